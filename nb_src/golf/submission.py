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

from golf.golf_settings import ARTIFACT_LIMIT_BYTES
from golf.seed_planner import (
    T_TEST_HEADER,
    SeedResult,
    mean_and_sd,
    refuse_mixed_results,
    significance_table,
    t_test_rows,
)
from golf.submission_linter import (
    RECORD_TRACK,
    SUBMISSION_SCRIPT,
    TIME_LIMIT_SECONDS,
    TrainingLog,
    lint_submission,
    parse_training_log,
    same_setting,
    training_time_to_judge,
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


# %% [markdown]
# ### `measure_run`
# A run is the folder that a training leaves: its log, the script that ran, and the model that was scored. Measure
# first, then judge: all faults are collected, so that one look shows everything that is missing.

# %%
RUN_LOG = "train.log"
RUN_ARTIFACTS = ("final_model.int8.ptz", "final_model.golf")


@dataclass
class MeasuredRun:
    """One trained seed, with its sizes in bytes. artifact_bytes: model and script."""

    data: bytes  # of the log
    log: TrainingLog
    script: bytes
    model_bytes: int
    artifact_bytes: int

    @property
    def script_sha256(self) -> str:
        return hashlib.sha256(self.script).hexdigest()

    @property
    def log_name(self) -> str:
        return f"train_seed{self.log.seed}.log"


def measure_run(folder) -> tuple[MeasuredRun | None, list[str]]:
    """(the run, everything that speaks against it). None when files or numbers are missing."""
    folder = Path(folder)
    models = [folder / name for name in RUN_ARTIFACTS if (folder / name).is_file()]
    absent = [name for name in (RUN_LOG, SUBMISSION_SCRIPT) if not (folder / name).is_file()]
    absent += [] if models else [" or ".join(RUN_ARTIFACTS)]
    if absent or len(models) > 1:
        return None, [f"{folder} has no {name}" for name in absent] or [f"{folder} has two models: remove one"]
    data = (folder / RUN_LOG).read_bytes()
    log = parse_training_log(data, f"the log of {folder.name}")
    said = {
        "seed": log.seed, "final score": log.result, "number of steps": log.steps, "training time": log.train_ms,
        "hash of its script (a line script_sha256:...)": log.script_sha256 or None,
    }  # fmt: skip
    unsaid = [what for what, value in said.items() if value is None]
    if unsaid:
        return None, [f"{log.name} does not say: {', '.join(unsaid)}"]
    script, model_bytes = (folder / SUBMISSION_SCRIPT).read_bytes(), models[0].stat().st_size
    run = MeasuredRun(data, log, script, model_bytes, model_bytes + len(script))
    faults = []
    for what, logged, size in (
        ("a model", log.sizes.get("model"), model_bytes),
        ("a script", log.sizes.get("code"), len(script)),
    ):
        if logged not in (None, size):
            faults.append(f"{log.name} names {what} of {logged:,} bytes, the file has {size:,}")
    if log.script_sha256 != run.script_sha256:
        faults.append(
            f"{log.name} was written by script {log.script_sha256[:12]}…, beside it lies {run.script_sha256[:12]}…"
        )
    over = run.artifact_bytes - ARTIFACT_LIMIT_BYTES
    if over > 0:
        faults.append(
            f"{folder.name}: {model_bytes:,} bytes of model + {len(script):,} of code = {run.artifact_bytes:,}, "
            f"{over:,} over the limit of {ARTIFACT_LIMIT_BYTES:,}"
        )
    return run, faults


# %% [markdown]
# ### `submission_json`
# Both generations of keys in one file. The score is the mean over the seeds, the size is that of the largest of them,
# and what can be measured under `compliance` is measured.


# %%
def submission_json(card: SubmissionCard, runs: list[MeasuredRun], pytorch: str, claims: dict) -> dict:
    """The content of submission.json. claims: what the author vouches for, e.g. {"score_first_ttt": True}."""
    nats, bpb = ([float(run.log.result[column]) for run in runs] for column in (0, 1))
    seed_results = {
        str(run.log.seed): {
            "val_loss": float(run.log.result[0]),
            "val_bpb": float(run.log.result[1]),
            "artifact_bytes": run.artifact_bytes,
            "steps": run.log.steps,
        }
        for run in runs
    }
    measured = {
        "train_under_600s": all(training_time_to_judge(run.log) <= TIME_LIMIT_SECONDS * 1000 for run in runs),
        "artifact_under_16mb": all(run.artifact_bytes <= ARTIFACT_LIMIT_BYTES for run in runs),
        "eval_under_600s": all(0 < run.log.evaluation_ms <= TIME_LIMIT_SECONDS * 1000 for run in runs),
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
        "bytes_code": len(runs[0].script),
        "seeds": [run.log.seed for run in runs],
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
    card: SubmissionCard, runs: list[MeasuredRun], content: dict, hyperparameters: dict, previous=()
) -> str:
    """README.md. content: of submission.json. previous: SeedResult list of the record to beat."""
    score = f"{content['val_bpb']:.8f} bits per byte, {content['val_loss']:.8f} nats per token"
    if len(runs) > 1:
        deviation = f"{content['val_bpb_std']:.8f} bits per byte, {content['val_loss_std']:.8f} nats"
        score += f" (mean of {len(runs)} seeds; sample standard deviation {deviation})"
    rows = [
        (
            run.log.seed, f"{run.log.steps:,}", f"{float(run.log.train_ms) / 1000:.1f}", run.log.result[0],
            run.log.result[1], f"{run.model_bytes:,}", f"{run.artifact_bytes:,}", f"`{run.log_name}`",
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
        f"`{runs[0].script_sha256}`.",
        readme_table(head, rows),
        f"- Code size: {content['bytes_code']:,} bytes (`{SUBMISSION_SCRIPT}` as shipped)\n"
        f"- Hardware: {card.hardware}; PyTorch {content['pytorch_version']}",
    ]
    if previous and len(runs) > 1:
        tests, sentence = significance_table(seed_results_of(runs), list(previous))
        text += [
            "## Significance",
            f"Against {len(previous)} published results, one-sided; this {sentence}.",
            readme_table(list(T_TEST_HEADER), t_test_rows(tests)),
        ]
    settings = [(f"`{name}`", f"`{value}`") for name, value in hyperparameters.items()]
    text += ["## Every hyper-parameter, as it took effect", readme_table(["name", "value"], settings)]
    text += ["## Run it again", f"```bash\n{card.command}\n```"]
    return "\n\n".join(part for part in text if part) + "\n"


def seed_results_of(runs: list[MeasuredRun]) -> list[SeedResult]:
    """The runs as the seed planner wants them."""
    return [SeedResult(run.log.seed, *map(float, run.log.result), run.script_sha256, run.log.targets) for run in runs]


# %% [markdown]
# ### `write_submission`
# Everything is written into a folder beside the final one, read again by the linter, and only then renamed: there is a
# complete submission or none. Running the notebook again replaces its own.


# %%
def refuse_submission(faults: list[str]) -> None:
    if faults:
        raise UserError("the submission is not complete:\n" + "\n".join(f"- {fault}" for fault in faults))


def runs_of_script(run_dir, script: bytes) -> list[Path]:
    """run_dir, and the folders beside it whose models were trained and scored by the same script with other seeds."""
    runs = {}
    for folder in [Path(run_dir), *sorted(Path(run_dir).parent.iterdir())]:
        log, own_script = folder / RUN_LOG, folder / SUBMISSION_SCRIPT
        if log.is_file() and own_script.is_file() and own_script.read_bytes() == script:
            said = parse_training_log(log.read_bytes(), folder.name)
            if said.script_sha256 == hashlib.sha256(script).hexdigest():  # the last line of a run that is complete
                runs.setdefault(said.seed, folder)
    return list(runs.values())


def write_submission(
    root, card: SubmissionCard, runs, hyperparameters: dict, requirements=(), compliance=None, previous=()
) -> Path:
    """Write root/records/<track>/<date>_<folder>/ and return it; an earlier one of that name is replaced.

    runs: folders, one for each seed that was trained, each with train.log, train_gpt.py and the artifact.
    hyperparameters: every one, with the value that took effect. requirements: lines of requirements.txt. compliance:
    what the author vouches for. previous: SeedResult list of the record to beat. Raises UserError with all faults when
    something is missing, contradicts a log, or is over the limit. Only rank 0 writes. Golf spec sections 0.1, 3.4.
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
    if not hyperparameters:
        faults.append("no hyper-parameters are given")
    measured = []
    for folder in runs:
        run, of_run = measure_run(folder)
        measured += [run] if run else []
        faults += of_run
    measured.sort(key=lambda run: run.log.seed)
    for run in measured:
        for name, value in hyperparameters.items():
            printed = run.log.settings.get(name.lower())
            first_word = " ".join(str(value).split()[:1]).rstrip(",")  # a log line ends a value at the first space
            if name.lower() != "seed" and printed is not None and not same_setting(printed, first_word):
                faults.append(f"{name} is {value} by the hyper-parameters and {printed} in {run.log.name}")
    if not runs:
        faults.append("there is no run")
    elif measured:
        try:
            refuse_mixed_results(seed_results_of(measured), "the runs")
        except UserError as error:
            faults.append(str(error))
    refuse_submission(faults)
    pytorch = measured[0].log.pytorch_version or torch.__version__
    content = submission_json(card, measured, pytorch, dict(compliance or {}))
    found = content["compliance"].items()
    refuse_submission(
        [
            f"compliance claims {key}, measured it is {value}"
            for key, value in found
            if (compliance or {}).get(key, value) != value
        ]
    )
    files = {run.log_name: run.data for run in measured} | {
        SUBMISSION_SCRIPT: measured[0].script,
        "submission.json": json.dumps(plain_json(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        "README.md": submission_readme(card, measured, content, hyperparameters, previous),
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
