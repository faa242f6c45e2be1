# %% [markdown]
# ## What every training loop needs
#
# Pretraining, fine-tuning and whatever else learns differ in what they read and how they step. Around that they are
# alike: each step leaves a record, a run can be stopped at any moment and goes on where it was, and when it is over
# someone wants to know how fast it went. That part is here, and knows nothing of the model.

# %%
import gc
import json
import math
import os
import shutil
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from nanochat.checkpoint_files import checkpoint_name, checkpoint_problem, find_last_step, read_meta
from nanochat.runtime import (
    UserError,
    device_name_of,
    gather_numbers,
    get_dist_info,
    get_peak_flops,
    print0,
    wait_for_everyone,
    write_atomic,
)

# %% [markdown]
# ### `TrainRecord`
# What one step leaves behind. The records also go to a small log beside the checkpoints, one line of JSON each, so
# that a resumed or finished run can draw its whole curve.


# %%
@dataclass(frozen=True)
class TrainRecord:
    """One step. `loss` is None in the last record, which comes after the last update and only evaluates."""

    step: int
    loss: float | None  # nats per token, mean over all micro-steps and processes
    smooth_loss: float | None  # exponential mean of the loss, β = 0.9, debiased
    lr_multiplier: float
    seconds: float
    tokens_per_second: float
    mfu: float | None  # fraction of the peak; None where the peak is unknown
    epoch: int
    total_seconds: float  # without the first steps of each process, which compile
    eta_seconds: float | None
    total_flops: float
    val_bpb: float | None = None  # measured before this step's update
    samples: tuple[str, ...] | None = None
    progress: float | None = None  # 0 to 1, how much of the run came before this step
    replayed: bool = False  # read from the log of an earlier run, not computed now
    wall_seconds: float = 0.0  # by the clock, compiling, evaluating and saving included, over all processes
    peak_memory_bytes: int | None = None  # of rank 0's GPU, in the last record


class TrainLog:
    """train_log.jsonl in a checkpoint folder: append, and cut back to a step when resuming.

    kind: the dataclass that a line is read into.
    """

    def __init__(self, folder: str, kind: type[TrainRecord] = TrainRecord):
        self.path, self.kind = Path(folder) / "train_log.jsonl", kind

    def keep_before(self, step: int, keep_evaluation: bool = False) -> list[TrainRecord]:
        """Drop the records from `step` on (an unsaved future) and return the others."""
        records = []
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                fields = json.loads(line)
            except json.JSONDecodeError:  # the line during which the process was killed
                break
            if fields["step"] < step or (keep_evaluation and fields["step"] == step):
                records.append(self.kind(**{**fields, "replayed": True}))
        write_atomic(self.path, "".join(self.line_of(record) for record in records))
        return records

    def append(self, record: TrainRecord) -> None:
        with open(self.path, "a") as file:
            file.write(self.line_of(record))

    @staticmethod
    def line_of(record: TrainRecord) -> str:
        fields = asdict(record)
        del fields["replayed"]
        return json.dumps(fields) + "\n"


# %% [markdown]
# ### `TrainMeter`
# Loss, time and speed, as the records show them. The first steps of each process compile and warm up; a clock that
# counted them would promise too long a run.

# %%
WARM_UP_STEPS = 11


class TrainMeter:
    """Adds up what the records of a run tell; `state` goes into the checkpoints and back into the next meter."""

    def __init__(self, device: torch.device, tokens_per_step: int, flops_per_step: int, state: dict | None = None):
        self.device, self.tokens_per_step, self.flops_per_step = device, tokens_per_step, flops_per_step
        self.peak_flops = get_peak_flops(device_name_of(device)) * get_dist_info()[3]
        state = state or {"min_val_bpb": None, "smooth_train_loss": 0.0, "total_training_time": 0.0}
        self.min_val_bpb = math.inf if state["min_val_bpb"] is None else state["min_val_bpb"]
        self.ema_loss, self.total_seconds = state["smooth_train_loss"], state["total_training_time"]
        self.timed_steps, self.timed_seconds = -WARM_UP_STEPS, 0.0  # of this process
        self.wall_clock_began = time.time() - state.get("total_wall_time", 0.0)

    def state(self) -> dict:
        return {
            "min_val_bpb": self.min_val_bpb if math.isfinite(self.min_val_bpb) else None,
            "smooth_train_loss": self.ema_loss,
            "total_training_time": self.total_seconds,
            "total_wall_time": time.time() - self.wall_clock_began,
        }

    def record(self, step: int, loss: float, seconds: float, progress: float, **more) -> TrainRecord:
        """The record of a step that took `seconds`. Raises UserError when its loss is not a number."""
        if not math.isfinite(loss):
            raise UserError(
                f"the loss became {loss} at step {step}. Lower the learning rates (matrix_lr, embedding_lr) "
                "and run again."
            )
        self.ema_loss = 0.9 * self.ema_loss + 0.1 * loss
        self.timed_steps += 1
        eta_seconds = None
        if self.timed_steps > 0:
            self.total_seconds += seconds
            self.timed_seconds += seconds
            if progress > 0:
                eta_seconds = (step / progress - step) * self.timed_seconds / self.timed_steps
        return TrainRecord(
            step=step,
            loss=loss,
            smooth_loss=smoothed(self.ema_loss, step + 1),
            seconds=seconds,
            tokens_per_second=self.tokens_per_step / seconds,
            mfu=self.flops_per_step / seconds / self.peak_flops if self.peak_flops < math.inf else None,
            total_seconds=self.total_seconds,
            eta_seconds=eta_seconds,
            total_flops=self.flops_per_step * (step + 1),
            progress=progress,
            wall_seconds=time.time() - self.wall_clock_began,
            **more,
        )

    def last_record(self, step: int, epoch: int, val_bpb: float, samples=None) -> TrainRecord:
        """The record after the last step."""
        return TrainRecord(
            step, None, smoothed(self.ema_loss, step), 0.0, 0.0, 0.0, None, epoch, self.total_seconds, 0.0,
            self.flops_per_step * step, val_bpb, samples, progress=1.0,
            wall_seconds=time.time() - self.wall_clock_began,
            peak_memory_bytes=torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None,
        )  # fmt: skip


# %% [markdown]
# ### Stopping politely
# Ctrl-C, the stop button and SIGTERM all mean "finish this step, save, then stop". A second Ctrl-C means now.
# A crash asks nobody, so loops save by the clock too.

# %%
AUTOSAVE_SECONDS = 600  # whatever save_every says, no crash costs more than this


class StopRequest:
    """Context manager that turns SIGINT and SIGTERM into a flag; idle outside the main thread, where none arrive."""

    def __init__(self):
        self.requested, self.previous = False, {}

    def handle(self, number, frame):
        self.requested = True
        print0("\nStopping after this step…")
        signal.signal(number, signal.default_int_handler)

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self.handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


# %% [markdown]
# ### `find_resumable`
# Going on is only right with the settings and the data that a checkpoint was trained with. A fingerprint of both is in
# its JSON. Rank 0 looks for it: a disk in the network may show another machine the folder as it was a minute ago.

# %%
DISK_PATIENCE = 90  # seconds; NFS keeps what it knows of a folder for up to one minute


def find_resumable(folder: str, fingerprint: str) -> tuple[int, dict | None]:
    """(step, meta) of the newest complete checkpoint that fits; (0, None) to start afresh.

    How many processes saved it does not matter. A model trained with other settings is not overwritten: its folder is
    moved aside first. Every rank must call it. UserError, on every rank, when one does not see what rank 0 found.
    """
    wait_for_everyone()
    rank, step = get_dist_info()[1], -1
    if rank == 0:
        try:
            step = find_last_step(folder)
        except FileNotFoundError:
            pass
    step = gather_numbers([step])[0][0]
    if step < 0:
        return 0, None
    deadline = time.monotonic() + DISK_PATIENCE
    while checkpoint_problem(folder, step) and time.monotonic() < deadline:
        time.sleep(0.5)
    problems = gather_numbers([int(bool(checkpoint_problem(folder, step)))])
    blind = [str(other) for other, (problem,) in enumerate(problems) if problem]
    if blind:
        raise UserError(
            f"rank {', '.join(blind)} does not see checkpoint {checkpoint_name(folder, step)}, which rank 0 goes on "
            "from. All machines need one base directory on a disk that they share."
        )
    meta = read_meta(folder, step)
    if meta.get("fingerprint") != fingerprint:
        aside = f"{folder}-previous"
        wait_for_everyone()
        if rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(folder, aside)
        wait_for_everyone()
        print0(f"{Path(folder).name} was trained with other settings or data; it is kept as {Path(aside).name}")
        return 0, None
    return step, meta


# %% [markdown]
# ### Compiling, if that is possible
# `torch.compile` needs a C++ compiler on a CPU and Triton on a GPU. Rather than guess, compile something tiny and see.


# %%
def compiler_works(device: torch.device) -> tuple[bool, str]:
    """Whether torch.compile can build a kernel for this device, and in words why not."""
    if device.type == "mps":
        return False, "not used on Apple GPUs"
    try:
        torch.compile(lambda x: (x + 1).sum(), dynamic=False)(torch.ones(64, device=device))
    except Exception as error:  # whatever is missing, training can go on without it
        return False, f"{type(error).__name__}: {str(error).strip().splitlines()[0][:150]}"
    return True, ""


# %% [markdown]
# ### What a loop leans on
# Small helpers with one reason each. Python's garbage collector is one of them: it stops the world for half a second
# whenever it feels like it, so after the first step it is told not to.


# %%
def smoothed(ema_loss: float, count: int) -> float | None:
    """The exponential mean without the pull of its zero start."""
    return ema_loss / (1 - 0.9**count) if count else None


def synchronize(device: torch.device) -> None:
    """Wait for the GPU, so that a clock reads the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def collect_garbage() -> None:
    """Collect now and not again by itself; what has survived is never looked at again."""
    gc.collect()
    gc.freeze()
    gc.disable()


@contextmanager
def collector_on_call():
    """Give Python its garbage collector back at the end."""
    try:
        yield
    finally:
        gc.unfreeze()
        gc.enable()


# %% [markdown]
# ### `summarize_training`
# What is left of a training when it is over, for the table and the report.


# %%
def summarize_training(records: list[TrainRecord], price_per_hour: float = 0.0) -> dict:
    """Best and last bits per byte, FLOPs, minutes, and where known MFU, GPU memory and price. Spec section 14.6."""
    evaluations = [record.val_bpb for record in records if record.val_bpb is not None]
    speeds = sorted(record.tokens_per_second for record in records if record.loss is not None)
    utilisations = sorted(record.mfu for record in records if record.mfu)
    last = records[-1]
    summary = {
        "Minimum validation bpb": min(evaluations),
        "Final validation bpb": evaluations[-1],
        "Total training flops": f"{last.total_flops:e}",
        "Total training time": f"{last.total_seconds / 60:.2f}m",
        "Median tokens per second": round(speeds[len(speeds) // 2]),
    }
    if utilisations:
        summary["MFU %"] = 100 * utilisations[len(utilisations) // 2]
    if last.peak_memory_bytes:
        summary["Peak memory usage"] = f"{last.peak_memory_bytes / 2**20:.2f}MiB"
    if price_per_hour:
        summary["Price of the training"] = f"${price_per_hour * last.total_seconds / 3600:.2f}"
    return summary


def training_times(records: list[TrainRecord]) -> dict:
    """Seconds of training proper, and by the clock."""
    return {"training seconds": records[-1].total_seconds, "wall seconds": records[-1].wall_seconds}
