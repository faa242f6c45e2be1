"""Exports and their manifests, downloads from a hub that misbehaves, and the data that needs no network."""

import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from golf import golf_data
from golf.golf_data import (
    download_golf_data,
    export_golf_data,
    golf_documents,
    open_golf_data,
    open_golf_shards,
    prepare_golf_data,
    write_golf_documents,
)
from golf.golf_tokenizers import TokenizerSpec, load_golf_tokenizer
from golf.shards import read_token_shard
from helpers import english_documents, run_ranks
from nanochat.offline_corpus import OfflineDocument
from nanochat.runtime import UserError

SP300 = TokenizerSpec(vocab_size=400)
BYTES = TokenizerSpec(kind="byte")


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch):
    folder = tmp_path / "base"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    for name in list(os.environ):
        if name.startswith("MATCHED_FINEWEB"):
            monkeypatch.delenv(name)
    return folder


def texts():
    return [text[:2000] for text in english_documents()[:40]] + ["", " not stripped \n", "half \ud83d"]


def export(folder, specs=(SP300, BYTES), docs_val=7, shard_tokens=3000, documents=None, **options):
    folder.mkdir(parents=True, exist_ok=True)
    write_golf_documents(folder, documents or texts(), docs_val, selection_seed=1337)
    export_golf_data(folder, list(specs), shard_tokens=shard_tokens, **options)
    return folder


def all_bytes(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# Export


def test_shards_hold_what_the_original_would_write(tmp_path):
    """A document without its begin, stripped, or lost at a border; validation text in a training shard."""
    folder = export(tmp_path / "data")
    for variant, spec in (("sp400", SP300), ("byte260", BYTES)):
        data = open_golf_data(folder, variant)
        tokenizer = load_golf_tokenizer(data.tokenizer_path)
        cleaned = [text.replace("\ud83d", "?") for text in texts()]
        for files, part in ((data.val_files, cleaned[:7]), (data.train_files, cleaned[7:])):
            if spec is SP300:
                expected = [token for text in part for token in [1, *tokenizer.processor.encode(text)]]
            else:
                expected = [token for text in part for token in [1, *(byte + 4 for byte in text.encode())]]
            shards = [read_token_shard(path).tolist() for path in files]
            assert sum(shards, []) == expected
            assert all(len(shard) == 3000 for shard in shards[:-1]) and 0 < len(shards[-1]) <= 3000
        assert len(data.train_files) > 1 and Path(data.train_files[1]).name == "fineweb_train_000001.bin"


def test_the_manifest_has_every_key_and_the_right_counts(tmp_path):
    """A folder that tools for the challenge cannot read, or whose counts are made up."""
    folder = export(tmp_path / "data")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert list(manifest) == [
        "version", "num_docs", "num_val_docs", "shuffle_seed", "shard_size", "append_eos", "docs_jsonl", "docs_meta",
        "tokenizer_specs", "tokenizers", "datasets",
    ]  # fmt: skip
    assert (manifest["version"], manifest["num_docs"], manifest["num_val_docs"]) == ("10B", 43, 7)
    assert manifest["append_eos"] is False and manifest["shard_size"] == 3000
    sp, byte = manifest["tokenizers"]
    assert sp == {
        "name": "sp_bpe_400", "kind": "sentencepiece_bpe", "vocab_size": 400, "bos_id": 1, "eos_id": 2,
        "recommended_bigram_vocab_size": 2560, "source_spec": SP300.as_json(),
        "model_path": "tokenizers/fineweb_400_bpe.model", "vocab_path": "tokenizers/fineweb_400_bpe.vocab",
    }  # fmt: skip
    assert (byte["path"], byte["pad_id"], byte["unk_id"]) == ("tokenizers/fineweb_pure_byte_260.json", 0, 3)
    assert byte["recommended_bigram_vocab_size"] == 1920 and "model_path" not in byte
    dataset = manifest["datasets"][1]
    assert dataset["path"] == "datasets/fineweb10B_byte260" and dataset["tokenizer_kind"] == "byte"
    assert dataset["val_glob"] == "datasets/fineweb10B_byte260/fineweb_val_*.bin"
    n_bytes = [len(text.encode("utf-8", "replace")) + 1 for text in texts()]
    stats = dataset["stats"]
    assert (stats["docs_total"], stats["docs_val"], stats["docs_train"]) == (43, 7, 36)
    assert (stats["tokens_total"], stats["tokens_val"]) == (sum(n_bytes), sum(n_bytes[:7]))
    assert stats["tokens_train"] == stats["tokens_total"] - stats["tokens_val"]
    assert stats["files_val"] == -(-stats["tokens_val"] // 3000) == len(list((folder / dataset["path"]).glob("*val*")))
    assert stats["files_total"] == stats["files_val"] + stats["files_train"]
    meta, documents = manifest["docs_meta"], (folder / "docs_selected.jsonl").read_bytes()
    assert list(meta) == [
        "remote_repo_id", "remote_root", "num_docs", "docs_sha256", "source_manifest", "source_sidecar"
    ]  # fmt: skip
    assert meta["docs_sha256"] == hashlib.sha256(documents).hexdigest()
    assert meta["source_sidecar"]["docs_bytes"] == len(documents) and meta["source_sidecar"]["selection_seed"] == 1337
    exported = json.loads((folder / "tokenizer_config.export.json").read_text())
    assert exported == {"tokenizers": [SP300.as_json(), BYTES.as_json()]}
    assert str(tmp_path) not in (folder / "manifest.json").read_text()


def test_an_export_is_the_same_wherever_it_is_made(tmp_path, monkeypatch):
    """A stage done again, or losses that differ, because of the folder, the batch or the number of threads."""
    first = all_bytes(export(tmp_path / "one"))
    monkeypatch.setenv("MATCHED_FINEWEB_SP_BATCH_SIZE", "3")
    monkeypatch.setenv("MATCHED_FINEWEB_TOKENIZER_THREADS", "3")
    assert all_bytes(export(tmp_path / "elsewhere" / "two")) == first
    assert (
        open_golf_data(tmp_path / "one", "sp400").fingerprint()
        == open_golf_data(tmp_path / "elsewhere" / "two", "sp400").fingerprint()
    )
    monkeypatch.setenv("MATCHED_FINEWEB_SP_BATCH_SIZE", "0")
    with pytest.raises(UserError, match="MATCHED_FINEWEB_SP_BATCH_SIZE is '0'"):
        export(tmp_path / "three")


def test_the_fingerprint_follows_the_content(tmp_path):
    """Work of other data taken for finished."""
    folder = export(tmp_path / "data")
    data = open_golf_data(folder, "sp400")
    before = data.fingerprint()
    assert open_golf_data(folder, "sp400", 1).fingerprint() != before
    for path in (data.val_files[0], data.train_files[1], data.tokenizer_path):
        content = Path(path).read_bytes()
        Path(path).write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
        assert data.fingerprint() != before
        Path(path).write_bytes(content)
    assert data.fingerprint() == before


def test_exporting_again_leaves_no_old_shards(tmp_path):
    """Shards of an earlier, longer export read on as if they belonged to the new one."""
    folder = export(tmp_path / "data", [BYTES], shard_tokens=1000)
    assert len(open_golf_data(folder, "byte260").train_files) > 5
    export(folder, [BYTES], shard_tokens=10**6)
    assert len(open_golf_data(folder, "byte260").train_files) == 1


def test_a_folder_of_shards_without_a_manifest(tmp_path):
    """DATA_PATH of a published command that is refused, or training shards that an evaluation asks for in vain."""
    exported = export(tmp_path / "export")
    whole = open_golf_data(exported, "byte260")
    shards, tokenizer = Path(whole.dataset_path), whole.tokenizer_path
    data = open_golf_shards(shards, tokenizer, 260)
    assert (data.train_files, data.val_files, data.vocab_size) == (whole.train_files, whole.val_files, 260)
    assert (data.name, data.dataset_path, data.fingerprint()) == (whole.name, str(shards), whole.fingerprint())
    assert data.stats == {name: whole.stats[name] for name in data.stats}
    fewer = open_golf_shards(shards, tokenizer, 260, train_shards=1)
    assert fewer.train_files == whole.train_files[:1] and fewer.fingerprint() != data.fingerprint()
    for path in shards.glob("fineweb_train_*"):
        path.unlink()
    assert open_golf_shards(shards, tokenizer, 260, training=False).train_files == ()
    with pytest.raises(UserError, match="holds no fineweb_train_"):
        open_golf_shards(shards, tokenizer, 260)
    with pytest.raises(UserError, match="holds no fineweb_val_"):
        open_golf_shards(tmp_path, tokenizer, 260)
    with pytest.raises(UserError, match="260"):
        open_golf_shards(shards, tokenizer, 100, training=False)


def test_the_number_of_validation_documents(tmp_path):
    """The sidecar's number ignored, or fifty thousand taken of a smaller file without a word."""
    folder = export(tmp_path / "data", [BYTES])
    assert export_golf_data(folder, [BYTES], 3)["datasets"][0]["stats"]["docs_val"] == 3
    (folder / "docs_selected.source_manifest.json").unlink()
    with pytest.raises(UserError, match="50,000 of 43 documents cannot be for validation"):
        export_golf_data(folder, [BYTES])
    for number in (0, 43):
        with pytest.raises(UserError, match=f"{number} of 43 documents"):
            export_golf_data(folder, [BYTES], number)
    manifest = export_golf_data(folder, [BYTES], 5)
    assert manifest["docs_meta"]["source_manifest"] is None and "source_sidecar" not in manifest["docs_meta"]
    with pytest.raises(UserError, match="of 2 documents 2 would be for validation"):
        write_golf_documents(tmp_path, ["a", "b"], 2)


def test_documents_that_are_not_those_of_the_sidecar_are_refused(tmp_path):
    """A published score claimed for text that was changed."""
    folder = export(tmp_path / "data", [BYTES])
    sidecar = folder / "docs_selected.source_manifest.json"
    content = json.loads(sidecar.read_text())
    sidecar.write_text(json.dumps(content | {"docs_sha256": "0" * 64}))
    with pytest.raises(UserError, match="the checksum differs"):
        export_golf_data(folder, [BYTES])
    sidecar.write_text(json.dumps(content | {"num_docs": 44}))
    with pytest.raises(UserError, match="has 43 documents and .* says 44"):
        export_golf_data(folder, [BYTES])
    for broken in ("[1]", "{"):
        sidecar.write_text(broken)
        with pytest.raises(UserError, match="source_manifest.json cannot be read"):
            export_golf_data(folder, [BYTES])
    with pytest.raises(UserError, match="has no docs_selected.jsonl"):
        export_golf_data(tmp_path, [BYTES])


@pytest.mark.parametrize("line", [b'{"txt": "a"}', b"{", b'"text"', b'{"text": null}', b"", b'{"text": "\xff"}'])
def test_a_broken_document_names_its_line(tmp_path, line):
    """KeyError: 'text', somewhere in fifteen million lines."""
    path = tmp_path / "docs_selected.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n')
    with pytest.raises(UserError, match="docs_selected.jsonl, line 2"):
        list(golf_documents(path))


def test_only_the_first_documents_train_the_tokenizer(tmp_path):
    """tokenizer_train_docs ignored: hours in place of minutes, and another tokenizer than the published one."""
    first = texts()[:30]
    limited = TokenizerSpec(vocab_size=400, tokenizer_train_docs=30)
    a = export(tmp_path / "a", [limited], documents=first + ["xyzzy " * 300] * 9)
    b = export(tmp_path / "b", [SP300], documents=first)
    name = "tokenizers/fineweb_400_bpe.model"
    assert (a / name).read_bytes() == (b / name).read_bytes()


def test_a_folder_that_does_not_fit_its_manifest_is_refused(tmp_path):
    """A validation stream without one of its shards, whose score nobody can reproduce; a mix of two exports."""
    folder = export(tmp_path / "data", [BYTES], docs_val=20, shard_tokens=1000)
    data = open_golf_data(folder, "byte260")
    assert open_golf_data(folder, "byte260", 2).train_files == data.train_files[:2]
    with pytest.raises(UserError, match="99 were asked for"):
        open_golf_data(folder, "byte260", 99)
    with pytest.raises(UserError, match='no dataset "sp1024" here, only byte260'):
        open_golf_data(folder)
    last = Path(data.train_files[-1])
    content = last.read_bytes()
    last.unlink()
    assert len(open_golf_data(folder, "byte260").train_files) == len(data.train_files) - 1
    last.write_bytes(Path(data.train_files[0]).read_bytes())
    with pytest.raises(UserError, match="train tokens in .* and the manifest says"):
        open_golf_data(folder, "byte260")
    last.write_bytes(content)
    (folder / "datasets/fineweb10B_byte260/fineweb_train_000999.bin").write_bytes(content)
    with pytest.raises(UserError, match="train tokens in"):
        open_golf_data(folder, "byte260")
    (folder / "datasets/fineweb10B_byte260/fineweb_train_000999.bin").unlink()
    Path(data.val_files[-1]).unlink()
    with pytest.raises(UserError, match="val tokens in"):
        open_golf_data(folder, "byte260")
    for broken in ("{}", "{", "[]", '{"datasets": [{"name": "a", "stats": {"files_val": 1}}]}'):
        (folder / "manifest.json").write_text(broken)
        with pytest.raises(UserError, match="is no manifest"):
            open_golf_data(folder, "byte260")


def test_a_manifest_may_leave_out_what_is_not_needed(tmp_path):
    """An export of somebody else refused because its tokenizer has no list of words, or no size beside it."""
    folder = export(tmp_path / "data", [SP300])
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["tokenizers"][0]["vocab_path"], manifest["datasets"][0]["vocab_size"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert open_golf_data(folder, "sp400").vocab_size == 400
    del manifest["tokenizers"][0]["model_path"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="is no manifest of the challenge .*sp_bpe_400 has no file"):
        open_golf_data(folder, "sp400")


def test_a_manifest_cannot_name_files_outside_its_folder(tmp_path):
    """A downloaded manifest that has files written wherever it likes."""
    folder = export(tmp_path / "data", [BYTES])
    manifest = json.loads((folder / "manifest.json").read_text())
    for path in ("../outside.json", "/tmp/outside.json"):
        manifest["tokenizers"][0]["path"] = path
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(UserError, match="lies outside the folder"):
            open_golf_data(folder, "byte260")
    manifest["datasets"][0]["name"] = "../elsewhere"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="is no manifest of the challenge"):
        open_golf_data(folder, "byte260")


# Downloads


class Hub:
    """A dataset hub on loopback. faults: path → what to do wrong, one for each GET; requests: (method, path)."""

    def __init__(self):
        self.files, self.faults, self.requests = {}, {}, []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_HEAD(self):
                hub.answer(self)

            do_GET = do_HEAD

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def publish(self, repository, folder, root="datasets"):
        for path, content in all_bytes(Path(folder)).items():
            self.files[f"/datasets/{repository}/resolve/main/{root}/{path}"] = content

    def answer(self, request):
        path, get = request.path.partition("?")[0], request.command == "GET"
        self.requests.append((request.command, path))
        request.close_connection = True
        fault = self.faults[path].pop(0) if get and self.faults.get(path) else None
        data = self.files.get(path)
        status = fault if isinstance(fault, int) else 404 if data is None else 200
        request.send_response(206 if status == 200 and request.headers.get("Range") else status)
        if status != 200:
            request.send_header("X-Error-Code", "EntryNotFound" if status == 404 else "")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        large = path.endswith((".bin", ".model"))
        etag = hashlib.sha256(data).hexdigest() if large else hashlib.sha1(data).hexdigest()
        start = int(re.match(r"bytes=(\d+)-", request.headers.get("Range") or "bytes=0-")[1])
        body = data[start:]
        if fault == "other bytes":
            body = body[:-1] + bytes([body[-1] ^ 1])
        commit = hashlib.sha1(b"".join(hashlib.sha1(content).digest() for content in self.files.values())).hexdigest()
        request.send_header("X-Repo-Commit", commit)
        request.send_header("ETag", f'"{etag}"')
        request.send_header("Connection", "close")
        request.send_header("Content-Length", str(len(body)))
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        request.end_headers()
        if get:
            request.wfile.write(body[: len(body) // 2] if fault == "cut" else body)

    def fetched(self, ending=""):
        return [path.rsplit("/", 1)[-1] for method, path in self.requests if method == "GET" and path.endswith(ending)]


@pytest.fixture
def hub(monkeypatch):
    found = Hub()
    monkeypatch.setenv("HF_ENDPOINT", found.address)
    yield found
    found.http.shutdown()
    found.http.server_close()


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return export(tmp_path_factory.mktemp("published"), docs_val=10)


REPOSITORY = "willdepueoai/parameter-golf"
QUICK = (0.01, 0.01)


def shard_url(name, repository=REPOSITORY, dataset="fineweb10B_byte260"):
    return f"/datasets/{repository}/resolve/main/datasets/datasets/{dataset}/{name}"


def test_a_download_brings_what_was_asked_for(hub, published, base):
    """Other shards, half of the validation stream, or a folder in another layout."""
    hub.publish(REPOSITORY, published)
    data = download_golf_data("byte260", 2, retry_seconds=QUICK)
    folder = base / "golf_data" / "willdepueoai--parameter-golf"
    original = open_golf_data(published, "byte260")
    assert data.folder == str(folder) and data.dataset_path == str(folder / "datasets/fineweb10B_byte260")
    assert [Path(path).read_bytes() for path in data.val_files] == [Path(p).read_bytes() for p in original.val_files]
    assert len(data.train_files) == 2 < len(original.train_files)
    here = set(all_bytes(folder))
    assert here == {"manifest.json", "manifest.source.json", "tokenizers/fineweb_pure_byte_260.json"} | {
        f"datasets/fineweb10B_byte260/{Path(path).name}" for path in data.val_files + data.train_files
    }
    hub.requests.clear()
    assert download_golf_data("byte260", 2, retry_seconds=QUICK) == data and hub.requests == []
    more = download_golf_data("byte260", 3, skip_manifest=True, retry_seconds=QUICK)
    assert hub.fetched() == ["fineweb_train_000002.bin"] and more.train_files[:2] == data.train_files
    assert not Path(data.train_files[0]).is_symlink()
    with pytest.raises(UserError, match="is no token shard|bytes, and its header"):
        Path(data.train_files[0]).unlink()
        Path(data.train_files[0]).write_bytes(b"half")
        open_golf_data(folder, "byte260")
    assert download_golf_data("byte260", 2, retry_seconds=QUICK) == data  # what is damaged is fetched again
    assert len(download_golf_data("byte260", -1, retry_seconds=QUICK).train_files) == len(original.train_files)
    model = Path(download_golf_data("sp400", 1, retry_seconds=QUICK).tokenizer_path)
    model.unlink()
    model.write_bytes(b"half")
    assert download_golf_data("sp400", 1, retry_seconds=QUICK).vocab_size == 400


def test_a_full_disk_is_said_before_the_download(hub, published, monkeypatch):
    """Sixteen gigabytes fetched until there is no space for the last."""
    hub.publish(REPOSITORY, published)
    wanted = []
    monkeypatch.setattr(golf_data, "require_free_space", lambda n_bytes, purpose: wanted.append((n_bytes, purpose)))
    data = download_golf_data("byte260", 2, retry_seconds=QUICK)
    download_golf_data("byte260", 2, retry_seconds=QUICK)
    shards = len(data.val_files) + 2
    assert wanted == [(shards * 2 * 3000, "downloading byte260"), (0, "downloading byte260")]


def test_more_shards_than_there_are_is_an_error_before_the_download(hub, published):
    """Eight gigabytes fetched, and then a file that does not exist."""
    hub.publish(REPOSITORY, published)
    for number in (99, 0, -2):
        with pytest.raises(UserError, match=rf"has \d+ training shards of byte260, and {number} were asked for"):
            download_golf_data("byte260", number, retry_seconds=QUICK)
    assert hub.fetched(".bin") == []
    with pytest.raises(UserError, match='no dataset "sp1024" here, only sp400, byte260'):
        download_golf_data(retry_seconds=QUICK)
    with pytest.raises(UserError, match='variant "gpt2" is not known'):
        download_golf_data("gpt2", retry_seconds=QUICK)


def test_a_manifest_of_another_repository_is_detected(hub, published, tmp_path, monkeypatch):
    """Shards of one export mixed with the manifest and the tokenizer of another."""
    hub.publish(REPOSITORY, published)
    hub.publish("someone/else", published)
    download_golf_data("byte260", 1, tmp_path / "data", retry_seconds=QUICK)
    monkeypatch.setenv("MATCHED_FINEWEB_REPO_ID", "someone/else")
    for skip in (False, True):
        with pytest.raises(UserError, match="holds data from willdepueoai/parameter-golf, not from someone/else"):
            download_golf_data("byte260", 1, tmp_path / "data", skip, retry_seconds=QUICK)
    assert "someone--else" in download_golf_data("byte260", 1, retry_seconds=QUICK).folder
    (tmp_path / "data" / "manifest.json").unlink()  # the shards are still the old ones
    with pytest.raises(UserError, match="holds data from willdepueoai"):
        download_golf_data("byte260", 1, tmp_path / "data", retry_seconds=QUICK)
    with pytest.raises(UserError, match="from an unknown place"):
        download_golf_data("byte260", 1, export(tmp_path / "own", [BYTES]), retry_seconds=QUICK)
    mine = tmp_path / "mine"
    download_golf_data("byte260", 1, mine, with_docs=True, retry_seconds=QUICK)
    export_golf_data(mine, [BYTES], shard_tokens=2000)  # other shards under the old names
    with pytest.raises(UserError, match="from an unknown place"):
        download_golf_data("byte260", 1, mine, retry_seconds=QUICK)
    with pytest.raises(UserError, match="Leave out skip_manifest"):
        download_golf_data("byte260", 1, tmp_path / "new", True, retry_seconds=QUICK)


def test_the_documented_repositories_and_variables(hub, published, monkeypatch):
    """A variable of the challenge that is not read; sp8192 looked for where it never was."""
    hub.publish("kevclark/parameter-golf", published)
    assert golf_data.golf_repository("sp8192").repo_id == "kevclark/parameter-golf"
    assert golf_data.golf_repository("sp1024") == golf_data.GolfRepository(REPOSITORY, "datasets")
    with pytest.raises(UserError, match='no dataset "sp4096" here'):
        download_golf_data("sp4096", 1, retry_seconds=QUICK)
    monkeypatch.setenv("MATCHED_FINEWEB_REPO_ID", "my/copy")
    monkeypatch.setenv("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "a/b/")
    hub.publish("my/copy", published, root="a/b")
    assert download_golf_data("sp400", 1, retry_seconds=QUICK).vocab_size == 400
    monkeypatch.setenv("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "")
    assert golf_data.golf_repository("sp1024").remote_path("manifest.json") == "manifest.json"


def test_trouble_on_the_way_is_tried_again(hub, published):
    """A download that ends with the first lost connection, or keeps what arrived broken."""
    hub.publish(REPOSITORY, published)
    faults = {
        "fineweb_val_000000.bin": ["cut"],
        "fineweb_train_000000.bin": [503],
        "fineweb_train_000001.bin": ["other bytes"],
    }
    hub.faults = {shard_url(name): fault for name, fault in faults.items()}
    data = download_golf_data("byte260", 2, retry_seconds=QUICK)
    original = open_golf_data(published, "byte260", 2)
    assert data.fingerprint() == original.fingerprint()
    assert not any(hub.faults.values())


def test_what_stays_wrong_is_said(hub, published):
    """An endless loop, a traceback of the hub's client, or a bad shard trained on."""
    hub.publish(REPOSITORY, published)
    url = shard_url("fineweb_val_000000.bin")
    hub.faults = {url: ["other bytes"] * 9}
    with pytest.raises(UserError, match=r"val_000000.bin of .* could not be fetched in 3 attempts \(the checksum"):
        download_golf_data("byte260", 1, retry_seconds=QUICK)
    hub.faults, good = {}, hub.files[url]
    hub.files[url] = good[:-2]  # a server that has half of it
    with pytest.raises(UserError, match="its header promises"):
        download_golf_data("byte260", 1, retry_seconds=QUICK)
    del hub.files[url]
    with pytest.raises(UserError, match="answers 404: it does not exist or needs permission"):
        download_golf_data("byte260", 1, retry_seconds=(60,))
    hub.files[url] = good
    assert download_golf_data("byte260", 1, retry_seconds=QUICK).val_files


def test_without_a_network_it_says_so(monkeypatch):
    """A traceback of two hundred lines when the hub is out of reach, or minutes of waiting for it."""
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)  # the client's own patience
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r'manifest.json of .*: the hub is out of reach.*"offline"'):
        download_golf_data("byte260", 1, retry_seconds=(12345,))
    assert 12345 not in waits


def test_documents_come_with_their_checksum(hub, published, tmp_path):
    """Text other than what the shards were made of, under the same name."""
    hub.publish(REPOSITORY, published)
    data = download_golf_data("byte260", 1, tmp_path / "a", with_docs=True, retry_seconds=QUICK)
    assert data.documents_path.read_bytes() == (published / "docs_selected.jsonl").read_bytes()
    hub.files[f"/datasets/{REPOSITORY}/resolve/main/datasets/docs_selected.jsonl"] += b'{"text": "one more"}\n'
    with pytest.raises(UserError, match="has another checksum than the manifest names"):
        download_golf_data("byte260", 1, tmp_path / "b", with_docs=True, retry_seconds=QUICK)
    assert not (tmp_path / "b" / "docs_selected.jsonl").exists()


def test_links_are_resolved_and_copied_across_disks(hub, published, monkeypatch):
    """A shard that is a link into a cache, gone when the cache is emptied."""
    hub.publish(REPOSITORY, published)

    def no_links(source, destination):
        raise OSError("another disk")

    monkeypatch.setattr(os, "link", no_links)
    data = download_golf_data("byte260", 1, retry_seconds=QUICK)
    assert not any(Path(path).is_symlink() for path in (*data.val_files, data.tokenizer_path))
    assert data.fingerprint() == open_golf_data(published, "byte260", 1).fingerprint()


# Offline


@pytest.fixture
def few_documents(monkeypatch):
    calls = []

    def collect(characters):
        calls.append(characters)
        return [
            OfflineDocument("python", f"Chapter {i}\n\n{text[:1500]}") for i, text in enumerate(english_documents())
        ]

    monkeypatch.setattr(golf_data, "collect_offline_documents", collect)
    monkeypatch.setattr(golf_data, "OFFLINE_GOLF_SHARD_TOKENS", 20_000)
    return calls


def test_offline_builds_everything_once(few_documents, base, capsys):
    """A notebook without a network that has nothing to train on, or builds its data anew on each run."""
    data = prepare_golf_data("offline", "sp400")
    assert data.vocab_size == 400 and len(data.train_files) > 1 and len(data.val_files) == 1
    assert data.stats["docs_val"] >= 1 and data.documents_path.exists()
    assert re.search(r"fineweb10B_sp400: [\d,]+ training tokens in \d+ shards", capsys.readouterr().out)
    before = data.fingerprint()
    assert prepare_golf_data("offline", "sp400") == data and len(few_documents) == 1
    assert prepare_golf_data("offline", "sp400", 1).train_files == data.train_files[:1]
    Path(data.train_files[0]).write_bytes(b"damaged")
    assert prepare_golf_data("offline", "sp400").fingerprint() == before and len(few_documents) == 2


def test_offline_is_deterministic_and_follows_its_inputs(few_documents, base, monkeypatch, tmp_path):
    """Two machines with other data under one name, or data of an old installation used for a new one."""
    first = prepare_golf_data("offline", "byte260")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "other"))
    second = prepare_golf_data("offline", "byte260")
    assert all_bytes(Path(first.folder)) == all_bytes(Path(second.folder))
    monkeypatch.setattr(golf_data, "offline_installation", lambda: "another")
    assert prepare_golf_data("offline", "byte260").folder != second.folder
    assert prepare_golf_data("offline", "sp400").folder != second.folder


def test_an_export_folder_is_a_source_too(published, tmp_path):
    """Own data that has to be copied to a special place."""
    assert prepare_golf_data(str(published), "sp400", 1) == open_golf_data(published, "sp400", 1)
    for arguments, message in (
        (("nowhere", "sp400"), 'source "nowhere" is not known'),
        ((str(tmp_path), "sp400"), "has no manifest.json"),
        ((str(published), "sp99"), 'variant "sp99" is not known'),
        ((str(published), "sp400", 0), "train_shards is 0"),
    ):
        with pytest.raises(UserError, match=message):
            prepare_golf_data(*arguments)


RANKS = """
import sys, torch.distributed as dist
from golf.golf_data import prepare_golf_data
dist.init_process_group("gloo")
data = prepare_golf_data(sys.argv[1], "sp400")
print(data.fingerprint())
dist.destroy_process_group()
"""


def test_every_rank_gets_the_same_data(published):
    """A rank that waits forever, or opens the folder before it is complete."""
    first, second = run_ranks(RANKS, published)
    assert first.splitlines()[-1] == second.splitlines()[-1] == open_golf_data(published, "sp400").fingerprint()


def test_a_shard_is_never_longer_than_the_limit(tmp_path):
    """A document longer than a shard that loses its middle."""
    folder = export(tmp_path / "data", [BYTES], documents=["a" * 10, "b" * 95, "c"], docs_val=1, shard_tokens=10)
    data = open_golf_data(folder, "byte260")
    tokens = np.concatenate([read_token_shard(path) for path in data.train_files])
    assert tokens.tolist() == [1, *[102] * 95, 1, 103] and len(data.train_files) == 10 and len(data.val_files) == 2
