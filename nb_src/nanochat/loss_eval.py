# %% [markdown]
# ## Bits per byte
#
# Loss per token depends on the tokenizer: a bigger vocabulary packs more text into each token, so each one is harder
# to guess. Divide the total surprise by the number of *bytes* of text it covers and the tokenizer drops out. A file
# compressor works in the same unit, so the notebook can put the model beside `xz` and ask who knows English better.

# %%
import itertools
import math

import torch
import torch.distributed as dist

from nanochat.dataset import parquets_iter_batched
from nanochat.runtime import is_ddp_initialized

# %% [markdown]
# ### `evaluate_bpb`
# Two sums over everything and one division at the end. A mean of per-batch ratios would be wrong: batches do not hold
# the same number of bytes.


# %%
@torch.no_grad()
def evaluate_bpb(model, batches, steps: int, token_bytes: torch.Tensor) -> float:
    """Bits per byte of `model` over the next `steps` batches.

    batches: yields (inputs, targets), both (B, T) int64; targets below 0 are ignored; it may end earlier.
    token_bytes: (V,) int32, the bytes of each token; 0 for tokens that are not text.
    Returns inf when no byte was counted. Every rank must call it. Spec section 12.
    """
    home = "cpu" if token_bytes.device.type == "mps" else token_bytes.device  # Apple GPUs have no fp64
    nats = torch.zeros((), dtype=torch.float64, device=home)  # fp32 drifts over millions of terms
    n_bytes = torch.zeros((), dtype=torch.int64, device=home)
    for inputs, targets in itertools.islice(batches, steps):
        losses = model(inputs, targets, loss_reduction="none").view(-1)
        targets = targets.reshape(-1)
        lengths = token_bytes[targets.clamp(min=0)] * (targets >= 0)
        nats += torch.where(lengths > 0, losses, 0).to(home).sum(dtype=torch.float64)
        n_bytes += lengths.to(home).sum()
    if is_ddp_initialized():
        dist.all_reduce(nats)
        dist.all_reduce(n_bytes)
    return nats.item() / (math.log(2) * n_bytes.item()) if n_bytes.item() else math.inf


# %% [markdown]
# ### `every_byte_batches`
# Training batches drop the ends of documents that do not fit. To compare with a compressor every byte must be paid
# for exactly once, so here the text runs on from row to row and nothing is left out.


# %%
def every_byte_batches(tokenizer, texts: list[str], B: int, T: int, device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(inputs, targets), both (B, T), over all tokens of the texts; every row begins with BOS and scores T tokens.

    Targets beyond the end of the text are -1.
    """
    bos = tokenizer.get_bos_token_id()
    stream = [token for ids in tokenizer.encode(texts, prepend=bos) for token in ids]
    n_rows = -(-len(stream) // (B * T)) * B
    targets = torch.full((n_rows * T,), -1, dtype=torch.int64)
    targets[: len(stream)] = torch.tensor(stream)
    targets = targets.view(n_rows, T)
    inputs = torch.cat([torch.full((n_rows, 1), bos), targets[:, :-1].clamp(min=0)], dim=1)
    return [(inputs[i : i + B].to(device), targets[i : i + B].to(device)) for i in range(0, n_rows, B)]


def first_texts(corpus, split: str, characters: int) -> list[str]:
    """Documents of a split in order, until they hold this many characters."""
    texts, total = [], 0
    for group in parquets_iter_batched(split, corpus=corpus):
        for text in group:
            texts.append(text)
            total += len(text)
            if total >= characters:
                return texts
    return texts
