"""Corpora: folders, text files, downloads from a server that misbehaves, and what is said when something is wrong."""

import errno
import gzip
import hashlib
import json
import os
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import dataset
from nanochat.dataset import (
    Corpus,
    Download,
    HubShards,
    ShardLedger,
    cut_text,
    download_files,
    epoch_sentence,
    find_text_column,
    held_out_by_hash,
    list_parquet_files,
    parquet_footer,
    parquets_iter_batched,
    plan_data,
    prepare_corpus,
    read_row_group,
    sha256_of_file,
    shards_needed,
    training_characters,
    write_corpus,
    write_shard,
)
from nanochat.offline_corpus import OfflineDocument
from nanochat.runtime import UserError


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch):
    folder = tmp_path / "base"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    return folder


def texts(count, word="document"):
    return [f"{word} {index} {hashlib.sha256(f'{word}{index}'.encode()).hexdigest()}" for index in range(count)]


def shard_folder(folder, files=3, documents=40):
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(files):
        write_shard(folder / f"part{index}.parquet", texts(documents, f"file{index}"))
    return folder


def flip_a_bit(path, position):
    status = os.stat(path)
    data = bytearray(Path(path).read_bytes())
    data[position] ^= 1
    Path(path).write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))


# Reading


def test_shard_layout_is_the_one_of_the_public_corpora(tmp_path):
    """Shards that other programs for this layout cannot read as quickly, or whose damage nobody notices."""
    write_shard(tmp_path / "a.parquet", texts(40_000))
    metadata = pq.read_metadata(tmp_path / "a.parquet")
    assert metadata.row_group(0).num_rows == 1024 and metadata.num_row_groups == 40
    column = metadata.row_group(0).column(0)
    assert column.path_in_schema == "text" and column.compression == "ZSTD" and column.statistics is None
    assert not any("DICTIONARY" in encoding for encoding in column.encodings)
    write_shard(tmp_path / "b.parquet", texts(100))
    assert pq.read_metadata(tmp_path / "b.parquet").num_row_groups >= 16


def test_row_groups_are_strided_in_every_file(tmp_path):
    """Two ranks that read the same documents, or documents that no rank reads."""
    corpus = prepare_corpus(str(shard_folder(tmp_path / "data")))
    every = [text for batch in parquets_iter_batched("train", corpus=corpus) for text in batch]
    assert every == texts(40, "file0") + texts(40, "file1")
    ranks = [[t for b in parquets_iter_batched("train", rank, 3, corpus) for t in b] for rank in range(3)]
    assert sorted(sum(ranks, [])) == sorted(every) and all(ranks)
    assert [t for b in parquets_iter_batched("val", corpus=corpus) for t in b] == texts(40, "file2")
    with pytest.raises(UserError, match="train"):
        next(parquets_iter_batched("test", corpus=corpus))


def test_the_default_folder_is_read_without_a_corpus(base):
    """The plain calls of the original pipeline failing."""
    with pytest.raises(UserError, match="no data yet"):
        next(parquets_iter_batched("train"))
    shard_folder(base / "base_data", files=2)
    (base / "base_data" / "part9.parquet.tmp").write_bytes(b"half")
    (base / "base_data" / ".part8.parquet").write_bytes(b"half")
    assert [os.path.basename(path) for path in list_parquet_files()] == ["part0.parquet", "part1.parquet"]
    assert next(parquets_iter_batched("val"))[0].startswith("file1 0")


def test_nulls_and_empty_documents_are_left_out_and_said(tmp_path, capsys):
    """A crash in the tokenizer at the first null, or empty documents trained on as lone separators."""
    folder = shard_folder(tmp_path / "data", files=1)
    pq.write_table(pa.table({"text": [None, "", "a", "b"]}), folder / "part1.parquet")
    pq.write_table(pa.table({"text": ["c"]}), folder / "part2.parquet")
    corpus = prepare_corpus(str(folder))
    assert read_row_group(corpus.train_files[1], 0, "text") == ["a", "b"]
    assert "part1.parquet: 2 of 4 documents are null or empty" in capsys.readouterr().out
    pq.write_table(pa.table({"text": pa.array([None, ""], pa.string())}), folder / "part0.parquet")
    with pytest.raises(UserError, match=r"part0.parquet has no text: all 2 values"):
        prepare_corpus(str(folder))


@pytest.mark.parametrize(
    "columns, wanted, message",
    [
        ({"url": ["u"], "body": ["b"]}, "", r'has no column "text" \(it has: url, body\). Name the right one'),
        ({"url": ["u"], "body": ["b"]}, "txt", r'has no column "txt" \(it has: url, body\)'),
        ({"text": [1]}, "", r'has no column "text" \(it has: text\)'),
        ({"number": [1], "text": ["t"]}, "number", r'"number" of .* holds int64, not text'),
    ],
)
def test_a_missing_text_column_lists_those_there_are(tmp_path, columns, wanted, message):
    """KeyError: 'text'."""
    for name in ("a.parquet", "b.parquet"):
        pq.write_table(pa.table(columns), tmp_path / name)
    with pytest.raises(UserError, match=message):
        prepare_corpus(str(tmp_path), text_column=wanted)


def test_the_only_column_of_strings_is_found(tmp_path):
    """Asking for a name where there is nothing to choose."""
    pq.write_table(pa.table({"id": [1], "content": pa.array(["c"], pa.large_string())}), tmp_path / "a.parquet")
    assert find_text_column(tmp_path / "a.parquet") == "content"
    pq.write_table(pa.table({"body": ["b"], "text": ["t"]}), tmp_path / "b.parquet")
    assert find_text_column(tmp_path / "b.parquet") == "text"
    assert find_text_column(tmp_path / "b.parquet", "body") == "body"
    with pytest.raises(UserError, match="different text columns"):
        prepare_corpus(str(tmp_path))


# The horizon


def test_the_horizon_decides_the_number_of_shards(base):
    """The original run's 19 shards, short for d12, wrapping into a second epoch without a word."""
    assert shards_needed(935_854_080) in (24, 25)
    assert shards_needed(1) == 1
    assert abs(250_000_000 / 4.7 * 0.75 / 524_288 - 76) < 1  # steps of the original run on one shard
    count, sentence = plan_data("fineweb-edu", 935_854_080)
    assert count == 24 and "24 training shards and the validation shard, 2.5 GB to download" in sentence
    assert "without reading anything twice" in sentence
    count, sentence = plan_data("fineweb-edu", 935_854_080, train_shards=19)
    assert count == 19 and re.search("second epoch begins after (7[89]|8[0-4])% of the run", sentence)
    assert plan_data("climbmix", 1000, tokenizer_characters=2_000_000_000)[0] == 8
    assert plan_data("fineweb-edu", 10**15)[0] == 1822
    shard_folder(base / "base_data", files=0)
    for index in (0, 1822):
        write_shard(base / "base_data" / f"shard_{index:05d}.parquet", texts(5))
    assert "all of them here already" in plan_data("fineweb-edu", 1000)[1]
    assert all("nothing to download" in plan_data(source, 1000)[1] for source in ("offline", str(base)))


def test_characters_are_counted_from_the_footers(tmp_path):
    """An epoch that ends at another place than was said before training."""
    corpus = prepare_corpus(str(shard_folder(tmp_path / "data", documents=400)))
    exact = sum(len(text) for batch in parquets_iter_batched("train", corpus=corpus) for text in batch)
    assert 0.9 < exact / training_characters(corpus) <= 1.0  # footers count lengths and headers too
    sentence = epoch_sentence(4.7e6, 1_500_000)
    assert "second epoch begins after 50% of the run; in all the text is read 2.0 times" in sentence


# Folders


def test_the_fingerprint_changes_with_every_file(tmp_path):
    """A tokenizer or model of other text taken for finished work."""
    folder = shard_folder(tmp_path / "data")
    seen = {prepare_corpus(str(folder)).fingerprint()}
    assert prepare_corpus(str(folder)).fingerprint() in seen
    seen.add(prepare_corpus(str(folder), train_shards=1).fingerprint())
    for name in ("part0.parquet", "part2.parquet"):
        write_shard(folder / name, texts(41, name))
        seen.add(prepare_corpus(str(folder)).fingerprint())
    corpus = prepare_corpus(str(folder))
    seen.add(Corpus("x", corpus.train_files, corpus.val_file, "other").fingerprint())
    assert len(seen) == 5


def test_nothing_is_written_into_a_folder_of_yours(tmp_path):
    """Manifests and locks in somebody's data folder, or a failure because it is read-only."""
    folder = shard_folder(tmp_path / "data")
    prepare_corpus(str(folder))
    assert sorted(os.listdir(folder)) == ["part0.parquet", "part1.parquet", "part2.parquet"]


def test_a_folder_must_have_something_to_train_and_to_validate_on(tmp_path):
    """An endless loop over an empty training split."""
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="has no files to train on"):
        prepare_corpus(str(empty))
    with pytest.raises(UserError, match="one parquet file only, and two are needed"):
        prepare_corpus(str(shard_folder(tmp_path / "one", files=1)))
    (empty / "a.txt").write_text("  \n\n ")
    with pytest.raises(UserError, match="fewer than two documents"):
        prepare_corpus(str(empty))
    for source in ("", "no such thing", "/no/such/folder", "./relative/none"):
        with pytest.raises(UserError, match="neither a folder here nor a name that is known"):
            prepare_corpus(source)
    for count in (0, -2):
        with pytest.raises(UserError, match="train_shards is"):
            prepare_corpus("offline", train_shards=count)


def test_every_process_gets_a_row_group(tmp_path, monkeypatch):
    """A rank whose first row group lies beyond every file waiting forever."""
    folder = shard_folder(tmp_path / "data")
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    prepare_corpus(str(folder))
    pq.write_table(pa.table({"text": texts(9)}), folder / "part2.parquet", row_group_size=3)
    with pytest.raises(UserError, match="part2.parquet has 3 row groups, and each of the 8 processes needs one"):
        prepare_corpus(str(folder))


def test_a_truncated_shard_is_named_before_anything_is_read(tmp_path, monkeypatch):
    """Hours of training, then ArrowInvalid without a file name."""
    folder = shard_folder(tmp_path / "data")
    prepare_corpus(str(folder))
    data = (folder / "part1.parquet").read_bytes()
    monkeypatch.setattr(dataset, "count_documents", lambda *args: pytest.fail("decoded before footers were checked"))
    for cut in (data[:-1], data[: len(data) // 2], data[:3], b""):
        (folder / "part1.parquet").write_bytes(cut)
        with pytest.raises(UserError, match=r"part1.parquet is damaged or incomplete .*Replace it with a good copy"):
            prepare_corpus(str(folder))


def test_a_flipped_bit_is_named_in_a_folder_seen_before(tmp_path):
    """A bit that changed on the disk and turned into other text, which zstd and snappy decode without complaint."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("a", "b"):
        pq.write_table(pa.table({"text": texts(50, name)}), folder / f"{name}.parquet", compression=None)
    prepare_corpus(str(folder))
    position = (folder / "a.parquet").read_bytes().index(b"a 7 ")
    flip_a_bit(folder / "a.parquet", position)
    assert pq.read_table(folder / "a.parquet").num_rows == 50  # parquet itself does not notice
    with pytest.raises(UserError, match=r"a.parquet is damaged .*checksum differs"):
        prepare_corpus(str(folder))


def test_a_touched_file_is_still_good(tmp_path, monkeypatch):
    """Data that was copied with new times being called damaged, or hashed again at each run."""
    folder = shard_folder(tmp_path / "data")
    prepare_corpus(str(folder))
    for path in list_parquet_files(folder):
        os.utime(path, (1, 1))
    prepare_corpus(str(folder))
    monkeypatch.setattr(dataset, "sha256_of_file", lambda path: pytest.fail("hashed again although nothing changed"))
    prepare_corpus(str(folder))


def test_damage_while_reading_names_the_file(tmp_path):
    """A read error in the middle of training that does not say which of 350 files to replace."""
    write_shard(tmp_path / "a.parquet", texts(50))
    start = pq.read_metadata(tmp_path / "a.parquet").row_group(0).column(0).data_page_offset
    flip_a_bit(tmp_path / "a.parquet", start + 60)
    with pytest.raises(UserError, match=r"a.parquet is damaged or incomplete"):
        read_row_group(tmp_path / "a.parquet", 0, "text")
    with pytest.raises(UserError, match="b.parquet is damaged or incomplete .*No such file"):
        read_row_group(tmp_path / "b.parquet", 0, "text")


def test_large_collections_are_not_decoded_at_first_sight(tmp_path, monkeypatch):
    """Hours of checking before the first step on a terabyte of text."""
    folder = shard_folder(tmp_path / "data")
    monkeypatch.setattr(dataset, "DECODED_AT_FIRST_SIGHT", 100)
    monkeypatch.setattr(dataset, "count_documents", lambda *args: pytest.fail("decoded"))
    prepare_corpus(str(folder))


# Text files


def test_text_files_become_shards_once(tmp_path, monkeypatch):
    """Lost text, text on both sides of the split, or the same conversion at each run."""
    folder = tmp_path / "texts"
    (folder / "inner").mkdir(parents=True)
    documents = texts(200)
    for index, text in enumerate(documents[:150]):
        (folder / f"{index:03d}.txt").write_text(text)
    (folder / "inner" / "more.md").write_text("\n\n".join(documents[150:190]))
    (folder / "inner" / "old.rst.gz").write_bytes(gzip.compress("\n".join(documents[190:]).encode()))
    (folder / "copy.txt").write_text("  " + documents[3].replace(" ", "\n"))
    (folder / "picture.png").write_bytes(b"\0\1")
    corpus = prepare_corpus(str(folder))
    train = [text for batch in parquets_iter_batched("train", corpus=corpus) for text in batch]
    val = [text for batch in parquets_iter_batched("val", corpus=corpus) for text in batch]
    assert val and not set(val) & set(train)
    everything = "\n".join(train + val)
    assert all(everything.count(document.split()[-1]) == 1 for document in documents)
    assert len(train) + len(val) == 152
    assert corpus.name == str(folder) and Path(corpus.val_file).parent.parent.name == "data"

    calls = []
    monkeypatch.setattr(dataset, "read_text_file", lambda path: calls.append(path) or "never\n\nread")
    assert prepare_corpus(str(folder)) == corpus and not calls
    monkeypatch.undo()


def test_a_changed_text_file_is_noticed(tmp_path, base, monkeypatch):
    """Training on yesterday's text after an edit."""
    (tmp_path / "book.txt").write_text("\n\n".join(text * 20 for text in texts(30)))
    first = prepare_corpus(str(tmp_path / "book.txt"))
    (tmp_path / "book.txt").write_text("\n\n".join(text * 20 for text in texts(31)))
    second = prepare_corpus(str(tmp_path / "book.txt"))
    assert first.fingerprint() != second.fingerprint()
    Path(second.train_files[0]).unlink()  # as the message for a damaged shard tells one to do
    assert prepare_corpus(str(tmp_path / "book.txt")).fingerprint() == second.fingerprint()


def test_a_conversion_that_was_killed_is_done_again(tmp_path):
    """Half a corpus taken for a whole one."""
    (tmp_path / "t").mkdir()
    for index, text in enumerate(texts(50)):
        (tmp_path / "t" / f"{index}.txt").write_text(text)
    corpus = prepare_corpus(str(tmp_path / "t"))
    folder = Path(corpus.val_file).parent
    (folder / "manifest.json").unlink()
    write_shard(folder / "shard_00007.parquet", ["left over"])
    assert prepare_corpus(str(tmp_path / "t")) == corpus
    assert sorted(os.listdir(folder)) == ["manifest.json", "shard_00000.parquet", "shard_00001.parquet"]


def test_text_encodings(tmp_path):
    """A crash, or a byte order mark and carriage returns in the text."""
    (tmp_path / "a.txt").write_bytes("\ufeffna\u00efve\r\ntext".encode())
    (tmp_path / "b.txt").write_bytes("caf\u00e9".encode("latin-1"))
    assert dataset.read_text_file(tmp_path / "a.txt") == "na\u00efve\ntext"
    assert dataset.read_text_file(tmp_path / "b.txt") == "caf\u00e9"
    (tmp_path / "c.txt").write_bytes(b"\0\1\2")
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"hello")[:-4])
    for name in ("c.txt", "d.txt.gz"):
        with pytest.raises(UserError, match=f"{name} .*out of the folder"):
            dataset.read_text_file(tmp_path / name)


def test_large_files_are_cut_at_blank_lines():
    """A novel as one document of which only the first page is ever trained on, or text lost at the cuts."""
    paragraphs = [f"{index} " + "word " * 60 for index in range(200)]
    pieces = list(cut_text("\n\n".join(paragraphs)))
    assert all(1000 < len(piece) <= 10_000 for piece in pieces)
    assert "\n\n".join(pieces).split() == " ".join(paragraphs).split()
    assert all(re.match(r"\d+ word", piece) for piece in pieces)
    assert [len(piece) for piece in cut_text("x" * 25_000)] == [10_000, 10_000, 5_000]
    assert list(cut_text("")) == [] and list(cut_text("a\n\n\n\nb", 3)) == ["a", "b"]


def test_small_corpora_have_both_sides(tmp_path):
    """Chance putting all of three documents on one side."""
    for number, sides in enumerate([[False, False], [True, True], [False, True, True]]):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_corpus(folder, [(f"text {index}", side) for index, side in enumerate(sides)])
        assert len(list_parquet_files(folder)) == 2
    held_out = [side for _, side in held_out_by_hash(texts(2000))]
    assert len(held_out) == 2000 and 60 < sum(held_out) < 140
    assert len(list(held_out_by_hash(["a b", " a\nb", "c"]))) == 2


def test_shards_close_at_their_size(tmp_path):
    """Everything in one shard, so that train_shards means nothing."""
    held_out, rest = texts(100)[::10], [text for index, text in enumerate(texts(100)) if index % 10]
    write_corpus(tmp_path, [(text, text in held_out) for text in texts(100)], characters_per_shard=2000)
    *train, val = [pq.read_table(path)["text"].to_pylist() for path in list_parquet_files(tmp_path)]
    assert len(train) == 4 and sorted(sum(train, [])) == sorted(rest) and sorted(val) == sorted(held_out)
    assert sum(train, []) != rest  # shuffled


def test_offline_is_built_once(base, monkeypatch):
    """The documentation of the machine collected again at each start, or its shards without a list of sources."""
    documents = [OfflineDocument("python", text * 20) for text in texts(1500)]
    calls = []
    monkeypatch.setattr(dataset, "collect_offline_documents", lambda: calls.append(1) or documents)
    monkeypatch.setattr(dataset, "offline_installation", lambda: "abc")
    corpus = prepare_corpus("offline")
    assert prepare_corpus("offline") == corpus and len(calls) == 1
    folder = base / "data" / "offline-abc"
    assert "python" in (folder / "README.txt").read_text() and corpus.val_file == str(folder / "shard_00001.parquet")
    train, val = ([t for b in parquets_iter_batched(split, corpus=corpus) for t in b] for split in ("train", "val"))
    assert sorted(train + val) == sorted(document.text for document in documents) and not set(train) & set(val)
    flip_a_bit(corpus.train_files[0], 100)
    with pytest.raises(UserError, match="shard_00000.parquet is damaged .*Delete it and run again"):
        prepare_corpus("offline")
    Path(corpus.train_files[0]).unlink()
    assert prepare_corpus("offline") == corpus and len(calls) == 2


# Downloads


class Server:
    """A hub on the loopback interface. `faults[path]` is a list of things to do wrong, one for each request."""

    def __init__(self):
        self.files, self.faults, self.requests, self.ranges = {}, {}, [], True
        self.json, self.etag, self.gate = {}, False, None
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_GET(self):
                server.answer(self)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def answer(self, request):
        path, _, _ = request.path.partition("?")
        self.requests.append((path, request.headers.get("Range"), request.headers.get("Authorization")))
        fault = self.faults[path].pop(0) if self.faults.get(path) else None
        request.close_connection = True
        if path in self.json:
            data = json.dumps(self.json[path]).encode()
            request.send_response(200)
            request.send_header("Content-Length", str(len(data)))
            request.end_headers()
            request.wfile.write(data)
            return
        if isinstance(fault, int) or path not in self.files:
            request.send_response(fault or 404)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        data, start = self.files[path], 0
        if fault == "garbage":
            data = data[:50] + bytes(len(data) - 50)
        if fault == "other bytes":
            data = data[:50] + bytes([data[50] ^ 1]) + data[51:]
        if self.ranges and request.headers.get("Range"):
            start = int(re.match(r"bytes=(\d+)-", request.headers["Range"])[1])
            if start >= len(data):
                request.send_response(416)
                request.send_header("Content-Length", "0")
                request.end_headers()
                return
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            request.send_response(200)
        if fault == "too short":
            data = data[:-100]
        if self.etag:
            request.send_header("X-Linked-Etag", f'"{hashlib.sha256(self.files[path]).hexdigest()}"')
        request.send_header("Content-Length", str(len(data) - start + (70 if fault == "claims more" else 0)))
        request.end_headers()
        body = data[start:]
        if fault == "cut":
            body = body[: len(body) // 2]
        request.wfile.write(body[:10])
        request.wfile.flush()
        if self.gate is not None:
            self.gate.wait(20)
        request.wfile.write(body[10:])


@pytest.fixture
def server(monkeypatch):
    found = Server()
    monkeypatch.setenv("HF_ENDPOINT", found.address)
    yield found
    if found.gate:
        found.gate.set()
    found.http.shutdown()
    found.http.server_close()


@pytest.fixture
def shard_bytes(tmp_path):
    write_shard(tmp_path / "source.parquet", texts(400))
    return (tmp_path / "source.parquet").read_bytes()


def fetch(server, folder, retry_seconds=(0.01,) * 4, **options):
    server.files.setdefault("/a.parquet", b"")
    ledger = ShardLedger(folder)
    item = Download(f"{server.address}/a.parquet", str(folder / "a.parquet"), **options)
    download_files([item], ledger, retry_seconds=retry_seconds)
    return ledger


def test_a_download_arrives_and_is_noted(server, tmp_path, shard_bytes):
    """A plain download failing, its temporary file left over, or no checksum to recognise damage by later."""
    server.files["/a.parquet"] = shard_bytes
    ledger = fetch(server, tmp_path / "d")
    assert (tmp_path / "d" / "a.parquet").read_bytes() == shard_bytes
    assert sorted(os.listdir(tmp_path / "d")) == ["a.parquet", "manifest.json"]
    assert ledger.files["a.parquet"]["sha256"] == hashlib.sha256(shard_bytes).hexdigest()
    assert ShardLedger(tmp_path / "d").files == ledger.files
    assert server.requests == [("/a.parquet", None, "Bearer hf_secret")]


def test_a_cut_connection_goes_on_where_it_stopped(server, tmp_path):
    """Fetching the first 99 MB again because the last one did not arrive."""
    write_shard(tmp_path / "source.parquet", texts(20_000))
    data = (tmp_path / "source.parquet").read_bytes()
    server.files["/a.parquet"], server.faults["/a.parquet"] = data, ["cut", "cut", 500]
    fetch(server, tmp_path / "d")
    assert (tmp_path / "d" / "a.parquet").read_bytes() == data
    asked = [int((wanted or "bytes=0-")[6:-1]) for _, wanted, _ in server.requests]
    assert asked[0] == 0 and asked[1] > 0.3 * len(data) and asked[2] > 0.6 * len(data) and asked[3] == asked[2]


def test_a_partial_file_of_an_earlier_run_is_used(server, tmp_path, shard_bytes):
    """Starting over after Ctrl-C."""
    server.files["/a.parquet"] = shard_bytes
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.parquet.tmp").write_bytes(shard_bytes[:1000])
    fetch(server, tmp_path / "d")
    assert (tmp_path / "d" / "a.parquet").read_bytes() == shard_bytes
    assert server.requests[0][1] == "bytes=1000-"


@pytest.mark.parametrize("etag", [False, True])
def test_a_server_without_ranges_and_partial_rubbish(server, tmp_path, shard_bytes, etag):
    """The whole file appended to the half that was there; a wrong partial file that can never become right."""
    server.files["/a.parquet"], server.ranges, server.etag = shard_bytes, False, etag
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.parquet.tmp").write_bytes(b"x" * 1000)
    fetch(server, tmp_path / "d")
    assert (tmp_path / "d" / "a.parquet").read_bytes() == shard_bytes
    server.ranges = True
    for rubbish in (b"x" * 1000, shard_bytes + b"more"):
        (tmp_path / "d" / "a.parquet").unlink()
        (tmp_path / "d" / "a.parquet.tmp").write_bytes(rubbish)
        fetch(server, tmp_path / "d")
        assert (tmp_path / "d" / "a.parquet").read_bytes() == shard_bytes


@pytest.mark.parametrize("fault", ["too short", "claims more", "garbage", 500, 503])
def test_what_is_wrong_is_fetched_again_and_never_gets_the_final_name(server, tmp_path, shard_bytes, fault):
    """Half a file, an error page or other rubbish under the name of a shard."""
    server.files["/a.parquet"], server.faults["/a.parquet"] = shard_bytes, [fault] * 3
    fetch(server, tmp_path / "d")
    assert (tmp_path / "d" / "a.parquet").read_bytes() == shard_bytes
    server.faults["/a.parquet"] = [fault] * 5
    (tmp_path / "d" / "a.parquet").unlink()
    with pytest.raises(UserError, match="a.parquet could not be downloaded in 5 attempts"):
        fetch(server, tmp_path / "d")
    assert not (tmp_path / "d" / "a.parquet").exists() and server.faults["/a.parquet"] == []


def test_the_checksum_of_the_server_counts(server, tmp_path, shard_bytes):
    """A bit that flipped on the way, with length and footer in order."""
    server.files["/a.parquet"], server.faults["/a.parquet"] = shard_bytes, ["other bytes"]
    server.etag = True
    fetch(server, tmp_path / "d")
    assert (tmp_path / "d" / "a.parquet").read_bytes() == shard_bytes and len(server.requests) == 2
    (tmp_path / "d" / "a.parquet").unlink()
    with pytest.raises(UserError, match="checksum is not the one"):
        fetch(server, tmp_path / "d", sha256="0" * 64)


def test_refusals_are_not_repeated(server, tmp_path):
    """Half a minute of retries for a file that does not exist."""
    for status in (401, 403, 404):
        server.requests.clear()
        server.faults["/a.parquet"] = [status]
        with pytest.raises(UserError, match=f"answers {status}: it does not exist or needs permission"):
            fetch(server, tmp_path / "d", retry_seconds=(60,))
        assert len(server.requests) == 1


def test_the_pauses_grow(server, tmp_path, monkeypatch):
    """A server that is overloaded being asked five times within a second."""
    pauses = []
    stop = threading.Event()
    monkeypatch.setattr(stop, "wait", lambda seconds: pauses.append(seconds))
    server.faults["/a.parquet"] = [500] * 9
    with pytest.raises(UserError, match="5 attempts"):
        dataset.download_file(Download(f"{server.address}/a.parquet", str(tmp_path / "a.parquet")), stop)
    assert pauses == [2, 4, 8, 16]


def test_the_token_stays_with_the_hub(server, tmp_path, shard_bytes, monkeypatch):
    """An access token sent to whatever server a file comes from."""
    server.files["/a.parquet"] = shard_bytes
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    fetch(server, tmp_path / "d")
    assert server.requests[0][2] is None


def test_ctrl_c_stops_at_once_and_keeps_what_arrived(server, tmp_path, shard_bytes, monkeypatch):
    """Ctrl-C that waits for the downloads to end, or throws away what has arrived."""
    server.files["/a.parquet"], server.gate = shard_bytes, threading.Event()
    interrupted = threading.Event()

    def interrupt(*args):
        deadline = time.monotonic() + 20
        while not (tmp_path / "d" / "a.parquet.tmp").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        interrupted.set()
        raise KeyboardInterrupt

    monkeypatch.setattr(dataset.concurrent.futures, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch(server, tmp_path / "d")
    assert interrupted.is_set() and not server.gate.is_set()  # it came back while the server was still sending
    monkeypatch.undo()
    assert not (tmp_path / "d" / "a.parquet").exists() and (tmp_path / "d" / "a.parquet.tmp").exists()
    server.gate.set()
    time.sleep(0.2)
    assert not (tmp_path / "d" / "a.parquet").exists()  # the worker noticed too


def test_no_space_is_said_before_the_download(server, tmp_path, monkeypatch):
    """A disk that is full after two hours of downloading."""
    with pytest.raises(UserError, match="needs about 1000000.0 GB"):
        fetch(server, tmp_path / "d", size=10**15)
    assert server.requests == []


def test_a_disk_that_fills_up_is_said(server, tmp_path, shard_bytes, monkeypatch):
    """Five attempts and a traceback for a full disk."""
    server.files["/a.parquet"] = shard_bytes

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(dataset.os, "fsync", full)
    with pytest.raises(UserError, match="no space left while downloading a.parquet"):
        fetch(server, tmp_path / "d")
    assert len(server.requests) == 1


def test_several_files_come_at_once(server, tmp_path, shard_bytes):
    """Shards fetched one after the other, by mistake or because of a lock."""
    server.gate = threading.Event()
    items = []
    for name in "abc":
        server.files[f"/{name}.parquet"] = shard_bytes
        items.append(Download(f"{server.address}/{name}.parquet", str(tmp_path / "d" / f"{name}.parquet")))
    ledger = ShardLedger(tmp_path / "d")
    worker = threading.Thread(target=download_files, args=(items, ledger, 3), daemon=True)
    worker.start()
    deadline = time.monotonic() + 20
    while len(server.requests) < 3 and time.monotonic() < deadline:  # none of them is answered before the gate opens
        time.sleep(0.01)
    assert len(server.requests) == 3
    server.gate.set()
    worker.join(20)
    assert sorted(ledger.files) == ["a.parquet", "b.parquet", "c.parquet"]


# The public corpora


@pytest.fixture
def small_hub(server, monkeypatch, tmp_path):
    hub = HubShards("karpathy/fineweb-edu-100b-shuffle", 6, "base_data")
    monkeypatch.setitem(dataset.HUB_SHARDS, "fineweb-edu", hub)
    for index in range(7):
        write_shard(tmp_path / "x.parquet", texts(40, f"shard{index}"))
        url = f"/datasets/{hub.repository}/resolve/main/shard_{index:05d}.parquet"
        server.files[url] = (tmp_path / "x.parquet").read_bytes()
    return server


def test_addresses_and_counts_of_the_public_corpora():
    """A number or a name mistyped: shards that do not exist, or another validation shard than everybody's."""
    hubs = dataset.HUB_SHARDS.items()
    assert {name: (hub.repository, hub.shard_name(hub.last_shard), hub.folder) for name, hub in hubs} == {
        "fineweb-edu": ("karpathy/fineweb-edu-100b-shuffle", "shard_01822.parquet", "base_data"),
        "climbmix": ("karpathy/climbmix-400b-shuffle", "shard_06542.parquet", "base_data_climbmix"),
    }


def test_the_validation_shard_is_pinned(small_hub, base):
    """Another validation text after fetching more data: no two curves could be compared."""
    first = prepare_corpus("fineweb-edu", train_shards=2)
    assert [os.path.basename(path) for path in first.train_files] == ["shard_00000.parquet", "shard_00001.parquet"]
    assert first.val_file == str(base / "base_data" / "shard_00006.parquet")
    assert len(small_hub.requests) == 3
    second = prepare_corpus("fineweb-edu", train_shards=4, workers=2)
    assert len(small_hub.requests) == 5 and second.val_file == first.val_file and len(second.train_files) == 4
    assert prepare_corpus("fineweb-edu", train_shards=2) == first and len(small_hub.requests) == 5
    everything = prepare_corpus("fineweb-edu")
    assert len(everything.train_files) == 6 and len(small_hub.requests) == 7
    assert [t for b in parquets_iter_batched("val", corpus=first) for t in b] == texts(40, "shard6")


def test_a_damaged_shard_is_named_before_the_download(small_hub, base):
    """Downloading for an hour before hearing that a file from last week is broken; a broken file fetched around."""
    prepare_corpus("fineweb-edu", train_shards=2)
    path = base / "base_data" / "shard_00001.parquet"
    flip_a_bit(path, 200)
    small_hub.requests.clear()
    with pytest.raises(UserError, match="shard_00001.parquet is damaged .*checksum differs.*Delete it and run again"):
        prepare_corpus("fineweb-edu", train_shards=5)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="shard_00001.parquet is damaged .*end is missing"):
        prepare_corpus("fineweb-edu", train_shards=5)
    assert small_hub.requests == []
    path.unlink()
    prepare_corpus("fineweb-edu", train_shards=2)
    assert len(small_hub.requests) == 1


def test_shards_of_an_older_download_are_adopted(small_hub, base, tmp_path):
    """Twenty shards from another run being fetched again for lack of a manifest, or trusted although broken."""
    (base / "base_data").mkdir(parents=True)
    write_shard(base / "base_data" / "shard_00000.parquet", texts(40, "shard0"))
    prepare_corpus("fineweb-edu", train_shards=1)
    assert [path[-13:] for path, _, _ in small_hub.requests] == ["00006.parquet"]
    assert "shard_00000.parquet" in ShardLedger(base / "base_data").files


# Any dataset on the hub


@pytest.fixture
def repository(server, tmp_path):
    def serve(names, repository="someone/stories", tree="main", resolve="main", column="story", checksum=True):
        listing = []
        for index, name in enumerate(names):
            pq.write_table(pa.table({"id": [1] * 60, column: texts(60, f"{name}{index}")}), tmp_path / "x.parquet",
                           row_group_size=20)  # fmt: skip
            data = (tmp_path / "x.parquet").read_bytes()
            server.files[f"/datasets/{repository}/resolve/{resolve}/{name}"] = data
            lfs = {"lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data)}} if checksum else {}
            listing.append({"type": "file", "path": name, "size": len(data), **lfs})
        listing += [{"type": "file", "path": "README.md", "size": 5}, {"type": "directory", "path": "data"}]
        server.json[f"/api/datasets/{repository}/tree/{tree}"] = listing
        return server

    return serve


def test_a_hub_dataset_with_its_own_validation_split(repository, base):
    """Training on the validation split of a dataset, or on its tests; asking the hub again when all is here."""
    server = repository(["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet",
                         "data/test-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"])  # fmt: skip
    corpus = prepare_corpus("someone/stories", train_shards=1)
    assert corpus.text_column == "story" and corpus.name == "someone/stories"
    assert [os.path.basename(p) for p in corpus.train_files] == ["data--train-00000-of-00002.parquet"]
    assert os.path.basename(corpus.val_file) == "data--validation-00000-of-00001.parquet"
    server.http.shutdown()
    count = len(server.requests)
    assert prepare_corpus("someone/stories", train_shards=1) == corpus and len(server.requests) == count == 3


def test_a_hub_dataset_without_a_validation_split(repository):
    """The last file trained on and validated on."""
    repository(["a.parquet", "b.parquet", "c.parquet"])
    corpus = prepare_corpus("someone/stories", train_shards=1)
    assert [os.path.basename(p) for p in (*corpus.train_files, corpus.val_file)] == ["a.parquet", "c.parquet"]
    count, sentence = plan_data("someone/stories", 500)
    assert count == 1 and "1 training file and one for validation" in sentence
    assert plan_data("someone/stories", 10**9)[0] == 2 and "second epoch" in plan_data("someone/stories", 10**9)[1]


def test_a_folder_of_a_hub_dataset(repository, server):
    """Three hundred languages downloaded for one of them."""
    repository(["en/a.parquet", "en/b.parquet", "de/a.parquet"])
    listing = server.json.pop("/api/datasets/someone/stories/tree/main")
    server.json["/api/datasets/someone/stories/tree/main/en"] = [e for e in listing if e["path"].startswith("en")]
    corpus = prepare_corpus("someone/stories/en")
    assert [os.path.basename(p) for p in (*corpus.train_files, corpus.val_file)] == ["en--a.parquet", "en--b.parquet"]


def test_a_hub_dataset_in_one_file_is_split(repository):
    """Most small datasets on the hub, which are one file, being unusable."""
    repository(["train.parquet"], checksum=False)
    corpus = prepare_corpus("someone/stories")
    train, val = ([t for b in parquets_iter_batched(s, corpus=corpus) for t in b] for s in ("train", "val"))
    assert sorted(train + val) == sorted(texts(60, "train.parquet0")) and train and val
    assert prepare_corpus("someone/stories") == corpus


def test_the_hubs_own_conversion_is_used(repository, server):
    """Datasets of CSV or JSON files, which the hub offers as parquet at another revision, being refused."""
    server.json["/api/datasets/someone/stories/tree/main"] = [{"type": "file", "path": "data.csv", "size": 3}]
    revision = "refs%2Fconvert%2Fparquet"
    repository(["default/train/0000.parquet", "default/test/0000.parquet"], tree=revision, resolve=revision)
    corpus = prepare_corpus("someone/stories")
    assert os.path.basename(corpus.val_file) == "default--test--0000.parquet"


def test_a_hub_dataset_that_cannot_be_read(repository, server, monkeypatch):
    """A traceback of an HTTP library for a typing error."""
    with pytest.raises(UserError, match="someone/else is neither a folder .*answer 404.*HF_TOKEN"):
        prepare_corpus("someone/else")
    server.json["/api/datasets/someone/else/tree/main"] = []
    with pytest.raises(UserError, match="the hub dataset someone/else has no parquet files"):
        prepare_corpus("someone/else")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="could not be fetched from http://127.0.0.1:9 .*Check the connection"):
        prepare_corpus("someone/else")


def test_processes_that_start_together_download_once(small_hub, base):
    """Eight ranks writing the same temporary file at the same time."""
    found = []
    threads = [threading.Thread(target=lambda: found.append(prepare_corpus("fineweb-edu", 2))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(set(found)) == 1 and len(small_hub.requests) == 3


def test_footers_and_checksums(tmp_path):
    """The two primitives that everything above rests on."""
    write_shard(tmp_path / "a.parquet", ["a", "b"])
    data = (tmp_path / "a.parquet").read_bytes()
    assert data.endswith(parquet_footer(tmp_path / "a.parquet") + data[-8:])
    assert sha256_of_file(tmp_path / "a.parquet") == hashlib.sha256(data).hexdigest()
    for wrong in (b"", b"PAR1", b"PAR1PAR1", data[:-1], data[1:], data[:4] + b"\xff\xff\xff\x7fPAR1"):
        (tmp_path / "b.parquet").write_bytes(wrong)
        with pytest.raises(OSError):
            parquet_footer(tmp_path / "b.parquet")
