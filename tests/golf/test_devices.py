"""Both systems from the first step to the score, on every device that is here: what runs on a CPU must run on a GPU."""

from functools import partial

import pytest
import torch
from tiny_golf_run import TRAINING, TinyRun, byte_tables, write_tiny_shards

from golf.artifact import read_artifact
from golf.golf_ladder import score_ladder
from golf.golf_scoring import score_stream
from golf.golf_settings import RECURRENT_PRESETS
from golf.golf_tokenizers import ByteTables
from golf.golf_train import compile_golf, golf_step
from golf.golf_ttt import TTTSettings
from golf.int8_export import export_int8, int8_damage
from golf.legality import prove_legality
from golf.recurrent_export import GOLF_ARTIFACT, calibrate, export_golf
from golf.shards import DistributedTokenLoader

pytestmark = pytest.mark.usefixtures("one_thread")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tiny_shards(tmp_path_factory.mktemp("data"))


def trained(data, kind, device, compiled=False):
    """(run, what calls its model) after three steps on a device."""
    run = TinyRun(data, kind)
    run.model.to(device)
    call = compile_golf(run.model, run.optimizer, compiled)
    loader = DistributedTokenLoader(run.stream, device=device)
    for _ in range(3):
        loss = golf_step(call, run.optimizer, loader, TRAINING, 1.0, 0.9, {})
    assert loss.device.type == device and torch.isfinite(loss)
    return run, call, loader


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["baseline", "recurrent", "looped"])
def test_a_step_and_a_score_on_the_device(data, kind, device):
    """Tables, masks or schedules that stay on the CPU while the model moves."""
    run, call, _ = trained(data, kind, device)
    tables = ByteTables(*(table.to(device) for table in byte_tables()))
    ttt = TTTSettings(ttt_chunk_tokens=64, ttt_batch_seqs=2, ttt_chunk_size=16, ttt_eval_seq_len=32, ttt_epochs=1)
    scoring = {"length": 32, "stride": 8, "ttt": vars(ttt)}
    ways = ("blocks", "banded", "sliding", "sgd", "lora")
    rows = dict(score_ladder(run.model, call, scoring, run.val_tokens, tables, 4, device, ways))
    assert all(0 < row["val_bpb"] < 10 for row in rows.values()) and list(rows) == list(ways)


@pytest.mark.parametrize("device", DEVICES)
def test_both_exports_from_the_device(data, tmp_path, device):
    """Weights on a GPU that an exporter hands to numpy, or compares with a file on the CPU."""
    run, _, _ = trained(data, "baseline", device)
    restored, _ = export_int8(tmp_path, run.model.state_dict(), ("attn_scale",))
    assert max(int8_damage(run.model.state_dict(), restored).values()) < 0.02
    run, _, loader = trained(data, "recurrent", device)
    hessians = calibrate(run.model, (loader.next_batch(512, 32, 8)[0] for _ in range(2)))
    params = RECURRENT_PRESETS["cpu"] | {"keep_float_numel": 100, "artifact_limit_bytes": 200_000}
    told = export_golf(tmp_path, run.model, hessians, params, {"architecture": "recurrent"}, 10_000)
    assert all(row["gptq"] <= row["nearest"] for row in told["table"])
    run.model.load_state_dict(read_artifact(tmp_path / GOLF_ARTIFACT)[0])


@pytest.mark.parametrize("device", DEVICES)
def test_the_proof_on_the_device(data, device):
    """A tolerance that only holds for a CPU."""
    run, _, _ = trained(data, "recurrent", device)
    tables = ByteTables(*(table.to(device) for table in byte_tables()))

    def scorer(stream, watch):
        return score_stream(partial(run.model, reduction="none"), stream, tables, 32, 8, 4, device, watch)

    findings, _ = prove_legality(scorer, run.val_tokens[:150], tables, number=3)
    assert [finding.verdict for finding in findings] == ["ok"] * len(findings)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["baseline", "recurrent", "looped"])
def test_compiled_is_eager(data, kind):
    """A compiled graph that computes something else than the model."""
    eager, _, _ = trained(data, kind, "cuda")
    _, call, _ = trained(data, kind, "cuda", compiled=True)
    ids = eager.val_tokens[None, :33].cuda()
    for options in ({}, {"last": 8, "reduction": "none"}):
        expected = eager.model(ids[:, :-1], ids[:, 1:], **options)
        assert torch.allclose(call(ids[:, :-1], ids[:, 1:], **options), expected, rtol=2e-2, atol=2e-2)
