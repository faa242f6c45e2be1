import csv
import json
import random
import re
from pathlib import Path

import pytest
import yaml

from helpers import small_corpus, write_parquet
from nanochat.dataset import Corpus, parquets_iter_batched
from nanochat.offline_bundle import OFFLINE_BUNDLE_TASKS, phrase_examples, prepare_offline_bundle
from nanochat.runtime import UserError
from tasks.offline_tasks import OfflineMaterial

FIELDS = {
    "multiple_choice": {"query", "choices", "gold"},
    "schema": {"context_options", "continuation", "gold"},
    "language_modeling": {"context", "continuation"},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The small corpus, with a little documentation that has modules and names."""
    folder = tmp_path_factory.mktemp("corpus")
    corpus = small_corpus(folder)
    things = "matrix vector tensor graph token string number symbol".split()
    verbs = "Return Remove Replace Count Print Check".split()
    documents = [
        f"package.{thing}s\n\n" + "\n\n".join(f"{verb.lower()}_{thing}\n\n{verb} the {thing} that is first in the list."
                                              for verb in verbs)
        for thing in things
    ]  # fmt: skip
    texts = [text for batch in parquets_iter_batched("val", corpus=corpus) for text in batch]
    return Corpus("small", corpus.train_files, write_parquet(folder / "val.parquet", texts + documents))


@pytest.fixture(scope="module")
def bundle(corpus, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(tmp_path_factory.mktemp("base")))
        return Path(prepare_offline_bundle(corpus))


def tasks_of(bundle):
    """(entry of core.yaml, examples) of each task."""
    entries = yaml.safe_load((bundle / "core.yaml").read_text())["icl_tasks"]
    for entry in entries:
        lines = (bundle / "eval_data" / entry["dataset_uri"]).read_text().splitlines()
        yield entry, list(map(json.loads, lines))


def test_layout_and_fields(bundle):
    """A field or file that is named otherwise than in the published bundle cannot be evaluated."""
    assert sorted(path.name for path in bundle.iterdir()) == [
        "README.txt", "complete.json", "core.yaml", "eval_data", "eval_meta_data.csv"
    ]  # fmt: skip
    for entry, examples in tasks_of(bundle):
        assert set(entry) - {"continuation_delimiter"} == {"label", "dataset_uri", "num_fewshot", "icl_task_type"}
        assert all(set(example) == FIELDS[entry["icl_task_type"]] for example in examples)
        assert len(examples) > entry["num_fewshot"][0]
    assert {entry["icl_task_type"] for entry, _ in tasks_of(bundle)} == set(FIELDS)
    delimiters = {entry["label"]: entry.get("continuation_delimiter", " ") for entry, _ in tasks_of(bundle)}
    assert delimiters.items() <= {label: task[3] for label, *task in OFFLINE_BUNDLE_TASKS}.items()
    assert len(delimiters) >= 5


def test_the_evaluation_reads_it(bundle):
    """A bundle that the evaluation refuses is found out at the end of pretraining."""
    from nanochat.core_bundle import load_core_tasks

    assert [task.label for task in load_core_tasks(bundle)] == [entry["label"] for entry, _ in tasks_of(bundle)]


def test_baselines_are_what_guessing_scores(bundle):
    """With a wrong baseline a model that knows nothing does not score zero."""
    with open(bundle / "eval_meta_data.csv", newline="") as file:
        table = {row["Eval Task"]: row for row in csv.DictReader(file)}
    for entry, examples in tasks_of(bundle):
        row = table[entry["label"]]
        assert int(row["#datapoints"]) == len(examples) and int(row["#shots"]) == entry["num_fewshot"][0]
        if entry["icl_task_type"] == "language_modeling":
            assert row["Random baseline"] == "0"
            continue
        choices = [example.get("choices") or example["context_options"] for example in examples]
        assert {len(set(options)) for options in choices} == {100 // int(row["Random baseline"])}
        places = [example["gold"] for example in examples]
        counts = [places.count(place) for place in range(len(choices[0]))]
        assert max(counts) - min(counts) <= 1 and sum(counts) == len(places)


def test_right_answers_are_in_the_validation_text(bundle, corpus):
    """The wrong choice marked as gold, or a sentence put together wrongly, makes the task unsolvable."""
    documents = [text for batch in parquets_iter_batched("val", corpus=corpus) for text in batch]
    text = " ".join(re.sub("[*`]+", "", " ".join(documents)).split())
    for entry, examples in tasks_of(bundle):
        for example in examples:
            if entry["label"] == "documentation":
                module, name = example["query"].split("\n\n")
                section = f"\n\n{name}\n\n{example['choices'][example['gold']]}"
                assert any(document.startswith(module + "\n") and section in document for document in documents)
                continue
            if entry["label"] == "fitting_word":
                right = f"{example['query']} {example['choices'][example['gold']]}"
            elif entry["label"] == "repeat_words":
                assert example["context"] == f"Repeat these words: {example['continuation']}"
                continue
            else:
                options = example.get("context_options")
                right = f"{options[example['gold']] if options else example['context']} {example['continuation']}"
            assert " ".join(re.sub("[*`]+", "", right).split()) in text, entry["label"]


def test_wrong_choices_differ_in_one_word(bundle):
    """Choices that differ in length too can be told apart without reading them."""
    for entry, examples in tasks_of(bundle):
        for example in examples if entry["label"] == "fitting_word" else []:
            assert len({re.sub(r"^[\w']+", "", choice) for choice in example["choices"]}) == 1


def test_set_phrases_are_those_of_the_training_text():
    """A word that could as well be another one would make the score depend on luck."""
    known = OfflineMaterial(sentences=["It is as soon as possible."] * 3 + [f"It is on the {word}." for word in "abcd"])
    new = OfflineMaterial(sentences=["Call it back as soon as possible, or at once.", "Put the lid on the table now."])
    examples = list(phrase_examples(random.Random(0), new, known))
    assert all(example in [
        {"context": "Call it back as soon as", "continuation": "possible"},
        {"context": "Call it back as soon", "continuation": "as"},
    ] for example in examples) and len(examples) == 1  # fmt: skip


def test_last_words_occur_in_their_context(bundle):
    """A last word that the passage does not have before can only be guessed."""
    for entry, examples in tasks_of(bundle):
        for example in examples if entry["label"] == "last_word" else []:
            assert len(re.findall(rf"\b{example['continuation']}\b", example["context"])) >= 2


def test_prompts_are_short(bundle):
    """The smallest model reads 512 tokens; few-shot prompts beyond that are read wrongly or not at all."""
    for entry, examples in tasks_of(bundle):
        longest = max(len(json.dumps(example.get("query", example.get("context", "")))) for example in examples)
        longest += max(len(str(option)) for example in examples
                       for option in example.get("choices", example.get("context_options", [""])))  # fmt: skip
        longest += max(len(example.get("continuation", "")) for example in examples)
        assert longest * (1 + entry["num_fewshot"][0]) < 2000


def test_same_corpus_same_bytes(corpus, bundle, tmp_path, monkeypatch):
    """A bundle that differs from run to run makes scores that cannot be compared."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    again = Path(prepare_offline_bundle(corpus))
    for path in bundle.rglob("*"):
        assert path.is_dir() or path.read_bytes() == (again / path.relative_to(bundle)).read_bytes()


def test_plain_text_has_no_documentation_task(tmp_path, monkeypatch):
    """A corpus of novels has no modules, and a task without questions would stop the evaluation."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    entries = [entry["label"] for entry, _ in tasks_of(Path(prepare_offline_bundle(small_corpus(tmp_path / "text"))))]
    assert "documentation" not in entries and len(entries) >= 4


def test_text_without_sentences_is_refused(tmp_path, monkeypatch):
    """An empty bundle would be evaluated to no number at all."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    files = [write_parquet(tmp_path / f"{name}.parquet", ["das ist kein englischer Text"] * 9) for name in "ab"]
    with pytest.raises(UserError, match="plain English sentences"):
        prepare_offline_bundle(Corpus("mine", (files[0],), files[1]))
