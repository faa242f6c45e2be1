# %% [markdown]
# ## A CORE of your own
#
# CORE asks a base model twenty-two kinds of questions, from trivia to logic, and comes as a download. Without a
# network, this chapter makes a bundle of the same shape from the validation text of the corpus: six tasks, all three
# kinds of scoring, examples short enough for a context of 512 tokens. It measures what a model of four minutes can
# be expected to have learned (which word fits, which sentence belongs where, how a phrase goes on) and it is centred in
# the same way, so zero is chance and one is perfect. It is not the published number and must not be compared with it.

# %%
import csv
import io
import json
import random
import re
from collections import Counter
from pathlib import Path

from nanochat.dataset import Corpus, parquets_iter_batched
from nanochat.runtime import UserError, write_atomic
from tasks.offline_tasks import (
    MATERIAL_CHARACTERS,
    OfflineMaterial,
    choose_content_word,
    prepare_offline_folder,
    read_material,
    words_of_like_frequency,
)

OFFLINE_BUNDLE_RULES = 1  # raise it when a rule of this chapter changes: bundles of the old rules are then built anew
OFFLINE_EXAMPLES = 150  # of each task, where the corpus has enough text

# %% [markdown]
# ### Multiple choice
# Which of four words belongs into a sentence, and which of four sentences documents a name. The second question is
# asked in the very shape of a training document: the module, a blank line, the name, a blank line.
#
# A choice of the first kind is the word with the rest of the sentence, so that there is more to tell the right one by.


# %% tags=["folded"]
def fitting_word_examples(rng: random.Random, material: OfflineMaterial):
    """Yield {query, right, wrong}: the beginning of a sentence, and its end with four words about equally frequent."""
    for sentence in rng.sample(material.sentences, len(material.sentences)):
        word = choose_content_word(rng, material.long_words, sentence, skip=4)
        if word is not None and len(sentence) <= 120:
            wrong = words_of_like_frequency(rng, material.long_words, word, sentence, 3)
            start, end = re.split(rf" {word}(?=[ ,;:.])", sentence, maxsplit=1)
            yield {"query": start, "right": word + end, "wrong": [other + end for other in wrong]}


def documentation_examples(rng: random.Random, material: OfflineMaterial):
    """Yield {query, right, wrong}: a module and a name in it, its first sentence and three from other modules."""
    entries = [entry for entry in material.entries if len(entry[2]) <= 120]
    for module, name, sentence in rng.sample(entries, len(entries)):
        others = [entry[2] for entry in entries if entry[0] != module and entry[2] != sentence]
        if len(others) >= 3:
            yield {"query": f"{module}\n\n{name}", "right": sentence, "wrong": rng.sample(others, 3)}


# %% [markdown]
# ### Schema
# One ending, two beginnings: the model sees the same words twice and should find them less surprising after the
# beginning that they belong to.


# %% tags=["folded"]
def beginning_examples(rng: random.Random, material: OfflineMaterial):
    """Yield {continuation, right, wrong}: the second half of a sentence, and the first halves of two."""
    sentences = [sentence for sentence in material.sentences if 60 <= len(sentence) <= 140]
    rng.shuffle(sentences)
    halves = [(words[: len(words) // 2], words[len(words) // 2 :]) for words in map(str.split, sentences)]
    for (start, end), (other, _) in zip(halves, halves[1:] + halves[:1], strict=True):
        yield {"continuation": " ".join(end), "right": " ".join(start), "wrong": [" ".join(other)]}


# %% [markdown]
# ### Language modelling
# Here the model has to produce the continuation, so there should be only one: the word that completes a set phrase, the
# last word of a passage that has used this word at least twice, and words to be repeated. The last one needs a model
# that has learned to look back and copy, which the smallest ones have not.

# %% tags=["folded"]
ECHO_CHARACTERS = (150, 600)  # of the text before the last word


def last_word_examples(rng: random.Random, documents: list[str]):
    """Yield {context, continuation}: text up to a full stop, without its last word, which it has twice already.

    At most two of a document, none inside an example of code.
    """
    for document in rng.sample(documents, len(documents)):
        found = []
        for match in re.finditer(r"(?<=[a-z,] )([a-z]{4,})\.(?=\s|$)", document):
            start = document.find("\n\n", max(0, match.start() - ECHO_CHARACTERS[1])) + 2
            context = document[start : match.start()].strip()
            said = len(re.findall(rf"\b{match[1]}\b", context))
            if 1 < start < match.start() - ECHO_CHARACTERS[0] and said >= 2 and not re.search(">>>|::|--", context):
                found.append({"context": context, "continuation": match[1]})
        yield from rng.sample(found, min(2, len(found)))


def repetition_examples(rng: random.Random, material: OfflineMaterial):
    """Yield {context, continuation}: one to three words to be repeated in the same order."""
    while True:
        words = " ".join(rng.sample(material.long_words[:500], rng.randint(1, 3)))
        yield {"context": f"Repeat these words: {words}", "continuation": words}


def phrase_examples(rng: random.Random, material: OfflineMaterial, known: OfflineMaterial):
    """Yield {context, continuation}: a sentence up to a word that mostly follows the two before it in `known`."""
    followers = {}
    for sentence in known.sentences:
        words = sentence.rstrip(".").split()
        for first, second, third in zip(words, words[1:], words[2:], strict=False):
            followers.setdefault((first, second), Counter())[third] += 1
    fixed = {}
    for pair, counts in followers.items():
        word, count = counts.most_common(1)[0]
        if count >= 3 and count >= 0.6 * counts.total() and re.fullmatch("[a-z]{3,}", word) and word != "the":
            fixed[pair] = word
    for sentence in rng.sample(material.sentences, len(material.sentences)):
        words = sentence.split()
        ends = [i for i in range(4, len(words)) if fixed.get((words[i - 2], words[i - 1])) == words[i].rstrip(".,;:")]
        if ends:
            end = rng.choice(ends)
            yield {"context": " ".join(words[:end]), "continuation": words[end].rstrip(".,;:")}


# %% [markdown]
# ### `write_offline_bundle`
# The layout of the published bundle: `core.yaml` lists the tasks, `eval_meta_data.csv` has the accuracy of guessing,
# and each task is a file of JSON lines. The right answer stands equally often in each place.

# %% tags=["folded"]
# Label, folder, type, number of examples shown first, delimiter, accuracy of guessing in percent, description.
OFFLINE_BUNDLE_TASKS = (
    ("fitting_word", "language_understanding", "multiple_choice", 5, " ", 25,
     "The beginning of a sentence and four ways to go on, which differ in one word."),
    ("documentation", "world_knowledge", "multiple_choice", 0, "\n\n", 25,
     "A module, a name in it, and four sentences, one of which says what the name stands for."),
    ("beginnings", "language_understanding", "schema", 3, " ", 50,
     "The second half of a sentence and two beginnings, one of which belongs to it."),
    ("set_phrase", "language_understanding", "language_modeling", 0, " ", 0,
     "The beginning of a sentence; the word that completes a set phrase is to be predicted."),
    ("last_word", "language_understanding", "language_modeling", 0, " ", 0,
     "A passage whose last word, one that it has used before, is to be predicted."),
    ("repeat_words", "symbolic_problem_solving", "language_modeling", 10, "\nAnswer: ", 0,
     "One to three words to be repeated."),
)  # fmt: skip
FEWEST_EXAMPLES = 8  # a task with fewer is left out

OFFLINE_BUNDLE_README = """\
Tasks for base models, made by a program from the validation text of the corpus "{corpus}".

The layout is that of the CORE evaluation bundle, and none of its content: scores on these tasks cannot be compared
with published CORE scores. The licences of the corpus's sources apply to the sentences.

"""


def placed_example(kind: str, example: dict, index: int) -> dict:
    """The example in the fields of the bundle, with the right answer in place `index` modulo the number of choices."""
    if kind == "language_modeling":
        return example
    gold = index % (1 + len(example["wrong"]))
    options = [*example["wrong"][:gold], example["right"], *example["wrong"][gold:]]
    if kind == "schema":
        return {"context_options": options, "continuation": example["continuation"], "gold": gold}
    return {"query": example["query"], "choices": options, "gold": gold}


def different_examples(examples, count: int) -> list[dict]:
    """The first `count` different ones of an iterable of examples, which may be endless."""
    chosen = {}
    for example, _ in zip(examples, range(20 * count), strict=False):
        chosen.setdefault(json.dumps(example), example)
        if len(chosen) == count:
            break
    return list(chosen.values())


def write_offline_bundle(corpus: Corpus, folder: Path) -> None:
    """Write the bundle into `folder`. Raises UserError when the validation text is too short for one of the types."""
    known = read_material(corpus, "train")
    material, documents, characters = read_material(corpus, "val", known), [], 0
    for batch in parquets_iter_batched("val", corpus=corpus):
        documents += batch
        characters += sum(map(len, batch))
        if characters >= MATERIAL_CHARACTERS["val"]:
            break
    sources = {
        "fitting_word": (fitting_word_examples, material), "documentation": (documentation_examples, material),
        "beginnings": (beginning_examples, material), "set_phrase": (phrase_examples, material, known),
        "last_word": (last_word_examples, documents), "repeat_words": (repetition_examples, material),
    }  # fmt: skip
    configuration, readme, types = ["icl_tasks:"], OFFLINE_BUNDLE_README.format(corpus=corpus.name), set()
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["Eval Task", "Task Category", "Task Type", "#shots", "#datapoints", "Random baseline",
                     "Centered Metric?", "Description"])  # fmt: skip
    for label, category, kind, shots, delimiter, baseline, description in OFFLINE_BUNDLE_TASKS:
        make_examples, *inputs = sources[label]
        examples = different_examples(make_examples(random.Random(label), *inputs), OFFLINE_EXAMPLES)
        if len(examples) < FEWEST_EXAMPLES:
            continue
        lines = [json.dumps(placed_example(kind, example, index)) for index, example in enumerate(examples)]
        write_atomic(folder / "eval_data" / category / f"{label}.jsonl", "\n".join(lines) + "\n")
        configuration += [
            f"- label: {label}", f"  dataset_uri: {category}/{label}.jsonl", "  num_fewshot:", f"  - {shots}",
            f"  icl_task_type: {kind}",
        ]  # fmt: skip
        if delimiter != " ":
            configuration.append(f"  continuation_delimiter: {json.dumps(delimiter)}")
        row = [label, category.replace("_", " "), kind.replace("_", " "), shots, len(lines), baseline, "", description]
        writer.writerow(row)
        readme += f"{label:<18}{len(lines):>4} examples, {kind.replace('_', ' ')}, {shots} shown first. {description}\n"
        types.add(kind)
    if len(types) < 3:
        raise UserError(
            f"the validation text of {corpus.name} is too short to make an evaluation bundle of. Use the published "
            "bundle, or a corpus with more text."
        )
    write_atomic(folder / "core.yaml", "\n".join(configuration) + "\n")
    write_atomic(folder / "eval_meta_data.csv", table.getvalue())
    write_atomic(folder / "README.txt", readme)


# %% [markdown]
# ### `prepare_offline_bundle`
# The one call that the pipeline makes; a few seconds the first time.


# %% tags=["folded"]
def prepare_offline_bundle(corpus: Corpus) -> str:
    """Write an evaluation bundle in the layout of spec section 13.1 into <base>/offline_eval_bundle, once; its path.

    The same corpus gives the same bytes. Raises UserError when the validation text is too short.
    """
    inputs = {"corpus": corpus.fingerprint(), "rules": OFFLINE_BUNDLE_RULES, "examples": OFFLINE_EXAMPLES}
    return prepare_offline_folder("offline_eval_bundle", inputs, lambda folder: write_offline_bundle(corpus, folder))
