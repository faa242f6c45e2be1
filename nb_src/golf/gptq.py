# %% [markdown]
# ## GPTQ
#
# Rounding every weight to its nearest level is the best one can do for the weights, and not for the model. What counts
# is the layer's output, and inputs are correlated: if one weight was rounded up, a neighbour that sees nearly the same
# input can be rounded down and make up for it. GPTQ ([arXiv 2210.17323](https://arxiv.org/abs/2210.17323)) goes through
# the columns one by one, rounds, and moves the error on to the columns that are still to come, in the amounts that the
# correlations say.
#
# The correlations are a matrix XᵀX for each layer with inputs X, collected while the trained model reads some
# *training* tokens. It is called the Hessian, because up to a factor it is the second derivative of the output's
# squared error with respect to the weights. It is a promise of this chapter, kept row by row, that the result is never
# worse than plain rounding.

# %%
import math
import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist

from nanochat.runtime import UserError, is_ddp_initialized

# %% [markdown]
# ### `HessianSums`
# Listens at the inputs of linear layers. A layer that runs in several loops simply adds several times. Layers that
# read the same input (q, k, v, and in a parallel block the first MLP matrix) share one sum; the tied embedding has no
# layer of its own, so its inputs are handed over with `add`.


# %%
class HessianSums:
    """Sums XᵀX (fp32, inputs × inputs) over all tokens that reach some linear layers, in all loops.

    sums = HessianSums()
    sums.watch({"blocks.0.attn.c_q.weight": model.blocks[0].attn.c_q})  # the eager model, not a compiled one
    sums.share("blocks.0.attn.c_q.weight", ["blocks.0.attn.c_k.weight", "blocks.0.attn.c_v.weight"])
    ... run the model on calibration tokens ...
    sums.finish()  # on every rank
    sums["blocks.0.attn.c_k.weight"]

    If something fails before `finish`, call `stop`.
    """

    def __init__(self):
        self.sums, self.tokens, self.sources, self.hooks = {}, {}, {}, {}

    def watch(self, layers: dict[str, torch.nn.Module]) -> None:
        """Add up the inputs of all these layers from now on, under these names."""
        for name, layer in layers.items():
            self.hooks[name] = layer.register_forward_pre_hook(lambda _, inputs, name=name: self.add(name, inputs[0]))

    def share(self, source: str, names: list[str]) -> None:
        """Let `names` read the sum of `source`, because they have the same input."""
        self.sources |= dict.fromkeys(names, source)

    @torch.no_grad()
    def add(self, name: str, inputs: torch.Tensor) -> None:
        """Add one batch of inputs, (..., inputs)."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        with torch.autocast(rows.device.type, enabled=False):
            product = rows.T @ rows
        if name in self.sums:
            self.sums[name] += product
        else:
            self.sums[name] = product
        self.tokens[name] = self.tokens.get(name, 0) + len(rows)

    def stop(self) -> None:
        """Listen no longer."""
        for hook in self.hooks.values():
            hook.remove()

    def finish(self) -> None:
        """Stop listening, and add up over ranks. Every rank must call it, each after at least one batch.

        Raises UserError when a watched layer never ran or a sum is not finite.
        """
        self.stop()
        if silent := [name for name in self.hooks if name not in self.sums]:
            raise UserError(
                f"no calibration input reached {', '.join(silent)}. Run at least one batch through the eager model."
            )
        self.hooks = {}
        if is_ddp_initialized():
            for name in sorted(self.sums):
                dist.all_reduce(self.sums[name])
                count = torch.tensor(self.tokens[name], device=self.sums[name].device)
                dist.all_reduce(count)
                self.tokens[name] = int(count)
        for name, total in self.sums.items():
            if not torch.isfinite(total).all():
                raise UserError(f"the calibration inputs of {name} are not finite: the model diverged.")

    def __contains__(self, name: str) -> bool:
        return self.sources.get(name, name) in self.sums

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.sums[self.sources.get(name, name)]


# %% [markdown]
# ### SDClip: the size of a step
# The records clip by the standard deviation and call that SDClip: the scale of a row is a multiple of its spread
# instead of its largest weight. The multiple k trades precision against size: the levels reach k standard deviations
# out, and what is beyond is clipped. A scale is rounded to the fp16 number that is stored *before* anything is divided
# by it.


# %%
def largest_code(bits: int) -> int:
    """31 for 6 bits, 127 for 8. Codes run from minus this to plus this."""
    return 2 ** (bits - 1) - 1


def sdclip_scales(weight: torch.Tensor, sigmas: float, bits: int) -> torch.Tensor:
    """(rows,) fp16 scales sigmas·σ/q of a matrix; σ is the root mean square of the row. Golf spec section 4.6.

    Never below the smallest normal fp16, which would round to nothing; 1 for a row of zeros.
    """
    limits = torch.finfo(torch.float16)
    spread = weight.double().square().mean(dim=1).sqrt()
    scales = (sigmas * spread / largest_code(bits)).clamp(limits.tiny, limits.max)
    return torch.where(spread == 0, 1.0, scales).to(torch.float16)


def nearest_codes(weight: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """int8 codes of plain rounding: (rows, columns)."""
    q = largest_code(bits)
    return torch.clamp(torch.round(weight.double() / scales.double()[:, None]), -q, q).to(torch.int8)


# %% [markdown]
# ### How much is lost
# In the measure that GPTQ works on: the squared change of the layer's output over the calibration tokens. Each row of
# the matrix makes one output, so the rows can be judged one by one.


# %%
def output_errors(weight: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, hessian: torch.Tensor):
    """(rows,) fp64: the diagonal of (W − Ŵ) H (W − Ŵ)ᵀ."""
    difference = weight.double() - codes.double() * scales.double()[:, None]
    return ((difference @ hessian.double()) * difference).sum(dim=1).clamp_min(0)


# %% [markdown]
# ### `inverse_hessian_factor`
# Some inputs never vary and some calibration sets are small, so the matrix may have no inverse. A little is added to
# its diagonal, and ten times more when that does not help.


# %%
def inverse_hessian_factor(hessian: torch.Tensor, damp: float) -> torch.Tensor | None:
    """Upper triangular U with UᵀU = (H + d·I)⁻¹ for H in fp64; None when six tries all fail.

    d is `damp` times the mean of the diagonal, then ten times as much after each failure.
    """
    mean, identity = hessian.diagonal().mean(), torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    for attempt in range(6):
        lower, failed = torch.linalg.cholesky_ex(hessian + damp * 10**attempt * mean * identity)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and torch.isfinite(upper).all():
                return upper
    return None


# %% [markdown]
# ### `gptq_codes`
# The columns with the strongest inputs go first: their errors can still be made up for by everybody else. Within a
# block of columns errors move on at once; to the rest of the matrix they go when the block is done, in one product.
#
# The theory forgets that codes end at ±q. A row whose weights run into that end can come out worse than plainly
# rounded, so at the end each row keeps the better of the two.


# %%
@torch.no_grad()
def gptq_codes(
    weight: torch.Tensor, hessian: torch.Tensor, scales: torch.Tensor, bits: int, block: int = 128, damp: float = 0.01
) -> torch.Tensor:
    """int8 codes (rows, columns) for a matrix with inputs of this Hessian (columns, columns) and these fp16 scales.

    The output error of every row is at most that of `nearest_codes`. Plain rounding, with a RuntimeWarning, when the
    Hessian cannot be inverted. Computes in fp64. Golf spec section 4.6.
    """
    if hessian.shape != (weight.shape[1], weight.shape[1]):
        raise ValueError(f"a matrix with {weight.shape[1]} columns cannot have a Hessian {list(hessian.shape)}")
    q, step = largest_code(bits), scales.double()
    weight, hessian = weight.double(), hessian.double()
    dead = hessian.diagonal() == 0  # inputs that are always zero: their weights do nothing
    weight = weight.masked_fill(dead, 0)
    nearest = nearest_codes(weight, scales, bits)
    order = hessian.diagonal().masked_fill(dead, 1).argsort(descending=True, stable=True)
    factor = inverse_hessian_factor((hessian + dead.double().diag())[order][:, order], damp)
    if factor is None:
        warnings.warn("a Hessian could not be inverted; this matrix is rounded plainly", RuntimeWarning, stacklevel=2)
        return nearest
    rest, codes = weight[:, order], torch.empty_like(nearest)
    for start in range(0, rest.shape[1], block):
        end = min(start + block, rest.shape[1])
        errors = torch.empty_like(rest[:, start:end])
        for j in range(start, end):
            code = torch.clamp(torch.round(rest[:, j] / step), -q, q)
            error = (rest[:, j] - code * step) / factor[j, j]
            rest[:, j + 1 : end] -= error[:, None] * factor[j, j + 1 : end]
            codes[:, j], errors[:, j - start] = code.to(torch.int8), error
        rest[:, end:] -= errors @ factor[start:end, end:]
    codes = codes[:, order.argsort()]
    better = output_errors(weight, codes, scales, hessian) <= output_errors(weight, nearest, scales, hessian)
    return torch.where(better[:, None], codes, nearest)


# %% [markdown]
# ### `StoredTensor`
# A tensor in the form in which the file will hold it. `restored` is the one way back, used before the file is written
# and after it is read, so the two cannot differ.


# %%
@dataclass(frozen=True)
class StoredTensor:
    """values: int8 codes (rows, columns) with scales (rows,) fp16, or a plain tensor with scales None.

    bits: of a code, or of one plain value. dtype: of the tensor that it stands for.
    """

    values: torch.Tensor
    scales: torch.Tensor | None
    bits: int
    dtype: torch.dtype

    def restored(self) -> torch.Tensor:
        if self.scales is None:
            return self.values.to(self.dtype)
        return (self.values.float() * self.scales.float()[:, None]).to(self.dtype)


# %% [markdown]
# ### `storage_rules`
# Who gets how many bits. Large matrices get few and the embedding, which is both the first and the last layer, gets
# more. Small tensors stay fp16; control tensors stay fp32, because they are tiny and steer everything.


# %%
@dataclass(frozen=True)
class StorageRule:
    """bits: up to 8 for codes, with a clip of `sigmas`; 16 or 32 for floats. 0: stored as it is."""

    bits: int
    sigmas: float = math.inf


def storage_rules(
    shapes: dict[str, tuple[int, ...]],
    control_patterns: tuple[str, ...],
    embedding_patterns: tuple[str, ...],
    matrix: StorageRule = StorageRule(6, 12.85),
    embedding: StorageRule = StorageRule(8, 20.0),
    keep_numel: int = 65_536,
) -> dict[str, StorageRule]:
    """name → rule, from names and shapes alone, so it can be asked before there is a model.

    keep_numel: a tensor of at most so many elements stays fp16. A tiny model needs a smaller one than the default.
    Raises UserError for widths that int8 codes cannot hold. Golf spec section 4.6.
    """
    for rule in (matrix, embedding):
        if not 2 <= rule.bits <= 8 or not rule.sigmas > 0:
            raise UserError(
                f"codes of {rule.bits} bits with a clip of {rule.sigmas} σ: use 2 to 8 bits and a clip > 0."
            )
    rules = {}
    for name, shape in shapes.items():
        if any(pattern in name for pattern in control_patterns):
            rules[name] = StorageRule(32)
        elif len(shape) != 2 or math.prod(shape) <= keep_numel:
            rules[name] = StorageRule(16)
        else:
            rules[name] = embedding if any(pattern in name for pattern in embedding_patterns) else matrix
    return rules


# %% [markdown]
# ### `quantize_state`
# The whole model, and one table with plain rounding beside GPTQ: the same levels and the same scales, so the
# difference is what the error feedback is worth.


# %%
@torch.no_grad()
def quantize_state(
    state: dict[str, torch.Tensor],
    rules: dict[str, StorageRule],
    hessians: HessianSums | None = None,
    block: int = 128,
    damp: float = 0.01,
) -> tuple[dict[str, StoredTensor], list[dict]]:
    """name → StoredTensor on the CPU, and the rows of the comparison.

    hessians: matrices without one, and all of them when this is None, are rounded to nearest.
    A row has name, bits, sigmas, nearest and gptq (squared output errors, relative to the squared output).
    Raises UserError for values that are not finite.
    """
    stored, table = {}, []
    for name, tensor in state.items():
        rule, dtype = rules[name], tensor.dtype
        tensor = tensor.detach().cpu() if tensor.device.type == "mps" else tensor.detach()  # mps has no fp64
        if not tensor.is_floating_point() or rule.bits == 0:
            stored[name] = StoredTensor(tensor.cpu(), None, 8 * tensor.element_size(), dtype)
            continue
        if not torch.isfinite(tensor).all():
            raise UserError(f"{name} holds values that are not finite: the training diverged, nothing was exported.")
        if rule.bits > 8:
            fits = rule.bits == 16 and (tensor.numel() == 0 or tensor.abs().max() <= torch.finfo(torch.float16).max)
            values = tensor.to(torch.float16 if fits else torch.float32).cpu()
            stored[name] = StoredTensor(values, None, 8 * values.element_size(), dtype)
            continue
        scales = sdclip_scales(tensor, rule.sigmas, rule.bits)
        codes = nearest = nearest_codes(tensor, scales, rule.bits)
        if hessians is not None and name in hessians:
            hessian = hessians[name].to(tensor.device)
            codes = gptq_codes(tensor, hessian, scales, rule.bits, block, damp)
            table.append(gptq_table_row(name, rule, tensor, nearest, codes, scales, hessian))
        stored[name] = StoredTensor(codes.cpu(), scales.cpu(), rule.bits, dtype)
    return stored, table


def gptq_table_row(name, rule, weight, nearest, codes, scales, hessian) -> dict:
    """One row of the comparison: output errors of both codes, relative to the squared output."""
    nothing = torch.zeros_like(codes)
    whole = output_errors(weight, nothing, scales, hessian).sum().clamp_min(torch.finfo(torch.float64).tiny)
    errors = [float(output_errors(weight, each, scales, hessian).sum() / whole) for each in (nearest, codes)]
    return dict(name=name, bits=rule.bits, sigmas=rule.sigmas, nearest=errors[0], gptq=errors[1])
