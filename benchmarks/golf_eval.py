"""What a long context costs and gains: quality and speed of the scorers on one briefly trained model, in one run.

    python benchmarks/golf_eval.py [--lengths 1024 256] [--stride 64] [--steps 150] [--rounds 3] [--batch 8] [--compile]

The model has the shape of the cpu preset (6 layers, width 128, 4 heads, 2 key-value heads, 1,024 tokens) and is trained
on the offline data for a few minutes, at the length at which it is scored: random weights know nothing that a longer
context could help with. Two tables for each length:

Quality: bits per byte of the validation text in blocks, in a band, and in windows that slide by fractions of their
length, and how many tokens each computes for one target. A model that was trained too briefly for its length loses by
a longer context, whoever provides it; then this table says nothing about the scorers.

Speed: the first targets of the text, scored in turns; the median over the rounds. "Plain" is what one writes first: one
window per forward, all its logits. Ours in the same windows must have its targets and bytes to the last one and in
fp32 its bits per byte to a millionth. What a token is in a deep layer depends on where its window began, so the same
windows can save work in the last block and the head only: the line above the table says how many multiplications.
A band computes each token once, and is another score.
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

from golf.golf_data import prepare_golf_data
from golf.golf_gpt import GolfConfig, GolfGPT
from golf.golf_optim import setup_golf_optimizer
from golf.golf_schedule import golf_lr_multiplier, golf_muon_momentum
from golf.golf_scoring import STRETCH_LENGTHS, score_banded, score_stream, scoring_windows
from golf.golf_tokenizers import BpbSums, ByteTables, build_byte_tables, load_golf_tokenizer
from golf.shards import DistributedTokenLoader, TokenStream, load_validation_tokens
from nanochat.runtime import device_name_of, keep_freed_memory

VOCABULARY, BATCH_TOKENS = 1024, 4096


def new_model(length: int, dtype: torch.dtype) -> GolfGPT:
    torch.manual_seed(0)
    config = GolfConfig(
        vocab_size=VOCABULARY, model_dim=128, num_heads=4, num_kv_heads=2, num_layers=6, max_seq_len=length
    )
    return GolfGPT(config, dtype)


def train_briefly(length: int, steps: int, files) -> GolfGPT:
    model, loader = new_model(length, torch.float32), DistributedTokenLoader(TokenStream(files))
    optimizer = setup_golf_optimizer(
        model, tied_embed_lr=0.03, matrix_lr=0.02, scalar_lr=0.02, compute_dtype=torch.float32
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    started, tokens = time.perf_counter(), max(BATCH_TOKENS, length)
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * golf_lr_multiplier(step, steps, steps * 2 // 5)
            if group["kind"] == "muon":
                group["momentum"] = golf_muon_momentum(step, warmup_steps=100)
        loss = model(*loader.next_batch(tokens, length, 1))
        loss.backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - started
    print(f"\nlength {length}: {steps} steps of {tokens} tokens in {seconds:.0f} s, last loss {loss.item():.3f} nats\n")
    return model.eval()


@torch.no_grad()
def plain_score(model, stream, tables: ByteTables, length: int, stride: int) -> BpbSums:
    """What one writes first: each window by itself, logits and losses of all its targets, the new ones are kept."""
    sums = BpbSums()
    for start, first, end in scoring_windows(len(stream) - 1, length, stride):
        logits = model(stream[None, start:end])[0]
        losses = F.cross_entropy(logits, stream[start + 1 : end + 1], reduction="none")
        sums.add(losses[first - start :], stream[first:end], stream[first + 1 : end + 1], tables)
    return sums


def timed(function) -> tuple[float, BpbSums]:
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def show_quality(model, stream, tables, length: int, stride: int, batch: int) -> None:
    losses_of, computed = partial(model, reduction="none"), 0

    def counted(inputs, targets, **how):
        nonlocal computed
        computed += inputs.numel()
        return losses_of(inputs, targets, **how)

    ways = {"blocks": partial(score_stream, counted, stream, tables, length, batch_windows=batch)}
    strides = sorted({stride} | {length // part for part in (2, 4, 8) if length // part > stride}, reverse=True)
    for each in strides:
        ways[f"windows, stride {each}"] = partial(score_stream, counted, stream, tables, length, each, batch)
    ways["band"] = partial(score_banded, counted, stream, tables, length, stride, batch)
    rows = {}
    for name, way in ways.items():
        computed = 0
        seconds, score = timed(way)
        rows[name] = score.val_bpb, computed / (len(stream) - 1), seconds
    print(f"{len(stream) - 1:,} targets{'':18}{'bpb':>9}{'to blocks':>11}{'tokens/target':>15}{'seconds':>9}")
    for name, (bpb, tokens, seconds) in rows.items():
        print(f"  {name:30}{bpb:>9.5f}{bpb - rows['blocks'][0]:>+11.5f}{tokens:>15.2f}{seconds:>9.1f}")


def saved_in_same_windows(config: GolfConfig, length: int, stride: int) -> float:
    """Multiplications of whole windows over those of windows whose last block and head compute the new targets only."""
    C, keys = config.model_dim, 2 * config.model_dim * config.num_kv_heads * config.head_dim
    block, head = 2 * C * C + keys + 2 * config.mlp_mult * C * C, config.vocab_size * C
    whole_block = length * (block + C * (length + 1))  # a query meets (length + 1) / 2 keys, and as many values
    last_block = length * keys + stride * (block - keys + C * (2 * length - stride + 1))
    plain = config.num_layers * whole_block + length * head
    return plain / ((config.num_layers - 1) * whole_block + last_block + stride * head)


def show_speed(model, stream, tables, length: int, stride: int, arguments) -> bool:
    """False when the same windows give different scores."""
    narrow = new_model(length, torch.bfloat16).eval()
    narrow.load_state_dict(model.state_dict())
    runs = {"plain, one window": partial(plain_score, model, stream, tables, length, stride)}
    for dtype, each in (("fp32", model), ("bf16", narrow)):
        calls = {dtype: each}
        if arguments.compile:
            calls[f"{dtype}, compiled"] = torch.compile(each, dynamic=False)
        for label, call in calls.items():
            losses_of = partial(call, reduction="none")
            runs[f"windows, {label}"] = partial(
                score_stream, losses_of, stream, tables, length, stride, arguments.batch
            )
            runs[f"band, {label}"] = partial(score_banded, losses_of, stream, tables, length, stride, arguments.batch)
    scores = {name: run() for name, run in runs.items()}  # also the warm-up
    seconds = {name: [] for name in runs}
    for _ in range(arguments.rounds):
        for name, run in runs.items():
            seconds[name].append(timed(run)[0])
    plain, same = "plain, one window", True
    saved = saved_in_same_windows(model.config, length, stride)
    print(f"Whole windows have {saved:.2f} times the multiplications of those with a short last block and head.\n")
    print(f"{len(stream) - 1:,} targets{'':20}{'targets/s':>11}{'faster':>9}{'bpb off by':>13}")
    for name in runs:
        median, difference = statistics.median(seconds[name]), scores[name].val_bpb / scores[plain].val_bpb - 1
        same &= bool((scores[name].sums[1:] == scores[plain].sums[1:]).all())
        same &= name.startswith("band") or abs(difference) < (1e-3 if "bf16" in name else 1e-6)
        faster = statistics.median(seconds[plain]) / median
        print(f"  {name:32}{(len(stream) - 1) / median:>11,.0f}{faster:>9.2f}{difference:>13.1e}", flush=True)
    return same


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 256], help="tokens in a window")
    parser.add_argument("--stride", type=int, default=64)
    parser.add_argument("--steps", type=int, default=150, help="of training")
    parser.add_argument("--batch", type=int, default=8, help="windows that go through the model together")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="also with torch.compile")
    arguments = parser.parse_args()
    keep_freed_memory()
    data = prepare_golf_data("offline")
    stream = load_validation_tokens(data.val_files, VOCABULARY)
    tables = build_byte_tables(load_golf_tokenizer(data.tokenizer_path), VOCABULARY)
    print(
        f"\n{device_name_of(torch.device('cpu'))}; torch {torch.__version__}; stride {arguments.stride}, "
        f"batches of {arguments.batch} windows"
    )
    same = True
    for length in arguments.lengths:
        model = train_briefly(length, arguments.steps, data.train_files)
        show_quality(model, stream, tables, length, arguments.stride, arguments.batch)
        print()
        some = stream[: (2 * STRETCH_LENGTHS + 1) * length - arguments.stride + 1]  # two full stretches of the band
        same &= show_speed(model, some, tables, length, arguments.stride, arguments)
    if not same:
        sys.exit("The scores differ.")


if __name__ == "__main__":
    main()
