"""Rows from parquet files, and getting the files from a hub on the loopback interface."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from task_files import write_split

from nanochat import dataset
from nanochat.runtime import UserError
from tasks.common import Task
from tasks.hub import HubTask, has_shape, hub_rows, task_file


def rows(start, stop):
    return [{"id": index, "text": f"row {index}"} for index in range(start, stop)]


def ids(found):
    return [found[index]["id"] for index in range(len(found))]


# Rows


def test_rows_come_in_the_order_of_the_files(tmp_path):
    """Rows of the second file before those of the first, or a row group left out."""
    write_split(tmp_path, "a/b", "main", "test", rows(0, 5), rows(5, 6), rows(6, 9))
    found = hub_rows("a/b", "main", "test", str(tmp_path))
    assert len(found) == 9 and ids(found) == list(range(9))
    assert found[5] == {"id": 5, "text": "row 5"}
    for index in (-1, 9):
        with pytest.raises(IndexError):
            found[index]


def test_shuffling_is_numpys_permutation(tmp_path):
    """Another order than the `datasets` library's, so other questions among the first hundred than everybody's."""
    write_split(tmp_path, "a/b", "main", "test", rows(0, 4), rows(4, 6))
    found = hub_rows("a/b", "main", "test", str(tmp_path))
    assert ids(found.shuffled()) == [3, 2, 5, 4, 1, 0]  # numpy.random.default_rng(42).permutation(6)
    assert ids(found.shuffled(seed=42)) == ids(found.shuffled()) != ids(found.shuffled(seed=1))
    assert ids(found) == list(range(6))
    order = [3, 2, 5, 4, 1, 0]
    assert ids(found.shuffled().shuffled()) == [order[index] for index in order]


def test_shapes():
    """A null or a number where a question should be, found out in the middle of the training."""
    shape = {"text": [str], "n": int}
    assert has_shape({"text": ["a", "b"], "n": 1, "more": None}, shape) and has_shape({"text": [], "n": 1}, shape)
    for wrong in ({"text": ["a", None], "n": 1}, {"text": "ab", "n": 1}, {"text": ["a"]}, {"n": None}, None, [shape]):
        assert not has_shape(wrong, shape)


def test_a_missing_column_names_the_file(tmp_path):
    """KeyError: 'question'."""
    folder = write_split(tmp_path, "a/b", "main", "test", rows(0, 2), [{"id": 2, "body": "x"}])
    found = hub_rows("a/b", "main", "test", str(tmp_path))
    path = re.escape(str(folder / "00001.parquet"))
    with pytest.raises(UserError, match=rf'{path} has no column "text" \(it has: id, body\)'):
        found.require({"id": int, "text": str})
    assert found.require({"id": int})[2]["id"] == 2


def test_a_bad_value_names_the_file_and_the_row(tmp_path):
    """A traceback from the tokenizer after an hour, for a null in row 312,004."""
    folder = write_split(tmp_path, "a/b", "main", "test", rows(0, 3), [*rows(3, 4), {"id": 4, "text": None}])
    found = hub_rows("a/b", "main", "test", str(tmp_path)).require({"text": str}).shuffled()
    path = re.escape(str(folder / "00001.parquet"))
    place = [int(index) for index in found.order].index(4)
    with pytest.raises(UserError, match=rf'{path}, row 2: the column "text" cannot be None'):
        found[place]


def test_a_dataset_without_rows_is_named(tmp_path):
    """An evaluation over nothing, or a division by zero."""
    folder = write_split(tmp_path, "a/b", "main", "test", rows(0, 1))
    pq.write_table(pa.table({"id": pa.array([], pa.int64())}), folder / "00000.parquet")
    size = (folder / "00000.parquet").stat().st_size
    (folder / "manifest.json").write_text(
        json.dumps({"files": [{"name": "00000.parquet", "bytes": size, "rows": 0}], "rows": 0})
    )
    with pytest.raises(UserError, match="00000.parquet has no rows"):
        hub_rows("a/b", "main", "test", str(tmp_path))


# Offline folders


def test_an_incomplete_folder_names_what_is_missing(tmp_path):
    """An offline run that goes to the network, or evaluates on the half of the questions that are there."""
    with pytest.raises(UserError, match=r"a--b/main/test/manifest.json is missing .*leave data_dir out to fetch a/b"):
        hub_rows("a/b", "main", "test", str(tmp_path))
    folder = write_split(tmp_path, "a/b", "main", "test", rows(0, 2), rows(2, 4))
    data = (folder / "00001.parquet").read_bytes()
    (folder / "00001.parquet").write_bytes(data[:-1])
    with pytest.raises(UserError, match="00001.parquet is missing or incomplete"):
        hub_rows("a/b", "main", "test", str(tmp_path))
    (folder / "00001.parquet").write_bytes(bytes(len(data)))
    with pytest.raises(UserError, match="00001.parquet is damaged"):
        hub_rows("a/b", "main", "test", str(tmp_path))
    (folder / "00001.parquet").unlink()
    with pytest.raises(UserError, match="00001.parquet is missing"):
        hub_rows("a/b", "main", "test", str(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", '{"files": []}', '{"files": [{"name": "x.parquet"}]}'])
def test_a_broken_manifest_is_named(tmp_path, text):
    """KeyError: 'files'."""
    folder = write_split(tmp_path, "a/b", "main", "test", rows(0, 2))
    (folder / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="manifest.json is not a list of the dataset's files"):
        hub_rows("a/b", "main", "test", str(tmp_path))


def test_a_flipped_bit_is_noticed(tmp_path):
    """Offline tasks with a letter changed by a bad disk."""
    folder = write_split(tmp_path, "a/b", "main", "test", rows(0, 2))
    path = folder / "00000.parquet"
    table = pa.Table.from_pylist(rows(0, 2))
    plain = dict(compression="none", use_dictionary=False, write_statistics=False)  # the text stands there once
    pq.write_table(table, path, write_page_checksum=True, **plain)
    manifest = {"files": [{"name": path.name, "bytes": path.stat().st_size, "rows": 2}], "rows": 2}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert ids(hub_rows("a/b", "main", "test", str(tmp_path))) == [0, 1]
    data = path.read_bytes()
    assert data.count(b"row 1") == 1
    path.write_bytes(data.replace(b"row 1", b"rox 1"))
    with pytest.raises(UserError, match="00000.parquet is damaged"):
        hub_rows("a/b", "main", "test", str(tmp_path))


def test_rows_that_the_manifest_does_not_know(tmp_path):
    """A file that was replaced by another of the same size."""
    folder = write_split(tmp_path, "a/b", "main", "test", rows(0, 2))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][0]["rows"] = 3
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="00000.parquet is damaged or incomplete .2 rows instead of 3"):
        hub_rows("a/b", "main", "test", str(tmp_path))


# The hub


class Hub:
    """What the client asks of a hub: the description of a dataset and its files."""

    def __init__(self):
        self.siblings, self.files, self.requests = [], {}, []
        self.answers, self.cut = {}, set()  # {path: (status, body)}, and paths whose next answer breaks off
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_GET(self):
                path = self.path.partition("?")[0]
                hub.requests.append((path, self.headers.get("Authorization"), self.headers.get("Range")))
                status, data = hub.answer(path)
                start = int(re.match(r"bytes=(\d+)-", self.headers["Range"])[1]) if self.headers.get("Range") else 0
                if start:
                    status = 206
                self.send_response(status)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
                self.send_header("Content-Length", str(len(data) - start))
                self.end_headers()
                end = len(data) // 2 if path in hub.cut else len(data)
                hub.cut.discard(path)
                self.wfile.write(data[start:end])

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def answer(self, path):
        if path in self.answers:
            return self.answers[path]
        if path == "/api/datasets/a/b/revision/refs%2Fconvert%2Fparquet":
            return 200, json.dumps({"id": "a/b", "sha": "c0ffee", "siblings": self.siblings}).encode()
        return (200, self.files[path]) if path in self.files else (404, b"")

    def add(self, name, content):
        """Serve rows as the parquet file `name`, or bytes as they are."""
        if isinstance(content, list):
            sink = pa.BufferOutputStream()
            pq.write_table(pa.Table.from_pylist(content), sink, row_group_size=2)
            content = sink.getvalue().to_pybytes()
        self.files[f"/datasets/a/b/resolve/c0ffee/{name}"] = content
        digest = hashlib.sha256(content).hexdigest()
        lfs = {"size": len(content), "sha256": digest, "pointerSize": 130}
        self.siblings.append({"rfilename": name, "size": len(content), "lfs": lfs})

    def fetched(self):
        return sorted(path.rpartition("c0ffee/")[2] for path, _, _ in self.requests if "/resolve/" in path)


@pytest.fixture
def hub(monkeypatch):
    found = Hub()
    monkeypatch.setenv("HF_ENDPOINT", found.address)
    yield found
    found.http.shutdown()
    found.http.server_close()


@pytest.fixture
def full_hub(hub):
    hub.add("main/train/0000.parquet", rows(100, 101))
    hub.add("main/test/0001.parquet", rows(3, 5))
    hub.add("main/test/0000.parquet", rows(0, 3))
    hub.add("other/test/0000.parquet", rows(200, 201))
    hub.add("README.md", b"# A dataset")
    return hub


def test_a_split_is_fetched_once(full_hub, base, monkeypatch):
    """Another split's rows, files in the order of the listing, or a download before every run."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert ids(hub_rows("a/b", "main", "test")) == [0, 1, 2, 3, 4]
    assert full_hub.fetched() == ["main/test/0000.parquet", "main/test/0001.parquet"]
    assert {authorization for _, authorization, _ in full_hub.requests} == {"Bearer hf_secret"}
    folder = base / "task_data" / "a--b" / "main" / "test"
    assert sorted(path.name for path in folder.iterdir()) == ["00000.parquet", "00001.parquet", "manifest.json"]
    sizes = [(folder / f"0000{number}.parquet").stat().st_size for number in (0, 1)]
    assert json.loads((folder / "manifest.json").read_text()) == {
        "repo": "a/b",
        "subset": "main",
        "split": "test",
        "files": [
            {"name": "00000.parquet", "bytes": sizes[0], "rows": 3},
            {"name": "00001.parquet", "bytes": sizes[1], "rows": 2},
        ],
        "rows": 5,
    }
    count = len(full_hub.requests)
    assert ids(hub_rows("a/b", "main", "test")) == ids(hub_rows("a/b", "main", "test", str(base / "task_data")))
    assert len(full_hub.requests) == count


def test_what_is_there_is_kept(full_hub, base):
    """A gigabyte fetched again because another file was lost; a file of the wrong size trusted."""
    hub_rows("a/b", "main", "test")
    folder = base / "task_data" / "a--b" / "main" / "test"
    good = folder / "00001.parquet"
    before = good.stat().st_mtime_ns
    (folder / "00000.parquet").write_bytes(b"PAR1")
    full_hub.requests.clear()
    assert ids(hub_rows("a/b", "main", "test")) == [0, 1, 2, 3, 4]
    assert full_hub.fetched() == ["main/test/0000.parquet"] and good.stat().st_mtime_ns == before


def test_a_broken_connection_is_resumed(full_hub, base, monkeypatch):
    """Beginning again at the first byte, or half a file taken for a whole one."""
    monkeypatch.setattr(dataset.download_files, "__defaults__", (4, (0.01,) * 4))
    first, second = (f"/datasets/a/b/resolve/c0ffee/main/test/000{number}.parquet" for number in (0, 1))
    full_hub.cut.add(first)  # the first answer ends in the middle
    folder = base / "task_data" / "a--b" / "main" / "test"
    folder.mkdir(parents=True)
    (folder / "00001.parquet.tmp").write_bytes(full_hub.files[second][:70])  # came before the last run was stopped
    assert ids(hub_rows("a/b", "main", "test")) == [0, 1, 2, 3, 4]
    asked = [path for path, _, _ in full_hub.requests]
    assert asked.count(first) == 2 and asked.count(second) == 1
    assert (second, None, "bytes=70-") in full_hub.requests


def test_an_interrupted_download_goes_on(full_hub, base, monkeypatch):
    """A manifest for files that never came; the first file fetched again because the second one failed."""
    path = "/datasets/a/b/resolve/c0ffee/main/test/0001.parquet"
    full_hub.answers[path] = (404, b"")
    with pytest.raises(UserError, match="answers 404"):
        hub_rows("a/b", "main", "test")
    folder = base / "task_data" / "a--b" / "main" / "test"
    assert not (folder / "manifest.json").exists()
    full_hub.answers.clear()
    hub_rows("a/b", "main", "test")
    assert (folder / "manifest.json").exists() and not (folder / "arriving").exists()


def test_processes_that_start_together_fetch_once(full_hub):
    """Eight ranks fetching the same files eight times, into each other's."""
    found = []
    threads = [threading.Thread(target=lambda: found.append(ids(hub_rows("a/b", "main", "test")))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[0, 1, 2, 3, 4]] * 4 and len(full_hub.fetched()) == 2


def test_a_part_of_a_split_is_not_the_split(hub):
    """Training on the first few gigabytes of a large dataset in the belief that they are all."""
    hub.add("main/partial-train/0000.parquet", rows(0, 1))
    with pytest.raises(UserError, match="converted only a part of a/b main/train"):
        hub_rows("a/b", "main", "train")
    with pytest.raises(UserError, match="a/b has no main/test on the hub; it has: main/partial-train"):
        hub_rows("a/b", "main", "test")


def test_a_hub_that_does_not_answer_as_hoped(hub, monkeypatch):
    """A page of traceback from an HTTP library, or half a minute of attempts without a word."""
    address = "/api/datasets/a/b/revision/refs%2Fconvert%2Fparquet"
    for status in (401, 403, 404):
        hub.answers[address] = (status, b"{}")
        with pytest.raises(UserError, match=f"does not give out the dataset a/b .answer {status}.*HF_TOKEN"):
            hub_rows("a/b", "main", "test")
    hub.answers[address] = (500, b"")
    with pytest.raises(UserError, match="could not be fetched .*answer 500.*Check the connection"):
        hub_rows("a/b", "main", "test")
    hub.answers[address] = (200, b"<html>Please log in to this Wi-Fi</html>")
    with pytest.raises(UserError, match="could not be fetched"):
        hub_rows("a/b", "main", "test")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="could not be fetched from http://127.0.0.1:9 .ConnectError"):
        hub_rows("a/b", "main", "test")


def test_single_files(hub, base, tmp_path):
    """A missing file passing as an empty one, as in the original, or an offline run that goes to the network."""
    hub.answers["/words.txt"] = (200, b"apple\n")
    url = f"{hub.address}/words.txt"
    assert task_file("words.txt", url) == str(base / "words.txt")
    assert (base / "words.txt").read_bytes() == b"apple\n"
    hub.requests.clear()
    task_file("words.txt", url)
    with pytest.raises(UserError, match=r"offline/words.txt is missing.*leave data_dir out"):
        task_file("words.txt", url, str(tmp_path / "offline"))
    assert hub.requests == []
    with pytest.raises(UserError, match=rf"other.txt could not be fetched .answer 404.*{re.escape(str(base))}"):
        task_file("other.txt", f"{hub.address}/other.txt")
    with pytest.raises(UserError, match="could not be fetched .ConnectionError"):
        task_file("other.txt", "http://127.0.0.1:9/other.txt")
    assert not (base / "other.txt").exists()


# Tasks of the hub


class Numbers(HubTask):
    repo = "a/b"
    splits = {"main": ("test",), "other": ("train", "test")}
    row_shape = {"id": int}

    def get_example(self, index):
        return self.rows[index]["id"]


def test_a_hub_task_is_shuffled_before_it_is_cut(tmp_path):
    """Another "first 420 questions" than the original's."""
    write_split(tmp_path, "a/b", "main", "test", rows(0, 6))
    assert issubclass(HubTask, Task)
    assert list(Numbers("main", "test", str(tmp_path))) == [3, 2, 5, 4, 1, 0]
    assert list(Numbers("main", "test", data_dir=str(tmp_path), start=1, stop=4)) == [2, 5, 4]


def test_unknown_subsets_and_splits(tmp_path):
    """A download that fails with an HTTP error because of a typing error."""
    with pytest.raises(UserError, match="Numbers has no subset 'mian'; it has: main, other"):
        Numbers("mian", "test", str(tmp_path))
    with pytest.raises(UserError, match="Numbers main has no split 'train'; it has: test"):
        Numbers("main", "train", str(tmp_path))
