"""Kernels that are really loaded by the `kernels` package, from folders: right ones, and wrong in one way each."""

import hashlib
import json
from pathlib import Path

RIGHT_KERNEL = """
import torch

calls = []

def attend(q, k, v, left, first):
    share = q.size(2) // k.size(2)
    k, v = (x.repeat_interleave(share, dim=2) for x in (k, v))
    distance = (first + torch.arange(q.size(1)))[:, None] - torch.arange(k.size(1))
    mask = (distance >= 0) & ((distance <= left) | (left < 0))
    scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) / q.size(3) ** 0.5
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v.float()).to(q.dtype)

def flash_attn_func(q, k, v, causal=False, window_size=(-1, -1)):
    assert causal
    calls.append("train")
    return attend(q, k, v, window_size[0], 0)

def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, cache_seqlens=None, causal=False, window_size=(-1, -1)
):
    assert causal and cache_seqlens.dtype == torch.int32 and q.dtype == k_cache.dtype
    calls.append("cached")
    rows = []
    for row, length in enumerate(cache_seqlens.tolist()):
        first = length if k is not None else length - q.size(1)
        end = first + q.size(1)
        if k is not None:
            k_cache[row, first:end], v_cache[row, first:end] = k[row], v[row]
        one = slice(row, row + 1)
        rows.append(attend(q[one], k_cache[one, :end], v_cache[one, :end], window_size[0], first))
    return torch.cat(rows)
"""
TRAIN_LINE = "    return attend(q, k, v, window_size[0], 0)\n"
CACHED_LINE = "        rows.append("


def with_training(source: str) -> str:
    """The right kernel with another body of its training call."""
    return RIGHT_KERNEL.replace(TRAIN_LINE, source)


WRONG_KERNELS = {  # what is wrong -> (source, what the reason must say)
    "forward": (with_training("    return attend(q, k, v, window_size[0], 0) * 1.2\n"), r"output \(.*\) is off by 20%"),
    "looks ahead": (with_training("    return attend(q, k, v, window_size[0], 1)\n"), "output .* is off by"),
    "backward of v": (
        with_training("    return attend(q, k, v / 2 + (v / 2).detach(), window_size[0], 0)\n"),
        r"dv \(.*\) is off by 50%",
    ),
    "no gradient of k": (
        with_training("    return attend(q, k.detach(), v, window_size[0], 0)\n"), "not have been used"
    ),
    "backward raises": (
        with_training("""    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(context, q, k, v):
            return attend(q, k, v, window_size[0], 0)
        @staticmethod
        def backward(context, upstream):
            raise NotImplementedError("no backward in this build")
    return Forward.apply(q, k, v)
"""),
        "NotImplementedError: no backward in this build",
    ),
    "ignores the window": (with_training("    return attend(q, k, v, -1, 0)\n"), "output .*window 50.* is off by"),
    "window off by one": (
        with_training("    return attend(q, k, v, max(-1, window_size[0] - 1), 0)\n"), "output .*window 50.* is off by"
    ),
    "refuses grouped heads": (
        with_training('    assert q.size(2) == k.size(2), "grouped heads"\n' + TRAIN_LINE),
        "AssertionError: grouped heads",
    ),
    "wrong gradient of grouped heads": (
        with_training("""    share = q.size(2) // k.size(2)
    k, v = (x / share + (x - x / share).detach() for x in (k, v))
""" + TRAIN_LINE),
        "dk .*over 2.* is off by 50%",
    ),
    "one head size only": (
        with_training('    assert q.size(3) == 128, "head size 64"\n' + TRAIN_LINE), "AssertionError: head size 64"
    ),
    "NaN in the last row": (
        with_training("    y = attend(q, k, v, window_size[0], 0)\n    y[:, -1] = float('nan')\n    return y\n"),
        "output .* is off by nan",
    ),
    "another dtype": (
        with_training("    return attend(q, k, v, window_size[0], 0).float()\n"), "torch.float32, not .*bfloat16"
    ),
    "a function is missing": (
        RIGHT_KERNEL.replace("def flash_attn_with_kvcache", "def other"), "has no flash_attn_with_kvcache"
    ),
    "import fails": ("raise OSError('libcudart.so.12: not found')", "OSError: libcudart.so.12: not found"),
}  # fmt: skip
WRONG_WITH_A_CACHE = {
    "queries one position late": (
        RIGHT_KERNEL.replace("window_size[0], first))", "window_size[0], first - 1))"), "is off by"
    ),
    "window": (RIGHT_KERNEL.replace("window_size[0], first))", "-1, first))"), "cached call .*window 50.* is off by"),
    "writes nothing": (
        RIGHT_KERNEL.replace("k_cache[row, first:end], v_cache[row, first:end] = k[row], v[row]", "pass"), "is off by"
    ),
    "all rows like the first": (
        RIGHT_KERNEL.replace("enumerate(cache_seqlens.tolist())", "enumerate([int(cache_seqlens[0])] * len(q))"),
        r"at \(37, 150\)",
    ),
    "writes beyond": (
        RIGHT_KERNEL.replace("    return torch.cat(rows)", "    k_cache[:, -1] = 0\n    return torch.cat(rows)"),
        "leaves something else in the cache",
    ),
}  # fmt: skip


def write_kernel(folder: Path, source: str = RIGHT_KERNEL, **metadata) -> Path:
    """A kernel repository with one build, which fits every machine."""
    build = folder / "build" / "torch-universal"
    build.mkdir(parents=True)
    (build / "__init__.py").write_text(source)
    name = f"kernel_{hashlib.sha1(str(folder).encode()).hexdigest()}"  # two kernels with one id would be one module
    content = {"id": name, "name": "stand-in", "version": 1, "license": "MIT", "python-depends": [],
               "backend": {"type": "cpu"}} | metadata  # fmt: skip
    (build / "metadata.json").write_text(json.dumps(content))
    return folder
