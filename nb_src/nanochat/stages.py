# %% [markdown]
# ## Stages
#
# Training takes hours and a notebook is run more than once: the tab closes, a cell gets edited, a machine is taken
# away. So each stage, once done, leaves a small JSON that says what went in, what came out, and which files it left.
# Run everything again and a stage with the same inputs is read back in a moment; one whose inputs changed is done
# again, and can say which input it was.

# %%
import hashlib
import json
import math
import re
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from nanochat.runtime import get_base_dir, get_dist_info, is_ddp_initialized, write_atomic

# %% [markdown]
# ### `plain_json`
# Everything that is saved as JSON passes through here. Python would write `Infinity` and `NaN`, which are not JSON
# and which other readers reject, so they become `null`: "no number", which is what an evaluation that never ran has
# to say.


# %%
def plain_json(value):
    """`value` in JSON's own types: inf and nan as None, tuples as lists, one-element tensors and arrays as numbers."""
    if isinstance(value, dict):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        return plain_json(value.item())
    raise TypeError(f"{value!r} cannot be saved as JSON")


# %% [markdown]
# ### `fingerprint_of`
# Two runs had the same inputs when this short string is the same. The order of the names does not matter.


# %%
def fingerprint_of(inputs: dict) -> str:
    """sha256 (hex) of `inputs` as canonical JSON."""
    text = json.dumps(plain_json(inputs), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


# %% [markdown]
# ### `source_fingerprint`
# The code has a fingerprint too. A notebook gets it when it is built; a script reads it off the files it was loaded
# from, and for the same sources both are the same.


# %%
def source_fingerprint(stamp: str) -> str:
    """sha256 (hex) over the sources of the running program. stamp: what the build wrote, or still its placeholder."""
    if re.fullmatch("[0-9a-f]{64}", stamp):
        return stamp
    spine = Path(sys.modules["__main__"].__file__).resolve()
    paths, waiting = set(), [spine]
    while waiting:  # the script, the chapters that it imports, and those that they import
        path = waiting.pop()
        if path not in paths:
            paths.add(path)
            modules = re.findall(r"^from (\w+\.\w+) import ", path.read_text(encoding="utf-8"), re.MULTILINE)
            files = (spine.parent / f"{module.replace('.', '/')}.py" for module in modules)
            waiting += [file for file in files if file.is_file()]
    names = {path: path.relative_to(spine.parent).as_posix() for path in paths}
    digests = {name: hashlib.sha256(path.read_bytes()).hexdigest() for path, name in names.items()}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


# %% [markdown]
# ### `finish_stage`
# Called once, after the last file of the stage is in place. Files below the base directory are noted relative to it,
# so the whole directory can be moved to another machine and still counts as finished.


# %%
def stage_file(name: str, folder=None) -> Path:
    """Where the record of a stage lies. folder: in place of the base directory."""
    return Path(folder or get_base_dir()) / "stages" / f"{name}.json"


def finish_stage(name: str, inputs: dict, results: dict, files=(), folder=None) -> None:
    """Record on rank 0 that a stage is done.

    inputs: everything that its outcome depends on. results: what later stages want to know. Both as JSON types.
    files: paths that must still be there, in the same size, for the stage to count as done.
    folder: in place of the base directory.
    """
    if get_dist_info()[1] != 0:
        return
    base = Path(folder or get_base_dir()).resolve()
    sizes = {}
    for path in map(Path, files):
        path = path.resolve()
        sizes[str(path.relative_to(base) if path.is_relative_to(base) else path)] = path.stat().st_size
    record = {
        "stage": name,
        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
        "fingerprint": fingerprint_of(inputs),
        "inputs": plain_json(inputs),
        "results": plain_json(results),
        "file_bytes": sizes,
    }
    write_atomic(stage_file(name, folder), json.dumps(record, indent=2, allow_nan=False) + "\n")


# %% [markdown]
# ### `finished_stage`
# The question at the top of each stage: is there anything to do? With several processes rank 0 looks and tells the
# others, because a file that appears between two looks would send the ranks different ways.


# %%
def read_stage(name: str, folder=None) -> dict | None:
    """The record of a stage, whatever its inputs were; None when there is none that can be read."""
    try:
        record = json.loads(stage_file(name, folder).read_text(encoding="utf-8"))
        return record if {"fingerprint", "inputs", "results", "file_bytes"} <= set(record) else None
    except (OSError, ValueError, TypeError):
        return None


def changed_files(record: dict, folder=None) -> list[str]:
    """One phrase for each file of a stage that is gone or has another size."""
    phrases = []
    for name, size in record["file_bytes"].items():
        path = Path(folder or get_base_dir()) / name
        if not path.is_file():
            phrases.append(f"{path.name} is missing")
        elif path.stat().st_size != size:
            phrases.append(f"{path.name} has {path.stat().st_size:,} bytes instead of {size:,}")
    return phrases


def finished_stage(name: str, inputs: dict, folder=None) -> dict | None:
    """The results recorded for exactly these inputs, if all files of the stage are still there; otherwise None.

    Ask `is None`: results may be an empty dict. Every rank must call it when there are several.
    """
    results = None
    if get_dist_info()[1] == 0:
        record = read_stage(name, folder)
        if record and record["fingerprint"] == fingerprint_of(inputs) and not changed_files(record, folder):
            results = record["results"]
    if is_ddp_initialized():
        # as bytes of JSON: object collectives would pickle
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        data = torch.tensor(list(json.dumps(results).encode()), dtype=torch.uint8, device=device)
        size = torch.tensor(len(data), device=device)
        dist.broadcast(size, 0)
        data = data if get_dist_info()[1] == 0 else torch.empty(int(size), dtype=torch.uint8, device=device)
        dist.broadcast(data, 0)
        results = json.loads(bytes(data.tolist()))
    return results


# %% [markdown]
# ### `what_changed`
# A stage that runs again without saying why looks like a bug. This finds the words: "vocab_size changed from 4096 to
# 8192".


# %%
def named_leaves(value, name: str = "") -> dict:
    """{"a.b": 1} for {"a": {"b": 1}}: every innermost value under its dotted name."""
    if not isinstance(value, dict):
        return {name: value}
    leaves = {}
    for key, item in value.items():
        leaves |= named_leaves(item, f"{name}.{key}" if name else key)
    return leaves


def short_value(value) -> str:
    """A value in at most 24 characters."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 24 else text[:12] + "…" + text[-11:]


def what_changed(name: str, inputs: dict, folder=None) -> str:
    """Why a stage that once finished has to be done again; "" when it never finished or nothing changed."""
    record = read_stage(name, folder)
    if record is None:
        return ""
    old, new = named_leaves(record["inputs"]), named_leaves(plain_json(inputs))
    phrases = []
    for key in sorted(old.keys() | new.keys()):
        if key not in old:
            phrases.append(f"{key} is new ({short_value(new[key])})")
        elif key not in new:
            phrases.append(f"{key} is gone (it was {short_value(old[key])})")
        elif old[key] != new[key]:
            phrases.append(f"{key} changed from {short_value(old[key])} to {short_value(new[key])}")
    return ", ".join(phrases + changed_files(record, folder))
