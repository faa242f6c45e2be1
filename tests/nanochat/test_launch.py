"""Training in several processes, seen from the notebook that started them. The processes are stand-ins here."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from helpers import EAGER, python_environment, small_corpus, small_plan, small_tokenizer
from nanochat import launch, settings
from nanochat.base_train import pretrain, pretraining_inputs
from nanochat.checkpoint_files import save_checkpoint
from nanochat.launch import is_trained, rank_environment, train_on
from nanochat.runtime import UserError, lock_base_dir
from nanochat.settings import PARAMETER_TYPES, PRESETS, processes_to_train, resolve_parameters
from nanochat.stages import fingerprint_of
from nanochat.training_loop import TrainLog, TrainRecord

RECORD = TrainRecord(0, 5.0, 5.0, 1.0, 0.1, 1000.0, None, 1, 0.0, None, 1e9)


def line_of(step: int, loss: float) -> str:
    return TrainLog.line_of(replace(RECORD, step=step, loss=loss))


# What every stand-in begins with. `say` shows a record, `done` leaves what a finished training leaves.
STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path

rank, folder = int(os.environ["RANK"]), Path(sys.argv[1].removeprefix("--folder="))
log, line = folder / "train_log.jsonl", {line!r}


def compute_cleanup():
    (folder / f"ended-{{rank}}").touch()


def say(step, loss):
    with open(log, "a") as file:
        file.write(json.dumps(json.loads(line) | dict(step=step, loss=loss)) + "\\n")


def on_signal(work):
    def handle(number, frame):
        work()
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, handle)


"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A checkpoint folder, in a base directory that this process holds."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(launch, "is_trained", lambda folder, *more: (folder / "done").exists())
    lock = lock_base_dir()
    folder = tmp_path / "base_checkpoints" / "d2"
    folder.mkdir(parents=True)
    yield folder
    assert lock.is_locked, "held again"
    lock.release()


@pytest.fixture
def train(folder, monkeypatch):
    """Run a stand-in as two processes; its records as they come."""

    def run(program: str, **params):
        monkeypatch.setattr(launch, "program_so_far", lambda: STAND_IN.format(line=line_of(0, 5.0)) + program)
        return train_on(2, iter(()), "pretrain", folder, "fingerprint", {"folder": folder, **params})

    return run


def ended(folder, rank: int) -> bool:
    """Whether the process that noted its number is gone."""
    try:
        os.kill(int((folder / f"pid-{rank}").read_text()), 0)
    except ProcessLookupError:
        return True
    return False


def test_a_run_that_goes_on_cuts_its_log_back(folder, train):
    """A chart that shows the unsaved steps of a killed run beside those that were trained instead of them."""
    (folder / "train_log.jsonl").write_text("".join(line_of(step, 9.0 - step) for step in range(5)) + '{"step": 5, "lo')
    program = """
if rank == 0:
    time.sleep(0.3)
    kept = log.read_text().splitlines(keepends=True)[:3]
    (folder / "new").write_text("".join(kept))
    os.replace(folder / "new", log)
    for step in range(3, 6):
        say(step, 1.0 * step)
        time.sleep(0.15)
    (folder / "done").touch()
"""
    records = list(train(program))
    assert [record.step for record in records] == list(range(6))
    assert [record.loss for record in records] == [9.0, 8.0, 7.0, 3.0, 4.0, 5.0]
    assert [record.replayed for record in records] == [True] * 3 + [False] * 3
    assert (folder / "ended-0").exists() and (folder / "ended-1").exists()


def test_a_log_that_was_moved_aside_is_not_shown(folder, train):
    """A chart of the model that was trained before with other settings."""
    (folder / "train_log.jsonl").write_text(line_of(0, 9.0) + line_of(1, 8.0))
    program = """
if rank == 0:
    os.rename(folder, folder.with_name("d2-previous"))
    time.sleep(0.3)
    folder.mkdir()
    say(0, 9.5)
    (folder / "done").touch()
time.sleep(0.5)
"""
    assert [(record.step, record.loss, record.replayed) for record in train(program)] == [(0, 9.5, False)]


def test_what_the_processes_find(folder, train, monkeypatch):
    """Scripts that draw into the notebook, fight over the cores, or find the base directory taken by their parent."""
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setenv("JPY_PARENT_PID", "1")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    program = """
from filelock import FileLock

if rank == 0:
    FileLock(folder.parent.parent / "run.lock", timeout=0).acquire()
    (folder / "done").touch()
(folder / f"found-{rank}").write_text(json.dumps([sys.argv[2:], dict(os.environ), "ipykernel" in sys.modules]))
"""
    assert list(train(program, depth=-1, torch_compile=False, run="")) == []
    for rank in (0, 1):
        arguments, variables, in_kernel = json.loads((folder / f"found-{rank}").read_text())
        assert arguments == ["--depth=-1", "--torch_compile=False", "--run="] and not in_kernel
        assert variables["RANK"] == variables["LOCAL_RANK"] == str(rank) and variables["WORLD_SIZE"] == "2"
        assert variables["WANDB_MODE"] == "disabled" and int(variables["OMP_NUM_THREADS"]) >= 1
        assert not {"MPLBACKEND", "JPY_PARENT_PID"} & set(variables)
        assert variables["NANOCHAT_LAUNCHED_FOR"] == "pretrain fingerprint"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert rank_environment(0, 2, 1)["OMP_NUM_THREADS"] == "3", "as the reader wants it"


def test_what_is_said_before_the_first_step_is_shown(folder, train, capsys):
    """A smaller device batch, or that nothing could be compiled, known to a log file alone."""
    program = f"""
if rank == 0:
    print("a table of the plan")
    print({launch.BEGINS!r})
    print("a device batch of 8 does not fit; using 4", flush=True)
    time.sleep(0.5)
    say(0, 5.0)
    time.sleep(0.5)
    print("Step 00000 | and so on", flush=True)
    time.sleep(0.3)
    (folder / "done").touch()
"""
    assert [record.step for record in train(program)] == [0]
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert shown == ["│ a device batch of 8 does not fit; using 4"]


def test_the_place_from_which_on_words_are_shown(folder, monkeypatch, capsys):
    """Words that are looked for after a line that nobody prints."""
    monkeypatch.setenv("NANOCHAT_LAUNCHED_FOR", "pretrain fingerprint")
    assert list(train_on(1, iter([RECORD]), "pretrain", folder, "fingerprint", {})) == [RECORD]
    assert capsys.readouterr().out == launch.BEGINS + "\n"


def test_one_process_and_a_finished_training_start_nothing(folder, train):
    """Twenty seconds of starting processes each time a finished notebook is run."""
    records = [RECORD, replace(RECORD, step=1)]
    assert list(train_on(1, iter(records), "pretrain", folder, "fingerprint", {})) == records
    (folder / "done").touch()
    assert list(train_on(8, iter(records), "pretrain", folder, "fingerprint", {})) == records
    assert not (folder.parent.parent / "launch").exists()


def test_a_sentence_of_a_process_is_the_sentence_here(folder, train, monkeypatch):
    """Forty lines of log for someone who gave a wrong number, or a wait for processes that wait for a dead one."""
    monkeypatch.setattr(launch, "FAILURE_PATIENCE", 0.3)
    program = """
(folder / f"pid-{rank}").write_text(str(os.getpid()))
while not (folder / "pid-0").exists():
    time.sleep(0.01)
if rank == 1:
    print("✗ depth is 0; a model needs at least 1 layer.")
    sys.exit(1)
time.sleep(60)
"""
    with pytest.raises(UserError, match=r"^pretrain: depth is 0; a model needs at least 1 layer\.$"):
        list(train(program))
    assert ended(folder, 0) and ended(folder, 1)


def test_who_only_followed_is_not_blamed(folder, train):
    """A sentence about a lost connection, or PyTorch's prefix before it, in the place of what went wrong."""
    program = """
if rank == 1:
    while not (folder / "lost").exists():
        time.sleep(0.01)
    print("[rank1]: ✗ the loss became nan at step 3.")
else:
    print("[rank0]: ✗ rank 0 lost another process and ends too (Broken pipe).")
    (folder / "lost").touch()
sys.exit(1)
"""
    with pytest.raises(UserError, match=r"^pretrain: the loss became nan at step 3\.$"):
        list(train(program))


def test_who_fails_and_takes_its_time_to_end_is_blamed(folder, train):
    """The end of the log of who only followed, because a process that fails also has a GPU to leave."""
    program = """
if rank == 0:
    print("✗ rank 0 lost another process and ends too (Connection closed by peer).")
    sys.exit(1)
time.sleep(0.5)
1 / 0
"""
    with pytest.raises(UserError, match=r"^pretrain: rank 1 failed with status 1(.|\n)*division by zero"):
        list(train(program))


def test_another_training_than_the_one_shown_is_refused(folder, monkeypatch):
    """Cells that were edited in another order than they ran: hours on another model, and this one moved aside."""
    started = iter([RECORD])
    monkeypatch.setenv("NANOCHAT_LAUNCHED_FOR", "finetune another")
    for name in ("finetune", "pretrain"):
        with pytest.raises(UserError, match="Restart the kernel and run all cells"):
            next(train_on(1, started, name, folder, "fingerprint", {}))
    (folder / "done").touch()
    assert list(train_on(1, started, "pretrain", folder, "fingerprint", {})) == [RECORD], "what is trained is passed by"


def test_who_was_killed_is_named(folder, train):
    """A process that ran out of memory, and a message about the others, which lost their connection to it."""
    program = """
if rank == 1:
    print("loading")
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(0.2)
raise RuntimeError("connection closed by peer")
"""
    with pytest.raises(UserError) as failure:
        list(train(program))
    sentence, _, log = str(failure.value).partition("\n")
    assert sentence.startswith("pretrain: rank 1 was killed by signal 9 (SIGKILL), as systems do when memory runs out.")
    assert "Run the cell again to go on from the last checkpoint" in sentence and log == "loading"


def test_a_crash_shows_the_end_of_its_log(folder, train):
    """A failure of which only the exit status is known."""
    with pytest.raises(UserError, match=r"rank \d failed with status 1(.|\n)*ZeroDivisionError: division by zero"):
        list(train("1 / 0"))


def test_who_had_to_be_ended_is_not_blamed(folder, train, monkeypatch):
    """A crash on one GPU, told as the end of another one that was still waiting for it, which NCCL does for ever."""
    monkeypatch.setattr(launch, "FAILURE_PATIENCE", 0.3)
    with pytest.raises(UserError, match=r"^pretrain: rank 1 failed with status 1(.|\n)*division by zero"):
        list(train("time.sleep(60) if rank == 0 else 1 / 0"))
    with pytest.raises(UserError, match=r"^pretrain: rank 1 was killed by signal 9 \(SIGKILL\)"):
        list(train("time.sleep(60) if rank == 0 else os.kill(os.getpid(), signal.SIGKILL)"))


def test_a_stop_waits_until_all_have_saved(folder, train, monkeypatch):
    """A stop button that kills a process while it writes the checkpoint."""
    monkeypatch.setattr(launch, "FAILURE_PATIENCE", 0.1)
    program = """
def save():
    time.sleep(0.2 + rank)
    (folder / f"saved-{rank}").touch()


on_signal(save)
say(rank, 1.0)
time.sleep(60)
"""
    seen, before = [], signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="stopped and saved"):
        for record in train(program):
            seen.append(record.step)
            if len(seen) == 2:
                os.kill(os.getpid(), signal.SIGINT)
    assert sorted(seen) == [0, 1] and (folder / "saved-0").exists() and (folder / "saved-1").exists()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_stop_during_the_set_up_does_not_wait_for_ever(folder, train, monkeypatch):
    """A process that had not begun and is gone, and another that waits three hours to meet it."""
    monkeypatch.setattr(launch, "FAILURE_PATIENCE", 0.3)
    program = """
(folder / f"pid-{rank}").write_text(str(os.getpid()))
if rank == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
say(rank, 1.0)
time.sleep(60)
"""
    with pytest.raises(KeyboardInterrupt, match="run again"):
        for step, _ in enumerate(train(program)):
            if step == 1:
                os.kill(os.getpid(), signal.SIGINT)
    assert ended(folder, 0) and ended(folder, 1)


def test_a_second_stop_means_now(folder, train):
    """A notebook that cannot be stopped while a process hangs."""
    program = """
(folder / f"pid-{rank}").write_text(str(os.getpid()))
signal.signal(signal.SIGTERM, signal.SIG_IGN)
say(rank, 1.0)
time.sleep(60)
"""
    with pytest.raises(KeyboardInterrupt):
        for step, _ in enumerate(train(program)):
            if step == 1:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
    assert ended(folder, 0) and ended(folder, 1)


def test_processes_that_train_something_else_are_found_out(folder, train):
    """A notebook that goes on to evaluate a model which nobody has trained."""
    with pytest.raises(UserError, match="ended well and did not train this model"):
        list(train("pass"))


KERNEL = """
import sys
from pathlib import Path
from nanochat import launch

launch.program_so_far = lambda: Path(sys.argv[1]).read_text()
folder = Path(sys.argv[2])
for record in launch.train_on(2, iter(()), "pretrain", folder, "fingerprint", {"folder": folder}):
    print(record.step, flush=True)
"""


def test_nothing_outlives_the_kernel(tmp_path):
    """GPUs that stay busy after the kernel was killed, and a step that is lost."""
    program, folder = tmp_path / "program.py", tmp_path / "d2"
    folder.mkdir()
    program.write_text(
        STAND_IN.format(line=line_of(0, 5.0))
        + 'on_signal(lambda: (folder / f"saved-{rank}").touch())\nsay(rank, 1.0)\ntime.sleep(60)'
    )
    kernel = subprocess.Popen(
        [sys.executable, "-c", KERNEL, program, folder], stdout=subprocess.PIPE, text=True,
        env=python_environment(NANOCHAT_BASE_DIR=tmp_path),
    )  # fmt: skip
    started = f"pretrain: starting 2 processes, which print into {tmp_path}/launch/pretrain-*.log; "
    assert kernel.stdout.readline().startswith(started)
    assert kernel.stdout.readline().strip() in ("0", "1")
    while len((folder / "train_log.jsonl").read_text().splitlines()) < 2:
        time.sleep(0.05)
    kernel.kill()
    kernel.wait()
    deadline = time.monotonic() + 20
    while len(list(folder.glob("saved-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(list(folder.glob("saved-*"))) == 2


PRETRAINING = """
import time
import torch
from helpers import EAGER, small_plan, small_tokenizer
from nanochat.base_train import pretrain
from nanochat.dataset import Corpus
from nanochat.runtime import compute_cleanup, compute_init

compute_init("cpu")
corpus = Corpus("small", {train_files!r}, {val_file!r})
plan = small_plan(eval_every=0, save_every=-1)
for record in pretrain(plan, corpus, small_tokenizer(), torch.device("cpu"), torch.float32, EAGER):
    time.sleep(0.1)
"""


def test_a_stopped_training_goes_on(tmp_path, monkeypatch, one_thread):
    """A stop button after which the training begins again, or goes on with other numbers."""
    corpus, tokenizer, plan = (
        small_corpus(tmp_path / "text"),
        small_tokenizer(),
        small_plan(eval_every=0, save_every=-1),
    )
    arguments = (corpus, tokenizer, torch.device("cpu"), torch.float32, EAGER)
    fingerprint = fingerprint_of(pretraining_inputs(plan, corpus, tokenizer))
    program = PRETRAINING.format(train_files=corpus.train_files, val_file=corpus.val_file)
    monkeypatch.setattr(launch, "program_so_far", lambda: program)
    monkeypatch.setenv("PYTHONPATH", python_environment()["PYTHONPATH"])
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "one"))
    alone = list(pretrain(plan, *arguments))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "two"))
    folder, first = plan.settings.checkpoint_dir, []
    with pytest.raises(KeyboardInterrupt, match="stopped and saved"):
        for record in train_on(2, pretrain(plan, *arguments), "pretrain", folder, fingerprint, {}):
            first.append(record)
            if record.step == 1:
                os.kill(os.getpid(), signal.SIGINT)
    assert 2 <= len(first) < 12 and not any(record.replayed for record in first)
    again = list(train_on(2, pretrain(plan, *arguments), "pretrain", folder, fingerprint, {}))
    assert [record.replayed for record in again] == [True] * len(first) + [False] * (13 - len(first))
    assert [r.loss for r in again[:12]] == pytest.approx([r.loss for r in alone[:12]], rel=2e-3)
    finished = list(train_on(2, pretrain(plan, *arguments), "pretrain", folder, fingerprint, {}))
    assert [(r.step, r.loss, r.val_bpb) for r in finished] == [(r.step, r.loss, r.val_bpb) for r in again]
    assert all(record.replayed for record in finished)
    lock_base_dir().release()


def test_only_a_finished_checkpoint_of_this_training_counts(tmp_path):
    """A training that is taken for finished because another one is, or because it has saved once."""
    weights, about = {"w": torch.zeros(2)}, {"model_config": {}}
    assert not is_trained(tmp_path / "d2", "mine")
    save_checkpoint(tmp_path / "d2", 4, weights, None, about | {"fingerprint": "mine", "finished": False})
    assert not is_trained(tmp_path / "d2", "mine")
    save_checkpoint(tmp_path / "d2", 8, weights, None, about | {"fingerprint": "mine", "finished": True})
    assert is_trained(tmp_path / "d2", "mine") and not is_trained(tmp_path / "d2", "another")


def test_a_finished_checkpoint_of_an_older_version_counts(tmp_path):
    """A model that was trained before checkpoints said so: trained again, or an error after every "Run all"."""
    save_checkpoint(tmp_path / "d2", 8, {"w": torch.zeros(2)}, None, {"model_config": {}, "fingerprint": "mine"})
    assert is_trained(tmp_path / "d2", "mine", last_step=8) and not is_trained(tmp_path / "d2", "mine", last_step=9)


@pytest.mark.parametrize("gpus, requested, expected", [(1, -1, 1), (3, -1, 2), (8, -1, 8), (8, 4, 4), (0, 2, 2)])
def test_a_notebook_takes_all_gpus_that_divide(gpus, requested, expected, monkeypatch, capsys):
    """Seven GPUs that idle, or a number of processes over which no batch divides."""
    monkeypatch.setattr(settings, "command_line", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert processes_to_train(requested, "cuda" if gpus else "cpu") == expected
    assert ("Training on 2 of 3 GPUs" in capsys.readouterr().out) == (gpus == 3)


def test_what_cannot_be_had_is_refused(monkeypatch, capsys):
    """Processes that share a GPU, or a script that silently trains on one of eight."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(settings, "command_line", lambda: None)
    for requested, device_type in ((9, "cuda"), (2, "mps")):
        with pytest.raises(UserError, match="Ask for fewer"):
            processes_to_train(requested, device_type)
    monkeypatch.setattr(settings, "command_line", lambda: [])
    assert processes_to_train(-1, "cuda") == 1
    assert "torchrun --standalone --nproc_per_node=8" in capsys.readouterr().out
    with pytest.raises(UserError, match="torchrun --standalone --nproc_per_node=2"):
        processes_to_train(2, "cpu")
    for name, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=4).items():
        monkeypatch.setenv(name, str(value))
    assert processes_to_train(-1, "cuda") == processes_to_train(4, "cpu") == 4
    with pytest.raises(UserError, match="4 were started"):
        processes_to_train(2, "cpu")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("changes", [{}, dict(num_iterations=5), dict(target_flops=1e15)])
def test_parameters_arrive_as_they_were_sent(preset, changes):
    """Processes that train with other settings than the notebook shows."""
    cell = {name: {str: "", bool: False}.get(kind, -1) for name, kind in PARAMETER_TYPES.items()}
    cell["weights_license"] = "mit"
    params = resolve_parameters(cell | changes | dict(preset=preset, price_per_hour=0.5))
    arguments = [f"--{name}={value}" for name, value in params.items()]
    assert resolve_parameters(cell | dict(preset="cpu", allow_weak_sandbox=True), arguments) == params
