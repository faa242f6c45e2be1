import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from attention_reference import random_qkv, reference_attention
from nanochat.attention import (
    CPU_QUERY_BLOCK,
    AttentionBackend,
    FlashAttention,
    band_mask,
    banded_sdpa,
    blocked_attention,
    flash_attn,
    sdpa_attention,
    sdpa_with_kvcache,
)
from nanochat.engine import KVCache
from nanochat.gpt import GPT, GPTConfig

BLOCK = CPU_QUERY_BLOCK
TOLERANCE = dict(atol=2e-5, rtol=1e-4)


pytestmark = pytest.mark.usefixtures("one_thread")


@st.composite
def shapes(draw, max_T):
    """(B, T, H, H_kv, D, left), with the windows that go wrong most easily drawn as often as all others."""
    T = draw(st.integers(1, max_T))
    left = draw(st.sampled_from([-1, 0, 1, T - 1, T, T + 1, 3 * T]) | st.integers(0, T))
    H_kv = draw(st.integers(1, 3))
    return draw(st.integers(1, 3)), T, H_kv * draw(st.integers(1, 3)), H_kv, draw(st.sampled_from([2, 8, 12])), left


@settings(max_examples=40, deadline=None)
@given(shape=shapes(40), seed=st.integers(0, 2**32 - 1))
def test_a_sequence_agrees_with_the_reference_for_any_shape_and_window(shape, seed):
    """A window off by one, a query head that reads the wrong key head, a wrong scale; in training or in evaluation."""
    B, T, H, H_kv, D, left = shape
    q, k, v = random_qkv(seed, B, T, T, H, H_kv, D)
    for training in (True, False):
        with torch.set_grad_enabled(training):
            y = flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(left, 0))
        assert y.shape == (B, T, H, D)
        torch.testing.assert_close(y.double(), reference_attention(q, k, v, left), **TOLERANCE)


@pytest.mark.parametrize("T", [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 17])
@pytest.mark.parametrize("left", [-1, 0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 10_000])
def test_blocks_of_queries_join_without_a_seam(T, left):
    """A key lost or seen twice where one block of queries ends and the next begins."""
    q, k, v = random_qkv(T + left, 1, T, T, 2, 1, 4)
    for training in (True, False):
        with torch.set_grad_enabled(training):
            y = flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(left, 0))
        torch.testing.assert_close(y.double(), reference_attention(q, k, v, left), **TOLERANCE)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), B=st.integers(1, 3), T=st.integers(2, 40), H_kv=st.integers(1, 2), share=st.integers(1, 3))
def test_the_banded_form_agrees_with_the_reference(data, B, T, H_kv, share):
    """The GPU's way with windows that reads padding as keys or mixes rows of the batch, seen without a GPU."""
    left = data.draw(st.sampled_from([1, T - 1]) | st.integers(1, T - 1))
    q, k, v = random_qkv(B * T + left, B, T, T, H_kv * share, H_kv, 4)
    y = banded_sdpa(*(x.transpose(1, 2) for x in (q, k, v)), left).transpose(1, 2)
    torch.testing.assert_close(y.double(), reference_attention(q, k, v, left), **TOLERANCE)


@pytest.mark.parametrize("compute", [blocked_attention, banded_sdpa])
@pytest.mark.parametrize("T, left", [(BLOCK + 37, 20), (BLOCK + 37, BLOCK + 5), (50, 1)])
def test_gradients_agree_with_the_reference(compute, T, left):
    """A backward pass that trains on other keys than the forward pass looked at."""
    q, k, v = (x.requires_grad_() for x in random_qkv(T, 2, T, T, 2, 2, 4))
    upstream = torch.randn(2, T, 2, 4, generator=torch.Generator().manual_seed(5))
    expected = torch.autograd.grad((reference_attention(q, k, v, left) * upstream).sum(), (q, k, v))
    y = compute(*(x.transpose(1, 2) for x in (q, k, v)), left).transpose(1, 2)
    actual = torch.autograd.grad((y * upstream).sum(), (q, k, v))
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)


@pytest.mark.parametrize("left", [-1, 0, 70])
def test_gradients_of_a_grouped_query_layer_agree_with_the_reference(left):
    """Gradients of a shared key head that come from one of its query heads instead of all."""
    q, k, v = (x.requires_grad_() for x in random_qkv(3, 1, BLOCK + 9, BLOCK + 9, 4, 2, 4))
    expected = torch.autograd.grad(reference_attention(q, k, v, left).sin().sum(), (q, k, v))
    actual = torch.autograd.grad(sdpa_attention(q, k, v, (left, 0)).sin().sum(), (q, k, v))
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)


@pytest.mark.parametrize("left, visible", [(0, 1), (1, 2), (4, 5), (-1, 10)])
def test_a_window_is_left_tokens_and_the_token_itself(left, visible):
    """left keys instead of left + 1, counted: checkpoints trained elsewhere would see a shorter window."""
    T = 10
    q = torch.zeros(1, T, 1, T)  # equal scores: the output is the mean over what is visible
    v = torch.eye(T).view(1, T, 1, T)
    whole = flash_attn.flash_attn_func(q, torch.zeros_like(q), v, causal=True, window_size=(left, 0))[0, -1, 0]
    position = torch.tensor([T - 1], dtype=torch.int32)
    k_cache, v_cache = torch.zeros(1, T, 1, T), v.clone()
    cached = flash_attn.flash_attn_with_kvcache(
        q[:, -1:], k_cache, v_cache, torch.zeros(1, 1, 1, T), v[:, -1:], position, causal=True, window_size=(left, 0)
    )[0, -1, 0]
    expected = torch.tensor([0.0] * (T - visible) + [1 / visible] * visible)
    torch.testing.assert_close(whole, expected)
    torch.testing.assert_close(cached, expected)
    assert band_mask(torch.arange(T), torch.arange(T), left)[-1].sum() == visible


@settings(max_examples=60, deadline=None)
@given(shape=shapes(24), position=st.integers(0, 24), room=st.integers(0, 5), seed=st.integers(0, 2**32 - 1))
@example(shape=(2, 1, 2, 1, 8, 3), position=10, room=0, seed=0)
def test_a_cached_call_agrees_with_the_reference_at_any_position(shape, position, room, seed):
    """New tokens that see the wrong past, or each other's future; a cache written beside its place or advanced."""
    B, T_new, H, H_kv, D, left = shape
    end = position + T_new
    q, keys, values = random_qkv(seed, B, T_new, end, H, H_kv, D)
    k_cache, v_cache = torch.full((2, B, end + room, H_kv, D), 1e6)  # what is not written yet must never be read
    k_cache[:, :position], v_cache[:, :position] = keys[:, :position], values[:, :position]
    expected_k, expected_v = k_cache.clone(), v_cache.clone()
    expected_k[:, position:end], expected_v[:, position:end] = keys[:, position:], values[:, position:]
    seqlens = torch.full((B,), position, dtype=torch.int32)

    y = flash_attn.flash_attn_with_kvcache(
        q, k_cache, v_cache, keys[:, position:], values[:, position:], seqlens, causal=True, window_size=(left, 0)
    )
    torch.testing.assert_close(y.double(), reference_attention(q, keys, values, left, position), **TOLERANCE)
    assert torch.equal(k_cache, expected_k) and torch.equal(v_cache, expected_v), "written in place, and nothing else"
    assert seqlens.tolist() == [position] * B, "the model advances the cache, once for all layers"

    again = flash_attn.flash_attn_with_kvcache(  # without new keys: the queries are the last ones that the cache holds
        q, k_cache, v_cache, cache_seqlens=seqlens + T_new, causal=True, window_size=(left, 0)
    )
    torch.testing.assert_close(again, y, **TOLERANCE)


@settings(max_examples=60, deadline=None)
@given(shape=shapes(12), positions=st.lists(st.integers(0, 20), min_size=3, max_size=3), seed=st.integers(0, 2**32 - 1))
def test_rows_of_a_cache_may_be_filled_differently(shape, positions, seed):
    """One row that sees as far as another: a text then goes on from what was left in the cache by a stranger."""
    B, T_new, H, H_kv, D, left = shape
    positions = positions[:B]
    q, keys, values = random_qkv(seed, B, T_new, max(positions) + T_new, H, H_kv, D)
    k_cache, v_cache = torch.full((2, B, keys.size(1) + 2, H_kv, D), 1e6)
    expected_k, expected_v, new_k, new_v = k_cache.clone(), v_cache.clone(), *torch.zeros(2, B, T_new, H_kv, D)
    for row, position in enumerate(positions):
        end = position + T_new
        for cache, expected, new, source in ((k_cache, expected_k, new_k, keys), (v_cache, expected_v, new_v, values)):
            cache[row, :position], new[row] = source[row, :position], source[row, position:end]
            expected[row, :end] = source[row, :end]
    seqlens = torch.tensor(positions, dtype=torch.int32)
    y = flash_attn.flash_attn_with_kvcache(
        q, k_cache, v_cache, new_k, new_v, seqlens, causal=True, window_size=(left, 0)
    )
    for row, position in enumerate(positions):
        one = slice(row, row + 1)
        expected = reference_attention(q[one], keys[one], values[one], left, position)
        torch.testing.assert_close(y[one].double(), expected, **TOLERANCE)
    assert torch.equal(k_cache, expected_k) and torch.equal(v_cache, expected_v)


@pytest.mark.parametrize("T_new", [1, 2])
def test_a_full_cache_is_an_error(T_new):
    """A token that is silently dropped at the end of the cache, after which the model reads stale text."""
    q, k, v = random_qkv(0, 1, T_new, 6, 1, 1, 4)
    position = torch.tensor([7 - T_new], dtype=torch.int32)
    with pytest.raises(ValueError, match="cache holds 6 positions"):
        flash_attn.flash_attn_with_kvcache(q, k, v, q, q, position, causal=True)


def test_bf16_agrees_with_the_reference_to_its_precision():
    """A softmax over bf16 scores: it must be done in fp32."""
    q, k, v = (x.bfloat16() for x in random_qkv(1, 2, 200, 200, 4, 2, 16))
    for left in (-1, 50):
        y = flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(left, 0))
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.double(), reference_attention(q, k, v, left), atol=1e-2, rtol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("left", [-1, 0, 1, 30, 99, 100])
@pytest.mark.parametrize("H_kv", [2, 4])
def test_on_a_gpu_a_sequence_agrees_with_the_reference(left, H_kv):
    """The GPU takes other branches than the CPU (built-in causal, bands); they must mean the same window."""
    q, k, v = (x.cuda() for x in random_qkv(left + 1, 2, 100, 100, 4, H_kv, 16))
    y = flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(left, 0))
    torch.testing.assert_close(y.double(), reference_attention(q, k, v, left), atol=1e-4, rtol=1e-3)


def test_looking_forward_is_refused():
    """A caller that forgets causal=True and trains a model which copies the next token."""
    q, k, v = random_qkv(0, 1, 4, 4, 1, 1, 4)
    with pytest.raises(ValueError, match="causal=True"):
        flash_attn.flash_attn_func(q, k, v)
    with pytest.raises(ValueError, match="causal=True"):
        flash_attn.flash_attn_with_kvcache(q, k, v, cache_seqlens=torch.zeros(1, dtype=torch.int32))


def test_the_backend_in_use_answers_and_no_other():
    """A kernel that was chosen and is not called, or only in training; or one that is called before any choice."""
    attention = FlashAttention(AttentionBackend("sdpa", sdpa_attention, sdpa_with_kvcache))
    q, k, v = random_qkv(0, 1, 2, 2, 1, 1, 4)
    seqlens = torch.zeros(1, dtype=torch.int32)
    assert torch.is_tensor(attention.flash_attn_func(q, k, v, causal=True))
    attention.use(AttentionBackend("other", lambda *a: "other trained", lambda *a: "other generated"))
    assert attention.selected.name == "other"
    assert attention.flash_attn_func(q, k, v, causal=True) == "other trained"
    assert attention.flash_attn_with_kvcache(q, k, v, k, v, seqlens, causal=True) == "other generated"
    assert flash_attn.selected.name == "sdpa", "another object, another choice"


@pytest.mark.parametrize("lengths", [[5, 5, 5], [0, 0, 0], [2, 7, 4]])
@pytest.mark.parametrize("T_new, new_keys", [(1, True), (3, True), (2, False)])
def test_bounds_change_nothing_but_who_is_asked(lengths, T_new, new_keys):
    """Numbers known to the caller that lead to other keys than those which the device would have told."""
    lengths = [length + 3 for length in lengths] if not new_keys else lengths
    q, keys, values = random_qkv(7, 3, T_new, 12, 4, 2, 8)
    k, v = (keys[:, :T_new], values[:, :T_new]) if new_keys else (None, None)
    seqlens = torch.tensor(lengths, dtype=torch.int32)
    results = []
    for bounds in (None, (min(lengths), max(lengths))):
        caches = keys.clone(), values.clone()
        y = flash_attn.flash_attn_with_kvcache(
            q, *caches, k, v, seqlens, causal=True, window_size=(4, 0), bounds=bounds
        )
        results.append((y, *caches))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="cache holds 12 positions"):
        flash_attn.flash_attn_with_kvcache(q, keys, values, keys[:, :T_new], values[:, :T_new], seqlens, causal=True,
                                           bounds=(0, 13 - T_new))  # fmt: skip


@pytest.mark.parametrize("lengths", [[6, 6], [6, 3]])
def test_a_step_with_a_cache_never_waits_for_the_device(lengths):
    """A layer that asks the GPU for a number: it then stands still until the GPU has done everything before."""
    config = GPTConfig(
        sequence_len=16, vocab_size=100, n_layer=3, n_head=4, n_kv_head=2, n_embd=64, window_pattern="SL"
    )
    with torch.device("meta"):  # a device that has shapes but no values: asking it for one raises
        model = GPT(config)
        cache = KVCache(2, config.n_kv_head, 20, config.head_dim, config.n_layer, "meta", torch.float32)
        model(torch.zeros(2, 6, dtype=torch.long), kv_cache=cache)
        cache.set_lengths(lengths)
        for T_new in (1, 1, 4):
            assert model(torch.zeros(2, T_new, dtype=torch.long), kv_cache=cache).shape == (2, T_new, 100)
    assert cache.lengths.tolist() == [length + 6 for length in lengths]
