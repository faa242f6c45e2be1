# %% [markdown]
# ## Checkpoints
#
# A checkpoint is what a power cut leaves you with. So three things matter: that there is always a complete one, that
# a damaged one is noticed, and that it says everything needed to read it years later.
#
# Weights are safetensors (numbers and names, nothing that could run), everything else is JSON, and each process keeps
# its own share of the optimizer. The JSON is written last and lists the other files with size and checksum: when it
# is there, the checkpoint is whole. It also holds every constant of the architecture, because weights loaded into
# slightly different arithmetic give no error, only worse text.
#
# This chapter knows files and nothing about models: any `state_dict` can be saved with it.

# %%
import errno
import json
import re
import zlib
from contextlib import ExitStack, contextmanager
from pathlib import Path

import safetensors.torch
import torch

from nanochat.runtime import (
    UserError,
    atomic_path,
    gather_numbers,
    get_dist_info,
    print0,
    wait_for_everyone,
    write_atomic,
)
from nanochat.stages import plain_json

# %% [markdown]
# ### Where they lie
# All checkpoints of a model share a folder; the step is in the name of each file.


# %%
class NoCheckpointError(UserError, FileNotFoundError):
    """There is no checkpoint where one was looked for."""


def checkpoint_path(checkpoint_dir, step: int, kind: str, rank: int = 0) -> Path:
    """The file of a checkpoint that holds its model, meta or optim (one for each rank)."""
    names = {
        "model": f"model_{step:06d}.safetensors",
        "meta": f"meta_{step:06d}.json",
        "optim": f"optim_{step:06d}_rank{rank}.pt",
    }
    return Path(checkpoint_dir) / names[kind]


def checkpoint_name(checkpoint_dir, step: int) -> str:
    """What messages call it: d12/1785."""
    return f"{Path(checkpoint_dir).name}/{step}"


# %% [markdown]
# ### Before writing
# safetensors stores plain tensors, each once: views, transposes and weights that share memory are copied first. Names
# lose the prefix that `torch.compile` adds, so it does not matter who was compiled when.


# %%
def storable_tensors(model_data: dict) -> dict[str, torch.Tensor]:
    """The same tensors on the CPU, contiguous, none sharing memory with another."""
    storable, storages = {}, set()
    for name, tensor in model_data.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        storable[name.replace("_orig_mod.", "")] = tensor
    return storable


def file_record(path) -> dict:
    """Size and CRC-32 of a file: enough to notice truncation and flipped bits, at a gigabyte per second."""
    checksum = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            checksum = zlib.crc32(chunk, checksum)
    return {"bytes": Path(path).stat().st_size, "crc32": checksum}


# %% [markdown]
# ### When writing fails
# One process with a full disk must not leave the others waiting, or behind with half a checkpoint: it says so in
# words that can be acted on, and everyone hears it.


# %%
@contextmanager
def full_disk_is_oserror():
    """Libraries wrap a full disk into errors of their own; undo that, so that `atomic_path` can say it plainly."""
    try:
        yield
    except Exception as error:
        cause = error
        while cause is not None:
            if getattr(cause, "errno", None) == errno.ENOSPC or f"os error {errno.ENOSPC}" in str(cause):
                raise OSError(errno.ENOSPC, "No space left on device") from error
            cause = cause.__cause__ or cause.__context__
        raise


# %% [markdown]
# ### The files, then the JSON
# Everything a process writes gets a temporary name first and its real one when all of it is on the disk. If a
# checkpoint of the same step is there already, with other contents, it stops counting before the first file is
# replaced.


# %%
def read_meta(checkpoint_dir, step: int) -> dict | None:
    """The JSON of a checkpoint; None when it is not there or cannot be read."""
    try:
        meta = json.loads(checkpoint_path(checkpoint_dir, step, "meta").read_text(encoding="utf-8"))
        return meta if isinstance(meta["files"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_checkpoint_files(checkpoint_dir, step: int, model_data, optimizer_data, rank: int) -> dict[str, dict]:
    """Write a model or an optimizer share or both (None: not); returns the record of each file."""
    paths = {kind: checkpoint_path(checkpoint_dir, step, kind, rank) for kind in ("model", "optim")}
    records = {}
    with ExitStack() as renames:
        if model_data is not None:
            temporary = renames.enter_context(atomic_path(paths["model"]))
            with full_disk_is_oserror():
                safetensors.torch.save_file(storable_tensors(model_data), temporary)
            records[paths["model"].name] = file_record(temporary)
        if optimizer_data is not None:
            temporary = renames.enter_context(atomic_path(paths["optim"]))
            # through a file object: given a path, torch writes its name into the file and no two saves are alike
            with full_disk_is_oserror(), open(temporary, "wb") as file:
                torch.save(optimizer_data, file)
            records[paths["optim"].name] = file_record(temporary)
        older = read_meta(checkpoint_dir, step)
        if older is None or any(older["files"].get(name) != record for name, record in records.items()):
            checkpoint_path(checkpoint_dir, step, "meta").unlink(missing_ok=True)
    return records


def write_checkpoint_meta(checkpoint_dir, step: int, meta_data: dict, records: dict[str, dict]) -> None:
    """Declare a checkpoint complete."""
    meta = plain_json(meta_data) | {"step": step, "files": records}
    write_atomic(checkpoint_path(checkpoint_dir, step, "meta"), json.dumps(meta, indent=2, allow_nan=False) + "\n")


# %% [markdown]
# ### `save_checkpoint`
# Every process writes its share, tells the others that it is on the disk, and then rank 0 writes the JSON that makes
# it count. A kill anywhere in between leaves the earlier checkpoints as they were, and this one visibly unfinished.


# %%
def save_checkpoint(checkpoint_dir, step: int, model_data, optimizer_data, meta_data: dict, rank: int = 0) -> None:
    """Write a checkpoint. With several processes all must call it, and share the folder.

    model_data: a state_dict, written by rank 0. optimizer_data: this rank's state_dict of tensors and plain values, or
    None. meta_data: JSON types with `model_config` (inf and nan become null); `step` and `files` are added to it.
    Raises on every rank when one of them could not write its part. Spec section 10.
    """
    records, failure = {}, None
    try:
        model_data = model_data if rank == 0 else None
        records = write_checkpoint_files(checkpoint_dir, step, model_data, optimizer_data, rank)
    except Exception as error:  # the others wait below and must hear of it
        failure = error
    mine = records.get(checkpoint_path(checkpoint_dir, step, "optim", rank).name, {"bytes": -1, "crc32": -1})
    rows = gather_numbers([int(failure is None), mine["bytes"], mine["crc32"]])
    if failure is not None:
        raise failure
    failed = [str(other) for other, (succeeded, _, _) in enumerate(rows) if not succeeded]
    if failed:
        name = checkpoint_name(checkpoint_dir, step)
        raise UserError(f"checkpoint {name} was not saved: rank {', '.join(failed)} could not write, and says why.")
    if rank == 0:
        for other, (_, size, checksum) in enumerate(rows):
            if size >= 0:
                name = checkpoint_path(checkpoint_dir, step, "optim", other).name
                records[name] = {"bytes": size, "crc32": checksum}
        write_checkpoint_meta(checkpoint_dir, step, meta_data, records)
    wait_for_everyone()


# %% [markdown]
# ### Is it complete?
# The JSON is there and can be read, and the model has the size that it says.


# %%
def checkpoint_problem(checkpoint_dir, step: int) -> str:
    """Why a checkpoint cannot be used, in a few words; "" when its model is all there.

    Looks at names and sizes; checksums are for loading. Optimizer files may be absent: a published model has none.
    """
    if not checkpoint_path(checkpoint_dir, step, "meta").exists():
        return "no meta file"
    meta = read_meta(checkpoint_dir, step)
    if meta is None:
        return "its meta file cannot be read"
    path = checkpoint_path(checkpoint_dir, step, "model")
    if not path.exists():
        return f"no {path.name}"
    expected, size = meta["files"].get(path.name, {}).get("bytes"), path.stat().st_size
    return "" if size == expected else f"{path.name} has {size} bytes instead of {expected}"


def steps_in(checkpoint_dir) -> list[int]:
    """Every step of which there is a model or a meta file, complete or not, newest first."""
    if not Path(checkpoint_dir).is_dir():
        return []
    names = (path.name for path in Path(checkpoint_dir).iterdir())
    matches = (re.fullmatch(r"(?:model_(\d{6,})\.safetensors|meta_(\d{6,})\.json)", name) for name in names)
    return sorted({int(match[1] or match[2]) for match in matches if match}, reverse=True)


# %% [markdown]
# ### `find_last_step`
# The newest *complete* checkpoint counts. Others are passed over aloud: silence would hide that an hour of training
# is being repeated.


# %%
def find_last_step(checkpoint_dir) -> int:
    """The step of the newest complete checkpoint; says which newer ones were passed over.

    Raises NoCheckpointError (a FileNotFoundError) when there is none.
    """
    passed_over = []
    for step in steps_in(checkpoint_dir):
        problem = checkpoint_problem(checkpoint_dir, step)
        if not problem:
            for skipped, reason in passed_over:
                name = checkpoint_name(checkpoint_dir, skipped)
                print0(f"checkpoint {name} is incomplete ({reason}); going back to {step}, the newest complete one.")
            return step
        passed_over.append((step, problem))
    reasons = "; ".join(f"{step}: {reason}" for step, reason in passed_over)
    raise NoCheckpointError(
        f"there is no complete checkpoint in {checkpoint_dir}"
        + (f" ({reasons})." if reasons else ". Train the model first, or check model_tag.")
    )


# %% [markdown]
# ### `load_checkpoint`
# Checksums are compared before anything is read, so a flipped bit is a sentence with a file name and not a model that
# is mysteriously a little worse.


# %%
def check_file(path: Path, meta: dict) -> None:
    """Raise UserError unless the file is the one that was saved."""
    if file_record(path) != meta["files"].get(path.name):
        step = re.search(r"\d+", path.name)[0]
        raise UserError(
            f"{path} is damaged (not the bytes that were saved). "
            f"To go on from an older checkpoint, delete meta_{step}.json beside it."
        )


def load_optimizer_share(checkpoint_dir, step: int, meta: dict, rank: int, **how) -> dict:
    """What one rank saved of the optimizer, read by torch.load with these options."""
    path = checkpoint_path(checkpoint_dir, step, "optim", rank)
    if not path.exists():
        raise NoCheckpointError(
            f"checkpoint {checkpoint_name(checkpoint_dir, step)} has no optimizer state for rank {rank} ({path.name} "
            f"is missing). Go on from an older checkpoint: delete meta_{step:06d}.json beside it."
        )
    check_file(path, meta)
    return torch.load(path, weights_only=True, **how)


def load_checkpoint(checkpoint_dir, step: int, device, load_optimizer: bool = False, rank: int = 0):
    """(model_data, optimizer_data, meta) of one step, tensors on `device`.

    optimizer_data is None unless asked for. Raises NoCheckpointError when there is no such checkpoint or no optimizer
    file for `rank`, and UserError when a file is damaged; both name it. Spec section 10.
    """
    name, problem = checkpoint_name(checkpoint_dir, step), checkpoint_problem(checkpoint_dir, step)
    if problem:
        usable = [str(other) for other in steps_in(checkpoint_dir) if not checkpoint_problem(checkpoint_dir, other)]
        raise NoCheckpointError(
            f"checkpoint {name} cannot be loaded ({problem}). "
            f"Complete in {checkpoint_dir}: {', '.join(usable) or 'none'}."
        )
    meta, model_path = read_meta(checkpoint_dir, step), checkpoint_path(checkpoint_dir, step, "model")
    check_file(model_path, meta)
    model_data = safetensors.torch.load_file(model_path, device=str(device))
    optimizer_data = None
    if load_optimizer:
        optimizer_data = load_optimizer_share(checkpoint_dir, step, meta, rank, map_location=device)
    return model_data, optimizer_data, meta


# %% [markdown]
# ### `load_for_training`
# To go on training, a process needs its share of the optimizer. When as many processes go on as have saved, that is
# its own file. When there are more or fewer, everyone looks into all files and cuts out what is now theirs; the files
# are mapped into memory, not read, so no process holds more than its share.


# %%
def saved_shares(meta: dict) -> int:
    """How many processes saved their share of the optimizer in a checkpoint."""
    return sum(name.startswith("optim_") for name in meta["files"])


def load_for_training(checkpoint_dir, step: int, device, reshard) -> tuple[dict, dict]:
    """(model_data, optimizer_data) with which this process goes on.

    reshard: called when the checkpoint was saved by another number of processes, with the list of what all of them
    saved of the optimizer, on the CPU, in the order of their ranks; returns what this one would have saved. Errors as
    those of load_checkpoint.
    """
    _, rank, _, world_size = get_dist_info()
    model_data, _, meta = load_checkpoint(checkpoint_dir, step, device)
    shares = saved_shares(meta)
    if shares == world_size:
        return model_data, load_optimizer_share(checkpoint_dir, step, meta, rank, map_location=device)
    name, plural = checkpoint_name(checkpoint_dir, step), "es" * (shares != 1)
    print0(f"checkpoint {name} was saved by {shares} process{plural}; this run has {world_size} and shares it out anew")
    everyone = range(max(shares, 1))
    return model_data, reshard(
        [load_optimizer_share(checkpoint_dir, step, meta, other, map_location="cpu", mmap=True) for other in everyone]
    )


# %% [markdown]
# ### `delete_old_checkpoints`
# The JSON goes first, so that a kill halfway leaves files that no one mistakes for a checkpoint; those, and the
# temporary files of a save that was killed, are swept up next time.


# %%
def delete_old_checkpoints(checkpoint_dir, keep: int) -> None:
    """Keep the newest `keep` complete checkpoints of a folder and delete all others. Rank 0 acts."""
    if get_dist_info()[1] != 0 or not Path(checkpoint_dir).is_dir():
        return
    complete = [step for step in steps_in(checkpoint_dir) if not checkpoint_problem(checkpoint_dir, step)]
    pattern = re.compile(r"\.?(meta|model|optim)_(\d{6,})(_rank\d+)?\.(json|safetensors|pt)(\.\w+\.tmp)?")
    for path in sorted(Path(checkpoint_dir).iterdir()):  # "meta" sorts before "model" and "optim"
        match = pattern.fullmatch(path.name)
        if match and (match[5] or int(match[2]) not in complete[:keep]):
            path.unlink()
