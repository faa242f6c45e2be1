"""Fine-tuning weighs every learned token alike, ends where it should, and can be killed at any moment."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from helpers import EAGER, python_environment, run_ranks, small_corpus, small_plan, small_tokenizer
from nanochat import base_train, chat_sft
from nanochat.base_train import pretrain
from nanochat.chat_sft import SFTSettings, fine_tune, plan_fine_tuning, sft_lr_multiplier, sft_progress
from nanochat.checkpoint_files import find_last_step, load_checkpoint, read_meta
from nanochat.checkpoint_manager import checkpoint_folder, load_model
from nanochat.optim import MuonAdamW
from nanochat.runtime import UserError
from nanochat.sft_dataloader import sft_data_generator_bos_bestfit

CPU, FP32 = torch.device("cpu"), torch.float32


def say(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def tools(number):
    parts = [
        {"type": "python", "text": f"{number}+1"},
        {"type": "python_output", "text": f"{number + 1}"},
        {"type": "text", "text": f"It is {number + 1}."},
    ]
    return {"messages": [{"role": "user", "content": f"Add 1 to {number}"}, {"role": "assistant", "content": parts}]}


# Long, short, with tools, empty, without an answer within the row.
CONVERSATIONS = [say("word " * (i % 7), "yes " * (1 + i * i % 9)) for i in range(40)] + [tools(i) for i in range(20)]
CONVERSATIONS += [{"messages": []}, say("word " * 300, "never seen"), say("Why?", "because " * 300)]
VALIDATION = [say(f"Is {i} a number?", "yes " * 3) for i in range(9)]


def sft_settings(**changes):
    values = dict(
        model_tag="d2", num_iterations=7, max_seq_len=-1, device_batch_size=2, total_batch_size=256, embedding_lr=-1.0,
        unembedding_lr=-1.0, matrix_lr=-1.0, scalar_lr=-1.0, init_lr_frac=0.5, warmup_ratio=0.0, warmdown_ratio=0.2,
        final_lr_frac=0.0, eval_every=3, eval_tokens=100_000, save_every=3, load_optimizer=True,
    ) | changes  # fmt: skip
    return SFTSettings(**values)


def plan_of(tokenizer, train=CONVERSATIONS, val=VALIDATION, data=None, **changes):
    return plan_fine_tuning(sft_settings(**changes), train, val, tokenizer, data or {"train": "test"})


def records_of(tokenizer, train=CONVERSATIONS, val=VALIDATION, data=None, **changes):
    plan = plan_of(tokenizer, train, val, data, **changes)
    return list(fine_tune(plan, train, val, tokenizer, CPU, FP32, EAGER))


@pytest.fixture(scope="module")
def world(tmp_path_factory, one_thread):
    """A base directory with a base model of three steps, to be copied; and its tokenizer."""
    base, tokenizer = tmp_path_factory.mktemp("world"), small_tokenizer()
    tokenizer.save(base / "tokenizer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        patch.setattr(base_train, "sample_text", lambda *args: ())
        plan = small_plan(num_iterations=3, eval_every=-1)
        list(pretrain(plan, small_corpus(base / "data"), tokenizer, CPU, FP32, EAGER))
    return base, tokenizer


@pytest.fixture
def base_dir(world, tmp_path, monkeypatch, one_thread):
    for name in ("base_checkpoints", "tokenizer"):
        shutil.copytree(world[0] / name, tmp_path / name)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    return tmp_path


@pytest.fixture
def tokenizer(world):
    return world[1]


def sft_weights(base_dir):
    folder = base_dir / "chatsft_checkpoints" / "d2"
    return load_checkpoint(folder, find_last_step(folder), "cpu")[0]


def test_lr_schedule_by_hand():
    """Prevents a schedule that starts or ends elsewhere than HEAD's, or than the original's with its values."""
    settings = sft_settings(warmup_ratio=0.1, warmdown_ratio=0.5, final_lr_frac=0.2)
    expected = {0.0: 1e-7, 0.05: 0.5, 0.1: 1.0, 0.5: 1.0, 0.75: 0.6, 1.0: 0.2}
    for progress, value in expected.items():
        assert sft_lr_multiplier(settings, progress) == pytest.approx(value, rel=1e-5)
    original = sft_settings()  # 0, 0.2, 0
    for progress in (0.0, 0.3, 0.8, 0.81, 0.9, 0.999, 1.0):
        by_the_original = 1.0 if progress < 0.8 else 1 - (progress - 0.8) / 0.2
        assert sft_lr_multiplier(original, progress) == pytest.approx(by_the_original, abs=1e-12)
    assert sft_lr_multiplier(sft_settings(warmdown_ratio=0.0), 1.0) == 1.0


def test_the_plan(base_dir, tokenizer):
    """Prevents learning rates of another batch or another model than was meant, and a lost inheritance."""
    plan = plan_of(tokenizer, embedding_lr=0.7)
    pretrained = small_plan().settings
    assert plan.settings.matrix_lr == pretrained.matrix_lr and plan.settings.embedding_lr == 0.7
    assert plan.settings.max_seq_len == 64 and plan.gradient_accumulation == 2
    assert plan.lr_scale == pytest.approx((256 / 2**19) ** 0.5)
    assert plan.checkpoint_dir == str(checkpoint_folder("sft", "d2"))
    assert plan_of(tokenizer, model_tag="").checkpoint_dir == plan.checkpoint_dir


@pytest.mark.parametrize("processes, total_batch_size, expected", [(1, 512, 4), (1, 128, 2), (1, 384, 3), (4, 512, 2)])
def test_an_inherited_device_batch_fits_the_step(
    processes, total_batch_size, expected, base_dir, tokenizer, monkeypatch
):
    """A refusal, after hours of pretraining, of a number that nobody has chosen."""
    monkeypatch.setattr(chat_sft, "get_dist_info", lambda: (processes > 1, 0, 0, processes))
    plan = plan_of(tokenizer, device_batch_size=-1, total_batch_size=total_batch_size)
    assert plan.settings.device_batch_size == expected
    assert plan.gradient_accumulation * expected * 64 * processes == total_batch_size


def test_every_learned_token_weighs_the_same(base_dir, tokenizer, monkeypatch):
    """Prevents a mean of micro-batch means, in which a short answer counts more when its neighbours are short."""
    seen = []

    def spy(optimizer, multiplier, momentum, weight_decay):
        assert (multiplier, momentum, weight_decay) == (1.0, 0.85, 0.0)

    def instead_of_an_update(optimizer):
        seen.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])

    monkeypatch.setattr(chat_sft, "set_schedules", spy)
    monkeypatch.setattr(MuonAdamW, "step", instead_of_an_update)
    options = dict(num_iterations=1, device_batch_size=1, total_batch_size=512, init_lr_frac=1.0)
    (record, _) = records_of(tokenizer, **options)
    model, _, _ = load_model("base", CPU, "train", "d2")
    order = [p for group in model.setup_optimizer().param_groups for p in group["params"]]
    inputs, targets, state = next(sft_data_generator_bos_bestfit(tokenizer, CONVERSATIONS, 8, 64, "cpu"))
    counts = (targets >= 0).sum(1)
    assert counts.max() > 2 * counts.min()
    loss = F.cross_entropy(model(inputs).double().flatten(0, 1), targets.flatten(), ignore_index=-1)
    loss.backward()
    assert record.loss == pytest.approx(loss.item(), rel=1e-5)
    for mine, reference in zip(seen[0], order, strict=True):
        assert torch.allclose(mine, reference.grad, rtol=1e-3, atol=1e-6)
    assert any(grad.abs().max() > 1e-3 for grad in seen[0])


def test_num_iterations_counts_optimizer_steps(base_dir, tokenizer):
    """Prevents a run that counts micro-batches, or that stops one step early because it fetches ahead."""
    updates = []
    for accumulated in (1, 4):
        records = records_of(
            tokenizer, num_iterations=5, device_batch_size=4 // accumulated, eval_every=-1, data={"n": accumulated}
        )
        assert [record.step for record in records] == list(range(6))
        assert [record.lr_multiplier for record in records[:-1]] == pytest.approx([1, 1, 1, 1, 1])
        assert [record.progress for record in records] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
        updates.append([record.loss for record in records[:-1]])
        _, optimizer_state, meta = load_checkpoint(checkpoint_folder("sft", "d2"), 5, "cpu", load_optimizer=True)
        assert meta["finished"] and {
            state["step"] for state in optimizer_state["state"].values() if "step" in state
        } == {8}
    assert updates[0] == pytest.approx(updates[1], rel=1e-4)


def test_one_pass(base_dir, tokenizer):
    """Prevents progress that goes backwards, stalls, or ends before all conversations were used."""
    plan = plan_of(tokenizer, num_iterations=-1)
    records = list(fine_tune(plan, CONVERSATIONS, VALIDATION, tokenizer, CPU, FP32, EAGER))
    progress = [record.progress for record in records]
    assert progress[0] == 0 and progress[-1] == 1 and progress == sorted(set(progress))
    state = read_meta(checkpoint_folder("sft", "d2"), records[-1].step)["dataloader_state_dict"]
    assert len(CONVERSATIONS) <= state["consumed"] < len(CONVERSATIONS) * 1.3
    assert sft_progress(plan, 0, state["consumed"]) == 1 and records[-1].epoch <= 2
    for record in records[:-1]:
        assert record.lr_multiplier == sft_lr_multiplier(plan.settings, record.progress)


@pytest.mark.parametrize("task", [CONVERSATIONS[:3], CONVERSATIONS[:1], [CONVERSATIONS[0], {"messages": []}]])
@pytest.mark.parametrize("device_batch_size", [1, 4])
def test_a_tiny_task_ends(task, device_batch_size, base_dir, tokenizer):
    """Prevents an endless loop, a step without targets (0 / 0), or no step at all when there is hardly any data."""
    options = dict(device_batch_size=device_batch_size, total_batch_size=64 * device_batch_size, eval_every=-1)
    records = records_of(tokenizer, task, VALIDATION[:1], num_iterations=-1, **options)
    assert 2 <= len(records) <= 5
    assert all(0 < record.loss < 10 for record in records[:-1]) and 0 < records[-1].val_bpb < 100
    more = records_of(tokenizer, task, VALIDATION[:1], num_iterations=6, **options)
    assert len(more) == 7 and all(0 < record.loss < 10 for record in more[:-1])


def test_it_learns_what_the_assistant_says(base_dir, tokenizer):
    """Prevents a fine-tuning that runs and teaches nothing, or whose validation does not measure it."""
    records = records_of(
        tokenizer,
        num_iterations=12,
        eval_every=4,
        embedding_lr=6.0,
        unembedding_lr=0.1,
        matrix_lr=0.4,
        init_lr_frac=1.0,
    )
    assert [record.step for record in records if record.val_bpb is not None] == [0, 4, 8, 12]
    assert records[-1].val_bpb < 0.5 * records[0].val_bpb
    assert records[11].loss < 0.7 * records[0].loss
    model, _, meta = load_model("sft", CPU, "eval", model_tag="d2")
    assert meta["val_bpb"] == records[-1].val_bpb and meta["step"] == 12
    assert meta["base"] == {"model_tag": "d2", "step": 3} and meta["user_config"]["total_batch_size"] == 256


def test_validation_is_one_pass_whatever_the_batch(base_dir, tokenizer):
    """Prevents a small validation set from being counted twice in part, or a bpb that depends on the batch size."""
    bpb = [records_of(tokenizer, num_iterations=1, device_batch_size=B, data={"B": B})[0].val_bpb for B in (1, 2, 4)]
    assert bpb[0] == pytest.approx(bpb[1], rel=1e-6) == pytest.approx(bpb[2], rel=1e-6)
    twice = records_of(tokenizer, val=VALIDATION * 2, num_iterations=1, data={"val": 2})[0].val_bpb
    assert twice == pytest.approx(bpb[0], rel=1e-2)


def test_momenta_come_from_the_base_model(base_dir, tokenizer, capsys):
    """Prevents a warm start that is silently cold, takes the old learning rates along, or cannot do without."""
    plan = plan_of(tokenizer)
    _, optimizer = chat_sft.load_for_fine_tuning(plan, 0, CPU, FP32)
    saved = load_checkpoint(plan.base_folder, 3, "cpu", load_optimizer=True)[1]
    restored = optimizer.state_dict()
    for number, state in saved["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(restored["state"][number][name]))
    assert saved["state"]
    matrix = restored["param_groups"][-1]
    assert matrix["lr"] == matrix["initial_lr"] == pytest.approx(plan.settings.matrix_lr * plan.lr_scale * 0.5)
    assert matrix["weight_decay"] == 0 and saved["param_groups"][-1]["weight_decay"] != 0
    capsys.readouterr()
    assert not chat_sft.load_for_fine_tuning(plan_of(tokenizer, load_optimizer=False), 0, CPU, FP32)[1].state
    assert "optimizer" not in capsys.readouterr().out
    (base_dir / "base_checkpoints" / "d2" / "optim_000003_rank0.pt").unlink()
    assert not chat_sft.load_for_fine_tuning(plan, 0, CPU, FP32)[1].state
    assert capsys.readouterr().out.count("base checkpoint d2/3 has no complete optimizer state;") == 1


# Fine-tunes and kills itself. argv: where.
PROGRAM = """
import os, signal, sys, torch
import nanochat.checkpoint_files as checkpoint_files
import test_chat_sft as here
from nanochat.chat_sft import fine_tune
from nanochat.tokenizer import get_tokenizer

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

point, number = sys.argv[1].split(":")
torch.set_num_threads(1)
tokenizer = get_tokenizer()
plan = here.plan_of(tokenizer)
for record in fine_tune(plan, here.CONVERSATIONS, here.VALIDATION, tokenizer, here.CPU, here.FP32, here.EAGER):
    print("loss", record.step, float(record.loss).hex(), flush=True)
    if point == "step" and record.step == int(number):
        die()
    if point == "meta" and record.step + 1 == int(number):
        checkpoint_files.write_checkpoint_meta = die
"""


def outcome(records):
    return [(record.step, record.loss, record.smooth_loss, record.lr_multiplier, record.val_bpb) for record in records]


def test_killed_fine_tuning_resumes_bitwise(base_dir, tokenizer, tmp_path_factory, monkeypatch):
    """Prevents a resumed run that repeats or skips conversations, or loses optimizer state or its schedule."""
    points = {"step:1": 0, "meta:6": 3, "meta:7": 6}  # where killed -> where it goes on
    folders = {point: tmp_path_factory.mktemp("killed") for point in points}
    whole = records_of(tokenizer)
    weights = sft_weights(base_dir)
    processes = []
    for point, folder in folders.items():
        for name in ("base_checkpoints", "tokenizer"):
            shutil.copytree(base_dir / name, folder / name)
        environment = python_environment(NANOCHAT_BASE_DIR=folder)
        environment["PYTHONPATH"] += os.pathsep + os.path.dirname(__file__)
        processes.append(subprocess.Popen([sys.executable, "-c", PROGRAM, point], env=environment))
    for process in processes:
        assert process.wait(timeout=120) == -signal.SIGKILL
    for point, first_step in points.items():
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folders[point]))
        records = records_of(tokenizer)
        assert [record.step for record in records if not record.replayed] == list(range(first_step, 8))
        assert outcome(records) == outcome(whole)
        resumed = sft_weights(folders[point])
        assert resumed.keys() == weights.keys()
        assert all(torch.equal(resumed[name], weights[name]) for name in weights)


def test_a_polite_stop_saves_first(base_dir, tokenizer, tmp_path_factory, monkeypatch):
    """Prevents a stop button that throws away work, in a run of one pass whose length nobody knows beforehand."""
    options = dict(num_iterations=-1, save_every=-1)
    whole = records_of(tokenizer, **options)
    other = tmp_path_factory.mktemp("stopped")
    for name in ("base_checkpoints", "tokenizer"):
        shutil.copytree(base_dir / name, other / name)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(other))
    with pytest.raises(KeyboardInterrupt, match="run again to go on"):
        for record in fine_tune(plan_of(tokenizer, **options), CONVERSATIONS, VALIDATION, tokenizer, CPU, FP32, EAGER):
            if record.step == 1:
                signal.raise_signal(signal.SIGINT)
    assert find_last_step(other / "chatsft_checkpoints" / "d2") == 3
    records = records_of(tokenizer, **options)
    assert [record.replayed for record in records] == [True] * 3 + [False] * (len(whole) - 3)
    assert outcome(records) == outcome(whole)


def test_a_finished_run_is_replayed_and_other_data_starts_anew(base_dir, tokenizer, capsys):
    """Prevents "Run all" from fine-tuning again what is done, and new data from going on with the old run."""
    first = records_of(tokenizer, num_iterations=3)
    capsys.readouterr()
    again = records_of(tokenizer, num_iterations=3, eval_every=1, save_every=1)
    assert "nothing to do" in capsys.readouterr().out
    assert all(record.replayed for record in again) and outcome(again) == outcome(first)
    changed = records_of(tokenizer, num_iterations=3, data={"train": "other"})
    assert not any(record.replayed for record in changed)
    assert "kept as d2-previous" in capsys.readouterr().out


RANK_PROGRAM = """
import os, signal, sys
sys.path.append(sys.argv[3])
import test_chat_sft as here
from nanochat.chat_sft import fine_tune
from nanochat.runtime import compute_cleanup, compute_init
from nanochat.tokenizer import get_tokenizer
rank, options = compute_init("cpu")[1], dict(num_iterations=-1, device_batch_size=1, save_every=2)
os.environ["NANOCHAT_BASE_DIR"] = sys.argv[1]
tokenizer = get_tokenizer()
records = here.records_of(tokenizer, **options)
print("OUT" + repr([(r.loss or 0, r.val_bpb or 0, r.progress) for r in records]) + "OUT")
os.environ["NANOCHAT_BASE_DIR"] = sys.argv[2]
plan = here.plan_of(tokenizer, **options)
try:
    for record in fine_tune(plan, here.CONVERSATIONS, here.VALIDATION, tokenizer, here.CPU, here.FP32, here.EAGER):
        if record.step == 2 and rank == 0:
            signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("stopped and saved")
compute_cleanup()
"""


def test_two_processes_fine_tune_as_one_does(base_dir, tokenizer, tmp_path_factory, monkeypatch):
    """Prevents other rows, other weights of the tokens, or another end with two GPUs than with one.

    Both begin with the momenta of a base model that one process trained, and one goes on where two have stopped.
    """
    other, moved = tmp_path_factory.mktemp("ranks"), tmp_path_factory.mktemp("moved")
    for folder in (other, moved):
        for name in ("base_checkpoints", "tokenizer"):
            shutil.copytree(base_dir / name, folder / name)
    printed = run_ranks(RANK_PROGRAM, other, moved, os.path.dirname(__file__))
    records = records_of(tokenizer, num_iterations=-1)
    one = [(r.loss or 0, r.val_bpb or 0, r.progress) for r in records]
    two = [eval(output.split("OUT")[1]) for output in printed]
    assert two[0] == two[1] and len(two[0]) == len(one) > 5
    for mine, theirs in zip(one, two[0], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    folder = other / "chatsft_checkpoints" / "d2"
    step = find_last_step(folder)
    assert (folder / f"optim_{step:06d}_rank1.pt").exists()
    mine = read_meta(checkpoint_folder("sft", "d2"), step)["dataloader_state_dict"]
    assert read_meta(folder, step)["dataloader_state_dict"] == mine

    assert all("stopped and saved" in output for output in printed)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(moved))
    rest = records_of(tokenizer, num_iterations=-1)
    assert [record.replayed for record in rest] == [True] * 4 + [False] * (len(records) - 4)
    for mine, theirs in zip(one, rest, strict=True):
        assert mine == pytest.approx((theirs.loss or 0, theirs.val_bpb or 0, theirs.progress), rel=1e-4)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(total_batch_size=300), "sft_total_batch_size 300 is not a multiple of 2 sequences × 64 .* 256, 384"),
        (dict(device_batch_size=-1, total_batch_size=32), "sft_total_batch_size 32 is not a multiple of 4 sequences"),
        (dict(max_seq_len=65), "max_seq_len of fine-tuning is 65, .* Choose 1 to 64"),
        (dict(train=[]), "no training conversation"),
        (dict(val=[]), "no validation conversation"),
        (dict(model_tag="d9"), "no complete checkpoint in .*d9.*model_tag"),
    ],
)
def test_bad_input_is_one_sentence(changes, message, base_dir, tokenizer):
    """Prevents an hour of waiting for a traceback."""
    with pytest.raises(UserError, match=message) as error:
        plan_of(tokenizer, **changes)
    assert "\n" not in str(error.value)


def test_other_bad_input(base_dir, tokenizer):
    """Prevents a model from being fine-tuned with foreign tokens, from unknown settings, or on nothing at all."""
    with pytest.raises(UserError, match="not the one that checkpoint d2/3 was trained with"):
        plan_of(small_tokenizer(520))
    nothing = [say("word " * 300, "never seen"), {"messages": []}] * 6
    with pytest.raises(UserError, match="none of the 12 conversations has an assistant's turn within 64 tokens"):
        records_of(tokenizer, nothing)
    path = base_dir / "base_checkpoints" / "d2" / "meta_000003.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | {"user_config": None}))
    with pytest.raises(UserError, match="base d2/3 does not tell its embedding_lr"):
        plan_of(tokenizer)
