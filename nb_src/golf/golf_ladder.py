# %% [markdown]
# ## The ladder of scores
#
# One model, scored in five ways: in blocks that each begin blind; in long stretches, where every token is computed once
# and looks back over a band; in windows that slide, so that every prediction has a window of its own; with training on
# what was scored; and with training on each document by itself. Every step costs time, and the limit for all of it
# together is ten minutes.

# %%
import time
from dataclasses import replace
from functools import partial

from golf.golf_scoring import score_banded, score_stream
from golf.golf_ttt import TTTSettings, score_with_lora_ttt, score_with_sgd_ttt

# %% [markdown]
# ### `score_ladder`
# Whoever has the artifact can call this: all it needs besides stands in the artifact's header. A score is told as soon
# as it is known.

# %%
LADDER_LABELS = {
    "blocks": "in blocks", "banded": "in a band", "sliding": "sliding windows",
    "sgd": "and training on what was scored", "lora": "training on each document",
}  # fmt: skip


def score_ladder(model, call, scoring: dict, stream, byte_tables, batch_windows: int, device, ways):
    """Yield (way, dict of val_loss in nats per token, val_bpb, seconds). Every rank must iterate. Golf spec 4.7, 4.8.

    call: the model, compiled or not; adapters and the band need the eager one. scoring: the artifact's: length, stride
    and the fields of TTTSettings. batch_windows: as many tokens at once as in so many windows; for documents, which
    are trained on while they are scored, no more either. ways: of LADDER_LABELS, in the order in which to score; each
    starts from the same weights.
    """
    length, stride, ttt = scoring["length"], scoring["stride"], TTTSettings(**scoring["ttt"])
    losses_of = partial(call, reduction="none")
    documents = max(1, batch_windows * length // ttt.ttt_eval_seq_len)
    by_document = replace(ttt, ttt_batch_size=min(ttt.ttt_batch_size, documents))
    for way in ways:
        started = time.perf_counter()
        if way == "blocks":
            sums = score_stream(losses_of, stream, byte_tables, length, None, batch_windows, device)
        elif way == "banded":
            # to compile the many small blocks of a band takes longer than to run them once
            eager = partial(model, reduction="none")
            sums = score_banded(eager, stream, byte_tables, length, stride, batch_windows, device)
        elif way == "sliding":
            sums = score_stream(losses_of, stream, byte_tables, length, stride, batch_windows, device)
        elif way == "sgd":
            sums = score_with_sgd_ttt(model, stream, byte_tables, length, stride, ttt, batch_windows, device)
        else:
            sums = score_with_lora_ttt(model, stream, byte_tables, by_document, device)
        yield way, dict(val_loss=sums.val_loss, val_bpb=sums.val_bpb, seconds=time.perf_counter() - started)
