"""Pretraining speed on a CPU beside a plain fp32 implementation of the same model, measured in turns in one run.

    python benchmarks/pretrain_cpu.py [--depth 4] [--vocab_size 8192] [--seq_len 512] [--batch 8] [--profile]

The plain model is what one writes first: fp32, PyTorch's built-in attention, all logits at once, cross-entropy; eager,
and compiled as a whole. Medians over all steps of all rounds; the machine's own matrix-product rate is printed too.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "nb_src"))

from nanochat.attention import AttentionBackend, flash_attn, sdpa_attention, sdpa_with_kvcache
from nanochat.gpt import GPT, GPTConfig
from nanochat.runtime import choose_compute_dtype, device_name_of


class PlainGPT(GPT):
    """The same parameters and arithmetic in fp32, written plainly."""

    def forward(self, idx, targets):
        logits = self.lm_head(self.trunk(idx)).float()
        logits = 15 * torch.tanh(logits / 15)
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


def builtin_attention(q, k, v, window_size):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def build(kind, config, dtype):
    torch.manual_seed(0)
    model = kind(config, dtype)
    model.init_weights()
    return model, model.setup_optimizer()


def train_step(model, optimizer, call, batch) -> float:
    started = time.perf_counter()
    call(*batch).backward()
    optimizer.step()
    model.zero_grad(set_to_none=True)
    return time.perf_counter() - started


def matmul_rate(dtype, config) -> float:
    """FLOP/s of the MLP's product, the best of many."""
    a, b = torch.randn(4096, config.n_embd).to(dtype), torch.randn(4 * config.n_embd, config.n_embd).to(dtype)
    times = []
    for _ in range(30):
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
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="also print where the time of our step goes")
    args = parser.parse_args()

    heads = args.depth
    config = GPTConfig(args.seq_len, args.vocab_size, args.depth, heads, heads, 64 * heads, "L")
    batch = torch.randint(0, args.vocab_size, (2, args.batch, args.seq_len)).unbind()
    dtype, reason = choose_compute_dtype("cpu")
    plain = AttentionBackend("plain", builtin_attention, sdpa_with_kvcache, lambda device, dtype: True)
    ours = AttentionBackend("sdpa", sdpa_attention, sdpa_with_kvcache, lambda device, dtype: True)

    contenders = {}
    model, optimizer = build(PlainGPT, config, torch.float32)
    contenders["plain fp32, eager"] = (plain, model, optimizer, model)
    model, optimizer = build(PlainGPT, config, torch.float32)
    optimizer.compile()
    contenders["plain fp32, compiled"] = (plain, model, optimizer, torch.compile(model, dynamic=False))
    model, optimizer = build(GPT, config, dtype)
    model.compile(args.batch, args.seq_len)
    optimizer.compile()
    contenders[f"ours, {str(dtype).removeprefix('torch.')}"] = (ours, model, optimizer, model)

    times = {name: [] for name in contenders}
    first = {}
    for round_number in range(args.rounds + 1):
        for name, (backend, model, optimizer, call) in contenders.items():
            flash_attn.selected = backend
            steps = [train_step(model, optimizer, call, batch) for _ in range(1 if round_number == 0 else 5)]
            if round_number == 0:
                first[name] = steps[0]
            else:
                times[name] += steps[1:]

    tokens = args.batch * args.seq_len
    medians = {name: statistics.median(values) for name, values in times.items()}
    reference = medians["plain fp32, compiled"]
    print(f"\n{device_name_of(torch.device('cpu'))}; torch {torch.__version__}; {reason}")
    print(f"depth {args.depth}, width {config.n_embd}, seq {args.seq_len}, batch {args.batch}, vocab {args.vocab_size}")
    print(f"\n{'':24}{'tokens/s':>10}{'step ms':>10}{'ratio':>8}{'first step s':>14}{'share of peak':>15}")
    for name, median in medians.items():
        peak = matmul_rate(dtype if name.startswith("ours") else torch.float32, config)
        share = model.estimate_flops() * tokens / median / peak
        row = f"{name:24}{tokens / median:>10,.0f}{1000 * median:>10.0f}{reference / median:>8.2f}"
        print(row + f"{first[name]:>14.1f}{share:>15.0%}")
    print("\nratio: to the compiled plain model. Share of peak: model FLOPs, causality not discounted, over the")
    print("machine's best rate for one large product in the same dtype.")

    if args.profile:
        from torch.profiler import ProfilerActivity, profile

        backend, model, optimizer, call = list(contenders.values())[-1]
        flash_attn.selected = backend
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            for _ in range(5):
                train_step(model, optimizer, call, batch)
        print(recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=16, max_name_column_width=48))


if __name__ == "__main__":
    main()
