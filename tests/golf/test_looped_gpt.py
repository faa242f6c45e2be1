import math
from functools import partial

import pytest
import torch
from test_golf_gpt import randomise, reference_logits, reference_norm, reference_rotate, tiny_batch

from golf.golf_gpt import parameter_roles
from golf.golf_scoring import scoring_windows, window_losses
from golf.looped_gpt import LoopedConfig, LoopedGPT, without_own_value
from nanochat.runtime import UserError

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = dict(
    vocab_size=61, model_dim=32, num_heads=4, num_kv_heads=2, mlp_mult=2, max_seq_len=64, tied_embed_init_std=0.05,
    num_layers=4, loop_start=1, loop_end=2, num_loops=1, parallel_residual_start=2, rope_dims=4,
)  # fmt: skip
PLAIN_PIECES = dict(leaky_slope=0.0, rope_dims=8, scale_norms=False, gated_skips=False, exclude_own_value=False)


def tiny_model(seed: int = 0, **changes) -> LoopedGPT:
    torch.manual_seed(seed)
    return randomise(LoopedGPT(LoopedConfig(**TINY | changes)), seed)


# --- golf spec 4.3 (B2) and 7 in float64, one token and one head at a time ------------------------------------------


def reference_attention(w, at, h, config):  # h (T, C)
    T, D, R, n_h, n_kv = len(h), config.head_dim, config.rope_dims, config.num_heads, config.num_kv_heads
    q, k, v = (h @ w[f"{at}.{name}.weight"].T for name in ("c_q", "c_k", "c_v"))

    def turned(u, t):
        u = reference_norm(u)
        return torch.cat([reference_rotate(u[:R], t, config.rope_base), u[R:]])

    rows = [[] for _ in range(T)]
    for head in range(n_h):
        kv = head * n_kv // n_h
        mine, theirs = slice(head * D, head * D + D), slice(kv * D, kv * D + D)
        keys = [turned(k[t, theirs], t) for t in range(T)]
        for t in range(T):
            query = turned(q[t, mine], t) * w[f"{at}.q_gain"][head]
            y = torch.stack([query @ keys[s] / D**0.5 for s in range(t + 1)]).softmax(0) @ v[: t + 1, theirs]
            if config.exclude_own_value:
                unit = v[t, theirs] / v[t, theirs].norm()
                y = y - (y @ unit) * unit
            rows[t].append(y)
    return torch.stack([torch.cat(row) for row in rows]) @ w[f"{at}.proj.weight"].T


def reference_looped(w, config, ids, order):
    """Logits (T, V) for the layers in this order; w: name → fp64 tensor."""
    x = x0 = reference_norm(w["tok_emb.weight"][ids])
    half, stack = len(order) // 2, []
    for i, layer in enumerate(order):
        at = f"blocks.{layer}"
        if i >= half and stack:
            skip = w["skip_weights"][i - half] * stack.pop()
            if config.gated_skips:
                gate = 1 / (1 + torch.exp(-w["skip_gates"][i - half]))
                x = (1 - gate) * skip + gate * x
            else:
                x = x + skip
        scale = 1 / math.sqrt(layer + 1) if config.scale_norms else 1.0
        z = w[f"{at}.resid_mix"][0] * x + w[f"{at}.resid_mix"][1] * x0
        attended = z + w[f"{at}.attn_scale"] * reference_attention(w, f"{at}.attn", reference_norm(z) * scale, config)
        hidden = reference_norm(z if layer >= config.parallel_residual_start else attended) * scale
        hidden = hidden @ w[f"{at}.mlp.fc.weight"].T
        hidden = torch.where(hidden > 0, hidden, config.leaky_slope * hidden) ** 2
        x = attended + w[f"{at}.mlp_scale"] * (hidden @ w[f"{at}.mlp.proj.weight"].T)
        if i < half:
            stack.append(x)
    return reference_logits(w, x, config)


def weights64(model):
    return {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}


@pytest.mark.parametrize("looping, order", [(True, [0, 1, 2, 1, 2, 3, 4]), (False, [0, 1, 2, 3, 4])])
def test_an_odd_list_has_its_middle_in_the_second_half(looping, order):
    """Rounded up instead of down, every skip would start and end one layer off."""
    model, (ids, _) = tiny_model(num_layers=5), tiny_batch(rows=1, length=9)
    expected = reference_looped(weights64(model), model.config, ids[0], order)
    torch.testing.assert_close(model(ids, looping=looping)[0].double(), expected, rtol=1e-3, atol=1e-3)
    assert len(model.skip_weights) == 3


def test_virtual_list_is_the_spec_example():
    """A segment that runs once too often or a U cut at another place is another model."""
    config = LoopedConfig()
    order = config.layer_order()
    assert order[: len(order) // 2] == [0, 1, 2, 3, 4, 5, 3, 4]
    assert order[len(order) // 2 :] == [5, 3, 4, 5, 6, 7, 8, 9, 10]
    assert config.layer_order(looping=False) == list(range(11)) == LoopedConfig(num_loops=0).layer_order()


@pytest.mark.parametrize("looping, order", [(True, [0, 1, 2, 1, 2, 3]), (False, [0, 1, 2, 3])])
@pytest.mark.parametrize("piece", [None, *PLAIN_PIECES, "all", "parallel_residual_start"])
def test_forward_is_the_spec(looping, order, piece):
    """A flag that does nothing, a gate the wrong way round or a norm without its scale trains and says nothing."""
    changes = PLAIN_PIECES if piece == "all" else {name: PLAIN_PIECES.get(name, 4) for name in [piece] if name}
    model = tiny_model(**changes)
    ids, targets = tiny_batch(rows=1, length=9)
    expected = reference_looped(weights64(model), model.config, ids[0], order)
    torch.testing.assert_close(model(ids, looping=looping)[0].double(), expected, rtol=1e-3, atol=1e-3)
    nats = -expected.log_softmax(-1).gather(-1, targets[0][:, None])[:, 0]
    losses = model(ids, targets, reduction="none", looping=looping)
    torch.testing.assert_close(losses[0].double(), nats, rtol=1e-3, atol=1e-3)


def test_every_piece_changes_the_answer():
    """With a flag that nothing reads, an ablation compares a model with itself."""
    (ids, targets), answers = tiny_batch(), []
    changes = [{}, {"num_loops": 0}, {"num_loops": 2}, {"parallel_residual_start": 4}]
    for change in changes + [{name: value} for name, value in PLAIN_PIECES.items()]:
        answers.append(tiny_model(**change)(ids, targets).item())
    assert len(set(answers)) == 4 + len(PLAIN_PIECES)


def test_own_value_is_gone():
    """With the value of another group or another position the projection removes what it should keep."""
    y, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8)
    rest = without_own_value(y, v)
    own = v[:, :, -3:].repeat_interleave(2, dim=1)
    assert (rest * own).sum(-1).abs().max() < 1e-5
    unit = own / own.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(rest + (y * unit).sum(-1, keepdim=True) * unit, y)


def test_parameter_count_and_roles():
    """The stack has 35.9 million parameters; gates that count as matrices would be quantised and given to Muon."""
    with torch.device("meta"):
        model = LoopedGPT(LoopedConfig())
    counts = {role: sum(p.numel() for p in members.values()) for role, members in parameter_roles(model).items()}
    assert counts == {"token": 8192 * 512, "matrix": 11 * 2_883_584, "scalar": 11 * 2_056 + 2 * 8 * 512, "head": 0}
    assert sum(counts.values()) == 35_944_536
    assert {"skip_weights", "skip_gates"} < set(parameter_roles(model)["scalar"])


@pytest.mark.parametrize("looping", [True, False])
def test_start(looping):
    """A piece that is not neutral at the start begins above ln V."""
    torch.manual_seed(0)
    model = LoopedGPT(LoopedConfig(vocab_size=8192, model_dim=64, num_heads=4, num_kv_heads=2))
    ids = torch.randint(8192, (2, 65))
    assert abs(model(ids[:, :-1], ids[:, 1:], looping=looping).item() - math.log(8192)) < 0.01
    assert not model.skip_gates.any() and (model.skip_weights == 1).all()
    assert all(not block.attn.proj.weight.any() and not block.mlp.proj.weight.any() for block in model.blocks)


@pytest.mark.parametrize("looping, order", [(True, [0, 1, 2, 1, 2, 3]), (False, [0, 1, 2, 3])])
def test_gradients_are_those_of_the_spec(looping, order):
    """A shared weight must get the sum over its passes, and a skip must carry the gradient back."""
    model = tiny_model()
    ids, targets = tiny_batch(rows=1, length=7)
    model(ids, targets, looping=looping).backward()
    w = weights64(model)
    logits = reference_looped(w, model.config, ids[0], order)
    torch.nn.functional.cross_entropy(logits, targets[0]).backward()
    for name, p in model.named_parameters():
        scale = w[name].grad.abs().max()
        assert scale > 0, name
        torch.testing.assert_close(p.grad.double(), w[name].grad, rtol=1e-3, atol=2e-4 * scale.item(), msg=name)
    used = 3 if looping else 2
    assert (model.skip_gates.grad.abs().sum(1) > 0).tolist() == [place < used for place in range(3)]


@pytest.mark.parametrize("looping", [True, False])
def test_no_score_sees_the_future(looping):
    """Neither the loop nor the own value may let a position look past itself."""
    model, (ids, _) = tiny_model(), tiny_batch(length=40)
    before = model(ids, looping=looping)
    for position in (1, 17, 39):
        changed = ids.clone()
        changed[:, position:] = (changed[:, position:] + 1) % 61
        after = model(changed, looping=looping)
        assert torch.equal(after[:, :position], before[:, :position])
        assert not torch.allclose(after[:, position:], before[:, position:])


@pytest.mark.parametrize("looping", [True, False])
@pytest.mark.parametrize("length, stride", [(16, 16), (16, 4), (64, 8)])
def test_window_scores_are_those_of_whole_windows(looping, length, stride):
    """The shortcut for the last positions must take queries, own values and the parallel MLP from the same place."""
    model = tiny_model()
    losses_of = partial(model, reduction="none", looping=looping)
    stream = torch.randint(61, (150,), generator=torch.Generator().manual_seed(3))
    windows = scoring_windows(len(stream) - 1, length, stride)
    scores = torch.cat([nats for _, nats in window_losses(losses_of, stream, windows, length, batch_windows=5)])
    with torch.no_grad():
        expected = [
            losses_of(stream[None, w.start : w.end], stream[None, w.start + 1 : w.end + 1])[0, w.first - w.start :]
            for w in windows
        ]
    torch.testing.assert_close(scores, torch.cat(expected), rtol=1e-4, atol=1e-4)


def test_bf16_activations_keep_fp32_masters():
    """A gate or a table in fp32 would silently lift the whole stream to fp32."""
    model, (ids, targets) = tiny_model(), tiny_batch()
    exact = model(ids, targets).item()
    model.compute_dtype = torch.bfloat16
    loss = model(ids, targets)
    loss.backward()
    assert model.trunk(ids).dtype == torch.bfloat16 and abs(loss.item() - exact) < 0.2
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize(
    "changes, word",
    [({"loop_end": 4}, "loop"), ({"loop_start": 3}, "loop"), ({"num_loops": -1}, "loop"),
     ({"rope_dims": 3}, "rope_dims"), ({"rope_dims": 16}, "rope_dims"), ({"rope_dims": 0}, "rope_dims"),
     ({"num_kv_heads": 3}, "num_kv_heads")],
)  # fmt: skip
def test_bad_shapes_are_named(changes, word):
    """A loop past the last layer would silently be a shorter loop."""
    with pytest.raises(UserError, match=word):
        LoopedConfig(**TINY | changes)
