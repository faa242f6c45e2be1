# %% [markdown]
# ## int8 export
#
# A record may weigh 16 MB, code included, and 17 million fp32 weights weigh 68. The first system gets there in two
# plain steps: each row of a large matrix becomes integers from −127 to 127 with one scale, and zlib takes what is
# left. What is small is not worth rounding and stays a float.
#
# The file is that of the challenge's own script, to the byte: a model saved there is read here and the other way round.
# One thing of that script, the original, is optional here: it never lets a scale fall below 1/127, so a row of weights
# around 0.02 keeps 25 of its 255 levels. That also makes the file smaller, which is why the size has to be looked at
# again without it.

# %%
import io
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch

from golf.golf_settings import ARTIFACT_LIMIT_BYTES
from nanochat.runtime import UserError, get_dist_info, wait_for_everyone, write_atomic

# %% [markdown]
# ### `int8_codes`
# A single outlier would stretch the scale of its whole row, so the largest two in a million may be clipped. The
# division uses the fp32 scale and the file keeps it as fp16, as in the original.

# %%
INT8_FORMAT = "int8_clean_per_row_v1"
INT8_CLIP_QUANTILE = 99.99984 / 100
INT8_KEEP_FLOAT_MAX_NUMEL = 65_536  # tensors up to this size stay floats
INT8_ORIGINAL_SCALE_FLOOR = 1 / 127


def int8_codes(weight: torch.Tensor, original_floor: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (int8, the shape of `weight`) and scales: (rows,) fp16 for a matrix, one fp32 number for anything else.

    original_floor: no row scale below 1/127, to reproduce files of the original. Otherwise the floor is the smallest
    normal fp16, which only keeps the scale of an empty row from being zero. Golf spec sections 2.7 and 6 (2).
    """
    weight = weight.float()
    if weight.ndim != 2:
        clip = torch.quantile(weight.abs().flatten(), INT8_CLIP_QUANTILE) if weight.numel() else torch.tensor(0.0)
        scale = torch.tensor(float(clip) / 127 if clip > 0 else 1.0)
        return torch.clamp(torch.round(weight.clamp(-clip, clip) / scale), -127, 127).to(torch.int8), scale
    if weight.shape[1] == 0:
        clip = torch.zeros(weight.shape[0])
    else:
        clip = torch.quantile(weight.abs(), INT8_CLIP_QUANTILE, dim=1)
    floor = INT8_ORIGINAL_SCALE_FLOOR if original_floor else torch.finfo(torch.float16).tiny
    scale = (clip / 127).clamp_min(floor)
    clipped = torch.minimum(weight.abs(), clip[:, None]).copysign(weight)
    codes = torch.clamp(torch.round(clipped / scale[:, None]), -127, 127).to(torch.int8)
    return codes, scale.to(torch.float16)


# %% [markdown]
# ### `quantize_state_dict_int8`
# The dictionary that is saved. Control tensors (gains, mixes: the few numbers that steer all others) keep fp32, other
# small tensors are halved and remember what they were.


# %%
def quantize_state_dict_int8(
    state: dict[str, torch.Tensor], control_patterns: tuple[str, ...], original_floor: bool = False
) -> tuple[dict, dict[str, int]]:
    """The dictionary of the file, and the sizes for its log line.

    control_patterns: a small tensor whose name contains one of these is stored in fp32.
    Sizes: parameters, tensors, float_bytes (of `state` itself), payload_bytes (of the codes, scales and kept tensors).
    Raises UserError for a tensor with values that are not finite. Golf spec section 2.7.
    """
    quantized, scales, dtypes, passthrough, qmeta, original_dtypes = {}, {}, {}, {}, {}, {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        if not tensor.is_floating_point():
            passthrough[name] = tensor
            continue
        if not torch.isfinite(tensor).all():
            raise UserError(f"{name} holds values that are not finite: the training diverged, nothing was exported.")
        if tensor.numel() > INT8_KEEP_FLOAT_MAX_NUMEL:
            quantized[name], scales[name] = int8_codes(tensor, original_floor)
            dtypes[name] = str(tensor.dtype).removeprefix("torch.")
            if scales[name].ndim:
                qmeta[name] = {"scheme": "per_row", "axis": 0}
        elif any(pattern in name for pattern in control_patterns):
            passthrough[name] = tensor.float()
        else:
            if tensor.dtype in (torch.float32, torch.bfloat16):
                original_dtypes[name] = str(tensor.dtype).removeprefix("torch.")
                tensor = tensor.to(torch.float16)
            passthrough[name] = tensor
    saved = dict(
        __quant_format__=INT8_FORMAT, quantized=quantized, scales=scales, dtypes=dtypes, passthrough=passthrough
    )
    if qmeta:
        saved["qmeta"] = qmeta
    if original_dtypes:
        saved["passthrough_orig_dtypes"] = original_dtypes
    stored = [*quantized.values(), *scales.values(), *passthrough.values()]
    sizes = dict(
        parameters=sum(tensor.numel() for tensor in state.values()),
        tensors=len(state),
        float_bytes=sum(tensor.numel() * tensor.element_size() for tensor in state.values()),
        payload_bytes=sum(tensor.numel() * tensor.element_size() for tensor in stored),
    )
    return saved, sizes


# %% [markdown]
# ### `dequantize_state_dict_int8`
# The way back. The dictionary came from a file, so what it says about itself is checked before it is believed.


# %%
def dequantize_state_dict_int8(saved: dict) -> dict[str, torch.Tensor]:
    """name → tensor in its original dtype. Raises UserError, naming the tensor, for a dictionary that is not sound."""
    if not isinstance(saved, dict) or saved.get("__quant_format__") != INT8_FORMAT:
        found = saved.get("__quant_format__") if isinstance(saved, dict) else type(saved).__name__
        raise UserError(f"the model file has format {found!r}, not {INT8_FORMAT!r}.")
    float_dtypes = {"float64", "float32", "float16", "bfloat16"}
    state = {}
    for name, codes in saved["quantized"].items():
        scale, dtype = saved["scales"].get(name), saved["dtypes"].get(name)
        if codes.dtype != torch.int8 or scale is None or dtype not in float_dtypes:
            raise UserError(f"the model file is damaged: {name} lacks int8 codes, a scale or a float dtype.")
        if scale.ndim and scale.shape != codes.shape[:1]:
            raise UserError(f"the model file is damaged: {name} has {len(codes)} rows and scales {list(scale.shape)}.")
        scale = scale.float()
        if scale.ndim:
            scale = scale.view(-1, *[1] * (codes.ndim - 1))
        state[name] = (codes.float() * scale).to(getattr(torch, dtype))
    original_dtypes = saved.get("passthrough_orig_dtypes", {})
    for name, tensor in saved["passthrough"].items():
        dtype = original_dtypes.get(name)
        if dtype is not None and dtype not in float_dtypes:
            raise UserError(f"the model file is damaged: {name} claims the dtype {dtype!r}.")
        state[name] = tensor.to(getattr(torch, dtype)) if dtype else tensor
    return state


# %% [markdown]
# ### `read_int8_model`
# `weights_only` lets the unpickler build tensors and plain containers and nothing else: a file from a stranger can be
# wrong but cannot run code.


# %%
def int8_file_bytes(saved: dict) -> tuple[bytes, int]:
    """The compressed file, and how long it was before zlib."""
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    return zlib.compress(buffer.getvalue(), level=9), len(buffer.getvalue())


def read_int8_model(path) -> dict[str, torch.Tensor]:
    """The state dict in `path` (final_model.int8.ptz). Raises UserError when it is missing, damaged or not that format.

    The order is the file's: matrices first, then what was kept.
    """
    path = Path(path)
    try:
        raw = zlib.decompress(path.read_bytes())
        saved = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist. Run the export first.") from None
    except zlib.error as error:
        raise UserError(f"{path} is damaged or no zlib file ({error}). Export it again.") from None
    except Exception as error:  # torch raises many kinds, the same one for pickled code as for a cut file
        raise UserError(f"{path} holds no plain tensors ({type(error).__name__}), so it was not loaded.") from None
    try:
        return dequantize_state_dict_int8(saved)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (KeyError, AttributeError, TypeError, RuntimeError) as error:
        raise UserError(f"{path} is damaged: its dictionary is incomplete ({error!r}).") from None


# %% [markdown]
# ### `export_int8`
# Rank 0 writes, everybody waits, and then every rank reads the file back: what is scored is what was written. The floor
# of the original makes the file smaller and the model worse, so it is the second choice; a file that is too large with
# it too is not written at all.


# %%
@dataclass(frozen=True)
class Int8Sizes:
    """What the log says about the two model files, in bytes."""

    raw_state: int  # final_model.pt
    packed: int  # final_model.int8.ptz
    payload: int  # codes, scales and kept tensors
    raw_torch: int  # what zlib was given
    payload_ratio: float  # float weights / payload
    original_floor: bool


def export_int8(
    folder, state: dict[str, torch.Tensor], control_patterns: tuple[str, ...], floors: tuple[bool, ...] = (False,),
    code_bytes: int = 0, limit_bytes: int = ARTIFACT_LIMIT_BYTES,
) -> tuple[dict[str, torch.Tensor], Int8Sizes | None]:  # fmt: skip
    """Write final_model.pt and final_model.int8.ptz; returns the state dict read back from the second, and the sizes.

    floors: original_floor of `int8_codes`, in the order in which to try; the first whose file fits is taken.
    Every rank must call it; only rank 0 writes and gets sizes, the others get None. Raises UserError when nothing fits.
    Golf spec sections 2.7 and 6 (2).
    """
    folder, sizes = Path(folder), None
    if get_dist_info()[1] == 0:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomic(folder / "final_model.pt", buffer.getvalue())
        for original_floor in floors:
            saved, counts = quantize_state_dict_int8(state, control_patterns, original_floor)
            packed, raw_torch = int8_file_bytes(saved)
            over = len(packed) + code_bytes - limit_bytes
            if over <= 0:
                break
        else:
            raise UserError(
                f"the model ({len(packed):,} bytes) and the code ({code_bytes:,}) are {over:,} bytes over the limit "
                f"of {limit_bytes:,}. The largest tensors: {largest_tensors(state)}. Make the model "
                f"{over / len(packed):.1%} smaller."
            )
        write_atomic(folder / "final_model.int8.ptz", packed)
        payload = counts["payload_bytes"]
        ratio = counts["float_bytes"] / max(payload, 1)
        sizes = Int8Sizes(len(buffer.getvalue()), len(packed), payload, raw_torch, ratio, original_floor)
    wait_for_everyone()
    return read_int8_model(folder / "final_model.int8.ptz"), sizes


def largest_tensors(state: dict[str, torch.Tensor], count: int = 3) -> str:
    """The names of the largest and their weights, for a message."""
    largest = sorted(state, key=lambda name: -state[name].numel())[:count]
    return ", ".join(f"{name} ({state[name].numel():,} weights)" for name in largest)


# %% [markdown]
# ### The log lines
# Word for word those of the published logs, so the same scripts can read both.


# %%
def int8_size_lines(sizes: Int8Sizes, code_bytes: int) -> list[str]:
    """The five lines about sizes. code_bytes: UTF-8 bytes of the script as shipped."""
    return [
        f"Serialized model: {sizes.raw_state} bytes",
        f"Code size: {code_bytes} bytes",
        f"Total submission size: {sizes.raw_state + code_bytes} bytes",
        f"Serialized model int8+zlib: {sizes.packed} bytes (payload:{sizes.payload} raw_torch:{sizes.raw_torch} "
        f"payload_ratio:{sizes.payload_ratio:.2f}x)",
        f"Total submission size int8+zlib: {sizes.packed + code_bytes} bytes",
    ]


def int8_roundtrip_lines(val_loss: float, val_bpb: float, seconds: float) -> list[str]:
    """The two lines about the score of the file that was read back. val_loss in nats per token."""
    return [
        f"final_int8_zlib_roundtrip val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} eval_time:{1000 * seconds:.0f}ms",
        f"final_int8_zlib_roundtrip_exact val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f}",
    ]


# %% [markdown]
# ### `int8_damage`
# What rounding costs each matrix, before any validation: the part of its length that is lost.


# %%
def int8_damage(state: dict[str, torch.Tensor], restored: dict[str, torch.Tensor]) -> dict[str, float]:
    """name → ‖W − Ŵ‖ / ‖W‖ for every float tensor that is not all zero. The two may lie on different devices."""
    damage = {}
    for name, tensor in state.items():
        weight = tensor.detach().cpu().double()
        if tensor.is_floating_point() and weight.any():
            damage[name] = float((weight - restored[name].cpu().double()).norm() / weight.norm())
    return damage
