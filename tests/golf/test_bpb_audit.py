"""The auditor: it must be content with data that are right, and name each way in which others were wrong."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from golf import bpb_audit
from golf.bpb_audit import (
    AUDIT_HEADER,
    audit_bpb,
    audit_frozen_set,
    audit_rows,
    document_bytes,
    document_starts,
    training_overlap,
    window_hashes,
)
from golf.golf_data import (
    export_golf_data,
    open_golf_data,
    open_golf_shards,
    read_golf_manifest,
    write_golf_documents,
)
from golf.golf_tokenizers import (
    ByteTables,
    ByteTokenizer,
    TokenizerSpec,
    build_byte_tables,
    load_golf_tokenizer,
    train_sentencepiece,
)
from golf.shards import read_token_shard, write_token_shard
from helpers import english_documents
from nanochat.plots import table_text
from nanochat.runtime import UserError

SPECS = [TokenizerSpec(vocab_size=512), TokenizerSpec(kind="byte")]


def documents():
    """Without what normalisation would change."""
    return [" ".join(text[:3000].split()).replace("▁", "_") for text in english_documents()[:50]]


def export(folder, texts, docs_val=12):
    write_golf_documents(folder, texts, docs_val)
    export_golf_data(folder, SPECS, shard_tokens=10_000)
    return folder


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return export(tmp_path_factory.mktemp("good"), documents())


def verdicts(findings):
    return {finding.check: finding.verdict for finding in findings}


def finding_about(findings, words):
    (found,) = [finding for finding in findings if words in finding.check]
    return found


def rewrite_validation(folder, change, variant="sp512"):
    """Apply `change` to the tokens of the only validation shard; the same number must come back."""
    path = Path(open_golf_data(folder, variant).val_files[0])
    tokens = read_token_shard(path)
    changed = change(tokens.copy())
    assert len(changed) == len(tokens)
    write_token_shard(path, changed)
    return tokens


@pytest.mark.parametrize("variant", ["sp512", "byte260"])
def test_shards_without_a_manifest_are_audited(good, tmp_path, variant):
    """Foreign shards under DATA_PATH need an audit most, and have no manifest."""
    data = open_golf_data(good, variant)
    found = audit_bpb(open_golf_shards(data.dataset_path, data.tokenizer_path, data.vocab_size))
    assert {finding.verdict for finding in found} == {"ok", "look"} and not any("manif" in f.check for f in found)
    assert finding_about(found, "by the tables").verdict == "ok"
    shutil.copytree(data.dataset_path, tmp_path / "shards")
    shard = tmp_path / "shards" / "fineweb_val_000000.bin"
    write_token_shard(shard, np.concatenate([[1], read_token_shard(shard), [2]]))  # ends with an end of document
    found = audit_bpb(open_golf_shards(tmp_path / "shards", data.tokenizer_path, data.vocab_size))
    assert finding_about(found, "end of document").verdict == "WRONG"


@pytest.mark.parametrize("variant", ["sp512", "byte260"])
def test_good_data_pass(good, variant):
    """An auditor that finds fault with everything, so that nobody reads it."""
    findings = audit_bpb(open_golf_data(good, variant), overlap_shards=99)
    look = [check for check, verdict in verdicts(findings).items() if verdict != "ok"]
    assert look == ["documents of the frozen set"]
    raw = sum(len(text.encode()) for text in documents()[:12])
    assert (
        finding_about(findings, "by the tables").expected
        == f"{raw:,}"
        == finding_about(findings, "by the tables").found
    )
    assert finding_about(findings, "training documents of the manifest").found == "38"
    text = table_text(audit_rows(findings), AUDIT_HEADER)
    assert "bytes by the tables = bytes of the decoded text" in text and f"{raw:,}" in text


def test_a_space_that_is_counted_twice_is_found(good):
    """Pitfall 1, as it was submitted: a better score for the same model."""
    data = open_golf_data(good, "sp512")
    right = build_byte_tables(load_golf_tokenizer(data.tokenizer_path))
    twice = ByteTables(right.base_bytes + right.has_leading_space, *right[1:])
    findings = audit_bpb(data, twice)
    found = finding_about(findings, "by the tables")
    assert (
        found.verdict == "WRONG" and "each space is counted twice" in found.found and "in 12 documents" in found.found
    )
    assert verdicts(findings)["the tables"] == "WRONG"
    assert verdicts(audit_bpb(data, right))["the tables"] == "ok"


def test_tables_by_decoding_and_boundary_mistakes_are_found(good):
    """Pitfalls 3 and 4: three bytes for a lone byte, and a space counted after the begin of a document."""
    texts = ["naïve ☃ 日本 text", " starts with a word"]
    tokenizer = train_sentencepiece([text for text in documents() if text], 512)
    right = build_byte_tables(tokenizer)
    tokens = np.concatenate([np.concatenate([[1], each]) for each in tokenizer.encode_batch(texts)]).astype(np.uint16)
    counted = document_bytes(tokens, tokenizer, right)
    assert counted.by_tables.tolist() == counted.by_text.tolist() == [22, 18] and counted.encodes_back.all()
    base = right.base_bytes.clone()
    for token in range(512):
        if tokenizer.processor.is_byte(token):
            base[token] = len(tokenizer.processor.decode([token]).encode("utf-8"))
    decoded = document_bytes(tokens, tokenizer, right._replace(base_bytes=base))
    assert decoded.by_tables[0] > counted.by_text[0]
    word = np.array([1, next(i for i in range(512) if tokenizer.processor.id_to_piece(i).startswith("▁t"))], np.uint16)
    no_boundary = right._replace(is_boundary=torch.zeros(512, dtype=torch.bool))
    assert document_bytes(word, tokenizer, right).spaces.tolist() == [0]
    wrong = document_bytes(word, tokenizer, no_boundary)
    assert wrong.spaces.tolist() == [1] and wrong.by_tables[0] == wrong.by_text[0] + 1


def test_another_tokenizer_of_the_same_size_is_found(tmp_path):
    """A tokenizer that does not fit its shards and has the right number of tokens: every check of numbers passes."""
    folder = export(tmp_path, documents())
    data = open_golf_data(folder, "sp512")
    assert finding_about(audit_bpb(data), "encodes to these tokens").verdict == "ok"
    other = train_sentencepiece([text[::-1] for text in documents()], 512)
    Path(data.tokenizer_path).write_bytes(other.model)
    found = finding_about(audit_bpb(open_golf_data(folder, "sp512")), "encodes to these tokens")
    assert found.verdict == "WRONG" and found.expected == "12" and int(found.found) < 3
    Path(data.tokenizer_path).write_bytes(train_sentencepiece(documents(), 500).model)
    with pytest.raises(UserError, match="has 500 tokens and VOCAB_SIZE is 512"):
        open_golf_data(folder, "sp512")


def test_a_stream_that_was_changed_is_found(tmp_path):
    """A document dropped, an end of document put in, or a stream that starts in the middle of a document."""
    folder = export(tmp_path, documents())

    def merge_two_documents(tokens):
        tokens[document_starts(tokens)[3]] = 5
        return tokens

    original = rewrite_validation(folder, merge_two_documents)
    found = finding_about(audit_bpb(open_golf_data(folder, "sp512")), "validation documents of the manifest")
    assert (found.expected, found.found, found.verdict) == ("12", "11", "WRONG")

    def end_of_document(tokens):
        tokens[:] = original
        tokens[document_starts(tokens)[1] - 1] = 2
        return tokens

    rewrite_validation(folder, end_of_document)
    assert finding_about(audit_bpb(open_golf_data(folder, "sp512")), "padding, end of document").verdict == "WRONG"

    rewrite_validation(folder, lambda tokens: np.roll(original, -1))
    findings = audit_bpb(open_golf_data(folder, "sp512"))
    assert [finding.verdict for finding in findings] == ["WRONG"] and findings[0].check == "the first token"

    rewrite_validation(folder, lambda tokens: np.where(original == original.max(), 600, original))
    with pytest.raises(UserError, match="holds token 600, and the vocabulary ends at 511"):
        audit_bpb(open_golf_data(folder, "sp512"))


def test_text_that_normalisation_changes_is_told_apart_from_a_mistake(tmp_path):
    """Pitfall 5: a difference that is real and nobody's fault, reported as an error, or not at all."""
    texts = ["new\n\n\nlines   and spaces " * 20 + text for text in documents()]
    findings = audit_bpb(open_golf_data(export(tmp_path, texts), "sp512"))
    assert finding_about(findings, "before normalisation").verdict == "look"
    assert "(-" in finding_about(findings, "before normalisation").found
    assert finding_about(findings, "by the tables").verdict == "ok"
    (tmp_path / "docs_selected.jsonl").unlink()
    assert not any("normalisation" in finding.check for finding in audit_bpb(open_golf_data(tmp_path, "sp512")))


# Overlap


def test_validation_text_in_training_text_is_found(tmp_path):
    """A model that is measured on what it has read."""
    texts = documents()
    copied = texts[:12] + texts[12:20] + [texts[3]] + texts[20:] + ["In the middle: " + texts[5] + " and an end"]
    findings = audit_bpb(open_golf_data(export(tmp_path, copied), "sp512"), overlap_shards=99)
    assert finding_about(findings, "are training documents too").found == "1"
    assert finding_about(findings, "are training documents too").verdict == "look"
    assert finding_about(findings, "blocks of 32").verdict == "look"
    assert finding_about(findings, "occur twice").found == "0"


def test_a_copy_across_two_shards_counts_and_a_part_of_the_shards_is_said(tmp_path):
    """A copied document that is missed because a shard ends within it; a search of four shards told as one of all."""
    val = np.array([1, *range(10, 110), 1, *range(200, 240), 1, *range(10, 110), 1, *range(300, 332)], np.uint16)
    train = [1, 7, 8, 1, *range(10, 110), 1, 9, *range(205, 240), *range(300, 332), 1, 5]
    train = np.array(train, np.uint16)
    for cut in (1, 3, 4, 30, 103, 104, 110, len(train)):
        write_token_shard(tmp_path / "a.bin", train[:cut])
        write_token_shard(tmp_path / "b.bin", train[cut:])
        overlap = training_overlap(val, [tmp_path / "a.bin", tmp_path / "b.bin"])
        assert overlap.documents_train == 4 and overlap.documents_repeated == 1 and overlap.documents_in_training == 2
        assert (overlap.blocks, overlap.blocks_in_training) == (8, 7)  # 200 to 231 is not in 205 to 239
    assert training_overlap(val, []).blocks_in_training == 0
    short = training_overlap(np.array([1, 5, 6, 1], np.uint16), [tmp_path / "a.bin"])
    assert (short.blocks, short.documents_in_training) == (0, 0)


def test_some_of_the_shards_is_said(good):
    """A search of one shard that reads like a search of all."""
    findings = audit_bpb(open_golf_data(good, "byte260"), overlap_shards=1)
    assert "in 1 of" in finding_about(findings, "are training documents too").check
    assert not any(finding.check.startswith("training documents") for finding in findings)


def test_windows_have_one_hash_for_one_content():
    """A sliding hash that depends on the position, or is the same for other tokens in another order."""
    tokens = np.random.default_rng(1).integers(0, 1024, 400).astype(np.uint16)
    tokens[300:332] = tokens[50:82]
    hashes = window_hashes(tokens)
    assert len(hashes) == 369 and hashes[300] == hashes[50] and len(np.unique(hashes)) == 368
    swapped = tokens[50:82].copy()
    swapped[[1, 2]] = swapped[[2, 1]]
    assert window_hashes(swapped)[0] != hashes[50]
    assert len(window_hashes(tokens[:31])) == 0


# The frozen set


def frozen_stream(variant_cut, documents, extra):
    """A byte stream of `documents` documents and one more target than a multiple of the cut, if `extra`."""
    text = np.full(variant_cut * 3 + extra, 70, np.uint16)
    stream = np.concatenate([np.ones(documents, np.uint16), text[documents - 1 :]])
    return stream


def test_the_frozen_set_is_recognised_by_documents_targets_and_bytes(monkeypatch):
    """A score on the early validation set, or another export's, told as one on the frozen set."""
    tables = build_byte_tables(ByteTokenizer())
    monkeypatch.setattr(bpb_audit, "FROZEN_DOCUMENTS", 5)
    monkeypatch.setitem(bpb_audit.FROZEN_STREAMS, "sp1024", (64, 192, 188))
    stream = frozen_stream(64, 5, 20)
    assert len(stream) == 213  # 212 targets, of which the published logs scored 192
    assert [f.verdict for f in audit_frozen_set("sp1024", stream, tables)] == ["ok", "ok", "ok"]
    other = stream.copy()
    other[150] = 3
    findings = audit_frozen_set("sp1024", other, tables)
    assert [f.verdict for f in findings] == ["ok", "ok", "look"] and "compare with equal bytes only" in findings[
        2
    ].found
    longer = np.concatenate([stream, stream[-64:]])
    assert [f.verdict for f in audit_frozen_set("sp1024", longer, tables)] == ["ok", "look", "look"]
    fewer = audit_frozen_set("sp1024", stream[1:], tables)
    assert [f.verdict for f in fewer] == ["look"] and "no score here compares" in fewer[0].found
    assert len(audit_frozen_set("sp300", stream, tables)) == 1


def test_the_selection_of_documents_is_recognised(tmp_path, monkeypatch):
    """Shards of other training documents, shuffled otherwise, beside the right validation text."""
    folder = export(tmp_path, documents())
    data = open_golf_data(folder, "byte260")
    assert not any("selection" in finding.check for finding in audit_bpb(data))  # twelve documents are another set
    monkeypatch.setattr(bpb_audit, "FROZEN_DOCUMENTS", 12)
    found = finding_about(audit_bpb(data), "of the selection")
    assert (found.expected, found.found[:4], found.verdict) == ("15,368,808, 84386dfa7b33", "50, ", "look")
    meta = read_golf_manifest(folder)["docs_meta"]
    monkeypatch.setattr(bpb_audit, "FROZEN_SELECTION", (meta["num_docs"], meta["docs_sha256"]))
    assert finding_about(audit_bpb(data), "of the selection").verdict == "ok"


def test_validation_documents_may_be_empty(tmp_path):
    """A division by the bytes of a text that has none."""
    write_golf_documents(tmp_path, ["", "", "x"], 2)
    export_golf_data(tmp_path, SPECS[1:])
    findings = audit_bpb(open_golf_data(tmp_path, "byte260"))
    assert finding_about(findings, "before normalisation").verdict == "ok"


def test_published_totals_are_those_of_the_specification():
    """A digit wrong in a table that everything is compared with."""
    streams = bpb_audit.FROZEN_STREAMS
    for variant, bytes_per_token in (("sp1024", 2.43593), ("sp4096", 3.31968), ("sp8192", 3.72663)):
        length, targets, n_bytes = streams[variant]
        assert targets % length == 0 and round(n_bytes / targets, 5) == bytes_per_token
    assert streams["byte260"][1] - streams["byte260"][2] == bpb_audit.FROZEN_DOCUMENTS == 50_000
    documents, sha256 = bpb_audit.FROZEN_SELECTION
    assert documents - 50_000 == 15_318_808 and (len(sha256), sha256[:4], sha256[-4:]) == (64, "8438", "9bc7")
