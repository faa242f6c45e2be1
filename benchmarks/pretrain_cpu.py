"""Pretraining speed on a CPU beside a plain fp32 implementation of the same model, measured in turns in one run.

    python benchmarks/pretrain_cpu.py [--depth 4] [--vocab_size 8192] [--seq_len 512] [--batch 8] [--profile]

The plain model is what one writes first: fp32, PyTorch's built-in attention, all logits at once, cross-entropy; eager,
and compiled as a whole. Each contender lives in a process of its own and they take turns, five steps each; medians over
all steps of all rounds. The machine's own rate for one large matrix product is measured in the same run.
"""

import argparse
import multiprocessing
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "nb_src"))

from nanochat.attention import AttentionBackend, flash_attn, sdpa_with_kvcache
from nanochat.gpt import GPT, GPTConfig
from nanochat.runtime import choose_compute_dtype, device_name_of, keep_freed_memory

STEPS_PER_TURN = 5


class PlainGPT(GPT):
    """The same parameters and arithmetic in fp32, written plainly."""

    def forward(self, idx, targets):
        logits = self.lm_head(self.trunk(idx)).float()
        logits = 15 * torch.tanh(logits / 15)
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


def builtin_attention(q, k, v, window_size):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def prepare(name: str, config: GPTConfig, batch_size: int):
    """(model, optimizer, callable) of a contender."""
    torch.manual_seed(0)
    ours = name.startswith("ours")
    model = GPT(config, choose_compute_dtype("cpu")[0]) if ours else PlainGPT(config, torch.float32)
    model.init_weights()
    optimizer = model.setup_optimizer()
    if ours:
        keep_freed_memory()
        model.compile(batch_size, config.sequence_len)
        optimizer.compile()
        return model, optimizer, model
    flash_attn.use(AttentionBackend("plain", builtin_attention, sdpa_with_kvcache))
    if name.endswith("compiled"):
        optimizer.compile()
        return model, optimizer, torch.compile(model, dynamic=False)
    return model, optimizer, model


def train_step(model, optimizer, call, batch) -> float:
    started = time.perf_counter()
    call(*batch).backward()
    optimizer.step()
    model.zero_grad(set_to_none=True)
    return time.perf_counter() - started


def contender(name: str, config: GPTConfig, batch_size: int, pipe) -> None:
    """Answer "go" with the seconds of some steps, "profile" with a table; end at "stop"."""
    torch.set_num_threads(multiprocessing.cpu_count())
    model, optimizer, call = prepare(name, config, batch_size)
    batch = torch.randint(0, config.vocab_size, (2, batch_size, config.sequence_len)).unbind()
    while (order := pipe.recv()) != "stop":
        if order == "go":
            pipe.send([train_step(model, optimizer, call, batch) for _ in range(STEPS_PER_TURN)])
        else:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
                for _ in range(STEPS_PER_TURN):
                    train_step(model, optimizer, call, batch)
            table = recorded.key_averages().table
            pipe.send(table(sort_by="self_cpu_time_total", row_limit=16, max_name_column_width=48))


def matmul_rate(dtype, config: GPTConfig) -> float:
    """FLOP/s of the MLP's product, the best of many."""
    a, b = torch.randn(4096, config.n_embd).to(dtype), torch.randn(4 * config.n_embd, config.n_embd).to(dtype)
    times = []
    for _ in range(50):
        started = time.perf_counter()
        a @ b.T
        times.append(time.perf_counter() - started)
    return 2 * a.size(0) * b.numel() / min(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--vocab_size", type=int, default=8192)
    parser.add_argument("--seq_len", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--profile", action="store_true", help="also print where the time of our step goes")
    args = parser.parse_args()

    config = GPTConfig(args.seq_len, args.vocab_size, args.depth, args.depth, args.depth, 64 * args.depth, "L")
    dtype, reason = choose_compute_dtype("cpu")
    ours = f"ours, {str(dtype).removeprefix('torch.')}"
    names = ("plain fp32, eager", "plain fp32, compiled", ours)
    spawn = multiprocessing.get_context("spawn")
    pipes, first, times = {}, {}, {name: [] for name in names}
    for name in names:
        pipes[name], other_end = spawn.Pipe()
        spawn.Process(target=contender, args=(name, config, args.batch, other_end), daemon=True).start()
    for round_number in range(args.rounds + 1):
        for name, pipe in pipes.items():
            pipe.send("go")
            seconds = pipe.recv()
            if round_number == 0:
                first[name] = seconds[0]
            else:
                times[name] += seconds

    with torch.device("meta"):
        flops = GPT(config).estimate_flops()
    tokens = args.batch * args.seq_len
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"\n{device_name_of(torch.device('cpu'))}; torch {torch.__version__}; {reason}")
    print(f"depth {args.depth}, width {config.n_embd}, seq {args.seq_len}, batch {args.batch}, vocab {args.vocab_size}")
    print(f"\n{'':22}{'tokens/s':>10}{'step ms':>9}{'vs eager':>10}{'vs compiled':>13}{'1st step s':>12}{'of peak':>9}")
    for name, median in medians.items():
        share = flops * tokens / median / matmul_rate(dtype if name == ours else torch.float32, config)
        ratios = [medians[plain] / median for plain in names[:2]]
        row = f"{name:22}{tokens / median:>10,.0f}{1000 * median:>9.0f}{ratios[0]:>10.2f}{ratios[1]:>13.2f}"
        print(row + f"{first[name]:>12.1f}{share:>9.0%}")
    print("\nOf peak: model FLOPs, causality not discounted, over the machine's best rate for one large matrix product")
    print(f"in the same dtype (here {matmul_rate(dtype, config) / 1e9:,.0f} GFLOP/s in {dtype}).")
    if args.profile:
        pipes[ours].send("profile")
        print(pipes[ours].recv())
    for pipe in pipes.values():
        pipe.send("stop")


if __name__ == "__main__":
    main()
