"""Step time and peak memory of both golf systems on one GPU, beside the published speed of the first.

    python benchmarks/golf_gpu.py [--steps 20] [--eager] [--tiny]

Random tokens, the presets' shapes, one process: a step has eight slices, one after the other, so its time is eight
times that of one of eight GPUs plus no communication. The published record needed 71.5 ms for 393,216 tokens on eight
H100, which is 687,000 tokens per second for each. Medians over the steps after the first three. --tiny tries the script
itself on a CPU.
"""

import argparse
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "nb_src"))

from golf.golf_gpt import GolfConfig, GolfGPT
from golf.golf_optim import setup_golf_optimizer
from golf.golf_settings import RECURRENT_PRESETS, SEQ4096_PRESETS
from golf.golf_train import GolfTraining, compile_golf, golf_step
from golf.looped_gpt import LoopedConfig, LoopedGPT
from golf.recurrent_gpt import RecurrentConfig, RecurrentGPT
from golf.shards import DistributedTokenLoader, TokenStream, write_token_shard
from nanochat.runtime import autodetect_device_type, choose_compute_dtype, device_name_of
from nanochat.training_loop import synchronize

PUBLISHED_TOKENS_PER_SECOND = 393_216 / 0.0715 / 8


def systems(tiny: bool):
    """(name, config class, model class, settings) of what is measured."""
    small = dict(model_dim=64, num_heads=4, num_kv_heads=2) if tiny else {}
    for name, presets, preset, *kinds in (
        ("first: seq4096", SEQ4096_PRESETS, "record", GolfConfig, GolfGPT),
        ("its baseline", SEQ4096_PRESETS, "baseline", GolfConfig, GolfGPT),
        ("second: recurrent 3 × 8", RECURRENT_PRESETS, "h100", RecurrentConfig, RecurrentGPT),
        ("second: looped B2", RECURRENT_PRESETS, "looped", LoopedConfig, LoopedGPT),
    ):
        params = presets["cpu" if tiny else preset] | small
        yield name, *kinds, params | {"max_seq_len": params["train_seq_len"]}


def fields_of(kind, params: dict):
    """The dataclass with what `params` has of its fields."""
    return kind(**{name: params[name] for name in kind.__dataclass_fields__ if name in params})


def measure(config_kind, kind, params, device, dtype, steps: int, eager: bool) -> tuple[float, float]:
    """(median seconds of a step, GiB at the peak)."""
    torch.manual_seed(0)
    config, training = fields_of(config_kind, params), fields_of(GolfTraining, params)
    model = kind(config, dtype).to(device)
    optimizer = setup_golf_optimizer(model, compute_dtype=dtype, equalise_rows=bool(params.get("equalise_rows")))
    call = compile_golf(model, optimizer, not eager)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, 4 * training.train_batch_tokens)
        write_token_shard(Path(folder, "fineweb_train_000000.bin"), tokens)
        loader = DistributedTokenLoader(TokenStream([Path(folder, "fineweb_train_000000.bin")]), device=device)
        seconds = []
        for _ in range(steps + 3):
            synchronize(device)
            started = time.perf_counter()
            golf_step(call, optimizer, loader, training, 1.0, training.muon_momentum, {})
            synchronize(device)
            seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
    return statistics.median(seconds[3:]), peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    device = torch.device(autodetect_device_type())
    if device.type != "cuda" and not given.tiny:
        raise SystemExit("This needs an NVIDIA GPU; --tiny tries the script without one.")
    dtype, _ = choose_compute_dtype(device.type, allow_float16=False)
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    print(f"{device_name_of(device)}, {dtype}, {versions}, {time.strftime('%Y-%m-%d')}\n")
    print("| system | tokens in a step | ms | tokens per second | of the published 687,000 | peak GiB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, config_kind, kind, params in systems(given.tiny):
        seconds, peak = measure(config_kind, kind, params, device, dtype, given.steps, given.eager)
        tokens = params["train_batch_tokens"]
        share = tokens / seconds / PUBLISHED_TOKENS_PER_SECOND
        print(f"| {name} | {tokens:,} | {1000 * seconds:,.1f} | {tokens / seconds:,.0f} | {share:.1%} | {peak:.2f} |")
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
