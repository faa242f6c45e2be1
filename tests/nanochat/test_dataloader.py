import json
import random
from collections import Counter
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanochat.dataloader import (
    BestFitPacker,
    DocumentStream,
    pack_rows_preview,
    packing_statistics,
    tokenizing_distributed_data_loader_bos_bestfit,
    tokenizing_distributed_data_loader_with_state_bos_bestfit,
)
from nanochat.dataset import Corpus
from nanochat.runtime import UserError
from nanochat.tokenizer import RustBPETokenizer

BOS = 0


class CharacterTokenizer:
    """One token for each character, so that a test can read rows."""

    def get_bos_token_id(self):
        return BOS

    def encode(self, text, prepend=None, num_threads=1):
        return [[prepend, *map(ord, one)] for one in text]


def document(number, length):
    """A text whose characters say which document it is."""
    return chr(1000 + number) * length


def write_corpus(folder, train_files, val_file=(("v" * 3, "w" * 5),)):
    """train_files: for each file its row groups, for each row group its texts. Empty texts and nulls lie in between."""
    paths = []
    for index, groups in enumerate([*train_files, val_file]):
        path = folder / f"shard_{index:05d}.parquet"
        with pq.ParquetWriter(path, pa.schema([("text", pa.string())])) as writer:
            for texts in groups:
                rows = ["", *(row for text in texts for row in (text, None, ""))]
                writer.write_table(pa.table({"text": pa.array(rows, pa.string())}))
        paths.append(str(path))
    return Corpus(name="test", train_files=tuple(paths[:-1]), val_file=paths[-1])


def random_files(seed, n_files, n_groups, group_size, longest):
    """Files of row groups of numbered documents, some longer than a row. In later files a row group may have none."""
    draw, number, files = random.Random(seed), 0, []
    for file_index in range(n_files):
        groups = []
        for _ in range(n_groups + draw.randint(0, 1)):
            n_documents = draw.randint(0 if file_index else 1, group_size)
            lengths = [draw.choice([1, 1, 2, 3, draw.randint(1, longest)]) for _ in range(n_documents)]
            groups.append([document(number + index, length) for index, length in enumerate(lengths)])
            number += len(lengths)
        files.append(groups)
    return files


def set_rank(monkeypatch, rank, world_size):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world_size))


def loader(corpus, B=2, T=6, split="train", **kwargs):
    return tokenizing_distributed_data_loader_with_state_bos_bestfit(
        CharacterTokenizer(), B, T, split, device="cpu", corpus=corpus, **kwargs
    )


def walk(files, rank, world_size):
    """Coordinates and texts in the order in which a rank must meet them, endlessly, with the epoch."""
    epoch = 1
    while True:
        for pq_idx, groups in enumerate(files):
            for rg_idx in range(rank, len(groups), world_size):
                for index, text in enumerate(groups[rg_idx]):
                    yield epoch, [pq_idx, rg_idx, index], text
        epoch += 1


def brute_force_rows(files, rank, world_size, capacity, buffer_size, batch_size):
    """Spec section 7.2, read literally: scan the whole buffer for every pick."""
    stream = walk(files, rank, world_size)
    epoch, place, text = next(stream)
    buffer = []
    while True:
        row = []
        while len(row) < capacity:
            while len(buffer) < buffer_size:
                group = place[:2], epoch
                for _ in range(batch_size):
                    buffer.append([BOS, *map(ord, text)])
                    epoch, place, text = next(stream)
                    if (place[:2], epoch) != group or place[2] == 0:  # a batch never crosses row groups
                        break
            remaining, best = capacity - len(row), None
            for index, tokens in enumerate(buffer):
                if len(tokens) <= remaining and (best is None or len(tokens) > len(buffer[best])):
                    best = index
            if best is None:
                best = min(range(len(buffer)), key=lambda index: (len(buffer[index]), index))
            row += buffer.pop(best)[:remaining]
        yield row


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10**6),
    T=st.integers(1, 12),
    buffer_size=st.integers(1, 20),
    batch_size=st.integers(1, 6),
    ranks=st.sampled_from([(0, 1), (0, 2), (1, 2)]),
)
def test_packing_equals_brute_force(tmp_path_factory, seed, T, buffer_size, batch_size, ranks):
    """A wrong tie rule or a stale length in the sorted list packs other rows than the specification says."""
    rank, world_size = ranks
    files = random_files(seed, 2, 2, 5, longest=2 * T)
    corpus = write_corpus(tmp_path_factory.mktemp("corpus"), files)
    stream = DocumentStream(corpus, "train", rank, world_size)
    packer = BestFitPacker(CharacterTokenizer(), stream, T + 1, buffer_size, batch_size, threads=1)
    expected = brute_force_rows(files, rank, world_size, T + 1, buffer_size, batch_size)
    for row in islice(expected, 25):
        assert [int(token) for piece, used in packer.next_row() for token in piece.tokens[:used]] == row


def fetched(files, state):
    """Every document that a rank has met when its loader yields this state, in order; the epochs are checked too."""
    met = []
    target = [state["epoch"], state["pq_idx"], state["rg_idx"], state["next_doc"] - 1]
    for epoch, place, text in walk(files, state["rank"], state["world_size"]):
        met.append((place, text))
        if [epoch, *place] == target:
            return met
        assert epoch <= state["epoch"], f"the position {target} is not on the way"


@pytest.mark.parametrize("buffer_size", [1, 2, 7, 40])
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (0, 2), (1, 2)])
def test_exact_resume_at_every_batch(tmp_path, monkeypatch, rank, world_size, buffer_size):
    """A run that was interrupted would train on other batches than one that was not."""
    set_rank(monkeypatch, rank, world_size)
    files = random_files(buffer_size, 2, 3, 6, longest=14)
    corpus = write_corpus(tmp_path, files)
    options = {"buffer_size": buffer_size, "tokenizer_batch_size": 4}
    reference = []
    for inputs, targets, state in loader(corpus, **options):
        reference.append((inputs, targets, json.loads(json.dumps(state))))
        assert reference[-1][2] == state, "the state must survive JSON"
        if state["epoch"] >= 3 and len(reference) >= 12:
            break
    for index, (_, _, state) in enumerate(reference[:-1]):
        resumed = loader(corpus, resume_state_dict=state, **options)
        for expected, got in zip(reference[index + 1 : index + 4], resumed, strict=False):
            assert torch.equal(expected[0], got[0]) and torch.equal(expected[1], got[1])
            assert expected[2] == got[2]
    last = reference[0]  # resuming again and again must not drift either
    for expected in reference[1:]:
        last = next(loader(corpus, resume_state_dict=last[2], **options))
        assert torch.equal(expected[0], last[0]) and torch.equal(expected[1], last[1]) and expected[2] == last[2]


@pytest.mark.parametrize("buffer_size", [1, 5, 30])
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (0, 2), (1, 2)])
def test_no_document_is_skipped_or_repeated(tmp_path, monkeypatch, rank, world_size, buffer_size):
    """Resuming by position alone loses the documents in the buffer; going back too far repeats some."""
    set_rank(monkeypatch, rank, world_size)
    files = random_files(100 + buffer_size, 3, 2, 6, longest=12)
    corpus = write_corpus(tmp_path, files)
    T, packed, state = 6, Counter(), None
    for _ in range(60):  # a fresh loader for every batch: the hardest way to lose nothing
        inputs, targets, state = next(loader(corpus, B=1, T=T, buffer_size=buffer_size, resume_state_dict=state))
        row = [*inputs[0].tolist(), targets[0, -1].item()]
        assert row[0] == BOS
        for begin in (position for position, token in enumerate(row) if token == BOS):
            following = row[begin + 1] if begin + 1 < len(row) else None
            # A piece cropped to its BOS cannot say which document it is.
            packed[chr(following) if following else "?"] += 1
        met = fetched(files, state)
        waiting = Counter(files[a][b][c][:1] for a, b, c in state["waiting"])
        unknown = Counter(text[:1] for _, text in met) - waiting - packed
        assert sum(unknown.values()) == packed["?"]
        assert sum(packed.values()) + sum(waiting.values()) == len(met)
    assert state["epoch"] > 1


def test_ranks_share_the_corpus_without_overlap(tmp_path):
    """Two ranks that read the same row group train twice on it, and some other is never read."""
    files = random_files(5, 3, 4, 3, longest=5)
    corpus = write_corpus(tmp_path, files)
    seen = []
    for rank in range(3):
        stream = DocumentStream(corpus, "train", rank, 3)
        while stream.epoch == 1:
            _, where = stream.next_batch(2)
            seen += [tuple(place) for place in where] if stream.epoch == 1 else []
    everything = [
        (f, g, i) for f, groups in enumerate(files) for g, group in enumerate(groups) for i in range(len(group))
    ]
    assert sorted(seen) == everything


def test_shapes_and_shift(tmp_path):
    """Targets that are not the inputs moved by one teach the model to copy."""
    corpus = write_corpus(tmp_path, random_files(1, 2, 2, 6, longest=9))
    with_state = loader(corpus, B=3, T=5, buffer_size=10)
    without = tokenizing_distributed_data_loader_bos_bestfit(
        CharacterTokenizer(), 3, 5, "train", device="cpu", corpus=corpus, buffer_size=10
    )
    for (inputs, targets, _), (same_inputs, same_targets) in islice(zip(with_state, without, strict=False), 5):
        assert inputs.shape == targets.shape == (3, 5)
        assert inputs.dtype == targets.dtype == torch.int64 and inputs.is_contiguous() and targets.is_contiguous()
        assert torch.equal(inputs[:, 1:], targets[:, :-1]) and inputs[:, 0].eq(BOS).all()
        assert torch.equal(inputs, same_inputs) and torch.equal(targets, same_targets)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_batches_may_be_held(tmp_path, device):
    """Views of one reused buffer change under the hands of whoever keeps a batch (spec section 21.7)."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    corpus = write_corpus(tmp_path, random_files(2, 2, 2, 6, longest=9))
    batches = tokenizing_distributed_data_loader_with_state_bos_bestfit(
        CharacterTokenizer(), 2, 6, "train", device=device, corpus=corpus, buffer_size=10
    )
    held = list(islice(batches, 20))
    one_by_one = loader(corpus, buffer_size=10)
    for inputs, targets, state in held:
        expected_inputs, expected_targets, expected_state = next(one_by_one)
        assert inputs.device.type == device
        assert torch.equal(inputs.cpu(), expected_inputs) and torch.equal(targets.cpu(), expected_targets)
        assert state == expected_state


def test_validation_split(tmp_path):
    """Validation would read training documents."""
    corpus = write_corpus(tmp_path, [[["t" * 4]]])
    inputs, _, _ = next(loader(corpus, split="val"))
    assert set(inputs.flatten().tolist()) <= {BOS, ord("v"), ord("w")}
    with pytest.raises(ValueError, match="train or val"):
        loader(corpus, split="test")


def test_corpora_that_cannot_feed_every_rank(tmp_path, monkeypatch):
    """The original loops forever on a single shard, and on a rank whose first row group exceeds every file."""
    with pytest.raises(UserError, match="at least two"):
        loader(write_corpus(tmp_path, []))
    corpus = write_corpus(tmp_path, [[["a"], ["b"]], [["c"]]])
    set_rank(monkeypatch, 0, 3)
    with pytest.raises(UserError, match="at most 2 row groups, too few for 3 processes"):
        loader(corpus)
    set_rank(monkeypatch, 1, 2)
    assert next(loader(corpus, buffer_size=1))[0].tolist()[0] == [BOS, ord("b")] * 3
    monkeypatch.setattr("nanochat.dataloader.read_row_group", lambda *_: [])
    with pytest.raises(UserError, match="no document"):
        next(loader(corpus))


def test_states_that_do_not_fit(tmp_path, monkeypatch):
    """A run that goes on with another rank's state, or on other data, would not say so."""
    files = random_files(7, 2, 4, 6, longest=9)
    corpus = write_corpus(tmp_path, files)
    state = next(loader(corpus, buffer_size=30))[2]
    with pytest.raises(UserError, match="lacks .*next_doc"):
        loader(corpus, resume_state_dict={"pq_idx": 0, "rg_idx": 0, "epoch": 1})
    set_rank(monkeypatch, 1, 2)
    with pytest.raises(UserError, match="rank 0 of 1 was given to rank 1 of 2"):
        loader(corpus, resume_state_dict=state)
    set_rank(monkeypatch, 0, 1)
    (tmp_path / "other").mkdir()
    other = write_corpus(tmp_path / "other", [[["a"]]])
    with pytest.raises(UserError, match="not in this corpus"):
        loader(other, resume_state_dict=state)
    shrunk = write_corpus(tmp_path / "other", [[group[:1] for group in groups] for groups in files])
    with pytest.raises(UserError, match="fewer documents"):
        loader(shrunk, resume_state_dict=state)


def test_state_keeps_coordinates_alone(tmp_path):
    """A state with tokens or texts in it would make every checkpoint carry megabytes of the corpus."""
    corpus = write_corpus(tmp_path, [[[document(index, 500) for index in range(50)]]])
    state = next(loader(corpus, buffer_size=40))[2]
    assert len(json.dumps(state)) < 16 * len(state["waiting"]) + 200


def test_batch_size_may_change(tmp_path):
    """Continuing with another batch size would lose rows, although a batch always ends with a whole row."""
    corpus = write_corpus(tmp_path, random_files(8, 2, 2, 6, longest=9))
    state = next(loader(corpus, B=2, buffer_size=9))[2]
    wide = next(loader(corpus, B=4, buffer_size=9, resume_state_dict=state))
    narrow = list(islice(loader(corpus, B=2, buffer_size=9, resume_state_dict=state), 2))
    assert torch.equal(wide[0], torch.cat([inputs for inputs, _, _ in narrow]))
    assert wide[2] == narrow[1][2]


def test_with_the_real_tokenizer(tmp_path):
    """The loader and the tokenizer would disagree about what `encode` takes."""
    texts = [f"Ferry number {index} left the harbour, and nobody waved. " * (index % 4) for index in range(40)]
    tokenizer = RustBPETokenizer.train_from_iterator(iter(texts), 280)
    corpus = write_corpus(tmp_path, [[texts[:20], texts[20:]]])
    options = {"device": "cpu", "buffer_size": 8, "tokenizer_batch_size": 5, "corpus": corpus}
    batches = tokenizing_distributed_data_loader_with_state_bos_bestfit(tokenizer, 2, 32, "train", **options)
    reference = list(islice(batches, 12))
    whole = {tuple(tokenizer.encode(text, prepend="<|bos|>")) for text in texts}
    row = [*reference[0][0][0].tolist(), reference[0][1][0, -1].item()]
    starts = [position for position, token in enumerate(row) if token == tokenizer.get_bos_token_id()]
    pieces = [tuple(row[a:b]) for a, b in zip(starts, [*starts[1:], None], strict=True)]
    assert all(piece in whole for piece in pieces[:-1])
    assert any(ids[: len(pieces[-1])] == pieces[-1] for ids in whole)
    resumed = tokenizing_distributed_data_loader_with_state_bos_bestfit(
        tokenizer, 2, 32, "train", resume_state_dict=reference[4][2], **options
    )
    for expected, got in zip(reference[5:], resumed, strict=False):
        assert torch.equal(expected[0], got[0]) and torch.equal(expected[1], got[1]) and expected[2] == got[2]


def test_preview_and_statistics(tmp_path):
    """The picture of packing would show something else than what is trained on."""
    files = random_files(9, 2, 3, 8, longest=14)
    corpus = write_corpus(tmp_path, files)
    preview = pack_rows_preview(CharacterTokenizer(), corpus, rows=4, T=7)
    rows = list(islice(brute_force_rows(files, 0, 1, 8, buffer_size=1000, batch_size=128), 4))
    texts, tokens_read, documents, n_cropped = {}, 0, 0, 0
    for pieces, row in zip(preview, rows, strict=True):
        assert sum(length for _, length, _ in pieces) == len(row) == 8
        position = 0
        for number, length, cropped in pieces:
            content = "".join(map(chr, row[position + 1 : position + length]))
            assert row[position] == BOS and len(content) == length - 1
            assert texts.setdefault(number, content)[:1] == content[:1]
            assert not cropped or position + length == 8, "only the end of a row is cropped"
            position += length
            documents, n_cropped = documents + 1, n_cropped + cropped
    statistics = packing_statistics(CharacterTokenizer(), corpus, rows=4, T=7)
    assert (statistics["documents"], statistics["cropped_documents"]) == (documents, n_cropped)
    lost = Counter()
    packer = BestFitPacker(CharacterTokenizer(), DocumentStream(corpus, "train", 0, 1), 8, 1000, 128, 1)
    for _ in range(4):
        for piece, used in packer.next_row():
            f, g, i = piece.where
            tokens_read += len(files[f][g][i]) + 1
            lost["tokens"] += len(files[f][g][i]) + 1 - used
    assert statistics["cropped_tokens_percent"] == pytest.approx(100 * lost["tokens"] / tokens_read)
