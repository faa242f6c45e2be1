"""Tokenizers of the challenge, their spec files, and the byte tables with every way in which they have gone wrong."""

import json
import math

import numpy as np
import pytest
import sentencepiece
import torch

from golf.golf_tokenizers import (
    BOS_ID,
    BpbSums,
    ByteTables,
    ByteTokenizer,
    SentencePieceTokenizer,
    TokenizerSpec,
    build_byte_tables,
    load_golf_tokenizer,
    make_tokenizer,
    parse_tokenizer_specs,
    read_tokenizer_specs,
    train_sentencepiece,
)
from helpers import english_documents, run_ranks
from nanochat.runtime import UserError

DIFFICULT = [
    "", " ", "plain words, and more words", "  two  spaces   and a tail  ", "tabs\tand\nnew lines\r\n\r\nhere",
    "é ü ﬁ ligature ½ ² ①", "日本語のテキスト 中文", "😀👩‍👩‍👧 emoji", "\x00 nul \x01 control \u200b zero width",
    "12345 678,9",     "<s> </s> <unk> <0x41> <pad>", "▁ a real lower block ▁▁", "half a pair \ud83d here",
    "ﷺ long when normalised", "a\u0301 e\u0300",
]  # fmt: skip


@pytest.fixture(scope="module")
def texts():
    return [text[:4000] for text in english_documents()]


@pytest.fixture(scope="module")
def tokenizer(texts):
    return train_sentencepiece(texts, 512)


def stream_of(tokenizer, texts):
    tokens = [np.concatenate([[BOS_ID], each]) for each in tokenizer.encode_batch(texts)]
    return torch.from_numpy(np.concatenate(tokens).astype(np.int64))


def original_tables(processor, vocab_size):
    """The published look-up tables, transcribed from the specification with numpy."""
    size = max(processor.vocab_size(), vocab_size)
    base, space, boundary = np.zeros(size, np.int16), np.zeros(size, np.bool_), np.ones(size, np.bool_)
    for i in range(processor.vocab_size()):
        if processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i):
            continue
        boundary[i] = False
        if processor.is_byte(i):
            base[i] = 1
            continue
        piece = processor.id_to_piece(i)
        if piece.startswith("▁"):
            space[i] = True
            piece = piece[1:]
        base[i] = len(piece.encode("utf-8"))
    return base, space, boundary


# Tokenizers


def test_training_has_the_settings_of_the_challenge(tokenizer):
    """A tokenizer trained with a library's defaults: other ids, a dummy space, digits in one piece."""
    processor = tokenizer.processor
    assert [processor.pad_id(), processor.bos_id(), processor.eos_id(), processor.unk_id()] == [0, 1, 2, 3]
    assert tokenizer.vocab_size == 512 and sum(map(processor.is_byte, range(512))) == 256
    assert processor.encode("word", out_type=str)[0][0] != "▁"
    assert tokenizer.processor.decode(tokenizer.processor.encode("ﬁ ½ 日")) == "fi 1⁄2 日"  # nmt_nfkc
    pieces = [processor.id_to_piece(i) for i in range(260, 512)]
    assert not any(len(piece) > 1 and any(c.isdigit() for c in piece.removeprefix("▁")) for piece in pieces)


def test_training_is_deterministic_and_holds_no_path(texts, tokenizer, tmp_path):
    """Two runs whose losses cannot be compared, or a model file that depends on the folder it was trained in."""
    again = train_sentencepiece(iter(texts), 512)
    assert again.model == tokenizer.model
    make_tokenizer(TokenizerSpec(vocab_size=512), texts, tmp_path)
    assert (tmp_path / "fineweb_512_bpe.model").read_bytes() == tokenizer.model
    assert str(tmp_path).encode() not in tokenizer.model


def test_files_are_those_that_the_library_writes(texts, tokenizer, tmp_path):
    """A .vocab file in a format of our own; pieces other than the original's export would have learned."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.replace("\0", " ").strip() for text in texts), model_prefix=str(tmp_path / "lib"),
        model_type="bpe", vocab_size=512, character_coverage=0.999, byte_fallback=True, split_digits=True,
        normalization_rule_name="nmt_nfkc", add_dummy_prefix=False, pad_id=0, bos_id=1, eos_id=2, unk_id=3,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    make_tokenizer(TokenizerSpec(vocab_size=512), texts, tmp_path)
    assert (tmp_path / "fineweb_512_bpe.vocab").read_bytes() == (tmp_path / "lib.vocab").read_bytes()
    theirs = load_golf_tokenizer(tmp_path / "lib.model", 512)
    for ours, other in zip(tokenizer.encode_batch(DIFFICULT), theirs.encode_batch(DIFFICULT), strict=True):
        assert ours.tolist() == other.tolist()


def test_training_text_is_cleaned_and_limited(texts):
    """Empty documents and zero bytes that stop the trainer, or change what it learns."""
    odd = ["", "  \n ", "\0", *(text.replace(" ", "\0") for text in texts), "half \ud83d"]
    plain = [*texts, "half ?"]
    assert train_sentencepiece(odd, 512).model == train_sentencepiece(plain, 512).model


def test_training_that_cannot_work_says_why(texts):
    """A line of C++ source in place of a reason, or a smaller vocabulary than the model has rows for."""
    with pytest.raises(UserError, match="300 pieces could not be trained .*required_chars"):
        train_sentencepiece([chr(0x4E00 + i) * 50 for i in range(500)], 300)
    for nothing in ([], [" ".join(texts)]):
        with pytest.raises(UserError, match="no text that is short enough .* max_sentence_length is 4192"):
            train_sentencepiece(nothing, 512)
    assert train_sentencepiece([" ".join(texts)], 512, {"max_sentence_length": 10**6}).vocab_size == 512
    with pytest.raises(UserError, match=r"enough for \d+ pieces and 4096 were asked for"):
        train_sentencepiece(["a few words only, a few words"], 4096)
    with pytest.raises(UserError, match="trainer_overrides"):
        train_sentencepiece(texts, 512, {"no_such_setting": 1})
    assert train_sentencepiece(texts, 512, {"character_coverage": 0.99}).vocab_size == 512


def test_byte260(tmp_path):
    """Bytes shifted by another offset, or a description that the challenge does not read."""
    spec = TokenizerSpec(kind="pure_byte")
    tokenizer = make_tokenizer(spec, [], tmp_path)
    description = json.loads((tmp_path / spec.file_name).read_text())
    assert set(description) == {"tokenizer_type", "config", "vocab_size"} and description["vocab_size"] == 260
    ids = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "byte_offset": 4, "byte_count": 256}
    assert description["config"] == ids and description["tokenizer_type"] == "pure_byte"
    (tokens,) = tokenizer.encode_batch(["A\x00é\xff"])
    assert tokens.dtype == np.uint16 and tokens.tolist() == [69, 4, 0xC3 + 4, 0xA9 + 4, 0xC3 + 4, 0xBF + 4]
    assert tokenizer.decode_batch([np.array([1, 69, 2, 70])]) == ["AB"]
    whole = [text.encode("utf-8", "replace").decode() for text in DIFFICULT]
    assert tokenizer.decode_batch(tokenizer.encode_batch(DIFFICULT)) == whole
    assert isinstance(load_golf_tokenizer(tmp_path / spec.file_name, 260), ByteTokenizer)
    more = description | {"config": description["config"] | {"comment": "of another exporter"}, "version": 2}
    (tmp_path / "more.json").write_text(json.dumps(more))
    assert isinstance(load_golf_tokenizer(tmp_path / "more.json", 260), ByteTokenizer)
    shifted = description | {"config": description["config"] | {"byte_offset": 3}}
    for other in (description | {"vocab_size": 256}, shifted, {}, [], {"vocab_size": 260, "config": None}):
        (tmp_path / "other.json").write_text(json.dumps(other))
        with pytest.raises(UserError, match="does not describe the byte tokenizer"):
            load_golf_tokenizer(tmp_path / "other.json")
    with pytest.raises(UserError, match="cannot be read"):
        load_golf_tokenizer(tmp_path / "missing.json")


def test_a_tokenizer_of_another_size_is_refused(tokenizer, tmp_path):
    """Pitfall 6: a model with 1,024 rows and tokens of another vocabulary."""
    path = tmp_path / "a.model"
    path.write_bytes(tokenizer.model)
    assert load_golf_tokenizer(path, 512).vocab_size == load_golf_tokenizer(path).vocab_size == 512
    with pytest.raises(UserError, match="a.model has 512 tokens and VOCAB_SIZE is 1024. Set VOCAB_SIZE to 512"):
        load_golf_tokenizer(path, 1024)


def test_a_vocabulary_without_the_space_piece_is_refused(tokenizer, tmp_path):
    """Pitfall 2: spaces spelled as three byte tokens, and three bytes counted for each."""
    entry = b"\n\x03" + "▁".encode() + b"\x15"
    assert tokenizer.model.count(entry) == 1
    without = tokenizer.model.replace(entry, b"\n\x03" + "▂".encode() + b"\x15")
    processor = sentencepiece.SentencePieceProcessor(model_proto=without)
    assert processor.encode("日 本", out_type=str)[3:6] == ["<0xE2>", "<0x96>", "<0x81>"]  # why it matters
    with pytest.raises(UserError, match="no piece for a space of its own"):
        SentencePieceTokenizer(without)
    (tmp_path / "a.model").write_bytes(without)
    with pytest.raises(UserError, match="a.model has no piece for a space"):
        load_golf_tokenizer(tmp_path / "a.model")


def test_files_that_are_no_tokenizer_are_named(texts, tmp_path):
    """RuntimeError: Internal: src/sentencepiece_processor.cc(237)."""
    for name, content in (("a.model", b""), ("b.model", b"not a model"), ("c.model", b"<html></html>" * 100)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} is no SentencePiece model"):
            load_golf_tokenizer(tmp_path / name)
    with pytest.raises(UserError, match="d.model cannot be read"):
        load_golf_tokenizer(tmp_path / "d.model")
    with pytest.raises(UserError, match="begins documents with token 2"):
        train_sentencepiece(texts, 512, {"bos_id": 2, "eos_id": 1})


# Specs


def test_specs_are_read_from_all_three_shapes(tmp_path):
    """A spec file of the challenge that is refused, or read without its settings."""
    entries = [
        {"name": "sp_bpe_1024", "dataset_suffix": "sp1024", "vocab_size": 1024},
        {"kind": "sentencepiece", "vocab_size": 4096, "tokenizer_train_docs": 5_000_000, "trainer_overrides": {"a": 1}},
        {"kind": "byte", "reuse_model_path": None},
        {"dataset_suffix": "byte260x", "kind": "pure_byte", "name": "b", "filename": "b.json"},
    ]
    shapes = [entries, {"tokenizers": entries}, {"tokenizer_specs": entries}]
    for shape in shapes:
        (tmp_path / "specs.json").write_text(json.dumps(shape))
        first, second, third, fourth = read_tokenizer_specs(tmp_path / "specs.json")
        assert (first.kind, first.dataset_name, first.file_name) == (
            "sentencepiece_bpe", "fineweb10B_sp1024", "fineweb_1024_bpe.model",
        )  # fmt: skip
        assert (second.name, second.dataset_suffix, second.tokenizer_train_docs) == ("sp_bpe_4096", "sp4096", 5_000_000)
        assert (third.kind, third.name, third.dataset_suffix, third.vocab_size) == (
            "byte",
            "pure_byte_260",
            "byte260",
            260,
        )
        assert (fourth.file_name, fourth.kind) == ("b.json", "byte")
        assert parse_tokenizer_specs([spec.as_json() for spec in (first, second, third, fourth)]) == [
            first, second, third, fourth
        ]  # fmt: skip
    assert TokenizerSpec(dataset_suffix="byte260").kind == "byte"


@pytest.mark.parametrize(
    "content, message",
    [
        ([], "not empty"),
        ({"specs": []}, "list of objects"),
        ([1], "list of objects"),
        ([{"vocab_sise": 1024}], 'key "vocab_sise" is not known. Did you mean vocab_size'),
        ([{"vocab_size": 200}], "It can be 261 to 65,536"),
        ([{"vocab_size": 70000}], "It can be 261 to 65,536"),
        ([{"name": "x"}], "vocab_size None"),
        ([{"vocab_size": 1024, "kind": "char"}], 'kind "char" is not known'),
        ([{"vocab_size": 1024, "tokenizer_train_docs": "5"}], "tokenizer_train_docs is '5'"),
        ([{"vocab_size": 1024, "tokenizer_train_docs": 0}], "tokenizer_train_docs is 0"),
        ([{"vocab_size": 512, "kind": "byte"}], "260 tokens"),
        ([{"vocab_size": 1024}, {"vocab_size": 1024}], 'two tokenizers have the name "sp_bpe_1024"'),
        ([{"vocab_size": 1024}, {"vocab_size": 1024, "name": "b"}], 'dataset name "fineweb10B_sp1024"'),
        (
            [{"vocab_size": 1024}, {"vocab_size": 1024, "name": "b", "dataset_suffix": "c"}],
            "two tokenizers have the file",
        ),
    ],
)
def test_a_wrong_spec_says_what_is_wrong(tmp_path, content, message):
    """A setting with a typing error that is silently left out; two datasets written over each other."""
    path = tmp_path / "specs.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        read_tokenizer_specs(path)
    with pytest.raises(UserError, match="none.json cannot be read"):
        read_tokenizer_specs(tmp_path / "none.json")


def test_a_reused_model_is_copied_and_must_fit(tokenizer, tmp_path):
    """Training again for hours in place of a model that is at hand, or exporting with one of another size."""
    (tmp_path / "old.model").write_bytes(tokenizer.model)
    spec = TokenizerSpec(vocab_size=512, reuse_model_path=str(tmp_path / "old.model"))
    assert make_tokenizer(spec, iter(()), tmp_path / "new").model == tokenizer.model
    assert (tmp_path / "new" / "fineweb_512_bpe.model").read_bytes() == tokenizer.model
    assert (tmp_path / "new" / "fineweb_512_bpe.vocab").read_text().count("\n") == 512
    with pytest.raises(UserError, match="has 512 tokens and VOCAB_SIZE is 1024"):
        make_tokenizer(TokenizerSpec(vocab_size=1024, reuse_model_path=str(tmp_path / "old.model")), [], tmp_path)


# Byte tables


@pytest.mark.parametrize("vocab_size", [None, 512, 600, 100])
def test_tables_are_those_of_the_original(tokenizer, vocab_size):
    """A score that cannot be compared with any published one."""
    tables = build_byte_tables(tokenizer, vocab_size)
    base, space, boundary = original_tables(tokenizer.processor, vocab_size or 0)
    assert tables.base_bytes.dtype == torch.int16 and np.array_equal(tables.base_bytes.numpy(), base)
    assert np.array_equal(tables.has_leading_space.numpy(), space)
    assert np.array_equal(tables.is_boundary.numpy(), boundary)
    assert boundary[:4].all() and not boundary[4:512].any() and space.sum() > 20


def test_table_bytes_are_those_of_the_decoded_text(tokenizer, texts):
    """Check 2 of the specification: bytes that nobody ever wrote in the denominator."""
    tables = build_byte_tables(tokenizer)
    for text in texts[:30] + DIFFICULT:
        stream = stream_of(tokenizer, [text])
        decoded = tokenizer.decode_batch([stream[1:].numpy()])[0]
        assert tables.stream_bytes(stream) == len(decoded.encode("utf-8"))


def test_the_space_is_added_once(tokenizer, texts):
    """Pitfall 1: a space in the table and again at evaluation, a sixth more bytes."""
    tables, stream = build_byte_tables(tokenizer), stream_of(tokenizer, texts)
    once, spaces = tables.stream_bytes(stream), int(tables.has_leading_space[stream[1:]].sum())
    twice = ByteTables(tables.base_bytes + tables.has_leading_space, *tables[1:]).stream_bytes(stream)
    assert twice == once + spaces and 1.1 < twice / once < 1.3
    space = tokenizer.processor.piece_to_id("▁")
    assert tables.base_bytes[space] == 0
    assert tables.target_bytes(torch.tensor([300]), torch.tensor([space])).tolist() == [1]


def test_lone_bytes_are_one_byte_each(tokenizer):
    """Pitfall 3: decode and measure gives three, the length of the replacement mark."""
    lone = tokenizer.processor.piece_to_id("<0xC3>")
    assert len(tokenizer.processor.decode([lone]).encode()) == 3
    tables = build_byte_tables(tokenizer)
    assert tables.base_bytes[lone] == 1 and not tables.has_leading_space[lone] and not tables.is_boundary[lone]
    assert build_byte_tables(ByteTokenizer()).base_bytes.tolist() == [0] * 4 + [1] * 256


def test_begin_of_document_adds_loss_but_no_bytes(tokenizer):
    """Pitfall 4: BOS left out of the loss, or counted as a byte, or a space counted where no text precedes it."""
    tables = build_byte_tables(tokenizer)
    word = next(i for i in range(512) if tokenizer.processor.id_to_piece(i).startswith("▁t"))
    length = len(tokenizer.processor.id_to_piece(word)) - 1
    previous, targets = torch.tensor([BOS_ID, word, word, 0, 2]), torch.tensor([word, BOS_ID, word, word, word])
    assert tables.target_bytes(previous, targets).tolist() == [length, 0, length + 1, length, length]
    sums = BpbSums()
    sums.add(torch.ones(5), previous, targets, tables)
    assert sums.sums.tolist() == [5, 5, 4 * length + 1]


def test_bytes_are_those_of_the_normalised_text(tokenizer, texts):
    """Pitfall 5: to expect the bytes of the file, where new lines in a row and ligatures have been normalised away."""
    tables = build_byte_tables(tokenizer)
    text = "two   spaces\n\n\nﬁ ½"
    assert tables.stream_bytes(stream_of(tokenizer, [text])) == len("two spaces fi 1⁄2".encode()) != len(text.encode())
    one_line = [" ".join(text.split()) for text in texts]
    raw = sum(len(text.encode()) for text in one_line)
    assert tables.stream_bytes(stream_of(tokenizer, one_line)) == pytest.approx(raw, rel=0.002)


def test_sums_weigh_by_tokens_and_divide_once(tokenizer, texts):
    """Pitfalls 7 and 8: means of batches, and means of ratios, which let a short batch count as much as a long one."""
    tables, stream = build_byte_tables(tokenizer), stream_of(tokenizer, texts[:5])
    nats = torch.rand(len(stream) - 1, generator=torch.Generator().manual_seed(0)) * torch.linspace(
        1, 9, len(stream) - 1
    )
    parts, sums = [0, 10, 300, len(nats)], BpbSums()
    ratios, means = [], []
    for start, end in zip(parts, parts[1:], strict=False):
        batch = nats[start:end], stream[start:end], stream[start + 1 : end + 1]
        sums.add(*batch, tables)
        one = BpbSums()
        one.add(*batch, tables)
        ratios.append(one.val_bpb)
        means.append(one.val_loss)
    expected_loss = nats.double().mean().item()
    expected_bpb = nats.double().sum().item() / math.log(2) / tables.stream_bytes(stream)
    assert sums.val_loss == pytest.approx(expected_loss, rel=1e-12)
    assert sums.val_bpb == pytest.approx(expected_bpb, rel=1e-12)
    assert abs(np.mean(means) - expected_loss) > 0.1 and abs(np.mean(ratios) - expected_bpb) > 0.1
    assert math.isnan(BpbSums().val_loss) and BpbSums().val_bpb == math.inf


def test_sums_are_kept_in_float64():
    """A stream of millions of small losses added up in float32, where the last ones vanish."""
    tables, sums = build_byte_tables(ByteTokenizer()), BpbSums()
    token = torch.tensor([70])
    sums.add(torch.tensor([2.0**25]), token, token, tables)
    for _ in range(8):
        sums.add(torch.tensor([1.0]), token, token, tables)
    assert sums.sums.tolist() == [2.0**25 + 8, 9, 9]


def test_long_streams_are_counted_in_pieces_without_losing_a_border(monkeypatch):
    """A byte lost or counted twice wherever two pieces of a long stream meet."""
    from golf import golf_tokenizers

    tables = build_byte_tables(ByteTokenizer())
    for length in (1, 2, 3, 4, 5, 7, 8, 9, 100):
        monkeypatch.setattr(golf_tokenizers, "STREAM_PIECE", 4)
        assert tables.stream_bytes(torch.full((length,), 70)) == length - 1


RANKS = """
import os, torch, torch.distributed as dist
from golf.golf_tokenizers import BpbSums, ByteTokenizer, build_byte_tables
dist.init_process_group("gloo")
rank, tables = int(os.environ["RANK"]), build_byte_tables(ByteTokenizer())
sums = BpbSums()
token = torch.full((rank + 1,), 70)
sums.add(torch.full((rank + 1,), 2.0 + rank), token, token, tables)
sums.sum_over_ranks()
print(sums.val_loss, sums.sums.tolist())
dist.destroy_process_group()
"""


def test_sums_of_all_ranks_are_the_same():
    """A score of one rank's share, or a mean of the ranks' means."""
    assert run_ranks(RANKS) == [f"{8 / 3} [8.0, 3.0, 3.0]"] * 2
