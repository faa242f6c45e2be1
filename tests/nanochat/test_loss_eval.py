import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import small_corpus
from nanochat import loss_eval
from nanochat.dataset import parquets_iter_batched
from nanochat.gpt import GPT, GPTConfig
from nanochat.loss_eval import evaluate_bpb, every_byte_batches, first_texts

BOS = 256
TOKEN_BYTES = torch.tensor([1] * 256 + [0] + [3, 7], dtype=torch.int32)  # bytes, BOS, two longer tokens


class ByteTokenizer:
    """One token for each byte."""

    def get_bos_token_id(self):
        return BOS

    def encode(self, texts, prepend=None):
        return [[prepend, *text.encode("utf-8")] for text in texts]


def constant_model(nats):
    """Every target costs the same, counted or not, so that a target which should not count shows."""

    def model(inputs, targets, loss_reduction):
        assert loss_reduction == "none"
        return torch.full((targets.numel(),), float(nats))

    return model


def batch_of(*targets):
    targets = torch.tensor([targets])
    return torch.zeros_like(targets), targets


def test_bits_per_byte_agree_with_brute_force_on_a_real_model():
    """Special tokens or ignored targets in one of the two sums, a mean of ratios, nats for bits."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(sequence_len=12, vocab_size=259, n_layer=1, n_head=1, n_kv_head=1, n_embd=32))
    model.init_weights()
    torch.nn.init.normal_(model.lm_head.weight)
    batches = [(torch.randint(0, 259, (3, 12)), torch.randint(-1, 259, (3, 12))) for _ in range(4)]
    batches[1][1][:] = -1  # a batch in which nothing counts
    batches[2][1][0, :6] = BOS
    nats, n_bytes = 0.0, 0
    for inputs, targets in batches[:3]:
        probabilities = F.log_softmax(model(inputs).double(), -1)
        for b in range(3):
            for t in range(12):
                target = targets[b, t].item()
                if target >= 0 and TOKEN_BYTES[target] > 0:
                    nats -= probabilities[b, t, target].item()
                    n_bytes += TOKEN_BYTES[target].item()
    assert evaluate_bpb(model, iter(batches), 3, TOKEN_BYTES) == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)


def test_a_batch_weighs_as_much_as_its_bytes():
    """The mean of the batches' ratios: (1 + 1/7) / 2 instead of 2 nats over 8 bytes."""
    batches = [batch_of(65), batch_of(258)]
    assert evaluate_bpb(constant_model(math.log(2)), iter(batches), 2, TOKEN_BYTES) == pytest.approx(2 / 8)


def test_what_is_not_text_counts_nowhere():
    """Surprise about BOS, or a -1 that is used as an index and reads the last token's length."""
    batches = [batch_of(65, BOS, -1, -100, 257)]
    assert evaluate_bpb(constant_model(math.log(2)), iter(batches), 1, TOKEN_BYTES) == pytest.approx(2 / 4)


@pytest.mark.parametrize("batches", [[], [batch_of(BOS, -1)], [batch_of(-1, -1), batch_of(BOS, BOS)]])
def test_without_a_byte_the_answer_is_infinite(batches):
    """A division by zero, or a 0 that would be the best result ever measured."""
    assert evaluate_bpb(constant_model(1), iter(batches), 5, TOKEN_BYTES) == math.inf


def test_exactly_so_many_batches_are_read():
    """A stream that ends early raises StopIteration; one that goes on loses a batch to a look ahead."""
    stream = iter([batch_of(65), batch_of(66), batch_of(67)])
    assert evaluate_bpb(constant_model(math.log(2)), stream, 2, TOKEN_BYTES) == pytest.approx(1)
    assert next(stream)[1].item() == 67
    assert evaluate_bpb(constant_model(math.log(2)), iter([batch_of(65)]), 10, TOKEN_BYTES) == pytest.approx(1)


def test_nats_are_summed_in_double_precision():
    """A sum in fp32 that stops growing: adding 1 to 2**25 changes nothing there."""
    costs = iter([2.0**25] + [1.0] * 1000)

    def model(inputs, targets, loss_reduction):
        return torch.tensor([next(costs)])

    batches = [batch_of(65)] * 1001
    expected = (2**25 + 1000) / math.log(2) / 1001
    assert evaluate_bpb(model, iter(batches), 1001, TOKEN_BYTES) == pytest.approx(expected, rel=1e-12)


def test_no_gradients_are_kept():
    """Memory that grows with every batch of an evaluation."""
    weight = torch.ones(1, requires_grad=True)
    kept = []

    def model(inputs, targets, loss_reduction):
        kept.append(weight * torch.ones(targets.numel()))
        return kept[-1]

    evaluate_bpb(model, iter([batch_of(65)]), 1, TOKEN_BYTES)
    assert not kept[0].requires_grad


def test_the_sums_of_all_processes_are_added(monkeypatch):
    """A mean over processes of their ratios; a process without bytes that answers inf while the others do not."""
    others = {True: 6 * math.log(2), False: 12}  # what the other processes bring: nats, bytes

    def all_reduce(tensor):
        tensor += others[tensor.is_floating_point()]

    monkeypatch.setattr(loss_eval, "is_ddp_initialized", lambda: True)
    monkeypatch.setattr(loss_eval.dist, "all_reduce", all_reduce)
    model = constant_model(math.log(2))
    assert evaluate_bpb(model, iter([batch_of(65, 66)]), 1, TOKEN_BYTES) == pytest.approx((2 + 6) / (2 + 12))
    assert evaluate_bpb(model, iter([]), 1, TOKEN_BYTES) == pytest.approx(6 / 12)


@settings(max_examples=80, deadline=None)
@given(texts=st.lists(st.text(max_size=30), max_size=6), B=st.integers(1, 4), T=st.integers(1, 9))
def test_every_byte_is_predicted_exactly_once(texts, B, T):
    """A token that is dropped or scored twice between two rows: the comparison with a compressor would be unfair."""
    batches = every_byte_batches(ByteTokenizer(), texts, B, T, torch.device("cpu"))
    tokens = [token for text in texts for token in [BOS, *text.encode("utf-8")]]
    assert all(inputs.shape == targets.shape == (B, T) for inputs, targets in batches)
    scored = [token for _, targets in batches for token in targets.flatten().tolist()]
    assert scored[: len(tokens)] == tokens and set(scored[len(tokens) :]) <= {-1}
    assert len(scored) - len(tokens) < B * T, "no batch of nothing"
    for inputs, targets in batches:
        assert (inputs[:, 0] == BOS).all()
        counted = targets[:, 1:] >= 0
        assert torch.equal(inputs[:, 1:][counted], targets[:, :-1][counted]), "each row sees what came before"
        assert inputs.min() >= 0, "also the padding is a token"
    n_bytes = sum(len(text.encode("utf-8")) for text in texts)
    if n_bytes:
        bpb = evaluate_bpb(constant_model(math.log(2)), iter(batches), len(batches), TOKEN_BYTES)
        assert bpb == pytest.approx(1), "one bit for each token is one for each byte: no byte is missing"


def test_first_texts_are_the_first_documents_until_they_are_enough(tmp_path):
    """Other validation bytes at each run, or all of a shard in memory."""
    corpus = small_corpus(tmp_path / "corpus")
    for split in ("train", "val"):
        documents = [text for group in parquets_iter_batched(split, corpus=corpus) for text in group]
        for wanted in (1, len(documents[0]), len(documents[0]) + 1, 20_000):
            texts = first_texts(corpus, split, wanted)
            assert texts == documents[: len(texts)]
            assert sum(map(len, texts)) >= wanted > sum(map(len, texts[:-1]))
        assert first_texts(corpus, split, 10**9) == documents, "a small split is given whole"
