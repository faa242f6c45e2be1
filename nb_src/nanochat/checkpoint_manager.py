# %% [markdown]
# ## From a checkpoint to a model
#
# A checkpoint is files; a model is weights, a configuration and a tokenizer that belong together. This chapter finds
# the files by what they are (the largest base model, the newest chat model, or one by its name) and puts the three
# together, or says why they do not fit.

# %%
import re
from dataclasses import fields
from pathlib import Path

import torch

from nanochat.checkpoint_files import (
    NoCheckpointError,
    checkpoint_name,
    checkpoint_path,
    checkpoint_problem,
    find_last_step,
    load_checkpoint,
    steps_in,
)
from nanochat.gpt import GPT, GPTConfig
from nanochat.runtime import UserError, choose_compute_dtype, get_base_dir, print0
from nanochat.tokenizer import get_tokenizer

# %% [markdown]
# ### The folder of a model
# One folder for each kind of model, in it one for each model, named by its depth unless it was given another name.

# %%
CHECKPOINT_FOLDERS = {"base": "base_checkpoints", "sft": "chatsft_checkpoints", "rl": "chatrl_checkpoints"}


def checkpoint_folder(source: str, model_tag: str) -> Path:
    """`<base>/base_checkpoints/d12` and the like. source: base, sft or rl."""
    if source not in CHECKPOINT_FOLDERS:
        raise UserError(f"there are no checkpoints of kind {source!r}; it can be {', '.join(CHECKPOINT_FOLDERS)}.")
    return Path(get_base_dir()) / CHECKPOINT_FOLDERS[source] / model_tag


# %% [markdown]
# ### `find_largest_model`
# When nobody says which model, the largest is meant.


# %%
def find_largest_model(checkpoints_dir) -> str:
    """The tag of the deepest model (d12 over d4), or of the most recently changed one if none is named by its depth.

    Only folders with a complete checkpoint count. Raises NoCheckpointError when there is none.
    """
    folders = sorted(path for path in Path(checkpoints_dir).glob("*") if path.is_dir())
    folders = [path for path in folders if any(not checkpoint_problem(path, step) for step in steps_in(path))]
    if not folders:
        raise NoCheckpointError(f"there is no model with a complete checkpoint in {checkpoints_dir}. Train one first.")
    by_depth = [path for path in folders if re.fullmatch(r"d\d+", path.name)]
    if by_depth:
        return max(by_depth, key=lambda path: int(path.name[1:])).name
    return max(folders, key=lambda path: path.stat().st_mtime).name


# %% [markdown]
# ### `build_model`
# Weights, configuration and tokenizer belong together, and nothing in the arithmetic would complain if they did not.
# So each is checked against the others: a constant missing from an old file is not guessed, a tokenizer of the right
# size but with other tokens is refused.


# %%
def config_from_meta(meta: dict, name: str) -> GPTConfig:
    """The model configuration of a checkpoint. Raises UserError when it does not name exactly our constants."""
    config, known = meta.get("model_config"), {field.name for field in fields(GPTConfig)}
    if not isinstance(config, dict):
        raise UserError(f"checkpoint {name} has no model_config in its meta file; it is not one of ours.")
    unknown, absent = sorted(config.keys() - known), sorted(known - config.keys())
    if unknown or absent:
        differences = [f"has the unknown {', '.join(unknown)}"] if unknown else []
        differences += [f"lacks {', '.join(absent)}"] if absent else []
        raise UserError(
            f"the model_config of checkpoint {name} {' and '.join(differences)}. "
            "It was saved by another version of this project; load it with that one."
        )
    return GPTConfig(**config)


def build_model(checkpoint_dir, step: int, device, phase: str):
    """(model, tokenizer, meta) of one checkpoint. phase: "train" or "eval", the mode that the model is put into.

    For "eval" the weights are in the compute dtype, which changes no result; for "train" they stay in fp32. The
    tokenizer is that of the base directory. Raises UserError when the three do not belong together.
    """
    if phase not in ("train", "eval"):
        raise ValueError(f"phase is {phase!r}; it can be train or eval")
    name, device = checkpoint_name(checkpoint_dir, step), torch.device(device)
    model_data, _, meta = load_checkpoint(checkpoint_dir, step, device)
    config = config_from_meta(meta, name)

    tokenizer = get_tokenizer()
    if tokenizer.get_vocab_size() != config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.get_vocab_size()} tokens and checkpoint {name} was trained with "
            f"{config.vocab_size}. Put its own tokenizer into {get_base_dir()}/tokenizer, or train the model again."
        )
    theirs, ours = meta.get("tokenizer_fingerprint"), tokenizer.fingerprint()
    if theirs not in (None, ours):
        raise UserError(
            f"the tokenizer (fingerprint {ours[:12]}) is not the one that checkpoint {name} was trained with "
            f"({theirs[:12]}). Put its own tokenizer into {get_base_dir()}/tokenizer, or train the model again."
        )

    with torch.device("meta"):
        model = GPT(config, choose_compute_dtype(device.type)[0])
    model.to_empty(device=device)
    model.init_weights()  # for what is not saved: the rotary tables
    try:
        model.load_state_dict(model_data, strict=True)
    except RuntimeError as error:
        raise UserError(f"the weights of checkpoint {name} do not fit its own model_config: {error}") from error
    if phase == "eval":  # every product casts its weight to this anyway: once is enough when no update follows
        model.to(model.compute_dtype)
    return model.train(phase == "train"), tokenizer, meta


# %% [markdown]
# ### `load_model`
# What the later stages call: the largest base model, or the newest chat model, or one that is named.


# %%
def locate_checkpoint(source: str, model_tag: str | None, step: int | None) -> tuple[Path, int]:
    """Folder and step of a checkpoint; None stands for the largest model and its last step."""
    if model_tag is None:
        model_tag = find_largest_model(checkpoint_folder(source, ""))
    folder = checkpoint_folder(source, model_tag)
    return folder, find_last_step(folder) if step is None else step


def load_model(source: str, device, phase: str, model_tag: str | None = None, step: int | None = None):
    """(model, tokenizer, meta) of a source: base, sft or rl."""
    folder, step = locate_checkpoint(source, model_tag, step)
    print0(f"loading {source} model {checkpoint_name(folder, step)}")
    return build_model(folder, step, device, phase)


def load_optimizer_state(source: str, device, rank: int, model_tag: str | None = None, step: int | None = None):
    """This rank's optimizer state of a checkpoint, or None when it was not saved."""
    folder, step = locate_checkpoint(source, model_tag, step)
    if not checkpoint_path(folder, step, "optim", rank).exists():
        return None
    return load_checkpoint(folder, step, device, load_optimizer=True, rank=rank)[1]
