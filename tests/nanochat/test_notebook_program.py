"""A notebook's history becomes the program that it is, whatever order its cells were run and run again in."""

import pytest

from nanochat.notebook_program import notebook_program, program_so_far
from nanochat.runtime import UserError


def lines_of(inputs, failed=()):
    return notebook_program(inputs, failed).split("\n\n")


def test_edited_and_repeated_cells():
    """A notebook whose script trains twice, or keeps the version of a function that was found wrong."""
    cells = [
        "",
        "depth = 2\nname = ''",
        "# Parameters\ndepth = 3\n",
        "def f():\n    return 1",
        "x = f()",
        "%pip install something",
        "await f()",
        "x = x + 1",
        "def f():\n    return 2",  # corrected
        "x = f()",  # and run again
        "depth = 4\nname = ''",
        "def f():\n    return 1",  # changed back
        "x = x + 1",
    ]
    assert lines_of(cells) == ["depth = 4\nname = ''", "def f():\n    return 1", "x = f()", "x = x + 1"]


def test_what_comes_after_the_running_cell_is_left_out():
    """Eight processes that go on to the exams and the upload, because "run all" was pressed twice."""
    notebook = ["import os", "train()", "evaluate()", "upload()"]
    assert lines_of(["", *notebook, "import os", "train()"]) == ["import os", "train()"]


def test_a_failed_cell_keeps_a_place_and_nothing_else():
    """A training, started again after a stop, whose program holds what was typed between the two."""
    cells = ["", "import os", "train()", "misspelt + 1", "records[-1]", "train()"]
    assert lines_of(cells, failed={2, 3}) == ["import os", "train()"]
    assert lines_of([*cells[:4], "y = 1"], failed={2, 3}) == ["import os", "y = 1"]


def test_a_cell_with_a_magic_cannot_be_the_program():
    """Processes that run everything but the cell which was to train, because it began with %%time."""
    with pytest.raises(UserError, match="Take out its % and ! lines"):
        notebook_program(["", "x = 1", "%%time\ntrain()"])


def test_a_script_has_no_history():
    """A script that is taken for a notebook because IPython is installed."""
    assert program_so_far() is None
