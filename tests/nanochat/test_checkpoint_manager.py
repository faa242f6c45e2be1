import os
import shutil
from dataclasses import asdict

import pytest
import tiktoken
import torch

from nanochat.checkpoint_files import NoCheckpointError, load_checkpoint, save_checkpoint
from nanochat.checkpoint_manager import (
    build_model,
    checkpoint_folder,
    find_largest_model,
    load_model,
    load_optimizer_state,
)
from nanochat.gpt import GPT, GPTConfig
from nanochat.runtime import UserError
from nanochat.tokenizer import SPECIAL_TOKENS, RustBPETokenizer

META = {"model_config": {"n_layer": 2}}
TENSORS = {"w": torch.ones(3)}


def byte_tokenizer(first_special=256):
    """All bytes and the special tokens: a tokenizer without training."""
    ranks = {bytes([value]): value for value in range(256)}
    special = {name: first_special + i for i, name in enumerate(SPECIAL_TOKENS)}
    encoding = tiktoken.Encoding("bytes", pat_str=".+", mergeable_ranks=ranks, special_tokens=special)
    return RustBPETokenizer(encoding, "<|bos|>")


@pytest.fixture
def base_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    byte_tokenizer().save(tmp_path / "tokenizer")
    return tmp_path


def small_model(seed=0, **changes):
    torch.manual_seed(seed)
    config = dict(sequence_len=16, vocab_size=265, n_layer=2, n_head=2, n_kv_head=1, n_embd=32)
    model = GPT(GPTConfig(**config | changes))
    model.init_weights()
    for parameter in model.parameters():  # zero matrices would hide a wrong one
        parameter.data.normal_(std=0.1)
    return model


def save_model(folder, step, model, **meta):
    save_checkpoint(folder, step, model.state_dict(), None, {"model_config": asdict(model.config)} | meta)


def test_largest_model(tmp_path):
    """Text order puts d4 above d12, a prefix match took "d99-old" for a model of depth 99, and an empty folder won."""
    with pytest.raises(FileNotFoundError):
        find_largest_model(tmp_path)
    for tag in ("d4", "d12", "d99-old", "my-model"):
        save_checkpoint(tmp_path / tag, 1, TENSORS, None, META)
    (tmp_path / "d50").mkdir()
    (tmp_path / "d60").write_text("a file")
    assert find_largest_model(tmp_path) == "d12"
    for tag in ("d4", "d12"):
        shutil.rmtree(tmp_path / tag)
    os.utime(tmp_path / "d99-old", (1, 1))
    assert find_largest_model(tmp_path) == "my-model"
    os.utime(tmp_path / "my-model", (1, 1))
    assert find_largest_model(tmp_path) == "d99-old"  # a tie goes by name, not by directory order


def test_build_model_computes_the_same(base_dir):
    """A constant or a weight that is not restored gives a model that runs and is wrong."""
    model = small_model(rope_base=500.0, logit_softcap=7.0, window_pattern="SL")
    folder = checkpoint_folder("base", "d2")
    save_model(folder, 3, model, tokenizer_fingerprint=byte_tokenizer().fingerprint())
    loaded, tokenizer, meta = build_model(folder, 3, "cpu", "eval")
    ids = torch.randint(0, 265, (2, 12))
    assert torch.equal(loaded(ids), model(ids))
    assert loaded.config == model.config and not loaded.training and meta["step"] == 3
    assert tokenizer.get_vocab_size() == 265
    assert build_model(folder, 3, "cpu", "train")[0].training
    with pytest.raises(ValueError, match="train or eval"):
        build_model(folder, 3, "cpu", "test")


def test_bf16_weights_load_on_a_cpu(base_dir):
    """Checkpoints from a GPU hold bf16 embeddings; an fp32 model must take them and stay fp32."""
    model = small_model()
    state = {name: tensor.bfloat16() if "wte" in name else tensor for name, tensor in model.state_dict().items()}
    folder = checkpoint_folder("base", "d2")
    save_checkpoint(folder, 1, state, None, {"model_config": asdict(model.config)})
    loaded, _, _ = build_model(folder, 1, "cpu", "eval")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.state_dict()["transformer.wte.weight"], state["transformer.wte.weight"].float())


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda config: config.update(gate_kind="new"), "has the unknown gate_kind"),
        (lambda config: config.pop("rope_base"), "lacks rope_base"),
    ],
)
def test_configuration_of_another_version_is_refused(base_dir, change, words):
    """Upstream's old checkpoints load silently into newer arithmetic and answer nonsense."""
    model = small_model()
    config = asdict(model.config)
    change(config)
    save_checkpoint(base_dir / "d2", 1, model.state_dict(), None, {"model_config": config})
    with pytest.raises(UserError, match=f"checkpoint d2/1 {words}"):
        build_model(base_dir / "d2", 1, "cpu", "eval")


def test_weights_that_do_not_fit_are_refused(base_dir):
    """A meta file copied from another model must not pass."""
    model = small_model()
    config = asdict(model.config) | {"n_embd": 64}
    save_checkpoint(base_dir / "d2", 1, model.state_dict(), None, {"model_config": config})
    with pytest.raises(UserError, match="weights of checkpoint d2/1 do not fit"):
        build_model(base_dir / "d2", 1, "cpu", "eval")


def test_tokenizer_that_does_not_fit_is_refused(base_dir):
    """Another tokenizer of the same size decodes a good model's output into garbage."""
    folder = checkpoint_folder("base", "d2")
    save_model(folder, 1, small_model(vocab_size=300))
    with pytest.raises(UserError, match="tokenizer has 265 tokens and checkpoint d2/1 was trained with 300"):
        build_model(folder, 1, "cpu", "eval")
    other = "f" * 64
    save_model(folder, 2, small_model(), tokenizer_fingerprint=other)
    ours = byte_tokenizer().fingerprint()[:12]
    with pytest.raises(UserError, match=rf"\(fingerprint {ours}\) is not the one .*d2/2.*\(ffffffffffff\)"):
        build_model(folder, 2, "cpu", "eval")


def test_load_model_finds_the_newest_of_the_largest(base_dir):
    """Evaluating yesterday's small model by accident is easy to miss."""
    for tag, step, seed in (("d2", 10, 1), ("d10", 9, 2), ("d10", 11, 3)):
        save_model(checkpoint_folder("base", tag), step, small_model(seed))
    assert load_model("base", "cpu", "eval")[2]["step"] == 11
    assert load_model("base", "cpu", "eval", model_tag="d2")[2]["step"] == 10
    model, _, meta = load_model("base", "cpu", "eval", model_tag="d10", step=9)
    assert meta["step"] == 9 and torch.equal(model.lm_head.weight, small_model(2).lm_head.weight)
    with pytest.raises(UserError, match="'bse'; it can be base, sft, rl"):
        load_model("bse", "cpu", "eval")
    with pytest.raises(FileNotFoundError):
        load_model("sft", "cpu", "eval")


def test_optimizer_state_of_a_rank(base_dir):
    """A share of the optimizer that is lost: an error that names it and what is left to do, not a missing file."""
    folder = checkpoint_folder("base", "d2")
    save_checkpoint(folder, 1, TENSORS, {"m": torch.ones(2)}, META)
    assert load_optimizer_state("base", "cpu", 0)["m"].tolist() == [1, 1]
    assert load_optimizer_state("base", "cpu", 1) is None
    with pytest.raises(NoCheckpointError, match="no optimizer state for rank 1 .*Go on from an older checkpoint"):
        load_checkpoint(folder, 1, "cpu", load_optimizer=True, rank=1)
