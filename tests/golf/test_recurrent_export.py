"""From weights to the artifact: widths that fit, Hessians against XᵀX by hand, and what GPTQ may and may not change."""

import math
from dataclasses import asdict, replace

import pytest
import torch

from golf.artifact import ARTIFACT_RESERVE_BYTES, decode_artifact, predicted_size, read_artifact
from golf.golf_gpt import rms_normalise
from golf.golf_settings import RECURRENT_PRESETS, resolve_golf_parameters
from golf.looped_gpt import LoopedGPT
from golf.recurrent_export import (
    GOLF_ARTIFACT,
    NEAREST_ARTIFACT,
    SMALLEST_CLIP_SIGMAS,
    calibrate,
    export_golf,
    golf_config_of,
    golf_model_of,
    golf_storage_rules,
    plan_width,
    shapes_of,
)
from golf.recurrent_gpt import RecurrentGPT
from nanochat.runtime import UserError

pytestmark = pytest.mark.usefixtures("one_thread")

PARAMS, _ = resolve_golf_parameters({"preset": "cpu"}, RECURRENT_PRESETS)
SMALL = PARAMS | dict(vocab_size=97, model_dim=32, num_heads=2, num_kv_heads=1, mlp_mult=2, max_seq_len=16, rope_dims=8)


def realistic_model(architecture="recurrent", **changes):
    """A model whose rows differ in spread, as after training, and whose control tensors are not all ones."""
    torch.manual_seed(0)
    model = golf_model_of(architecture, golf_config_of(architecture, SMALL | changes))
    with torch.no_grad():
        for p in model.parameters():
            spread = 0.5 + torch.rand(len(p), 1) if p.ndim == 2 else 1.0
            p.copy_(torch.randn(p.shape) * 0.06 * spread if p.ndim == 2 and min(p.shape) > 8 else p + 0.05)
    return model


def batches(count=3, length=16):
    return [torch.randint(97, (4, length), generator=torch.Generator().manual_seed(i)) for i in range(count)]


# --- which model ------------------------------------------------------------------------------------------------------


def test_config_takes_what_it_knows():
    """A header's setting that is dropped, or a parameter cell's 1 that stays a number where a switch is meant."""
    config = golf_config_of("recurrent", PARAMS | {"model_dim": 64, "parallel_residuals": 0})
    assert (config.model_dim, config.vocab_size, config.num_recurrences) == (64, 1024, 3)
    assert config.parallel_residuals is False and config.iteration_embeddings is True
    looped = golf_config_of("looped", SMALL)
    for each, architecture, kind in ((config, "recurrent", RecurrentGPT), (looped, "looped", LoopedGPT)):
        assert golf_config_of(architecture, asdict(each)) == each
        assert isinstance(golf_model_of(architecture, each), kind)
    with pytest.raises(UserError, match="architecture is 'flat'; it can be recurrent or looped"):
        golf_config_of("flat", {})


def test_shapes_are_those_of_the_model():
    """A plan for tensors that the model does not have."""
    for architecture in ("recurrent", "looped"):
        config = golf_config_of(architecture, SMALL)
        built = {name: tuple(p.shape) for name, p in golf_model_of(architecture, config).named_parameters()}
        assert shapes_of(architecture, config) == built


@pytest.mark.parametrize("architecture", ["recurrent", "looped"])
def test_widest_that_fits_is_planned(architecture):
    """A model that leaves a third of the file empty, or one that is refused after ten minutes of training."""
    base = golf_config_of(architecture, SMALL)
    widths = [16, 18, 32, 48, 64, 80]  # 18: heads of nine channels, which cannot be rotated in pairs

    def rules_of(shapes):
        return golf_storage_rules(shapes, PARAMS, 6.0)

    needed = {}
    for width in (16, 32, 48, 64, 80):
        shapes = shapes_of(architecture, replace(base, model_dim=width))
        needed[width] = math.ceil(sum(predicted_size(shapes, rules_of(shapes)).values()))
    for width in (32, 64):
        limit = needed[width] + 1000 + ARTIFACT_RESERVE_BYTES
        config, rows = plan_width(architecture, base, rules_of, widths, 1000, limit)
        assert config == replace(base, model_dim=width)
        assert [row["label"] for row in rows] == [f"width {w}" for w in needed]
        assert [row["fits"] for row in rows] == [w <= width for w in needed]
    with pytest.raises(UserError, match="the smallest, width 16, .* 1 too many"):
        plan_width(architecture, base, rules_of, widths, 1000, needed[16] + 999 + ARTIFACT_RESERVE_BYTES)


def test_widths_that_the_architecture_cannot_have_are_passed_over():
    """A plan that ends at a width whose heads are too narrow for the positions, though a wider one fits."""
    base = golf_config_of("looped", SMALL | {"rope_dims": 16})
    config, rows = plan_width("looped", base, lambda s: golf_storage_rules(s, PARAMS, 6.0), [16, 32, 48, 64], 0, 10**7)
    assert config.model_dim == 64 and [row["label"] for row in rows] == ["width 32", "width 64"]
    with pytest.raises(UserError, match="rope_dims 16 must be even and divide the 8 channels"):
        plan_width("looped", base, lambda s: golf_storage_rules(s, PARAMS, 6.0), [16], 0, 10**7)


# --- what the layers read ---------------------------------------------------------------------------------------------


def inputs_by_hand(model, ids):
    """name of a matrix → its inputs (N, C) over all loops, from the formulas of the blocks."""
    found, taken = {}, {}
    for i, block in enumerate(model.blocks):
        layers = {"attn.c_q": block.attn.c_q, "attn.c_k": block.attn.c_k, "attn.c_v": block.attn.c_v,
                  "attn.proj": block.attn.proj, "mlp.fc": block.mlp.fc, "mlp.proj": block.mlp.proj}  # fmt: skip
        for name, layer in layers.items():
            key = f"blocks.{i}.{name}.weight"
            taken[key] = layer.register_forward_hook(
                lambda module, args, output, key=key: found.setdefault(key, []).append(args[0].flatten(0, -2))
            )
    with torch.no_grad():
        hidden = [model.trunk(each) for each in ids]
    for hook in taken.values():
        hook.remove()
    found["tok_emb.weight"] = [each.flatten(0, 1) for each in hidden]
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.mark.parametrize(
    "architecture, changes",
    [("recurrent", {}), ("recurrent", {"parallel_residuals": 0}), ("looped", {})],
    ids=["parallel", "sequential", "looped"],
)
def test_hessians_are_the_products_of_all_inputs(architecture, changes):
    """A layer calibrated on another's inputs, on its first loop alone, or on the stream before the norm."""
    model = realistic_model(architecture, **changes)
    sums = calibrate(model, batches())
    expected = inputs_by_hand(model, batches())
    matrices = {name for name, p in model.named_parameters() if p.ndim == 2 and name.endswith("weight")}
    assert expected.keys() == matrices
    for name, inputs in expected.items():
        product = inputs.double().T @ inputs.double()
        assert torch.allclose(sums[name].double(), product, rtol=1e-4, atol=1e-4 * product.abs().max()), name
    tokens = 3 * 4 * 16
    loops = {"recurrent": 3 * tokens, "looped": tokens * (1 + PARAMS["num_loops"])}[architecture]
    assert sums.tokens["blocks.1.attn.c_q.weight"] == loops and sums.tokens["tok_emb.weight"] == tokens
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_blocks_differ_in_what_their_mlp_reads():
    """The one Hessian used for both: in a sequential block the MLP reads what attention has added to."""
    for changes, same in (({}, True), ({"parallel_residuals": 0}, False)):
        sums = calibrate(realistic_model(**changes), batches(1))
        query, fc = sums["blocks.0.attn.c_q.weight"], sums["blocks.0.mlp.fc.weight"]
        assert torch.equal(query, fc) is same


def test_calibration_passes_its_options_on():
    """Calibrated at another depth than the one that is scored."""
    model = realistic_model("looped")
    tokens = calibrate(model, batches(1), looping=False).tokens
    assert tokens["blocks.1.attn.c_q.weight"] == 4 * 16
    assert torch.allclose(rms_normalise(model.trunk(batches(1)[0])), model.trunk(batches(1)[0]), atol=1e-5)


def test_an_interrupted_calibration_leaves_the_model_alone():
    """Hooks of a calibration that was stopped go on adding up products in every score from then on."""
    model = realistic_model()

    def stopped():
        yield batches(1)[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, stopped())
    assert not any(module._forward_pre_hooks for module in model.modules())


# --- the file ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(folder, model, hessians, report) of a model with half a million codes."""
    folder = tmp_path_factory.mktemp("export")
    model = realistic_model(vocab_size=1024, model_dim=160, mlp_mult=4)
    hessians = calibrate(model, [torch.randint(1024, (8, 16)) for _ in range(4)])
    header = {"architecture": "recurrent", "model": asdict(model.config), "scoring": {"length": 16, "stride": 4}}
    params = SMALL | dict(compressor="brotli", artifact_limit_bytes=480_000)
    report = export_golf(folder, model, hessians, params, header, code_bytes=20_000)
    return folder, model, params, report


def test_gptq_changes_codes_and_nothing_else(exported):
    """A comparison with plain rounding that also compares other levels, scales or controls."""
    folder, model, _, report = exported
    files = {name: decode_artifact((folder / name).read_bytes()) for name in (GOLF_ARTIFACT, NEAREST_ARTIFACT)}
    (ours, header), (nearest, other_header) = files.values()
    assert header == other_header and list(ours) == list(nearest) == list(model.state_dict())
    changed, codes = set(), 0
    for name, tensor in ours.items():
        other = nearest[name]
        assert (tensor.bits, tensor.dtype) == (other.bits, other.dtype)
        if tensor.scales is None:
            assert torch.equal(tensor.values, other.values)
        else:
            assert torch.equal(tensor.scales, other.scales)
            codes += tensor.values.numel()
            if not torch.equal(tensor.values, other.values):
                changed.add(name)
    assert codes >= 500_000
    assert {row["name"] for row in report["table"]} == {name for name in ours if ours[name].scales is not None}
    assert "blocks.0.mlp.proj.weight" in changed and "tok_emb.weight" in changed
    assert all(row["gptq"] <= row["nearest"] for row in report["table"])
    assert sum(row["gptq"] < 0.95 * row["nearest"] for row in report["table"]) > len(report["table"]) / 2


def test_file_is_read_back_into_the_same_kind_of_model(exported):
    """A header from which the model cannot be built."""
    folder, model, params, _ = exported
    weights, header = read_artifact(folder / GOLF_ARTIFACT)
    config = golf_config_of(header["architecture"], header["model"])
    assert config == model.config
    again = golf_model_of(header["architecture"], config)
    again.load_state_dict(weights, strict=True)
    for name, p in model.named_parameters():
        relative = (p - again.get_parameter(name)).norm() / p.norm()
        assert relative < 0.2, name
        if any(pattern in name for pattern in params["control_tensor_name_patterns"].split(",")):
            assert torch.equal(p, again.get_parameter(name))


def test_sizes_are_predicted_within_two_percent(exported):
    """A table that says the file will fit and a run that ends with a refusal."""
    folder, _, _, report = exported
    packed = (folder / GOLF_ARTIFACT).stat().st_size
    assert report["bytes"] == packed and report["codec"] == "brotli"
    assert report["bytes_from_counts"] == pytest.approx(packed, rel=0.02)
    assert report["bytes_from_shapes"] == pytest.approx(packed, rel=0.02)
    assert sum(row["bytes"] for row in report["size_rows"]) == pytest.approx(packed)


def test_clip_is_solved_for_the_room_that_is_left(exported):
    """A file that is half empty at a coarse clip, or a clip that forgets the script's bytes."""
    _, _, params, report = exported
    room = params["artifact_limit_bytes"] - 20_000 - ARTIFACT_RESERVE_BYTES
    assert report["sigmas"] > SMALLEST_CLIP_SIGMAS
    at_sigmas = [trial["bytes"] for trial in report["trials"] if trial["sigmas"] == report["sigmas"]]
    assert 0.999 * room <= at_sigmas[0] <= room
    assert report["bytes"] + 20_000 <= params["artifact_limit_bytes"]


def test_codes_of_gptq_that_need_more_room_get_a_larger_clip(tmp_path, monkeypatch):
    """A trained model that cannot be exported: GPTQ's codes took a few thousandths more than the solver had left."""
    monkeypatch.setattr("golf.recurrent_export.ARTIFACT_RESERVE_BYTES", 0)
    shape = dict(model_dim=128, num_heads=4, num_kv_heads=2, mlp_mult=4)
    model = realistic_model(**shape)
    hessians = calibrate(model, batches(20))
    params = SMALL | shape | dict(keep_float_numel=512, compressor="brotli", artifact_limit_bytes=110_000)
    report = export_golf(tmp_path, model, hessians, params, {}, 100)
    solved = max(trial["bytes"] for trial in report["trials"] if trial["bytes"] <= 109_900)
    clip = [trial["sigmas"] for trial in report["trials"] if trial["bytes"] == solved]
    assert report["sigmas"] > clip[0] and 0.98 * 110_000 < report["bytes"] + 100 <= 110_000
    assert {row["sigmas"] for row in report["table"] if "blocks" in row["name"]} == {report["sigmas"]}


def test_fixed_clip_is_kept_and_a_file_over_the_limit_refused(tmp_path):
    """A clip that was asked for and replaced, or a record that may not be handed in."""
    model = realistic_model()
    hessians = calibrate(model, batches(1))
    params = SMALL | dict(matrix_clip_sigmas=5.0, compressor="zlib", keep_float_numel=16)
    report = export_golf(tmp_path, model, hessians, params, {}, 100)
    assert (report["sigmas"], report["trials"], report["codec"]) == (5.0, [], "zlib")
    (tmp_path / GOLF_ARTIFACT).unlink()
    limit = report["bytes"] + 99
    with pytest.raises(UserError, match=r"are 1 bytes over the limit"):
        export_golf(tmp_path, model, hessians, params | {"artifact_limit_bytes": limit}, {}, 100)
    assert not (tmp_path / GOLF_ARTIFACT).exists()
    with pytest.raises(UserError, match="even with a clip of 64"):
        export_golf(tmp_path, model, hessians, params | {"matrix_clip_sigmas": 0.0, "artifact_limit_bytes": 31_000},
                    {}, 100)  # fmt: skip
    assert not (tmp_path / GOLF_ARTIFACT).exists()
