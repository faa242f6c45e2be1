"""School science questions."""

import pytest
from task_files import talk, write_split

from nanochat.runtime import UserError
from tasks.arc import ARC

REPO = "allenai/ai2_arc"


def question(labels, answer):
    texts = ["ice", "rock", "air", "fire", "tea"][: len(labels)]
    return {"question": "What melts?", "choices": {"text": texts, "label": labels}, "answerKey": answer}


@pytest.mark.parametrize(
    "labels, answer, lines",
    [
        (["A", "B", "C"], "A", "- ice=A\n- rock=B\n- air=C\n"),
        (["1", "2", "3", "4"], "2", "- ice=1\n- rock=2\n- air=3\n- fire=4\n"),
    ],
)
def test_the_letters_are_those_of_the_exam(tmp_path, labels, answer, lines):
    """Questions whose choices count 1, 2, 3 asked with A, B, C, so that no answer is ever right."""
    write_split(tmp_path, REPO, "ARC-Easy", "test", [question(labels, answer)])
    task = ARC("ARC-Easy", "test", data_dir=str(tmp_path))
    prompt = f"Multiple Choice question: What melts?\n{lines}\nRespond only with the letter of the correct answer."
    assert task.eval_type == "categorical"
    assert list(task) == [{"messages": talk(prompt, answer), "letters": labels}]
    assert [task.evaluate(task[0], label) for label in labels] == [int(label == answer) for label in labels]


def test_a_bad_row_is_named(tmp_path):
    """An answer that is none of the choices, counted as one that the model got wrong."""
    bad = question(["A", "B"], "A")
    bad["choices"]["text"].append("air")
    write_split(tmp_path, REPO, "ARC-Challenge", "train", [question(["A", "B"], "C")])
    write_split(tmp_path, REPO, "ARC-Challenge", "test", [bad])
    with pytest.raises(UserError, match="00000.parquet, row 1: the answer 'C' and 2 choices do not fit the letters"):
        ARC("ARC-Challenge", "train", data_dir=str(tmp_path))[0]
    with pytest.raises(UserError, match="00000.parquet, row 1: the answer 'A' and 3 choices do not fit the letters"):
        ARC("ARC-Challenge", "test", data_dir=str(tmp_path))[0]
    with pytest.raises(UserError, match="ARC has no subset 'ARC-Hard'; it has: ARC-Easy, ARC-Challenge"):
        ARC("ARC-Hard", "test", data_dir=str(tmp_path))
