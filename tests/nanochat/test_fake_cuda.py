import random
import shutil
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._subclasses.fake_tensor import FakeTensorMode

from golf.golf_train import compile_golf
from golf.recurrent_gpt import RecurrentConfig, RecurrentGPT
from nanochat.attention import flash_attn, sdpa_attention
from nanochat.attention_kernels import load_cudnn_sdpa, load_sdpa, load_varlen
from nanochat.attention_selection import prove_cached, prove_training
from nanochat.base_train import training_step
from nanochat.core_eval import ScoredSequence, score_questions
from nanochat.device_batch import fitting_device_batch
from nanochat.engine import Engine
from nanochat.fp8 import convert_to_fp8
from nanochat.gpt import GPT, Block, GPTConfig, chunk_losses, chunk_losses_and_gradient
from nanochat.loss_eval import evaluate_bpb
from nanochat.optim import adamw_step_fused, muon_step_fused
from nanochat.precision import LossScaler
from pretended_cuda import build, run_pretending

pytestmark = pytest.mark.skipif(
    torch.version.cuda is not None or torch.version.hip is not None or shutil.which("g++") is None,
    reason="pretends CUDA to a PyTorch that has none, with a few lines of C++",
)
SMALL = GPTConfig(sequence_len=64, vocab_size=512, n_layer=4, n_head=2, n_kv_head=1, n_embd=128, window_pattern="SSSL")
CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build(tmp_path_factory.mktemp("guard"))


def test_training_scoring_and_generation_on_the_gpu_do_what_they_do_on_the_cpu(library):
    """A CPU tensor among CUDA tensors, a branch for GPUs with other numbers, a wait for the device in every layer."""
    run_pretending(library, "test_fake_cuda", "check_values")


def test_texts_that_grow_are_read_without_plans(library):
    """cuDNN, which an H100 prefers and which spends 30 ms on each length that it has not seen: on every new token."""
    run_pretending(library, "test_fake_cuda", "check_kernels_of_growing_texts")


def test_what_is_compiled_on_a_gpu_stays_below_the_limit_of_forms(library):
    """A layer that silently runs uncompiled, or a golf run that ends, because torch keeps only so many forms."""
    run_pretending(library, "test_fake_cuda", "check_compiled_forms")


class AnyTokenizer:
    def get_bos_token_id(self):
        return 503

    def encode_special(self, name):
        return 511 - len(name) % 8


def model_on(device, config, dtype) -> GPT:
    with torch.device("meta"):
        model = GPT(config, dtype)
    model.to_empty(device=device)
    torch.manual_seed(42)
    model.init_weights()
    return model


def numbers_of(device, dtype) -> dict:
    """Everything a run computes, in small."""
    from pretended_cuda import waits

    draw, generator = random.Random(0), torch.Generator().manual_seed(0)
    model, scaler = model_on(device, SMALL, dtype), LossScaler(dtype)
    optimizer = model.setup_optimizer()
    tokens = torch.randint(0, 512, (4, 65), generator=generator).to(device)
    fitting_device_batch(model, optimizer, 4, 64, 4, lambda size: None, try_anywhere=True)
    result = {"losses": []}
    for model.recompute in (False, True, False):
        passes = [(tokens[i : i + 2, :-1], tokens[i : i + 2, 1:], 0.5) for i in (0, 2)]
        result["losses"].append(training_step(model, optimizer, scaler, passes).item())
    token_bytes = torch.ones(512, dtype=torch.int32).to(device)
    result["bpb"] = evaluate_bpb(model, [(tokens[:, :-1], tokens[:, 1:])], 1, token_bytes)
    model = model.to(dtype).eval()
    engine = Engine(model, AnyTokenizer())
    waits.clear()
    prompts = [[1, 2, 3], [4, 5], [7] * 50, [9]]
    result["texts"] = sorted(engine.generate_many(prompts, 8, batch_size=2))
    result["drawn"] = [column for column, _ in engine.generate([1, 2, 3], 2, 8, temperature=1.0, top_k=5)]
    result["waits"] = len(waits)
    questions = []
    for length in range(20, 24):
        prompt, endings = draw.choices(range(500), k=length), [draw.choices(range(500), k=3) for _ in range(2)]
        questions.append([ScoredSequence(prompt + ending, length, length + 3) for ending in endings])
    scores = dict(score_questions(model, questions, True, torch.device(device)))
    result["scores"] = [loss for number in sorted(scores) for loss in scores[number]]
    return result


def check_values():
    from pretended_cuda import PretendedCuda

    expected = numbers_of("cpu", torch.float32)
    with PretendedCuda():
        actual = numbers_of("cuda", torch.float32)
        for name in ("losses", "bpb", "scores"):
            assert actual[name] == pytest.approx(expected[name], rel=1e-3), name
        assert actual["texts"] == expected["texts"] and actual["drawn"] == expected["drawn"]
        tokens = sum(len(text) for _, text in actual["texts"]) + len(actual["drawn"])
        assert 0 < actual["waits"] <= tokens  # one for each step, however many layers there are
        for dtype in (torch.bfloat16, torch.float16):
            losses = numbers_of("cuda", dtype)["losses"]
            assert losses[0] == pytest.approx(expected["losses"][0], rel=1e-3)
            assert losses[-1] < 2 * losses[0]  # and no NaN
            prove_training(sdpa_attention, CUDA, dtype)
            prove_cached(flash_attn.selected, CUDA, dtype)
        with pytest.raises(RuntimeError, match="on cuda and on cpu"):
            torch.ones(2, device="cuda") + torch.ones(2)


def check_kernels_of_growing_texts():
    from pretended_cuda import PretendedCuda

    attend, allowed = F.scaled_dot_product_attention, []

    def watched(*inputs, **options):
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attend(*inputs, **options)

    F.scaled_dot_product_attention = watched
    with PretendedCuda():
        model = model_on("cuda", SMALL, torch.bfloat16)
        tokens = torch.zeros(2, 64, dtype=torch.long, device="cuda")
        model(tokens, tokens).backward()
        assert allowed and all(allowed), "a training batch has one shape, and may be planned for"
        allowed.clear()
        list(Engine(model, AnyTokenizer()).generate_many([[1, 2, 3], [4] * 50], 8))
        with torch.no_grad():
            model(tokens[:, :20])
        assert len(allowed) > 8 * SMALL.n_layer and not any(allowed)


def forms(function) -> int:
    return len(_debug_get_cache_entry_list(function.__code__))


def check_compiled_forms():
    compile_with = torch.compile
    torch.compile = partial(compile_with, backend="aot_eager")  # everything but the making of kernels
    torch._dynamo.config.recompile_limit, torch._dynamo.config.fail_on_recompile_limit_hit = 8, True
    torch.backends.cudnn.is_available = lambda: True
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    with FakeTensorMode():
        sdpa = load_sdpa(CUDA, torch.bfloat16)
        check_forms_of_optimizer(check_forms_of_gpt(sdpa, torch.bfloat16, fp8=True, recompute=True))
        torch.compile = partial(compile_with, backend="eager")  # faster, with the same number of forms
        check_forms_of_gpt(load_cudnn_sdpa(CUDA, torch.float16), torch.float16)  # its windows are FlexAttention's
        try:
            varlen = load_varlen(CUDA, torch.bfloat16)
        except (ImportError, RuntimeError):
            pass  # this PyTorch has none
        else:
            check_forms_of_gpt(varlen, torch.bfloat16)
        check_forms_of_golf()


def check_forms_of_gpt(backend, dtype, fp8=False, recompute=False):
    flash_attn.use(backend)
    config = GPTConfig(
        sequence_len=128, vocab_size=512, n_layer=4, n_head=2, n_kv_head=2, n_embd=128, window_pattern="SSL"
    )  # every combination of window and value embedding
    model = model_on("cuda", config, dtype)
    if fp8:
        assert convert_to_fp8(model)[0]
    model.recompute, B = recompute, 17  # rows for one whole chunk of the loss and a smaller one
    model.compile(B, 128)
    tokens = torch.zeros(B, 128, dtype=torch.long, device="cuda")
    model.trunk(tokens[:1])  # uncompiled: FlexAttention makes its masks outside of the tracing, for real
    for _ in range(2):
        model(tokens, tokens).backward()
        with torch.no_grad():
            model(tokens, tokens, loss_reduction="none")
    assert 0 < forms(Block.forward) <= 8 and forms(chunk_losses) == forms(chunk_losses_and_gradient) == 2
    return model


def check_forms_of_optimizer(model):
    optimizer = model.setup_optimizer()
    optimizer.compile()
    for _ in range(2):
        for group in optimizer.param_groups:
            group["lr"] *= 0.9  # a schedule
        optimizer.step()
    assert 0 < forms(adamw_step_fused) <= 8 and 0 < forms(muon_step_fused) <= 8


def check_forms_of_golf():
    config = RecurrentConfig(
        vocab_size=256, model_dim=64, num_heads=2, num_kv_heads=1, max_seq_len=64, num_unique_layers=1
    )
    with torch.device("cuda"):
        model = RecurrentGPT(config, torch.bfloat16)
    call = compile_golf(model, None, True)
    tokens = torch.zeros(2, 64, dtype=torch.long, device="cuda")
    with torch.no_grad():
        for last in range(1, 11):  # as good as ten depths, and faster to trace
            call(tokens, tokens, depth=1, last=last)
