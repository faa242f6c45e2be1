"""The contract of a task, the multiple-choice prompt, mixtures and sequences."""

import numpy as np
import pytest
from task_files import talk

from nanochat.runtime import UserError
from tasks.common import (
    Task,
    TaskMixture,
    TaskSequence,
    check_string_messages,
    evaluate_letter,
    multiple_choice_conversation,
    render_mc,
    require_choice,
    require_examples,
)


class Letters(Task):
    """Examples that say which one they are."""

    def __init__(self, letter, size, **view):
        super().__init__(**view)
        self.letter, self.size = letter, size

    def num_examples(self):
        return self.size

    def get_example(self, index):
        return f"{self.letter}{index}"


@pytest.mark.parametrize(
    "view, expected",
    [
        ({}, [0, 1, 2, 3, 4, 5, 6]),
        ({"start": 2}, [2, 3, 4, 5, 6]),
        ({"stop": 3}, [0, 1, 2]),
        ({"stop": 0}, []),
        ({"stop": 100}, [0, 1, 2, 3, 4, 5, 6]),
        ({"start": 1, "stop": 6, "step": 2}, [1, 3, 5]),
        ({"start": 1, "stop": 7, "step": 4}, [1, 5]),
        ({"start": 9}, []),
    ],
)
def test_a_view_selects_as_a_slice_does(view, expected):
    """The last example lost or read twice, everything selected by stop 0, or a crash beyond the end."""
    task = Letters("a", 7, **view)
    assert len(task) == len(expected)
    assert list(task) == [f"a{index}" for index in expected]  # iteration ends by IndexError


@pytest.mark.parametrize("view", [{"start": -1}, {"step": 0}, {"start": 3, "stop": 2}])
def test_views_that_make_no_sense(view):
    """An empty task, or a wrong one, because of a mistyped number."""
    with pytest.raises(ValueError, match="0 <= start <= stop and step >= 1"):
        Letters("a", 7, **view)


def test_an_index_is_an_int_from_zero_on():
    """task[-1] or task[:10] giving an example from outside the selected part."""
    task = Letters("a", 7, start=2, stop=4)
    for index in (-1, 2):
        with pytest.raises(IndexError, match=f"Letters has no example {index}: it has 2"):
            task[index]
    for index in (slice(0, 2), 1.0, "1", None):
        with pytest.raises(TypeError, match="indexed by an int"):
            task[index]


def test_the_multiple_choice_prompt():
    """A prompt other than everybody's, or a letter whose token is not that of the answer."""
    prompt = render_mc("What is wet?", ("A", "B"), ("The sun", "The sea"))
    assert prompt == (
        "Multiple Choice question: What is wet?\n"
        "- The sun=A\n"
        "- The sea=B\n"
        "\n"
        "Respond only with the letter of the correct answer."
    )
    conversation = multiple_choice_conversation("What is wet?", ("A", "B"), ("The sun", "The sea"), "B")
    assert conversation == {"messages": talk(prompt, "B"), "letters": ["A", "B"]}


def test_a_letter_is_judged():
    """A wrong letter counted as right, or a sentence quietly counted as wrong."""
    conversation = multiple_choice_conversation("Q", ("A", "B"), ("x", "y"), "B")
    assert evaluate_letter(conversation, "B") == 1 and evaluate_letter(conversation, "A") == 0
    for completion in ("C", "b", "", "The answer is B"):
        with pytest.raises(ValueError, match="none of A, B"):
            evaluate_letter(conversation, completion)


def test_a_mixture_is_shuffled_with_seed_42():
    """Another order of the training data than the original's: random.Random(42).shuffle of the pairs in task order."""
    twice = Letters("b", 4, start=1, step=2)
    mixture = TaskMixture([Letters("a", 3), twice, twice])
    assert len(mixture) == 7
    assert list(mixture) == ["a1", "b1", "b3", "a2", "b3", "a0", "b1"]
    assert list(TaskMixture([Letters("a", 3), twice, twice])) == list(mixture)
    with pytest.raises(IndexError):
        mixture[7]


def test_a_sequence_goes_through_one_task_after_the_other():
    """An example lost or repeated where one task ends and the next begins."""
    sequence = TaskSequence([Letters("a", 2), Letters("b", 1), Letters("c", 5, step=2)])
    assert list(sequence) == ["a0", "a1", "b0", "c0", "c2", "c4"]
    assert isinstance(TaskMixture([sequence])[0], str)


@pytest.mark.parametrize("kind", [TaskMixture, TaskSequence])
def test_a_task_without_examples_is_named(kind):
    """A mixture that silently lacks a task, as it lacked the identity conversations in the original."""
    empty = Letters("b", 5, start=5)
    with pytest.raises(UserError, match="Letters has no examples: start 5, stop None and step 1 select nothing from 5"):
        kind([Letters("a", 3), empty])
    with pytest.raises(UserError, match="no tasks"):
        kind([])
    with pytest.raises(UserError, match="Letters has no examples"):
        require_examples(empty)
    require_examples(Letters("a", 1))


def test_an_unknown_name_lists_those_there_are():
    """KeyError: 'tset'."""
    require_choice("Letters", "split", "test", ("train", "test"))
    with pytest.raises(UserError, match="Letters has no split 'tset'; it has: train, test"):
        require_choice("Letters", "split", "tset", ("train", "test"))


@pytest.mark.parametrize(
    "messages, message",
    [
        ({"role": "user"}, "a list of messages"),
        ([], "at least one"),
        (talk("hello"), "at least two messages"),
        (talk("be kind", "hello", roles=("system", "user")), "at least two messages|role 'system'"),
        (["hello", "hi"], "message 1 is not a dict"),
        ([{"role": "user"}, {"role": "assistant"}], "message 1 is not a dict"),
        (talk("hello", "hi", roles=("assistant", "user")), "message 1 has the role 'assistant' where 'user' belongs"),
        (talk("hello", "hi", roles=("user",)), "message 2 has the role 'user' where 'assistant' belongs"),
        (talk("hello", None), "message 2"),
        (talk("hello", [{"type": "text", "text": "hi"}]), "message 2 must have a string"),
        (talk(5, "hi"), "message 1 .*string"),
    ],
)
def test_what_is_not_a_conversation(messages, message):
    """Training on a conversation whose user speaks for the assistant."""
    for system_allowed in (False, True):
        with pytest.raises(ValueError, match=message):
            check_string_messages(messages, system_allowed)


def test_a_system_message_only_where_it_is_allowed():
    """A system message that is refused in SmolTalk, or taken for the user's in a file of your own."""
    messages = talk("be kind", "hello", "hi", roles=("system", "user", "assistant"))
    check_string_messages(messages, system_allowed=True)
    with pytest.raises(ValueError, match="message 1 has the role 'system' where 'user' belongs"):
        check_string_messages(messages)
    check_string_messages(talk("a", "b", "c", "d"))


def test_an_order_does_not_leak_numpy_numbers():
    """Tasks that take ints alone being asked for example numpy.int64(3)."""
    seen = []

    class Picky(Letters):
        def get_example(self, index):
            seen.append(type(index))
            return index

    list(TaskMixture([Picky("a", 3)]))
    assert seen == [int] * 3
    with pytest.raises(TypeError):
        Letters("a", 3)[np.int64(1)]
