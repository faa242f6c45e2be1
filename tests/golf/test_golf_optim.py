import copy
import json

import pytest
import torch

from golf.golf_gpt import GolfConfig, GolfGPT, parameter_roles
from golf.golf_optim import GolfOptimizer, WeightEMA, ema_decay_for, newton_schulz, setup_golf_optimizer
from golf.recurrent_gpt import RecurrentConfig, RecurrentGPT
from helpers import run_ranks
from nanochat.runtime import UserError

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = dict(vocab_size=61, model_dim=32, num_heads=4, num_kv_heads=2, max_seq_len=48)


def reference_newton_schulz(X, steps):  # golf spec 2.3, one float64 matrix
    a, b, c = 3.4445, -4.7750, 2.0315
    X = X / (X.norm() + 1e-7)
    transposed = X.size(0) > X.size(1)
    X = X.T if transposed else X
    for _ in range(steps):
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X.T if transposed else X


def reference_muon(W, G, B, momentum, lr, weight_decay=0.0, equalise_rows=False, steps=5):  # 2.3 and 4.4
    B = momentum * B + G
    G = G + momentum * B
    if equalise_rows:
        G = torch.stack([row / max(row.norm().item(), 1e-7) for row in G])
    step = reference_newton_schulz(G, steps) * max(1, W.size(0) / W.size(1)) ** 0.5
    return (1 - lr * weight_decay) * W - lr * step, B


def reference_adam(W, G, m, v, t, lr, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8):
    m, v = betas[0] * m + (1 - betas[0]) * G, betas[1] * v + (1 - betas[1]) * G**2
    step = lr * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
    return (1 - lr * weight_decay) * W - step, m, v


def fill_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator) * 0.01


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (32, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_newton_schulz_singular_values(shape, dtype):
    """Coefficients with a digit wrong leave the singular values spread out, or let them explode."""
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    out = newton_schulz(x, 5, dtype)
    singular = torch.linalg.svdvals(out.float())
    assert out.dtype == dtype and 0.6 < singular.min() and singular.max() < 1.25
    if dtype == torch.float32:
        expected = torch.stack([reference_newton_schulz(each.double(), 5) for each in x])
        torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


def test_newton_schulz_of_nothing():
    """Matrices behind a projection that starts at zero have no gradient in the first step: not a nan, but a zero."""
    assert not newton_schulz(torch.zeros(2, 4, 8)).any()


def golf_model():
    torch.manual_seed(0)
    return GolfGPT(GolfConfig(num_layers=3, **SHAPE))


def recurrent_model():
    torch.manual_seed(0)
    return RecurrentGPT(RecurrentConfig(num_unique_layers=2, num_recurrences=2, **SHAPE))


SYSTEM_B = dict(equalise_rows=True, muon_weight_decay=0.09, embed_wd=0.085, adam_wd=0.02)


@pytest.mark.parametrize("make, options", [(golf_model, {}), (recurrent_model, SYSTEM_B)])
def test_updates_are_the_spec(make, options):
    """A wrong order, scale, decay or group trains, only worse, and no loss curve would say why."""
    model = make()
    optimizer = setup_golf_optimizer(model, compute_dtype=torch.float32, **options)
    names = {name: role for role, members in parameter_roles(model).items() for name in members}
    lrs = {"token": 0.05, "matrix": 0.04, "scalar": 0.04}
    decays = {"token": options.get("embed_wd", 0), "scalar": options.get("adam_wd", 0)}
    W = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    first, second = ({name: torch.zeros_like(w) for name, w in W.items()} for _ in range(2))
    for t, (multiplier, momentum) in enumerate([(1.0, 0.85), (0.5, 0.9), (0.25, 0.95)], start=1):
        fill_gradients(model, t)
        gradients = {name: p.grad.double() for name, p in model.named_parameters()}
        optimizer.set_schedule(multiplier, momentum)
        optimizer.step()
        for name, role in names.items():
            lr, G = lrs[role] * multiplier, gradients[name]
            if role == "matrix":
                decay, rows = options.get("muon_weight_decay", 0.0), options.get("equalise_rows", False)
                W[name], first[name] = reference_muon(W[name], G, first[name], momentum, lr, decay, rows)
            else:
                W[name], first[name], second[name] = reference_adam(
                    W[name], G, first[name], second[name], t, lr, decays[role]
                )
    for name, p in model.named_parameters():
        torch.testing.assert_close(
            p.detach().double(), W[name], rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_untied_head_has_its_own_rates():
    """The untied embedding is trained at 0.6 and its head at 0.008; the tied rate would stall one, wreck the other."""
    model = GolfGPT(GolfConfig(num_layers=2, tie_embeddings=False, **SHAPE))
    optimizer = setup_golf_optimizer(model)
    lr_of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert lr_of[id(model.tok_emb.weight)] == 0.6 and lr_of[id(model.lm_head.weight)] == 0.008
    assert len(lr_of) == len(list(model.parameters()))


def test_bf16_products_stay_close():
    """Newton–Schulz in bf16 may cost digits of the step and none of the weight."""
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        model = golf_model()
        optimizer = setup_golf_optimizer(model, compute_dtype=dtype)
        fill_gradients(model, 1)
        optimizer.step()
        results.append(parameter_roles(model)["matrix"])
    for name, p in results[0].items():
        assert p.dtype == results[1][name].dtype == torch.float32
        assert (p - results[1][name]).norm() < 0.05 * 0.04 * min(p.shape) ** 0.5 * max(1, p.size(0) / p.size(1)) ** 0.5


UPDATES = """
import hashlib, torch, torch.distributed as dist
from golf.golf_gpt import GolfConfig, GolfGPT
from golf.golf_optim import reduce_gradients, setup_golf_optimizer

def updates(rank, world, dtype):
    torch.manual_seed(0)
    model = GolfGPT(GolfConfig(vocab_size=61, model_dim=32, num_heads=4, num_kv_heads=2, max_seq_len=48, num_layers=3))
    optimizer = setup_golf_optimizer(model, muon_weight_decay=0.1, equalise_rows=True, compute_dtype=dtype)
    ids = torch.randint(61, (8, 17), generator=torch.Generator().manual_seed(1))
    losses = []
    for step in range(4):
        optimizer.zero_grad()
        mine = ids.roll(step, 0)[rank * 8 // world : (rank + 1) * 8 // world]
        loss = model(mine[:, :-1], mine[:, 1:])
        loss.backward()
        reduce_gradients(model.parameters(), 1 / world)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
        shared = loss.detach() / world
        if world > 1:
            dist.all_reduce(shared)
        losses.append([shared.item(), norm.item()])
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return losses, hashlib.sha256(weights.numpy().tobytes()).hexdigest(), weights[::7].tolist()
"""
UPDATES_OF_RANK = """
import json
torch.set_num_threads(1)
dist.init_process_group("gloo")
dtypes = (torch.float32, torch.bfloat16)
print(json.dumps([updates(dist.get_rank(), dist.get_world_size(), dtype) for dtype in dtypes]))
dist.destroy_process_group()
"""


def test_any_number_of_processes_gives_the_same_updates():
    """Ranks that disagree in one bit drift apart for good; matrices forgotten by the division are never trained."""
    alone = {}
    exec(UPDATES, alone)
    results = {world: run_ranks(UPDATES + UPDATES_OF_RANK, world_size=world) for world in (2, 4)}
    for i, (dtype, tolerance) in enumerate([(torch.float32, 2e-4), (torch.bfloat16, 2e-2)]):
        losses, _, weights = (torch.tensor(x) if isinstance(x, list) else x for x in alone["updates"](0, 1, dtype))
        for ranks in results.values():
            ranks = [json.loads(out)[i] for out in ranks]
            assert len({digest for _, digest, _ in ranks}) == 1
            torch.testing.assert_close(torch.tensor(ranks[0][0]), losses, rtol=tolerance, atol=1e-4)
            assert (torch.tensor(ranks[0][2]) - weights).abs().mean() < tolerance * 0.1


ABSENT = """
import torch, torch.distributed as dist
from golf.golf_optim import reduce_gradients
dist.init_process_group("gloo")
rank = dist.get_rank()
a, b = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2, 2))
if rank == 1:
    a.grad, b.grad = torch.arange(3.0), torch.full((2, 2), 5.0)
reduce_gradients([a, b], 0.5)
print(a.grad.tolist(), b.grad.tolist())
dist.destroy_process_group()
"""


def test_a_process_without_gradients_counts_as_zero():
    """At the end of a text one rank may have nothing to train on; it must neither hang the others nor change them."""
    assert run_ranks(ABSENT) == ["[0.0, 0.5, 1.0] [[2.5, 2.5], [2.5, 2.5]]"] * 2


def test_state_survives_a_round_trip():
    """Warm-up is undone through the state dict: a momentum that stays behind would start the run from elsewhere."""
    results = []
    for restored in (False, True):
        model = golf_model()
        optimizer = setup_golf_optimizer(model, compute_dtype=torch.float32)
        fill_gradients(model, 1)
        optimizer.step()
        if restored:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = setup_golf_optimizer(model, compute_dtype=torch.float32)
            optimizer.load_state_dict(state)
        fill_gradients(model, 2)
        optimizer.step()
        results.append(model.state_dict())
    assert all(torch.equal(w, results[1][name]) for name, w in results[0].items())


def test_mixed_shapes_are_refused():
    """Matrices are stacked; two shapes in a group would fail inside torch.stack."""
    params = [torch.nn.Parameter(torch.zeros(2, n)) for n in (2, 3)]
    with pytest.raises(ValueError, match="one shape"):
        GolfOptimizer([dict(kind="muon", params=params, lr=0.1)])


# --- the average ------------------------------------------------------------------------------------------------------


def test_ema_is_the_spec():
    """The original averaged from the random start and exported that: 63 % of nothing."""
    model = golf_model()
    ema = WeightEMA(model, decay=0.9, start_fraction=0.4)
    generator = torch.Generator().manual_seed(0)
    shadow, decay = None, None
    for step in range(1, 201):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=generator) * 0.01)
        weights = {name: w.double().clone() for name, w in model.state_dict().items()}
        ema.update(step, step / 200)
        if step == 80:  # the first with progress 0.4; 120 steps are left
            shadow, decay = weights, min(0.9, 1 - 10 / 120)
        elif step > 80:
            shadow = {name: decay * s + (1 - decay) * weights[name] for name, s in shadow.items()}
        assert ema.started == (step >= 80)
    assert ema.decay == pytest.approx(decay)
    ema.copy_to_model()
    for name, w in model.state_dict().items():
        torch.testing.assert_close(w.double(), shadow[name], rtol=1e-5, atol=1e-6)
        assert not torch.equal(w.double(), weights[name])


def test_ema_goes_on_from_its_state():
    """A resumed run whose average begins anew, with another decay, or goes on in the checkpoint's own tensors."""
    model = golf_model()
    whole, first = (WeightEMA(model, decay=0.9, start_fraction=0.25) for _ in range(2))
    assert first.state_dict() == {"decay": None, "shadow": {}}
    resumed = WeightEMA(model, decay=0.5, start_fraction=0.25)
    resumed.load_state_dict(first.state_dict())
    assert not resumed.started
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 101):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=generator))
        whole.update(step, step / 100)
        if step <= 40:
            first.update(step, step / 100)
        if step == 40:
            resumed.load_state_dict(copy.deepcopy(first.state_dict()))
        if step > 40:
            resumed.update(step, step / 100)
    assert resumed.started and resumed.decay == whole.decay == pytest.approx(1 - 10 / 75)
    assert resumed.shadow.keys() == model.state_dict().keys()
    assert all(torch.equal(w, whole.shadow[name]) for name, w in resumed.shadow.items())


def test_an_average_comes_to_its_model():
    """Shares of several processes are read on the CPU: on a GPU the next update would meet tensors of two devices."""
    model = golf_model()
    ema = WeightEMA(model, start_fraction=0.0)
    ema.update(1, 0.5)
    state = copy.deepcopy(ema.state_dict())
    elsewhere = WeightEMA(golf_model().to("meta"), start_fraction=0.0)
    elsewhere.load_state_dict(state)
    assert {tensor.device.type for tensor in elsewhere.shadow.values()} == {"meta"}
    elsewhere.update(2, 0.6)


def test_control_patterns_choose_the_optimizer():
    """CONTROL_TENSOR_NAME_PATTERNS printed and ignored: Muon orthogonalises a matrix that steers others."""
    model = golf_model()
    members = {}
    for patterns in (("resid_mix", "skip_weight"), ("resid_mix", "skip_weight", "c_k")):
        optimizer = setup_golf_optimizer(model, control_patterns=patterns, compute_dtype=torch.float32)
        muon = {id(p) for group in optimizer.param_groups if group["kind"] == "muon" for p in group["params"]}
        members[patterns] = {name for name, p in model.named_parameters() if id(p) in muon}
        everything = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert sorted(everything) == sorted(map(id, model.parameters()))
    without, with_keys = members.values()
    assert {name for name in without - with_keys} == {name for name in without if "c_k" in name} != set()
    assert with_keys < without


def test_ema_is_fp32_beside_bf16_weights():
    """In bf16 a step of 0.001 of the distance is less than the last bit, and the average stands still."""
    model = torch.nn.Linear(4, 4, bias=False).bfloat16()
    with torch.no_grad():
        model.weight.fill_(1.0)
    ema = WeightEMA(model, decay=0.999, start_fraction=0.0)
    ema.update(1, 1e-6)
    with torch.no_grad():
        model.weight.fill_(2.0)
    for step in range(1000):
        ema.update(step + 2, 0.5)
    assert ema.shadow["weight"].dtype == torch.float32
    assert ema.shadow["weight"].mean().item() == pytest.approx(2 - 0.999**1000, abs=1e-3)
    ema.copy_to_model()
    assert model.weight.dtype == torch.bfloat16 and model.weight.mean().item() == pytest.approx(1.632, abs=0.01)


@pytest.mark.parametrize(
    "steps_done, progress, expected",
    [
        (4000, 0.4, 0.997),
        (400, 0.4, 1 - 10 / 600),
        (2000, 2 / 3, 0.99),
        (4, 0.4, 0.0),
        (10, 1.0, 0.0),
        (1, 1e-9, 0.997),
    ],
)
def test_ema_decay_follows_the_steps_left(steps_done, progress, expected):
    """A decay for 3,333 steps in a run of 100 exports mostly its beginning."""
    assert ema_decay_for(0.997, steps_done, progress) == pytest.approx(expected)


def test_ema_that_never_began():
    """A run that the clock stopped early must not export weights from nowhere."""
    ema = WeightEMA(golf_model(), start_fraction=0.5)
    ema.update(1, 0.2)
    with pytest.raises(UserError, match="ended before the weight average began, at 50%"):
        ema.copy_to_model()
    with pytest.raises(UserError, match="EMA decay"):
        WeightEMA(golf_model(), decay=1.0)
