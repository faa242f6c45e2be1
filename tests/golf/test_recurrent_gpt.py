import math
from collections import Counter
from functools import partial

import pytest
import torch
from test_golf_gpt import (
    randomise,
    reference_attention,
    reference_logits,
    reference_mlp,
    reference_norm,
    tiny_batch,
)

from golf.golf_gpt import parameter_roles, rms_normalise
from golf.golf_scoring import scoring_windows, window_losses
from golf.recurrent_gpt import RecurrentConfig, RecurrentGPT, depth_for_step

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = dict(
    vocab_size=61, model_dim=32, num_heads=4, num_kv_heads=2, num_unique_layers=2, num_recurrences=3, max_seq_len=48
)


def tiny_model(seed: int = 0, **changes) -> RecurrentGPT:
    torch.manual_seed(seed)
    return randomise(RecurrentGPT(RecurrentConfig(**TINY | changes)), seed)


def reference_recurrent(model, ids, depth):  # golf spec 4.3 in float64
    w, config = {name: p.detach().double() for name, p in model.named_parameters()}, model.config
    x = x0 = reference_norm(w["tok_emb.weight"][ids])
    for r in range(depth):
        if "iter_embed" in w:
            x = x + w["iter_embed"][min(r, len(w["iter_embed"]) - 1)]
        for u in range(config.num_unique_layers):
            at = f"blocks.{u}"
            z = w[f"{at}.resid_mix"][0] * x + w[f"{at}.resid_mix"][1] * x0
            h = reference_norm(z)
            attended = reference_attention(w, f"{at}.attn", h, config)
            x = z + w[f"{at}.attn_scale"] * attended + w[f"{at}.mlp_scale"] * reference_mlp(w, f"{at}.mlp", h)
    return reference_logits(w, x, config)


@pytest.mark.parametrize("depth", [None, 1, 5])
@pytest.mark.parametrize("iteration_embeddings", [True, False])
def test_forward_is_the_spec(depth, iteration_embeddings):
    """A block that is not parallel, a loop too many or an embedding at the wrong place is another model."""
    model = tiny_model(iteration_embeddings=iteration_embeddings)
    ids, targets = tiny_batch(rows=1, length=9)
    expected = reference_recurrent(model, ids[0], depth or 3)
    torch.testing.assert_close(model(ids, depth=depth)[0].double(), expected, rtol=5e-4, atol=5e-4)
    nats = -expected.log_softmax(-1).gather(-1, targets[0][:, None])[:, 0]
    losses = model(ids, targets, reduction="none", depth=depth)
    torch.testing.assert_close(losses[0].double(), nats, rtol=5e-4, atol=5e-4)


def test_parameter_count_and_roles():
    """The spec's sizes: 25,175,076 without iteration embeddings, and one vector per loop with them."""
    with torch.device("meta"):
        plain = RecurrentGPT(RecurrentConfig(iteration_embeddings=False))
        model = RecurrentGPT(RecurrentConfig())
    assert sum(p.numel() for p in plain.parameters()) == 25_175_076
    assert sum(p.numel() for p in model.parameters()) == 25_175_076 + 8 * 768 == 25_181_220
    roles = parameter_roles(model)
    assert sum(p.numel() for p in roles["matrix"].values()) == 18_874_368
    assert sum(p.numel() for p in roles["scalar"].values()) == 3 * 3_084 + 8 * 768
    assert "iter_embed" in roles["scalar"]


def test_start():
    """The original forgot to zero the projections: a looped model then starts far from ln V."""
    torch.manual_seed(0)
    model = RecurrentGPT(RecurrentConfig(**TINY | dict(vocab_size=8192)))
    ids = torch.randint(8192, (2, 25))
    for depth in (1, 3, 7):
        assert abs(model(ids[:, :-1], ids[:, 1:], depth=depth).item() - math.log(8192)) < 0.01
    assert all(not block.attn.proj.weight.any() and not block.mlp.proj.weight.any() for block in model.blocks)
    assert not model.iter_embed.any() and (model.blocks[0].attn.q_gain == 5.25).all()


def test_one_loop_of_one_block_is_the_block():
    """Recurrence must add nothing of its own, and the block is the one that the spec writes out."""
    model, (ids, _) = tiny_model(num_unique_layers=1, num_recurrences=1, iteration_embeddings=False), tiny_batch()
    x0 = model.embed(ids)
    block = model.blocks[0]
    assert torch.equal(model.trunk(ids), rms_normalise(block(x0, x0, *model.rope(ids.size(1)))))
    w = {name: p.detach().double() for name, p in block.named_parameters()}
    x0 = reference_norm(model.tok_emb.weight.detach().double()[ids[0]])
    z = w["resid_mix"][0] * x0 + w["resid_mix"][1] * x0
    h = reference_norm(z)
    attended = reference_attention({f"block.{name}": p for name, p in w.items()}, "block.attn", h, model.config)
    mlp = (h @ w["mlp.fc.weight"].T).relu() ** 2 @ w["mlp.proj.weight"].T
    expected = reference_norm(z + w["attn_scale"] * attended + w["mlp_scale"] * mlp)
    torch.testing.assert_close(model.trunk(ids)[0].double(), expected, rtol=1e-4, atol=1e-4)


def test_depth_changes_the_answer_and_the_gradient_counts_every_loop():
    """A depth that is ignored would make every depth comparison a row of equal numbers."""
    model, (ids, targets) = tiny_model(), tiny_batch()
    losses = [model(ids, targets, depth=depth).item() for depth in (1, 2, 3, 4)]
    assert len(set(losses)) == 4
    assert model(ids, targets).item() == model(ids, targets, depth=0).item() == losses[2]
    model(ids, targets, depth=2).backward()
    assert model.iter_embed.grad[:2].abs().sum(1).min() > 0 and not model.iter_embed.grad[2].any()


@pytest.mark.parametrize("depth", [1, 3, 5])
def test_gradients_are_finite_differences(depth):
    """A loop that is cut off from the gradient, or counted twice, trains something else than what is evaluated."""
    model, (ids, _) = tiny_model().double(), tiny_batch(rows=1, length=9)
    model.compute_dtype = torch.float64
    generator = torch.Generator().manual_seed(2)
    probe = torch.randn(1, 9, 32, generator=generator, dtype=torch.float64)

    def value():
        return (model.trunk(ids, depth=depth) * probe).sum()

    value().backward()
    for name, p in model.named_parameters():
        direction, size = torch.randn(p.shape, generator=generator, dtype=torch.float64), 1e-6
        with torch.no_grad():
            p += size * direction
            above = value()
            p -= 2 * size * direction
            difference = (above - value()) / (2 * size)
            p += size * direction
        torch.testing.assert_close((p.grad * direction).sum(), difference, rtol=1e-5, atol=1e-5, msg=name)


def test_no_score_sees_the_future():
    """Looping must not let a position look past itself."""
    model, (ids, _) = tiny_model(), tiny_batch(length=40)
    before = model(ids)
    for position in (1, 17, 39):
        changed = ids.clone()
        changed[:, position:] = (changed[:, position:] + 1) % 61
        assert torch.equal(model(changed)[:, :position], before[:, :position])


@pytest.mark.parametrize("last", [1, 7, 24])
def test_last_positions_are_those_of_the_whole(last):
    """Only the very last block may skip positions: all loops before it need them all."""
    model, (ids, _) = tiny_model(), tiny_batch()
    torch.testing.assert_close(model(ids, last=last), model(ids)[:, -last:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("depth", [0, 2, 5])
@pytest.mark.parametrize("length, stride", [(16, 16), (48, 8)])
def test_window_scores_at_any_depth_are_those_of_whole_windows(depth, length, stride):
    """The table of depths must compare depths, not ways of scoring."""
    losses_of = partial(tiny_model(), reduction="none", depth=depth)
    stream = torch.randint(61, (110,), generator=torch.Generator().manual_seed(3))
    windows = scoring_windows(len(stream) - 1, length, stride)
    scores = torch.cat([nats for _, nats in window_losses(losses_of, stream, windows, length, batch_windows=5)])
    with torch.no_grad():
        expected = [
            losses_of(stream[None, w.start : w.end], stream[None, w.start + 1 : w.end + 1])[0, w.first - w.start :]
            for w in windows
        ]
    torch.testing.assert_close(scores, torch.cat(expected), rtol=1e-4, atol=1e-4)


def test_depth_is_drawn_from_seed_and_step_alone():
    """Processes that draw different depths would average gradients of different models."""
    draws = [depth_for_step(1337, step, (4, 6, 8)) for step in range(600)]
    assert draws == [depth_for_step(1337, step, (4, 6, 8)) for step in range(600)]
    assert draws != [depth_for_step(1338, step, (4, 6, 8)) for step in range(600)]
    assert all(150 < count < 250 for count in Counter(draws).values()) and set(draws) == {4, 6, 8}
