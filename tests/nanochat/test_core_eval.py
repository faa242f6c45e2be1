import json
import random
from pathlib import Path

import core_bundles
import core_reference
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import run_ranks, small_tokenizer
from nanochat import core_eval
from nanochat.core_bundle import CoreTask, load_core_tasks
from nanochat.core_eval import (
    CorePromptEncoder,
    ScoredSequence,
    centered_accuracy,
    common_prefix_length,
    core_log_line,
    core_prompts,
    core_question_order,
    cropped_sequence,
    draw_fewshot,
    evaluate_core,
    least_loss,
    score_examples,
    scored_sequences,
    token_batches,
)
from nanochat.runtime import UserError

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENIZER = small_tokenizer(400)
ORDER_OF_TEN = [0, 3, 7, 2, 1, 6, 4, 5, 8, 9]
DRAWS_OF_TWELVE = [[8, 2, 1], [1, 4, 8], [8, 10, 2]]


def task_of(kind: str, delimiter: str = " ", shots: int = 0, examples=(), path="some.jsonl", baseline=25.0) -> CoreTask:
    return CoreTask("a_task", kind, shots, delimiter, baseline, path, list(examples), list(range(1, len(examples) + 1)))


@pytest.fixture(scope="module")
def model():
    return core_bundles.small_gpt(TOKENIZER)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return core_bundles.write_core_bundle(tmp_path_factory.mktemp("core") / "bundle")


# Prompts, to the character


def test_multiple_choice_prompts():
    """A missing or doubled space changes the tokens, and with them every score."""
    item = {"query": "Sky is ", "choices": ["blue", " red\n"], "gold": 0}
    shot = {"query": "Grass is", "choices": ["pink", "green"], "gold": 1}
    assert core_prompts(task_of("multiple_choice", "\nAnswer: "), item, [shot, item]) == [
        "Grass is\nAnswer: green\n\nSky is \nAnswer: blue\n\nSky is \nAnswer: blue",
        "Grass is\nAnswer: green\n\nSky is \nAnswer: blue\n\nSky is \nAnswer:  red\n",
    ]
    assert core_prompts(task_of("multiple_choice"), item, []) == ["Sky is  blue", "Sky is   red\n"]


def test_schema_prompts():
    """The contexts vary and the continuation stays; the solved examples show the right context."""
    item = {"context_options": ["The cup", "The big cup"], "continuation": "fell.", "gold": 1}
    assert core_prompts(task_of("schema"), item, [item]) == [
        "The big cup fell.\n\nThe cup fell.",
        "The big cup fell.\n\nThe big cup fell.",
    ]


def test_language_modeling_prompts():
    """A space before the end of the shorter prompt would become a token that the longer one does not have."""
    item = {"context": "  2 + 2 = \n", "continuation": " 4 "}
    shot = {"context": "\t1 + 1 =", "continuation": "2"}
    assert core_prompts(task_of("language_modeling"), item, [shot]) == [
        "1 + 1 = 2\n\n2 + 2 =",
        "1 + 1 = 2\n\n2 + 2 =  4 ",
    ]
    assert core_prompts(task_of("language_modeling", "\nAnswer: "), item, []) == [
        "2 + 2 =\nAnswer:",
        "2 + 2 =\nAnswer:  4 ",
    ]


# Shuffle and draws


def test_order_of_questions():
    """Another shuffle is another exam, and scores of part of it could not be compared with anyone's."""
    data = list(range(10))
    random.Random(1337).shuffle(data)
    assert core_question_order(10) == data == ORDER_OF_TEN
    assert core_question_order(10, 4) == ORDER_OF_TEN[:4]
    assert core_question_order(10, 0) == core_question_order(10, -1) == core_question_order(10, 99) == ORDER_OF_TEN


def test_fewshot_draws():
    """The quick way to draw must give what drawing from a list of all the others gives, and never the question."""
    assert [draw_fewshot(i, 12, 3) for i in (0, 5, 11)] == DRAWS_OF_TWELVE
    for n, k in ((4, 3), (30, 10), (200, 10)):
        for position in range(n):
            others = [i for i in range(n) if i != position]
            assert draw_fewshot(position, n, k) == random.Random(1234 + position).sample(others, k)


# Tokens and spans


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("ab1.' \n\r\t\u00a0\u2028\x1c\x85é日\u200b🙂!?\u0301"), max_size=40))
def test_tokens_are_those_of_the_whole_prompt(text):
    """Remembering the tokens of a paragraph is only allowed where nothing around it can change them."""
    encoder = CorePromptEncoder(TOKENIZER)
    assert encoder.by_paragraph
    for _ in range(2):
        assert encoder.encode([text, text + "\n\na"]) == TOKENIZER.encode([text, text + "\n\na"], prepend="<|bos|>")


def test_other_split_patterns_are_not_cut():
    """GPT-2's pattern keeps two line feeds together at the end of a text and not before a word."""

    class Other:
        def get_bos_token_id(self):
            return 7

        def encode(self, texts, prepend):
            return [[prepend, len(text)] for text in texts]

    assert CorePromptEncoder(Other()).encode(["a\n\nb"]) == [[7, 4]]


def test_multiple_choice_spans():
    """Scored is what follows the part that all choices share, up to each one's own end."""
    a, b, c = [9, 1, 2, 3, 4], [9, 1, 2, 5], [9, 1, 2, 3]
    assert spans("multiple_choice", [a, b, c]) == [(3, 5), (3, 4), (3, 4)]
    assert spans("multiple_choice", [b[:3], b]) == [(3, 3), (3, 4)]  # the first begins the second: nothing to score
    assert spans("multiple_choice", [b, b]) == [(4, 4), (4, 4)]


def test_schema_spans():
    """Scored is the common end, which begins later in the longer text."""
    assert spans("schema", [[9, 1, 5, 6], [9, 2, 3, 5, 6]]) == [(2, 4), (3, 5)]
    assert spans("schema", [[9, 1, 5], [9, 1, 6]]) == [(3, 3), (3, 3)]
    assert spans("schema", [[9, 1], [9, 1]]) == [(0, 2), (0, 2)]


def test_language_modeling_span():
    """One sequence, scored from where the shorter prompt ends."""
    assert spans("language_modeling", [[9, 1, 2], [9, 1, 2, 3, 4]]) == [(3, 5)]
    for without, whole in (([9, 1], [9, 1]), ([9, 1, 2], [9, 1, 3, 4]), ([9, 1, 2], [9, 1])):
        with pytest.raises(UserError, match="some.jsonl, line 3: the tokens of the context are not the beginning"):
            scored_sequences("language_modeling", [without, whole], "some.jsonl, line 3")


def spans(kind, token_lists):
    return [(sequence.start, sequence.end) for sequence in scored_sequences(kind, token_lists, "here")]


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=5))
def test_common_prefix(lists):
    """An off-by-one here shifts every span."""
    longest = max(n for n in range(8) if all(row[:n] == lists[0][:n] and len(row) >= n for row in lists))
    assert common_prefix_length(lists) == longest


def test_cropping_keeps_the_end():
    """A model with a short context must lose the examples furthest from the question, and keep what is scored."""
    sequence = ScoredSequence([9, 1, 2, 3, 4], 3, 5)
    assert cropped_sequence(sequence, 5, "") is sequence
    assert cropped_sequence(sequence, 3, "") == ScoredSequence([2, 3, 4], 1, 3)
    with pytest.raises(UserError, match="line 8: 2 tokens are to be scored and the model reads at most 2"):
        cropped_sequence(sequence, 2, "line 8")


def test_least_loss():
    """The first of equals wins; a choice with nothing to score must not win by accident of its place later on."""
    nan = float("nan")
    assert [least_loss(x) for x in ([2.0, 1.0, 1.0], [1.0, nan], [nan, nan], [3.0, nan, 2.0])] == [1, 0, 0, 2]


def test_token_batches():
    """A batch over the budget runs out of memory; a question lost between batches is never answered."""
    sizes = [(2, 10), (2, 30), (1, 100), (2, 12), (0, 0), (2, 11)]
    batches = token_batches(sizes, 60)
    assert batches == [[4, 0, 5], [3], [1], [2]]
    assert token_batches([], 60) == []


# Whole tasks against the plain reference


def reference(model, task, **kwargs):
    answers = core_reference.reference_answers(
        model, TOKENIZER, "cpu", task.task_type, task.path, task.num_fewshot, task.delimiter, **kwargs
    )
    return [(correct, choice) for correct, choice, _ in answers]


@pytest.mark.parametrize("shared", [1, 10**9], ids=["cache", "whole sequences"])
@pytest.mark.parametrize("budget", [1, 150, 4096])
def test_answers_are_those_of_the_reference(model, bundle, monkeypatch, shared, budget):
    """Batches, padding and the shared cache may change the time and nothing else."""
    monkeypatch.setattr(core_eval, "MIN_SHARED_TOKENS", shared)
    monkeypatch.setattr(core_eval, "CORE_BATCH_TOKENS", {"cpu": budget})
    correct = 0
    for task in load_core_tasks(bundle):
        answers = score_examples(model, TOKENIZER, task, "cpu")
        assert [(answer.correct, answer.choice) for answer in answers] == reference(model, task), task.label
        assert sorted(answer.line_number for answer in answers) == list(range(1, 9))
        if task.task_type == "language_modeling":
            correct += sum(answer.correct for answer in answers)
    assert 0 < correct < 16  # a model that is always wrong would agree with anything


def test_max_per_task_draws_from_what_is_left(model, bundle):
    """The examples shown come from the questions that were kept, as in the original."""
    for task in load_core_tasks(bundle):
        answers = score_examples(model, TOKENIZER, task, "cpu", max_per_task=5)
        assert [(answer.correct, answer.choice) for answer in answers] == reference(model, task, max_per_task=5)


def test_losses_are_those_of_the_reference(model, bundle):
    """Equal choices could hide scores that are a little off."""
    for task in load_core_tasks(bundle):
        if task.task_type == "language_modeling":
            continue
        data = core_reference.exam(task.path)
        for position, item in enumerate(data):
            shots = core_reference.fewshot_examples(data, position, task.num_fewshot)
            prompts = CorePromptEncoder(TOKENIZER).encode(core_prompts(task, item, shots))
            sequences = scored_sequences(task.task_type, prompts, "here")
            [(_, losses)] = core_eval.score_questions(model, [sequences], True, torch.device("cpu"))
            _, _, expected = core_reference.answer(model, TOKENIZER, "cpu", task.task_type, item, shots, task.delimiter)
            torch.testing.assert_close(
                torch.tensor(losses), torch.tensor(expected), equal_nan=True, rtol=1e-4, atol=1e-4
            )


def test_nothing_is_computed_twice(model, bundle, monkeypatch):
    """The beginning that four choices share costs once; the head runs for scored positions alone."""
    task = next(task for task in load_core_tasks(bundle) if task.label == "choices3")
    read, scored = [], []
    trunk, head = model.trunk, model.head
    monkeypatch.setattr(model, "trunk", lambda ids, *args, **kw: read.append(ids.numel()) or trunk(ids, *args, **kw))
    monkeypatch.setattr(model, "head", lambda hidden: scored.append(len(hidden)) or head(hidden))
    monkeypatch.setattr(core_eval, "CORE_BATCH_TOKENS", {"cpu": 1})
    score_examples(model, TOKENIZER, task, "cpu")
    data = core_reference.exam(task.path)
    whole, distinct, positions = 0, 0, 0
    for index, item in enumerate(data):
        prompts = core_prompts(task, item, core_reference.fewshot_examples(data, index, 3))
        tokens, starts, ends = core_reference.tokens_and_spans("multiple_choice", prompts, TOKENIZER)
        whole += sum(map(len, tokens))
        different = {
            tuple(row): (start, end) for row, start, end in zip(tokens, starts, ends, strict=True) if end > start
        }
        positions += sum(end - start for start, end in different.values())
        distinct += sum(end - starts[0] for _, end in different.values())
        distinct += starts[0] - 1 if len(different) > 1 else max(ends) - 1 - (ends[0] - starts[0]) if different else 0
    assert sum(scored) == positions
    assert sum(read) < 0.5 * whole and sum(read) <= distinct + 8 * len(data)


def test_prompts_at_the_end_of_the_rotary_tables(bundle, monkeypatch):
    """Padding behind a short answer must not push a batch over the last position that the model has."""
    model = core_bundles.small_gpt(TOKENIZER)
    monkeypatch.setattr(core_eval, "MIN_SHARED_TOKENS", 1)
    task = next(task for task in load_core_tasks(bundle) if task.label == "choices3")
    data = core_reference.exam(task.path)
    longest = 0
    for index, item in enumerate(data):
        prompts = core_prompts(task, item, core_reference.fewshot_examples(data, index, 3))
        longest = max(longest, *(len(ids) + 1 for ids in TOKENIZER.encode(prompts)))
    expected = reference(model, task)
    model.cos, model.sin = model.cos[:, :longest], model.sin[:, :longest]
    answers = score_examples(model, TOKENIZER, task, "cpu")
    assert [(answer.correct, answer.choice) for answer in answers] == expected


def test_longer_prompts_lose_their_beginning(model, bundle):
    """Beyond the last position there is nothing to look up; the model reads the end of the prompt."""
    model, whole_model = core_bundles.small_gpt(TOKENIZER), model
    model.cos, model.sin = model.cos[:, :90], model.sin[:, :90]
    for task in load_core_tasks(bundle):
        data, different = core_reference.exam(task.path), []
        answers = score_examples(model, TOKENIZER, task, "cpu")
        for index, (item, answer) in enumerate(zip(data, answers, strict=True)):
            if len(set(item.get("context_options", "12"))) == 1:
                continue  # nothing to score, so nothing that has to be kept
            shots = core_reference.fewshot_examples(data, index, task.num_fewshot)
            expected = core_reference.answer(
                model, TOKENIZER, "cpu", task.task_type, item, shots, task.delimiter, max_seq_len=90
            )
            assert (answer.correct, answer.choice) == expected[:2]
            whole = core_reference.answer(whole_model, TOKENIZER, "cpu", task.task_type, item, shots, task.delimiter)
            different.append(whole[2] != expected[2])
        if task.label in ("choices3", "schema3"):
            assert any(different)  # some were cropped


def test_a_merged_token_is_named(model, tmp_path):
    """When context and continuation share a token nobody can say where the answer begins: which line was it?"""
    questions = [{"context": "one two", "continuation": " three"}, {"context": "over t", "continuation": "he hill"}]
    assert TOKENIZER.encode("over the hill")[: len(TOKENIZER.encode("over t"))] != TOKENIZER.encode("over t")
    bundle = core_bundles.write_core_bundle(tmp_path, [("merged", "language_modeling", 0, None, "0", questions)])
    core = (bundle / "core.yaml").read_text()
    (bundle / "core.yaml").write_text(core + "  continuation_delimiter: ''\n")
    with pytest.raises(UserError, match=r"merged.jsonl, line 2: the tokens of the context"):
        score_examples(model, TOKENIZER, load_core_tasks(bundle)[0], "cpu")


# Results


def test_centering():
    """0 must be guessing whatever the number of choices."""
    assert centered_accuracy(0.25, 25) == 0
    assert centered_accuracy(1.0, 62.0) == 1
    assert centered_accuracy(0.318064, 25.0) == pytest.approx(0.090752, abs=1e-6)  # spec section 0.4
    assert centered_accuracy(0.5309, 62.0) == pytest.approx(-0.2345, abs=5e-4)


def test_log_line():
    """Scripts read these lines."""
    expected = (
        "Evaluating: a_task                           (10-shot, type: multiple_choice)  ... "
        "accuracy: 0.3181 | centered: 0.0908 | time: 172.33s"
    )
    assert core_log_line(task_of("multiple_choice", shots=10), 0.318064, 0.090752, 172.329) == expected
    line = core_log_line(task_of("language_modeling", shots=10), 0, 0, 0)
    assert "(10-shot, type: language_modeling)... accuracy: 0.0000" in line


def test_evaluate_core(model, bundle, capsys):
    """The mean must be over centred accuracies, and every task must be in every column."""
    model.train()
    outcome = evaluate_core(model, TOKENIZER, torch.device("cpu"), bundle)
    assert model.training
    model.eval()
    tasks = load_core_tasks(bundle)
    for task in tasks:
        answers = reference(model, task)
        correct = sum(correct for correct, _ in answers)
        assert outcome["correct"][task.label] == correct and outcome["questions"][task.label] == len(answers)
        assert outcome["results"][task.label] == correct / len(answers)
        assert outcome["centered_results"][task.label] == centered_accuracy(correct / len(answers), task.baseline)
        assert outcome["seconds"][task.label] > 0
    assert outcome["core_metric"] == pytest.approx(sum(outcome["centered_results"].values()) / len(tasks))
    printed = capsys.readouterr().out.replace("\r", "\n").splitlines()
    assert sum(line.startswith("Evaluating: ") for line in printed) == len(tasks)


def test_an_interrupted_benchmark_goes_on_with_its_next_task(model, bundle, capsys):
    """Half an hour of answers that a closed tab throws away."""
    whole = evaluate_core(model, TOKENIZER, "cpu", bundle)
    kept = []

    def keep_two(done):
        kept.append(json.dumps(done))
        if len(kept) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_core(model, TOKENIZER, "cpu", bundle, keep=keep_two)
    capsys.readouterr()
    resumed = evaluate_core(model, TOKENIZER, "cpu", bundle, done=json.loads(kept[-1]))
    printed = capsys.readouterr().out.replace("\r", "\n").splitlines()
    assert sum(line.startswith("Evaluating: ") for line in printed) == len(whole["results"]) - 2
    for name in ("results", "centered_results", "correct", "questions", "core_metric"):
        assert resumed[name] == whole[name], name
    assert list(resumed["results"]) == list(whole["results"])


def test_max_per_task_too_small(model, bundle):
    """Three examples cannot be drawn from two others: said before the first task, not after the fifth."""
    with pytest.raises(UserError, match="choices3 asks each question after 3 others.*at least 4"):
        evaluate_core(model, TOKENIZER, "cpu", bundle, max_per_task=3)


RANKS_PROGRAM = """
import json, sys
sys.path.insert(0, sys.argv[2])
import core_bundles
from helpers import small_tokenizer
from nanochat.core_eval import evaluate_core
from nanochat.runtime import compute_cleanup, compute_init
*_, device = compute_init("cpu")
tokenizer = small_tokenizer(400)
outcome = evaluate_core(core_bundles.small_gpt(tokenizer), tokenizer, device, sys.argv[1], 7)
print("\\n" + json.dumps([outcome[name] for name in ("results", "correct", "questions", "core_metric")]))
compute_cleanup()
"""


def test_two_ranks_get_the_result_of_one(model, bundle):
    """Questions asked twice or by nobody when they are shared out; ranks that disagree on the score."""
    outcome = evaluate_core(model, TOKENIZER, "cpu", bundle, 7)  # odd: the ranks have unequal shares
    expected = [outcome[name] for name in ("results", "correct", "questions", "core_metric")]
    folder = Path(core_bundles.__file__).parent
    for printed in run_ranks(RANKS_PROGRAM, bundle, folder):
        assert json.loads(printed.splitlines()[-1]) == expected
