import io
import os
import zlib

import pytest
import torch

from golf.int8_export import (
    INT8_FORMAT,
    Int8Sizes,
    dequantize_state_dict_int8,
    export_int8,
    int8_codes,
    int8_damage,
    int8_file_bytes,
    int8_roundtrip_lines,
    int8_size_lines,
    quantize_state_dict_int8,
    read_int8_model,
)
from helpers import run_ranks
from nanochat.runtime import UserError

CONTROL = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weight")


def baseline_shapes() -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The tensors of the 9×512 baseline."""
    shapes = {"tok_emb.weight": ((1024, 512), torch.bfloat16), "skip_weights": ((4, 512), torch.float32)}
    for i in range(9):
        for name, shape in {
            "attn_scale": (512,), "mlp_scale": (512,), "resid_mix": (2, 512), "attn.q_gain": (8,),
            "attn.c_q.weight": (512, 512), "attn.c_k.weight": (256, 512), "attn.c_v.weight": (256, 512),
            "attn.proj.weight": (512, 512), "mlp.fc.weight": (1024, 512), "mlp.proj.weight": (512, 1024),
        }.items():  # fmt: skip
            shapes[f"blocks.{i}.{name}"] = (shape, torch.float32)
    return shapes


def mixed_state() -> dict[str, torch.Tensor]:
    """Every branch of the format once, and weights of several magnitudes."""
    generator = torch.Generator().manual_seed(1)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    state = {
        "tok_emb.weight": (normal(300, 256) * 0.1).bfloat16(),
        "blocks.0.attn.c_q.weight": normal(256, 300) * torch.logspace(-4, 1, 256)[:, None],
        "blocks.0.mlp.fc.weight": (normal(260, 256) * 3).half(),
        "blocks.0.attn.q_gain": normal(8),
        "blocks.0.resid_mix": normal(2, 64).bfloat16(),
        "blocks.0.small.weight": normal(16, 16),
        "blocks.0.small_bf16": normal(16).bfloat16(),
        "blocks.0.small_fp64": normal(5).double(),
        "blocks.0.steps": torch.arange(7),
        "blocks.0.cube": normal(41, 41, 41),
        "blocks.0.long": torch.zeros(70_000),
    }
    state["blocks.0.attn.c_q.weight"][5] = 0
    return state


# An independent reading of the published format, statement by statement.


def transcribed_quantizer(state: dict, floor: float) -> dict:
    quantized, scales, dtypes, kept, meta, before = {}, {}, {}, {}, {}, {}
    for name in state:
        t = state[name].detach().to("cpu").contiguous()
        if not t.is_floating_point():
            kept[name] = t
        elif t.numel() <= 65536:
            if any(word in name for word in CONTROL):
                kept[name] = t.to(torch.float32)
            elif t.dtype == torch.float32 or t.dtype == torch.bfloat16:
                before[name] = str(t.dtype)[len("torch.") :]
                kept[name] = t.to(torch.float16)
            else:
                kept[name] = t
        elif t.dim() == 2:
            w = t.to(torch.float32)
            limit = torch.quantile(w.abs(), 0.9999984, dim=1)
            step = torch.clamp(limit / 127.0, min=floor)
            w = torch.max(torch.min(w, limit.unsqueeze(1)), -limit.unsqueeze(1))
            quantized[name] = torch.round(w / step.unsqueeze(1)).clamp(-127, 127).to(torch.int8)
            scales[name] = step.to(torch.float16)
            meta[name] = {"scheme": "per_row", "axis": 0}
            dtypes[name] = str(t.dtype)[len("torch.") :]
        else:
            w = t.to(torch.float32)
            limit = torch.quantile(w.abs().reshape(-1), 0.9999984).item()
            step = torch.tensor(limit / 127.0 if limit > 0 else 1.0, dtype=torch.float32)
            quantized[name] = torch.round(w.clamp(-limit, limit) / step).clamp(-127, 127).to(torch.int8)
            scales[name] = step
            dtypes[name] = str(t.dtype)[len("torch.") :]
    saved = {
        "__quant_format__": "int8_clean_per_row_v1",
        "quantized": quantized,
        "scales": scales,
        "dtypes": dtypes,
        "passthrough": kept,
    }
    if meta:
        saved["qmeta"] = meta
    if before:
        saved["passthrough_orig_dtypes"] = before
    return saved


def transcribed_reader(data: bytes) -> dict:
    saved = torch.load(io.BytesIO(zlib.decompress(data)), weights_only=True)
    assert saved["__quant_format__"] == "int8_clean_per_row_v1"
    state = {}
    for name, q in saved["quantized"].items():
        s = saved["scales"][name]
        if saved.get("qmeta", {}).get(name, {}).get("scheme") == "per_row":
            w = q.float() * s.float().reshape([-1] + [1] * (q.dim() - 1))
        else:
            w = q.float() * s.item()
        state[name] = w.to(getattr(torch, saved["dtypes"][name]))
    for name, t in saved["passthrough"].items():
        dtype = saved.get("passthrough_orig_dtypes", {}).get(name)
        state[name] = t if dtype is None else t.to(getattr(torch, dtype))
    return state


def test_file_is_the_originals_to_the_byte():
    """A different key order or dtype in the dictionary, which other readers of the format would trip over."""
    state = mixed_state()
    buffer = io.BytesIO()
    torch.save(transcribed_quantizer(state, 1 / 127), buffer)
    saved, _ = quantize_state_dict_int8(state, CONTROL, original_floor=True)
    assert int8_file_bytes(saved) == (zlib.compress(buffer.getvalue(), 9), len(buffer.getvalue()))


def test_each_side_reads_the_other(tmp_path):
    """A file of the original that cannot be read here, or one of ours that its reader restores differently."""
    state = mixed_state()
    for original_floor in (True, False):
        ours, sizes = export_int8(tmp_path, state, CONTROL, (original_floor,))
        theirs = transcribed_reader((tmp_path / "final_model.int8.ptz").read_bytes())
        assert ours.keys() == theirs.keys() == state.keys()
        for name in state:
            assert ours[name].dtype == state[name].dtype or "resid_mix" in name  # control tensors stay fp32
            assert torch.equal(ours[name], theirs[name])
        assert sizes.original_floor is original_floor
        assert sizes.packed == os.path.getsize(tmp_path / "final_model.int8.ptz")
        assert sizes.raw_state == os.path.getsize(tmp_path / "final_model.pt")
    buffer = io.BytesIO()
    torch.save(transcribed_quantizer(state, 1 / 127), buffer)
    (tmp_path / "theirs.ptz").write_bytes(zlib.compress(buffer.getvalue(), 9))
    from_theirs = read_int8_model(tmp_path / "theirs.ptz")
    expected = transcribed_reader((tmp_path / "theirs.ptz").read_bytes())
    assert all(torch.equal(from_theirs[name], expected[name]) for name in state)
    raw = torch.load(tmp_path / "final_model.pt", weights_only=True)
    assert all(torch.equal(raw[name], state[name]) for name in state)


def test_published_size_identity():
    """A tensor stored in the wrong width: the payload of the 17,059,912-parameter baseline would move."""
    state = {name: torch.ones(shape, dtype=dtype) for name, (shape, dtype) in baseline_shapes().items()}
    saved, sizes = quantize_state_dict_int8(state, CONTROL)
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    raw_state = io.BytesIO()
    torch.save(state, raw_state)
    of = lambda part: sum(t.numel() * t.element_size() for t in saved[part].values())  # noqa: E731
    assert sizes["parameters"] == 17_059_912
    assert of("quantized") == 17_039_360
    assert of("scales") == 57_344
    assert saved["passthrough"]["skip_weights"].numel() * 4 == 8_192
    assert of("passthrough") == 74_016 + 8_192
    assert sizes["payload_bytes"] == 17_178_912
    assert round(sizes["float_bytes"] / sizes["payload_bytes"], 2) == 3.91
    # torch's own framing differs by a few KB between versions
    assert len(buffer.getvalue()) == pytest.approx(17_224_025, abs=8_000)
    assert len(raw_state.getvalue()) == pytest.approx(67_224_983, abs=8_000)


def test_floor_of_the_original_costs_fourteen_times_the_error():
    """The floor of 1/127 left on by default, or the switch without effect."""
    weight = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0)) * 0.02
    errors, levels = {}, {}
    for floor in (True, False):
        codes, scales = int8_codes(weight, original_floor=floor)
        errors[floor] = float((weight - codes.float() * scales.float()[:, None]).norm() / weight.norm())
        levels[floor] = len(codes.unique())
    assert errors[True] == pytest.approx(0.114, abs=0.002)
    assert errors[False] == pytest.approx(0.008, abs=0.001)
    assert levels[True] <= 25 and levels[False] > 200


def test_rows_of_zeros_and_of_tiny_weights_survive():
    """A scale that rounds to zero in fp16, and a row that comes back as nan or as zeros."""
    weight = torch.randn(3, 50_000, generator=torch.Generator().manual_seed(0))
    weight[0] = 0
    weight[1] *= 1e-3
    codes, scales = int8_codes(weight)
    restored = codes.float() * scales.float()[:, None]
    assert (scales > 0).all() and not restored[0].any()
    assert (restored[1] - weight[1]).norm() < 0.1 * weight[1].norm()
    state = {"huge": weight, "empty": torch.zeros(70_000)}
    restored = dequantize_state_dict_int8(quantize_state_dict_int8(state, CONTROL)[0])
    assert int8_damage(state, restored).keys() == {"huge"} and torch.equal(restored["empty"], state["empty"])


class ElsewhereTensor(torch.Tensor):
    """Stands for a tensor on a GPU: meets no other kind, and leaves with `cpu`."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.cpu:
            return args[0].as_subclass(torch.Tensor)
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        assert all(isinstance(tensor, cls) for tensor in tensors), "Expected all tensors to be on the same device"
        return super().__torch_function__(function, types, args, kwargs or {})


def test_damage_of_a_model_on_another_device():
    """Ten minutes of training on a GPU end in an error about devices, because the file is read to the CPU."""
    weight = torch.randn(300, 300)
    restored = dequantize_state_dict_int8(quantize_state_dict_int8({"matrix": weight}, CONTROL)[0])
    damage = int8_damage({"matrix": weight.as_subclass(ElsewhereTensor)}, restored)
    assert damage == int8_damage({"matrix": weight}, restored) and 0 < damage["matrix"] < 0.02


def test_log_lines_are_the_published_ones():
    """A log that the scripts which read published logs cannot read."""
    sizes = Int8Sizes(67_224_983, 15_820_684, 17_178_912, 17_224_025, 67_191_072 / 17_178_912, False)
    assert int8_size_lines(sizes, 47_642) == [
        "Serialized model: 67224983 bytes",
        "Code size: 47642 bytes",
        "Total submission size: 67272625 bytes",
        "Serialized model int8+zlib: 15820684 bytes (payload:17178912 raw_torch:17224025 payload_ratio:3.91x)",
        "Total submission size int8+zlib: 15868326 bytes",
    ]
    assert int8_roundtrip_lines(2.02857127, 1.20143417, 2.1004) == [
        "final_int8_zlib_roundtrip val_loss:2.0286 val_bpb:1.2014 eval_time:2100ms",
        "final_int8_zlib_roundtrip_exact val_loss:2.02857127 val_bpb:1.20143417",
    ]


def test_floor_is_taken_only_when_the_file_is_too_large_without_it(tmp_path):
    """A record refused at upload, or fourteen times the rounding error where there was room."""
    state = {"w": torch.randn(400, 400, generator=torch.Generator().manual_seed(0)) * 0.02}
    sizes = {}
    for floor in (False, True):
        _, sizes[floor] = export_int8(tmp_path / f"{floor}", state, (), (floor,))
    assert sizes[True].packed < sizes[False].packed
    for limit, floor in ((sizes[False].packed + 10, False), (sizes[False].packed + 9, True)):
        restored, taken = export_int8(tmp_path / "both", state, (), (False, True), code_bytes=10, limit_bytes=limit)
        assert taken.original_floor is floor and taken.packed == sizes[floor].packed
        assert torch.equal(restored["w"], read_int8_model(tmp_path / f"{floor}" / "final_model.int8.ptz")["w"])
    with pytest.raises(UserError) as refusal:
        export_int8(tmp_path / "neither", state, (), (False, True), 10, sizes[True].packed + 3)
    assert "7 bytes over the limit" in str(refusal.value) and "w (160,000 weights)" in str(refusal.value)
    assert not (tmp_path / "neither" / "final_model.int8.ptz").exists()


class RunsOnUnpickling:
    def __reduce__(self):
        return (os.mkdir, ("this-directory-must-not-appear",))


def test_file_with_code_is_not_run(tmp_path, monkeypatch):
    """A model file from a stranger that runs commands when it is loaded."""
    monkeypatch.chdir(tmp_path)
    buffer = io.BytesIO()
    torch.save({"__quant_format__": INT8_FORMAT, "quantized": RunsOnUnpickling()}, buffer)
    (tmp_path / "model.ptz").write_bytes(zlib.compress(buffer.getvalue()))
    with pytest.raises(UserError, match="no plain tensors"):
        read_int8_model(tmp_path / "model.ptz")
    assert not (tmp_path / "this-directory-must-not-appear").exists()


def test_damaged_files_are_refused_with_a_reason(tmp_path):
    """A traceback from deep inside torch where one sentence would say which file is broken."""
    path = tmp_path / "model.ptz"
    with pytest.raises(UserError, match="does not exist"):
        read_int8_model(path)
    saved, _ = quantize_state_dict_int8(mixed_state(), CONTROL)
    whole, _ = int8_file_bytes(saved)
    without_scale = {**saved, "scales": {}}
    short_scale = {**saved, "scales": {**saved["scales"], "tok_emb.weight": torch.ones(7)}}
    odd_dtype = {**saved, "dtypes": {**saved["dtypes"], "tok_emb.weight": "save"}}
    incomplete = {key: value for key, value in saved.items() if key != "passthrough"}
    for data, reason in (
        (whole[:-100], "damaged or no zlib"),
        (b"not zlib at all", "damaged or no zlib"),
        (zlib.compress(b"not torch"), "no plain tensors"),
        (int8_file_bytes({"__quant_format__": "int4_v9"})[0], "int4_v9"),
        (int8_file_bytes([1, 2])[0], "format 'list'"),
        (int8_file_bytes(without_scale)[0], "tok_emb.weight lacks"),
        (int8_file_bytes(short_scale)[0], "300 rows and scales"),
        (int8_file_bytes(odd_dtype)[0], "tok_emb.weight lacks"),
        (int8_file_bytes(incomplete)[0], "incomplete"),
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match=reason):
            read_int8_model(path)


def test_diverged_model_is_not_exported(tmp_path):
    """Nan weights that become code 0 without a word."""
    with pytest.raises(UserError, match="blocks.0.w .*not finite"):
        export_int8(tmp_path, {"blocks.0.w": torch.tensor([1.0, float("nan")])}, CONTROL)
    assert not (tmp_path / "final_model.int8.ptz").exists()


def test_every_rank_reads_what_rank_0_wrote(tmp_path):
    """Ranks that score their own weights, or read the file before it is there."""
    program = """
import sys, torch
from golf.int8_export import export_int8
from nanochat.runtime import compute_cleanup, compute_init, get_dist_info
import contextlib, io
with contextlib.redirect_stdout(io.StringIO()):
    compute_init("cpu")
rank = get_dist_info()[1]
state, sizes = export_int8(sys.argv[1], {"w": torch.full((300, 300), 1.0 + rank)}, ())
print(round(float(state["w"].mean()), 3), sizes is not None)
compute_cleanup()
"""
    assert run_ranks(program, tmp_path) == ["1.0 True", "1.0 False"]
