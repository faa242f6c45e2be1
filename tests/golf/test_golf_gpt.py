import math

import pytest
import torch
import torch.nn.functional as F

from golf.golf_gpt import GolfConfig, GolfGPT, RotaryTables, is_control_tensor, parameter_roles, windowed_attention
from nanochat.runtime import UserError

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = dict(
    vocab_size=61, model_dim=32, num_heads=4, num_kv_heads=2, num_layers=5, max_seq_len=48, tied_embed_init_std=0.05
)


def randomise(model, seed: int = 0):
    """Give every parameter a value that is not its neutral start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * (0.3 if p.ndim < 2 else 0.2))
    return model


def tiny_model(seed: int = 0, **changes) -> GolfGPT:
    torch.manual_seed(seed)
    return randomise(GolfGPT(GolfConfig(**TINY | changes)), seed)


def tiny_batch(rows: int = 2, length: int = 24, seed: int = 1):
    ids = torch.randint(61, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1], ids[:, 1:]


# --- golf spec 2.2 in float64, one token and one head at a time -----------------------------------------------------


def reference_norm(x):
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()


def reference_rotate(v, position, base):
    D = len(v)
    out = torch.empty_like(v)
    for i in range(D // 2):
        angle = position * base ** (-2 * i / D)
        c, s = math.cos(angle), math.sin(angle)
        out[i] = v[i] * c + v[i + D // 2] * s
        out[i + D // 2] = -v[i] * s + v[i + D // 2] * c
    return out


def reference_attention(w, at, h, config):  # h (T, C)
    T, D, n_h, n_kv = len(h), config.head_dim, config.num_heads, config.num_kv_heads
    q, k, v = (h @ w[f"{at}.{name}.weight"].T for name in ("c_q", "c_k", "c_v"))
    out = torch.zeros(T, n_h * D, dtype=torch.float64)
    for head in range(n_h):
        kv = head * n_kv // n_h
        mine, theirs = slice(head * D, head * D + D), slice(kv * D, kv * D + D)
        queries = [reference_rotate(reference_norm(q[t, mine]), t, config.rope_base) for t in range(T)]
        keys = [reference_rotate(reference_norm(k[t, theirs]), t, config.rope_base) for t in range(T)]
        for t in range(T):
            scores = torch.stack([queries[t] * w[f"{at}.q_gain"][head] @ keys[s] for s in range(t + 1)]) / D**0.5
            out[t, mine] = scores.softmax(0) @ v[: t + 1, theirs]
    return out @ w[f"{at}.proj.weight"].T


def reference_mlp(w, at, h):
    return (h @ w[f"{at}.fc.weight"].T).clamp(min=0).square() @ w[f"{at}.proj.weight"].T


def reference_logits(w, x, config):
    z = reference_norm(x) @ w["lm_head.weight" if "lm_head.weight" in w else "tok_emb.weight"].T
    return config.logit_softcap * torch.tanh(z / config.logit_softcap)


def reference_golf(model, ids):  # ids (T,)
    w, config = {name: p.detach().double() for name, p in model.named_parameters()}, model.config
    x = x0 = reference_norm(w["tok_emb.weight"][ids])
    stack, encoders = [], config.num_layers // 2
    for i in range(config.num_layers):
        if i >= encoders and stack:
            x = x + w["skip_weights"][i - encoders] * stack.pop()
        at = f"blocks.{i}"
        x = w[f"{at}.resid_mix"][0] * x + w[f"{at}.resid_mix"][1] * x0
        x = x + w[f"{at}.attn_scale"] * reference_attention(w, f"{at}.attn", reference_norm(x), config)
        x = x + w[f"{at}.mlp_scale"] * reference_mlp(w, f"{at}.mlp", reference_norm(x))
        if i < encoders:
            stack.append(x)
    return reference_logits(w, x, config)


@pytest.mark.parametrize("changes", [{}, {"num_layers": 2}, {"num_layers": 1, "tie_embeddings": False}])
def test_forward_is_the_spec(changes):
    """A wrong skip, head grouping, rotation or gain gives a model that trains a little worse and can read no record."""
    model = tiny_model(**changes)
    ids, targets = tiny_batch(length=12)
    expected = torch.stack([reference_golf(model, row) for row in ids])
    torch.testing.assert_close(model(ids).double(), expected, rtol=2e-4, atol=2e-4)
    nats = -expected.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(model(ids, targets, reduction="none").double(), nats, rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(model(ids, targets).double(), nats.mean(), rtol=1e-4, atol=1e-4)


def test_parameter_count_and_roles():
    """The published model has exactly 17,059,912 parameters; one more or in another group is another model."""
    with torch.device("meta"):
        model = GolfGPT(GolfConfig())
    assert sum(p.numel() for p in model.parameters()) == 17_059_912
    roles = parameter_roles(model)
    assert {role: sum(p.numel() for p in members.values()) for role, members in roles.items()} == {
        "token": 524_288, "matrix": 9 * 1_835_008, "scalar": 9 * (8 + 512 + 512 + 1024) + 2048, "head": 0,
    }  # fmt: skip
    assert set(roles["matrix"]) == {
        f"blocks.{i}.{name}.weight" for i in range(9)
        for name in ("attn.c_q", "attn.c_k", "attn.c_v", "attn.proj", "mlp.fc", "mlp.proj")
    }  # fmt: skip
    assert "skip_weights" in roles["scalar"] and is_control_tensor("blocks.3.attn.q_gain")
    with torch.device("meta"):
        untied = parameter_roles(GolfGPT(GolfConfig(tie_embeddings=False)))
    assert list(untied["head"]) == ["lm_head.weight"]


def test_start():
    """Output matrices that do not start at zero, or a wide embedding, begin above ln V."""
    torch.manual_seed(0)
    model = GolfGPT(GolfConfig(vocab_size=1024, model_dim=64, num_heads=4, num_kv_heads=2, num_layers=4))
    ids = torch.randint(1024, (2, 65))
    assert abs(model(ids[:, :-1], ids[:, 1:]).item() - math.log(1024)) < 0.01
    bound = 64**-0.5
    for name, p in parameter_roles(model)["matrix"].items():
        assert p.dtype == torch.float32
        if "proj" in name:
            assert not p.any(), name
        else:
            assert p.abs().max() <= bound and abs(p.std() - bound / 3**0.5) < 0.1 * bound, name


def test_no_score_sees_the_future():
    """A leak through attention or the skips would make every reported number worthless."""
    model, (ids, _) = tiny_model(), tiny_batch(length=40)
    before = model(ids)
    for position in (1, 17, 39):
        changed = ids.clone()
        changed[:, position:] = (changed[:, position:] + 1 + torch.arange(40 - position)) % 61
        assert torch.equal(model(changed)[:, :position], before[:, :position])
        assert not torch.allclose(model(changed)[:, position:], before[:, position:])


@pytest.mark.parametrize("last", [1, 7, 24])
def test_last_positions_are_those_of_the_whole(last):
    """The shortcut of sliding windows must not change what is scored."""
    model, (ids, targets) = tiny_model(), tiny_batch()
    torch.testing.assert_close(model(ids, last=last), model(ids)[:, -last:], rtol=1e-5, atol=1e-5)
    some, whole = (model(ids, targets, reduction="none", last=n) for n in (last, None))
    torch.testing.assert_close(some, whole[:, -last:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("T, n", [(1, 1), (7, 7), (24, 24), (24, 5), (25, 24)])
@pytest.mark.parametrize("window", [1, 2, 6, 9, 24, 40])
def test_windowed_attention_is_one_mask(T, n, window):
    """Blocks of queries that begin or end a key too early or too late: a leak, or a shorter past than promised."""
    generator = torch.Generator().manual_seed(T)
    q, k, v = (torch.randn(2, h, t, 8, generator=generator) for h, t in ((4, n), (2, T), (2, T)))
    mask = torch.ones(T, T, dtype=torch.bool).tril() & ~torch.ones(T, T, dtype=torch.bool).tril(-window)
    expected = F.scaled_dot_product_attention(q, k, v, mask[T - n :], enable_gqa=True)
    torch.testing.assert_close(windowed_attention(q, k, v, window, True), expected, rtol=1e-5, atol=1e-5)


def test_a_window_reaches_every_layer():
    """With windows of 4 keys five layers see 15 tokens back and no further; and the text may outgrow the tables."""
    model, ids = tiny_model(), tiny_batch(length=100)[0]
    before = model(ids, window=4)
    for at in (0, 30):
        changed = ids.clone()
        changed[:, at] = (changed[:, at] + 1) % 61
        moved = (model(changed, window=4) != before).any(-1).any(0).nonzero()[:, 0]
        assert moved.min() == at and moved.max() == at + 15
    torch.testing.assert_close(model(ids, window=4, last=70), before[:, -70:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(ids[:, :48], window=48), model(ids[:, :48]), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="49 tokens are more than the 48 positions"):
        model(ids, window=49)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_long_texts_leave_nothing_behind(mode):
    """Tables that grow in an evaluation are tensors that the next backward refuses."""
    model, (ids, targets) = tiny_model(), tiny_batch(length=100)
    with mode():
        model(ids, targets, reduction="none", window=16)
    assert len(model.rope.cos) == 48
    model(ids[:, :48], targets[:, :48]).backward()
    assert model.tok_emb.weight.grad.any()


def test_rotary_tables_stay_fp32():
    """A cast of the model to bf16 left 513 positions of 1024: the defect that the original has."""
    model = tiny_model()
    cos = model.rope.cos.clone()
    for cast in (model.bfloat16(), model.half(), model.double(), model.float()):
        assert torch.equal(cast.rope.cos, cos)
    assert "rope" not in " ".join(model.state_dict())
    with torch.device("meta"):
        elsewhere = GolfGPT(GolfConfig(**TINY))
    assert torch.equal(elsewhere.to_empty(device="cpu").rope.cos, cos)  # made anew, not copied from nowhere


@pytest.mark.parametrize("length, distinct", [(1024, 513), (4096, 769)])
def test_bf16_rope_replays_the_original(length, distinct):
    """Without the same rounding a published log cannot be replayed; the counts are the spec's."""
    tables = RotaryTables(GolfConfig(max_seq_len=length, bf16_rope=True))
    assert len(torch.unique(torch.cat([tables.cos, tables.sin], 1), dim=0)) == distinct
    exact = RotaryTables(GolfConfig(max_seq_len=length))
    assert len(torch.unique(torch.cat([exact.cos, exact.sin], 1), dim=0)) == length
    assert torch.equal(tables.cos, tables.cos.bfloat16().float())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_scoring_before_the_first_backward(mode):
    """Tables filled by an evaluation make the first backward fail: 'Inference tensors cannot be saved'."""
    torch.manual_seed(0)
    model, (ids, targets) = GolfGPT(GolfConfig(**TINY)), tiny_batch()
    with mode():
        model(ids, targets)
        model(ids, targets, reduction="none", last=5)
    model(ids, targets).backward()
    assert model.tok_emb.weight.grad.any()


def test_bf16_activations_keep_fp32_masters():
    """A weight that is itself bf16 loses the small updates of the warmdown."""
    model, (ids, targets) = tiny_model(), tiny_batch()
    model.compute_dtype = torch.bfloat16
    loss = model(ids, targets)
    loss.backward()
    assert loss.dtype == torch.float32 and model.trunk(ids).dtype == torch.bfloat16
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    model.compute_dtype = torch.float32
    assert abs(model(ids, targets).item() - loss.item()) < 0.1


def test_bad_shapes_are_named():
    """A width that the heads do not divide would fail deep inside, with a view error."""
    for changes in ({"model_dim": 30}, {"num_kv_heads": 3}, {"model_dim": 36}):
        with pytest.raises(UserError, match="multiple of"):
            GolfConfig(**TINY | changes)
    with pytest.raises(ValueError, match="max_seq_len"):
        tiny_model()(torch.zeros(1, 49, dtype=torch.long))
