import sys

import pytest

from nanochat.parameters import command_line, is_given, parse_arguments, typed_value
from nanochat.runtime import UserError

TYPES = dict(
    depth=int, head_dim=int, matrix_lr=float, weight_decay=float, target_flops=float, price_per_hour=float,
    torch_compile=bool, data_source=str, run=str,
)  # fmt: skip


def test_arguments_as_torchrun_passes_them():
    """--name=value and --name value, negative numbers, text with blanks, True and False in any case."""
    given = parse_arguments(
        [
            "--depth=4", "--head_dim", "64", "--matrix_lr=1e-2", "--target_flops", "-1", "--torch_compile=false",
            "--data_source=/my texts/here", "--price_per_hour=2", "--run=",
        ],
        TYPES,
        "program",
    )  # fmt: skip
    values = {name: typed_value(name, value, TYPES[name]) for name, value in given.items()}
    assert values == dict(
        depth=4, head_dim=64, matrix_lr=0.01, target_flops=-1.0, torch_compile=False, data_source="/my texts/here",
        price_per_hour=2.0, run="",
    )  # fmt: skip
    assert {name: type(value) for name, value in values.items()} == {name: TYPES[name] for name in values}


def test_the_command_line_of_a_kernel_is_not_ours(monkeypatch):
    """A notebook that stumbles over the file name which Jupyter passes to its kernel."""
    monkeypatch.setattr("sys.argv", ["program.py", "--depth=4"])
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    assert command_line() == ["--depth=4"]
    monkeypatch.setitem(sys.modules, "ipykernel", object())
    assert command_line() is None


@pytest.mark.parametrize(
    "argument, sentence",
    [
        ("--dpeth=4", "no parameter 'dpeth'; did you mean 'depth'"),
        ("--weight-decay=0.1", "no parameter 'weight-decay'; did you mean 'weight_decay'"),
        ("--dep=4", "no parameter 'dep'; did you mean 'depth'"),  # and is not taken as an abbreviation
        ("--zzz=4", "no parameter 'zzz'; --help lists them"),
        ("depth=4", "'depth=4' is not understood; parameters are written --depth=value"),
        ("-depth=4", "'-depth=4' is not understood; parameters are written --depth=value"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest_one(argument, sentence):
    """A misspelt parameter that is ignored: the run does something else, for hours."""
    with pytest.raises(UserError, match=sentence):
        parse_arguments([argument], TYPES, "program")


@pytest.mark.parametrize(
    "name, value, sentence",
    [
        ("depth", "twelve", "depth is 'twelve'; it must be of type int"),
        ("depth", 4.5, "depth is 4.5; it must be of type int"),
        ("depth", "4.5", "depth is '4.5'; it must be of type int"),
        ("depth", True, "depth is True; it must be of type int"),
        ("depth", None, "depth is None; it must be of type int"),
        ("matrix_lr", "fast", "matrix_lr is 'fast'; it must be of type float"),
        ("torch_compile", "maybe", "torch_compile is 'maybe'; it must be True or False"),
        ("torch_compile", 1, "torch_compile is 1; it must be True or False"),
        ("data_source", 5, "data_source is 5; it must be of type str"),
    ],
)
def test_a_wrong_type_is_one_clear_sentence(name, value, sentence):
    """A TypeError from the middle of the data stage instead of a sentence at once."""
    with pytest.raises(UserError, match=sentence):
        typed_value(name, value, TYPES[name])


def test_zero_and_false_are_values():
    """A switch turned off, or a count of zero, that a preset overrules as if nothing had been said."""
    assert [value for value in (0, 0.0, False, True, "x", -1, -1.0, "") if not is_given(value)] == [-1, -1.0, ""]
