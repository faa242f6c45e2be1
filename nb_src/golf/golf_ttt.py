# %% [markdown]
# ## Test-time training
#
# Evaluation may take ten minutes on eight GPUs, and the text that has been scored is known. A model may learn from it,
# as long as it only ever scores what it has not yet seen: score first, then train, and never go back.
#
# There are two ways. The first reads the text as one long stream: it scores a chunk, takes a few steps of gradient
# descent (SGD) on it, and keeps what it learned for all that follows. The second takes every document for itself: small
# adapters (LoRA: low-rank additions to a few matrices), new for each document, learn while it is read and are thrown
# away at its end. Documents do not know of each other then, so many are read side by side.
#
# Target t means: predict token t + 1 from tokens 0 to t.

# %%
import math
import re
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from golf.golf_gpt import GolfModel
from golf.golf_optim import reduce_gradients
from golf.golf_scoring import report_scores, scoring_windows, share_of_windows, window_losses
from golf.golf_tokenizers import BOS_ID, BpbSums, ByteTables
from nanochat.runtime import UserError, is_ddp_initialized

# %% [markdown]
# ### `TTTSettings`
# The names and values of the challenge, in lower case.


# %%
@dataclass(frozen=True)
class TTTSettings:
    """Golf spec section 4.8. Raises UserError for what cannot work.

    The first form trains the weights that have ttt_params in their names ("all": every weight), in the blocks
    ttt_layers ("all", or numbers such as "0,2"). ttt_lora_rank and what follows it belong to the second form.
    """

    ttt_chunk_tokens: int = 32768
    ttt_epochs: int = 3
    ttt_lr: float = 0.005
    ttt_momentum: float = 0.9
    ttt_grad_clip: float = 1.0
    ttt_batch_seqs: int = 32  # over all processes
    ttt_params: str = "mlp.proj"
    ttt_layers: str = "all"
    ttt_lora_rank: int = 8
    ttt_lora_lr: float = 0.01
    ttt_chunk_size: int = 256
    ttt_eval_seq_len: int = 1024
    ttt_batch_size: int = 64  # documents on each process

    def __post_init__(self):
        counts = ("chunk_tokens", "epochs", "batch_seqs", "lora_rank", "chunk_size", "batch_size")
        for name in (f"ttt_{count}" for count in counts):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("ttt_lr", "ttt_grad_clip", "ttt_lora_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)}; it must be above 0.")
        if not 0 <= self.ttt_momentum < 1:
            raise UserError(f"ttt_momentum is {self.ttt_momentum}; it lies in [0, 1).")
        if self.ttt_eval_seq_len < self.ttt_chunk_size:
            raise UserError(
                f"ttt_eval_seq_len {self.ttt_eval_seq_len} is shorter than ttt_chunk_size {self.ttt_chunk_size}: a "
                "chunk is scored at once and must fit. Shorten the chunk or lengthen the context."
            )
        if self.ttt_layers != "all" and not re.fullmatch(r"\d+(,\d+)*", self.ttt_layers):
            raise UserError(f'ttt_layers is "{self.ttt_layers}"; it can be "all" or block numbers such as "0,2".')


# %% [markdown]
# ### `ttt_parameters`
# By default the matrices that write the MLPs' answers into the stream: much can be stored there, and little breaks.


# %%
def ttt_parameters(model: GolfModel, settings: TTTSettings) -> list[nn.Parameter]:
    """The weights that the first form trains. Raises UserError when there are none, or when they are not fp32."""
    layers = None if settings.ttt_layers == "all" else {int(layer) for layer in settings.ttt_layers.split(",")}
    if layers is not None and max(layers) >= len(model.blocks):
        raise UserError(f"ttt_layers names block {max(layers)}, and the model has blocks 0 to {len(model.blocks) - 1}.")
    chosen = {}
    for name, parameter in model.named_parameters():
        block = re.search(r"blocks\.(\d+)\.", name)
        in_layers = layers is None or block is not None and int(block[1]) in layers
        if in_layers and (settings.ttt_params == "all" or settings.ttt_params in name):
            chosen[name] = parameter
    if not chosen:
        raise UserError(f'no weight has "{settings.ttt_params}" in its name. Use ttt_params "mlp.proj" or "all".')
    for name, parameter in chosen.items():
        if parameter.dtype != torch.float32:
            raise UserError(f"{name} is {parameter.dtype}, which swallows small steps. Load the weights in float32.")
    return list(chosen.values())


# %% [markdown]
# ### `require_equal_weights`
# Every process takes every step by itself. If two of them ever disagree in one bit, they no longer score with the same
# model, and nothing in the result would show it.


# %%
@torch.no_grad()
def require_equal_weights(parameters: list[nn.Parameter], when: str) -> None:
    """Raise RuntimeError on all ranks unless the fp32 weights are the same on all. Every rank must call it."""
    if is_ddp_initialized():
        sums = torch.stack([p.view(torch.int32).sum(dtype=torch.int64) for p in parameters])
        extremes = torch.cat([sums, -sums])
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
        if not torch.equal(extremes[: len(sums)], -extremes[len(sums) :]):
            raise RuntimeError(f"the adapted weights differ between processes {when}")


# %% [markdown]
# ### `train_on_chunk`
# Sequences are divided over the processes and their losses summed. The sum of all gradients is divided by the number
# of all tokens, so that it does not matter who had how many, or in how many parts they went through the model. That
# sum is also what makes everybody wait: no process can take a step before all have finished scoring the chunk.


# %%
def train_on_chunk(
    model, parameters, optimizer, stream, chunk: range, length: int, settings, at_once: int, device, watch
) -> None:
    """Train some epochs on the targets of a chunk, in whole sequences of `length`. Every rank must call it.

    at_once: the most sequences in one forward and backward.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if is_ddp_initialized() else (0, 1)
    starts = range(chunk.start, chunk.stop - length + 1, length)
    for _ in range(settings.ttt_epochs):
        for i in range(0, len(starts), settings.ttt_batch_seqs):
            batch = starts[i : i + settings.ttt_batch_seqs]
            optimizer.zero_grad()
            mine = share_of_windows(batch, rank, world_size)
            if mine:
                tokens = stream[mine[0] : mine[-1] + length + 1].to(device, torch.int64)
                for rows in tokens.unfold(0, length + 1, length).split(at_once):
                    model(rows[:, :-1], rows[:, 1:], reduction="sum").backward(inputs=parameters)
            reduce_gradients(parameters, 1 / (len(batch) * length))
            nn.utils.clip_grad_norm_(parameters, settings.ttt_grad_clip)
            if watch is not None:
                watch.updated(range(batch[0], batch[-1] + length))
            optimizer.step()


# %% [markdown]
# ### `score_with_sgd_ttt`
# The first form. Windows slide as in plain scoring; a window belongs to the chunk of the first target that it scores,
# so by the end of a chunk all its targets have their score. Weights and momentum live on from chunk to chunk, also over
# the borders of documents, and the learning rate falls to zero along a cosine. After the last chunk nothing is left to
# score, so nothing is learned from it. In the end the model gets its own weights back.

# %%
CHECKSUM_EVERY = 100  # chunks


def score_with_sgd_ttt(
    model: GolfModel,
    stream,
    byte_tables,
    length: int,
    stride: int,
    settings: TTTSettings,
    batch_windows: int = 32,
    device=None,
    watch=None,
) -> BpbSums:
    """Score every target of a stream once, and train on each chunk once it is scored. Golf spec 4.8, form 1.

    stream, byte_tables, length, stride, device: as for `score_stream`. batch_windows: as there, and the most sequences
    that are trained on at once; it changes no step. watch: as there; it also hears updated(targets) right before each
    step, with the targets of all processes. Every rank must call it, and all get the same sums. Raises UserError when a
    chunk cannot hold one sequence.
    """
    if settings.ttt_chunk_tokens < length:
        raise UserError(
            f"ttt_chunk_tokens {settings.ttt_chunk_tokens} is less than one sequence of {length}, so there would be "
            "nothing to train on. Use longer chunks or shorter windows."
        )
    n_targets = len(stream) - 1
    windows = scoring_windows(n_targets, length, stride)
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if is_ddp_initialized() else (0, 1)
    tables = ByteTables(*byte_tables)
    home = tables.base_bytes.device
    sums, losses_of = BpbSums(home), partial(model, reduction="none")
    n_chunks = math.ceil(n_targets / settings.ttt_chunk_tokens)
    of_chunk = [[] for _ in range(n_chunks)]
    for window in windows:
        of_chunk[window.first // settings.ttt_chunk_tokens].append(window)
    parameters = ttt_parameters(model, settings)
    originals = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.SGD(parameters, settings.ttt_lr, settings.ttt_momentum)
    try:
        for c in range(n_chunks):
            mine = share_of_windows(of_chunk[c], rank, world_size)
            for targets, losses in window_losses(losses_of, stream, mine, length, batch_windows, device, watch):
                tokens = stream[targets.start : targets.stop + 1].to(home, torch.int64)
                sums.add(losses.to(home), tokens[:-1], tokens[1:], tables)
            if c < n_chunks - 1:
                optimizer.param_groups[0]["lr"] = settings.ttt_lr * (1 + math.cos(math.pi * c / (n_chunks - 1))) / 2
                chunk = range(c * settings.ttt_chunk_tokens, (c + 1) * settings.ttt_chunk_tokens)
                train_on_chunk(
                    model, parameters, optimizer, stream, chunk, length, settings, batch_windows, device, watch
                )
            if c % CHECKSUM_EVERY == CHECKSUM_EVERY - 1 or c == n_chunks - 1:
                require_equal_weights(parameters, f"after chunk {c + 1} of {n_chunks}")
    finally:
        with torch.no_grad():
            for p, original in zip(parameters, originals, strict=True):
                p.copy_(original)
                p.grad = None
    return sums.sum_over_ranks()


# %% [markdown]
# ### `DocumentAdapters`
# A low-rank addition to the queries, the values and the head, another one for each document of a batch. The first
# matrix projects the input onto a few directions, the second starts at zero, so an adapter that has not learned
# anything adds nothing. They are hung onto the layers as hooks: a block that runs in eight loops calls its hooks eight
# times, and one adapter serves all loops.


# %%
class DocumentAdapters:
    """y += (x Aᵀ)Bᵀ with A (documents, rank, inputs) and B (documents, outputs, rank), both fp32.

    While it is entered (`with`), row i of a batch goes through adapter i. Every document begins with the same A, drawn
    from ±1/√inputs, and with B = 0.
    """

    def __init__(self, model: GolfModel, rank: int, documents: int, device=None):
        width, vocab_size = model.config.model_dim, model.config.vocab_size
        layers = [layer for block in model.blocks for layer in (block.attn.c_q, block.attn.c_v)]
        shapes = [(layer.in_features, layer.out_features) for layer in layers] + [(width, vocab_size)]
        generator = torch.Generator().manual_seed(0)
        self.layers, self.pairs, self.hooks = [*layers, model.unembed], [], []
        for n_in, n_out in shapes:
            first = torch.empty(rank, n_in).uniform_(-(n_in**-0.5), n_in**-0.5, generator=generator)
            down = first.to(device).repeat(documents, 1, 1).requires_grad_()
            up = torch.zeros(documents, n_out, rank, device=device, requires_grad=True)
            self.pairs.append((down, up))

    @property
    def weights(self) -> list[torch.Tensor]:
        return [weight for pair in self.pairs for weight in pair]

    def __enter__(self):
        for layer, (down, up) in zip(self.layers, self.pairs, strict=True):

            def add(_, inputs, output, down=down, up=up):
                x = inputs[0]  # (B, T, inputs); the rows that are left when the shortest documents have ended
                down, up = down[: len(x)].to(x.dtype), up[: len(x)].to(x.dtype)
                return output + x @ down.mT @ up.mT

            self.hooks.append(layer.register_forward_hook(add))
        return self

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()


# %% [markdown]
# ### `frozen_weights`
# Only the adapters learn. Unless autograd is told so, it keeps the input of every matrix for a gradient that nobody
# will ask for: about half of all that it keeps.


# %%
@contextmanager
def frozen_weights(model):
    """While entered, no weight of the model asks for a gradient."""
    learning = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in learning:
            p.requires_grad_(False)
        yield
    finally:
        for p in learning:
            p.requires_grad_(True)


# %% [markdown]
# ### `stream_documents`
# A document's targets go up to the next begin of document, which is a prediction like any other, so nothing is lost
# between two documents. What a stream holds before its first document belongs to one whose beginning is not there: it
# is scored, and not learned from.


# %%
def stream_documents(stream) -> list[tuple[range, bool]]:
    """(targets, whether it begins with BOS) for each document of a stream; together all targets, in order."""
    n_targets = len(stream) - 1
    starts = (stream[:-1].to(torch.int64) == BOS_ID).nonzero()[:, 0].tolist()
    borders = sorted({0, *starts, n_targets})
    begins = set(starts)
    return [(range(a, b), a in begins) for a, b in zip(borders, borders[1:], strict=False)]


# %% [markdown]
# ### `score_documents`
# One batch of documents, chunk by chunk. A chunk is scored, and the mean loss of exactly its targets is the next step's
# loss; it is summed over the documents, so each adapter gets the gradient of its own document alone.
#
# The context of a chunk begins where it would begin if the chunk were whole, also when the document ends within it. To
# count back from the document's end instead would let a token see more or less of the past depending on how soon the
# text after it stops: a hint from the future, if a small one.


# %%
def score_documents(model, padded, documents, sums: BpbSums, tables, settings: TTTSettings, device, watch) -> None:
    """Add every target of some documents to the sums.

    padded: the stream as int64 on the CPU, with a chunk of padding behind it. documents: (targets, learns) from long
    to short.
    """
    home = tables.base_bytes.device
    size, length = settings.ttt_chunk_size, settings.ttt_eval_seq_len
    starts = torch.tensor([targets.start for targets, _ in documents])
    ends = torch.tensor([targets.stop for targets, _ in documents])
    learns = torch.tensor([learns for _, learns in documents])
    adapters = DocumentAdapters(model, settings.ttt_lora_rank, len(documents), device)
    optimizer = torch.optim.Adam(adapters.weights, settings.ttt_lora_lr, betas=(0.9, 0.95), eps=1e-10)
    with frozen_weights(model), adapters, torch.enable_grad():
        for begin in range(0, len(documents[0][0]), size):  # counted from the beginning of each document
            alive = int((starts + begin < ends).sum())
            context = min(begin + size, length)
            first = starts[:alive] + begin
            rows = padded[(first + size - context)[:, None] + torch.arange(context + 1)]
            inputs, targets = rows[:, :-1].to(device), rows[:, 1:].to(device)
            losses = model(inputs, targets, reduction="none", last=size)
            counts = first[:, None] + torch.arange(size) < ends[:alive, None]
            nats = losses.detach()[counts.to(losses.device)].to(home)
            sums.add(nats, rows[:, -size - 1 : -1][counts].to(home), rows[:, -size:][counts].to(home), tables)
            if watch is not None:
                logits_of = torch.no_grad()(partial(model, inputs, last=size))
                for i, (start, n) in enumerate(zip(first.tolist(), counts.sum(1).tolist(), strict=True)):
                    where = (i, slice(0, n))
                    report_scores(watch, range(start, start + n), losses.detach()[where], logits_of, where)
            trains = learns[:alive] & (first + size < ends[:alive])
            if trains.any():
                optimizer.zero_grad()
                (losses[trains.to(losses.device)].sum() / size).backward()
                if watch is not None:
                    for i in trains.nonzero()[:, 0].tolist():
                        watch.updated(range(int(first[i]), int(first[i]) + size), documents[i][0])
                optimizer.step()


# %% [markdown]
# ### `score_with_lora_ttt`
# The second form. Documents do not depend on each other, so they may be read in any order: those of similar length go
# together, and the processes share them without a word until their sums are added up.


# %%
def score_with_lora_ttt(
    model: GolfModel, stream, byte_tables, settings: TTTSettings, device=None, watch=None
) -> BpbSums:
    """Score every target of a stream once, each document with adapters of its own. Golf spec section 4.8, form 2.

    model: not compiled. stream, byte_tables, device: as for `score_stream`. watch: as there; it also hears
    updated(targets, document) right before each step, for each document that trains, with the range of its targets.
    Every rank must call it, and all get the same sums. Raises UserError when the context is longer than the model's.
    """
    if settings.ttt_eval_seq_len > model.config.max_seq_len:
        raise UserError(
            f"ttt_eval_seq_len {settings.ttt_eval_seq_len} is more than the {model.config.max_seq_len} positions of "
            "the model. Shorten it or build the model with a larger max_seq_len."
        )
    documents = stream_documents(stream)
    if not documents:
        raise UserError("there is nothing to score: a stream must have at least two tokens.")
    if is_ddp_initialized():
        documents = share_of_windows(documents, dist.get_rank(), dist.get_world_size())
    documents = sorted(documents, key=lambda document: -len(document[0]))
    tables = ByteTables(*byte_tables)
    sums = BpbSums(tables.base_bytes.device)
    padded = F.pad(stream.to(torch.int64), (0, settings.ttt_chunk_size))
    for i in range(0, len(documents), settings.ttt_batch_size):
        batch = documents[i : i + settings.ttt_batch_size]
        score_documents(model, padded, batch, sums, tables, settings, device, watch)
    return sums.sum_over_ranks()
