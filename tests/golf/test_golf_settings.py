"""Settings: where a value comes from, what is refused, and that no name is declared for nothing."""

import ast
import os
import re

import pytest

from golf.golf_settings import (
    GOLF_BASELINE,
    OPEN_PARAMETERS,
    RECURRENT_PRESETS,
    SEQ4096_PRESETS,
    frozen_parameters,
    golf_accumulation_steps,
    golf_skipped,
    public_settings,
    resolve_golf_parameters,
)
from helpers import REPOSITORY
from nanochat.runtime import UserError

SPINES = {"golf_seq4096": SEQ4096_PRESETS, "golf_recurrent": RECURRENT_PRESETS}


def spine_source(spine: str) -> str:
    return (REPOSITORY / "nb_src" / f"{spine}.py").read_text(encoding="utf-8")


def parameter_cell(spine: str) -> dict:
    """What the cell tagged `parameters` binds, in order."""
    cell = spine_source(spine).split('# %% tags=["parameters"]\n')[1].split("\n# %%")[0]
    return {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(cell).body}


def resolve(arguments=(), cell=None, environment=None, presets=SEQ4096_PRESETS):
    return resolve_golf_parameters(cell or {}, presets, list(arguments), environment)


def test_the_nearest_place_wins():
    """A value typed at the start of a run that loses against one set in a profile last year."""
    environment = {"MATRIX_LR": "0.1", "SEED": "7", "ITERATIONS": "", "NUM_LAYERS": "-1", "BETA1": "0.5"}
    cell = {"preset": "cpu", "matrix_lr": 0.2, "seed": -1, "num_layers": 5}
    params, given = resolve(["--matrix_lr=0.3", "--num_heads", "2"], cell, environment)
    names = ("matrix_lr", "seed", "iterations", "num_layers", "beta1", "num_heads", "preset")
    assert [params[name] for name in names] == [0.3, 7, 150, 5, 0.5, 2, "cpu"]
    assert given == {"matrix_lr": 0.3, "seed": 7, "num_layers": 5, "beta1": 0.5, "num_heads": 2}


def test_what_was_given_counts_as_given_when_the_preset_agrees():
    """An explicit cap of 600 seconds that is stretched to 4,800 on one GPU, as the preset's own is."""
    _, given = resolve(["--preset=record", "--max_wallclock_seconds=600"])
    assert given == {"max_wallclock_seconds": 600.0}


def test_what_nobody_sets_is_the_presets():
    """A preset of which a part is forgotten, or a -1 of the cell that becomes a value."""
    for presets, spine in ((SEQ4096_PRESETS, "golf_seq4096"), (RECURRENT_PRESETS, "golf_recurrent")):
        for preset in presets:
            cell = parameter_cell(spine) | {"preset": preset}
            assert resolve(cell=cell, presets=presets) == (presets[preset] | {"preset": preset}, {})


def test_auto_is_what_the_machine_can_do(monkeypatch):
    """A laptop that begins the run for eight H100."""
    for gpu, expected in ((True, "record"), (False, "cpu")):
        monkeypatch.setattr("torch.cuda.is_available", lambda gpu=gpu: gpu)
        assert resolve()[0]["preset"] == expected
        assert resolve(["--device_type=cuda"])[0]["preset"] == expected
        assert resolve(["--device_type=cpu"])[0]["preset"] == "cpu"


@pytest.mark.parametrize(
    "arguments, cell, environment, sentence",
    [
        (["--matrx_lr=1"], {}, {}, "no parameter 'matrx_lr'; did you mean 'matrix_lr'"),
        ([], {"iteration": 3}, {}, "no parameter 'iteration'; did you mean 'iterations'"),
        (["--iterations=ten"], {}, {}, "iterations is 'ten'; it must be of type int"),
        ([], {"iterations": 1.5}, {}, "iterations is 1.5; it must be of type int"),
        ([], {"variant": 1024}, {}, "variant is 1024; it must be of type str"),
        ([], {}, {"MATRIX_LR": "fast"}, "matrix_lr is 'fast'; it must be of type float"),
        (["--matrix_lr=nan"], {}, {}, "matrix_lr is nan; it must be positive"),
        (["--matrix_lr=inf"], {}, {}, "matrix_lr is inf; it must be positive"),
        (["--train_seq_len=0"], {}, {}, "train_seq_len is 0; it must be positive"),
        (["--warmup_steps=-2"], {}, {}, "warmup_steps is -2; it must be positive"),
        (["--preset=h200"], {}, {}, "preset is 'h200'; it can be auto, record, baseline, cpu"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(arguments, cell, environment, sentence):
    """A misspelt rate that trains ten minutes with the old one."""
    with pytest.raises(UserError, match=sentence):
        resolve(arguments, cell, environment)


@pytest.mark.parametrize(
    "argument, sentence",
    [
        ("--run_id=../other", "run_id is '../other'"),
        ("--data_path=shards", "data_path is given and tokenizer_path is not"),
        ("--ttt_mode=adam", "ttt_mode is 'adam'"),
        ("--compressor=gzip", "compressor is 'gzip'"),
        ("--train_recurrences=4,8", "train_recurrences is '4,8'"),
        ("--train_recurrences=0|2", "train_recurrences is '0|2'"),
        ("--max_wallclock_seconds=12", "no time is left to train"),
        ("--num_eval_recurrences=6", "scored with 6 rounds, and the training has [3]"),
        ("--train_recurrences=4|8", "scored with 3 rounds, and the training has [4, 8]"),
        ("--architecture=deep", "architecture is 'deep'; it can be recurrent or looped"),
        ("--enable_looping_at=1", "enable_looping_at is 1.0; it must be below 1"),
        ("--sw_stride=257", "sw_stride 257 is more than sw_seq_len 256"),
        ("--ttt_chunk_tokens=255", "ttt_chunk_tokens 255 is less than sw_seq_len 256"),
        ("--num_heads=5", "num_heads 5 and num_kv_heads 2 do not fit"),
        ("--model_dim=60", "model_dim 60, num_heads 4 and num_kv_heads 2 do not fit"),
        ("--beta2=1", "beta2 is 1.0; it must be below 1"),
        ("--muon_momentum=9.5", "muon_momentum is 9.5; it must be below 1"),
        ("--ema_decay=1", "ema_decay is 1.0; it must be below 1"),
        ("--warmdown_fraction=70", "warmdown_fraction is 70.0; it must be at most 1"),
        ("--swa_start_frac=40", "swa_start_frac is 40.0; it must be at most 1"),
        ("--control_tensor_name_patterns= ,", "control_tensor_name_patterns names nothing"),
    ],
)
def test_what_would_only_be_noticed_later_is_refused_at_once(argument, sentence):
    """A run of ten minutes that ends because nobody knows the codec, or that writes into another folder."""
    with pytest.raises(UserError, match=re.escape(sentence)):
        resolve(["--preset=cpu", argument], presets=RECURRENT_PRESETS)
    for fine in ("--run_id=a_1.b-2", "--train_recurrences=2|3", "--max_wallclock_seconds=13", "--warmdown_fraction=1",
                 "--swa_start_frac=1", "--sw_stride=256", "--ttt_chunk_tokens=256"):  # fmt: skip
        resolve(["--preset=cpu", fine], presets=RECURRENT_PRESETS)


def test_a_rounding_step_that_is_none():
    """A KeyError after ten minutes of training."""
    with pytest.raises(UserError, match="int8_original_floor is 3; it can be 0, 1 or 2"):
        resolve(["--int8_original_floor=3"])


def test_patterns_as_people_write_them():
    """A comma at the end: the empty pattern is in every name, and no matrix is left for Muon or the codes."""
    params, _ = resolve(["--control_tensor_name_patterns=attn_scale, resid_mix,"])
    assert params["control_tensor_name_patterns"] == "attn_scale,resid_mix"


def test_zero_where_zero_means_off():
    """A documented "0 is no limit" that the check refuses."""
    for spine, presets in SPINES.items():
        comments = re.findall(r"^# (.*)\n(\w+) = ", spine_source(spine), flags=re.M)
        off = [name for comment, name in comments if re.search(r"\b0 (is|does|leaves|learns|runs|counts)\b", comment)]
        assert len(off) >= 4, off
        for name in off:
            assert resolve([f"--{name}=0"], presets=presets)[0][name] == 0


def test_stages_that_can_be_left_out():
    """A misspelt stage that runs for two minutes although it was to be left out."""
    assert golf_skipped(" audit,submit ,", ("audit", "prove", "submit")) == {"audit", "submit"}
    assert golf_skipped("", ("audit",)) == set()
    with pytest.raises(UserError, match="skip has 'train'; .* audit, prove"):
        golf_skipped("train", ("audit", "prove"))


def test_only_divisors_of_eight_may_work_together():
    """Three processes whose slices are not those of one."""
    assert [golf_accumulation_steps(n) for n in (1, 2, 4, 8)] == [8, 4, 2, 1]
    for n in (3, 5, 6, 7, 9, 16):
        with pytest.raises(UserError, match=f"{n} processes do not divide"):
            golf_accumulation_steps(n)


@pytest.mark.parametrize("spine", SPINES)
def test_cell_and_presets_have_the_same_names(spine):
    """A parameter that papermill accepts and nobody reads, or one that only the source can change."""
    cell, presets = parameter_cell(spine), SPINES[spine]
    for preset in presets.values():
        assert preset.keys() == cell.keys()
        assert {name: type(value) for name, value in preset.items()} == {n: type(v) for n, v in cell.items()}
    assert all(value in (-1, "") or name == "preset" for name, value in cell.items())


def chapters_of(spine: str) -> set[str]:
    """The chapters that a program unrolls, as module names."""
    found, todo = set(), {spine}
    while todo:
        module = todo.pop()
        path = REPOSITORY / "nb_src" / (module.replace(".", os.sep) + ".py")
        imports = re.findall(r"^from ((?:golf|nanochat)\.\w+) import", path.read_text(encoding="utf-8"), flags=re.M)
        found.add(module)
        todo |= set(imports) - found
    return found


def names_that_are_read(spine: str) -> set[str]:
    """Parameters that the program reads by their name, or by the field of a dataclass that is read."""
    found, fields, attributes = set(), set(), set()
    for module in chapters_of(spine) - {"golf.golf_settings"}:
        source = (REPOSITORY / "nb_src" / (module.replace(".", os.sep) + ".py")).read_text(encoding="utf-8")
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
                found.add(node.slice.value)  # params["seed"]
            elif isinstance(node, ast.For | ast.comprehension) and isinstance(node.iter, ast.Tuple):
                found |= {each.value for each in node.iter.elts if isinstance(each, ast.Constant)}
            elif isinstance(node, ast.ClassDef) and module.startswith("golf."):
                fields |= {each.target.id for each in node.body if isinstance(each, ast.AnnAssign)}
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                attributes.add(node.attr)
    return found | (fields & attributes)


@pytest.mark.parametrize("spine", SPINES)
def test_every_parameter_is_read_by_code(spine):
    """A knob that is turned, logged and handed in, and changes nothing."""
    assert {"seed", "iterations"} <= names_that_are_read(spine)
    assert "no_such_parameter" not in names_that_are_read(spine)
    assert SPINES[spine]["cpu"].keys() - names_that_are_read(spine) == set()


SMALL_PROGRAM = """
preset = "auto"
base_dir = ""
seed = -1
matrix_lr = -1.0
iterations = -1
skip = ""
text = "seed = 5"
seed = seed + 1
matrix_lr = matrix_lr * 2
"""


def test_frozen_program_needs_no_arguments():
    """A script that is handed in with a command line that only its author knows."""
    for spine, presets in SPINES.items():
        arguments = ["--preset=cpu", "--matrix_lr=0.123", "--iterations=77", "--seed=5", "--base_dir=/home/me"]
        params, _ = resolve(arguments, presets=presets)
        frozen = frozen_parameters(spine_source(spine), params)
        tree = ast.parse(frozen)
        names = presets["cpu"].keys()
        cell = {}
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in names:
                cell.setdefault(node.targets[0].id, ast.literal_eval(node.value))
        assert cell.keys() == names
        again, _ = resolve(cell=cell, presets=presets)
        for name in names:
            assert again[name] == (presets["cpu"][name] if name in OPEN_PARAMETERS else params[name]), name
        assert "/home/me" not in frozen
        assert resolve(["--seed=9"], cell, presets=presets)[0]["seed"] == 9
        assert frozen_parameters(frozen, params) == frozen


def test_only_the_first_assignment_is_the_parameter():
    """A variable of the program that is overwritten because it has a parameter's name."""
    params = dict(preset="cpu", base_dir="/home/me", seed=7, matrix_lr=0.5, iterations=10, skip="audit")
    frozen = frozen_parameters(SMALL_PROGRAM, params)
    assert frozen.splitlines() == [
        "preset = 'cpu'", "base_dir = ''", "seed = -1", "matrix_lr = 0.5", "iterations = 10", "skip = ''",
        "text = 'seed = 5'", "seed = seed + 1", "matrix_lr = matrix_lr * 2",
    ]  # fmt: skip


def test_what_is_told_to_everyone():
    """A log for the public with the folders of its author's machine."""
    told = public_settings(GOLF_BASELINE | dict(base_dir="/home/me", seed=7, author="me"))
    assert told["seed"] == 7 and told["matrix_lr"] == 0.04
    assert not {"base_dir", "data_path", "tokenizer_path", "author"} & told.keys()


def test_a_variant_says_how_many_tokens_it_has():
    """Sixteen gigabytes of sp4096 that are fetched before anyone notices that the model has 1,024 tokens."""
    assert resolve(["--variant=sp4096"])[0]["vocab_size"] == 4096
    assert resolve(["--variant=byte260"])[0]["vocab_size"] == 260
    with pytest.raises(UserError, match="variant 'sp1024' does not have vocab_size 2048 tokens"):
        resolve(["--vocab_size=2048"])
    assert resolve(["--vocab_size=2048", "--data_path=here", "--tokenizer_path=it"])[0]["vocab_size"] == 2048
