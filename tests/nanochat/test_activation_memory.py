from functools import partial

import pytest
import torch
import torch._functorch.config as functorch_config
import torch.nn.functional as F
from torch._dynamo.utils import counters

import nanochat.gpt as gpt_chapter
from nanochat.gpt import GPT, GPTConfig, RMSNorm, SquaredReLU, norm, squared_relu

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = GPTConfig(sequence_len=64, vocab_size=256, n_layer=2, n_head=2, n_kv_head=2, n_embd=64, window_pattern="SL")


@pytest.fixture
def quick_compiler(monkeypatch):
    """Everything that torch.compile does for training, what to keep included, except writing C++."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager_decomp_partition"))


def model_and_batch():
    torch.manual_seed(0)
    model = GPT(CONFIG)
    model.init_weights()
    for p in model.transformer["h"].parameters():
        torch.nn.init.normal_(p, std=0.1)  # also those that start at zero, behind which errors hide
    idx = torch.randint(256, (2, 64))
    return model, idx


def loss_and_gradients(model, idx):
    loss = model(idx, idx.roll(-1, 1))
    return loss.detach(), torch.autograd.grad(loss, list(model.parameters()))


def saved_bytes(model, idx) -> int:
    """What autograd keeps between forward and backward, weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.trunk(idx)
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in weights)


@pytest.mark.parametrize("compiled", [False, True])
def test_recomputing_gives_the_same_numbers(compiled, quick_compiler):
    """Activations that are computed again from other inputs: a model that learns something else to save memory."""
    model, idx = model_and_batch()
    if compiled:
        model.compile(2, 64)
    loss, gradients = loss_and_gradients(model, idx)
    model.recompute = True
    again, same_gradients = loss_and_gradients(model, idx)
    assert torch.equal(again, loss)
    for (name, _), one, other in zip(model.named_parameters(), same_gradients, gradients, strict=True):
        assert torch.equal(one, other), name


def test_recomputing_keeps_only_the_inputs_of_the_layers():
    """A switch that costs a third of the speed and saves nothing."""
    model, idx = model_and_batch()
    all_of_it = saved_bytes(model, idx)
    model.recompute = True
    stream = 2 * 64 * 64 * 4  # bytes of one (B, T, C)
    assert saved_bytes(model, idx) < 10 * stream < 0.3 * all_of_it, "2 inputs, 1 value embedding, and what is outside"


def test_nothing_is_recomputed_where_nothing_is_learned(monkeypatch):
    """An evaluation or a generation that goes through the machinery of the backward pass."""
    monkeypatch.setattr(gpt_chapter, "recomputed", None)
    model, idx = model_and_batch()
    model.recompute = True
    with torch.no_grad():
        assert model(idx).shape == (2, 64, 256)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 1e-4, 300.0])
def test_derivatives_from_the_result_are_the_usual_ones(dtype, size):
    """A derivative that only training on a GPU would have, and that no other test would see."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(50, 64, generator=generator) for _ in range(2))
    x, dy = (size * x).to(dtype).requires_grad_(), dy.to(dtype)
    assert torch.equal(SquaredReLU.apply(x), squared_relu(x))
    (actual,) = torch.autograd.grad(SquaredReLU.apply(x), x, dy)
    (expected,) = torch.autograd.grad(squared_relu(x), x, dy)
    assert torch.equal(actual, expected), "the square root of a rounded square is the number itself"

    wide = x.detach().double().requires_grad_()
    eps = torch.finfo(torch.float32).eps
    (exact,) = torch.autograd.grad(F.rms_norm(wide, (64,), eps=eps), wide, dy.double())
    (usual,) = torch.autograd.grad(norm(x), x, dy)
    (actual,) = torch.autograd.grad(RMSNorm.apply(x), x, dy)
    torch.testing.assert_close(RMSNorm.apply(x), norm(x), rtol=2e-6 if dtype == torch.float32 else 8e-3, atol=0)
    error, usual_error = ((each.double() - exact).norm() / exact.norm() for each in (actual, usual))
    assert error < (1e-6 if dtype == torch.float32 else 4e-3) and usual_error < 4e-3


def test_a_compiled_model_with_derivatives_from_the_result_learns_the_same_and_keeps_less(quick_compiler, monkeypatch):
    """The GPU's path through the compiler, broken by something that eager code allows; or with nothing saved."""
    model, idx = model_and_batch()
    model.compile(2, 64)
    loss, gradients = loss_and_gradients(model, idx)
    usual_bytes = saved_bytes(model, idx)
    monkeypatch.setattr(gpt_chapter, "memory_counts", lambda x: torch.compiler.is_compiling())
    model.compile(2, 64)
    other_loss, other_gradients = loss_and_gradients(model, idx)
    torch.testing.assert_close(other_loss, loss, atol=0, rtol=1e-6)
    for (name, _), one, other in zip(model.named_parameters(), other_gradients, gradients, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm() + 1e-7, name
    layer = 2 * 64 * 64 * 4
    assert saved_bytes(model, idx) <= usual_bytes - 2 * 4.5 * layer, "five numbers of each layer, give or take"


@functorch_config.patch(autograd_cache_allow_custom_autograd_functions=False)
def test_a_second_start_traces_nothing_again(tmp_path, monkeypatch):
    """Half of the compilation repeated at every start: torch caches no derivatives of one's own unless it is told to;
    or, told to, takes an older derivative for the one that is written here now."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model_and_batch()[0].compile(2, 64)

    def gradient_and_counts():
        torch._dynamo.reset()
        counters.clear()
        x = torch.linspace(-1, 2, 64).requires_grad_()
        (gradient,) = torch.autograd.grad(torch.compile(SquaredReLU.apply, dynamic=False)(x).sum(), x)
        return gradient, dict(counters["aot_autograd"])

    first, counts = gradient_and_counts()
    assert counts.get("autograd_cache_saved") == 1 and "autograd_cache_bypass" not in counts
    again, counts = gradient_and_counts()
    assert torch.equal(first, again) and counts.get("autograd_cache_hit") == 1
    monkeypatch.setattr(SquaredReLU, "backward", staticmethod(lambda ctx, dy: 3 * dy * ctx.saved_tensors[0].sqrt()))
    other, counts = gradient_and_counts()
    torch.testing.assert_close(other, first * 1.5)
    assert "autograd_cache_hit" not in counts


@torch._dynamo.config.patch(recompile_limit=4, fail_on_recompile_limit_hit=True)
def test_every_shape_is_compiled_however_many_there_were_before(quick_compiler):
    """After eight forms of a function torch gives up compiling, with a warning nobody reads: half the speed."""
    model, idx = model_and_batch()
    for batch_size in (2, 1):
        model.compile(batch_size, 64)
        loss_and_gradients(model, idx[:batch_size])
