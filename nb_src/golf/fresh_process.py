# %% [markdown]
# ## A process that knows nothing
#
# A score is worth something when a stranger gets it too. The stranger has the script, the model file, the tokenizer and
# the validation text, and nothing else: not our variables, not our environment, not the training data. So the numbers
# that a run reports are found by a stranger: a new process in an empty folder that gets just these files. What this
# process remembers cannot leak into them, and an artifact that lacks something fails here and not at the reviewer's.

# %%
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from nanochat.runtime import (
    UserError,
    free_port,
    get_dist_info,
    is_ddp_requested,
    print0,
    wait_for_everyone,
    write_atomic,
)

# %% [markdown]
# ### `clean_environment`
# What a program needs to find Python's libraries and the GPU, and the precision that was asked for on this machine.
# Everything else stays here, the settings of the run above all: they have to be in the artifact, in the script or on
# the command line.

# %%
PASSED_ON = (
    "PATH", "HOME", "USER", "LOGNAME", "TMPDIR", "LD_LIBRARY_PATH", "CC", "CXX", "HF_HOME", "NANOCHAT_DTYPE",
)  # fmt: skip
PASSED_ON_PREFIXES = ("CUDA_", "NVIDIA_", "NCCL_", "GLOO_", "OMP_", "MKL_")
PLACE_OF_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")


def clean_environment(base_dir, port: int) -> dict[str, str]:
    """The environment of the new process; with several, it has the rank of this one and its group meets at `port`."""
    kept = {
        name: value for name, value in os.environ.items() if name in PASSED_ON or name.startswith(PASSED_ON_PREFIXES)
    }
    if is_ddp_requested():
        kept |= {name: os.environ[name] for name in PLACE_OF_RANK if name in os.environ} | {"MASTER_PORT": str(port)}
    return kept | {"NANOCHAT_BASE_DIR": str(base_dir), "HF_HUB_OFFLINE": "1"}


# %% [markdown]
# ### `shared_empty_folder`
# All ranks of a machine meet in one folder, whose name only they know. They also need a free port, over which the new
# processes find each other.


# %%
@contextmanager
def shared_empty_folder():
    """Yield (folder, port), the same on every rank; rank 0 removes the folder in the end. Every rank must call it.

    A rank that fails leaves without waiting; each notes that it is done as a file done-RANK in the folder.
    """
    _, rank, _, world_size = get_dist_info()
    if int(os.environ.get("LOCAL_WORLD_SIZE", world_size)) != world_size:
        raise UserError("The evaluation in a fresh process needs all ranks on one machine. Start it on one.")
    device = "cuda" if world_size > 1 and dist.get_backend() == "nccl" else "cpu"
    agreed = torch.tensor([secrets.randbits(62), free_port()], device=device)
    if world_size > 1:
        dist.broadcast(agreed, 0)
    number, port = agreed.tolist()
    folder = Path(tempfile.gettempdir()) / f"golf-{number:016x}"
    try:
        if rank == 0:
            folder.mkdir(mode=0o700)
        wait_for_everyone()
        yield folder, port
        wait_for_everyone()
    finally:
        if rank == 0:
            patience = time.monotonic() + 15  # for the others, who want to read why
            while len(list(folder.glob("done-[1-9]*"))) < world_size - 1 and time.monotonic() < patience:
                time.sleep(0.1)
            shutil.rmtree(folder, ignore_errors=True)


# %% [markdown]
# ### `place_files`
# A link costs nothing and a copy little; a symbolic link would show the way back to where the file came from.


# %%
def place_files(files: dict, folder: Path) -> None:
    """Put each file under its name into `folder`; a list of files becomes a folder of that name."""
    for name, source in files.items():
        listed = [(source, folder / name)]
        if isinstance(source, list):
            listed = [(path, folder / name / Path(path).name) for path in source]
        for path, target in listed:
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(Path(path).resolve(), target)
            except OSError:  # another disk
                shutil.copyfile(path, target)


# %% [markdown]
# ### `watch_child`
# Shows what the process says while it runs, and knows how those of the other ranks are doing: each rank writes a file
# when its process has ended, empty when all went well. One failure ends all of them, because processes that wait for a
# dead one in a collective would wait for long.


# %%
def last_lines(path: Path, count: int = 15) -> str:
    """The end of a text file."""
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").rstrip().split("\n")[-count:])


def watch_child(process: subprocess.Popen, output: Path, timeout: float) -> str:
    """Wait until the processes of all ranks have ended; what went wrong first, or "". output: what this one prints.

    Notes of all ranks lie as done-RANK beside `output`.
    """
    _, rank, _, world_size = get_dist_info()
    own_note, deadline, rest = output.with_name(f"done-{rank}"), time.monotonic() + timeout, ""
    with open(output, encoding="utf-8", errors="replace") as reader:
        while True:
            status = process.poll()
            *lines, rest = (rest + reader.read()).split("\n")
            if status is not None and rest:
                lines, rest = [*lines, rest], ""
            for line in lines:
                print0(f"│ {line}", flush=True)
            if status is not None and not own_note.exists():
                failed = f"the fresh process of rank {rank} failed with exit status {status}:\n{last_lines(output)}"
                write_atomic(own_note, failed if status else "")
            notes = sorted(output.parent.glob("done-*"), key=lambda path: path.stat().st_mtime_ns)
            failures = list(filter(None, (note.read_text(encoding="utf-8") for note in notes)))
            if failures or len(notes) == world_size:
                return failures[0] if failures else ""
            if time.monotonic() > deadline:
                return f"the fresh process of rank {rank} was stopped after {timeout:g} seconds:\n{last_lines(output)}"
            time.sleep(0.1)


def stop_child(process: subprocess.Popen) -> None:
    """End a process that may still run: politely, then for certain."""
    process.terminate()
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# %% [markdown]
# ### `run_in_fresh_process`
# Under `torchrun` every rank starts a process, and these form a group like the one that their parents are in.


# %%
def run_in_fresh_process(script: bytes, arguments: list[str], files: dict, result: str, timeout: float) -> dict:
    """Run `script` as train_gpt.py in an empty folder and return the JSON that it wrote to the file `result` there.

    files: name in that folder -> path, or list of paths for a folder of that name. timeout: seconds.
    The output of rank 0 is shown as it comes. Raises UserError, on every rank, when a process fails: with the end of
    its output. Every rank must call it, with the same arguments; all are on one machine. Golf spec section 5.
    """
    for source in files.values():
        for path in source if isinstance(source, list) else [source]:
            if not Path(path).is_file():
                raise UserError(f"{path} is not there, and the evaluation in a fresh process needs it.")
    rank = get_dist_info()[1]
    with shared_empty_folder() as (shared, port):
        folder, output = shared / "empty", shared / f"output-{rank}"
        failure = f"the fresh process of rank {rank} was interrupted"
        if rank == 0:
            write_atomic(folder / "train_gpt.py", script)
            place_files(files, folder)
        wait_for_everyone()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # the new process needs the memory
        with open(output, "wb") as sink:
            process = subprocess.Popen(
                [sys.executable, "-u", "train_gpt.py", *arguments],
                cwd=folder,
                env=clean_environment(folder / "base", port),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
            )
        try:
            failure = watch_child(process, output, timeout)
        finally:
            stop_child(process)
            if not (shared / f"done-{rank}").exists():
                write_atomic(shared / f"done-{rank}", failure)
        if failure:
            raise UserError(failure)
        try:
            return json.loads((folder / result).read_bytes())
        except (OSError, ValueError):
            raise UserError(f"the fresh process ended well, but left no JSON in {result}.") from None
