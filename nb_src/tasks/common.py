# %% [markdown]
# ## Tasks
#
# A task is a list of conversations, each with the answer that the assistant should give, and a way to judge another
# answer. The same object serves twice: fine-tuning shows the model the answers of the training split, and the chat
# evaluation hides those of the test split.
#
# Two kinds of judgement: a *categorical* task asks which of a few letters the model finds likeliest, a *generative* one
# lets it write and looks at the text.

# %%
import bisect
import itertools
import random

import numpy as np

from nanochat.runtime import UserError
from nanochat.tokenizer import check_conversation

# %% [markdown]
# ### `Task`
# Examples are made when they are asked for. start, stop and step select some of them as a slice of a list would.


# %%
class Task:
    """Examples start, start + step, ... below stop (None: all; more than there are is no error). Spec section 15.1.

    A kind of task sets `eval_type` ("generative" or "categorical") and defines the three methods that raise here.
    """

    eval_type = "generative"

    def __init__(self, start: int = 0, stop: int | None = None, step: int = 1):
        if start < 0 or step < 1 or (stop is not None and stop < start):
            raise ValueError(f"start {start}, stop {stop}, step {step}: needed are 0 <= start <= stop and step >= 1")
        self.start, self.stop, self.step = start, stop, step

    def num_examples(self) -> int:
        """How many examples there are before start, stop and step select from them."""
        raise NotImplementedError

    def get_example(self, index: int) -> dict:
        """The conversation with this index among all: {"messages": [...]} and what `evaluate` needs."""
        raise NotImplementedError

    def evaluate(self, conversation: dict, completion: str) -> int:
        """1 when the completion answers the conversation's last question rightly, otherwise 0."""
        raise NotImplementedError

    def __len__(self) -> int:
        stop = self.num_examples() if self.stop is None else min(self.stop, self.num_examples())
        return len(range(self.start, stop, self.step))

    def __getitem__(self, index: int) -> dict:
        if not isinstance(index, int):
            raise TypeError(f"a task is indexed by an int, not by {index!r}; start, stop and step select a part of it")
        if not 0 <= index < len(self):
            raise IndexError(f"{type(self).__name__} has no example {index}: it has {len(self)}, counted from 0")
        return self.get_example(self.start + index * self.step)


# %% [markdown]
# ### Checks
# A wrong name or a broken file should be one sentence with the place in it, and come before an hour of training.


# %%
def require_examples(task: Task) -> None:
    """Raise UserError for a task with no examples."""
    if len(task) == 0:
        raise UserError(
            f"{type(task).__name__} has no examples: start {task.start}, stop {task.stop} and step {task.step} select "
            f"nothing from {task.num_examples():,}. Change them, or leave the task out."
        )


def require_choice(task_name: str, kind: str, value: str, choices) -> None:
    """Raise UserError unless `value` is one of the choices; kind is what it is called, as "split"."""
    if value not in choices:
        raise UserError(f"{task_name} has no {kind} {value!r}; it has: {', '.join(choices)}.")


def check_string_messages(messages, system_allowed: bool = False) -> None:
    """Raise ValueError unless user and assistant speak in turn, in at least two messages that are strings.

    system_allowed: a system message may come before them.
    """
    if not isinstance(messages, list):
        raise ValueError("a conversation is a list of messages")
    turns = check_conversation({"messages": messages})
    if messages[0]["role"] == "system" and not system_allowed:
        raise ValueError("message 1 has the role 'system' where 'user' belongs")
    if len(turns) < 2:
        raise ValueError("a conversation has at least two messages, a question and an answer")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message["content"], str):
            raise ValueError(f"message {number} must have a string as content")


# %% [markdown]
# ### Multiple choice
# The letter stands *behind* the choice, because small models bind it better there, and no space stands before it: that
# way the token in the question is the very token of the answer.


# %%
def render_mc(question: str, letters, choices) -> str:
    """The question of a multiple-choice problem as a prompt. Spec section 15.2."""
    lines = "".join(f"- {choice}={letter}\n" for letter, choice in zip(letters, choices, strict=True))
    return f"Multiple Choice question: {question}\n{lines}\nRespond only with the letter of the correct answer."


def multiple_choice_conversation(question: str, letters, choices, answer: str) -> dict:
    """The question, its answer (one of the letters), and under "letters" those to choose from."""
    return {
        "messages": [
            {"role": "user", "content": render_mc(question, letters, choices)},
            {"role": "assistant", "content": answer},
        ],
        "letters": list(letters),
    }


def evaluate_letter(conversation: dict, completion: str) -> int:
    """1 if the letter is the right one. Raises ValueError when it is none of the letters to choose from."""
    if completion not in conversation["letters"]:
        raise ValueError(f"the answer {completion!r} is none of {', '.join(conversation['letters'])}")
    return int(completion == conversation["messages"][-1]["content"])


# %% [markdown]
# ### Several tasks as one
# Fine-tuning learns from a mixture: everything in one random order, always the same. To see a task twice in an epoch,
# list it twice. A sequence goes through one task after the other instead, which makes a curriculum.


# %%
class TaskSequence(Task):
    """All examples of the first task, then of the second, ... Raises UserError when one has none."""

    def __init__(self, tasks: list[Task]):
        super().__init__()
        if not tasks:
            raise UserError("there are no tasks to learn from: name at least one.")
        for task in tasks:
            require_examples(task)
        self.tasks = list(tasks)
        self.ends = list(itertools.accumulate(map(len, tasks)))

    def num_examples(self) -> int:
        return self.ends[-1]

    def get_example(self, index: int) -> dict:
        number = bisect.bisect_right(self.ends, index)
        return self.tasks[number][index - (self.ends[number - 1] if number else 0)]


class TaskMixture(TaskSequence):
    """The examples of all tasks, shuffled with seed 42. Raises UserError when a task has none. Spec section 15.1."""

    def __init__(self, tasks: list[Task]):
        super().__init__(tasks)
        order = list(range(self.num_examples()))
        random.Random(42).shuffle(order)
        self.order = np.array(order)  # the list would be several times larger

    def get_example(self, index: int) -> dict:
        return super().get_example(int(self.order[index]))
