# %% [markdown]
# ## GSM8K
#
# Word problems of grade-school mathematics. Their solutions are written sentence by sentence, and wherever something is
# computed, the computation stands between double angle brackets: `<<12*3=36>>`. That becomes a call of the calculator,
# so the model learns to set up the sum and to leave the arithmetic to somebody who can.

# %%
import re

from tasks.hub import HubTask

# %% [markdown]
# ### The answer and its judgement
# The number behind four hash signs counts. It is compared as text, as everybody does whose results we want to compare
# with: 18.0 is not 18.

# %%
FINAL_ANSWER = re.compile(r"#### (\-?[0-9\.\,]+)")
CALCULATOR_NOTE = re.compile(r"(<<[^>]+>>)")


def extract_final_answer(text: str) -> str | None:
    """The first number behind "#### ", without commas; None when there is none."""
    match = FINAL_ANSWER.search(text)
    return match[1].strip().replace(",", "") if match else None


def evaluate_final_answer(conversation: dict, completion: str) -> int:
    """1 when the completion's final answer is that of the conversation, whose last part holds it. Spec section 15.3."""
    expected = extract_final_answer(conversation["messages"][-1]["content"][-1]["text"])
    return int(expected is not None and extract_final_answer(completion) == expected)


def split_calculator_notes(solution: str) -> list[dict]:
    """A solution as the parts of an assistant's message: text, calculator calls and what they return."""
    parts = []
    for number, piece in enumerate(CALCULATOR_NOTE.split(solution)):
        if number % 2 == 0:
            parts.append({"type": "text", "text": piece})
            continue
        note = piece[2:-2]
        expression, result = note.rsplit("=", 1) if "=" in note else (note, "")
        parts.append({"type": "python", "text": expression})
        parts.append({"type": "python_output", "text": result})
    return parts


# %% [markdown]
# ### `GSM8K`
# The reward is what reinforcement learning would ask for.


# %%
class GSM8K(HubTask):
    """Subset "main" or "socratic"; split "train" or "test". Spec section 15.3."""

    repo = "openai/gsm8k"
    splits = dict.fromkeys(("main", "socratic"), ("train", "test"))
    row_shape = {"question": str, "answer": str}

    def get_example(self, index: int) -> dict:
        row = self.rows[index]
        parts = split_calculator_notes(row["answer"])
        if extract_final_answer(parts[-1]["text"]) is None:
            raise self.rows.bad_row(index, "the answer does not end with #### and a number")
        return {
            "messages": [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": parts}],
        }

    def evaluate(self, conversation: dict, completion: str) -> int:
        return evaluate_final_answer(conversation, completion)

    def reward(self, conversation: dict, completion: str) -> float:
        return float(self.evaluate(conversation, completion))
