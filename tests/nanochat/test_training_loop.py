import subprocess
import sys
from dataclasses import asdict, dataclass

import pytest
import torch

from helpers import python_environment
from nanochat.training_loop import TrainLog, TrainMeter, TrainRecord, smoothed


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


def test_longer_records_survive_log_and_meter(tmp_path):
    """Prevents a loop with records of its own from losing its fields when it resumes, or failing on them."""
    meter = TrainMeter(torch.device("cpu"), 512, 1000, kind=LongerRecord)
    first = meter.record(0, 2.0, 0.5, 0.0, lr_multiplier=1.0, epoch=1, phase="warm")
    last = meter.last_record(1, 1, 1.25, phase="end")
    assert (first.loss, first.tokens_per_second, first.phase) == (2.0, 1024, "warm")
    assert (last.step, last.loss, last.val_bpb, last.phase) == (1, None, 1.25, "end")
    assert last.smooth_loss == pytest.approx(2.0)
    log = TrainLog(tmp_path, kind=LongerRecord)
    log.append(first)
    log.append(last)
    kept = TrainLog(tmp_path, kind=LongerRecord).keep_before(2)
    assert [type(record) for record in kept] == [LongerRecord] * 2
    assert [asdict(record) for record in kept] == [asdict(record) | {"replayed": True} for record in (first, last)]


def test_what_notebooks_share_brings_no_model_with_it():
    """Prevents every notebook that trains something from having to unroll this one's model, tokenizer and loader."""
    program = (
        "import sys, nanochat.parameters, nanochat.training_loop\n"
        "print(*sorted(name for name in sys.modules if name.startswith('nanochat.')))"
    )
    printed = subprocess.check_output([sys.executable, "-c", program], env=python_environment(), text=True)
    shared = "checkpoint_files parameters runtime stages training_loop".split()
    assert printed.split() == [f"nanochat.{name}" for name in shared]
