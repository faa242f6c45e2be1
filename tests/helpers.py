"""What several tests need: a small corpus of real English, a tokenizer trained on it, a plan for a tiny model."""

import ast
import os
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

import nbformat
import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.dataset import Corpus
from nanochat.planning import PretrainSettings, TrainingOptions, plan_pretraining
from nanochat.settings import PRESETS
from nanochat.tokenizer import RustBPETokenizer

EAGER = TrainingOptions(compile=False)
REPOSITORY = Path(__file__).resolve().parent.parent


def english_documents() -> list[str]:
    """The documentation topics of the running Python, about 80 texts of 100 to 30,000 characters."""
    source = (Path(sysconfig.get_paths()["stdlib"]) / "pydoc_data" / "topics.py").read_text(encoding="utf-8")
    topics = next(node.value for node in ast.parse(source).body if isinstance(node, ast.Assign))
    return list(ast.literal_eval(topics).values())


def write_parquet(path, texts: list[str], row_group_size: int = 4) -> str:
    pq.write_table(pa.table({"text": texts}), path, row_group_size=row_group_size)
    return str(path)


def small_corpus(folder) -> Corpus:
    """Two training shards and one for validation."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    texts = english_documents()
    middle = len(texts) // 2
    train = (
        write_parquet(folder / "shard_0.parquet", texts[20:middle]),
        write_parquet(folder / "shard_1.parquet", texts[middle:]),
    )
    return Corpus("small", train, write_parquet(folder / "shard_2.parquet", texts[:20], row_group_size=2))


def small_tokenizer(vocab_size: int = 512) -> RustBPETokenizer:
    return RustBPETokenizer.train_from_iterator(iter(english_documents()), vocab_size)


def small_plan(**changes):
    """A two-layer model of width 64 that trains twelve steps of 512 tokens."""
    values = PRESETS["cpu"] | dict(
        depth=2, aspect_ratio=32, head_dim=32, max_seq_len=64, window_pattern="SL", device_batch_size=4,
        total_batch_size=512, num_iterations=12, eval_every=5, eval_tokens=512, sample_every=-1, save_every=4,
        model_tag="",
    ) | changes  # fmt: skip
    names = PretrainSettings.__dataclass_fields__
    return plan_pretraining(PretrainSettings(**{name: values[name] for name in names}), 512)


def python_environment(**variables) -> dict[str, str]:
    """The environment for a subprocess that imports the chapters."""
    paths = os.pathsep.join([str(REPOSITORY / "nb_src"), str(REPOSITORY / "tests")])
    return {**os.environ, "PYTHONPATH": paths, **{name: str(value) for name, value in variables.items()}}


def run_notebook(notebook, parameters: dict, output, **variables) -> subprocess.CompletedProcess:
    """Run a notebook file in its own folder, with nothing of the repository on the path."""
    arguments = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
    environment = python_environment(OMP_NUM_THREADS=1, **variables)
    del environment["PYTHONPATH"]
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "tools" / "nb_convert.py"), "run", str(notebook), *arguments, "-o", output],
        env=environment, cwd=notebook.parent, text=True, timeout=300, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def texts_and_images(path) -> tuple[str, int]:
    """All text that the cells of an executed notebook printed or displayed, and the number of pictures."""
    outputs = [output for cell in nbformat.read(path, 4).cells for output in cell.get("outputs", [])]
    data = [output["data"] for output in outputs if "data" in output]
    texts = [output.get("text", "") for output in outputs] + [str(item) for item in data]
    return "\n".join(texts), sum("image/png" in item for item in data)


def start_ranks(program: str, *arguments, world_size: int = 2, **options) -> list[subprocess.Popen]:
    """Start a program as the ranks of one gloo group on this machine; options are Popen's."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = dict(OMP_NUM_THREADS=1, WORLD_SIZE=world_size, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    return [
        subprocess.Popen(
            [sys.executable, "-c", program, *map(str, arguments)], stdout=subprocess.PIPE, text=True,
            env=python_environment(RANK=rank, LOCAL_RANK=rank, **group), **options,
        )
        for rank in range(world_size)
    ]  # fmt: skip


def run_ranks(program: str, *arguments, world_size: int = 2) -> list[str]:
    """Run a program as the ranks of one gloo group on this machine; what each of them printed."""
    ranks = start_ranks(program, *arguments, world_size=world_size)
    return [rank.communicate(timeout=120)[0].strip() for rank in ranks]


PYTHON = sys.executable
