# %% [markdown]
# ## Reading the originals' checkpoints
#
# nanochat itself stores weights as `.pt` and its tokenizer as a pickle. A pickle is a program: loading one from a
# stranger runs what the stranger wrote. Nothing else here ever does that, so the import is a step of its own, done
# once, on purpose, with an unpickler that knows one class by name and only takes notes of what would be put into it.

# %%
import json
import pickle
from pathlib import Path

import tiktoken
import torch

from nanochat.checkpoint_files import NoCheckpointError, write_checkpoint_files, write_checkpoint_meta
from nanochat.checkpoint_manager import config_from_meta
from nanochat.runtime import UserError, print0
from nanochat.tokenizer import RustBPETokenizer

# %% [markdown]
# ### `import_original_tokenizer`
# A pickled `tiktoken.Encoding` is the name of the class and a dictionary of four entries. The stand-in below receives
# the dictionary; any other name in the pickle ends the reading before anything is called.


# %%
class EncodingNotes:
    """Stands in for `tiktoken.Encoding` while unpickling and keeps the state that it is given."""

    state = None

    def __setstate__(self, state):
        self.state = state


class TokenizerUnpickler(pickle.Unpickler):
    """Reads a pickled `tiktoken.Encoding` and can do nothing else."""

    def find_class(self, module, name):
        if (module, name) != ("tiktoken.core", "Encoding"):
            raise pickle.UnpicklingError(f"it wants to use {module}.{name}")
        return EncodingNotes


def read_pickled_encoding(path) -> tiktoken.Encoding:
    """The encoding in an original `tokenizer.pkl`. Raises UserError for anything else, without having run any of it."""
    try:
        with open(path, "rb") as file:
            notes = TokenizerUnpickler(file).load()
    except FileNotFoundError:
        raise UserError(f"there is no {path}.") from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise UserError(f"{path} is not a pickled tiktoken encoding ({error}); it was not loaded.") from error
    state = notes.state if isinstance(notes, EncodingNotes) else None
    kinds = {"name": str, "pat_str": str, "mergeable_ranks": dict, "special_tokens": dict}
    if (
        not isinstance(state, dict)
        or state.keys() != kinds.keys()
        or not all(type(state[key]) is kind for key, kind in kinds.items())
        or not all(type(token) is bytes and type(rank) is int for token, rank in state["mergeable_ranks"].items())
        or not all(type(name) is str and type(number) is int for name, number in state["special_tokens"].items())
    ):
        raise UserError(f"{path} is not a pickled tiktoken encoding with pattern, ranks and special tokens.")
    return tiktoken.Encoding(**state)


def import_original_tokenizer(pickle_path, tokenizer_dir) -> RustBPETokenizer:
    """Turn an original `tokenizer.pkl` into our tokenizer files; returns the tokenizer."""
    RustBPETokenizer(read_pickled_encoding(pickle_path), "<|bos|>").save(tokenizer_dir)
    return RustBPETokenizer.from_directory(tokenizer_dir)  # which checks it once more, as any other


# %% [markdown]
# ### `import_original_checkpoint`
# The originals do not store their constants, so the values that they had then are written down here. Checkpoints from
# before the residual scalars get the ones that change nothing.

# %%
ORIGINAL_CONFIG = {
    "window_pattern": "L",  # what it was before there was a choice
    "rope_base": 10000.0,
    "logit_softcap": 15.0,
    "ve_gate_channels": 32,
    "vocab_multiple": 64,
}


def load_original_tensors(path: Path):
    """Tensors and plain values of a `.pt` file, on the CPU. Raises UserError when it holds anything else."""
    if not path.is_file():
        raise NoCheckpointError(f"there is no {path}.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds, depending on where the damage is
        reason = str(error).split("\n")[0]
        raise UserError(f"{path} holds more than tensors, or is damaged; it was not loaded ({reason}).") from error


def import_original_checkpoint(src_dir, step: int, dst_dir) -> None:
    """Copy one checkpoint of the originals (commit 5fdd5cd) into our format: model, meta and all optimizer shards.

    Raises UserError, naming the file, when one is missing, damaged or not what it should be. Spec sections 10, 21.14.
    """
    src_dir = Path(src_dir)
    meta_path = src_dir / f"meta_{step:06d}.json"
    try:
        meta = json.loads(meta_path.read_text(encoding="utf-8"))
        config = ORIGINAL_CONFIG | meta["model_config"]
    except FileNotFoundError:
        raise NoCheckpointError(f"there is no {meta_path}.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{meta_path} is not the meta file of a checkpoint ({error!r}).") from error
    config_from_meta({"model_config": config}, f"{src_dir.name}/{step}")  # complains about names that we do not know

    model_data = load_original_tensors(src_dir / f"model_{step:06d}.pt")
    model_data = {name.replace("_orig_mod.", ""): tensor for name, tensor in model_data.items()}
    model_data.setdefault("resid_lambdas", torch.ones(config["n_layer"]))
    model_data.setdefault("x0_lambdas", torch.zeros(config["n_layer"]))

    records = write_checkpoint_files(dst_dir, step, model_data, None, rank=0)
    rank = 0
    while (path := src_dir / f"optim_{step:06d}_rank{rank}.pt").exists():
        records |= write_checkpoint_files(dst_dir, step, None, load_original_tensors(path), rank)
        rank += 1
    write_checkpoint_meta(dst_dir, step, meta | {"model_config": config}, records)
    print0(f"imported {src_dir.name}/{step} with {rank} optimizer shards into {dst_dir}")
