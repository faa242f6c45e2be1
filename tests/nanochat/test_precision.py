import json
import math

import pytest
import torch
import torch.nn.functional as F

import nanochat.precision as precision_chapter
from helpers import english_documents, run_ranks, small_tokenizer
from nanochat.checkpoint_files import save_checkpoint
from nanochat.checkpoint_manager import build_model
from nanochat.engine import Engine
from nanochat.gpt import GPT, ChunkedCrossEntropy, GPTConfig, chunk_losses_and_gradient
from nanochat.loss_eval import evaluate_bpb
from nanochat.precision import LOSS_SCALE_START, LossScaler
from nanochat.runtime import UserError

CONFIG = GPTConfig(
    sequence_len=64, vocab_size=512, n_layer=2, n_head=2, n_kv_head=2, n_embd=64, window_pattern="SL"
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer(CONFIG.vocab_size)


@pytest.fixture(scope="module")
def batches(tokenizer):
    """Thirty batches (inputs, targets), (8, 64) each, of real text."""
    ids = [token for document in tokenizer.encode(english_documents()) for token in document][: 30 * 8 * 64 + 1]
    rows = torch.tensor(ids)
    return list(zip(rows[:-1].view(30, 8, 64), rows[1:].view(30, 8, 64), strict=True))


def model_and_optimizer(compute_dtype, scalar_lr=0.5):
    """The same model every time. A fresh one does not notice its scalars, since a norm follows: their first gradients
    are rounding noise, which AdamW turns into whole steps. To compare precisions, give them the learning rate 0.
    """
    torch.manual_seed(42)
    model = GPT(CONFIG, compute_dtype)
    model.init_weights()
    return model, model.setup_optimizer(matrix_lr=0.02, embedding_lr=0.3, scalar_lr=scalar_lr)


def train(model, optimizer, scaler, batches):
    """Losses of one update for each batch, and whether each was made."""
    losses, made = [], []
    for inputs, targets in batches:
        loss = model(inputs, targets)
        scaler.scale(loss).backward()
        made.append(scaler.step(optimizer))
        model.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses, made


def test_fp16_learns_like_fp32(batches):
    """Gradients that vanish in fp16: the loss would fall more slowly, or not at all."""
    curves = {}
    for dtype in (torch.float32, torch.float16):
        model, optimizer = model_and_optimizer(dtype, scalar_lr=0.0)  # see there
        curves[dtype], made = train(model, optimizer, LossScaler(dtype), batches)
        assert all(made)
        assert all(p.dtype == torch.float32 for p in model.parameters()), "master weights are fp32"
    full, half = curves[torch.float32], curves[torch.float16]
    assert full[-1] < full[0] - 1
    assert max(abs(a - b) for a, b in zip(full, half, strict=True)) < 0.02


def test_gradients_of_a_large_step_survive_fp16_only_with_the_scaler(batches):
    """A scaler whose factor never reaches the backward pass; a loss that divides before it could help."""

    def gradient(dtype, scaler):
        model, _ = model_and_optimizer(dtype)
        for inputs, targets in batches[:2]:  # the second step, when the zero matrices have moved
            model.zero_grad()
            loss = model(inputs, targets) / 1024  # as if this were one of 1,024 parts of a batch of 524,288 tokens
            scaler.scale(loss).backward()
            with torch.no_grad():
                for block in model.transformer["h"]:
                    block.attn.c_proj.weight.copy_(torch.eye(64) / 8)
                    block.mlp.c_proj.weight.copy_(torch.eye(64, 256) / 8)
        return torch.cat([p.grad.flatten() for p in model.transformer["h"].parameters()])

    exact = gradient(torch.float32, LossScaler(torch.float32))
    without = gradient(torch.float16, LossScaler(torch.float32))
    with_scaler = gradient(torch.float16, LossScaler(torch.float16)) / LOSS_SCALE_START
    assert F.cosine_similarity(with_scaler, exact, dim=0) > 0.9999
    assert F.cosine_similarity(without, exact, dim=0) < 0.99


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n_rows", [512, 700])
def test_the_loss_hands_back_gradients_of_full_precision(dtype, n_rows):
    """A mean over many tokens taken before the scale, which empties fp16; a scale rounded to the compute dtype."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(n_rows, 64, generator=generator), torch.randn(100, 64, generator=generator) / 100
    targets = torch.randint(100, (n_rows,), generator=generator)
    factor = 1000 / 3  # no power of two

    def gradients(dtype):
        leaves = [x.to(dtype).to(torch.float32).to(dtype).requires_grad_(), weight.clone().requires_grad_()]
        loss = ChunkedCrossEntropy.apply(*leaves, targets, 15.0, chunk_losses_and_gradient)
        return torch.autograd.grad(loss * factor, leaves)

    for one, other in zip(gradients(dtype), gradients(torch.float32), strict=True):
        one, other = one.double(), other.double()
        unit = torch.finfo(dtype).eps
        assert (one - other).norm() <= (2 * unit + 1e-6) * other.norm()
        assert abs((one * other).sum() / other.square().sum() - 1) < unit / 4 + 1e-6, "a scale that is off for all"


def test_logits_that_overflow_fp16_are_held_by_the_cap():
    """inf - inf: a product beyond 65,504 would turn the loss into NaN, which no loss scale can help."""
    logits = torch.tensor([[math.inf, 0.0, -math.inf], [math.inf, 0.0, -math.inf]], dtype=torch.float16)
    losses, gradient = chunk_losses_and_gradient(logits, torch.tensor([0, 2]), 15.0)
    torch.testing.assert_close(losses, torch.tensor([0.0, 30.0]), atol=1e-4, rtol=1e-6)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_precisions_are_left_alone(dtype, batches):
    """A scaler that costs a multiplication, or moves a bit, where there is nothing to scale."""
    model, optimizer = model_and_optimizer(dtype)
    plain_model, plain_optimizer = model_and_optimizer(dtype)
    scaler, loss = LossScaler(dtype), torch.ones(())
    assert scaler.scale(loss) is loss
    train(model, optimizer, scaler, batches[:3])
    for inputs, targets in batches[:3]:
        plain_model(inputs, targets).backward()
        plain_optimizer.step()
        plain_model.zero_grad(set_to_none=True)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain_model.parameters(), strict=True))
    assert scaler.state_dict() == LossScaler(dtype).state_dict()


# One of two processes. At step 2 an infinity, at step 4 a NaN appears in one gradient of rank 1.
TRAIN_WITH_OVERFLOW = """
import hashlib, json
import torch
from nanochat.gpt import GPT, GPTConfig
from nanochat.precision import LossScaler
from nanochat.runtime import compute_cleanup, compute_init

torch.set_num_threads(1)
_, rank, _, _, device = compute_init("cpu")
torch.manual_seed(42)
config = GPTConfig(sequence_len=32, vocab_size=128, n_layer=2, n_head=2, n_kv_head=2, n_embd=64, window_pattern="SL")
model = GPT(config, torch.float16)
model.init_weights()
optimizer, scaler = model.setup_optimizer(), LossScaler(torch.float16)
generator = torch.Generator().manual_seed(rank)
seen = []
for step in range(6):
    ids = torch.randint(16, (4, 33), generator=generator)
    loss = model(ids[:, :-1], ids[:, 1:])
    scaler.scale(loss).backward()
    if rank == 1 and step in (2, 4):
        model.transformer["h"][0].mlp.c_fc.weight.grad[3, 5] = float("inf") if step == 2 else float("nan")
    made = scaler.step(optimizer)
    model.zero_grad(set_to_none=True)
    weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    digest, count = hashlib.sha256(weights).hexdigest(), optimizer.state[model.lm_head.weight]["step"]
    seen.append([made, scaler.factor, count, digest, all(bool(p.isfinite().all()) for p in model.parameters())])
compute_cleanup()
print("RESULT" + json.dumps(seen))
"""


def test_an_overflow_on_one_rank_is_skipped_by_both():
    """One rank in the optimizer's collectives while the other goes on: a deadlock, or weights that drift apart."""
    outputs = run_ranks(TRAIN_WITH_OVERFLOW)
    first, second = (json.loads(output.split("RESULT")[1]) for output in outputs)
    assert first == second, "made, scale, step count and weights are equal on both ranks after every step"
    made, factors, counts, digests, finite = zip(*first, strict=True)
    assert made == (True, True, False, True, False, True) and all(finite)
    assert factors == tuple(LOSS_SCALE_START / n for n in (1, 1, 2, 2, 4, 4))
    assert counts == (1, 2, 2, 3, 3, 4), "a skipped update is no step of the optimizer"
    assert digests[2] == digests[1] and digests[4] == digests[3] and len(set(digests)) == 4
    assert outputs[0].count("update skipped") == 2 and "skipped" not in outputs[1]


def test_a_resumed_run_is_bitwise_the_same(batches, monkeypatch):
    """A scale that starts over after a resume: other roundings, other overflows, another model."""
    monkeypatch.setattr(precision_chapter, "LOSS_SCALE_GROWTH_INTERVAL", 4)

    def run(parts):
        model, optimizer = model_and_optimizer(torch.float16)
        scaler = LossScaler(torch.float16)
        scaler.factor = 2.0**30  # it overflows at first
        made, start = [], 0
        for stop in parts:
            made += train(model, optimizer, scaler, batches[start:stop])[1]
            weights, states, saved = model.state_dict(), optimizer.state_dict(), json.dumps(scaler.state_dict())
            model, optimizer = model_and_optimizer(torch.float16)
            scaler, start = LossScaler(torch.float16), stop
            model.load_state_dict(weights)
            optimizer.load_state_dict(states)
            scaler.load_state_dict(json.loads(saved))
        return made, scaler.state_dict(), weights

    (made, scale, weights), (made2, scale2, weights2) = run([24]), run([10, 13, 24])
    assert made == made2 and scale == scale2
    assert all(torch.equal(weights[name], weights2[name]) for name in weights)
    first = made.index(True)
    assert 0 < first < 20 and scale["good_steps"] < 4, "both overflows and growth have happened"


def test_the_scale_grows_after_enough_good_updates(monkeypatch):
    """A scale that only ever shrinks, until small gradients vanish."""
    monkeypatch.setattr(precision_chapter, "LOSS_SCALE_GROWTH_INTERVAL", 3)
    p = torch.nn.Parameter(torch.ones(3))
    optimizer, scaler = torch.optim.SGD([p], lr=0.1), LossScaler(torch.float16)
    factors = []
    for step in range(8):
        scaler.scale(p.sum()).backward()
        if step == 4:
            p.grad[1] = math.inf
        scaler.step(optimizer)
        p.grad = None
        factors.append(scaler.factor / LOSS_SCALE_START)
    assert factors == [1, 1, 2, 2, 1, 1, 1, 2]
    torch.testing.assert_close(p.detach(), torch.full((3,), 1 - 7 * 0.1))


def test_an_overflow_for_ever_ends_with_a_sentence():
    """A run that skips every update until someone looks."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer, scaler = torch.optim.SGD([p], lr=0.1), LossScaler(torch.float16)
    with pytest.raises(UserError, match="fp16 cannot hold the gradients .* NANOCHAT_DTYPE to float32"):
        for _ in range(100):
            p.grad = torch.full((3,), math.nan)
            scaler.step(optimizer)
    assert (p == 1).all()


@pytest.mark.parametrize("dtype, expected", [(torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_tables_on_a_gpu_are_not_kept_in_fp16(monkeypatch, dtype, expected):
    """fp16 embeddings as the original would have them: their updates are rounded away, and unscaling refuses them."""

    class Gpu:
        type = "cuda"

    model = GPT(CONFIG, dtype)
    tables = model.cos, model.sin
    monkeypatch.setattr(GPT, "get_device", lambda self: Gpu())
    monkeypatch.setattr(GPT, "rotary_tables", lambda self, length, device=None: tables)
    model.init_weights()
    assert model.transformer["wte"].weight.dtype == model.value_embeds["1"].weight.dtype == expected
    assert model.lm_head.weight.dtype == torch.float32


def test_a_model_in_fp16_evaluates_and_generates(tmp_path, monkeypatch, tokenizer, batches):
    """A dtype that some part of inference does not take: the run would train for hours and fail in its evaluation."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    tokenizer.save(tmp_path / "tokenizer")
    model, optimizer = model_and_optimizer(torch.float32)
    train(model, optimizer, LossScaler(torch.float32), batches[:20])
    save_checkpoint(tmp_path / "d2", 1, model.state_dict(), None, {"model_config": model.config.__dict__})
    bpb, texts = {}, {}
    for name in ("float32", "float16"):
        monkeypatch.setenv("NANOCHAT_DTYPE", name)
        loaded, _, _ = build_model(tmp_path / "d2", 1, "cpu", "eval")
        assert {p.dtype for p in loaded.parameters()} == {getattr(torch, name)}
        bpb[name] = evaluate_bpb(loaded, batches[20:], 10, torch.ones(512, dtype=torch.int32))
        prompt = tokenizer.encode("The", prepend=tokenizer.get_bos_token_id())
        texts[name] = Engine(loaded, tokenizer).generate_batch(prompt, max_tokens=8, temperature=0)[0][0]
        assert texts[name][len(prompt) :] == list(loaded.generate(prompt, 8, temperature=0))
    assert abs(bpb["float16"] - bpb["float32"]) < 1e-3
