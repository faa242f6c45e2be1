# %% [markdown]
# ## The baseline model
#
# The GPT that every parameter-golf record starts from. 17 million weights must say everything, so nothing is stored
# twice: the embedding is also the output head, and eight query heads share four key-value heads. The first half of the
# layers leaves its outputs for the second half, last one first, as in a U-Net; every block may go back to the very
# first embedding. The gains, scales and mixes that steer all this are a handful of numbers, kept in fp32.
#
# Weights are fp32 throughout and cast where they are used. The published script trains its embedding in bf16, where
# the small updates of the last phase vanish.
#
# Shapes in comments: B sequences, T tokens, C model width, H heads, D head width, V vocabulary.

# %%
import re
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from golf.golf_settings import refuse_uneven_heads

# %% [markdown]
# ### `GolfShape` and `GolfConfig`
# Everything that an artifact must carry so that its model can be built again. What both systems have in common comes
# first; the names are those of the challenge's variables, in lower case.


# %%
@dataclass(frozen=True)
class GolfShape:
    """What all parameter-golf models have in common. Golf spec section 2.1."""

    vocab_size: int = 1024
    model_dim: int = 512
    num_heads: int = 8
    num_kv_heads: int = 4
    mlp_mult: int = 2
    tie_embeddings: bool = True
    rope_base: float = 10000.0
    logit_softcap: float = 30.0
    qk_gain_init: float = 1.5
    tied_embed_init_std: float = 0.005
    max_seq_len: int = 1024  # positions for which there are rotary tables
    bf16_rope: bool = False  # round positions and tables as the published script does, to replay its logs

    def __post_init__(self):
        refuse_uneven_heads(self.model_dim, self.num_heads, self.num_kv_heads)

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads


@dataclass(frozen=True)
class GolfConfig(GolfShape):
    """Shape of the baseline model. Golf spec section 2.2."""

    num_layers: int = 9


# %% [markdown]
# ### Small parts
# The rotation turns pairs of channels, i and i + R/2, by an angle that grows with the position. `last_positions` serves
# scoring: a sliding window needs the predictions at its end only, so the last block computes no others.


# %%
class GolfLinear(nn.Linear):
    """A matrix product without bias in the dtype of its input; starts uniform within ±1/√n_in, or at zero."""

    def __init__(self, n_in: int, n_out: int, zero: bool = False):
        super().__init__(n_in, n_out, bias=False)
        bound = 0.0 if zero else n_in**-0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


def rms_normalise(x):
    """RMS norm over the last dimension without a gain, with torch's epsilon for the dtype."""
    return F.rms_norm(x, (x.size(-1),))


def last_positions(x, last: int | None):  # (B, T, C) -> (B, last, C)
    """The last positions of each sequence; all of them for None."""
    return x if last is None else x[:, -last:]


def rotate_half_pairs(x, cos, sin):  # x (B, H, T, D); cos and sin (T, R/2) fp32, R = D or less
    """Turn the channel pairs (i, i + R/2) by the angle of their position, in fp32; the dtype of x is kept.

    Channels from R on stay as they are.
    """
    half = cos.size(-1)
    x1, x2, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin, rest], dim=-1).to(x.dtype)


# %% [markdown]
# ### `RotaryTables`
# Made when the model is made, in fp32, and made again rather than converted when the model moves. The published script
# lost two things here. Its tables are cast to bf16 with the rest of the model, which leaves 513 different positions of
# 1024 and 769 of 4096. And they are first computed inside the first evaluation, so that without warm-up steps the
# first backward pass meets tensors that refuse to be saved for it.
#
# Only the distance of two tokens counts. A text longer than any in the training is therefore nothing new to a model
# whose queries look back no further than in the training.


# %%
class RotaryTables(nn.Module):
    """cos and sin of position times frequency, (max_seq_len, D/2) fp32 whatever the model is cast to. Golf spec 6.

    bf16_rope repeats the rounding of the published script under torch.compile (run eagerly it rounds the angles too).
    """

    def __init__(self, config: GolfShape):
        super().__init__()
        self.shape = config
        self.cos, self.sin = self.tables(config.max_seq_len, torch.get_default_device())

    def tables(self, length: int, device):
        """cos and sin for positions 0 to length − 1, each (length, D/2)."""
        dims = torch.arange(0, self.shape.head_dim, 2, dtype=torch.float32, device=device)
        frequencies = self.shape.rope_base ** (-dims / self.shape.head_dim)
        positions = torch.arange(length, dtype=torch.float32, device=device)
        if self.shape.bf16_rope:
            frequencies, positions = (table.bfloat16().float() for table in (frequencies, positions))
        angles = torch.outer(positions, frequencies)
        tables = angles.cos(), angles.sin()
        return tuple(table.bfloat16().float() for table in tables) if self.shape.bf16_rope else tables

    def _apply(self, fn, recurse=True):  # what .to(), .cuda() and .bfloat16() call
        probe = fn(self.cos)
        if probe.device != self.cos.device:
            self.cos, self.sin = self.tables(self.shape.max_seq_len, probe.device)
        return self

    def forward(self, length: int, window: int | None = None):
        """The tables of the first positions, each (length, D/2), for attention over the last `window` of them."""
        farthest = length if window is None else min(length, window)
        if farthest > self.shape.max_seq_len:
            raise ValueError(f"{farthest} tokens are more than the {self.shape.max_seq_len} positions of max_seq_len")
        if length > self.shape.max_seq_len:  # made and forgotten: a table kept from an evaluation breaks the training
            return self.tables(length, self.cos.device)
        return self.cos[:length], self.sin[:length]


# %% [markdown]
# ### `windowed_attention`
# For long texts: a window limits how far a query looks back. Queries are taken in blocks, each with the keys that any
# of them can see, so the cost grows with the length of the text and not with its square.


# %%
def windowed_attention(q, k, v, window: int, grouped: bool):  # q (B, H, n, D); k and v (B, Hkv, T, D) -> as q
    """Attention of the last n positions; each sees `window` keys: its own and those right before it."""
    T, skipped, rows = k.size(2), k.size(2) - q.size(2), []
    positions = torch.arange(T, device=q.device)
    block = max(1, window // 4)  # a larger one computes more keys in vain, a smaller one is no faster
    for start in range(skipped, T, block):
        stop, first = min(start + block, T), max(0, start - window + 1)
        distance = positions[start:stop, None] - positions[first:stop]
        mask = (distance >= 0) & (distance < window)
        queries, seen = q[:, :, start - skipped : stop - skipped], slice(first, stop)
        rows.append(F.scaled_dot_product_attention(queries, k[:, :, seen], v[:, :, seen], mask, enable_gqa=grouped))
    return torch.cat(rows, 2)


# %% [markdown]
# ### `GolfAttention`
# Queries and keys are normalised, so their product says nothing but the angle between them; the learned gain of each
# head then decides how sharply it may choose.


# %%
class GolfAttention(nn.Module):
    """Causal attention with grouped key-value heads, QK norm, rotary positions and a gain for each head."""

    def __init__(self, config: GolfShape):
        super().__init__()
        C, D = config.model_dim, config.head_dim
        self.head_dim, self.grouped = D, config.num_heads != config.num_kv_heads
        self.c_q = GolfLinear(C, C)
        self.c_k = GolfLinear(C, config.num_kv_heads * D)
        self.c_v = GolfLinear(C, config.num_kv_heads * D)
        self.proj = GolfLinear(C, C, zero=True)
        self.q_gain = nn.Parameter(torch.full((config.num_heads,), config.qk_gain_init))

    def heads(self, x):  # (B, T, H·D) -> (B, H, T, D)
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def attend(self, h, cos, sin, last=None, window=None):  # (B, T, C) -> (B, H, T or last, D), (B, Hkv, T, D)
        """What each head gathers, and the values that it gathers from."""
        T, n = h.size(1), last or h.size(1)
        q = rms_normalise(self.heads(self.c_q(last_positions(h, last))))
        k, v = rms_normalise(self.heads(self.c_k(h))), self.heads(self.c_v(h))
        q = rotate_half_pairs(q, cos[-n:], sin[-n:]) * self.q_gain.to(q.dtype)[:, None, None]
        k = rotate_half_pairs(k, cos, sin)
        if window is not None and window < T:
            return windowed_attention(q, k, v, window, self.grouped), v
        # with fewer queries than keys torch's own causal mask would align their beginnings, not their ends
        mask = None if n == T else torch.ones(n, T, dtype=torch.bool, device=h.device).tril(T - n)
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=self.grouped), v

    def forward(self, h, cos, sin, last=None, window=None):  # (B, T, C) -> (B, T or last, C)
        y, _ = self.attend(h, cos, sin, last, window)
        return self.proj(y.transpose(1, 2).flatten(2))


# %% [markdown]
# ### `GolfMLP` and `GolfBlock`
# A block first mixes the stream with the first embedding, channel by channel, and weighs what attention and MLP add,
# channel by channel again. Both output matrices start at zero, so a new model is the identity and its loss is ln V.


# %%
class GolfMLP(nn.Module):
    """C → mult·C → C with squared ReLU."""

    def __init__(self, config: GolfShape):
        super().__init__()
        self.fc = GolfLinear(config.model_dim, config.mlp_mult * config.model_dim)
        self.proj = GolfLinear(config.mlp_mult * config.model_dim, config.model_dim, zero=True)

    def forward(self, x):
        return self.proj(F.relu(self.fc(x)).square())


class GolfBlock(nn.Module):
    """One layer: attention, then MLP. Golf spec section 2.2."""

    parallel = False  # whether attention and MLP read the same input

    def __init__(self, config: GolfShape):
        super().__init__()
        C = config.model_dim
        self.attn, self.mlp = GolfAttention(config), GolfMLP(config)
        self.attn_scale, self.mlp_scale = nn.Parameter(torch.ones(C)), nn.Parameter(torch.ones(C))
        self.resid_mix = nn.Parameter(torch.stack([torch.ones(C), torch.zeros(C)]))

    def mixed(self, x, x0):
        """The stream with the first embedding mixed in."""
        keep, anchor = self.resid_mix.to(x.dtype)
        return keep * x + anchor * x0

    def forward(self, x, x0, cos, sin, last=None, window=None):  # (B, T, C) -> (B, T or last, C)
        x = self.mixed(x, x0)
        attended = self.attn_scale.to(x.dtype) * self.attn(rms_normalise(x), cos, sin, last, window)
        x = last_positions(x, last) + attended
        return x + self.mlp_scale.to(x.dtype) * self.mlp(rms_normalise(x))


# %% [markdown]
# ### `GolfHead`
# The last product is a module although it has no weights of its own: what listens at the layers of a model, or adds
# to them, can then treat the head like any other.


# %%
class GolfHead(nn.Module):
    """Hidden states (..., C) times a vocabulary of rows, (V, C): logits (..., V) before the softcap."""

    def forward(self, hidden, weight):
        return F.linear(hidden, weight.to(hidden.dtype))


# %% [markdown]
# ### `GolfModel`
# The two ends of both systems: tokens in, losses out. What happens between them is `trunk`, which each system writes
# for itself.


# %%
class GolfModel(nn.Module):
    """Embedding, head and loss. `compute_dtype` is the dtype of activations; weights stay in fp32.

    A system adds its blocks and `trunk(ids, last=None, window=None, ...)`: (B, T) int64 -> normalised hidden states
    (B, T, C), or with `last` those of the last positions of each row, (B, last, C). window: keys that a query of any
    layer sees; None for all before it. Only with a window may T be more than max_seq_len.
    """

    def __init__(self, config: GolfShape, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        self.rope = RotaryTables(config)
        self.tok_emb = nn.Embedding(config.vocab_size, config.model_dim)
        if config.tie_embeddings:
            nn.init.normal_(self.tok_emb.weight, std=config.tied_embed_init_std)
        self.lm_head = None if config.tie_embeddings else GolfLinear(config.model_dim, config.vocab_size, zero=True)
        self.unembed = GolfHead()

    def embed(self, ids):  # (B, T) -> (B, T, C)
        """x0: the normalised embedding, to which every block can go back."""
        return rms_normalise(self.tok_emb(ids).to(self.compute_dtype))

    def head(self, hidden):  # (..., C) -> (..., V)
        """The logits in fp32, held softly within ±logit_softcap."""
        weight = (self.lm_head or self.tok_emb).weight
        cap = self.config.logit_softcap
        return cap * torch.tanh(self.unembed(hidden, weight).float() / cap)

    def forward(self, ids, targets=None, reduction: str = "mean", last: int | None = None, **how):
        """Logits (B, T, V) fp32; with targets the cross-entropy in nats, a scalar or with reduction "none" (B, T).

        ids and targets (B, T) int64. last: only the last positions of each row, T becomes last. how: what else the
        trunk of this model understands.
        """
        logits = self.head(self.trunk(ids, last=last, **how))
        if targets is None:
            return logits
        targets = targets if last is None else targets[:, -last:]
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)
        return losses.view(targets.shape) if reduction == "none" else losses


# %% [markdown]
# ### `GolfGPT`
# With nine layers, four leave a skip and five follow; the last of the five gets none.


# %%
class GolfGPT(GolfModel):
    """The baseline: blocks in a U, with a learned weight for each channel of each skip. Golf spec section 2.2."""

    def __init__(self, config: GolfConfig, compute_dtype: torch.dtype = torch.float32):
        super().__init__(config, compute_dtype)
        self.blocks = nn.ModuleList(GolfBlock(config) for _ in range(config.num_layers))
        self.encoders = config.num_layers // 2
        self.skip_weights = nn.Parameter(torch.ones(self.encoders, config.model_dim))

    def trunk(self, ids, last: int | None = None, window: int | None = None):
        cos, sin = self.rope(ids.size(1), window)
        x = x0 = self.embed(ids)
        skips = []
        for i, block in enumerate(self.blocks):
            if i >= self.encoders and skips:
                x = x + self.skip_weights[i - self.encoders].to(x.dtype) * skips.pop()
            x = block(x, x0, cos, sin, last if i == len(self.blocks) - 1 else None, window)
            if i < self.encoders:
                skips.append(x)
        return rms_normalise(x)


# %% [markdown]
# ### `parameter_roles`
# Four kinds of tensor, by shape and name. Each gets its own learning rate, the matrices their own optimizer, and the
# control tensors are never quantised.

# %%
CONTROL_TENSOR_NAME_PATTERNS = (
    "attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weight", "skip_gate", "log_alpha", "iter_embed",
)  # fmt: skip


def is_control_tensor(name: str, patterns=CONTROL_TENSOR_NAME_PATTERNS) -> bool:
    """Whether any of the patterns occurs in the name of a parameter."""
    return any(pattern in name for pattern in patterns)


def parameter_roles(model: GolfModel, patterns=CONTROL_TENSOR_NAME_PATTERNS) -> dict[str, dict[str, nn.Parameter]]:
    """Name → parameter by role: "token", "matrix", "scalar" and "head". Golf spec section 2.3.

    A matrix has two dimensions and no control name; the head is there only when it is not tied to the embedding.
    """
    roles = {"token": {}, "matrix": {}, "scalar": {}, "head": {}}
    for name, parameter in model.named_parameters():
        if name == "tok_emb.weight":
            role = "token"
        elif name == "lm_head.weight":
            role = "head"
        else:
            role = "matrix" if parameter.ndim == 2 and not is_control_tensor(name, patterns) else "scalar"
        roles[role][name] = parameter
    return roles


def role_of(name: str) -> str:
    """blocks.3.attn.c_q.weight → blocks.*.attn.c_q.weight: the same tensor of all layers is one role."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
