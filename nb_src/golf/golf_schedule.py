# %% [markdown]
# ## Golf schedules
#
# The challenge gives ten minutes, not a number of steps. So the learning rate falls by the clock: as soon as the time
# that is left equals the time that the last steps of a run are to take, it starts to go down, and it is zero when the
# bell rings. On a slower machine the same rule gives fewer steps and the same shape.
#
# Several processes have several clocks. If each followed its own, one would stop a step before the others, which would
# wait for it forever; a little earlier their learning rates, and so their weights, would already have parted. Here they
# agree on one time after every step, and everything that depends on the time uses that one.

# %%
import copy
import time

import torch
import torch.distributed as dist

from nanochat.runtime import is_ddp_initialized

# %% [markdown]
# ### `golf_lr_multiplier`
# The rule of the challenge's script, and that of later records, in fractions of the run.


# %%
def golf_lr_multiplier(
    step: int, iterations: int, warmdown_iters: int, elapsed_ms: float = 0.0, cap_ms: float | None = None
) -> float:
    """The multiple of every base learning rate at this step (from 0). Golf spec section 2.4.

    With cap_ms the last `warmdown_iters` steps are estimated from elapsed_ms, the training time at the step's start.
    """
    if warmdown_iters <= 0:
        return 1.0
    if cap_ms is None:
        return min(1.0, max(0.0, (iterations - step) / warmdown_iters))
    warmdown_ms = warmdown_iters * elapsed_ms / max(step, 1)
    left_ms = max(cap_ms - elapsed_ms, 0.0)
    return left_ms / max(warmdown_ms, 1e-9) if left_ms <= warmdown_ms else 1.0


def golf_progress(step: int, iterations: int, elapsed_ms: float = 0.0, cap_ms: float | None = None) -> float:
    """How much of the run is over, 0 to 1: by steps, or by the clock if there is a cap and it is further."""
    return min(1.0, max(step / iterations, 0.0 if cap_ms is None else elapsed_ms / cap_ms))


def progress_lr_multiplier(progress: float, warmdown_fraction: float) -> float:
    """1, then down to 0 in a straight line over the last warmdown_fraction of the run. Golf spec section 7."""
    return 1.0 if progress < 1 - warmdown_fraction else (1 - progress) / max(warmdown_fraction, 1e-9)


def golf_muon_momentum(step: int, start: float = 0.85, final: float = 0.95, warmup_steps: int = 500) -> float:
    """Muon's momentum at this step (from 0): a straight line from start to final. Golf spec section 2.3."""
    done = min(step / warmup_steps, 1.0) if warmup_steps > 0 else 1.0
    return (1 - done) * start + done * final


# %% [markdown]
# ### `TrainingClock`
# Counts training time only: it is paused while the model is evaluated. The time is shared as the maximum over all
# processes, through the CPU, so that no GPU has to finish its work for it.


# %%
class TrainingClock:
    """The training time that all processes agree on, and the step at which it is over. Golf spec section 2.5.

    cap_seconds: 0 for no cap. now: seconds from any fixed moment. All processes must create it and call `step_done`.
    """

    def __init__(self, iterations: int, cap_seconds: float = 0.0, now=time.perf_counter):
        self.iterations, self.now = iterations, now
        self.cap_ms = 1000 * cap_seconds if cap_seconds > 0 else None
        self.elapsed_ms = 0.0  # the agreed time after the last step
        self.stop_step: int | None = None  # set once, by the step after which the time was up
        self.counted, self.resumed = 0.0, None
        on_gpus = is_ddp_initialized() and dist.get_backend() != "gloo"
        self.group = dist.new_group(backend="gloo") if on_gpus else None  # for numbers that lie on the CPU

    def own_ms(self) -> float:
        """The training time by the clock of this process."""
        running = 0.0 if self.resumed is None else self.now() - self.resumed
        return 1000 * (self.counted + running)

    def resume(self) -> None:
        if self.resumed is None:
            self.resumed = self.now()

    def pause(self) -> None:
        """Stop counting, after the work that was given to a GPU is done."""
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.counted, self.resumed = self.own_ms() / 1000, None

    def step_done(self, step: int, *flags: bool) -> list[bool]:
        """Agree on the time after `step` steps and decide whether this was the last one.

        flags: asked by this process (to stop, to save...); returned is what any process asked.
        """
        numbers = torch.tensor([self.own_ms(), *flags], dtype=torch.float64)
        if is_ddp_initialized():
            dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=self.group)
        self.elapsed_ms, *asked = numbers.tolist()
        if self.stop_step is None and self.cap_ms is not None and self.elapsed_ms >= self.cap_ms:
            self.stop_step = step
        return [bool(flag) for flag in asked]

    def is_over(self, step: int) -> bool:
        """Whether no step may follow after `step` steps."""
        return step >= self.iterations or self.stop_step is not None

    def seconds_left(self, step: int, ms_per_step: float) -> float:
        """An estimate at this pace."""
        left_ms = (self.iterations - step) * ms_per_step
        return max(0.0, left_ms if self.cap_ms is None else min(left_ms, self.cap_ms - self.elapsed_ms)) / 1000

    def progress(self, step: int) -> float:
        """How much of the run is over after `step` steps, the same on all processes."""
        return golf_progress(step, self.iterations, self.elapsed_ms, self.cap_ms)

    def lr_multiplier(self, step: int, warmdown_iters: int) -> float:
        """`golf_lr_multiplier` at the agreed time."""
        return golf_lr_multiplier(step, self.iterations, warmdown_iters, self.elapsed_ms, self.cap_ms)


# %% [markdown]
# ### `warm_up_and_restore`
# The first steps of a compiled model wait for the compiler. They are taken before the clock starts, on real batches,
# and then everything that they changed is put back.


# %%
def warm_up_and_restore(model, optimizer, one_step, steps: int) -> None:
    """Call one_step(i) for i < steps, then undo what it did to the model, the optimizer and the gradients.

    one_step: loss, backward and optimizer. Its batches are used up: build the loader anew afterwards. Golf spec 2.5.
    """
    if steps <= 0:
        return
    weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}
    optimizer_state = copy.deepcopy(optimizer.state_dict())
    for i in range(steps):
        one_step(i)
    model.load_state_dict(weights)
    optimizer.load_state_dict(optimizer_state)
    model.zero_grad(set_to_none=True)
