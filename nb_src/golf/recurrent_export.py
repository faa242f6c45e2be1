# %% [markdown]
# ## From weights to the artifact
#
# Three decisions stand between a trained model and the file that is handed in, and all three are made by measuring.
# Which directions do a layer's inputs really take? Some *training* tokens are run through the model to find out. How
# coarse may the matrices be? As fine as the limit of bytes allows. And how wide may the model be in the first place?
# That is asked before the training, with a formula for the size instead of a model.

# %%
import math
from dataclasses import replace
from pathlib import Path

import torch

from golf.artifact import (
    ARTIFACT_RESERVE_BYTES,
    artifact_size_rows,
    counted_size,
    encode_artifact,
    largest_that_fits,
    predicted_size,
    require_artifact_fits,
    solve_clip_sigmas,
    write_artifact,
)
from golf.golf_gpt import GolfModel, parameter_roles
from golf.gptq import HessianSums, StorageRule, quantize_state, storage_rules
from golf.looped_gpt import LoopedConfig, LoopedGPT
from golf.recurrent_gpt import RecurrentConfig, RecurrentGPT
from nanochat.runtime import UserError, write_atomic

# %% [markdown]
# ### `golf_model_of`
# A model from its settings, or from what the header of an artifact says.

# %%
GOLF_ARCHITECTURES = {"recurrent": (RecurrentConfig, RecurrentGPT), "looped": (LoopedConfig, LoopedGPT)}


def golf_config_of(architecture: str, settings: dict):
    """The config of "recurrent" or "looped" from whatever of its fields `settings` has. Raises UserError."""
    if architecture not in GOLF_ARCHITECTURES:
        raise UserError(f"architecture is {architecture!r}; it can be {' or '.join(GOLF_ARCHITECTURES)}.")
    config, _ = GOLF_ARCHITECTURES[architecture]
    kinds = {name: type(each.default) for name, each in config.__dataclass_fields__.items()}
    return config(**{name: kind(settings[name]) for name, kind in kinds.items() if name in settings})


def golf_model_of(architecture: str, config, compute_dtype: torch.dtype = torch.float32) -> GolfModel:
    """A new model of that architecture."""
    return GOLF_ARCHITECTURES[architecture][1](config, compute_dtype)


# %% [markdown]
# ### `plan_width`
# Of several widths the largest whose predicted file fits. A model on the meta device has shapes and no weights, so
# asking costs nothing.


# %%
def shapes_of(architecture: str, config) -> dict[str, tuple[int, ...]]:
    """name → shape of every tensor of a model that is not built."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in golf_model_of(architecture, config).named_parameters()}


def plan_width(
    architecture: str, config, rules_of, widths, code_bytes: int, limit_bytes: int
) -> tuple[object, list[dict]]:
    """(the config with the widest of `widths` that fits, one row for each of them). Golf spec section 4.6.

    rules_of(shapes) -> storage rules by name. Widths that the architecture cannot have are passed over. Raises
    UserError when none is left or none fits.
    """
    configs, refusal = {}, None
    for width in widths:
        try:
            configs[f"width {width}"] = replace(config, model_dim=width)
        except UserError as error:  # this width does not fit the heads
            refusal = error
    if not configs:
        raise refusal
    shapes = {label: shapes_of(architecture, each) for label, each in configs.items()}
    candidates = [(label, shapes[label], rules_of(shapes[label])) for label in configs]
    label, rows = largest_that_fits(candidates, code_bytes, limit_bytes)
    return configs[label], rows


# %% [markdown]
# ### `calibrate`
# Every linear layer adds up what it is fed. Queries, keys and values read the same input and share one sum; in a
# parallel block the MLP reads it as well. The embedding's sum is of what reaches the head, which is its other role.


# %%
@torch.no_grad()
def calibrate(model: GolfModel, batches, **options) -> HessianSums:
    """The Hessian sums of all matrices over `batches`, an iterable of (B, T) int64 inputs on the model's device.

    options: of the forward, as in scoring. Training tokens only; the time counts as training. Every rank must call it,
    each with at least one batch. Golf spec section 4.6.
    """
    sums = HessianSums()
    for i, block in enumerate(model.blocks):
        name = f"blocks.{i}"
        sums.watch({
            f"{name}.attn.c_q.weight": block.attn.c_q,
            f"{name}.attn.proj.weight": block.attn.proj,
            f"{name}.mlp.proj.weight": block.mlp.proj,
        })  # fmt: skip
        shared = [f"{name}.attn.c_k.weight", f"{name}.attn.c_v.weight"]
        if block.parallel:
            shared.append(f"{name}.mlp.fc.weight")
        else:
            sums.watch({f"{name}.mlp.fc.weight": block.mlp.fc})
        sums.share(f"{name}.attn.c_q.weight", shared)
    try:
        for inputs in batches:
            sums.add("tok_emb.weight", model.trunk(inputs, **options))
    finally:  # the model is used again, also after the stop button
        sums.stop()
    sums.finish()
    return sums


# %% [markdown]
# ### `golf_storage_rules`
# Who gets how many bits, from the settings of the run.


# %%
def golf_storage_rules(shapes: dict, params: dict, sigmas: float) -> dict[str, StorageRule]:
    """name → rule; sigmas: the clip of the matrices."""
    return storage_rules(
        shapes,
        tuple(params["control_tensor_name_patterns"].split(",")),
        ("tok_emb",),
        StorageRule(params["gptq_bits"], sigmas),
        StorageRule(params["embed_bits"], params["embed_clip_sigmas"]),
        params["keep_float_numel"],
    )


# %% [markdown]
# ### `export_golf`
# Rank 0 rounds, compresses and writes. A second file holds the same levels and scales with plain rounding: what GPTQ
# is worth has to be seen on text that it was not calibrated on.

# %%
GOLF_ARTIFACT, NEAREST_ARTIFACT = "final_model.golf", "nearest_rounding.golf"
SMALLEST_CLIP_SIGMAS = 4.0  # a smaller clip cuts off more than its finer steps give back


def export_golf(folder, model: GolfModel, hessians: HessianSums, params: dict, header: dict, code_bytes: int) -> dict:
    """Write GOLF_ARTIFACT and NEAREST_ARTIFACT into `folder`; returns what there is to say about them, as JSON types.

    header: what a reader needs to rebuild and score the model. code_bytes: of the script. For rank 0 alone.
    Raises UserError when no clip makes the file small enough. Golf spec section 4.6.
    """
    state = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    sigmas, trials, compressor = params["matrix_clip_sigmas"], [], params["compressor"]
    if not sigmas:
        rules = golf_storage_rules(shapes, params, SMALLEST_CLIP_SIGMAS)
        adjustable = [name for name in parameter_roles(model)["matrix"] if rules[name].bits <= 8]
        room = params["artifact_limit_bytes"] - code_bytes - ARTIFACT_RESERVE_BYTES
        sigmas, trials = solve_clip_sigmas(
            state, rules, adjustable, room, header, compressor, lowest=SMALLEST_CLIP_SIGMAS
        )
    limit = params["artifact_limit_bytes"]
    for _ in range(4):
        rules = golf_storage_rules(shapes, params, sigmas)
        tensors, table = quantize_state(state, rules, hessians, params["gptq_group_size"], params["gptq_damp"])
        encoded = encode_artifact(tensors, header, compressor)
        over = len(encoded.blob) + code_bytes - limit
        if over <= 0 or not trials:
            break
        # GPTQ's codes are spread wider than plain ones; where those are coarse, by more than was left free
        sigmas *= 2 ** (8 * 1.5 * over / sum(state[name].numel() for name in adjustable))
    size_rows = artifact_size_rows(tensors, encoded)
    require_artifact_fits(size_rows, code_bytes, len(encoded.blob), limit)
    write_atomic(Path(folder) / GOLF_ARTIFACT, encoded.blob)
    nearest, _ = quantize_state(state, rules)
    write_artifact(Path(folder) / NEAREST_ARTIFACT, nearest, header, encoded.codec, 0, 2 * limit)
    return dict(
        sigmas=sigmas, trials=trials, table=table, size_rows=size_rows, codec=encoded.codec, bytes=len(encoded.blob),
        bytes_from_shapes=math.ceil(sum(predicted_size(shapes, rules).values())),
        bytes_from_counts=math.ceil(counted_size(tensors)),
    )  # fmt: skip
