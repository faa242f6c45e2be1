import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat.fp8 import Float8Linear, Float8Product, convert_to_fp8, require_fp8, to_float8
from nanochat.gpt import GPT, GPTConfig, Linear
from nanochat.runtime import UserError

CONFIG = GPTConfig(
    sequence_len=64, vocab_size=128, n_layer=2, n_head=2, n_kv_head=2, n_embd=128, window_pattern="SL"
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class StrictProducts(TorchDispatchMode):
    """Makes the GPU's demands on fp8 products, which the CPU's does not make, and notes their kinds."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._scaled_mm.default:
            a, b, scale_a, scale_b = args[:4]
            assert a.stride() == (a.size(1), 1) and b.stride() == (1, b.size(0)), "row-major times column-major"
            assert not any(size % 16 for size in (a.size(1), *b.shape))
            assert all(scale.dtype == torch.float32 and scale.numel() == 1 for scale in (scale_a, scale_b))
            self.calls.append((a.dtype, b.dtype, args[7] if len(args) > 7 else kwargs.get("use_fast_accum", False)))
            if not a.is_cuda and a.numel() > 64 * 256:  # by the definition: the CPU takes seconds for one of these
                return ((a.float() @ b.float()) * scale_a * scale_b).to(args[6])
        return function(*args, **(kwargs or {}))


@pytest.fixture
def strict_products(request):
    if request.node.get_closest_marker("gpu") and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8")
    with StrictProducts() as mode:
        yield mode.calls


def small_gpt(compute_dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    model = GPT(CONFIG, compute_dtype).to(device)
    model.init_weights()
    return model


def random_operands(N=64, K=128, M=256, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x, weight, y_grad = (torch.randn(shape, generator=generator) for shape in ((N, K), (M, K), (N, M)))
    return x.to(device, dtype), weight.to(device), y_grad.to(device, dtype)


def rounding_bound(x, dtype):
    """The largest error of each entry: half a step of its mantissa, or of the smallest numbers."""
    info = torch.finfo(dtype)
    half_step = info.eps / 2
    return x.abs() * half_step * 1.001 + x.abs().max() / info.max * info.tiny * half_step


def product_bound(a, b, a_dtype, b_dtype):
    """The largest error of each entry of a @ b.T when both factors are rounded."""
    da, db = rounding_bound(a, a_dtype), rounding_bound(b, b_dtype)
    return a.abs() @ db.T + da @ b.abs().T + da @ db.T + 1e-5 * a.abs() @ b.abs().T


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("size", [0.0, 1e-9, 1.0, 1e30])
def test_the_scale_puts_the_largest_entry_at_the_end_of_the_range(dtype, size):
    """inf or NaN from an entry that rounds past the end; 0 / 0; a range of which half is not used."""
    x = torch.randn(50, 50, generator=torch.Generator().manual_seed(0)) * size
    quantised, inverse = to_float8(x, dtype)
    values = quantised.double()
    assert quantised.dtype == dtype and inverse.dtype == torch.float32 and inverse.shape == ()
    assert values.abs().max() == (torch.finfo(dtype).max if size else 0)
    assert ((values * inverse - x).abs() <= rounding_bound(x.double(), dtype)).all()


@pytest.mark.parametrize("device", DEVICES)
def test_product_and_gradients_are_within_the_errors_of_the_formats(strict_products, device):
    """A transposed factor, the inverse of a scale, a format in the wrong place, a layout that only a GPU refuses."""
    x, weight, y_grad = random_operands(device=device)
    if device == "cuda":  # its product has no fp32 accumulation that a bound could be written for
        x, y_grad = x.bfloat16(), y_grad.bfloat16()
    x, weight = x.requires_grad_(), weight.requires_grad_()
    y = Float8Product.apply(x, weight)
    y.backward(y_grad)
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    x64, weight64, y_grad64 = x.detach().double(), weight.detach().double(), y_grad.double()
    for actual, a, b, a_dtype, typical in (
        (y, x64, weight64, e4m3, 0.04),
        (x.grad, y_grad64, weight64.T, e5m2, 0.07),
        (weight.grad, y_grad64.T, x64.T, e5m2, 0.07),
    ):
        error, exact = actual.detach().double() - a @ b.T, a @ b.T
        slack = 0 if device == "cpu" else 2**-8 * exact.abs() + 1e-3 * a.abs() @ b.abs().T
        assert (error.abs() <= product_bound(a, b, a_dtype, e4m3) + slack).all()
        assert 0.01 < error.norm() / exact.norm() < typical, "far from exact, and no further than it must be"
    assert strict_products == [(e4m3, e4m3, True), (e5m2, e4m3, False), (e5m2, e4m3, False)]
    assert weight.grad.dtype == torch.float32 and x.grad.dtype == x.dtype


def test_zeros_and_huge_values_give_finite_products(strict_products):
    """A batch of padding that makes 0 / 0, a scale that over- or underflows."""
    x, weight, y_grad = random_operands(dtype=torch.bfloat16)
    exact = x.double() @ weight.double().T
    for x_size, weight_size in ((0.0, 1.0), (1.0, 0.0), (2.0**100, 2.0**-30), (2.0**-30, 2.0**100)):
        big_x, big_weight = (x * x_size).requires_grad_(), (weight * weight_size).requires_grad_()
        y = Float8Product.apply(big_x, big_weight)
        y.backward(y_grad * 0)
        assert y.isfinite().all() and (big_x.grad == 0).all() and (big_weight.grad == 0).all()
        expected = exact * x_size * weight_size
        assert (y.double() - expected).norm() <= 0.05 * expected.norm()


def test_the_eight_bit_form_is_what_waits_for_the_backward_pass():
    """Memory: an input kept in bf16 beside its fp8 form would cost more than without fp8."""
    x, weight, _ = random_operands(dtype=torch.bfloat16)
    y = Float8Product.apply(x.requires_grad_(), weight.requires_grad_())
    saved = y.grad_fn.saved_tensors
    assert all(tensor.element_size() == 1 for tensor in saved if tensor.ndim)
    assert sum(tensor.numel() for tensor in saved if tensor.ndim) == x.numel() + weight.numel()


def test_small_matrices_and_the_head_are_left_alone():
    """Gates of a few rows, where casting costs more than it saves; a head that says fp8 and is not."""
    converted, skipped = convert_to_fp8(small_gpt())
    assert sorted(skipped) == ["lm_head", "transformer.h.1.attn.ve_gate"]
    parts = ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert sorted(converted) == sorted(f"transformer.h.{i}.{part}" for i in range(2) for part in parts)
    sizes = {"small": (112, 256), "odd": (136, 256), "fine": (128, 144)}
    layers = torch.nn.ModuleDict({name: Linear(*size) for name, size in sizes.items()})
    assert convert_to_fp8(layers) == (["fine"], ["small", "odd"])
    assert isinstance(layers["fine"], Float8Linear)


def test_conversion_keeps_the_parameters_and_their_names():
    """An optimizer that updates weights which no layer reads, a checkpoint that loads into fp8 models only."""
    model, plain = small_gpt(), small_gpt()
    before = dict(model.named_parameters())
    convert_to_fp8(model)
    after = dict(model.named_parameters())
    assert list(before) == list(after) and all(before[name] is after[name] for name in before)
    plain.load_state_dict({name: tensor + 1 for name, tensor in model.state_dict().items()}, strict=True)
    model.load_state_dict(plain.state_dict(), strict=True)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
    assert convert_to_fp8(model)[0] == [], "converting twice changes nothing"


def test_evaluation_is_bitwise_that_of_the_unconverted_model(strict_products):
    """Scores measured through eight bits, which no one who loads the checkpoint would see."""
    model, plain = small_gpt(), small_gpt()
    convert_to_fp8(model)
    ids = torch.randint(128, (2, 64), generator=torch.Generator().manual_seed(0))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(model(ids), plain(ids))
    assert strict_products == []
    model(ids)
    assert len(strict_products) == 12, "the check above could fail"


def trained_losses(model, batches):
    optimizer = model.setup_optimizer()
    losses = []
    for ids in batches:
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("device", DEVICES)
def test_fp8_learns_like_fp32(device, strict_products):
    """A gradient with the wrong sign or scale in one of the layers."""
    generator = torch.Generator().manual_seed(0)
    step = torch.randint(1, 4, (20, 4, 65), generator=generator)  # each token follows the last one by 1, 2 or 3
    batches = (step.cumsum(-1) % 128).to(device)
    plain, model = small_gpt(device=device), small_gpt(torch.bfloat16, device)
    convert_to_fp8(model)
    expected, actual = trained_losses(plain, batches), trained_losses(model, batches)
    assert len(strict_products) == 20 * 2 * 6 * 3
    assert expected[-1] < expected[0] - 1
    assert abs(sum(actual[-5:]) - sum(expected[-5:])) / 5 < 0.1


def test_the_products_can_be_compiled_as_a_whole():
    """A break in the graph at every product: fp8 would then be slower than bf16."""
    layer = Linear(128, 256)
    convert_to_fp8(torch.nn.ModuleList([layer]))
    x = torch.randn(2, 32, 128, dtype=torch.bfloat16, requires_grad=True)

    def loss(x):
        return layer(x).relu().square().float().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=False, backend="aot_eager")
    inputs = (x, layer.weight)
    for one, other in zip(torch.autograd.grad(compiled(x), inputs), torch.autograd.grad(loss(x), inputs), strict=True):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), loss(x))


@pytest.mark.parametrize("capability, fits", [((7, 5), False), ((8, 0), False), ((8, 9), True), ((9, 0), True)])
def test_gpus_without_fp8_are_refused(monkeypatch, capability, fits):
    """An hour of preparation that ends in an error of the CUDA library."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: capability)
    gpu = torch.device("cuda")
    if not fits:
        with pytest.raises(UserError, match=f"this GPU has {capability[0]}.{capability[1]}. Set fp8 to False"):
            require_fp8(gpu, 2048, True)
        return
    require_fp8(gpu, 2048, True)
    with pytest.raises(UserError, match="fp8 needs torch_compile"):
        require_fp8(gpu, 2048, False)
    with pytest.raises(UserError, match="multiple of 16 tokens in a device batch, and there are 1000"):
        require_fp8(gpu, 1000, True)


@pytest.mark.parametrize("device_type", ["cpu", "mps"])
def test_devices_other_than_nvidia_gpus_are_refused(device_type):
    """fp8 emulated on a CPU, many times slower than fp32."""
    with pytest.raises(UserError, match="fp8 needs an NVIDIA GPU"):
        require_fp8(torch.device(device_type), 2048, True)
