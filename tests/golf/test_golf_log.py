"""The log: every line against its published shape, and read back by the linter that reads published logs."""

import re
from decimal import Decimal

import pytest
import torch

from golf.golf_data import GolfData
from golf.golf_gpt import GolfConfig, GolfGPT
from golf.golf_log import GolfLog, golf_header_lines, golf_record_lines
from golf.golf_settings import RECURRENT_PRESETS, SEQ4096_PRESETS
from golf.golf_train import GolfRecord
from golf.submission_linter import parse_training_log
from helpers import run_ranks

DATA = GolfData("fineweb10B_sp1024", "/secret/export", "/secret/export/fineweb_1024_bpe.model", 1024,
                ("/secret/a.bin", "/secret/b.bin"), ("/secret/v.bin",), {})  # fmt: skip
NUMBER = r"\d+(\.\d+)?"
HEADER_SHAPES = [
    r"Running Python 3\.\d+\.\S+",
    r"Running PyTorch \S+",
    r"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path=fineweb_1024_bpe\.model",
    r"train_loader:dataset:fineweb10B_sp1024 train_shards:2",
    r"val_loader:shards pattern=\S+ tokens:62021632",
    r"model_params:\d+",
    r"world_size:4 grad_accum_steps:2",
    r"sdp_backends:cudnn=(True|False) flash=(True|False) mem_efficient=(True|False) math=(True|False)",
    r"attention_mode:gqa num_heads:\d+ num_kv_heads:\d+",
    rf"tie_embeddings:True embed_lr:{NUMBER} head_lr:0\.0 matrix_lr:{NUMBER} scalar_lr:{NUMBER}",
    r"train_batch_tokens:\d+ train_seq_len:\d+ iterations:\d+ warmup_steps:\d+ max_wallclock_seconds:\d+\.\d{3}",
    r"seed:1337",
    r"settings: .*",
]
RECORDS = [
    GolfRecord(0, 0.0, 1.0, 0.85, val_loss=6.9357, val_bpb=4.1077),
    GolfRecord(1, 71.5, 1.0, 0.85, loss=6.93449),
    GolfRecord(2, 143.2, 1.0, 0.85),
    GolfRecord(
        3, 214.6, 0.5, 0.86, loss=6.5, val_loss=6.41234, val_bpb=3.81239, stopped_early=True, peak_mib=[7748, 8066]
    ),
]


def tiny_model():
    return GolfGPT(GolfConfig(vocab_size=61, model_dim=16, num_heads=2, num_kv_heads=1, num_layers=2, max_seq_len=16))


@pytest.mark.parametrize("params", [SEQ4096_PRESETS["record"], RECURRENT_PRESETS["h100"]])
def test_header_has_the_published_shapes(params):
    """A log that the scripts which read published logs pass over, or one that shows its author's folders."""
    lines = golf_header_lines(params, DATA, 62_021_632, tiny_model(), 4, 2)
    assert len(lines) == len(HEADER_SHAPES)
    for line, shape in zip(lines, HEADER_SHAPES, strict=True):
        assert re.fullmatch(shape, line), line
    assert not any("/secret" in line or "\n" in line for line in lines)


def test_header_is_read_back_with_every_setting():
    """Record A's log does not say which warmdown it had, and nobody can check it."""
    for params in (SEQ4096_PRESETS["record"], RECURRENT_PRESETS["h100"]):
        lines = golf_header_lines(params | {"base_dir": "/secret"}, DATA, 62_021_632, tiny_model(), 1, 8)
        log = parse_training_log("\n".join(lines).encode())
        assert (log.targets, log.seed, log.pytorch_version) == (62_021_632, 1337, torch.__version__)
        for name in ("warmdown_iters", "muon_momentum_warmup_start", "muon_momentum_warmup_steps", "grad_clip_norm"):
            assert float(log.settings[name]) == params[name]
        assert int(log.settings["model_params"]) == sum(p.numel() for p in tiny_model().parameters())
        assert "base_dir" not in log.settings


def test_untied_head_is_told():
    """A head of its own whose rate the log gives as 0, or the embedding's rate taken for the tied one's."""
    params = SEQ4096_PRESETS["record"] | {"tie_embeddings": 0}
    line = golf_header_lines(params, DATA, 1, tiny_model(), 1, 8)[9]
    assert line == "tie_embeddings:False embed_lr:0.6 head_lr:0.008 matrix_lr:0.02 scalar_lr:0.02"


def test_steps_have_the_published_shapes():
    """A step that is missing from the log, or logged though nothing was measured."""
    assert [line for record in RECORDS for line in golf_record_lines(record, 20_000, 2)] == [
        "warmup_step:1/2",
        "warmup_step:2/2",
        "step:0/20000 val_loss:6.9357 val_bpb:4.1077 train_time:0ms step_avg:0.00ms",
        "step:1/20000 train_loss:6.9345 train_time:72ms step_avg:71.50ms",
        "step:3/20000 train_loss:6.5000 train_time:215ms step_avg:71.53ms",
        "step:3/20000 val_loss:6.4123 val_bpb:3.8124 train_time:215ms step_avg:71.53ms",
        "stopping_early: wallclock_cap train_time:215ms step:3/20000",
        "peak memory allocated: 7748 MiB reserved: 8066 MiB",
    ]


def test_steps_are_read_back():
    """A linter that finds no steps in our own log."""
    log = parse_training_log("\n".join(line for r in RECORDS for line in golf_record_lines(r, 20_000, 20)).encode())
    assert log.validations == [(0, Decimal("6.9357"), Decimal("4.1077")), (3, Decimal("6.4123"), Decimal("3.8124"))]
    assert (log.steps, log.train_ms) == (3, 215) and log.result is None


def test_a_new_run_begins_a_new_file(tmp_path, capsys):
    """Two runs in one log, or lines of an earlier run printed again."""
    for _ in range(2):
        log = GolfLog(tmp_path / "run" / "train.log")
        log("first", "second")
        log("replayed", echo=False)
        log()
        assert (tmp_path / "run" / "train.log").read_text(encoding="utf-8") == "first\nsecond\nreplayed\n"
        assert capsys.readouterr().out == "first\nsecond\n"


def test_in_a_notebook_only_the_file_gets_the_lines(tmp_path, capsys, monkeypatch):
    """Twenty thousand lines below a chart that shows the same."""
    monkeypatch.setattr("golf.golf_log.in_notebook", lambda: True)
    GolfLog(tmp_path / "train.log")("a line")
    assert capsys.readouterr().out == "" and (tmp_path / "train.log").read_text() == "a line\n"


LOGGING_RANKS = """
import sys, torch.distributed as dist
from golf.golf_log import GolfLog
dist.init_process_group("gloo")
log = GolfLog(sys.argv[1])
dist.barrier()
log(f"rank {dist.get_rank()}", echo=False)
dist.destroy_process_group()
"""


def test_one_process_writes(tmp_path):
    """Every line as often as there are processes."""
    run_ranks(LOGGING_RANKS, tmp_path / "train.log")
    assert (tmp_path / "train.log").read_text() == "rank 0\n"
