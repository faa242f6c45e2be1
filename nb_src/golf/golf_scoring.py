# %% [markdown]
# ## Scoring
#
# The challenge is scored in bits per byte of a fixed text. Cut the text into blocks and every block begins blind: its
# first tokens are predicted from almost nothing. A window that slides by a few tokens, and of which only the newest
# predictions count, gives every token a long context; it costs as many forward passes as there are strides in a window.
#
# Either way each prediction counts exactly once, the first ones and the ragged end included. (The published scorers
# cut the end off, and some of them the beginning.) Blocks are windows that slide by their whole length, so one
# function does both. Target t means: predict token t + 1 from tokens 0 to t.

# %%
import itertools
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from golf.golf_tokenizers import BpbSums, ByteTables
from nanochat.runtime import UserError, is_ddp_initialized

# %% [markdown]
# ### `scoring_windows`
# The first window scores all that it sees; each later one the part that no earlier window reached.


# %%
class ScoringWindow(NamedTuple):
    """The model sees targets start..end − 1 and the predictions first..end − 1 count."""

    start: int
    first: int
    end: int


def scoring_windows(n_targets: int, length: int, stride: int) -> list[ScoringWindow]:
    """Windows of at most `length` targets that score each of n_targets once, in order. Golf spec section 4.7.

    stride = length gives disjoint blocks.
    """
    if not 1 <= stride <= length:
        raise UserError(f"stride {stride} does not fit windows of {length}: it lies between 1 and the length.")
    if n_targets < 1:
        raise UserError("there is nothing to score: a stream must have at least two tokens.")
    context = length - stride
    windows = [ScoringWindow(0, 0, min(length, n_targets))]
    windows += [
        ScoringWindow(start, start + context, min(start + length, n_targets))
        for start in range(stride, n_targets - context, stride)
    ]
    return windows


def share_of_windows(windows: list, rank: int, world_size: int) -> list:
    """The consecutive part of the windows that one process scores."""
    return windows[len(windows) * rank // world_size : len(windows) * (rank + 1) // world_size]


# %% [markdown]
# ### `report_scores`
# Whoever wants to know what a scorer does hands it a watch. It hears of every score in the order in which they become
# final, and may ask for the whole distribution behind a few of them, which the model then makes without knowing the
# targets. (Chapter Legality has such a watch, and draws conclusions.)


# %%
def report_scores(watch, targets: range, nats, logits_of, where) -> None:
    """Tell `watch` about the nats (n,) of n targets, and the log probabilities (V,) of those that it wants.

    watch: has scored(targets, nats), a set `wanted` of targets, and distribution(target, log_probs).
    logits_of()[where]: (n, V), made only when needed.
    """
    watch.scored(targets, nats)
    if wanted := sorted(watch.wanted.intersection(targets)):
        log_probs = logits_of()[where].float().log_softmax(-1)
        for target in wanted:
            watch.distribution(target, log_probs[target - targets.start])


# %% [markdown]
# ### `window_losses`
# Many windows go through the model together, and it is asked for no more than the predictions that count. A short
# window is filled up with token 0, which changes nothing because no prediction sees what comes after it, and a short
# batch with windows that do not count; so a compiled model meets each shape once.


# %%
@torch.no_grad()
def window_losses(
    losses_of, stream, windows: list[ScoringWindow], length: int, batch_windows: int = 32, device=None, watch=None
):
    """Yield (targets, losses): a range of targets and the nats of each, fp32 (n,); in order, without gaps.

    losses_of(inputs, targets, last=n): inputs and targets (B, length) int64 -> nats (B, n) of the last n targets of
    each row; `functools.partial(model, reduction="none")` is one. stream: 1-D integer tensor on the CPU, targets + 1
    tokens. windows: consecutive ones of `scoring_windows`. device: of the model. Between two batches the caller may
    train. watch: hears of every batch (`report_scores`); for it losses_of must give logits when targets is None.
    """
    for skipped, same in itertools.groupby(windows, key=lambda window: window.first - window.start):
        group, last = list(same), length - skipped
        size = min(batch_windows, len(group))
        for i in range(0, len(group), size):
            batch = group[i : i + size]
            low, high = batch[0].start, batch[-1].end
            span = stream[low : high + 1].to(device, torch.int64)
            span = F.pad(span, (0, low + (size - 1) * last + length - high))
            rows = span.unfold(0, length + 1, last)  # windows lie as far apart as each has targets that count
            scored = range(batch[0].first, high)
            losses = losses_of(rows[:, :-1], rows[:, 1:], last=last).flatten()[: len(scored)]
            if watch is not None:
                logits_of = partial(losses_of, rows[:, :-1], None, last=last)
                report_scores(watch, scored, losses, lambda: logits_of().flatten(0, 1), slice(len(scored)))  # noqa: B023
            yield scored, losses


# %% [markdown]
# ### `score_stream`
# The number of the challenge, over all processes.


# %%
def score_stream(
    losses_of, stream, byte_tables, length: int, stride: int | None = None, batch_windows=32, device=None, watch=None
) -> BpbSums:
    """Score every target of a stream once, in windows of `length` that slide by `stride` (None: disjoint blocks).

    losses_of, stream, device, watch: as for `window_losses`. byte_tables: base_bytes, has_leading_space and
    is_boundary, each (V,); the sums are made in fp64 on the device where they lie. With several processes each scores
    its share; all must call it, and all get the same sums. Golf spec sections 2.5 and 4.7.
    """
    windows = scoring_windows(len(stream) - 1, length, length if stride is None else stride)
    if is_ddp_initialized():
        windows = share_of_windows(windows, dist.get_rank(), dist.get_world_size())
    tables = ByteTables(*byte_tables)
    home = tables.base_bytes.device
    sums = BpbSums(home)
    for targets, losses in window_losses(losses_of, stream, windows, length, batch_windows, device, watch):
        tokens = stream[targets.start : targets.stop + 1].to(home, torch.int64)
        sums.add(losses.to(home), tokens[:-1], tokens[1:], tables)
    return sums.sum_over_ranks()


# %% [markdown]
# ### `score_banded`
# Sliding windows compute a token again in every window that holds it: 16 times for a stride of a sixteenth. Here the
# model reads one long stretch, and a query looks back over a band of fixed width. Every token is computed once, the
# context before a stretch twice, and every target still has its past. Its past has seen further back in its turn, layer
# by layer, which no training showed the model; so whether a model can do this is for a measurement to say.
#
# The band is three quarters of the training length. The farthest distances were rare in training, and always led to
# tokens that had no past themselves. A baseline of 6 layers, trained for 520 steps of 4,096 tokens at length 256,
# scored 1.8600 bits per byte in blocks, 1.8450 in windows with a stride of 16, 1.8457 in a band of 256 and 1.8435 in
# one of 192. A model that has learned to use its whole length may prefer the windows: compare the two.

# %%
STRETCH_LENGTHS = 8  # new targets of a stretch, in training lengths


def score_banded(
    losses_of, stream, byte_tables, length: int, stride: int, batch_windows=32, device=None, watch=None
) -> BpbSums:
    """Score every target of a stream once, in stretches of 8·length that look back over a band of 3/4·length tokens.

    length: at which the model was trained. stride: a stretch begins length − stride tokens before its first target;
    at most length/4 gives every target a full band. batch_windows: as many tokens at a time as in so many windows. The
    rest as for `score_stream`, and losses_of must take `window` (see `GolfModel`). Causal like golf spec section 4.7.
    """
    new = STRETCH_LENGTHS * length
    stretch = length - stride + new
    losses_of = partial(losses_of, window=max(1, 3 * length // 4))
    rows = max(1, batch_windows * length // stretch)
    return score_stream(losses_of, stream, byte_tables, stretch, new, rows, device, watch)
