# %% [markdown]
# ## Golf optimizers
#
# The matrices inside the blocks get the first form of Muon: Nesterov momentum, then five Newton–Schulz steps, which
# turn the update into a nearly orthogonal matrix, and nothing else. The second system first gives every row of the
# update the same length (MuonEq-R), and it adds weight decay. Embedding, gains and mixes get Adam, the same kernel that
# trains nanochat. The second system also averages its late weights: the average of many is usually better than the
# last.
#
# With several processes each orthogonalises its share of the matrices and sends the result to the others. Everything
# else is done by all of them alike, so that their weights stay the same to the last bit.

# %%
import torch
import torch.distributed as dist
import torch.nn as nn

from golf.golf_gpt import CONTROL_TENSOR_NAME_PATTERNS, GolfModel, parameter_roles
from nanochat.optim import MuonAdamW, all_gather_into, odd_polynomials
from nanochat.runtime import UserError, is_ddp_initialized

# %% [markdown]
# ### `newton_schulz`
# One odd polynomial, five times over. It lifts small singular values quickly and lets the large ones swing around one;
# they end between about 0.7 and 1.2, except those that began near zero.

# %%
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def newton_schulz(x, steps: int = 5, compute_dtype: torch.dtype = torch.bfloat16):  # (K, m, n)
    """The orthogonal factor of each matrix, approximately, in compute_dtype. Golf spec section 2.3."""
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(compute_dtype)
    return odd_polynomials(x, (NEWTON_SCHULZ_COEFFICIENTS,) * steps)


# %% [markdown]
# ### `muon_directions`
# The momentum here is a plain sum of past gradients, not an average as in nanochat; after the orthogonalisation only
# the direction is left, so the size of the sum does not matter.


# %%
def muon_directions(grads, momentum_buffer, momentum_t, ns_steps: int, equalise_rows: bool, compute_dtype):
    """The orthogonalised steps of K matrices, (K, m, n) in compute_dtype; momentum_buffer is updated in place.

    equalise_rows: give every row the same length first (MuonEq-R). Golf spec sections 2.3 and 4.4.
    """
    momentum_buffer.mul_(momentum_t).add_(grads)
    direction = grads + momentum_t * momentum_buffer
    if equalise_rows:
        direction = direction / direction.norm(dim=-1, keepdim=True).clamp(min=1e-7)  # a row may still be zero
    return newton_schulz(direction, ns_steps, compute_dtype)


# %% [markdown]
# ### `reduce_gradients`
# One collective for all gradients. It comes before the optimizer, since clipping needs the norm of the whole.


# %%
@torch.no_grad()
def reduce_gradients(parameters, scale: float) -> None:
    """Replace every gradient by scale × its sum over all processes; all of them must call it.

    scale: 1/world_size for the mean of equally large batches. A process without any gradient counts as zero.
    """
    parameters = list(parameters)
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if is_ddp_initialized():
        flat = torch.cat([p.grad.flatten() for p in parameters])
        dist.all_reduce(flat)
        pieces = flat.split([p.numel() for p in parameters])
        torch._foreach_copy_(
            [p.grad for p in parameters], [x.view_as(p) for x, p in zip(pieces, parameters, strict=True)]
        )
    if scale != 1:
        torch._foreach_mul_([p.grad for p in parameters], scale)


# %% [markdown]
# ### `GolfOptimizer`
# nanochat's optimizer with another rule for the matrices and a simpler division of the work: gradients arrive averaged,
# Adam's few tensors are updated everywhere, and of Muon only the expensive part is shared out.


# %%
class GolfOptimizer(MuonAdamW):
    """Adam and Muon by parameter group. Golf spec sections 2.3 and 4.4.

    Groups: `kind="adamw"` with lr, betas, eps, weight_decay, or `kind="muon"` with lr, momentum, ns_steps,
    equalise_rows, weight_decay and parameters of one shape. Weight decay is decoupled and scaled by the learning rate.
    Gradients must be the same on all processes (`reduce_gradients`). compute_dtype is that of Newton–Schulz.
    """

    def __init__(self, param_groups: list[dict], compute_dtype: torch.dtype = torch.bfloat16):
        super().__init__(param_groups, compute_dtype)
        self.muon_kernel = muon_directions

    def compile(self) -> None:
        """Compile the update kernels; on a CPU only Adam's."""
        super().compile()
        on_cuda = self.param_groups[0]["params"][0].is_cuda
        self.muon_kernel = torch.compile(muon_directions, dynamic=False, fullgraph=True) if on_cuda else muon_directions

    def set_schedule(self, lr_multiplier: float, momentum: float) -> None:
        """The learning rates, as a multiple of their starting values, and Muon's momentum for the next step."""
        for group in self.param_groups:
            group["lr"] = group["initial_lr"] * lr_multiplier
            if group["kind"] == "muon":
                group["momentum"] = momentum

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter from its gradient. All processes must call it."""
        muon = [group for group in self.param_groups if group["kind"] == "muon"]
        started = [self.start_directions(group) for group in muon]
        for group in self.param_groups:
            if group["kind"] == "adamw":
                for p in group["params"]:
                    if p.grad is not None:
                        self.update_adamw(p, p, p.grad, group)
        for group, (work, directions) in zip(muon, started, strict=True):
            if work is not None:
                work.wait()
            params, lr = group["params"], group["lr"]
            rows, columns = params[0].shape
            steps = directions[: len(params)].to(params[0].dtype).unbind()
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            torch._foreach_add_(params, steps, alpha=-lr * max(1, rows / columns) ** 0.5)

    def owned_rows(self, p, group) -> tuple[int, int]:
        """(first, end) of the matrices of a muon group whose state is here; of Adam's parameters all rows."""
        if group["kind"] == "adamw":
            return 0, p.size(0)
        matrices = len(group["params"])
        chunk = -(-matrices // self.world_size)
        return min(self.rank * chunk, matrices), min((self.rank + 1) * chunk, matrices)

    def start_directions(self, group):
        """Orthogonalise the matrices that are ours and begin to exchange them; the last processes may own none."""
        params = group["params"]
        chunk = -(-len(params) // self.world_size)
        mine = params[self.rank * chunk : (self.rank + 1) * chunk]
        directions = None
        if mine:
            state = self.state[params[0]]
            grads = torch.stack([p.grad for p in mine])
            if not state:
                state["momentum_buffer"] = torch.zeros_like(grads)
            momentum = torch.tensor(float(group["momentum"]))
            directions = self.muon_kernel(
                grads, state["momentum_buffer"], momentum, group["ns_steps"], group["equalise_rows"], self.compute_dtype
            )
        if self.world_size == 1:
            return None, directions
        own = torch.zeros(chunk, *params[0].shape, dtype=self.compute_dtype, device=params[0].device)
        if mine:
            own[: len(mine)] = directions
        everyone = own.new_empty(chunk * self.world_size, *params[0].shape)
        return all_gather_into(everyone, own, async_op=True), everyone


# %% [markdown]
# ### `setup_golf_optimizer`
# The rates of the challenge's baseline, under its names. Matrices of one shape form one group, one stack of products.


# %%
def setup_golf_optimizer(
    model: GolfModel,
    tied_embed_lr: float = 0.05,
    embed_lr: float = 0.6,
    head_lr: float = 0.008,
    matrix_lr: float = 0.04,
    scalar_lr: float = 0.04,
    muon_momentum: float = 0.95,
    muon_backend_steps: int = 5,
    muon_weight_decay: float = 0.0,
    equalise_rows: bool = False,
    embed_wd: float = 0.0,
    adam_wd: float = 0.0,
    adam_betas: tuple[float, float] = (0.9, 0.95),
    adam_eps: float = 1e-8,
    control_patterns: tuple[str, ...] = CONTROL_TENSOR_NAME_PATTERNS,
    compute_dtype: torch.dtype = torch.bfloat16,
) -> GolfOptimizer:
    """The optimizer of a golf model. Golf spec section 2.3; with decay and equalise_rows that of section 4.4.

    embed_lr and head_lr count when the head is not tied to the embedding, tied_embed_lr when it is.
    """
    roles = {role: list(members.values()) for role, members in parameter_roles(model, control_patterns).items()}

    def adam(params, lr, weight_decay):
        return dict(kind="adamw", params=params, lr=lr, betas=adam_betas, eps=adam_eps, weight_decay=weight_decay)

    groups = [
        adam(roles["token"], tied_embed_lr if model.config.tie_embeddings else embed_lr, embed_wd),
        adam(roles["scalar"], scalar_lr, adam_wd),
    ]
    if roles["head"]:
        groups.append(adam(roles["head"], head_lr, 0.0))
    for shape in sorted({p.shape for p in roles["matrix"]}):
        groups.append(
            dict(kind="muon", params=[p for p in roles["matrix"] if p.shape == shape], lr=matrix_lr,
                 momentum=muon_momentum, ns_steps=muon_backend_steps, equalise_rows=equalise_rows,
                 weight_decay=muon_weight_decay)
        )  # fmt: skip
    return GolfOptimizer(groups, compute_dtype)


# %% [markdown]
# ### `WeightEMA`
# The average starts late, from weights that have already learned something, and forgets fast enough that these first
# ones are gone by the end: with n steps left a decay of 1 − 10/n leaves e⁻¹⁰ of them. It is kept in fp32; in bf16 one
# step of a slow average is less than the last bit.


# %%
def ema_decay_for(longest: float, steps_done: int, progress: float) -> float:
    """The decay of an average that starts after steps_done steps, at `progress` (0 to 1) of the run.

    At most `longest`; less when the steps that are left, at the pace so far, are few. Golf spec section 4.5.
    """
    steps_left = steps_done * (1 - progress) / progress if progress > 0 else float("inf")
    return min(longest, max(0.0, 1 - 10 / steps_left)) if steps_left > 0 else 0.0


class WeightEMA:
    """An exponential moving average of a model's floating-point state. Golf spec section 4.5."""

    def __init__(self, model: nn.Module, decay: float = 0.997, start_fraction: float = 0.4):
        if not (0 <= decay < 1 and 0 <= start_fraction <= 1):
            raise UserError(
                f"EMA decay {decay} and start {start_fraction}: the first lies in [0, 1), the other in [0, 1]."
            )
        self.model, self.longest, self.start_fraction = model, decay, start_fraction
        self.decay = None  # decided at the start
        self.shadow: dict[str, torch.Tensor] = {}

    @property
    def started(self) -> bool:
        return self.decay is not None

    @torch.no_grad()
    def update(self, step: int, progress: float) -> None:
        """Call it after the optimizer's step number `step` (from 1), with the same progress on all processes."""
        weights = {name: w for name, w in self.model.state_dict().items() if w.is_floating_point()}
        if self.started:
            torch._foreach_lerp_(list(self.shadow.values()), [w.float() for w in weights.values()], 1 - self.decay)
        elif progress >= self.start_fraction:
            self.decay = ema_decay_for(self.longest, step, progress)
            self.shadow = {name: w.float().clone() for name, w in weights.items()}

    def state_dict(self) -> dict:
        return {"decay": self.decay, "shadow": self.shadow}

    def load_state_dict(self, state: dict) -> None:
        """Go on from a saved average, wherever it was read to: it comes to the model's device."""
        weights = self.model.state_dict()
        self.decay = state["decay"]
        self.shadow = {name: tensor.to(weights[name].device) for name, tensor in state["shadow"].items()}

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Put the average into the model, in the dtypes of its parameters; all processes must."""
        if not self.started:
            raise UserError(
                f"the run ended before the weight average began, at {self.start_fraction:.0%} of it. "
                "Train longer, or export the raw weights."
            )
        self.model.load_state_dict(self.model.state_dict() | self.shadow)
