import functools
import re

import pytest
import torch

from helpers import run_ranks
from kernel_stand_ins import WRONG_KERNELS, WRONG_WITH_A_CACHE, with_training, write_kernel
from nanochat import attention_selection
from nanochat.attention import AttentionBackend, flash_attn, sdpa_attention, sdpa_with_kvcache
from nanochat.attention_selection import (
    ATTENTION_LOADERS,
    AttentionMachine,
    attention_order,
    prove_training,
    select_attention,
    this_machine,
)
from nanochat.runtime import UserError, choose_compute_dtype

pytestmark = pytest.mark.usefixtures("one_thread")
FA3, FA2 = "kernels-community/flash-attn3", "kernels-community/flash-attn2"


@pytest.fixture(autouse=True)
def what_was_used(monkeypatch, tmp_path):
    """Leave the kernel of the other tests in place, and never touch anybody's files."""
    monkeypatch.setattr(flash_attn, "selected", flash_attn.selected)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))


@pytest.fixture
def on(monkeypatch):
    """Pretend to be a machine."""

    def pretend(*machine, **kernels):
        monkeypatch.setattr(attention_selection, "this_machine", lambda device: AttentionMachine(*machine))
        local = ":".join(
            f"{repository}={kernels[name]}" for name, repository in (("fa3", FA3), ("fa2", FA2)) if name in kernels
        )
        monkeypatch.setenv("LOCAL_KERNELS", local)

    return pretend


def reasons(choice) -> dict:
    return dict(choice.passed_over)


AMPERE = ("fa3", "fa2", "varlen", "flex", "sdpa")
HOPPER = ("fa3", "fa4", "varlen", "cudnn", "flex", "sdpa")
BLACKWELL = ("fa4", "fa2", "varlen", "flex", "sdpa")


@pytest.mark.parametrize(
    "machine, order",
    [
        (("cuda", (8, 0)), AMPERE), (("cuda", (8, 6)), AMPERE), (("cuda", (8, 9)), AMPERE),
        (("cuda", (8, 7), "aarch64"), AMPERE[1:]),
        (("cuda", (9, 0)), HOPPER), (("cuda", (9, 0), "aarch64"), HOPPER[1:]),
        (("cuda", (10, 0)), BLACKWELL), (("cuda", (10, 3)), BLACKWELL), (("cuda", (10, 0), "aarch64"), BLACKWELL),
        (("cuda", (12, 0)), ("fa2", "varlen", "sdpa")), (("cuda", (12, 1), "aarch64"), ("fa2", "varlen", "sdpa")),
        (("cuda", (7, 5)), ("sdpa",)), (("cuda", (7, 0)), ("sdpa",)), (("cuda", (6, 1)), ("sdpa",)),
        (("cuda", (13, 0)), ("sdpa",)), (("rocm", (9, 0)), ("sdpa",)), (("mps",), ("sdpa",)), (("cpu",), ("sdpa",)),
    ],
)  # fmt: skip
def test_every_kind_of_device_has_its_order(machine, order):
    """A T4 or an AMD card that is sent to a kernel which cannot run there; a GH200 to one that has no build for Arm."""
    assert attention_order(AttentionMachine(*machine)) == order
    assert order[-1] == "sdpa" and set(order) <= set(ATTENTION_LOADERS)


def test_the_machine_is_described_by_its_capability(monkeypatch):
    """A ROCm device, whose capability (9, 0) is an MI200, taken for an H100."""
    assert this_machine(torch.device("cpu")) == AttentionMachine("cpu")
    assert this_machine(torch.device("mps")).device == "mps"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert this_machine(torch.device("cuda")) == AttentionMachine("cuda", (9, 0), "aarch64")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert this_machine(torch.device("cuda")).device == "rocm"


def test_a_kernel_that_computes_the_right_thing_is_used(on, tmp_path):
    """A fast kernel that is proven and then not called, or called in another way than it was proven."""
    on("cuda", (8, 0), fa3=write_kernel(tmp_path / "fa3"))
    choice = select_attention("cpu", torch.bfloat16)
    assert (choice.name, choice.cached_name, choice.passed_over, choice.remarks) == ("fa3", "fa3", (), ())
    assert choice.sentence == f"fa3, FlashAttention-3 from the local folder {tmp_path / 'fa3'} (proven on 12 cases)"
    assert flash_attn.selected is choice.backend
    calls = choice.backend.train.__closure__[-1].cell_contents.calls
    calls.clear()
    q, k, v = torch.randn(3, 1, 6, 2, 64).bfloat16()
    y = flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(2, 0))
    torch.testing.assert_close(y, sdpa_attention(q, k, v, (2, 0)), atol=2e-2, rtol=2e-2)
    cache, lengths = torch.zeros(2, 1, 8, 2, 64).bfloat16(), torch.zeros(1, dtype=torch.int32)
    again = flash_attn.flash_attn_with_kvcache(q, *cache, k, v, lengths, causal=True, window_size=(2, 0))
    assert torch.equal(again, y) and calls == ["train", "cached"]
    wide = torch.zeros(2, 1, 8, 2, 64)  # a cache in fp32 is not for this kernel
    wider = flash_attn.flash_attn_with_kvcache(q, *wide, k, v, lengths, causal=True, window_size=(2, 0))
    torch.testing.assert_close(wider, y, atol=2e-2, rtol=2e-2)
    assert calls == ["train", "cached"]


def test_a_build_that_returns_the_softmax_statistics_too_is_understood(on, tmp_path):
    """FlashAttention-3 builds that answer (output, log-sum-exp): right, and passed over."""
    pair = with_training("    return attend(q, k, v, window_size[0], 0), None\n")
    on("cuda", (9, 0), fa3=write_kernel(tmp_path / "fa3", pair))
    assert select_attention("cpu", torch.float16).name == "fa3"


@pytest.mark.parametrize("what", WRONG_KERNELS)
def test_a_kernel_that_is_wrong_is_passed_over_with_the_reason(on, tmp_path, what):
    """Days of training on a kernel that loads and is wrong."""
    source, reason = WRONG_KERNELS[what]
    on("cuda", (8, 9), fa3=write_kernel(tmp_path / "fa3", source), fa2=write_kernel(tmp_path / "fa2"))
    choice = select_attention("cpu", torch.bfloat16)
    assert choice.name == "fa2" and list(reasons(choice)) == ["fa3"]
    assert re.search(reason, reasons(choice)["fa3"]), reasons(choice)
    assert f"passed over: fa3 ({reasons(choice)['fa3']})" in choice.sentence


@pytest.mark.parametrize("what", WRONG_WITH_A_CACHE)
def test_a_kernel_that_is_wrong_with_a_cache_only_trains(on, tmp_path, what):
    """A model that trains well and talks nonsense; or a good training kernel thrown away for its other half."""
    source, reason = WRONG_WITH_A_CACHE[what]
    on("cuda", (8, 9), fa3=write_kernel(tmp_path / "fa3", source))
    choice = select_attention("cpu", torch.bfloat16)
    assert (choice.name, choice.cached_name) == ("fa3", "sdpa")
    assert choice.backend.cached is sdpa_with_kvcache and choice.backend.train is not sdpa_attention
    assert "; with a cache sdpa (proven" in choice.sentence and "not used with a cache (" in choice.sentence
    with pytest.raises(UserError, match=f"attention fa3 cannot be used here: .*{reason}"):
        select_attention("cpu", torch.bfloat16, "fa3")


def test_when_nothing_else_works_the_reasons_are_listed_and_pytorch_computes(on, tmp_path):
    """A silent end at the slowest kernel; or one reason five times in the line that explains it."""
    gone = tmp_path / "gone"
    on("cuda", (8, 0), fa3=gone, fa2=gone)
    choice = select_attention("cpu", torch.bfloat16)
    assert choice.name == choice.cached_name == "sdpa"
    assert list(reasons(choice)) == ["fa3", "fa2", "varlen", "flex"] and all(reasons(choice).values())
    assert choice.sentence.startswith("sdpa (proven on 12 cases); passed over: fa3, fa2 (FileNotFoundError: ")


def test_fp32_leaves_the_hub_alone(on, monkeypatch):
    """A download of gigabytes for a kernel that cannot compute in fp32."""
    monkeypatch.setattr("nanochat.hub_kernels.load_hub_kernel", lambda repository: pytest.fail("asked the hub"))
    on("cuda", (9, 0))
    choice = select_attention("cpu", torch.float32)
    assert choice.name == "sdpa"
    assert reasons(choice)["fa3"] == "it computes in bf16 and fp16, not in float32"


@pytest.mark.parametrize("machine", [("cpu",), ("mps",), ("cuda", (7, 5)), ("rocm", (9, 4))])
def test_where_no_hub_kernel_runs_the_hub_is_not_asked(on, monkeypatch, machine):
    """A run on a laptop that waits for a network it does not need."""
    asked = []
    monkeypatch.setattr("nanochat.hub_kernels.load_hub_kernel", asked.append)
    on(*machine)
    assert select_attention("cpu", torch.bfloat16).passed_over == () and not asked


def test_a_kernel_asked_for_by_name_is_used_or_an_error(on, tmp_path):
    """A comparison of kernels in which one of them was quietly another."""
    on("cpu", fa3=write_kernel(tmp_path / "fa3", WRONG_KERNELS["forward"][0]), fa2=write_kernel(tmp_path / "fa2"))
    assert select_attention("cpu", torch.bfloat16, "sdpa").name == "sdpa"
    choice = select_attention("cpu", torch.bfloat16, "fa2")
    assert choice.name == "fa2" and choice.sentence.startswith("fa2, FlashAttention-2 from the local folder ")
    with pytest.raises(
        UserError, match="attention fa3 cannot be used here: output .* is off by 20%.*Set attention to auto"
    ):
        select_attention("cpu", torch.bfloat16, "fa3")
    assert flash_attn.selected is choice.backend, "an error changes nothing"
    with pytest.raises(UserError, match="attention is 'fa5'; it can be auto, fa3, fa4, fa2, varlen, cudnn, flex, sdpa"):
        select_attention("cpu", torch.bfloat16, "fa5")


def test_a_missing_package_is_named(on, monkeypatch, tmp_path):
    """A reason that does not say what to install."""

    def load(device, dtype):
        raise ModuleNotFoundError("No module named 'kernels'", name="kernels")

    monkeypatch.setitem(ATTENTION_LOADERS, "fa3", load)
    on("cuda", (8, 0), fa2=write_kernel(tmp_path / "fa2"))
    assert reasons(select_attention("cpu", torch.bfloat16)) == {"fa3": "package kernels is not installed"}


def test_a_device_on_which_even_pytorch_is_wrong_is_an_error(on, monkeypatch):
    """A training that starts although nothing on this machine computes attention."""
    wrong = AttentionBackend("sdpa", lambda *inputs: 2 * sdpa_attention(*inputs), sdpa_with_kvcache)
    monkeypatch.setitem(ATTENTION_LOADERS, "sdpa", lambda device, dtype: wrong)
    on("cpu")
    with pytest.raises(UserError, match="no attention kernel is right on this device .sdpa: output .*another device"):
        select_attention("cpu", torch.float32)


@pytest.mark.parametrize("traced, outside", [("2", True), ("1", False)])
def test_a_kernel_that_the_compiler_gets_wrong_is_called_from_outside(on, monkeypatch, tmp_path, traced, outside):
    """A kernel that was proven alone and trains wrongly inside compiled blocks; or one kept out without need."""
    compile_quickly = functools.partial(torch.compile, backend="aot_eager")  # traces all, generates no code
    monkeypatch.setattr(torch, "compile", compile_quickly)
    source = with_training(
        f"    scale = {traced} if torch.compiler.is_compiling() else 1\n"
        "    return attend(q, k, v, window_size[0], 0) * scale\n"
    )
    on("cuda", (8, 0), fa3=write_kernel(tmp_path / "fa3", source))
    choice = select_attention("cpu", torch.bfloat16, compiled=True)
    assert choice.name == "fa3"
    remark = "called from outside the compiled blocks (output (4 heads of 128 over 2, window 50) is off by 100%)"
    assert choice.remarks == ((remark,) if outside else ()) and (remark in choice.sentence) == outside
    block = torch.compile(lambda q, k, v: choice.backend.train(q * 2, k, v, (50, 0)) + 1)
    q, k, v = torch.randn(3, 1, 60, 2, 64).bfloat16()
    torch.testing.assert_close(block(q, k, v), sdpa_attention(q * 2, k, v, (50, 0)) + 1, atol=2e-2, rtol=2e-2)


def test_proving_draws_nothing_from_the_generator_of_the_weights():
    """Initial weights that depend on which kernel was tried."""
    torch.manual_seed(42)
    expected = torch.rand(1)
    torch.manual_seed(42)
    select_attention("cpu", torch.float32)
    assert torch.equal(torch.rand(1), expected)


RANKS = """
import os, sys
import torch
from nanochat import attention_selection
from nanochat.attention_selection import AttentionMachine, select_attention
from nanochat.runtime import compute_cleanup, compute_init
_, rank, _, _, device = compute_init("cpu")
right, wrong, missing = sys.argv[1:]
fa3, fa2 = (right, wrong) if rank == 0 else (missing, right)
os.environ["LOCAL_KERNELS"] = f"kernels-community/flash-attn3={fa3}:kernels-community/flash-attn2={fa2}"
capability = (8, 0) if rank == 0 else (12, 0)  # whose own order would begin with fa2
attention_selection.this_machine = lambda device: AttentionMachine("cuda", capability)
choice = select_attention(device, torch.bfloat16)
print("chosen", choice.sentence)
compute_cleanup()
"""


def test_all_ranks_use_the_same_kernel(tmp_path):
    """Ranks that train on different kernels, or wait for each other for ever, because one of them could not use it."""
    right, wrong = write_kernel(tmp_path / "right"), write_kernel(tmp_path / "wrong", WRONG_KERNELS["backward of v"][0])
    first, second = (output.splitlines()[-1] for output in run_ranks(RANKS, right, wrong, tmp_path / "missing"))
    assert first == second and first.startswith("chosen sdpa (proven on 12 cases); passed over: fa3 (FileNotFound")
    assert "(on rank 1)), fa2 (dv " in first and "is off by 50% (on rank 0)), varlen (" in first


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in ATTENTION_LOADERS])
def test_on_a_gpu_every_kernel_is_right_or_says_why_not(name):
    """A kernel whose adapter is wrong on the real thing: visible here as the reason for which it is skipped."""
    dtype = choose_compute_dtype("cuda")[0]
    try:
        choice = select_attention("cuda", dtype, name, compiled=True)
    except UserError as error:
        assert name != "sdpa"
        pytest.skip(str(error))
    assert choice.name == name
    prove_training(torch.compile(choice.backend.train, dynamic=False), torch.device("cuda"), dtype)
