import base64
import hashlib
import json
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken

from nanochat.dataset import Corpus
from nanochat.tok_eval import (
    CODE_TEXT,
    KOREAN_TEXT,
    MATH_TEXT,
    NEWS_TEXT,
    SCIENCE_TEXT,
    evaluate_tokenizer,
    load_baseline_encodings,
    tokenizer_report_tables,
    tokenizer_summary_table,
)
from nanochat.tokenizer import SPLIT_PATTERN, RustBPETokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return RustBPETokenizer.train_from_iterator(iter([NEWS_TEXT]), 400)


@pytest.fixture
def corpus(tmp_path):
    paths = []
    for name in ("train_0", "train_1", "val"):
        path = tmp_path / f"{name}.parquet"
        table = pa.table({"text": [f"{name} first", "é second", f"{name} in the next group"]})
        pq.write_table(table, path, row_group_size=2)
        paths.append(str(path))
    return Corpus(name="fineweb-edu", train_files=tuple(paths[:2]), val_file=paths[2])


def no_network(name):
    raise ConnectionError("no route to host")


def bytes_only(name):
    """A stand-in for a published encoding that knows no merges: as many tokens as bytes."""
    ranks = {bytes([value]): value for value in range(256)}
    return tiktoken.Encoding(name=name, pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})


def gpt2_only(name):
    return bytes_only(name) if name == "gpt2" else no_network(name)


@pytest.mark.parametrize("text", [NEWS_TEXT, KOREAN_TEXT, CODE_TEXT, MATH_TEXT, SCIENCE_TEXT])
def test_texts_are_of_comparable_size(text):
    """A text of a few words gives a ratio that says nothing."""
    assert 800 <= len(text.encode()) <= 1800


def test_texts_are_what_their_names_say():
    """An editor that replaces typographic quotes or subscripts would take away what the text is there for."""
    assert "“" in NEWS_TEXT and "’" in NEWS_TEXT
    assert sum("가" <= character <= "힣" for character in KOREAN_TEXT) > len(KOREAN_TEXT) / 2
    compile(CODE_TEXT, "code", "exec")
    assert MATH_TEXT.count("\\begin{") == MATH_TEXT.count("\\end{") >= 3
    assert {"₂", "⁻", "¹³"} <= {SCIENCE_TEXT[i : i + n] for i in range(len(SCIENCE_TEXT)) for n in (1, 2)}


def test_evaluation_without_network(tokenizer, corpus, monkeypatch):
    """Without network the stage would fail, although our own numbers need none."""
    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    evaluation = evaluate_tokenizer(tokenizer, corpus)
    names = [row["name"] for row in evaluation["texts"]]
    assert names == ["news", "korean", "code", "math", "science", "fwe-train", "fwe-val"]
    assert evaluation["texts"][0] == {
        "name": "news", "bytes": len(NEWS_TEXT.encode()), "tokens": {"ours": len(tokenizer.encode(NEWS_TEXT))}
    }  # fmt: skip
    assert evaluation["texts"][5]["bytes"] == len("train_0 first\né second".encode())
    assert evaluation["texts"][6]["bytes"] == len("val first\né second".encode())
    assert set(evaluation["unavailable"]) == {"GPT-2", "GPT-4"}
    assert json.loads(json.dumps(evaluation)) == evaluation
    table = tokenizer_summary_table(evaluation)
    assert "unavailable" in table and "ConnectionError" in table
    assert len({len(line) for line in table.splitlines() if line.startswith("|")}) == 1
    report = tokenizer_report_tables(evaluation)
    assert "### Comparison with GPT-2\n\nNot available: gpt2" in report
    assert "### Comparison with raw bytes\n\n| Text Type" in report


def test_differences_have_the_right_sign(tokenizer, corpus, monkeypatch):
    """A table that calls the longer encoding the better one; a baseline lost because the other is missing."""
    monkeypatch.setattr(tiktoken, "get_encoding", gpt2_only)
    evaluation = evaluate_tokenizer(tokenizer, corpus)
    assert set(evaluation["unavailable"]) == {"GPT-4"}
    assert evaluation["vocab_sizes"] == {"ours": 400, "GPT-2": 256}
    news = evaluation["texts"][0]
    n_bytes, ours = news["bytes"], news["tokens"]["ours"]
    assert news["tokens"]["GPT-2"] == n_bytes > ours
    saving = f"{100 * (n_bytes - ours) / n_bytes:+.1f}"
    assert saving.startswith("+")
    row = f"| news | {n_bytes} | {n_bytes} | 1.00 | {ours} | {n_bytes / ours:.2f} | {saving}% |"
    assert tokenizer_report_tables(evaluation).count(row) == 2  # against GPT-2's stand-in and against raw bytes
    line = next(line for line in tokenizer_summary_table(evaluation).splitlines() if "news" in line)
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        "news", f"{n_bytes:,}", f"{ours:,}", f"{n_bytes / ours:.2f}", f"{saving} %", f"{saving} %", "unavailable"
    ]  # fmt: skip


def test_a_hanging_download_is_given_up(monkeypatch):
    """tiktoken waits for minutes when a firewall swallows its packets."""
    release = threading.Event()
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: release.wait(30) and no_network(name))
    available, unavailable = load_baseline_encodings(patience_seconds=0.05)
    release.set()
    assert available == {} and "within 0.05 seconds" in unavailable["GPT-2"]


def test_cached_copies_are_used(tmp_path, monkeypatch):
    """A cache that somebody filled by hand for a machine without network would be ignored."""
    asked = []

    def read_file(path):
        asked.append(path)
        raise ConnectionError

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("tiktoken.load.read_file", read_file)
    monkeypatch.setattr("tiktoken.load.check_hash", lambda data, expected: True)
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    _, unavailable = load_baseline_encodings()
    assert set(unavailable) == {"GPT-2", "GPT-4"}
    url = next(path for path in asked if "cl100k_base" in path)
    lines = b"".join(b"%b %d\n" % (base64.b64encode(bytes([value])), value) for value in range(256))
    (tmp_path / hashlib.sha1(url.encode()).hexdigest()).write_bytes(lines)
    available, unavailable = load_baseline_encodings()
    assert set(available) == {"GPT-4"} and set(unavailable) == {"GPT-2"}


def test_a_tokenizer_that_loses_text_is_refused(tokenizer, corpus, monkeypatch):
    """Token counts of a tokenizer that drops characters look wonderful."""
    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    monkeypatch.setattr(tokenizer, "encode", lambda text: [])
    with pytest.raises(AssertionError, match="ours .*'news'"):
        evaluate_tokenizer(tokenizer, corpus)
