# %% [markdown]
# ## The report
#
# At the end of a long run one wants a page: what was trained, on what, with which numbers, and how good it got. Every
# stage writes its own section as soon as it is done, so a run that dies at the last stage still has the others. How
# the page is put together from them is told at the end; this is how they are kept.
#
# Numbers take a second road. Text is for people; a program that fishes for "CORE" in it will one day find the word in
# a sample that the model generated. So each stage also puts its results into `metrics.json`, and the page and later
# stages read them there.

# %%
import json
import os
import platform
import re
import subprocess
import time
from pathlib import Path

import psutil
import torch

from nanochat.runtime import get_base_dir, get_dist_info, print0, write_atomic
from nanochat.stages import plain_json

# %% [markdown]
# ### What a report holds
# The sections in their order. A section whose name is not in the list is welcome too; it comes after the others.

# %%
REPORT_SCHEMA = 1  # of metrics.json: counts up when a name there changes its meaning
REPORT_TIME = "%Y-%m-%d %H:%M:%S"
REPORT_SECTIONS = (
    "Tokenizer training",
    "Tokenizer evaluation",
    "Base model training",
    "Base model evaluation",
    "CORE",
    "SFT",
    "Chat evaluation sft",
    "Chat RL",
    "Chat evaluation rl",
)
REPORT_RL_SECTIONS = REPORT_SECTIONS[-2:]  # optional: neither missed nor counted in the wall clock


def section_slug(section: str) -> str:
    """The file name of a section without its ending: "Chat evaluation sft" -> "chat-evaluation-sft"."""
    return re.sub(r"[^a-z0-9._-]", "-", section.lower())


# %% [markdown]
# ### Text that others wrote
# A language model may write anything: a heading, half a table, a picture to be fetched from somewhere. On the page its
# words have to be words. Markdown leaves alone what stands between backticks, if there are more of them than inside.


# %%
def plain_lines(text: str) -> str:
    """`text` with line feeds as its only control characters; the others become � or, the tab, stay."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)


def backticks_around(text: str, at_least: int) -> str:
    return "`" * max(at_least, 1 + max(map(len, re.findall("`+", text)), default=0))


def code_span(text: str) -> str:
    """`text` on one line, its white space drawn together, as Markdown code."""
    text = " ".join(plain_lines(text).split())
    ticks = backticks_around(text, 1)
    pad = " " if not text or "`" in (text[0], text[-1]) else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def fenced_text(text: str, kind: str = "text") -> list[str]:
    """`text` with all its lines as a block of Markdown code, marked as one of that kind."""
    text = plain_lines(text)
    fence = backticks_around(text, 3)
    return [fence + kind, *text.rstrip("\n").split("\n"), fence]


# %% [markdown]
# ### `report_lines`
# Settings and results come as dictionaries, and a value may be a sample or the name of somebody's folder.


# %%
def report_lines(item) -> list[str]:
    """One entry of a section as Markdown: a string as it is, a dict as a list."""
    if isinstance(item, str):
        return [item]
    lines = []
    for key, value in item.items():
        if isinstance(value, float):
            text = f"{value:.4f}"
        elif isinstance(value, int) and not isinstance(value, bool) and value >= 10000:
            text = f"{value:,}"
        else:
            text = str(value)
        if "\n" in text or "\r" in text:
            lines += [f"- {key}:", "", *(f"  {line}".rstrip() for line in fenced_text(text)), ""]
        elif re.search(r"[\\`*\[\]<>|~&$\x00-\x1f\x7f-\x9f]|(?<!\w)_|_(?!\w)", text):  # what Markdown might read
            lines.append(f"- {key}: {code_span(text)}")
        else:
            lines.append(f"- {key}: {text}")
    return lines


# %% [markdown]
# ### Environment
# Written once, when the run starts: a number without the machine that made it cannot be compared.


# %%
def run_git(*arguments: str) -> str | None:
    """What git prints, stripped; None without git, outside a repository, or after 5 seconds."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def git_lines() -> list[str]:
    """Branch, commit and subject when we run in a clone of this project; [] elsewhere, where it is not ours to tell."""
    if not run_git("ls-files", ":/nb_src/nanochat_speedrun.py"):
        return []
    commit = run_git("rev-parse", "--short", "HEAD")
    if not commit:
        return []
    state = "dirty" if run_git("status", "--porcelain") else "clean"
    return [
        "### Git",
        *report_lines(
            {
                "Branch": run_git("rev-parse", "--abbrev-ref", "HEAD"),
                "Commit": f"{commit} ({state})",
                "Message": (run_git("log", "-1", "--format=%s") or "")[:80],
            }
        ),
        "",
    ]


def hardware_lines() -> list[str]:
    """Processor, memory and GPUs, with a guess of what they cost by the hour."""
    physical, logical = psutil.cpu_count(logical=False), psutil.cpu_count()
    lines = [
        "### Hardware",
        f"- Platform: {platform.system()} {platform.machine()}",
        f"- CPUs: {physical or logical} cores ({logical} logical)",
        f"- Memory: {psutil.virtual_memory().total / 1024**3:.1f} GB",
    ]
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    if not gpus:
        return [*lines, "- GPUs: None available", ""]
    names = [gpu.name for gpu in gpus]
    # dollars per GPU and hour; what clouds ask for the card, roughly
    rates = {"H100": 3.00, "A100": 1.79, "V100": 0.55}
    rate = next((price for name, price in rates.items() if name in names[0]), 2.00) * len(gpus)
    return [
        *lines,
        f"- GPUs: {len(gpus)}× {', '.join(sorted(set(names)))}",
        f"- GPU memory: {sum(gpu.total_memory for gpu in gpus) / 1024**3:.1f} GB in total",
        f"- CUDA version: {torch.version.cuda}",
        f"- Hourly rate: ${rate:.2f}/hour is typical",
        "",
    ]


def bloat_lines() -> list[str]:
    """How much code there is to read, over the files that git tracks; [] outside a clone of this project."""
    if not run_git("ls-files", ":/nb_src/nanochat_speedrun.py"):
        return []
    root = run_git("rev-parse", "--show-toplevel")
    tracked = root and run_git("-C", root, "ls-files", "*.py", "*.md", "*.rs", "*.html", "*.toml", "*.sh")
    if not tracked:
        return []
    texts = []
    for name in tracked.splitlines():
        path = Path(root, name)
        if path.is_file():  # tracked, but deleted in the working tree
            texts.append(path.read_text(encoding="utf-8", errors="replace"))
    characters = sum(map(len, texts))
    return [
        "### Bloat",
        f"- Characters: {characters:,}",
        f"- Lines: {sum(len(text.splitlines()) for text in texts):,}",
        f"- Files: {len(texts):,}",
        f"- Tokens (approx): {characters // 4:,}",
        "",
    ]


def report_header() -> str:
    """The top of the report: this machine, this code, this moment."""
    now = time.strftime(REPORT_TIME)
    lines = ["# nanochat training report", "", f"Generated: {now}", "", "## Environment", ""]
    lines += git_lines() + hardware_lines()
    lines += ["### Software", f"- Python: {platform.python_version()}", f"- PyTorch: {torch.__version__}", ""]
    lines += bloat_lines()
    return "\n".join([*lines, f"Run started: {now}", "", "---", "", ""])


# %% [markdown]
# ### `without_folders`
# A report is made to be sent to others, and where its writer keeps things is nobody's business.

# %%
REPORT_SAME_RUN = ("data fingerprint", "tokenizer fingerprint", "settings fingerprint")


def without_folders(value):
    """A string that is a path on this machine as "…/name"; anything else as it is."""
    if not isinstance(value, str) or not value or "\n" in value:
        return value
    path = Path(value)
    local = path.is_absolute() or value[0] in "~." or ("/" in value and path.exists())
    return f"…/{path.name}" if local else value


# %% [markdown]
# ### `Report`
# Text, dictionaries of settings and results, and pictures: a string such as `![loss](loss.png)` shows `loss.png` when
# the file lies in the same folder. A section that is written again has also forgotten its numbers of last time, so
# they can never belong to different runs.


# %%
class Report:
    """A folder with one Markdown file for each section, the header, and `metrics.json`; all that the page is made of.

    Spec section 3.
    """

    def __init__(self, report_dir):
        self.folder = Path(report_dir)

    def log(self, section: str, data: list) -> str:
        """Write a section, in place of an older one and its numbers; returns its path.

        data: strings, which are taken as Markdown, and dicts, whose values may be anybody's text; empty ones left out.
        """
        self._ensure_header()
        every = self.metrics()
        if every.pop(section, None) is not None:
            self._write_metrics(every)
        lines = [f"## {section}", f"timestamp: {time.strftime(REPORT_TIME)}", ""]
        for item in data:
            lines += report_lines(item) if item else []
        path = self.folder / f"{section_slug(section)}.md"
        write_atomic(path, "\n".join(lines) + "\n")
        return str(path)

    def add_metrics(self, section: str, metrics: dict) -> None:
        """Merge numbers (or other JSON values) into `metrics.json` under a section; the newer of two values stays.

        The chapter on the page says which names it reads.
        """
        every = self.metrics()
        self._write_metrics(every | {section: every.get(section, {}) | plain_json(metrics)})

    def is_about(self, section: str, facts: dict) -> bool:
        """Whether the numbers of a section were given together with these: its model's fingerprint, for example."""
        return plain_json(facts).items() <= self.metrics().get(section, {}).items()

    def set_provenance(self, facts: dict) -> None:
        """Where the numbers of this run come from, in place of what was there.

        facts: "parameters" (name -> value) and whatever else identifies the run: hashes, the version that it follows.
        Of a parameter that is a path only the name is kept; the rest is nobody's business. Another text, tokenizer or
        plan of training than last time is another run in the same folder, and gets a new header.
        """
        every, facts = self.metrics(), plain_json(facts)
        for name, value in facts.get("parameters", {}).items():
            facts["parameters"][name] = without_folders(value)
        old = every.get("Provenance")
        if old is None or any(old.get(name) != facts.get(name) for name in REPORT_SAME_RUN):
            write_atomic(self.folder / "header.md", report_header())
        if old != facts:
            self._write_metrics(every | {"Provenance": facts})

    def metrics(self) -> dict:
        """{section: {name: value}} of everything measured so far."""
        path = self.folder / "metrics.json"
        every = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return {section: metrics for section, metrics in every.items() if section != "schema"}

    def sections(self) -> dict[str, Path]:
        """{slug: path} of the sections that are there, in order. The first two lines make a file one, not its name."""
        found = {}
        for path in sorted(self.folder.glob("*.md")):
            first_lines = path.read_text(encoding="utf-8", errors="replace").split("\n", 2)[:2]
            if len(first_lines) == 2 and first_lines[0].startswith("## ") and first_lines[1].startswith("timestamp: "):
                found[path.stem] = path
        order = [section_slug(name) for name in REPORT_SECTIONS]
        return {slug: found[slug] for slug in [*order, *found] if slug in found}

    def reset(self) -> None:
        """Begin a new report: forget the sections and the metrics, write a fresh header, print the folder."""
        others = (self.folder / name for name in ("report.md", "report.html", "metrics.json"))
        for path in [*self.sections().values(), *others]:
            path.unlink(missing_ok=True)
        write_atomic(self.folder / "header.md", report_header())
        print0(f"report: started afresh in {self.folder}")

    def header(self) -> str:
        """The text of `header.md`, written now if need be."""
        self._ensure_header()
        return (self.folder / "header.md").read_text(encoding="utf-8")

    def _ensure_header(self) -> None:
        if not (self.folder / "header.md").exists():
            write_atomic(self.folder / "header.md", report_header())

    def _write_metrics(self, every: dict) -> None:
        known = [*REPORT_SECTIONS[:4], *sorted(name for name in every if name.startswith("CORE")), *REPORT_SECTIONS[4:]]
        names = [name for name in dict.fromkeys([*known, *every]) if name in every and name != "Provenance"]
        ordered = {"schema": REPORT_SCHEMA} | {name: every[name] for name in names}
        if "Provenance" in every:
            ordered["Provenance"] = every["Provenance"]
        write_atomic(self.folder / "metrics.json", json.dumps(ordered, indent=2, allow_nan=False) + "\n")


# %% [markdown]
# ### `get_report`
# Only rank 0 writes. The others get an object that takes the same calls and does nothing, so that no stage needs an
# `if`.


# %%
class SilentReport(Report):
    """What the ranks other than 0 hold: reads like a `Report`, writes nothing."""

    def log(self, section: str, data: list) -> str:
        return ""

    def add_metrics(self, section: str, metrics: dict) -> None:
        pass

    def set_provenance(self, facts: dict) -> None:
        pass

    def reset(self) -> None:
        pass

    def _ensure_header(self) -> None:
        pass


def get_report() -> Report:
    """The report of this run, in `<base>/report`."""
    kind = Report if get_dist_info()[1] == 0 else SilentReport
    return kind(os.path.join(get_base_dir(), "report"))
