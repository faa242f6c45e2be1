# %% [markdown]
# ## Reading a submission as a reviewer would
#
# A submission is a folder: a script, a log for each seed, a JSON for the leaderboard and a README that tells the story.
# Every number in it stands in two or three places, and nobody who looks at a table of results will compare them. This
# chapter does: it measures what is in the folder, reads the logs, and holds each claim against what it found.
#
# It was written with one published record in mind. Its script has 47,759 bytes; its total was computed with 47,642,
# because the log that it quotes came from another script, whose text stands in that log; and the result that it claims
# to beat stands in no log at all. Each of these is a finding here, with the numbers of both sides.

# %%
import ast
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

from golf.seed_planner import (
    RECORD_MARGIN_NATS,
    RECORD_P,
    SeedResult,
    bytes_per_token_of,
    mean_and_sd,
    nats_to_bpb,
    one_sample_test,
    significance_table,
)
from nanochat.execution import SANDBOX_LOCK
from nanochat.runtime import UserError

# %% [markdown]
# ### `Finding`
# An *error* breaks a rule, or is two statements that cannot both be true. A *warning* is something that a reviewer
# would ask about, because the files do not answer it. A *note* is good to know.

# %%
SUBMISSION_LIMIT_BYTES = 16_000_000  # decimal
SUBMISSION_WARNING_BYTES = 15_950_000
TIME_LIMIT_SECONDS = 600  # training, and evaluation again
RECORD_TRACK = "track_10min_16mb"
SUBMISSION_SCRIPT = "train_gpt.py"
# targets: bytes of the published validation streams. Spec section 1.5.
VALIDATION_BYTES = {62_021_632: 151_080_363, 63_779_840: 155_769_746, 45_508_608: 151_074_053, 40_540_160: 151_078_222}
EARLY_VALIDATION_TARGETS, FROZEN_VALIDATION_TARGETS = 63_779_840, 62_021_632
EARLY_BASELINE_BPB, FROZEN_BASELINE_BPB = Decimal("1.22436570"), Decimal("1.22756")
SEVERITIES = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """claimed, found: the numbers of the two sides, None where there is only one."""

    severity: str  # "error", "warning" or "note"
    rule: str
    message: str
    claimed: object = None
    found: object = None

    def __str__(self) -> str:
        return f"{self.severity:7} {self.rule}: {self.message}"


# %% [markdown]
# ### Numbers as they were published
# `2.0286` and `2.02857127` agree: the first is the second, rounded. A float has forgotten how many digits were printed,
# a `Decimal` has not.


# %%
def printed_number(text: str) -> Decimal:
    return Decimal(text.replace(",", "").replace("_", ""))


def whole_number(text: str) -> int | None:
    """None for anything but a plain number of at most 15 digits."""
    return int(text) if re.fullmatch("[0-9]{1,15}", text) else None


def half_unit(number: Decimal) -> float:
    """Half of the last printed digit; 0 for a whole number, which was counted and not rounded."""
    exponent = number.as_tuple().exponent
    return 0.5 * 10.0**exponent if isinstance(exponent, int) and exponent < 0 else 0.0


def printed_alike(a, b) -> bool:
    """Can both numbers be the same one, each printed with its own digits?"""
    a, b = (value if isinstance(value, Decimal) else Decimal(repr(value)) for value in (a, b))
    if not (a.is_finite() and b.is_finite()):
        return False
    return abs(float(a - b)) <= max(half_unit(a), half_unit(b)) * (1 + 1e-9)


def bytes_per_token_range(nats: Decimal, bpb: Decimal) -> tuple[float, float]:
    """The bytes per token that a printed pair of losses leaves possible."""
    low = bytes_per_token_of(float(nats) - half_unit(nats), float(bpb) + half_unit(bpb))
    return low, bytes_per_token_of(float(nats) + half_unit(nats), float(bpb) - half_unit(bpb))


# %% [markdown]
# ### `parse_training_log`
# The shapes of the challenge's log lines, with the small differences of later records (a space after the colon, another
# codec's name, minutes for milliseconds). The original writes its own source at the top of the log, above a line of
# `=`: the one honest witness of what ran.


# %%
@dataclass
class TrainingLog:
    """What one log says. Numbers keep their printed digits; None: the log does not say. Spec sections 2.6 and 2.7."""

    name: str
    script: bytes | None = None  # as embedded
    script_sha256: str = ""  # of the embedded script, or as a line of the log states it
    settings: dict = field(default_factory=dict)  # every `key:value`, as text
    validations: list = field(default_factory=list)  # (step, nats, bpb) while training
    results: list = field(default_factory=list)  # (label, nats, bpb, evaluation milliseconds or None) after training
    train_steps: list = field(default_factory=list)  # (step, milliseconds, average or None)
    seed: int | None = None
    steps: int | None = None
    iterations: int | None = None
    train_ms: Decimal | None = None
    code_bytes: int | None = None
    model_bytes: int | None = None
    total_bytes: int | None = None
    payload_bytes: int | None = None
    pytorch_version: str = ""

    @property
    def result(self):
        """(label, nats, bpb, evaluation milliseconds) of the reported score: the last one, with the most digits."""
        rows = [row for row in self.results if all(value.is_finite() and value > 0 for value in row[1:3])]
        if not rows:
            return None
        last = rows[-1]
        same = [row for row in rows if printed_alike(row[2], last[2]) and printed_alike(row[1], last[1])]
        best = min(same, key=lambda row: row[2].as_tuple().exponent)
        timed = [row[3] for row in same if row[3] is not None]
        return (*best[:3], timed[-1] if timed else None)

    @property
    def evaluation_ms(self) -> int:
        """All scoring after the training together, as far as the log gives its time."""
        return sum(row[3] or 0 for row in self.results)

    @property
    def targets(self) -> int:
        """Scored targets of the validation text; 0 when the log does not say."""
        text = self.settings.get("val_loader_tokens") or self.settings.get("val_tokens", "")
        return whole_number(text) or 0


LOG_NUMBER = r"(-?(?:nan|inf|\d{1,18}(?:\.\d{1,18})?))"
STEP_LINE = re.compile(
    rf"(?:^|\s)(?:step:?\s*)?(\d{{1,9}})/(\d{{1,9}})\s+(train|val)_loss:\s*{LOG_NUMBER}(?:\s+val_bpb:\s*{LOG_NUMBER})?"
    rf"(?:.*?train_(?:time|ms):\s*{LOG_NUMBER}(ms|s|m)?)?(?:.*?step_avg:\s*{LOG_NUMBER}ms)?"
)
RESULT_LINE = re.compile(
    rf"^([A-Za-z][\w+.()\- ]*?):?\s+val_loss:\s*{LOG_NUMBER}\s+val_bpb:\s*{LOG_NUMBER}"
    r"(?:.*?eval_time:\s*(\d{1,12})\s*ms)?"
)
STOP_LINE = re.compile(rf"stopping_early:.*train_time:\s*{LOG_NUMBER}ms\s+step:\s*(\d{{1,9}})/(\d{{1,9}})")
SIZE_LINE = re.compile(
    r"^(Serialized model|Code size|Total submission size)([^:]*):\s*(\d{1,15}) bytes(?:.*?payload:(\d{1,15}))?"
)
LOG_SETTING = re.compile(r"(?<![\w/])([A-Za-z_][A-Za-z0-9_]*):\s?([^\s:]\S*)")
MILLISECONDS = {"ms": 1, "s": 1000, "m": 60_000, None: 1}


def embedded_script(text: str) -> tuple[str | None, str]:
    """(the Python source above the first line of `=`, the rest); (None, text) when there is none."""
    line = re.search(r"^={20,}\s*$", text, re.M)
    above = text[: line.start()] if line else ""
    if not re.search(r"^(?:import|from) \w", above, re.M):
        return None, text
    above = above.removesuffix("\n")  # the end of the print, not of the file
    start = 0
    while start >= 0:  # launchers may have written a few lines first
        if parsed_script(above[start:]) is not None:
            return above[start:], text[line.end() :]
        start = above.find("\n", start) + 1 if above.count("\n", 0, start) < 20 and "\n" in above[start:] else -1
    return above, text[line.end() :]


def parsed_script(source: str) -> ast.Module | None:
    """The syntax tree, or None. The text is somebody else's: nothing of it is run."""
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def parse_training_log(data: str | bytes, name: str = "the log") -> TrainingLog:
    """Read a log of either system, or of a record like them. Unknown lines are skipped; the last of a kind counts."""
    text = data.decode("utf-8", "replace") if isinstance(data, bytes) else data
    log = TrainingLog(name)
    source, text = embedded_script(text.replace("\r\n", "\n"))
    if source is not None:
        log.script = source.encode("utf-8")
        log.script_sha256 = hashlib.sha256(log.script).hexdigest()
    for line in text.split("\n"):
        line = line.strip()
        if found := STEP_LINE.search(line):
            step, total, kind, nats, bpb, spent, unit, average = found.groups()
            log.iterations = int(total)
            if kind == "val" and bpb:
                log.validations.append((int(step), Decimal(nats), Decimal(bpb)))
            if spent:
                ms = Decimal(spent) * MILLISECONDS[unit]
                log.train_steps.append((int(step), ms, Decimal(average) if average else None))
        elif found := STOP_LINE.search(line):
            log.train_ms, log.steps, log.iterations = Decimal(found[1]), int(found[2]), int(found[3])
        elif found := RESULT_LINE.match(line):
            label, nats, bpb, spent = found.groups()
            log.results.append((label, Decimal(nats), Decimal(bpb), int(spent) if spent else None))
        elif found := SIZE_LINE.match(line):
            kind, label, size, payload = found[1], found[2].strip(), int(found[3]), found[4]
            if kind == "Code size":
                log.code_bytes = size
            elif label and kind == "Serialized model":  # without a label it is the raw state
                log.model_bytes, log.payload_bytes = size, int(payload) if payload else log.payload_bytes
            elif label:
                log.total_bytes = size
        elif found := re.match(r"Running PyTorch (\S+)", line):
            log.pytorch_version = found[1]
        else:
            prefix = "val_loader_" if line.startswith("val_loader") else ""
            for key, value in LOG_SETTING.findall(line):
                log.settings.setdefault(prefix + key if key == "tokens" else key, value.rstrip(","))
    if log.steps is None and log.train_steps:
        log.steps, log.train_ms = log.train_steps[-1][:2]
    stated = re.fullmatch("[0-9a-f]{64}", log.settings.get("script_sha256", ""))
    log.script_sha256 = log.script_sha256 or (stated[0] if stated else "")
    log.seed = whole_number(log.settings.get("seed", ""))
    keys = {"code_bytes": "code_bytes", "model_bytes": "model_compressed_bytes", "total_bytes": "total_artifact_bytes"}
    for attribute, key in keys.items():
        if getattr(log, attribute) is None:
            setattr(log, attribute, whole_number(log.settings.get(key, "")))
    return log


# %% [markdown]
# ### What a script says of itself
# Its imports and the defaults of its environment variables, read off the syntax tree: with two scripts at hand, this
# tells in which settings they differ.

# %%
LOGGED_AS = {"TIED_EMBED_LR": "embed_lr"}


def environment_defaults(source: str) -> dict[str, str]:
    """{variable: default, as text} for every os.environ.get(name, default) and os.getenv(name, default)."""
    tree = parsed_script(source)
    defaults = {}
    for node in ast.walk(tree) if tree else ():
        if not isinstance(node, ast.Call) or not node.args or not isinstance(node.args[0], ast.Constant):
            continue
        called = ast.unparse(node.func)
        if called.endswith("environ.get") or called.endswith("getenv"):
            default = node.args[1] if len(node.args) > 1 else ast.Constant("")
            text = str(default.value) if isinstance(default, ast.Constant) else ast.unparse(default)
            defaults[str(node.args[0].value)] = text
    return defaults


def same_setting(a: str, b: str) -> bool:
    try:
        return float(a) == float(b)
    except ValueError:
        words = {"true": "1", "false": "0"}
        return words.get(a.lower(), a) == words.get(b.lower(), b)


def top_level_imports(tree: ast.Module) -> set[str]:
    """First names of everything that the script imports anywhere, except where it is ready for a failure."""
    guarded = {id(n) for t in ast.walk(tree) if isinstance(t, ast.Try) for part in t.body for n in ast.walk(part)}
    names = set()
    for node in ast.walk(tree):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0] if node.module and not node.level else ".")
    return names


# %% [markdown]
# ### The import, tried
# "Runs from inside the folder" can only be found out by running, and the script may be anybody's. A sandbox for single
# functions would not do, since `import torch` needs gigabytes and threads. So a fresh process works on a *copy* of the
# folder and, before it reads a word of the script, is locked in with the parts that the sandbox is made of: Landlock
# (it may read the Python library, `/dev/urandom` and a few tables about the machine, and fill its own copy), seccomp
# (no network, no other process, no signals), no capabilities, 16 GiB of memory, 1 MiB for each file, a time limit. What
# this cannot prevent is a script that fakes its successful import: the check is for sloppy scripts, the lock for the
# others. Where the kernel has no such locks, the script does not run unless `allow_weak` says so.
#
# A script with `if __name__ == "__main__":` is imported whole. One without would start to train (that is how a flat
# notebook, or one packed into a string, is built): of it, the import statements alone are run.

# %%
IMPORT_PROGRAM = r"""
import json
folder, parent, weak, memory, seconds, verdict = sys.argv[1:]
text = sys.stdin.read()
READABLE = "/dev/urandom", "/proc/cpuinfo", "/proc/meminfo", "/sys/devices/system/cpu"
plain_kernel = kernel


def kernel(number, *arguments):
    # The sandbox allows no more than libraries. torch also wants to read these: rules added before the lock closes.
    for path in READABLE if number == 446 else ():
        if os.path.exists(path):
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            allowed = 1 << 2 | (1 << 3 if os.path.isdir(path) else 0)
            plain_kernel(445, arguments[0], 1, struct.pack("=Qi", allowed, place), 0)
            os.close(place)
    return plain_kernel(number, *arguments)


def report(kind, message="", missing=None):
    os.write(int(verdict), json.dumps([kind, message[:500], missing]).encode())
    os._exit(0)


os.environ["HOME"] = os.environ["TMPDIR"] = folder
locked = False
try:
    set_limits(int(memory), int(float(seconds)) + 2, True)
    if LINUX:
        drop_privileges()
        die_with(int(parent))
        locked = confine_files(folder) and SECCOMP and install(call_filter(may_open=True, may_create=True)) == 0
except OSError:
    pass
if not locked and weak != "weak":
    report("unlocked")
sys.argv[:] = ["train_gpt.py"]
try:
    exec(compile(text, "train_gpt.py", "exec", dont_inherit=True), {"__name__": "train_gpt_import"})
except ModuleNotFoundError as error:
    report("missing", str(error), error.name)
except BaseException as error:
    report("failed", type(error).__name__ + ": " + str(error))
report("done", "locked in" if locked else "without a lock")
"""


def import_text(tree: ast.Module) -> tuple[str, bool]:
    """(the program that tries the script's import, whether the script is imported whole)."""
    for node in tree.body:
        if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test) and "__main__" in ast.unparse(node.test):
            return f"import {Path(SUBMISSION_SCRIPT).stem}", True
    imports = (ast.Import, ast.ImportFrom)
    kept = [
        node
        for node in tree.body
        if isinstance(node, imports)
        or (isinstance(node, ast.Try) and all(isinstance(part, imports) for part in node.body))
    ]
    return "\n".join(map(ast.unparse, kept)), False


def try_import(folder, timeout: float = 120.0, allow_weak: bool = False) -> tuple[str, str, str | None]:
    """(outcome, message, missing module) of the script's import, from a copy of `folder` in a fresh process.

    outcome: "done", "missing", "failed", "timeout", "unlocked" (this machine cannot confine it) or "unreadable".
    """
    source = (Path(folder) / SUBMISSION_SCRIPT).read_bytes().decode("utf-8", "replace")
    tree = parsed_script(source)
    if tree is None:
        return "unreadable", "is not Python that this version can parse", None
    if not hasattr(os, "fork"):
        return "unlocked", "", None
    text, whole = import_text(tree)
    environment = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "HOME") if name in os.environ}
    with tempfile.TemporaryDirectory(prefix="golf-import-", ignore_cleanup_errors=True) as place:
        copy = Path(place, "record").resolve()
        copy.mkdir()
        for path in Path(folder).rglob("*"):
            if path.is_file() and not path.is_symlink() and path.suffix in (".py", ".json", ".txt"):
                (copy / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy / path.relative_to(folder))
        reading, writing = os.pipe()
        options = [copy, os.getpid(), "weak" if allow_weak else "full", 16 << 30, timeout, writing]
        process = subprocess.Popen(
            [sys.executable, "-E", "-B", "-X", "utf8", "-c", SANDBOX_LOCK + IMPORT_PROGRAM, *map(str, options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=copy,
            env=environment,
            pass_fds=[writing],
            start_new_session=True,
        )
        os.close(writing)
        with os.fdopen(reading, "rb") as verdicts:
            try:
                process.communicate(text.encode(), timeout=timeout)
            except subprocess.TimeoutExpired:
                return "timeout", f"did not end within {timeout:g} seconds", None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            said = verdicts.read(4096)
    if not said:
        return "failed", f"the process ended before its last line (status {process.returncode})", None
    outcome, message, missing = json.loads(said)
    if outcome == "done":
        message = f"{'the whole script' if whole else 'its import statements alone (it has no main guard)'}, {message}"
    return outcome, message, missing


# %% [markdown]
# ### `check_script`
# What the script weighs, whether it stands alone, and whether its import works. Files that it imports from the folder
# are code too and are counted.

# %%
CHALLENGE_PACKAGES = """numpy torch tqdm sentencepiece brotli huggingface_hub datasets tiktoken kernels setuptools
typing_extensions wandb""".split()


@dataclass
class ShippedCode:
    """data: the script on disk. code_bytes: its size and that of the files that it imports from its folder."""

    data: bytes = b""
    code_bytes: int = 0
    sha256: str = ""
    local_files: list = field(default_factory=list)

    @property
    def source(self) -> str:
        return self.data.decode("utf-8", "replace")


def shipped_code(folder) -> ShippedCode:
    """Measure the script and its local modules, wherever they import each other."""
    script = Path(folder) / SUBMISSION_SCRIPT
    code = ShippedCode(script.read_bytes())
    code.sha256 = hashlib.sha256(code.data).hexdigest()
    waiting, sources = [script], {}
    while waiting:
        path = waiting.pop()
        if path in sources:
            continue
        sources[path] = path.read_bytes()
        tree = parsed_script(sources[path].decode("utf-8", "replace"))
        for name in top_level_imports(tree) if tree else ():
            places = [Path(folder) / f"{name}.py", *(Path(folder) / name).rglob("*.py")]
            waiting += [place for place in places if place.is_file() and not place.is_symlink()]
    code.code_bytes = sum(map(len, sources.values()))
    code.local_files = sorted(path.relative_to(folder).as_posix() for path in sources if path != script)
    return code


def other_conventions(claimed: int, code: ShippedCode, logs: list[TrainingLog]) -> str:
    """How somebody may have come to count `claimed` bytes of code; "" when no convention known here gives it."""
    embedded = "those of the script embedded in {} (sha256 {}…), not of the shipped one"
    counts = {
        embedded.format(log.name, log.script_sha256[:12]): len(log.script) for log in logs if log.script is not None
    }
    counts |= {
        "characters instead of bytes": len(code.source),
        "bytes after translating line ends": len(code.source.replace("\r\n", "\n").encode()),
        "bytes without the white space at the end": len(code.source.rstrip().encode()),
        f"{SUBMISSION_SCRIPT} alone, without {', '.join(code.local_files)}": len(code.data),
    }
    return next((convention for convention, size in counts.items() if size == claimed), "")


def check_script(folder, code: ShippedCode, requirements: str, run_import: bool, timeout: float, allow_weak: bool):
    """Findings about the script alone."""
    if code.code_bytes > len(code.data):
        listed = ", ".join(code.local_files)
        yield Finding("warning", "code-files", f"code is expected in one script; counted with it: {listed}")
    tree = parsed_script(code.source)
    listed = {re.split(r"[^\w.-]", line.strip())[0].replace("-", "_").lower() for line in requirements.split("\n")}
    own = {Path(name).parts[0].removesuffix(".py") for name in code.local_files}
    for name in sorted(top_level_imports(tree) - own - sys.stdlib_module_names) if tree else ():
        if name.lower() not in listed and name not in CHALLENGE_PACKAGES:
            what = "is imported relative to a package" if name == "." else "is imported"
            yield Finding("warning", "requirements", f"{name} {what} and stands in no requirements.txt")
    if not run_import:
        return
    outcome, message, missing = try_import(folder, timeout, allow_weak)
    declared = (missing or "").split(".")[0].lower() in listed | {*CHALLENGE_PACKAGES}
    if outcome == "unlocked":
        yield Finding("warning", "import", "not tried: this machine cannot lock the script in (see allow_weak)")
    elif outcome == "missing" and declared:
        yield Finding("note", "import", f"not finished: {missing} is declared, but not installed here")
    elif outcome == "done":
        yield Finding("note", "import", f"works from inside the folder: {message}")
    else:
        yield Finding("error", "import", f"{SUBMISSION_SCRIPT} does not import ({outcome}): {message}")


# %% [markdown]
# ### `check_sizes`
# The rule counts the script *as shipped* and the model file. Every total that is claimed anywhere is taken apart into
# a model that some log names and the code that is left, and that is compared with the file.


# %%
def check_sizes(folder, code: ShippedCode, logs: list[TrainingLog], claims: dict):
    """Findings about bytes. claims: the JSON, numbers as int or Decimal."""
    shipped, models = code.code_bytes, {log.model_bytes: log.name for log in logs if log.model_bytes}
    for log in logs:
        if log.code_bytes is not None and log.code_bytes != shipped:
            how = other_conventions(log.code_bytes, code, logs) or "a number that no convention known here gives"
            message = f"{log.name} counts {log.code_bytes:,} bytes of code, the shipped code has {shipped:,}: {how}"
            yield Finding("error", "code-bytes", message, log.code_bytes, shipped)
        if None not in (log.model_bytes, log.code_bytes, log.total_bytes):
            total = log.model_bytes + log.code_bytes
            if total != log.total_bytes:
                message = f"{log.name}: {log.model_bytes:,} + {log.code_bytes:,} = {total:,}, not {log.total_bytes:,}"
                yield Finding("error", "size-sum", message, log.total_bytes, total)
        if log.model_bytes is not None:
            yield from size_verdict(log.name, log.model_bytes + shipped)
    claimed_code, claimed_total = claims.get("bytes_code"), claims.get("bytes_total")
    if isinstance(claimed_code, int) and claimed_code != shipped:
        how = other_conventions(claimed_code, code, logs) or "a number that no convention known here gives"
        message = f"submission.json counts {claimed_code:,} bytes of code, the shipped code has {shipped:,}: {how}"
        yield Finding("error", "code-bytes", message, claimed_code, shipped)
    if isinstance(claimed_total, int) and models:
        yield from check_total("submission.json", claimed_total, claimed_code, code, logs)
    for path in sorted(Path(folder).iterdir()):
        if path.suffix in (".ptz", ".bin", ".artifact") and path.is_file():
            size = path.stat().st_size
            if models and size not in models:
                message = f"{path.name} has {size:,} bytes, the logs name {', '.join(f'{m:,}' for m in models)}"
                yield Finding("error", "model-bytes", message, sorted(models), size)
            yield from size_verdict(path.name, size + shipped)


def size_verdict(name: str, total: int):
    """With the shipped code, is it small enough?"""
    if total > SUBMISSION_LIMIT_BYTES:
        message = f"{name}: {total:,} bytes with the shipped code are {total - SUBMISSION_LIMIT_BYTES:,} over the limit"
        yield Finding("error", "size-limit", message, SUBMISSION_LIMIT_BYTES, total)
    elif total > SUBMISSION_WARNING_BYTES:
        message = f"{name}: {total:,} bytes with the shipped code leave {SUBMISSION_LIMIT_BYTES - total:,}"
        yield Finding("warning", "size-limit", message, SUBMISSION_LIMIT_BYTES, total)


def check_total(where: str, claimed: int, claimed_code, code: ShippedCode, logs: list[TrainingLog]):
    """A total is right when it is the model of one of the logs and the shipped code."""
    rights = {log.model_bytes + code.code_bytes: log for log in logs if log.model_bytes}
    if claimed in rights:
        return
    for right, log in rights.items():
        rest = claimed - log.model_bytes
        how = other_conventions(rest, code, logs)
        if rest == log.code_bytes or how:
            message = (
                f"{where} claims {claimed:,} bytes = {log.model_bytes:,} (model, {log.name}) + {rest:,} (code"
                f"{': ' + how if how else ' as its log counts'}); the shipped code has {code.code_bytes:,}, "
                f"which makes {right:,}"
            )
            if isinstance(claimed_code, int) and claimed_code != rest:
                message += f". It also claims {claimed_code:,} bytes of code, which does not go with this total"
            yield Finding("error", "bytes-total", message, claimed, right)
            return
    listed = ", ".join(f"{right:,} ({log.name})" for right, log in rights.items())
    message = f"{where} claims {claimed:,} bytes; a logged model and the shipped code make {listed}"
    yield Finding("error", "bytes-total", message, claimed, sorted(rights))


# %% [markdown]
# ### `check_log`
# Each log by itself: does it end with a score, and do nats and bits per byte fit its validation text?


# %%
def check_log(log: TrainingLog, code: ShippedCode, record_track: bool):
    """Findings about one log."""
    for label, nats, bpb in [("validation", *row[1:]) for row in log.validations] + [row[:3] for row in log.results]:
        if not (nats.is_finite() and bpb.is_finite() and nats > 0 and bpb > 0):
            yield Finding("error", "loss", f"{log.name}: {label} is {nats} nats, {bpb} bits per byte", nats, bpb)
            return
    if log.result is None:
        yield Finding("error", "result", f"{log.name} ends without a score (a line with val_loss: and val_bpb:)")
    if log.seed is None:
        yield Finding("warning", "seeds", f"{log.name} does not say its seed")
    yield from check_log_script(log, code)
    yield from check_log_times(log, record_track)
    if log.result is None:
        return
    _, nats, bpb, _ = log.result
    low, high = bytes_per_token_range(nats, bpb)
    for step, *pair in log.validations:
        below, above = bytes_per_token_range(*pair)
        if above < low or below > high:
            message = (
                f"{log.name}, step {step}: {pair[0]} nats and {pair[1]} bits per byte mean {below:.4f} to {above:.4f} "
                f"bytes per token, the final score {low:.5f}"
            )
            yield Finding("error", "bytes-per-token", message, pair[1], low)
            break
    known = VALIDATION_BYTES.get(log.targets)
    if known:
        expected = known / log.targets
        if not low * (1 - 5e-6) <= expected <= high * (1 + 5e-6):  # the table's own digits
            message = (
                f"{log.name}: {nats} nats and {bpb} bits per byte mean {low:.5f} bytes per token; {log.targets:,} "
                f"targets of {known:,} bytes have {expected:.5f}"
            )
            yield Finding("error", "bytes-per-token", message, low, expected)
    if log.targets == EARLY_VALIDATION_TARGETS:
        message = f"{log.name} scores the early validation text, whose results do not compare with the frozen one's"
        yield Finding("warning", "validation-text", message, log.targets, FROZEN_VALIDATION_TARGETS)


# %% [markdown]
# ### `check_log_script`
# Did the shipped script write this log, and does the log show what it was set to?


# %%
def check_log_script(log: TrainingLog, code: ShippedCode):
    """Did the shipped script write this log, and does the log show what it was set to?"""
    if not log.script_sha256:
        message = f"{log.name} does not show which script wrote it (no source text, no script_sha256 line)"
        yield Finding("warning", "script-unknown", message)
        return
    if log.script_sha256 == code.sha256:
        return
    size = f"{len(log.script):,} bytes, " if log.script is not None else ""
    message = (
        f"{log.name} was written by another script ({size}sha256 {log.script_sha256[:12]}…) than the shipped one "
        f"({len(code.data):,} bytes, {code.sha256[:12]}…)"
    )
    yield Finding("error", "script-differs", message, log.script_sha256, code.sha256)
    if log.script is None:
        return
    ran, shipped = environment_defaults(log.script.decode()), environment_defaults(code.source)
    silent, overridden = [], []
    for name in sorted(ran.keys() & shipped.keys()):
        if same_setting(ran[name], shipped[name]):
            continue
        logged = log.settings.get(LOGGED_AS.get(name, name.lower()))
        if logged is None:
            silent.append(f"{name} ({ran[name]} there, {shipped[name]} in the shipped script)")
        elif not same_setting(logged, ran[name]):
            overridden.append(f"{name} ({ran[name]} there, {logged} in the log)")
    if overridden:
        message = f"{log.name}: set from outside, against the defaults of its own script: {', '.join(overridden)}"
        yield Finding("warning", "overridden", message)
    if silent:
        message = f"{log.name} prints nowhere what it was trained with: {', '.join(silent)}"
        yield Finding("error", "unauditable", message)


# %% [markdown]
# ### `check_log_times`
# The ten minutes, and whether steps, times and averages go together.


# %%
def check_log_times(log: TrainingLog, record_track: bool):
    """Steps, averages and the ten minutes."""
    severity = "error" if record_track else "note"
    for step, ms, average in log.train_steps:
        if average is not None and step > 0:
            slack = (0.5 + float(half_unit(ms))) / step + half_unit(average) + 1e-9
            if abs(float(ms) / step - float(average)) > slack:
                message = f"{log.name}, step {step}: {ms} ms are {float(ms) / step:.2f} ms per step, not {average}"
                yield Finding("error", "step-time", message, average, float(ms) / step)
                break
    order = [step for step, *_ in log.train_steps]
    times = [ms for _, ms, _ in log.train_steps]
    if order != sorted(order) or times != sorted(times):
        yield Finding("error", "step-order", f"{log.name}: steps or times run backwards, so it holds more than one run")
    cap = log.settings.get("max_wallclock_seconds", "")
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", cap) and not 0 < float(cap) <= TIME_LIMIT_SECONDS:
        message = (
            f"{log.name}: the clock was set to stop at {cap} seconds (0: never); the limit is {TIME_LIMIT_SECONDS}"
        )
        yield Finding(severity, "time-cap", message, cap, TIME_LIMIT_SECONDS)
    if log.train_ms is not None and log.train_ms > TIME_LIMIT_SECONDS * 1000:
        over = float(log.train_ms) - TIME_LIMIT_SECONDS * 1000
        one_step = float(log.train_ms) / max(log.steps or 1, 1)
        message = f"{log.name} trained {float(log.train_ms):,.0f} ms, {over:,.0f} over the limit"
        if over <= one_step:  # the clock is looked at after a step
            yield Finding("note", "train-time", message + " (less than a step)", log.train_ms, TIME_LIMIT_SECONDS)
        else:
            yield Finding(severity, "train-time", message, log.train_ms, TIME_LIMIT_SECONDS)
    if log.evaluation_ms > TIME_LIMIT_SECONDS * 1000:
        seconds = log.evaluation_ms / 1000
        message = f"{log.name}: its evaluations took {seconds:,.0f} seconds together, the limit is {TIME_LIMIT_SECONDS}"
        yield Finding(severity, "eval-time", message, seconds, TIME_LIMIT_SECONDS)
    world = whole_number(log.settings.get("world_size", ""))
    if record_track and world not in (None, 8):
        message = f"{log.name} ran on {world} processes; the limit of ten minutes is for 8 GPUs"
        yield Finding("warning", "world-size", message, world, 8)


# %% [markdown]
# ### `check_logs`
# All logs together: one script, one validation text, each seed once.


# %%
def check_logs(logs: list[TrainingLog], code: ShippedCode, record_track: bool):
    """Findings about the logs, each and together."""
    for log in logs:
        yield from check_log(log, code, record_track)
    seeds = [log.seed for log in logs if log.seed is not None]
    twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
    if twice:
        yield Finding("error", "seeds", f"more than one log for seed {', '.join(map(str, twice))}")
    results = [log.result for log in logs if log.result]
    if len({(nats, bpb) for _, nats, bpb, _ in results}) < len(results):
        yield Finding("error", "seeds", "two logs end with the same score to the last digit: one run, copied?")
    scripts = {log.script_sha256: log.name for log in logs if log.script_sha256}
    if len(scripts) > 1:
        listed = ", ".join(f"{name}: {sha256[:12]}…" for sha256, name in scripts.items())
        message = f"the logs come from different scripts ({listed}), so their mean and deviation are of no one recipe"
        yield Finding("error", "mixed-scripts", message)
    targets = {log.targets: log.name for log in logs if log.targets}
    ranges = [bytes_per_token_range(row[1], row[2]) for row in results]
    if len(targets) > 1 or (ranges and max(low for low, _ in ranges) > min(high for _, high in ranges) * (1 + 1e-6)):
        listed = ", ".join(f"{name}: {number:,} targets" for number, name in targets.items())
        message = f"the logs were scored on different validation texts ({listed or 'by their bytes per token'})"
        yield Finding("error", "mixed-texts", message)
    steps = [log.steps for log in logs if log.steps]
    if len(steps) > 1 and max(steps) / min(steps) > 1.03:
        message = (
            f"{min(steps):,} to {max(steps):,} steps in the same time, {max(steps) / min(steps) - 1:.0%} apart: "
            "the scatter of the seeds holds that of the machines"
        )
        yield Finding("warning", "throughput", message, min(steps), max(steps))


# %% [markdown]
# ### `check_json`
# The leaderboard reads this file. Both generations of its keys are known: the first has one score and two sizes, the
# second has all seeds.

# %%
FIRST_KEYS = ("author", "github_id", "name", "blurb", "date", "val_loss", "val_bpb", "bytes_total", "bytes_code")
LATER_KEYS = ("author", "github_id", "name", "date", "track", "val_bpb", "val_bpb_std", "seeds", "seed_results")


def check_json(claims: dict, logs: list[TrainingLog], code: ShippedCode, track: str):
    """Findings about submission.json against the logs. Sizes: see `check_sizes`."""
    keys = LATER_KEYS if "seed_results" in claims or "seeds" in claims else FIRST_KEYS
    missing = [key for key in keys if claims.get(key) in (None, "") and not (key == "val_bpb_std" and len(logs) == 1)]
    if missing:
        yield Finding("error", "json-keys", f"submission.json lacks {', '.join(missing)}")
    if not re.match(r"\d{4}-\d\d-\d\d", str(claims.get("date", ""))):
        yield Finding("error", "json-keys", f"submission.json: the date is {claims.get('date')!r}, not YYYY-MM-DD")
    if claims.get("track") and track.startswith("track_") and track.removeprefix("track_") not in (
        claims["track"], str(claims["track"]).removeprefix("track_")
    ):  # fmt: skip
        message = f"submission.json says track {claims['track']}, the folder lies in {track}"
        yield Finding("error", "track", message, claims["track"], track)
    scored = {log.seed if log.seed is not None else log.name: log for log in logs if log.result}
    yield from check_scores(claims, scored)
    yield from check_seed_results(claims, scored, code)


# %% [markdown]
# ### `check_scores`
# Is the score on the leaderboard that of one seed or the mean, and does the deviation divide by n - 1?


# %%
def check_scores(claims: dict, scored: dict):
    """val_bpb and val_loss: of one log, or the mean? And the deviation: with n - 1?"""
    whose = {}
    for key, column in (("val_loss", 1), ("val_bpb", 2)):
        claimed = claims.get(key)
        if not isinstance(claimed, int | Decimal) or not scored:
            continue
        values = {seed: log.result[column] for seed, log in scored.items()}
        mean = mean_and_sd(values.values())[0]
        matches = [seed for seed, value in values.items() if printed_alike(value, claimed)]
        if len(values) > 1 and printed_alike(Decimal(mean), Decimal(claimed)):
            whose[key] = "the mean"
        elif matches:
            whose[key] = f"seed {matches[0]}"
            if len(values) > 1:
                message = (
                    f"submission.json: {key} {claimed} is that of seed {matches[0]} alone; the mean is {mean:.8f}, the "
                    f"best {min(values.values())}, the worst {max(values.values())}"
                )
                yield Finding("note", "one-seed", message, claimed, mean)
        else:
            listed = ", ".join(f"{value} (seed {seed})" for seed, value in values.items())
            message = f"submission.json: {key} is {claimed}; the logs have {listed}, mean {mean:.8f}"
            yield Finding("error", key.replace("_", "-"), message, claimed, mean)
    if len(set(whose.values())) > 1:
        message = f"submission.json: val_loss is that of {whose['val_loss']}, val_bpb that of {whose['val_bpb']}"
        yield Finding("error", "one-seed", message)
    pair = claims.get("val_loss"), claims.get("val_bpb")
    if all(isinstance(value, Decimal) and value > 0 for value in pair) and scored:
        low, high = bytes_per_token_range(*pair)
        ranges = [bytes_per_token_range(*log.result[1:3]) for log in scored.values()]
        if low > max(above for _, above in ranges) * (1 + 1e-6) or high < min(below for below, _ in ranges) * (
            1 - 1e-6
        ):
            message = f"submission.json: {pair[0]} nats and {pair[1]} bits per byte mean {low:.5f} bytes per token"
            message += f"; the logs have {min(ranges)[0]:.5f}"
            yield Finding("error", "bytes-per-token", message, low, min(ranges)[0])
    for key, column in (("val_loss_std", 1), ("val_bpb_std", 2)):
        claimed = claims.get(key)
        values = [log.result[column] for log in scored.values()]
        if not isinstance(claimed, int | Decimal) or len(values) < 2:
            continue
        sd = mean_and_sd(values)[1]
        population = sd * math.sqrt((len(values) - 1) / len(values))
        if printed_alike(Decimal(sd), Decimal(claimed)):
            continue
        how = " (it divides by n, which makes every test too sure)"
        how = how if printed_alike(Decimal(population), Decimal(claimed)) else ""
        message = f"submission.json: {key} is {claimed}{how}; the sample deviation is {sd:.8f}"
        yield Finding("warning" if how else "error", "deviation", message, claimed, sd)


# %% [markdown]
# ### `check_seed_results`
# A seed without a log, a log without a seed, or a row that the log contradicts.


# %%
def check_seed_results(claims: dict, scored: dict, code: ShippedCode):
    """seeds and seed_results against the logs."""
    listed = claims.get("seeds")
    rows = claims.get("seed_results") or {}
    if not isinstance(rows, dict) or not isinstance(listed, list | None):
        yield Finding("error", "json-keys", "submission.json: seeds has to be a list and seed_results an object")
        return
    named = set(map(str, listed or [])) | set(map(str, rows))
    logged = {str(seed) for seed in scored}
    if named and named - logged:
        yield Finding(
            "error", "seeds", f"submission.json names seeds without a log: {', '.join(sorted(named - logged))}"
        )
    if named and logged - named:
        message = f"logs of seeds that submission.json leaves out: {', '.join(sorted(logged - named))}"
        yield Finding("error", "seeds", message)
    for seed, log in scored.items():
        row = rows.get(str(seed))
        if not isinstance(row, dict):
            continue
        total = log.model_bytes + code.code_bytes if log.model_bytes else None
        for key, found in (
            ("val_loss", log.result[1]), ("val_bpb", log.result[2]), ("steps", log.steps), ("artifact_bytes", total),
        ):  # fmt: skip
            claimed = row.get(key)
            if claimed is None or found is None or not isinstance(claimed, int | Decimal):
                continue
            if not printed_alike(Decimal(found), Decimal(claimed)):
                rule = "bytes-total" if key == "artifact_bytes" else key.replace("_", "-")
                rest = f" (its log's total: {log.total_bytes:,})" if key == "artifact_bytes" and log.total_bytes else ""
                message = f"submission.json, seed {seed}: {key} is {claimed}, the files give {found}{rest}"
                yield Finding("error", rule, message, claimed, found)


# %% [markdown]
# ### `check_readme`
# Prose is harder. What is looked for are the shapes in which results are told: named sizes, pairs of losses, a line
# that names a seed, a t with its p, and numbers with so many digits that they must come from somewhere. A number with
# six decimals that no log, no JSON and no mean of them contains is reported: it may be true, but not by these files.

# %%
NO_HYPERPARAMETER = r"RUN_ID|.*_PATH|.*_DIR|(LOCAL_)?RANK|WORLD_SIZE|MASTER_.*"
README_SIZES = {
    "model": r"serialized model[^:\n]*:\W*([\d,_]{5,})",
    "code": r"code size[^:\n]*:\W*([\d,_]{3,})",
    "total": r"total (?:submission )?size[^:\n]*:\W*([\d,_]{5,})",
}


def check_readme(readme: str, claims: dict, logs: list[TrainingLog], code: ShippedCode):
    """Findings about the README against files, logs and JSON."""
    sizes = {
        name: [int(printed_number(n)) for n in re.findall(shape, readme, re.I)] for name, shape in README_SIZES.items()
    }
    for size in set(sizes["code"]) - {code.code_bytes}:
        how = other_conventions(size, code, logs) or "a number that no convention known here gives"
        message = f"README.md counts {size:,} bytes of code, the shipped code has {code.code_bytes:,}: {how}"
        yield Finding("error", "code-bytes", message, size, code.code_bytes)
    models = {log.model_bytes for log in logs if log.model_bytes}
    for size in set(sizes["model"]) - models - {67_224_983} if models else ():
        yield Finding(
            "error", "model-bytes", f"README.md: a model of {size:,} bytes is in no log", size, sorted(models)
        )
    for size in sorted(set(sizes["total"])) if models else ():
        stated = sizes["code"][0] if len(set(sizes["code"])) == 1 else None
        yield from check_total("README.md", size, stated, code, logs)
    yield from check_readme_scores(readme, logs)
    yield from check_readme_origins(readme, claims, logs)
    yield from check_readme_test(readme, logs)
    for log in logs:
        if log.script_sha256 and log.script_sha256[:8] not in readme:
            yield Finding(
                "warning", "script-hash", f"README.md does not state the hash of the script behind {log.name}"
            )
    printed = {name for log in logs for name in log.settings}
    silent = [
        name
        for name in environment_defaults(code.source)
        if LOGGED_AS.get(name, name.lower()) not in printed
        and not re.search(rf"\b{re.escape(name)}\b", readme, re.I)
        and not re.fullmatch(NO_HYPERPARAMETER, name)
    ]
    if silent and logs:
        message = f"neither logs nor README.md state the values of {', '.join(silent)}"
        yield Finding("warning", "hyperparameters", message)


# %% [markdown]
# ### `check_readme_scores`
# Values with a log's own words in front of them, and lines that name one seed.


# %%
def check_readme_scores(readme: str, logs: list[TrainingLog]):
    """Values with a log's own words in front of them, and lines that name one seed."""
    columns = {"val_loss": 1, "val_bpb": 2}
    everything = {
        key: [row[column] for log in logs for row in [*log.validations, *log.results]]
        for key, column in columns.items()
    }
    for key, text in dict.fromkeys(re.findall(r"\b(val_loss|val_bpb):\s*(\d+\.\d+)", readme)):
        if logs and not any(printed_alike(value, printed_number(text)) for value in everything[key]):
            yield Finding("error", key.replace("_", "-"), f"README.md: {key}:{text} is in no log", text)
    known_steps = {(str(log.steps), str(log.iterations)) for log in logs}
    for steps, total in dict.fromkeys(re.findall(r"\b(\d{2,})/(\d{3,})\b", readme)):
        if logs and (steps, total) not in known_steps and total in {pair[1] for pair in known_steps}:
            yield Finding("error", "steps", f"README.md: no log stopped at step {steps}/{total}", steps)
    for text in dict.fromkeys(re.findall(r"step_avg:\s*([\d.]+)ms", readme)):
        averages = [average for log in logs for _, _, average in log.train_steps if average is not None]
        if averages and not any(printed_alike(average, printed_number(text)) for average in averages):
            yield Finding("error", "step-time", f"README.md: step_avg:{text}ms is in no log", text)
    scores = {log.seed: log.result[1:3] for log in logs if log.result and log.seed is not None}
    for line in readme.split("\n"):
        named = {int(seed) for seed in re.findall(r"(?:seed\W{0,4}|^\|\s*\W*)(\d+)\b", line, re.I)} & scores.keys()
        if len(named) != 1:
            continue
        (seed,) = named
        for text in re.findall(r"(?<![\d.])\d\.\d{6,}", line):
            owners = [s for s, pair in scores.items() if any(printed_alike(v, printed_number(text)) for v in pair)]
            if owners and seed not in owners:
                message = f"README.md gives {text} for seed {seed}; by the logs it is that of seed {owners[0]}"
                yield Finding("error", "seeds", message, seed, owners[0])


# %% [markdown]
# ### `known_numbers`
# What a long number may come from: everything that logs and JSON hold, and the means of it.


# %%
def known_numbers(claims: dict, logs: list[TrainingLog]) -> list:
    """Every number that the logs and the JSON hold or give: values, means, deviations, bytes per token."""
    rows = [row for log in logs for row in [*log.validations, *log.results]]
    known = [value for row in rows for value in row[1:3]]
    waiting = [claims]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict | list):
            waiting += item.values() if isinstance(item, dict) else item
        elif isinstance(item, Decimal):
            known.append(item)
    lasts = {
        1: [log.validations[-1][1:] for log in logs if log.validations],
        2: [log.result[1:3] for log in logs if log.result],
    }
    for pairs in lasts.values():
        for column in (0, 1):
            values = [pair[column] for pair in pairs if pair[column].is_finite()]
            if len(values) > 1:
                mean, sd = mean_and_sd(values)
                known += [mean, sd, sd * math.sqrt((len(values) - 1) / len(values)), sd / math.sqrt(len(values))]
        known += [bytes_per_token_of(float(nats), float(bpb)) for nats, bpb in pairs if bpb > 0]
    return known


# %% [markdown]
# ### `check_readme_origins`
# Numbers that come from nowhere, wrong roundings of them, and margins and baselines of another unit or text.


# %%
def check_readme_origins(readme: str, claims: dict, logs: list[TrainingLog]):
    """Where do the long numbers come from?"""
    if not logs:
        return
    known = known_numbers(claims, logs)
    scores = [log.result[2] for log in logs if log.result]
    unknown = {}
    for line in readme.split("\n"):
        for text in re.findall(r"(?<![\w.,/-])\d+\.\d{4,}(?![\w.]*[\w])", line):
            number = printed_number(text)
            near = any(float(score) / 1.3 < float(number) < 1.3 * float(score) for score in scores)
            if (len(text.split(".")[1]) >= 6 or near) and not any(printed_alike(value, number) for value in known):
                unknown.setdefault(number, line.strip())
    long = [number for number in unknown if number.as_tuple().exponent <= -6]
    for number in unknown:
        thresholds = [other for other in long if other - number == Decimal("0.005")]
        if thresholds:
            ratio = bytes_per_token_of(*map(float, next(log.result[1:3] for log in logs if log.result)))
            message = (
                f"README.md: {number} is {thresholds[0]} less 0.005 bits per byte; the rule is {RECORD_MARGIN_NATS} "
                f"nats per token, which is {nats_to_bpb(RECORD_MARGIN_NATS, ratio):.5f} bits per byte here"
            )
            yield Finding("warning", "margin-unit", message, number, nats_to_bpb(RECORD_MARGIN_NATS, ratio))
        elif number in long:
            message = f"README.md: {number} occurs in no log of this folder, nor in its JSON ({unknown[number][:90]})"
            yield Finding("warning", "unknown-number", message, number)
        elif printed_alike(EARLY_BASELINE_BPB, number):
            message = (
                f"README.md compares with {number}, the baseline on the early validation text; on the frozen one it "
                f"has {FROZEN_BASELINE_BPB}, so the gain is {float(FROZEN_BASELINE_BPB) - mean_and_sd(scores)[0]:.4f}"
            )
            if any(log.targets in (0, FROZEN_VALIDATION_TARGETS) for log in logs):
                yield Finding("warning", "baseline-text", message, number, FROZEN_BASELINE_BPB)
        else:
            nearly = [other for other in long if 0 < abs(other - number) < Decimal("0.0002")]
            nearly = [other for other in nearly if not printed_alike(other, number)]
            if nearly:
                digits = -number.as_tuple().exponent
                message = f"README.md: {number} is not {nearly[0]} rounded, which is {float(nearly[0]):.{digits}f}"
                yield Finding("warning", "rounding", message, number, nearly[0])
            elif not any(printed_alike(other, number) for other in long):
                message = f"README.md: {number} occurs in no log of this folder ({unknown[number][:90]})"
                yield Finding("note", "unknown-number", message, number)
    for ours, theirs in re.findall(r"~?(\d+(?:\.\d+)?)\s*ms(?:/step)?\W{1,4}vs\.?\W{1,3}(\d+(?:\.\d+)?)\s*ms", readme):
        ran = whole_number(logs[0].settings.get("train_batch_tokens", ""))
        default = environment_defaults((logs[0].script or b"").decode()).get("TRAIN_BATCH_TOKENS", "")
        default = whole_number(default.replace("_", ""))
        if ran and default and ran != default:
            cost = float(ours) / ran / (float(theirs) / default)
            message = (
                f"README.md compares {ours} ms per step of {ran:,} tokens with {theirs} ms per step of what by "
                f"default are {default:,}: per token that is {cost:.1f} times"
            )
            yield Finding("note", "step-time", message, float(ours) / float(theirs), cost)


# %% [markdown]
# ### `check_readme_test`
# A published t-test, done again.


# %%
def check_readme_test(readme: str, logs: list[TrainingLog]):
    """A published t-test, done again: a line with t=... and the reference that it names."""
    for line in readme.split("\n"):
        t, p = re.search(r"\bt\s*=\s*(-?\d+\.?\d*)", line), re.search(r"\bp\s*[=<]\s*(\d*\.\d+)", line)
        named = re.findall(r"against\W+(\d+\.\d{4,})", line) or re.findall(r"(?<![\w.=])[1-9]\d*\.\d{4,}", line)
        references = [printed_number(text) for text in named]
        scored = [log.result for log in logs if log.result]
        if not t or not references or len(scored) < 2:
            continue
        column = min((1, 2), key=lambda c: abs(float(scored[0][c]) - float(references[0])))
        test = one_sample_test(
            [float(row[column]) for row in scored], float(references[0]), ("nats", "bpb")[column - 1]
        )
        if not printed_alike(Decimal(test.t), printed_number(t[1])):
            message = f"README.md: t = {t[1]} against {references[0]}; the logs give t = {test.t:.2f}, p = {test.p:.4f}"
            yield Finding("warning", "t-test", message, printed_number(t[1]), test.t)
        if p and not printed_alike(Decimal(test.p), printed_number(p[1])) and float(p[1]) < test.p:
            message = f"README.md: p = {p[1]} against {references[0]}; the logs give p = {test.p:.4f}"
            yield Finding("error", "t-test", message, printed_number(p[1]), test.p)


# %% [markdown]
# ### `lint_submission`
# The whole folder. With the results of the standing record, the significance of the claim is computed anew, in the unit
# of the rule.


# %%
def lint_submission(
    folder, previous=(), run_import: bool = True, timeout: float = 120.0, allow_weak: bool = False
) -> list[Finding]:
    """All findings about a submission folder, errors first. The folder is only read; the script runs in a copy.

    previous: SeedResult list of the record to beat. run_import: also try the script's import, for at most `timeout`
    seconds; allow_weak: even where this machine cannot confine it. UserError when there is no such folder.
    Spec sections 0.1, 3.4 and 8 (check 9).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a folder. Give the folder that holds submission.json and {SUBMISSION_SCRIPT}."
        )
    findings, track = [], folder.resolve().parent.name
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            findings.append(
                Finding("error", "files", f"{path.relative_to(folder)} is a link: a submission holds files")
            )
    if not re.fullmatch(r"\d{4}-\d\d-\d\d_\w[\w.+-]*", folder.resolve().name):
        findings.append(Finding("warning", "files", f"the folder is named {folder.name}, not <YYYY-MM-DD>_<name>"))
    own = {path.name: path for path in folder.iterdir() if path.is_file() and not path.is_symlink()}
    for name in ("README.md", "submission.json", SUBMISSION_SCRIPT):
        if name not in own:
            findings.append(Finding("error", "files", f"{name} is missing"))
    code = shipped_code(folder) if SUBMISSION_SCRIPT in own else None
    readme, requirements = (
        own[name].read_bytes().decode("utf-8", "replace") if name in own else ""
        for name in ("README.md", "requirements.txt")
    )
    claims = {}
    if "submission.json" in own:
        try:
            claims = json.loads(own["submission.json"].read_bytes(), parse_float=Decimal)
        except (ValueError, ArithmeticError, RecursionError) as error:
            findings.append(Finding("error", "json-keys", f"submission.json is not JSON: {error}"))
        if not isinstance(claims, dict):
            findings.append(Finding("error", "json-keys", "submission.json is not an object"))
            claims = {}
    logs = read_logs(folder)
    if not logs:
        findings.append(Finding("error", "files", "there is no train log (*.log, or *.txt with steps and scores)"))
    if code:
        findings += check_script(folder, code, requirements, run_import, timeout, allow_weak)
        findings += check_sizes(folder, code, logs, claims)
        findings += check_logs(logs, code, track == RECORD_TRACK)
        findings += check_readme(readme, claims, logs, code) if readme else []
    if claims:
        findings += check_json(claims, logs, code or ShippedCode(), track)
    findings += check_significance(logs, previous, track == RECORD_TRACK)
    return sorted({str(f): f for f in findings}.values(), key=lambda finding: SEVERITIES.index(finding.severity))


# %% [markdown]
# ### `read_logs`
# Which files are logs is decided by what is in them.


# %%
def read_logs(folder) -> list[TrainingLog]:
    """The train logs of a folder and of its subfolder logs/, by name; other text files are left out."""
    paths = [*Path(folder).glob("*.log"), *Path(folder).glob("*.txt"), *Path(folder).glob("logs/*")]
    logs = [
        parse_training_log(path.read_bytes(), path.relative_to(folder).as_posix())
        for path in sorted(paths)
        if path.is_file() and not path.is_symlink() and path.name != "requirements.txt"
    ]
    return [log for log in logs if log.results or log.train_steps or log.validations]


# %% [markdown]
# ### `check_significance`
# The rule itself, with the results of the standing record.


# %%
def check_significance(logs: list[TrainingLog], previous, record_track: bool):
    """Is it a record, by the rule in nats?"""
    scored = [log for log in logs if log.result and min(log.result[1:3]) > 0]
    if len(scored) < 3 and record_track:
        yield Finding("warning", "significance", f"{len(scored)} scored logs: a record normally shows three seeds")
    if not previous or len(scored) < 2:
        return
    results = [
        SeedResult(number if log.seed is None else log.seed, float(log.result[1]), float(log.result[2]))
        for number, log in enumerate(scored)
    ]
    try:
        tests, sentence = significance_table(results, list(previous))
    except UserError as error:
        yield Finding("error", "significance", str(error))
        return
    official = tests[0]
    severity = "note" if sentence.startswith("clears") else "error" if record_track else "warning"
    yield Finding(severity, "significance", f"{sentence}. {official}", RECORD_P, official.p)


# %% [markdown]
# ### `findings_table`
# What a person reads.


# %%
def findings_table(findings: list[Finding]) -> str:
    """One line for each finding, and a last one that counts them."""
    counts = [f"{sum(f.severity == s for f in findings)} {s}s" for s in SEVERITIES]
    return "\n".join([*map(str, findings), ", ".join(counts)])
