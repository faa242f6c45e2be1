import json

import pytest
import torch

from golf.golf_gpt import GolfConfig, GolfGPT
from golf.golf_optim import setup_golf_optimizer
from golf.golf_schedule import (
    TrainingClock,
    golf_lr_multiplier,
    golf_muon_momentum,
    golf_progress,
    progress_lr_multiplier,
    warm_up_and_restore,
)
from helpers import run_ranks

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "step, expected",
    [(0, 1.0), (18799, 1.0), (18800, 1.0), (19400, 0.5), (19999, 1 / 1200), (20000, 0.0), (20500, 0.0)],
)
def test_multiplier_by_steps(step, expected):
    """Off by one at the start of the warmdown, or below zero after the end, which would unlearn."""
    assert golf_lr_multiplier(step, 20000, 1200) == pytest.approx(expected)


@pytest.mark.parametrize(
    "step, elapsed_ms, expected",
    [
        (0, 0.0, 1.0),
        (100, 10_000.0, 1.0),  # 100 ms a step: the warmdown takes 120 s, 590 s are left
        (4800, 480_000.0, 1.0),  # exactly the time that it takes
        (5400, 540_000.0, 0.5),
        (5999, 599_900.0, 100 / 119_980.0),  # the pace is that of the run so far: 599,900 / 5,999 = 100.0 ms
        (6001, 600_100.0, 0.0),
        (10, 595_000.0, 5_000 / (1200 * 59_500)),  # very slow steps: the warmdown begins at once
    ],
)
def test_multiplier_by_the_clock(step, elapsed_ms, expected):
    """A warmdown that begins too late is cut off at a high rate, one too early wastes the run."""
    assert golf_lr_multiplier(step, 20000, 1200, elapsed_ms, 600_000.0) == pytest.approx(expected, rel=1e-3)
    assert golf_lr_multiplier(step, 20000, 0, elapsed_ms, 600_000.0) == 1.0


def test_multiplier_against_the_formula():
    """The spec's words, number by number, over a run whose pace changes."""
    elapsed, W, C = 0.0, 300, 60_000.0
    for s in range(900):
        w, r = W * elapsed / max(s, 1), max(C - elapsed, 0)
        assert golf_lr_multiplier(s, 10**6, W, elapsed, C) == pytest.approx(r / w if r <= w else 1.0)
        elapsed += 50 + 40 * (s % 7 == 0)


def test_momentum():
    """Record A warms its momentum up over 1,500 steps; at once at 0.99 the first steps overshoot."""
    assert [golf_muon_momentum(step) for step in (0, 250, 500, 9999)] == pytest.approx([0.85, 0.9, 0.95, 0.95])
    assert golf_muon_momentum(750, 0.92, 0.99, 1500) == pytest.approx(0.955)
    assert golf_muon_momentum(0, 0.85, 0.95, 0) == 0.95


def test_progress_and_its_multiplier():
    """A schedule tied to 20,000 steps never ends in a run of 2,000."""
    assert golf_progress(30, 100) == 0.3 and golf_progress(30, 100, 45_000, 60_000) == 0.75
    assert golf_progress(999, 1000, 61_000, 60_000) == 1.0
    # a trial of 100 steps within an hour: by the clock alone its rate never falls and its average never begins
    assert golf_progress(99, 100, 5_000, 3_600_000) == 0.99
    values = [progress_lr_multiplier(p, 0.75) for p in (0, 0.2, 0.25, 0.625, 1.0)]
    assert values == pytest.approx([1, 1, 1, 0.5, 0])
    assert progress_lr_multiplier(1.0, 0.0) == 0.0 and progress_lr_multiplier(0.99, 0.0) == 1.0


class StepwiseTime:
    """Seconds that pass only when told."""

    def __init__(self):
        self.seconds = 100.0

    def __call__(self):
        return self.seconds


def test_clock_counts_training_only():
    """A clock that runs on during evaluation stops the training early; one that never stops breaks the rules."""
    time = StepwiseTime()
    clock = TrainingClock(iterations=100, cap_seconds=10, now=time)
    clock.resume()
    steps = 0
    while not clock.is_over(steps):
        time.seconds += 1.5
        steps += 1
        clock.step_done(steps)
        clock.pause()
        time.seconds += 1000  # validation
        clock.resume()
        clock.resume()
    assert steps == clock.stop_step == 7 and clock.elapsed_ms == pytest.approx(10_500)
    assert clock.progress(steps) == 1.0 and clock.lr_multiplier(steps, 5) == 0.0
    clock.step_done(8)
    assert clock.stop_step == 7


def test_the_bell_rings_on_time():
    """One step more when the time is up to the millisecond."""
    time = StepwiseTime()
    clock = TrainingClock(iterations=100, cap_seconds=3, now=time)
    clock.resume()
    for step in (1, 2, 3):
        assert not clock.is_over(step - 1)
        time.seconds += 1
        clock.step_done(step)
    assert clock.stop_step == 3 and clock.is_over(3)


def test_clock_without_a_cap():
    """Without a cap only the steps count."""
    time = StepwiseTime()
    clock = TrainingClock(iterations=3, now=time)
    clock.resume()
    for step in (1, 2, 3):
        time.seconds += 1e6
        assert not clock.is_over(step - 1)
        clock.step_done(step)
    assert clock.is_over(3) and clock.stop_step is None and clock.progress(3) == 1.0
    assert clock.lr_multiplier(2, 2) == 0.5 and clock.elapsed_ms == 3e9


def test_flags_come_back():
    """A stop button that nobody hears."""
    clock = TrainingClock(iterations=3, now=StepwiseTime())
    assert clock.step_done(1) == [] and clock.step_done(2, True, False) == [True, False]
    assert clock.elapsed_ms == 0


CLOCKS = """
import json, torch.distributed as dist
from golf.golf_schedule import TrainingClock
dist.init_process_group("gloo")
rank, seconds = dist.get_rank(), [0.0]
clock = TrainingClock(100, 10, now=lambda: seconds[0])
clock.resume()
steps, seen = 0, []
while not clock.is_over(steps):
    seconds[0] += 1.0 if rank else 1.3  # one rank is slower
    steps += 1
    flags = clock.step_done(steps, rank == 1 and steps == 3, steps == 5, False)
    seen.append([flags, clock.elapsed_ms, clock.lr_multiplier(steps, 5), clock.progress(steps)])
print(json.dumps([steps, clock.stop_step, seen]))
dist.destroy_process_group()
"""


@pytest.mark.parametrize("world", [2, 4])
def test_all_processes_stop_at_the_same_step(world):
    """Each by its own clock: one leaves, the others wait forever, and their learning rates had differed before."""
    ranks = [json.loads(out) for out in run_ranks(CLOCKS, world_size=world)]
    assert all(rank == ranks[0] for rank in ranks)
    steps, stop_step, seen = ranks[0]
    assert steps == stop_step == 8 and seen[0][1] == pytest.approx(1300)
    asked = [flags for flags, *_ in seen]
    assert asked == [[step == 3, step == 5, False] for step in range(1, 9)]  # whoever asked, all hear of it


def train(model, optimizer, steps: int, offset: int = 0) -> list[float]:
    losses = []
    for i in range(steps):
        ids = torch.randint(61, (2, 17), generator=torch.Generator().manual_seed(offset + i))
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.set_schedule(1 - 0.1 * i, 0.85 + 0.02 * i)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("steps", [1, 3])
def test_warm_up_leaves_no_trace(steps, before):
    """Weights, moments, step counters or rates of the warm-up that survive make the run another run."""

    def losses_after(warm: int) -> list[float]:
        torch.manual_seed(0)
        model = GolfGPT(GolfConfig(61, 32, 4, 2, max_seq_len=48, num_layers=2))
        optimizer = setup_golf_optimizer(model, compute_dtype=torch.float32)
        train(model, optimizer, before)
        start = [p.detach().clone() for p in model.parameters()]
        parameters, losses = [id(p) for p in model.parameters()], []

        def one_step(i):
            losses.extend(train(model, optimizer, 1, 77 + i))
            model.skip_weights.grad = torch.ones_like(model.skip_weights)  # left behind, to be taken away

        warm_up_and_restore(model, optimizer, one_step, warm)
        assert len(losses) == warm and parameters == [id(p) for p in model.parameters()]
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), start, strict=True))
        assert all(p.grad is None for p in model.parameters())
        return train(model, optimizer, 3, 5)

    assert losses_after(steps) == losses_after(0)
