# %% [markdown]
# ## The recurrent model
#
# The limit of the challenge is on bytes, not on arithmetic, so this model uses every weight many times: three blocks,
# run eight times over, are a network of 24 layers that weighs as much as three. Inside a block attention and MLP read
# the same normalised input and are added together, which needs one norm less and lets both run side by side.
#
# A looped model must be told how often to loop, and it should be asked the question it was trained on. The depth is
# therefore an argument of every forward pass, and by default the same in training and evaluation. Running it deeper
# than it was trained is an experiment that the notebook shows, not a free gain.

# %%
import random
from dataclasses import dataclass

import torch
import torch.nn as nn

from golf.golf_gpt import GolfBlock, GolfModel, GolfShape, last_positions, rms_normalise

# %% [markdown]
# ### `RecurrentConfig`
# Wider than the baseline, because unique blocks are few.


# %%
@dataclass(frozen=True)
class RecurrentConfig(GolfShape):
    """Shape of the recurrent model. Golf spec sections 4.2 and 4.3."""

    vocab_size: int = 8192
    model_dim: int = 768
    num_heads: int = 12
    mlp_mult: int = 4
    qk_gain_init: float = 5.25
    num_unique_layers: int = 3
    num_recurrences: int = 8
    iteration_embeddings: bool = True
    parallel_residuals: bool = True  # False: the baseline's blocks, attention and then MLP


# %% [markdown]
# ### `ParallelBlock`
# The parameters of the baseline's block, arranged in parallel.


# %%
class ParallelBlock(GolfBlock):
    """One layer in which attention and MLP read the same normalised stream. Golf spec section 4.3."""

    parallel = True

    def forward(self, x, x0, cos, sin, last=None, window=None):  # (B, T, C) -> (B, T or last, C)
        x = self.mixed(x, x0)
        h = rms_normalise(x)
        attended = self.attn_scale.to(x.dtype) * self.attn(h, cos, sin, last, window)
        return last_positions(x, last) + attended + self.mlp_scale.to(x.dtype) * self.mlp(last_positions(h, last))


# %% [markdown]
# ### `RecurrentGPT`
# Shared weights cannot know which round they are in. The iteration embeddings tell them: one vector for each round,
# zero at first, added before it begins.


# %%
class RecurrentGPT(GolfModel):
    """A few parallel blocks run `depth` times. Golf spec section 4.3."""

    def __init__(self, config: RecurrentConfig, compute_dtype: torch.dtype = torch.float32):
        super().__init__(config, compute_dtype)
        block = ParallelBlock if config.parallel_residuals else GolfBlock
        self.blocks = nn.ModuleList(block(config) for _ in range(config.num_unique_layers))
        rounds = config.num_recurrences if config.iteration_embeddings else 0
        self.iter_embed = nn.Parameter(torch.zeros(rounds, config.model_dim)) if rounds else None
        self.depth = config.num_recurrences  # rounds of a forward pass that does not say how many

    def trunk(self, ids, last: int | None = None, window: int | None = None, depth: int | None = None):
        """Hidden states after `depth` rounds (None or 0: self.depth). Beyond the trained rounds the last embedding is
        used again."""
        depth = depth or self.depth
        cos, sin = self.rope(ids.size(1), window)
        x = x0 = self.embed(ids)
        for r in range(depth):
            if self.iter_embed is not None:
                x = x + self.iter_embed[min(r, self.config.num_recurrences - 1)].to(x.dtype)
            for u, block in enumerate(self.blocks):
                final = r == depth - 1 and u == len(self.blocks) - 1
                x = block(x, x0, cos, sin, last if final else None, window)
        return rms_normalise(x)


# %% [markdown]
# ### `depth_for_step`
# To train several depths at once each step draws one. All processes must draw the same, so the draw depends on the
# seed and the step and on nothing else.


# %%
def depth_for_step(seed: int, step: int, depths: tuple[int, ...]) -> int:
    """The depth at which to train this step, each of `depths` equally often."""
    return random.Random(f"depth {seed} {step}").choice(depths)
