# %% [markdown]
# ## Reading a submission as a reviewer would
#
# A submission is a folder: a script, a log for each seed, a JSON for the leaderboard and a README that tells the story.
# Every number in it stands in two or three places, and nobody who looks at a table of results will compare them. This
# chapter does: it measures what is in the folder, reads the logs, and holds each claim against what it found.
#
# It was written with one published record in mind, "Training Opt Seq4096 v1" of openai/parameter-golf. Its script has
# 47,759 bytes; its total was computed with 47,642, because the log that it quotes came from another script, whose text
# stands in that log; and the result that it claims to beat stands in no log at all. Each of these is a finding here,
# with the numbers of both sides.

# %%
import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from decimal import Decimal
from importlib.machinery import PathFinder
from importlib.metadata import packages_distributions
from pathlib import Path

from golf.golf_settings import ARTIFACT_LIMIT_BYTES
from golf.packed_script import unpack_script
from golf.seed_planner import (
    RECORD_MARGIN_NATS,
    SeedResult,
    bytes_per_token_of,
    mean_and_sd,
    nats_to_bpb,
    significance_table,
)
from nanochat.runtime import UserError

# %% [markdown]
# ### `Finding`
# An *error* breaks a rule, or is two statements that cannot both be true. A *warning* is something that a reviewer
# would ask about, because the files do not answer it. A *note* is good to know.

# %%
SUBMISSION_WARNING_BYTES = 15_950_000
RECORD_TRACK = "track_10min_16mb"
SUBMISSION_SCRIPT = "train_gpt.py"
TIME_LIMIT_SECONDS = 600  # training, and evaluation again
# targets: bytes of the published validation streams. Golf spec section 1.5.
VALIDATION_BYTES = {62_021_632: 151_080_363, 63_779_840: 155_769_746, 45_508_608: 151_074_053, 40_540_160: 151_078_222}
EARLY_VALIDATION_TARGETS, FROZEN_VALIDATION_TARGETS = 63_779_840, 62_021_632
EARLY_BASELINE_BPB, FROZEN_BASELINE_BPB = Decimal("1.22436570"), Decimal("1.22756")
SEVERITIES = ("error", "warning", "note")
FINDING_HEADER = ("severity", "rule", "finding")


@dataclass(frozen=True)
class Finding:
    severity: str  # one of SEVERITIES
    rule: str
    message: str


def finding_rows(findings: list[Finding]) -> list[tuple[str, str, str]]:
    """One row for each finding, under FINDING_HEADER."""
    return [(finding.severity, finding.rule, finding.message) for finding in findings]


# %% [markdown]
# ### Numbers as they were published
# `2.0286` and `2.02857127` agree: the first is the second, rounded. A float has forgotten how many digits were printed,
# a `Decimal` has not.


# %%
def is_number(value) -> bool:
    """Whether a value of the JSON can be compared: no text, no truth value, no NaN (which is a float there)."""
    return type(value) in (int, Decimal)


def half_unit(number: Decimal) -> float:
    """Half of the last printed digit; 0 for a whole number, which was counted and not rounded."""
    return 0.5 * 10.0**exponent if (exponent := number.as_tuple().exponent) < 0 else 0.0


def printed_alike(a, b) -> bool:
    """Can both be the same number, each printed with its own digits? A float has all of them."""
    a, b = Decimal(a), Decimal(b)
    if not (a.is_finite() and b.is_finite()):
        return False
    return abs(float(a) - float(b)) <= max(half_unit(a), half_unit(b)) * (1 + 1e-6)


def bytes_per_token_range(nats: Decimal, bpb: Decimal) -> tuple[float, float]:
    """The bytes per token that a printed pair of losses leaves possible."""
    low = bytes_per_token_of(float(nats) - half_unit(nats), float(bpb) + half_unit(bpb))
    return low, bytes_per_token_of(float(nats) + half_unit(nats), float(bpb) - half_unit(bpb))


# %% [markdown]
# ### `parse_training_log`
# The shapes of the challenge's log lines, with the small differences of later records (a space after the colon, another
# codec's name, minutes for milliseconds). The original writes its own source at the top of the log, above a line of
# `=`: the one honest witness of what ran. Ours states the hash of the script in a line `script_sha256:`.


# %%
@dataclass
class TrainingLog:
    """What one log says. Numbers keep their printed digits; None: it does not say. Golf spec sections 2.6 and 2.7."""

    name: str
    script: bytes | None = None  # as embedded
    script_sha256: str = ""  # of the embedded script, or as a line of the log states it
    settings: dict = field(default_factory=dict)  # every `key:value`, as text
    validations: list = field(default_factory=list)  # (step, nats, bpb) while training
    result: tuple[Decimal, Decimal] | None = None  # nats, bpb: the last score after the training, if it is a number
    seed: int | None = None
    steps: int | None = None
    train_ms: Decimal | None = None
    evaluation_ms: int = 0  # all scoring after the training
    targets: int = 0  # scored targets of the validation text
    sizes: dict = field(default_factory=dict)  # bytes of "model", "code" and "total", as far as they are stated
    pytorch_version: str = ""


LOG_NUMBER = r"(-?(?:nan|inf|\d{1,18}(?:\.\d{1,18})?))"
STEP_SHAPE = re.compile(r"(?:^|\bstep:?\s*)(\d{1,9})/\d{1,9}\b")
TIME_SHAPE = re.compile(r"train_(?:time|ms):\s*(\d{1,12}(?:\.\d{1,6})?)(ms|s|m)?")
LOSSES_SHAPE = re.compile(rf"\bval_loss:\s*{LOG_NUMBER}\s+val_bpb:\s*{LOG_NUMBER}")
SIZE_SHAPE = re.compile(
    r"(Serialized|Code|Total) (?:model|submission size|size)([^:\n]{0,60}):\W{0,4}(\d[\d,]{0,18}) bytes"
)
SIZE_KINDS = {"Serialized": "model", "Code": "code", "Total": "total"}
SETTING_SHAPE = re.compile(r"(?<![\w/])([A-Za-z_][A-Za-z0-9_]*):\s?([^\s:]+)(?=\s|$)")
MILLISECONDS = {"ms": 1, "s": 1000, "m": 60_000, None: 1}


def parsed_script(source: str) -> ast.Module | None:
    """The syntax tree, or None. Nothing of the text is run."""
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def stated_sizes(text: str) -> dict[str, int]:
    """The last statement of each size in bytes: code, model, total. A model without a codec's name is the raw state."""
    sizes = {}
    for kind, label, number in SIZE_SHAPE.findall(text):
        if kind == "Code" or label.strip():
            sizes[SIZE_KINDS[kind]] = int(number.replace(",", ""))
    return sizes


def parse_training_log(data: bytes, name: str = "the log") -> TrainingLog:
    """Read a log of either system, or of a record like them. Unknown lines are skipped; the last of a kind counts."""
    log, text = TrainingLog(name), data.decode("utf-8", "replace").replace("\r\n", "\n")
    parts = re.split(r"^={20,}[ \t]*$", text, maxsplit=1, flags=re.M)
    if len(parts) == 2 and re.search(r"^(?:import|from) \w", parts[0], re.M):
        above, text = parts
        if parsed_script(above):
            log.script = above.removesuffix("\n").encode("utf-8")  # the end of the print, not of the file
            log.script_sha256 = hashlib.sha256(log.script).hexdigest()
    for line in map(str.strip, text.split("\n")):
        step, losses, time = STEP_SHAPE.search(line), LOSSES_SHAPE.search(line), TIME_SHAPE.search(line)
        if step and time:
            log.steps, log.train_ms = int(step[1]), Decimal(time[1]) * MILLISECONDS[time[2]]
        if losses:
            pair = Decimal(losses[1]), Decimal(losses[2])
            valid = all(value.is_finite() and value > 0 for value in pair)
            if step and valid:
                log.validations.append((int(step[1]), *pair))
            elif not step:
                log.result = pair if valid else None
                spent = re.search(r"eval_time:\s*(\d{1,12})\s*ms", line)
                log.evaluation_ms += int(spent[1]) if spent else 0
        elif not step:
            if line.startswith("val_loader") and (counted := re.search(r"tokens:\s?(\d{1,15})", line)):
                log.targets = int(counted[1])
            elif version := re.match(r"Running PyTorch (\S+)", line):
                log.pytorch_version = version[1]
            log.settings |= {key: value.rstrip(",") for key, value in SETTING_SHAPE.findall(line)}
    log.sizes = stated_sizes(text)
    if re.fullmatch("[0-9]{1,15}", log.settings.get("seed", "")):
        log.seed = int(log.settings["seed"])
    if not log.script_sha256 and re.fullmatch("[0-9a-f]{64}", log.settings.get("script_sha256", "")):
        log.script_sha256 = log.settings["script_sha256"]
    return log


def read_logs(folder) -> list[TrainingLog]:
    """The logs of a folder and of its subfolder logs/, by name: *.log, and *.txt that hold steps or scores."""
    paths = [path for pattern in ("*.log", "*.txt", "logs/*") for path in Path(folder).glob(pattern)]
    paths = sorted(path for path in paths if path.is_file() and not path.is_symlink())
    logs = [parse_training_log(path.read_bytes(), path.relative_to(folder).as_posix()) for path in paths]
    return [log for log in logs if log.name.endswith(".log") or log.result or log.steps or log.validations]


# %% [markdown]
# ### `shipped_code`
# What counts is the code *as shipped*, every Python file of the folder. A packed script is unpacked to be read, never
# to be counted.


# %%
@dataclass
class ShippedCode:
    """data: the script on disk. source: its text, unpacked. code_bytes: all Python files of the folder together."""

    data: bytes
    source: str
    code_bytes: int
    modules: list[str]  # Python files beside the script

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


def shipped_code(folder) -> ShippedCode:
    data = (Path(folder) / SUBMISSION_SCRIPT).read_bytes()
    files = [path for path in Path(folder).rglob("*.py") if path.is_file() and not path.is_symlink()]
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    source = unpack_script(data) or data.decode("utf-8", "replace")
    return ShippedCode(data, source, sum(sizes.values()), sorted(sizes.keys() - {SUBMISSION_SCRIPT}))


def top_level_imports(tree: ast.Module) -> set[str]:
    """First names of everything that the script imports anywhere, except where it is ready for a failure."""
    guarded = {n for t in ast.walk(tree) if isinstance(t, ast.Try) for part in t.body for n in ast.walk(part)}
    nodes = {*ast.walk(tree)} - guarded
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module and not n.level}
    return {name.split(".")[0] for name in names}


# %% [markdown]
# ### `check_script`
# "Runs from inside its folder" is judged from the syntax tree first: which packages does it want, are they declared,
# are they installed here? Nothing is executed for that.

# %%
CHALLENGE_PACKAGES = """numpy torch tqdm sentencepiece brotli huggingface_hub datasets tiktoken kernels setuptools
typing_extensions""".split()


def check_script(folder, code: ShippedCode, requirements: str, run_import: bool, timeout: float):
    """Findings about the script alone. requirements: the text of requirements.txt."""
    tree = parsed_script(code.source)
    if tree is None:
        yield Finding("error", "import", f"{SUBMISSION_SCRIPT} is not Python that this version can parse")
        return
    if code.modules:
        message = f"code is expected in one script; counted with it: {', '.join(code.modules)}"
        yield Finding("warning", "code-files", message)
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    paths = [string for string in sorted(strings) if re.fullmatch(r"\.\.?/[\w./*-]+", string)]
    outside = [path for path in paths if not os.path.exists(os.path.join(folder, path))]
    if outside:
        yield Finding("note", "paths", f"paths that do not exist inside the folder: {', '.join(outside)}")
    declared = {re.split(r"[^\w.-]", line.strip())[0].replace("-", "_").lower() for line in requirements.split("\n")}
    installed = [place for place in sys.path if "-packages" in place]  # not the repository that this program lies in
    local = {Path(module).parts[0].removesuffix(".py") for module in code.modules}
    absent, distributions = [], packages_distributions()
    for name in sorted(top_level_imports(tree) - local - sys.stdlib_module_names):
        called = {name, *distributions.get(name, ())}  # PIL comes with a package called pillow
        called = {each.replace("-", "_").lower() for each in called}
        known = name in CHALLENGE_PACKAGES or not declared.isdisjoint(called)
        here = PathFinder.find_spec(name, installed) is not None
        if not here:
            absent.append(name)
        if not known:
            where = "and stands in no requirements.txt" if here else "but neither declared nor in the folder"
            yield Finding("warning" if here else "error", "requirements", f"{name} is imported, {where}")
    if absent:
        yield Finding("note", "import", f"not installed here: {', '.join(absent)}; the import cannot be tried")
    elif run_import:
        failure = try_import(folder, tree, timeout)
        message = f"does not import: {failure}" if failure else "imports from inside its folder"
        yield Finding("error" if failure else "note", "import", f"{SUBMISSION_SCRIPT} {message}")


# %% [markdown]
# ### `try_import`
# The real thing, in a fresh process and in a copy of the folder. A script with `if __name__ == "__main__":` is imported
# whole. One without would start to train (a notebook as a flat script does): of it, the import statements alone are
# run. Beware: this executes what is in the folder, with your rights, so do it to your own folders only.


# %%
def is_import(node: ast.stmt) -> bool:
    return isinstance(node, ast.Import | ast.ImportFrom) or (
        isinstance(node, ast.Try) and all(map(is_import, node.body))
    )


def try_import(folder, tree: ast.Module, timeout: float) -> str:
    """What goes wrong when a copy of `folder` imports its script; "" when nothing does. EXECUTES the folder's code.

    tree: of the (unpacked) script. timeout: seconds.
    """
    program = f"import {Path(SUBMISSION_SCRIPT).stem}"
    tests = [ast.unparse(node.test) for node in tree.body if isinstance(node, ast.If)]
    if not any("__name__" in test and "__main__" in test for test in tests):
        program = "\n".join(ast.unparse(node) for node in tree.body if is_import(node))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place, tempfile.TemporaryFile() as said:
        copy = shutil.copytree(folder, Path(place) / "submission", symlinks=True)
        options = dict(cwd=copy, env=environment | {"CUDA_VISIBLE_DEVICES": ""}, timeout=timeout)
        silence = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said)
        try:
            status = subprocess.run([sys.executable, "-B", "-c", program], **options, **silence).returncode
        except subprocess.TimeoutExpired:
            return f"it did not end within {timeout:g} seconds"
        said.seek(0)
        last = said.read().decode("utf-8", "replace").strip().split("\n")[-1]
    return (last[:500] or f"the process ended with status {status}") if status else ""


# %% [markdown]
# ### `check_sizes`
# Every total that is claimed anywhere is taken apart into a model that some log names and the code that is left, and
# that is compared with the file. When it differs, the ways in which people count are tried until one gives the claim.


# %%
UNKNOWN_CONVENTION = "a number that no convention known here gives"


def counting_convention(claimed: int, code: ShippedCode, logs: list[TrainingLog]) -> str:
    """How somebody may have come to count `claimed` bytes of code."""
    text = code.data.decode("utf-8", "replace")
    embedded = "those of the script embedded in {} (sha256 {}…), not of the shipped one"
    counts = {embedded.format(log.name, log.script_sha256[:12]): len(log.script) for log in logs if log.script} | {
        "those of the source before it was packed": len(code.source.encode()),
        "characters instead of bytes": len(text),
        "bytes after translating line ends": len(text.replace("\r\n", "\n").encode()),
        f"{SUBMISSION_SCRIPT} without {', '.join(code.modules)}": len(code.data),
    }
    fits = [convention for convention, size in counts.items() if size == claimed]
    return fits[0] if fits else UNKNOWN_CONVENTION


def wrong_total(claimed: int, code: ShippedCode, logs: list[TrainingLog], models: dict[int, str]) -> str:
    """How a total came about that is not a logged model and the shipped code. models: bytes → log."""
    for model, name in models.items():
        how = counting_convention(claimed - model, code, logs)
        if how != UNKNOWN_CONVENTION:
            return (
                f"claims {claimed:,} bytes = {model:,} (model, {name}) + {claimed - model:,} (code: {how}); with the "
                f"shipped code it is {model + code.code_bytes:,}"
            )
    rights = " or ".join(f"{model + code.code_bytes:,}" for model in models)
    return f"claims {claimed:,} bytes; a logged model and the shipped code make {rights}"


def check_sizes(folder, code: ShippedCode, logs: list[TrainingLog], claims: dict, readme: str):
    """Findings about bytes. claims: the JSON, numbers as int or Decimal."""
    files = [path for path in sorted(Path(folder).iterdir()) if path.suffix in (".ptz", ".golf") and path.is_file()]
    files = {path.name: {"model": path.stat().st_size} for path in files}
    models = {log.sizes["model"]: log.name for log in logs if "model" in log.sizes}
    models = models or {sizes["model"]: name for name, sizes in files.items()}
    stated = {log.name: log.sizes for log in logs} | files
    stated["submission.json"] = {"code": claims.get("bytes_code"), "total": claims.get("bytes_total")}
    stated["README.md"] = stated_sizes(readme)
    if not models:
        totals = [sizes["total"] for sizes in stated.values() if type(sizes.get("total")) is int]
        over = max(totals, default=0) - ARTIFACT_LIMIT_BYTES
        message = "no log says how many bytes the model has, and it is not here, so no total can be checked"
        yield Finding("warning", "model-unknown", message)
        if over > 0:
            yield Finding("error", "size-limit", f"a total is claimed that is {over:,} bytes over the limit")
    for where, sizes in stated.items():
        model, own, total = sizes.get("model", 0), sizes.get("code"), sizes.get("total")
        if isinstance(own, int) and own != code.code_bytes:
            how = counting_convention(own, code, logs)
            message = f"{where} counts {own:,} bytes of code, the shipped code has {code.code_bytes:,}: {how}"
            yield Finding("error", "code-bytes", message)
        if isinstance(total, int) and models and total - code.code_bytes not in models:
            yield Finding("error", "bytes-total", f"{where} {wrong_total(total, code, logs, models)}")
        if model and models and model not in models:
            message = f"{where}: the model has {model:,} bytes, the logs name {', '.join(f'{m:,}' for m in models)}"
            yield Finding("error", "model-bytes", message)
    heavy = {where: sizes["model"] for where, sizes in stated.items() if "model" in sizes} or {SUBMISSION_SCRIPT: 0}
    for where, model in heavy.items():
        room = ARTIFACT_LIMIT_BYTES - code.code_bytes - model
        if room < ARTIFACT_LIMIT_BYTES - SUBMISSION_WARNING_BYTES:
            verdict = f"{-room:,} bytes over the limit" if room < 0 else f"{room:,} bytes below the limit"
            message = f"{where}: {model:,} bytes of model and {code.code_bytes:,} of code are {verdict}"
            yield Finding("error" if room < 0 else "warning", "size-limit", message)


# %% [markdown]
# ### `check_log`
# Each log by itself: does it end with a score, did the shipped script write it, and do nats and bits per byte fit its
# validation text? The quotient of the two is the bytes per token of that text, which nobody can choose.


# %%
def check_log(log: TrainingLog, code: ShippedCode):
    """Findings about one log."""
    if log.seed is None:
        yield Finding("warning", "seeds", f"{log.name} does not say its seed")
    if not log.script_sha256:
        message = f"{log.name} does not show which script wrote it (no source text, no script_sha256 line)"
        yield Finding("warning", "script-unknown", message)
    elif log.script_sha256 not in (code.sha256, hashlib.sha256(code.source.encode()).hexdigest()):
        size = f"{len(log.script):,} bytes, " if log.script is not None else ""
        message = (
            f"{log.name} was written by another script ({size}sha256 {log.script_sha256[:12]}…) than the shipped one "
            f"({len(code.data):,} bytes, {code.sha256[:12]}…)"
        )
        yield Finding("error", "script-differs", message)
    if log.result is None:
        yield Finding("error", "result", f"{log.name} does not end with a score (numbers after val_loss: and val_bpb:)")
        return
    pairs = [row[1:] for row in log.validations] + [log.result]
    ranges = [bytes_per_token_range(*pair) for pair in pairs]
    expected = VALIDATION_BYTES.get(log.targets, 0) / (log.targets or 1)
    if expected:
        ranges.append((expected * (1 - 5e-6), expected * (1 + 5e-6)))  # the table's own digits
    low, high = max(low for low, _ in ranges), min(high for _, high in ranges)
    if low > high:
        message = f"{log.name}: its losses in nats and in bits per byte mean different bytes per token, {high:.5f} and "
        message += f"{low:.5f}" + (f"; its validation text has {expected:.5f}" if expected else "")
        yield Finding("error", "bytes-per-token", message)
    if log.targets == EARLY_VALIDATION_TARGETS:
        message = f"{log.name} scores the early validation text, whose results do not compare with the frozen one's"
        yield Finding("warning", "validation-text", message)


# %% [markdown]
# ### `check_logs`
# All logs together: one script, one validation text, each seed once; and, with the results of the standing record, the
# rule itself.


# %%
def training_time_to_judge(log: TrainingLog) -> float:
    """Milliseconds of training without the step in which the time was up, which may end, as in the original."""
    train_ms = float(log.train_ms or 0)
    return train_ms - train_ms / max(log.steps or 1, 1)


def check_times(log: TrainingLog, record_track: bool, claims: dict):
    """Findings about the two limits of a record."""
    vouched = claims.get("compliance") if isinstance(claims.get("compliance"), dict) else {}
    for what, ms, key in (
        ("trained", training_time_to_judge(log), "train_under_600s"),
        ("scored", log.evaluation_ms, "eval_under_600s"),
    ):
        if ms > 1000 * TIME_LIMIT_SECONDS and (record_track or vouched.get(key) is True):
            against = "the limit of a record" if record_track else f"what submission.json claims ({key})"
            message = f"{log.name} {what} for {ms / 1000:,.0f} seconds, against {against}: {TIME_LIMIT_SECONDS}"
            yield Finding("error", "time-limit", message)


def check_logs(logs: list[TrainingLog], code: ShippedCode, record_track: bool, claims: dict, previous=()):
    """Findings about the logs, each and together. previous: SeedResult list of the record to beat."""
    for log in logs:
        yield from check_log(log, code)
        yield from check_times(log, record_track, claims)
    scored = [log for log in logs if log.result]
    seeds = [log.seed for log in logs if log.seed is not None]
    if len(set(seeds)) < len(seeds) or len({log.result for log in scored}) < len(scored):
        yield Finding("error", "seeds", "a seed or a score to the last digit stands in two logs: one run, copied?")
    scripts = {log.script_sha256: log.name for log in logs if log.script_sha256}
    if len(scripts) > 1:
        listed = ", ".join(f"{name}: {sha256[:12]}…" for sha256, name in scripts.items())
        message = f"the logs come from different scripts ({listed}), so their mean and deviation are of no one recipe"
        yield Finding("error", "mixed-scripts", message)
    targets = {log.targets: log.name for log in logs if log.targets}
    ranges = [bytes_per_token_range(*log.result) for log in scored]
    if len(targets) > 1 or (ranges and max(low for low, _ in ranges) > min(high for _, high in ranges) * (1 + 1e-6)):
        listed = ", ".join(f"{name}: {number:,} targets" for number, name in targets.items())
        message = f"the logs were scored on different validation texts ({listed})"
        yield Finding("error", "mixed-texts", message)
    if len(scored) < 3 and record_track:
        yield Finding("warning", "significance", f"{len(scored)} scored logs: a record normally shows three seeds")
    if previous and len(scored) > 1:
        results = [SeedResult(n, *map(float, log.result), "", log.targets) for n, log in enumerate(scored)]
        try:
            tests, sentence = significance_table(results, previous)
        except UserError as error:
            yield Finding("error", "significance", str(error))
            return
        severity = "note" if sentence.startswith("clears") else "error" if record_track else "warning"
        yield Finding(severity, "significance", f"{sentence}. {tests[0]}")


# %% [markdown]
# ### `check_json`
# The leaderboard reads this file. Is its score that of one seed or the mean, are the two units those of the same run,
# and do the rows of later records (one for each seed) agree with the logs?

# %%
SUBMISSION_KEYS = ("author", "github_id", "name", "date", "val_bpb")  # of both generations of this file


def check_json(claims: dict, logs: list[TrainingLog], code: ShippedCode):
    """Findings about submission.json against the logs. Sizes: see `check_sizes`."""
    missing = [key for key in SUBMISSION_KEYS if claims.get(key) in (None, "")]
    if missing:
        yield Finding("error", "json-keys", f"submission.json lacks {', '.join(missing)}")
    for key in ("bytes_total", "bytes_code", "val_loss", "val_bpb", "val_loss_std", "val_bpb_std"):
        value, kind = claims.get(key), "whole number" if "bytes" in key else "number"
        if value is not None and not (type(value) is int if "bytes" in key else is_number(value)):
            value = value if is_number(value) else repr(value)
            yield Finding("error", "json-keys", f"submission.json: {key} is {value}, which is no {kind}")
    scored = {log.name if log.seed is None else str(log.seed): log for log in logs if log.result}
    owners = []
    for column, key in enumerate(("val_loss", "val_bpb") if scored else ()):
        claimed, deviation = claims.get(key), claims.get(f"{key}_std")
        values = {"seed " * seed.isdecimal() + seed: log.result[column] for seed, log in scored.items()}
        mean, sd = mean_and_sd(values.values())
        values["mean"] = mean
        if is_number(claimed):
            owners.append({whose for whose, value in values.items() if printed_alike(value, claimed)})
            if not owners[-1]:
                listed = ", ".join(f"{whose} {value:.8f}" for whose, value in values.items())
                message = f"submission.json: {key} is {claimed}; by the logs {listed}"
                yield Finding("error", key.replace("_", "-"), message)
        if is_number(deviation) and not printed_alike(sd, deviation):
            message = f"submission.json: {key}_std is {deviation}; the sample deviation (n - 1) is {sd:.8f}"
            yield Finding("error", "deviation", message)
    common = set.intersection(*owners) if owners else {"mean"}
    if "mean" not in common:
        whose = f"the score is that of {min(common)} alone" if common else "val_loss and val_bpb are not of one run"
        yield Finding("note" if common else "error", "one-seed", f"submission.json: {whose}")
    rows, listed = claims.get("seed_results"), claims.get("seeds")
    rows = rows if isinstance(rows, dict) else {}
    named = {*map(str, listed if isinstance(listed, list) else ()), *rows}
    if ("seeds" in claims or rows) and named != scored.keys():
        message = f"submission.json has the seeds {', '.join(sorted(named))}, the logs {', '.join(sorted(scored))}"
        yield Finding("error", "seeds", message)
    for seed, log in scored.items():
        found = {"val_loss": log.result[0], "val_bpb": log.result[1], "steps": log.steps}
        found["artifact_bytes"] = log.sizes["model"] + code.code_bytes if "model" in log.sizes else None
        row = rows[seed] if isinstance(rows.get(seed), dict) else {}
        for key, value in found.items():
            claimed = row.get(key)
            if None not in (claimed, value) and not (is_number(claimed) and printed_alike(value, claimed)):
                message = f"submission.json, seed {seed}: {key} is {claimed}, the files give {value}"
                yield Finding("error", "seed-results", message)


# %% [markdown]
# ### `check_readme`
# Prose is harder. What is looked for are pairs of losses in a log's own words, and numbers with so many digits, and so
# near to the scores, that they must come from somewhere. One that no log, no JSON and no mean of them contains is
# reported: it may be true, but not by these files. The same goes for settings (`WARMDOWN_ITERS=3000`): a log that does
# not print one cannot bear witness to it.


# %%
def same_setting(a: str, b: str) -> bool:
    try:
        return float(a) == float(b)
    except ValueError:
        words = {"true": "1", "false": "0"}
        return words.get(a.lower(), a) == words.get(b.lower(), b)


def check_settings(readme: str, logs: list[TrainingLog]):
    """Findings about the settings that the README names, in the form of environment variables."""
    silent = []
    for name, value in dict.fromkeys(re.findall(r"\b([A-Z][A-Z0-9_]+)=(-?\d[\d.]*(?:e-?\d+)?)\b", readme)):
        printed = {log.settings[name.lower()] for log in logs if name.lower() in log.settings}
        if not printed:
            silent.append(f"{name}={value}")
        elif not any(same_setting(value, other) for other in printed):
            message = f"README.md: {name} is {value}, the logs print {', '.join(sorted(printed))}"
            yield Finding("warning", "readme-setting", message)
    if silent:
        message = f"README.md names settings that no log prints under that name: {', '.join(silent)}"
        yield Finding("note", "readme-setting", message)


def check_readme(readme: str, claims: dict, logs: list[TrainingLog]):
    """Findings about the README against logs and JSON. Sizes: see `check_sizes`."""
    yield from check_settings(readme, logs)
    for log in logs:
        if log.script_sha256 and log.script_sha256[:8] not in readme:
            message = f"README.md does not state the hash of the script behind {log.name}"
            yield Finding("warning", "script-hash", message)
    scored = [log.result for log in logs if log.result]
    if not scored:
        return
    means = [mean_and_sd(values)[0] for values in zip(*scored, strict=True)]
    known = [value for log in logs for row in log.validations for value in row[1:]]
    known += [*means, *(value for pair in scored for value in pair)]
    for text in dict.fromkeys(re.findall(r"\bval_(?:loss|bpb):\s*(\d+\.\d+)", readme)):
        if not any(printed_alike(value, Decimal(text)) for value in known):
            yield Finding("error", "readme-score", f"README.md gives a score of {text}, which is in no log")
    known += [value for value in claims.values() if isinstance(value, Decimal)]
    settings = {value for log in logs for value in log.settings.values()}
    told = sorted(map(Decimal, set(re.findall(r"(?<![\w.,/-])\d+\.\d{4,}(?![\w.]*\w)", readme)) - settings))
    near = [n for n in told if half_unit(n) < 1e-6 and any(mean / 1.3 < n < mean * 1.3 for mean in means)]
    unknown = [number for number in near if not any(printed_alike(value, number) for value in known)]
    margin_bpb = nats_to_bpb(RECORD_MARGIN_NATS, bytes_per_token_of(*means))
    for number in unknown:
        reference = number + Decimal("0.005")
        if reference in unknown:
            message = (
                f"README.md: {number} is {reference} less 0.005 bits per byte; the rule is {RECORD_MARGIN_NATS} nats "
                f"per token, which is {margin_bpb:.5f} bits per byte here"
            )
            yield Finding("warning", "margin-unit", message)
        else:
            message = f"README.md: {number} occurs in no log of this folder, nor in its JSON"
            yield Finding("warning", "unknown-number", message)
    early = [number for number in told if printed_alike(EARLY_BASELINE_BPB, number)]
    if early and any(log.targets == FROZEN_VALIDATION_TARGETS for log in logs):
        message = (
            f"README.md compares with {early[0]}, the baseline on the early validation text; on the frozen one it has "
            f"{FROZEN_BASELINE_BPB}, so the gain is {float(FROZEN_BASELINE_BPB) - means[1]:.4f}"
        )
        yield Finding("warning", "baseline-text", message)


# %% [markdown]
# ### `lint_submission`
# The whole folder. With the results of the standing record, the significance of the claim is computed anew, in the unit
# of the rule.


# %%
def lint_submission(folder, previous=(), run_import: bool = False, timeout: float = 120.0) -> list[Finding]:
    """All findings about a submission folder, errors first. The folder is only read.

    previous: SeedResult list of the record to beat. run_import: also import the script, in a copy of the folder and for
    at most `timeout` seconds. That EXECUTES the folder's code with your rights: for folders that you trust.
    UserError when there is no such folder. Golf spec sections 0.1, 3.4 and 8 (check 9).
    """
    folder = Path(folder).resolve()
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a folder. Give the folder that holds submission.json and {SUBMISSION_SCRIPT}."
        )
    findings, track = [], folder.parent.name
    links = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_symlink()]
    if links:
        findings.append(Finding("error", "files", f"a submission holds files, not links: {', '.join(links)}"))
    own = {path.name: path for path in folder.iterdir() if path.is_file() and not path.is_symlink()}
    for name in ("README.md", "submission.json", SUBMISSION_SCRIPT):
        if name not in own:
            findings.append(Finding("error", "files", f"{name} is missing"))
    logs = read_logs(folder)
    if not logs:
        findings.append(Finding("error", "files", "there is no train log (*.log, or *.txt with steps and scores)"))
    readme, requirements = (
        own[name].read_bytes().decode("utf-8", "replace") if name in own else ""
        for name in ("README.md", "requirements.txt")
    )
    claims = None
    if "submission.json" in own:
        try:
            claims = json.loads(own["submission.json"].read_bytes(), parse_float=Decimal)
        except (ValueError, ArithmeticError, RecursionError):
            pass
        if not isinstance(claims, dict):
            findings.append(Finding("error", "json-keys", "submission.json is not a JSON object"))
            claims = None
    if SUBMISSION_SCRIPT in own:
        code = shipped_code(folder)
        findings += check_script(folder, code, requirements, run_import, timeout)
        findings += check_json(claims, logs, code) if claims is not None else []
        findings += check_sizes(folder, code, logs, claims or {}, readme)
        findings += check_logs(logs, code, track == RECORD_TRACK, claims or {}, previous)
        findings += check_readme(readme, claims or {}, logs) if readme else []
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))
