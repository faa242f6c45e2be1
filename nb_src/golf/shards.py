# %% [markdown]
# ## Token shards
#
# The challenge hands out text that is tokenized already: files of a hundred million numbers, two bytes each, after a
# header of one kilobyte. Nothing in such a file says which tokenizer wrote it or where the next file goes on, so all
# that can be checked is checked before a number is believed: the mark at the start, the version, the length, and that
# no token lies outside the vocabulary. A file that was cut off during a download would otherwise train quite well.
#
# Training reads the shards as one endless ribbon. Every process knows where its part of the next step lies and reads
# that part only, and the parts of all processes together are the same whether there is one process or eight.

# %%
from pathlib import Path

import numpy as np
import torch

from nanochat.runtime import UserError, atomic_path

# %% [markdown]
# ### `write_token_shard`
# 256 integers of 4 bytes, of which three are used, then the tokens.

# %%
SHARD_MAGIC = 20240520
SHARD_VERSION = 1
SHARD_HEADER_BYTES = 1024
SHARD_TOKENS = 100_000_000


def write_token_shard(path, tokens) -> None:
    """Write one shard. tokens: (n,) integers of 0 to 65,535, n < 2^31. Golf spec section 1.1. Raises UserError."""
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(f"{path}: a shard holds one row of integers, not {tokens.dtype} of shape {tokens.shape}.")
    if len(tokens) >= 2**31:
        raise UserError(f"{path}: a shard holds less than 2^31 tokens, not {len(tokens):,}. Write several.")
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < 2**16:
        raise UserError(
            f"{path}: tokens from {tokens.min()} to {tokens.max()} do not fit into two bytes. Use a vocabulary of at "
            "most 65,536."
        )
    header = np.zeros(SHARD_HEADER_BYTES // 4, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, len(tokens)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(header.tobytes())
        file.write(tokens.astype("<u2", copy=False).tobytes())


# %% [markdown]
# ### Reading
# The header promises a number of tokens, and the file must have exactly that length.


# %%
def shard_token_count(path) -> int:
    """The number of tokens in a shard, after checking its mark, version and length. Raises UserError."""
    remedy = "Fetch or export it again."
    try:
        with open(path, "rb") as file:
            header = np.frombuffer(file.read(SHARD_HEADER_BYTES), dtype="<i4")
            size = file.seek(0, 2)
    except (OSError, ValueError) as error:  # ValueError: cut off within one of the integers
        raise UserError(f"the shard {path} cannot be read ({error}). {remedy}") from error
    if len(header) * 4 < SHARD_HEADER_BYTES:
        raise UserError(f"{path} is no token shard: {size:,} bytes are less than a header. {remedy}")
    magic, version, count = map(int, header[:3])
    if magic != SHARD_MAGIC:
        raise UserError(f"{path} is no token shard: it begins with {magic} instead of {SHARD_MAGIC}. {remedy}")
    if version != SHARD_VERSION:
        raise UserError(f"{path} is a shard of version {version}, and version {SHARD_VERSION} is known here. {remedy}")
    if count < 0 or size != SHARD_HEADER_BYTES + 2 * count:
        raise UserError(
            f"{path} has {size:,} bytes, and its header promises {count:,} tokens, which make "
            f"{SHARD_HEADER_BYTES + 2 * count:,}. {remedy}"
        )
    return count


def read_token_shard(path, start: int = 0, count: int = -1) -> np.ndarray:
    """Tokens start, ..., start + count − 1 of a shard (count −1: to its end) as (n,) uint16. Raises UserError."""
    available = shard_token_count(path) - start
    count = available if count < 0 else count
    tokens = np.fromfile(path, dtype="<u2", count=count, offset=SHARD_HEADER_BYTES + 2 * start)
    if len(tokens) != count:
        raise UserError(f"{path} gave {len(tokens):,} of {count:,} tokens. Fetch or export it again.")
    return tokens.astype(np.uint16, copy=False)


def token_shard_files(folder, split: str) -> tuple[Path, ...]:
    """The shards of a dataset folder in reading order. split: "train" or "val". Raises UserError when it has none."""
    files = tuple(sorted(Path(folder).glob(f"fineweb_{split}_*.bin")))
    if not files:
        raise UserError(f"{folder} holds no fineweb_{split}_*.bin. Download or export the data, or correct DATA_PATH.")
    return files


# %% [markdown]
# ### `TokenStream`
# Many files, one ribbon. Only headers are read at first; what is asked for is read when it is asked for, so eight
# processes hold eight small slices in memory and not eight copies of everything.


# %%
class TokenStream:
    """The tokens of several shards in the order given, starting over after the last one.

    vocab_size: a token that is not below it raises UserError, which names the file.
    """

    def __init__(self, files, vocab_size: int = 2**16):
        self.files, self.vocab_size = [Path(path) for path in files], vocab_size
        self.ends = np.cumsum([shard_token_count(path) for path in self.files], dtype=np.int64)
        if not len(self) > 0:
            raise UserError("the token stream is empty: its shards hold no token. Fetch or export the data again.")

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start, ..., start + count − 1 as (count,) uint16; positions count on after the end."""
        parts, start = [], start % len(self)
        while count > 0:
            index = int(np.searchsorted(self.ends, start, side="right"))
            take = min(count, int(self.ends[index]) - start)
            first = int(self.ends[index - 1]) if index else 0
            part = read_token_shard(self.files[index], start - first, take)
            if int(part.max()) >= self.vocab_size:
                raise UserError(
                    f"{self.files[index]} holds token {part.max()}, and the vocabulary ends at {self.vocab_size - 1}. "
                    "These shards belong to another tokenizer: correct DATA_PATH, TOKENIZER_PATH or VOCAB_SIZE."
                )
            parts.append(part)
            count, start = count - take, (start + take) % len(self)
        return np.concatenate(parts) if parts else np.empty(0, np.uint16)


# %% [markdown]
# ### `DistributedTokenLoader`
# Each slice has one token more than it has inputs, because the last input needs a target. The challenge allows 1, 2,
# 4 or 8 processes and always cuts a step into eight slices, one after the other for one process or all at once for
# eight, so the number of processes changes nothing in what a step sees.


# %%
def slice_tokens(batch_tokens: int, seq_len: int, slices: int) -> int:
    """Inputs in each of the equal slices of a step. Raises UserError when whole sequences do not come out even."""
    unit = slices * seq_len
    if batch_tokens < unit or batch_tokens % unit:
        nearest = sorted({max(unit, batch_tokens // unit * unit), (batch_tokens // unit + 1) * unit})
        raise UserError(
            f"TRAIN_BATCH_TOKENS {batch_tokens} is not a multiple of {slices} slices × {seq_len} tokens = {unit}. "
            f"Nearest that work: {', '.join(map(str, nearest))}."
        )
    return batch_tokens // slices


class DistributedTokenLoader:
    """Batches for one rank, from the start of the stream. `position` is all its state: set it to go on from there.

    stream: a TokenStream, the same on every rank. Golf spec section 2.5.
    """

    def __init__(self, stream: TokenStream, rank: int = 0, world_size: int = 1, device="cpu"):
        self.stream, self.rank, self.world_size, self.device = stream, rank, world_size, device
        self.position = 0

    def next_batch(self, batch_tokens: int, seq_len: int, grad_accum_steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's inputs and targets of one micro-step, (B, seq_len) int64 each; then everyone moves on.

        batch_tokens: inputs of a whole step, over all ranks and micro-steps. Raises UserError when it cannot be split.
        """
        local = slice_tokens(batch_tokens, seq_len, self.world_size * grad_accum_steps)
        tokens = self.stream.read(self.position + self.rank * (local + 1), local + 1)
        self.position = (self.position + (local + 1) * self.world_size) % len(self.stream)
        tokens, on_gpu = torch.from_numpy(tokens.astype(np.int64)), torch.device(self.device).type == "cuda"
        tokens = tokens.pin_memory() if on_gpu else tokens  # from other memory the copy would wait for the GPU
        tokens = tokens.to(self.device, non_blocking=on_gpu)
        return tokens[:-1].view(-1, seq_len), tokens[1:].view(-1, seq_len)


# %% [markdown]
# ### `load_validation_tokens`
# The whole stream. Published loaders cut it to a multiple of the sequence length and never score what is left over.


# %%
def load_validation_tokens(files, vocab_size: int = 2**16) -> torch.Tensor:
    """All tokens of the validation shards, (N + 1,) int64 for N targets. Raises UserError when N is 0."""
    stream = TokenStream(files, vocab_size)
    if len(stream) < 2:
        raise UserError("the validation shards hold one token, and nothing can be predicted. Export them again.")
    return torch.from_numpy(stream.read(0, len(stream)).astype(np.int64))
