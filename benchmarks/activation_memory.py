"""Where the memory of a training pass on a GPU goes, counted without a GPU.

    python benchmarks/activation_memory.py [--depth 12] [--seq_len 2048] [--batch 16] [--vocab_size 32768]

An estimate, not a measurement. One layer with and one without value embedding are compiled on the CPU in bf16, one
sequence long, and everything that autograd keeps between forward and backward is counted, each storage once. Attention
is stood in by an operation that keeps what flash kernels keep (q, k, v, result, log-sum-exp). The rest follows from
the sizes: fp32 matrices and head, bf16 tables, their gradients, the optimizer's state, one chunk of the loss. Not in
it: what the allocator holds in reserve, work space of libraries, temporary tensors of the backward pass.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "nb_src"))

import nanochat.gpt as gpt_chapter
from nanochat.attention import AttentionBackend, flash_attn
from nanochat.gpt import GPT, Block, GPTConfig

MEBIBYTE = 2**20


@torch.library.custom_op("activation_memory::flash", mutates_args=())
def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return q.clone(), q.new_zeros(q.size(0), q.size(2), q.size(1), dtype=torch.float32)


@flash.register_fake
def _(q, k, v):
    return torch.empty_like(q), q.new_empty(q.size(0), q.size(2), q.size(1), dtype=torch.float32)


@torch.library.custom_op("activation_memory::flash_backward", mutates_args=())
def flash_backward(
    y_grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, y: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return y_grad.clone(), y_grad.clone(), y_grad.clone()


@flash_backward.register_fake
def _(y_grad, q, k, v, y, lse):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


flash.register_autograd(
    lambda ctx, y_grad, lse_grad: flash_backward(y_grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output),
)


def kept_by_layer(config: GPTConfig, layer: int, from_result: bool) -> tuple[int, int]:
    """Bytes that the compiled layer keeps for one sequence, and bytes of weights that it keeps in bf16 besides."""
    gpt_chapter.memory_counts = lambda x: from_result and torch.compiler.is_compiling()
    T, C = config.sequence_len, config.n_embd
    model = GPT(config, torch.bfloat16)
    model.init_weights()
    model.compile(1, T)
    x, x0, value_embedding = (torch.randn(1, T, C).bfloat16().requires_grad_() for _ in range(3))
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    block = model.transformer["h"][layer]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.compiled[Block.forward](
            block, x, x0, model.resid_lambdas[layer], model.x0_lambdas[layer],
            value_embedding if config.has_value_embedding(layer) else None,
            model.cos[:, :T], model.sin[:, :T], model.window_sizes[layer],
        )  # fmt: skip
    shared = {tensor.untyped_storage().data_ptr() for tensor in (x0, model.cos, model.sin, *model.parameters())}
    shapes = {p.shape for p in block.parameters()}
    sizes = [(t.shape in shapes, t.untyped_storage().nbytes()) for at, t in kept.items() if at not in shared]
    return sum(size for is_weight, size in sizes if not is_weight), sum(size for is_weight, size in sizes if is_weight)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--seq_len", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--vocab_size", type=int, default=32768)
    args = parser.parse_args()
    heads = -(-args.depth * 64 // 128)
    shape = dict(sequence_len=args.seq_len, n_head=heads, n_kv_head=heads, n_embd=128 * heads)
    with torch.device("meta"):
        counts = GPT(GPTConfig(vocab_size=args.vocab_size, n_layer=args.depth, **shape)).num_scaling_params()
    flash_attn.use(AttentionBackend("stand-in", lambda q, k, v, window_size: flash(q, k, v)[0], None))

    tables, head, matrices = counts["wte"] + counts["value_embeds"], counts["lm_head"], counts["transformer_matrices"]
    stream = args.batch * args.seq_len * shape["n_embd"] * 2  # bytes of one (B, T, C) in bf16
    rows = min(gpt_chapter.loss_chunk_rows(torch.device("cuda")), args.batch * args.seq_len)
    fixed = {
        "weights": 4 * (matrices + head) + 2 * tables,
        "gradients, in all passes but the first": 4 * (matrices + head) + 2 * tables,
        "optimizer state": 4 * matrices + 8 * head + 4 * tables,
        "first embedding, stream, its norm and gradient": 4 * stream,
        f"loss: {rows} rows of logits and their gradient, head in bf16, its gradient": (
            2 * 2 * rows * args.vocab_size + 2 * head + 4 * head + 2 * head
        ),
    }
    print(f"d{args.depth}, {args.batch} x {args.seq_len} tokens, estimated; torch {torch.__version__}\n")
    print("| part | MiB | MiB with derivatives from the result |")
    print("| --- | ---: | ---: |")
    totals = [0, 0]
    small = GPTConfig(vocab_size=64, n_layer=2, **shape)
    layers = [[kept_by_layer(small, layer, from_result) for layer in (0, 1)] for from_result in (False, True)]
    with_table = args.depth - args.depth // 2
    rows_of_table = {name: (size, size) for name, size in fixed.items()}
    for layer, number, kind in ((0, args.depth - with_table, "without"), (1, with_table, "with")):
        kept = [number * args.batch * each[layer][0] for each in layers]
        rows_of_table[f"{number} layers {kind} value embedding ({kept[0] / number / stream:.1f} or "
                      f"{kept[1] / number / stream:.1f} numbers per token and channel)"] = kept  # fmt: skip
    rows_of_table["their weights in bf16"] = [
        (args.depth - with_table) * each[0][1] + with_table * each[1][1] for each in layers
    ]
    for name, sizes in rows_of_table.items():
        print(f"| {name} | {sizes[0] / MEBIBYTE:.0f} | {sizes[1] / MEBIBYTE:.0f} |")
        totals = [total + size for total, size in zip(totals, sizes, strict=True)]
    print(f"| **together** | **{totals[0] / MEBIBYTE:.0f}** | **{totals[1] / MEBIBYTE:.0f}** |")


if __name__ == "__main__":
    main()
