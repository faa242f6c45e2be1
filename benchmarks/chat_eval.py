"""Chat generation speed: many problems in one batch beside the same engine with one problem at a time, in one run.

    python benchmarks/chat_eval.py [--problems 256] [--batch 32] [--max_new_tokens 64] [--dtype auto] [--rounds 3]

The model has the shape of the cpu preset (depth 4, width 256, 4,096 tokens) and random weights, so every answer runs to
its full length; the problems are the offline word problems, of different lengths. Speeds are new tokens divided by all
of the time, reading the prompts included. One at a time is measured on every fourth problem. Medians over the rounds.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "nb_src"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from helpers import small_tokenizer
from nanochat.attention_selection import select_attention
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.runtime import autodetect_device_type, choose_compute_dtype, compute_init, device_name_of
from tasks.offline_problems import offline_word_problems


def random_model(dtype_name: str):
    """A model of the cpu preset's shape that has learned nothing, as `load_model` gives it, and its tokenizer."""
    device = compute_init(autodetect_device_type())[-1]
    dtype = choose_compute_dtype(device.type)[0] if dtype_name == "auto" else getattr(torch, dtype_name)
    select_attention(device, dtype)
    tokenizer = small_tokenizer(4096)
    config = GPTConfig(
        sequence_len=512, vocab_size=tokenizer.get_vocab_size(), n_layer=4, n_head=4, n_kv_head=4, n_embd=256,
        window_pattern="L",
    )  # fmt: skip
    model = GPT(config, compute_dtype=dtype).to(device)
    model.init_weights()
    for parameter in model.parameters():
        if parameter.dim() == 2:  # with the starting weights every next token would be the same
            parameter.data.normal_(std=0.05)
    return model.eval().to(dtype), tokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    arguments = parser.parse_args()
    model, tokenizer = random_model(arguments.dtype)
    engine = Engine(model, tokenizer)
    problems = [
        {"messages": [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": ""}]}
        for row in offline_word_problems(arguments.problems)
    ]
    prompts = [tokenizer.render_for_completion(problem) for problem in problems]
    lengths = sorted(map(len, prompts))
    print(
        f"{device_name_of(model.get_device())}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{model.compute_dtype}"
    )
    print(f"{len(prompts)} prompts of {lengths[0]} to {lengths[-1]} tokens (median {lengths[len(lengths) // 2]})")

    def speed(chosen, batch_size):
        started = time.perf_counter()
        answers = dict(engine.generate_many(chosen, arguments.max_new_tokens, batch_size=batch_size))
        return sum(map(len, answers.values())) / (time.perf_counter() - started), answers

    speed(prompts[: arguments.batch], arguments.batch)  # warm up
    many, one, equal = [], [], 0
    for _ in range(arguments.rounds):
        together = speed(prompts, arguments.batch)
        alone = speed(prompts[::4], 1)
        many.append(together[0])
        one.append(alone[0])
        equal = sum(together[1][4 * i] == answer for i, answer in alone[1].items())
    rows = [
        ("one at a time", statistics.median(one), 1.0),
        (f"batch {arguments.batch}", statistics.median(many), statistics.median(many) / statistics.median(one)),
    ]
    print(f"\n{'':<16}{'new tokens/s':>14}{'ratio':>8}")
    for name, tokens_per_second, ratio in rows:
        print(f"{name:<16}{tokens_per_second:>14,.0f}{ratio:>8.2f}")
    print(f"\n{equal} of {len(prompts[::4])} answers are the same, token for token")


if __name__ == "__main__":
    main()
