# %% [markdown]
# ## The partly looped model
#
# Looping a whole network pays for depth with arithmetic, and ten minutes have too little of it. The records settled on
# a compromise: eleven different layers, of which only three in the middle run three times. The passes are laid out as
# one list of *virtual* layers, 17 instead of 11, and that list is a U-Net like the baseline's. During the first part of
# the training the plain list runs instead, because its steps cost less.
#
# Around the loop are smaller pieces of the same records. Each is a field of the config that can be switched off, so the
# notebook can ask what it is worth.

# %%
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from golf.golf_gpt import (
    GolfAttention,
    GolfBlock,
    GolfMLP,
    GolfModel,
    GolfShape,
    last_positions,
    rms_normalise,
)
from nanochat.runtime import UserError

# %% [markdown]
# ### `LoopedConfig`
# With the default loop the virtual list reads 0, 1, 2, 3, 4, 5, 3, 4 on the way down the U and 5, 3, 4, 5, 6, …, 10 on
# the way up.


# %%
@dataclass(frozen=True)
class LoopedConfig(GolfShape):
    """Shape of the partly looped model. Golf spec sections 4.3 (variant B2) and 7."""

    vocab_size: int = 8192
    mlp_mult: int = 4
    qk_gain_init: float = 5.25
    max_seq_len: int = 2048
    num_layers: int = 11
    loop_start: int = 3  # first layer of the loop
    loop_end: int = 5  # last layer of the loop
    num_loops: int = 2  # passes after the first; 0 for no loop
    parallel_residual_start: int = 7  # first layer with attention and MLP side by side; num_layers for none
    leaky_slope: float = 0.5  # of the MLP below zero; 0 is the baseline's ReLU
    rope_dims: int = 16  # channels of a head that are rotated; the others know nothing of positions
    scale_norms: bool = True  # deeper layers read a quieter stream, 1/√(layer + 1)
    gated_skips: bool = True  # a learned mixture of stream and skip instead of a sum
    exclude_own_value: bool = True  # XSA in the records: a head does not repeat what its own token says

    def __post_init__(self):
        super().__post_init__()
        if not (0 <= self.loop_start <= self.loop_end < self.num_layers and self.num_loops >= 0):
            raise UserError(
                f"{self.num_loops} extra passes from layer {self.loop_start} to layer {self.loop_end} do not fit "
                f"{self.num_layers} layers: choose 0 <= loop_start <= loop_end < num_layers and num_loops >= 0."
            )
        if self.rope_dims < 2 or self.rope_dims % 2 or self.head_dim % self.rope_dims:
            raise UserError(
                f"rope_dims {self.rope_dims} must be even and divide the {self.head_dim} channels of a head."
            )

    def layer_order(self, looping: bool = True) -> list[int]:
        """The layers in the order in which they run: the virtual list, or without the loop 0 to num_layers − 1."""
        layers, first, end = list(range(self.num_layers)), self.loop_start, self.loop_end + 1
        return layers[:first] + layers[first:end] * (1 + self.num_loops if looping else 1) + layers[end:]


# %% [markdown]
# ### `LoopedAttention` and `LoopedMLP`
# What a token says itself is in the stream already. So each head removes the part along the token's own value from what
# it gathered, and adds only what the others say. The MLP lets a little through below zero, where a ReLU would have no
# gradient.


# %%
def without_own_value(y, v):  # y (B, H, n, D); v (B, Hkv, T, D), of which the last n belong to y -> (B, H, n, D)
    """y − (y·v̂)v̂ with v̂ the unit vector along the token's own value, in each group of heads."""
    own = F.normalize(v[:, :, -y.size(2) :], dim=-1)[:, :, None]
    grouped = y.unflatten(1, (v.size(1), -1))
    return (grouped - (grouped * own).sum(-1, keepdim=True) * own).flatten(1, 2)


class LoopedAttention(GolfAttention):
    """The baseline's attention, without each token's own value if the config says so."""

    def __init__(self, config: LoopedConfig):
        super().__init__(config)
        self.exclude_own_value = config.exclude_own_value

    def forward(self, h, cos, sin, last=None, window=None):  # (B, T, C) -> (B, T or last, C)
        y, v = self.attend(h, cos, sin, last, window)
        y = without_own_value(y, v) if self.exclude_own_value else y
        return self.proj(y.transpose(1, 2).flatten(2))


class LoopedMLP(GolfMLP):
    """C → mult·C → C with the square of a leaky ReLU."""

    def __init__(self, config: LoopedConfig):
        super().__init__(config)
        self.slope = config.leaky_slope

    def forward(self, x):
        return self.proj(F.leaky_relu(self.fc(x), self.slope).square())


# %% [markdown]
# ### `LoopedBlock`
# The MLP of a late layer reads what the attention reads, that of an early layer what the attention made of it.


# %%
class LoopedBlock(GolfBlock):
    """Layer number `layer` of a LoopedGPT."""

    def __init__(self, config: LoopedConfig, layer: int):
        super().__init__(config)
        self.attn, self.mlp = LoopedAttention(config), LoopedMLP(config)
        self.parallel = layer >= config.parallel_residual_start
        self.norm_scale = (layer + 1) ** -0.5 if config.scale_norms else 1.0

    def forward(self, x, x0, cos, sin, last=None, window=None):  # (B, T, C) -> (B, T or last, C)
        x = self.mixed(x, x0)
        h = self.norm_scale * rms_normalise(x)
        x = last_positions(x, last) + self.attn_scale.to(x.dtype) * self.attn(h, cos, sin, last, window)
        h = last_positions(h, last) if self.parallel else self.norm_scale * rms_normalise(x)
        return x + self.mlp_scale.to(x.dtype) * self.mlp(h)


# %% [markdown]
# ### `LoopedGPT`
# The first half of the list leaves a skip at each step, the second half takes them up, last one first. Weights and gate
# belong to the place in the second half, not to the layer. Without the loop the list is shorter and the last places
# stay unused.


# %%
class LoopedGPT(GolfModel):
    """Eleven layers in a U of which some run several times. Golf spec sections 4.3 (variant B2) and 7."""

    def __init__(self, config: LoopedConfig, compute_dtype: torch.dtype = torch.float32):
        super().__init__(config, compute_dtype)
        self.blocks = nn.ModuleList(LoopedBlock(config, layer) for layer in range(config.num_layers))
        skips = len(config.layer_order()) // 2
        self.skip_weights = nn.Parameter(torch.ones(skips, config.model_dim))
        self.skip_gates = nn.Parameter(torch.zeros(skips, config.model_dim)) if config.gated_skips else None

    def with_skip(self, x, skip, place: int):
        """The stream with a skip taken up at this place of the second half; x, skip and the result (B, T, C)."""
        skip = self.skip_weights[place].to(x.dtype) * skip
        return x + skip if self.skip_gates is None else skip.lerp(x, self.skip_gates[place].sigmoid().to(x.dtype))

    def trunk(self, ids, last: int | None = None, window: int | None = None, looping: bool = True):
        """Hidden states; looping False: each layer once, as in the first part of the training."""
        order = self.config.layer_order(looping)
        half, step = len(order) // 2, self.config.head_dim // self.config.rope_dims
        # a head's frequencies form a geometric series: every step-th is the series of rope_dims channels
        cos, sin = (table[:, ::step] for table in self.rope(ids.size(1), window))
        x = x0 = self.embed(ids)
        skips = []
        for i, layer in enumerate(order):
            if i >= half and skips:
                x = self.with_skip(x, skips.pop(), i - half)
            x = self.blocks[layer](x, x0, cos, sin, last if i == len(order) - 1 else None, window)
            if i < half:
                skips.append(x)
        return rms_normalise(x)
