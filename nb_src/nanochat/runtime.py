# %% [markdown]
# ## Runtime
#
# The few things every chapter leans on: which device this is and what it can multiply quickly, who prints when
# several processes run, where files go, and how a file is written so that a crash never leaves half of one behind.
#
# Precision is a decision made once and out loud. Master weights are fp32, matrix products run in one compute dtype, and
# there is no autocast to guess what happens where.

# %%
import ctypes
import errno
import os
import shutil
import socket
import sys
import tempfile
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import requests
import torch
import torch.distributed as dist
import torch.distributed.nn  # before a process group exists: its functions would hold on to it, and abort at exit
from filelock import FileLock, Timeout
from torch.distributed.distributed_c10d import _get_default_store

# %% [markdown]
# ### `UserError`
# Some failures are not bugs but a wrong number in a cell. They deserve one sentence instead of forty lines of
# traceback.


# %%
class UserError(Exception):
    """Something that the person running this can fix. Its message says what was wrong and what to do.

    A notebook shows the sentence alone; `show_user_errors_plainly` does the same for a script.
    """

    def _render_traceback_(self):  # IPython asks the exception itself how it wants to be shown
        return [f"✗ {self}"]


# What gloo, NCCL and the rendezvous say when a process on the other end is gone.
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection was likely closed",
             "remote process exited")  # fmt: skip


def show_user_errors_plainly() -> None:
    """Make an uncaught `UserError` end a script with its sentence and exit status 1, without a traceback.

    The same for the loss of another process, which is no fault of this one.
    """
    previous_hook = sys.excepthook

    def hook(kind, error, traceback):
        lost = [words for words in LOST_PEER if words in str(error)] if issubclass(kind, RuntimeError) else []
        if issubclass(kind, UserError):
            print(f"✗ {error}", file=sys.stderr)
        elif lost and is_ddp_requested():
            print(
                f"✗ rank {get_dist_info()[1]} lost another process and ends too ({lost[0]}). Why that one ended is in "
                "its own output, or in the launcher's. Run again to go on from the last checkpoint.",
                file=sys.stderr,
            )
        else:
            previous_hook(kind, error, traceback)

    sys.excepthook = hook


# %% [markdown]
# ### Who am I
# `torchrun` tells each process its rank through the environment. Everything else follows from these four numbers.


# %%
def is_ddp_requested() -> bool:
    """True when torchrun (or another launcher) started this process."""
    return all(name in os.environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))


def is_ddp_initialized() -> bool:
    """True once the process group exists, so that collectives may be called."""
    return dist.is_available() and dist.is_initialized()


def get_dist_info() -> tuple[bool, int, int, int]:
    """(ddp, rank, local_rank, world_size); (False, 0, 0, 1) for a single process."""
    if not is_ddp_requested():
        return False, 0, 0, 1
    return True, *(int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))


def free_port() -> int:
    """A port of this machine that nobody listens on at the moment, for processes to find each other."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def print0(s="", **kwargs) -> None:
    """Print on rank 0 alone."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(s, **kwargs)


# %% [markdown]
# ### Where files go
# One base directory holds everything: data, tokenizer, checkpoints, report. Delete it and nothing is left.


# %%
def get_base_dir() -> str:
    """`$NANOCHAT_BASE_DIR`, or `~/.cache/nanochat`; created on demand.

    Raises UserError when it cannot be created or written to.
    """
    folder = os.environ.get("NANOCHAT_BASE_DIR") or os.path.join(os.path.expanduser("~"), ".cache", "nanochat")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the base directory {folder} cannot be created ({error.strerror}). "
            "Point NANOCHAT_BASE_DIR at a folder that you can write to."
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(
            f"the base directory {folder} is not writable. Point NANOCHAT_BASE_DIR at a folder that you can write to."
        )
    return folder


def lock_base_dir() -> FileLock:
    """Claim the base directory for this process until it ends (rank 0 only; the system releases it after a kill).

    Two runs that write the same checkpoints would destroy each other's work, so the second one gets a UserError.
    """
    lock = FileLock(os.path.join(get_base_dir(), "run.lock"), timeout=0, is_singleton=True)
    if get_dist_info()[1] == 0 and not lock.is_locked:
        try:
            lock.acquire()
        except Timeout:
            raise UserError(
                f"another run is using {get_base_dir()}. Wait for it, stop it, or give this run a folder of its own "
                "with NANOCHAT_BASE_DIR."
            ) from None
    return lock


def require_free_space(needed_bytes: float, purpose: str) -> None:
    """Raise UserError when the disk under the base directory has less than `needed_bytes` free."""
    free = shutil.disk_usage(get_base_dir()).free
    if free < needed_bytes:
        raise UserError(
            f"{purpose} needs about {needed_bytes / 1e9:.1f} GB in {get_base_dir()} and {free / 1e9:.1f} GB are free. "
            "Free some space or point NANOCHAT_BASE_DIR at a larger disk."
        )


# %% [markdown]
# ### Writing a file
# Write under a temporary name, flush to the disk, rename. A reader sees the old file or the new one, never a mixture.


# %%
@contextmanager
def atomic_path(path):
    """Yield a temporary path in the same folder; on success it becomes `path`, on any error it is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    try:
        yield Path(name)
        with open(name, "rb+") as written:
            os.fsync(written.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"no space left while writing {path}. Nothing that was complete is lost: free some space and run again."
            ) from error
        raise


def write_atomic(path, data: str | bytes) -> None:
    """Write a whole small file at once, or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)


def download_file_with_lock(url: str, filename: str, postprocess_fn=None) -> str:
    """Fetch `url` into the base directory once, however many processes ask; returns its path. Spec section 2.

    postprocess_fn: called with the path after a download, before the lock is released.
    """
    target = os.path.join(get_base_dir(), filename)
    if os.path.exists(target):
        return target
    with FileLock(target + ".lock"):
        if os.path.exists(target):  # another process was quicker
            return target
        print0(f"Downloading {url}")
        with atomic_path(target) as temporary, requests.get(url, stream=True, timeout=30) as response:
            response.raise_for_status()
            with open(temporary, "wb") as file:
                for chunk in response.iter_content(1 << 20):
                    file.write(chunk)
        if postprocess_fn is not None:
            postprocess_fn(target)
        print0(f"Downloaded to {target}")
    return target


# %% [markdown]
# ### Device and precision
# bf16 wherever the hardware multiplies it natively. A T4 claims to support bf16 and emulates it many times slower, so
# the answer comes from the compute capability: V100 and T4 have tensor cores for fp16 alone. Everything else computes
# in fp32, apart from recent server CPUs, which have bf16 instructions too and double their speed with them.


# %%
def autodetect_device_type() -> str:
    """cuda, mps or cpu: the best that is here."""
    device_type = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    print0(f"Autodetected device type: {device_type}")
    return device_type


def cpu_has_native_bf16() -> bool:
    """Whether this processor has bf16 multiply instructions (AVX512-BF16, AMX or Arm BF16), as Linux reports them."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags))


def choose_compute_dtype(device_type: str, allow_float16: bool = True) -> tuple[torch.dtype, str]:
    """The dtype of matrix products, and the reason. `NANOCHAT_DTYPE` decides when it is set.

    allow_float16: False for a training without a `LossScaler`, whose gradients would vanish in fp16.
    """
    requested = os.environ.get("NANOCHAT_DTYPE", "")
    if requested:
        known = ("bfloat16", "float16", "float32") if allow_float16 else ("bfloat16", "float32")
        if requested not in known:
            raise UserError(f"NANOCHAT_DTYPE is {requested!r}; it can be {', '.join(known[:-1])} or {known[-1]} here.")
        return getattr(torch, requested), "set by NANOCHAT_DTYPE"
    if device_type == "cuda":
        major, minor = torch.cuda.get_device_capability()
        if (major, minor) >= (8, 0):
            return torch.bfloat16, f"compute capability {major}.{minor} has bf16 tensor cores"
        if major == 7 and allow_float16:
            return torch.float16, f"compute capability {major}.{minor} has tensor cores for fp16 and emulates bf16"
        return torch.float32, f"compute capability {major}.{minor} only emulates bf16"
    if device_type == "cpu" and cpu_has_native_bf16():
        return torch.bfloat16, "this CPU has bf16 instructions"
    return torch.float32, f"no native bf16 on this {device_type}"


RANK0_PATIENCE = timedelta(hours=3)  # the others wait while rank 0 downloads
NCCL_PATIENCE = timedelta(minutes=30)  # NCCL may not notice that a process on another machine has died


def keep_freed_memory() -> None:
    """Let the C library keep large buffers for the next step instead of giving them back to the system (glibc only).

    A CPU training step frees and takes gigabytes; getting them back costs a page fault for every 4 KiB, a seventh of
    the step.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # not glibc
        return
    M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1
    mallopt(M_MMAP_THRESHOLD, 1 << 30)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def compute_init(device_type: str = "cuda") -> tuple[bool, int, int, int, torch.device]:
    """Seed, set matmul precision, join the process group. Returns (ddp, rank, local_rank, world_size, device).

    Under torchrun the ranks talk over NCCL on CUDA and over gloo on the CPU. Calling it twice is harmless.
    """
    available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available, "cpu": lambda: True}
    if device_type not in available:
        raise UserError(f"device_type is {device_type!r}; it can be cuda, mps or cpu.")
    if not available[device_type]():
        raise UserError(f"device_type is {device_type} but torch {torch.__version__} finds no such device here.")
    ddp, rank, local_rank, world_size = get_dist_info()
    visible = torch.cuda.device_count() if device_type == "cuda" else local_rank + 1
    if local_rank >= visible:
        raise UserError(
            f"rank {rank} has LOCAL_RANK {local_rank}, and the number of GPUs that it sees is {visible}. Start one "
            f"process for each GPU (torchrun --nproc_per_node={visible}), and let each of them see all GPUs."
        )
    torch.manual_seed(42)  # of all devices; only weight initialisation draws from the global generator
    device = torch.device(device_type)
    if device_type == "cpu":
        keep_freed_memory()
    if device_type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in fp32
        if ddp:
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
    if ddp and not is_ddp_initialized():
        if device_type == "cuda":
            dist.init_process_group("nccl", device_id=device, timeout=NCCL_PATIENCE)
        else:
            dist.init_process_group("gloo", timeout=RANK0_PATIENCE)
        dist.barrier()
    print0(f"Distributed world size: {world_size}")
    return ddp, rank, local_rank, world_size, device


def compute_cleanup() -> None:
    """Leave the process group, if there is one."""
    if is_ddp_initialized():
        dist.destroy_process_group()


def wait_for_everyone() -> None:
    """A barrier when there are several processes; nothing otherwise."""
    if not is_ddp_initialized():
        return
    if dist.get_backend() != "nccl":
        dist.barrier()  # fails at once when another process dies
        return
    store = _get_default_store()  # a barrier of NCCL would have to be as patient as everything else that uses it
    turn = store.add(f"waits of rank {dist.get_rank()}", 1)
    if store.add(f"arrived at {turn}", 1) == dist.get_world_size():
        store.set(f"go on from {turn}", "")
    store.wait([f"go on from {turn}"], RANK0_PATIENCE)


@contextmanager
def rank0_first():
    """Run the block on rank 0, then on the others, who find the files that it left."""
    if get_dist_info()[1] != 0:
        wait_for_everyone()
    yield
    if get_dist_info()[1] == 0:
        wait_for_everyone()


def gather_numbers(numbers: list[int]) -> list[list[int]]:
    """The lists of all ranks, in their order. Every rank must call it, with lists of one length."""
    if not is_ddp_initialized():
        return [numbers]
    mine = torch.tensor(numbers, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, mine)
    return [row.tolist() for row in rows]


# %% [markdown]
# ### `require_shared_base_dir`
# On several machines the base directory must lie on a disk that all of them see. If it does not, the second machine
# finds no data, and half of every checkpoint is lost; so look before anything starts.


# %%
def require_shared_base_dir() -> None:
    """UserError, on every rank, unless all processes see the same base directory. Every rank must call it."""
    if not is_ddp_initialized():
        return
    folder, names = get_base_dir(), [""]
    if dist.get_rank() == 0:
        handle, names[0] = tempfile.mkstemp(dir=folder, prefix=".shared-")
        os.close(handle)
    dist.broadcast_object_list(names)
    path, deadline = Path(folder) / Path(names[0]).name, time.monotonic() + 5  # a network disk may lag behind
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    sights = gather_numbers([int(path.exists())])
    if dist.get_rank() == 0:
        path.unlink()
    blind = [str(rank) for rank, (sees,) in enumerate(sights) if not sees]
    if blind:
        raise UserError(
            f"rank {', '.join(blind)} does not see the files that rank 0 writes to its base directory. Point "
            "NANOCHAT_BASE_DIR (or base_dir) of all machines at one folder on a disk that they share."
        )


# %% [markdown]
# ### `get_peak_flops`
# What the tensor cores could do if nothing else took time: the denominator of model FLOPs utilisation (MFU).

# %%
# Dense bf16 TFLOPS by device name, from data sheets. All words of a row must occur; the first match wins.
PEAK_TFLOPS = (
    (("gb200",), 2500), (("grace blackwell",), 2500), (("b200",), 2250), (("b100",), 1800),
    (("h200", "nvl"), 836), (("h200", "pcie"), 836), (("h200",), 989),
    (("h100", "nvl"), 835), (("h100", "pcie"), 756), (("h100",), 989), (("h800", "nvl"), 989), (("h800",), 756),
    (("a100",), 312), (("a800",), 312), (("a40",), 149.7), (("a30",), 165),
    (("l40s",), 362), (("l40-s",), 362), (("l40 s",), 362), (("l4",), 121),
    (("mi355",), 2500), (("mi325",), 1307.4), (("mi300x",), 1307.4), (("mi300a",), 980.6), (("mi250x",), 383),
    (("mi250",), 362.1), (("5090",), 209.5), (("4090",), 165.2), (("3090",), 71),
    (("tesla t4",), 65), (("v100",), 125),  # in fp16: these two have no bf16
)  # fmt: skip


def get_peak_flops(device_name: str) -> float:
    """Peak dense bf16 FLOP/s of a device by its name; inf for one that is not in the table. Spec section 2."""
    name = device_name.lower()
    if "data center gpu max 1550" in name:
        return 512 * torch.xpu.get_device_properties("xpu").max_compute_units * 1300 * 10**6
    for words, tflops in PEAK_TFLOPS:
        if all(word in name for word in words):
            return tflops * 1e12
    return float("inf")


def device_name_of(device: torch.device) -> str:
    """What to call this device in a table: the GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return "Apple GPU"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = "CPU"
    return f"{model}, {torch.get_num_threads()} threads"


def devices_in_use(device: torch.device, processes: int) -> str:
    """What a table says of the devices: how many, which, and how many of this machine are left idle."""
    text, visible = f"{processes} × {device_name_of(device)}", torch.cuda.device_count() if device.type == "cuda" else 0
    return text if visible <= processes else f"{text}; {visible} are here, and torchrun would use them"
