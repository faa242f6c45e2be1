# %% [markdown]
# ## What each ingredient is worth
#
# A recipe with ten ingredients and one score says nothing about any of them. So the model is trained again, shortly,
# with one ingredient taken out at a time: the same seed, the same tokens in the same order, the same number of steps.
# What the loss gains or loses is that ingredient's worth *at this length and size*. Some only pay off in long runs, and
# a difference smaller than that between two seeds is none; so the table has a second seed of the full recipe as well.

# %%
import math
import time
from dataclasses import replace
from functools import partial

import torch

from golf.golf_optim import setup_golf_optimizer
from golf.golf_scoring import score_stream
from golf.golf_train import GolfTraining, device_batch_for, golf_step
from golf.shards import DistributedTokenLoader, TokenStream
from nanochat.runtime import print0

# %% [markdown]
# ### `ablate`
# Short runs are not worth checkpoints. They are over in a minute, and each finished one is kept.


# %%
def short_run(model, learning: dict, training: GolfTraining, stream: TokenStream, val_tokens, byte_tables, place):
    """Train for training.iterations steps and score; returns (nats per token, bits per byte, seconds of training).

    learning: for `setup_golf_optimizer`. place: (rank, world_size, device).
    """
    optimizer = setup_golf_optimizer(model, **learning)
    loader = DistributedTokenLoader(stream, *place)
    started = time.perf_counter()
    for step in range(training.iterations):
        left = (training.iterations - step) / training.iterations
        multiplier = min(1.0, left / training.warmdown_fraction) if training.warmdown_fraction else 1.0
        golf_step(model, optimizer, loader, training, multiplier, training.momentum(step), {})
    seconds = time.perf_counter() - started
    windows = training.scoring_windows_at_once(training.train_seq_len)
    losses_of = partial(model, reduction="none")
    sums = score_stream(losses_of, val_tokens, byte_tables, training.train_seq_len, None, windows, place[2])
    return sums.val_loss, sums.val_bpb, seconds


def ablate(
    runs: dict, training: GolfTraining, steps: int, stream, val_tokens, byte_tables, place, done=None, keep=None
) -> dict[str, tuple[float, float, float]]:
    """label → (nats per token, bits per byte, seconds of training) for each run. Every rank must call it.

    runs: label -> (seed, function that makes the model, learning, changes to `training`). done: rows of an earlier,
    interrupted call by label. keep: called with the rows so far after each run.
    """
    rows = dict(done or {})
    for label, (seed, build, learning, changes) in runs.items():
        if label not in rows:
            torch.manual_seed(seed)
            # a step that is not compiled needs more memory
            at_once = training.device_batch_tokens or device_batch_for(place[2], whole_slice_bytes=math.inf)
            short = replace(training, iterations=steps, max_wallclock_seconds=0.0, device_batch_tokens=at_once)
            short = replace(short, **changes)
            rows[label] = short_run(build(), learning, short, stream, val_tokens, byte_tables, place)
            print0(f"{label}: {rows[label][1]:.4f} bits per byte after {steps} steps")
            if keep:
                keep(rows)
    return rows
