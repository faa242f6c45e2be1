# %% [markdown]
# ## The model
#
# A GPT as it is built in 2026. Against GPT-2: rotary positions instead of learned ones, RMS norm without parameters,
# no biases, squared ReLU, normalised queries and keys, an embedding that is not tied to the output head, and logits
# held softly within ±15. Three cheaper ideas help small models a lot: every layer mixes the first embedding back in
# with a learned weight, every second layer adds a *value embedding* (a table of values looked up by token, at no cost
# in FLOPs), and most layers look only half as far back.
#
# Shapes in comments: B sequences, T tokens, C model width, H heads, D head width, V vocabulary.

# %%
import math
from dataclasses import dataclass
from functools import partial

import torch
import torch._functorch.config as functorch_config
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recomputed

from nanochat.attention import flash_attn
from nanochat.optim import MuonAdamW
from nanochat.runtime import UserError, print0

# %% [markdown]
# ### `GPTConfig`
# Everything that decides the shape *and the arithmetic* of the model. The last group are constants that no one tunes
# here, yet a checkpoint is unreadable without them: they are saved with it.


# %%
@dataclass(frozen=True)
class GPTConfig:
    """Shape of a model. Spec section 9.1."""

    sequence_len: int = 2048
    vocab_size: int = 32768
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768
    window_pattern: str = "SSSL"  # tiled over the layers: L sees sequence_len tokens back, S half; the last is L
    rope_base: float = 10000.0
    logit_softcap: float = 15.0
    ve_gate_channels: int = 32  # input channels that decide how much value embedding a head takes
    vocab_multiple: int = 64  # tables are padded up to this, for aligned matrix products

    def __post_init__(self):
        if self.n_embd % self.n_head or self.n_head % self.n_kv_head:
            raise UserError(
                f"{self.n_embd} channels, {self.n_head} heads and {self.n_kv_head} key-value heads do not divide: "
                "channels must be a multiple of heads, and heads of key-value heads."
            )
        if not self.window_pattern or set(self.window_pattern.upper()) - set("SL"):
            raise UserError(
                f"window_pattern is {self.window_pattern!r}; it is made of the letters S and L, as SSSL is."
            )
        if self.n_embd < self.ve_gate_channels:
            raise UserError(f"{self.n_embd} channels are fewer than the {self.ve_gate_channels} that the gates read.")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    def window_sizes(self) -> list[tuple[int, int]]:
        """(left, right) of each layer, for `flash_attn`."""
        pattern = self.window_pattern.upper()
        lefts = {"L": self.sequence_len, "S": self.sequence_len // 2}
        sizes = [(lefts[pattern[i % len(pattern)]], 0) for i in range(self.n_layer)]
        sizes[-1] = (lefts["L"], 0)
        return sizes

    def has_value_embedding(self, layer: int) -> bool:
        """Every second layer, counted so that the last one always has it."""
        return layer % 2 == (self.n_layer - 1) % 2


# %% [markdown]
# ### Small parts
# Weights live in fp32 and are cast where they are used, so the optimizer sees every bit of a small update and the
# matrix product still runs in the fast dtype. The rotation turns each half-pair of channels by an angle that grows
# with the position (by −θ: the mirror image of the textbook form, kept so that checkpoints stay readable).


# %%
class Linear(nn.Linear):
    """A matrix product without bias, in the dtype of its input."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


def norm(x):
    """RMS norm over the last dimension, without a learned scale."""
    return RMSNorm.apply(x) if memory_counts(x) else F.rms_norm(x, (x.size(-1),))


def squared_relu(x):
    """max(x, 0)², the nonlinearity of the MLP (So et al. 2021)."""
    return SquaredReLU.apply(x) if memory_counts(x) else F.relu(x).square()


def at_positions(x, positions):  # x (B or 1, T, ...), positions (B, n) -> (B, n, ...)
    """Some positions of each row, of its own; of the only row if there is one for all."""
    return x[0][positions] if x.size(0) == 1 else x[torch.arange(len(x), device=x.device)[:, None], positions]


def apply_rotary_emb(x, cos, sin):  # x (B, T, H, D); cos and sin (1, T, 1, D/2)
    """Rotate the channel pairs (i, i + D/2) of each head by the angle of the position."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1)


# %% [markdown]
# ### Derivatives from the result
# For the backward pass PyTorch keeps what went *into* a norm and into a squared ReLU. The matrix product that follows
# keeps its own input, which is what came *out*: the same numbers twice. Both derivatives can be had from the result as
# well, at the same price, and 7 of the 18 numbers that a layer keeps for each token and channel are no longer needed
# (`benchmarks/activation_memory.py`). Memory is scarce on GPUs only, and only compiled code can fuse the lines below.


# %%
def memory_counts(x) -> bool:
    """Whether to derive from the result: compiled code on a GPU."""
    return x.is_cuda and torch.compiler.is_compiling()


class RMSNorm(torch.autograd.Function):
    """`norm`, keeping its result y = x·r and one r for each row: dx = r·(dy − y·mean(dy·y))."""

    @staticmethod
    def forward(ctx, x):
        r = (x.float().square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).rsqrt()
        y = (x.float() * r).to(x.dtype)
        ctx.save_for_backward(y, r)
        return y

    @staticmethod
    def backward(ctx, y_grad):
        y, r = ctx.saved_tensors
        dy, wide_y = y_grad.float(), y.float()
        return (r * (dy - wide_y * (dy * wide_y).mean(-1, keepdim=True))).to(y.dtype)


class SquaredReLU(torch.autograd.Function):
    """`squared_relu`, keeping its result y: dx = dy · 2√y, exactly max(x, 0) again after rounding."""

    @staticmethod
    def forward(ctx, x):
        y = F.relu(x).square()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, y_grad):
        (y,) = ctx.saved_tensors
        return y_grad * (2 * y.sqrt())


# %% [markdown]
# ### `CausalSelfAttention`
# Queries and keys are rotated, then normalised, which bounds the logits and lets the learning rate be large. On
# layers with a value embedding each head decides per token, from a few input channels, how much of the looked-up
# value to add; a gate of zero weights gives exactly 1, so training starts from a plain sum.


# %%
class CausalSelfAttention(nn.Module):
    """Multi-head attention with a window, rotary positions, QK norm and (on some layers) gated value embeddings."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        self.gate_channels = config.ve_gate_channels
        self.c_q = Linear(config.n_embd, config.n_head * config.head_dim)
        self.c_k = Linear(config.n_embd, config.n_kv_head * config.head_dim)
        self.c_v = Linear(config.n_embd, config.n_kv_head * config.head_dim)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.ve_gate = Linear(self.gate_channels, config.n_kv_head) if config.has_value_embedding(layer) else None

    def forward(self, x, value_embedding, cos, sin, window_size, kv_cache, wanted=None):
        # x (B, T, C), already normalised; wanted: None for all positions, or (B, n), consecutive ones
        B, T, _ = x.shape
        k = self.c_k(x).view(B, T, self.n_kv_head, self.head_dim)
        v = self.c_v(x).view(B, T, self.n_kv_head, self.head_dim)
        if value_embedding is not None:
            gate = 2 * torch.sigmoid(self.ve_gate(x[..., : self.gate_channels]))  # (B, T, H_kv)
            v = v + gate.unsqueeze(-1) * value_embedding.view(B, T, self.n_kv_head, self.head_dim)
        k = norm(apply_rotary_emb(k, cos, sin))
        if wanted is not None:
            x, cos, sin = (at_positions(each, wanted) for each in (x, cos, sin))
        q = norm(apply_rotary_emb(self.c_q(x).view(B, -1, self.n_head, self.head_dim), cos, sin))
        if kv_cache is not None:
            k_cache, v_cache = kv_cache.get_layer_cache(self.layer)
        if wanted is not None:
            if kv_cache is not None:  # it is empty, see `GPT.trunk`
                k_cache[:, :T], v_cache[:, :T] = k, v
            ends = wanted[:, -1].int() + 1
            y = flash_attn.flash_attn_with_kvcache(q, k, v, cache_seqlens=ends, causal=True, window_size=window_size)
        elif kv_cache is None:
            y = flash_attn.flash_attn_func(q, k, v, causal=True, window_size=window_size)
        else:
            y = flash_attn.flash_attn_with_kvcache(
                q, k_cache, v_cache, k, v, kv_cache.cache_seqlens, causal=True, window_size=window_size,
                bounds=kv_cache.bounds(),
            )  # fmt: skip
        return self.c_proj(y.flatten(2))


# %% [markdown]
# ### `MLP` and `Block`
# The block's first line is the unusual one: the residual stream is rescaled and the very first embedding is mixed
# back in, each with a learned scalar per layer.


# %%
class MLP(nn.Module):
    """C → 4C → C with squared ReLU."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(squared_relu(self.c_fc(x)))


class Block(nn.Module):
    """One layer. The scalars and the value embedding come from the model, which owns them."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.attn = CausalSelfAttention(config, layer)
        self.mlp = MLP(config)

    def forward(
        self, x, x0, resid_lambda, x0_lambda, value_embedding, cos, sin, window_size, kv_cache=None, wanted=None
    ):
        x = resid_lambda.to(x.dtype) * x + x0_lambda.to(x.dtype) * x0
        y = self.attn(norm(x), value_embedding, cos, sin, window_size, kv_cache, wanted)
        x = (x if wanted is None else at_positions(x, wanted)) + y
        return x + self.mlp(norm(x))


# %% [markdown]
# ### The loss, without the logits
# For 32,768 sequences-of-tokens-by-vocabulary the logits are the largest tensor of the whole step, by far, and they
# are only needed to be summed. So they are made a chunk of rows at a time: loss, gradient, next chunk. The soft cap
# has a second use here: logits within ±15 can be exponentiated as they are, without looking for the maximum first.

# %%
LOSS_CHUNK_ROWS = 512  # rows of logits alive at once; on a CPU 256 to 1024 are equally fast


def loss_chunk_rows(device: torch.device) -> int:
    """More on a GPU, which needs larger products to be busy (chosen, not measured)."""
    return LOSS_CHUNK_ROWS if device.type == "cpu" else 4 * LOSS_CHUNK_ROWS


def capped_logits(logits, softcap: float):
    """softcap · tanh(logits / softcap) in fp32."""
    # tanh through exp: half the time of the library's tanh on a CPU, with an error of 4e-6
    return softcap - 2 * softcap / (torch.exp(logits.float() * (2 / softcap)) + 1)


def chunk_losses(logits, targets, softcap: float):  # (n, V) any float dtype, (n,) int64
    """Cross-entropy of each row in nats, (n,) fp32; 0 where the target is negative."""
    picked = capped_logits(logits.gather(1, targets.clamp(min=0)[:, None])[:, 0], softcap)
    return (capped_logits(logits, softcap).exp().sum(1).log() - picked) * (targets >= 0)


def chunk_losses_and_gradient(logits, targets, softcap: float):
    """`chunk_losses`, and the gradient of their sum with respect to `logits`, in the dtype of `logits`."""
    target_column, counts = targets.clamp(min=0)[:, None], (targets >= 0)[:, None]
    capped = capped_logits(logits, softcap)
    exponentials = capped.exp()
    total = exponentials.sum(1, keepdim=True)
    slope = 1 - (capped / softcap).square()  # derivative of the cap
    gradient = (exponentials * slope * (counts / total)).to(logits.dtype)
    picked = capped_logits(logits.gather(1, target_column), softcap)
    picked_slope = 1 - (picked / softcap).square()
    # The target's entry is p - 1, written whole: subtracting 1 from a rounded p would lose the digits that matter.
    picked_gradient = (picked.exp() / total - 1) * picked_slope * counts
    gradient = gradient.scatter(1, target_column, picked_gradient.to(logits.dtype))
    return ((total.log() - picked) * counts)[:, 0], gradient


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of a linear head with soft-capped logits, never holding more than a chunk of them.

    x (N, C), weight (V, C) fp32, targets (N,) with negatives ignored. Gradients are computed in the forward pass, while
    the chunk is in the cache, as those of the sum: divided by the number of targets they would be too small for fp16.
    Backward scales them in place, so it can run once.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, softcap, losses_and_gradient_of):
        fast_weight = weight.to(x.dtype)
        scale = 1 / (targets >= 0).sum().clamp(min=1)
        total = x.new_zeros((), dtype=torch.float32)
        x_grad, weight_grad = torch.empty_like(x), torch.zeros_like(weight)
        chunk = loss_chunk_rows(x.device)
        for start in range(0, x.size(0), chunk):
            rows = slice(start, start + chunk)
            logits = x[rows] @ fast_weight.T
            losses, gradient = losses_and_gradient_of(logits, targets[rows], softcap)
            total += losses.sum()
            x_grad[rows] = gradient @ fast_weight
            weight_grad += gradient.T @ x[rows]
        ctx.save_for_backward(x_grad, weight_grad, scale)
        return total * scale

    @staticmethod
    def backward(ctx, loss_grad):
        x_grad, weight_grad, scale = ctx.saved_tensors
        scale = (loss_grad * scale).view(1, 1)  # without dimensions a GPU would round it to the dtype of x
        return x_grad.mul_(scale), weight_grad.mul_(scale), None, None, None


# %% [markdown]
# ### `GPT`
# Built on the meta device (no memory, no time), then given memory and real values by `init_weights`. Output matrices
# of attention and MLP start at zero, so at step 0 every block is the identity and the loss is exactly that of guessing.


# %%
class GPT(nn.Module):
    """The language model. `compute_dtype` is the dtype of activations; weights stay in fp32. Spec section 9."""

    def __init__(self, config: GPTConfig, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        self.window_sizes = config.window_sizes()
        V, C, kv_width = config.padded_vocab_size, config.n_embd, config.n_kv_head * config.head_dim
        self.transformer = nn.ModuleDict(
            {"wte": nn.Embedding(V, C), "h": nn.ModuleList(Block(config, i) for i in range(config.n_layer))}
        )
        self.lm_head = Linear(C, V)
        self.resid_lambdas = nn.Parameter(torch.ones(config.n_layer))
        self.x0_lambdas = nn.Parameter(torch.zeros(config.n_layer))
        self.value_embeds = nn.ModuleDict(
            {str(i): nn.Embedding(V, kv_width) for i in range(config.n_layer) if config.has_value_embedding(i)}
        )
        # Ten times the training length, because few-shot prompts may be longer than anything seen in training.
        cos, sin = self.rotary_tables(10 * config.sequence_len)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.compiled_shape, self.compiled = None, {}
        self.recompute = False  # True: training keeps only each layer's input, and computes the rest again in backward

    def rotary_tables(self, length: int, device=None) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of position times frequency, (1, length, 1, D/2) in the compute dtype."""
        D = self.config.head_dim
        frequencies = self.config.rope_base ** (-torch.arange(0, D, 2, dtype=torch.float32, device=device) / D)
        angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequencies)[None, :, None, :]
        return angles.cos().to(self.compute_dtype), angles.sin().to(self.compute_dtype)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Give every tensor its starting value. Spec section 9.2."""
        C = self.config.n_embd
        bound = math.sqrt(3 / C)  # a uniform distribution with this bound has standard deviation 1/√C
        nn.init.normal_(self.transformer["wte"].weight, std=1.0)
        nn.init.normal_(self.lm_head.weight, std=0.001)
        for block in self.transformer["h"]:
            for linear in (block.attn.c_q, block.attn.c_k, block.attn.c_v, block.mlp.c_fc):
                nn.init.uniform_(linear.weight, -bound, bound)
            nn.init.zeros_(block.attn.c_proj.weight)
            nn.init.zeros_(block.mlp.c_proj.weight)
            if block.attn.ve_gate is not None:
                nn.init.zeros_(block.attn.ve_gate.weight)
        for table in self.value_embeds.values():
            nn.init.uniform_(table.weight, -bound, bound)
        self.resid_lambdas.fill_(1.0)
        self.x0_lambdas.fill_(0.1)
        cos, sin = self.rotary_tables(10 * self.config.sequence_len, device=self.get_device())
        self.cos, self.sin = cos, sin
        # Half the memory traffic for the largest tables; on a CPU it buys nothing, and fp16 is too narrow for updates.
        if self.get_device().type == "cuda" and self.compute_dtype == torch.bfloat16:
            for table in (self.transformer["wte"], *self.value_embeds.values()):
                table.to(self.compute_dtype)

    def get_device(self) -> torch.device:
        return self.lm_head.weight.device

    def compile(self, batch_size: int, length: int) -> None:
        """Compile the blocks and the loss for training batches of exactly this shape; other shapes run eagerly.

        One block is compiled, not the whole model: layers share its code, so the wait does not grow with depth.
        """
        # Of one function torch keeps eight compiled forms at most and then runs it as it is; one shape has up to eight:
        # with or without value embedding, short or long window, training or evaluation.
        torch.compiler.reset()
        # Otherwise what has derivatives of its own (norms, fp8) is traced anew at every start, cache or not.
        if hasattr(functorch_config, "autograd_cache_allow_custom_autograd_functions"):
            functorch_config.autograd_cache_allow_custom_autograd_functions = True
        self.compiled_shape = (batch_size, length)
        for function in (Block.forward, chunk_losses, chunk_losses_and_gradient):
            self.compiled[function] = torch.compile(function, dynamic=False)

    def compiled_for(self, idx) -> dict:
        """The compiled functions, if they are for this batch. On a CPU evaluation is eager: it would compile again."""
        pays = torch.is_grad_enabled() or idx.is_cuda
        return self.compiled if pays and idx.shape == self.compiled_shape else {}

    def trunk(self, idx, kv_cache=None, ends=None, n: int = 1):  # (B, T) int64 -> (B, T, C), with ends (B, n, C)
        """Everything before the output head. With a cache, row b's tokens follow the cache_seqlens[b] that it holds.

        ends (B,) int64: only the n positions before ends[b] of each row are wanted, and the last layer computes no
        others (where there are fewer than n, the first ones mean nothing). Without a cache, or with an empty one.
        """
        T = idx.size(1)
        held = 0 if kv_cache is None else kv_cache.longest()
        if held + T > self.cos.size(1):
            raise ValueError(f"{held + T} tokens are more than the {self.cos.size(1)} positions of the rotary tables")
        if ends is not None and held:
            raise ValueError("only an empty cache goes together with ends")
        wanted = None if ends is None else ends[:, None] + torch.arange(-n, 0, device=idx.device)
        cos, sin = self.cos[:, :T], self.sin[:, :T]
        if kv_cache is not None:  # each row goes on where its own tokens end
            positions = kv_cache.cache_seqlens[:, None] + torch.arange(T, device=idx.device)  # (B, T)
            cos, sin = self.cos[0, positions], self.sin[0, positions]  # (B, T, 1, D/2)
        run_block = self.compiled_for(idx).get(Block.forward, Block.forward) if kv_cache is None else Block.forward
        if self.recompute and kv_cache is None and torch.is_grad_enabled():
            run_block = partial(recomputed, run_block, use_reentrant=False, preserve_rng_state=False)
        x0 = norm(self.transformer["wte"](idx).to(self.compute_dtype))
        x = x0.clone()  # one tensor under two names would be compiled as a case of its own
        for i, block in enumerate(self.transformer["h"]):
            table = self.value_embeds[str(i)] if self.config.has_value_embedding(i) else None
            value_embedding = None if table is None else table(idx).to(self.compute_dtype)
            x = run_block(
                block, x, x0, self.resid_lambdas[i], self.x0_lambdas[i], value_embedding, cos, sin,
                self.window_sizes[i], kv_cache, wanted if i == self.config.n_layer - 1 else None,
            )  # fmt: skip
        if kv_cache is not None:
            kv_cache.advance(T)
        return norm(x)

    def head(self, hidden):  # (..., C) -> (..., V)
        """The soft-capped fp32 logits of hidden states, for those who need them at a few positions only."""
        weight = self.lm_head.weight[: self.config.vocab_size]
        return capped_logits(hidden @ weight.to(hidden.dtype).T, self.config.logit_softcap)

    def forward(self, idx, targets=None, kv_cache=None, loss_reduction: str = "mean"):
        """Logits (B, T, V) fp32, or with targets the cross-entropy in nats.

        idx (B, T) int64; targets (B, T) int64, negatives are ignored. loss_reduction "mean" gives a scalar over the
        targets that count, "none" one loss per position, (B·T,), with 0 where the target is ignored.
        """
        x = self.trunk(idx, kv_cache)
        if targets is None:
            return self.head(x)
        if loss_reduction not in ("mean", "none"):
            raise ValueError(f"loss_reduction is {loss_reduction!r}; it can be mean or none")
        weight, softcap = self.lm_head.weight[: self.config.vocab_size], self.config.logit_softcap
        compiled = self.compiled_for(idx)
        x, targets = x.view(-1, x.size(-1)), targets.reshape(-1)
        if loss_reduction == "mean" and torch.is_grad_enabled():
            losses_and_gradient_of = compiled.get(chunk_losses_and_gradient, chunk_losses_and_gradient)
            return ChunkedCrossEntropy.apply(x, weight, targets, softcap, losses_and_gradient_of)
        losses_of = compiled.get(chunk_losses, chunk_losses)
        fast_weight = weight.to(x.dtype)
        chunks = zip(x.split(loss_chunk_rows(x.device)), targets.split(loss_chunk_rows(x.device)), strict=True)
        losses = torch.cat([losses_of(rows @ fast_weight.T, chunk, softcap) for rows, chunk in chunks])
        return losses if loss_reduction == "none" else losses.sum() / (targets >= 0).sum().clamp(min=1)

    def num_scaling_params(self) -> dict[str, int]:
        """Parameter counts by role. Scaling laws count matrices and head: what is multiplied for every token."""
        counts = {
            "wte": self.transformer["wte"].weight.numel(),
            "value_embeds": sum(p.numel() for p in self.value_embeds.parameters()),
            "lm_head": self.lm_head.weight.numel(),
            "transformer_matrices": sum(p.numel() for p in self.transformer["h"].parameters()),
            "scalars": self.resid_lambdas.numel() + self.x0_lambdas.numel(),
        }
        counts["total"] = sum(counts.values())
        assert counts["total"] == sum(p.numel() for p in self.parameters()), "a parameter belongs to no role"
        return counts

    def estimate_flops(self) -> int:
        """Training FLOPs per token: 6 for each multiplied weight, plus attention without a discount for causality."""
        counts, T = self.num_scaling_params(), self.config.sequence_len
        seen = sum(T if left < 0 else min(left, T) for left, _ in self.window_sizes)
        return 6 * (counts["transformer_matrices"] + counts["lm_head"]) + 12 * self.config.n_embd * seen

    def setup_optimizer(
        self,
        unembedding_lr: float = 0.004,
        embedding_lr: float = 0.2,
        matrix_lr: float = 0.02,
        weight_decay: float = 0.0,
        adam_betas: tuple[float, float] = (0.8, 0.95),
        scalar_lr: float = 0.5,
    ) -> MuonAdamW:
        """AdamW for tables, head and scalars; Muon for every matrix inside the blocks. Spec section 9.4."""
        width_scale = (self.config.n_embd / 768) ** -0.5  # AdamW's rates were tuned at width 768
        print0(f"AdamW learning rates are scaled by {width_scale:.4f} for width {self.config.n_embd}")

        def adamw(params, lr, betas=adam_betas):
            return dict(kind="adamw", params=list(params), lr=lr, betas=betas, eps=1e-10, weight_decay=0.0)

        groups = [
            adamw(self.lm_head.parameters(), unembedding_lr * width_scale),
            adamw(self.transformer["wte"].parameters(), embedding_lr * width_scale),
            adamw(self.value_embeds.parameters(), embedding_lr * width_scale),
            adamw([self.resid_lambdas], scalar_lr * 0.01),
            adamw([self.x0_lambdas], scalar_lr, betas=(0.96, 0.95)),
        ]
        matrices = list(self.transformer["h"].parameters())
        for shape in sorted({p.shape for p in matrices}):
            same_shape = [p for p in matrices if p.shape == shape]
            groups.append(
                dict(kind="muon", params=same_shape, lr=matrix_lr, momentum=0.95, ns_steps=5, beta2=0.95,
                     weight_decay=weight_decay)
            )  # fmt: skip
        return MuonAdamW(groups, compute_dtype=self.compute_dtype)

    @torch.inference_mode()
    def generate(self, tokens: list[int], max_tokens: int, temperature: float = 1.0, top_k: int | None = None, seed=42):
        """Yield up to max_tokens next tokens, recomputing everything each time: slow, and right by inspection.

        The engine is tested against this. temperature 0 takes the likeliest token.
        """
        device = self.get_device()
        rng = torch.Generator(device=device).manual_seed(seed)
        ids = torch.tensor([tokens], dtype=torch.long, device=device)
        for _ in range(max_tokens):
            logits = self.forward(ids)[:, -1]
            if top_k:
                smallest_kept = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                logits = logits.masked_fill(logits < smallest_kept, float("-inf"))
            if temperature > 0:
                next_id = torch.multinomial((logits / temperature).softmax(-1), 1, generator=rng)
            else:
                next_id = logits.argmax(-1, keepdim=True)
            ids = torch.cat([ids, next_id], dim=1)
            yield next_id.item()
