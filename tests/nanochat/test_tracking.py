import json
import struct
import sys
import time
import types
from pathlib import Path

import pytest

from nanochat import tracking
from nanochat.runtime import UserError
from nanochat.tracking import (
    DummyWandb,
    WandbTracker,
    open_tracker,
    read_secret,
    stored_wandb_id,
    wandb_eval_record,
    wandb_train_record,
)

TRAIN_KEYS = {"train/loss", "train/lrm", "train/dt", "train/tok_per_sec", "train/mfu", "train/epoch"}
EVAL_KEYS = {"step", "total_training_flops", "total_training_time", "val/bpb"}


@pytest.fixture(autouse=True)
def clean_home(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base dir"))
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_RUN_ID", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there


def record(**changes):
    fields = {
        "step": 100, "loss": 3.5, "smooth_loss": 3.4, "lr_multiplier": 0.5, "seconds": 2.5, "mfu": 0.52,
        "tokens_per_second": 200_000, "epoch": 1, "total_seconds": 250.0, "eta_seconds": 60.0, "val_bpb": 1.01,
        "total_flops": 4.2e16,
    }  # fmt: skip
    return types.SimpleNamespace(**(fields | changes))


def history_of(path: Path) -> list[dict]:
    """The rows that were logged, read from a .wandb file: records in blocks of 32 KiB as in a LevelDB log."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, message, rows = path.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        room = 32768 - position % 32768
        if room < 7:
            position += room
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        if position + 7 + length > len(data):  # it is still being written
            break
        message += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            parsed, message = Record.FromString(message), b""
            if parsed.WhichOneof("record_type") == "history":
                items = parsed.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def history_when_written(folder, records: int) -> list[dict]:
    """The history of one part of a run; the client writes it from a process of its own, late on a busy machine."""
    deadline = time.monotonic() + 60
    while True:
        files = list(folder.glob("*.wandb"))
        history = history_of(files[0]) if files and files[0].stat().st_size else []
        if len(history) >= records or time.monotonic() > deadline:
            return history
        time.sleep(0.2)


def fake_colab(monkeypatch, get):
    userdata = types.ModuleType("google.colab.userdata")
    userdata.get = get
    colab = types.ModuleType("google.colab")
    colab.userdata = userdata
    for name, module in {"google": types.ModuleType("google"), "google.colab": colab}.items():
        monkeypatch.setitem(sys.modules, name, module)


def test_train_and_eval_keys_are_the_originals():
    """Renaming a key would put new runs on other axes than the published ones."""
    assert wandb_train_record(record()).keys() - {"step"} == TRAIN_KEYS
    assert wandb_eval_record(record()).keys() == EVAL_KEYS
    assert wandb_train_record(record())["train/mfu"] == pytest.approx(52)
    assert wandb_train_record(record(mfu=None))["train/mfu"] is None
    assert wandb_eval_record(record())["val/bpb"] == 1.01


@pytest.mark.parametrize(("run", "rank"), [("", 0), ("dummy", 0), ("d12", 1)])
def test_tracking_is_off_by_default_and_on_other_ranks(run, rank, tmp_path, monkeypatch):
    """Eight ranks would open eight runs, and a run without a name would ask for an account."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    tracker = open_tracker(run, "nanochat", {}, rank)
    assert isinstance(tracker, DummyWandb)
    tracker.log({"step": 0}, step=0)
    tracker.finish()
    assert not (tmp_path / "base dir").exists()


def test_missing_client_is_one_clear_sentence(monkeypatch):
    """An ImportError after the data has been downloaded says neither what is missing nor how to do without."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install wandb.*dummy"):
        open_tracker("d12", "nanochat", {}, 0)


def test_secret_comes_from_colab_then_environment(monkeypatch):
    """In Colab a leftover environment variable must not win over the key that the user put into the drawer."""
    assert read_secret("WANDB_API_KEY") is None
    monkeypatch.setenv("WANDB_API_KEY", " from-env\n")
    assert read_secret("WANDB_API_KEY") == "from-env"
    fake_colab(monkeypatch, {"WANDB_API_KEY": "from-colab"}.get)
    assert read_secret("WANDB_API_KEY") == "from-colab"


@pytest.mark.parametrize("name", ["SecretNotFoundError", "NotebookAccessError", "TimeoutException"])
def test_colab_refusing_a_secret_means_there_is_none(name, monkeypatch):
    """A notebook without that secret would stop at its first cell."""

    def refuse(secret):
        raise type(name, (Exception,), {})(secret)

    fake_colab(monkeypatch, refuse)
    assert read_secret("WANDB_API_KEY") is None
    monkeypatch.setenv("WANDB_API_KEY", "from-env")
    assert read_secret("WANDB_API_KEY") == "from-env"


def test_run_id_is_stable_for_one_training_and_new_for_another(tmp_path):
    """A resumed run would start a second curve, or a changed model would be drawn into the old one."""
    first = stored_wandb_id("d12", "nanochat", {"depth": 12, "lr": 0.3})
    assert stored_wandb_id("d12", "nanochat", {"lr": 0.3, "depth": 12}) == first
    others = [("d12", "nanochat", {"depth": 4}), ("x", "nanochat", {"depth": 12}), ("d12", "nanochat-sft", {})]
    assert len({first, *(stored_wandb_id(*other) for other in others)}) == 4
    assert len(json.loads((tmp_path / "base dir" / "wandb" / "run_ids.json").read_text())) == 4


def test_offline_run_keeps_history_and_resumes(tmp_path, capfd, monkeypatch):
    """Without a key the numbers would be lost, or the resumed half would not belong to the same run."""
    monkeypatch.delitem(sys.modules, "openai", raising=False)  # of another test; wandb advertises where it sees it
    config = {"depth": 12}
    for step in (0, 100):
        tracker = open_tracker("d12", "nanochat", config, 0)
        assert isinstance(tracker, WandbTracker) and tracker.offline
        tracker.log(wandb_eval_record(record(step=step)))
        tracker.log(wandb_train_record(record(step=step, mfu=None)))
        tracker.finish()
    said = capfd.readouterr()
    folder = tmp_path / "base dir" / "wandb"
    parts = sorted(folder.glob("offline-run-*"))
    assert len(parts) == 2 and len({part.name.split("-")[3] for part in parts}) == 1
    last_line = said.out.strip().splitlines()[-1]
    assert last_line.endswith(f"wandb sync '{parts[0]}' '{parts[1]}'")
    assert said.out.count("\n") == 2 and said.err == ""
    for part, step in zip(parts, (0, 100), strict=True):
        evaluation, train = history_when_written(part, records=2)
        assert EVAL_KEYS <= evaluation.keys() and evaluation["val/bpb"] == 1.01 and evaluation["step"] == step
        assert TRAIN_KEYS - train.keys() == {"train/mfu"}, "an unknown value is left out, not logged as null"
        assert train["train/loss"] == 3.4 and train["step"] == step


@pytest.mark.parametrize("key", ["0123456789abcdef" * 2 + "deadbeef", "not-a-real-key"])
def test_unreachable_server_falls_back_to_offline(key, tmp_path, monkeypatch, capfd):
    """A training of many hours would die, or print the key, because a logging service cannot be reached."""
    monkeypatch.setattr(tracking, "WANDB_INIT_SECONDS", 1)
    monkeypatch.setenv("WANDB_API_KEY", key)
    tracker = open_tracker("d12", "nanochat", {"depth": 12}, 0)
    assert tracker.offline
    tracker.log({"step": 7, "val/bpb": 1.5})
    tracker.finish()
    said = capfd.readouterr()
    assert said.out.startswith("wandb: going offline") and said.out.count("\n") == 2
    assert key not in said.out + said.err
    part = next((tmp_path / "base dir" / "wandb").glob("offline-run-*"))
    assert [record["val/bpb"] for record in history_when_written(part, records=1)] == [1.5]
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert key.encode() not in written
