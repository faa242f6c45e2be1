# %% [markdown]
# ## The report
#
# At the end of a long run one wants a page: what was trained, on what, with which numbers, and how good it got. Every
# stage writes its own section as soon as it is done, so a run that dies at the last stage still has the others.
#
# Numbers take a second road. Text is for people; a program that fishes for "CORE" in it will one day find the word in
# a sample that the model generated. So each stage also puts its results into `metrics.json`, and the summary table
# and later stages read them there.

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

from nanochat.runtime import atomic_path, get_base_dir, get_dist_info, print0, write_atomic
from nanochat.stages import plain_json

# %% [markdown]
# ### What a report holds
# The sections in their order, and the columns of the table at its end. A section whose name is not in the list is
# welcome too; it comes after the others.

# %%
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
REPORT_COLUMNS = {
    "BASE": ("Base model training", "Base model evaluation", "CORE"),
    "SFT": ("SFT", "Chat evaluation sft"),
    "RL": ("Chat RL", "Chat evaluation rl"),
}
REPORT_METRICS = (  # rows of the table, where a stage has measured them
    "CORE", "CORE offline", "val bpb", "ARC-Challenge", "ARC-Easy", "GSM8K", "HumanEval", "MMLU", "SpellingBee",
    "ChatCORE",
)  # fmt: skip


def section_slug(section: str) -> str:
    """The file name of a section without its ending: "Chat evaluation sft" -> "chat-evaluation-sft"."""
    return re.sub(r"[^a-z0-9._-]", "-", section.lower())


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
    """Branch, commit and subject of the repository that we run in; [] when there is none."""
    commit = run_git("rev-parse", "--short", "HEAD")
    if not commit:
        return []
    state = "dirty" if run_git("status", "--porcelain") else "clean"
    return [
        "### Git",
        f"- Branch: {run_git('rev-parse', '--abbrev-ref', 'HEAD')}",
        f"- Commit: {commit} ({state})",
        f"- Message: {(run_git('log', '-1', '--format=%s') or '')[:80]}",
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
        f"- Hourly rate: ${rate:.2f}/hour",
        "",
    ]


def bloat_lines() -> list[str]:
    """How much code there is to read, over the files that git tracks; [] outside a repository."""
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
# ### `Report`
# Text, dictionaries of settings and results, and pictures: a string such as `![loss](loss.png)` shows `loss.png` when
# the file lies in the same folder.


# %%
def report_lines(item) -> list[str]:
    """One entry of a section as Markdown: a string as it is, a dict as a list."""
    if isinstance(item, str):
        return [item]
    lines = []
    for key, value in item.items():
        if isinstance(value, float):
            value = f"{value:.4f}"
        elif isinstance(value, int) and not isinstance(value, bool) and value >= 10000:
            value = f"{value:,}"
        lines.append(f"- {key}: {value}")
    return lines


class Report:
    """A folder with one Markdown file for each section, the header, `metrics.json` and in the end `report.md`.

    Spec section 3.
    """

    def __init__(self, report_dir):
        self.folder = Path(report_dir)

    def log(self, section: str, data: list) -> str:
        """Write a section, in place of an older one; returns its path. data: strings and dicts, empty ones left out."""
        self._ensure_header()
        lines = [f"## {section}", f"timestamp: {time.strftime(REPORT_TIME)}", ""]
        for item in data:
            lines += report_lines(item) if item else []
        path = self.folder / f"{section_slug(section)}.md"
        write_atomic(path, "\n".join(lines) + "\n")
        return str(path)

    def add_metrics(self, section: str, metrics: dict) -> None:
        """Merge numbers (or other JSON values) into `metrics.json` under a section; the newer of two values stays."""
        every = self.metrics()
        every[section] = every.get(section, {}) | plain_json(metrics)
        write_atomic(self.folder / "metrics.json", json.dumps(every, indent=2, allow_nan=False) + "\n")

    def metrics(self) -> dict:
        """{section: {name: value}} of everything measured so far."""
        path = self.folder / "metrics.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def reset(self) -> None:
        """Begin a new report: forget the sections and the metrics, write a fresh header, print the folder."""
        for path in [*self._sections().values(), *(self.folder / name for name in ("report.md", "metrics.json"))]:
            path.unlink(missing_ok=True)
        write_atomic(self.folder / "header.md", report_header())
        print0(f"report: started afresh in {self.folder}")

    def generate(self, copy_to=None) -> str:
        """Put the sections together as `report.md` in the report's folder; returns its path.

        copy_to: a folder for a second copy, together with the pictures that it shows. By default there is none: the
        folder that someone happens to start from may be a git checkout or hold another `report.md`; it is not ours.
        """
        self._ensure_header()
        sections = self._sections()
        header = (self.folder / "header.md").read_text(encoding="utf-8")
        texts = [path.read_text(encoding="utf-8") for path in sections.values()]
        path = self.folder / "report.md"
        report = header + "\n".join(texts) + "\n" + self._summary(header, sections)
        write_atomic(path, report)
        if copy_to is not None:
            for name in ["report.md", *re.findall(r"!\[[^\]]*\]\(([^()/\\]+)\)", report)]:
                if (self.folder / name).is_file():
                    with atomic_path(Path(copy_to) / name) as temporary:
                        temporary.write_bytes((self.folder / name).read_bytes())
        expected = [name for name in REPORT_SECTIONS if name not in REPORT_RL_SECTIONS]
        missing = [name for name in expected if section_slug(name) not in sections]
        print0(f"report: {path}" + (f" (not run: {', '.join(missing)})" if missing else ""))
        return str(path)

    def _ensure_header(self) -> None:
        if not (self.folder / "header.md").exists():
            write_atomic(self.folder / "header.md", report_header())

    def _sections(self) -> dict[str, Path]:
        """{slug: path} of the sections that are there, in order. The first two lines make a file one, not its name."""
        found = {}
        for path in sorted(self.folder.glob("*.md")):
            first_lines = path.read_text(encoding="utf-8", errors="replace").split("\n", 2)[:2]
            if len(first_lines) == 2 and first_lines[0].startswith("## ") and first_lines[1].startswith("timestamp: "):
                found[path.stem] = path
        order = [section_slug(name) for name in REPORT_SECTIONS]
        return {slug: found[slug] for slug in [*order, *found] if slug in found}

    def _summary(self, header: str, sections: dict[str, Path]) -> str:
        lines = ["## Summary", ""]
        bloat = re.search(r"^### Bloat\n((?:- .*\n)+)", header, re.MULTILINE)
        lines += [bloat.group(1)] if bloat else []
        lines += [*self._metric_table(), "", f"Total wall clock time: {wall_clock(header, sections)}", ""]
        return "\n".join(lines)

    def _metric_table(self) -> list[str]:
        values = {}  # (row, column) -> number
        for section, metrics in self.metrics().items():
            for column, names in REPORT_COLUMNS.items():
                if section_slug(section) in map(section_slug, names):
                    numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
                    values |= {(row, column): numbers[row] for row in REPORT_METRICS if row in numbers}
        lines = [
            "| Metric          | " + " | ".join(f"{column:8}" for column in REPORT_COLUMNS) + " |",
            "|-----------------|" + "----------|" * len(REPORT_COLUMNS),
        ]
        for row in REPORT_METRICS:
            cells = [values.get((row, column)) for column in REPORT_COLUMNS]
            if any(cell is not None for cell in cells):
                shown = ["-" if cell is None else f"{cell:.4f}" for cell in cells]
                lines.append(f"| {row:15} | " + " | ".join(f"{cell:8}" for cell in shown) + " |")
        return lines


def wall_clock(header: str, sections: dict[str, Path]) -> str:
    """From the start of the run to its last section, as "4h29m"; RL is another day's work and does not count."""
    started = re.search(r"^Run started: (.+)$", header, re.MULTILINE)
    skipped = set(map(section_slug, REPORT_RL_SECTIONS))
    stamps = [
        path.read_text(encoding="utf-8").split("\n", 2)[1].removeprefix("timestamp: ")
        for slug, path in sections.items()
        if slug not in skipped
    ]
    if not started or not stamps:
        return "unknown"
    began, ended = (time.mktime(time.strptime(stamp, REPORT_TIME)) for stamp in (started.group(1), max(stamps)))
    minutes = int(ended - began) // 60
    return f"{minutes // 60}h{minutes % 60}m" if minutes >= 0 else "unknown"


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

    def reset(self) -> None:
        pass

    def generate(self, copy_to=None) -> str:
        return ""


def get_report() -> Report:
    """The report of this run, in `<base>/report`."""
    kind = Report if get_dist_info()[1] == 0 else SilentReport
    return kind(os.path.join(get_base_dir(), "report"))
