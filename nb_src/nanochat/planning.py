# %% [markdown]
# ## From one dial to a plan
#
# Everything about a training run follows from the depth: it gives the width, the width gives the number of
# parameters, the parameters give the amount of text, and the amount of text gives the batch size. So the whole run is
# known before a byte is downloaded: a model on PyTorch's meta device has shapes and no memory.

# %%
import math
import os
import time
from dataclasses import dataclass, replace

import torch

from nanochat.device_batch import starting_device_batch
from nanochat.gpt import GPT, GPTConfig
from nanochat.runtime import UserError, device_name_of, get_base_dir, get_dist_info, get_peak_flops

# %% [markdown]
# ### `PretrainSettings`
# Every dial of the run. The values come from the notebook's parameter cell and preset.


# %%
@dataclass(frozen=True)
class PretrainSettings:
    """What to train and for how long. Spec section 14.1. -1 means "derive it"."""

    depth: int
    aspect_ratio: int  # model width for each layer of depth
    head_dim: int
    max_seq_len: int
    window_pattern: str
    num_iterations: int  # first of these three that is positive decides the horizon
    target_flops: float
    target_param_data_ratio: float  # tokens for each scaling parameter
    device_batch_size: int  # sequences in one forward pass, at the most; -1: as many as the memory holds
    total_batch_size: int  # tokens in one optimizer step
    embedding_lr: float
    unembedding_lr: float
    weight_decay: float  # Muon's, at depth 12
    matrix_lr: float
    scalar_lr: float
    adam_beta1: float
    adam_beta2: float
    warmup_ratio: float
    warmdown_ratio: float
    final_lr_frac: float
    eval_every: int
    eval_tokens: int
    sample_every: int
    save_every: int
    model_tag: str

    @property
    def checkpoint_dir(self) -> str:
        return os.path.join(get_base_dir(), "base_checkpoints", self.model_tag or f"d{self.depth}")


# %% [markdown]
# ### `TrainingOptions`
# What costs or saves time and memory, and leaves the result alone.


# %%
@dataclass(frozen=True)
class TrainingOptions:
    """How a training is computed. None of it changes what is learned by more than rounding."""

    compile: bool = True
    recompute: bool = False  # activations again in the backward pass, instead of keeping them
    fp8: bool = False  # products of the large matrices


DEFAULT_OPTIONS = TrainingOptions()

# %% [markdown]
# ### `plan_pretraining`
# From the dials to the numbers: a model on the meta device costs nothing, so parameters, FLOPs, batch size and number
# of steps are known before anything is downloaded. Learning rates grow with the square root of the batch, and weight
# decay falls with the square of the depth.

# %%
REFERENCE_DEPTH, REFERENCE_BATCH = 12, 2**19  # where the learning rates and the weight decay were tuned


@dataclass(frozen=True)
class PretrainPlan:
    """Everything that follows from the settings. Spec section 14.2."""

    settings: PretrainSettings
    model_config: GPTConfig
    parameters: dict[str, int]  # counts by role
    flops_per_token: int
    total_batch_size: int  # tokens
    gradient_accumulation: int  # forward passes for each step and process
    iterations: int
    lr_scale: float
    weight_decay: float
    world_size: int

    @property
    def tokens(self) -> int:
        return self.iterations * self.total_batch_size

    @property
    def scaling_params(self) -> int:
        return self.parameters["transformer_matrices"] + self.parameters["lm_head"]


def model_config_of(settings: PretrainSettings, vocab_size: int, depth: int) -> GPTConfig:
    """The shape of a model of this depth: width = depth · aspect_ratio, rounded up to whole heads."""
    heads = -(-depth * settings.aspect_ratio // settings.head_dim)
    return GPTConfig(
        sequence_len=settings.max_seq_len,
        vocab_size=vocab_size,
        n_layer=depth,
        n_head=heads,
        n_kv_head=heads,
        n_embd=heads * settings.head_dim,
        window_pattern=settings.window_pattern,
    )


def check_shares(config: GPTConfig, world_size: int) -> None:
    """UserError unless the optimizer can split the tables over the processes."""
    if config.padded_vocab_size % world_size:
        raise UserError(
            f"the tables of {config.padded_vocab_size} rows do not divide over {world_size} processes. "
            "Start 1, 2, 4, 8 or another power of two."
        )


def accumulation_steps(name: str, total: int, device_batch_size: int, seq_len: int, world_size: int) -> int:
    """Forward passes of each process for a step of `total` tokens. UserError, about `name`, when that is no number."""
    pass_tokens = device_batch_size * seq_len * world_size
    if pass_tokens <= 0 or total <= 0 or total % pass_tokens:
        below = max(1, total // max(pass_tokens, 1)) * pass_tokens
        s, es = "s" * (device_batch_size != 1), "es" * (world_size > 1)
        raise UserError(
            f"{name} {total} is not a multiple of {device_batch_size} sequence{s} × {seq_len} tokens × {world_size} "
            f"process{es} = {pass_tokens}. Nearest that work: {below}, {below + pass_tokens}."
        )
    return total // pass_tokens


def plan_pretraining(
    settings: PretrainSettings, vocab_size: int, processes: int | None = None, device="cpu",
    compute_dtype: torch.dtype = torch.float32, recompute: bool = False,
) -> PretrainPlan:  # fmt: skip
    """Work out model, horizon and batch; UserError when they do not fit together.

    processes: that will train; None for those that there are. The last three are for a device batch of -1.
    """
    if settings.depth < 1:
        raise UserError(f"depth is {settings.depth}; a model needs at least 1 layer.")
    config = model_config_of(settings, vocab_size, settings.depth)
    with torch.device("meta"):
        model = GPT(config)
        reference = GPT(model_config_of(settings, vocab_size, REFERENCE_DEPTH))
    parameters, flops_per_token = model.num_scaling_params(), model.estimate_flops()
    scaling_params = parameters["transformer_matrices"] + parameters["lm_head"]
    reference_counts = reference.num_scaling_params()
    reference_params = reference_counts["transformer_matrices"] + reference_counts["lm_head"]
    target_tokens = int(settings.target_param_data_ratio * scaling_params)

    batch = settings.total_batch_size
    if batch <= 0:  # the best batch grows with the 0.383th power of the training tokens (Bergsma et al. 2025)
        if target_tokens <= 0:
            raise UserError(
                "total_batch_size -1 is worked out from target_param_data_ratio; set one of the two above 0."
            )
        reference_tokens = settings.target_param_data_ratio * reference_params
        batch = 2 ** round(math.log2(REFERENCE_BATCH * (target_tokens / reference_tokens) ** 0.383))
    world_size = processes or get_dist_info()[3]
    check_shares(config, world_size)
    if settings.device_batch_size == -1:
        sequences = max(1, batch // (settings.max_seq_len * world_size))
        largest = starting_device_batch(
            config, parameters["total"], sequences, compute_dtype, torch.device(device), recompute
        )
        settings = replace(settings, device_batch_size=largest)
    gradient_accumulation = accumulation_steps(
        "total_batch_size", batch, settings.device_batch_size, settings.max_seq_len, world_size
    )
    if settings.num_iterations > 0:
        iterations = settings.num_iterations
    elif settings.target_flops > 0:
        iterations = round(settings.target_flops / (flops_per_token * batch))
    elif target_tokens > 0:
        iterations = target_tokens // batch
    else:
        raise UserError(
            "one of num_iterations, target_flops and target_param_data_ratio must be above 0, to know the end."
        )
    if iterations < 1:
        raise UserError(f"the horizon is shorter than one step of {batch} tokens; raise it or lower total_batch_size.")
    return PretrainPlan(
        settings=settings,
        model_config=config,
        parameters=parameters,
        flops_per_token=flops_per_token,
        total_batch_size=batch,
        gradient_accumulation=gradient_accumulation,
        iterations=iterations,
        lr_scale=(batch / REFERENCE_BATCH) ** 0.5,
        weight_decay=settings.weight_decay * (REFERENCE_DEPTH / settings.depth) ** 2,
        world_size=world_size,
    )


# %% [markdown]
# ### Schedules
# Full speed for the first half, then a straight line down to zero. Muon's momentum starts low, while the gradients
# still change direction quickly, and its weight decay fades over the run.


# %%
def lr_multiplier(plan: PretrainPlan, step: int) -> float:
    """Warm-up, plateau, linear warm-down. Spec section 14.3."""
    settings, n = plan.settings, plan.iterations
    warmup, warmdown = round(settings.warmup_ratio * n), round(settings.warmdown_ratio * n)
    if step < warmup:
        return (step + 1) / warmup
    if step <= n - warmdown:
        return 1.0
    remaining = (n - step) / warmdown
    return remaining + (1 - remaining) * settings.final_lr_frac


def muon_momentum(step: int) -> float:
    """0.85 → 0.95 over the first 300 steps."""
    part = min(step / 300, 1)
    return 0.85 + 0.10 * part


def muon_weight_decay(plan: PretrainPlan, step: int) -> float:
    """Fades linearly to zero."""
    return plan.weight_decay * (1 - step / plan.iterations)


# %% [markdown]
# ### `estimate_minutes`
# Nobody should have to start a run to learn whether it takes a coffee or a night. On a GPU the estimate is 45 % of
# the peak, a usual share; on a CPU, which has no data sheet worth reading, a few matrix products are timed first.


# %%
def estimate_minutes(plan: PretrainPlan, device: torch.device, compute_dtype: torch.dtype) -> float | None:
    """Expected minutes of pretraining without compilation and evaluation; None where there is no telling."""
    peak = get_peak_flops(device_name_of(device)) * plan.world_size
    share = 0.45
    if device.type == "cpu":
        a, b = torch.ones(4096, 256, dtype=compute_dtype), torch.ones(256, 1024, dtype=compute_dtype)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - start)
        peak, share = 2 * 4096 * 256 * 1024 / min(times), 0.6
    return plan.flops_per_token * plan.tokens / (share * peak) / 60 if peak < math.inf else None
