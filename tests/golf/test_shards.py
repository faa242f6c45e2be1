"""Token shards against the original's format written by hand, damaged files, and what each rank reads of them."""

import os

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from golf.shards import (
    DistributedTokenLoader,
    TokenStream,
    load_validation_tokens,
    read_token_shard,
    shard_token_count,
    slice_tokens,
    token_shard_files,
    write_token_shard,
)
from nanochat.runtime import UserError


def original_shard_bytes(tokens, magic=20240520, version=1, count=None) -> bytes:
    """The challenge's format, transcribed without our code."""
    header = np.zeros(256, dtype="<i4")
    header[0], header[1], header[2] = magic, version, len(tokens) if count is None else count
    return header.tobytes() + np.array(tokens, dtype="<u2").tobytes()


def write_split(folder, lengths, split="train"):
    """Shards with the tokens 0, 1, 2, ... all through."""
    start = 0
    for index, length in enumerate(lengths):
        write_token_shard(folder / f"fineweb_{split}_{index:06d}.bin", np.arange(start, start + length))
        start += length
    return token_shard_files(folder, split)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(tokens=st.lists(st.integers(0, 65535), max_size=50))
def test_ours_is_the_original_format_in_both_directions(tmp_path, tokens):
    """Shards that the published scripts cannot read, or theirs that we read differently."""
    ours, theirs = tmp_path / "ours.bin", tmp_path / "theirs.bin"
    write_token_shard(ours, np.array(tokens, dtype=np.int64))
    assert ours.read_bytes() == original_shard_bytes(tokens)
    theirs.write_bytes(original_shard_bytes(tokens))
    read = read_token_shard(theirs)
    assert read.dtype == np.uint16 and read.tolist() == tokens
    assert shard_token_count(theirs) == len(tokens)


def test_an_original_file_of_big_numbers_reads_little_endian(tmp_path):
    """Byte order taken from the machine or swapped."""
    path = tmp_path / "a.bin"
    path.write_bytes(original_shard_bytes([])[:8] + b"\x02\0\0\0" + bytes(1012) + b"\x01\x02\xff\xfe")
    assert read_token_shard(path).tolist() == [0x0201, 0xFEFF]
    assert read_token_shard(path, 1).tolist() == [0xFEFF] and read_token_shard(path, 0, 1).tolist() == [0x0201]


GOOD = original_shard_bytes(range(10))


@pytest.mark.parametrize(
    "content, message",
    [
        (original_shard_bytes(range(10), magic=20240521), "begins with 20240521 instead of 20240520"),
        (original_shard_bytes(range(10), version=2), "version 2, and version 1"),
        (GOOD[:-1], r"1,043 bytes, and its header promises 10 tokens, which make 1,044"),
        (GOOD + b"\0", "1,045 bytes"),
        (original_shard_bytes(range(10), count=9), "promises 9 tokens"),
        (original_shard_bytes(range(10), count=-1), "promises -1 tokens"),
        (GOOD[:1000], "1,000 bytes are less than a header"),
        (GOOD[:1001], "cannot be read"),
        (b"", "0 bytes are less than a header"),
        (b"<html>not found</html>" + bytes(2000), "is no token shard"),
    ],
)
def test_a_damaged_shard_is_refused_by_name(tmp_path, content, message):
    """Training on half a download, or on the page of an error."""
    path = tmp_path / "fineweb_train_000000.bin"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        TokenStream([path])
    assert str(path) in str(error.value)
    with pytest.raises(UserError, match=message):
        read_token_shard(path)


def test_a_shard_cut_off_while_it_is_in_use_is_noticed(tmp_path):
    """A short read that returns fewer tokens than asked, or the rest of an old buffer."""
    (path,) = write_split(tmp_path, [10])
    stream = TokenStream([path])
    os.truncate(path, 1030)
    with pytest.raises(UserError, match="promises 10 tokens"):
        stream.read(0, 10)
    with pytest.raises(UserError, match="cannot be read"):
        TokenStream([tmp_path / "fineweb_train_000007.bin"])


@pytest.mark.parametrize(
    "tokens, message",
    [([1, 65536], "do not fit"), ([-1, 5], "do not fit"), ([1.5], "row of integers"), ([[1], [2]], "row of integers")],
)
def test_what_does_not_fit_is_not_written(tmp_path, tokens, message):
    """Tokens that wrap around silently, and half a file left behind."""
    with pytest.raises(UserError, match=message):
        write_token_shard(tmp_path / "a.bin", np.array(tokens))
    assert os.listdir(tmp_path) == []


def test_shards_are_read_in_sorted_order_and_wrap(tmp_path):
    """Another order on another file system, a token lost at a border, or a stop at the end of the data."""
    files = write_split(tmp_path, [5, 1, 0, 7])
    (tmp_path / ".fineweb_train_000009.bin.x.tmp").write_bytes(b"half")
    assert token_shard_files(tmp_path, "train") == files and [path.name[-7:] for path in files] == [
        "000.bin", "001.bin", "002.bin", "003.bin"
    ]  # fmt: skip
    stream = TokenStream(files)
    assert len(stream) == 13
    for start in (0, 4, 5, 6, 12, 13, 20, 13 * 10**9 + 3):
        for count in (0, 1, 2, 13, 30):
            assert stream.read(start, count).tolist() == [(start + i) % 13 for i in range(count)]
    with pytest.raises(UserError, match="holds no fineweb_val"):
        token_shard_files(tmp_path, "val")
    with pytest.raises(UserError, match="is empty"):
        TokenStream(files[2:3])
    with pytest.raises(UserError, match="is empty"):
        TokenStream([])


def test_a_token_outside_the_vocabulary_names_the_file(tmp_path):
    """A shard of a larger tokenizer: on a GPU, an assertion in a kernel an hour later."""
    files = write_split(tmp_path, [5, 5])
    assert TokenStream(files, 10).read(0, 10).max() == 9
    with pytest.raises(UserError, match="fineweb_train_000001.bin holds token 9, and the vocabulary ends at 8"):
        TokenStream(files, 9).read(0, 10)
    with pytest.raises(UserError, match="another tokenizer"):
        load_validation_tokens(write_split(tmp_path, [9], "val"), 8)


def test_ranks_together_read_what_one_process_reads(tmp_path):
    """Losses that depend on the number of processes."""
    files = write_split(tmp_path, [37, 50, 64])
    runs = {}
    for world_size in (1, 2, 4, 8):
        accumulation = 8 // world_size
        loaders = [DistributedTokenLoader(TokenStream(files), rank, world_size) for rank in range(world_size)]
        runs[world_size] = [
            torch.cat([torch.stack(loader.next_batch(64, 4, accumulation)) for loader in loaders], dim=1)
            for _ in range(3 * accumulation)
        ]
        assert all(loader.position == 3 * 72 % 151 for loader in loaders)
        steps = torch.cat(runs[world_size], dim=1)  # (2, sequences, 4)
        assert steps.shape == (2, 48, 4)
        runs[world_size] = steps
    # the original: consecutive slices of 9 tokens, of which 8 are inputs
    expected = torch.tensor([[(9 * index + i) % 151 for i in range(9)] for index in range(24)])
    for steps in runs.values():
        assert torch.equal(steps[0].reshape(24, 8), expected[:, :-1])
        assert torch.equal(steps[1].reshape(24, 8), expected[:, 1:])
    assert runs[1].dtype == torch.int64


def test_batches_reach_a_gpu_without_waiting_for_it(tmp_path, monkeypatch):
    """Every slice of a step waits until the GPU has done the one before."""
    asked = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: asked.append("pinned") or tensor)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *place, **how: asked.append((*place, how)) or tensor)
    loader = DistributedTokenLoader(TokenStream(write_split(tmp_path, [100])), device=torch.device("cuda"))
    loader.next_batch(16, 4, 2)
    assert asked == ["pinned", (torch.device("cuda"), {"non_blocking": True})]


def test_the_loader_goes_on_from_a_position(tmp_path):
    """Warm-up steps that use up training data, or a resumed run that sees the same tokens again."""
    loader = DistributedTokenLoader(TokenStream(write_split(tmp_path, [100])))
    first, second = loader.next_batch(16, 4, 2)[0], loader.next_batch(16, 4, 2)[0]
    loader.position = 0
    assert torch.equal(loader.next_batch(16, 4, 2)[0], first)
    other = DistributedTokenLoader(loader.stream)
    other.position = loader.position
    assert torch.equal(other.next_batch(16, 4, 2)[0], second)


def test_a_batch_that_cannot_be_split_names_those_that_can(tmp_path):
    """view(): shape is invalid for input of size."""
    loader = DistributedTokenLoader(TokenStream(write_split(tmp_path, [100])), 0, 2)
    with pytest.raises(UserError, match=r"8 slices × 4 tokens = 32. Nearest that work: 32, 64"):
        loader.next_batch(50, 4, 4)
    with pytest.raises(UserError, match="Nearest that work: 32"):
        loader.next_batch(10, 4, 4)
    assert slice_tokens(64, 4, 8) == 8 and slice_tokens(393_216, 4096, 8) == 49_152
    with pytest.raises(UserError, match="TRAIN_BATCH_TOKENS 0 "):
        slice_tokens(0, 4, 8)


def test_the_validation_stream_is_whole(tmp_path):
    """The last targets never scored because they do not fill a sequence."""
    tokens = load_validation_tokens(write_split(tmp_path, [10, 7], "val"), 17)
    assert tokens.dtype == torch.int64 and tokens.tolist() == list(range(17))
    with pytest.raises(UserError, match="one token"):
        load_validation_tokens(write_split(tmp_path / "short", [1], "val"))
