# %% [markdown]
# ## Attention
#
# Every token looks back at the tokens before it: all of them in a full layer, the nearest `left` in a sliding-window
# layer. Libraries differ in how fast they do this and agree on what they compute, so the model talks to two functions
# with FlashAttention's signature and does not know who answers.
#
# The implementation here is PyTorch's own. Two facts shape it. A boolean T×T mask throws most of the work away after
# doing it, so a window is computed as a band of blocks instead. And on a CPU two batched products with a softmax
# between them, compiled together, take three fifths of the built-in kernel's time at 512 tokens in bf16.

# %%
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

# %% [markdown]
# ### `band_mask`
# The one definition of "may look at": query i sees key j when `i - left <= j <= i`, so `left` tokens and itself. A
# window that nothing can fall out of is none, which is worth knowing: kernels are faster without.


# %%
def band_mask(q_positions: torch.Tensor, k_positions: torch.Tensor, left: int) -> torch.Tensor:
    """(..., Tq, Tk) bool for positions (..., Tq) and (Tk,): True where query and key may meet. Spec section 1.3.

    left < 0 means no limit.
    """
    distance = q_positions[..., :, None] - k_positions
    return (distance >= 0) if left < 0 else (distance >= 0) & (distance <= left)


def limiting_left(left: int, n_keys: int) -> int:
    """left, or -1 where even the last of n_keys tokens sees the first."""
    return -1 if left >= n_keys - 1 else left


# %% [markdown]
# ### `blocked_attention`
# The CPU's way. Queries are taken in blocks; each block multiplies only the keys that some query in it can see, which
# skips the upper triangle of a causal layer and everything left of a window. Scores stay in the compute dtype, the
# softmax is fp32.

# %%
CPU_QUERY_BLOCK = 256  # 128 skips more of the triangle: 3 % less time a step, 5 s more compilation


def blocked_attention(q, k, v, left: int):  # (B, H, T, D) each
    """Causal attention over equal lengths, (B, H, T, D). left < 0 means no limit."""
    B, H, T, D = q.shape
    q, k, v = ((q * D**-0.5).reshape(B * H, T, D), k.reshape(B * H, T, D), v.reshape(B * H, T, D))
    positions = torch.arange(T, device=q.device)
    rows = []
    for start in range(0, T, CPU_QUERY_BLOCK):
        stop = min(start + CPU_QUERY_BLOCK, T)
        first = 0 if left < 0 else max(0, start - left)
        scores = torch.bmm(q[:, start:stop], k[:, first:stop].transpose(1, 2)).float()
        hidden = ~band_mask(positions[start:stop], positions[first:stop], left)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        rows.append(torch.bmm(weights.to(v.dtype), v[:, first:stop]))
    return torch.cat(rows, 1).view(B, H, T, D)


def builtin_blocked_attention(q, k, v, left: int):  # (B, H, T, D) each
    """The same with the built-in kernel: without gradients and compilation it is the faster one for long sequences."""
    T = q.size(2)
    if left < 0:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    positions = torch.arange(T, device=q.device)
    rows = []
    for start in range(0, T, CPU_QUERY_BLOCK):
        queries, keys = slice(start, start + CPU_QUERY_BLOCK), slice(max(0, start - left), start + CPU_QUERY_BLOCK)
        mask = band_mask(positions[queries], positions[keys], left)
        rows.append(F.scaled_dot_product_attention(q[:, :, queries], k[:, :, keys], v[:, :, keys], attn_mask=mask))
    return torch.cat(rows, 2)


# %% [markdown]
# ### `fused_attention`
# PyTorch's function has several kernels behind it. On an H100 and a B200 its first choice is cuDNN, which makes a plan
# for each shape that it has not seen: tens of milliseconds. A training batch always has the same shape. A text that is
# being written is one key longer with every token, so there cuDNN is left out.

# %%
WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def fused_attention(q, k, v, mask=None, causal: bool = False):  # q (B, H, T, D), k and v (B, H_kv, T_k, D)
    """PyTorch's attention, (B, H, T, D), by a kernel that suits the kind of call."""
    gqa = q.size(1) != k.size(1)
    if not q.is_cuda or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=gqa)
    with sdpa_kernel(WITHOUT_PLANS):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=gqa)


# %% [markdown]
# ### `banded_sdpa`
# The GPU's way for windows. Cut the sequence into blocks as long as the window: each block then needs only itself and
# the one before, so memory and time grow with T·left instead of T².


# %%
def banded_sdpa(q, k, v, left: int):  # q (B, H, T, D), k and v (B, H_kv, T, D)
    """Sliding-window causal attention over pairs of neighbouring blocks, (B, H, T, D). Needs 0 < left < T."""
    B, H, T, D = q.shape
    blocks = -(-T // left)
    padding = blocks * left - T

    def cut(x, extra):  # (B, h, T, D) -> (B * blocks, h, left [+ left], D)
        x = F.pad(x, (0, 0, left if extra else 0, padding))
        x = x.unfold(2, 2 * left if extra else left, left)  # (B, h, blocks, D, length)
        return x.permute(0, 2, 1, 4, 3).reshape(B * blocks, x.size(1), -1, D)

    q_positions = torch.arange(blocks * left, device=q.device).view(blocks, left, 1)
    k_positions = torch.arange(-left, blocks * left, device=q.device).unfold(0, 2 * left, left)[:, None, :]
    distance = q_positions - k_positions
    mask = (distance >= 0) & (distance <= left) & (k_positions >= 0)  # (blocks, left, 2 left)
    mask = mask.repeat(B, 1, 1)[:, None]
    y = fused_attention(cut(q, False), cut(k, True), cut(v, True), mask)
    return y.view(B, blocks, H, left, D).transpose(1, 2).reshape(B, H, blocks * left, D)[:, :, :T]


# %% [markdown]
# ### `sdpa_attention` and `sdpa_with_kvcache`
# The two entry points of this implementation: a whole sequence when training, a few new tokens against a cache when
# generating. Rows may be at different places of their texts then. Where all are at the same one, slices do what would
# need indices and a mask otherwise.


# %%
def sdpa_attention(q, k, v, window_size: tuple[int, int]):  # q (B, T, H, D), k and v (B, T, H_kv, D)
    """Causal attention of a sequence with itself, (B, T, H, D)."""
    T = q.size(1)
    left = limiting_left(window_size[0], T)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.device.type == "cpu":
        if q.size(1) != k.size(1):
            k, v = (x.repeat_interleave(q.size(1) // k.size(1), dim=1) for x in (k, v))
        # In evaluation, at 680 and 1,000 tokens: 61 to 82 % of the time; at 512 and fewer as long, or longer in bf16.
        long = T > 2 * CPU_QUERY_BLOCK and not torch.is_grad_enabled()
        y = builtin_blocked_attention(q, k, v, left) if long else blocked_attention(q, k, v, left)
    elif left > 0:
        y = banded_sdpa(q, k, v, left)
    else:  # everything, or (left == 0) only the token itself
        mask = torch.eye(T, dtype=torch.bool, device=q.device) if left == 0 else None
        y = fused_attention(q, k, v, mask, causal=mask is None)
    return y.transpose(1, 2)


def write_to_cache(k_cache, v_cache, k, v, positions) -> None:
    """Put k and v (B, T_new, H_kv, D) into the caches (B, T_max, H_kv, D), row b from positions[b] on."""
    rows = torch.arange(len(k), device=k.device)[:, None]
    places = positions[:, None] + torch.arange(k.size(1), device=k.device)  # (B, T_new)
    k_cache[rows, places], v_cache[rows, places] = k.to(k_cache.dtype), v.to(v_cache.dtype)


def sdpa_with_kvcache(q, k_cache, v_cache, k, v, positions, window_size: tuple[int, int], bounds=None):
    """Attention of T_new queries with the cache, into which k and v (if given) are first written. (B, T_new, H, D).

    q (B, T_new, H, D); caches (B, T_max, H_kv, D), whose dtype may be a wider one, which is then computed in; k, v
    (B, T_new, H_kv, D) or None; positions (B,): each row's first; bounds: the lowest and the highest of them, two
    numbers, without which the device is asked for them.
    """
    T_new, left = q.size(1), window_size[0]
    lowest, highest = bounds or (int(positions.min()), int(positions.max()))
    end, same = highest + T_new, lowest == highest
    if k is not None and same:
        k_cache[:, lowest:end], v_cache[:, lowest:end] = k, v
    elif k is not None:
        write_to_cache(k_cache, v_cache, k, v, positions)
    if k is not None and same and lowest == 0 and T_new > 1:  # the cache was empty: a sequence looks at itself
        return sdpa_attention(q, k, v, window_size)
    first = 0 if left < 0 else max(0, lowest - left)  # nothing older is visible to any of the queries
    keys, values = k_cache[:, first:end], v_cache[:, first:end]
    mask = None
    if T_new > 1 or not same:
        q_positions = positions[:1, None] if same else positions[:, None]
        q_positions = q_positions + torch.arange(T_new, device=q.device)  # (B or 1, T_new)
        mask = band_mask(q_positions, torch.arange(first, end, device=q.device), left)[:, None]
    dtype = q.dtype
    q, keys, values = (x.transpose(1, 2) for x in (q.to(keys.dtype), keys, values))
    return fused_attention(q, keys, values, mask).transpose(1, 2).to(dtype)


# %% [markdown]
# ### `flash_attn`
# The public surface, and the place where a faster kernel signs in. A backend is two functions with the signatures
# above; which one is used is decided by the caller, once, and never changes silently.


# %%
@dataclass(frozen=True)
class AttentionBackend:
    """One implementation of `sdpa_attention` and `sdpa_with_kvcache`, with their parameters and their meaning.

    train(q, k, v, window_size), cached(q, k_cache, v_cache, k, v, positions, window_size, bounds=None). What one of
    them cannot do it hands to PyTorch's own.
    """

    name: str
    train: Callable
    cached: Callable


class FlashAttention:
    """FlashAttention's two functions over the backend in use, `selected`. Spec section 1."""

    def __init__(self, backend: AttentionBackend):
        self.selected = backend

    def use(self, backend: AttentionBackend) -> None:
        """Answer with this backend from now on. A model that is compiled already compiles again."""
        self.selected = backend

    def flash_attn_func(self, q, k, v, causal=False, window_size=(-1, -1)):
        """Attention of a sequence with itself, (B, T, H, D). q (B, T, H, D); k, v (B, T, H_kv, D)."""
        if not causal:
            raise ValueError("this model only ever looks back: call with causal=True")
        return self.selected.train(q, k, v, window_size)

    def flash_attn_with_kvcache(
        self, q, k_cache, v_cache, k=None, v=None, cache_seqlens=None, causal=False, window_size=(-1, -1), bounds=None
    ):
        """Attention of new queries with a cache, (B, T_new, H, D); k and v are written into it in place.

        k_cache, v_cache (B, T_max, H_kv, D); cache_seqlens (B,) int32, how much of each row is filled. Without new k
        and v the queries are the last T_new positions that the cache holds. Does not advance cache_seqlens.
        bounds: the smallest and the largest of cache_seqlens as numbers. A caller that knows them saves a GPU from
        being waited for in every layer.
        """
        if not causal:
            raise ValueError("this model only ever looks back: call with causal=True")
        lowest, highest = bounds or (int(cache_seqlens.min()), int(cache_seqlens.max()))
        held = q.size(1) if k is None else 0  # queries whose keys the cache holds already
        end = highest - held + q.size(1)
        if end > k_cache.size(1):
            raise ValueError(f"{end} tokens are too many: the cache holds {k_cache.size(1)} positions")
        bounds = (lowest - held, highest - held)
        return self.selected.cached(q, k_cache, v_cache, k, v, cache_seqlens - held, window_size, bounds)


flash_attn = FlashAttention(AttentionBackend("sdpa", sdpa_attention, sdpa_with_kvcache))
