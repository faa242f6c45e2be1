import gc
import weakref

import pytest
import torch

import nanochat.device_batch as chapter
from helpers import run_ranks
from nanochat.device_batch import fitting_device_batch, is_out_of_memory, largest_divisor, starting_device_batch
from nanochat.gpt import GPT, GPTConfig
from nanochat.runtime import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = GPTConfig(sequence_len=64, vocab_size=512, n_layer=2, n_head=2, n_kv_head=2, n_embd=64, window_pattern="SL")


class SmallMemory(GPT):
    """A model on a device that has room for `room` sequences; watches the activations of the last one that failed."""

    def __init__(self, config: GPTConfig, room: int, error: Exception | None = None):
        super().__init__(config)
        self.room, self.error, self.sizes, self.leftover = room, error, [], None
        self.init_weights()

    def forward(self, idx, targets=None, **more):
        self.sizes.append(len(idx))
        loss = super().forward(idx, targets, **more)
        if len(idx) > self.room:
            activations = torch.ones(idx.shape)
            self.leftover = weakref.ref(activations)
            raise self.error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return loss


def fit(model, batch_size, sequences, length=64):
    prepared = []
    optimizer = model.setup_optimizer()
    result = fitting_device_batch(
        model, optimizer, batch_size, length, sequences, prepare=prepared.append, try_anywhere=True
    )
    return result, prepared, optimizer


def test_it_halves_until_it_fits_and_says_so_once(capsys):
    """A run that dies at its first step because of a number in a cell; a batch that shrinks without a word."""
    result, prepared, _ = fit(SmallMemory(TINY, room=4), 16, sequences=32)
    assert (result, prepared) == (4, [16, 8, 4])
    lines = [line for line in capsys.readouterr().out.splitlines() if "device_batch_size" in line]
    assert len(lines) == 1 and lines[0].startswith("device_batch_size 16 does not fit into the memory of this ")
    assert lines[0].endswith("using 4 (accumulating 8 passes): the same training, in smaller pieces.")


def test_what_fits_is_not_talked_about(capsys):
    """A warning at every start that means nothing."""
    result, prepared, _ = fit(SmallMemory(TINY, room=16), 16, sequences=32)
    assert (result, prepared) == (16, [16]) and "device_batch_size" not in capsys.readouterr().out


@pytest.mark.parametrize("start, sequences, sizes", [(6, 24, [6, 3, 1]), (12, 36, [12, 6, 3, 1]), (5, 20, [5, 2, 1])])
def test_the_total_batch_stays(start, sequences, sizes):
    """A halved batch that no longer divides the total: another training than the one that was asked for."""
    result, prepared, _ = fit(SmallMemory(TINY, room=1), start, sequences)
    assert prepared == sizes and result == 1 and all(sequences % size == 0 for size in sizes)


def test_not_even_one_sequence_is_a_clear_error():
    """Halving one to zero, or an endless loop."""
    with pytest.raises(UserError, match="even one sequence of 64 tokens does not fit .* recompute"):
        fit(SmallMemory(TINY, room=0), 2, sequences=4)


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), RuntimeError("DataLoader worker is killed")])
def test_other_errors_are_not_swallowed(error):
    """A bug in a kernel that is taken for a lack of memory, and tried away."""
    with pytest.raises(RuntimeError, match=str(error)):
        fit(SmallMemory(TINY, room=0, error=error), 4, sequences=4)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"),
        RuntimeError("MPS backend out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
)
def test_every_library_may_say_it_in_its_own_words(error):
    """An out-of-memory error that is not recognised, so the run ends where it could have halved."""
    assert is_out_of_memory(error)
    assert fit(SmallMemory(TINY, room=2, error=error), 4, sequences=4)[0] == 2


def test_a_failed_trial_leaves_nothing_in_memory(monkeypatch):
    """Activations that the error's traceback keeps: the smaller batch would fail as well, down to one."""
    model, left = SmallMemory(TINY, room=2), []
    gc.disable()  # references must be gone by themselves
    monkeypatch.setattr(chapter, "release_memory", lambda device: left.append(model.leftover()))
    try:
        assert fit(model, 8, sequences=8)[0] == 2
    finally:
        gc.enable()
    assert left == [None, None]


def test_the_trial_changes_nothing():
    """A run that learns something else because it asked for memory first."""
    model = SmallMemory(TINY, room=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    _, _, optimizer = fit(model, 8, sequences=8)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert optimizer.state and all((t == 0).all() for state in optimizer.state.values() for t in state.values()
                                   if torch.is_tensor(t))  # fmt: skip


def test_the_trial_has_gradients_and_optimizer_state_in_memory():
    """A batch that fits in the first pass and not in the second, when the gradients of the first are there."""
    seen = []

    class Watched(SmallMemory):
        def forward(self, idx, targets=None, **more):
            seen.append((len(optimizer.state) > 0, all(p.grad is not None for p in self.parameters())))
            return super().forward(idx, targets, **more)

    model = Watched(TINY, room=9)
    optimizer = model.setup_optimizer()
    fitting_device_batch(model, optimizer, 2, 64, 4, prepare=lambda size: None, try_anywhere=True)
    assert seen == [(True, True)]


def test_a_cpu_is_not_asked():
    """A step of a minute before the first step, on a machine that would kill the process rather than answer."""
    model, prepared = SmallMemory(TINY, room=0), []
    optimizer = model.setup_optimizer()
    assert fitting_device_batch(model, optimizer, 8, 64, 8, prepare=prepared.append) == 8
    assert prepared == [8] and model.sizes == []


def test_allocated_state_trains_the_same():
    """State of another shape or dtype than the first step's: other weights, or an error after the trial."""
    results = []
    for allocate in (False, True):
        torch.manual_seed(0)
        model = GPT(TINY)
        model.init_weights()
        optimizer = model.setup_optimizer()
        if allocate:
            optimizer.allocate_state()
        for step in range(3):
            idx = torch.randint(512, (2, 64), generator=torch.Generator().manual_seed(step))
            model(idx[:, :-1], idx[:, 1:]).backward()
            optimizer.step()
            model.zero_grad(set_to_none=True)
        state = optimizer.state_dict()["state"]
        results.append((model.state_dict(), {key: {k: torch.as_tensor(v) for k, v in each.items()}
                                             for key, each in state.items()}))  # fmt: skip
    (weights, state), (other_weights, other_state) = results
    assert all(torch.equal(tensor, other_weights[name]) for name, tensor in weights.items())
    assert state.keys() == other_state.keys()
    for key in state:
        assert state[key].keys() == other_state[key].keys()
        assert all(torch.equal(value, other_state[key][name]) for name, value in state[key].items())


TWO_RANKS = """
import sys, torch
from nanochat.runtime import compute_init, compute_cleanup
from nanochat.device_batch import fitting_device_batch
from nanochat.gpt import GPT, GPTConfig
ddp, rank, *_ = compute_init("cpu")
config = GPTConfig(sequence_len=64, vocab_size=512, n_layer=2, n_head=2, n_kv_head=2, n_embd=64, window_pattern="SL")
room = int(sys.argv[1 + rank])
class SmallMemory(GPT):
    def forward(self, idx, targets=None):
        if len(idx) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(idx, targets)
model = SmallMemory(config)
model.init_weights()
optimizer = model.setup_optimizer()
size = fitting_device_batch(model, optimizer, 8, 64, 8, prepare=lambda size: None, try_anywhere=True)
other = model.setup_optimizer()
model(torch.zeros(2, 64, dtype=torch.long), torch.zeros(2, 64, dtype=torch.long)).backward()
other.step()
shapes = [
    sorted(tuple(t.shape) for state in each.state.values() for t in state.values() if torch.is_tensor(t))
    for each in (optimizer, other)
]
print(size, shapes[0] == shapes[1])
compute_cleanup()
"""


def test_one_process_without_room_halves_all():
    """Processes with different numbers of passes: they would wait for each other for ever."""
    outputs = run_ranks(TWO_RANKS, 8, 2)
    assert [output.splitlines()[-1] for output in outputs] == ["2 True", "2 True"]
    assert sum("does not fit" in output for output in outputs) == 1, "said by rank 0, though it had room"


@pytest.mark.parametrize("number, limit, expected", [(16, 9, 8), (24, 7, 6), (7, 6, 1), (5, 0, 1), (4, 100, 4)])
def test_the_largest_divisor_up_to_a_limit(number, limit, expected):
    """Zero, or a number that does not divide."""
    assert largest_divisor(number, limit) == expected


def test_the_estimate_follows_the_memory(monkeypatch):
    """A start so high that every run begins with failures, or so low that the GPU idles."""
    cuda, d12 = torch.device("cuda"), GPTConfig()

    def estimate(gigabytes, config=d12, parameters=286_262_424, sequences=256, **more):
        memory = type("", (), {"total_memory": gigabytes * 2**30})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
        return starting_device_batch(config, parameters, sequences, torch.bfloat16, cuda, **more)

    sizes = [estimate(gigabytes) for gigabytes in (8, 16, 24, 40, 80, 140)]
    assert sizes == sorted(sizes) and all(256 % size == 0 for size in sizes)
    assert sizes[-1] == 32, "more tokens at once make no GPU faster"
    assert estimate(1) == 1, "one is always tried"
    assert estimate(16, recompute=True) > estimate(16)
    assert estimate(80, sequences=12) == 12 and estimate(80, sequences=1) == 1
    assert starting_device_batch(d12, 1, 256, torch.float32, torch.device("cpu")) == 4
