# %% [markdown]
# ## Tracking
#
# The chart in the notebook shows this run. To lay many runs over one another, log them to Weights & Biases: give the
# run a name and every step goes there as well. Without a name nothing is imported and nothing is written.
#
# Tracking must never cost you a training. Without a key, or without a network, the run is recorded on disk and the last
# line says how to upload it.

# %%
import hashlib
import json
import os
import re
import secrets
import shlex
from pathlib import Path

from nanochat.runtime import UserError, get_base_dir, print0, write_atomic

# %% [markdown]
# ### `read_secret`
# Keys never belong in a notebook's cells. Colab has a drawer for them (the key symbol on the left); elsewhere they are
# environment variables.


# %%
def read_secret(name: str) -> str | None:
    """The secret from Colab's drawer, else from the environment, else None. Never printed, never stored."""
    value = None
    try:
        from google.colab import userdata

        value = userdata.get(name)
    except ImportError:
        pass  # not in Colab
    except Exception:
        # SecretNotFoundError, NotebookAccessError, TimeoutException, or a process that torchrun started, which cannot
        # ask the browser: in each case this secret is not to be had from Colab.
        pass
    return (value or os.environ.get(name) or "").strip() or None


# %% [markdown]
# ### What is logged
# The names under which the original logged, so that its runs and yours share their axes.


# %%
def wandb_train_record(record) -> dict:
    """What one optimizer step logs; keys of spec section 14.4, plus the step as their x-axis. mfu in percent."""
    return {
        "step": record.step,
        "train/loss": record.smooth_loss,
        "train/lrm": record.lr_multiplier,
        "train/dt": record.seconds,
        "train/tok_per_sec": record.tokens_per_second,
        "train/mfu": None if record.mfu is None else 100 * record.mfu,
        "train/epoch": record.epoch,
    }


def wandb_eval_record(record) -> dict:
    """What an evaluation logs; keys of spec section 14.4."""
    return {
        "step": record.step,
        "total_training_flops": record.total_flops,
        "total_training_time": record.total_seconds,
        "val/bpb": record.val_bpb,
    }


# %% [markdown]
# ### The trackers
# `DummyWandb` is what most runs use: it has the same two methods and does nothing.


# %%
class DummyWandb:
    """Stands in for a tracker when there is nothing to track."""

    def log(self, *args, **kwargs) -> None:
        pass

    def finish(self) -> None:
        pass


class WandbTracker:
    """A run of the real client. `log(dict)` as often as you like, `finish()` once."""

    def __init__(self, run, offline: bool):
        self.run, self.offline = run, offline
        run.define_metric("*", step_metric="step")  # a resumed run continues its curves instead of counting from 0

    def log(self, values: dict) -> None:
        """Log the values that are known; None is left out."""
        self.run.log({key: value for key, value in values.items() if value is not None})

    def finish(self) -> None:
        """Flush, and for an offline run print the command that uploads it: all its parts, if it was resumed."""
        self.run.finish()
        if self.offline:
            folder = Path(self.run.settings.sync_dir)
            parts = sorted(str(part) for part in folder.parent.glob(f"offline-run-*-{self.run.id}*"))
            print0(f"wandb: recorded offline. Upload it with: wandb sync {shlex.join(parts)}")


# %% [markdown]
# ### Which run is this?
# A training that was interrupted must continue its run, and a different training must not. So the run's id is kept in
# the base directory, under a fingerprint of the name, the project and the configuration.


# %%
def stored_wandb_id(run: str, project: str, config: dict) -> str:
    """The id under which this name, project and config were opened before, or a new one."""
    path = Path(get_base_dir()) / "wandb" / "run_ids.json"
    key = hashlib.sha256(json.dumps([run, project, config], sort_keys=True, default=str).encode()).hexdigest()
    ids = json.loads(path.read_text()) if path.exists() else {}
    if key not in ids:
        ids[key] = secrets.token_hex(4)
        write_atomic(path, json.dumps(ids, indent=1))
    return ids[key]


# %% [markdown]
# ### `open_tracker`
# The one call that a training makes.


# %%
WANDB_INIT_SECONDS = 30  # how long the server may take to answer before the run goes offline


def open_tracker(run: str, project: str, config: dict, rank: int = 0):
    """A tracker with `log(dict)` and `finish()`.

    run: the name shown in Weights & Biases; "" or "dummy" turns tracking off, as any rank but 0 and
    WANDB_MODE=disabled do.
    config: what defines this training. Opening again with the same run, project and config continues the same run, so
    leave out what differs between a start and a resume.
    With a WANDB_API_KEY the run is online; without one, or when the server does not accept it, offline in
    `<base>/wandb`. Raises UserError when tracking is wanted and the client is not installed.
    """
    if run in ("", "dummy") or rank != 0 or os.environ.get("WANDB_MODE") == "disabled":
        return DummyWandb()
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            f'run "{run}" is to be logged to Weights & Biases, but its client is not installed. '
            "Install it with `pip install wandb`, or set run to dummy."
        ) from error
    key = read_secret("WANDB_API_KEY")
    options = {
        "project": project,
        "name": run,
        "config": config,
        "id": stored_wandb_id(run, project, config),
        "resume": "allow",
        "dir": get_base_dir(),
        "reinit": "finish_previous",
    }
    quiet = {"silent": True, "console": "off", "init_timeout": WANDB_INIT_SECONDS}
    if key:
        try:
            settings = wandb.Settings(api_key=key, **quiet)
            tracker = WandbTracker(wandb.init(mode="online", settings=settings, **options), offline=False)
            print0(f"wandb: {tracker.run.url}")
            return tracker
        except Exception as error:  # no network, a wrong key, a server in trouble: none is worth losing a training for
            reason = re.sub(r"\s+", " ", str(error)).replace(key, "***")[:200]
            print0(f"wandb: going offline, the server did not take the run ({type(error).__name__}: {reason})")
            wandb.teardown()  # the client's background process would still hold the run's id
    return WandbTracker(wandb.init(mode="offline", settings=wandb.Settings(**quiet), **options), offline=True)
