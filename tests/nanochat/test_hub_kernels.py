import base64
import hashlib
import json
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from helpers import python_environment
from kernel_stand_ins import RIGHT_KERNEL, write_kernel
from nanochat import attention_selection
from nanochat.attention import flash_attn
from nanochat.attention_selection import AttentionMachine, select_attention
from nanochat.hub_kernels import HUB_KERNELS, fetch_hub_kernel, load_hub_kernel

FA3, FA2 = "kernels-community/flash-attn3", "kernels-community/flash-attn2"


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class KernelHub:
    """The part of a hub that gives out kernels. kernels: repository -> {path: content}, at the commit of the list."""

    def __init__(self):
        self.kernels, self.trusted, self.commits, self.asked = {}, True, dict(HUB_KERNELS), []

    def __enter__(self):
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments):
                pass

            def do_GET(self):
                hub.asked.append(self.path)
                status, headers, data = hub.answer(self.path.partition("?")[0])
                self.send_response(status)
                for name, value in {**headers, "Content-Length": len(data)}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(data)

            do_HEAD = do_GET

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.http.shutdown()
        self.http.server_close()

    def answer(self, path: str):
        if path.startswith("/api/organizations/"):
            return self.json({"name": "kernels-community", "trustedKernelPublisher": self.trusted})
        match = re.fullmatch(r"/api/kernels/([^/]+/[^/]+)/(revision|tree)/([^/]+)(/build)?", path)
        match = match or re.fullmatch(r"/kernels/([^/]+/[^/]+)/(resolve)/([^/]+)/(.+)", path)
        repository, what, revision, rest = match.groups()
        files = self.kernels.get(repository)
        if files is None or revision != HUB_KERNELS[repository]:
            return 404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"}, b"{}"
        if what == "revision":
            return self.json({"id": repository, "sha": revision})
        if what == "tree":
            folders = [{"type": "directory", "path": "build/torch-universal", "oid": "0" * 40}]
            entries = [
                {"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                for p, c in files.items()
            ]
            return self.json(folders if rest else folders + entries)
        content = files[rest]
        return (
            200,
            {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": self.commits[repository]},
            content,
        )

    def json(self, content):
        return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()


CHOOSE = """
import torch
from nanochat import attention_selection
from nanochat.attention_selection import AttentionMachine, select_attention
attention_selection.this_machine = lambda device: AttentionMachine("cuda", (8, 0))
print(select_attention("cpu", torch.bfloat16).sentence)
"""


def choose_in_a_new_process(tmp_path, address: str) -> str:
    """The sentence about the choice on an A100 that finds the hub at this address."""
    environment = python_environment(
        HF_ENDPOINT=address, HF_HOME=tmp_path / "hf", NANOCHAT_BASE_DIR=tmp_path / "base", OMP_NUM_THREADS=1
    )
    for name in ("KERNELS_CACHE", "HF_HUB_OFFLINE", "LOCAL_KERNELS"):
        environment.pop(name, None)
    done = subprocess.run([sys.executable, "-c", CHOOSE], env=environment, text=True, capture_output=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.fixture
def choose(monkeypatch, tmp_path):
    """The same in this process, with a cache of its own."""
    cache = str(tmp_path / "cache")
    for name, value in (("KERNELS_CACHE", cache), ("NANOCHAT_BASE_DIR", str(tmp_path / "base"))):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_KERNELS", raising=False)
    for module in ("kernels.resolver", "kernels.install"):
        monkeypatch.setattr(f"{module}.CACHE_DIR", cache)
    monkeypatch.setattr(attention_selection, "this_machine", lambda device: AttentionMachine("cuda", (8, 0)))
    monkeypatch.setattr(flash_attn, "selected", flash_attn.selected)

    def choose_with(address: str, action=lambda: select_attention("cpu", torch.bfloat16).sentence):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        files = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", address)
        return action()

    return choose_with


def digests(files: dict[str, bytes]) -> dict:
    """The files of a build with their digests written into its metadata."""
    build = "build/torch-universal/"
    entries = {path.removeprefix(build): base64.b64encode(hashlib.sha256(content).digest()).decode()
               for path, content in files.items() if not path.endswith("metadata.json")}  # fmt: skip
    metadata = json.loads(files[f"{build}metadata.json"]) | {"digest": {"algorithm": "sha256", "files": entries}}
    return {**files, f"{build}metadata.json": json.dumps(metadata).encode()}


def test_the_list_pins_whole_commits():
    """A branch, a tag or a short hash, behind which the code can change."""
    assert all(re.fullmatch("[0-9a-f]{40}", revision) for revision in HUB_KERNELS.values())


def test_a_repository_that_is_not_on_the_list_runs_nothing(monkeypatch, tmp_path):
    """Code of a stranger that runs because somebody typed a name, from the hub or from a folder."""
    folder = write_kernel(tmp_path / "stranger", f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setenv("LOCAL_KERNELS", f"somebody/flash-attn3={folder}")
    with pytest.raises(ValueError, match="somebody/flash-attn3 is not on the list"):
        load_hub_kernel("somebody/flash-attn3")
    assert not (tmp_path / "ran").exists()


def test_a_kernel_that_brings_others_along_runs_nothing(monkeypatch, tmp_path):
    """A repository that is not on the list, executed because one on the list depends on it."""
    other = {"repo-id": "somebody/other", "version": 1}
    folder = write_kernel(tmp_path / "fa3", f"open({str(tmp_path / 'ran')!r}, 'w')", **{"kernel-depends": [other]})
    monkeypatch.setenv("LOCAL_KERNELS", f"{FA3}={folder}")
    with pytest.raises(ValueError, match="it wants to load somebody/other, which is not on the list"):
        load_hub_kernel(FA3)
    assert not (tmp_path / "ran").exists()


def test_an_unreachable_hub_is_asked_once(choose, monkeypatch):
    """A start that hangs for a minute while the client repeats its requests, or does not say why it is slower then."""
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("the client waits before it asks again"))
    with KernelHub() as hub:
        address = hub.address  # closed again: nobody listens there
    assert choose(address).startswith("sdpa (proven on 12 cases); passed over: fa3, fa2 (ConnectError: ")


def test_a_kernel_is_downloaded_once_and_a_revoked_one_passed_over(tmp_path):
    """A commit that its authors withdrew ends the run; or every start needs the network again."""
    with KernelHub() as hub:
        hub.kernels[FA2] = digests(files_of(write_kernel(tmp_path / "fa2")))
        sentence = choose_in_a_new_process(tmp_path, hub.address)
        assert sentence.startswith(f"fa2, FlashAttention-2 from {FA2} at {HUB_KERNELS[FA2][:7]} (proven on 12 cases)")
        assert re.search(r"passed over: fa3 \(RevisionNotFoundError: 404 .*\)$", sentence)
    assert (tmp_path / "base" / "kernels").is_dir(), "all that is stored lies in the base directory"
    assert not list((tmp_path / "hf").rglob("*.py"))
    sentence = choose_in_a_new_process(tmp_path, hub.address)  # nobody listens there any more
    assert sentence.startswith("fa2, FlashAttention-2 from") and "passed over: fa3 (ConnectError: " in sentence


def test_a_build_without_digests_is_kept_when_the_hub_is_gone_and_not_when_it_was_revoked(choose, tmp_path):
    """A machine cut off from the hub that loses its kernel because nobody wrote digests into the build."""
    with KernelHub() as hub:
        hub.kernels[FA3] = files_of(write_kernel(tmp_path / "fa3"))
        assert choose(hub.address).startswith("fa3, ")
    assert choose(hub.address).startswith("fa3, ")  # nobody listens there any more
    with KernelHub() as hub:
        assert "passed over: fa3 (RevisionNotFoundError: 404" in choose(hub.address)


def test_a_download_that_was_interrupted_is_completed(choose, tmp_path):
    """Half a kernel in the cache that fails at every start from then on."""
    with KernelHub() as hub:
        hub.kernels[FA3] = digests(files_of(write_kernel(tmp_path / "fa3")))
        (choose(hub.address, lambda: fetch_hub_kernel(FA3)) / "__init__.py").unlink()
        assert choose(hub.address).startswith("fa3, ")


@pytest.mark.parametrize("what, reason", [
    ("other files", "DigestValidationError: .*hash mismatch for __init__.py"),
    ("other commit", "OSError: "),
    ("untrusted publisher", "not from a trusted publisher"),
])  # fmt: skip
def test_what_is_not_what_the_list_says_runs_nothing(choose, tmp_path, what, reason):
    """Files changed on the way, another commit than the one asked for, a publisher that the hub no longer trusts."""
    ran = tmp_path / "ran"
    files = digests(files_of(write_kernel(tmp_path / "fa3", RIGHT_KERNEL + f"\nopen({str(ran)!r}, 'w')\n")))
    with KernelHub() as hub:
        hub.kernels[FA3] = files
        if what == "other files":
            files["build/torch-universal/__init__.py"] += b"import os\n"
        elif what == "other commit":
            hub.commits[FA3] = "1" * 40
        else:
            hub.trusted = False
        sentence = choose(hub.address)
    assert sentence.startswith("sdpa ") and re.search(rf"fa3 \(.*{reason}", sentence), sentence
    assert not ran.exists()
