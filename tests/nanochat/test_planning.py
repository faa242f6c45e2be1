from dataclasses import replace

import pytest
import torch

from nanochat.planning import (
    PretrainSettings,
    estimate_minutes,
    lr_multiplier,
    muon_momentum,
    muon_weight_decay,
    plan_pretraining,
)
from nanochat.runtime import UserError

# Spec 14.1, column "notebook d12".
D12 = PretrainSettings(
    depth=12, aspect_ratio=64, head_dim=128, max_seq_len=2048, window_pattern="SSSL", num_iterations=-1,
    target_flops=-1.0, target_param_data_ratio=8.5, device_batch_size=16, total_batch_size=-1, embedding_lr=0.3,
    unembedding_lr=0.004, weight_decay=0.2, matrix_lr=0.02, scalar_lr=0.5, adam_beta1=0.8, adam_beta2=0.95,
    warmup_ratio=0.0, warmdown_ratio=0.5, final_lr_frac=0.0, eval_every=250, eval_tokens=40 * 524288, sample_every=-1,
    save_every=-1, model_tag="",
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def plan_of(**changes):
    return plan_pretraining(replace(D12, **changes), 32768)


def test_d12_is_the_published_run():
    """A plan that trains longer, shorter or in other batches than the run that it is compared with (spec 0.3)."""
    plan = plan_of()
    assert plan.parameters["total"] == 286_262_424
    assert plan.scaling_params == 110_101_632
    assert plan.flops_per_token == 802_167_552
    assert plan.total_batch_size == 524_288 and plan.gradient_accumulation == 16
    assert plan.iterations == 1_785 and plan.tokens == 935_854_080
    assert plan.tokens / plan.scaling_params == pytest.approx(8.4999, abs=1e-4)
    assert plan.flops_per_token * plan.tokens == pytest.approx(7.507118e17, rel=1e-6)
    assert plan.lr_scale == 1.0 and plan.weight_decay == pytest.approx(0.2)
    shape = plan.model_config
    assert (shape.sequence_len, shape.vocab_size, shape.n_layer, shape.n_embd) == (2048, 32768, 12, 768)
    assert (shape.n_head, shape.n_kv_head, shape.window_pattern) == (6, 6, "SSSL")


@pytest.mark.parametrize(
    "depth, ratio, parameters, flops, batch, iterations, lr_scale, weight_decay",
    [
        (20, 10.5, 896_535_720, 3.004189e9, 2**20, 4_357, 1.4142, 0.072),
        (26, 8.5, 1_681_790_292, 6.185320e9, 2**20, 7_444, 1.4142, 0.0426),
    ],
)
def test_larger_runs_are_the_published_ones(depth, ratio, parameters, flops, batch, iterations, lr_scale, weight_decay):
    """A scaling rule that is only right at the depth where it was tuned (spec 14.2)."""
    plan = plan_of(depth=depth, target_param_data_ratio=ratio)
    assert plan.parameters["total"] == parameters
    assert plan.flops_per_token == pytest.approx(flops, rel=5e-7)
    assert (plan.total_batch_size, plan.iterations) == (batch, iterations)
    assert plan.lr_scale == pytest.approx(lr_scale, abs=5e-5)
    assert plan.weight_decay == pytest.approx(weight_decay, abs=5e-5)


@pytest.mark.parametrize(
    "depths, power",
    [((8,), 18), ((10, 12, 14, 16), 19), ((18, 20, 22, 24, 26), 20), ((32, 36, 40, 44, 48, 50), 21)],
)
def test_the_batch_grows_with_the_horizon(depths, power):
    """A batch that stays small for large models, or a power of two that is rounded the wrong way."""
    for depth in depths:
        assert plan_of(depth=depth, target_param_data_ratio=10.5).total_batch_size == 2**power, depth


def test_width_is_rounded_up_to_whole_heads():
    """Heads of a width that the attention kernels do not know."""
    shape = plan_of(depth=5).model_config
    assert (shape.n_embd, shape.n_head, shape.n_kv_head) == (384, 3, 3)
    assert plan_of(depth=8).model_config.n_embd == 512


def test_the_first_horizon_that_is_given_decides():
    """A run for which someone asked 100 steps and which takes a day."""
    flops = 3.3 * 802_167_552 * 524_288
    assert plan_of(num_iterations=100, target_flops=flops).iterations == 100
    assert plan_of(target_flops=flops).iterations == 3
    assert plan_of(target_flops=3.6 * 802_167_552 * 524_288).iterations == 4, "rounded"
    assert plan_of(target_param_data_ratio=2.0).iterations == 220_203_264 // 2**19


def test_accumulation_is_shared_by_all_processes(monkeypatch):
    """Eight GPUs that train eight times the batch."""
    for name, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=8).items():
        monkeypatch.setenv(name, str(value))
    plan = plan_of()
    assert (plan.world_size, plan.gradient_accumulation, plan.iterations) == (8, 2, 1_785)


def test_a_batch_that_does_not_divide_names_its_neighbours():
    """An assertion that leaves the arithmetic to the reader."""
    with pytest.raises(UserError) as caught:
        plan_of(total_batch_size=500_000)
    sentence = str(caught.value)
    for part in ("total_batch_size 500000", "16 sequences", "2048 tokens", "1 process ", "32768", "491520, 524288"):
        assert part in sentence, part
    with pytest.raises(UserError, match="Nearest that work: 32768, 65536"):
        plan_of(total_batch_size=1000)


def test_a_batch_that_does_not_divide_over_the_processes_is_refused(monkeypatch):
    """Three GPUs that silently train a smaller batch."""
    for name, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=2).items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match="2 processes .*Nearest that work: 491520, 540672"):
        plan_of(device_batch_size=12)


def test_a_number_of_processes_that_cannot_share_the_tables_is_refused(monkeypatch):
    """Three GPUs that fail at the first optimizer step, after the data has been downloaded."""
    for name, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=3).items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match="32768 rows do not divide over 3 processes"):
        plan_of()


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(target_param_data_ratio=-1.0, total_batch_size=524_288), "num_iterations.*target_flops.*_ratio"),
        (dict(target_param_data_ratio=-1.0), "total_batch_size.*target_param_data_ratio"),
        (dict(depth=-3), "depth is -3"),
        (dict(depth=0), "depth is 0"),
        (dict(target_flops=1.0), "shorter than one step"),
        (dict(target_param_data_ratio=0.001, total_batch_size=524_288), "shorter than one step"),
        (dict(device_batch_size=0), "0 sequences"),
        (dict(window_pattern="SSX"), "letters S and L"),
    ],
)
def test_an_impossible_plan_is_one_clear_sentence(changes, sentence):
    """A traceback, or a run of zero steps, where a number in the parameter cell was wrong."""
    with pytest.raises(UserError, match=sentence):
        plan_of(**changes)


def test_the_learning_rate_of_d12_at_its_corners():
    """A plateau that ends one step early, a warm-down that ends above zero (spec 14.3 and 0.3)."""
    plan = plan_of()
    corner = 1_785 - 892
    assert [lr_multiplier(plan, step) for step in (0, 1, 500, corner - 1, corner)] == [1.0] * 5
    assert lr_multiplier(plan, corner + 1) == pytest.approx(891 / 892)
    assert lr_multiplier(plan, 1_700) == pytest.approx(0.09529, abs=5e-6)
    assert lr_multiplier(plan, 1_784) == pytest.approx(1 / 892)
    assert lr_multiplier(plan, 1_785) == 0.0


def test_warm_up_and_a_final_rate_above_zero():
    """A first step with rate zero, which trains nothing; a last rate that ignores its setting."""
    plan = plan_of(num_iterations=100, warmup_ratio=0.1, warmdown_ratio=0.2, final_lr_frac=0.05)
    assert [lr_multiplier(plan, step) for step in (0, 4, 9, 10, 80)] == pytest.approx([0.1, 0.5, 1.0, 1.0, 1.0])
    assert lr_multiplier(plan, 90) == pytest.approx(0.5 + 0.5 * 0.05)
    assert lr_multiplier(plan, 100) == pytest.approx(0.05)
    flat = plan_of(num_iterations=100, warmdown_ratio=0.0)
    assert lr_multiplier(flat, 99) == lr_multiplier(flat, 100) == 1.0, "no warm-down, no division by zero"


def test_momentum_and_weight_decay_of_muon():
    """A momentum that is at its end from the first step; a decay that does not fade (spec 14.3)."""
    assert [muon_momentum(step) for step in (0, 150, 300, 5000)] == pytest.approx([0.85, 0.90, 0.95, 0.95])
    plan = plan_of(num_iterations=200)
    assert [muon_weight_decay(plan, step) for step in (0, 50, 200)] == pytest.approx([0.2, 0.15, 0.0])


def test_the_plan_costs_no_memory():
    """A plan for a large model that needs the large model's memory."""
    assert plan_of(depth=50, device_batch_size=1).parameters["total"] > 5e9


def test_minutes_are_estimated_from_the_device(monkeypatch):
    """An estimate for another machine than this one, or a number where there is no telling."""
    plan = plan_of()
    monkeypatch.setattr("nanochat.planning.device_name_of", lambda device: "NVIDIA A100-SXM4-40GB")
    minutes = estimate_minutes(plan, torch.device("cuda"), torch.bfloat16)
    assert 70 < minutes < 110, "the published run took 77"
    monkeypatch.setattr("nanochat.planning.device_name_of", lambda device: "Some GPU of the future")
    assert estimate_minutes(plan, torch.device("cuda"), torch.bfloat16) is None
    assert estimate_minutes(plan, torch.device("cpu"), torch.float32) > 0


def test_checkpoints_go_to_the_folder_of_the_tag(monkeypatch, tmp_path):
    """Two runs that overwrite each other because a tag was ignored."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    assert D12.checkpoint_dir == str(tmp_path / "base_checkpoints" / "d12")
    assert replace(D12, model_tag="mine").checkpoint_dir == str(tmp_path / "base_checkpoints" / "mine")
