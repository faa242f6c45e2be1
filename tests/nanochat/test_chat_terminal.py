import builtins
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nanochat.chat_terminal as chat_terminal
from helpers import small_tokenizer
from nanochat.chat_terminal import (
    SAMPLE_QUESTIONS,
    AnswerReader,
    answer_parts,
    chat_in_terminal,
    fit_conversation,
    sample_answers,
)
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.runtime import UserError

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENIZER = small_tokenizer()
NAMES = ("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>", "<|assistant_end|>")
PYTHON_START, PYTHON_END, OUTPUT_START, OUTPUT_END, END = map(TOKENIZER.encode_special, NAMES)


def small_gpt(sequence_len=256):
    torch.manual_seed(1)
    model = GPT(GPTConfig(sequence_len=sequence_len, vocab_size=512, n_layer=2, n_head=2, n_kv_head=2, n_embd=64))
    model.init_weights()
    for parameter in model.parameters():  # with the starting weights all answers are alike
        if parameter.dim() == 2:
            parameter.data.normal_(std=0.3)
    return model.eval()


def scripted(model, *tokens):
    """Make a model say these tokens, one each step, and then end."""
    said = iter(tokens)
    model.head = lambda hidden: (100 * torch.eye(512)[next(said, END)]).expand(*hidden.shape[:-1], 512)
    return model


def byte_tokens(text):
    """One token for each byte, so that no character of several bytes is in one piece."""
    return [TOKENIZER.encoding.encode_single_token(bytes([byte])) for byte in text.encode()]


def read_all(tokens, stops=()):
    reader = AnswerReader(TOKENIZER, stops)
    events = [reader.read(token) for token in tokens]
    return reader, events, reader.finish()


# Reading an answer


def test_characters_wait_for_their_last_byte():
    """A question mark in a diamond for every emoji and every accent that two tokens share."""
    text = "é ∑ 😀!"
    reader, events, rest = read_all(byte_tokens(text))
    assert ["".join(shown) for shown in events] == ["", "é", " ", "", "", "∑", " ", "", "", "", "😀", "!"]
    assert reader.text == text and rest == []
    reader, events, rest = read_all(byte_tokens("ab😀")[:-1])  # cut off by the limit
    assert reader.text == "ab" and rest == []
    reader, *_ = read_all([*byte_tokens("😀")[:2], *byte_tokens("ok")])  # never completed: one sign, and it goes on
    assert reader.text == "\ufffdok"


def test_special_tokens_are_no_text():
    """Markup of the calculator in the answer, as the original's chat showed it."""
    block = [PYTHON_START, *TOKENIZER.encode("12*3"), PYTHON_END, OUTPUT_START, *TOKENIZER.encode("36"), OUTPUT_END]
    user_end = TOKENIZER.encode_special("<|user_end|>")
    tokens = [*TOKENIZER.encode("It is "), *block, user_end, *TOKENIZER.encode("36.")]
    reader, events, rest = read_all(tokens)
    assert reader.text == "It is 36." and rest == []
    assert reader.calls == [{"expression": "12*3", "result": "36", "position": 6}]
    shown = [event for some in events for event in some]
    assert reader.calls[0] in shown and all("|" not in event for event in shown if isinstance(event, str))
    text_of_a_special = TOKENIZER.encode("<|user_end|>")
    assert read_all(text_of_a_special)[0].text == "<|user_end|>"  # spelled out it is text


@pytest.mark.parametrize(
    "tokens,text,calls",
    [
        ([PYTHON_START, *b"1/0", PYTHON_END, *b"ok"], "ok", [("1/0", None)]),
        ([*b"a", PYTHON_START, *b"1+1"], "a", [("1+1", None)]),  # cut off: no result, although it looks like a sum
        ([PYTHON_START, PYTHON_END, *b"ok"], "ok", []),
        ([PYTHON_START, *b"5+", PYTHON_START, *b"1+1", PYTHON_END, OUTPUT_START, *b"2"], "", [("1+1", "2")]),
        ([*b"a", OUTPUT_START, *b"7", OUTPUT_END, *b"b"], "a7b", []),  # nobody asked: the model's own words
        ([PYTHON_START, *b"x", PYTHON_END, OUTPUT_START, *b"7", OUTPUT_END], "7", [("x", None)]),
        ([PYTHON_END, *b"1+1"], "1+1", []),
        ([PYTHON_START, *b"1", OUTPUT_START, *b"+1", PYTHON_END, *b"z"], "z", [("1+1", None)]),
    ],
)
def test_calls_that_are_not_as_they_should_be(tokens, text, calls):
    """A result that the calculator did not give, or text that is swallowed by a block that never ends."""
    tokens = [TOKENIZER.encoding.encode_single_token(bytes([t])) if t < 256 else t for t in tokens]
    reader, *_ = read_all(tokens)
    assert reader.text == text and [(call["expression"], call["result"]) for call in reader.calls] == calls


@given(st.text("abc ", max_size=30), st.lists(st.text("abc ", min_size=1, max_size=4), max_size=3))
@settings(max_examples=300, deadline=None)
def test_text_ends_before_the_first_stop_string(text, stops):
    """A stop string that is split over tokens is overlooked, or its first half is shown."""
    reader, events, rest = read_all(byte_tokens(text), stops)
    ends = [text.index(stop) for stop in stops if stop in text]
    # Of two that overlap the one that is complete first counts, which begins at most a few characters later.
    shown = "".join(event for some in [*events, rest] for event in some)
    assert shown == reader.text and reader.stopped == bool(ends) and text.startswith(shown)
    assert not any(stop in shown for stop in stops)
    if ends:
        complete = min(text.index(stop) + len(stop) for stop in stops if stop in text)
        assert shown == text[: min(text[:complete].index(stop) for stop in stops if stop in text[:complete])]
    else:
        assert shown == text


def test_an_answer_goes_back_into_the_conversation_as_it_was():
    """A model that does not see its own calls forgets that it has a calculator."""
    answer = [
        *TOKENIZER.encode("It is "), PYTHON_START, *TOKENIZER.encode("2+2"), PYTHON_END, OUTPUT_START,
        *TOKENIZER.encode("4"), OUTPUT_END, *TOKENIZER.encode(" or "), PYTHON_START, *TOKENIZER.encode("x"), PYTHON_END,
    ]  # fmt: skip
    reader, *_ = read_all(answer)
    parts = answer_parts(reader.text, reader.calls)
    conversation = {
        "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": parts}],
    }
    ids, _ = TOKENIZER.render_conversation(conversation)
    assert ids[-len(answer) - 1 :] == [*answer, END]


# What fits


def turns(n, words=8):
    roles = ["user", "assistant"]
    return [{"role": roles[i % 2], "content": f"{i}: " + "some words " * words} for i in range(n)]


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be brief."}]])
def test_the_oldest_turns_are_left_out(system):
    """A conversation that grows past the context ends in an error deep inside of the model."""
    messages = [*system, *turns(21)]
    for context, max_tokens in [(128, 32), (128, 1000), (200, 10), (2000, 100)]:
        prompt, left_out = fit_conversation(TOKENIZER, messages, context, max_tokens)
        room = context - min(max_tokens, context // 4)
        expected = [*system, *turns(21)[left_out:]]
        assert left_out % 2 == 0 and len(prompt) <= room
        assert prompt == TOKENIZER.render_for_completion(
            {"messages": [*expected, {"role": "assistant", "content": ""}]}
        )
        if left_out:  # one turn more would not have fitted
            more = [*system, *turns(21)[left_out - 2 :], {"role": "assistant", "content": ""}]
            assert len(TOKENIZER.render_for_completion({"messages": more})) > room
        assert (left_out == 0) == (context == 2000)
    assert len(messages) == len(system) + 21


def test_a_message_that_is_too_long_is_said_with_numbers():
    """Cutting the question itself would answer another one."""
    with pytest.raises(UserError, match=r"the last message has \d+ tokens; the model's context is 64 and 16 of them"):
        fit_conversation(TOKENIZER, turns(3, words=40), 64, 500)
    with pytest.raises(ValueError, match="the last message has the role 'assistant'"):
        fit_conversation(TOKENIZER, turns(2), 640, 500)


# In the terminal


@pytest.fixture
def talk(monkeypatch, capsys):
    """Feed the chat with lines; an exception among them is raised at the prompt."""

    def run(model, *lines, **options):
        waiting = iter([*lines, EOFError()])

        def typed(prompt=""):
            line = next(waiting)
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr(builtins, "input", typed)
        chat_in_terminal(model, TOKENIZER, **options)
        return capsys.readouterr().out

    return run


def prompts_of(monkeypatch):
    """The prompts that the engine gets from now on."""
    heard, generate = [], Engine.generate
    monkeypatch.setattr(
        Engine, "generate", lambda self, tokens, *rest: heard.append(list(tokens)) or generate(self, tokens, *rest)
    )
    return heard


def test_a_chat_in_the_terminal(talk, monkeypatch):
    """Markers on the screen, or a model that has forgotten what was said before."""
    heard = prompts_of(monkeypatch)
    call = [PYTHON_START, *TOKENIZER.encode("2*21"), PYTHON_END]
    forced = [OUTPUT_START, *TOKENIZER.encode("42"), OUTPUT_END]
    said = [
        *TOKENIZER.encode("It is "),
        *call,
        *[0] * len(forced),
        *byte_tokens("∑\x1b[2J"),
        END,
        *byte_tokens("Yes"),
        END,
    ]
    shown = talk(scripted(small_gpt(), *said), "What?", "", "Sure?", "clear", "Again", "quit", "never read")
    assert "Model: It is [2*21 = 42]∑[2J\n" in shown and "Model: Yes\n" in shown and "<|" not in shown
    assert "\x1b" not in shown and "A new conversation." in shown
    first = TOKENIZER.render_for_completion(
        {"messages": turns(0) + [{"role": "user", "content": "What?"}, {"role": "assistant", "content": ""}]}
    )
    assert heard[0] == first and len(heard) == 3
    assert (
        heard[1][: len(first)] == first
        and [*call, *forced] == heard[1][len(first) + len(TOKENIZER.encode("It is ")) :][: len(call) + len(forced)]
    )
    assert len(heard[2]) < len(heard[1]) and heard[2][1:2] == heard[0][1:2]


def test_one_answer_for_a_prompt(talk):
    """A script that asks one question must not be asked for another."""
    assert talk(scripted(small_gpt(), *byte_tokens("Hello.")), AssertionError("asked"), prompt="Hi") == "Hello.\n"


def test_answers_differ_from_time_to_time(talk):
    """The original began each answer with the same seed, so asking again gave the same words."""
    answers = {talk(small_gpt(), prompt="Hi", max_tokens=12, temperature=1.5) for _ in range(4)}
    assert len(answers) > 1
    assert len({talk(small_gpt(), prompt="Hi", max_tokens=12, temperature=0) for _ in range(2)}) == 1


def test_ctrl_c_ends_an_answer_and_at_the_prompt_the_chat(talk, monkeypatch):
    """Stopping a long answer must not lose the conversation."""
    heard, model = prompts_of(monkeypatch), scripted(small_gpt(), *byte_tokens("abc"))
    head, calls = model.head, iter(range(100))

    def interrupted(hidden):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return head(hidden)

    model.head = interrupted
    shown = talk(model, "One", "Two", KeyboardInterrupt(), "never read")
    assert "Model: ab (stopped)\n" in shown and "Model: c\n" in shown
    assert heard[1][: len(heard[0])] == heard[0]  # the conversation goes on


def test_a_long_conversation_is_trimmed_and_said(talk, monkeypatch):
    """The original's chat ended in an assertion about rotary tables."""
    heard, model = prompts_of(monkeypatch), small_gpt(64)
    shown = talk(model, *[f"{i} some words, some more" for i in range(6)], "word " * 200, max_tokens=8)
    assert len(heard) == 6 and all(len(prompt) <= 64 - 8 for prompt in heard)
    assert "(The oldest 2 messages no longer fit into the context of 64 tokens.)" in shown
    assert "✗ the last message has" in shown
    with pytest.raises(UserError, match="the last message has"):
        talk(model, prompt="word " * 200)


def test_the_chat_ends_with_the_input(talk, monkeypatch):
    """A traceback as a farewell."""
    monkeypatch.setattr(chat_terminal, "fit_conversation", None)
    talk(small_gpt())
    talk(small_gpt(), "  exit ")


@pytest.mark.parametrize("sequence_len, fit", [(256, 4), (50, 3), (16, 0)])
def test_sample_answers_are_those_of_the_chat(sequence_len, fit):
    """Samples in the report that the chat would never give; a run that fails because a question is too long for it."""
    model, tokenizer = small_gpt(sequence_len), TOKENIZER
    samples = sample_answers(model, tokenizer, max_tokens=12)
    assert len(samples) == fit and {sample["question"] for sample in samples} <= set(SAMPLE_QUESTIONS)
    for sample in samples:
        asked = [{"role": "user", "content": sample["question"]}]
        prompt, _ = fit_conversation(tokenizer, asked, model.config.sequence_len, 12)
        results, _ = Engine(model, tokenizer).generate_batch(prompt, max_tokens=12, temperature=0)
        reader = AnswerReader(tokenizer)
        for token in results[0][len(prompt) :]:
            reader.read(token)
        reader.finish()
        assert re.sub("⟦[^⟧]*⟧", "", sample["answer"]) == reader.text
