"""Peak memory of the loss: all logits at once beside the chunks of `ChunkedCrossEntropy`, on the CPU.

    python benchmarks/loss_memory.py [--rows 8192] [--vocab_size 32768] [--width 768]

Forward and backward of a linear head, the soft cap and the cross-entropy. "plain" is what one writes first: logits,
tanh, F.cross_entropy. Each contender runs in a process of its own; what is counted is the growth of that process's
resident memory (the kernel's VmHWM, Linux only) from the moment when activations and weights exist. Compilation happens
before. Gradients are compared with those of plain, eager, fp32. Times are of one run each, and only for orientation.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "nb_src"))

from nanochat.gpt import ChunkedCrossEntropy, chunk_losses_and_gradient
from nanochat.runtime import device_name_of

SOFTCAP = 15.0


def plain_loss(x, weight, targets):
    logits = (x @ weight.to(x.dtype).T).float()
    return F.cross_entropy(SOFTCAP * torch.tanh(logits / SOFTCAP), targets)


def process_memory(field: str) -> int:
    """Bytes of this process: VmRSS now, or VmHWM at its highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def contend(loss_of: str, dtype: str, mode: str, rows: int, vocab_size: int, width: int, output: str) -> None:
    """Measure one contender in this process; bytes, seconds and gradients go to the file."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=generator).to(getattr(torch, dtype)).requires_grad_()
    weight = (torch.randn(vocab_size, width, generator=generator) * width**-0.5).requires_grad_()
    targets = torch.randint(vocab_size, (rows,), generator=generator)
    compiled = torch.compile(dynamic=False) if mode == "compiled" else (lambda function: function)
    plain, chunk = compiled(plain_loss), compiled(chunk_losses_and_gradient)

    def step():
        if loss_of == "plain":
            loss = plain(x, weight, targets)
        else:
            loss = ChunkedCrossEntropy.apply(x, weight, targets, SOFTCAP, chunk)
        loss.backward()

    if mode == "compiled":
        step()
        x.grad = weight.grad = None
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before, started = process_memory("VmRSS"), time.perf_counter()
    step()
    seconds = time.perf_counter() - started
    torch.save((process_memory("VmHWM") - before, seconds, x.grad.float(), weight.grad), output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--vocab_size", type=int, default=32768)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--contend", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = (args.rows, args.vocab_size, args.width)
    if args.contend:
        return contend(*args.contend[:3], *sizes, args.contend[3])

    print(f"{args.rows} rows, {args.vocab_size} tokens, width {args.width}; torch {torch.__version__}, ", end="")
    print(device_name_of(torch.device("cpu")), end="\n\n")
    print("| dtype | mode | loss | peak MB | of plain | time of plain | gradient difference |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: |")
    reference = None
    with tempfile.TemporaryDirectory() as folder:
        output = str(Path(folder) / "result.pt")
        for dtype in ("float32", "bfloat16"):
            for mode in ("eager", "compiled"):
                of_plain = None
                for loss_of in ("plain", "chunked"):
                    options = [f"--rows={args.rows}", f"--vocab_size={args.vocab_size}", f"--width={args.width}"]
                    command = [sys.executable, __file__, *options, "--contend", loss_of, dtype, mode, output]
                    subprocess.run(command, check=True)
                    peak, seconds, *gradients = torch.load(output, weights_only=True)
                    reference = reference or gradients
                    of_plain = of_plain or (peak, seconds)
                    difference = max(
                        ((one - other).norm() / other.norm()).item()
                        for one, other in zip(gradients, reference, strict=True)
                    )
                    shares = f"{peak / of_plain[0]:.1%} | {seconds / of_plain[1]:.2f}"
                    print(
                        f"| {dtype} | {mode} | {loss_of} | {peak / 1e6:.0f} | {shares} | {difference:.1e} |", flush=True
                    )


if __name__ == "__main__":
    main()
