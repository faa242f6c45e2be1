"""What is written must pass the linter; what is incomplete must not be written at all."""

import dataclasses
import hashlib
import json
import os
import shutil

import pytest
from published_record import BASELINE, BEFORE, CHANGES, RUNS, log_of, script_of

from golf.packed_script import pack_script
from golf.seed_planner import SeedResult
from golf.submission import NON_RECORD_TRACK, SubmissionCard, runs_of_script, write_submission
from golf.submission_linter import RECORD_TRACK, lint_submission
from nanochat.runtime import UserError

SETTINGS = BASELINE | CHANGES
SCRIPT = pack_script(script_of(SETTINGS, 47_759))
SHA256 = hashlib.sha256(SCRIPT).hexdigest()
SEEDS = (1339, 1337, 1338)
CARD = SubmissionCard(
    author="A. Author", github_id="author", name="Longer context", folder="Longer-Context", blurb="One sentence.",
    date="2026-04-01", hardware="8xH100", story="What was tried and why.", command="torchrun train_gpt.py",
    track=RECORD_TRACK,
)  # fmt: skip
PREVIOUS = [SeedResult(i, float(nats), float(bpb)) for i, (nats, bpb) in enumerate(BEFORE)]


def log_text(seed, script=SCRIPT):
    """A log as ours are: the hash of the script in a line, not the script."""
    text = log_of("", seed, SETTINGS, len(script))
    return text.replace("\nseed:", f"\nscript_sha256:{hashlib.sha256(script).hexdigest()}\nseed:")


def run_folder(root, seed, log=None, script=SCRIPT, model_bytes=None):
    folder = root / f"run{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.log").write_text(log_text(seed, script) if log is None else log)
    (folder / "train_gpt.py").write_bytes(script)
    (folder / "final_model.int8.ptz").touch()
    os.truncate(folder / "final_model.int8.ptz", RUNS[seed][-1] if model_bytes is None else model_bytes)
    return folder


@pytest.fixture
def runs(tmp_path):
    return [run_folder(tmp_path / "runs", seed) for seed in SEEDS]


def refusal(root, runs, card=CARD, settings=SETTINGS, **more):
    """The message of a refusal, which must leave nothing behind."""
    with pytest.raises(UserError) as caught:
        write_submission(root / "out", card, runs, settings, **more)
    assert not list((root / "out").rglob("*.*"))
    return str(caught.value)


def test_the_folder_is_complete_and_passes_the_linter(tmp_path, runs):
    """The writer and the linter must agree on what a submission is."""
    claims = {"score_first_ttt": True}
    folder = write_submission(
        tmp_path, CARD, runs, SETTINGS, requirements=["requests==2.34.2"], compliance=claims, previous=PREVIOUS
    )
    assert folder == tmp_path / "records" / RECORD_TRACK / "2026-04-01_Longer-Context"
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "submission.json", "train_gpt.py", "requirements.txt",
        "train_seed1337.log", "train_seed1338.log", "train_seed1339.log",
    }  # fmt: skip
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]  # no temporary folder is left
    findings = lint_submission(folder, run_import=True)
    assert [(f.severity, f.rule) for f in findings] == [("note", "paths"), ("note", "import")]
    assert (folder / "train_seed1337.log").read_text() == log_text(1337)
    assert (folder / "train_gpt.py").read_bytes() == SCRIPT
    assert (folder / "requirements.txt").read_text() == "requests==2.34.2\n"


def test_the_json_has_the_keys_of_both_generations(tmp_path, runs):
    """The leaderboard reads either; the numbers come from the logs and the files."""
    folder = write_submission(tmp_path, CARD, runs, SETTINGS, compliance={"score_first_ttt": True})
    content = json.loads((folder / "submission.json").read_text())
    assert {"author", "github_id", "name", "blurb", "date", "track", "hardware", "pytorch_version"} <= content.keys()
    assert (content["val_loss"], content["val_bpb"], content["val_bpb_std"]) == (2.02844619, 1.20136009, 0.00187313)
    assert (content["bytes_code"], content["bytes_total"]) == (len(SCRIPT), 15_839_491 + len(SCRIPT))
    assert content["seeds"] == [1337, 1338, 1339] and content["track"] == "10min_16mb"
    assert content["seed_results"]["1337"] == {
        "val_loss": 2.02857127, "val_bpb": 1.20143417, "artifact_bytes": 15_820_684 + len(SCRIPT), "steps": 8394,
    }  # fmt: skip
    assert content["pytorch_version"] == "2.8.0+cu128"
    assert content["compliance"] == {
        "score_first_ttt": True, "train_under_600s": True, "artifact_under_16mb": True, "eval_under_600s": True,
        "three_seeds": True,
    }  # fmt: skip


def test_a_time_that_nobody_measured_is_no_compliance(tmp_path):
    """A log without the time of its scoring would count as one that took no time at all."""
    run = run_folder(tmp_path / "a", 1337, log_text(1337).replace(" eval_time:2106ms", ""))
    content = json.loads((write_submission(tmp_path, CARD, [run], SETTINGS) / "submission.json").read_text())
    assert not content["compliance"]["eval_under_600s"] and content["compliance"]["train_under_600s"]


def test_the_readme_states_hashes_and_every_setting(tmp_path, runs):
    """What the published record left out: which script wrote each log, and what it was set to."""
    text = (write_submission(tmp_path, CARD, runs, SETTINGS, previous=PREVIOUS) / "README.md").read_text()
    assert text.count(SHA256) == 4  # one for each log, one for the script
    assert all(f"| `{name}` | `{value}` |" in text for name, value in SETTINGS.items())
    assert "does not clear the rule of 0.005 nats" in text
    assert "| nats | 2.03190 | 2.02845 | 1.89 | 2.0 | 0.0996 |" in text
    assert "1.20136009 bits per byte, 2.02844619 nats per token" in text


def test_too_many_bytes_are_refused_by_how_much(tmp_path):
    """An artifact over 16,000,000 bytes is no submission, and its author wants to know how far to go."""
    log = log_text(1337).replace("15820684", "15999999")
    message = refusal(tmp_path, [run_folder(tmp_path, 1337, log, model_bytes=15_999_999)])
    assert f"run1337: 15,999,999 bytes of model + {len(SCRIPT):,} of code" in message
    assert f"{len(SCRIPT) - 1:,} over the limit of 16,000,000" in message


def test_incomplete_submissions_are_refused_with_all_that_is_missing(tmp_path, runs):
    """One look must show everything; half a folder must never lie on the disk."""
    log = log_text(1337)
    unscored = run_folder(tmp_path / "a", 1337, log[: log.index("final_int8")].replace("\nseed:1337", ""))
    message = refusal(tmp_path, [unscored], dataclasses.replace(CARD, author=" ", folder="../up"))
    assert "the card has no author" in message and "'../up'" in message
    assert "the log of run1337 does not say: seed, final score" in message
    assert "there is no run" in refusal(tmp_path, [])
    assert "no hyper-parameters" in refusal(tmp_path, runs, settings={})
    assert "the track is" in refusal(tmp_path, runs, dataclasses.replace(CARD, track="track_x"))
    assert "not YYYY-MM-DD" in refusal(tmp_path, runs, dataclasses.replace(CARD, date="1 April"))
    assert "compliance claims three_seeds" in refusal(tmp_path, runs[:1], compliance={"three_seeds": True})
    nothing = refusal(tmp_path, [tmp_path / "nowhere"])
    assert all(f"has no {name}" in nothing for name in ("train.log", "train_gpt.py", "final_model.int8.ptz or"))
    (runs[0] / "final_model.golf").touch()
    assert "has two models" in refusal(tmp_path, runs)


def test_files_that_are_not_those_of_the_log_are_refused(tmp_path):
    """The model and the script beside a log must be the ones that it speaks of."""
    message = refusal(tmp_path, [run_folder(tmp_path / "a", 1337, model_bytes=15_820_683)])
    assert "names a model of 15,820,684 bytes, the file has 15,820,683" in message
    other = pack_script(script_of(BASELINE, 47_642))
    message = refusal(tmp_path, [run_folder(tmp_path / "b", 1337, log_text(1337, other))])
    assert f"names a script of {len(other):,} bytes, the file has {len(SCRIPT):,}" in message
    assert "was written by script" in message and f"beside it lies {SHA256[:12]}" in message
    silent = log_text(1337).replace(f"script_sha256:{SHA256}", "")
    assert "hash of its script" in refusal(tmp_path, [run_folder(tmp_path / "c", 1337, silent)])


def test_runs_that_do_not_belong_together_are_refused(tmp_path, runs):
    """Two scripts, a seed twice, two texts, a setting that the log denies: the mean would be of nothing."""
    other = pack_script(script_of(BASELINE, 47_642))
    mixed = [run_folder(tmp_path / "a", 1337, script=other), *runs[::2]]
    assert "different scripts" in refusal(tmp_path, mixed)
    assert "a seed stands twice" in refusal(tmp_path, [runs[0], runs[0]])
    write_submission(tmp_path / "alike", CARD, runs, SETTINGS | {"TRAIN_SEQ_LEN": 4096.0, "EMBED_LR": "0.03 (tied)"})
    message = refusal(tmp_path, runs, settings=SETTINGS | {"TRAIN_SEQ_LEN": 1024})
    assert "TRAIN_SEQ_LEN is 1024 by the hyper-parameters and 4096 in the log of run1337" in message
    scaled = log_text(1338).replace("1.19945102", "1.29945102").replace("val_bpb:1.1995", "val_bpb:1.2995")
    assert "measured on different texts" in refusal(tmp_path, [runs[1], run_folder(tmp_path / "b", 1338, scaled)])


def test_one_seed_and_a_second_time(tmp_path, runs):
    """Run all must be safe to press twice, and a run on one seed has no deviation to claim."""
    card = dataclasses.replace(CARD, track=NON_RECORD_TRACK)
    folder = write_submission(tmp_path, card, runs[:1], SETTINGS)
    (folder / "left over").write_text("from the first time")
    assert write_submission(tmp_path, card, runs[:1], SETTINGS) == folder
    names = ["README.md", "submission.json", "train_gpt.py", "train_seed1339.log"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert json.loads((folder / "submission.json").read_text())["val_bpb_std"] is None
    assert {f.severity for f in lint_submission(folder)} == {"note"}


def test_only_the_first_rank_writes(tmp_path, runs, monkeypatch):
    """Eight processes that replace one folder at the same time would lose it."""
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert write_submission(tmp_path / "out", CARD, runs, SETTINGS).name == "2026-04-01_Longer-Context"
    assert not (tmp_path / "out").exists()


def test_all_seeds_of_one_script_are_one_submission(tmp_path, runs):
    """Three seeds that were trained one after the other and handed in as three submissions of one."""
    script = (runs[0] / "train_gpt.py").read_bytes()
    run_folder(tmp_path / "other", 1337, script=b"print(2)").rename(tmp_path / "runs" / "another_script")
    (tmp_path / "runs" / "unfinished").mkdir()
    (tmp_path / "runs" / "unfinished" / "train_gpt.py").write_bytes(script)
    again = tmp_path / "runs" / "again"
    shutil.copytree(runs[1], again)
    found = runs_of_script(runs[1], script)
    assert found[0] == runs[1] and sorted(found) == sorted(runs)  # a seed counts once, and the one that ran now
