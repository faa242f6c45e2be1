"""Chat server speed: one stream beside many at the same time, over HTTP, in one run.

    python benchmarks/serve.py [--streams 32] [--max_tokens 128] [--rounds 3] [--base_dir out/base]

Without --base_dir the model has the shape of the cpu preset (depth 4, width 256, 4,096 tokens) and random weights, and
never ends an answer by itself; with it, the fine-tuned model of that folder answers. The clients are plain sockets in a
process of their own, so that reading what arrives takes no time from the server. Speeds are tokens of the answers (as
the server counts them) divided by the time from the first request to the last token, reading the prompts included; the
first token is counted from the request. Medians over the rounds.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "nb_src"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

QUESTIONS = ("Why is the sky blue?", "What is 12 times 34?", "Tell me about the sea.", "How many r are in strawberry?")


def one_stream(port: int, token: str, body: bytes) -> tuple[int, float]:
    """Tokens of one answer, and seconds until the first piece of it came."""
    request = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    ).encode() + body
    started, first, received = time.perf_counter(), 0.0, b""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(request)
        while piece := connection.recv(1 << 16):
            received += piece
            if not first and (b'"delta":{"content"' in received or b'"delta":{"calculator"' in received):
                first = time.perf_counter() - started
    if b"data: [DONE]" not in received:
        sys.exit(f"an answer was not finished: {received[-300:].decode(errors='replace')}")
    usage = json.loads(received[received.rindex(b'"usage":') + 8 :].split(b"}")[0] + b"}")
    return usage["completion_tokens"], first


def clients(port: int, token: str, streams: int, options: dict) -> None:
    """The other process: for each line on its input, that many streams at once; one line of JSON about them."""
    for line in sys.stdin:
        bodies = [
            json.dumps(
                {"messages": [{"role": "user", "content": QUESTIONS[i % len(QUESTIONS)]}], "stream": True, "seed": i,
                 "stream_options": {"include_usage": True}, **options}
            ).encode()
            for i in range(int(line))
        ]  # fmt: skip
        with ThreadPoolExecutor(streams) as pool:
            started = time.perf_counter()
            results = list(pool.map(lambda body: one_stream(port, token, body), bodies))
            seconds = time.perf_counter() - started
        first = statistics.median(first for _, first in results)
        print(json.dumps({"tokens": sum(n for n, _ in results), "seconds": seconds, "first": first}), flush=True)


def talkative_model(dtype_name: str):
    """A random model that never ends an answer by itself, and its tokenizer."""
    import torch
    from chat_eval import random_model

    model, tokenizer = random_model(dtype_name)
    special, head = torch.tensor(sorted(tokenizer.special_ids.values()), device=model.get_device()), model.head
    model.head = lambda hidden: head(hidden).index_fill(-1, special, -1e4)
    return model, tokenizer


def trained_model(base_dir: str, dtype_name: str):
    from nanochat.attention_selection import select_attention
    from nanochat.checkpoint_manager import load_model
    from nanochat.runtime import autodetect_device_type, compute_init, show_user_errors_plainly

    show_user_errors_plainly()
    os.environ["NANOCHAT_BASE_DIR"] = base_dir
    if dtype_name != "auto":
        os.environ["NANOCHAT_DTYPE"] = dtype_name
    device = compute_init(autodetect_device_type())[-1]
    model, tokenizer, _ = load_model("sft", device, "eval")
    select_attention(device, model.compute_dtype)
    return model, tokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--max_tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--base_dir", default="")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--clients", type=int, help=argparse.SUPPRESS)  # the port: this is the other process
    arguments = parser.parse_args()
    options = {"max_tokens": arguments.max_tokens, "temperature": arguments.temperature}
    if arguments.clients:
        clients(arguments.clients, "benchmark", arguments.streams, options)
        return
    from nanochat.chat_server import ChatServer
    from nanochat.runtime import device_name_of

    if arguments.base_dir:
        model, tokenizer = trained_model(arguments.base_dir, arguments.dtype)
    else:
        model, tokenizer = talkative_model(arguments.dtype)
    import torch

    print(
        f"{device_name_of(model.get_device())}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{model.compute_dtype}, depth {model.config.n_layer}, width {model.config.n_embd}"
    )
    with ChatServer(model, tokenizer, "", token="benchmark", slots=arguments.streams) as server:
        command = [sys.executable, *sys.argv, "--clients", str(server.port)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

            def ask(streams):
                process.stdin.write(f"{streams}\n")
                process.stdin.flush()
                return json.loads(process.stdout.readline())

            ask(1), ask(arguments.streams)  # warm up
            measured = {1: [], arguments.streams: []}
            for _ in range(arguments.rounds):
                for streams, results in measured.items():
                    results.append(ask(streams))
            process.stdin.close()
    speeds = {
        streams: statistics.median(result["tokens"] / result["seconds"] for result in results)
        for streams, results in measured.items()
    }
    print(f"\n{'streams':<10}{'tokens':>10}{'tokens/s':>12}{'ratio':>8}{'first token':>14}")
    for streams, results in measured.items():
        first = statistics.median(result["first"] for result in results)
        print(
            f"{streams:<10}{results[0]['tokens']:>10,}{speeds[streams]:>12,.0f}{speeds[streams] / speeds[1]:>8.2f}"
            f"{first * 1000:>11,.0f} ms"
        )


if __name__ == "__main__":
    main()
