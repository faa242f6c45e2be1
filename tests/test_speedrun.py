"""The notebook and the script as people use them: alone in a folder, twice, on two processes, with wrong input."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import torch

import nb_convert
from helpers import (
    REPOSITORY,
    english_documents,
    python_environment,
    run_notebook,
    small_corpus,
    texts_and_images,
)
from nanochat.checkpoint_manager import load_model
from nanochat.runtime import UserError
from nanochat.settings import CHAT_TASK_NAMES
from nanochat.tokenizer import RustBPETokenizer

SPINE = REPOSITORY / "nb_src" / "nanochat_speedrun.py"
NOTEBOOK = REPOSITORY / "notebooks" / "nanochat_speedrun.ipynb"
TINY = dict(
    preset="cpu", vocab_size=512, depth=2, aspect_ratio=32, head_dim=32, max_seq_len=64, device_batch_size=4,
    total_batch_size=512, num_iterations=6, eval_every=3, eval_tokens=512, eval_split_tokens=512, save_every=2,
    torch_compile=False, task_source="offline", core_max_per_task=12, sft_num_iterations=6, sft_eval_every=3,
    sft_eval_tokens=512, sft_total_batch_size=512, simple_spelling_size=200, spelling_bee_size=100, max_problems=6,
    base_max_problems=4, chat_max_new_tokens=16,
)  # fmt: skip


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    small_corpus(folder)
    return folder


def script(base_dir, text_folder, launcher=(sys.executable,), program=SPINE, PYTHONPATH=None, **changes):
    """Run the spine, or another program, to its end; the finished process, output and errors together."""
    parameters = TINY | {"data_source": text_folder, "base_dir": base_dir} | changes
    arguments = [f"--{name}={value}" for name, value in parameters.items()]
    environment = python_environment(OMP_NUM_THREADS=1, NANOCHAT_DTYPE="float32")
    if PYTHONPATH is not None:
        environment["PYTHONPATH"] = PYTHONPATH
    return subprocess.run(
        [*launcher, str(program), *arguments], env=environment, text=True, timeout=300,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def papermill(base_dir, text_folder, notebook, output, **changes):
    parameters = TINY | {"data_source": str(text_folder), "base_dir": str(base_dir)} | changes
    return run_notebook(notebook, parameters, output)


@pytest.fixture(scope="module")
def executed(tmp_path_factory, text_folder):
    """The notebook file alone in an empty folder, run to its end."""
    folder = tmp_path_factory.mktemp("alone")
    notebook = folder / NOTEBOOK.name
    shutil.copy(NOTEBOOK, notebook)
    process = papermill(folder / "base", text_folder, notebook, folder / "executed.ipynb")
    assert process.returncode == 0, process.stdout
    return folder


def test_the_file_alone_runs_to_the_end(executed):
    """Prevents a notebook that only works inside the repository."""
    text, images = texts_and_images(executed / "executed.ipynb")
    assert images == 9  # windows, schedules, packing, training, bits per byte, CORE, conversations, fine-tuning, marks
    assert "this run" in text and "same bytes bpb" in text and "greedy" in text
    assert "Evaluating: " in text and "What fine-tuning taught it most" in text and "ChatCORE" in text
    assert "The chat runs while" in text and "Dry run: nothing was sent" in text and "why is the sky" in text.lower()
    report = executed / "base" / "report"
    page = (report / "report.md").read_text()
    for title in (
        "Tokenizer training", "Tokenizer evaluation", "Base model training", "Base model evaluation", "CORE", "SFT",
        "Chat evaluation sft",
    ):  # fmt: skip
        assert f"## {title}\n" in page
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", page):
        assert (report / picture).stat().st_size > 5000
    metrics = json.loads((report / "metrics.json").read_text())
    assert 1 < metrics["Base model evaluation"]["val bpb"] < 6
    assert metrics["Base model training"]["Calculated number of iterations"] == 6
    assert (report / "report.html").stat().st_size > 100_000, "its pictures are in it"
    assert metrics["Provenance"]["source hash"] == nb_convert.source_stamp(
        nb_convert.read_project(REPOSITORY), "nanochat_speedrun"
    )
    assert set(metrics["Run"]["wall seconds by stage"]) >= {"Base model training", "SFT", "Chat evaluation sft"}
    assert metrics["Chat samples"]["samples"][-1]["question"] == "Why is the sky blue?"
    assert metrics["SFT"]["Number of iterations"] == 6 and -1 < metrics["CORE"]["CORE offline"] < 1
    assert set(CHAT_TASK_NAMES) - set(metrics["Chat evaluation sft"]) <= {"HumanEval"}  # where nothing confines it


LOGITS_OF_THE_EXPORT = """
import sys, safetensors.torch, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
asked = [{"role": "user", "content": "Why is the sky <|bos|> blue?"}]
ids = torch.tensor([tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32)
with torch.no_grad():
    safetensors.torch.save_file({"ids": ids, "logits": model(ids).logits}, sys.argv[2])
"""


def test_what_was_exported_says_the_same(executed, tmp_path, monkeypatch):
    """A folder for transformers that loads and is another model."""
    folder, result = executed / "base" / "export" / "d2", tmp_path / "result.safetensors"
    environment = python_environment(HF_HOME=tmp_path, HF_HUB_OFFLINE=1, OMP_NUM_THREADS=1) | {"PYTHONPATH": ""}
    subprocess.run([sys.executable, "-c", LOGITS_OF_THE_EXPORT, folder, result], env=environment, check=True)
    theirs = safetensors.torch.load_file(result)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(executed / "base"))
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    model, tokenizer, _ = load_model("sft", torch.device("cpu"), "train", model_tag="d2")
    asked = [{"role": "user", "content": "Why is the sky <|bos|> blue?"}, {"role": "assistant", "content": ""}]
    assert theirs["ids"].tolist() == [tokenizer.render_for_completion({"messages": asked})]
    with torch.no_grad():
        assert (theirs["logits"] - model(theirs["ids"])).abs().max() < 1e-4


def test_again_skips_and_depth_redoes_what_depends_on_it(executed, text_folder):
    """Prevents "Run all" from repeating finished work, and a changed depth from keeping or repeating too much."""
    notebook = executed / NOTEBOOK.name
    process = papermill(executed / "base", text_folder, notebook, executed / "again.ipynb")
    assert process.returncode == 0, process.stdout
    text, images = texts_and_images(executed / "again.ipynb")
    assert len(re.findall(r"nothing to do\b", text)) >= 3 + 1 + 1 + 10 + 1 and images == 9
    assert "Evaluating: " not in text and "accuracy: " not in text, "no exam is taken twice"
    changes = dict(depth=3, skip="core, sft, chat_eval, export, chat")
    process = papermill(executed / "base", text_folder, notebook, executed / "deeper.ipynb", **changes)
    assert process.returncode == 0, process.stdout
    text, _ = texts_and_images(executed / "deeper.ipynb")
    assert len(re.findall(r"nothing to do\b", text)) == 1 and "tokenizer: trained earlier, nothing to do" in text
    assert sorted(path.name for path in (executed / "base" / "base_checkpoints").iterdir()) == ["d2", "d3"]
    metrics = json.loads((executed / "base" / "report" / "metrics.json").read_text())
    assert metrics["Base model training"]["model config"]["n_layer"] == 3
    process = papermill(executed / "base", text_folder, notebook, executed / "back.ipynb", **changes | dict(depth=2))
    assert process.returncode == 0, process.stdout
    metrics = json.loads((executed / "base" / "report" / "metrics.json").read_text())
    assert metrics["Base model training"]["model config"]["n_layer"] == 2, "the page is about the model at hand"
    assert text.count("left out, as asked") == 5 and "upload: left out, because the export was" in text
    assert not (executed / "base" / "chatsft_checkpoints" / "d3").exists()


def test_the_flat_script_runs_alone(tmp_path, text_folder):
    """Prevents a flat script that compiles and then misses a definition, an import or its parameters."""
    flat = tmp_path / "train_gpt.py"
    convert = [sys.executable, str(REPOSITORY / "tools" / "nb_convert.py"), "script", "nanochat_speedrun", "-o", flat]
    subprocess.run(convert, check=True, stdout=subprocess.PIPE)
    process = script(tmp_path / "base", text_folder, program=flat, num_iterations=2, PYTHONPATH="")
    assert process.returncode == 0 and "same bytes bpb" in process.stdout, process.stdout


def losses(process) -> list[float]:
    """Those of pretraining, then those of fine-tuning."""
    assert process.returncode == 0, process.stdout
    return [float(loss) for loss in re.findall(r"^step \d+/\d+ .*?loss: ([\d.]+)", process.stdout, re.M)]


def marks(process) -> list[str]:
    """What CORE and the exams print as results, without the times."""
    lines = re.findall(r"^(?:Evaluating: .* centered: \S+|\S+ accuracy: \S+ \(\d+/\d+)", process.stdout, re.M)
    return [" ".join(line.split()) for line in lines]


def test_two_processes_train_the_same_model(tmp_path, text_folder):
    """Prevents a distributed run that sees other data, averages wrongly or keeps the whole optimizer everywhere."""
    changes = dict(matrix_lr=0.3, embedding_lr=3.0, unembedding_lr=0.05)  # far enough from zero for errors to show
    alone = script(tmp_path / "one", text_folder, **changes)
    one = losses(alone)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    process = script(tmp_path / "two", text_folder, torchrun, device_batch_size=2, **changes)
    two = losses(process)
    assert len(one) == 6 + 6 and one[5] < one[0] and one[11] < one[6]
    assert two[:6] == pytest.approx(one[:6], rel=2e-4)
    assert two[6:] == pytest.approx(one[6:], rel=1e-3), (
        "fine-tuning starts from weights that have drifted apart already"
    )
    assert len(marks(alone)) > 14 and [mark.split()[:2] for mark in marks(alone)] == [
        mark.split()[:2] for mark in marks(process)
    ]
    assert process.stdout.count("Distributed world size: 2") == 1, "only rank 0 may print"
    stamp = nb_convert.source_stamp(nb_convert.read_project(REPOSITORY), "nanochat_speedrun")
    for base in ("one", "two"):
        metrics = json.loads((tmp_path / base / "report" / "metrics.json").read_text())
        assert metrics["Provenance"]["source hash"] == stamp, "a script is the same code as its notebook"
    folder = tmp_path / "two" / "base_checkpoints" / "d2"
    shares = [(folder / f"optim_000006_rank{rank}.pt").stat().st_size for rank in (0, 1)]
    whole = (tmp_path / "one" / "base_checkpoints" / "d2" / "optim_000006_rank0.pt").stat().st_size
    assert all(share < 0.65 * whole for share in shares)


def trained_losses(base) -> list[float]:
    """Those of pretraining, then those of fine-tuning, as the checkpoints have them."""
    logs = [base / f"{kind}_checkpoints" / "d2" / "train_log.jsonl" for kind in ("base", "chatsft")]
    records = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    return [record["loss"] for record in records if record["loss"] is not None]


def test_a_notebook_trains_in_two_processes(tmp_path, text_folder):
    """Prevents a notebook that leaves GPUs idle, or trains another model on several than on one."""
    changes = dict(matrix_lr=0.3, embedding_lr=3.0, unembedding_lr=0.05, device_batch_size=2)
    changes |= dict(skip="core,chat_eval,export,chat", processes=2)
    assert script(tmp_path / "one", text_folder, **changes | dict(processes=1)).returncode == 0
    notebook, base = tmp_path / NOTEBOOK.name, tmp_path / "base"
    shutil.copy(NOTEBOOK, notebook)
    parameters = TINY | changes | {"data_source": str(text_folder), "base_dir": str(base)}
    for output in ("executed.ipynb", "again.ipynb"):
        process = run_notebook(notebook, parameters, tmp_path / output, NANOCHAT_DTYPE="float32")
        assert process.returncode == 0, process.stdout
        text, images = texts_and_images(tmp_path / output)
        assert images == 7, "windows, schedules, packing, training, bits per byte, conversations, fine-tuning"
        started = [f"{name}: starting 2 processes" in text for name in ("pretrain", "finetune")]
        assert started == [output == "executed.ipynb"] * 2, "what is finished starts nothing"
    assert "512 tokens: 2 × 2 sequences × 64 on 2 processes" in text
    one, two = trained_losses(tmp_path / "one"), trained_losses(base)
    assert len(one) == 6 + 6
    assert two[:6] == pytest.approx(one[:6], rel=2e-4) and two[6:] == pytest.approx(one[6:], rel=1e-3)
    metrics = [json.loads((folder / "report" / "metrics.json").read_text()) for folder in (tmp_path / "one", base)]
    for stage, bpb in (("Base model training", "Final validation bpb"), ("SFT", "Final validation bpb")):
        assert metrics[0][stage][bpb] == pytest.approx(metrics[1][stage][bpb], rel=1e-3)
        assert metrics[0][stage]["DDP world size"] == 1 and metrics[1][stage]["DDP world size"] == 2
    printed = (base / "launch" / "pretrain-0.log").read_text()
    assert "Distributed world size: 2" in printed and not (base / "launch" / "pretrain-1.log").read_text()


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(detph=4), "there is no parameter 'detph'; did you mean 'depth'?"),
        (dict(depth="four"), "depth is 'four'; it must be of type int"),
        (
            dict(total_batch_size=500),
            "total_batch_size 500 is not a multiple of 4 sequences × 64 tokens × 1 process = 256",
        ),
        (dict(preset="a1000"), "preset is 'a1000'; it can be auto, "),
        (dict(window_pattern="XL"), "window_pattern is 'XL'"),
        (dict(device_type="cuda"), "device_type is cuda but torch"),
        (dict(data_source="{empty}"), "{empty}"),
        (dict(data_source="{one}"), "two are needed"),
        (dict(data_source="{cut}"), "shard_1.parquet"),
        (dict(data_source="{flipped}"), "shard_0.parquet"),
        (dict(text_column="body"), 'has no column "body" (it has: text)'),
        (dict(vocab_size=100), "vocab_size"),
        (dict(base_dir="{file}/base"), "cannot be created"),
        (dict(sft_total_batch_size=300), "sft_total_batch_size 300 is not a multiple of 1 sequence ×"),
        (dict(chat_tasks="GSM8K|MLMU"), "chat_tasks has 'MLMU'; it can have ARC-Easy, "),
        (dict(skip="core,pretrain"), "skip has 'pretrain'; stages that can be left out are core, sft, chat_eval, "),
        (dict(hub_repo="my model"), "hub_repo is 'my model', which is no name for a repository"),
        (dict(task_source="disk"), "task_source is 'disk'; it can be hub, offline or empty."),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value.items())).__repr__(),
)
def test_wrong_input_is_one_sentence(changes, sentence, tmp_path, text_folder):
    """Prevents a traceback, or an hour of work, before someone hears what was wrong."""
    places = {name: tmp_path / name for name in ("empty", "one", "cut", "flipped", "file")}
    places["empty"].mkdir()
    places["file"].write_text("")
    for name in ("one", "cut", "flipped"):
        small_corpus(places[name])
    for path in list(places["one"].glob("*.parquet"))[1:]:
        path.unlink()
    shard = places["cut"] / "shard_1.parquet"
    shard.write_bytes(shard.read_bytes()[:-100])
    shard = places["flipped"] / "shard_0.parquet"
    damaged = bytearray(shard.read_bytes())
    damaged[2000:2040] = bytes(byte ^ 0x55 for byte in damaged[2000:2040])
    shard.write_bytes(bytes(damaged))
    changes = {key: value.format(**places) if isinstance(value, str) else value for key, value in changes.items()}
    process = script(**{"base_dir": tmp_path / "base", "text_folder": text_folder} | changes)
    assert process.returncode == 1
    complaint = process.stdout.strip().splitlines()[-1]
    assert complaint.startswith("✗ ") and sentence.format(**places) in complaint
    assert "Traceback" not in process.stdout and "step 0" not in process.stdout


def test_a_second_run_in_the_same_folder_is_refused(tmp_path, text_folder):
    """Prevents two runs from overwriting each other's checkpoints."""
    hold = "import nanochat.runtime as r\nlock = r.lock_base_dir()\nprint('held', flush=True)\ninput()"
    holder = subprocess.Popen(
        [sys.executable, "-c", hold],
        env=python_environment(NANOCHAT_BASE_DIR=tmp_path), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout.readline() == "held\n"
    process = script(tmp_path, text_folder)
    assert process.returncode == 1 and "another run is using" in process.stdout.splitlines()[-1]
    holder.communicate("\n")


def test_a_tokenizer_that_does_not_fit_is_refused(executed, tmp_path, monkeypatch):
    """Prevents a model from being fed another tokenizer's numbers, which fails silently."""
    shutil.copytree(executed / "base" / "base_checkpoints", tmp_path / "base_checkpoints")
    RustBPETokenizer.train_from_iterator(iter(english_documents()[:60]), 512).save(tmp_path / "tokenizer")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with pytest.raises(UserError, match="tokenizer"):
        load_model("base", torch.device("cpu"), "eval", model_tag="d2")


def test_a_full_disk_is_said_before_training(tmp_path, monkeypatch):
    """Prevents a run that fails at its first checkpoint for want of space."""
    from nanochat import runtime

    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(runtime.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    with pytest.raises(runtime.UserError, match="needs about 2.0 GB .* 0.0 GB are free"):
        runtime.require_free_space(2e9, "training d4")
