# %% [markdown]
# ## Attention kernels for NVIDIA GPUs
#
# On a GPU attention decides a good part of the training time, and which implementation is the fastest depends on the
# chip and on the layer: cuDNN knows full layers only, FlashAttention skips what lies outside of a window. Here
# are those that come with PyTorch, and the package flash-attn-4.
#
# Each has a loader. It returns a backend, or raises an ordinary exception with a short reason where the kernel cannot
# exist. That the kernel computes what it should is no business of the loader: somebody else tries it out first.
#
# PyTorch can also put FlashAttention-3 or 4 under its own functions (`activate_flash_attention_impl`). We call them
# directly instead: that switch changes every attention in the process, and the one for FlashAttention-4 in PyTorch 2.13
# expects two results of an inner function that returns five in the package's 4.0.0b36.

# %%
import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F

from nanochat.attention import AttentionBackend, limiting_left, sdpa_attention, sdpa_with_kvcache, write_to_cache

# %% [markdown]
# ### `load_sdpa`
# The one of the previous chapter. It runs everywhere.


# %% tags=["folded"]
def load_sdpa(device: torch.device, dtype: torch.dtype) -> AttentionBackend:
    return AttentionBackend("sdpa", sdpa_attention, sdpa_with_kvcache)


def require_half_precision_on_cuda(device: torch.device, dtype: torch.dtype) -> None:
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        raise RuntimeError(f"it computes in bf16 and fp16 on CUDA, not in {str(dtype).split('.')[-1]} on {device.type}")


# %% [markdown]
# ### `load_varlen`
# FlashAttention-2 as PyTorch carries it: windows, shared key heads, and (from 2.12 on) cached rows that each have a
# length of their own. It was made for texts of different lengths laid end to end, so a batch is laid end to end for it.


# %% tags=["folded"]
def load_varlen(device: torch.device, dtype: torch.dtype) -> AttentionBackend:
    """`torch.nn.attention.varlen` with windows. Its calls with a cache have no gradient: use `no_grad`."""
    require_half_precision_on_cuda(device, dtype)
    from torch.nn.attention.varlen import varlen_attn

    if "window_size" not in inspect.signature(varlen_attn).parameters:
        raise RuntimeError(f"varlen_attn of torch {torch.__version__} has no windows")
    return varlen_backend(varlen_attn)


def varlen_backend(varlen_attn: Callable) -> AttentionBackend:
    names = inspect.signature(varlen_attn).parameters
    asks_for_gqa, takes_lengths = "enable_gqa" in names, "seqused_k" in names

    def attend(q, k, v, left, used=None):  # q (B, T, H, D); k, v (B, T_k, H_kv, D); used (B,) int32: keys that count
        (B, T, H, _), T_k = q.shape, k.size(1)
        starts, k_starts = (
            torch.arange(0, (B + 1) * length, length, dtype=torch.int32, device=q.device) for length in (T, T_k)
        )
        more = {} if used is None else {"seqused_k": used}
        if asks_for_gqa:  # PyTorch 2.11 takes shared key heads without
            more["enable_gqa"] = H != k.size(2)
        y = varlen_attn(
            *(x.reshape(-1, *x.shape[2:]) for x in (q, k, v)), starts, k_starts, T, T_k,
            window_size=(limiting_left(left, T_k), 0), **more,
        )  # fmt: skip
        return y.view(q.shape)

    def train(q, k, v, window_size):
        return attend(q, k, v, window_size[0])

    def cached(q, k_cache, v_cache, k, v, positions, window_size, bounds=None):
        if k is not None:
            write_to_cache(k_cache, v_cache, k, v, positions)
        return attend(q, k_cache, v_cache, window_size[0], (positions + q.size(1)).int())

    return AttentionBackend("varlen", train, cached if takes_lengths else sdpa_with_kvcache)


# %% [markdown]
# ### `load_flex`
# FlexAttention: the mask is a Python function, the compiler makes a kernel of it, and a table of blocks says which of
# them the kernel may skip. One kernel for each length and window takes seconds to make, so it is for training batches,
# which all look the same; everything else goes to PyTorch's own.


# %% tags=["folded"]
def load_flex(device: torch.device, dtype: torch.dtype) -> AttentionBackend:
    if device.type != "cuda":
        raise RuntimeError("its backward pass exists on CUDA only")
    return flex_backend()


def flex_backend() -> AttentionBackend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled_flex, masks = torch.compile(flex_attention, dynamic=False), {}

    # Called once for each graph that is being compiled, not each time it runs: the table becomes one of its inputs.
    @torch.compiler.assume_constant_result
    def key_of_mask(T: int, left: int, device: torch.device) -> str:
        def visible(batch, head, q_position, k_position):  # `band_mask` for one pair
            causal = q_position >= k_position
            return causal if left < 0 else causal & (q_position - k_position <= left)

        key = f"{T} {left} {device}"
        if key not in masks:
            with torch.inference_mode(False):  # or training could not use what an evaluation has made
                masks[key] = create_block_mask(visible, None, None, T, T, device=device)
        return key

    def train(q, k, v, window_size):
        if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            return sdpa_attention(q, k, v, window_size)
        T, gqa = q.size(1), q.size(2) != k.size(2)
        mask = masks[key_of_mask(T, limiting_left(window_size[0], T), q.device)]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled_flex(q, k, v, block_mask=mask, enable_gqa=gqa).transpose(1, 2)

    return AttentionBackend("flex", train, sdpa_with_kvcache)


# %% [markdown]
# ### `load_cudnn_sdpa`
# cuDNN knows no windows; FlexAttention does those. It makes a plan for each shape that it has not seen, so it is for
# training batches, too.


# %% tags=["folded"]
def load_cudnn_sdpa(device: torch.device, dtype: torch.dtype) -> AttentionBackend:
    require_half_precision_on_cuda(device, dtype)
    if not torch.backends.cudnn.is_available():
        raise RuntimeError("this PyTorch has no cuDNN")
    from torch.nn.attention import SDPBackend

    full, windowed = full_attention_by(SDPBackend.CUDNN_ATTENTION), load_flex(device, dtype).train

    def train(q, k, v, window_size):
        if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            return sdpa_attention(q, k, v, window_size)
        attention = full if limiting_left(window_size[0], q.size(1)) < 0 else windowed
        return attention(q, k, v, window_size)

    return AttentionBackend("cudnn", train, sdpa_with_kvcache)


def full_attention_by(backend) -> Callable:
    """Attention without a window by one of PyTorch's implementations (an `SDPBackend`) and no other."""
    from torch.nn.attention import sdpa_kernel

    def attention(q, k, v, window_size):
        gqa = q.size(2) != k.size(2)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa).transpose(1, 2)

    return attention


# %% [markdown]
# ### `load_fa4`
# FlashAttention-4, for Hopper and Blackwell, from the package `flash-attn-4`. It brings a compiler of its own, which
# PyTorch's cannot look into, so a compiled block is cut in two around it. It has no function for a cache that grows:
# PyTorch's own does that.


# %% tags=["folded"]
def load_fa4(device: torch.device, dtype: torch.dtype) -> AttentionBackend:
    require_half_precision_on_cuda(device, dtype)
    from flash_attn.cute import flash_attn_func

    return fa4_backend(flash_attn_func)


def fa4_backend(flash_attn_func: Callable) -> AttentionBackend:
    @torch.compiler.disable
    def train(q, k, v, window_size):
        left = limiting_left(window_size[0], q.size(1))
        y = flash_attn_func(q, k, v, causal=True, window_size=(None, None) if left < 0 else (left, 0))
        return y[0] if isinstance(y, tuple) else y  # with the logarithms of the sums, or without: both were published

    return AttentionBackend("fa4", train, sdpa_with_kvcache)
