import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict

import httpx
import pytest
import torch

from helpers import REPOSITORY, small_tokenizer
from nanochat.checkpoint_files import save_checkpoint
from nanochat.checkpoint_manager import checkpoint_folder
from nanochat.gpt import GPT, GPTConfig

TOOL = [sys.executable, str(REPOSITORY / "tools" / "chat.py"), "--device_type", "cpu"]


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    """A fine-tuned model that has learned nothing."""
    folder = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        small_tokenizer().save(folder / "tokenizer")
        torch.manual_seed(1)
        model = GPT(GPTConfig(sequence_len=64, vocab_size=512, n_layer=2, n_head=2, n_kv_head=2, n_embd=64))
        model.init_weights()
        meta = {"model_config": asdict(model.config)}
        save_checkpoint(checkpoint_folder("sft", "d2"), 3, model.state_dict(), None, meta)
    return folder


def environment():
    """Without what the tests add: the tool finds the chapters by itself."""
    return {**{name: value for name, value in os.environ.items() if name != "PYTHONPATH"}, "OMP_NUM_THREADS": "1"}


def run(*arguments, typed=""):
    return subprocess.run(
        [*TOOL, *map(str, arguments)],
        input=typed,
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(),
        cwd="/",
    )


def test_one_answer(base_dir):
    """The command that the end of a run prints must start a chat."""
    done = run("--base_dir", base_dir, "--prompt", "Hello", "--max_tokens", 5)
    assert done.returncode == 0 and "d2/3" in done.stdout and done.stderr == ""


def test_mistakes_are_one_sentence(base_dir, tmp_path):
    """Forty lines of traceback for a folder that is empty or a port that is taken."""
    done = run("--base_dir", tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("✗ ") and len(done.stderr.splitlines()) == 1
    done = run("--top_k", -1)
    assert done.returncode == 2 and "cannot be negative" in done.stderr


def test_serving(base_dir):
    """An address that does not work, a warning that nobody sees, a server that cannot be ended."""
    serving = subprocess.Popen(
        [*TOOL, "--base_dir", str(base_dir), "--serve", "--port", "0", "--host", "0.0.0.0", "--token", "abc"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), cwd="/",
    )  # fmt: skip
    guard = threading.Timer(60, serving.kill)  # ends the wait for a line that does not come
    guard.start()
    printed = []
    try:
        while not printed or (printed[-1] and not printed[-1].startswith("For programs")):
            printed.append(serving.stdout.readline())
        address = printed[-2].removeprefix("The page: ").strip().removesuffix("/#token=abc")
        assert address.startswith("http://127.0.0.1:") and "nothing is encrypted" in printed[-3]
        assert httpx.get(f"{address}/health").json()["model"] == "nanochat-sft"
        assert "<html" in httpx.get(address).text.lower()
        answer = httpx.post(
            f"{address}/v1/chat/completions", headers={"Authorization": "Bearer abc"}, timeout=20,
            json={"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
        )  # fmt: skip
        assert answer.json()["usage"]["completion_tokens"] <= 2
        taken = run("--base_dir", base_dir, "--serve", "--port", address.rpartition(":")[2])
        assert taken.returncode == 1 and "cannot be used" in taken.stderr and len(taken.stderr.splitlines()) == 1
        serving.send_signal(signal.SIGINT)
        rest, errors = serving.communicate()
        assert (serving.returncode, rest, errors) == (0, "", "")
    finally:
        serving.kill()
        guard.cancel()
