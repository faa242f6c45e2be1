# %% [markdown]
# ## The engine
#
# To write the next token a model needs the keys and values of every token before it. `GPT.generate` recomputes them
# all, each time; the engine keeps them. The prompt is read once, its cache is shared out to as many samples as one
# wants, and from then on each step costs one token.
#
# Between the steps runs a small state machine: when the model writes an expression between two special tokens, the
# answer of a real calculator is put into its mouth.

# %%
import copy
import math
import random
import re
from collections import deque
from dataclasses import dataclass, field

import torch

from nanochat.runtime import UserError

# %% [markdown]
# ### The calculator
# Two things a language model is bad at and is allowed to ask for: arithmetic, and counting letters, written as Python
# writes them. The text comes from the model, so it may be anything. It is parsed by a grammar of a few lines instead
# of being run: there is nothing to escape from, no timer to set, and the work is bounded by the length of the text.

# %%
CALCULATOR_MAX_CHARS = 500  # bounds the time, and the digits of a product: they never exceed those of its factors
CALCULATOR_MAX_NESTING = 30

ARITHMETIC_TOKEN = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)|([-+*/()])|( +)")
COUNT_CALL = re.compile(r""" *('[^'\\]*'|"[^"\\]*") *\. *count *\( *('[^'\\]*'|"[^"\\]*") *\) *""")

# %% [markdown]
# ### `ArithmeticParser`
# One method for each line of the grammar; a product binds tighter than a sum because it is parsed further down.


# %%
class ArithmeticParser:
    """Evaluates a sum while reading it. Raises ValueError for text that is not one, ArithmeticError as Python would.

    sum     = product (("+" | "-") product)*
    product = signed (("*" | "/") signed)*
    signed  = ("+" | "-")* (number | "(" sum ")")
    """

    def __init__(self, text: str):
        self.tokens, end = deque(), 0
        while end < len(text):
            match = ARITHMETIC_TOKEN.match(text, end)
            if match is None:
                raise ValueError(f"unexpected {text[end]!r}")
            if not match[3]:
                self.tokens.append(match[0])
            end = match.end()
        self.nesting = 0

    def take(self, choices: str) -> str:
        """The next token if it is one of these characters, otherwise ""."""
        return self.tokens.popleft() if self.tokens and self.tokens[0] in choices else ""

    def value(self) -> int | float:
        result = self.sum()
        if self.tokens:
            raise ValueError(f"unexpected {self.tokens[0]!r}")
        return result

    def sum(self) -> int | float:
        result = self.product()
        while operator := self.take("+-"):
            right = self.product()
            result = result + right if operator == "+" else result - right
        return result

    def product(self) -> int | float:
        result = self.signed()
        while operator := self.take("*/"):
            right = self.signed()
            result = result * right if operator == "*" else result / right
        return result

    def signed(self) -> int | float:
        negative = False
        while sign := self.take("+-"):
            negative ^= sign == "-"
        result = self.group() if self.take("(") else self.number()
        return -result if negative else result

    def group(self) -> int | float:
        self.nesting += 1
        if self.nesting > CALCULATOR_MAX_NESTING:
            raise ValueError("too deeply nested")
        result = self.sum()
        self.nesting -= 1
        if not self.take(")"):
            raise ValueError("a parenthesis is not closed")
        return result

    def number(self) -> int | float:
        token = self.tokens.popleft() if self.tokens else ""
        if "." in token:
            return float(token)
        if len(token) > 1 and token[0] == "0" and token.strip("0"):
            raise ValueError(f"{token} has a leading zero, which Python does not allow")
        return int(token)  # a ValueError for an operator where a number belongs


# %% [markdown]
# ### `use_calculator`
# What the engine calls. Whatever is not a sum or a count gets no answer, and the model goes on without one.


# %%
def use_calculator(expression: str) -> int | float | None:
    """What Python gives for "(12 + 3) * 2" or "'banana'.count('a')" and the like; None for anything else.

    Commas in numbers are left out ("1,000"). Never raises. Spec sections 11.4, 21.23 and 21.24.
    """
    if len(expression) > CALCULATOR_MAX_CHARS:
        return None
    if count := COUNT_CALL.fullmatch(expression):
        text, part = count[1][1:-1], count[2][1:-1]
        return text.count(part) if expression.isprintable() else None
    try:
        result = ArithmeticParser(expression.replace(",", "")).value()
    except (ValueError, ArithmeticError):  # not a sum, division by zero, too large for a float
        return None
    return None if isinstance(result, float) and not math.isfinite(result) else result


# %% [markdown]
# ### `KVCache`
# One tensor each for the keys and the values of all layers, allocated once. The attention writes into it; how far it
# is filled stands beside it, once for each row, and twice: on the device, where the kernels want it, and in `lengths`,
# because asking a GPU for a number means waiting until it has done everything else.


# %%
class KVCache:
    """Keys and values of up to `seq_len` tokens: `k_cache` and `v_cache`, (num_layers, B, seq_len, H_kv, D) each."""

    def __init__(self, batch_size, num_heads, seq_len, head_dim, num_layers, device, dtype):
        shape = (num_layers, batch_size, seq_len, num_heads, head_dim)
        self.k_cache = torch.zeros(shape, device=device, dtype=dtype)
        self.v_cache = torch.zeros(shape, device=device, dtype=dtype)
        self.cache_seqlens = torch.zeros(batch_size, device=device, dtype=torch.int32)
        self.lengths = torch.zeros(batch_size, device="cpu", dtype=torch.int32)  # the same, without asking the device

    def bounds(self) -> tuple[int, int]:
        """How many tokens the emptiest and the fullest row hold."""
        lengths = self.lengths.tolist()
        return min(lengths), max(lengths)

    def longest(self) -> int:
        """How many tokens the fullest row holds."""
        return self.bounds()[1]

    def get_pos(self) -> int:
        """How many tokens each row holds. Raises ValueError when they differ."""
        shortest, longest = self.bounds()
        if shortest != longest:
            raise ValueError("the rows of this cache hold different numbers of tokens")
        return longest

    def get_layer_cache(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of one layer's keys and values, (B, seq_len, H_kv, D) each, for attention to read and write."""
        return self.k_cache[layer], self.v_cache[layer]

    def advance(self, n: int) -> None:
        """Count n more tokens. The model calls it once for each forward, when its last layer has written."""
        self.cache_seqlens += n
        self.lengths += n

    def set_lengths(self, lengths) -> None:
        """Say how much of each row counts, (B,): after a forward over padded rows, or to forget what follows."""
        self.lengths.copy_(torch.as_tensor(lengths, device="cpu"))
        self.cache_seqlens.copy_(self.lengths)

    def reset(self) -> None:
        """Forget everything."""
        self.set_lengths(0)

    def write_rows(self, rows, other: "KVCache", other_rows) -> None:
        """Replace `rows` of this cache by `other_rows` of another one, both (n,) numbers."""
        rows, other_rows = (torch.as_tensor(index, dtype=torch.long, device="cpu") for index in (rows, other_rows))
        lengths = other.lengths[other_rows]
        n = max(lengths.tolist(), default=0)
        if n > self.k_cache.size(2):
            raise ValueError(f"{n} tokens do not fit into a cache of {self.k_cache.size(2)}")
        self.lengths[rows] = lengths
        rows, other_rows = rows.to(self.k_cache.device), other_rows.to(self.k_cache.device)
        self.k_cache[:, rows, :n] = other.k_cache[:, other_rows, :n]
        self.v_cache[:, rows, :n] = other.v_cache[:, other_rows, :n]
        self.cache_seqlens[rows] = other.cache_seqlens[other_rows]

    def prefill(self, other: "KVCache") -> None:
        """Begin with what another cache holds; one row of it is shared out to all rows.

        Raises ValueError unless this cache is empty, of the same layers, heads and width, and large enough.
        """
        ours, theirs = self.k_cache.shape, other.k_cache.shape
        if self.longest() != 0:
            raise ValueError("only an empty cache can be prefilled")
        if (ours[0], ours[3:]) != (theirs[0], theirs[3:]) or theirs[1] not in (1, ours[1]) or ours[2] < theirs[2]:
            raise ValueError(f"a cache of shape {tuple(theirs)} does not fit into one of {tuple(ours)}")
        self.write_rows(range(ours[1]), other, range(ours[1]) if theirs[1] > 1 else [0] * ours[1])

    def part(self, first: int, stop: int) -> "KVCache":
        """Neighbouring rows as a cache of their own that shares this one's memory."""
        part = copy.copy(self)
        part.k_cache, part.v_cache = self.k_cache[:, first:stop], self.v_cache[:, first:stop]
        part.cache_seqlens, part.lengths = self.cache_seqlens[first:stop], self.lengths[first:stop]
        return part


# %% [markdown]
# ### `sample_next_token`
# Temperature 0 takes the likeliest token. Above it tokens are drawn with their probability, from all or from the
# `top_k` likeliest.


# %%
def sample_next_token(logits, rng: torch.Generator, temperature: float = 1.0, top_k: int | None = None):
    """One token for each row: logits (B, V) -> ids (B, 1) int64."""
    assert temperature >= 0, f"temperature is {temperature}; it cannot be negative"
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    if top_k is not None and top_k > 0:
        values, ids = logits.topk(min(top_k, logits.size(-1)), dim=-1)
        drawn = torch.multinomial((values / temperature).softmax(dim=-1), num_samples=1, generator=rng)
        return ids.gather(1, drawn)
    return torch.multinomial((logits / temperature).softmax(dim=-1), num_samples=1, generator=rng)


# %% [markdown]
# ### `RowState`
# What the engine knows about one of the texts that it writes side by side.


# %%
ENGINE_TOKENS = ("<|assistant_end|>", "<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>")


@dataclass(eq=False)  # two rows are not the same because they look the same
class RowState:
    """One sample in the making."""

    completed: bool = False
    in_python_block: bool = False
    expression_tokens: list[int] = field(default_factory=list)  # since the block began
    forced_tokens: deque[int] = field(default_factory=deque)  # to be said next, whatever the model would say


@dataclass(kw_only=True, eq=False)
class PromptRow(RowState):
    """One prompt of many, how to continue it, and its continuation so far."""

    prompt: list[int]
    max_tokens: int
    temperature: float = 0.0
    top_k: int | None = None
    seed: int = 42
    owner: object = None  # whatever tells the caller whose row this is
    tokens: list[int] = field(default_factory=list)  # forced ones too, the terminal one not
    first_logits: torch.Tensor | None = None  # (V,), of what comes after the prompt

    def __post_init__(self):
        self.rng = random.Random(self.seed)

    @property
    def finished(self) -> bool:
        return self.completed or len(self.tokens) == self.max_tokens


# %% [markdown]
# ### `sample_rows`
# The same for rows that each have a temperature, a `top_k` and a source of randomness of their own, without doing them
# one after the other: each row throws one number between 0 and 1, and where it falls among the piled up probabilities
# is the token.


# %%
def draw_tokens(logits, rows: list[PromptRow]):  # (B, V) -> (B, 1) int64
    """One token for each row, drawn. All rows have a top_k, or none has."""

    def column(values):
        return torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]

    limits = [min(row.top_k or logits.size(-1), logits.size(-1)) for row in rows]
    values, ids = logits.topk(max(limits)) if rows[0].top_k else (logits, None)
    # Below 1e-4 every temperature takes the likeliest token, and the division would overflow.
    weights = (values / column([max(row.temperature, 1e-4) for row in rows])).softmax(-1)
    if ids is not None:  # values are sorted: a row with a smaller top_k ignores the last ones
        weights = weights * (torch.arange(max(limits), device=logits.device) < column(limits))
    piled = weights.cumsum(-1)
    drawn = torch.searchsorted(piled, piled[:, -1:] * column([row.rng.random() for row in rows]), right=True)
    drawn = drawn.minimum(column(limits).long() - 1)  # a number that was rounded up to 1 falls behind the last
    return drawn if ids is None else ids.gather(1, drawn)


def sample_rows(logits, rows: list[PromptRow]) -> list[int]:  # (B, V), B rows -> B ids
    """The next token of each row, as its own temperature and top_k want it and drawn with its own generator."""
    tokens = logits.argmax(-1)
    for limited in (True, False):
        chosen = [i for i, row in enumerate(rows) if row.temperature > 0 and bool(row.top_k) == limited]
        if chosen:
            tokens[chosen] = draw_tokens(logits[chosen], [rows[i] for i in chosen])[:, 0]
    return tokens.tolist()


# %% [markdown]
# ### `DecodeBatch`
# Texts of different lengths written side by side, where any of them may leave and others come in at every step. An
# exam does that, and so does a server that talks to several people. A step costs what the rows cost that are there:
# the place of one that left is filled by the next that comes, or else by the last row.


# %%
class DecodeBatch:
    """Up to `slots` texts of up to `seq_len` tokens each. Their rows do not influence one another."""

    def __init__(self, engine: "Engine", slots: int, seq_len: int):
        self.engine, self.slots, self.seq_len = engine, slots, seq_len
        self.cache = engine.new_cache(slots, seq_len)
        self.places: list[PromptRow | None] = []  # who has which row of the cache; None where one has left
        self.special = {name: engine.tokenizer.encode_special(name) for name in ENGINE_TOKENS}
        self.terminal = (self.special["<|assistant_end|>"], engine.tokenizer.get_bos_token_id())

    @property
    def rows(self) -> list[PromptRow]:
        return [row for row in self.places if row is not None]

    @property
    def free(self) -> int:
        return self.slots - len(self.rows)

    def admit(self, rows: list[PromptRow]) -> None:
        """Read the prompts of new rows, all together. Raises ValueError when there is no place for them."""
        longest = max(len(row.prompt) + row.max_tokens for row in rows)
        if len(rows) > self.free or longest > self.seq_len:
            raise ValueError(
                f"{len(rows)} texts of up to {longest} tokens do not fit into {self.free} rows of {self.seq_len}"
            )
        prompts, logits = self.engine.read_prompts([row.prompt for row in rows])
        self.places += [None] * (self.slots - len(self.places))
        places = [i for i, row in enumerate(self.places) if row is None][: len(rows)]
        self.cache.write_rows(places, prompts, range(len(rows)))
        for place, row, first_logits in zip(places, rows, logits, strict=True):
            self.places[place], row.first_logits = row, first_logits

    def remove(self, row: PromptRow) -> None:
        """Forget a row before it is finished."""
        self.places[self.places.index(row)] = None

    def close_ranks(self) -> None:
        """Move the last rows into the places of those that have left."""
        n = len(self.rows)
        empty = [i for i in range(n) if self.places[i] is None]
        last = [i for i in range(n, len(self.places)) if self.places[i] is not None]
        if last:
            self.cache.write_rows(empty, self.cache, last)
        for place, origin in zip(empty, last, strict=True):
            self.places[place] = self.places[origin]
        del self.places[n:]

    @torch.no_grad()
    def step(self) -> list[PromptRow]:
        """Give each row its next token and return these rows; those that are finished with it have left the batch.

        The token is row.tokens[-1], or the terminal one when the row is completed.
        """
        self.close_ranks()
        rows, device = self.rows, self.cache.k_cache.device
        if not rows:
            return []
        new = [i for i, row in enumerate(rows) if row.first_logits is not None]
        logits = torch.empty(len(rows), self.engine.model.config.vocab_size, device=device)
        if len(new) < len(rows):
            cache = self.cache.part(0, len(rows))
            # What a new row writes here, behind its prompt, is overwritten by its own first token.
            cache.set_lengths([len(row.prompt) + max(0, len(row.tokens) - 1) for row in rows])
            ids = torch.tensor([[row.tokens[-1] if row.tokens else 0] for row in rows], device=device)
            logits = self.engine.model(ids, kv_cache=cache)[:, -1]
        if new:
            logits[new] = torch.stack([rows[i].first_logits for i in new])
        for row, token in zip(rows, sample_rows(logits, rows), strict=True):
            row.first_logits = None
            token = row.forced_tokens.popleft() if row.forced_tokens else token
            self.engine.advance_row(row, token, self.special, self.terminal)
            if not row.completed:
                row.tokens.append(token)
        self.places = [None if row.finished else row for row in rows]
        return rows


# %% [markdown]
# ### `Engine`
# Three ways to call it. `generate` yields a token of every row as soon as it exists, which is what a chat wants;
# `generate_batch` returns finished texts. `generate_many` takes a whole exam: hundreds of prompts, each of its own
# length, share a batch, and a row that is done makes room for the next. Nothing is computed after the last token.

# %%
REFILL_SHARE = 4  # new prompts are read when a quarter of the rows is free: reading them one by one is dear


# %%
class Engine:
    """Text generation with a KV cache and the calculator. Spec section 11.3.

    model: a `GPT`. tokenizer: gives `encode`, `decode`, `encode_special` and `get_bos_token_id`.
    """

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer

    def new_cache(self, batch_size: int, seq_len: int) -> KVCache:
        config, device = self.model.config, self.model.get_device()
        # For one query a row a CPU's attention is four times as fast in fp32 as in bf16.
        dtype = torch.float32 if device.type == "cpu" else self.model.compute_dtype
        return KVCache(batch_size, config.n_kv_head, seq_len, config.head_dim, config.n_layer, device, dtype)

    # no_grad, not inference_mode: what the model caches on the way must stay usable when training goes on
    @torch.no_grad()
    def generate(
        self,
        tokens: list[int],
        num_samples: int = 1,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 42,
    ):
        """Continue `tokens` (a prompt of at least one id) in `num_samples` ways.

        Yields (token_column, token_masks), two lists with one entry for each row: the next token, and 1 if the model
        chose it or 0 if the calculator forced it. A row is completed by <|assistant_end|> or <|bos|>, which is yielded;
        it goes on emitting until all are. max_tokens: None fills the model's sequence_len. Raises UserError when the
        prompt leaves no room, ValueError for arguments that make no sense.
        """
        if not tokens or num_samples < 1 or (max_tokens is not None and max_tokens < 0):
            raise ValueError("needed: a prompt of at least one token, num_samples >= 1, max_tokens >= 0")
        if max_tokens is None:
            max_tokens = self.model.config.sequence_len - len(tokens)
            if max_tokens < 1:
                raise UserError(
                    f"the prompt has {len(tokens)} tokens and the model's context {self.model.config.sequence_len}: "
                    "there is no room for an answer. Shorten the prompt, or set max_tokens to go beyond the context."
                )
        if max_tokens == 0:
            return
        device = self.model.get_device()
        rng = torch.Generator(device=device).manual_seed(seed)
        special = {name: self.tokenizer.encode_special(name) for name in ENGINE_TOKENS}
        terminal = (special["<|assistant_end|>"], self.tokenizer.get_bos_token_id())

        prompt_cache = self.new_cache(1, len(tokens))
        logits = self.model(torch.tensor([tokens], dtype=torch.long, device=device), kv_cache=prompt_cache)
        logits = logits[:, -1].expand(num_samples, -1)  # each row draws its own first token
        cache = self.new_cache(num_samples, len(tokens) + max_tokens)
        cache.prefill(prompt_cache)
        del prompt_cache

        rows = [RowState() for _ in range(num_samples)]
        for remaining in reversed(range(max_tokens)):
            column, masks = sample_next_token(logits, rng, temperature, top_k)[:, 0].tolist(), []
            for i, row in enumerate(rows):
                masks.append(0 if row.forced_tokens else 1)
                if row.forced_tokens:
                    column[i] = row.forced_tokens.popleft()
                self.advance_row(row, column[i], special, terminal)
            yield column, masks
            if remaining == 0 or all(row.completed for row in rows):
                return
            ids = torch.tensor(column, dtype=torch.long, device=device)[:, None]
            logits = self.model(ids, kv_cache=cache)[:, -1]

    def generate_many(
        self,
        prompts: list[list[int]],
        max_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        seed: int = 42,
        batch_size: int = 32,
    ):
        """Continue many prompts of different lengths, up to `batch_size` at a time.

        Yields (index, tokens) for each prompt as soon as its text is finished, in no particular order: the
        continuation with forced tokens and without the terminal one. A finished row makes room for a prompt that
        waits. No answer depends on the other prompts: greedily it is the one of `generate`, and when sampling each
        prompt draws from its own generator, seeded with seed + index.
        """
        if not all(prompts) or max_tokens < 1 or batch_size < 1:
            raise ValueError("needed: prompts of at least one token each, max_tokens >= 1, batch_size >= 1")
        if not prompts:
            return
        # Similar lengths are read together, with little padding; the longest first: they need the most memory.
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        waiting = deque(
            PromptRow(prompt=prompts[index], max_tokens=max_tokens, temperature=temperature, top_k=top_k,
                      seed=seed + index, owner=index)
            for index in order
        )  # fmt: skip
        batch = DecodeBatch(self, min(batch_size, len(prompts)), len(waiting[0].prompt) + max_tokens)
        while waiting or batch.rows:
            if waiting and batch.free >= min(len(waiting), batch.slots / REFILL_SHARE):
                batch.admit([waiting.popleft() for _ in range(min(batch.free, len(waiting)))])
            for row in batch.step():
                if row.finished:
                    yield row.owner, row.tokens

    @torch.no_grad()
    def read_prompts(self, prompts: list[list[int]]) -> tuple[KVCache, torch.Tensor]:
        """A cache that holds each prompt in its row, and the logits (B, V) of what comes after them."""
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        cache = self.new_cache(*ids.shape)
        device = self.model.get_device()
        hidden = self.model.trunk(ids.to(device), cache, ends=lengths.to(device))  # (B, 1, C)
        cache.set_lengths(lengths)  # what was written for the padding behind them is forgotten
        return cache, self.model.head(hidden[:, 0])

    def advance_row(self, row: RowState, token: int, special: dict[str, int], terminal: tuple[int, ...]) -> None:
        """Follow one new token of a row: the end of the text, or the calculator's opening and closing tokens."""
        if token in terminal:
            row.completed = True
        elif token == special["<|python_start|>"]:
            row.in_python_block, row.expression_tokens = True, []
        elif token == special["<|python_end|>"] and row.in_python_block:
            row.in_python_block = False
            result = use_calculator(self.tokenizer.decode(row.expression_tokens)) if row.expression_tokens else None
            if result is not None:
                answer = self.tokenizer.encode(str(result))
                row.forced_tokens.extend([special["<|output_start|>"], *answer, special["<|output_end|>"]])
        elif row.in_python_block:
            row.expression_tokens.append(token)

    def generate_batch(self, tokens: list[int], num_samples: int = 1, **kwargs):
        """(results, masks), lists with one list for each row: prompt and continuation, without the terminal token.

        A mask is 1 where the model chose the token, 0 in the prompt and in forced tokens. kwargs: as for `generate`.
        """
        terminal = (self.tokenizer.encode_special("<|assistant_end|>"), self.tokenizer.get_bos_token_id())
        results, masks = [list(tokens) for _ in range(num_samples)], [[0] * len(tokens) for _ in range(num_samples)]
        completed = [False] * num_samples
        for column, column_masks in self.generate(tokens, num_samples, **kwargs):
            for i, (token, mask) in enumerate(zip(column, column_masks, strict=True)):
                completed[i] = completed[i] or token in terminal
                if not completed[i]:
                    results[i].append(token)
                    masks[i].append(mask)
        return results, masks
