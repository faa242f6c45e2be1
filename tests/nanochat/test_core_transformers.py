import sys
import types

import core_bundles
import core_reference
import pytest
import torch

from helpers import small_tokenizer
from nanochat import core_transformers
from nanochat.core_bundle import load_core_tasks
from nanochat.core_eval import evaluate_core, score_examples
from nanochat.core_transformers import TransformersModel, TransformersTokenizer, load_transformers_model
from nanochat.runtime import UserError

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENIZER = small_tokenizer(400)


class StandIn(torch.nn.Module):
    """A GPT that is called as a model of the transformers library is, and notes how many logits it gave."""

    def __init__(self, n_positions: int = 640):
        super().__init__()
        self.gpt = core_bundles.small_gpt(TOKENIZER)
        self.config = types.SimpleNamespace(n_positions=n_positions, vocab_size=TOKENIZER.get_vocab_size())
        self.given = []

    def forward(self, input_ids=None, use_cache=True):
        assert not use_cache
        return self.answer(self.gpt(input_ids))

    def answer(self, logits):
        self.given.append(logits.size(0) * logits.size(1))
        return types.SimpleNamespace(logits=logits)


class KeepingStandIn(StandIn):
    """One that can leave logits out."""

    def forward(self, input_ids=None, use_cache=True, logits_to_keep=0):
        return self.answer(self.gpt.head(self.gpt.trunk(input_ids)[:, -logits_to_keep:]))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return core_bundles.write_core_bundle(tmp_path_factory.mktemp("core") / "bundle")


@pytest.mark.parametrize("memory", [1, 1 << 30])
@pytest.mark.parametrize("kind", [StandIn, KeepingStandIn])
def test_wrapped_models_answer_as_the_reference(bundle, monkeypatch, kind, memory):
    """Positions picked from the wrong row or shifted by the logits that were left out."""
    monkeypatch.setattr(core_transformers, "FOREIGN_LOGITS_BYTES", memory)
    model = TransformersModel(kind())
    for task in load_core_tasks(bundle):
        expected = core_reference.reference_answers(
            model, TOKENIZER, "cpu", task.task_type, task.path, task.num_fewshot, task.delimiter
        )
        answers = score_examples(model, TOKENIZER, task, "cpu")
        assert [(answer.correct, answer.choice) for answer in answers] == [row[:2] for row in expected], task.label


def test_logits_are_limited(bundle, monkeypatch):
    """All logits of a batch of long prompts at once would not fit into memory."""
    monkeypatch.setattr(core_transformers, "FOREIGN_LOGITS_BYTES", 4 * TOKENIZER.get_vocab_size() * 300)
    task = next(task for task in load_core_tasks(bundle) if task.label == "writing3")
    plain, keeping = StandIn(), KeepingStandIn()
    for model in (plain, keeping):
        score_examples(TransformersModel(model), TOKENIZER, task, "cpu")
        assert max(model.given) <= 300
    assert sum(keeping.given) < sum(plain.given) / 2


def test_context_length(bundle):
    """GPT-2 has 1024 positions and no more; a model that does not say must not be guessed at."""
    assert TransformersModel(StandIn(1024)).max_seq_len == 1024
    assert TransformersModel(StandIn(1024), max_seq_len=90).max_seq_len == 90
    with pytest.raises(UserError, match="StandIn does not say how many tokens it can read"):
        TransformersModel(StandIn(0))
    model = StandIn(90)
    task = next(task for task in load_core_tasks(bundle) if task.label == "choices3")
    answers = score_examples(TransformersModel(model), TOKENIZER, task, "cpu")
    data = core_reference.exam(task.path)
    for index, (item, answer) in enumerate(zip(data, answers, strict=True)):
        shots = core_reference.fewshot_examples(data, index, 3)
        expected = core_reference.answer(
            model.gpt, TOKENIZER, "cpu", task.task_type, item, shots, task.delimiter, max_seq_len=90
        )
        assert (answer.correct, answer.choice) == expected[:2]


class PlainTokenizer:
    """As a tokenizer of the transformers library is called."""

    bos_token_id, eos_token_id = None, 7

    def __call__(self, texts, add_special_tokens, verbose):
        assert not add_special_tokens
        return {"input_ids": [list(text.encode()) for text in texts]}


def test_tokenizer():
    """A beginning-of-text token of the tokenizer's own accord would be a second one."""
    tokenizer = TransformersTokenizer(PlainTokenizer())
    assert tokenizer.get_bos_token_id() == 7
    assert tokenizer.encode("ab") == [97, 98]
    assert tokenizer.encode(["ab", ""], prepend=7) == [[7, 97, 98], [7]]
    PlainTokenizer.eos_token_id = None
    with pytest.raises(UserError, match="no token to begin a text with"):
        TransformersTokenizer(PlainTokenizer())


def test_without_the_library(monkeypatch):
    """Everything else must work without transformers, and asking for it must say what to install."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="pip install transformers"):
        load_transformers_model("gpt2", "cpu")


def gpt2_and_llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(vocab_size=TOKENIZER.get_vocab_size(), initializer_range=0.2)
    gpt2 = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=512, **sizes)
    llama = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=512, **sizes,
    )  # fmt: skip
    return [transformers.AutoModelForCausalLM.from_config(config).eval() for config in (gpt2, llama)]


def test_models_of_the_library(bundle):
    """The real thing, where it is installed: GPT-2 and Llama with random weights."""
    for model in map(TransformersModel, gpt2_and_llama()):
        assert model.max_seq_len == 512 and model.keeps_some
        for task in load_core_tasks(bundle):
            expected = core_reference.reference_answers(
                model, TOKENIZER, "cpu", task.task_type, task.path, task.num_fewshot, task.delimiter
            )
            answers = score_examples(model, TOKENIZER, task, "cpu")
            assert [(answer.correct, answer.choice) for answer in answers] == [row[:2] for row in expected]
        assert set(evaluate_core(model, TOKENIZER, "cpu", bundle, 5)["results"]) == {
            t[0] for t in core_bundles.SMALL_TASKS
        }
