"""The corpus that is built from installed documentation."""

import importlib.metadata
import random
import re
import string
import sys
import textwrap

import pytest

from nanochat import offline_corpus
from nanochat.offline_corpus import (
    OfflineDocument,
    ParagraphFilter,
    collect_offline_documents,
    docstrings_of,
    documents_of_module,
    is_english,
    letters_of,
    offline_folders,
    offline_installation,
    offline_readme,
    split_offline_documents,
)
from nanochat.runtime import UserError


@pytest.fixture(scope="module")
def documents():
    """The beginning of the real corpus of this installation: enough to show every rule, in a second or two."""
    return collect_offline_documents(2_500_000)


def test_docstrings_come_with_names_in_source_order():
    """Text under the wrong heading, lost methods, or indentation left in."""
    source = textwrap.dedent('''
        """About the module."""
        if True:
            def early():
                """First."""
        class Thing:
            """A thing.

                indented more
            end
            """
            def method(self):
                """Does it."""
        async def late():
            """Last."""
    ''')
    assert list(docstrings_of(source, "m")) == [
        ("", "About the module."),
        ("early", "First."),
        ("Thing", "A thing.\n\n    indented more\nend"),
        ("Thing.method", "Does it."),
        ("late", "Last."),
    ]


def test_attached_docstrings_are_found():
    """The documentation of functions written in C missing, or with str.format placeholders in it."""
    source = textwrap.dedent(r'''
        add_docstr(torch.asin, r"""asin(input) -> Tensor

        .. math:: \frac{a}{\sqrt{b}}
        """ + r"""
        """ + r"""
        Returns the arcsine of {{1, 2}}.

        Args:
            {input}

        Example::
        """.format(**common))
        add_newdoc('numpy._core', 'flatiter', ('index',
            """
            Current flat index.
            """))
        print("""not documentation""")
    ''')
    found = dict(docstrings_of(source, "m"))
    assert found["torch.asin"].startswith(
        "asin(input) -> Tensor\n\n.. math:: \\frac{a}{\\sqrt{b}}\n\n\nReturns the arcsine of {1, 2}."
    )
    assert "{input}" not in found["torch.asin"] and "Example::" in found["torch.asin"]
    assert found["numpy._core.flatiter.index"] == "Current flat index."
    assert not any("not documentation" in text for text in found.values())


def test_topics_of_help_are_read():
    """The chapters of help(), the best prose of the standard library, missing because they are no docstrings."""
    assert list(docstrings_of("topics = {'b': 'second', 'a': 'first'}", "pydoc_data.topics"))[1:] == [
        ("a", "first"), ("b", "second")
    ]  # fmt: skip


@pytest.mark.parametrize("source", ["def f(:\n", "x = '\0'", "(" * 5000 + ")" * 5000])
def test_files_that_do_not_parse_are_passed_over(source):
    """One odd file in some package stopping the whole build."""
    assert list(docstrings_of(source, "m")) == []


def test_paragraph_filter_drops_copies_and_tables_and_keeps_short_ones():
    """A copied passage with another number in it counting as new text, or section headings dropped as duplicates."""
    keep = ParagraphFilter()
    passage = "This layer pads the input tensor with copies of its border in {} dimensions, so that it keeps its size."
    table = "\n".join("| 1.00 | 2.00 | 3.00 | -0.12 | 4.5 |" for _ in range(5))
    first = keep(f"{passage.format(1)}\n\nReturns\n-------\n\n{table}\n\nend")
    assert first == f"{passage.format(1)}\n\nReturns\n-------\n\nend"
    assert keep(f"{passage.format(2).upper()}\n \nReturns\n-------") == "Returns\n-------"


def test_english_is_told_from_lists():
    """Lists of names and of symbols in the corpus."""
    assert is_english("The size of the set is the number of elements that it has, and it can be found with len.")
    assert not is_english("Arcsin Benini Beta Cauchy Chi Dagum Davis Erlang Frechet Gamma Gumbel Laplace Levy Lomax")
    assert not is_english("")


def test_documents_are_cut_between_definitions():
    """Documents of 100,000 characters whose end no row of training tokens ever shows, or text lost at a cut."""
    generator = random.Random(0)
    bodies = [" ".join("".join(generator.choices(string.ascii_lowercase, k=6)) for _ in range(60)) for _ in range(40)]
    source = "\n".join(f'def f{index}():\n    """{body}"""' for index, body in enumerate(bodies))
    found = list(documents_of_module(source, "pkg.mod", ParagraphFilter()))
    assert len(found) > 3 and all(len(text) < 4000 and text.startswith("pkg.mod\n\nf") for text in found)
    assert all(any(body in text for text in found) for body in bodies)


def test_the_corpus_is_the_same_each_time(documents):
    """Two builds on one machine with different text: nothing later could be compared or resumed."""
    again = collect_offline_documents(1_000_000)
    assert again == documents[: len(again)] and len(again) > 100
    assert split_offline_documents(again) == split_offline_documents(list(again))


def test_the_corpus_is_documentation_of_several_sources(documents):
    """A package that is read in the wrong place, or a rule that throws nearly everything away."""
    assert sum(len(document.text) for document in documents) >= 2_500_000
    assert {"python", "numpy"} <= {document.source for document in documents}
    lengths = sorted(len(document.text) for document in documents)
    assert 500 < lengths[len(lengths) // 2] < 5000 and min(lengths) > 200
    assert all(is_english(document.text) for document in documents)
    letters = sum(len(letters_of(document.text)) for document in documents)
    assert letters > 0.6 * sum(len(document.text) for document in documents)


def test_validation_shares_no_passage_with_training(documents):
    """A model trained on what it is validated on: documents, long paragraphs, or all but a few words of one."""
    training, validation = split_offline_documents(documents)
    assert len(training) + len(validation) == len(documents)
    held_out = sum(len(document.text) for document in validation) / sum(len(document.text) for document in documents)
    assert 0.04 < held_out < 0.065

    def paragraphs(side):
        found = (letters_of(paragraph) for document in side for paragraph in re.split(r"\n\s*\n", document.text))
        return {paragraph for paragraph in found if len(paragraph) >= 100}

    assert not paragraphs(training) & paragraphs(validation)

    def runs(text):
        words = re.findall(r"\w+", text.lower())
        return {tuple(words[i : i + 13]) for i in range(len(words) - 12)}

    in_training = set().union(*(runs(document.text) for document in training))
    overlaps = [len(runs(d.text) & in_training) / max(1, len(runs(d.text))) for d in validation]
    assert max(overlaps) < 0.5 and sum(overlaps) / len(overlaps) < 0.1


def test_a_near_copy_goes_to_the_training_side():
    """A held-out document whose copy with one word in forty changed is trained on."""
    generator = random.Random(1)
    vocabulary = ["".join(generator.choices(string.ascii_lowercase, k=9)) for _ in range(3000)]
    groups = []
    for _ in range(100):
        words = generator.choices(vocabulary, k=200)
        changed = [[f"c{n}" if place % 40 == n else word for place, word in enumerate(words)] for n in (0, 9)]
        groups.append([OfflineDocument("x", " ".join(copy)) for copy in [words, *changed]])
    alone = [OfflineDocument("x", " ".join(generator.choices(vocabulary, k=200))) for _ in range(300)]
    documents = sum(groups, alone)
    training, validation = split_offline_documents(documents, held_out_share=0.3)
    assert sorted(training + validation, key=hash) == sorted(documents, key=hash)
    assert all(set(group) <= set(training) or set(group) <= set(validation) for group in groups)
    assert len(set(validation) & set(alone)) > 50


def test_the_installation_is_recognised(monkeypatch):
    """A corpus of old package versions or old rules taken for the current one."""
    before = offline_installation()
    assert before == offline_installation() and re.fullmatch("[0-9a-f]{16}", before)
    monkeypatch.setattr(offline_corpus, "OFFLINE_RULES", -1)
    assert offline_installation() != before
    monkeypatch.undo()
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version(name) + ("+x" if name == "numpy" else ""))
    assert offline_installation() != before


def test_nothing_is_imported():
    """Collecting text starting every scientific package, with its start-up time and its side effects."""
    before = set(sys.modules)
    offline_folders()
    collect_offline_documents(200_000)
    assert not {name.split(".")[0] for name in set(sys.modules) - before} & set(offline_corpus.OFFLINE_PACKAGES)


def test_too_little_documentation_is_said(monkeypatch, tmp_path):
    """An installation without sources: a crash, or a model trained on three sentences."""
    monkeypatch.setattr(offline_corpus, "offline_folders", lambda: {"python": [str(tmp_path)]})
    with pytest.raises(UserError, match="name another data source"):
        collect_offline_documents()


def test_readme_lists_the_sources():
    """A folder of text that nobody can tell the origin of."""
    text = offline_readme([OfflineDocument("numpy", "a" * 300)], [OfflineDocument("python", "b" * 100)])
    assert "400 characters in 1 training and 1 validation" in text
    assert re.search(r"numpy +300 characters +75\.0%\npython +100 characters +25\.0%", text)
