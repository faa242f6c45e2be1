import json
import math
import re
import subprocess

import pytest
from hypothesis import given, strategies
from markdown_it import MarkdownIt

from nanochat.report import (
    REPORT_SECTIONS,
    Report,
    SilentReport,
    code_span,
    fenced_text,
    get_report,
    plain_lines,
    report_lines,
    section_slug,
    without_folders,
)


@pytest.fixture
def report(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.chdir(tmp_path)  # no git repository: the header is quick
    return Report(tmp_path / "report")


def test_section_format(report):
    """Other readers of a section rely on its exact lines: spec section 3."""
    path = report.log(
        "Base model training",
        ["verbatim *text*", {}, None, "", {"lr": 0.02, "tokens": 12345678, "n": 9999, "flag": True, "x": None}],
    )
    assert path.endswith("base-model-training.md")
    lines = open(path).read().split("\n")
    assert lines[0] == "## Base model training"
    assert re.fullmatch(r"timestamp: \d{4}-\d\d-\d\d \d\d:\d\d:\d\d", lines[1])
    assert lines[2:] == [
        "", "verbatim *text*", "- lr: 0.0200", "- tokens: 12,345,678", "- n: 9999", "- flag: True", "- x: None", "",
    ]  # fmt: skip


def test_sections_come_in_order_and_are_reset(report):
    """The original lost its SFT section: it was written under one name and looked for under another."""
    for section in reversed(("Golf", *REPORT_SECTIONS)):
        report.log(section, [f"body of {section}"])
    assert list(report.sections()) == [section_slug(name) for name in (*REPORT_SECTIONS, "Golf")]
    assert report.sections()["sft"].read_text().endswith("\n\nbody of SFT\n")
    report.add_metrics("SFT", {"ChatCORE": 0.5})
    for name in ("report.md", "report.html"):
        (report.folder / name).write_text("of last time")
    report.reset()
    assert sorted(path.name for path in report.folder.iterdir()) == ["header.md"]
    assert report.metrics() == {} and report.sections() == {}


def test_files_of_others_survive_and_stay_out(report):
    """Resetting a report must not delete notes that a person keeps beside it."""
    report.log("SFT", ["x"])
    (report.folder / "notes.md").write_text("## my notes\nnot a section\n")
    assert list(report.sections()) == ["sft"]
    report.reset()
    assert (report.folder / "notes.md").exists() and not (report.folder / "sft.md").exists()


def test_header_appears_by_itself(report):
    """The original needed a separate reset command first, or lost the environment."""
    report.log("SFT", ["x"])
    text = (report.folder / "header.md").read_text()
    assert text.startswith("# nanochat training report\n") and text == report.header()
    assert "### Hardware" in text and "- PyTorch: " in text and "Run started: " in text
    assert "### Git" not in text and "### Bloat" not in text


HOSTILE = (
    "![x](http://evil.example/x.png)",
    "a `tick` and ``two``",
    "`",
    "``` ",
    "<script>alert(1)</script>",
    "| a | b |",
    "_emphasis_ and *more*",
    "[a link](http://evil.example)",
    "&lt;b&gt; \\",
    "one\n# heading\n```\nout\n````\n![x](x.png)\n</details>\n\n---\n| a |\n|---|\n",
    "\r## heading\r",
    "\x1b[31mred\x00",
    "\n\n\n",
    "    indented",
)


def spoken_by(markdown: str) -> str:
    """All text in `markdown`, and a failure unless it is one list of plain items with code in them."""
    tokens, words = MarkdownIt("commonmark").enable("table").parse(markdown), []
    allowed = {"bullet_list_open", "bullet_list_close", "list_item_open", "list_item_close", "paragraph_open"}
    for token in tokens:
        assert token.type in allowed | {"paragraph_close", "inline", "fence"}, token
        assert all(child.type in ("text", "code_inline") for child in token.children or ()), token
        words += [child.content for child in token.children] if token.children else [token.content]
    return "".join(words)


@pytest.mark.parametrize("text", HOSTILE)
def test_text_of_a_model_stays_text(text):
    """A sample with a heading, a table or a picture in it broke the page and could fetch from anywhere."""
    markdown = "\n".join(report_lines({"sample": text, "next": 1}))
    spoken = "".join(spoken_by(markdown).split())
    wanted = "".join(text.replace("\x1b", "\ufffd").replace("\x00", "\ufffd").split())
    assert spoken == f"sample:{wanted}next:1"


@given(strategies.text(alphabet="`~![]()<>|#*_-\\\n\r\t .:1ax&$", max_size=40))
def test_no_text_escapes_from_its_fence(text):
    """A fence that its own text can close is none."""
    tokens = MarkdownIt("commonmark").parse("\n".join([*fenced_text(text), "", "after"]))
    assert [token.type for token in tokens] == ["fence", "paragraph_open", "inline", "paragraph_close"]
    assert tokens[0].content.rstrip("\n") == plain_lines(text).rstrip("\n")
    spans = MarkdownIt("commonmark").parse(f"before {code_span(text)} after")[1].children
    assert [child.type for child in spans] == ["text", "code_inline", "text"]
    assert " ".join(spans[1].content.split()) == " ".join(text.split())


def test_git_and_bloat_inside_a_repository(report, tmp_path, monkeypatch):
    """A number whose code is unknown cannot be repeated; untracked files are not code."""
    repository = tmp_path / "repository"
    (repository / "nb_src").mkdir(parents=True)
    (repository / "nb_src" / "nanochat_speedrun.py").write_text("x = 1\ny = 2\n")
    (repository / "data.bin").write_text("no source file")
    (repository / "untracked.py").write_text("z = 3\n")
    monkeypatch.chdir(repository / "nb_src")
    git = ["git", "-C", str(repository), "-c", "user.name=n", "-c", "user.email=e@x"]
    for command in (["init", "-q"], ["add", "nb_src", "data.bin"], ["commit", "-q", "-m", "m" * 200]):
        subprocess.run([*git, *command], check=True)
    report.reset()
    text = report.header()
    assert re.search(r"- Commit: [0-9a-f]{7,} \(dirty\)", text)
    assert f"- Message: {'m' * 80}\n" in text
    assert "- Characters: 12\n- Lines: 2\n- Files: 1\n- Tokens (approx): 3\n" in text
    subprocess.run([*git, "mv", "nb_src/nanochat_speedrun.py", "secret_plans.py"], check=True)
    report.reset()
    assert "### Git" not in report.header() and "### Bloat" not in report.header(), "somebody's other project"


def test_metrics_merge_and_are_json(report):
    """A second call must not lose the first one's numbers, and Infinity would make the file unreadable elsewhere."""
    report.add_metrics("SFT", {"a": 1, "b": 2})
    report.add_metrics("SFT", {"b": 3, "c": math.inf})
    report.add_metrics("Tokenizer training", {"time": 1.5})
    text = (report.folder / "metrics.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"schema": 1} | report.metrics()
    assert report.metrics() == {"SFT": {"a": 1, "b": 3, "c": None}, "Tokenizer training": {"time": 1.5}}


def test_the_file_has_a_schema_and_an_order(report):
    """A program that reads the file next year must be able to tell whether the names still mean the same."""
    for section in ("Run", "Provenance", "SFT", "CORE openai-community-gpt2", "CORE", "Tokenizer training"):
        report.add_metrics(section, {"a": 1})
    names = list(json.loads((report.folder / "metrics.json").read_text()))
    assert names == [
        "schema", "Tokenizer training", "CORE", "CORE openai-community-gpt2", "SFT", "Run", "Provenance"
    ]  # fmt: skip
    assert json.loads((report.folder / "metrics.json").read_text())["schema"] == 1
    assert "schema" not in report.metrics()


def test_a_section_written_again_forgets_its_numbers(report):
    """Two exams taken with a new model stood beside four of the old one, under one ChatCORE."""
    report.add_metrics("SFT", {"a": 1})
    report.log("Chat evaluation sft", ["x"])
    report.add_metrics("Chat evaluation sft", {"MMLU": 0.25, "GSM8K": 0.5})
    report.log("Chat evaluation sft", ["x"])
    report.add_metrics("Chat evaluation sft", {"GSM8K": 1.0})
    assert report.metrics() == {"SFT": {"a": 1}, "Chat evaluation sft": {"GSM8K": 1.0}}


def test_another_provenance_is_another_run(report):
    """A second run in the same folder kept the start and the machine of the first, from days ago."""
    report.log("Tokenizer training", ["x"])
    header = report.folder / "header.md"
    for facts in ({"settings fingerprint": "4"}, {"settings fingerprint": "6"}, {"data fingerprint": "d"}):
        header.write_text("of another day")
        report.set_provenance(facts)
        assert "Run started: " in header.read_text()
        header.write_text("of this run")
        facts |= {"parameters": {"hub_repo": "name"}}
        report.set_provenance(facts)
        assert header.read_text() == "of this run", "the same run goes on, and is now uploaded"
        assert report.metrics()["Provenance"] == facts


def test_numbers_know_which_model_they_are_about(report):
    """A page that shows the last model's curve because nothing was left to train for this one."""
    report.add_metrics("SFT", {"fingerprint": "abc", "a": 1})
    assert report.is_about("SFT", {"fingerprint": "abc"})
    assert not report.is_about("SFT", {"fingerprint": "abd"}) and not report.is_about("CORE", {"fingerprint": "abc"})


@pytest.mark.parametrize(
    "value, shown",
    [
        ("/home/ann/diary", "…/diary"), ("../../home/ann/diary", "…/diary"), ("~ann/diary", "…/diary"), (".", "…/"),
        ("offline", "offline"), ("user/name", "user/name"), (3, 3), ("", ""),
    ],
)  # fmt: skip
def test_folders_are_nobodys_business(value, shown):
    """A report, or a repository on the hub, that tells the name of a user and where the files are."""
    assert without_folders(value) == shown


def test_other_ranks_read_but_do_not_write(report, tmp_path, monkeypatch):
    """Eight ranks writing one file leave the last one's numbers."""
    get_report().add_metrics("SFT", {"a": 1})
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    silent = get_report()
    assert isinstance(silent, SilentReport)
    silent.reset()
    silent.log("SFT", ["x"])
    silent.add_metrics("SFT", {"a": 2})
    silent.set_provenance({"parameters": {}})
    assert silent.metrics() == {"SFT": {"a": 1}}
    assert sorted(path.name for path in (tmp_path / "base" / "report").iterdir()) == ["metrics.json"]


def test_slugs_stay_inside_the_folder():
    """A model name with a slash in a section title must not become a path."""
    assert section_slug("Chat evaluation sft") == "chat-evaluation-sft"
    assert "/" not in section_slug("Base model (openai/gpt2) ../../x")
