import ast
import math

import pytest
import torch

from helpers import REPOSITORY
from nanochat.planning import PretrainSettings, plan_pretraining
from nanochat.runtime import UserError
from nanochat.settings import (
    CHAT_TASK_NAMES,
    PARAMETER_TYPES,
    PRESETS,
    chosen_chat_tasks,
    resolve_parameters,
    skipped_stages,
)


def parameter_cell() -> str:
    """The text of the cell that papermill and Colab's forms write to."""
    source = (REPOSITORY / "nb_src" / "nanochat_speedrun.py").read_text(encoding="utf-8")
    return source.split('# %% tags=["parameters"]\n')[1].split("\n# %%")[0]


CELL = {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(parameter_cell()).body}


def resolved(*arguments, **changes):
    return resolve_parameters(CELL | dict(preset="a100") | changes, list(arguments))


def plan_of(params):
    names = PretrainSettings.__dataclass_fields__
    return plan_pretraining(PretrainSettings(**{name: params[name] for name in names}), params["vocab_size"])


# ---- the cell in the notebook


def test_the_parameter_cell_binds_exactly_the_known_names_with_their_types():
    """A parameter that the notebook shows and nothing reads, or one that can only be given on a command line."""
    assert {name: type(value) for name, value in CELL.items()} == PARAMETER_TYPES


def test_the_parameter_cell_is_plain_assignments_of_literals():
    """papermill finds no type for anything else, and would replace a cell that computes something."""
    for node in ast.parse(parameter_cell()).body:
        assert isinstance(node, ast.Assign) and len(node.targets) == 1
        value = node.value.operand if isinstance(node.value, ast.UnaryOp) else node.value
        assert isinstance(value, ast.Constant), ast.unparse(node)


def test_each_parameter_has_a_comment_of_its_own_without_an_equals_sign():
    """A parameter that no one explains; a comment that papermill takes for an assignment."""
    lines = parameter_cell().splitlines()
    for number, line in enumerate(lines):
        if line.startswith("#"):
            assert "=" not in line, line
        elif line:
            assert number and lines[number - 1].startswith("# "), line
            assert "=" not in line.partition("#")[2], line


def test_nothing_is_decided_in_the_cell_except_what_no_preset_knows():
    """A default in the cell that overrules every preset."""
    known = {name for preset in PRESETS.values() for name in preset}
    assert {name for name in known if CELL[name] not in ("", -1)} == set()
    assert all(set(preset) == known for preset in PRESETS.values())


# ---- presets


def test_the_a100_preset_is_the_original_run_value_for_value():
    """A number that differs from the run whose results the notebook shows for comparison (spec 14.1)."""
    original = dict(
        run="", device_type="", depth=12, aspect_ratio=64, head_dim=128, max_seq_len=2048, window_pattern="SSSL",
        num_iterations=-1, target_flops=-1.0, target_param_data_ratio=8.5, total_batch_size=-1,
        embedding_lr=0.3, unembedding_lr=0.004, weight_decay=0.2, matrix_lr=0.02, scalar_lr=0.5, adam_beta1=0.8,
        adam_beta2=0.95, warmup_ratio=0.0, warmdown_ratio=0.5, final_lr_frac=0.0, eval_every=250,
        eval_tokens=40 * 524_288, sample_every=-1, save_every=-1, model_tag="",
        vocab_size=32_768, tokenizer_max_chars=2_000_000_000, tokenizer_doc_cap=10_000, data_source="fineweb-edu",
        sft_num_iterations=0, sft_total_batch_size=-1, sft_init_lr_frac=1.0, sft_warmdown_ratio=0.2, sft_eval_every=150,
        sft_eval_tokens=20 * 524_288, simple_spelling_size=200_000, spelling_bee_size=80_000, max_problems=0,
        chat_max_new_tokens=512, chat_temperature=0.0, chat_num_samples=1, task_source="hub",
    )  # fmt: skip
    params = resolved()
    assert {name: params[name] for name in original} == original
    plan = plan_of(params)
    assert (plan.iterations, plan.total_batch_size) == (1_785, 524_288)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_complete_and_fits_together(preset):
    """A preset whose batch does not divide, or that leaves a -1 which nothing derives."""
    params = resolved(preset=preset)
    may_be_derived = {"train_shards", "num_iterations", "target_flops", "total_batch_size"}
    may_be_derived |= {"device_batch_size", "sample_every", "save_every", "sft_total_batch_size", "processes"}
    empty = {"base_dir", "device_type", "text_column", "model_tag", "run", "compare_model", "chat_tasks", "skip"}
    empty |= {"hub_repo"}
    assert {name for name, value in params.items() if value in ("", -1)} <= may_be_derived | empty
    for name, kind in PARAMETER_TYPES.items():
        assert type(params[name]) is kind, name
    assert plan_of(params).iterations > 0


@pytest.mark.parametrize(
    "capability, preset", [(None, "cpu"), ((7, 5), "t4"), ((8, 0), "a100"), ((8, 9), "a100"), ((9, 0), "h100")]
)
def test_auto_takes_the_preset_of_the_device(monkeypatch, capability, preset):
    """The original run started on a laptop, or the laptop's on a GPU that costs money by the hour."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: capability)
    assert resolved(preset="auto")["preset"] == preset


# ---- precedence


def test_command_line_beats_cell_beats_preset():
    """A value that someone gave and that something else silently replaced."""
    assert resolved()["depth"] == 12
    assert resolved(depth=8)["depth"] == 8
    assert resolved("--depth=6", depth=8)["depth"] == 6
    assert resolved("--preset=cpu")["data_source"] == "offline"
    assert resolved("--preset=cpu", data_source="climbmix")["data_source"] == "climbmix"
    assert resolved("--depth=-1")["depth"] == 12, "-1 is the preset's"
    assert resolved(eval_every=0)["eval_every"] == 0, "0 is a value"
    assert resolve_parameters(CELL | dict(preset="cpu"), None)["depth"] == PRESETS["cpu"]["depth"], "a notebook"


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    "name, value", [("num_iterations", 7), ("target_flops", 1e17), ("target_param_data_ratio", 3.5)]
)
def test_a_horizon_replaces_the_one_of_the_preset(preset, name, value):
    """Asking for 7 steps, or for a ratio, and getting the preset's horizon or an error about the batch size."""
    plan = plan_of(resolved(preset=preset, **{name: value}))
    if name == "num_iterations":
        assert plan.iterations == 7
    elif name == "target_flops":
        assert plan.iterations == round(1e17 / (plan.flops_per_token * plan.total_batch_size))
    else:
        assert plan.iterations == int(3.5 * plan.scaling_params) // plan.total_batch_size


def test_a_shorter_run_keeps_the_batch_of_the_preset():
    """A trial of ten steps that trains with another batch size than the run which it tries."""
    assert plan_of(resolved(num_iterations=10)).total_batch_size == plan_of(resolved()).total_batch_size


# ---- errors


def test_names_and_types_are_checked_before_anything_else():
    """A misspelt parameter that is ignored, or a TypeError from the middle of the data stage."""
    with pytest.raises(UserError, match="no parameter 'dpeth'; did you mean 'depth'"):
        resolved("--dpeth=4")
    with pytest.raises(UserError, match="torch_compile is 1; it must be True or False"):
        resolved(torch_compile=1)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(preset="a1000"), "preset is 'a1000'; it can be auto, .*a100"),
        (dict(preset=""), "preset is ''; it can be auto"),
        (dict(depth=0), "depth is 0; it must be positive"),
        (dict(depth=-2), "depth is -2; it must be positive, or -1"),
        (dict(device_batch_size=0), "device_batch_size is 0"),
        (dict(matrix_lr=-0.02), "matrix_lr is -0.02"),
        (dict(matrix_lr=0.0), "matrix_lr is 0.0"),
        (dict(matrix_lr=math.nan), "matrix_lr is nan"),
        (dict(target_flops=math.inf), "target_flops is inf"),
        (dict(warmdown_ratio=1.5), "warmdown_ratio is 1.5; it is a fraction"),
        (dict(final_lr_frac=2.0), "final_lr_frac is 2.0; it is a fraction"),
        (dict(adam_beta2=95.0), "adam_beta2 is 95.0; it is a fraction"),
        (dict(price_per_hour=-3.0), "price_per_hour is -3.0"),
        (dict(max_problems=-2), "max_problems is -2"),
        (dict(spelling_bee_size=0), "spelling_bee_size is 0"),
        (dict(task_source="disk"), "task_source is 'disk'; it can be hub, offline or empty"),
        (dict(hub_repo="my model"), "hub_repo is 'my model', which is no name for a repository"),
        (dict(hub_repo="a/b/c"), "hub_repo is 'a/b/c', which is no name for a repository"),
        (dict(weights_license="MIT License"), "weights_license is 'MIT License'; the hub knows names such as mit"),
        (dict(chat_tasks="GSM8K|MLMU"), "chat_tasks has 'MLMU'; it can have ARC-Easy, "),
        (
            dict(skip="core, pretrain"),
            "skip has 'pretrain'; stages that can be left out are core, sft, chat_eval, export, chat",
        ),
    ],
)
def test_an_impossible_value_is_one_clear_sentence(changes, sentence):
    """A run that divides by zero, or diverges, after the tokenizer was trained."""
    with pytest.raises(UserError, match=sentence):
        resolved(**changes)


def test_tasks_follow_the_text_unless_they_are_named():
    """An offline run that asks the hub for its exams, or a run on the hub's text with the toy exams."""
    assert resolved(preset="cpu")["task_source"] == "offline" and resolved()["task_source"] == "hub"
    assert resolved(data_source="my/texts", task_source="offline")["task_source"] == "offline"


def test_lists_of_names_are_read_leniently():
    """A space behind a comma, or a name given twice, that becomes another stage or an exam sat twice."""
    assert skipped_stages(" core,, sft ") == {"core", "sft"} and skipped_stages("") == set()
    assert chosen_chat_tasks("GSM8K | MMLU|GSM8K") == ["GSM8K", "MMLU"]
    assert chosen_chat_tasks("") == list(CHAT_TASK_NAMES)


def test_the_original_ratios_above_one_are_no_fractions():
    """A check of fractions that forbids 8.5 tokens for each parameter."""
    params = resolved(target_param_data_ratio=20.0, aspect_ratio=96, warmdown_ratio=1.0)
    assert (params["target_param_data_ratio"], params["aspect_ratio"], params["warmdown_ratio"]) == (20.0, 96, 1.0)
