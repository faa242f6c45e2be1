import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from golf.golf_gpt import role_of
from golf.gptq import (
    HessianSums,
    StorageRule,
    gptq_codes,
    inverse_hessian_factor,
    largest_code,
    nearest_codes,
    output_errors,
    quantize_state,
    sdclip_scales,
    storage_rules,
)
from helpers import run_ranks
from nanochat.runtime import UserError

CONTROL = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "iter_embed")


def correlated_inputs(tokens: int, columns: int, seed: int = 0, rank: int = 8) -> torch.Tensor:
    """Inputs like a residual stream's: a few common directions, and noise of different strength per channel."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(tokens, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
    noise = torch.randn(tokens, columns, generator=generator) * torch.rand(columns, generator=generator)
    return common + noise


def gaussian_weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + 100)) * 0.02


def total_error(weight, codes, scales, hessian) -> float:
    return float(output_errors(weight, codes, scales, hessian).sum())


def test_error_feedback_halves_the_error_on_correlated_inputs():
    """Error feedback that does nothing: codes that are plain rounding under another name."""
    inputs, weight = correlated_inputs(2048, 192), gaussian_weight(64, 192)
    hessian, scales = inputs.T @ inputs, sdclip_scales(weight, 12.85, 6)
    nearest, codes = nearest_codes(weight, scales, 6), gptq_codes(weight, hessian, scales, 6)
    gptq_error, nearest_error = (total_error(weight, each, scales, hessian) for each in (codes, nearest))
    assert gptq_error < 0.5 * nearest_error
    # the measure is what it claims to be: the squared change of the outputs
    outputs = inputs.double() @ (weight.double() - codes.double() * scales.double()[:, None]).T
    assert gptq_error == pytest.approx(float(outputs.square().sum()), rel=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 12),
    columns=st.integers(1, 40),
    tokens=st.integers(1, 60),
    rank=st.integers(1, 12),
    bits=st.integers(2, 8),
    sigmas=st.floats(0.3, 30),
    dead=st.integers(0, 5),
    block=st.sampled_from([1, 7, 128]),
)
def test_never_worse_than_plain_rounding(seed, rows, columns, tokens, rank, bits, sigmas, dead, block):
    """A matrix that GPTQ makes worse: heavy clipping, fewer tokens than inputs, dead inputs, zero rows."""
    inputs, weight = correlated_inputs(tokens, columns, seed, rank), gaussian_weight(rows, columns, seed)
    inputs[:, :dead] = 0
    weight[0] *= seed % 2
    hessian, scales = inputs.T @ inputs, sdclip_scales(weight, sigmas, bits)
    codes = gptq_codes(weight, hessian, scales, bits, block)
    nearest = nearest_codes(weight, scales, bits)
    assert codes.dtype == torch.int8 and codes.shape == weight.shape
    assert codes.abs().max() <= largest_code(bits)
    assert not codes[:, :dead].any()
    limit = output_errors(weight, nearest, scales, hessian)
    assert (output_errors(weight, codes, scales, hessian) <= limit * (1 + 1e-9) + 1e-12).all()


def greedy_reference(weight, hessian, scales, damp):
    """The same by definition, one column at a time: after each, the remaining weights are solved for exactly.

    With the first columns fixed, the best change of the rest is −e·Hinv[j, j+1:]/Hinv[j, j], Hinv the inverse Hessian
    of the columns not yet fixed, computed anew each time.
    """
    weight, hessian, step = weight.double().clone(), hessian.double(), scales.double()
    order = hessian.diagonal().argsort(descending=True, stable=True)
    hessian = hessian[order][:, order] + damp * hessian.diagonal().mean() * torch.eye(len(hessian)).double()
    rest, codes = weight[:, order], torch.zeros_like(weight)
    for j in range(len(hessian)):
        inverse = torch.linalg.inv(hessian[j:, j:])
        codes[:, j] = (rest[:, j] / step).round()
        error = rest[:, j] - codes[:, j] * step
        rest[:, j:] -= error[:, None] * inverse[0] / inverse[0, 0]
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    return codes[:, back].to(torch.int8)


@pytest.mark.parametrize("block", [5, 16, 128])
def test_codes_are_those_of_the_definition(block):
    """A factor transposed, a permutation not undone, or an error that is lost at the border of a block."""
    inputs, weight = correlated_inputs(400, 48, seed=3), gaussian_weight(24, 48, seed=3)
    hessian, scales = inputs.T @ inputs, sdclip_scales(weight, 12.85, 6)
    reference = greedy_reference(weight, hessian, scales, 0.01)
    codes = gptq_codes(weight, hessian, scales, 6, block)
    kept = output_errors(weight, reference, scales, hessian) <= output_errors(
        weight, nearest_codes(weight, scales, 6), scales, hessian
    )
    assert kept.float().mean() > 0.9
    assert torch.equal(codes[kept], reference[kept])


def test_independent_inputs_leave_plain_rounding():
    """A permutation that is not undone: without correlations there is nothing to feed back."""
    weight, hessian = gaussian_weight(8, 33), torch.rand(33, generator=torch.Generator().manual_seed(0)).diag()
    scales = sdclip_scales(weight, 4.0, 6)
    assert torch.equal(gptq_codes(weight, hessian, scales, 6), nearest_codes(weight, scales, 6))


def test_input_that_never_fires_costs_nothing():
    """A division by zero for a dead input, or codes stored for weights that do nothing."""
    inputs, weight = correlated_inputs(300, 20), gaussian_weight(6, 20)
    inputs[:, [0, 7, 19]] = 0
    scales = sdclip_scales(weight, 12.85, 6)
    codes = gptq_codes(weight, inputs.T @ inputs, scales, 6)
    assert not codes[:, [0, 7, 19]].any() and codes[:, 1].any()
    assert not gptq_codes(weight, torch.zeros(20, 20), scales, 6).any()


def test_hessian_without_inverse_falls_back_with_a_warning():
    """A run that dies after training because a matrix has no Cholesky factor, or goes on with garbage in silence."""
    weight = gaussian_weight(4, 6)
    scales = sdclip_scales(weight, 4.0, 6)
    for hessian in (torch.eye(6) * torch.tensor([1.0, 1, 1, 1, 1, -1e7]), torch.full((6, 6), math.nan)):
        with pytest.warns(RuntimeWarning, match="could not be inverted"):
            codes = gptq_codes(weight, hessian, scales, 6)
        assert torch.equal(codes, nearest_codes(weight, scales, 6))


def test_damping_grows_until_it_helps():
    """The first failure taken for the last one, or damping that stays after it helped."""
    basis, _ = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0)).double())
    for lowest, damp in ((0.5, 0.01), (-0.05, 0.1), (-0.5, 1.0)):
        spectrum = torch.ones(12).double()
        spectrum[0] = lowest
        hessian = basis @ spectrum.diag() @ basis.T
        factor = inverse_hessian_factor(hessian, 0.01)
        damped = hessian + damp * hessian.diagonal().mean() * torch.eye(12).double()
        assert torch.equal(factor, factor.triu())
        assert torch.allclose(factor.T @ factor @ damped, torch.eye(12).double(), atol=1e-8)


def test_scales_are_the_stored_ones():
    """A scale that becomes 0 or inf in fp16, and codes divided by another number than the stored one."""
    weight = torch.stack([torch.zeros(64), torch.full((64,), 1e-9), torch.full((64,), 0.5), torch.full((64,), 1e6)])
    scales = sdclip_scales(weight, 12.85, 6)
    assert scales.dtype == torch.float16
    assert scales.tolist()[:2] == [1.0, torch.finfo(torch.float16).tiny]
    assert float(scales[2]) == pytest.approx(12.85 * 0.5 / 31, rel=1e-3)
    assert torch.isfinite(scales).all()
    assert not nearest_codes(weight[:1], scales[:1], 6).any()
    assert float(sdclip_scales(torch.tensor([[3.0, 1.0, 3.0, 1.0]]), 2.0, 2)) == pytest.approx(2 * 5**0.5, rel=1e-3)


@pytest.mark.parametrize("bits", [2, 4, 6, 7, 8])
def test_unclipped_weights_move_by_half_a_step(bits):
    """Codes that are cut instead of rounded, or a range that is one short."""
    weight = gaussian_weight(16, 256)
    scales = sdclip_scales(weight, 3.0, bits)
    codes = nearest_codes(weight, scales, bits)
    error = (weight.double() - codes.double() * scales.double()[:, None]).abs()
    inside = weight.double().abs() <= (largest_code(bits) + 0.5) * scales.double()[:, None]
    assert (error <= scales.double()[:, None] / 2 + 1e-12)[inside].all()
    assert codes.max() == largest_code(bits) and codes.min() == -largest_code(bits)


class Looped(torch.nn.Module):
    """One linear layer that runs three times, and two that read the same input."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.loop, self.query, self.key = (torch.nn.Linear(6, size, bias=False) for size in (6, 4, 2))
        self.seen = []

    def forward(self, x):
        for _ in range(3):
            self.seen.append(x.detach())
            x = torch.tanh(self.loop(x))
        return self.query(x), self.key(x), x


def test_sums_cover_all_tokens_and_all_loops():
    """A Hessian of the last loop or the last batch alone."""
    model, sums = Looped(), HessianSums()
    sums.watch({"loop": model.loop, "query": model.query})
    sums.share("query", ["key"])
    outputs = []
    for seed in range(2):
        outputs.append(model(torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(seed)))[2].detach())
        sums.add("head", outputs[-1])
    sums.finish()
    model(torch.ones(1, 1, 6))  # no longer watched
    seen = torch.cat(model.seen[:6]).reshape(-1, 6)
    last = torch.cat(outputs).reshape(-1, 6)
    assert sums.tokens == {"loop": 60, "query": 20, "head": 20}
    assert torch.allclose(sums["loop"], seen.T @ seen, atol=1e-5)
    assert torch.allclose(sums["head"], last.T @ last, atol=1e-5)
    assert sums["key"] is sums["query"] and "key" in sums and "value" not in sums


def test_unusable_calibration_is_refused():
    """Plain rounding sold as GPTQ because the hooks sat on a model that never ran."""
    model, sums = Looped(), HessianSums()
    sums.watch({"loop": model.loop, "key": model.key})
    model.loop(torch.ones(1, 6))
    with pytest.raises(UserError, match="reached key"):
        sums.finish()
    sums = HessianSums()
    sums.add("loop", torch.full((2, 6), math.inf))
    with pytest.raises(UserError, match="loop are not finite"):
        sums.finish()


def test_ranks_add_up_to_one_process():
    """A Hessian of one rank's tokens, or ranks that hang because they add in different orders."""
    program = """
import contextlib, io, torch
from golf.gptq import HessianSums
from nanochat.runtime import compute_cleanup, compute_init, get_dist_info
with contextlib.redirect_stdout(io.StringIO()):
    compute_init("cpu")
rank = get_dist_info()[1]
sums, names = HessianSums(), ["a", "b"]
for name in names if rank == 0 else reversed(names):
    sums.add(name, torch.arange(12.).reshape(4, 3)[2 * rank : 2 * rank + 2] + (name == "b"))
sums.finish()
print(sums["a"].flatten().tolist(), sums["b"].sum().item(), sums.tokens["a"])
compute_cleanup()
"""
    whole = torch.arange(12.0).reshape(4, 3)
    expected = f"{(whole.T @ whole).flatten().tolist()} {((whole + 1).T @ (whole + 1)).sum().item()} 4"
    assert run_ranks(program) == [expected, expected]


def small_state() -> dict[str, torch.Tensor]:
    return {
        "tok_emb.weight": gaussian_weight(128, 32).bfloat16(),
        "blocks.0.attn.c_q.weight": gaussian_weight(32, 32, 1),
        "blocks.0.mlp.fc.weight": gaussian_weight(64, 32, 2),
        "blocks.0.attn_scale": torch.rand(32),
        "blocks.0.huge": torch.tensor([1e6, 1.0]),
        "blocks.0.bias": torch.rand(5),
        "steps": torch.arange(3),
    }


def test_every_tensor_gets_its_rule():
    """The embedding rounded to 6 bits, a control tensor rounded at all, or a number that overflows fp16."""
    state = small_state()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    rules = storage_rules(shapes, CONTROL, ("tok_emb",), keep_numel=1000)
    stored, table = quantize_state(state, rules)
    assert {name: tensor.bits for name, tensor in stored.items()} == {
        "tok_emb.weight": 8, "blocks.0.attn.c_q.weight": 6, "blocks.0.mlp.fc.weight": 6, "blocks.0.attn_scale": 32,
        "blocks.0.huge": 32, "blocks.0.bias": 16, "steps": 64,
    }  # fmt: skip
    assert table == [] and list(stored) == list(state)
    for name, tensor in stored.items():
        restored = tensor.restored()
        assert restored.dtype == state[name].dtype and restored.shape == state[name].shape
        if tensor.scales is None and tensor.bits != 16:
            assert torch.equal(restored, state[name])
        else:
            assert (restored.double() - state[name].double()).norm() < 0.2 * state[name].double().norm()
    default = storage_rules(shapes, CONTROL, ("tok_emb",))
    assert default["tok_emb.weight"].bits == 16  # 4,096 elements are not worth rounding
    for rule in (StorageRule(9, 4.0), StorageRule(1, 4.0), StorageRule(6, 0.0), StorageRule(6, math.nan)):
        with pytest.raises(UserError, match="2 to 8 bits"):
            storage_rules(shapes, CONTROL, ("tok_emb",), matrix=rule)
    with pytest.raises(UserError, match="tok_emb.weight .*not finite"):
        quantize_state({"tok_emb.weight": torch.full((2, 2), math.nan)}, rules)


def test_table_puts_plain_rounding_beside_gptq():
    """A comparison at different scales, or one that shows a matrix that had no Hessian."""
    state, sums = small_state(), HessianSums()
    inputs = correlated_inputs(500, 32)
    sums.add("blocks.0.attn.c_q.weight", inputs)
    sums.share("blocks.0.attn.c_q.weight", ["blocks.0.mlp.fc.weight"])
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    rules = storage_rules(shapes, CONTROL, ("tok_emb",), keep_numel=1000)
    stored, table = quantize_state(state, rules, sums)
    plain, _ = quantize_state(state, rules)
    assert [row["name"] for row in table] == ["blocks.0.attn.c_q.weight", "blocks.0.mlp.fc.weight"]
    for row in table:
        name, outputs = row["name"], inputs.double() @ state[row["name"]].double().T
        assert torch.equal(stored[name].scales, plain[name].scales)
        for key, tensors in (("nearest", plain), ("gptq", stored)):
            change = outputs - inputs.double() @ tensors[name].restored().double().T
            assert row[key] == pytest.approx(float((change.norm() / outputs.norm()) ** 2), rel=1e-3)
        assert row["gptq"] < row["nearest"]
    assert torch.equal(stored["tok_emb.weight"].values, plain["tok_emb.weight"].values)
    with pytest.raises(ValueError, match="32 columns"):
        gptq_codes(state["tok_emb.weight"], torch.eye(31), plain["tok_emb.weight"].scales, 8)


def test_layers_of_one_role_have_one_name():
    """Roles that mix different matrices, or that keep every layer apart."""
    assert role_of("blocks.13.attn.c_q.weight") == "blocks.*.attn.c_q.weight"
    assert role_of("blocks.2.mlp.fc2.weight") == "blocks.*.mlp.fc2.weight"
    assert role_of("tok_emb.weight") == "tok_emb.weight" and role_of("w.3") == "w.*"
