# %% [markdown]
# ## Tokenizer
#
# A language model reads numbers, so text is first cut into pieces from a fixed list. Byte pair encoding makes that
# list from the text itself: begin with the 256 bytes, then again and again glue together the two neighbours that
# occur most often. Common words end up as one token, rare ones as a few, and because every byte is in the list,
# nothing is ever unknown.
#
# `rustbpe` counts and merges, `tiktoken` applies the result, and both are fast. What they leave on disk is plain text
# that can be read, compared and checked.

# %%
import base64
import hashlib
import json
import os
import sys
from pathlib import Path

import pyarrow.parquet as pq
import rustbpe
import tiktoken
import tokenizers
import torch
from tqdm import tqdm

from nanochat.dataset import read_row_group
from nanochat.runtime import UserError, get_base_dir, get_dist_info, print0, write_atomic

# %% [markdown]
# ### Special tokens and the split pattern
# Special tokens mark structure: where a document begins, who speaks, what the calculator answered. No text can
# produce them, not even text that spells them out.
#
# The pattern cuts text into chunks before any merging, and merges never cross a cut. It is GPT-4's with one change:
# digits go in pairs instead of threes, which saves vocabulary in a small model (0.965 bits per byte against 0.972 at
# 12 layers).

# %%
SPECIAL_TOKENS = (
    "<|bos|>",  # begins every document and every conversation
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",  # the assistant calls the calculator
    "<|python_end|>",
    "<|output_start|>",  # the calculator answers
    "<|output_end|>",
)

SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)

# %% [markdown]
# ### Reading the vocabulary file
# One token per line, in base64, with its number: tiktoken's own format. Line n holds rank n − 1, so a line that is
# missing, repeated or damaged can be named.


# %%
def read_tiktoken_ranks(path) -> dict[bytes, int]:
    """Token bytes → rank from a tiktoken text file. Raises UserError naming file and line when it is damaged."""
    path = Path(path)
    advice = "The file is damaged: restore a copy or train the tokenizer again."
    ranks: dict[bytes, int] = {}
    for line_number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line:
            continue
        place = f"{path}, line {line_number}:"
        try:
            encoded, rank_text = line.split(b" ")
            token, rank = base64.b64decode(encoded, validate=True), int(rank_text)
        except ValueError:
            raise UserError(f"{place} {line[:40]!r} is not a base64 token, a space and a rank. {advice}") from None
        if rank != line_number - 1:
            raise UserError(f"{place} rank {rank} where {line_number - 1} belongs (rank missing or repeated). {advice}")
        if not token or token in ranks:
            raise UserError(f"{place} token {token!r} is empty or a duplicate of rank {ranks.get(token)}. {advice}")
        ranks[token] = rank
    lost = [value for value in range(256) if bytes([value]) not in ranks]
    if lost:
        raise UserError(f"{path} has {len(ranks)} tokens and none of them is the single byte {lost[0]}. {advice}")
    return ranks


# %% [markdown]
# ### Checking a conversation
# A chat is a list of messages, and training data is full of lists that are almost right. Saying which message is
# wrong, and how, saves an evening.


# %%
def check_conversation(conversation) -> list[dict]:
    """The messages to render, user first, with a leading system message merged into the user's. Nothing is mutated.

    Raises ValueError that names the message (counted from 1) and what is wrong with it. Spec section 5.5.
    """
    messages = conversation.get("messages") if isinstance(conversation, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError('a conversation is a dict with "messages", a list of at least one {"role", "content"} dict')
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise ValueError(f'message {number} is not a dict with "role" and "content": {message!r:.80}')
    first = 1  # the number that the first rendered message has in the original list
    if messages[0]["role"] == "system":
        first = 2
        if len(messages) < 2 or messages[1]["role"] != "user":
            raise ValueError("message 1 has the role 'system', so message 2 must exist and have the role 'user'")
        for number, message in enumerate(messages[:2], start=1):
            if not isinstance(message["content"], str):
                raise ValueError(f"message {number} ({message['role']}) must have a string as content")
        merged = messages[0]["content"] + "\n\n" + messages[1]["content"]
        messages = [{**messages[1], "content": merged}, *messages[2:]]
    for index, message in enumerate(messages):
        expected = "assistant" if index % 2 else "user"
        if message["role"] != expected:
            raise ValueError(f"message {first + index} has the role {message['role']!r} where {expected!r} belongs")
        if expected == "user" and not isinstance(message["content"], str):
            raise ValueError(f"message {first + index} (user) must have a string as content")
        if expected == "assistant":
            check_assistant_content(message["content"], first + index)
    return messages


def check_assistant_content(content, number: int) -> None:
    """Raise ValueError unless `content` is a string or a list of {"type", "text"} parts; `number` is its message's."""
    if isinstance(content, str):
        return
    if not isinstance(content, list):
        raise ValueError(f"message {number} (assistant) must have a string or a list of parts as content")
    for part_number, part in enumerate(content, start=1):
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise ValueError(f'message {number}, part {part_number} is not a dict with "type" and a string "text"')
        if part.get("type") not in ("text", "python", "python_output"):
            raise ValueError(
                f"message {number}, part {part_number} has the unknown type {part.get('type')!r}; "
                "it can be text, python or python_output"
            )


# %% [markdown]
# ### `RustBPETokenizer`
# The tokenizer of everything that follows. Merged tokens come first, special ones after them: with 32,768 entries
# `<|bos|>` is 32,759.
#
# When a conversation is rendered, each token comes with a mask: 1 where the assistant speaks, which is what chat
# training learns from, and 0 where it only listens.


# %%
class RustBPETokenizer:
    """Byte-level BPE: trained by rustbpe, applied by tiktoken, stored as text. Spec section 5.4."""

    def __init__(self, encoding: tiktoken.Encoding, bos_token: str):
        self.encoding = encoding
        self.special_ids: dict[str, int] = dict(encoding._special_tokens)
        self.bos_token = bos_token
        self.bos_token_id = self.encode_special(bos_token)

    @classmethod
    def train_from_iterator(cls, text_iterator, vocab_size: int) -> "RustBPETokenizer":
        """Learn `vocab_size` entries (special tokens included) from an iterator of strings.

        Raises UserError when vocab_size leaves no room for the bytes, or the text runs out of pairs to merge.
        """
        n_ranks = vocab_size - len(SPECIAL_TOKENS)
        if n_ranks < 256:
            raise UserError(
                f"vocab_size {vocab_size} is too small: 256 bytes and {len(SPECIAL_TOKENS)} special tokens need at "
                f"least {256 + len(SPECIAL_TOKENS)}."
            )
        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(text_iterator, n_ranks, pattern=SPLIT_PATTERN)
        ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
        if len(ranks) < n_ranks:
            reached = len(ranks) + len(SPECIAL_TOKENS)
            raise UserError(
                f"the training text is too small for vocab_size {vocab_size}: it has no pairs left to merge after "
                f"{reached} entries. Use more text, or a vocab_size of at most {reached}."
            )
        special_ids = {name: n_ranks + index for index, name in enumerate(SPECIAL_TOKENS)}
        encoding = tiktoken.Encoding(
            name="rustbpe", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=special_ids
        )
        return cls(encoding, "<|bos|>")

    @classmethod
    def from_pretrained(cls, tiktoken_name: str) -> "RustBPETokenizer":
        """A published encoding such as gpt2 or cl100k_base (tiktoken downloads it)."""
        return cls(tiktoken.get_encoding(tiktoken_name), "<|endoftext|>")

    @classmethod
    def from_directory(cls, tokenizer_dir) -> "RustBPETokenizer":
        """Load what `save` wrote. Raises UserError naming the file, and the line if there is one, that is damaged."""
        ranks_path = Path(tokenizer_dir) / "tokenizer.tiktoken"
        config_path = Path(tokenizer_dir) / "tokenizer_config.json"
        for path in (ranks_path, config_path):
            if not path.is_file():
                raise UserError(f"there is no {path}. Train the tokenizer first, or point to a folder that has one.")
        try:
            config = json.loads(config_path.read_bytes())
            pattern, special_ids, bos_token = config["pattern"], config["special_tokens"], config["bos_token"]
            vocab_size, n_tokens, checksum = config["vocab_size"], config["merged_tokens"], config["tokens_sha256"]
            special_ids = {str(name): int(token_id) for name, token_id in special_ids.items()}
        except json.JSONDecodeError as error:
            raise UserError(f"{config_path}, line {error.lineno}: not JSON ({error.msg}).") from None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{config_path} lacks an entry or has a wrong one ({error!r}).") from None
        ranks = read_tiktoken_ranks(ranks_path)
        if len(ranks) != n_tokens:
            raise UserError(
                f"{ranks_path} ends at line {len(ranks)}, but {config_path.name} promises {n_tokens} tokens. One of "
                "the two is damaged or from another tokenizer."
            )
        taken = set(ranks.values()) | set(special_ids.values())
        if len(taken) != len(ranks) + len(special_ids) or max(taken) + 1 != vocab_size:
            raise UserError(
                f"{config_path} promises vocab_size {vocab_size}, but its {len(special_ids)} special tokens and the "
                f"{len(ranks)} others have {len(taken)} different ids, the highest {max(taken)}. The file is damaged."
            )
        if hashlib.sha256(ranks_path.read_bytes()).hexdigest() != checksum:
            raise UserError(f"{ranks_path} is not the file that {config_path.name} was saved with (sha256 differs).")
        try:
            encoding = tiktoken.Encoding(
                name="rustbpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_ids
            )
            return cls(encoding, bos_token)
        except ValueError as error:
            raise UserError(f"{config_path} has a wrong pattern or bos_token ({error}).") from None

    def serialize(self) -> tuple[bytes, bytes]:
        """The content of `tokenizer.tiktoken` and of `tokenizer_config.json`."""
        by_rank = sorted(self.encoding._mergeable_ranks.items(), key=lambda item: item[1])
        tokens = b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in by_rank)
        config = {
            "pattern": self.encoding._pat_str,
            "special_tokens": self.special_ids,
            "bos_token": self.bos_token,
            "vocab_size": self.get_vocab_size(),
            "merged_tokens": len(by_rank),
            "tokens_sha256": hashlib.sha256(tokens).hexdigest(),
        }
        return tokens, (json.dumps(config, indent=2) + "\n").encode()

    def save(self, tokenizer_dir) -> None:
        """Write both files; the config goes last, so that an interrupted save is noticed when loading."""
        tokens, config = self.serialize()
        write_atomic(Path(tokenizer_dir) / "tokenizer.tiktoken", tokens)
        write_atomic(Path(tokenizer_dir) / "tokenizer_config.json", config)

    def fingerprint(self) -> str:
        """sha256 over both files: two tokenizers with the same fingerprint give the same ids for every text."""
        return hashlib.sha256(b"".join(self.serialize())).hexdigest()

    def get_vocab_size(self) -> int:
        return self.encoding.n_vocab

    def get_special_tokens(self) -> set[str]:
        return set(self.special_ids)

    def get_bos_token_id(self) -> int:
        return self.bos_token_id

    def id_to_token(self, token_id: int) -> str:
        return self.encoding.decode([token_id])

    def decode_single_token_bytes(self, token_id: int) -> bytes:
        return self.encoding.decode_single_token_bytes(token_id)

    def encode_special(self, text: str) -> int:
        """The id of a special token. Raises ValueError for anything else."""
        if text not in self.special_ids:
            raise ValueError(f"{text!r} is not a special token; this tokenizer has: {', '.join(self.special_ids)}")
        return self.special_ids[text]

    def encode(self, text, prepend=None, append=None, num_threads: int = 8) -> list:
        """Token ids of a string (list[int]), or of a list of strings (list[list[int]]) on several threads.

        prepend, append: an id or the name of a special token. Special tokens spelled out in the text stay text.
        Raises ValueError when `text` is neither a string nor a list.
        """
        before, after = (
            [] if extra is None else [extra if isinstance(extra, int) else self.encode_special(extra)]
            for extra in (prepend, append)
        )
        if isinstance(text, str):
            return before + self.encoding.encode_ordinary(text) + after
        if isinstance(text, list):
            encoded = self.encoding.encode_ordinary_batch(text, num_threads=num_threads)
            return [before + ids + after for ids in encoded]
        raise ValueError(f"only a string or a list of strings can be encoded, not {type(text).__name__}")

    __call__ = encode

    def decode(self, ids: list[int]) -> str:
        """Text of these ids, special tokens included; bytes that are not UTF-8 become U+FFFD."""
        return self.encoding.decode(ids)

    def render_conversation(self, conversation: dict, max_tokens: int = 2048) -> tuple[list[int], list[int]]:
        """Ids of a conversation and their mask (1: learn to say this), both cut to `max_tokens`.

        Raises ValueError that says which message is wrong. Spec section 5.5.
        """
        ids, mask = [self.bos_token_id], [0]

        def add(supervised: int, text: str, start: str | None = None, end: str | None = None) -> None:
            new = self.encode(text, prepend=start, append=end)
            ids.extend(new)
            mask.extend([supervised] * len(new))

        for message in check_conversation(conversation):
            content = message["content"]
            if message["role"] == "user":
                add(0, content, "<|user_start|>", "<|user_end|>")
                continue
            add(0, "", "<|assistant_start|>")
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                if part["type"] == "text":
                    add(1, part["text"])
                elif part["type"] == "python":
                    add(1, part["text"], "<|python_start|>", "<|python_end|>")
                else:  # the calculator writes this while the model waits, so there is nothing to learn
                    add(0, part["text"], "<|output_start|>", "<|output_end|>")
            add(1, "", end="<|assistant_end|>")
        return ids[:max_tokens], mask[:max_tokens]

    def render_for_completion(self, conversation: dict) -> list[int]:
        """Ids of a conversation without its final assistant message, ready for the assistant to speak.

        Raises ValueError when the last message is not the assistant's.
        """
        messages = check_conversation(conversation)
        if messages[-1]["role"] != "assistant":
            raise ValueError("the last message must be the assistant's, to be dropped and written anew")
        ids, _ = self.render_conversation({"messages": messages[:-1]})
        return ids + [self.encode_special("<|assistant_start|>")]

    def visualize_tokenization(self, ids: list[int], mask: list[int], with_token_id: bool = False) -> str:
        """Tokens separated by | for a terminal: green where the mask is 1, red where it is 0."""
        green, red, grey, plain = "\033[92m", "\033[91m", "\033[90m", "\033[0m"
        shown = []
        for token_id, supervised in zip(ids, mask, strict=True):
            number = f"{grey}({token_id}){plain}" if with_token_id else ""
            shown.append(f"{green if supervised else red}{self.decode([token_id])}{plain}{number}")
        return "|".join(shown)


# %% [markdown]
# ### `HuggingFaceTokenizer`
# The same interface over Hugging Face's library, for models that come with a `tokenizer.json`. Its trainer arrives at
# almost the same vocabulary.


# %%
class HuggingFaceTokenizer:
    """A thin wrapper of `tokenizers.Tokenizer`. Spec section 5.3."""

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(cls, hf_path: str) -> "HuggingFaceTokenizer":
        """The tokenizer of a model on the Hugging Face hub."""
        return cls(tokenizers.Tokenizer.from_pretrained(hf_path))

    @classmethod
    def from_directory(cls, tokenizer_dir) -> "HuggingFaceTokenizer":
        """Load `tokenizer.json`. Raises UserError when there is none, or it cannot be read."""
        path = Path(tokenizer_dir) / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"there is no {path}. Point to a folder that has a tokenizer.json.")
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path} cannot be read as a tokenizer ({error}).") from None

    @classmethod
    def train_from_iterator(cls, text_iterator, vocab_size: int) -> "HuggingFaceTokenizer":
        """Learn `vocab_size` entries from an iterator of strings; special tokens get the lowest ids."""
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token=None, fuse_unk=False))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
            [
                tokenizers.pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), behavior="isolated", invert=False),
                tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            show_progress=True,
            min_frequency=0,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=list(SPECIAL_TOKENS),
        )
        tokenizer.train_from_iterator(text_iterator, trainer)
        return cls(tokenizer)

    def save(self, tokenizer_dir) -> None:
        write_atomic(Path(tokenizer_dir) / "tokenizer.json", self.tokenizer.to_str(pretty=True))

    def get_vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size()

    def get_special_tokens(self) -> set[str]:
        return {token.content for token in self.tokenizer.get_added_tokens_decoder().values()}

    def id_to_token(self, token_id: int) -> str | None:
        return self.tokenizer.id_to_token(token_id)

    def encode_special(self, text: str) -> int | None:
        """The id of a special token, None when there is no such token."""
        return self.tokenizer.token_to_id(text)

    def get_bos_token_id(self) -> int:
        for name in ("<|bos|>", "<|endoftext|>"):
            if (token_id := self.encode_special(name)) is not None:
                return token_id
        raise AssertionError("this tokenizer has neither <|bos|> nor <|endoftext|>, so no token can begin a document")

    def encode(self, text, prepend=None, append=None, num_threads=None) -> list:
        """As `RustBPETokenizer.encode`; the library chooses its own number of threads."""
        if isinstance(text, list):
            return [self.encode(one, prepend, append) for one in text]
        if not isinstance(text, str):
            raise ValueError(f"only a string or a list of strings can be encoded, not {type(text).__name__}")
        before, after = (
            [] if extra is None else [extra if isinstance(extra, int) else self.encode_special(extra)]
            for extra in (prepend, append)
        )
        return before + self.tokenizer.encode(text, add_special_tokens=False).ids + after

    __call__ = encode

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)


# %% [markdown]
# ### `tokenizer_training_texts`
# Two billion characters are plenty to see which pairs are common, and no single document may have more than ten
# thousand of them, so that one endless page cannot bend the vocabulary.


# %%
def tokenizer_training_texts(corpus_files, text_column: str, max_chars: int, doc_cap: int):
    """Yield documents in file order, each cut to `doc_cap` characters; the one that exceeds `max_chars` is the last."""
    footers = [pq.read_metadata(path) for path in corpus_files]
    n_bytes = sum(footer.row_group(i).total_byte_size for footer in footers for i in range(footer.num_row_groups))
    seen = 0
    with tqdm(
        total=min(max_chars, n_bytes), desc="reading text for the tokenizer", unit="char", unit_scale=True,
        file=sys.stdout, mininterval=1, disable=get_dist_info()[1] != 0,
    ) as bar:  # fmt: skip
        for path, footer in zip(corpus_files, footers, strict=True):
            for index in range(footer.num_row_groups):
                before = seen
                for text in read_row_group(path, index, text_column):
                    text = text[:doc_cap]
                    seen += len(text)
                    yield text
                    if seen > max_chars:
                        bar.update(seen - before)
                        return
                bar.update(seen - before)


# %% [markdown]
# ### `train_tokenizer`
# Only training files may be given here: a vocabulary that has seen the validation text flatters the model.


# %%
def train_tokenizer(
    corpus_files, text_column: str, vocab_size: int, max_chars: int = 2_000_000_000, doc_cap: int = 10_000
) -> RustBPETokenizer:
    """Train a tokenizer on parquet files (training ones only) and check that it gives back what it is given.

    Raises UserError when vocab_size is too small, or too large for the text. Spec section 5.6.
    """
    texts = tokenizer_training_texts(corpus_files, text_column, max_chars, doc_cap)
    tokenizer = RustBPETokenizer.train_from_iterator(texts, vocab_size)
    sample = "It's 1234 o'clock, isn't it? <|bos|> {x} += [3.14];\r\n\t naïve · 你好，世界 · 한국어 · 🙂🏳️‍🌈 "
    if tokenizer.decode(tokenizer.encode(sample)) != sample:
        raise AssertionError(f"the new tokenizer does not give back {sample!r}")
    print0(f"Trained a tokenizer with {tokenizer.get_vocab_size():,} entries")
    return tokenizer


# %% [markdown]
# ### `get_tokenizer` and `get_token_bytes`
# How many bytes of text each token stands for. Bits per byte divides by this, and counts raw bytes: half a Chinese
# character is one or two bytes, not the three of the replacement character it would be shown as.


# %%
def get_tokenizer(tokenizer_dir=None) -> RustBPETokenizer:
    """Load the tokenizer of `tokenizer_dir`, by default `<base>/tokenizer`. Raises UserError when there is none."""
    return RustBPETokenizer.from_directory(tokenizer_dir or os.path.join(get_base_dir(), "tokenizer"))


def get_token_bytes(device="cpu", tokenizer: RustBPETokenizer | None = None) -> torch.Tensor:
    """(V,) int32: the number of bytes of each token, 0 for special tokens. Spec section 5.6."""
    tokenizer = get_tokenizer() if tokenizer is None else tokenizer
    lengths = [0] * tokenizer.get_vocab_size()
    for token, rank in tokenizer.encoding._mergeable_ranks.items():
        lengths[rank] = len(token)
    return torch.tensor(lengths, dtype=torch.int32, device=device)


def describe_token_bytes(token_bytes: torch.Tensor) -> dict:
    """What the report says about a vocabulary; statistics are over tokens that are text. Spec section 5.6."""
    text = token_bytes[token_bytes > 0].double()
    return {
        "num_special_tokens": int((token_bytes == 0).sum()),
        "token_bytes_min": int(text.min()),
        "token_bytes_max": int(text.max()),
        "token_bytes_mean": text.mean().item(),
        "token_bytes_std": text.std().item(),
    }
