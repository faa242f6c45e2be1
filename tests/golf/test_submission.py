"""What is written must pass the linter; what is incomplete must not be written at all."""

import dataclasses
import hashlib
import json

import pytest
from published_record import BASELINE, BEFORE, CHANGES, log_of, script_of

from golf.seed_planner import SeedResult
from golf.submission import NON_RECORD_TRACK, SubmissionCard, SubmissionRun, write_submission
from golf.submission_linter import RECORD_TRACK, lint_submission
from nanochat.runtime import UserError

SETTINGS = BASELINE | CHANGES
SCRIPT = script_of(SETTINGS, 47_759)
CARD = SubmissionCard(
    author="A. Author", github_id="author", name="Longer context", folder="Longer-Context", blurb="One sentence.",
    date="2026-04-01", hardware="8xH100", story="What was tried and why.", command="torchrun train_gpt.py",
    track=RECORD_TRACK,
)  # fmt: skip
PREVIOUS = [SeedResult(i, float(nats), float(bpb)) for i, (nats, bpb) in enumerate(BEFORE)]


def runs(script=SCRIPT, seeds=(1339, 1337, 1338)):
    return [SubmissionRun(log_of(script, seed, SETTINGS, len(script))) for seed in seeds]


def write(root, card=CARD, script=SCRIPT, given=None, settings=SETTINGS, **more):
    return write_submission(root, card, script, runs() if given is None else given, settings, **more)


def refusal(root, *arguments, **changes):
    """The message of a refusal, which must leave nothing behind."""
    with pytest.raises(UserError) as caught:
        write(root, *arguments, **changes)
    assert not [path for path in root.rglob("*") if path.is_file()]
    return str(caught.value)


def test_the_folder_is_complete_and_passes_the_linter(tmp_path):
    """The writer and the linter must agree on what a submission is."""
    claims = {"score_first_ttt": True}
    folder = write(tmp_path, requirements=["requests==2.34.2"], compliance=claims, previous=PREVIOUS)
    assert folder == tmp_path / "records" / RECORD_TRACK / "2026-04-01_Longer-Context"
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "submission.json", "train_gpt.py", "requirements.txt",
        "train_seed1337.log", "train_seed1338.log", "train_seed1339.log",
    }  # fmt: skip
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]  # no temporary folder is left
    findings = lint_submission(folder, run_import=True)
    assert not [f for f in findings if f.severity == "error"]
    assert {f.rule for f in findings if f.severity == "warning"} == {"throughput", "unknown-number"}  # PREVIOUS
    assert (folder / "train_seed1337.log").read_text() == runs(seeds=[1337])[0].log
    assert (folder / "train_gpt.py").read_text() == SCRIPT and (
        folder / "requirements.txt"
    ).read_text() == "requests==2.34.2\n"


def test_the_json_has_the_keys_of_both_generations(tmp_path):
    """The leaderboard reads either; the numbers come from the logs and the files."""
    content = json.loads((write(tmp_path, compliance={"score_first_ttt": True}) / "submission.json").read_text())
    assert {"author", "github_id", "name", "blurb", "date", "track", "hardware", "pytorch_version"} <= content.keys()
    assert (content["val_loss"], content["val_bpb"], content["val_bpb_std"]) == (2.02844619, 1.20136009, 0.00187313)
    assert (content["bytes_code"], content["bytes_total"]) == (47_759, 15_839_491 + 47_759)
    assert content["seeds"] == [1337, 1338, 1339] and content["track"] == "10min_16mb"
    assert content["seed_results"]["1337"] == {
        "val_loss": 2.02857127, "val_bpb": 1.20143417, "artifact_bytes": 15_868_443, "steps": 8394,
    }  # fmt: skip
    assert content["pytorch_version"] == "2.8.0+cu128"
    assert content["compliance"] == {
        "score_first_ttt": True, "train_under_600s": True, "artifact_under_16mb": True, "eval_under_600s": True,
        "three_seeds": True,
    }  # fmt: skip


def test_the_readme_states_hashes_and_every_setting(tmp_path):
    """What the published record left out: which script wrote each log, and what it was set to."""
    text = (write(tmp_path, previous=PREVIOUS) / "README.md").read_text()
    assert text.count(hashlib.sha256(SCRIPT.encode()).hexdigest()) == 4  # one for each log, one for the script
    assert all(f"| `{name}` | `{value}` |" in text for name, value in SETTINGS.items())
    assert "does not clear the rule of 0.005 nats" in text and "| nats | 2.03189884 | 1.89 | 2.0 | 0.0996 |" in text
    assert "1.20136009 bits per byte, 2.02844619 nats per token" in text


def test_too_many_bytes_are_refused_by_how_much(tmp_path):
    """An artifact over 16,000,000 bytes is no submission, and its author wants to know how far to go."""
    log = runs(seeds=[1337])[0].log.replace("15820684", "15960000").replace("15868443", "16007759")
    message = refusal(tmp_path, given=[SubmissionRun(log)])
    assert "15,960,000 bytes of model + 47,759 of code = 16,007,759, 7,759 over the limit of 16,000,000" in message


def test_incomplete_submissions_are_refused_with_all_that_is_missing(tmp_path):
    """One look must show everything; half a folder must never lie on the disk."""
    log = runs(seeds=[1337])[0].log
    without_score = log[: log.index("final_int8")]
    message = refusal(
        tmp_path, dataclasses.replace(CARD, author=" ", folder="../up"), given=[SubmissionRun(without_score)]
    )
    assert "the card has no author" in message and "final score" in message and "'../up'" in message
    assert "does not say: seed" in refusal(tmp_path, given=[SubmissionRun(log.replace("\nseed:1337", ""))])
    assert "there is no run" in refusal(tmp_path, given=[])
    assert "there is no log" in refusal(tmp_path, given=[SubmissionRun(tmp_path / "none.log")])
    assert "no hyper-parameters" in refusal(tmp_path, settings={})
    assert "there is no script" in refusal(tmp_path, script="nowhere.py")
    assert "is not Python" in refusal(tmp_path, script="def broken(:\n")
    assert "the track is" in refusal(tmp_path, dataclasses.replace(CARD, track="track_x"))
    assert "not YYYY-MM-DD" in refusal(tmp_path, dataclasses.replace(CARD, date="1 April"))
    assert "there is no model" in refusal(tmp_path, given=[SubmissionRun(log, tmp_path / "none.ptz")])
    assert "compliance claims three_seeds" in refusal(
        tmp_path, given=runs(seeds=[1337]), compliance={"three_seeds": True}
    )


def test_runs_that_do_not_belong_together_are_refused(tmp_path):
    """Another script's log, a seed twice, a setting that the log denies: the mean would be of nothing."""
    other = script_of(BASELINE, 47_642)
    mixed = [SubmissionRun(log_of(other, 1337, SETTINGS, 47_642)), *runs(seeds=[1338, 1339])]
    message = refusal(tmp_path, given=mixed)
    assert "counts 47,642 bytes of code, the script has 47,759" in message and "was written by script" in message
    assert "a seed stands twice" in refusal(tmp_path, given=runs(seeds=[1337, 1337]))
    message = refusal(tmp_path, settings=SETTINGS | {"TRAIN_SEQ_LEN": 1024})
    assert "TRAIN_SEQ_LEN is 1024 by the hyper-parameters and 4096 in the log of seed 1337" in message
    scaled = runs(seeds=[1338])[0].log.replace("1.19945102", "1.29945102").replace("val_bpb:1.1995", "val_bpb:1.2995")
    assert "measured on different texts" in refusal(tmp_path, given=[*runs(seeds=[1337]), SubmissionRun(scaled)])


def test_a_log_without_its_script_needs_the_hash(tmp_path):
    """A log of a notebook holds no source text; then the hash has to be said, and has to be right."""
    log = runs(seeds=[1337])[0].log.removeprefix(SCRIPT)
    sha256 = hashlib.sha256(SCRIPT.encode()).hexdigest()
    assert "give script_sha256" in refusal(tmp_path, given=[SubmissionRun(log)])
    assert "was written by script" in refusal(tmp_path, given=[SubmissionRun(log, script_sha256="0" * 64)])
    folder = write(tmp_path, given=[SubmissionRun(log, script_sha256=sha256)])
    assert sha256 in (folder / "README.md").read_text()


def test_files_by_path_one_seed_and_a_second_time(tmp_path):
    """Run all must be safe to press twice; sizes of files at hand are those of the files."""
    log, model, script = tmp_path / "in" / "run.log", tmp_path / "in" / "m.ptz", tmp_path / "in" / "flat.py"
    log.parent.mkdir()
    text = runs(seeds=[1337])[0].log.replace("15820684", "5000").replace("15868443", "52759")
    log.write_text(text)
    script.write_text(SCRIPT)
    model.write_bytes(bytes(4999))
    card = dataclasses.replace(CARD, track=NON_RECORD_TRACK)
    run = SubmissionRun(log, model)
    with pytest.raises(UserError, match="names a model of 5,000 bytes"):
        write(tmp_path, card, script, [run])
    model.write_bytes(bytes(5000))
    folder = write(tmp_path, card, script, [run])
    (folder / "left over").write_text("from the first time")
    assert write(tmp_path, card, str(script), [run]) == folder
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "submission.json",
        "train_gpt.py",
        "train_seed1337.log",
    ]
    content = json.loads((folder / "submission.json").read_text())
    assert content["bytes_total"] == 5000 + 47_759 and content["val_bpb_std"] is None


def test_only_the_first_rank_writes(tmp_path, monkeypatch):
    """Eight processes that replace one folder at the same time would lose it."""
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert write(tmp_path).name == "2026-04-01_Longer-Context" and not list(tmp_path.iterdir())
