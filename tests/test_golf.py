"""The two golf notebooks as people use them: script and notebook, alone, on two processes, stopped, with wrong input.

A test waits mostly for processes, so these run two at a time: fixtures start them for both systems, and the tests wait
for the results.
"""

import json
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import nb_convert
from golf.golf_data import export_golf_data, open_golf_data, write_golf_documents
from golf.golf_tokenizers import TokenizerSpec
from golf.submission_linter import lint_submission, parse_training_log
from helpers import REPOSITORY, english_documents, python_environment, run_notebook, texts_and_images

TRAINING = dict(
    preset="cpu", iterations=6, train_seq_len=64, train_batch_tokens=512, val_loss_every=3, save_every=2, model_dim=64
)
SCORING = dict(sw_seq_len=64, sw_stride=32, ttt_eval_seq_len=128, ttt_chunk_tokens=256, ttt_epochs=1)
SYSTEMS = {
    "golf_seq4096": TRAINING | dict(num_layers=2),
    "golf_recurrent": TRAINING | SCORING | dict(num_unique_layers=1, ablation_steps=1, gptq_calibration_batches=2),
}
ARTIFACTS = {"golf_seq4096": "final_model.int8.ptz", "golf_recurrent": "final_model.golf"}
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
of_both_systems = pytest.mark.parametrize("name", SYSTEMS)


def spine_of(name: str) -> Path:
    return REPOSITORY / "nb_src" / f"{name}.py"


def golf_command(name, base_dir, data, program=None, launcher=(sys.executable, "-u"), environment=(), **changes):
    """What Popen needs to start a system. program: in place of the spine; that one gets nothing of the repository."""
    parameters = SYSTEMS[name] | {"data_source": data, "base_dir": base_dir} | changes
    variables = python_environment(OMP_NUM_THREADS=1) | dict(environment)
    if program is not None:
        del variables["PYTHONPATH"]
    return dict(
        args=[*launcher, str(program or spine_of(name)), *(f"--{key}={value}" for key, value in parameters.items())],
        env=variables, cwd=Path(program or base_dir).parent, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def golf(name, base_dir, data, **options) -> subprocess.CompletedProcess:
    """Run a system to its end; the finished process, output and errors together."""
    return subprocess.run(**golf_command(name, base_dir, data, **options), timeout=600)


def result_of(base_dir, process) -> SimpleNamespace:
    """What a run that ended well has left in its base directory."""
    assert process.returncode == 0, process.stdout
    (folder,) = (path for path in (base_dir / "golf").iterdir() if path.is_dir())
    (artifact,) = (folder / name for name in ARTIFACTS.values() if (folder / name).exists())
    scores = json.loads((folder / "stages" / "golf evaluation.json").read_text())["results"]
    submissions = list(base_dir.glob("records/*/*"))
    return SimpleNamespace(
        base_dir=base_dir, folder=folder, artifact=artifact, printed=process.stdout, log=(folder / "train.log"),
        script=(folder / "train_gpt.py"), scores=without_seconds(scores), submissions=submissions,
    )  # fmt: skip


def without_seconds(value):
    """A tree of results without its times."""
    if isinstance(value, dict):
        return {key: without_seconds(item) for key, item in value.items() if key not in ("seconds", "eval_time")}
    return value


def losses(run) -> list[float]:
    return [float(loss) for loss in re.findall(r"train_loss:(\S+)", run.log.read_text())]


# What is run, once for all tests


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder in the challenge's layout: 1,300 validation tokens, training shards, a tokenizer of 1,024 tokens."""
    folder = tmp_path_factory.mktemp("data")
    texts = english_documents()
    write_golf_documents(folder, [text[:1200] for text in texts[:4]] + [text[:6000] for text in texts[4:]], 4)
    export_golf_data(folder, [TokenizerSpec(vocab_size=1024)], shard_tokens=20_000)
    return folder


@pytest.fixture(scope="module")
def pool():
    with ThreadPoolExecutor(2) as pool:
        yield pool
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    """name -> the system as one program, alone in a folder."""
    programs = {name: tmp_path_factory.mktemp(f"flat_{name}") / "train_it.py" for name in SYSTEMS}
    for name, path in programs.items():
        path.write_text(nb_convert.script(REPOSITORY, name), encoding="utf-8")
    return programs


@pytest.fixture(scope="module")
def started(tmp_path_factory, pool, data):
    """name -> the future of a run of the spine, with everything."""

    def whole_run(name):
        base_dir = tmp_path_factory.mktemp(f"spine_{name}") / "base"
        return result_of(base_dir, golf(name, base_dir, data))

    return {name: pool.submit(whole_run, name) for name in SYSTEMS}


@pytest.fixture(scope="module")
def notebooks(tmp_path_factory, started, pool, data):
    """name -> the future of a run of the notebook file, alone in an empty folder."""
    project = nb_convert.read_project(REPOSITORY)

    def notebook_run(name):
        folder = tmp_path_factory.mktemp(f"notebook_{name}")
        notebook = folder / f"{name}.ipynb"
        notebook.write_text(nb_convert.notebook_text(nb_convert.build_notebook(project, name)), encoding="utf-8")
        parameters = SYSTEMS[name] | {"data_source": data, "base_dir": folder / "base"}
        process = run_notebook(notebook, parameters, folder / "executed.ipynb")
        return result_of(folder / "base", process)

    return {name: pool.submit(notebook_run, name) for name in SYSTEMS}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, started, pool, data, flat):
    """name -> the future of a run of the flat script on two processes."""

    def distributed_run(name):
        base_dir = tmp_path_factory.mktemp(f"pair_{name}") / "base"
        process = golf(name, base_dir, data, program=flat[name], launcher=TORCHRUN, skip="audit,prove")
        return result_of(base_dir, process)

    return {name: pool.submit(distributed_run, name) for name in SYSTEMS}


def until(process, words: str) -> str:
    """Read what a process prints up to the line with these words."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if words in line:
            return "".join(lines)
    raise AssertionError(f"no {words!r} in:\n{''.join(lines)}")


@pytest.fixture(scope="module")
def resumed(tmp_path_factory, started, pool, data, flat):
    """name -> the future of a run of the flat script that was interrupted, killed, and then finished."""

    def broken_run(name):
        base_dir = tmp_path_factory.mktemp(f"resumed_{name}") / "base"
        command = golf_command(name, base_dir, data, program=flat[name], skip="audit,prove,submit")
        with subprocess.Popen(**command) as process:
            until(process, "step:1/6 train_loss")
            process.send_signal(signal.SIGINT)
            interrupted = process.communicate(timeout=120)[0]
        assert process.returncode != 0 and "stopped and saved; run again" in interrupted
        with subprocess.Popen(**command) as process:
            assert "going on from step" in until(process, "step:4/6 train_loss")
            process.kill()
        process = subprocess.run(**command, timeout=300)
        assert re.search("going on from step [24]", process.stdout), process.stdout
        return result_of(base_dir, process)

    return {name: pool.submit(broken_run, name) for name in SYSTEMS}


@pytest.fixture(scope="module")
def capped(tmp_path_factory, pool, data):
    """name -> the future of a run that gets the challenge's environment variables, and one second."""
    golf_data = open_golf_data(data)

    def capped_run(name):
        recurrent = name == "golf_recurrent"
        variables = dict(
            RUN_ID="from_outside", DATA_PATH=golf_data.dataset_path, TOKENIZER_PATH=golf_data.tokenizer_path,
            VOCAB_SIZE="1024", MAX_WALLCLOCK_SECONDS="13" if recurrent else "1",  # 12 of them for the export
        )  # fmt: skip
        changes = dict(iterations=100_000, data_source="", val_loss_every=0, skip="prove")
        changes |= dict(architecture="looped", ttt_mode="off") if recurrent else {}
        base_dir = tmp_path_factory.mktemp(f"capped_{name}") / "base"
        return result_of(base_dir, golf(name, base_dir, "", environment=variables, **changes))

    return {name: pool.submit(capped_run, name) for name in SYSTEMS}


# The tests


def written_files(run) -> dict[str, int]:
    """When each file was written that takes work to make."""
    files = [path for path in run.folder.rglob("*") if path.is_file() and path.suffix not in (".log", ".jsonl")]
    return {str(path.relative_to(run.folder)): path.stat().st_mtime_ns for path in files}


@pytest.mark.usefixtures("notebooks", "pairs", "resumed", "capped", "complaints")  # they have work while this waits
@of_both_systems
def test_again_repeats_no_work(name, started, data):
    """Prevents "Run all" from training, exporting or scoring a second time, or from telling other numbers."""
    run = started[name].result()
    log, files, scores = run.log.read_text(), written_files(run), run.scores
    assert "\nwarmup_step:1/1\nstep:0/6 val_loss:" in log and ("averaged_val_bpb:" in log) == (name == "golf_recurrent")
    assert len(losses(run)) == 6 and ARTIFACTS[name] in files and len(run.submissions) == 1
    again = result_of(run.base_dir, golf(name, run.base_dir, data, skip="audit,prove"))
    assert "trained earlier" in again.printed and "│" not in again.printed
    assert written_files(again) == files and again.scores == scores
    assert again.log.read_text() == log, "the submission quotes it"


@of_both_systems
def test_the_notebook_alone_does_the_same_and_ships_the_same_script(name, started, notebooks):
    """Prevents a notebook that needs the repository, and a score whose script is not the one that was run."""
    run, script_run = notebooks[name].result(), started[name].result()
    text, images = texts_and_images(run.base_dir.parent / "executed.ipynb")
    assert images == {"golf_seq4096": 2, "golf_recurrent": 7}[name] and "✗" not in text
    assert losses(run) == losses(script_run) and run.scores == script_run.scores
    assert run.artifact.read_bytes() == script_run.artifact.read_bytes()
    assert run.script.read_bytes() == script_run.script.read_bytes()


@of_both_systems
def test_two_processes_train_the_same_model(name, started, pairs, data):
    """Prevents a distributed run that sees other data, averages wrongly, scores twice or writes twice."""
    one, two = started[name].result(), pairs[name].result()
    assert losses(two) == pytest.approx(losses(one), rel=2e-4)
    assert two.printed.count("Distributed world size: 2") == 2, "once by the run and once by its new processes"
    scores = [run.scores["there" if name == "golf_seq4096" else "new process"] for run in (one, two)]
    ways = [score if name == "golf_recurrent" else {"blocks": score} for score in scores]
    assert ways[0].keys() == ways[1].keys()
    for way in ways[0]:
        assert ways[1][way]["val_bpb"] == pytest.approx(ways[0][way]["val_bpb"], rel=2e-3)
    (submission,) = two.submissions
    assert [path.name for path in submission.parent.iterdir()] == [submission.name]
    assert two.printed.count("imports from inside its folder") == 1


@of_both_systems
def test_stopped_and_killed_it_goes_on_to_the_same_artifact(name, started, resumed):
    """Prevents a resumed run from seeing other batches, losing its momentum or averaging other weights."""
    run, whole = resumed[name].result(), started[name].result()
    assert losses(run) == losses(whole)
    assert run.artifact.read_bytes() == whole.artifact.read_bytes() and run.scores == whole.scores


WRONG = dict(
    MODEL_DIM=32, NUM_LAYERS=1, NUM_UNIQUE_LAYERS=2, VOCAB_SIZE=2048, TRAIN_SEQ_LEN=32, SW_STRIDE=8, SEED=5,
    DATA_PATH="/nowhere", TTT_LR=1, PRESET="nothing", RUN_ID="other",
)  # fmt: skip


@of_both_systems
def test_script_and_artifact_are_enough_for_the_score(name, started, resumed, data, tmp_path):
    """Prevents a score that needs the training's folder, its environment, or settings that are not in the files."""
    run, golf_data = resumed[name].result(), open_golf_data(data)
    shutil.copy(run.script, tmp_path / "train_gpt.py")
    shutil.copy(run.artifact, tmp_path / "it")
    shutil.copy(golf_data.tokenizer_path, tmp_path / "tokenizer.model")
    for path in golf_data.val_files:
        (tmp_path / "val").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "val")
    run.base_dir.rename(run.base_dir.with_name("away"))
    variables = {key: str(value) for key, value in WRONG.items()}
    environment = python_environment(OMP_NUM_THREADS=1, NANOCHAT_BASE_DIR=tmp_path / "base")
    del environment["PYTHONPATH"]
    arguments = ["--evaluate=it", "--data_path=val", "--tokenizer_path=tokenizer.model"]
    process = subprocess.run(
        [sys.executable, "train_gpt.py", *arguments], cwd=tmp_path, env=environment | variables, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300,
    )  # fmt: skip
    run.base_dir.with_name("away").rename(run.base_dir)
    assert process.returncode == 0, process.stdout
    found = without_seconds(json.loads((tmp_path / "result.json").read_text()))
    reported = started[name].result().scores
    assert found == reported["there" if name == "golf_seq4096" else "new process"]
    last = found if name == "golf_seq4096" else list(found.values())[-1]
    log = started[name].result().log.read_text()
    assert f"val_loss:{last['val_loss']:.8f} val_bpb:{last['val_bpb']:.8f}" in log


@of_both_systems
def test_the_shipped_script_trains_the_same_model(name, started, data, tmp_path):
    """Prevents a train_gpt.py that only scores, asks for shards that are not there, or names a folder of a machine."""
    run = started[name].result()
    assert str(data).encode() not in run.log.read_bytes()
    shutil.copy(run.script, tmp_path / "train_gpt.py")
    environment = python_environment(OMP_NUM_THREADS=1)
    del environment["PYTHONPATH"]
    process = subprocess.run(
        [sys.executable, "train_gpt.py", f"--data_source={data}", "--base_dir=run"], cwd=tmp_path, env=environment,
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout
    (artifact,) = (tmp_path / "run" / "golf").glob(f"*/{run.artifact.name}")
    assert artifact.read_bytes() == run.artifact.read_bytes()
    assert artifact.with_name("train_gpt.py").read_bytes() == run.script.read_bytes()


@of_both_systems
def test_the_submission_says_what_the_log_says(name, started):
    """Prevents a folder that a reviewer would send back."""
    run = started[name].result()
    (folder,) = run.submissions
    files = {"README.md", "requirements.txt", "submission.json", "train_gpt.py", "train_seed1337.log"}
    assert {path.name for path in folder.iterdir()} == files
    claims, log = json.loads((folder / "submission.json").read_text()), (folder / "train_seed1337.log").read_bytes()
    parsed, code = parse_training_log(log), run.script.read_bytes()
    assert log == run.log.read_bytes() and (folder / "train_gpt.py").read_bytes() == code
    assert [claims["val_loss"], claims["val_bpb"]] == [float(number) for number in parsed.result]
    assert claims["bytes_total"] == run.artifact.stat().st_size + len(code) == parsed.sizes["total"]
    assert claims["bytes_code"] == len(code) == parsed.sizes["code"] and claims["seeds"] == [1337] == [parsed.seed]
    assert claims["seed_results"]["1337"]["steps"] == 6 == parsed.steps
    findings = lint_submission(folder, run_import=False)
    assert [finding for finding in findings if finding.severity != "note"] == []


@of_both_systems
def test_the_challenges_variables_and_its_clock(name, capped):
    """Prevents a run that ignores the published command line, or the limit of its time."""
    run = capped[name].result()
    log = run.log.read_text()
    (ms, steps) = map(int, re.search(r"stopping_early: wallclock_cap train_time:(\d+)ms step:(\d+)/", log).groups())
    assert run.folder.name == "from_outside" and 1000 <= ms and 0 < steps < 100_000
    assert log.count("val_bpb:") >= 2 and len(run.submissions) == 1


# Wrong input


@pytest.fixture(scope="module")
def damaged(tmp_path_factory, data):
    """Copies of the data with one thing wrong in each: name -> folder."""
    folder = tmp_path_factory.mktemp("damaged")
    for name, word, value in (("magic", 0, 1), ("version", 1, 2), ("length", 2, 7)):
        shutil.copytree(data, folder / name)
        shard = Path(open_golf_data(folder / name).train_files[1])
        header = np.fromfile(shard, dtype="<i4", count=256)
        header[word] = value
        shard.write_bytes(header.tobytes() + shard.read_bytes()[1024:])
    texts = english_documents()[:30]
    (folder / "other").mkdir()
    write_golf_documents(folder / "other", texts, 2)
    export_golf_data(folder / "other", [TokenizerSpec(vocab_size=512)])
    tokenizer = open_golf_data(folder / "other", "sp512").tokenizer_path
    shutil.copy(tokenizer, folder / "sp512.model")
    shards = folder / "foreign"
    shards.mkdir()
    for path in open_golf_data(data).val_files + open_golf_data(data).train_files[:1]:
        shutil.copy(path, shards)
    return {path.name.split(".")[0]: path for path in folder.iterdir()}


COMPLAINTS = [
    ("golf_seq4096", dict(data_source="{magic}"), "is no token shard: it begins with 1 instead of 20240520"),
    ("golf_recurrent", dict(data_source="{version}"), "is a shard of version 2, and version 1 is known here"),
    ("golf_seq4096", dict(data_source="{length}"), "its header promises 7 tokens"),
    ("golf_seq4096", dict(data_path="{foreign}", tokenizer_path="{sp512}"), "512"),
    ("golf_recurrent", dict(data_path="{foreign}", tokenizer_path="{sp512}", vocab_size=512), "another tokenizer"),
    ("golf_seq4096", dict(data_path="{foreign}"), "data_path is given and tokenizer_path is not"),
    ("golf_seq4096", dict(train_batch_tokens=500), "TRAIN_BATCH_TOKENS 500 is not a multiple of 8 slices × 64 tokens"),
    ("golf_seq4096", dict(matrix_lrr=1), "there is no parameter 'matrix_lrr'; did you mean 'matrix_lr'?"),
    ("golf_recurrent", dict(preset="a100"), "preset is 'a100'; it can be auto, h100, looped, cpu."),
    ("golf_recurrent", dict(architecture="deep"), "architecture is 'deep'; it can be recurrent or looped."),
    ("golf_recurrent", dict(train_recurrences="4;8"), "train_recurrences is '4;8'"),
    ("golf_recurrent", dict(ttt_mode="always"), "ttt_mode is 'always'; it can be off, sgd or lora."),
    ("golf_recurrent", dict(ttt_layers="0,9"), "ttt_layers names block 9, and the model has blocks 0 to 0"),
    ("golf_recurrent", dict(sw_stride=65), "sw_stride 65 is more than sw_seq_len 64"),
    ("golf_recurrent", dict(compressor="zip"), "compressor is 'zip'; it can be auto, "),
    ("golf_seq4096", dict(num_heads=3), "model_dim 64, num_heads 3 and num_kv_heads 2 do not "),
    ("golf_recurrent", dict(max_wallclock_seconds=3), "gptq_reserve_seconds 12, so no time is left to train"),
    ("golf_seq4096", dict(run_id="my run"), "run_id is 'my run'; it names a folder"),
    ("golf_recurrent", dict(model_dim=0, artifact_limit_bytes=100_000), "no model fits into 100,000 bytes"),
    ("golf_recurrent", dict(artifact_limit_bytes=100_000), "no model fits into 100,000 bytes"),
    ("golf_seq4096", dict(evaluate="nothing.ptz"), "nothing.ptz does not exist"),
]


@of_both_systems
def test_a_number_of_processes_that_does_not_divide(name, tmp_path, data):
    """Prevents processes that meet, wait for each other, and only then hear that there are too many of them."""
    process = golf(name, tmp_path / "base", data, environment=dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="3"))
    assert process.returncode == 1 and "Traceback" not in process.stdout
    assert process.stdout.splitlines()[-1].startswith("✗ 3 processes do not divide the eight slices of a step.")


@pytest.fixture(scope="module")
def complaints(tmp_path_factory, pool, data, damaged):
    """The futures of all runs with wrong input."""

    def wrong_run(name, changes):
        changes = {key: value.format(**damaged) if isinstance(value, str) else value for key, value in changes.items()}
        folder = changes.pop("data_source", data)
        return golf(name, tmp_path_factory.mktemp("wrong") / "base", folder, **changes)

    return [pool.submit(wrong_run, name, changes) for name, changes, _ in COMPLAINTS]


@pytest.mark.parametrize("number", range(len(COMPLAINTS)), ids=lambda n: "-".join(map(str, COMPLAINTS[n][1])))
def test_wrong_input_is_one_sentence(number, complaints):
    """Prevents a traceback, or ten minutes on eight GPUs, before someone hears what was wrong."""
    process, (_, _, sentence) = complaints[number].result(), COMPLAINTS[number]
    assert process.returncode == 1, process.stdout
    complaint = process.stdout.strip().splitlines()[-1]
    assert complaint.startswith("✗ ") and sentence in complaint
    assert "Traceback" not in process.stdout and "train_loss" not in process.stdout
