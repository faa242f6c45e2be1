import json
import math
import re
import subprocess

import pytest

from nanochat.report import REPORT_SECTIONS, Report, SilentReport, get_report, section_slug


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


def test_every_section_is_collected_in_order_and_reset(report):
    """The original lost its SFT section: it was written under one name and looked for under another."""
    for section in reversed(("Golf", *REPORT_SECTIONS)):
        report.log(section, [f"body of {section}"])
    text = open(report.generate()).read()
    positions = [text.index(f"## {section}\n") for section in (*REPORT_SECTIONS, "Golf")]
    assert positions == sorted(positions) and text.index("## Summary") > positions[-1]
    assert (report.folder / "sft.md").exists()
    report.add_metrics("SFT", {"ChatCORE": 0.5})
    report.reset()
    assert sorted(path.name for path in report.folder.iterdir()) == ["header.md"]
    assert report.metrics() == {}


def test_files_of_others_survive_and_stay_out(report):
    """Resetting a report must not delete notes that a person keeps beside it."""
    report.log("SFT", ["x"])
    (report.folder / "notes.md").write_text("## my notes\nnot a section\n")
    assert "my notes" not in open(report.generate()).read()
    report.reset()
    assert (report.folder / "notes.md").exists() and not (report.folder / "sft.md").exists()


def test_header_appears_by_itself(report):
    """The original needed a separate reset command first, or lost the environment and the wall clock."""
    report.log("SFT", ["x"])
    text = open(report.generate()).read()
    assert text.startswith("# nanochat training report\n")
    assert "### Hardware" in text and "- PyTorch: " in text and "Run started: " in text
    assert "Total wall clock time: 0h0m" in text
    assert "### Git" not in text and "### Bloat" not in text


def test_git_and_bloat_inside_a_repository(report, tmp_path, monkeypatch):
    """A number whose code is unknown cannot be repeated; untracked files are not code."""
    repository = tmp_path / "repository"
    (repository / "sub").mkdir(parents=True)
    (repository / "sub" / "a.py").write_text("x = 1\ny = 2\n")
    (repository / "data.bin").write_text("no source file")
    (repository / "untracked.py").write_text("z = 3\n")
    monkeypatch.chdir(repository / "sub")
    git = ["git", "-C", str(repository), "-c", "user.name=n", "-c", "user.email=e@x"]
    for command in (["init", "-q"], ["add", "sub/a.py", "data.bin"], ["commit", "-q", "-m", "m" * 200]):
        subprocess.run([*git, *command], check=True)
    report.reset()
    text = open(report.generate()).read()
    assert re.search(r"- Commit: [0-9a-f]{7,} \(dirty\)", text)
    assert f"- Message: {'m' * 80}\n" in text
    summary = text.split("## Summary")[1]
    assert "- Characters: 12\n- Lines: 2\n- Files: 1\n- Tokens (approx): 3\n" in summary


def test_metric_table_reads_numbers_not_text(report):
    """A generated sample that happens to say "CORE: 99" must not become the result of the run."""
    report.log("Base model evaluation", ["sample 1: the CORE: 99 of the ARC-Easy: 98", {"CORE metric": 0.1}])
    report.add_metrics("Base model evaluation", {"CORE": 0.1251, "other": 7})
    report.add_metrics("Chat evaluation sft", {"ARC-Easy": 0.338, "ChatCORE": 0.2144, "MMLU": None})
    table = open(report.generate()).read().split("## Summary")[1].split("Total wall")[0].strip().split("\n")
    assert table == [
        "| Metric          | BASE     | SFT      | RL       |",
        "|-----------------|----------|----------|----------|",
        "| CORE            | 0.1251   | -        | -        |",
        "| ARC-Easy        | -        | 0.3380   | -        |",
        "| ChatCORE        | -        | 0.2144   | -        |",
    ]


def test_metrics_merge_and_are_json(report):
    """A second call must not lose the first one's numbers, and Infinity would make the file unreadable elsewhere."""
    report.add_metrics("SFT", {"a": 1, "b": 2})
    report.add_metrics("SFT", {"b": 3, "c": math.inf})
    report.add_metrics("Tokenizer training", {"time": 1.5})
    text = (report.folder / "metrics.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == report.metrics()
    assert report.metrics() == {"SFT": {"a": 1, "b": 3, "c": None}, "Tokenizer training": {"time": 1.5}}


def set_time(path, key, stamp):
    path.write_text(re.sub(rf"^{key}: .*$", f"{key}: {stamp}", path.read_text(), flags=re.MULTILINE))


def test_wall_clock_spans_the_run_without_rl(report):
    """Time counted to the wrong section would report an RL run of next week as training time."""
    for section in ("Base model training", "SFT", "Chat RL"):
        report.log(section, ["x"])
    set_time(report.folder / "header.md", "Run started", "2026-02-05 17:10:00")
    set_time(report.folder / "base-model-training.md", "timestamp", "2026-02-05 19:00:00")
    set_time(report.folder / "sft.md", "timestamp", "2026-02-06 03:25:59")
    assert "Total wall clock time: 10h15m" in open(report.generate()).read()
    set_time(report.folder / "header.md", "Run started", "2026-02-07 00:00:00")
    assert "Total wall clock time: unknown" in open(report.generate()).read()


def test_the_working_directory_is_written_to_only_when_asked(report, tmp_path):
    """A stray report.md overwrote a file of that name in whatever folder the run was started from."""
    report.log("Base model training", ["![loss](loss.png) and ![far](sub/dir.png)"])
    (report.folder / "loss.png").write_bytes(b"png")
    before = sorted(tmp_path.iterdir())
    path = report.generate()
    assert sorted(tmp_path.iterdir()) == before and path == str(report.folder / "report.md")
    report.generate(copy_to=tmp_path / "copy")
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == ["loss.png", "report.md"]


def test_says_what_did_not_run(report, capsys):
    """A report without its SFT section looks complete unless someone says so; RL is optional and not missed."""
    report.log("Base model training", ["x"])
    report.generate()
    line = capsys.readouterr().out.strip().split("\n")[-1]
    missing = "Tokenizer training, Tokenizer evaluation, Base model evaluation, CORE, SFT, Chat evaluation sft"
    assert line.endswith(f"(not run: {missing})")


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
    silent.generate()
    assert silent.metrics() == {"SFT": {"a": 1}}
    assert sorted(path.name for path in (tmp_path / "base" / "report").iterdir()) == ["metrics.json"]


def test_slugs_stay_inside_the_folder():
    """A model name with a slash in a section title must not become a path."""
    assert section_slug("Chat evaluation sft") == "chat-evaluation-sft"
    assert "/" not in section_slug("Base model (openai/gpt2) ../../x")
