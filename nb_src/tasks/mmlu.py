# %% [markdown]
# ## MMLU
#
# Questions from 57 school and university subjects with four choices each. The training split teaches a small model
# less about anatomy than about what a multiple-choice question is and how one answers it: with a letter.

# %%
from tasks.common import evaluate_letter, multiple_choice_conversation
from tasks.hub import HubTask

# %% [markdown]
# ### `MMLU`
# The letters are always A to D. On the hub the auxiliary training rows are wrapped once more than the others.

# %%
MMLU_LETTERS = ("A", "B", "C", "D")


class MMLU(HubTask):
    """Subset "all" (splits validation, dev, test, auxiliary_train) or "auxiliary_train" (split train: the same rows).

    Each conversation also has its "subject". Spec section 15.3.
    """

    eval_type = "categorical"
    repo = "cais/mmlu"
    splits = {"all": ("validation", "dev", "test", "auxiliary_train"), "auxiliary_train": ("train",)}
    question_shape = {"question": str, "subject": str, "choices": [str], "answer": int}

    def __init__(self, subset: str, split: str, data_dir: str | None = None, **view):
        self.row_shape = {"train": self.question_shape} if subset == "auxiliary_train" else self.question_shape
        super().__init__(subset, split, data_dir, **view)

    def get_example(self, index: int) -> dict:
        row = self.rows[index]
        row = row.get("train", row)
        if len(row["choices"]) != 4 or not 0 <= row["answer"] < 4:
            raise self.rows.bad_row(index, f"{len(row['choices'])} choices, of which {row['answer']} is the right one")
        answer = MMLU_LETTERS[row["answer"]]
        conversation = multiple_choice_conversation(row["question"], MMLU_LETTERS, row["choices"], answer)
        return conversation | {"subject": row["subject"]}

    def evaluate(self, conversation: dict, completion: str) -> int:
        return evaluate_letter(conversation, completion)
