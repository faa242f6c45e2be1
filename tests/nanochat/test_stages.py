import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import run_ranks
from nanochat.stages import fingerprint_of, finish_stage, finished_stage, plain_json, what_changed


@pytest.fixture(autouse=True)
def base_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return tmp_path / "base"


def test_results_come_back_for_the_same_inputs_only():
    """A stage skipped although its inputs changed would silently train on the old tokenizer."""
    finish_stage("tokenizer", {"vocab_size": 4096, "corpus": "abc"}, {"train_time": 1.5})
    assert finished_stage("tokenizer", {"corpus": "abc", "vocab_size": 4096}) == {"train_time": 1.5}
    assert finished_stage("tokenizer", {"corpus": "abc", "vocab_size": 8192}) is None
    assert finished_stage("tokenizer", {"corpus": "abc"}) is None
    assert finished_stage("pretrain", {"corpus": "abc", "vocab_size": 4096}) is None


@pytest.mark.parametrize("damage", ["delete", "truncate"])
def test_missing_or_changed_files_undo_a_stage(base_dir, damage):
    """A record that outlives its files would send later stages to a checkpoint that is not there."""
    file = base_dir / "tokenizer" / "tokenizer.json"
    file.parent.mkdir(parents=True)
    file.write_text("0123456789")
    finish_stage("tokenizer", {"a": 1}, {}, files=[file])
    assert finished_stage("tokenizer", {"a": 1}) == {}
    if damage == "delete":
        file.unlink()
        expected = "tokenizer.json is missing"
    else:
        file.write_text("0123")
        expected = "tokenizer.json has 4 bytes instead of 10"
    assert finished_stage("tokenizer", {"a": 1}) is None
    assert what_changed("tokenizer", {"a": 1}) == expected


def test_a_moved_base_directory_still_counts(base_dir, tmp_path, monkeypatch):
    """Absolute paths in the record would redo hours of work after copying the directory to another machine."""
    base_dir.mkdir()
    (base_dir / "x.bin").write_bytes(b"abc")
    finish_stage("stage", {"a": 1}, {"r": 2}, files=[base_dir / "x.bin"])
    base_dir.rename(tmp_path / "elsewhere")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "elsewhere"))
    assert finished_stage("stage", {"a": 1}) == {"r": 2}


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"fingerprint": "x"}', "null"])
def test_an_unreadable_record_means_not_finished(base_dir, content):
    """A damaged record must cost one stage, not stop the whole run with a parser's message."""
    (base_dir / "stages").mkdir(parents=True)
    (base_dir / "stages" / "stage.json").write_text(content)
    assert finished_stage("stage", {"a": 1}) is None
    assert what_changed("stage", {"a": 1}) == ""


def test_what_changed_names_inputs_and_both_values():
    """ "Redone" without a reason leaves the reader to guess which of thirty parameters it was."""
    old = {"vocab_size": 4096, "corpus": {"name": "fineweb", "shards": 4}, "gone": True, "same": [1, 2]}
    finish_stage("tokenizer", old, {})
    new = {"vocab_size": 8192, "corpus": {"name": "fineweb", "shards": 8}, "fresh": "x" * 100, "same": (1, 2)}
    words = what_changed("tokenizer", new)
    assert "vocab_size changed from 4096 to 8192" in words
    assert "corpus.shards changed from 4 to 8" in words
    assert "gone is gone (it was true)" in words
    assert 'fresh is new ("xxx' in words and "x" * 30 not in words
    assert "same" not in words and "name" not in words
    assert what_changed("tokenizer", old) == ""


def test_fingerprint_ignores_order_and_nothing_else():
    """A fingerprint that depended on dict order would redo every stage; one that missed a value would skip wrongly."""
    assert fingerprint_of({"a": 1, "b": [1, 2]}) == fingerprint_of({"b": (1, 2), "a": 1})
    different = [{"a": 1}, {"a": 1.5}, {"a": "1"}, {"a": None}, {"a": True}, {"a": [1]}, {"b": 1}, {"a": {"a": 1}}, {}]
    assert len({fingerprint_of(inputs) for inputs in different}) == len(different)


def test_records_are_json_that_every_reader_accepts(base_dir):
    """Python's Infinity and NaN are not JSON; other tools refuse the whole file."""
    results = {"loss": math.nan, "tensor": torch.tensor(2.5), "n": np.int64(3), "path": Path("x"), "flag": True}
    finish_stage("s", {"a": math.inf}, results)
    record = json.loads((base_dir / "stages" / "s.json").read_text(), parse_constant=pytest.fail)
    assert record["results"] == {"loss": None, "tensor": 2.5, "n": 3, "path": "x", "flag": True}


def test_what_is_not_json_is_refused():
    """An object written as its repr would make a fingerprint that changes with every process."""
    with pytest.raises(TypeError, match="cannot be saved as JSON"):
        plain_json({"a": object()})


def test_only_rank_0_writes(base_dir, monkeypatch):
    """Several ranks writing one record would also record files that other ranks have not finished."""
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    finish_stage("s", {}, {})
    assert not (base_dir / "stages").exists()


STAGE_RANK_PROGRAM = """
import os, sys
import torch.distributed as dist
from nanochat.stages import finished_stage
dist.init_process_group("gloo")
if dist.get_rank() == 1:  # a rank that sees another disk must still hear what rank 0 saw
    os.environ["NANOCHAT_BASE_DIR"] = sys.argv[1]
print(finished_stage("s", {"a": 1}), finished_stage("s", {"a": 2}))
"""


def test_all_ranks_take_the_decision_of_rank_0(base_dir, tmp_path):
    """One rank that skips a stage while another runs it is a deadlock at the next collective."""
    finish_stage("s", {"a": 1}, {"bpb": 1.25})
    assert run_ranks(STAGE_RANK_PROGRAM, tmp_path / "other") == ["{'bpb': 1.25} None"] * 2
