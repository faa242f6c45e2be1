"""Talk to a trained model, in the terminal or, with --serve, in a browser and from programs.

python tools/chat.py                                  # the fine-tuned model of the base directory
python tools/chat.py --prompt "Why is the sky blue?"  # one answer
python tools/chat.py --serve                          # a page, and OpenAI's protocol beside it
"""

import argparse
import ipaddress
import os
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "nb_src"))

from nanochat.attention_selection import select_attention
from nanochat.chat_page import CHAT_PAGE
from nanochat.chat_server import ChatServer
from nanochat.chat_terminal import chat_in_terminal
from nanochat.checkpoint_manager import load_model, locate_checkpoint
from nanochat.runtime import autodetect_device_type, compute_init, print0, show_user_errors_plainly


def parse_arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_dir", help="where the run is (default: NANOCHAT_BASE_DIR, or ~/.cache/nanochat)")
    parser.add_argument("--source", default="sft", choices=["sft", "base", "rl"])
    parser.add_argument("--model_tag", help="such as d12 (default: the largest)")
    parser.add_argument("--step", type=int, help="of the checkpoint (default: the last)")
    parser.add_argument("--device_type", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    terminal = parser.add_argument_group("in the terminal")
    terminal.add_argument("--prompt", default="", help="answer this and end")
    terminal.add_argument("--temperature", type=float, default=0.6)
    terminal.add_argument("--top_k", type=int, default=50, help="0 for all tokens")
    terminal.add_argument("--max_tokens", type=int, default=512, help="of each answer")
    server = parser.add_argument_group("as a server")
    server.add_argument("--serve", action="store_true")
    server.add_argument("--host", default="127.0.0.1")
    server.add_argument("--port", type=int, default=8000, help="0 for any that is free")
    server.add_argument("--token", default="", help="which clients must send (default: a new one)")
    arguments = parser.parse_args(given)
    if arguments.temperature < 0 or arguments.top_k < 0 or arguments.max_tokens < 1:
        parser.error("temperature and top_k cannot be negative, max_tokens must be at least 1")
    return arguments


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(socket.gethostbyname(host) if ":" not in host else host).is_loopback
    except (OSError, ValueError):
        return False


def main() -> None:
    show_user_errors_plainly()
    arguments = parse_arguments()
    if arguments.base_dir:
        os.environ["NANOCHAT_BASE_DIR"] = arguments.base_dir
    locate_checkpoint(arguments.source, arguments.model_tag, arguments.step)  # before anything is started
    device_type = autodetect_device_type() if arguments.device_type == "auto" else arguments.device_type
    device = compute_init(device_type)[-1]
    model, tokenizer, _ = load_model(arguments.source, device, "eval", arguments.model_tag, arguments.step)
    print0(f"attention: {select_attention(device, model.compute_dtype).sentence}")
    if not arguments.serve:
        chat_in_terminal(
            model, tokenizer, arguments.temperature, arguments.top_k, arguments.max_tokens, arguments.prompt
        )
        return
    name = f"nanochat-{arguments.source}"
    server = ChatServer(model, tokenizer, CHAT_PAGE, name, arguments.host, arguments.port, arguments.token)
    if not is_loopback(arguments.host):
        print(f"Warning: everybody who can reach {arguments.host} can connect, and nothing is encrypted on the way.")
    print(f"The page: {server.url}")
    print(f"For programs: base_url {server.address}/v1, api_key {server.token}. Ctrl-C ends.", flush=True)
    server.serve()


if __name__ == "__main__":
    main()
