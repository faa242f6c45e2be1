"""Spelling words and counting letters."""

import random
import string

import pytest
from task_files import talk

from nanochat.runtime import UserError
from tasks.spellingbee import (
    SPELLING_QUESTIONS,
    SimpleSpelling,
    SpellingBee,
    spelling_answer,
    spelling_question,
    spelling_words,
)

WORDS = ["apple", "banana", "cherry", "kiwi", "lemon"]


@pytest.fixture
def data_dir(tmp_path):
    (tmp_path / "words_alpha.txt").write_bytes("\r\n".join([*WORDS, ""]).encode())
    return str(tmp_path)


def test_the_word_list(data_dir, tmp_path):
    """Words with a carriage return at the end, which the public list has."""
    assert spelling_words(data_dir) == WORDS
    (tmp_path / "words_alpha.txt").write_text("\n".join(WORDS))
    assert spelling_words(data_dir) == WORDS


@pytest.mark.parametrize(
    "content, message",
    [
        ("apple\nApple\nkiwi\na\nb\n", r"words_alpha.txt:2: 'Apple' is not a word"),
        ("apple\n\nkiwi\na\nb\n", r"words_alpha.txt:2: '' is not a word"),
        ("apple\nice cream\nkiwi\na\nb\n", r"words_alpha.txt:2: 'ice cream'"),
        ("apple\ncafé\nkiwi\na\nb\n", r"words_alpha.txt:2: 'café'"),
        ("<html>Log in</html>", r"words_alpha.txt:1: '<html>Log in</html>'"),
        ("apple\nkiwi\n", r"words_alpha.txt has 2 words; at least 5"),
        ("", r"words_alpha.txt has 0 words; at least 5"),
    ],
)
def test_a_file_that_is_no_word_list(tmp_path, content, message):
    """Training on the letters of an error page."""
    (tmp_path / "words_alpha.txt").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        SpellingBee(data_dir=str(tmp_path))


def test_a_missing_word_list(tmp_path):
    """FileNotFoundError, or a download in an offline run."""
    with pytest.raises(UserError, match="words_alpha.txt is missing"):
        SimpleSpelling(data_dir=str(tmp_path))


def test_simple_spelling(data_dir):
    """Other words than the draws of the specification give, or a space between the letters."""
    # random.Random(42).shuffle makes kiwi, banana, cherry, lemon, apple of the list. The first draws of
    # random.Random(0), (1), ... from it:
    train = SimpleSpelling(size=4, data_dir=data_dir)
    assert train[0] == {"messages": talk("Spell the word: lemon", "lemon:l,e,m,o,n")}
    words = [c["messages"][0]["content"].removeprefix("Spell the word: ") for c in train]
    assert words == ["lemon", "banana", "kiwi", "banana"]
    # and of random.Random(10_000_000), (10_000_001), ...
    test = SimpleSpelling(size=4, split="test", data_dir=data_dir)
    words = [c["messages"][0]["content"].removeprefix("Spell the word: ") for c in test]
    assert words == ["cherry", "kiwi", "banana", "banana"]
    assert [train.evaluate(train[0], text) for text in ("lemon:l,e,m,o,n", "lemon:l,e,m,o", "l,e,m,o,n", "")] == [
        1, 0, 0, 0
    ]  # fmt: skip


def test_a_letter_counted(data_dir):
    """Another layout: a space before a letter makes it another token, and nothing of the spelling carries over."""
    # random.Random(4) draws banana, a letter of it: a, question 25 as it stands, no quotes, and a question mark
    conversation = SpellingBee(size=5, data_dir=data_dir)[4]
    user, assistant = conversation["messages"]
    assert user == {"role": "user", "content": "How many times must I type a to write banana?"}
    assert assistant["role"] == "assistant"
    assert assistant["content"] == [
        {
            "type": "text",
            "text": (
                "How many 'a' are in 'banana'? First I count by hand and spell the word:\n"
                "\n"
                "banana:b,a,n,a,n,a\n"
                "\n"
                "Now I look at each letter:\n"
                "\n"
                "1:b\n"
                "2:a hit! count=1\n"
                "3:n\n"
                "4:a hit! count=2\n"
                "5:n\n"
                "6:a hit! count=3\n"
                "\n"
                "That makes 3."
            ),
        },
        {"type": "text", "text": "\n\nLet me check with Python:\n\n"},
        {"type": "python", "text": "'banana'.count('a')"},
        {"type": "python_output", "text": "3"},
        {"type": "text", "text": "\n\nPython counts 3.\n\n#### 3"},
    ]
    assert len(conversation["messages"]) == 2


@pytest.mark.parametrize(
    "split, index, question, count",
    [
        ("train", 0, "count the letter \"i\" in 'kiwi'?", "2"),
        ("train", 3, "Work out how many times \"banana\" uses 'a'", "3"),
        ("train", 6, "lemonにoは何回出てきますか", "1"),
        ("test", 5, "'banana'에서 'n'는 몇 번 나오나요", "2"),
        ("test", 7, "lemon里有几个'b'", "0"),  # the letter came from the alphabet
        ("test", 0, "How many times does 'e' occur in cherry?", "1"),
    ],
)
def test_the_draws_come_in_the_order_of_the_specification(data_dir, split, index, question, count):
    """Other examples than the original's generator draws, and then other results."""
    task = SpellingBee(size=100, split=split, data_dir=data_dir)
    user, assistant = task[index]["messages"]
    assert user["content"] == question
    assert assistant["content"][3]["text"] == count
    assert assistant["content"][-1]["text"].endswith(f"#### {count}")


def test_the_questions():
    """A slot that was forgotten, so that the letter or the word is never named; fewer languages than promised."""
    assert len(SPELLING_QUESTIONS) == len(set(SPELLING_QUESTIONS)) == 51
    for question in SPELLING_QUESTIONS:
        assert {name for _, name, _, _ in string.Formatter().parse(question) if name} == {"letter", "word"}
    scripts = {"Chinese": slice(34, 38), "Korean": slice(38, 42), "Japanese": slice(48, 51)}
    for part in scripts.values():
        assert not any(question.isascii() for question in SPELLING_QUESTIONS[part])
    assert all(question.isascii() for question in SPELLING_QUESTIONS[:30])


def test_no_question_ends_in_two_marks():
    """Questions that end in ?? or ？?."""
    rng = random.Random(0)
    questions = [spelling_question(rng, "kiwi", "i") for _ in range(3000)]
    assert not any(question.endswith(("??", "？?", "??")) for question in questions)
    marked = sum(question.endswith(("?", "？")) for question in questions)
    assert len(questions) / 2 < marked < len(questions)
    assert any('"kiwi"' in question and "'i'" in question for question in questions)
    assert not any("{" in question for question in questions)


def test_the_count_is_right_for_any_word():
    """Hits that disagree with the final answer."""
    for word in ("a", "aaaa", "strawberry", "zzz"):
        for letter in "arz":
            manual, _, python, output, final = (part["text"] for part in spelling_answer(word, letter))
            assert output == str(eval(python)) == str(word.count(letter))
            assert manual.count("hit!") == word.count(letter) and final.endswith(f"#### {output}")
            assert f"\n{len(word)}:{word[-1]}" in manual


def test_answers_are_judged(data_dir):
    """A right count that is not counted."""
    task = SpellingBee(size=5, data_dir=data_dir)
    assert task.eval_type == "generative" and len(task) == 5
    assert [task.evaluate(task[4], text) for text in ("So\n\n#### 3", "#### 2", "3")] == [1, 0, 0]
    assert task.reward(task[4], "#### 3") == 1.0


def test_sizes_and_splits(data_dir):
    """The test words drawn with the seeds of the training words."""
    assert list(SpellingBee(size=10, data_dir=data_dir)) == list(SpellingBee(size=20, data_dir=data_dir, stop=10))
    assert list(SpellingBee(size=20, data_dir=data_dir)) != list(SpellingBee(20, "test", data_dir))
    with pytest.raises(UserError, match="SpellingBee has no split 'dev'; it has: train, test"):
        SpellingBee(split="dev", data_dir=data_dir)
    for size in (-1, 10_000_001):
        with pytest.raises(ValueError, match="size is"):
            SimpleSpelling(size=size, data_dir=data_dir)
