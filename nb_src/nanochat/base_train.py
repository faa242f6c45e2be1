# %% [markdown]
# ## Pretraining
#
# Read text, predict the next token, correct the weights, several hundred thousand tokens at a time.
#
# The loop is a generator. It yields one record for each step and whoever calls it draws, prints or logs. It can be
# killed at any moment: started again with the same settings it continues from its last checkpoint and computes
# exactly the numbers that it would have computed.

# %%
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from nanochat.checkpoint_files import delete_old_checkpoints, load_for_training, save_checkpoint
from nanochat.dataloader import (
    merge_loader_states,
    tokenizing_distributed_data_loader_bos_bestfit,
    tokenizing_distributed_data_loader_with_state_bos_bestfit,
)
from nanochat.device_batch import fitting_device_batch
from nanochat.engine import Engine
from nanochat.fp8 import convert_to_fp8, require_fp8
from nanochat.gpt import GPT
from nanochat.loss_eval import evaluate_bpb
from nanochat.planning import DEFAULT_OPTIONS, PretrainPlan, lr_multiplier, muon_momentum, muon_weight_decay
from nanochat.precision import LossScaler
from nanochat.runtime import UserError, get_dist_info, is_ddp_initialized, print0, require_free_space
from nanochat.stages import fingerprint_of
from nanochat.tokenizer import get_token_bytes
from nanochat.training_loop import (
    AUTOSAVE_SECONDS,
    StopRequest,
    TrainLog,
    TrainMeter,
    collect_garbage,
    collector_on_call,
    compiler_works,
    find_resumable,
    synchronize,
)

# %% [markdown]
# ### `prepare_for_training`
# The last things before the first step: fp8 if it was asked for, compiled code, and a device batch that fits. Where
# nothing can be compiled, slower is better than not at all.


# %%
def prepare_for_training(model: GPT, optimizer, batch_size: int, length: int, sequences: int, options) -> int:
    """Get model and optimizer ready, and return the device batch, `batch_size` or the largest below it that fits.

    length: tokens in a sequence. sequences: that each process learns from in one step. Every process must call it.
    """
    device, compiles = model.get_device(), options.compile
    model.recompute = options.recompute
    if options.fp8:
        converted, skipped = convert_to_fp8(model)
        print0(f"fp8: {len(converted)} matrices multiply in fp8, {len(skipped)} are too small or in the loss")
    if compiles:
        compiles, reason = compiler_works(device)
        if not compiles and options.fp8:
            raise UserError(f"fp8 needs torch.compile, which is not available here ({reason}). Set fp8 to False.")
        if not compiles:
            print0(f"torch.compile is not available here ({reason}); training eagerly: slower, otherwise the same")

    def prepare(size: int) -> None:
        if options.fp8:
            require_fp8(device, size * length, options.compile)
        if compiles:
            model.compile(size, length)
            optimizer.compile()

    return fitting_device_batch(model, optimizer, batch_size, length, sequences, prepare)


# %% [markdown]
# ### `training_step`
# Forward and backward as often as a step needs, then one update. What the passes learn is weighed by whoever knows how
# much is in each of them.


# %%
def training_step(model, optimizer, scaler: LossScaler, batches, forward=None) -> torch.Tensor:
    """One update from (inputs, targets, weight) batches; returns the weighted sum of their losses, on the device.

    Every process must call it. forward: in place of the model, called as it is.
    """
    total = torch.zeros((), device=model.get_device())
    for inputs, targets, weight in batches:
        loss = (forward or model)(inputs, targets) * weight
        scaler.scale(loss).backward()
        total += loss.detach()
    scaler.step(optimizer)
    model.zero_grad(set_to_none=True)
    return total


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
def pretrain(
    plan: PretrainPlan, corpus, tokenizer, device: torch.device, compute_dtype: torch.dtype, options=DEFAULT_OPTIONS
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
    first_step, meta = find_resumable(folder, fingerprint)
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
        weights, optimizer_state = load_for_training(folder, first_step, device, optimizer.reshard)
        model.load_state_dict(weights, strict=True)
        optimizer.load_state_dict(optimizer_state)
        del weights, optimizer_state
        loader_state = meta["dataloader_state_dict"]
    scaler = LossScaler(compute_dtype)
    if first_step and "loss_scaler" in meta:
        scaler.load_state_dict(meta["loss_scaler"])
    T, sequences = settings.max_seq_len, plan.total_batch_size // (settings.max_seq_len * world_size)
    B = prepare_for_training(model, optimizer, settings.device_batch_size, T, sequences, options)

    def loader_of(split, **more):
        with_state = tokenizing_distributed_data_loader_with_state_bos_bestfit
        make = with_state if split == "train" else tokenizing_distributed_data_loader_bos_bestfit
        return make(tokenizer, B, T, split, device=device, corpus=corpus, **more)

    token_bytes = get_token_bytes(device, tokenizer)
    eval_steps = max(1, settings.eval_tokens // (B * T * world_size))
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
                "user_config": asdict(settings), "device_batch_size": B, "max_seq_len": T,
                "total_batch_size": plan.total_batch_size, "loss_scaler": scaler.state_dict(),
                "dataloader_state_dict": merge_loader_states(gather_loader_states(loader_state)),
                "loop_state": meter.state(), "fingerprint": fingerprint, "finished": step == plan.iterations,
                "world_size": world_size, "tokenizer_fingerprint": tokenizer.fingerprint(),
            },
            rank=rank,
        )  # fmt: skip
        if rank == 0:
            delete_old_checkpoints(folder, keep=2)

    def batches_of_step():
        nonlocal batch, loader_state, epoch
        passes = sequences // B
        for _ in range(passes):
            inputs, targets, loader_state = batch  # the state of what is trained on, not of what is fetched ahead
            yield inputs, targets, 1 / passes
            epoch, batch = loader_state["epoch"], next(loader)  # prepared while the device is busy

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
            multiplier = lr_multiplier(plan, step)
            set_schedules(optimizer, multiplier, muon_momentum(step), muon_weight_decay(plan, step))
            totals[0] = training_step(model, optimizer, scaler, batches_of_step())
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
# Small helpers with one reason each. The last lists what the weights depend on: when all of that is as it was, a
# checkpoint may be continued from.


# %%
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
    """A freshly initialised model of the plan's shape on the device, the same on every process, which all call it."""
    with torch.device("meta"):
        model = GPT(plan.model_config, compute_dtype)
    model.to_empty(device=device)
    torch.manual_seed(42)
    model.init_weights()
    if is_ddp_initialized():  # GPUs of two kinds draw two series of numbers from one seed
        for p in model.parameters():
            dist.broadcast(p.data, 0)
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
