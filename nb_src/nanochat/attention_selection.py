# %% [markdown]
# ## Choosing the attention kernel
#
# The best kernel differs from device to device, and a kernel that loads is not yet one that computes. Builds exist
# whose backward pass fails for grouped queries, that ignore the window, or that are wrong only with a cache. Training
# on one of them costs days and looks like a bad idea about learning rates.
#
# So there is one table of candidates for each kind of device, best first, and each candidate has to prove itself on a
# few small cases, forward and backward, before it is used. What was passed over is reported with its reason.

# %%
import platform
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch

from nanochat.attention import AttentionBackend, FlashAttention, band_mask, flash_attn, sdpa_with_kvcache
from nanochat.attention_kernels import load_cudnn_sdpa, load_fa4, load_flex, load_sdpa, load_varlen
from nanochat.hub_kernels import load_hub_flash2, load_hub_flash3
from nanochat.runtime import UserError, gather_numbers, rank0_first

# %% [markdown]
# ### The table
# What is missing on a machine (a package, a newer PyTorch, the network, bf16) is found out when a candidate is loaded,
# so that the report can say what to install. Every order ends with PyTorch's own kernel; unknown devices start with it.

# %%
ATTENTION_LOADERS = {
    "fa3": load_hub_flash3,
    "fa4": load_fa4,
    "fa2": load_hub_flash2,
    "varlen": load_varlen,
    "cudnn": load_cudnn_sdpa,
    "flex": load_flex,
    "sdpa": load_sdpa,
}
ATTENTION_ORDERS = {  # CUDA compute capability -> candidates, best first
    (8, 0): ("fa3", "fa2", "varlen", "flex", "sdpa"),  # A100
    (8, 6): ("fa3", "fa2", "varlen", "flex", "sdpa"),  # A10, RTX 30
    (8, 7): ("fa3", "fa2", "varlen", "flex", "sdpa"),  # Jetson Orin
    (8, 9): ("fa3", "fa2", "varlen", "flex", "sdpa"),  # L4, L40S, RTX 40
    (9, 0): ("fa3", "fa4", "varlen", "cudnn", "flex", "sdpa"),  # H100, H200, GH200
    (10, 0): ("fa4", "fa2", "varlen", "flex", "sdpa"),  # B200
    (10, 3): ("fa4", "fa2", "varlen", "flex", "sdpa"),  # B300
    (12, 0): ("fa2", "varlen", "sdpa"),  # RTX 50
    (12, 1): ("fa2", "varlen", "sdpa"),  # DGX Spark
}


@dataclass(frozen=True)
class AttentionMachine:
    """What the choice depends on. device: cuda, rocm, mps or cpu; processor: as `platform.machine()` calls it."""

    device: str
    capability: tuple[int, int] = (0, 0)
    processor: str = "x86_64"


def this_machine(device: torch.device) -> AttentionMachine:
    if device.type != "cuda":
        return AttentionMachine(device.type)
    kind = "rocm" if torch.version.hip else "cuda"  # ROCm calls itself cuda, and its capabilities mean other things
    return AttentionMachine(kind, torch.cuda.get_device_capability(device), platform.machine())


def attention_order(machine: AttentionMachine) -> tuple[str, ...]:
    """Names of the candidates for this machine, best first."""
    order = ATTENTION_ORDERS.get(machine.capability, ("sdpa",)) if machine.device == "cuda" else ("sdpa",)
    return tuple(name for name in order if name != "fa3" or machine.processor == "x86_64")  # no other build seen


# %% [markdown]
# ### The measure
# The definition, in float64 and with a full mask, gives the expected result. The error is taken for each query and head
# on its own and relative to its size, so neither a single wrong row nor a gradient of small numbers can hide.

# %% tags=["folded"]
# Largest relative error of a row. Right kernels show up to 0.025 in bf16, 0.002 in fp16; a window off by one shows 0.6.
PROOF_TOLERANCE = {torch.float32: 0.01, torch.float16: 0.02, torch.bfloat16: 0.08}


def exact_attention(q, k, v, mask):  # q (B, Tq, H, D), k and v (B, Tk, H_kv, D), mask (Tq, Tk)
    """Attention by its definition, (B, Tq, H, D)."""
    k, v = (x.repeat_interleave(q.size(2) // x.size(2), dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.size(-1) ** -0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~mask, float("-inf")).softmax(-1), v)


def require_close(what: str, actual, expected, dtype: torch.dtype) -> None:
    """Raise ValueError unless `actual` has the dtype and, in each row, the values of `expected` (float64, CPU)."""
    if actual.shape != expected.shape or actual.dtype != dtype:
        raise ValueError(f"{what} is {tuple(actual.shape)} {actual.dtype}, not {tuple(expected.shape)} {dtype}")
    size = expected.norm(dim=-1)
    typical = size.square().mean().sqrt()
    error = (actual.detach().cpu().double() - expected).norm(dim=-1) / size.clamp_min(typical)
    if not error.max() <= PROOF_TOLERANCE[dtype]:  # also when it is NaN
        raise ValueError(f"{what} is off by {error.max():.0%}")


# %% [markdown]
# ### `prove_training` and `prove_cached`
# Small, but with everything that has gone wrong somewhere: grouped heads, both head sizes, a window shorter than the
# sequence and one that is longer, a length that is no multiple of any block; then a cache whose rows stand at different
# positions, one new token or several, with new keys and without.

# %% tags=["folded"]
TRAINING_CASES = (  # head size, query heads, key-value heads, window
    (128, 4, 4, -1),
    (128, 4, 2, 50),
    (64, 4, 2, -1),
    (64, 4, 4, 64),
    (128, 2, 1, 1000),
)
CACHED_CASES = (  # head size, query heads, key-value heads, window, new tokens, with new keys, first positions
    (128, 4, 4, 50, 40, True, (0, 0)),
    (128, 4, 4, -1, 1, True, (37, 150)),
    (64, 4, 2, 50, 1, True, (37, 150)),
    (128, 4, 2, -1, 7, True, (37, 150)),
    (64, 4, 4, 50, 7, True, (150, 150)),
    (128, 4, 2, 50, 1, False, (37, 150)),
    (64, 4, 4, -1, 7, False, (37, 150)),
)


@torch.enable_grad()
def prove_training(train: Callable, device: torch.device, dtype: torch.dtype, cases=TRAINING_CASES) -> None:
    """Raise ValueError when outputs or gradients of train(q, k, v, window_size) are wrong, or whatever it raises."""
    B, T = 2, 200
    positions = torch.arange(T)
    for D, H, H_kv, left in cases:
        generator = torch.Generator().manual_seed(D + left)  # its own: weights drawn later must not depend on this
        q, k, v, upstream = (torch.randn(B, T, heads, D, generator=generator).to(dtype) for heads in (H, H_kv, H_kv, H))
        inputs = [x.to(device).requires_grad_() for x in (q, k, v)]
        y = train(*inputs, (left, 0))
        actual = (y, *torch.autograd.grad(y, inputs, upstream.to(device)))
        inputs = [x.double().requires_grad_() for x in (q, k, v)]
        y = exact_attention(*inputs, band_mask(positions, positions, left))
        expected = (y.detach(), *torch.autograd.grad(y, inputs, upstream.double()))
        heads = f"{H} heads of {D} over {H_kv}, window {left}"
        for what, one, other in zip(("output", "dq", "dk", "dv"), actual, expected, strict=True):
            require_close(f"{what} ({heads})", one, other, dtype)


@torch.no_grad()
def prove_cached(backend: AttentionBackend, device: torch.device, dtype: torch.dtype) -> None:
    """Raise ValueError when a call with a cache answers or writes something wrong, or whatever it raises."""
    attention, B, T_max, stale = FlashAttention(backend), 2, 256, 100.0
    for D, H, H_kv, left, T_new, with_new, starts in CACHED_CASES:
        generator = torch.Generator().manual_seed(D + left + T_new)
        q = torch.randn(B, T_new, H, D, generator=generator).to(dtype)
        keys, values = torch.randn(2, B, T_max, H_kv, D, generator=generator).to(dtype)
        rows = torch.tensor(starts)[:, None] + torch.arange(T_new)  # (B, T_new)
        batch = torch.arange(B)[:, None]
        for row, start in enumerate(starts):
            keys[row, start + T_new :], values[row, start + T_new :] = stale, stale
        k_cache, v_cache = keys.clone(), values.clone()
        if with_new:
            k_cache[batch, rows] = v_cache[batch, rows] = torch.tensor(stale, dtype=dtype)
        k_cache, v_cache = k_cache.to(device), v_cache.to(device)
        new = (keys[batch, rows].to(device), values[batch, rows].to(device)) if with_new else (None, None)
        lengths = torch.tensor(starts, dtype=torch.int32, device=device) + (0 if with_new else T_new)
        y = attention.flash_attn_with_kvcache(
            q.to(device), k_cache, v_cache, *new, cache_seqlens=lengths, causal=True, window_size=(left, 0)
        )
        expected = [
            exact_attention(
                *(x[row : row + 1].double() for x in (q, keys, values)), band_mask(rows[row], torch.arange(T_max), left)
            )
            for row in range(B)
        ]
        what = f"cached call ({H} heads of {D} over {H_kv}, window {left}, {T_new} queries at {starts})"
        require_close(what, y, torch.cat(expected), dtype)
        if not (torch.equal(k_cache.cpu(), keys) and torch.equal(v_cache.cpu(), values)):
            raise ValueError(f"{what} leaves something else in the cache")


# %% [markdown]
# ### `prove_compiled`
# The model's blocks are compiled. A kernel that the compiler cannot look through, or that it gets wrong, is called from
# outside the compiled code instead, which costs little: attention is one long kernel.


# %% tags=["folded"]
def prove_compiled(train: Callable, device: torch.device, dtype: torch.dtype) -> str:
    """Why `train` has to stay outside compiled code; "" when it need not. Raises when it is wrong either way."""

    def prove(train):
        def block(q, k, v, window_size):  # as in a model: computed inputs, and something after it
            return train(q * 1, k * 1, v * 1, window_size) * 1

        prove_training(torch.compile(block, dynamic=False), device, dtype, TRAINING_CASES[1:2])

    try:
        prove(train)
        return ""
    except Exception as error:
        prove(torch.compiler.disable(train))
        return short_reason(error)


# %% [markdown]
# ### `prove_candidate`
# Loading and proving one candidate, on all ranks together: it counts only if it is right on every one of them, or they
# would train on different kernels. Whatever goes wrong becomes a reason in words.

# %% tags=["folded"]
REASON_BYTES = 200


def short_reason(error: Exception) -> str:
    """One line for a list of reasons."""
    if isinstance(error, ModuleNotFoundError):
        return f"package {error.name} is not installed"
    text = " ".join(str(error).split())
    if type(error) not in (RuntimeError, ValueError) or not text:  # these two speak for themselves
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
    return text if len(text) <= 160 else f"{text[:157]}..."


def reason_of_all_ranks(reason: str) -> str:
    """The reason of the first rank that has one, on every rank; "" when none has. Every rank must call it."""
    rows = gather_numbers(list(reason.encode()[:REASON_BYTES].ljust(REASON_BYTES, b"\0")))
    for rank, row in enumerate(rows):
        if any(row):
            text = bytes(row).rstrip(b"\0").decode(errors="ignore")
            return text if len(rows) == 1 else f"{text} (on rank {rank})"
    return ""


def attempt(action: Callable) -> tuple[object, str]:
    """(what the action returned, "") or (None, why it failed)."""
    # An error inside a CUDA kernel (an illegal address) leaves the process unable to use its GPU: every later candidate
    # fails as well, and the first reason is the one that matters.
    try:
        return action(), ""
    except Exception as error:
        return None, short_reason(error)


def prove_candidate(name: str, device: torch.device, dtype: torch.dtype, compiled: bool, whole: bool):
    """(backend, remarks about it), or (None, the reason against it). Every rank must call it.

    whole: refuse a kernel that is wrong with a cache only, instead of leaving those calls to PyTorch's own.
    """
    with rank0_first():  # which downloads for all
        backend, reason = attempt(lambda: ATTENTION_LOADERS[name](device, dtype))
    if reason := reason_of_all_ranks(reason):
        return None, (reason,)
    train, cached, remarks = backend.train, backend.cached, []
    reason = reason_of_all_ranks(attempt(lambda: prove_training(train, device, dtype))[1])
    if compiled and name != "sdpa" and not reason:  # PyTorch's own operations are what its compiler is made for
        obstacle, reason = attempt(lambda: prove_compiled(train, device, dtype))
        reason = reason_of_all_ranks(reason)
        if obstacle := reason_of_all_ranks(obstacle or ""):
            train = torch.compiler.disable(train)
            remarks.append(f"called from outside the compiled blocks ({obstacle})")
    if name != "sdpa":
        torch.compiler.reset()  # these shapes must not use up the compiler's patience with new shapes
    if reason:
        return None, (reason,)
    if reason := reason_of_all_ranks(attempt(lambda: prove_cached(backend, device, dtype))[1]):
        if whole or name == "sdpa":
            return None, (reason,)
        cached = sdpa_with_kvcache
        remarks.append(f"not used with a cache ({reason})")
    return AttentionBackend(backend.name, train, cached), tuple(remarks)


# %% [markdown]
# ### `select_attention`
# The choice, made once before a model runs. A kernel that is asked for by name is used or is an error; it never turns
# into another one.


# %% tags=["folded"]
@dataclass(frozen=True)
class AttentionChoice:
    """The kernel in use, why, and what was passed over for which reason."""

    name: str  # as in ATTENTION_LOADERS
    backend: AttentionBackend
    remarks: tuple[str, ...]
    passed_over: tuple[tuple[str, str], ...]  # (name, reason)

    @property
    def cached_name(self) -> str:
        """The kernel that answers calls with a cache."""
        return "sdpa" if self.backend.cached is sdpa_with_kvcache else self.name

    @property
    def sentence(self) -> str:
        """One line for the plan and the report."""
        kernel = self.name if self.backend.name == self.name else f"{self.name}, {self.backend.name}"
        kernel += "" if self.cached_name == self.name else f"; with a cache {self.cached_name}"
        parts = [f"{kernel} (proven on {len(TRAINING_CASES) + len(CACHED_CASES)} cases)", *self.remarks]
        names = defaultdict(list)
        for name, reason in self.passed_over:
            names[reason].append(name)
        passed_over = [f"{', '.join(group)} ({reason})" for reason, group in names.items()]
        return "; ".join(parts + [f"passed over: {', '.join(passed_over)}"] * bool(passed_over))


def select_attention(device, dtype: torch.dtype, name: str = "auto", compiled: bool = False) -> AttentionChoice:
    """Choose the best attention kernel that proves itself here, or the one called `name`, and use it from now on.

    dtype: of the queries. compiled: whether training blocks will be compiled. Every rank must call it.
    Raises UserError for an unknown name, for a kernel asked for by name that fails, and when all of them fail.
    """
    device, names = torch.device(device), list(ATTENTION_LOADERS)
    if name not in ("auto", *names):
        raise UserError(f"attention is {name!r}; it can be auto, {', '.join(names)}.")
    order = [name] if name != "auto" else attention_order(this_machine(device))
    numbers = [names.index(candidate) for candidate in order]
    numbers = gather_numbers(numbers + [-1] * (len(names) - len(numbers)))[0]  # rank 0's, should the devices differ
    passed_over = []
    for candidate in (names[number] for number in numbers if number >= 0):
        backend, remarks = prove_candidate(candidate, device, dtype, compiled, whole=name != "auto")
        if backend is not None:
            flash_attn.use(backend)
            return AttentionChoice(candidate, backend, remarks, tuple(passed_over))
        if name != "auto":
            raise UserError(f"attention {name} cannot be used here: {remarks[0]}. Set attention to auto.")
        passed_over.append((candidate, remarks[0]))
    reasons = "; ".join(f"{candidate}: {reason}" for candidate, reason in passed_over)
    raise UserError(f"no attention kernel is right on this device ({reasons}). Try another device or PyTorch version.")
