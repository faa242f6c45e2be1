"""Word problems with a calculator."""

import pytest
from task_files import write_split

from nanochat.runtime import UserError
from tasks.gsm8k import GSM8K, extract_final_answer, split_calculator_notes

QUESTION = "Ann has 3 boxes of 12 eggs and eats 6. How many are left?"
ANSWER = "She has 3*12 = <<3*12=36>>36 eggs.\nThen 36-6 = <<36-6=30>>30 are left.\n#### 1,030"


def task_of(tmp_path, answer=ANSWER):
    write_split(tmp_path, "openai/gsm8k", "main", "train", [{"question": QUESTION, "answer": answer}])
    return GSM8K("main", "train", data_dir=str(tmp_path))


def test_a_problem(tmp_path):
    """The model taught to do sums itself, or to say the calculator's lines."""
    task = task_of(tmp_path)
    assert task.eval_type == "generative"
    assert task[0] == {
        "messages": [
            {"role": "user", "content": QUESTION},
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "She has 3*12 = "},
                    {"type": "python", "text": "3*12"},
                    {"type": "python_output", "text": "36"},
                    {"type": "text", "text": "36 eggs.\nThen 36-6 = "},
                    {"type": "python", "text": "36-6"},
                    {"type": "python_output", "text": "30"},
                    {"type": "text", "text": "30 are left.\n#### 1,030"},
                ],
            },
        ]
    }


def test_odd_calculator_notes():
    """A note with two equals signs cut at the first, or one without any being a crash."""
    parts = [part for part in split_calculator_notes("a<<x=1=2>>b<<7>><<>>c<d>") if part["text"] != ""]
    assert [(part["type"], part["text"]) for part in parts] == [
        ("text", "a"), ("python", "x=1"), ("python_output", "2"), ("text", "b"), ("python", "7"), ("text", "<<>>c<d>")
    ]  # fmt: skip
    assert split_calculator_notes("<<7>>")[2] == {"type": "python_output", "text": ""}


@pytest.mark.parametrize(
    "text, expected",
    [
        ("so\n#### 72", "72"),
        ("#### -5", "-5"),
        ("#### 1,234,567 eggs", "1234567"),
        ("#### 18.50", "18.50"),
        ("#### 18.", "18."),
        ("#### 1 and later #### 2", "1"),
        ("####72", None),
        ("#### $72", None),
        ("### 72", None),
        ("72", None),
        ("", None),
    ],
)
def test_final_answers(text, expected):
    """An accuracy that cannot be compared with anybody's."""
    assert extract_final_answer(text) == expected


def test_answers_are_judged(tmp_path):
    """A missing answer that counts as right, a comma that counts as wrong, or a number found elsewhere in the text."""
    task = task_of(tmp_path)
    for completion, right in (("#### 1030", 1), ("I think\n#### 1,030\n", 1), ("#### 1030.0", 0), ("#### 30", 0),
                              ("1030", 0), ("", 0)):  # fmt: skip
        assert task.evaluate(task[0], completion) == right
        assert task.reward(task[0], completion) == float(right)
        assert isinstance(task.reward(task[0], completion), float)


def test_a_reference_without_an_answer_is_not_reached_by_silence(tmp_path):
    """None == None: full marks for saying nothing."""
    conversation = {"messages": [{"role": "assistant", "content": [{"type": "text", "text": "who knows"}]}]}
    assert task_of(tmp_path).evaluate(conversation, "nobody") == 0


@pytest.mark.parametrize("answer", ["no number", "#### 5\nso <<1+1=2>>2", ""])
def test_a_problem_without_an_answer_is_named(tmp_path, answer):
    """Problems that no answer can solve."""
    with pytest.raises(UserError, match="00000.parquet, row 1: the answer does not end with #### and a number"):
        task_of(tmp_path, answer)[0]


def test_unknown_subsets(tmp_path):
    """A download that fails with an HTTP error because of a typing error."""
    with pytest.raises(UserError, match="GSM8K has no subset 'default'; it has: main, socratic"):
        GSM8K("default", "test", data_dir=str(tmp_path))
