# %% [markdown]
# ## Training in fp16
#
# A V100 or a T4 has tensor cores for fp16 and for nothing else. Its eleven bits of precision are more than bf16 has,
# but its range ends at 65,504 above and at 0.00000006 below, and gradients are small: many would become zero. So the
# loss is multiplied by a large number before the backward pass, and the gradients, which are collected in fp32, are
# divided by it afterwards. Which number? Too large a one shows itself, as infinity, and costs one update; so try large
# ones and fall back (Micikevicius et al. 2018).
#
# In bf16 and fp32 none of this is needed, and the same three lines of a training loop do nothing of it.

# %%
import math

import torch
import torch.distributed as dist

from nanochat.runtime import UserError, is_ddp_initialized, print0

# %% [markdown]
# ### `LossScaler`
# PyTorch's `GradScaler` does the same on one device, with the same numbers. It keeps to itself whether it found an
# overflow, and here all processes must know: the optimizer's step is a conversation between them, which all have or
# none. So they ask each other first.

# %%
LOSS_SCALE_START = 2.0**16  # powers of two change no digit
LOSS_SCALE_GROWTH_INTERVAL = 2000  # updates without an overflow, after which twice the scale is tried


class LossScaler:
    """Keeps fp16 gradients in range; for other compute dtypes it only calls the optimizer. Spec section 22.18.

    In a loop: `scaler.scale(loss).backward()`, then `scaler.step(optimizer)`. Its state is two numbers, the same on all
    processes, that fit into JSON.
    """

    def __init__(self, compute_dtype: torch.dtype):
        self.enabled = compute_dtype == torch.float16
        self.factor, self.good_steps = LOSS_SCALE_START, 0

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss to call `backward` on."""
        return loss * self.factor if self.enabled else loss

    def step(self, optimizer) -> bool:
        """Unscale the gradients and update, unless one overflowed on any process. True if the update was made.

        Every process must call it. Raises UserError when no scale is small enough.
        """
        if not self.enabled:
            optimizer.step()
            return True
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_mul_(gradients, 1 / self.factor)
        largest = torch.stack(torch._foreach_norm(gradients, math.inf)).max()  # NaN if any is
        overflow = (~largest.isfinite()).float()
        if is_ddp_initialized():
            dist.all_reduce(overflow, dist.ReduceOp.MAX)
        if overflow.item():
            self.factor, self.good_steps = self.factor / 2, 0
            if self.factor < 1:
                raise UserError(
                    "fp16 cannot hold the gradients of this model, however they are scaled: training has diverged, or "
                    "needs a wider range. Set NANOCHAT_DTYPE to float32, or lower the learning rates."
                )
            print0(f"gradients overflowed in fp16: update skipped, loss scale lowered to {self.factor:g}")
            return False
        optimizer.step()
        self.good_steps += 1
        if self.good_steps == LOSS_SCALE_GROWTH_INTERVAL:
            self.factor, self.good_steps = 2 * self.factor, 0
        return True

    def state_dict(self) -> dict:
        """What a checkpoint must remember."""
        return {"factor": self.factor, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict) -> None:
        """Go on where a checkpoint stopped."""
        self.factor, self.good_steps = state["factor"], state["good_steps"]
