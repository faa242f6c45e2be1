# %% [markdown]
# ## Export
#
# A checkpoint is for going on; an export is for others. It is one folder that the `transformers` library loads with
# one line, and every program that understands such folders: weights, sizes, tokenizer, chat template, and the few
# Python files that explain to the library what this model computes.
#
# Two promises. The numbers are the same: logits, ids and greedy texts of the exported model are those of ours. And
# nothing is dropped silently: when a simpler form of the model was asked for and cannot hold it, the answer is a list
# of reasons.
#
# One thing is not part of a model: the calculator. The engine gives its answers while the text is being written; a
# program that loads the export sees `<|python_start|>12*3<|python_end|>` and has to answer that itself, or the model
# goes on without.

# %%
import json
import os
import re
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

import safetensors.torch
import tokenizers
import torch

from nanochat.checkpoint_files import checkpoint_name, full_disk_is_oserror
from nanochat.checkpoint_manager import build_model, locate_checkpoint
from nanochat.export_modeling import (
    EXPORT_CHAT_TEMPLATE,
    EXPORT_CONFIGURATION_SOURCE,
    EXPORT_MODELING_SOURCE,
    EXPORT_TOKENIZATION_SOURCE,
)
from nanochat.gpt import GPT
from nanochat.runtime import UserError, atomic_path, print0, write_atomic
from nanochat.tokenizer import SPECIAL_TOKENS, RustBPETokenizer

# %% [markdown]
# ### `export_files`
# What an export consists of. An upload sends exactly these files, so what someone else put beside them stays here.

# %%
EXPORT_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "tokenization_nanochat_gpt.py",
)
EXPORT_MODEL_FILES = ("configuration_nanochat_gpt.py", "modeling_nanochat_gpt.py")  # not with the library's own model


def export_files(folder) -> list[Path]:
    """The files of an export. Raises UserError unless it is there and complete."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(
            f"{folder} is not an exported model (it has no readable config.json). Export it again."
        ) from None
    names = EXPORT_FILES + (EXPORT_MODEL_FILES if "auto_map" in config else ())
    absent = [name for name in names if not (Path(folder) / name).is_file()]
    if absent:
        raise UserError(f"the export {folder} is incomplete (no {', '.join(absent)}). Export the model again.")
    return [Path(folder) / name for name in names]


# %% [markdown]
# ### Back to merges
# Our vocabulary says which tokens there are, the library wants to know how each was put together. That can be played
# back: cut a token into bytes and glue them as any text is glued, with the tokens that are older than itself. What is
# left, just before it becomes one, are its two halves.


# %%
def token_halves(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two tokens that `token` was merged from; None when merging older tokens never arrives at two."""
    parts, limit = [token[i : i + 1] for i in range(len(token))], ranks[token]
    while len(parts) > 2:
        candidates = [ranks.get(left + right, limit) for left, right in zip(parts, parts[1:], strict=False)]
        lowest = min(candidates)
        if lowest >= limit:
            return None
        at = candidates.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


# %% [markdown]
# ### `library_tokenizer`
# In the library's files a token is text, so each byte is written as a character that can be seen: itself where it is
# printable, and one from behind Latin-1 where it is not.


# %%
def visible_bytes() -> list[str]:
    """The character that stands for each byte in the files of byte-level tokenizers."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printable]
    return [chr(value) if value in printable else chr(256 + others.index(value)) for value in range(256)]


def library_tokenizer(tokenizer: RustBPETokenizer) -> tokenizers.Tokenizer:
    """The same tokenizer for the `tokenizers` library; a plain encode with special tokens puts <|bos|> in front.

    Raises UserError when its special tokens are not ours, or its tokens were not made by merging.
    """
    if set(tokenizer.special_ids) != set(SPECIAL_TOKENS):
        raise UserError(
            f"only a tokenizer with exactly the special tokens {', '.join(SPECIAL_TOKENS)} can be exported."
        )
    ranks, characters = tokenizer.encoding._mergeable_ranks, visible_bytes()

    def shown(token: bytes) -> str:
        return "".join(characters[value] for value in token)

    merges = []
    for token in sorted(ranks, key=ranks.get):
        if len(token) > 1:
            halves = token_halves(token, ranks)
            if halves is None:
                raise UserError(
                    f"token {token!r} cannot be made by merging older ones, so this vocabulary is not a BPE."
                )
            merges.append((shown(halves[0]), shown(halves[1])))
    by_id = sorted(tokenizer.special_ids.items(), key=lambda item: item[1])
    vocabulary = {shown(token): rank for token, rank in ranks.items()} | dict(by_id)
    # ignore_merges: a chunk that is a token as a whole becomes that token, as tiktoken does it
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(tokenizer.encoding._pat_str), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.decoder = tokenizers.decoders.ByteLevel()
    bos = tokenizer.bos_token
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    library.add_special_tokens([tokenizers.AddedToken(name, normalized=False) for name, _ in by_id])
    return library


# %% [markdown]
# ### `export_tokenizer`
# The class that comes along is used with `trust_remote_code=True`. Without, the library falls back to its own, which
# reads the same file and gives the same ids for ordinary text; it finds special tokens in text, as it does for every
# model, and the template keeps those of a conversation's messages apart.


# %%
def export_tokenizer(tokenizer: RustBPETokenizer, folder, sequence_len: int) -> None:
    """Write the tokenizer's four files into an existing folder."""
    folder, library = Path(folder), library_tokenizer(tokenizer)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "auto_map": {"AutoTokenizer": [None, "tokenization_nanochat_gpt.NanochatGPTTokenizer"]},
        "bos_token": "<|bos|>",
        "eos_token": "<|assistant_end|>",
        "pad_token": "<|bos|>",  # it ends a text too; padding is hidden by the attention mask anyway
        "padding_side": "left",
        "model_max_length": sequence_len,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    write_atomic(folder / "tokenizer.json", library.to_str(pretty=False) + "\n")
    write_atomic(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    template = EXPORT_CHAT_TEMPLATE.replace("SPECIAL_TOKEN_NAMES", json.dumps(list(SPECIAL_TOKENS)))
    write_atomic(folder / "chat_template.jinja", template)
    write_atomic(folder / "tokenization_nanochat_gpt.py", EXPORT_TOKENIZATION_SOURCE)


# %% [markdown]
# ### The library's own model
# Early nanochat models have no value embeddings, scalars or windows, and the library has a class for those, which
# runs without foreign code. A model that makes no use of them can be written in that form.
#
# One difference is accepted, and written into the folder: our longest window is as long as the training length, the
# library's has no end. The two compute the same up to `max_position_embeddings` tokens, which is what both can read.


# %%
def reasons_against_stock(model: GPT) -> list[str]:
    """Why the library's own nanochat model cannot compute what this one does; empty when it can."""
    config, reasons = model.config, []
    tables = [i for i, table in model.value_embeds.items() if bool(table.weight[: config.vocab_size].any())]
    if tables:
        reasons.append(f"layer {', '.join(tables)} adds value embeddings")
    if not bool((model.resid_lambdas == 1).all()):
        reasons.append("the residual stream is rescaled (resid_lambdas are not all 1)")
    if bool(model.x0_lambdas.any()):
        reasons.append("the first embedding is mixed back in (x0_lambdas are not all 0)")
    short = [str(i) for i, (left, _) in enumerate(config.window_sizes()) if left < config.sequence_len]
    if short:
        reasons.append(f"layer {', '.join(short)} has a window shorter than {config.sequence_len} tokens")
    return reasons


STOCK_NAMES = (
    ("transformer.wte.", "model.embed_tokens."),
    ("transformer.h.", "model.layers."),
    (".attn.c_q.", ".self_attn.q_proj."),
    (".attn.c_k.", ".self_attn.k_proj."),
    (".attn.c_v.", ".self_attn.v_proj."),
    (".attn.c_proj.", ".self_attn.o_proj."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
)


def stock_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our tensors under the library's names, without those that contribute nothing."""
    renamed = {}
    for name, tensor in tensors.items():
        if name.endswith("_lambdas") or "value_embeds." in name or ".ve_gate." in name:
            continue
        for ours, theirs in STOCK_NAMES:
            name = name.replace(ours, theirs)
        renamed[name] = tensor
    return renamed


# %% [markdown]
# ### `export_config`
# Every constant of the architecture goes into `config.json`, as it does into a checkpoint. A text ends with
# `<|assistant_end|>` or where the next document would begin.


# %%
def export_config(model: GPT, tokenizer: RustBPETokenizer, stock: bool) -> tuple[dict, dict]:
    """The contents of config.json and generation_config.json."""
    config, end = model.config, tokenizer.encode_special("<|assistant_end|>")
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": [end, tokenizer.bos_token_id],
        "pad_token_id": tokenizer.bos_token_id,
    }
    if stock:
        architecture = {
            "architectures": ["NanoChatForCausalLM"],
            "model_type": "nanochat",
            "vocab_size": config.vocab_size,
            "hidden_size": config.n_embd,
            "intermediate_size": 4 * config.n_embd,
            "num_hidden_layers": config.n_layer,
            "num_attention_heads": config.n_head,
            "num_key_value_heads": config.n_kv_head,
            "max_position_embeddings": config.sequence_len,
            "rms_norm_eps": torch.finfo(torch.float32).eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
            "final_logit_softcapping": config.logit_softcap,
            "hidden_act": "relu2",
        }
    else:
        modules = ("configuration_nanochat_gpt.NanochatGPTConfig", "modeling_nanochat_gpt.NanochatGPTForCausalLM")
        architecture = {
            "architectures": ["NanochatGPTForCausalLM"],
            "model_type": "nanochat_gpt",
            "auto_map": {"AutoConfig": modules[0], "AutoModelForCausalLM": modules[1]},
            **asdict(config),
        }
    constants = {"dtype": "float32", "tie_word_embeddings": False, "use_cache": True}
    generation = {
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 50,
        "max_new_tokens": min(256, config.sequence_len // 2),
    }
    return architecture | special | constants, special | generation


# %% [markdown]
# ### `export_model`
# The tables are cut to the vocabulary: the rows behind it only made matrix products even. Everything is written into
# a folder of another name, which takes its real one when all of it is on the disk.


# %%
def export_model(model: GPT, tokenizer: RustBPETokenizer, folder, architecture: str = "auto") -> Path:
    """Write `model` (fp32 weights, as loaded for "train") and its tokenizer as a `transformers` folder; returns it.

    architecture: "custom" brings its Python files along (load with trust_remote_code=True), "nanochat" is the
    library's own, "auto" is "nanochat" if that can hold the model. An older export of that name is replaced.
    Raises UserError when "nanochat" cannot hold the model, with each reason, or the folder holds something else.
    """
    folder, config = Path(folder), model.config
    if architecture not in ("auto", "custom", "nanochat"):
        raise UserError(f"architecture is {architecture!r}; it can be auto, custom or nanochat.")
    if model.lm_head.weight.dtype != torch.float32:
        raise ValueError('the weights were cast to the compute dtype; load the model with phase "train" to export it')
    reasons = reasons_against_stock(model)
    if architecture == "nanochat" and reasons:
        raise UserError(
            f"the nanochat model of transformers cannot hold this model: {'; '.join(reasons)}. "
            'Export it with architecture "auto" or "custom".'
        )
    stock = architecture != "custom" and not reasons
    foreign = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    foreign = sorted(set(foreign) - {*EXPORT_FILES, *EXPORT_MODEL_FILES})
    if foreign or (folder.exists() and not folder.is_dir()):
        raise UserError(f"{folder} holds something else ({', '.join(foreign) or 'a file'}). Export to another folder.")

    tensors = {name: tensor.detach().float().cpu() for name, tensor in model.state_dict().items()}
    for name, tensor in tensors.items():
        if name.startswith(("transformer.wte.", "value_embeds.", "lm_head.")):
            tensors[name] = tensor[: config.vocab_size]
    tensors = {name: tensor.contiguous() for name, tensor in (stock_tensors(tensors) if stock else tensors).items()}

    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished_exports(folder)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp"))
    try:
        model_config, generation_config = export_config(model, tokenizer, stock)
        write_atomic(temporary / "config.json", json.dumps(model_config, indent=2) + "\n")
        write_atomic(temporary / "generation_config.json", json.dumps(generation_config, indent=2) + "\n")
        if not stock:
            write_atomic(temporary / "configuration_nanochat_gpt.py", EXPORT_CONFIGURATION_SOURCE)
            write_atomic(temporary / "modeling_nanochat_gpt.py", EXPORT_MODELING_SOURCE)
        export_tokenizer(tokenizer, temporary, config.sequence_len)
        with atomic_path(temporary / "model.safetensors") as path, full_disk_is_oserror():
            safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
        os.chmod(temporary, 0o755)
        replace_folder(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    size = sum(path.stat().st_size for path in export_files(folder))
    print0(f"Exported {'for the nanochat model of transformers' if stock else 'with its own modelling file'}: {folder} "
           f"({size / 1e6:,.1f} MB)")  # fmt: skip
    return folder


# %% [markdown]
# ### Taking the place of an older export
# A folder with files in it cannot be replaced in one step, so the old one steps aside first. A kill between the two
# renames leaves no folder of that name rather than half of one.


# %%
def replace_folder(new: Path, folder: Path) -> None:
    """Rename the folder `new` to `folder`, whose former contents are deleted."""
    old = new.with_name(new.name + ".old")
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def remove_unfinished_exports(folder: Path) -> None:
    """Delete what killed exports to this folder left beside it."""
    for path in folder.parent.iterdir():
        if re.fullmatch(rf"\.{re.escape(folder.name)}\.\w+\.tmp(\.old)?", path.name):
            shutil.rmtree(path, ignore_errors=True)


# %% [markdown]
# ### `export_checkpoint`
# What the notebook calls: the newest chat model, or one that is named, from its checkpoint on the disk.


# %%
def export_checkpoint(
    source: str, folder, model_tag: str | None = None, step: int | None = None, architecture: str = "auto"
) -> Path:
    """`export_model` for a checkpoint of base, sft or rl and the tokenizer of the base directory. Errors as there."""
    checkpoint_dir, step = locate_checkpoint(source, model_tag, step)
    print0(f"exporting {source} model {checkpoint_name(checkpoint_dir, step)}")
    model, tokenizer, _ = build_model(checkpoint_dir, step, "cpu", "train")
    return export_model(model, tokenizer, folder, architecture)
