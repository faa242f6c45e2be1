import json
import os
import pickle
from dataclasses import asdict

import pytest
import tiktoken
import torch

from nanochat.checkpoint_files import load_checkpoint
from nanochat.checkpoint_import import import_original_checkpoint, import_original_tokenizer
from nanochat.checkpoint_manager import build_model
from nanochat.gpt import GPT, GPTConfig
from nanochat.runtime import UserError
from nanochat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, get_tokenizer

ORIGINAL_KEYS = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")


def encoding():
    ranks = {bytes([value]): value for value in range(256)} | {b"th": 256, b"the": 257}
    special = {name: 258 + i for i, name in enumerate(SPECIAL_TOKENS)}
    return tiktoken.Encoding("rustbpe", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=special)


def write_original(folder, model, optimizers, drop=(), config_keys=ORIGINAL_KEYS, **meta):
    """What nanochat's trainer leaves: compiled names, bf16 embeddings, Infinity in the JSON."""
    folder.mkdir(exist_ok=True)
    state = {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items() if name not in drop}
    for name in state:
        if "wte" in name or "value_embeds" in name:
            state[name] = state[name].bfloat16()
    torch.save(state, folder / "model_000100.pt")
    for rank, optimizer in enumerate(optimizers):
        torch.save(optimizer, folder / f"optim_000100_rank{rank}.pt")
    config = {key: value for key, value in asdict(model.config).items() if key in config_keys}
    text = json.dumps({"step": 100, "val_bpb": float("inf"), "model_config": config} | meta, indent=2)
    (folder / "meta_000100.json").write_text(text)


@pytest.fixture
def original(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    torch.manual_seed(0)
    config = dict(sequence_len=16, vocab_size=267, n_layer=2, n_head=2, n_kv_head=2, n_embd=32, window_pattern="L")
    model = GPT(GPTConfig(**config))
    model.init_weights()
    for parameter in model.parameters():
        parameter.data.copy_((torch.randn_like(parameter) * 0.1).bfloat16())
    with open(tmp_path / "tokenizer.pkl", "wb") as file:
        pickle.dump(encoding(), file)
    return model


def test_an_original_checkpoint_computes_the_same_here(original, tmp_path):
    """Weights under a wrong name or a constant of another value give a model that speaks nonsense."""
    optimizers = [{"state": {0: {"step": 5, "exp_avg": torch.ones(2) * rank}}, "param_groups": []} for rank in range(2)]
    write_original(tmp_path / "d2", original, optimizers)
    import_original_tokenizer(tmp_path / "tokenizer.pkl", tmp_path / "base" / "tokenizer")
    target = tmp_path / "base" / "base_checkpoints" / "d2"
    import_original_checkpoint(tmp_path / "d2", 100, target)
    model, tokenizer, meta = build_model(target, 100, "cpu", "eval")
    ids = torch.randint(0, 267, (2, 9))
    assert torch.equal(model(ids), original(ids))
    assert meta["val_bpb"] is None and meta["model_config"] == asdict(original.config)
    for rank in range(2):
        optimizer = load_checkpoint(target, 100, "cpu", load_optimizer=True, rank=rank)[1]
        assert optimizer["state"][0]["exp_avg"].tolist() == [rank, rank]


def test_checkpoints_older_than_the_residual_scalars(original, tmp_path):
    """Filling them with today's starting values (x0 at 0.1) would change what the old model computes."""
    write_original(tmp_path / "d2", original, [], drop=("resid_lambdas", "x0_lambdas"))
    import_original_checkpoint(tmp_path / "d2", 100, tmp_path / "out")
    state, _, _ = load_checkpoint(tmp_path / "out", 100, "cpu")
    assert state["resid_lambdas"].tolist() == [1, 1] and state["x0_lambdas"].tolist() == [0, 0]


def test_a_window_pattern_that_was_saved_is_kept(original, tmp_path):
    """The default for old files must not overwrite what a newer one says."""
    write_original(tmp_path / "d2", original, [], model_config=asdict(original.config) | {"window_pattern": "SSSL"})
    import_original_checkpoint(tmp_path / "d2", 100, tmp_path / "out")
    assert load_checkpoint(tmp_path / "out", 100, "cpu")[2]["model_config"]["window_pattern"] == "SSSL"


def test_the_tokenizer_gives_the_same_ids(original, tmp_path):
    """One rank off by one turns every prompt into noise."""
    ours = import_original_tokenizer(tmp_path / "tokenizer.pkl", tmp_path / "base" / "tokenizer")
    text = "the other 1234 ways, naïve 🙂 <|bos|>"
    assert ours.encode(text) == encoding().encode_ordinary(text) == get_tokenizer().encode(text)
    assert ours.get_bos_token_id() == 258 and ours.get_vocab_size() == 267


class RunsOnLoad:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "call", [(os.mkdir, ("pwned",)), (exec, ("import os; os.mkdir('pwned')",)), (eval, ("open('pwned', 'w')",))]
)
def test_a_malicious_tokenizer_is_refused_without_running(tmp_path, monkeypatch, protocol, call):
    """Loading a pickle from a stranger runs the stranger's program."""
    monkeypatch.chdir(tmp_path)
    for payload in (RunsOnLoad(*call), {"name": RunsOnLoad(*call)}):
        with open("tokenizer.pkl", "wb") as file:
            pickle.dump(payload, file, protocol=protocol)
        with pytest.raises(UserError, match="not a pickled tiktoken encoding"):
            import_original_tokenizer("tokenizer.pkl", "out")
        assert os.listdir() == ["tokenizer.pkl"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        pickle.dumps({"name": "x"}),
        pickle.dumps(encoding())[:500],
        pickle.dumps(encoding()).replace(b"pat_str", b"pat_xxx"),
        pickle.dumps(encoding()).replace(b"tiktoken.core", b"tiktoken.load"),
        b"\x80\x04\x8c\x0dtiktoken.core\x8c\x08Encoding\x93)\x81\x8c\x04gpt2b.",  # a state that is only a name
        b"\x80\x04\x8c\x0dtiktoken.core\x8c\x08Encoding\x93.",  # the class itself
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",  # a frame of 2**63 bytes
    ],
)
def test_other_pickles_are_refused_with_a_sentence(tmp_path, content):
    """A wrong file must be named, not end in an error from the depths of a library."""
    (tmp_path / "tokenizer.pkl").write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.pkl is not a pickled tiktoken encoding"):
        import_original_tokenizer(tmp_path / "tokenizer.pkl", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_malicious_model_file_is_refused_without_running(original, tmp_path, monkeypatch):
    """A .pt file is a pickle too."""
    monkeypatch.chdir(tmp_path)
    write_original(tmp_path / "d2", original, [])
    torch.save({"w": RunsOnLoad(os.mkdir, ("pwned",))}, tmp_path / "d2" / "model_000100.pt")
    with pytest.raises(UserError, match=r"model_000100\.pt holds more than tensors"):
        import_original_checkpoint(tmp_path / "d2", 100, tmp_path / "out")
    assert not (tmp_path / "pwned").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model_000100.pt", "meta_000100.json"])
def test_missing_and_damaged_files_are_named(original, tmp_path, name):
    """Eight files lie in the folder; the message must say which one it is."""
    write_original(tmp_path / "d2", original, [])
    path = tmp_path / "d2" / name
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match=name):
        import_original_checkpoint(tmp_path / "d2", 100, tmp_path / "out")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=name):
        import_original_checkpoint(tmp_path / "d2", 100, tmp_path / "out")


def test_a_configuration_from_the_future_is_refused(original, tmp_path):
    """Newer originals have parts that ours lacks; without them the weights mean something else."""
    config = asdict(original.config) | {"smear": True}
    write_original(tmp_path / "d2", original, [], model_config=config)
    with pytest.raises(UserError, match="unknown smear"):
        import_original_checkpoint(tmp_path / "d2", 100, tmp_path / "out")
