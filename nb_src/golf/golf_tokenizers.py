# %% [markdown]
# ## Tokenizers and how many bytes a token is worth
#
# The score is the number of bits that the model needs for each *byte* of text, so somebody has to say how many bytes
# every token stands for. That sounds like bookkeeping, and it moves scores more than any idea does: count the space
# before a word twice, and there are 17.5 % more bytes to share the same bits (pull request 1734 of
# openai/parameter-golf). Here it is done once, for both kinds of tokenizer that the challenge knows, and the auditor
# compares it with the text.
#
# SentencePiece learns its pieces from text and writes the space as `▁`, in front of the word it belongs to. What it
# has no piece for it spells in bytes, so no text is lost. The byte tokenizer has nothing to learn: one token for each
# byte and four that are not text.

# %%
import difflib
import io
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch
import torch.distributed as dist

from nanochat.runtime import UserError, is_ddp_initialized, write_atomic

# %% [markdown]
# ### `ByteTokenizer`
# Ids 0 to 3 are padding, begin of document, end of document and unknown, as in all tokenizers of the challenge.

# %%
PAD_ID, BOS_ID, EOS_ID, UNK_ID = 0, 1, 2, 3
BYTE_OFFSET = 4


def encodable_text(text: str) -> str:
    """The text with a question mark for each half of a surrogate pair, which has no place in UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")


class ByteTokenizer:
    """`byte260`: byte b is token b + 4. Golf spec section 1.2."""

    kind = "byte"
    vocab_size = BYTE_OFFSET + 256

    def encode_batch(self, texts: list[str], threads: int = 1) -> list[np.ndarray]:
        """The tokens of each text, (n,) uint16, without a begin of document."""
        return [
            np.frombuffer(encodable_text(text).encode("utf-8"), np.uint8).astype(np.uint16) + BYTE_OFFSET
            for text in texts
        ]

    def decode_batch(self, documents: list[np.ndarray]) -> list[str]:
        """The text of each row of tokens; U+FFFD for bytes that are not UTF-8."""
        return [
            (tokens[tokens >= BYTE_OFFSET] - BYTE_OFFSET).astype(np.uint8).tobytes().decode("utf-8", "replace")
            for tokens in documents
        ]

    def description(self) -> str:
        """The tokenizer file: JSON with the keys tokenizer_type, config and vocab_size."""
        config = dict(pad_id=PAD_ID, bos_id=BOS_ID, eos_id=EOS_ID, unk_id=UNK_ID)
        config |= dict(byte_offset=BYTE_OFFSET, byte_count=256)
        content = {"tokenizer_type": "pure_byte", "config": config, "vocab_size": self.vocab_size}
        return json.dumps(content, indent=2, sort_keys=True) + "\n"


# %% [markdown]
# ### `SentencePieceTokenizer`
# A vocabulary that lacks the lone `▁` looks fine and is not: each space between two unknown characters becomes three
# byte tokens, and every one of them is counted as a byte of text. So it is refused, as is any model whose documents
# do not begin with token 1.


# %%
class SentencePieceTokenizer:
    """A trained model, given as the bytes of its file. name: for messages. Golf spec section 1.2. Raises UserError."""

    kind = "sentencepiece_bpe"

    def __init__(self, model: bytes, name: str = "the SentencePiece model"):
        self.model = model
        try:
            if not model:
                raise RuntimeError("it is empty")
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(f"{name} is no SentencePiece model. Fetch or train it again.") from error
        self.vocab_size = self.processor.vocab_size()
        if self.processor.bos_id() != BOS_ID:
            raise UserError(
                f"{name} begins documents with token {self.processor.bos_id()} and the challenge with {BOS_ID}. Train "
                "it with bos_id=1."
            )
        if self.processor.piece_to_id("▁") == self.processor.unk_id():
            raise UserError(
                f"{name} has no piece for a space of its own (▁), so it would spell one with three byte tokens and "
                "count bytes that are not in the text. Train it on text with spaces, or raise character_coverage."
            )

    def encode_batch(self, texts: list[str], threads: int = 1) -> list[np.ndarray]:
        """The tokens of each text, (n,) uint16, without a begin of document."""
        encoded = self.processor.encode([encodable_text(text) for text in texts], out_type=int, num_threads=threads)
        return [np.array(tokens, dtype=np.uint16) for tokens in encoded]

    def decode_batch(self, documents: list[np.ndarray]) -> list[str]:
        """The text of each row of tokens; U+FFFD for bytes that are not UTF-8."""
        return self.processor.decode([tokens.tolist() for tokens in documents]) if documents else []

    def vocabulary(self) -> str:
        """The `.vocab` file: a line for each piece, with its score behind a tab."""
        pieces = ((self.processor.id_to_piece(i), self.processor.get_score(i)) for i in range(self.vocab_size))
        return "".join(f"{piece}\t{score:g}\n" for piece, score in pieces)


# %% [markdown]
# ### `train_sentencepiece`
# The settings of the challenge. Trained in memory, because SentencePiece writes the path that it was given into the
# model, and the same text would give another file in another folder.


# %%
def train_sentencepiece(texts: Iterable[str], vocab_size: int, overrides: dict | None = None) -> SentencePieceTokenizer:
    """Learn `vocab_size` pieces from texts. overrides: further settings of the trainer. Raises UserError."""
    cleaned = (encodable_text(text).replace("\0", " ").strip() for text in texts)
    settings = dict(
        model_type="bpe", vocab_size=vocab_size, hard_vocab_limit=False, character_coverage=0.999, byte_fallback=True,
        split_digits=True, normalization_rule_name="nmt_nfkc", add_dummy_prefix=False, pad_id=PAD_ID, bos_id=BOS_ID,
        eos_id=EOS_ID, unk_id=UNK_ID, minloglevel=2,
    )  # fmt: skip
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(text for text in cleaned if text), model_writer=model, **(settings | (overrides or {}))
        )
    except (RuntimeError, OSError, TypeError) as error:
        reason = str(error).split("] ")[-1].strip().rstrip(".")
        reason = reason or "no text that is short enough to learn from: max_sentence_length is 4192 bytes if not given"
        raise UserError(
            f"a vocabulary of {vocab_size} pieces could not be trained ({reason}). Change vocab_size, the "
            "trainer_overrides, or the text."
        ) from error
    tokenizer = SentencePieceTokenizer(model.getvalue(), f"the tokenizer with {vocab_size} pieces")
    if tokenizer.vocab_size != vocab_size:
        raise UserError(
            f"the text has enough for {tokenizer.vocab_size} pieces and {vocab_size} were asked for. Use more text or "
            "a smaller vocabulary."
        )
    return tokenizer


# %% [markdown]
# ### `load_golf_tokenizer`
# `VOCAB_SIZE` decides the size of the model's tables, so a tokenizer of any other size is the wrong one.


# %%
def load_golf_tokenizer(path, vocab_size: int | None = None) -> SentencePieceTokenizer | ByteTokenizer:
    """The tokenizer in a `.model` or `.json` file. Raises UserError when it is broken or has another vocabulary."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"the tokenizer {path} cannot be read ({error.strerror}). Correct TOKENIZER_PATH.") from error
    if Path(path).suffix == ".json":
        tokenizer = ByteTokenizer()
        try:
            found, ours = json.loads(data), json.loads(tokenizer.description())
            if found["vocab_size"] != ours["vocab_size"] or found["config"] != found["config"] | ours["config"]:
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{path} does not describe the byte tokenizer with 260 tokens. Export it again.") from None
    else:
        tokenizer = SentencePieceTokenizer(data, str(path))
    if vocab_size not in (None, tokenizer.vocab_size):
        raise UserError(
            f"{path} has {tokenizer.vocab_size} tokens and VOCAB_SIZE is {vocab_size}. Set VOCAB_SIZE to "
            f"{tokenizer.vocab_size} or name the tokenizer of these shards."
        )
    return tokenizer


# %% [markdown]
# ### `TokenizerSpec`
# What tokenizers to make, in the JSON that the challenge's exporter reads.


# %%
@dataclass(frozen=True)
class TokenizerSpec:
    """One entry of a spec file. What is None takes the challenge's value. Golf spec section 1.2. Raises UserError."""

    name: str = ""
    dataset_suffix: str = ""
    vocab_size: int | None = None
    kind: str = ""
    tokenizer_train_docs: int | None = None
    model_prefix: str = ""
    filename: str = "fineweb_pure_byte_260.json"
    trainer_overrides: dict = field(default_factory=dict)
    reuse_model_path: str | None = None

    def __post_init__(self):
        size, kinds = self.vocab_size, ("byte", "pure_byte", "sentencepiece", "sentencepiece_bpe")
        if self.kind and self.kind not in kinds:
            raise UserError(f'the tokenizer kind "{self.kind}" is not known. Use one of {", ".join(kinds)}.')
        is_byte = "byte" in self.kind or not self.kind and self.dataset_suffix == "byte260"
        if not is_byte and (not isinstance(size, int) or not 260 < size <= 2**16):
            raise UserError(
                f'the tokenizer "{self.name}" has vocab_size {size!r}. It can be 261 to 65,536: 256 are bytes, and a '
                "shard has two bytes for a token."
            )
        limit = self.tokenizer_train_docs
        if limit is not None and not (type(limit) is int and limit > 0):
            raise UserError(f"tokenizer_train_docs is {limit!r}; it can be a whole number above 0, or be left out.")
        if is_byte and size not in (None, ByteTokenizer.vocab_size):
            raise UserError(f"the byte tokenizer has 260 tokens, and vocab_size {size} was asked for. Leave it out.")
        defaults = dict(kind="byte", name="pure_byte_260", dataset_suffix="byte260", vocab_size=260)
        if not is_byte:
            defaults = dict(kind="sentencepiece_bpe", name=f"sp_bpe_{size}", dataset_suffix=f"sp{size}")
            defaults["model_prefix"] = f"fineweb_{size}_bpe"
        for key, value in defaults.items():
            if key == "kind" or not getattr(self, key):
                object.__setattr__(self, key, value)

    @property
    def dataset_name(self) -> str:
        return f"fineweb10B_{self.dataset_suffix}"

    @property
    def file_name(self) -> str:
        """The tokenizer's file, in the folder `tokenizers`."""
        return self.filename if self.kind == "byte" else f"{self.model_prefix}.model"

    def as_json(self) -> dict:
        """The entry without what has no value, for spec files and manifests."""
        unused = {"filename"} if self.kind != "byte" else {"model_prefix"}
        return {key: value for key, value in asdict(self).items() if key not in unused and value not in (None, "", {})}


def parse_tokenizer_specs(content, origin: str = "the tokenizer specs") -> list[TokenizerSpec]:
    """Specs from a list, or from the list under `tokenizers` or `tokenizer_specs`. Raises UserError."""
    if isinstance(content, dict):
        content = content.get("tokenizer_specs", content.get("tokenizers"))
    if not isinstance(content, list) or not content or not all(isinstance(entry, dict) for entry in content):
        raise UserError(f'{origin} should be a list of objects that is not empty, or hold one as "tokenizers".')
    known, specs = [each.name for each in fields(TokenizerSpec)], []
    for entry in content:
        for key in entry:
            if key not in known:
                near = difflib.get_close_matches(key, known, 1)
                raise UserError(
                    f'{origin}: the key "{key}" is not known. '
                    + (f"Did you mean {near[0]}?" if near else f"Use {', '.join(known)}.")
                )
        specs.append(TokenizerSpec(**{key: value for key, value in entry.items() if value is not None}))
    for what in ("name", "dataset_name", "file_name"):
        values = [getattr(spec, what) for spec in specs]
        if len(set(values)) < len(values):
            twice = next(value for value in values if values.count(value) > 1)
            raise UserError(f'{origin}: two tokenizers have the {what.replace("_", " ")} "{twice}". Rename one.')
    return specs


def read_tokenizer_specs(path) -> list[TokenizerSpec]:
    """Specs from a JSON file. Raises UserError that names it."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"the tokenizer specs {path} cannot be read ({error}).") from error
    return parse_tokenizer_specs(content, str(path))


# %% [markdown]
# ### `make_tokenizer`
# From spec to file: train, copy, or just describe.


# %%
def make_tokenizer(spec: TokenizerSpec, texts: Iterable[str], folder) -> SentencePieceTokenizer | ByteTokenizer:
    """Write the tokenizer of a spec into `folder` and return it. texts: what it may learn from. Raises UserError."""
    path = Path(folder) / spec.file_name
    if spec.kind == "byte":
        write_atomic(path, ByteTokenizer().description())
        return ByteTokenizer()
    if spec.reuse_model_path:
        tokenizer = load_golf_tokenizer(Path(spec.reuse_model_path).expanduser(), spec.vocab_size)
    else:
        tokenizer = train_sentencepiece(texts, spec.vocab_size, spec.trainer_overrides)
    write_atomic(path, tokenizer.model)
    write_atomic(path.with_suffix(".vocab"), tokenizer.vocabulary())
    return tokenizer


# %% [markdown]
# ### `ByteTables`
# Whether a space is text depends on what stands before it: after the begin of a document there is none. So the bytes
# of a target need two looks, one at the token and one at the token before.


# %%
STREAM_PIECE = 2**22  # tokens at a time: the temporary tables of a whole stream would be gigabytes


class ByteTables(NamedTuple):
    """base_bytes: (V,) int16. has_leading_space, is_boundary: (V,) bool. Golf spec section 1.5."""

    base_bytes: torch.Tensor
    has_leading_space: torch.Tensor
    is_boundary: torch.Tensor

    def target_bytes(self, previous: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The bytes of each target, int64, in the shape of `targets`. previous: the token before each."""
        space = self.has_leading_space[targets] & ~self.is_boundary[previous]
        return self.base_bytes[targets].long() + space

    def stream_bytes(self, tokens: torch.Tensor) -> int:
        """The bytes of all targets of a stream, (N + 1,) tokens."""
        total = 0
        for start in range(0, len(tokens) - 1, STREAM_PIECE):
            piece = tokens[start : start + STREAM_PIECE + 1]
            total += int(self.target_bytes(piece[:-1], piece[1:]).sum())
        return total


# %% [markdown]
# ### `build_byte_tables`
# Lengths come from the pieces. To decode a token and measure the text would be wrong: a lone byte of a longer
# character decodes to a replacement mark, and that has three bytes.


# %%
def build_byte_tables(
    tokenizer: SentencePieceTokenizer | ByteTokenizer, vocab_size: int | None = None, device="cpu"
) -> ByteTables:
    """The tables of a tokenizer for ids up to the larger of its vocabulary and `vocab_size`. Golf spec section 1.5."""
    size = max(tokenizer.vocab_size, vocab_size or 0)
    base = torch.zeros(size, dtype=torch.int16)
    space, boundary = torch.zeros(size, dtype=torch.bool), torch.ones(size, dtype=torch.bool)
    if tokenizer.kind == "byte":
        base[BYTE_OFFSET : tokenizer.vocab_size] = 1
        boundary[BYTE_OFFSET : tokenizer.vocab_size] = False
        return ByteTables(base.to(device), space.to(device), boundary.to(device))
    pieces = tokenizer.processor
    for token in range(tokenizer.vocab_size):
        if pieces.is_control(token) or pieces.is_unknown(token) or pieces.is_unused(token):
            continue
        piece = pieces.id_to_piece(token)
        boundary[token] = False
        if pieces.is_byte(token):
            base[token] = 1
            continue
        space[token] = piece.startswith("▁")
        base[token] = len(piece.removeprefix("▁").encode("utf-8"))
    return ByteTables(base.to(device), space.to(device), boundary.to(device))


# %% [markdown]
# ### `BpbSums`
# Three sums and, at the very end, one division. Means of batches, and means of ratios even more, give short batches
# and short documents a weight that they do not have.


# %%
class BpbSums:
    """Nats, targets and bytes of what has been scored, in float64."""

    def __init__(self, device="cpu"):
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, nats: torch.Tensor, previous: torch.Tensor, targets: torch.Tensor, tables: ByteTables) -> None:
        """nats: −log probability of each target. previous: the token before each. All of the same shape."""
        n_bytes = tables.target_bytes(previous, targets).sum().double()
        self.sums += torch.stack([nats.double().sum(), torch.full_like(n_bytes, nats.numel()), n_bytes])

    def sum_over_ranks(self) -> "BpbSums":
        """Add the sums of all ranks, once. Every rank must call it."""
        if is_ddp_initialized():
            dist.all_reduce(self.sums)
        return self

    @property
    def val_loss(self) -> float:
        """Nats per target; nan before anything was added."""
        nats, targets, _ = self.sums.tolist()
        return nats / targets if targets else math.nan

    @property
    def val_bpb(self) -> float:
        """Bits per byte; inf when no byte was counted."""
        nats, _, n_bytes = self.sums.tolist()
        return nats / (math.log(2) * n_bytes) if n_bytes else math.inf
