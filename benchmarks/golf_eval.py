"""Sliding-window scoring beside one window per forward with all its logits, measured in turns in one run.

    python benchmarks/golf_eval.py [--lengths 1024 128] [--stride 64] [--windows 64] [--batch 8] [--compile] [--profile]

The model has the shape of the cpu preset (6 layers, width 128, 4 heads, 2 key-value heads, 1,024 tokens) and random
weights. All contenders score the same stream in the same windows; medians over the rounds. Targets and bytes must be
the same to the last one, and in fp32 the bits per byte to a millionth; the difference is printed. The machine's own
rate for one large matrix product is measured in the same run: what the products of a window allow at best.
"""

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "nb_src"))

from golf.golf_gpt import GolfConfig, GolfGPT
from golf.golf_scoring import score_stream, scoring_windows
from golf.golf_tokenizers import BpbSums, ByteTables
from nanochat.runtime import device_name_of, keep_freed_memory

VOCABULARY = 1024


def random_model(length: int, dtype: torch.dtype) -> GolfGPT:
    torch.manual_seed(0)
    config = GolfConfig(
        vocab_size=VOCABULARY, model_dim=128, num_heads=4, num_kv_heads=2, num_layers=6, max_seq_len=length
    )
    model = GolfGPT(config, dtype).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:  # a new model is the identity, and all windows would score alike
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def random_text(n_targets: int) -> tuple[torch.Tensor, ByteTables]:
    generator = torch.Generator().manual_seed(1)
    stream = torch.randint(VOCABULARY, (n_targets + 1,), generator=generator)
    base_bytes = torch.randint(1, 9, (VOCABULARY,), generator=generator, dtype=torch.int16)
    space, boundary = (torch.rand(VOCABULARY, generator=generator) < share for share in (0.5, 0.01))
    return stream, ByteTables(base_bytes, space, boundary)


@torch.no_grad()
def plain_score(model, stream, tables: ByteTables, length: int, stride: int) -> BpbSums:
    """What one writes first: each window by itself, logits and losses of all its targets, the new ones are kept."""
    sums = BpbSums()
    for start, first, end in scoring_windows(len(stream) - 1, length, stride):
        logits = model(stream[None, start:end])[0]
        losses = F.cross_entropy(logits, stream[start + 1 : end + 1], reduction="none")
        sums.add(losses[first - start :], stream[first:end], stream[first + 1 : end + 1], tables)
    return sums


def contenders(length: int, stride: int, batch: int, with_compile: bool, stream, tables) -> dict:
    """name -> callable that scores the stream."""
    runs = {
        "plain, one window": partial(plain_score, random_model(length, torch.float32), stream, tables, length, stride)
    }
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model = random_model(length, dtype)
        calls = {f"ours, {name}": model}
        if with_compile:
            calls[f"ours, {name}, compiled"] = torch.compile(model, dynamic=False)
        for label, call in calls.items():
            runs[label] = partial(
                score_stream, partial(call, reduction="none"), stream, tables, length, stride, batch_windows=batch
            )
    return runs


def timed(function) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def product_gflops() -> float:
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    return 2 * 1024**3 / statistics.median(timed(lambda: a @ b) for _ in range(9)) / 1e9


def compare(length: int, arguments) -> bool:
    """Print the lines of one length; False when the scores differ."""
    n_targets = length + arguments.stride * (arguments.windows - 1)
    stream, tables = random_text(n_targets)
    runs = contenders(length, arguments.stride, arguments.batch, arguments.compile, stream, tables)
    scores = {name: run() for name, run in runs.items()}  # also the warm-up
    seconds = {name: [] for name in runs}
    for _ in range(arguments.rounds):
        for name, run in runs.items():
            seconds[name].append(timed(run))
    plain, same = next(iter(runs)), True
    for name in runs:
        median, difference = statistics.median(seconds[name]), scores[name].val_bpb / scores[plain].val_bpb - 1
        same &= bool((scores[name].sums[1:] == scores[plain].sums[1:]).all()) and abs(difference) < (
            1e-3 if "bf16" in name else 1e-6
        )
        print(
            f"{length:>6}  {name:24}{1000 * median / arguments.windows:>11.2f}{n_targets / median:>11,.0f}"
            f"{statistics.median(seconds[plain]) / median:>8.2f}{difference:>12.1e}",
            flush=True,
        )
    if arguments.profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
            runs["ours, fp32"]()
        print(recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=10, max_name_column_width=44))
    return same


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 128], help="tokens in a window")
    parser.add_argument("--stride", type=int, default=64)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8, help="windows that go through the model together")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="also with torch.compile")
    parser.add_argument("--profile", action="store_true", help="also print where our time goes")
    arguments = parser.parse_args()
    keep_freed_memory()
    print(
        f"\n{device_name_of(torch.device('cpu'))}; {torch.get_num_threads()} threads; torch {torch.__version__}; "
        f"{product_gflops():,.0f} GFLOP/s in fp32; stride {arguments.stride}, {arguments.windows} windows, "
        f"batch {arguments.batch}\n"
    )
    print(f"{'length':>6}  {'':24}{'ms/window':>11}{'targets/s':>11}{'faster':>8}{'bpb off by':>12}")
    if not all([compare(length, arguments) for length in arguments.lengths]):
        sys.exit("The scores differ.")


if __name__ == "__main__":
    main()
