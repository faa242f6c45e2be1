"""Exam questions with four choices."""

import pytest
from task_files import talk, write_split

from nanochat.runtime import UserError
from tasks.mmlu import MMLU

ROW = {"question": "2 + 2 =", "subject": "algebra", "choices": ["1", "2", "3", "4"], "answer": 3}
CONVERSATION = {
    "messages": talk(
        "Multiple Choice question: 2 + 2 =\n- 1=A\n- 2=B\n- 3=C\n- 4=D\n\n"
        "Respond only with the letter of the correct answer.",
        "D",
    ),
    "subject": "algebra",
    "letters": ["A", "B", "C", "D"],
}


def test_a_question(tmp_path):
    """A prompt other than everybody's, or the answer one letter off."""
    write_split(tmp_path, "cais/mmlu", "all", "test", [ROW])
    task = MMLU("all", "test", data_dir=str(tmp_path))
    assert task.eval_type == "categorical" and list(task) == [CONVERSATION]
    assert [task.evaluate(task[0], letter) for letter in "ABCD"] == [0, 0, 0, 1]
    with pytest.raises(ValueError, match="none of A, B, C, D"):
        task.evaluate(task[0], "E")


def test_the_training_rows_are_unwrapped(tmp_path):
    """KeyError on the only split that the model is trained on."""
    write_split(tmp_path, "cais/mmlu", "auxiliary_train", "train", [{"train": ROW}])
    write_split(tmp_path, "cais/mmlu", "all", "auxiliary_train", [ROW])
    assert list(MMLU("auxiliary_train", "train", data_dir=str(tmp_path))) == [CONVERSATION]
    assert list(MMLU("all", "auxiliary_train", data_dir=str(tmp_path))) == [CONVERSATION]


@pytest.mark.parametrize("change", [{"answer": 4}, {"answer": -1}, {"choices": ["1", "2", "3"]}, {"question": None}])
def test_a_bad_row_is_named(tmp_path, change):
    """An answer that is none of the choices."""
    write_split(tmp_path, "cais/mmlu", "all", "dev", [ROW | change])
    with pytest.raises(UserError, match="00000.parquet, row 1: "):
        MMLU("all", "dev", data_dir=str(tmp_path))[0]


def test_unknown_subsets_and_columns(tmp_path):
    """A question without choices, or a download for a subset that was mistyped."""
    with pytest.raises(UserError, match="MMLU has no subset 'anatomy'; it has: all, auxiliary_train"):
        MMLU("anatomy", "test", data_dir=str(tmp_path))
    with pytest.raises(
        UserError, match="MMLU all has no split 'train'; it has: validation, dev, test, auxiliary_train"
    ):
        MMLU("all", "train", data_dir=str(tmp_path))
    write_split(tmp_path, "cais/mmlu", "all", "test", [{"question": "Q", "subject": "s", "answer": 1}])
    with pytest.raises(UserError, match='00000.parquet has no column "choices"'):
        MMLU("all", "test", data_dir=str(tmp_path))
