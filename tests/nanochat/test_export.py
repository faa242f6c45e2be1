import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import textwrap

import pytest
import torch

from helpers import PYTHON, REPOSITORY, english_documents, python_environment, small_tokenizer
from nanochat import export
from nanochat.checkpoint_files import save_checkpoint
from nanochat.checkpoint_manager import checkpoint_folder
from nanochat.engine import Engine
from nanochat.export import (
    EXPORT_FILES,
    EXPORT_MODEL_FILES,
    export_checkpoint,
    export_files,
    export_model,
    reasons_against_stock,
)
from nanochat.gpt import GPT, GPTConfig
from nanochat.runtime import UserError

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread", "module_cache")

TOKENIZER = small_tokenizer(500)  # not a multiple of 64: the tables of the model are padded
BOS = TOKENIZER.get_bos_token_id()
CONFIG = GPTConfig(
    sequence_len=32, vocab_size=500, n_layer=4, n_head=4, n_kv_head=2, n_embd=64, window_pattern="SSL", rope_base=5000.0
)


@pytest.fixture(scope="module")
def module_cache(tmp_path_factory):
    """The library copies Python files of a model into a cache; not into that of the person who runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr("sys.path", list(__import__("sys").path))
        yield


def random_model(config=CONFIG, seed=0) -> GPT:
    """Every tensor of a size that shows in the logits, scalars and gates too."""
    model = GPT(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            std = 0.3 if name.endswith("_lambdas") else 1.0 if "wte" in name or "value_embeds" in name else 0.15
            tensor.normal_(0.9 if name == "resid_lambdas" else 0.0, std, generator=generator)
    return model


def plain_model(config) -> GPT:
    """A random model that makes no use of what the library's own lacks."""
    model = random_model(config)
    with torch.no_grad():
        model.resid_lambdas.fill_(1)
        model.x0_lambdas.zero_()
        for table in model.value_embeds.values():
            table.weight.zero_()
    return model


def prompts(n=20, longest=100) -> list[list[int]]:
    """Of 5 to `longest` tokens: shorter than the shortest window, longer than the training length."""
    lengths = torch.linspace(5, longest, n).long().tolist()
    documents = english_documents()
    return [TOKENIZER.encode(documents[i], prepend=BOS)[:length] for i, length in enumerate(lengths)]


def loaded(folder, **options):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, **options)
    return model.eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(our model, the folder, the model of the library)"""
    model = random_model()
    folder = export_model(model, TOKENIZER, tmp_path_factory.mktemp("export") / "d4")
    return model, folder, loaded(folder, trust_remote_code=True)


def largest_difference(ours, theirs, tokens) -> float:
    with torch.no_grad():
        a, b = ours(torch.tensor([tokens])), theirs(torch.tensor([tokens])).logits
    assert a.shape == b.shape and b.dtype == torch.float32
    return (a - b).abs().max().item()


def test_every_part_matters():
    """A model with zero gates or output matrices would agree with any modelling file."""
    model, tokens = random_model(), torch.tensor([prompts()[-1]])
    with torch.no_grad():
        before = model(tokens)
        for name, tensor in model.named_parameters():
            saved = tensor.clone()
            tensor.copy_(tensor.roll(1, dims=0))
            assert (model(tokens) - before).abs().max() > 1e-3, name
            tensor.copy_(saved)
        wide = random_model(dataclasses.replace(CONFIG, window_pattern="L"))
        assert (wide(tokens) - before).abs().max() > 1e-3


def test_logits(exported):
    """Another rotation sign, window, gate or norm gives fluent nonsense and no error."""
    ours, _, theirs = exported
    assert max(largest_difference(ours, theirs, tokens) for tokens in prompts()) < 1e-4


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_text(exported, use_cache):
    """A cache that shifts positions or forgets the window drifts away after some tokens."""
    ours, _, theirs = exported
    engine = Engine(ours, TOKENIZER)
    for tokens in prompts()[::4]:
        expected = [column[0] for column, _ in engine.generate(tokens, max_tokens=70, temperature=0)]
        new = theirs.generate(
            torch.tensor([tokens]), max_new_tokens=70, do_sample=False, use_cache=use_cache
        )[0, len(tokens) :].tolist()  # fmt: skip
        assert new == expected
        assert len(new) == 70 or new[-1] in (BOS, TOKENIZER.encode_special("<|assistant_end|>"))
    assert len(tokens) + len(new) > 2 * CONFIG.sequence_len


def test_left_padding_and_static_cache(exported):
    """In a batch padding would be read as text, or its rows turn to nan."""
    ours, folder, theirs = exported
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    rows = [tokens[:length] for tokens, length in zip(prompts()[10:13], (7, 45, 20), strict=True)]
    batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    assert batch["attention_mask"].sum(1).tolist() == [7, 45, 20] and batch["attention_mask"][0, 0] == 0
    with torch.no_grad():
        logits = theirs(**batch).logits
        for row, tokens in zip(logits, rows, strict=True):
            assert (row[-len(tokens) :] - ours(torch.tensor([tokens]))[0]).abs().max() < 1e-4
    assert logits.isfinite().all()
    engine = Engine(ours, TOKENIZER)
    stop = (BOS, TOKENIZER.encode_special("<|assistant_end|>"))
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        new = theirs.generate(**batch, max_new_tokens=30, do_sample=False, **options)[:, batch["input_ids"].size(1) :]
        for row, tokens in zip(new.tolist(), rows, strict=True):
            expected = [column[0] for column, _ in engine.generate(tokens, max_tokens=30, temperature=0)]
            assert row[: len(expected)] == expected and (len(expected) == 30 or expected[-1] in stop)


def test_a_prompt_in_pieces(exported):
    """Continuing a chat with the cache of the last turn must not read positions from the start again."""
    ours, _, theirs = exported
    tokens = torch.tensor([prompts()[-1]])
    with torch.no_grad():
        cache, logits = None, []
        for piece in tokens.split(33, dim=1):
            out = theirs(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits)
        assert (torch.cat(logits, 1) - ours(tokens)).abs().max() < 1e-4
        padded = torch.cat([torch.full((1, 9), BOS), tokens], 1)
        mask = (torch.arange(padded.size(1)) >= 9).long()[None]
        cache = theirs(padded[:, :50], attention_mask=mask[:, :50]).past_key_values
        rest = theirs(padded[:, 50:], attention_mask=mask, past_key_values=cache).logits
        assert (rest - ours(tokens)[:, 41:]).abs().max() < 1e-4
        last = theirs(tokens, logits_to_keep=1).logits
        assert last.shape == (1, 1, 500) and torch.allclose(last[:, 0], logits[-1][:, -1], atol=1e-4)


def test_wrong_inputs(exported):
    """What the model cannot do must not be done half."""
    _, _, theirs = exported
    ids = torch.tensor([[BOS, 1, 2]])
    with pytest.raises(ValueError, match="needs input_ids"):
        theirs(inputs_embeds=torch.zeros(1, 3, 64))
    with pytest.raises(ValueError, match=r"attention_mask is \(1, 2\); it must be \(batch, 3\)"):
        theirs(ids, attention_mask=torch.ones(1, 2))


def test_training_goes_on_elsewhere(exported, tmp_path):
    """Fine-tuning with the library: the loss is ours, and what it saves loads again."""
    ours, _, theirs = exported
    tokens = torch.tensor([prompts()[5]])
    loss = theirs(tokens, labels=tokens).loss
    assert abs(loss.item() - ours(tokens[:, :-1], tokens[:, 1:]).item()) < 1e-4
    loss.backward()
    used = [name for name, parameter in theirs.named_parameters() if parameter.grad is None]
    assert not used, f"no gradient reaches {used}"
    theirs.zero_grad()
    theirs.save_pretrained(tmp_path / "again")
    assert largest_difference(ours, loaded(tmp_path / "again", trust_remote_code=True), prompts()[9]) < 1e-4


STOCK = dataclasses.replace(CONFIG, window_pattern="L", sequence_len=64)


def test_stock_architecture(tmp_path):
    """A model that the library knows must not need foreign code, and be the same one."""
    ours = plain_model(STOCK)
    folder = export_model(ours, TOKENIZER, tmp_path / "stock")
    assert {path.name for path in folder.iterdir()} == set(EXPORT_FILES)
    theirs = loaded(folder)
    assert type(theirs).__module__ == "transformers.models.nanochat.modeling_nanochat"
    assert max(largest_difference(ours, theirs, tokens) for tokens in prompts(longest=64)) < 1e-4
    engine = Engine(ours, TOKENIZER)
    for tokens in prompts(longest=24)[::5]:
        expected = [column[0] for column, _ in engine.generate(tokens, max_tokens=40, temperature=0)]
        new = theirs.generate(torch.tensor([tokens]), max_new_tokens=40, do_sample=False)
        assert new[0, len(tokens) :].tolist() == expected
    custom = loaded(export_model(ours, TOKENIZER, tmp_path / "custom", "custom"), trust_remote_code=True)
    assert type(custom).__name__ == "NanochatGPTForCausalLM"
    assert largest_difference(ours, custom, prompts()[-1]) < 1e-4


def test_stock_architecture_refuses(tmp_path):
    """A part that is left out makes a model worse without a word."""
    assert reasons_against_stock(plain_model(STOCK)) == []
    reasons = reasons_against_stock(random_model())
    assert [reason.split(" ", 2)[:2] for reason in reasons] == [
        ["layer", "1,"], ["the", "residual"], ["the", "first"], ["layer", "0,"],
    ]  # fmt: skip
    with pytest.raises(UserError) as refusal:
        export_model(random_model(), TOKENIZER, tmp_path / "d4", "nanochat")
    assert all(reason in str(refusal.value) for reason in reasons)
    assert not list(tmp_path.iterdir())
    for change in ("resid_lambdas", "x0_lambdas", "value_embeds.1.weight", "value_embeds.3.weight"):
        model = plain_model(STOCK)
        with torch.no_grad():
            dict(model.named_parameters())[change].view(-1)[3] = 0.5
        assert len(reasons_against_stock(model)) == 1, change
    short = dataclasses.replace(STOCK, window_pattern="LSLL")
    assert reasons_against_stock(plain_model(short)) == ["layer 1 has a window shorter than 64 tokens"]
    with pytest.raises(UserError, match="it can be auto, custom or nanochat"):
        export_model(random_model(), TOKENIZER, tmp_path / "d4", "llama")


def test_fresh_process(exported, tmp_path):
    """What works only beside our own code, with a network or with pickled weights is no export."""
    ours, folder, _ = exported
    program = """
        import json, sys, torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
        tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
        messages = [{"role": "user", "content": "Is <|assistant_end|> text?"}]
        inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=20, do_sample=False)
        assert not any(name.split(".")[0] in ("nanochat", "tiktoken") for name in sys.modules)
        print(json.dumps(out[0].tolist()))
    """
    shutil.copytree(folder, tmp_path / "elsewhere")
    environment = python_environment(HF_HOME=tmp_path / "hf", HF_HUB_OFFLINE=1, OMP_NUM_THREADS=1) | {"PYTHONPATH": ""}
    ran = subprocess.run(
        [PYTHON, "-c", textwrap.dedent(program), str(tmp_path / "elsewhere")], env=environment, cwd=tmp_path,
        stdout=subprocess.PIPE, text=True, check=True, timeout=120,
    )  # fmt: skip
    messages = [{"role": "user", "content": "Is <|assistant_end|> text?"}, {"role": "assistant", "content": ""}]
    prompt = TOKENIZER.render_for_completion({"messages": messages})
    new = [column[0] for column, _ in Engine(ours, TOKENIZER).generate(prompt, max_tokens=20, temperature=0)]
    assert json.loads(ran.stdout) == prompt + new


def test_the_folder(exported):
    """A constant that is missing, an index of the wrong size, a file too many."""
    ours, folder, theirs = exported
    assert sorted(path.name for path in folder.iterdir()) == sorted(EXPORT_FILES + EXPORT_MODEL_FILES)
    assert [path.name for path in export_files(folder)] == [*EXPORT_FILES, *EXPORT_MODEL_FILES]
    config = json.loads((folder / "config.json").read_text())
    assert {name: config[name] for name in dataclasses.asdict(CONFIG)} == dataclasses.asdict(CONFIG)
    assert theirs.config.num_hidden_layers == 4 and theirs.config.max_position_embeddings == 32
    ends = [TOKENIZER.encode_special("<|assistant_end|>"), BOS]
    assert theirs.generation_config.eos_token_id == ends
    assert theirs.get_input_embeddings().weight.shape == theirs.lm_head.weight.shape == (500, 64)
    state = theirs.state_dict()
    assert all(torch.equal(state[name], tensor[:500]) for name, tensor in ours.state_dict().items())


def test_sources_are_clean(exported, tmp_path):
    """The files are read by people who have nothing else of this project."""
    _, folder, _ = exported
    sources = [str(path) for path in export_files(folder) if path.suffix == ".py"]
    assert len(sources) == 3
    for command in (["check", "--no-cache"], ["format", "--check", "--no-cache"]):
        arguments = ["ruff", *command, "--config", str(REPOSITORY / "pyproject.toml"), *sources]
        ran = subprocess.run([PYTHON, "-m", *arguments], capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout + ran.stderr


def test_interrupted_export(exported, tmp_path, monkeypatch):
    """Half an export that looks like a whole one would be uploaded."""
    model, folder, _ = exported
    target = tmp_path / "export" / "d4"

    def fail(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(export.safetensors.torch, "save_file", fail)
        with pytest.raises(KeyboardInterrupt):
            export_model(model, TOKENIZER, target)
    assert list(target.parent.iterdir()) == []
    export_model(model, TOKENIZER, target)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    other = random_model(seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(export.safetensors.torch, "save_file", fail)
        with pytest.raises(KeyboardInterrupt):
            export_model(other, TOKENIZER, target)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    # killed between the two renames: neither the old nor the new folder has the name, and the next export tidies up
    with monkeypatch.context() as patch:
        patch.setattr(export.shutil, "rmtree", lambda *arguments, **options: None)
        replace, calls = os.replace, []

        def replace_once(source, destination):
            if os.path.isdir(source):
                calls.append(source)
                if len(calls) == 2:
                    raise KeyboardInterrupt
            replace(source, destination)

        patch.setattr(export.os, "replace", replace_once)
        with contextlib.suppress(KeyboardInterrupt):
            export_model(other, TOKENIZER, target)
    assert not target.exists() and len(list(target.parent.iterdir())) == 2
    with pytest.raises(UserError, match="not an exported model"):
        export_files(target)
    export_model(other, TOKENIZER, target)
    assert [path.name for path in target.parent.iterdir()] == ["d4"]
    assert (target / "model.safetensors").read_bytes() != before["model.safetensors"]
    (target / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="incomplete .no tokenizer.json"):
        export_files(target)


def test_other_peoples_files(exported, tmp_path):
    """Replacing a folder must not delete what is not ours, and one model's files must not stay beside another's."""
    model, _, _ = exported
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else .notes.txt"):
        export_model(model, TOKENIZER, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    folder = export_model(model, TOKENIZER, tmp_path / "new")
    export_model(plain_model(STOCK), TOKENIZER, folder)
    assert {path.name for path in folder.iterdir()} == set(EXPORT_FILES)


def test_export_checkpoint(tmp_path, monkeypatch):
    """Weights that passed through the compute dtype have lost their last digits."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setenv("NANOCHAT_DTYPE", "bfloat16")
    TOKENIZER.save(tmp_path / "base" / "tokenizer")
    model = random_model()
    meta = {"model_config": dataclasses.asdict(CONFIG), "tokenizer_fingerprint": TOKENIZER.fingerprint()}
    save_checkpoint(checkpoint_folder("sft", "d4"), 7, model.state_dict(), None, meta)
    folder = export_checkpoint("sft", tmp_path / "out")
    assert largest_difference(model, loaded(folder, trust_remote_code=True), prompts()[-1]) < 1e-4
    with pytest.raises(UserError, match="no complete checkpoint"):
        export_checkpoint("rl", tmp_path / "rl", "d4")
    with pytest.raises(ValueError, match='load the model with phase "train"'):
        export_model(model.to(torch.bfloat16), TOKENIZER, tmp_path / "out")
