# %% [markdown]
# ## Your own conversations
#
# One JSON array of messages on each line of a file: the easiest way to teach a model something of yours. The default
# is a thousand conversations about who the model is and where it comes from, without which it would claim to be
# whichever model its training text talks about most.

# %%
import json
import os

from nanochat.runtime import UserError, get_base_dir
from tasks.common import Task, check_string_messages
from tasks.hub import task_file

# %% [markdown]
# ### `identity_conversations`
# Fetched once.

# %%
IDENTITY_FILE = "identity_conversations.jsonl"
IDENTITY_URL = f"https://karpathy-public.s3.us-west-2.amazonaws.com/{IDENTITY_FILE}"


def identity_conversations(data_dir: str | None = None) -> str:
    """The path of the identity conversations: in data_dir, or fetched into the base directory. Raises UserError."""
    return task_file(IDENTITY_FILE, IDENTITY_URL, data_dir)


# %% [markdown]
# ### `CustomJSON`
# Every line is checked at once. A file that is not there is an error: a model that was to learn who it is should not
# find out after the training that it did not.


# %%
class CustomJSON(Task):
    """Conversations of a JSONL file: [{"role", "content"}, ...] a line, user first, strings. Spec section 15.3.

    Blank lines are skipped. Raises UserError that names the line when one is not a conversation.
    """

    def __init__(self, filepath, **view):
        super().__init__(**view)
        self.filepath = os.fspath(filepath)
        if os.path.abspath(self.filepath) == os.path.abspath(os.path.join(get_base_dir(), IDENTITY_FILE)):
            identity_conversations()
        self.conversations = []
        try:
            with open(self.filepath, "rb") as file:
                for number, line in enumerate(file, start=1):
                    self.add_line(number, line)
        except OSError as error:
            raise UserError(
                f"the conversations {self.filepath} cannot be read ({error.strerror}). Check the path."
            ) from error
        if not self.conversations:
            raise UserError(f"{self.filepath} has no conversations: write one JSON array of messages on each line.")

    def add_line(self, number: int, line: bytes) -> None:
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if text:
                messages = json.loads(text)
                check_string_messages(messages)
                self.conversations.append(messages)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{self.filepath}:{number}: this is not JSON ({error.msg}, column {error.colno})."
            ) from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.filepath}:{number}: {error}.") from None

    def num_examples(self) -> int:
        return len(self.conversations)

    def get_example(self, index: int) -> dict:
        return {"messages": self.conversations[index]}
