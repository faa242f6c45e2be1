# %% [markdown]
# ## ARC
#
# Science questions from American schools. The *challenge* ones are those that looking up words does not answer.

# %%
from tasks.common import evaluate_letter, multiple_choice_conversation
from tasks.hub import HubTask

# %% [markdown]
# ### `ARC`
# Three, four or five choices, and the letters are those of the exam: a few of them count 1, 2, 3, 4.


# %%
class ARC(HubTask):
    """Subset "ARC-Easy" or "ARC-Challenge"; split train, validation or test. Spec section 15.3."""

    eval_type = "categorical"
    repo = "allenai/ai2_arc"
    splits = dict.fromkeys(("ARC-Easy", "ARC-Challenge"), ("train", "validation", "test"))
    row_shape = {"question": str, "choices": {"text": [str], "label": [str]}, "answerKey": str}

    def get_example(self, index: int) -> dict:
        row = self.rows[index]
        letters, choices, answer = row["choices"]["label"], row["choices"]["text"], row["answerKey"]
        if len(letters) != len(choices) or answer not in letters:
            raise self.rows.bad_row(
                index, f"the answer {answer!r} and {len(choices)} choices do not fit the letters {letters}"
            )
        return multiple_choice_conversation(row["question"], letters, choices, answer)

    def evaluate(self, conversation: dict, completion: str) -> int:
        return evaluate_letter(conversation, completion)
