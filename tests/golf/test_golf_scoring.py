import json
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_golf_gpt import randomise

from golf.golf_gpt import GolfConfig, GolfGPT
from golf.golf_scoring import score_banded, score_stream, scoring_windows, share_of_windows, window_losses
from golf.recurrent_gpt import RecurrentConfig, RecurrentGPT
from helpers import run_ranks
from nanochat.runtime import UserError

pytestmark = pytest.mark.usefixtures("one_thread")

V = 61
SHAPE = dict(vocab_size=V, model_dim=32, num_heads=4, num_kv_heads=2, max_seq_len=64)


def golf_model():
    torch.manual_seed(0)
    return randomise(GolfGPT(GolfConfig(num_layers=3, **SHAPE)))


def recurrent_model():
    torch.manual_seed(0)
    return randomise(RecurrentGPT(RecurrentConfig(num_unique_layers=2, num_recurrences=2, **SHAPE)))


def tokens_of(n_targets: int, seed: int = 0, dtype=torch.uint16):
    return torch.randint(V, (n_targets + 1,), generator=torch.Generator().manual_seed(seed)).to(dtype)


def byte_tables():
    generator = torch.Generator().manual_seed(5)
    return (
        torch.randint(0, 9, (V,), generator=generator, dtype=torch.int16),
        torch.rand(V, generator=generator) < 0.5,
        torch.rand(V, generator=generator) < 0.2,
    )


def naive_losses(model, stream, L, S):
    """Golf spec 4.7 to the letter: one window per forward, whole logits, no padding. nats of each target, fp64."""
    N, C = len(stream) - 1, L - S
    stream = stream.long()
    starts, w = [0], S
    while w + C < N:
        starts.append(w)
        w += S
    nats, counts = torch.zeros(N, dtype=torch.float64), torch.zeros(N, dtype=torch.int64)
    with torch.no_grad():
        for w in starts:
            end = min(w + L, N)
            log_p = model(stream[None, w:end])[0].double().log_softmax(-1)
            for t in range(0 if w == 0 else w + C, end):
                nats[t] -= log_p[t - w, stream[t + 1]]
                counts[t] += 1
    assert (counts == 1).all() and len(starts) == 1 + math.ceil(max(N - L, 0) / S)
    return nats


def all_losses(model, stream, L, S, batch_windows):
    losses = torch.full((len(stream) - 1,), math.nan)
    windows = scoring_windows(len(stream) - 1, L, S)
    for targets, nats in window_losses(partial(model, reduction="none"), stream, windows, L, batch_windows):
        assert losses[targets.start : targets.stop].isnan().all() and len(targets) == len(nats)
        losses[targets.start : targets.stop] = nats
    return losses


@settings(max_examples=400, deadline=None)
@given(length=st.integers(1, 40), stride_part=st.floats(0, 1), n_targets=st.integers(1, 300), world=st.integers(1, 9))
def test_every_target_once(length, stride_part, n_targets, world):
    """A first window, a last one or a rank boundary that is lost or counted twice changes the score unseen."""
    stride = max(1, round(stride_part * length))
    windows = scoring_windows(n_targets, length, stride)
    assert len(windows) == 1 + math.ceil(max(n_targets - length, 0) / stride)
    shares = [share_of_windows(windows, rank, world) for rank in range(world)]
    assert [window for share in shares for window in share] == windows
    scored = [t for window in windows for t in range(window.first, window.end)]
    assert scored == list(range(n_targets))
    for i, window in enumerate(windows):
        assert 0 < window.end - window.start <= length and window.start == i * stride
        context = window.first - window.start
        assert context == (0 if i == 0 else length - stride)


CASES = [
    # N: below the stride, the stride, below the context, the context, around the length, whole strides, ragged
    (1, 16, 4), (3, 16, 4), (4, 16, 4), (11, 16, 4), (12, 16, 4), (15, 16, 4), (16, 16, 4), (17, 16, 4), (40, 16, 4),
    (43, 16, 4), (64, 16, 16), (70, 16, 16), (5, 16, 16), (70, 16, 1), (70, 16, 15), (33, 1, 1), (50, 64, 8),
]  # fmt: skip


@pytest.mark.parametrize("make", [golf_model, recurrent_model])
@pytest.mark.parametrize("batch_windows", [1, 3, 32])
def test_sliding_windows_are_the_naive_ones(make, batch_windows):
    """Batching, padding and the shortcut through the last block must give the same number for every target."""
    model = make()
    for N, L, S in CASES:
        stream = tokens_of(N, seed=N)
        losses = all_losses(model, stream, L, S, batch_windows)
        torch.testing.assert_close(losses.double(), naive_losses(model, stream, L, S), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.int32, torch.int64])
@pytest.mark.parametrize("L, S", [(16, 4), (16, None)])
def test_sums_are_those_of_the_targets(L, S, dtype):
    """The bytes of each target once, the space once, none after a boundary; the ratio of sums, not a mean of ratios."""
    model, stream, (base, space, boundary) = golf_model(), tokens_of(53, dtype=dtype), byte_tables()
    score = score_stream(partial(model, reduction="none"), stream, (base, space, boundary), L, S, batch_windows=4)
    nats, n_bytes = naive_losses(model, stream, L, S or L).sum().item(), 0
    ids = stream.tolist()
    for previous, current in zip(ids, ids[1:], strict=False):
        n_bytes += int(base[current]) + int(space[current] and not boundary[previous])
    assert score.sums.dtype == torch.float64 and score.sums[1:].tolist() == [53, n_bytes]
    assert score.val_loss == pytest.approx(nats / 53, rel=1e-5)
    assert score.val_bpb == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)


@pytest.mark.parametrize("N", [1, 5, 16, 53, 70, 203])
@pytest.mark.parametrize("batch_windows", [1, 32])
def test_a_band_is_exact_for_one_layer(N, batch_windows):
    """A single layer cannot look past its window: each target must get the score of the window that ends with it."""
    torch.manual_seed(0)
    model = randomise(GolfGPT(GolfConfig(num_layers=1, **SHAPE | {"max_seq_len": 16})))
    losses_of, stream = partial(model, reduction="none"), tokens_of(N)
    band = score_banded(losses_of, stream, byte_tables(), 16, 4, batch_windows)
    exact = score_stream(losses_of, stream, byte_tables(), 12, 1)
    assert torch.equal(band.sums[1:], exact.sums[1:])
    torch.testing.assert_close(band.sums[0], exact.sums[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("make", [golf_model, recurrent_model])
@pytest.mark.parametrize("L, S", [(16, 4), (16, 16), (16, 1)])
def test_changed_future_changes_no_earlier_score(make, L, S):
    """A window that sees its future scores well and proves nothing."""
    model, stream = make(), tokens_of(60)
    before = all_losses(model, stream, L, S, 8)
    for t in (0, 3, 15, 16, 30, 58):
        changed = stream.long()
        changed[t + 2 :] = (changed[t + 2 :] + 1 + torch.arange(len(changed) - t - 2) % 7) % V
        after = all_losses(model, changed, L, S, 8)
        assert torch.equal(after[: t + 1], before[: t + 1])
        assert not torch.allclose(after[t + 1 :], before[t + 1 :])


def test_shapes_are_static():
    """A compiled model that meets a new shape compiles again, in the middle of a timed evaluation."""
    shapes, model = set(), golf_model()

    def losses_of(inputs, targets, last):
        shapes.add((tuple(inputs.shape), last))
        return model(inputs, targets, reduction="none", last=last)

    windows = scoring_windows(203, 16, 4)
    assert len(windows) % 8 != 1
    list(window_losses(losses_of, tokens_of(203), windows, 16, batch_windows=8))
    assert shapes == {((1, 16), 16), ((8, 16), 4)}
    shapes.clear()
    list(window_losses(losses_of, tokens_of(203), scoring_windows(203, 16, 16), 16, batch_windows=8))
    assert shapes == {((8, 16), 16)}


@pytest.mark.parametrize("make", [golf_model, recurrent_model])
def test_training_goes_on_after_scoring(make):
    """Scores are taken between training steps: they must leave nothing behind that a backward pass cannot use."""
    model, stream = make(), tokens_of(40)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            score = score_stream(partial(model, reduction="none"), stream, byte_tables(), 16, 4)
        ids = stream.long()[None]
        model(ids[:, :-1], ids[:, 1:]).backward()
        assert torch.isfinite(score.sums).all() and all(p.grad is not None for p in model.parameters())


def test_training_between_two_batches():
    """Test-time training updates while scores are still to come: gradients must be on there, and off in the scoring."""
    model, modes = golf_model(), []

    def losses_of(inputs, targets, last):
        modes.append(torch.is_grad_enabled())
        return model(inputs, targets, reduction="none", last=last)

    ids, before = tokens_of(40).long()[None, :17], None
    for _, losses in window_losses(losses_of, tokens_of(40), scoring_windows(40, 16, 4), 16, batch_windows=2):
        modes.append(torch.is_grad_enabled())
        model(ids[:, :-1], ids[:, 1:]).backward()
        assert not losses.requires_grad and before != (before := model.tok_emb.weight.grad.sum().item())
    assert modes == [False, True] * 4


def test_unscorable_requests_are_named():
    """A stride beyond the window would skip targets, and an empty stream divide by zero."""
    with pytest.raises(UserError, match="stride 17 does not fit windows of 16"):
        scoring_windows(100, 16, 17)
    with pytest.raises(UserError, match="stride 0"):
        score_stream(None, tokens_of(100), byte_tables(), 16, stride=0)
    with pytest.raises(UserError, match="nothing to score"):
        score_stream(None, tokens_of(0), byte_tables(), 16)


SUMS = """
import json, sys, torch, torch.distributed as dist
from functools import partial
from golf.golf_gpt import GolfConfig, GolfGPT
from golf.golf_scoring import score_stream
torch.set_num_threads(1)
dist.init_process_group("gloo")
weights, cases = torch.load(sys.argv[1], weights_only=True)
shape = dict(vocab_size=61, model_dim=32, num_heads=4, num_kv_heads=2, max_seq_len=64)
model = GolfGPT(GolfConfig(num_layers=3, **shape))
model.load_state_dict(weights)
print(json.dumps([score_stream(partial(model, reduction="none"), *case).sums.tolist() for case in cases]))
dist.destroy_process_group()
"""


def test_any_number_of_processes_gives_the_same_sums(tmp_path):
    """Only the share of rank 0 was counted by the original; a rank without windows must take part all the same."""
    model = golf_model()
    cases = [(tokens_of(N), byte_tables(), 16, S, 4) for N, S in ((203, 4), (203, 16), (9, 4))]
    torch.save((dict(model.state_dict()), cases), tmp_path / "case.pt")
    alone = torch.stack([score_stream(partial(model, reduction="none"), *case).sums for case in cases])
    assert alone[:, 1].tolist() == [203, 203, 9]
    for world in (2, 4):
        ranks = [json.loads(out) for out in run_ranks(SUMS, tmp_path / "case.pt", world_size=world)]
        assert all(rank == ranks[0] for rank in ranks)
        torch.testing.assert_close(torch.tensor(ranks[0], dtype=torch.float64), alone, rtol=1e-6, atol=0)
