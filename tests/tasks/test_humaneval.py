"""Python functions to write: the conversation, the program made of an answer, and the verdict."""

import pytest
from task_files import write_split

from nanochat.execution import ExecutionResult
from nanochat.runtime import UserError
from tasks import humaneval
from tasks.humaneval import HumanEval, extract_code, leading_imports

PROMPT = 'from typing import List\n\n\ndef total(xs: List[int]) -> int:\n    """Add."""\n'
ROW = {
    "task_id": "HumanEval/0",
    "prompt": PROMPT,
    "canonical_solution": "    return sum(xs)\n",
    "entry_point": "total",
    "test": "def check(candidate):\n    assert candidate([1, 2]) == 3\n    assert candidate([]) == 0\n",
}


@pytest.fixture
def task(tmp_path):
    write_split(tmp_path, "openai/openai_humaneval", "openai_humaneval", "test", [ROW])
    return HumanEval(data_dir=str(tmp_path))


def test_a_problem(task):
    """A solution that does not run because it lacks the head of the function."""
    assert task.eval_type == "generative" and len(task) == 1
    assert task[0] == {
        "messages": [
            {"role": "user", "content": PROMPT},
            {"role": "assistant", "content": PROMPT + "\n    return sum(xs)\n"},
        ],
        "entry_point": "total",
        "test": ROW["test"],
    }


@pytest.mark.parametrize(
    "completion, code",
    [
        ("Sure!\n```python\nx = 1\n\ny = 2\n```\nThat is it.", "x = 1\n\ny = 2"),
        ("```\nx = 1\n```", "x = 1"),
        ("```python \n\n  x = 1  \n```", "x = 1"),
        ("```python\na\n```\n```python\nb\n```", "a"),
        ("  x = 1\n", "x = 1"),
        ("```python\nx = 1", "```python\nx = 1"),  # never closed: no block
        ("```py\nx = 1\n```", "```py\nx = 1\n```"),
        ("", ""),
    ],
)
def test_the_code_in_an_answer(completion, code):
    """Prose run as Python, or another block than everybody takes."""
    assert extract_code(completion) == code


@pytest.mark.parametrize(
    "prompt, imports",
    [
        (PROMPT, "from typing import List"),
        ("# maths\nimport math\n\n  from a import b\ndef f():\n    import os\n", "import math\nfrom a import b"),
        ("def f():\n    pass\nimport math\n", ""),
        ("imported = 1\nimport math", ""),
        ("", ""),
    ],
)
def test_the_imports_of_a_prompt(prompt, imports):
    """NameError: List, for an answer that is right."""
    assert leading_imports(prompt) == imports


def test_what_the_sandbox_is_given(task, monkeypatch):
    """The test run together with what the model wrote, where it can be tampered with."""
    given = []

    def check(*arguments, **options):
        given.append((arguments, options))
        return ExecutionResult(success=len(given) == 1)

    monkeypatch.setattr(humaneval, "check_solution", check)
    answer = "Here:\n```python\ndef total(xs):\n    return 3\n```"
    assert task.evaluate(task[0], answer) == 1 and task.evaluate(task[0], answer) == 0
    program = "from typing import List\n\ndef total(xs):\n    return 3"
    assert given[0] == ((PROMPT, program, ROW["test"], "total"), {"allow_weak": False})


def test_answers_are_run(task):
    """A wrong answer that passes, or the solution of the dataset that fails."""
    task.allow_weak = True  # what is run here is known
    solution = task[0]["messages"][-1]["content"]
    assert task.evaluate(task[0], solution) == 1
    assert task.evaluate(task[0], f"```python\n{solution}\n```") == 1
    assert task.evaluate(task[0], solution.replace("sum(xs)", "3")) == 0
    assert task.evaluate(task[0], "I do not know.") == 0


def test_a_bad_row_is_named(tmp_path):
    """A problem whose tests are missing, passed by every answer."""
    write_split(tmp_path, "openai/openai_humaneval", "openai_humaneval", "test", [ROW, ROW | {"test": None}])
    task = HumanEval(data_dir=str(tmp_path))
    with pytest.raises(UserError, match='00000.parquet, row 2: the column "test" cannot be None'):
        list(task)
