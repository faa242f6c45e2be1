"""The golf training loop: against a plain loop written here, killed and resumed, against the clock, and on ranks."""

import json
import os
import signal
import subprocess
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_golf_run import LEARNING, TRAINING, StepTime, TinyRun, V, byte_tables, checksum, write_tiny_shards

from golf.golf_schedule import TrainingClock
from golf.golf_train import compile_golf
from helpers import PYTHON, python_environment, run_ranks
from nanochat.runtime import UserError

pytestmark = pytest.mark.usefixtures("one_thread")

HERE = str(Path(__file__).parent)
TIMES = ("train_ms", "tokens_per_second", "eta_seconds", "replayed")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tiny_shards(tmp_path_factory.mktemp("data"))


def without_times(records) -> list[dict]:
    return [{name: value for name, value in asdict(r).items() if name not in TIMES} for r in records]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """(records, weights, average) of a run that nobody interrupts."""
    run = TinyRun(data)
    records = list(run.records(tmp_path_factory.mktemp("whole") / "checkpoints"))
    return records, run.model.state_dict(), run.ema.shadow


def assert_same_end(run, whole):
    _, weights, average = whole
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    assert run.ema.shadow.keys() == average.keys()
    assert all(torch.equal(tensor, average[name]) for name, tensor in run.ema.shadow.items())


# --- what a step is ---------------------------------------------------------------------------------------------------


def test_run_is_the_straightforward_loop(data, whole):
    """Slices that overlap or are left out, gradients that are not a mean, a schedule that is one step late."""
    records, weights, average = whole
    run = TinyRun(data)
    model, optimizer, parameters = run.model, run.optimizer, list(run.model.parameters())
    ribbon = torch.from_numpy(run.stream.read(0, len(run.stream)).astype("int64"))
    position, shadow, losses, scores = 0, None, {}, {}

    def score():
        nats = n_bytes = 0.0
        tables = byte_tables()
        for start in range(0, len(run.val_tokens) - 1, 32):
            block = run.val_tokens[start : start + 33]
            with torch.no_grad():
                log_probs = model(block[None, :-1])[0].double().log_softmax(-1)
            nats -= log_probs[torch.arange(len(block) - 1), block[1:]].sum().item()
            for previous, target in zip(block[:-1].tolist(), block[1:].tolist(), strict=True):
                space = tables.has_leading_space[target] and not tables.is_boundary[previous]
                n_bytes += int(tables.base_bytes[target]) + int(space)
        return nats / (len(run.val_tokens) - 1), nats / n_bytes / torch.log(torch.tensor(2.0)).item()

    for step in range(25):
        if step % 5 == 0 or step == 24:
            scores[step] = score()
        if step == 24:
            break
        loss = 0.0
        for _ in range(8):
            tokens = ribbon[(position + torch.arange(65)) % len(ribbon)]
            position += 65
            logits = model(tokens[:64].view(2, 32)).view(64, V)
            loss = loss + torch.nn.functional.cross_entropy(logits, tokens[1:]) / 8
        loss.backward()
        norm = sum(p.grad.square().sum() for p in parameters) ** 0.5
        for p in parameters:
            p.grad *= min(1.0, 0.3 / norm.item())
        multiplier = min(1.0, (24 - step) / 9)
        momentum = 0.85 + 0.1 * min(1.0, step / 10)
        optimizer.set_schedule(multiplier, momentum)
        optimizer.step()
        optimizer.zero_grad()
        losses[step + 1] = (loss.item(), multiplier, momentum)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        if step + 1 == 6:
            shadow = state
        elif shadow:
            shadow = {name: 8 / 18 * shadow[name] + 10 / 18 * state[name] for name in state}

    assert [r.step for r in records] == list(range(25))
    assert records[0].loss is None and records[0].train_ms == 0
    for record in records[1:]:
        loss, multiplier, momentum = losses[record.step]
        assert record.loss == pytest.approx(loss, rel=1e-5)
        assert (record.lr_multiplier, record.muon_momentum) == pytest.approx((multiplier, momentum))
        assert record.progress == record.step / 24
    assert losses[24][0] < losses[1][0] - 0.2  # it learns
    assert {r.step for r in records if r.val_bpb is not None} == scores.keys()
    for step, (nats, bpb) in scores.items():
        assert (records[step].val_loss, records[step].val_bpb) == pytest.approx((nats, bpb), rel=1e-5)
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor, weights[name], atol=1e-5), name
        assert torch.allclose(shadow[name], average[name], atol=1e-5), name


@pytest.mark.parametrize("kind", ["baseline", "looped"])
def test_warm_up_leaves_no_trace(data, tmp_path, kind):
    """A run that has seen its first batches twice, or starts with the momentum of the warm-up."""
    states, counts = [], []
    options = {}
    if kind == "looped":
        options = dict(variants=[{"looping": False}, {"looping": True}],
                       options_at=lambda step, progress, scoring: {"looping": progress >= 0.5})  # fmt: skip
    for warm_up in (0, 3):
        run = TinyRun(data, kind, iterations=4, warmup_steps=warm_up, val_loss_every=2, save_every=0)
        time = StepTime(run)
        records = list(run.records(tmp_path / str(warm_up), **options))
        states.append((without_times(records), run.model.state_dict()))
        counts.append(time.steps)
    assert states[0][0] == states[1][0]
    assert all(torch.equal(w, states[1][1][name]) for name, w in states[0][1].items())
    assert counts == [4, 4 + 3 * (2 if kind == "looped" else 1)]


def test_options_reach_the_steps_and_the_scoring(data, tmp_path):
    """A loop that is switched on in training and not in scoring, or one step late."""
    asked, seen = [], []
    run = TinyRun(data, "looped", iterations=4, warmup_steps=0, val_loss_every=2)

    def options_at(step, progress, scoring):
        asked.append((step, progress, scoring))
        return {"looping": progress >= 0.5}

    run.call = lambda *a, looping, **how: seen.append(looping) or run.model(*a, looping=looping, **how)
    list(run.records(tmp_path / "run", options_at=options_at))
    updates = [(step, step / 4, False) for step in range(4)]
    scorings = [(step, step / 4, True) for step in (0, 2, 4)]
    assert sorted(asked) == sorted(updates + scorings)
    assert seen == [False] * (3 + 16) + [True] * (3 + 16 + 3)  # 3 batches each time it is scored, 8 slices a step


def test_validation_and_losses_where_they_are_wanted(data, tmp_path):
    """A validation at each of twenty thousand steps, or a log that waits for the GPU at each of them."""
    run = TinyRun(data, val_loss_every=0, train_log_every=7, save_every=0)
    records = list(run.records(tmp_path / "few"))
    assert [r.step for r in records if r.val_bpb is not None] == [24]
    assert [r.step for r in records if r.loss is not None] == [*range(1, 11), 14, 21, 24]


def test_compiling_is_asked_for(data):
    """A compiler that starts on a machine where it was switched off."""
    run = TinyRun(data)
    assert compile_golf(run.model, None, wanted=False) is run.model


def test_scoring_compiles_without_an_optimizer(data, monkeypatch):
    """The new process, which has none, falls over it: only on a machine with a compiler."""
    monkeypatch.setattr("golf.golf_train.compiler_works", lambda device: (True, ""))
    run = TinyRun(data)
    assert compile_golf(run.model, None, wanted=True)._orig_mod is run.model


# --- stopping and going on --------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.append(sys.argv[1])
from tiny_golf_run import TinyRun
for record in TinyRun(Path(sys.argv[2])).records(sys.argv[3]):
    if record.step == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
"""


def assert_goes_on(data, folder, whole, replayed):
    run = TinyRun(data)
    records = list(run.records(folder))
    assert without_times(records) == without_times(whole[0])
    assert [r.replayed for r in records].count(True) == replayed
    assert_same_end(run, whole)
    steps = [json.loads(line)["step"] for line in (folder / "train_log.jsonl").read_text().splitlines()]
    assert steps == list(range(25))


def test_killed_run_goes_on_as_if_nothing_had_happened(data, tmp_path, whole):
    """Steps that count twice after a crash, an average or a loader that begins anew."""
    folder = tmp_path / "run" / "checkpoints"
    command = [PYTHON, "-c", KILLED, HERE, data, folder, "11"]
    assert subprocess.run(command, env=python_environment(OMP_NUM_THREADS=1)).returncode == -signal.SIGKILL
    assert json.loads((folder / "train_log.jsonl").read_text().splitlines()[-1])["step"] == 11
    assert_goes_on(data, folder, whole, replayed=9)


def test_run_that_ended_before_its_first_checkpoint(data, tmp_path, whole):
    """The record of the start twice in log and chart."""
    folder = tmp_path / "run" / "checkpoints"
    for record in TinyRun(data).records(folder):
        if record.step == 3:
            break
    assert_goes_on(data, folder, whole, replayed=0)


@pytest.mark.parametrize("asked_at", [0, 6, 23])
def test_stopped_run_saves_and_goes_on(data, tmp_path, whole, asked_at):
    """A stop button that costs ten minutes of training, or that stops nothing."""
    folder, run, seen = tmp_path / "run" / "checkpoints", TinyRun(data), []
    before = signal.getsignal(signal.SIGINT)

    def stop_at(records):
        for record in records:
            seen.append(record)
            if record.step == asked_at:
                os.kill(os.getpid(), signal.SIGINT)

    if asked_at == 23:  # it is over anyway
        stop_at(run.records(folder))
    else:
        with pytest.raises(KeyboardInterrupt, match="saved"):
            stop_at(run.records(folder))
    assert signal.getsignal(signal.SIGINT) is before
    assert [r.step for r in seen] == list(range(asked_at + 2))
    run = TinyRun(data)
    records = list(run.records(folder))
    assert without_times(records) == without_times(whole[0])
    assert [r.replayed for r in records].count(True) == asked_at + 2
    assert_same_end(run, whole)


def test_the_clock_on_the_wall_saves_too(data, tmp_path, monkeypatch):
    """A crash after an hour without save_every, and nothing to go on from."""
    monkeypatch.setattr("golf.golf_train.AUTOSAVE_SECONDS", -1)
    records = TinyRun(data, save_every=0, val_loss_every=0).records(tmp_path / "run")
    while next(records).step < 4:
        pass
    records.close()
    assert sorted(path.name for path in (tmp_path / "run").glob("meta_*")) == ["meta_000002.json", "meta_000003.json"]


def test_finished_run_replays_and_does_nothing(data, tmp_path, whole):
    """Run all, for the second time, trains for another ten minutes."""
    folder = tmp_path / "run" / "checkpoints"
    list(TinyRun(data).records(folder))
    files = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != "train_log.jsonl"}
    run = TinyRun(data, val_loss_every=1, train_log_every=3)  # what is looked at changes no training
    run.call = run.optimizer.step = None
    records = list(run.records(folder))
    assert all(r.replayed for r in records) and without_times(records) == without_times(whole[0])
    assert_same_end(run, whole)
    assert files == {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != "train_log.jsonl"}
    assert len([name for name in files if name.startswith("model_")]) <= 2


@pytest.mark.parametrize("what", ["settings", "seed", "inputs"])
def test_other_settings_begin_anew(data, tmp_path, what, capsys):
    """A run that goes on from weights that were trained at another rate."""
    folder = tmp_path / "run" / "checkpoints"
    list(TinyRun(data, iterations=2, val_loss_every=0).records(folder))
    saved = sorted(path.name for path in folder.glob("model_*"))
    changes = dict(iterations=2, val_loss_every=0)
    run = TinyRun(data, **changes | {"settings": {"grad_clip_norm": 0.2}, "seed": {"seed": 4}, "inputs": {}}[what])
    records = list(run.records(folder, {"learning": LEARNING | {"matrix_lr": 0.01}} if what == "inputs" else None))
    assert [r.replayed for r in records] == [False] * 3
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints-previous").glob("model_*")) == saved
    assert "kept as checkpoints-previous" in capsys.readouterr().out


# --- the clock --------------------------------------------------------------------------------------------------------


def timed_run(monkeypatch, data, **changes):
    settings = dict(iterations=1000, max_wallclock_seconds=5.5, warmdown_iters=3, warmup_steps=2) | changes
    run = TinyRun(data, **settings)
    time = StepTime(run)
    monkeypatch.setattr("golf.golf_train.TrainingClock", partial(TrainingClock, now=time))
    return run, time


def test_no_step_follows_the_bell(data, tmp_path, monkeypatch):
    """One step too many, or a clock that runs while the model is compiled, scored or saved."""
    run, time = timed_run(monkeypatch, data, val_loss_every=2, save_every=3)
    records = list(run.records(tmp_path / "run"))
    assert [r.step for r in records] == list(range(7)) and time.steps == 2 + 6
    assert [r.train_ms for r in records] == [1000.0 * step for step in range(7)]
    assert [r.stopped_early for r in records] == [False] * 6 + [True]
    assert records[-1].val_bpb is not None and records[-1].progress == 1.0
    # 3 steps of the warmdown at 1,000 ms each; at the start of step s (from 0) 5,500 − 1,000 s ms are left
    expected = [min(1.0, (5.5 - s) / 3) if s else 1.0 for s in range(6)]
    assert [r.lr_multiplier for r in records[1:]] == pytest.approx(expected)
    again, time = timed_run(monkeypatch, data, val_loss_every=2, save_every=3)
    assert all(r.replayed for r in again.records(tmp_path / "run")) and time.steps == 0


def test_a_run_that_is_complete_was_not_stopped(data, tmp_path, monkeypatch):
    """The bell that rings during the very last step, and a log that says the run was cut short."""
    run, _ = timed_run(monkeypatch, data, iterations=6)
    records = list(run.records(tmp_path / "run"))
    assert records[-1].step == 6 and not any(r.stopped_early for r in records)


def test_what_was_validated_is_not_validated_again(data, tmp_path):
    """A resumed run that begins with minutes of scoring whose result nobody sees."""
    with pytest.raises(KeyboardInterrupt):
        for record in TinyRun(data).records(tmp_path / "run"):
            if record.step == 4:
                os.kill(os.getpid(), signal.SIGINT)
    run, scored = TinyRun(data), []
    run.call = lambda *a, **how: (torch.is_grad_enabled() or scored.append(1), run.model(*a, **how))[1]
    records = run.records(tmp_path / "run")
    for record in records:
        if not record.replayed:
            break
    records.close()
    assert record.step == 6 and not scored


def test_last_record_has_the_time_of_the_gpu(data, tmp_path, monkeypatch):
    """599,900 ms in the log of a run whose last steps the GPU finished a second after the bell."""
    run, time = timed_run(monkeypatch, data, val_loss_every=0, save_every=0)
    pause = TrainingClock.pause

    def pause_for_the_gpu(clock):
        time.seconds += 0.25
        pause(clock)

    monkeypatch.setattr(TrainingClock, "pause", pause_for_the_gpu)
    assert [r.train_ms for r in run.records(tmp_path / "run")] == [*(1000.0 * step for step in range(6)), 6250.0]


def test_clock_goes_on_where_it_stood(data, tmp_path, monkeypatch):
    """Eleven minutes for a run of ten that was interrupted."""
    run, _ = timed_run(monkeypatch, data)
    with pytest.raises(KeyboardInterrupt):
        for record in run.records(tmp_path / "run"):
            if record.step == 3:
                os.kill(os.getpid(), signal.SIGINT)
    run, time = timed_run(monkeypatch, data)
    records = list(run.records(tmp_path / "run"))
    assert [r.train_ms for r in records] == [1000.0 * step for step in range(7)]
    assert records[-1].stopped_early and time.steps == 2 + 2
    whole, _ = timed_run(monkeypatch, data)
    assert without_times(whole.records(tmp_path / "whole")) == without_times(records)


def test_warmdown_by_fraction_follows_the_clock(data, tmp_path, monkeypatch):
    """System B's rule in steps of twenty thousand, of which two thousand are taken."""
    run, _ = timed_run(monkeypatch, data, warmdown_fraction=0.5)
    rates = [r.lr_multiplier for r in run.records(tmp_path / "run")][1:]
    assert rates == pytest.approx([min(1.0, (1 - s / 5.5) / 0.5) for s in range(6)])


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train_log_every", [1, 100])
def test_a_loss_that_is_no_number_ends_the_run(data, tmp_path, train_log_every):
    """Ten minutes of nan, or a checkpoint full of nan from which the next run goes on."""
    run = TinyRun(data, warmup_steps=0, train_log_every=train_log_every, val_loss_every=0)
    slices = iter(range(10**6))
    run.call = lambda *a, **how: run.model(*a, **how) * (float("nan") if next(slices) >= 8 * 13 else 1.0)
    seen = []
    with pytest.raises(UserError, match="the loss became nan. Lower MATRIX_LR"):
        for record in run.records(tmp_path / "run"):
            seen.append(record.step)
    assert seen[-1] == (13 if train_log_every == 1 else 15)
    assert sorted(path.name for path in (tmp_path / "run").glob("meta_*")) == ["meta_000008.json", "meta_000012.json"]


# --- several processes ------------------------------------------------------------------------------------------------

RANKS = """
import contextlib, io, json, sys, time
from functools import partial
from pathlib import Path
sys.path.append(sys.argv[1])
import golf.golf_train
from golf.golf_schedule import TrainingClock
from nanochat.runtime import UserError, compute_cleanup, compute_init
from tiny_golf_run import StepTime, TinyRun, checksum

data, folder, found = Path(sys.argv[2]), sys.argv[3], {}

def trains_plainly():
    run = TinyRun(data, iterations=8, save_every=0, val_loss_every=4)
    records = [[r.loss, r.val_loss, r.val_bpb] for r in run.records(folder + "/plain")]
    return [records, checksum(run.model.state_dict()), checksum(run.ema.shadow)]

def stops_by_the_clock():
    run = TinyRun(data, iterations=1000, max_wallclock_seconds=5.5, save_every=0)
    clock = StepTime(run, per_step=1.3 if rank else 1.0)
    if rank:
        run.model.register_forward_pre_hook(lambda *_: time.sleep(0.005))
    golf.golf_train.TrainingClock = partial(TrainingClock, now=clock)
    records = [[r.step, r.train_ms, r.lr_multiplier] for r in run.records(folder + "/slow")]
    golf.golf_train.TrainingClock = TrainingClock
    return [records, clock.steps, checksum(run.model.state_dict())]

def meets_nan():
    run = TinyRun(data, warmup_steps=0)
    run.call = lambda *a, **how: run.model(*a, **how) * (float("nan") if rank else 1.0)
    try:
        list(run.records(folder + "/nan"))
    except UserError as error:
        return str(error)

with contextlib.redirect_stdout(io.StringIO()):
    rank = compute_init("cpu")[1]
    found["plain"] = trains_plainly()
    if sys.argv[4] == "2":
        found |= {"slow": stops_by_the_clock(), "nan": meets_nan()}
print(json.dumps(found))
compute_cleanup()
"""


@pytest.fixture(scope="module")
def ranks(data, tmp_path_factory):
    """What each process found, by their number."""
    folder = tmp_path_factory.mktemp("ranks")
    return {
        n: [json.loads(out) for out in run_ranks(RANKS, HERE, data, folder / str(n), n, world_size=n)] for n in (2, 4)
    }


def test_any_number_of_processes_trains_the_same(data, tmp_path, ranks):
    """Ranks that see the same slice, divide twice, or drift apart."""
    single = TinyRun(data, iterations=8, save_every=0, val_loss_every=4)
    expected = [[r.loss, r.val_loss, r.val_bpb] for r in single.records(tmp_path / "1")]
    for several in ranks.values():
        assert all(rank["plain"] == several[0]["plain"] for rank in several)
        for row, want in zip(several[0]["plain"][0], expected, strict=True):
            assert row == [None if value is None else pytest.approx(value, rel=2e-5) for value in want]


def test_finished_run_opens_with_more_processes(data, tmp_path):
    """Trained by one process, opened by two: the second misses an optimizer file, and the first waits for it."""
    run = TinyRun(data, iterations=8, save_every=0, val_loss_every=4)
    list(run.records(tmp_path / "2" / "plain"))
    ends = [json.loads(out)["plain"][1:] for out in run_ranks(RANKS, HERE, data, tmp_path / "2", 0, world_size=2)]
    assert ends == 2 * [[checksum(run.model.state_dict()), checksum(run.ema.shadow)]]


def test_two_processes_go_on_where_one_stopped(data, tmp_path):
    """A run that dies on one GPU and can only be continued on one, or loses its momenta on two."""
    whole, part = (TinyRun(data, iterations=8, save_every=0, val_loss_every=4) for _ in range(2))
    expected = [[r.loss, r.val_loss, r.val_bpb] for r in whole.records(tmp_path / "whole")]
    with pytest.raises(KeyboardInterrupt):
        for record in part.records(tmp_path / "2" / "plain"):
            if record.step == 3:
                signal.raise_signal(signal.SIGINT)
    ends = [json.loads(out)["plain"] for out in run_ranks(RANKS, HERE, data, tmp_path / "2", 0, world_size=2)]
    assert ends[0][1:] == ends[1][1:]  # only the first replays what was before
    assert len(list((tmp_path / "2" / "plain").glob("optim_000008_rank*.pt"))) == 2
    for row, want in zip(ends[0][0], expected, strict=True):
        assert row == [None if value is None else pytest.approx(value, rel=2e-5) for value in want]


def test_slow_process_stops_all_at_one_step(ranks):
    """Each by its own clock: the fast one takes a sixth step and waits in it forever."""
    fast, slow = (rank["slow"] for rank in ranks[2])
    assert fast == slow
    records, steps, _ = fast
    assert [step for step, *_ in records] == list(range(6)) and steps == 1 + 5
    assert [ms for _, ms, _ in records] == pytest.approx([1300.0 * step for step in range(6)])


def test_all_processes_hear_of_a_loss_that_is_no_number(ranks):
    """One process leaves and the others wait for its gradients."""
    assert all(rank["nan"].startswith("the loss became nan. Lower MATRIX_LR") for rank in ranks[2])


FAILING_RANK = """
import os, sys
from pathlib import Path
sys.path.append(sys.argv[1])
from tiny_golf_run import TinyRun
from nanochat.runtime import compute_cleanup, compute_init
rank = compute_init("cpu")[1]
for record in TinyRun(Path(sys.argv[2])).records(sys.argv[3]):
    if os.environ["RANK"] == "1" and len(list(Path(sys.argv[3]).glob("meta_*"))):
        raise RuntimeError("planted on rank 1")
compute_cleanup()
"""


GOES_ON = """
import json, sys
from pathlib import Path
sys.path.append(sys.argv[1])
from tiny_golf_run import TinyRun, checksum
from nanochat.runtime import compute_cleanup, compute_init
rank = compute_init("cpu")[1]
run = TinyRun(Path(sys.argv[2]))
replayed = [record.replayed for record in run.records(sys.argv[3])].count(True)
print(json.dumps([replayed if rank == 0 else None, checksum(run.model.state_dict()), checksum(run.ema.shadow)]))
compute_cleanup()
"""


def test_a_failing_process_ends_the_run_and_both_go_on(data, tmp_path):
    """Seven GPUs that wait for the eighth until somebody looks, or go on with the momenta of the first."""
    program = tmp_path / "program.py"
    program.write_text(FAILING_RANK)
    launch = [PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", program]
    done = subprocess.run(
        [*launch, HERE, data, tmp_path / "run"], env=python_environment(OMP_NUM_THREADS=1), text=True, timeout=110,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode != 0 and "planted on rank 1" in done.stdout
    assert "rank      : 1" in done.stdout
    broken, whole = (
        [json.loads(out.splitlines()[-1]) for out in run_ranks(GOES_ON, HERE, data, tmp_path / name, world_size=2)]
        for name in ("run", "whole")
    )
    assert broken[0][0] > 0 == whole[0][0]
    assert [rank[1:] for rank in broken] == 2 * [whole[0][1:]]


def test_a_slice_in_parts_trains_the_same(data, tmp_path):
    """A gradient that is weighted wrongly where a GPU is too small for a whole slice."""
    run = TinyRun(data, device_batch_tokens=40, iterations=6)  # one row of 32 tokens at a time, of two
    seen = []
    run.call = lambda inputs, targets, **how: (seen.append(tuple(inputs.shape)), run.model(inputs, targets, **how))[1]
    records = list(run.records(tmp_path / "checkpoints"))
    wholes = TinyRun(data, iterations=6)
    expected = list(wholes.records(tmp_path / "wholes"))
    assert (1, 32) in seen and (2, 32) not in seen
    assert [r.loss for r in records[1:]] == pytest.approx([r.loss for r in expected[1:]], rel=1e-5)
    assert records[-1].val_loss == pytest.approx(expected[-1].val_loss, rel=1e-5)


def test_parts_divide_a_slice():
    """A part with fewer rows than the others, for which a compiled model would be compiled again."""
    for rows, tokens, expected in ((12, 0, 12), (12, 5 * 32, 4), (12, 1, 1), (7, 6 * 32, 1), (8, 8 * 32, 8)):
        assert replace(TRAINING, device_batch_tokens=tokens).rows_at_once(rows) == expected
