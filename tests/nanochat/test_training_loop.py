import subprocess
import sys
from dataclasses import asdict, dataclass, replace

import pytest
import torch

from helpers import python_environment, run_ranks
from nanochat.training_loop import TrainLog, TrainMeter, TrainRecord, smoothed, summarize_training


@dataclass(frozen=True)
class LongerRecord(TrainRecord):
    """The record of a loop that has more to tell."""

    phase: str = ""


def test_log_survives_a_torn_line(tmp_path):
    """Prevents a kill in the middle of a log line from losing the whole curve."""
    log = TrainLog(tmp_path)
    record = TrainRecord(0, 1.0, 1.0, 1.0, 0.1, 10.0, None, 1, 0.0, None, 1.0)
    log.append(record)
    with open(log.path, "a") as file:
        file.write('{"step": 1, "lo')
    kept = log.keep_before(5)
    assert [r.step for r in kept] == [0] and kept[0].replayed
    assert len(log.path.read_text().splitlines()) == 1


def test_smoothed_of_nothing():
    """Prevents a division by zero in a run of no steps."""
    assert smoothed(0.0, 0) is None and smoothed(0.1, 1) == pytest.approx(1.0)


def test_longer_records_survive_the_log(tmp_path):
    """Prevents a loop with records of its own from losing its fields when it resumes, or failing on them."""
    record = LongerRecord(0, 1.0, 1.0, 1.0, 0.1, 10.0, None, 1, 0.0, None, 1.0, phase="warm")
    TrainLog(tmp_path, kind=LongerRecord).append(record)
    (kept,) = TrainLog(tmp_path, kind=LongerRecord).keep_before(2)
    assert isinstance(kept, LongerRecord) and asdict(kept) == asdict(record) | {"replayed": True}


def test_meter_counts_no_step_that_compiles():
    """Prevents the seconds of the compiler from standing in the training time."""
    meter = TrainMeter(torch.device("cpu"), 512, 1000)
    records = [meter.record(step, 2.0, 0.5, step / 20, lr_multiplier=1.0, epoch=1) for step in range(13)]
    assert records[10].total_seconds == 0 and records[12].total_seconds == pytest.approx(1.0)
    last = meter.last_record(13, 1, 1.25)
    assert (last.step, last.loss, last.val_bpb, last.tokens_per_second) == (13, None, 1.25, 0.0)


def test_the_summary_tells_the_memory_of_who_trained():
    """Prevents a notebook whose training ran in other processes, or earlier, from reporting its own idle memory."""
    meter = TrainMeter(torch.device("cpu"), 512, 1000)
    records = [meter.record(0, 2.0, 0.5, 0.0, lr_multiplier=1.0, epoch=1), meter.last_record(1, 1, 1.25)]
    assert "Peak memory usage" not in summarize_training(records)
    records[-1] = replace(records[-1], peak_memory_bytes=3 << 20)
    assert summarize_training(records)["Peak memory usage"] == "3.00MiB"


def test_what_notebooks_share_brings_no_model_with_it():
    """Prevents every notebook that trains something from having to unroll this one's model, tokenizer and loader."""
    program = (
        "import sys, nanochat.parameters, nanochat.training_loop\n"
        "print(*sorted(name for name in sys.modules if name.startswith('nanochat.')))"
    )
    printed = subprocess.check_output([sys.executable, "-c", program], env=python_environment(), text=True)
    shared = "checkpoint_files parameters runtime stages training_loop".split()
    assert printed.split() == [f"nanochat.{name}" for name in shared]


RESUMING = """
import shutil, sys, threading
from pathlib import Path
import torch
from nanochat import training_loop
from nanochat.checkpoint_files import save_checkpoint
from nanochat.runtime import UserError, compute_cleanup, compute_init

rank = compute_init("cpu")[1]
on_disk, late = Path(sys.argv[1]), Path(sys.argv[2])
save_checkpoint(on_disk, 7, {"w": torch.ones(2)}, None, {"fingerprint": "mine"}, rank)
if rank == 1:
    threading.Timer(0.7, shutil.copytree, (on_disk, late)).start()
print(training_loop.find_resumable((on_disk, late)[rank], "mine")[0])
training_loop.DISK_PATIENCE = 0.5
try:
    training_loop.find_resumable((on_disk, on_disk / "never")[rank], "mine")
except UserError as error:
    print(error)
compute_cleanup()
"""


def test_a_disk_that_lags_behind_does_not_part_the_processes(tmp_path):
    """Prevents one machine from going on at step 7 while another, which does not see that yet, begins at step 0."""
    printed = run_ranks(RESUMING, tmp_path / "d2", tmp_path / "late" / "d2")
    for output, name in zip(printed, ("d2", "never"), strict=True):
        step, sentence = output.splitlines()[-2:]
        assert step == "7"
        assert sentence.startswith(f"rank 1 does not see checkpoint {name}/7, which rank 0 goes on from.")
