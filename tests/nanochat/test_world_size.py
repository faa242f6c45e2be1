"""One process or many, and another number tomorrow: the same rows, the same losses. When one dies, all end."""

import json
import os
import re
import signal
import subprocess
import time
import zlib

import pytest
import torch

from helpers import (
    EAGER,
    PYTHON,
    english_documents,
    python_environment,
    run_ranks,
    small_plan,
    small_tokenizer,
    start_ranks,
    write_parquet,
)
from nanochat import base_train
from nanochat.checkpoint_files import find_last_step
from nanochat.dataset import Corpus
from nanochat.runtime import get_dist_info
from nanochat.tokenizer import RustBPETokenizer

HERE = os.path.dirname(__file__)
STEPS, ROWS = 50, 16  # of the run, of a step
# With the higher rates of the cpu preset, rounding grows to a hundredth of the loss on the way.
CALM = dict(matrix_lr=0.2, embedding_lr=1.0, unembedding_lr=0.02, scalar_lr=0.5, warmup_ratio=0.2)
pytestmark = pytest.mark.usefixtures("one_thread")


def train(world, name, device_batch_size=4, stop_after=None, die_after=None) -> dict:
    """Train, or go on, in the folder `name` of `world`: the losses by step, and a checksum of each row in its order.

    Three layers: their matrices divide neither over two nor over four processes. stop_after: the step after which
    rank 0 is asked to stop; die_after: the one after which rank 1 is killed.
    """
    rank, rows, losses = get_dist_info()[1], [], {}
    os.environ["NANOCHAT_BASE_DIR"] = str(world / name)
    tokenizer = RustBPETokenizer.from_directory(world / "tokenizer")
    plan = small_plan(
        depth=3, aspect_ratio=10, max_seq_len=32, total_batch_size=32 * ROWS, device_batch_size=device_batch_size,
        num_iterations=STEPS, eval_every=-1, save_every=20, **CALM,
    )  # fmt: skip
    build = base_train.build_for_training

    def note(_, arguments):
        if torch.is_grad_enabled():
            rows.extend(zlib.crc32(row.numpy().tobytes()) for row in arguments[0])

    def build_watched(*arguments):
        model = build(*arguments)
        model.register_forward_pre_hook(note)
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base_train, "build_for_training", build_watched)
        patch.setattr(base_train, "sample_text", lambda *arguments: ())
        files = [str(world / f"shard_{number}.parquet") for number in range(3)]
        corpus = Corpus("lines", tuple(files[:2]), files[2])
        try:
            for record in base_train.pretrain(plan, corpus, tokenizer, torch.device("cpu"), torch.float32, EAGER):
                if record.loss is not None and not record.replayed:
                    losses[record.step] = record.loss
                if record.step == stop_after and rank == 0:
                    signal.raise_signal(signal.SIGINT)
                if record.step == die_after and rank == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
        except KeyboardInterrupt:
            assert stop_after is not None
    return {"losses": losses, "rows": rows}


RANK = """
import json, sys
from pathlib import Path
sys.path.append(sys.argv[1])
from nanochat.runtime import compute_cleanup, compute_init, show_user_errors_plainly
from test_world_size import train
show_user_errors_plainly()
compute_init("cpu")
found = [train(Path(sys.argv[2]), **options) for options in json.loads(sys.argv[3])]
print("FOUND" + json.dumps(found))
compute_cleanup()
"""


def train_together(world, world_size, *trainings) -> list[dict]:
    """The trainings, one after the other, by so many processes: losses, and the rows of all in the order of the run."""
    printed = run_ranks(RANK, HERE, world, json.dumps(trainings), world_size=world_size)
    found = []
    for ranks in zip(*(json.loads(output.split("FOUND")[1]) for output in printed), strict=True):
        losses = {int(step): loss for step, loss in ranks[0]["losses"].items()}
        rows = [row for together in zip(*(rank["rows"] for rank in ranks), strict=True) for row in together]
        found.append({"losses": losses, "rows": rows})
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    lines = [line for text in english_documents() for line in text.splitlines() if len(line) > 60]
    for number in range(3):  # a row holds one line or two, and an epoch is longer than the run
        write_parquet(folder / f"shard_{number}.parquet", lines[number::3], row_group_size=32)
    small_tokenizer().save(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def runs(world, one_thread):
    """By number of processes an uninterrupted training, and the parts of one that went from 1 to 2 to 4 to 1."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", "")  # `train` sets it
        whole, parts = {1: train(world, "one")}, [train(world, "moved", stop_after=12)]
        for world_size, device_batch_size, stop_after in ((2, 4, 26), (4, 2, 40)):
            sizes = {"device_batch_size": device_batch_size}
            whole[world_size], part = train_together(
                world, world_size, {"name": str(world_size), **sizes},
                {"name": "moved", **sizes, "stop_after": stop_after},
            )  # fmt: skip
            parts.append(part)
        return whole, [*parts, train(world, "moved")]


@pytest.mark.parametrize("world_size", [2, 4])
def test_several_processes_train_as_one_does(runs, world_size):
    """Prevents gradients that are averaged wrongly, matrices without an owner, and rows that nobody or two see."""
    one, several = runs[0][1], runs[0][world_size]
    assert len(one["rows"]) == STEPS * ROWS and len(set(one["rows"])) > 0.9 * STEPS * ROWS
    assert several["rows"] == one["rows"]
    assert list(several["losses"]) == list(one["losses"]) == list(range(STEPS))
    assert one["losses"][STEPS - 1] < one["losses"][0] - 1, "and learn enough for a mistake to show"
    assert several["losses"] == pytest.approx(one["losses"], rel=1e-4)


def test_the_number_of_processes_may_change_on_the_way(runs):
    """Prevents documents that are skipped or seen twice, and momenta that are lost, when a run moves to more GPUs."""
    whole, parts = runs
    assert [(min(part["losses"]), max(part["losses"])) for part in parts] == [(0, 13), (14, 27), (28, 41), (42, 49)]
    assert [row for part in parts for row in part["rows"]] == whole[1]["rows"]
    losses = {step: loss for part in parts for step, loss in part["losses"].items()}
    assert losses == pytest.approx(whole[1]["losses"], rel=1e-4)


def test_a_killed_process_ends_all_and_the_run_goes_on(world, runs):
    """Prevents processes that wait for a dead one for hours, in silence or with pages of noise, and its work lost."""
    program, how = world / "program.py", {"name": "killed"}
    program.write_text(RANK)
    torchrun = [PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", program]
    log = world / "killed" / "base_checkpoints" / "d3" / "train_log.jsonl"  # written to before each step ends
    done = subprocess.run(
        [*torchrun, HERE, world, json.dumps([how | {"die_after": 23}])], env=python_environment(OMP_NUM_THREADS=1),
        text=True, timeout=90, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 1 and re.search(r"rank +: 1 .*\n.*exitcode +: -9 .*SIGKILL", done.stdout), done.stdout
    assert time.time() - log.stat().st_mtime < 30, "not after half a minute, when the launcher loses its patience"
    assert find_last_step(log.parent) == 20

    ranks = start_ranks(RANK, HERE, world, json.dumps([how | {"die_after": 30}]), stderr=subprocess.PIPE)
    outputs = [rank.communicate(timeout=90) for rank in ranks]  # without an agent that ends what is left
    assert time.time() - log.stat().st_mtime < 30
    assert [rank.returncode for rank in ranks] == [1, -signal.SIGKILL]
    assert "d3: going on from step 20" in outputs[0][0]
    assert outputs[0][1].count("✗ rank 0 lost another process and ends too (Connection ") == 1
    assert "Traceback" not in outputs[0][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", "")
        rest = train(world, "killed")["losses"]
    whole = runs[0][1]["losses"]
    assert rest == pytest.approx({step: whole[step] for step in range(20, STEPS)}, rel=1e-4)
