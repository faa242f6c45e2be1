# %% [markdown]
# ## Training against the clock
#
# One loop trains both systems. A step has eight slices of tokens, shared out over one, two, four or eight processes;
# gradients are summed once, clipped if asked for, and applied by everyone alike. The clock runs only while the model
# learns: it stands still during validation and while a checkpoint is written.
#
# The loop is a generator. It yields a record for each step, and whoever calls it draws and logs. Killed at any moment
# and started again it goes on from its last checkpoint, at the step and at the time at which that was written.

# %%
import math
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from golf.golf_gpt import GolfModel
from golf.golf_optim import GolfOptimizer, WeightEMA, reduce_gradients
from golf.golf_schedule import TrainingClock, golf_muon_momentum, progress_lr_multiplier, warm_up_and_restore
from golf.golf_scoring import score_stream
from golf.golf_settings import golf_accumulation_steps
from golf.golf_tokenizers import ByteTables
from golf.shards import DistributedTokenLoader
from nanochat.checkpoint_files import delete_old_checkpoints, load_for_training, save_checkpoint
from nanochat.runtime import UserError, get_dist_info, is_ddp_initialized, print0
from nanochat.stages import fingerprint_of
from nanochat.training_loop import (
    AUTOSAVE_SECONDS,
    StopRequest,
    TrainLog,
    collect_garbage,
    collector_on_call,
    compiler_works,
    find_resumable,
)

# %% [markdown]
# ### `GolfTraining` and `GolfRecord`
# The settings of the loop, under the challenge's names, and what one step leaves behind.


# %%
@dataclass(frozen=True)
class GolfTraining:
    """Golf spec sections 2.1 and 4.2. val_batch_size and train_batch_tokens: tokens over all processes."""

    iterations: int
    warmup_steps: int
    warmdown_iters: int
    max_wallclock_seconds: float  # 0: no cap
    train_batch_tokens: int
    train_seq_len: int
    val_batch_size: int
    val_loss_every: int
    train_log_every: int
    save_every: int
    grad_clip_norm: float
    muon_momentum: float
    muon_momentum_warmup_start: float
    muon_momentum_warmup_steps: int
    seed: int
    warmdown_fraction: float = 0.0  # of the run, instead of warmdown_iters
    device_batch_tokens: int = 0  # at most so many in one forward; 0: a whole slice, as in the original

    def momentum(self, step: int) -> float:
        return golf_muon_momentum(
            step, self.muon_momentum_warmup_start, self.muon_momentum, self.muon_momentum_warmup_steps
        )

    def lr_multiplier(self, clock: TrainingClock, step: int) -> float:
        if self.warmdown_fraction:
            return progress_lr_multiplier(clock.progress(step), self.warmdown_fraction)
        return clock.lr_multiplier(step, self.warmdown_iters)

    def rows_at_once(self, rows: int) -> int:
        """How many of the sequences of a slice go through the model together: the most that divide it and fit."""
        fitting = max(1, self.device_batch_tokens // self.train_seq_len) if self.device_batch_tokens else rows
        return max(n for n in range(1, rows + 1) if rows % n == 0 and n <= fitting)

    def scoring_windows_at_once(self, length: int) -> int:
        """Windows of `length` tokens in one forward pass: those of an eighth of VAL_BATCH_SIZE, at least one."""
        tokens = self.val_batch_size // 8  # as if validation had the slices of a step, on any number of processes
        return max(1, min(tokens, self.device_batch_tokens or tokens) // length)


@dataclass(frozen=True)
class GolfRecord:
    """After `step` updates. loss: of the update before, where it was logged; val_*: where it was validated."""

    step: int
    train_ms: float  # the clock of the challenge
    lr_multiplier: float
    muon_momentum: float
    loss: float | None = None  # nats per token
    val_loss: float | None = None  # nats per token
    val_bpb: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None
    progress: float = 0.0
    stopped_early: bool = False  # by the clock
    peak_mib: list[int] | None = None  # GPU memory allocated and reserved, in the last record
    replayed: bool = False  # read from the log of an earlier run


# %% [markdown]
# ### `device_batch_for`
# The original's slices are made for GPUs of 80 GB. A slice can go through a smaller one in parts: the gradient is the
# same sum.


# %%
def device_batch_for(device: torch.device, whole_slice_bytes: float) -> int:
    """Tokens in one forward: 0, a whole slice, on a CPU or where a GPU has whole_slice_bytes; 16,384 elsewhere."""
    small = device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory < whole_slice_bytes
    return 16_384 if small else 0


# %% [markdown]
# ### `compile_golf`
# The compiled model shares its weights with the eager one. It meets one shape in training and one in scoring.


# %%
def compile_golf(model: GolfModel, optimizer: GolfOptimizer | None, wanted: bool):
    """The model to call: compiled, or the model itself with the reason printed. optimizer: None to score only."""
    if not wanted:
        return model
    works, reason = compiler_works(next(model.parameters()).device)
    if not works:
        print0(f"torch.compile is not available here ({reason}); training eagerly: slower, otherwise the same")
        return model
    # one form for each depth, in training and in scoring: with torch's eight a run of many depths would be an error
    torch._dynamo.config.recompile_limit = 64
    if optimizer is not None:
        optimizer.compile()
    return torch.compile(model, dynamic=False, fullgraph=True)


# %% [markdown]
# ### `golf_step`
# Forward, backward, update. Processes exchange the sum of their gradients and the directions that Muon shares out.


# %%
def golf_step(
    call, optimizer: GolfOptimizer, loader: DistributedTokenLoader, training: GolfTraining, lr_multiplier: float,
    momentum: float, options: dict,
) -> torch.Tensor:  # fmt: skip
    """One update; returns the mean loss of this process's slices, still on the device.

    call: the model, compiled or not. options: further arguments of its forward.
    """
    accumulation = golf_accumulation_steps(loader.world_size)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    total = torch.zeros((), device=parameters[0].device)
    for _ in range(accumulation):
        inputs, targets = loader.next_batch(training.train_batch_tokens, training.train_seq_len, accumulation)
        rows = training.rows_at_once(len(inputs))
        for x, y in zip(inputs.split(rows), targets.split(rows), strict=True):
            loss = call(x, y, **options) * (rows / len(inputs) / accumulation)
            loss.backward()
            total += loss.detach()
    reduce_gradients(parameters, 1 / loader.world_size)
    if training.grad_clip_norm > 0:
        torch.nn.utils.clip_grad_norm_(parameters, training.grad_clip_norm)
    optimizer.set_schedule(lr_multiplier, momentum)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


# %% [markdown]
# ### `train_golf`
# The loop. With a cap on the time, what is left of it decides the learning rate; the step after which it is over is
# the same for all processes.


# %%
def train_golf(
    folder, training: GolfTraining, model: GolfModel, optimizer: GolfOptimizer, call, loader: DistributedTokenLoader,
    val_tokens: torch.Tensor, byte_tables: ByteTables, inputs: dict, ema: WeightEMA | None = None, variants=({},),
    options_at=lambda step, progress, scoring: {},
):  # fmt: skip
    """Train `model` in place, or go on training it; yields a GolfRecord after each step and one at the start.

    folder: for checkpoints; the newest that fits is continued from. call: what runs the model (`compile_golf`).
    inputs: all else that the result depends on (shapes, learning rates, data), for the fingerprint.
    variants: forward options to compile in the warm-up. options_at: those of a step, of its update or of its
    validation, the same on all processes. Raises KeyboardInterrupt after saving when asked to stop. Every process must
    iterate. Golf spec section 2.5.
    """
    _, rank, _, world_size = get_dist_info()
    device = next(model.parameters()).device
    settings = asdict(training)
    for name in ("val_batch_size", "val_loss_every", "train_log_every", "save_every", "device_batch_tokens"):
        del settings[name]
    fingerprint = fingerprint_of({"training": settings, "inputs": inputs})
    log = TrainLog(folder, GolfRecord)
    step, meta = find_resumable(str(folder), fingerprint)
    finished = bool(meta and meta["finished"])
    history = log.keep_before(step, keep_evaluation=meta is not None) if rank == 0 else []
    if meta:

        def reshard(shares):  # the average of the weights is the same everywhere
            return {"optimizer": optimizer.reshard([share["optimizer"] for share in shares]), "ema": shares[0]["ema"]}

        weights, state = load_for_training(folder, step, device, reshard)
        model.load_state_dict(weights)
        optimizer.load_state_dict(state["optimizer"])
        if ema is not None:
            ema.load_state_dict(state["ema"])
        print0(f"{Path(folder).parent.name}: {'trained earlier' if finished else f'going on from step {step}'}")
    yield from history
    if finished:
        return

    clock = TrainingClock(training.iterations, training.max_wallclock_seconds)
    stream = loader.stream

    def update(step, multiplier, options):
        return golf_step(call, optimizer, loader, training, multiplier, training.momentum(step), options)

    for options in variants:
        warm_up_and_restore(model, optimizer, lambda i, options=options: update(i, 1.0, options), training.warmup_steps)
    loader = DistributedTokenLoader(stream, rank, world_size, device)
    if meta:
        loader.position, clock.counted = meta["position"], meta["train_ms"] / 1000
        clock.elapsed_ms = meta["train_ms"]

    def validate():
        batch = training.scoring_windows_at_once(training.train_seq_len)
        losses_of = partial(call, reduction="none", **options_at(step, clock.progress(step), True))
        return score_stream(losses_of, val_tokens, byte_tables, training.train_seq_len, None, batch, device)

    def save(finished=False):
        save_checkpoint(
            folder, step, model.state_dict(),
            {"optimizer": optimizer.state_dict(), "ema": ema.state_dict() if ema is not None else None},
            {"finished": finished, "position": loader.position, "train_ms": clock.elapsed_ms,
             "fingerprint": fingerprint, "world_size": world_size, "model_config": asdict(model.config)},
            rank=rank,
        )  # fmt: skip
        if rank == 0:
            delete_old_checkpoints(folder, keep=2)

    loss, last_save, began, began_ms = None, time.monotonic(), step, clock.elapsed_ms
    multiplier, asked_to_stop, save_is_due = training.lr_multiplier(clock, step), False, False
    with StopRequest() as stop, collector_on_call():
        clock.resume()
        while True:
            over, sums = clock.is_over(step), None
            known = meta is not None and step == began  # the log has its record already
            if over or (training.val_loss_every > 0 and step % training.val_loss_every == 0 and not known):
                clock.pause()
                if over:
                    clock.step_done(step)  # a GPU has now finished what it was given
                sums = validate()
                clock.resume()
            logged = over or step <= 10 or step % training.train_log_every == 0
            saving = over or ((asked_to_stop or save_is_due) and step > began)
            mean_loss = shared_loss(loss) if loss is not None and (logged or saving) else None
            pace = (clock.elapsed_ms - began_ms) / (step - began) if step > began else None
            record = GolfRecord(
                step=step,
                train_ms=clock.elapsed_ms,
                lr_multiplier=multiplier,
                muon_momentum=training.momentum(max(step - 1, 0)),
                loss=mean_loss if logged else None,
                val_loss=sums.val_loss if sums else None,
                val_bpb=sums.val_bpb if sums else None,
                tokens_per_second=1000 * training.train_batch_tokens / pace if pace else None,
                eta_seconds=clock.seconds_left(step, pace) if pace else None,
                progress=clock.progress(step),
                stopped_early=over and step < training.iterations,
                peak_mib=peak_memory_mib() if over else None,
            )
            if not known:
                if rank == 0:
                    log.append(record)
                yield record
            if saving:
                clock.pause()
                save(finished=over)
                last_save = time.monotonic()
                if over:
                    return
                if asked_to_stop:
                    raise KeyboardInterrupt("stopped and saved; run again to go on from there")
                clock.resume()
            multiplier = training.lr_multiplier(clock, step)
            loss = update(step, multiplier, options_at(step, clock.progress(step), False))
            step += 1
            if ema is not None:
                ema.update(step, clock.progress(step))
            timed_out = rank == 0 and time.monotonic() - last_save > AUTOSAVE_SECONDS
            asked_to_stop, save_is_due = clock.step_done(step, stop.requested, timed_out)
            save_is_due |= training.save_every > 0 and step % training.save_every == 0
            if step == began + 1 or step % 5000 == 0:
                collect_garbage()


def peak_memory_mib() -> list[int]:
    """The most memory of this process's GPU that was allocated and reserved, in MiB; zeros without one."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return [0, 0]
    return [torch.cuda.max_memory_allocated() >> 20, torch.cuda.max_memory_reserved() >> 20]


def shared_loss(loss: torch.Tensor) -> float:
    """The mean over all processes. Raises UserError, everywhere alike, when it is not a number."""
    loss = loss.clone()
    if is_ddp_initialized():
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
    value = loss.item()
    if not math.isfinite(value):
        raise UserError(f"the loss became {value}. Lower MATRIX_LR, SCALAR_LR and the embedding's rate and run again.")
    return value
