# %% [markdown]
# ## Pretraining
#
# Read text, predict the next token, correct the weights, several hundred thousand tokens at a time.
#
# The loop is a generator. It yields one record for each step and whoever calls it draws, prints or logs. It can be
# killed at any moment: started again with the same settings it continues from its last checkpoint and computes
# exactly the numbers that it would have computed.

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
import torch.distributed as dist

from nanochat.checkpoint_manager import (
    delete_old_checkpoints,
    find_last_step,
    load_checkpoint,
    read_meta,
    save_checkpoint,
)
from nanochat.dataloader import (
    merge_loader_states,
    tokenizing_distributed_data_loader_bos_bestfit,
    tokenizing_distributed_data_loader_with_state_bos_bestfit,
)
from nanochat.engine import Engine
from nanochat.gpt import GPT
from nanochat.loss_eval import evaluate_bpb
from nanochat.planning import PretrainPlan, lr_multiplier, muon_momentum, muon_weight_decay
from nanochat.runtime import (
    UserError,
    device_name_of,
    get_dist_info,
    get_peak_flops,
    is_ddp_initialized,
    print0,
    require_free_space,
    wait_for_everyone,
    write_atomic,
)
from nanochat.stages import fingerprint_of
from nanochat.tokenizer import get_token_bytes

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


class TrainLog:
    """train_log.jsonl in a checkpoint folder: append, and cut back to a step when resuming."""

    def __init__(self, folder: str):
        self.path = Path(folder) / "train_log.jsonl"

    def keep_before(self, step: int, keep_evaluation: bool = False) -> list[TrainRecord]:
        """Drop the records from `step` on (an unsaved future) and return the others."""
        records = []
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                fields = json.loads(line)
            except json.JSONDecodeError:  # the line during which the process was killed
                break
            if fields["step"] < step or (keep_evaluation and fields["step"] == step):
                records.append(TrainRecord(**{**fields, "replayed": True}))
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
        self.tokens_per_step, self.flops_per_step = tokens_per_step, flops_per_step
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
        )  # fmt: skip


# %% [markdown]
# ### Stopping politely
# Ctrl-C, the stop button and SIGTERM all mean "finish this step, save, then stop". A second Ctrl-C means now.


# %%
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


def compile_for_training(model: GPT, optimizer, batch_size: int, length: int) -> None:
    """Compile model and optimizer for batches of this shape, or say why training will be eager."""
    works, reason = compiler_works(model.get_device())
    if works:
        model.compile(batch_size, length)
        optimizer.compile()
    else:
        print0(f"torch.compile is not available here ({reason}); training eagerly: slower, otherwise the same")


# %% [markdown]
# ### `sample_text`
# Seven beginnings that show what a small model picks up first: facts, patterns, then arithmetic, in that order or
# never.

# %%
SAMPLE_PROMPTS = (
    "The capital city of France is called",
    "In chemistry, the symbol for gold is",
    "If today is Monday, then tomorrow is",
    "The opposite of cold is",
    "The planets, starting from the sun, are",
    "The food that I like best is",
    "If 3*x + 4 = 19, then x is",
)


def sample_text(model: GPT, tokenizer, prompts=SAMPLE_PROMPTS, max_tokens: int = 16) -> tuple[str, ...]:
    """Each prompt with its greedy continuation."""
    engine = Engine(model, tokenizer)
    bos = tokenizer.get_bos_token_id()
    rows = (
        engine.generate_batch(tokenizer.encode(p, prepend=bos), max_tokens=max_tokens, temperature=0) for p in prompts
    )
    return tuple(tokenizer.decode(results[0][1:]) for results, _ in rows)


# %% [markdown]
# ### `pretrain`
# The loop. In words: at some steps measure, sample and save; fetch a batch and accumulate gradients until the step
# has its tokens; set the schedules; update.


# %%
AUTOSAVE_SECONDS = 600  # whatever save_every says, no crash costs more than this


def pretrain(
    plan: PretrainPlan, corpus, tokenizer, device: torch.device, compute_dtype: torch.dtype, compile_model=True
):
    """Train a base model, or go on training it; yields a TrainRecord for each step and one after the last.

    Steps that an earlier run has done come first, from its log (`record.replayed`). Checkpoints go to
    `plan.settings.checkpoint_dir`; the newest that fits the plan is continued from, exactly. Raises KeyboardInterrupt
    after saving when asked to stop. Every process of the group must iterate.
    """
    settings, folder = plan.settings, plan.settings.checkpoint_dir
    _, rank, _, world_size = get_dist_info()
    fingerprint = fingerprint_of(pretraining_inputs(plan, corpus, tokenizer))
    log = TrainLog(folder)
    first_step, meta = find_resumable(folder, fingerprint, world_size)
    finished = first_step == plan.iterations
    history = log.keep_before(first_step, keep_evaluation=finished) if rank == 0 else []
    if first_step:
        what_now = "finished earlier, nothing to do" if finished else f"going on from step {first_step}"
        print0(f"{Path(folder).name}: {what_now}")
    yield from history
    if finished:
        return
    require_free_space(40 * plan.parameters["total"], f"training {Path(folder).name}")  # two checkpoints and a margin

    model = build_for_training(plan, device, compute_dtype)
    beta1, beta2 = settings.adam_beta1, settings.adam_beta2
    optimizer = model.setup_optimizer(
        unembedding_lr=settings.unembedding_lr * plan.lr_scale,
        embedding_lr=settings.embedding_lr * plan.lr_scale,
        matrix_lr=settings.matrix_lr * plan.lr_scale,
        weight_decay=plan.weight_decay,
        adam_betas=(beta1, beta2),
        scalar_lr=settings.scalar_lr * plan.lr_scale,
    )
    loader_state = None
    if first_step:
        weights, optimizer_state, _ = load_checkpoint(folder, first_step, device, load_optimizer=True, rank=rank)
        model.load_state_dict(weights, strict=True)
        optimizer.load_state_dict(optimizer_state)
        del weights, optimizer_state
        loader_state = meta["dataloader_state_dict"]
    if compile_model:
        compile_for_training(model, optimizer, settings.device_batch_size, settings.max_seq_len)

    def loader_of(split, **more):
        with_state = tokenizing_distributed_data_loader_with_state_bos_bestfit
        make = with_state if split == "train" else tokenizing_distributed_data_loader_bos_bestfit
        return make(
            tokenizer, settings.device_batch_size, settings.max_seq_len, split, device=device, corpus=corpus, **more
        )

    token_bytes = get_token_bytes(device, tokenizer)
    eval_steps = max(1, settings.eval_tokens // (settings.device_batch_size * settings.max_seq_len * world_size))
    flops_per_step = plan.flops_per_token * plan.total_batch_size
    meter = TrainMeter(device, plan.total_batch_size, flops_per_step, meta["loop_state"] if first_step else None)
    loader = loader_of("train", resume_state_dict=loader_state)
    batch = next(loader)
    val_bpb, epoch, stops = None, batch[2]["epoch"], 0
    last_save = time.monotonic()

    def save(step):
        save_checkpoint(
            folder, step, model.state_dict(), optimizer.state_dict(),
            {
                "step": step, "val_bpb": val_bpb, "model_config": asdict(plan.model_config),
                "user_config": asdict(settings), "device_batch_size": settings.device_batch_size,
                "max_seq_len": settings.max_seq_len,
                "total_batch_size": plan.total_batch_size,
                "dataloader_state_dict": merge_loader_states(gather_loader_states(loader_state)),
                "loop_state": meter.state(), "fingerprint": fingerprint, "world_size": world_size,
                "tokenizer_fingerprint": tokenizer.fingerprint(),
            },
            rank=rank,
        )  # fmt: skip
        if rank == 0:
            delete_old_checkpoints(folder, keep=2)

    with StopRequest() as stop, collector_on_call():
        for step in range(first_step, plan.iterations + 1):
            last_step = step == plan.iterations
            val_bpb, samples = None, None
            if last_step or (settings.eval_every > 0 and step % settings.eval_every == 0):
                val_bpb = evaluate_bpb(model, loader_of("val"), eval_steps, token_bytes)
                meter.min_val_bpb = min(meter.min_val_bpb, val_bpb)
            if rank == 0 and step and (last_step or (settings.sample_every > 0 and step % settings.sample_every == 0)):
                samples = sample_text(model, tokenizer)
            save_now = settings.save_every > 0 and step % settings.save_every == 0 and step not in (0, first_step)
            if save_now and not last_step:
                save(step)
                last_save = time.monotonic()
            if last_step:
                record = meter.last_record(step, epoch, val_bpb, samples)
                if rank == 0:
                    log.append(record)
                save(step)  # after the record: a checkpoint at the last step means that nothing is missing
                yield record
                break

            synchronize(device)
            started = time.perf_counter()
            totals = torch.zeros(3, device=device)  # loss, how many were asked to stop, whether it is time to save
            for _ in range(plan.gradient_accumulation):
                inputs, targets, state = batch
                loss = model(inputs, targets) / plan.gradient_accumulation
                loss.backward()
                totals[0] += loss.detach()
                epoch = state["epoch"]
                batch = next(loader)  # prepared while the device is busy
            loader_state = state  # of the last batch that was trained on, not of the one fetched ahead
            multiplier = lr_multiplier(plan, step)
            set_schedules(optimizer, multiplier, muon_momentum(step), muon_weight_decay(plan, step))
            optimizer.step()
            model.zero_grad(set_to_none=True)
            totals[1] = float(stop.requested)
            totals[2] = float(rank == 0 and time.monotonic() - last_save > AUTOSAVE_SECONDS)
            if is_ddp_initialized():
                dist.all_reduce(totals)
            loss_sum, stops, save_is_due = totals.tolist()
            synchronize(device)
            seconds = time.perf_counter() - started

            record = meter.record(
                step, loss_sum / world_size, seconds, step / plan.iterations,
                lr_multiplier=multiplier, epoch=epoch, val_bpb=val_bpb, samples=samples,
            )  # fmt: skip
            if rank == 0:
                log.append(record)
            yield record
            if (stops or save_is_due) and step + 1 < plan.iterations:
                val_bpb = None
                save(step + 1)
                last_save = time.monotonic()
                if stops:
                    break
            if step == first_step or step % 5000 == 0:
                collect_garbage()
    if stop.requested or stops:
        raise KeyboardInterrupt("stopped and saved; run again to go on from there")


# %% [markdown]
# ### What the loop leans on
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


def set_schedules(optimizer, multiplier: float, momentum: float, weight_decay: float) -> None:
    """Learning rates of all groups, momentum and weight decay of Muon's, for the step that follows."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * multiplier
        if group["kind"] == "muon":
            group["momentum"], group["weight_decay"] = momentum, weight_decay


def gather_loader_states(state: dict) -> list[dict]:
    """The dataloader states of all ranks. Every rank must call it."""
    states = [state] * get_dist_info()[3]
    if is_ddp_initialized():
        dist.all_gather_object(states, state)
    return states


def build_for_training(plan: PretrainPlan, device: torch.device, compute_dtype: torch.dtype) -> GPT:
    """A freshly initialised model of the plan's shape on the device, the same on every process."""
    with torch.device("meta"):
        model = GPT(plan.model_config, compute_dtype)
    model.to_empty(device=device)
    torch.manual_seed(42)
    model.init_weights()
    return model


def pretraining_inputs(plan: PretrainPlan, corpus, tokenizer) -> dict:
    """Everything that the trained weights depend on. How often to look, save or sample is not part of it."""
    settings = asdict(plan.settings)
    for name in ("eval_every", "eval_tokens", "sample_every", "save_every", "model_tag", "device_batch_size"):
        del settings[name]
    return {
        "settings": settings,
        "iterations": plan.iterations,
        "total_batch_size": plan.total_batch_size,
        "model_config": asdict(plan.model_config),
        "corpus": corpus.fingerprint(),
        "tokenizer": tokenizer.fingerprint(),
    }


def find_resumable(folder: str, fingerprint: str, world_size: int) -> tuple[int, dict | None]:
    """(step, meta) of the newest complete checkpoint that fits; (0, None) to start afresh.

    A model trained with other settings is not overwritten: its folder is moved aside first.
    """
    wait_for_everyone()
    try:
        step = find_last_step(folder)
    except FileNotFoundError:
        return 0, None
    meta = read_meta(folder, step)
    if meta.get("fingerprint") != fingerprint:
        aside = f"{folder}-previous"
        wait_for_everyone()
        if get_dist_info()[1] == 0:
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(folder, aside)
        wait_for_everyone()
        print0(f"{Path(folder).name} was trained with other settings or data; it is kept as {Path(aside).name}")
        return 0, None
    if meta["world_size"] != world_size and step:
        raise UserError(
            f"checkpoint {Path(folder).name} was written by {meta['world_size']} processes and this run has "
            f"{world_size}. Start {meta['world_size']}, or give this run another model_tag."
        )
    return step, meta


# %% [markdown]
# ### `summarize_training`
# What is left of a training when it is over, for the table and the report.


# %%
def summarize_training(records: list[TrainRecord], device: torch.device, price_per_hour: float = 0.0) -> dict:
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
    if device.type == "cuda":
        summary["Peak memory usage"] = f"{torch.cuda.max_memory_allocated(device) / 2**20:.2f}MiB"
    if price_per_hour:
        summary["Price of the training"] = f"${price_per_hour * last.total_seconds / 3600:.2f}"
    return summary


def training_times(records: list[TrainRecord]) -> dict:
    """Seconds of training proper, and by the clock."""
    return {"training seconds": records[-1].total_seconds, "wall seconds": records[-1].wall_seconds}
