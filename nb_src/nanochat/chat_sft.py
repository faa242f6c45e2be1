# %% [markdown]
# ## Supervised fine-tuning
#
# The base model continues text. Shown conversations, and corrected only where the assistant speaks, it learns to take
# its turn: to answer, to stop, to call the calculator. It is the training loop of before with other data, so most of
# its parts are those of before; what is new is how a step weighs its tokens and how the run knows where it ends.

# %%
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from nanochat.base_train import (
    build_for_training,
    gather_loader_states,
    prepare_for_training,
    set_schedules,
    training_step,
)
from nanochat.checkpoint_files import (
    checkpoint_name,
    checkpoint_path,
    delete_old_checkpoints,
    load_checkpoint,
    load_for_training,
    read_meta,
    save_checkpoint,
    saved_shares,
)
from nanochat.checkpoint_manager import checkpoint_folder, config_from_meta, locate_checkpoint
from nanochat.dataloader import LANES
from nanochat.device_batch import largest_divisor
from nanochat.gpt import GPT, GPTConfig
from nanochat.loss_eval import evaluate_bpb
from nanochat.planning import DEFAULT_OPTIONS, REFERENCE_BATCH, accumulation_steps, check_shares, muon_momentum
from nanochat.precision import LossScaler
from nanochat.runtime import (
    UserError,
    gather_numbers,
    get_dist_info,
    is_ddp_initialized,
    print0,
    require_free_space,
)
from nanochat.sft_dataloader import merge_conversation_states, sft_data_generator_bos_bestfit
from nanochat.stages import fingerprint_of
from nanochat.tokenizer import get_token_bytes
from nanochat.training_loop import (
    AUTOSAVE_SECONDS,
    StopRequest,
    TrainLog,
    TrainMeter,
    collect_garbage,
    collector_on_call,
    find_resumable,
    synchronize,
)

# %% [markdown]
# ### `SFTSettings`
# Sizes and learning rates may be left at -1: the base model's own run knows good ones.


# %%
@dataclass(frozen=True)
class SFTSettings:
    """What to fine-tune and how. Spec section 16.1. -1: as in pretraining, unless it says otherwise."""

    model_tag: str  # of the base model, and of the result; "" for the largest
    num_iterations: int  # optimizer steps; -1 for one pass over the conversations
    max_seq_len: int
    device_batch_size: int  # sequences in one forward pass
    total_batch_size: int  # tokens in one optimizer step, padding included
    embedding_lr: float
    unembedding_lr: float
    matrix_lr: float
    scalar_lr: float
    init_lr_frac: float  # times each of them
    warmup_ratio: float
    warmdown_ratio: float
    final_lr_frac: float
    eval_every: int  # steps; -1 for the end alone
    eval_tokens: int
    save_every: int  # steps; -1 for the end alone, and every ten minutes
    load_optimizer: bool  # begin with the momenta of pretraining


INHERITED_SETTINGS = (
    "max_seq_len", "device_batch_size", "total_batch_size", "embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr",
)  # fmt: skip


def inherited_settings(settings: SFTSettings, base_meta: dict, base_name: str) -> SFTSettings:
    """The settings with every -1 that stands for pretraining's value replaced by it."""
    known = (base_meta.get("user_config") or {}) | base_meta
    found = {name: known.get(name) for name in INHERITED_SETTINGS if getattr(settings, name) == -1}
    for name, value in found.items():
        if value is None:
            raise UserError(f"checkpoint {base_name} does not tell its {name}; give fine-tuning one of its own.")
    return replace(settings, **found)


# %% [markdown]
# ### `plan_fine_tuning`
# Everything that can be wrong is wrong here, before weights are loaded: no such model, no data, sizes that do not fit.


# %%
@dataclass(frozen=True)
class SFTPlan:
    """Everything that follows from the settings and the base model."""

    settings: SFTSettings  # no -1 left in sizes and learning rates
    base_folder: str
    base_step: int
    model_config: GPTConfig
    parameters: dict[str, int]  # counts by role
    flops_per_token: int
    gradient_accumulation: int  # forward passes for each step and process
    lr_scale: float  # of all learning rates, for the batch, as in pretraining
    conversations: int  # in one pass
    world_size: int
    inputs: dict  # everything that the trained weights depend on

    @property
    def checkpoint_dir(self) -> str:
        return str(checkpoint_folder("sft", Path(self.base_folder).name))


def plan_fine_tuning(
    settings: SFTSettings, train_task, val_task, tokenizer, data_inputs: dict, processes: int | None = None
) -> SFTPlan:
    """Find the base model and work out the rest; UserError when something does not fit.

    data_inputs: what the conversations are made of, as JSON types; when it changes the run starts anew. processes:
    that will train; None for those that there are.
    """
    for name, task in (("training", train_task), ("validation", val_task)):
        if not len(task):
            raise UserError(f"there is no {name} conversation to fine-tune with. Choose tasks that have some.")
    folder, base_step = locate_checkpoint("base", settings.model_tag or None, None)
    meta, name = read_meta(folder, base_step), checkpoint_name(folder, base_step)
    config, world_size = config_from_meta(meta, name), processes or get_dist_info()[3]
    if meta.get("tokenizer_fingerprint") not in (None, tokenizer.fingerprint()) or (
        tokenizer.get_vocab_size() != config.vocab_size
    ):
        raise UserError(f"the tokenizer is not the one that checkpoint {name} was trained with. Use its own.")

    inherits_batch = settings.device_batch_size == -1
    settings = inherited_settings(settings, meta, f"base {name}")
    sequences, rest = divmod(settings.total_batch_size, settings.max_seq_len * world_size)
    if inherits_batch and sequences and not rest:  # pretraining had another batch, or another number of processes
        fitting = largest_divisor(sequences, settings.device_batch_size)
        if fitting < settings.device_batch_size:
            larger = settings.device_batch_size
            print0(
                f"fine-tuning uses a device batch of {fitting}: a step cannot be divided into pretraining's {larger}"
            )
        settings = replace(settings, device_batch_size=fitting)
    B, T, batch = settings.device_batch_size, settings.max_seq_len, settings.total_batch_size
    if not 0 < T <= config.sequence_len:
        raise UserError(
            f"max_seq_len of fine-tuning is {T}, and base model {name} was trained on rows of {config.sequence_len} "
            f"tokens. Choose 1 to {config.sequence_len}."
        )
    gradient_accumulation = accumulation_steps("sft_total_batch_size", batch, B, T, world_size)
    check_shares(config, world_size)
    with torch.device("meta"):
        model = GPT(config)
    how_often = ("eval_every", "eval_tokens", "save_every", "model_tag", "device_batch_size")
    weights_file = checkpoint_path(folder, base_step, "model").name
    return SFTPlan(
        settings=settings,
        base_folder=str(folder),
        base_step=base_step,
        model_config=config,
        parameters=model.num_scaling_params(),
        flops_per_token=model.estimate_flops(),
        gradient_accumulation=gradient_accumulation,
        lr_scale=(batch / REFERENCE_BATCH) ** 0.5,
        conversations=len(train_task),
        world_size=world_size,
        inputs={
            "settings": {key: value for key, value in asdict(settings).items() if key not in how_often},
            "base": {"step": base_step, "fingerprint": meta.get("fingerprint"), "weights": meta["files"][weights_file]},
            "tokenizer": tokenizer.fingerprint(),
            "conversations": len(train_task),
            "data": data_inputs,
        },
    )


# %% [markdown]
# ### `sft_lr_multiplier`
# Up, level, down, over the progress of the run instead of its steps: of one pass over the conversations nobody knows
# beforehand how many rows they will fill.


# %%
def sft_lr_multiplier(settings: SFTSettings, progress: float) -> float:
    """Factor of all learning rates when this share (0 to 1) of the run is done. Spec section 16.4."""
    if progress < settings.warmup_ratio:
        return (progress + 1e-8) / settings.warmup_ratio
    if progress <= 1 - settings.warmdown_ratio:
        return 1.0
    decayed = (progress - (1 - settings.warmdown_ratio)) / settings.warmdown_ratio
    return 1 - decayed + decayed * settings.final_lr_frac


def sft_progress(plan: SFTPlan, step: int, consumed: int) -> float:
    """Share of the run that is done after `step` steps, which consumed so many conversations."""
    if plan.settings.num_iterations > 0:
        return step / plan.settings.num_iterations
    return min(1.0, consumed / plan.conversations)


# %% [markdown]
# ### `load_for_fine_tuning`
# From the last checkpoint of this run if there is one, else from the base model. There the optimizer's momenta come
# along too: they know the scale of every gradient, and the first steps need not find it out again. The learning rates
# are always this run's own.


# %%
def load_for_fine_tuning(plan: SFTPlan, first_step: int, device: torch.device, compute_dtype: torch.dtype):
    """(model, optimizer) as they were before step `first_step`."""
    settings = plan.settings
    folder, step = (plan.checkpoint_dir, first_step) if first_step else (plan.base_folder, plan.base_step)
    with_optimizer = first_step > 0 or settings.load_optimizer
    if with_optimizer and not first_step:
        shares = saved_shares(read_meta(folder, step))
        there = [checkpoint_path(folder, step, "optim", other).exists() for other in range(shares)]
        with_optimizer = all(all(row) for row in gather_numbers([int(shares > 0 and all(there))]))
        if not with_optimizer:
            print0(
                f"base checkpoint {checkpoint_name(folder, step)} has no complete optimizer state; "
                "fine-tuning begins with a new optimizer"
            )
    model = build_for_training(plan, device, compute_dtype)
    scale = plan.lr_scale * settings.init_lr_frac
    optimizer = model.setup_optimizer(
        unembedding_lr=settings.unembedding_lr * scale,
        embedding_lr=settings.embedding_lr * scale,
        matrix_lr=settings.matrix_lr * scale,
        scalar_lr=settings.scalar_lr * scale,
    )
    if with_optimizer:
        weights, saved = load_for_training(folder, step, device, optimizer.reshard)
        optimizer.load_state_dict(optimizer.state_dict() | {"state": saved["state"]})
    else:
        weights, _, _ = load_checkpoint(folder, step, device)
    model.load_state_dict(weights, strict=True)
    return model, optimizer


# %% [markdown]
# ### `step_batches`
# The batches of one step are fetched together, because a batch must know its share: with many short answers in one and
# a long question in another, the mean of their means is not the mean over the tokens.


# %%
def step_batches(plan: SFTPlan, loader, passes: int) -> tuple[list, int, int]:
    """(batches, learned targets in them, conversations consumed up to their end), both numbers over all ranks.

    passes: batches in a step of one rank. Raises UserError when nothing is left to learn anywhere. Every rank must
    call it.
    """
    for _ in range(max(LANES, plan.world_size)):  # a lane may have nothing to learn; after so many all had their turn
        batches = [next(loader) for _ in range(passes)]
        states = [state for _, _, state in batches]
        rows = gather_numbers([sum(state["targets"] for state in states), states[-1]["consumed"]])
        n_targets, consumed = (sum(column) for column in zip(*rows, strict=True))
        if n_targets:
            return batches, n_targets, consumed
    raise UserError(
        f"none of the {plan.conversations} conversations has an assistant's turn within {plan.settings.max_seq_len} "
        "tokens, so there is nothing to learn. Raise max_seq_len, or check the data."
    )


# %% [markdown]
# ### `fine_tune`
# The same contract as `pretrain`: a generator of records, that can be killed at any moment.
#
# Without `num_iterations` the run is over when as many conversations are consumed as there are. Each lane counts its
# own passes, so at that moment some are a few conversations ahead and others as many behind.


# %%
def fine_tune(
    plan: SFTPlan, train_task, val_task, tokenizer, device: torch.device, compute_dtype: torch.dtype,
    options=DEFAULT_OPTIONS,
):  # fmt: skip
    """Fine-tune the plan's base model, or go on with it; yields a TrainRecord for each step and one after the last.

    train_task, val_task: len() and [i] -> conversation. The loss is the mean over all learned tokens of the step;
    val_bpb is over the assistant's text. Steps that an earlier run has done come first, from its log. Checkpoints go
    to `plan.checkpoint_dir`. Raises KeyboardInterrupt after saving when asked to stop. Every process must iterate.
    """
    settings, folder = plan.settings, plan.checkpoint_dir
    _, rank, _, world_size = get_dist_info()
    T, fingerprint = settings.max_seq_len, fingerprint_of(plan.inputs)
    log = TrainLog(folder)
    first_step, meta = find_resumable(folder, fingerprint)
    finished = first_step > 0 and meta["finished"]
    history = log.keep_before(first_step, keep_evaluation=finished) if rank == 0 else []
    if first_step:
        what_now = "finished earlier, nothing to do" if finished else f"going on from step {first_step}"
        print0(f"fine-tuning {Path(folder).name}: {what_now}")
    yield from history
    if finished:
        return
    require_free_space(40 * plan.parameters["total"], f"fine-tuning {Path(folder).name}")

    model, optimizer = load_for_fine_tuning(plan, first_step, device, compute_dtype)
    scaler = LossScaler(compute_dtype)
    if first_step and "loss_scaler" in meta:
        scaler.load_state_dict(meta["loss_scaler"])
    sequences = settings.total_batch_size // (T * world_size)
    B = prepare_for_training(model, optimizer, settings.device_batch_size, T, sequences, options)
    meter = TrainMeter(
        device, settings.total_batch_size, plan.flops_per_token * settings.total_batch_size,
        meta["loop_state"] if first_step else None,
    )  # fmt: skip
    token_bytes = get_token_bytes(device, tokenizer)
    eval_steps = max(1, settings.eval_tokens // (B * T * world_size))
    loader_state = meta["dataloader_state_dict"] if first_step else None
    loader = sft_data_generator_bos_bestfit(tokenizer, train_task, B, T, device, resume_state_dict=loader_state)
    step, consumed, val_bpb, stops = first_step, loader_state["consumed"] if loader_state else 0, None, 0
    following = step_batches(plan, loader, sequences // B)
    last_save = time.monotonic()

    def save(finished=False):
        save_checkpoint(
            folder, step, model.state_dict(), optimizer.state_dict(),
            {
                "step": step, "val_bpb": val_bpb, "model_config": asdict(plan.model_config),
                "user_config": asdict(settings), "device_batch_size": B, "max_seq_len": T,
                "total_batch_size": settings.total_batch_size,
                "dataloader_state_dict": merge_conversation_states(gather_loader_states(loader_state)),
                "loop_state": meter.state(), "loss_scaler": scaler.state_dict(), "fingerprint": fingerprint,
                "finished": finished, "world_size": world_size, "tokenizer_fingerprint": tokenizer.fingerprint(),
                "base": {"model_tag": Path(plan.base_folder).name, "step": plan.base_step},
            },
            rank=rank,
        )  # fmt: skip
        if rank == 0:
            delete_old_checkpoints(folder, keep=2)

    def validate() -> float:
        batches = sft_data_generator_bos_bestfit(tokenizer, val_task, B, T, device, repeat=False)
        return evaluate_bpb(model, ((inputs, targets) for inputs, targets, _ in batches), eval_steps, token_bytes)

    with StopRequest() as stop, collector_on_call():
        while True:
            progress = sft_progress(plan, step, consumed)
            epoch, last_step = max(1, -(-consumed // plan.conversations)), progress >= 1
            val_bpb = None
            if last_step or (settings.eval_every > 0 and step % settings.eval_every == 0):
                val_bpb = validate()
                meter.min_val_bpb = min(meter.min_val_bpb, val_bpb)
            if last_step:
                record = meter.last_record(step, epoch, val_bpb)
                if rank == 0:
                    log.append(record)
                save(finished=True)  # after the record: a finished checkpoint means that nothing is missing
                yield record
                break
            if settings.save_every > 0 and step % settings.save_every == 0 and step not in (0, first_step):
                save()
                last_save = time.monotonic()

            synchronize(device)
            started = time.perf_counter()
            totals = torch.zeros(3, device=device)  # loss, how many were asked to stop, whether it is time to save
            batches, n_targets, consumed = following
            loader_state = batches[-1][2]
            multiplier = sft_lr_multiplier(settings, progress)
            set_schedules(optimizer, multiplier, muon_momentum(step), weight_decay=0.0)
            # The optimizer takes the mean over the processes and this is a sum, so each weight is times their number.
            weighed = ((x, y, world_size * state["targets"] / n_targets) for x, y, state in batches)
            totals[0] = training_step(model, optimizer, scaler, weighed)
            following_progress = sft_progress(plan, step + 1, consumed)
            if following_progress < 1:
                following = step_batches(plan, loader, sequences // B)  # prepared while the device is busy
            totals[1] = float(stop.requested)
            totals[2] = float(rank == 0 and time.monotonic() - last_save > AUTOSAVE_SECONDS)
            if is_ddp_initialized():
                dist.all_reduce(totals)
            loss_sum, stops, save_is_due = totals.tolist()
            synchronize(device)
            seconds = time.perf_counter() - started

            record = meter.record(
                step, loss_sum / world_size, seconds, progress, lr_multiplier=multiplier, epoch=epoch, val_bpb=val_bpb
            )
            if rank == 0:
                log.append(record)
            yield record
            if step == first_step or step % 5000 == 0:
                collect_garbage()
            step += 1
            if (stops or save_is_due) and following_progress < 1:
                val_bpb = None
                save()
                last_save = time.monotonic()
                if stops:
                    break
    if stop.requested or stops:
        raise KeyboardInterrupt("stopped and saved; run again to go on from there")
