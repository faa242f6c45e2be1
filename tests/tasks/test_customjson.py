"""Conversations of one's own."""

import json
import re

import pytest
from task_files import talk

from nanochat.runtime import UserError
from tasks import customjson
from tasks.common import TaskMixture
from tasks.customjson import CustomJSON, identity_conversations

GOOD = json.dumps(talk("Who are you?", "A small model."))


def test_conversations_line_by_line(tmp_path):
    """A blank line or the mark that editors put at the start of a file being an error; a letter lost."""
    second = talk("¿Quién?", "Un modelo…", "And?", "That is all.")
    text = f"\ufeff{GOOD}\n\n  \n{json.dumps(second, ensure_ascii=False)}"
    (tmp_path / "mine.jsonl").write_text(text, encoding="utf-8")
    task = CustomJSON(tmp_path / "mine.jsonl")
    assert [conversation["messages"] for conversation in task] == [json.loads(GOOD), second]
    assert len(CustomJSON(str(tmp_path / "mine.jsonl"), stop=1)) == 1
    assert len(TaskMixture([task, task])) == 4


@pytest.mark.parametrize(
    "line, message",
    [
        ("[", "this is not JSON"),
        ("[" * 100_000, "recursion|not JSON"),
        ('{"messages": []}', "a list of messages"),
        ("[]", "at least one"),
        (json.dumps(talk("Hello")), "at least two messages"),
        (json.dumps(talk("Hi", "Hello", roles=("assistant", "user"))), "message 1 has the role 'assistant'"),
        (json.dumps(talk("Hi", "Hello", roles=("user", "user"))), "message 2 has the role 'user'"),
        (
            json.dumps(talk("x", "Hi", "Hello", roles=("system", "user", "assistant"))),
            "message 1 has the role 'system'",
        ),
        (json.dumps(talk("Hi", "Hello", roles=("user", "bot"))), "message 2 has the role 'bot'"),
        (json.dumps(talk("Hi", 5)), "message 2"),
        (json.dumps(talk("Hi", [{"type": "text", "text": "Hello"}])), "message 2 must have a string"),
        ('[{"role": "user", "text": "Hi"}, {"role": "assistant", "text": "Hello"}]', "message 1 is not a dict"),
        (b'["\xff"]', "utf-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    """Training for an hour and then failing at a line that nobody can find."""
    path = tmp_path / "mine.jsonl"
    path.write_bytes(f"{GOOD}\n\n".encode() + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    with pytest.raises(UserError, match=f"(?s){re.escape(str(path))}:3: .*{message}"):
        CustomJSON(path)


def test_a_missing_or_empty_file_is_an_error(tmp_path):
    """A model that learns nothing about itself, with only a hint on the console."""
    with pytest.raises(UserError, match=r"nothing.jsonl cannot be read .No such file"):
        CustomJSON(tmp_path / "nothing.jsonl")
    with pytest.raises(UserError, match="cannot be read"):
        CustomJSON(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="empty.jsonl has no conversations"):
        CustomJSON(tmp_path / "empty.jsonl")


def test_the_identity_conversations_are_fetched_on_demand(base, tmp_path, monkeypatch):
    """Zero identity conversations because the file was never fetched, or was fetched to another place."""
    asked = []

    def fetch(filename, url, data_dir=None):
        asked.append((filename, url, data_dir))
        (base / filename).write_text(GOOD)
        return str(base / filename)

    monkeypatch.setattr(customjson, "task_file", fetch)
    assert len(CustomJSON(base / "identity_conversations.jsonl")) == 1
    url = "https://karpathy-public.s3.us-west-2.amazonaws.com/identity_conversations.jsonl"
    assert asked == [("identity_conversations.jsonl", url, None)]
    monkeypatch.undo()
    (tmp_path / "identity_conversations.jsonl").write_text(GOOD)
    assert identity_conversations(str(tmp_path)) == str(tmp_path / "identity_conversations.jsonl")
    with pytest.raises(UserError, match="elsewhere/identity_conversations.jsonl is missing"):
        identity_conversations(str(tmp_path / "elsewhere"))
