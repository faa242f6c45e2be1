import json

import pytest
import torch

import nanochat.chat_eval as chat_eval
from helpers import run_ranks, small_tokenizer
from nanochat.chat_eval import (
    CHAT_TASKS,
    D12_CHAT_REFERENCE,
    ChatResult,
    chat_tasks_to_run,
    chatcore_metric,
    run_categorical_eval,
    run_chat_eval,
    run_generative_eval,
)
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.runtime import UserError
from nanochat.settings import CHAT_TASK_NAMES
from tasks.common import Task, multiple_choice_conversation

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


def small_gpt(seed=1):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(sequence_len=128, vocab_size=512, n_layer=2, n_head=2, n_kv_head=2, n_embd=32))
    model.init_weights()
    for parameter in model.parameters():  # with the starting weights all answers are alike
        if parameter.dim() == 2:
            parameter.data.normal_(std=0.3)
    return model.eval()


class Choices(Task):
    """Questions of different lengths with two to five letters."""

    eval_type = "categorical"

    def num_examples(self):
        return 23

    def get_example(self, index):
        letters = list("ABCDE"[: 2 + index % 4])
        question = "What is " + "very " * (index * 7 % 5) + f"number {index}?"
        return multiple_choice_conversation(
            question, letters, [f"it {letter}" for letter in letters], letters[index % 2]
        )

    def evaluate(self, conversation, completion):
        assert completion in conversation["letters"]
        return int(completion == conversation["messages"][-1]["content"])


class Writing(Task):
    """An answer passes when it has an even number of characters."""

    def num_examples(self):
        return 11

    def get_example(self, index):
        question = "Say " + "something " * (index * 5 % 4) + f"about {index}."
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "?"}]}

    def evaluate(self, conversation, completion):
        return int(len(completion) % 2 == 0)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_multiple_choice_is_what_one_question_at_a_time_gives(tokenizer, batch_size):
    """Padding that is looked at, or a letter of another question, shifts every mark by a little."""
    model, task = small_gpt(), Choices()
    expected = []
    for conversation in task:
        ids = tokenizer.render_for_completion(conversation)
        logits = model(torch.tensor([ids]))[0, -1]
        best = max(conversation["letters"], key=lambda letter: logits[tokenizer.encode(letter)[0]])
        expected.append(task.evaluate(conversation, best))
    result = run_categorical_eval("Choices", task, model, tokenizer, batch_size)
    assert (result.passed, result.total, result.new_tokens) == (sum(expected), 23, 0) and 0 < result.passed < 23
    assert [paper["passed"] for paper in result.papers] == [bool(one) for one in expected[:8]]
    assert result.papers[3]["question"].startswith("Multiple Choice question: What is very number 3?\n- it A=A\n")
    assert run_categorical_eval("Choices", task, model, tokenizer, 4, max_problems=5).total == 5


def test_an_answer_of_two_tokens_is_refused(tokenizer):
    """Comparing only the first token of an answer would grade another question."""

    class Numbers(Choices):
        def get_example(self, index):
            return multiple_choice_conversation("Which?", ["1", "zq"], ["one", "two"], "1")

    with pytest.raises(UserError, match=r"Numbers: the answer 'zq' is 2 tokens"):
        run_categorical_eval("Numbers", Numbers(), small_gpt(), tokenizer)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_written_answers_are_those_of_one_at_a_time(tokenizer, batch_size):
    """Answers that change with the batch size make two runs of the same model incomparable."""
    model, task, engine = small_gpt(), Writing(), Engine(small_gpt(), tokenizer)
    answers = []
    for conversation in task:
        prompt = tokenizer.render_for_completion(conversation)
        rows, _ = engine.generate_batch(prompt, max_tokens=12, temperature=0)
        answers.append(tokenizer.decode(rows[0][len(prompt) :]))
    result = run_generative_eval("Writing", task, model, tokenizer, batch_size, max_new_tokens=12)
    assert [paper["answer"] for paper in result.papers] == answers[:8]
    assert result.passed == sum(len(answer) % 2 == 0 for answer in answers) and result.total == 11
    assert 0 < result.passed < 11 and 11 <= result.new_tokens <= 11 * 12


def test_a_problem_passes_when_any_sample_does(tokenizer):
    """Counting samples instead of problems reports more than there are; counting only the first wastes the rest."""
    arguments = dict(max_new_tokens=6, temperature=1.0, batch_size=8)
    one = run_generative_eval("Writing", Writing(), small_gpt(), tokenizer, **arguments)
    many = run_generative_eval("Writing", Writing(), small_gpt(), tokenizer, num_samples=6, **arguments)
    assert one.total == many.total == 11 and one.passed < many.passed <= 11


def test_the_mean_is_centered_and_complete():
    """A mean over the tasks that happened to run is compared with means over all of them."""
    results = {
        name: ChatResult(name, round(10**6 * D12_CHAT_REFERENCE[name]), 10**6, 0, 0.0, []) for name in CHAT_TASKS
    }
    assert chatcore_metric(results) == pytest.approx(0.2144, abs=5e-5)  # the original's own number
    without = (0.117284 + 0.062571 + 0.070598 + 0.004549 + 0.054878) / 5
    assert chatcore_metric(results, with_spelling=False) == pytest.approx(without, abs=1e-5)
    del results["SpellingBee"]
    assert chatcore_metric(results) is None and chatcore_metric(results, with_spelling=False) is not None


def test_every_task_of_the_settings_can_be_run():
    """A name that the parameters accept and the evaluation does not know fails after hours of training."""
    assert tuple(CHAT_TASKS) == CHAT_TASK_NAMES


def test_programs_are_left_out_where_nothing_confines_them(monkeypatch):
    """Model-written code that runs unconfined because nobody looked at the level of the sandbox."""
    monkeypatch.setattr(chat_eval, "sandbox_level", lambda: ("none", "There is no sandbox here."))
    tasks, sentence = chat_tasks_to_run("")
    assert tasks == [name for name in CHAT_TASK_NAMES if name != "HumanEval"] and "allow_weak_sandbox" in sentence
    assert chat_tasks_to_run("HumanEval|GSM8K", allow_weak_sandbox=True)[0] == ["HumanEval", "GSM8K"]
    assert chat_tasks_to_run("GSM8K")[0] == ["GSM8K"]
    monkeypatch.setattr(chat_eval, "sandbox_level", lambda: ("full", "All is confined."))
    assert chat_tasks_to_run("") == (list(CHAT_TASK_NAMES), "All is confined.")


def test_a_task_without_problems_is_one_sentence(tokenizer, monkeypatch):
    """0 of 0 is a division by zero, after everything else has run."""
    monkeypatch.setitem(CHAT_TASKS, "GSM8K", lambda data_dir, allow_weak: Writing(stop=0))
    with pytest.raises(UserError, match="Writing has no examples"):
        run_chat_eval("GSM8K", small_gpt(), tokenizer)


TWO_RANKS = """
import json, sys
import torch
from nanochat.runtime import compute_init, compute_cleanup
import test_chat_eval as tests
from nanochat.chat_eval import run_categorical_eval, run_generative_eval
compute_init("cpu")
tokenizer = tests.small_tokenizer()
model = tests.small_gpt()
results = [
    run_categorical_eval("Choices", tests.Choices(), model, tokenizer, 4),
    run_generative_eval("Writing", tests.Writing(), model, tokenizer, 4, max_new_tokens=12),
]
print(json.dumps([[result.passed, result.total, result.new_tokens] for result in results]))
compute_cleanup()
"""


def test_two_processes_share_the_problems(tokenizer, tmp_path, monkeypatch):
    """Problems that both processes solve, or neither."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))

    outputs = run_ranks(f"import sys; sys.path.insert(0, {str(__file__.rpartition('/')[0])!r})\n{TWO_RANKS}")
    model = small_gpt()
    alone = [
        run_categorical_eval("Choices", Choices(), model, tokenizer, 4),
        run_generative_eval("Writing", Writing(), model, tokenizer, 4, max_new_tokens=12),
    ]
    expected = [[result.passed, result.total, result.new_tokens] for result in alone]
    assert [json.loads(output.splitlines()[-1]) for output in outputs] == [expected, expected]
