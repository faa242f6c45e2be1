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
    LanePacker,
    merge_loader_states,
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


def loader(corpus, B=2, T=6, split="train", tokenizer=None, **kwargs):
    return tokenizing_distributed_data_loader_with_state_bos_bestfit(
        tokenizer or CharacterTokenizer(), B, T, split, device="cpu", corpus=corpus, **kwargs
    )


def together(monkeypatch, corpus, world_size, state=None, tokenizers=None, **options):
    """Endless (batches by rank, merged state) of as many processes, all continuing from the one state."""
    loaders = []
    for rank in range(world_size):
        set_rank(monkeypatch, rank, world_size)
        tokenizer = tokenizers[rank] if tokenizers else None
        loaders.append(loader(corpus, resume_state_dict=state, tokenizer=tokenizer, **options))
    set_rank(monkeypatch, 0, 1)
    while True:
        batches = [next(one) for one in loaders]
        merged = merge_loader_states([state for _, _, state in batches])
        assert json.loads(json.dumps(merged)) == merged, "the state must survive JSON"
        yield batches, merged


def rows_of(batches):
    """The rows of one batch of every rank in the order of the run: row j of rank r of W is row j * W + r."""
    by_rank = [torch.cat([inputs, targets[:, -1:]], dim=1).tolist() for inputs, targets, _ in batches]
    return [row for rows in zip(*by_rank, strict=True) for row in rows]


def assert_same_batches(expected, got):
    for (inputs, targets, state), (other_inputs, other_targets, other_state) in zip(expected, got, strict=True):
        assert torch.equal(inputs, other_inputs) and torch.equal(targets, other_targets) and state == other_state


def walk(files, lane, lanes):
    """Coordinates and texts in the order in which a lane must meet them, endlessly, with the epoch."""
    epoch = 1
    while True:
        for pq_idx, groups in enumerate(files):
            for rg_idx in range(lane, len(groups), lanes):
                for index, text in enumerate(groups[rg_idx]):
                    yield epoch, [pq_idx, rg_idx, index], text
        epoch += 1


def brute_force_rows(files, lane, lanes, capacity, buffer_size, batch_size):
    """Spec section 7.2, read literally: scan the whole buffer for every pick."""
    stream = walk(files, lane, lanes)
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


def brute_force_run(files, lanes, capacity, buffer_size, batch_size=128):
    """The rows of a run: one from each lane in turn."""
    rows = [
        brute_force_rows(files, lane, lanes, capacity, max(1, buffer_size // lanes), batch_size)
        for lane in range(lanes)
    ]
    while True:
        yield from map(next, rows)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10**6),
    T=st.integers(1, 12),
    buffer_size=st.integers(1, 20),
    batch_size=st.integers(1, 6),
    lane_of=st.sampled_from([(0, 1), (0, 2), (1, 2)]),
)
def test_packing_equals_brute_force(tmp_path_factory, seed, T, buffer_size, batch_size, lane_of):
    """A wrong tie rule or a stale length in the sorted list packs other rows than the specification says."""
    lane, lanes = lane_of
    files = random_files(seed, 2, 2, 5, longest=2 * T)
    corpus = write_corpus(tmp_path_factory.mktemp("corpus"), files)
    stream = DocumentStream(corpus, "train", lane, lanes)
    packer = BestFitPacker(CharacterTokenizer(), stream, T + 1, buffer_size, batch_size, threads=1)
    expected = brute_force_rows(files, lane, lanes, T + 1, buffer_size, batch_size)
    for row in islice(expected, 25):
        assert [int(token) for piece, used in packer.next_row() for token in piece.tokens[:used]] == row


def fetched(files, state):
    """Every document that was met when the loaders' merged state is this, lane by lane; the epochs are checked too."""
    met = []
    for lane, at in state["packers"].items():
        if at["rg_idx"] < 0:  # this lane has not had its first turn
            continue
        target = [at["epoch"], at["pq_idx"], at["rg_idx"], at["next_doc"] - 1]
        for epoch, place, text in walk(files, int(lane), state["lanes"]):
            met.append((place, text))
            if [epoch, *place] == target:
                break
            assert epoch <= at["epoch"], f"the position {target} is not on the way"
    return met


def assert_all_documents_accounted_for(files, rows, state):
    """What was met is either in the rows so far or still waits, and nothing is there twice."""
    packed = Counter()
    for row in rows:
        assert row[0] == BOS
        for begin in (position for position, token in enumerate(row) if token == BOS):
            following = row[begin + 1] if begin + 1 < len(row) else None
            # A piece cropped to its BOS cannot say which document it is.
            packed[chr(following) if following else "?"] += 1
    met = fetched(files, state)
    waiting = Counter(files[a][b][c][:1] for packer in state["packers"].values() for a, b, c in packer["waiting"])
    unknown = Counter(text[:1] for _, text in met) - waiting - packed
    assert sum(unknown.values()) == packed["?"]
    assert sum(packed.values()) + sum(waiting.values()) == len(met)


@pytest.mark.parametrize("buffer_size", [1, 2, 7, 40])
@pytest.mark.parametrize(("world_size", "lanes"), [(1, 1), (1, 4), (2, 2), (2, 4)])
def test_exact_resume_at_every_batch(tmp_path, monkeypatch, world_size, lanes, buffer_size):
    """A run that was interrupted would train on other batches than one that was not."""
    files = random_files(buffer_size, 2, 4, 5, longest=14)
    corpus = write_corpus(tmp_path, files)
    options = {"buffer_size": buffer_size, "tokenizer_batch_size": 4}
    reference = []
    for batches, state in together(monkeypatch, corpus, world_size, lanes=lanes, **options):
        reference.append((batches, json.loads(json.dumps(state))))
        if state["epoch"] >= 3 and len(reference) >= 12:
            break
    for index, (_, state) in enumerate(reference[:-1]):
        resumed = together(monkeypatch, corpus, world_size, state, **options)
        for expected, got in zip(reference[index + 1 : index + 4], resumed, strict=False):
            assert_same_batches(expected[0], got[0])
            assert expected[1] == got[1]
    state = reference[0][1]  # resuming again and again must not drift either
    for expected in reference[1:]:
        batches, state = next(together(monkeypatch, corpus, world_size, state, **options))
        assert_same_batches(expected[0], batches)


@pytest.mark.parametrize("buffer_size", [1, 5, 30])
@pytest.mark.parametrize(("world_size", "lanes"), [(1, 1), (1, 2), (2, 2), (2, 4)])
def test_no_document_is_skipped_or_repeated(tmp_path, monkeypatch, world_size, lanes, buffer_size):
    """Resuming by position alone loses the documents in the buffer; going back too far repeats some."""
    files = random_files(100 + buffer_size, 3, max(2, lanes), 4, longest=12)
    corpus = write_corpus(tmp_path, files)
    rows, state = [], None
    for _ in range(60):  # fresh loaders for every batch: the hardest way to lose nothing
        batches, state = next(
            together(monkeypatch, corpus, world_size, state, B=1, buffer_size=buffer_size, lanes=lanes)
        )
        rows += rows_of(batches)
        assert_all_documents_accounted_for(files, rows, state)
    assert all(packer["epoch"] > 1 for packer in state["packers"].values())


@pytest.mark.parametrize("buffer_size", [3, 40])
def test_rows_do_not_depend_on_the_number_of_processes(tmp_path, monkeypatch, buffer_size):
    """The losses of one GPU and of eight could not be compared, and only the same machine could finish a run."""
    files = random_files(buffer_size, 2, 8, 20, longest=14)
    corpus = write_corpus(tmp_path, files)
    expected = list(islice(brute_force_run(files, 8, 7, buffer_size), 96))
    assert len({tuple(row) for row in expected}) > 48
    for world_size in (1, 2, 4, 8):
        run = together(monkeypatch, corpus, world_size, B=8 // world_size, buffer_size=buffer_size)
        after = list(islice(run, 12))
        assert [row for batches, _ in after for row in rows_of(batches)] == expected
        states = [state for _, state in after]
        if world_size == 1:
            states_of_one = states
        assert states == states_of_one, "merged, the states are the state of one process"


def test_a_run_may_move_to_another_number_of_processes(tmp_path, monkeypatch):
    """A run that moves to a bigger machine would start its data over, or see some of it twice."""
    files = random_files(11, 3, 8, 3, longest=14)
    corpus = write_corpus(tmp_path, files)
    rows, state = [], None
    parts = [(1, 3, 3), (2, 1, 2), (4, 3, 2), (1, 2, 3), (8, 1, 5), (2, 5, 3), (4, 1, 1), (1, 1, 9)]
    for world_size, B, steps in parts:
        run = together(monkeypatch, corpus, world_size, state, B=B, buffer_size=20, tokenizer_batch_size=3)
        for batches, merged in islice(run, steps):
            rows += rows_of(batches)
            assert_all_documents_accounted_for(files, rows, merged)
        state = json.loads(json.dumps(merged))
    assert state["lanes"] == 8 and state["epoch"] > 1
    assert rows == list(islice(brute_force_run(files, 8, 7, 20, batch_size=3), len(rows)))


class CountingTokenizer(CharacterTokenizer):
    def __init__(self):
        self.texts = Counter()

    def encode(self, text, prepend=None, num_threads=1):
        self.texts.update(text)
        return super().encode(text, prepend, num_threads)


def test_processes_divide_the_tokenizing(tmp_path, monkeypatch):
    """Every process would tokenize the whole corpus, and eight GPUs wait for the processor."""
    files = random_files(12, 3, 8, 6, longest=14)
    corpus = write_corpus(tmp_path, files)
    alone = [CountingTokenizer()]
    list(islice(together(monkeypatch, corpus, 1, tokenizers=alone, B=8, buffer_size=20), 2))
    four = [CountingTokenizer() for _ in range(4)]
    list(islice(together(monkeypatch, corpus, 4, tokenizers=four, B=2, buffer_size=20), 2))
    assert sum((one.texts for one in four), Counter()) == alone[0].texts
    assert all(one.texts.total() < alone[0].texts.total() / 2 for one in four)


@pytest.mark.parametrize("lanes", [1, 2, 8])
def test_lanes_divide_the_buffer(tmp_path, lanes):
    """With a whole buffer for each lane, eight times as many documents must be tokenized before the first step."""
    corpus = write_corpus(tmp_path, random_files(13, 2, 8, 30, longest=14))
    state = next(loader(corpus, B=lanes, lanes=lanes, buffer_size=64, tokenizer_batch_size=2))[2]
    waiting = [len(packer["waiting"]) for packer in state["packers"].values()]
    assert len(waiting) == lanes and all(64 // lanes - 1 <= count <= 64 // lanes for count in waiting)


@pytest.mark.parametrize(
    ("row_groups", "world_size", "lanes"),
    [(1, 1, 1), (2, 1, 2), (3, 1, 2), (7, 2, 4), (8, 1, 8), (20, 4, 8), (20, 8, 8), (5, 3, 3), (20, 16, 16), (3, 3, 3)],
)
def test_number_of_lanes(tmp_path, monkeypatch, row_groups, world_size, lanes):
    """A small corpus, or an odd number of processes, could not be read at all."""
    corpus = write_corpus(tmp_path, [[["a"]], [["b"] for _ in range(row_groups)]])
    _, state = next(together(monkeypatch, corpus, world_size, buffer_size=1))
    assert state["lanes"] == lanes and list(state["packers"]) == [str(lane) for lane in range(lanes)]


def test_lanes_share_the_corpus_without_overlap(tmp_path):
    """Two lanes that read the same row group train twice on it, and some other is never read."""
    files = random_files(5, 3, 4, 3, longest=5)
    corpus = write_corpus(tmp_path, files)
    seen = []
    for lane in range(3):
        stream = DocumentStream(corpus, "train", lane, 3)
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
    assert state["lanes"] == 4
    with pytest.raises(UserError, match="lacks lanes, packers, row,"):
        loader(corpus, resume_state_dict={"pq_idx": 0, "rg_idx": 0, "epoch": 1})
    set_rank(monkeypatch, 0, 3)
    with pytest.raises(UserError, match="dealt to 4 lanes, which 3 processes cannot share .*: 1, 2, 4"):
        loader(corpus, resume_state_dict=state)
    set_rank(monkeypatch, 0, 1)
    (tmp_path / "other").mkdir()
    other = write_corpus(tmp_path / "other", [[["a"]]])
    with pytest.raises(UserError, match="not in this corpus"):
        loader(other, resume_state_dict=state)
    shrunk = write_corpus(tmp_path / "other", [[group[:1] for group in groups] for groups in files])
    with pytest.raises(UserError, match="fewer documents"):
        loader(shrunk, resume_state_dict=state)


def test_states_that_are_not_merged(tmp_path, monkeypatch):
    """A run would go on without the lanes of the other processes, or with some of another step."""
    corpus = write_corpus(tmp_path, random_files(7, 2, 4, 6, longest=9))
    batches = list(islice(together(monkeypatch, corpus, 2, B=1), 2))
    states = [[state for _, _, state in ranks] for ranks, _ in batches]
    for rank, world_size in [(0, 1), (0, 2), (1, 2)]:
        set_rank(monkeypatch, rank, world_size)
        for state in states[0]:
            with pytest.raises(UserError, match="lanes (0, 2|1, 3) of 4 alone.* merge_loader_states"):
                loader(corpus, resume_state_dict=state)
            with pytest.raises(UserError, match="merge_loader_states"):
                loader(corpus, resume_state_dict=merge_loader_states([state, state]))
    with pytest.raises(ValueError, match="one moment"):
        merge_loader_states([states[0][0], states[1][1]])


def test_a_run_keeps_its_lanes(tmp_path):
    """A run saved with few lanes would be cut anew when it goes on, as if it had been saved with eight."""
    corpus = write_corpus(tmp_path, random_files(7, 2, 8, 6, longest=9))
    state = next(loader(corpus, lanes=2))[2]
    assert next(loader(corpus, resume_state_dict=state))[2]["lanes"] == 2


def test_state_keeps_coordinates_alone(tmp_path):
    """A state with tokens or texts in it would make every checkpoint carry megabytes of the corpus."""
    corpus = write_corpus(tmp_path, [[[document(index, 500) for index in range(50)]]])
    state = next(loader(corpus, buffer_size=40))[2]
    assert len(json.dumps(state)) < 16 * len(state["packers"]["0"]["waiting"]) + 250


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
    lanes = 4 if max(map(len, files)) >= 4 else 2
    rows = list(islice(brute_force_run(files, lanes, 8, buffer_size=1000), 4))
    assert rows == rows_of([next(loader(corpus, B=4, T=7))])
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
    packer = LanePacker(CharacterTokenizer(), corpus, "train", 8)
    for _ in range(4):
        for piece, used in packer.next_row():
            f, g, i = piece.where
            tokens_read += len(files[f][g][i]) + 1
            lost["tokens"] += len(files[f][g][i]) + 1 - used
    assert statistics["cropped_tokens_percent"] == pytest.approx(100 * lost["tokens"] / tokens_read)
