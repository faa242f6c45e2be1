# %% [markdown]
# ## Products in fp8
#
# From the L4 and the H100 on, tensor cores multiply numbers of eight bits, by their data sheets twice as fast as bf16.
# Eight bits are few: *e4m3* has four significant bits and reaches 448, *e5m2* has three and reaches 57,344. So every
# tensor is multiplied by a number that puts its largest entry at the end of the range. Activations and weights become
# e4m3; gradients, whose sizes differ more, e5m2 (Micikevicius et al. 2022).
#
# Measuring and casting costs time, too, so this is an option and not the default: it pays for large matrices only. The
# weights that the optimizer sees stay in fp32, and evaluation uses the ordinary product.

# %%
import torch
import torch.nn as nn

from nanochat.gpt import Linear
from nanochat.runtime import UserError

# %% [markdown]
# ### `require_fp8`
# Everything that fp8 asks for, said before anything starts.


# %%
def require_fp8(device: torch.device, rows: int, compiled: bool) -> None:
    """Raise UserError where fp8 training cannot run, or could only be slower.

    rows: tokens in one device batch, device_batch_size · max_seq_len.
    """
    if device.type != "cuda" or torch.version.hip:
        raise UserError("fp8 needs an NVIDIA GPU of compute capability 8.9 or newer (L4, H100). Set fp8 to False.")
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        raise UserError(
            f"fp8 needs compute capability 8.9 or newer (L4, H100), and this GPU has {capability[0]}.{capability[1]}. "
            "Set fp8 to False."
        )
    if not compiled:
        raise UserError(
            "fp8 needs torch_compile: uncompiled, measuring and casting every tensor takes longer than the faster "
            "product saves. Set torch_compile to True or fp8 to False."
        )
    if rows % 16:
        raise UserError(
            f"fp8 needs a multiple of 16 tokens in a device batch, and there are {rows}. "
            "Change device_batch_size or max_seq_len, or set fp8 to False."
        )


# %% [markdown]
# ### `to_float8`
# The scale is found anew for every tensor. Without the clamp, an entry that rounds past the end would become NaN.


# %%
def to_float8(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(x · scale in dtype, 1 / scale as a zero-dimensional fp32 tensor). Spec section 14.5."""
    largest = torch.finfo(dtype).max
    scale = largest / x.abs().amax().double().clamp(min=1e-12)  # double: exact enough to be the same everywhere
    quantised = (x.float() * scale.float()).clamp(-largest, largest).to(dtype)
    return quantised, scale.reciprocal().float()


# %% [markdown]
# ### `Float8Product`
# A product of matrices and the two products of its gradient. The tensor core wants the contracted dimension to be the
# innermost of both factors, which is why the backward pass turns some of them round in memory. All of this is code that
# the compiler can see through, so that it may fuse the casts into what comes before and do common work once.


# %%
class Float8Product(torch.autograd.Function):
    """x (N, K) times weight.T, weight (M, K), in fp8; N, K and M are multiples of 16.

    What is kept for the backward pass is the fp8 form: a quarter of fp32's memory, half of bf16's. Gradients are summed
    precisely, the forward pass with the tensor core's faster accumulation.
    """

    @staticmethod
    def forward(ctx, x, weight):
        x8, x_scale = to_float8(x, torch.float8_e4m3fn)
        weight8, weight_scale = to_float8(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(x8, x_scale, weight8, weight_scale)
        return torch._scaled_mm(x8, weight8.T, x_scale, weight_scale, out_dtype=x.dtype, use_fast_accum=True)

    @staticmethod
    def backward(ctx, y_grad):
        x8, x_scale, weight8, weight_scale = ctx.saved_tensors
        y_grad8, y_scale = to_float8(y_grad, torch.float8_e5m2)
        x_grad = torch._scaled_mm(
            y_grad8, weight8.T.contiguous().T, y_scale, weight_scale, out_dtype=y_grad.dtype, use_fast_accum=False
        )
        weight_grad = torch._scaled_mm(
            y_grad8.T.contiguous(), x8.T.contiguous().T, y_scale, x_scale,
            out_dtype=torch.float32, use_fast_accum=False,
        )  # fmt: skip
        return x_grad, weight_grad


# %% [markdown]
# ### `Float8Linear` and `convert_to_fp8`
# A converted layer is the same module with the same weight under the same name; only the product is another. Small
# matrices are left alone, and so is the output head, whose product is part of the loss.

# %%
FP8_SMALLEST = 128  # below this in either dimension casting costs more than the product


class Float8Linear(Linear):
    """A `Linear` that multiplies in fp8 while gradients are recorded, and as usual otherwise."""

    def forward(self, x):
        if not torch.is_grad_enabled():
            return super().forward(x)
        return Float8Product.apply(x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])


def convert_to_fp8(model: nn.Module) -> tuple[list[str], list[str]]:
    """Make the large linear layers of a GPT's blocks multiply in fp8, in place; (converted, skipped) by name.

    Call it before the model is compiled. Parameters and state_dict stay as they are.
    """
    converted, skipped = [], []
    for name, module in model.named_modules():
        if type(module) is not Linear:
            continue
        sizes = (module.in_features, module.out_features)
        if name == "lm_head" or min(sizes) < FP8_SMALLEST or any(size % 16 for size in sizes):
            skipped.append(name)
        else:
            module.__class__ = Float8Linear  # nothing else about it changes, so there is nothing to build or to copy
            converted.append(name)
    return converted, skipped
