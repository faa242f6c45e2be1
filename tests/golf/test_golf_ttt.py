import json
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from test_golf_scoring import byte_tables, golf_model, naive_losses, recurrent_model

from golf.golf_scoring import score_stream
from golf.golf_ttt import (
    DocumentAdapters,
    TTTSettings,
    score_with_lora_ttt,
    score_with_sgd_ttt,
    stream_documents,
    ttt_parameters,
)
from helpers import run_ranks
from nanochat.runtime import UserError

pytestmark = pytest.mark.usefixtures("one_thread")

V, L, S = 61, 16, 4
SMALL = dict(
    ttt_chunk_tokens=40, ttt_lr=0.05, ttt_batch_seqs=2, ttt_lora_rank=2, ttt_chunk_size=8, ttt_eval_seq_len=24,
    ttt_batch_size=3,
)  # fmt: skip


def documents_stream(n_targets: int = 150, seed: int = 0, begins=(0, 5, 6, 60, 90, 131)):
    stream = torch.randint(2, V, (n_targets + 1,), generator=torch.Generator().manual_seed(seed))
    stream[[b for b in begins if b <= n_targets]] = 1
    return stream


def reference_sgd_ttt(model, stream, settings):
    """Golf spec 4.8 form 1 by hand, one window at a time; the total nats. Leaves the model adapted."""
    N, weights = len(stream) - 1, ttt_parameters(model, settings)
    starts, nats, size = [0, *range(S, N - (L - S), S)], 0.0, settings.ttt_chunk_tokens
    K, momentum = math.ceil(N / size), [torch.zeros_like(w) for w in weights]
    for c in range(K):
        with torch.no_grad():
            for w in starts:
                first = 0 if w == 0 else w + L - S
                if first // size == c:
                    end = min(w + L, N)
                    log_p = model(stream[None, w:end])[0].double().log_softmax(-1)
                    nats -= sum(log_p[t - w, stream[t + 1]].item() for t in range(first, end))
        if c == K - 1:
            return nats
        lr = settings.ttt_lr * 0.5 * (1 + math.cos(math.pi * c / (K - 1)))
        rows = [stream[c * size + i * L : c * size + i * L + L + 1] for i in range(size // L)]
        for _ in range(settings.ttt_epochs):
            for i in range(0, len(rows), settings.ttt_batch_seqs):
                batch = torch.stack(rows[i : i + settings.ttt_batch_seqs])
                grads = torch.autograd.grad(model(batch[:, :-1], batch[:, 1:]), weights)
                norm = torch.sqrt(sum(g.square().sum() for g in grads))
                with torch.no_grad():
                    for w, m, g in zip(weights, momentum, grads, strict=True):
                        m.mul_(settings.ttt_momentum).add_(g * min(1.0, settings.ttt_grad_clip / norm))
                        w -= lr * m


@pytest.mark.parametrize("make", [golf_model, recurrent_model])
@pytest.mark.parametrize("params", ["mlp.proj", "all"])
def test_sgd_form_is_the_spec(make, params):
    """A step too many, a momentum that restarts, another rate: each gives a number that looks as good as this."""
    settings, stream = TTTSettings(**SMALL, ttt_params=params), documents_stream()
    model = make()
    weights = [p.clone() for p in model.parameters()]
    score = score_with_sgd_ttt(model, stream, byte_tables(), L, S, settings, batch_windows=3)
    assert score.sums[1] == 150
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    plain = score_stream(partial(model, reduction="none"), stream, byte_tables(), L, S)
    assert score.sums[2] == plain.sums[2] and abs(score.val_loss - plain.val_loss) > 1e-3
    assert score.sums[0].item() == pytest.approx(reference_sgd_ttt(make(), stream, settings), rel=1e-4)


def test_training_takes_no_more_at_once_than_scoring():
    """A GPU that trained and scored within its memory, and runs out of it at the first step of the evaluation."""
    model, seen = golf_model(), []
    settings = TTTSettings(**SMALL | {"ttt_chunk_tokens": 80, "ttt_batch_seqs": 5})
    hook = model.register_forward_pre_hook(lambda _, inputs: seen.append((torch.is_grad_enabled(), len(inputs[0]))))
    by_three, by_one = (
        score_with_sgd_ttt(model, documents_stream(), byte_tables(), L, S, settings, at_once) for at_once in (3, 1)
    )
    hook.remove()
    trained = [rows for training, rows in seen if training]
    assert trained == [3, 2] * settings.ttt_epochs + [1] * 5 * settings.ttt_epochs
    torch.testing.assert_close(by_one.sums, by_three.sums, rtol=1e-6, atol=0)


def test_weights_come_back_after_an_error():
    """An interrupted evaluation that leaves the adapted weights behind spoils everything that is measured later."""
    model, calls = golf_model(), []

    class Interrupts:
        wanted = frozenset()

        def scored(self, targets, nats):
            calls.append(model.blocks[0].mlp.proj.weight.clone())
            if targets.stop > 100:
                raise KeyboardInterrupt

        def updated(self, targets, document=None):
            pass

    before = model.blocks[0].mlp.proj.weight.clone()
    with pytest.raises(KeyboardInterrupt):
        score_with_sgd_ttt(model, documents_stream(), byte_tables(), L, S, TTTSettings(**SMALL), 3, watch=Interrupts())
    assert not torch.equal(calls[-1], before) and torch.equal(model.blocks[0].mlp.proj.weight, before)
    assert model.blocks[0].mlp.proj.weight.grad is None
    with pytest.raises(KeyboardInterrupt):
        score_with_lora_ttt(model, documents_stream(), byte_tables(), TTTSettings(**SMALL), watch=Interrupts())
    assert not any(module._forward_hooks for module in model.modules())


def adapted_logits(model, ids, pairs):
    """The model with its adapters written into the weights of the layers: (1, T) -> (T, V)."""
    layers = [layer for block in model.blocks for layer in (block.attn.c_q, block.attn.c_v)]
    added = {id(layer.weight): b @ a for layer, (a, b) in zip(layers, pairs, strict=False)}
    weights = {name: parameter + added.get(id(parameter), 0) for name, parameter in model.named_parameters()}
    hidden = torch.func.functional_call(Trunk(model), {f"model.{k}": v for k, v in weights.items()}, (ids,))
    a, b = pairs[-1]
    cap = model.config.logit_softcap
    return cap * torch.tanh((hidden @ (model.tok_emb.weight + b @ a).T)[0] / cap)


class Trunk(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model.trunk(ids)


def reference_lora_ttt(model, stream, settings):
    """Golf spec 4.8 form 2 by hand, one document at a time, adapters merged into weights; the total nats."""
    nats, c = 0.0, settings.ttt_chunk_size
    for document, begins in stream_documents(stream):
        fresh = DocumentAdapters(model, settings.ttt_lora_rank, 1)
        pairs = [
            (a[0].detach().clone().requires_grad_(), b[0].detach().clone().requires_grad_()) for a, b in fresh.pairs
        ]
        flat = [w for pair in pairs for w in pair]
        first, second = [torch.zeros_like(w) for w in flat], [torch.zeros_like(w) for w in flat]
        for step, start in enumerate(range(document.start, document.stop, c), 1):
            end = min(start + c, document.stop)
            low = max(document.start, start + c - settings.ttt_eval_seq_len)
            logits = adapted_logits(model, stream[None, low:end], pairs)[start - low :]
            loss = F.cross_entropy(logits, stream[start + 1 : end + 1])
            nats += loss.item() * (end - start)
            if end == document.stop or not begins:
                continue
            grads = torch.autograd.grad(loss, flat)
            with torch.no_grad():
                for w, m, v, g in zip(flat, first, second, grads, strict=True):
                    m.mul_(0.9).add_(0.1 * g)
                    v.mul_(0.95).add_(0.05 * g * g)
                    w -= settings.ttt_lora_lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-10)
    return nats


@pytest.mark.parametrize("make", [golf_model, recurrent_model])
@pytest.mark.parametrize("begins", [(0, 5, 6, 60, 90, 131), (19, 60, 150), ()])
def test_lora_form_is_the_spec(make, begins):
    """Adapters that leak between documents, a moment that is not reset, a target between documents that is lost."""
    model, stream, settings = make(), documents_stream(begins=begins), TTTSettings(**SMALL)
    weights = [p.clone() for p in model.parameters()]
    score = score_with_lora_ttt(model, stream, byte_tables(), settings)
    plain = score_stream(partial(model, reduction="none"), stream, byte_tables(), L)
    assert score.sums[1:].tolist() == plain.sums[1:].tolist()
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(weights, model.parameters(), strict=True))
    assert not any(module._forward_hooks for module in model.modules())
    assert score.sums[0].item() == pytest.approx(reference_lora_ttt(make(), stream, settings), rel=1e-4)


def test_frozen_weights_keep_nothing_for_their_gradients():
    """Evaluation that takes the memory of a training, for gradients of weights that do not learn."""
    model, kept = recurrent_model(), []
    weights = {p.data_ptr() for p in model.parameters()}

    def keep(tensor):
        if tensor.data_ptr() not in weights:
            kept.append(tensor)
        return tensor

    def bytes_kept():
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
        return sum(storages.values())

    ids = documents_stream().long()[None, :25]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with DocumentAdapters(model, 2, 1):
            model(ids[:, :-1], ids[:, 1:])
        whole = bytes_kept()
        kept.clear()
        one_chunk = TTTSettings(**SMALL | dict(ttt_chunk_size=24))
        score_with_lora_ttt(model, documents_stream(24, begins=(0,)), byte_tables(), one_chunk)
    assert 0 < bytes_kept() < 0.7 * whole
    assert all(p.requires_grad for p in model.parameters())


def test_text_before_the_first_document_is_scored_as_it_is():
    """Its beginning is not there, so no adapter may learn from it, and every target of the stream still counts."""
    model, stream = golf_model(), documents_stream(24, begins=())
    settings = TTTSettings(**SMALL)
    score = score_with_lora_ttt(model, stream, byte_tables(), settings)
    assert score.sums[0].item() == pytest.approx(naive_losses(model, stream, 24, 24).sum().item(), rel=1e-5)


def test_documents_cover_the_stream():
    """The prediction of the next document's begin belongs to the document before it, and counts."""
    stream = torch.tensor([7, 8, 1, 9, 9, 1, 1, 5, 1])
    assert stream_documents(stream) == [
        (range(0, 2), False),
        (range(2, 5), True),
        (range(5, 6), True),
        (range(6, 8), True),
    ]
    assert stream_documents(torch.tensor([1])) == []


def test_settings_that_cannot_work_are_named():
    """A run that finds out after an hour that its chunks hold no sequence has lost an hour of eight GPUs."""
    model = golf_model()
    for wrong, message in (
        (dict(ttt_epochs=0), "ttt_epochs is 0"), (dict(ttt_lr=0.0), "ttt_lr"), (dict(ttt_momentum=1.0), "ttt_momentum"),
        (dict(ttt_lora_lr=math.nan), "ttt_lora_lr"), (dict(ttt_batch_size=0), "ttt_batch_size"),
        (dict(ttt_chunk_size=2048), "shorter than ttt_chunk_size"), (dict(ttt_layers="0;2"), "ttt_layers"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            TTTSettings(**wrong)
    with pytest.raises(UserError, match="ttt_chunk_tokens 40 is less than one sequence of 64"):
        score_with_sgd_ttt(model, documents_stream(), byte_tables(), 64, 16, TTTSettings(**SMALL))
    with pytest.raises(UserError, match="ttt_eval_seq_len 1024 is more than the 64 positions"):
        score_with_lora_ttt(model, documents_stream(), byte_tables(), TTTSettings())
    with pytest.raises(UserError, match="blocks 0 to 2"):
        ttt_parameters(model, TTTSettings(ttt_layers="0,3"))
    with pytest.raises(UserError, match="no weight has"):
        ttt_parameters(model, TTTSettings(ttt_params="down_proj"))
    with pytest.raises(UserError, match="bfloat16"):
        ttt_parameters(golf_model().bfloat16(), TTTSettings())
    chosen = ttt_parameters(model, TTTSettings(ttt_layers="0,2"))
    assert [id(p) for p in chosen] == [id(model.blocks[i].mlp.proj.weight) for i in (0, 2)]
    assert len(ttt_parameters(model, TTTSettings(ttt_params="all"))) == len(list(model.parameters()))


SUMS = """
import json, sys, torch, torch.distributed as dist
from golf.golf_gpt import GolfConfig, GolfGPT
from golf.golf_ttt import TTTSettings, score_with_lora_ttt, score_with_sgd_ttt, require_equal_weights, ttt_parameters
from golf.legality import prove_legality
torch.set_num_threads(1)
dist.init_process_group("gloo")
weights, stream, tables, small = torch.load(sys.argv[1], weights_only=True)
shape = dict(vocab_size=61, model_dim=32, num_heads=4, num_kv_heads=2, max_seq_len=64)
model, settings = GolfGPT(GolfConfig(num_layers=3, **shape)), TTTSettings(**small)
model.load_state_dict(weights)
sgd = lambda stream, watch: score_with_sgd_ttt(model, stream, tables, 16, 4, settings, 3, watch=watch)
lora = lambda stream, watch: score_with_lora_ttt(model, stream, tables, settings, watch=watch)
sums = [scorer(stream, None).sums.tolist() for scorer in (sgd, lora)]
verdicts = [f for scorer in (sgd, lora) for f in prove_legality(scorer, stream, tables, number=3)[0]]
model.blocks[0].mlp.proj.weight.data += 1e-3 * dist.get_rank()
try:
    require_equal_weights(ttt_parameters(model, settings), "now")
    found = False
except RuntimeError:
    found = True
print(json.dumps([sums, verdicts, found]))
dist.destroy_process_group()
"""


def test_any_number_of_processes_learns_the_same(tmp_path):
    """Steps that differ by process, or a mean of means, make another model on every machine; and weights that have
    drifted apart must not go unnoticed."""
    model, stream, settings = golf_model(), documents_stream(), TTTSettings(**SMALL)
    torch.save((dict(model.state_dict()), stream, byte_tables(), SMALL), tmp_path / "case.pt")
    alone = torch.stack([
        score_with_sgd_ttt(model, stream, byte_tables(), L, S, settings, 3).sums,
        score_with_lora_ttt(model, stream, byte_tables(), settings).sums,
    ])  # fmt: skip
    for world in (2, 4):
        ranks = [json.loads(out) for out in run_ranks(SUMS, tmp_path / "case.pt", world_size=world)]
        assert all(rank == ranks[0] for rank in ranks)
        sums, verdicts, found = ranks[0]
        torch.testing.assert_close(torch.tensor(sums, dtype=torch.float64), alone, rtol=1e-5, atol=0)
        assert len(verdicts) == 10 and all(verdict[-1] == "ok" for verdict in verdicts), verdicts
        assert found
