import pytest
import torch
import torch.nn as nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend

from attention_reference import random_qkv, reference_attention
from nanochat.attention import band_mask, flash_attn, sdpa_attention, sdpa_with_kvcache
from nanochat.attention_kernels import (
    fa4_backend,
    flex_backend,
    full_attention_by,
    load_cudnn_sdpa,
    load_fa4,
    load_flex,
    load_sdpa,
    load_varlen,
    varlen_backend,
)

pytestmark = pytest.mark.usefixtures("one_thread")

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LOADERS = [load_sdpa, load_varlen, load_flex, load_cudnn_sdpa, load_fa4]
SHAPES = [(1, 200, 4, 4, 64), (2, 133, 4, 2, 128)]  # B, T, H, H_kv, D; no T is a multiple of any block
LEFTS = [-1, 0, 1, 64, 131, 500]


def plain_varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False, seqused_k=None
):
    """PyTorch's `varlen_attn` as its documentation has it: queries are the last of the keys that count."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and window_size[1] == 0
    assert enable_gqa or query.size(1) == key.size(1)
    assert (max_q, max_k) == (cu_seq_q.diff().max(), cu_seq_k.diff().max())
    outputs = []
    for row in range(len(cu_seq_q) - 1):
        q = query[cu_seq_q[row] : cu_seq_q[row + 1]]
        start, stop = cu_seq_k[row : row + 2].tolist()
        n = stop - start if seqused_k is None else int(seqused_k[row])
        k, v = (x[start : start + n].repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (key, value))
        mask = band_mask(torch.arange(n - len(q), n), torch.arange(n), window_size[0])
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.size(-1) ** 0.5
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, float("-inf")).softmax(-1), v))
    return torch.cat(outputs)


def plain_fa4(q, k, v, causal=False, window_size=(None, None)):
    """FlashAttention-4's function: its unlimited is None, and it gives the logarithms of the sums too."""
    assert causal and (window_size == (None, None) or min(window_size) >= 0)
    left = -1 if window_size[0] is None else window_size[0]
    return reference_attention(q, k, v, left).to(q.dtype), None


STAND_INS = [load_sdpa(CPU, torch.float32), varlen_backend(plain_varlen_attn), fa4_backend(plain_fa4)]


def assert_close_in_scale(actual, expected, tolerance):
    """Largest error relative to the largest value: a single gradient near zero may be off by more than itself."""
    error = (actual.double() - expected).abs().max() / expected.abs().max().clamp(min=0.1)  # all are 0 when left is
    assert error < tolerance, f"off by {error:.1e} of the largest value"


def check_training(train, device, dtype, tolerance, shape, left):
    """Output and gradients against the reference, in the dtype of the kernel."""
    B, T, H, H_kv, D = shape
    qkv = [x.to(device, dtype).requires_grad_() for x in random_qkv(T + left, B, T, T, H, H_kv, D)]
    upstream = random_qkv(1, B, T, T, H, H_kv, D)[0].to(device, dtype)
    expected = reference_attention(*qkv, left)
    y = train(*qkv, (left, 0))
    assert y.shape == (B, T, H, D) and y.dtype == dtype
    assert_close_in_scale(y, expected, tolerance)
    wanted = torch.autograd.grad((expected * upstream).sum(), qkv)
    for actual, gradient in zip(torch.autograd.grad((y * upstream).sum(), qkv), wanted, strict=True):
        assert_close_in_scale(actual, gradient.double(), tolerance)


def check_cached_calls(cached, device, dtype, tolerance, T_new, positions, left, new_keys):
    """Rows at their positions against the reference, and the cache as it must be afterwards."""
    (B, T_max, H, H_kv, D), ends = (len(positions), 150, 4, 2, 64), [position + T_new for position in positions]
    q, keys, values = (x.to(device, dtype) for x in random_qkv(left, B, T_new, T_max, H, H_kv, D))
    caches, new = [keys.clone(), values.clone()], [None, None]
    if new_keys:
        new = [torch.stack([x[b, p : p + T_new] for b, p in enumerate(positions)]) for x in (keys, values)]
        for cache in caches:
            for row, position in enumerate(positions):
                cache[row, position : position + T_new] = 100.0  # to be overwritten
    bounds = min(positions), max(positions)
    y = cached(q, *caches, *new, torch.tensor(positions, dtype=torch.int32, device=device), (left, 0), bounds)
    assert torch.equal(caches[0], keys) and torch.equal(caches[1], values), "written in place, and nothing else"
    for row, (position, end) in enumerate(zip(positions, ends, strict=True)):
        one = slice(row, row + 1)
        expected = reference_attention(q[one], keys[one, :end], values[one, :end], left, position)
        assert_close_in_scale(y[one], expected, tolerance)


CACHED_CASES = dict(
    argnames="T_new, positions, new_keys",
    argvalues=[
        (1, [90, 90, 90], True), (1, [0, 90, 149], True), (7, [0, 0, 0], True), (7, [60, 3, 143], True),
        (3, [5, 100, 147], False),
    ],
)  # fmt: skip


@pytest.mark.parametrize("backend", STAND_INS, ids=lambda backend: backend.name)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("left", LEFTS)
def test_what_a_kernel_is_asked_for_is_the_window(backend, shape, left):
    """A wrapper that hands a kernel another window, other heads or another order of the axes than it expects."""
    check_training(backend.train, CPU, torch.float32, 1e-4, shape, left)


@pytest.mark.parametrize("backend", STAND_INS, ids=lambda backend: backend.name)
@pytest.mark.parametrize(**CACHED_CASES)
@pytest.mark.parametrize("left", LEFTS)
def test_what_a_kernel_is_asked_for_is_what_the_row_has_seen(backend, T_new, positions, new_keys, left):
    """Rows that stand at different places read as if they stood at one, or keys written beside their place."""
    check_cached_calls(backend.cached, CPU, torch.float32, 1e-4, T_new, positions, left, new_keys)


class Layer(nn.Module):
    """Attention inside a function that is compiled, as the model's blocks are."""

    def __init__(self, train, head_dim=8):
        super().__init__()
        self.train_attention, self.projection = train, nn.Linear(32, 4 * head_dim)

    def forward(self, x, window_size):
        q = self.projection(x).unflatten(-1, (4, -1))
        return self.train_attention(q, q[:, :, :2], q[:, :, 2:], window_size).flatten(2)


def test_flex_is_compiled_into_the_block_that_calls_it():
    """A mask made anew in each step, a graph for each layer, or a table of blocks that skips visible ones."""
    compiler = CompileCounterWithBackend("inductor")
    torch._dynamo.reset()
    layers = [Layer(flex_backend().train)]
    layers.append(Layer(layers[0].train_attention))
    plain = [Layer(lambda q, k, v, window: reference_attention(q, k, v, window[0]).float()) for _ in layers]
    for one, other in zip(plain, layers, strict=True):
        one.load_state_dict(other.state_dict())
    compiled = torch.compile(Layer.forward, backend=compiler, dynamic=False, fullgraph=True)
    x = random_qkv(0, 2, 200, 1, 1, 1, 32)[0][:, :, 0]
    with torch.no_grad():
        for left in (30, 300, 30, 300):
            for layer, reference in zip(layers, plain, strict=True):
                y = compiled(layer, x, (left, 0))
                torch.testing.assert_close(y, reference(x, (left, 0)), atol=1e-5, rtol=1e-4)
    assert compiler.frame_count == 2, "one graph for each window"


def test_flex_leaves_single_evaluations_to_the_kernel_that_need_not_be_compiled():
    """Seconds of compilation for each length of text in an exam."""
    q, k, v = random_qkv(0, 1, 50, 50, 2, 1, 8)
    with torch.no_grad():
        y = flex_backend().train(q, k, v, (10, 0))
        assert torch.equal(y, load_sdpa(CPU, torch.float32).train(q, k, v, (10, 0)))


def test_the_implementation_named_is_the_one_that_is_compiled_in():
    """A choice of kernel that is lost when the block is traced, so that another one is measured under its name."""
    x = random_qkv(0, 2, 40, 1, 1, 1, 32)[0][:, :, 0]
    torch._dynamo.reset()
    compiled = torch.compile(Layer.forward, backend="aot_eager", dynamic=False, fullgraph=True)
    layer = Layer(full_attention_by(SDPBackend.MATH))
    expected = layer(x, (-1, 0))
    y = compiled(layer, x, (-1, 0))
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-4)
    (actual,), (wanted,) = (torch.autograd.grad(each.sin().sum(), layer.projection.weight) for each in (y, expected))
    torch.testing.assert_close(actual, wanted, atol=1e-4, rtol=1e-4)
    with pytest.raises(RuntimeError, match="(?i)no viable backend"):  # a CPU has no cuDNN
        compiled(Layer(full_attention_by(SDPBackend.CUDNN_ATTENTION)), x, (-1, 0))


@pytest.mark.parametrize("backend", STAND_INS[1:], ids=lambda backend: backend.name)
def test_a_compiled_block_trains_through_the_kernel(backend):
    """A kernel that the compiler cannot look into and that ends the compilation, or loses its gradient there."""
    x = random_qkv(0, 2, 40, 1, 1, 1, 32)[0][:, :, 0]
    torch._dynamo.reset()
    layer = Layer(backend.train)
    compiled = torch.compile(Layer.forward, backend="aot_eager", dynamic=False)
    gradients = [
        torch.autograd.grad(call(layer, x, (9, 0)).sin().sum(), layer.projection.weight)[0]
        for call in (compiled, Layer.forward)
    ]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


def test_cudnn_leaves_single_evaluations_to_the_kernel_that_makes_no_plans(monkeypatch):
    """A plan for each length of text in an exam; or an error for a text of one token, which cuDNN does not take."""
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    train = load_cudnn_sdpa(CUDA, torch.bfloat16).train
    for T in (1, 50):
        q, k, v = random_qkv(0, 1, T, T, 2, 1, 8)
        with torch.no_grad():
            assert torch.equal(train(q, k, v, (-1, 0)), sdpa_attention(q, k, v, (-1, 0)))
        with pytest.raises(RuntimeError, match="(?i)no viable backend"):  # a CPU has no cuDNN
            train(q.requires_grad_(), k, v, (-1, 0))


@pytest.mark.parametrize("load", [load_varlen, load_flex, load_cudnn_sdpa, load_fa4])
def test_a_kernel_that_cannot_run_here_says_so_in_one_short_line(load):
    """A traceback, or a kernel that is chosen and fails in the first step."""
    with pytest.raises(Exception, match=r"CUDA|No module named") as error:
        load(CPU, torch.bfloat16)
    assert len(str(error.value)) < 100 and "\n" not in str(error.value)


@pytest.mark.parametrize("load", [load_varlen, load_cudnn_sdpa, load_fa4])
def test_flash_kernels_refuse_fp32(load):
    """fp32 tensors handed to a kernel that only has half precision."""
    with pytest.raises(RuntimeError, match="bf16 and fp16 on CUDA, not in float32 on cuda"):
        load(CUDA, torch.float32)


def test_a_varlen_kernel_without_windows_is_refused_by_name(monkeypatch):
    """PyTorch 2.10's function, which knows no windows: every layer would be a full one."""
    from torch.nn.attention import varlen

    def older(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        raise AssertionError("not to be called")

    monkeypatch.setattr(varlen, "varlen_attn", older)
    with pytest.raises(RuntimeError, match="has no windows"):
        load_varlen(CUDA, torch.bfloat16)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("left", [-1, 64])
def test_a_varlen_kernel_with_windows_only_trains(monkeypatch, shape, left):
    """PyTorch 2.11's function, refused although it does all that training needs, or asked for what it does not know."""
    from torch.nn.attention import varlen

    def older(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        return plain_varlen_attn(
            query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size=window_size, enable_gqa=True
        )

    monkeypatch.setattr(varlen, "varlen_attn", older)
    backend = load_varlen(CUDA, torch.bfloat16)
    check_training(backend.train, CPU, torch.float32, 1e-4, shape, left)
    assert backend.cached is sdpa_with_kvcache


@pytest.mark.parametrize("left", [-1, 0, 7, 60])
def test_the_real_varlen_function_takes_what_it_is_given(left):
    """A stand-in that accepts arguments which PyTorch's own function does not have."""
    try:
        backend = load_varlen(CUDA, torch.bfloat16)
    except (ImportError, RuntimeError) as error:
        pytest.skip(str(error))  # an older PyTorch
    q, k, v = (x.to("meta", torch.bfloat16).requires_grad_() for x in random_qkv(0, 2, 50, 50, 4, 2, 64))
    compiled = torch.compile(lambda *a: backend.train(*a, (left, 0)), backend="aot_eager", fullgraph=True)
    for train in (lambda *a: backend.train(*a, (left, 0)), compiled):
        y = train(q, k, v)
        assert y.shape == q.shape and torch.autograd.grad(y.sum(), (q, k, v))[2].shape == v.shape
    with torch.no_grad():
        positions = torch.zeros(2, dtype=torch.int32, device="meta")
        y = backend.cached(q[:, :3], k.detach(), v.detach(), k[:, :3], v[:, :3], positions, (left, 0))
    assert y.shape == (2, 3, 4, 64)


def test_the_kernel_that_runs_everywhere_is_the_one_before_any_choice():
    """Two definitions of PyTorch's own attention that drift apart."""
    assert load_sdpa(CPU, torch.float32) == flash_attn.selected


def half_precision():
    """bf16, or fp16 on GPUs that emulate it."""
    return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16


def load_or_skip(load):
    if load is not load_sdpa and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("made for newer GPUs")
    try:
        return load(CUDA, half_precision())
    except Exception as error:
        pytest.skip(f"{load.__name__}: {error}")


@pytest.mark.gpu
@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("left", [-1, 0, 64])
def test_on_a_gpu_training_agrees_with_the_reference(load, shape, left):
    """A kernel whose window, key heads or gradients differ from the definition on this GPU."""
    torch._dynamo.reset()  # every case is a graph of its own, and there is a limit to them
    check_training(load_or_skip(load).train, CUDA, half_precision(), 2e-2, shape, left)


@pytest.mark.gpu
@pytest.mark.parametrize("load", [load_sdpa, load_varlen])  # the others use the cached half of sdpa
@pytest.mark.parametrize(**CACHED_CASES)
@pytest.mark.parametrize("left", [-1, 0, 64])
def test_on_a_gpu_cached_calls_agree_with_the_reference(load, T_new, positions, new_keys, left):
    """A text that goes on from keys which its row has not seen, on this GPU."""
    check_cached_calls(load_or_skip(load).cached, CUDA, half_precision(), 2e-2, T_new, positions, left, new_keys)


@pytest.mark.gpu
@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("left", [-1, 9])
def test_on_a_gpu_a_compiled_block_trains_through_the_kernel(load, left):
    """A kernel that is right alone and wrong, or not there, once the block around it is compiled."""
    x = random_qkv(0, 2, 40, 1, 1, 1, 32)[0][:, :, 0].to(CUDA, half_precision())
    torch._dynamo.reset()
    layer = Layer(load_or_skip(load).train, head_dim=64).to(CUDA, half_precision())  # FlexAttention wants 16 at least
    compiled = torch.compile(Layer.forward, dynamic=False)
    expected = Layer(lambda q, k, v, window: reference_attention(q, k, v, window[0]).to(q.dtype))
    expected.projection = layer.projection
    gradients = [
        torch.autograd.grad(call(x, (left, 0)).float().square().sum(), layer.projection.weight)[0]
        for call in (lambda *a: compiled(layer, *a), expected)
    ]
    assert_close_in_scale(gradients[0], gradients[1].double(), 5e-2)


@pytest.mark.gpu
def test_on_a_gpu_a_step_with_a_cache_never_waits_for_it():
    """A layer that asks the GPU for a number: it then stands still until the GPU has done everything before."""
    for load in (load_sdpa, load_varlen):
        cached = load_or_skip(load).cached
        q, k, v = (x.to(CUDA, half_precision()) for x in random_qkv(0, 2, 1, 64, 4, 2, 64))
        positions = torch.tensor([3, 9], dtype=torch.int32, device=CUDA)
        torch.cuda.set_sync_debug_mode("error")
        try:
            cached(q, k, v, k[:, :1].clone(), v[:, :1].clone(), positions, (-1, 0), (3, 9))
        finally:
            torch.cuda.set_sync_debug_mode("default")
