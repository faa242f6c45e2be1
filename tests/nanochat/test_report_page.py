import base64
import html.parser
import json
import re

import pytest

from nanochat.chat_eval import D12_CHAT_REFERENCE
from nanochat.core_report import GPT2_CORE, ORIGINAL_D12_CENTERED
from nanochat.report import REPORT_SECTIONS, Report, SilentReport
from nanochat.report_page import (
    generate_report,
    report_html,
    spoken_count,
    spoken_list,
    spoken_price,
    spoken_seconds,
)

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
HOSTILE = (
    "![x](http://evil.example/x.png) ![y](loss.png) <img src=http://evil.example> <script>alert(1)</script>\n"
    "```\n## Summary\n| CORE | 99 |\n|---|---|\n</details></main><iframe src='//evil.example'></iframe>\n"
    "[a](javascript:alert(1)) ````\n![z](loss.png)\n"
)
PARAMETERS = {"depth": 4, "data_source": "offline", "task_source": "offline", "skip": "", "price_per_hour": 0.0}


@pytest.fixture
def report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no git repository: the header is quick
    return Report(tmp_path / "report")


def log_section(report, section, metrics, facts=()):
    report.log(section, [metrics, *facts])
    report.add_metrics(section, metrics)


def log_tokenizer(report, real=False):
    log_section(report, "Tokenizer training", {"wall seconds": 60.0})
    report.log("Tokenizer evaluation", ["| a | b |\n|---|---|\n| 1 | 2 |"])


def log_pretraining(report, real=False):
    facts = {"Number of parameters": 7340296, "Number of training tokens": 1720320, "training seconds": 196.4}
    facts |= {"model config": {"n_layer": 4, "n_embd": 256}, "wall seconds": 240.0}
    log_section(report, "Base model training", facts, ["![training](loss.png)"])
    (report.folder / "loss.png").write_bytes(PNG)


def log_evaluation(report, real=False):
    facts = {"model": "d4", "val bpb": 1.5153185, "same bytes bpb": 1.5970347, "zlib -9": 2.6258, "xz -9e": 2.1621}
    log_section(report, "Base model evaluation", facts | {"wall seconds": 14.0}, [{"sample 0": HOSTILE}])
    samples = [f"The opposite of cold is {HOSTILE}", "If 3*x + 4 = 19, then x is 5", HOSTILE]
    report.add_metrics("Base model evaluation", {"samples": samples, "unconditioned": [HOSTILE] * 3})


def log_core(report, real=False):
    scores = {label: 0.2 for label in ORIGINAL_D12_CENTERED} if real else {"last_word": 0.12345}
    log_section(report, "CORE", {"model": "d4", "CORE" if real else "CORE offline": 0.17654} | scores)
    report.add_metrics("CORE", {"questions": {label: 50 for label in scores}, "wall seconds": 4.0})


def log_tuning(report, real=False):
    facts = {"Number of conversations": 25804, "Final validation bpb": 1.0179, "training seconds": 140.0}
    log_section(report, "SFT", facts | {"wall seconds": 160.0}, ["![fine-tuning](gone.png)"])


def log_chat(report, real=False):
    scores = {task: 0.3 for task in D12_CHAT_REFERENCE} | {"ChatCORE": 0.2468, "ChatCORE without SpellingBee": 0.1357}
    log_section(report, "Chat evaluation sft", scores)
    extra = {"exams": "hub" if real else "offline", "problems": {task: 200 for task in D12_CHAT_REFERENCE}}
    extra |= {"base model": {"MMLU": 0.2512}, "base problems": {"MMLU": 128}, "wall seconds": 20.0}
    report.add_metrics("Chat evaluation sft", extra)


def log_chat_samples(report, real=False):
    answer = "2+2 = ⟦2+2 → 4⟧4 " + HOSTILE
    report.add_metrics("Chat samples", {"samples": [{"question": f"What? {HOSTILE}", "answer": answer}]})


STAGES = (log_tokenizer, log_pretraining, log_evaluation, log_core, log_tuning, log_chat, log_chat_samples)


def pages(report, stages=STAGES, real=False, **parameters):
    """(report.md, report.html, metrics.json) after these stages."""
    for stage in stages:
        stage(report, real)
    given = PARAMETERS | {"task_source": "hub" if real else "offline"} | parameters
    report.set_provenance({"follows": "nanochat 5fdd5cd", "source hash": "abc123", "parameters": given})
    generate_report(report)
    texts = [(report.folder / name).read_text() for name in ("report.md", "report.html", "metrics.json")]
    return *texts[:2], json.loads(texts[2], parse_constant=pytest.fail)


class Elements(html.parser.HTMLParser):
    """Every element of a page with its attributes; the text outside <style>; whether the elements are well nested."""

    def __init__(self, page):
        super().__init__()
        self.found, self.open, self.text = [], [], ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if self.open and self.open[-1] != "style" else ""


@pytest.mark.parametrize(
    "stages",
    [(), *(STAGES[:n] for n in range(1, len(STAGES) + 1)), *((stage,) for stage in STAGES[1:]),
     tuple(stage for stage in STAGES if stage is not log_core)],
    ids=lambda stages: "+".join(stage.__name__.removeprefix("log_") for stage in stages) or "nothing",
)  # fmt: skip
@pytest.mark.parametrize("real", [False, True], ids=["offline", "hub"])
def test_a_page_comes_from_whichever_stages_ran(report, stages, real, capsys):
    """A run without CORE, or one that stopped after the tokenizer, ended without any page."""
    markdown, page, metrics = pages(report, stages, real)
    assert markdown.startswith("# nanochat training report\n")
    for title in ("At a glance", "Environment", "Provenance", "Summary"):
        assert f"\n## {title}\n" in markdown
    ran = [path.read_text().split("\n", 1)[0] for path in report.sections().values()]
    assert all(f"\n{title}\n" in markdown for title in ran)
    positions = [markdown.index(f"\n{title}\n") for title in ran]
    assert positions == sorted(positions)
    assert "None" not in re.sub(r"(?s)### Parameters.*?## Summary|GPUs: None", "", markdown)
    assert [tag for tag, _ in Elements(page).found].count("details") == len(ran) + 1  # and the parameters
    missing = [name for name in REPORT_SECTIONS[:-2] if f"## {name}" not in ran]
    line = capsys.readouterr().out.strip().split("\n")[-1]
    assert line.endswith(f"(not run: {', '.join(missing)})" if missing else "report.html")


def test_a_page_without_provenance_or_metrics(report):
    """A folder that an older or an interrupted run left has sections and nothing else."""
    report.log("SFT", ["x"])
    generate_report(report)
    markdown = (report.folder / "report.md").read_text()
    assert "\n## SFT\n" in markdown and "## Provenance" not in markdown
    assert "Total wall clock time: unknown" in markdown


def test_what_a_model_wrote_is_text(report):
    """A sample could run a program in the reader's browser, fetch a picture from anywhere or forge a result."""
    markdown, page, _ = pages(report)
    elements = Elements(page)
    allowed = {"html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "h3", "p", "ul", "li", "div"}
    allowed |= {"table", "thead", "tbody", "tr", "th", "td", "strong", "code", "pre", "img", "details", "summary"}
    assert {tag for tag, _ in elements.found} == allowed
    assert sum(tag == "img" for tag, _ in elements.found) == 1, "the training curve, and none of a sample"
    assert elements.text.count("<script>alert(1)</script>") >= 7 and "javascript:alert(1)" in elements.text
    assert [tag for tag, _ in elements.found].count("h2") == 7 + len(report.sections())
    assert "⟦2+2 → 4⟧" in elements.text
    table = markdown[markdown.rindex("## Summary") :]
    assert "99" not in table


def test_the_page_needs_nothing_else(report):
    """A page whose pictures or fonts lie elsewhere is broken in the mail, or tells a server who reads it."""
    _, page, _ = pages(report)
    elements = Elements(page)
    for tag, attributes in elements.found:
        assert not {"href", "srcset", "action", "onerror", "onload", "data"} & set(attributes), (tag, attributes)
        if "src" in attributes:
            assert attributes["src"] == "data:image/png;base64," + base64.b64encode(PNG).decode()
            assert attributes["alt"].startswith("Training loss")
    assert "url(" not in page and "@import" not in page
    policy = [attributes["content"] for tag, attributes in elements.found if "http-equiv" in attributes]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert "prefers-color-scheme: dark" in page and "@media print" in page and 'name="viewport"' in page
    assert "<title>nanochat d4 report</title>" in page


def test_pictures_from_elsewhere_and_missing_ones(report, tmp_path):
    """A broken icon, or a file from outside the folder in a page that goes to a friend."""
    markdown, page, _ = pages(report)
    assert "(The picture gone.png is missing.)" in markdown and "(The picture gone.png is missing.)" in page
    assert "](gone.png)" not in markdown and "gone.png" in (report.folder / "sft.md").read_text()
    (tmp_path / "secret.png").write_bytes(PNG)
    sources = ("../secret.png", f"{tmp_path}/secret.png", "http://evil.example/loss.png", "no.png", "")
    for source in sources:
        body = report_html(f"![x]({source})", report.folder, "t").split("<main>")[1]
        assert "<img" not in body and "is missing" in body
    assert "<img" in report_html("![x](loss.png)", report.folder, "t").split("<main>")[1]


def test_published_scores_stand_only_beside_published_exams(report):
    """Offline exams share names with the real ones; beside GPT-2's score theirs would be a lie."""
    markdown, _, _ = pages(report, real=True)
    assert "| original d12 |" in markdown and f"| GPT-2 355M | {GPT2_CORE['GPT-2 355M']:.4f} |" in markdown
    assert "| **ChatCORE** |  | 0.0000 |  | 0.2468 | 0.2144 |" in markdown  # the original's, spec section 0.7
    assert "| copa | 50 | 0.2000 | 0.2000 |" in markdown and "| **CORE** |  | 0.1765 | 0.1251 |" in markdown
    assert "offline" not in markdown.split("## Samples")[0]
    means = markdown.split("### CORE\n")[1].split("| task |")[0]
    order = re.findall(r"^\| (.+) \| \d", means, re.MULTILINE)
    assert order == ["GPT-2 124M", "the original d12", "**this model**", "GPT-2 355M", "GPT-2 774M", "GPT-2 1.6B"]
    for stages in (STAGES, (log_chat,), (log_core,)):
        report.reset()
        markdown, _, _ = pages(report, stages)
        assert "original d12" not in markdown and "GPT-2" not in markdown and "offline" in markdown
    report.reset()
    log_chat(report)
    report.add_metrics("Chat evaluation sft", {"exams": None})
    generate_report(report)
    assert "original d12" not in (report.folder / "report.md").read_text(), "who does not know may not compare"


def test_a_part_of_core_has_no_mean_to_compare(report):
    """The mean over two easy tasks stood beside GPT-2's mean over 22."""
    report.add_metrics("CORE", {"CORE": 0.3, "copa": 0.4, "piqa": 0.2})
    markdown, _, _ = pages(report, ())
    assert "| copa | 0.4000 | 0.2000 |" in markdown and "| **CORE** | 0.3000 |  |" in markdown
    assert "GPT-2" not in markdown


def test_fewer_questions_are_said(report):
    """Ten questions of each task compared with ten thousand, silently."""
    markdown, _, _ = pages(report, real=True, core_max_per_task=50, max_problems=200)
    assert "This model got 50 questions of each task at most" in markdown
    assert "This model got 200 problems of each exam at most" in markdown
    assert "The base model got the first 128 problems" in markdown


def test_another_model_gets_its_column(report):
    """The comparison that someone asked for, and that took half an hour, was not on the page."""
    scores = {label: 0.111 for label in ORIGINAL_D12_CENTERED} | {"model": "openai-community/gpt2", "CORE": 0.1139}
    log_section(report, "CORE openai-community-gpt2", scores)
    markdown, _, _ = pages(report, real=True, compare_model="openai-community/gpt2")
    assert "| `openai-community/gpt2` | 0.1139 |" in markdown
    assert "| copa | 50 | 0.2000 | 0.2000 | 0.1110 |" in markdown
    markdown, _, _ = pages(report, real=True, compare_model="")
    assert "openai-community" not in markdown.split("### Parameters")[0], "it was compared in an earlier run"


def test_what_was_left_out_is_not_shown(report):
    """The chat marks of last week's small model stood on the page of today's."""
    pages(report)
    markdown, page, metrics = pages(report, (), skip="core, sft, chat_eval")
    for title in ("CORE", "SFT", "Chat evaluation sft"):
        assert f"\n## {title}\n" not in markdown and f"<h2>{title}</h2>" not in page
    assert "0.2468" not in markdown and "ChatCORE" not in markdown and "25,804" not in markdown
    assert metrics["Run"]["total wall seconds"] == 60 + 240 + 14 and "SFT" in metrics
    markdown, _, _ = pages(report, ())
    assert "\n## SFT\n" in markdown, "it is back without being done again"


def test_the_price_is_said_when_it_is_known(report):
    """A guessed price, or one of another span of time, in a page that says what things cost."""
    markdown, _, metrics = pages(report)
    assert "$" not in markdown.split("### The base model")[0] and "¢" not in markdown and "### Time\n" in markdown
    assert metrics["Run"]["price in dollars"] is None
    markdown, _, metrics = pages(report, (), price_per_hour=36.0)
    total = 60 + 240 + 14 + 4 + 160 + 20
    assert metrics["Run"]["total wall seconds"] == total
    assert metrics["Run"]["price in dollars"] == pytest.approx(total / 100)
    assert "all stages together 8 min 18 s, which cost $4.98." in markdown
    assert "| price | $4.98 at $36.00 an hour |" in markdown
    assert (
        "| Base model training | 4 min 0 s | $2.40 |" in markdown
        and "| **together** | 8 min 18 s | $4.98 |" in markdown
    )
    markdown, _, metrics = pages(report, (), price_per_hour=0.0)
    assert "$36" not in markdown and metrics["Run"]["price in dollars"] is None, "the price is taken back"


def test_wall_clock_is_the_sum_of_the_stages(report):
    """The time from the first start to the last section called a week of waiting, or an RL run, training time."""
    report.add_metrics("Base model training", {"wall seconds": 4 * 3600 + 1700})
    report.add_metrics("SFT", {"wall seconds": 121.5})
    report.add_metrics("Chat RL", {"wall seconds": 9999})
    markdown, _, metrics = pages(report, ())
    assert "Total wall clock time: 4h30m\n" in markdown and "| **together** | 4 h 30 min |" in markdown
    assert metrics["Run"]["wall seconds by stage"] == {"Base model training": 16100, "SFT": 121.5}


def test_numbers_on_the_page_are_those_of_the_metrics(report):
    """The page and the file for programs disagreed."""
    markdown, page, metrics = pages(report)
    base, chat = metrics["Base model evaluation"], metrics["Chat evaluation sft"]
    numbers = [base[name] for name in ("same bytes bpb", "val bpb", "zlib -9", "xz -9e")]
    numbers += [chat["ChatCORE"], chat["base model"]["MMLU"], metrics["CORE"]["CORE offline"]]
    numbers += [metrics["CORE"]["last_word"], metrics["SFT"]["Final validation bpb"]]
    for number in numbers:
        assert f"{number:.4f}" in markdown and f"{number:.4f}" in page
    assert "| text | 1,720,320 tokens of the documentation of the Python packages" in markdown
    assert "4 layers, 256 wide, 7.34 million parameters" in markdown
    assert metrics["schema"] == 1 and metrics["Provenance"]["source hash"] == "abc123"
    for line in ("- follows: nanochat 5fdd5cd", "- source hash: abc123", "- depth: 4", "- data_source: offline"):
        assert f"\n{line}\n" in markdown


def test_the_summary_table_reads_numbers_not_text(report):
    """A generated sample that happens to say "CORE: 99" must not become the result of the run."""
    report.log("Base model evaluation", ["sample 1: the CORE: 99 of the ARC-Easy: 98", {"CORE metric": 0.1}])
    report.add_metrics("Base model evaluation", {"CORE": 0.1251, "other": 7})
    report.add_metrics("Chat evaluation sft", {"ARC-Easy": 0.338, "ChatCORE": 0.2144, "MMLU": None})
    generate_report(report)
    summary = (report.folder / "report.md").read_text().split("## Summary")[1]
    assert re.findall(r"^\|.*$", summary, re.MULTILINE) == [
        "| Metric          | BASE     | SFT      | RL       |",
        "|-----------------|----------|----------|----------|",
        "| CORE            | 0.1251   | -        | -        |",
        "| ARC-Easy        | -        | 0.3380   | -        |",
        "| ChatCORE        | -        | 0.2144   | -        |",
    ]


def test_the_same_run_makes_the_same_page(report):
    """A page that changes by being looked at cannot be compared, and an upload of it is never finished."""
    first = pages(report)
    files = {path.name: path.read_bytes() for path in report.folder.iterdir()}
    generate_report(Report(report.folder))
    assert {path.name: path.read_bytes() for path in report.folder.iterdir()} == files and len(first[0]) > 3000


def test_the_working_directory_is_written_to_only_when_asked(report, tmp_path):
    """A stray report.md overwrote a file of that name in whatever folder the run was started from."""
    log_pretraining(report)
    before = sorted(tmp_path.iterdir())
    assert generate_report(report) == str(report.folder / "report.md") and sorted(tmp_path.iterdir()) == before
    generate_report(report, copy_to=tmp_path / "copy")
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == ["loss.png", "report.html", "report.md"]


def test_other_ranks_write_nothing(report):
    """Eight ranks writing one page leave that of the slowest."""
    log_tuning(report)
    files = {path.name: path.read_bytes() for path in report.folder.iterdir()}
    assert generate_report(SilentReport(report.folder)) == ""
    assert {path.name: path.read_bytes() for path in report.folder.iterdir()} == files


def test_words():
    """Sentences like "60 s", "1e+03 million" or "$0.00"."""
    assert [spoken_count(n) for n in (999, 7340296, 935854080, 999.9e6, 1.2e9)] == [
        "999", "7.34 million", "936 million", "1000 million", "1.2 billion"
    ]  # fmt: skip
    assert [spoken_seconds(s) for s in (1.83, 9.97, 59.6, 196.4, 3599.7, 7200)] == [
        "1.8 s", "10 s", "1 min 0 s", "3 min 16 s", "1 h 0 min", "2 h 0 min"
    ]  # fmt: skip
    assert [spoken_price(p) for p in (0.0001, 0.0142, 0.0999, 0.7, 0.996, 1234.5)] == [
        "under 0.1 ¢", "1.4 ¢", "10 ¢", "70 ¢", "$1.00", "$1,234.50"
    ]  # fmt: skip
    assert [spoken_list(list(words)) for words in ("", "a", "ab", "abc")] == ["", "a", "a and b", "a, b and c"]


@pytest.mark.parametrize("source", ["/home/someone/my texts", "fineweb-edu", "user/name", "../a|b"])
def test_the_text_has_a_name(report, source):
    """The page told a friend where on the disk someone keeps his files, or a name broke its table."""
    log_pretraining(report)
    markdown, page, metrics = pages(report, (), data_source=source)
    top = markdown.split("## Stage by stage")[0]
    words = {"/home/someone/my texts": "`…/my texts`", "fineweb-edu": "FineWeb-Edu", "../a|b": "`…/a\\|b`"}
    assert f"tokens of {words.get(source, '`user/name`')}" in top and "/home" not in markdown + page + json.dumps(
        metrics
    )
