"""General conversations."""

import pytest
from task_files import talk, write_split

from nanochat.runtime import UserError
from tasks.smoltalk import SmolTalk

REPO = "HuggingFaceTB/smol-smoltalk"


def test_conversations_are_used_as_they_are(tmp_path):
    """A system message lost, or the turns of a conversation changed."""
    system = talk("Be brief.", "Hello", "Hi", roles=("system", "user", "assistant"))
    plain = talk("One", "Two", "Three", "Four")
    write_split(tmp_path, REPO, "default", "train", [{"messages": plain, "source": "x"}], [{"messages": system}])
    task = SmolTalk("train", data_dir=str(tmp_path))
    assert task.eval_type == "generative" and len(task) == 2
    assert sorted((c["messages"] for c in task), key=len) == [system, plain]


@pytest.mark.parametrize(
    "messages, message",
    [
        (talk("Hello"), "row 1: a conversation has at least two messages"),
        (talk("Be brief.", "Hello", roles=("system", "user")), "row 1: a conversation has at least two messages"),
        (talk("Hello", "Hi", roles=("assistant", "user")), "row 1: message 1 has the role 'assistant'"),
        (
            [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": None}],
            'row 1: the column "messages"',
        ),
    ],
)
def test_a_bad_conversation_names_the_row(tmp_path, messages, message):
    """Training on a conversation without an answer."""
    write_split(tmp_path, REPO, "default", "test", [{"messages": messages}])
    with pytest.raises(UserError, match=f"00000.parquet, {message}"):
        SmolTalk("test", data_dir=str(tmp_path))[0]
    with pytest.raises(UserError, match="SmolTalk default has no split 'dev'; it has: train, test"):
        SmolTalk("dev", data_dir=str(tmp_path))
