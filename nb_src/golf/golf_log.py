# %% [markdown]
# ## The log
#
# Every record of the challenge comes with its log, and scripts exist that read them, so the lines have the published
# shapes. Two things are added that the published logs lack: every setting with the value that took effect, and the hash
# of the script that ran. Without them a score cannot be traced back to the program that made it.

# %%
import os
import platform
from pathlib import Path

import torch

from golf.golf_settings import public_settings
from golf.golf_train import GolfRecord
from nanochat.plots import in_notebook
from nanochat.runtime import get_dist_info, print0, write_atomic

# %% [markdown]
# ### `GolfLog`
# One file for each run, written anew whenever the notebook runs: the records of earlier steps come back from the
# checkpoint's folder, so nothing is lost and nothing stands twice. In a notebook the chart tells the story, so there
# only the file gets the lines.


# %%
class GolfLog:
    """Appends lines to a new file and prints them in a script. Rank 0 alone writes; all may call."""

    def __init__(self, path):
        self.path = Path(path)
        if get_dist_info()[1] == 0:
            write_atomic(self.path, "")

    def __call__(self, *lines: str, echo: bool = True) -> None:
        """echo: False for lines that were printed by an earlier run."""
        if get_dist_info()[1] != 0:
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
        if echo and lines and not in_notebook():
            print0("\n".join(lines))


# %% [markdown]
# ### The lines
# Word for word those of the challenge's own script, where it has them.


# %%
def golf_header_lines(params: dict, data, val_tokens: int, model, world_size: int, accumulation: int) -> list[str]:
    """What is known before the first step. data: GolfData. val_tokens: targets of it. Golf spec section 2.6."""
    kind = "byte" if data.tokenizer_path.endswith(".json") else "sentencepiece"
    tied = bool(params.get("tie_embeddings", 1))  # the second system knows no other
    rate = params["tied_embed_lr"] if tied and "tied_embed_lr" in params else params["embed_lr"]
    backends = {
        "cudnn": torch.backends.cuda.cudnn_sdp_enabled(), "flash": torch.backends.cuda.flash_sdp_enabled(),
        "mem_efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "math": torch.backends.cuda.math_sdp_enabled(),
    }  # fmt: skip
    return [
        f"Running Python {platform.python_version()}",
        f"Running PyTorch {torch.__version__}",
        f"val_bpb:enabled tokenizer_kind={kind} tokenizer_path={os.path.basename(data.tokenizer_path)}",
        f"train_loader:dataset:{data.name} train_shards:{len(data.train_files)}",
        f"val_loader:shards pattern=fineweb_val_*.bin tokens:{val_tokens}",
        f"model_params:{sum(p.numel() for p in model.parameters())}",
        f"world_size:{world_size} grad_accum_steps:{accumulation}",
        "sdp_backends:" + " ".join(f"{name}={on}" for name, on in backends.items()),
        f"attention_mode:gqa num_heads:{params['num_heads']} num_kv_heads:{params['num_kv_heads']}",
        f"tie_embeddings:{tied} embed_lr:{rate} head_lr:{0.0 if tied else params['head_lr']} "
        f"matrix_lr:{params['matrix_lr']} scalar_lr:{params['scalar_lr']}",
        f"train_batch_tokens:{params['train_batch_tokens']} train_seq_len:{params['train_seq_len']} "
        f"iterations:{params['iterations']} warmup_steps:{params['warmup_steps']} "
        f"max_wallclock_seconds:{params['max_wallclock_seconds']:.3f}",
        f"seed:{params['seed']}",
        "settings: " + " ".join(f"{name}:{value}" for name, value in public_settings(params).items() if value != ""),
    ]


def golf_record_lines(record: GolfRecord, iterations: int, warmup_steps: int) -> list[str]:
    """What the log says about one step, and before the first about those that warmed up and were undone."""
    at = f"step:{record.step}/{iterations}"
    time = f"train_time:{record.train_ms:.0f}ms"
    average = f"step_avg:{record.train_ms / max(record.step, 1):.2f}ms"
    lines = [f"warmup_step:{i}/{warmup_steps}" for i in range(1, warmup_steps + 1)] if record.step == 0 else []
    if record.loss is not None:
        lines.append(f"{at} train_loss:{record.loss:.4f} {time} {average}")
    if record.val_bpb is not None:
        lines.append(f"{at} val_loss:{record.val_loss:.4f} val_bpb:{record.val_bpb:.4f} {time} {average}")
    if record.stopped_early:
        lines.append(f"stopping_early: wallclock_cap {time} {at}")
    if record.peak_mib is not None:
        lines.append(f"peak memory allocated: {record.peak_mib[0]} MiB reserved: {record.peak_mib[1]} MiB")
    return lines
