# %% [markdown]
# ## Writing the submission
#
# One folder, `records/<track>/<date>_<name>/`: a script that runs from inside it, a log for each seed, a JSON for the
# leaderboard and a README. Nothing in it is typed by hand. All scores, steps and sizes are read off the logs and the
# files, so they cannot disagree with them; the README says which script, by its hash, wrote each log, and lists every
# hyper-parameter as it took effect. What would make a reviewer doubt is refused here, before the folder exists: a log
# of another script, a run without a score, too many bytes, two validation texts under one mean.

# %%
import hashlib
import json
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from golf.seed_planner import SeedResult, mean_and_sd, refuse_mixed_results, significance_table
from golf.submission_linter import (
    RECORD_TRACK,
    SUBMISSION_LIMIT_BYTES,
    SUBMISSION_SCRIPT,
    TIME_LIMIT_SECONDS,
    TrainingLog,
    lint_submission,
    parse_training_log,
    parsed_script,
    same_setting,
)
from nanochat.runtime import UserError, get_dist_info, write_atomic
from nanochat.stages import plain_json

# %% [markdown]
# ### What a person has to say
# The names, and what was tried and why. Everything else is measured.

# %%
NON_RECORD_TRACK = "track_non_record_16mb"


@dataclass(frozen=True)
class SubmissionCard:
    """name: as on the leaderboard. folder: the short name of the folder, without the date. date: YYYY-MM-DD.

    story: markdown for the README: what is different, and what each part of it is worth. command: how to run it again.
    """

    author: str
    github_id: str
    name: str
    folder: str
    blurb: str
    date: str
    hardware: str
    story: str
    command: str
    track: str = NON_RECORD_TRACK


@dataclass(frozen=True)
class SubmissionRun:
    """One trained seed. log: its path, or its text. model: path of the compressed model, if it is still at hand.

    script_sha256: of the script that ran, for a log that holds neither the script nor a script_sha256 line.
    """

    log: str | bytes | Path
    model: str | Path | None = None
    script_sha256: str = ""


# %% [markdown]
# ### `read_runs`
# Measure first, then judge: all faults are collected, so that one look shows everything that is missing.


# %%
@dataclass
class MeasuredRun:
    """A run with its sizes in bytes; parsed: its log."""

    data: bytes
    parsed: TrainingLog
    model_bytes: int
    artifact_bytes: int
    script_sha256: str


def read_runs(runs, script: bytes, script_sha256: str) -> tuple[list[MeasuredRun], list[str]]:
    """(the runs, by seed; everything that speaks against them). script: as it will be shipped."""
    measured, faults = [], []
    for number, run in enumerate(runs, 1):
        text_given = isinstance(run.log, bytes) or (isinstance(run.log, str) and "\n" in run.log)
        if not text_given and not Path(run.log).is_file():
            faults.append(f"there is no log {run.log}")
            continue
        data = (run.log.encode() if isinstance(run.log, str) else run.log) if text_given else Path(run.log).read_bytes()
        log = parse_training_log(data, f"log {number}" if text_given else Path(run.log).name)
        unsaid = {
            "seed": log.seed,
            "final score": log.result,
            "number of steps": log.steps,
            "training time": log.train_ms,
        }
        unsaid = [what for what, value in unsaid.items() if value is None]
        model_bytes = log.model_bytes
        if run.model is not None and not Path(run.model).is_file():
            faults.append(f"there is no model {run.model}")
        elif run.model is not None:
            model_bytes = Path(run.model).stat().st_size
            if log.model_bytes not in (None, model_bytes):
                faults.append(f"{log.name} names a model of {log.model_bytes:,} bytes, {run.model} has {model_bytes:,}")
        elif model_bytes is None:
            unsaid.append("size of the model")
        if unsaid:
            faults.append(f"{log.name} does not say: {', '.join(unsaid)}")
        if log.code_bytes not in (None, len(script)):
            faults.append(f"{log.name} counts {log.code_bytes:,} bytes of code, the script has {len(script):,}")
        sha256 = log.script_sha256 or run.script_sha256
        if not sha256:
            faults.append(f"{log.name} does not show which script wrote it: give script_sha256")
        elif sha256 != script_sha256:
            faults.append(
                f"{log.name} was written by script {sha256[:12]}…, not by the one to ship, {script_sha256[:12]}…"
            )
        total = (model_bytes or 0) + len(script)
        if total > SUBMISSION_LIMIT_BYTES:
            faults.append(
                f"{log.name}: {model_bytes:,} bytes of model + {len(script):,} of code = {total:,}, "
                f"{total - SUBMISSION_LIMIT_BYTES:,} over the limit of {SUBMISSION_LIMIT_BYTES:,}"
            )
        if not unsaid:
            measured.append(MeasuredRun(data, log, model_bytes, total, sha256))
    measured.sort(key=lambda run: run.parsed.seed)
    return measured, faults


# %% [markdown]
# ### `submission_json`
# Both generations of keys in one file. The score is the mean over the seeds, the size is that of the largest of them,
# and what can be measured under `compliance` is measured.


# %%
def submission_json(
    card: SubmissionCard, runs: list[MeasuredRun], script_bytes: int, pytorch: str, claims: dict
) -> dict:
    """The content of submission.json. claims: what the author vouches for, e.g. {"score_first_ttt": True}."""
    nats, bpb = ([float(run.parsed.result[column]) for run in runs] for column in (1, 2))
    seed_results = {
        str(run.parsed.seed): {
            "val_loss": float(run.parsed.result[1]),
            "val_bpb": float(run.parsed.result[2]),
            "artifact_bytes": run.artifact_bytes,
            "steps": run.parsed.steps,
        }
        for run in runs
    }
    measured = {
        "train_under_600s": all(float(run.parsed.train_ms) <= TIME_LIMIT_SECONDS * 1000 for run in runs),
        "artifact_under_16mb": all(run.artifact_bytes <= SUBMISSION_LIMIT_BYTES for run in runs),
        "eval_under_600s": all(run.parsed.evaluation_ms <= TIME_LIMIT_SECONDS * 1000 for run in runs),
        "three_seeds": len(runs) >= 3,
    }
    several = len(runs) > 1
    return {
        "author": card.author,
        "github_id": card.github_id,
        "name": card.name,
        "blurb": card.blurb,
        "date": card.date,
        "track": card.track.removeprefix("track_"),
        "val_loss": round(mean_and_sd(nats)[0], 8),
        "val_bpb": round(mean_and_sd(bpb)[0], 8),
        "val_loss_std": round(mean_and_sd(nats)[1], 8) if several else None,
        "val_bpb_std": round(mean_and_sd(bpb)[1], 8) if several else None,
        "bytes_total": max(run.artifact_bytes for run in runs),
        "bytes_code": script_bytes,
        "seeds": [run.parsed.seed for run in runs],
        "seed_results": seed_results,
        "hardware": card.hardware,
        "pytorch_version": pytorch,
        "compliance": {**claims, **measured},
    }


# %% [markdown]
# ### `submission_readme`
# The write-up: scores in both units, sizes, the script's hash behind each log, every setting, and, with the results of
# the standing record, the test that decides.


# %%
def readme_table(head: list[str], rows) -> str:
    """A markdown table; bars inside cells are escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def submission_readme(
    card: SubmissionCard, runs: list[MeasuredRun], content: dict, hyperparameters: dict, sha256: str, previous=()
) -> str:
    """README.md. content: of submission.json. previous: SeedResult list of the record to beat."""
    score = f"{content['val_bpb']:.8f} bits per byte, {content['val_loss']:.8f} nats per token"
    if len(runs) > 1:
        deviation = f"{content['val_bpb_std']:.8f} bits per byte, {content['val_loss_std']:.8f} nats"
        score += f" (mean of {len(runs)} seeds; sample standard deviation {deviation})"
    rows = [
        (
            run.parsed.seed, f"{run.parsed.steps:,}", f"{float(run.parsed.train_ms) / 1000:.1f}", run.parsed.result[1],
            run.parsed.result[2], f"{run.model_bytes:,}", f"{run.artifact_bytes:,}", f"`{log_name(run)}`",
            f"`{run.script_sha256}`",
        )
        for run in runs
    ]  # fmt: skip
    head = ["seed", "steps", "seconds", "nats per token", "bits per byte", "model bytes", "with code", "log", "script"]
    text = [
        f"# {card.name}",
        card.blurb,
        f"**{score}**",
        card.story,
        "## Results",
        f"Each log was written by the script whose sha256 stands beside it; that of `{SUBMISSION_SCRIPT}` here is "
        f"`{sha256}`.",
        readme_table(head, rows),
        f"- Code size: {content['bytes_code']:,} bytes (`{SUBMISSION_SCRIPT}` as shipped)\n"
        f"- Hardware: {card.hardware}; PyTorch {content['pytorch_version']}",
    ]
    if previous and len(runs) > 1:
        tests, sentence = significance_table(seed_results_of(runs), list(previous))
        cells = [(t.name, t.unit, f"{t.reference:.8f}", f"{t.t:.2f}", f"{t.df:.1f}", f"{t.p:.4f}") for t in tests]
        text += [
            "## Significance",
            f"Against {len(previous)} published results, one-sided; this {sentence}.",
            readme_table(["test", "unit", "reference", "t", "df", "p"], cells),
        ]
    settings = [(f"`{name}`", f"`{value}`") for name, value in hyperparameters.items()]
    text += ["## Every hyper-parameter, as it took effect", readme_table(["name", "value"], settings)]
    text += ["## Run it again", f"```bash\n{card.command}\n```"]
    return "\n\n".join(part for part in text if part) + "\n"


def log_name(run: MeasuredRun) -> str:
    return f"train_seed{run.parsed.seed}.log"


def seed_results_of(runs: list[MeasuredRun]) -> list[SeedResult]:
    """The runs as the seed planner wants them."""
    return [
        SeedResult(
            run.parsed.seed,
            float(run.parsed.result[1]),
            float(run.parsed.result[2]),
            run.script_sha256,
            run.parsed.targets,
        )
        for run in runs
    ]


# %% [markdown]
# ### `write_submission`
# Everything is written into a folder beside the final one, read again by the linter, and only then renamed: there is a
# complete submission or none. Running the notebook again replaces its own.


# %%
def refuse_submission(faults: list[str]) -> None:
    if faults:
        raise UserError("the submission is not complete:\n" + "\n".join(f"- {fault}" for fault in faults))


def setting_faults(hyperparameters: dict, runs: list[MeasuredRun]) -> list[str]:
    """Where the stated hyper-parameters contradict what a log printed."""
    return [
        f"{name} is {value} by the hyper-parameters and {printed} in the log of seed {run.parsed.seed}"
        for run in runs
        for name, value in hyperparameters.items()
        if (printed := run.parsed.settings.get(name.lower())) is not None
        and name.lower() != "seed"
        and not same_setting(str(printed), str(value))
    ]


def write_submission(
    root,
    card: SubmissionCard,
    script: str | Path,
    runs,
    hyperparameters: dict,
    requirements=(),
    compliance=None,
    previous=(),
) -> Path:
    """Write root/records/<track>/<date>_<folder>/ and return it; an earlier one of that name is replaced.

    script: path of the flat script (`tools/nb_convert.py script`), or its text. runs: SubmissionRun list, one for each
    seed that was trained. hyperparameters: every one, with the value that took effect. requirements: lines of
    requirements.txt. compliance: what the author vouches for. previous: SeedResult list of the record to beat.
    Raises UserError with all faults when something is missing, contradicts a log, or is over the limit. Only rank 0
    writes. Spec sections 0.1, 3.4.
    """
    final = Path(root) / "records" / card.track / f"{card.date}_{card.folder}"
    if get_dist_info()[1] != 0:
        return final
    faults = [f"the card has no {name}" for name, value in vars(card).items() if not str(value).strip()]
    if card.track not in (RECORD_TRACK, NON_RECORD_TRACK):
        faults.append(f"the track is {card.track!r}; it can be {RECORD_TRACK} or {NON_RECORD_TRACK}")
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", card.date):
        faults.append(f"the date is {card.date!r}, not YYYY-MM-DD")
    if not re.fullmatch(r"\w[\w.+-]*", card.folder, re.A):
        faults.append(f"the folder's name {card.folder!r} may hold letters, digits and _ . + - only")
    is_path = isinstance(script, Path) or "\n" not in script
    if is_path and not Path(script).is_file():
        refuse_submission([*faults, f"there is no script {script}: make it with tools/nb_convert.py script"])
    code = Path(script).read_bytes() if is_path else script.encode("utf-8")
    if parsed_script(code.decode("utf-8", "replace")) is None:
        faults.append("the script is not Python")
    if not hyperparameters:
        faults.append("no hyper-parameters are given")
    if not runs:
        faults.append("there is no run")
    sha256 = hashlib.sha256(code).hexdigest()
    measured, of_runs = read_runs(runs, code, sha256)
    faults += of_runs + setting_faults(hyperparameters, measured)
    if measured:
        try:
            refuse_mixed_results(seed_results_of(measured), "the runs")
        except UserError as error:
            faults.append(str(error))
    refuse_submission(faults)
    pytorch = measured[0].parsed.pytorch_version or torch.__version__
    content = submission_json(card, measured, len(code), pytorch, dict(compliance or {}))
    denied = [f"compliance claims {key}, measured it is {content['compliance'][key]}"
              for key, claim in (compliance or {}).items() if content["compliance"][key] != claim]  # fmt: skip
    refuse_submission(denied)
    files = {log_name(run): run.data for run in measured} | {
        SUBMISSION_SCRIPT: code,
        "submission.json": json.dumps(plain_json(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        "README.md": submission_readme(card, measured, content, hyperparameters, sha256, previous),
        "requirements.txt": "".join(f"{line}\n" for line in requirements),
    }
    place_folder(final, {name: data for name, data in files.items() if data}, previous)
    return final


def place_folder(final: Path, files: dict, previous) -> None:
    """Write `files` beside `final`, let the linter read them, and put the folder in its place."""
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=final.parent, prefix=f".{final.name}.", ignore_cleanup_errors=True) as beside:
        staged, old = Path(beside) / final.parent.name / final.name, Path(beside) / "old"
        for name, data in files.items():
            write_atomic(staged / name, data)
        findings = lint_submission(staged, previous=previous, run_import=False)
        refuse_submission([str(f.message) for f in findings if f.severity == "error" and f.rule != "significance"])
        if final.exists():
            os.replace(final, old)
        os.replace(staged, final)
