import errno
import json
import math
import os
import shutil
import signal

import pytest
import safetensors
import safetensors.torch
import torch

from helpers import run_ranks
from nanochat.checkpoint_files import (
    NoCheckpointError,
    checkpoint_path,
    delete_old_checkpoints,
    find_last_step,
    load_checkpoint,
    save_checkpoint,
)
from nanochat.runtime import UserError

META = {"model_config": {"n_layer": 2}}


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(8, 4, generator=generator) for name in ("a", "b")}


def test_what_is_saved_comes_back(tmp_path):
    """Views, transposes, shared weights, bf16 and compiled names: each has broken a checkpoint format before."""
    shared = torch.randn(6, 4)
    model_data = {
        "tied.1": shared,
        "tied.2": shared,
        "view": shared[1:3],
        "transposed": torch.randn(3, 5).T,
        "scalar": torch.tensor(1.5),
        "bf16": torch.randn(4, 4).bfloat16(),
        "empty": torch.zeros(0, 3),
        "_orig_mod.compiled": torch.ones(2),
        "h.0._orig_mod.part": torch.ones(3),
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }
    state = {0: {"step": 3, "m": torch.randn(4).bfloat16()}}
    optimizer_data = {"state": state, "param_groups": [{"betas": (0.8, 0.95)}]}
    save_checkpoint(tmp_path, 7, model_data, optimizer_data, META | {"val_bpb": math.inf, "loop": {"x": math.nan}})
    model, optimizer, meta = load_checkpoint(tmp_path, 7, "cpu", load_optimizer=True)
    assert model.keys() == {name.replace("_orig_mod.", "") for name in model_data}
    for name, tensor in model_data.items():
        loaded = model[name.replace("_orig_mod.", "")]
        assert loaded.dtype == tensor.dtype and torch.equal(loaded, tensor)
    assert torch.equal(optimizer["state"][0].pop("m"), optimizer_data["state"][0].pop("m"))
    assert optimizer == optimizer_data
    assert meta["step"] == 7 and meta["val_bpb"] is None and meta["loop"] == {"x": None}
    assert sorted(os.listdir(tmp_path)) == ["meta_000007.json", "model_000007.safetensors", "optim_000007_rank0.pt"]
    json.loads((tmp_path / "meta_000007.json").read_text(), parse_constant=pytest.fail)
    assert load_checkpoint(tmp_path, 7, "cpu")[1] is None


def test_two_saves_of_one_state_are_the_same_bytes(tmp_path):
    """A file that holds its temporary name cannot be compared, and overwriting it would be unsafe for a moment."""
    for folder in ("x", "y"):
        save_checkpoint(tmp_path / folder, 1, tensors(), tensors(1), META)
    for name in os.listdir(tmp_path / "x"):
        assert (tmp_path / "x" / name).read_bytes() == (tmp_path / "y" / name).read_bytes()


def save_until_killed(folder, step, seed, victim, call):
    """Save in a child process that gets SIGKILL at the given call of one system function; True when it was killed."""
    child = os.fork()
    if child == 0:
        original, calls = getattr(os, victim), [0]

        def deadly(*args, **kwargs):
            calls[0] += 1
            if calls[0] == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(os, victim, deadly)
        try:
            save_checkpoint(folder, step, tensors(seed), tensors(seed + 1), META)
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1] == signal.SIGKILL


KILL_POINTS = [(victim, call) for victim in ("fsync", "replace", "chmod") for call in (1, 2, 3)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork")
@pytest.mark.parametrize("victim,call", KILL_POINTS)
def test_a_kill_while_saving_leaves_the_previous_checkpoint(tmp_path, capsys, victim, call):
    """A power cut in the middle of a save must cost the steps since the last one, not the run."""
    folder = tmp_path / "d2"
    save_checkpoint(folder, 100, tensors(1), tensors(2), META)
    assert save_until_killed(folder, 200, 3, victim, call)
    assert find_last_step(folder) == 100
    model, optimizer, _ = load_checkpoint(folder, 100, "cpu", load_optimizer=True)
    assert torch.equal(model["a"], tensors(1)["a"]) and torch.equal(optimizer["b"], tensors(2)["b"])
    out = capsys.readouterr().out
    if (folder / "model_000200.safetensors").exists():
        expected = "checkpoint d2/200 is incomplete (no meta file); going back to 100, the newest complete one."
        assert out.strip() == expected
    save_checkpoint(folder, 200, tensors(5), None, META)  # and the next attempt succeeds
    assert torch.equal(load_checkpoint(folder, find_last_step(folder), "cpu")[0]["a"], tensors(5)["a"])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork")
@pytest.mark.parametrize("victim,call", KILL_POINTS)
@pytest.mark.parametrize("same", [True, False])
def test_a_kill_while_replacing_a_checkpoint_never_mixes_two(tmp_path, victim, call, same):
    """Half of the old files under the old JSON would load as a model that never existed."""
    save_checkpoint(tmp_path, 100, tensors(1), tensors(2), META)
    assert save_until_killed(tmp_path, 100, 1 if same else 7, victim, call)
    if same:  # a resumed run that saves at once: its only checkpoint must survive
        assert find_last_step(tmp_path) == 100
    try:
        step = find_last_step(tmp_path)
    except NoCheckpointError:
        return
    model, optimizer, _ = load_checkpoint(tmp_path, step, "cpu", load_optimizer=True)
    sources = [(tensors(1)["a"], tensors(2)["a"]), (tensors(7)["a"], tensors(8)["a"])]
    assert any(torch.equal(model["a"], a) and torch.equal(optimizer["a"], b) for a, b in sources)


@pytest.mark.parametrize("kind", ["model", "optim"])
@pytest.mark.parametrize("damage", ["truncate", "flip"])
def test_damaged_files_are_named(tmp_path, kind, damage):
    """A flipped bit in a weight loads without an error anywhere; the text just gets worse."""
    save_checkpoint(tmp_path, 5, tensors(), tensors(1), META)
    path = checkpoint_path(tmp_path, 5, kind)
    data = bytearray(path.read_bytes())
    if damage == "truncate":
        data = data[:-10]
    else:
        data[-20] ^= 16
    path.write_bytes(data)
    with pytest.raises(UserError, match=path.name):
        load_checkpoint(tmp_path, 5, "cpu", load_optimizer=True)


def test_the_advice_for_a_damaged_file_works(tmp_path):
    """Advice that leads to the next error is worse than none."""
    for step in (5, 6):
        save_checkpoint(tmp_path, step, tensors(), tensors(1), META)
    path = checkpoint_path(tmp_path, 6, "optim")
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(UserError, match=r"delete meta_000006\.json beside it"):
        load_checkpoint(tmp_path, 6, "cpu", load_optimizer=True)
    (tmp_path / "meta_000006.json").unlink()
    load_checkpoint(tmp_path, find_last_step(tmp_path), "cpu", load_optimizer=True)


def test_malicious_optimizer_file_does_not_run(tmp_path):
    """An optimizer file is a zip with a pickle inside; loading a stranger's must not execute it."""

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    save_checkpoint(tmp_path, 1, tensors(), Evil(), META)
    with pytest.raises(Exception, match="(?i)weights.only"):
        load_checkpoint(tmp_path, 1, "cpu", load_optimizer=True)
    assert not (tmp_path / "pwned").exists()


def test_a_full_disk_is_said_plainly(tmp_path, monkeypatch):
    """safetensors wraps "no space left" in an error of its own, which would reach the reader as a traceback."""

    def full(*args, **kwargs):
        raise safetensors.SafetensorError(f"Error while serializing: No space left (os error {errno.ENOSPC})")

    save_checkpoint(tmp_path, 1, tensors(), None, META)
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(UserError, match="no space left.*model_000002"):
        save_checkpoint(tmp_path, 2, tensors(), None, META)
    assert find_last_step(tmp_path) == 1
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def test_last_step_compares_numbers_and_ignores_strangers(tmp_path):
    """The original compared strings and crashed on a file such as model_000200_backup.pt."""
    for step in (90, 1000, 999999, 1000000):
        save_checkpoint(tmp_path, step, tensors(), None, META)
    for name in ("model_2000000_backup.safetensors", "model_x.safetensors", "model_3000000.pt", "meta_9.json"):
        (tmp_path / name).write_text("")
    assert find_last_step(tmp_path) == 1000000


@pytest.mark.parametrize(
    "damage,reason",
    [
        (lambda folder: (folder / "meta_000200.json").unlink(), "no meta file"),
        (lambda folder: (folder / "meta_000200.json").write_text("{"), "its meta file cannot be read"),
        (lambda folder: (folder / "meta_000200.json").write_text("[]"), "its meta file cannot be read"),
        (lambda folder: (folder / "model_000200.safetensors").unlink(), "no model_000200.safetensors"),
        (lambda folder: os.truncate(folder / "model_000200.safetensors", 9), "model_000200.safetensors has 9 bytes"),
    ],
)
def test_incomplete_checkpoints_are_passed_over_aloud(tmp_path, capsys, damage, reason):
    """Going back without a word hides that hours are repeated; not going back ends the run."""
    folder = tmp_path / "d12"
    for step in (100, 200):
        save_checkpoint(folder, step, tensors(), None, META)
    damage(folder)
    assert find_last_step(folder) == 100
    out = capsys.readouterr().out
    assert out.startswith(f"checkpoint d12/200 is incomplete ({reason}")
    assert out.endswith("); going back to 100, the newest complete one.\n")
    with pytest.raises(NoCheckpointError, match=r"d12/200 cannot be loaded \(.*Complete in .*: 100\."):
        load_checkpoint(folder, 200, "cpu")
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match="no complete checkpoint in"):
        find_last_step(folder)


@pytest.mark.parametrize("keep,left", [(2, [30, 20]), (1, [30]), (9, [30, 20, 10]), (0, [])])
def test_old_checkpoints_are_deleted(tmp_path, keep, left):
    """A disk that fills with checkpoints ends the run; one deleted too many cannot be brought back."""
    for step in (10, 20, 30):
        save_checkpoint(tmp_path, step, tensors(), tensors(), META)
    (tmp_path / "model_000040.safetensors").write_text("unfinished")
    (tmp_path / "optim_000040_rank3.pt").write_text("unfinished")
    (tmp_path / ".model_000050.safetensors.ab_cd12.tmp").write_text("killed")
    (tmp_path / "notes.txt").write_text("mine")
    delete_old_checkpoints(tmp_path, keep)
    expected = {checkpoint_path(tmp_path, step, kind).name for step in left for kind in ("meta", "model", "optim")}
    assert set(os.listdir(tmp_path)) == expected | {"notes.txt"}


def test_temporary_files_have_the_names_that_are_swept(tmp_path, monkeypatch):
    """If the temporary names changed, every killed save would leave gigabytes behind for good."""
    monkeypatch.setattr(os, "replace", lambda *paths: None)  # as if killed just before the rename
    save_checkpoint(tmp_path, 10, tensors(), tensors(), META)
    assert len(os.listdir(tmp_path)) == 3 and all(name.endswith(".tmp") for name in os.listdir(tmp_path))
    delete_old_checkpoints(tmp_path, 1)
    assert os.listdir(tmp_path) == []


RANK_PROGRAM = """
import os, sys
import torch, torch.distributed as dist
from nanochat import checkpoint_files as c
dist.init_process_group("gloo")
rank, folder = dist.get_rank(), sys.argv[1]
c.save_checkpoint(folder, 10, {"w": torch.ones(3)}, {"rank": rank}, {"model_config": {}}, rank)
print(c.load_checkpoint(folder, 10, "cpu", load_optimizer=True, rank=rank)[1])
if rank == 1:
    def fail(*args, **kwargs): raise OSError("disk gone")
    torch.save = fail
try:
    c.save_checkpoint(folder, 20, {"w": torch.ones(3)}, {"rank": rank}, {"model_config": {}}, rank)
except Exception as error:
    print(error)
print(c.find_last_step(folder))
dist.barrier()
"""


def test_several_ranks_save_one_checkpoint_or_none(tmp_path):
    """A rank that fails alone leaves the others waiting, or a checkpoint that lacks its share."""
    outputs = [printed.split("\n") for printed in run_ranks(RANK_PROGRAM, tmp_path / "d2")]
    incomplete = "checkpoint d2/20 is incomplete (no meta file); going back to 10, the newest complete one."
    refused = "checkpoint d2/20 was not saved: rank 1 could not write, and says why."
    assert outputs == [["{'rank': 0}", refused, incomplete, "10"], ["{'rank': 1}", "disk gone", "10"]]
