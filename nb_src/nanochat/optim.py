# %% [markdown]
# ## The optimizer
#
# Two kinds of parameter, two rules. Tables, head and scalars get AdamW. Every matrix inside the blocks gets Muon: its
# momentum is replaced by the nearest matrix whose singular values are all about one, so that directions which gradients
# rarely point to are learned as fast as the common ones. All matrices of one shape are updated together, as one stack.
#
# The same class runs on one device and on many. With many, each process keeps the optimizer state of its share only
# (ZeRO stage 2): gradients are averaged to their owner, the owner updates, and the new values are sent back. What one
# number of processes has saved, another can go on from: the shares are put together and cut anew.

# %%
import torch
import torch.distributed as dist

from nanochat.runtime import is_ddp_initialized

# %% [markdown]
# ### `adamw_step_fused`
# Hyper-parameters arrive as zero-dimensional tensors: a compiled kernel would treat Python numbers as constants and
# recompile at every step of the schedule.


# %%
def adamw_step_fused(p, grad, exp_avg, exp_avg_sq, step_t, lr_t, beta1_t, beta2_t, eps_t, wd_t) -> None:
    """One AdamW update in place (Loshchilov & Hutter 2019), in the order of spec section 8.2."""
    p.mul_(1 - lr_t * wd_t)
    exp_avg.lerp_(grad, 1 - beta1_t)
    exp_avg_sq.lerp_(grad.square(), 1 - beta2_t)
    bias1, bias2 = 1 - beta1_t**step_t, 1 - beta2_t**step_t
    p.sub_(exp_avg / ((exp_avg_sq / bias2).sqrt() + eps_t) * (lr_t / bias1))


# %% [markdown]
# ### `polar_express`
# Five odd polynomials, composed, push every singular value towards one. Their coefficients are the fastest possible
# for five steps (Amsel et al. 2025); nothing but matrix products, so it runs at full speed in bf16.

# %%
POLAR_EXPRESS_COEFFICIENTS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def polar_express(x, steps: int = 5):  # (K, m, n)
    """The orthogonal factor of each matrix, approximately (singular values within about 0.7 to 1.2)."""
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)  # 2 % of room: bf16 must not push the largest above one
    return odd_polynomials(x, POLAR_EXPRESS_COEFFICIENTS[:steps])


def odd_polynomials(x, coefficients):  # (K, m, n)
    """Apply a·s + b·s³ + c·s⁵ to all singular values s, once for each (a, b, c)."""
    tall = x.size(-2) > x.size(-1)
    for a, b, c in coefficients:
        gram = x.mT @ x if tall else x @ x.mT  # the smaller of the two
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, polynomial, beta=a) if tall else torch.baddbmm(x, polynomial, x, beta=a)
    return x


# %% [markdown]
# ### `muon_step_fused`
# Around the orthogonalisation stand three refinements: Nesterov momentum, a per-row normaliser that evens out rows
# with large updates while keeping the total (NorMuon), and weight decay only where it agrees with the update.


# %%
def muon_step_fused(
    stacked_grads, stacked_params, momentum_buffer, second_momentum_buffer, momentum_t, lr_t, wd_t, beta2_t,
    ns_steps: int, compute_dtype: torch.dtype,
) -> None:  # fmt: skip
    """One Muon update of K matrices in place, (K, m, n). Spec section 8.3; arithmetic in the parameters' dtype.

    second_momentum_buffer (K, m, 1) for m >= n, else (K, 1, n). stacked_grads is overwritten.
    """
    momentum_buffer.lerp_(stacked_grads, 1 - momentum_t)
    direction = stacked_grads.lerp_(momentum_buffer, momentum_t)
    if compute_dtype == torch.float16:  # its range ends at 6e-8, above the entries of many a gradient
        direction = direction / direction.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-15)
    update = polar_express(direction.to(compute_dtype), ns_steps).to(stacked_params.dtype)

    m, n = update.shape[-2:]
    reduced = -1 if m >= n else -2
    size = update.size(reduced)
    mean_square = update.float().square().mean(dim=reduced, keepdim=True)
    second_momentum_buffer.lerp_(mean_square.to(second_momentum_buffer.dtype), 1 - beta2_t)
    scale = second_momentum_buffer.float().clamp(min=1e-10).rsqrt()
    norm_before = (size * mean_square.sum(dim=(-2, -1), keepdim=True)).sqrt()
    norm_after = (size * mean_square * scale.square()).sum(dim=(-2, -1), keepdim=True).sqrt()
    update = update * (scale * (norm_before / norm_after.clamp(min=1e-10))).to(update.dtype)

    lr_t = lr_t * max(1, m / n) ** 0.5
    agrees = (update * stacked_params) >= 0  # decay that would fight the update is skipped ("cautious")
    stacked_params.sub_(lr_t * update + lr_t * wd_t * stacked_params * agrees)


# %% [markdown]
# ### Collectives
# torch 2.13 renamed two collectives and deprecated the old names, which are the only ones in 2.9. Sums are divided
# here because not every backend can average.

# %%
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# %% [markdown]
# ### `MuonAdamW`
# With several processes a step has three phases, so that the network and the arithmetic overlap: start all
# reductions; as each arrives, update the share that is ours and start sending it back; wait for the last.

# %%
SMALL_PARAMETER = 1024  # elements; below this, sharding costs more than it saves and every process updates the whole


class MuonAdamW(torch.optim.Optimizer):
    """AdamW and Muon by parameter group, sharded over the process group when there is one. Spec section 8.

    Groups: `kind="adamw"` with lr, betas, eps, weight_decay, or `kind="muon"` with lr, momentum, ns_steps, beta2,
    weight_decay and parameters of one shape. compute_dtype is that of Muon's matrix products.
    """

    def __init__(self, param_groups: list[dict], compute_dtype: torch.dtype = torch.bfloat16):
        for group in param_groups:
            if group.get("kind") not in ("adamw", "muon"):
                raise ValueError(f"a parameter group has kind {group.get('kind')!r}; it can be adamw or muon")
            if group["kind"] == "muon" and len({p.shape for p in group["params"]}) != 1:
                raise ValueError("all parameters of a muon group must have one shape")
        super().__init__(param_groups, {})
        for group in self.param_groups:
            group["initial_lr"] = group["lr"]
        self.compute_dtype = compute_dtype
        self.adamw_kernel, self.muon_kernel = adamw_step_fused, muon_step_fused
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if is_ddp_initialized() else (0, 1)

    def compile(self) -> None:
        """Compile the update kernels; on a CPU only AdamW's, which are element-wise throughout."""
        self.adamw_kernel = torch.compile(adamw_step_fused, dynamic=False, fullgraph=True)
        if self.param_groups[0]["params"][0].is_cuda:
            self.muon_kernel = torch.compile(muon_step_fused, dynamic=False, fullgraph=True)

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter from its gradient. All processes must call it."""
        adamw = [(p, group) for group in self.param_groups if group["kind"] == "adamw" for p in group["params"]]
        muon = [group for group in self.param_groups if group["kind"] == "muon"]
        adamw = [(p, group) for p, group in adamw if p.grad is not None]
        if self.world_size == 1:
            for p, group in adamw:
                self.update_adamw(p, p, p.grad, group)
            for group in muon:
                self.update_muon(group)
            return
        reductions = [self.start_adamw_reduction(p) for p, _ in adamw] + [self.start_muon_reduction(g) for g in muon]
        gathers = []
        for (p, group), (work, grad) in zip(adamw, reductions[: len(adamw)], strict=True):
            gathers.append(self.finish_adamw(p, group, work, grad))
        for group, (work, grads, padded) in zip(muon, reductions[len(adamw) :], strict=True):
            gathers.append(self.finish_muon(group, work, grads, padded))
        for work, copy_back in gathers:
            if work is not None:
                work.wait()
            copy_back()

    @torch.no_grad()
    def allocate_state(self) -> None:
        """Create the state that the first step would create, so that the memory left is known before it.

        All processes must call it.
        """
        for group in self.param_groups:
            if group["kind"] == "muon":
                first, end = self.owned_rows(group["params"][0], group)
                self.muon_state(group, end - first)
            else:
                for p in group["params"]:
                    self.adamw_state(p, p[slice(*self.owned_rows(p, group))])
        if self.world_size > 1:
            self.use_the_network()

    def use_the_network(self) -> None:
        """Reduce and gather zeros, as much at once as a step does at the least and at the most.

        NCCL takes memory of its own at its first use, and PyTorch gives back nothing of what it holds.
        """
        sizes, first = set(), self.param_groups[0]["params"][0]
        for group in self.param_groups:
            if group["kind"] == "muon":
                sizes.add(-(-len(group["params"]) // self.world_size) * self.world_size * group["params"][0].numel())
            else:
                sizes |= {p.numel() for p in group["params"] if p.numel() >= SMALL_PARAMETER}
        for size in {min(sizes), max(sizes)} if sizes else ():
            whole = torch.zeros(size, device=first.device)
            share = whole.new_empty(size // self.world_size)
            reduce_scatter(share, whole)
            all_gather_into(whole, share)

    def adamw_state(self, p, values) -> dict:
        """The state of `values` (the parameter p, or this process's rows of it), zeros at first."""
        state = self.state[p]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(values), exp_avg_sq=torch.zeros_like(values))
        return state

    def muon_state(self, group, K: int) -> dict:
        """The state of K matrices of the group, zeros at first; it lives under the group's first parameter."""
        first = group["params"][0]
        state, (m, n) = self.state[first], first.shape
        if not state:
            state["momentum_buffer"] = first.new_zeros(K, m, n)
            state["second_momentum_buffer"] = first.new_zeros((K, m, 1) if m >= n else (K, 1, n))
        return state

    def update_adamw(self, p, values, grad, group) -> None:
        """Update `values` (the parameter p, or this process's rows of it) with its gradient."""
        state = self.adamw_state(p, values)
        state["step"] += 1
        kernel = self.adamw_kernel if values.numel() >= SMALL_PARAMETER else adamw_step_fused
        numbers = (state["step"], group["lr"], *group["betas"], group["eps"], group["weight_decay"])
        kernel(values, grad, state["exp_avg"], state["exp_avg_sq"], *(torch.tensor(float(x)) for x in numbers))

    def update_muon(self, group) -> None:
        """Update all matrices of a group at once."""
        params = group["params"]
        stacked = torch.stack(params)
        self.update_muon_stack(group, stacked, torch.stack([p.grad for p in params]))
        torch._foreach_copy_(params, list(stacked.unbind()))

    def update_muon_stack(self, group, stacked, grads) -> None:
        """Update `stacked` (K, m, n) in place; the state lives under the group's first parameter."""
        state = self.muon_state(group, len(stacked))
        numbers = (group["momentum"], group["lr"], group["weight_decay"], group["beta2"] or 0.0)
        self.muon_kernel(
            grads, stacked, state["momentum_buffer"], state["second_momentum_buffer"],
            *(torch.tensor(float(x)) for x in numbers), group["ns_steps"], self.compute_dtype,
        )  # fmt: skip

    def owned_rows(self, p, group) -> tuple[int, int]:
        """(first, end) of the rows of p, or of the matrices of a muon group, whose state is here; the end may be
        beyond the last, where the state is padded."""
        if group["kind"] == "adamw" and (self.world_size == 1 or p.numel() < SMALL_PARAMETER):
            return 0, p.size(0)
        rows = p.size(0) if group["kind"] == "adamw" else len(group["params"])
        share = -(-rows // self.world_size)
        return self.rank * share, (self.rank + 1) * share

    def reshard(self, shares: list[dict]) -> dict:
        """The state_dict of this process, cut from what any other number of processes saved.

        shares: the state_dicts of all of them, in the order of their ranks, on the CPU.
        """
        places = [(p, group) for group in self.param_groups for p in group["params"]]  # as state_dict numbers them
        state = {}
        for number in shares[0]["state"]:  # the first process has a part of everything
            p, group = places[number]
            rows = p.size(0) if group["kind"] == "adamw" else len(group["params"])
            first, end = self.owned_rows(p, group)
            if first == end:
                continue
            parts = [share["state"][number] for share in shares if number in share["state"]]
            state[number] = dict(parts[0])
            for name, value in parts[0].items():
                if torch.is_tensor(value):
                    whole = torch.cat([part[name] for part in parts])[:rows]  # without padding and further copies
                    mine = whole[first:end]
                    state[number][name] = mine.new_zeros(end - first, *mine.shape[1:])
                    state[number][name][: len(mine)] = mine
        return {"state": state, "param_groups": shares[0]["param_groups"]}

    def start_adamw_reduction(self, p):
        """Begin to average the gradient: whole for a small parameter, this process's rows of a large one."""
        if p.numel() < SMALL_PARAMETER:
            return dist.all_reduce(p.grad, async_op=True), p.grad
        if p.size(0) % self.world_size:
            raise ValueError(f"{p.size(0)} rows of a parameter do not divide over {self.world_size} processes")
        share = p.grad.new_empty(p.size(0) // self.world_size, *p.shape[1:])
        return reduce_scatter(share, p.grad.contiguous(), async_op=True), share

    def finish_adamw(self, p, group, work, grad):
        """Wait for the gradient, update what is ours, begin to send it to everyone."""
        work.wait()
        grad.div_(self.world_size)
        if p.numel() < SMALL_PARAMETER:
            self.update_adamw(p, p, grad, group)
            return None, lambda: None
        rows = p.size(0) // self.world_size
        mine = p[self.rank * rows : (self.rank + 1) * rows].clone()
        self.update_adamw(p, mine, grad, group)
        return all_gather_into(p.data, mine, async_op=True), lambda: None

    def start_muon_reduction(self, group):
        """Begin to average the stacked gradients to the owners of the matrices; the last owners may own none."""
        params = group["params"]
        chunk = -(-len(params) // self.world_size)
        padded = params[0].new_zeros(chunk * self.world_size, *params[0].shape)
        torch.stack([p.grad for p in params], out=padded[: len(params)])
        grads = padded.new_empty(chunk, *params[0].shape)
        return reduce_scatter(grads, padded, async_op=True), grads, padded

    def finish_muon(self, group, work, grads, padded):
        """Wait, update the matrices that are ours, begin to send them to everyone."""
        work.wait()
        params, chunk = group["params"], grads.size(0)
        mine = params[self.rank * chunk : (self.rank + 1) * chunk]
        updated = torch.zeros_like(grads)
        if mine:
            updated[: len(mine)] = torch.stack(mine)
        self.update_muon_stack(group, updated, grads.div_(self.world_size))

        def copy_back():
            torch._foreach_copy_(params, list(padded[: len(params)].unbind()))

        return all_gather_into(padded, updated, async_op=True), copy_back
