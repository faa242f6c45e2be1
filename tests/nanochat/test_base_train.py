"""Training can be stopped anywhere, by anyone, and goes on as if nothing had happened."""

import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from helpers import (
    EAGER,
    english_documents,
    python_environment,
    run_ranks,
    small_corpus,
    small_plan,
    small_tokenizer,
    write_parquet,
)
from nanochat import base_train, precision
from nanochat.base_train import pretrain
from nanochat.checkpoint_files import find_last_step, load_checkpoint, read_meta
from nanochat.checkpoint_manager import load_model
from nanochat.dataset import Corpus
from nanochat.runtime import UserError

# A training program of a few lines. argv: where to be killed. Each loss is printed with all its bits.
PROGRAM = """
import json, os, signal, sys
from pathlib import Path
import torch
from helpers import small_corpus, small_plan
import nanochat.checkpoint_files as checkpoint_files
from nanochat.base_train import pretrain
from nanochat.planning import TrainingOptions
from nanochat.tokenizer import RustBPETokenizer

point, number = (sys.argv[1].split(":") + ["0"])[:2]
number = int(number)

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def half_a_model(tensors, path):
    Path(path).write_bytes(b"x" * 1000)
    die()

def before_saving(step):  # patches the writer once the step has come
    if point == "model" and step == number:
        checkpoint_files.safetensors.torch.save_file = half_a_model
    if point == "optimizer" and step == number:
        checkpoint_files.torch.save = die
    if point == "meta" and step == number:
        checkpoint_files.write_checkpoint_meta = die

torch.use_deterministic_algorithms(True)
base = Path(os.environ["NANOCHAT_BASE_DIR"])
corpus = small_corpus(base / "data")
tokenizer = RustBPETokenizer.from_directory(base / "tokenizer")
compiled = os.environ.get("COMPILED") == "1"
dtype = torch.bfloat16 if compiled else torch.float32
for record in pretrain(small_plan(), corpus, tokenizer, torch.device("cpu"), dtype, TrainingOptions(compiled)):
    if not record.replayed:
        print("loss", record.step, float(record.loss).hex() if record.loss else "-", record.val_bpb, flush=True)
    if point == "step" and record.step == number and not record.replayed:
        die()
    before_saving(record.step + 1)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base directory with a corpus and a tokenizer; each test copies what it needs by pointing at its own."""
    base = tmp_path_factory.mktemp("world")
    tokenizer = small_tokenizer()
    tokenizer.save(base / "tokenizer")
    return base, small_corpus(base / "data"), tokenizer


@pytest.fixture
def base_dir(world, tmp_path, monkeypatch):
    small_corpus(tmp_path / "data")
    world[2].save(tmp_path / "tokenizer")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return tmp_path


def start(base_dir, point="never", **environment):
    program = base_dir / "program.py"
    program.write_text(PROGRAM)
    return subprocess.Popen(
        [sys.executable, str(program), point], env=python_environment(NANOCHAT_BASE_DIR=base_dir, **environment),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def losses_of(output: str) -> dict[int, str]:
    return {int(line.split()[1]): line for line in output.splitlines() if line.startswith("loss ")}


def weights_of(base_dir, step=12):
    return load_checkpoint(base_dir / "base_checkpoints" / "d2", step, "cpu")[0]


@pytest.fixture(scope="module")
def uninterrupted(world):
    base = world[0]
    process = start(base)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    losses = losses_of(output)
    assert list(losses) == list(range(13))
    return losses, weights_of(base)


@pytest.mark.parametrize(
    "point", ["step:2", "step:4", "step:6", "step:11", "model:8", "optimizer:8", "meta:8", "meta:12"]
)
def test_killed_training_resumes_bitwise(point, base_dir, uninterrupted):
    """Prevents a resumed run that repeats or skips data, loses optimizer state, or loads half a checkpoint."""
    process = start(base_dir, point)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    before = losses_of(output)
    process = start(base_dir)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    after = losses_of(output)
    losses, weights = uninterrupted
    assert after.keys() | before.keys() == losses.keys()
    assert all(losses[step] == line for part in (before, after) for step, line in part.items())
    resumed = weights_of(base_dir)
    assert resumed.keys() == weights.keys()
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)
    number = int(point.split(":")[1])
    if number > 4:
        assert min(after) > 0, "it started over instead of resuming"


def test_compiled_bf16_training_resumes_bitwise_too(base_dir, world, tmp_path_factory):
    """Prevents a compiled kernel whose result depends on the threads or on the process from breaking exactness."""
    whole = tmp_path_factory.mktemp("whole")
    world[2].save(whole / "tokenizer")
    options = dict(COMPILED=1, TORCHINDUCTOR_CACHE_DIR=tmp_path_factory.mktemp("kernels"))
    output, errors = start(whole, **options).communicate(timeout=300)
    losses = losses_of(output)
    assert list(losses) == list(range(13)), errors
    before = losses_of(start(base_dir, "step:6", **options).communicate(timeout=300)[0])
    after = losses_of(start(base_dir, **options).communicate(timeout=300)[0])
    assert min(after) == 4 and {**before, **after} == losses
    assert all(torch.equal(tensor, weights_of(whole)[name]) for name, tensor in weights_of(base_dir).items())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_polite_signal_saves_first(number, base_dir, uninterrupted):
    """Prevents a stop button that throws away everything since the last checkpoint."""
    process = start(base_dir)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("loss 1 "):
            process.send_signal(number)
            break
    output, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and "run again to go on" in errors
    done = losses_of("".join(lines) + output)
    assert find_last_step(base_dir / "base_checkpoints" / "d2") == max(done) + 1 < 12
    output, errors = start(base_dir).communicate(timeout=120)
    after = losses_of(output)
    assert min(after) == max(done) + 1
    losses, weights = uninterrupted
    assert {**done, **after} == losses
    assert all(torch.equal(tensor, weights[name]) for name, tensor in weights_of(base_dir).items())


def records_of(world, base_dir, plan=None, **changes):
    _, _, tokenizer = world
    plan = plan or small_plan(**changes)
    return list(pretrain(plan, small_corpus(base_dir / "data"), tokenizer, torch.device("cpu"), torch.float32, EAGER))


def test_it_learns_and_reports(world, base_dir):
    """Prevents records that say nothing true: the loss falls, bpb is measured where asked, samples come at the end."""
    records = records_of(world, base_dir, num_iterations=40, embedding_lr=6.0, unembedding_lr=0.1, matrix_lr=0.4)
    assert [record.step for record in records] == list(range(41))
    assert records[0].loss == pytest.approx(math.log(512), abs=0.05)  # zero-initialised outputs: pure guessing
    assert records[39].loss < records[0].loss - 1
    assert [r.step for r in records if r.val_bpb is not None] == [0, 5, 10, 15, 20, 25, 30, 35, 40]
    assert records[-1].loss is None and len(records[-1].samples) == 7
    ema = 0.0
    for record in records[:-1]:
        ema = 0.9 * ema + 0.1 * record.loss
        assert record.smooth_loss == pytest.approx(ema / (1 - 0.9 ** (record.step + 1)))
    model, tokenizer, meta = load_model("base", torch.device("cpu"), "eval", model_tag="d2")
    assert meta["step"] == 40 and meta["val_bpb"] == records[-1].val_bpb
    assert meta["loop_state"]["min_val_bpb"] == min(r.val_bpb for r in records if r.val_bpb is not None)


def test_a_finished_run_is_replayed_not_repeated(world, base_dir, capsys):
    """Prevents "Run all" from training again what is trained, or from losing its curve."""
    first = records_of(world, base_dir)
    capsys.readouterr()
    again = records_of(world, base_dir)
    assert "nothing to do" in capsys.readouterr().out
    assert all(record.replayed for record in again)
    assert [(r.step, r.loss, r.val_bpb) for r in again] == [(r.step, r.loss, r.val_bpb) for r in first]


def test_other_settings_do_not_overwrite_a_model(world, base_dir, capsys):
    """Prevents a changed learning rate from continuing, or destroying, a model that was trained with another."""
    records_of(world, base_dir)
    changed = records_of(world, base_dir, matrix_lr=0.03)
    assert not any(record.replayed for record in changed)
    assert "kept as d2-previous" in capsys.readouterr().out
    folder = base_dir / "base_checkpoints"
    assert find_last_step(folder / "d2-previous") == find_last_step(folder / "d2") == 12


def test_how_often_to_look_is_not_part_of_the_model(world, base_dir):
    """Prevents retraining because someone wanted more validations or another device batch."""
    records_of(world, base_dir)
    again = records_of(world, base_dir, eval_every=2, save_every=7, eval_tokens=1024, device_batch_size=2)
    assert all(record.replayed for record in again)


def test_gradient_accumulation_is_the_same_batch(world, base_dir, tmp_path_factory, monkeypatch):
    """Prevents an accumulation that weighs or orders the micro-batches differently from one large batch."""
    calm = dict(save_every=-1, matrix_lr=0.02, embedding_lr=0.3, unembedding_lr=0.004, scalar_lr=0.5)
    one = records_of(world, base_dir, device_batch_size=8, **calm)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path_factory.mktemp("accumulated")))
    four = records_of(world, base_dir, device_batch_size=2, **calm)
    for a, b in zip(one[:-1], four[:-1], strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-5)


def test_an_exploding_loss_is_a_sentence(world, base_dir):
    """Prevents hours of training on NaN."""
    with pytest.raises(UserError, match="Lower the learning rates"):
        records_of(world, base_dir, embedding_lr=1e30, unembedding_lr=1e30, scalar_lr=1e30)


def test_signals_are_given_back(world, base_dir):
    """Prevents a training that leaves Ctrl-C changed for the cells after it."""
    before = signal.getsignal(signal.SIGINT)
    started = time.monotonic()
    records_of(world, base_dir)
    assert signal.getsignal(signal.SIGINT) is before and time.monotonic() > started


def test_without_a_compiler_it_says_so_and_trains(world, base_dir, monkeypatch, capsys):
    """Prevents a machine without a C++ compiler from being unable to train, or from being slow in silence."""

    def no_compiler(function, **options):
        def fail(*args):
            raise RuntimeError("No working C++ compiler found\nmore about it")

        return fail

    monkeypatch.setattr(torch, "compile", no_compiler)
    _, _, tokenizer = world
    plan, corpus = small_plan(num_iterations=2, save_every=-1), small_corpus(base_dir / "data")
    records = list(pretrain(plan, corpus, tokenizer, torch.device("cpu"), torch.float32))
    assert len(records) == 3
    printed = capsys.readouterr().out
    assert printed.count("torch.compile is not available here (RuntimeError: No working C++ compiler found)") == 1


def test_a_resumed_fp16_run_reads_on_where_it_stopped(base_dir, world, monkeypatch, one_thread):
    """Prevents rows that are read twice or never, and a loss scale that starts over. Here no two batches are alike:
    of a corpus of a few long documents, a loader repeats its first rows for many steps.
    """
    texts = [part for text in english_documents() for part in text.split("\n\n") if len(part) > 40]
    files = [write_parquet(base_dir / f"{i}.parquet", texts[i::3]) for i in range(3)]
    corpus, step_of, seen = Corpus("many", tuple(files[:2]), files[2]), base_train.training_step, []
    monkeypatch.setattr(base_train, "sample_text", lambda *args: ())
    monkeypatch.setattr(precision, "LOSS_SCALE_START", 2.0**24)  # overflows, so that some updates are skipped
    monkeypatch.setattr(precision, "LOSS_SCALE_GROWTH_INTERVAL", 3)

    def spy(model, optimizer, scaler, batches):
        return step_of(model, optimizer, scaler, ((seen.append(x.tolist()), (x, y, w))[1] for x, y, w in batches))

    def run(tag, *stops):
        losses, plan = {}, small_plan(num_iterations=7, eval_every=0, save_every=-1, model_tag=tag)
        for last in (*stops, None):
            try:
                for r in pretrain(plan, corpus, world[2], torch.device("cpu"), torch.float16, EAGER):
                    losses[r.step] = r.loss
                    if r.step == last:
                        os.kill(os.getpid(), signal.SIGINT)
            except KeyboardInterrupt:
                pass
        return losses, seen[:], read_meta(plan.settings.checkpoint_dir, 7)["loss_scaler"]

    monkeypatch.setattr(base_train, "training_step", spy)
    whole = run("whole")
    seen.clear()
    assert run("parts", 0, 3) == whole and whole[2]["factor"] < 2.0**24
    assert len(whole[1]) == 14 and all(a != b for a, b in zip(whole[1], whole[1][1:], strict=False))


BUILDING = """
import torch
from helpers import small_plan
from nanochat.base_train import build_for_training
from nanochat.runtime import compute_cleanup, compute_init

rank, seed = compute_init("cpu")[1], torch.manual_seed
torch.manual_seed = lambda number: seed(number + rank)  # as a GPU with another number of cores would draw
model = build_for_training(small_plan(), torch.device("cpu"), torch.float32)
print(sum(p.double().abs().sum().item() for p in model.parameters()).hex())
compute_cleanup()
"""


def test_different_gpus_begin_with_the_same_weights():
    """Prevents a first step whose gradients are the mean over models that never met."""
    one, other = (output.splitlines()[-1] for output in run_ranks(BUILDING))
    assert one == other and float.fromhex(one) > 100
