"""Ablation: the same seed gives the same row, an ingredient less another, and nothing runs twice."""

from dataclasses import replace

import pytest
import torch
from tiny_golf_run import LEARNING, TRAINING, TinyRun, byte_tables, write_tiny_shards

from golf.ablation import ablate
from golf.recurrent_gpt import RecurrentGPT

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    run = TinyRun(write_tiny_shards(tmp_path_factory.mktemp("data")))
    learning = LEARNING | {"compute_dtype": torch.float32}
    built = []

    def build(**changes):
        built.append(changes)
        return RecurrentGPT(replace(run.config, **changes))

    def table(runs, steps=6, training=TRAINING, **options):
        place = (0, 1, torch.device("cpu"))
        return ablate(runs, training, steps, run.stream, run.val_tokens, byte_tables(), place, **options)

    return build, learning, built, table


def test_rows_depend_on_seed_and_recipe_alone(parts, capsys):
    """Worth that is really the order of the rows: a generator that goes on from the run before."""
    build, learning, _, table = parts
    other = learning | {"matrix_lr": 0.001}
    runs = {
        "whole": (3, build, learning, {}),
        "seed": (4, build, learning, {}),
        "slow": (3, build, other, {}),
        "steady": (3, build, learning, {"muon_momentum_warmup_steps": 0}),
        "again": (3, build, learning, {}),
    }
    rows = table(runs)
    assert list(rows) == list(runs)
    scores = {label: row[:2] for label, row in rows.items()}
    assert scores["whole"] == scores["again"]
    assert len(set(scores.values())) == 4
    assert table({"alone": runs["slow"]})["alone"][:2] == scores["slow"]
    assert "whole: " in capsys.readouterr().out and rows["whole"][2] > 0


def test_runs_are_of_the_wanted_length_and_learn(parts):
    """A table of models that were never trained, or trained with the cap and the warmdown of the long run."""
    build, learning, _, table = parts
    training = replace(TRAINING, warmdown_fraction=0.5, max_wallclock_seconds=1e-9)
    run = {"whole": (3, build, learning, {})}
    none, few, more = (table(run, steps, training)["whole"][0] for steps in (0, 4, 12))
    assert none > few > more


def test_finished_rows_are_kept_and_not_run_again(parts):
    """A stop during the last of ten runs that costs all ten."""
    build, learning, built, table = parts
    runs = {label: (3, build, learning, {}) for label in ("first", "second", "third")}
    kept = []
    built.clear()
    rows = table(runs, 1, done={"first": (1.0, 2.0, 3.0)}, keep=lambda rows: kept.append(dict(rows)))
    assert rows["first"] == (1.0, 2.0, 3.0) and len(built) == 2
    assert [list(each) for each in kept] == [["first", "second"], ["first", "second", "third"]]
    assert table(runs, 1, done=rows) == rows and len(built) == 2


def test_a_gpu_gets_a_slice_in_parts(parts, monkeypatch):
    """A training that fits because it is compiled, and after it an ablation that does not fit, because it is not."""
    build, learning, _, table = parts
    asked = []
    monkeypatch.setattr("golf.ablation.device_batch_for", lambda device, whole_slice_bytes: asked.append(device) or 32)
    shapes, forward = set(), RecurrentGPT.forward
    monkeypatch.setattr(RecurrentGPT, "forward", lambda model, ids, *a, **how: (
        torch.is_grad_enabled() and shapes.add(tuple(ids.shape)), forward(model, ids, *a, **how))[1])  # fmt: skip
    table({"whole": (3, build, learning, {})}, 1)
    assert shapes == {(1, 32)} and asked == [torch.device("cpu")]
