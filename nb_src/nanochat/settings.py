# %% [markdown]
# ## Presets and checks
#
# What the parameters of this notebook are, what each is on each kind of machine, and which values make no sense. A
# run that cannot work should end here, not after the data is downloaded.

# %%
import math
import re

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from nanochat.parameters import command_line, is_given, parse_arguments, typed_value
from nanochat.runtime import UserError, get_dist_info, print0

# %% [markdown]
# ### `PRESETS`
# One column for each kind of machine. `a100` is the original d12 run, value for value. `cpu` is the same pipeline at
# the size of a coffee break; its learning rates were found on that size.

# %%
D12_RUN = dict(
    data_source="fineweb-edu", train_shards=-1, vocab_size=32768, tokenizer_max_chars=2_000_000_000,
    tokenizer_doc_cap=10_000, depth=12, aspect_ratio=64, head_dim=128, max_seq_len=2048, window_pattern="SSSL",
    num_iterations=-1, target_flops=-1.0, target_param_data_ratio=8.5, device_batch_size=-1, total_batch_size=-1,
    embedding_lr=0.3, unembedding_lr=0.004, matrix_lr=0.02, scalar_lr=0.5, weight_decay=0.2, adam_beta1=0.8,
    adam_beta2=0.95, warmup_ratio=0.0, warmdown_ratio=0.5, final_lr_frac=0.0, eval_every=250, eval_tokens=40 * 524288,
    sample_every=-1, save_every=-1, eval_split_tokens=40 * 524288, core_max_per_task=0,
    sft_num_iterations=0, sft_total_batch_size=-1, sft_init_lr_frac=1.0, sft_warmdown_ratio=0.2, sft_eval_every=150,
    sft_eval_tokens=20 * 524288, simple_spelling_size=200_000, spelling_bee_size=80_000,
    max_problems=0, base_max_problems=256, chat_batch_size=32, chat_max_new_tokens=512, chat_temperature=0.0,
    chat_num_samples=1,
)  # fmt: skip
PRESETS = {
    "a100": D12_RUN,
    "h100": D12_RUN,
    # No bf16 on a T4: fp16 products, full windows and a small model. Never run on one yet.
    "t4": D12_RUN | dict(
        depth=4, max_seq_len=1024, window_pattern="L", total_batch_size=65536, vocab_size=16384,
        tokenizer_max_chars=500_000_000, eval_tokens=20 * 65536, eval_split_tokens=20 * 65536,
        sft_eval_tokens=10 * 65536,
    ),
    # At this batch the rates become 0.04, 0.56, 0.011 and 0.5 and the decay 0.2. The original's own, scaled down to it,
    # are twelve times lower and learn far less in so few steps.
    "cpu": D12_RUN | dict(
        data_source="offline", vocab_size=4096, tokenizer_max_chars=20_000_000, depth=4, head_dim=64, max_seq_len=512,
        window_pattern="L", num_iterations=210, device_batch_size=16, total_batch_size=8192, matrix_lr=0.34,
        embedding_lr=4.5, unembedding_lr=0.09, scalar_lr=4.0, weight_decay=0.022, eval_every=60, eval_tokens=4 * 8192,
        save_every=60, eval_split_tokens=8 * 8192, sft_num_iterations=150, sft_eval_every=50, sft_eval_tokens=4 * 8192,
        sft_init_lr_frac=0.5, sft_warmdown_ratio=0.5, simple_spelling_size=6000, spelling_bee_size=4000,
        base_max_problems=128, chat_max_new_tokens=192,
    ),
}  # fmt: skip
HORIZONS = ("num_iterations", "target_flops", "target_param_data_ratio")

# %%
PARAMETER_TYPES = dict(
    preset=str, base_dir=str, device_type=str, data_source=str, text_column=str, train_shards=int,
    tokenizer_max_chars=int, tokenizer_doc_cap=int, vocab_size=int,
    depth=int, aspect_ratio=int, head_dim=int, max_seq_len=int, window_pattern=str,
    num_iterations=int, target_flops=float, target_param_data_ratio=float,
    device_batch_size=int, total_batch_size=int,
    embedding_lr=float, unembedding_lr=float, matrix_lr=float, scalar_lr=float, weight_decay=float,
    adam_beta1=float, adam_beta2=float, warmup_ratio=float, warmdown_ratio=float, final_lr_frac=float,
    eval_every=int, eval_tokens=int, eval_split_tokens=int, sample_every=int, save_every=int,
    task_source=str, core_max_per_task=int, compare_model=str,
    sft_num_iterations=int, sft_total_batch_size=int, sft_init_lr_frac=float, sft_warmdown_ratio=float,
    sft_eval_every=int, sft_eval_tokens=int, simple_spelling_size=int, spelling_bee_size=int,
    chat_tasks=str, max_problems=int, base_max_problems=int, chat_batch_size=int, chat_max_new_tokens=int,
    chat_temperature=float, chat_num_samples=int, allow_weak_sandbox=bool, skip=str,
    hub_repo=str, hub_public=bool, upload_checkpoint=bool, weights_license=str,
    model_tag=str, attention=str, torch_compile=bool, recompute=bool, fp8=bool, processes=int, run=str,
    price_per_hour=float,
)  # fmt: skip
MAY_BE_ZERO = {"warmup_ratio", "warmdown_ratio", "final_lr_frac", "weight_decay", "adam_beta1", "adam_beta2",
               "eval_every", "sample_every", "save_every", "price_per_hour", "core_max_per_task", "sft_num_iterations",
               "sft_warmdown_ratio", "sft_eval_every", "max_problems", "base_max_problems",
               "chat_temperature"}  # fmt: skip
FRACTIONS = {"warmup_ratio", "warmdown_ratio", "final_lr_frac", "adam_beta1", "adam_beta2", "sft_init_lr_frac",
             "sft_warmdown_ratio"}  # fmt: skip
CHOICES = {"task_source": ("", "hub", "offline")}
STAGES_TO_SKIP = ("core", "sft", "chat_eval", "export", "chat")
CHAT_TASK_NAMES = ("ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee")

# %% [markdown]
# ### `resolve_parameters`
# Cell, then command line, then preset. Giving one horizon replaces the preset's, whichever that was.


# %%
def resolve_parameters(cell: dict, arguments: list[str] | None = None) -> dict:
    """The parameter cell with `--name=value` arguments applied, types and ranges checked and the preset filled in.

    cell: name -> value for every name of PARAMETER_TYPES. arguments: a command line, or None for a notebook, whose
    command line belongs to the kernel. Raises UserError for an unknown name, a wrong type or an impossible value.
    """
    given = cell | parse_arguments(arguments or [], PARAMETER_TYPES, "nanochat_speedrun")
    chosen = {name: typed_value(name, value, PARAMETER_TYPES[name]) for name, value in given.items()}
    preset = choose_preset(chosen["preset"])
    defaults = PRESETS[preset]
    if any(is_given(chosen[name]) for name in HORIZONS):  # the preset's ratio stays: a batch size may follow from it
        defaults = defaults | dict(num_iterations=-1, target_flops=-1.0)
    filled = {name: value if is_given(value) else defaults.get(name, value) for name, value in chosen.items()}
    for name, value in filled.items():
        is_number = PARAMETER_TYPES[name] in (int, float) and is_given(value)
        if is_number and not (0 < value < math.inf or value == 0 and name in MAY_BE_ZERO):  # nan fails both
            raise UserError(f"{name} is {value}; it must be positive, or -1 for the preset's value.")
        if name in FRACTIONS and value > 1:
            raise UserError(f"{name} is {value}; it is a fraction between 0 and 1.")
        if value not in CHOICES.get(name, (value,)):
            raise UserError(f"{name} is {value!r}; it can be {', '.join(filter(None, CHOICES[name]))} or empty.")
    check_hub_names(filled["hub_repo"], filled["weights_license"])
    skipped_stages(filled["skip"])
    chosen_chat_tasks(filled["chat_tasks"])
    if not filled["task_source"]:
        filled["task_source"] = "offline" if filled["data_source"] == "offline" else "hub"
    return filled | {"preset": preset}


def check_hub_names(hub_repo: str, weights_license: str = "mit") -> None:
    """Raise UserError for what the hub would refuse at the end of the run."""
    try:
        if hub_repo:
            validate_repo_id(hub_repo)
    except HFValidationError as error:
        reason = str(error).rstrip(".")
        raise UserError(
            f"hub_repo is {hub_repo!r}, which is no name for a repository ({reason}). Use name or user/name."
        ) from None
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", weights_license):
        raise UserError(f"weights_license is {weights_license!r}; the hub knows names such as mit or apache-2.0.")


def skipped_stages(text: str) -> set[str]:
    """The stages of "core, sft". Raises UserError for a name that is no stage, or one that cannot be left out."""
    stages = {name.strip() for name in text.split(",") if name.strip()}
    for name in sorted(stages - set(STAGES_TO_SKIP)):
        raise UserError(f"skip has {name!r}; stages that can be left out are {', '.join(STAGES_TO_SKIP)}.")
    return stages


def chosen_chat_tasks(names: str) -> list[str]:
    """The tasks of "ARC-Easy|GSM8K", all of them for "". Raises UserError for a name that is none."""
    chosen = [name.strip() for name in names.split("|")] if names else list(CHAT_TASK_NAMES)
    for name in chosen:
        if name not in CHAT_TASK_NAMES:
            raise UserError(f"chat_tasks has {name!r}; it can have {', '.join(CHAT_TASK_NAMES)}, joined by |.")
    return list(dict.fromkeys(chosen))


def choose_preset(name: str) -> str:
    """The named preset, or with "auto" the one for the device at hand."""
    if name in PRESETS:
        return name
    if name != "auto":
        raise UserError(f"preset is {name!r}; it can be auto, {', '.join(PRESETS)}.")
    if not torch.cuda.is_available():
        return "cpu"
    major, _ = torch.cuda.get_device_capability()
    return "h100" if major >= 9 else "a100" if major == 8 else "t4"


# %% [markdown]
# ### `processes_to_train`
# Eight GPUs are eight processes. A script trains alone or with those that `torchrun` started beside it; only a notebook
# starts more.


# %%
def processes_to_train(requested: int, device_type: str) -> int:
    """How many processes will train; this one alone is 1.

    requested: the parameter `processes`; -1 is the most GPUs that a power of two allows. Raises UserError for a number
    that cannot be had.
    """
    started_by_torchrun, _, _, world_size = get_dist_info()
    if started_by_torchrun:
        if requested not in (-1, world_size):
            raise UserError(f"processes is {requested} and {world_size} were started. Leave it at -1 under torchrun.")
        return world_size
    visible = torch.cuda.device_count() if device_type == "cuda" else 1
    fitting = 2 ** (visible.bit_length() - 1)
    if command_line() is not None:
        if max(requested, fitting) > 1:
            count = fitting if requested == -1 else requested
            sentence = f"start it with torchrun --standalone --nproc_per_node={count}"
            if requested > 1:
                raise UserError(f"processes is {requested} and a script is one process; {sentence}.")
            print0(f"This script trains on one of {visible} GPUs; to train on {count}, {sentence}.")
        return 1
    if requested == -1:
        if fitting < visible:
            print0(f"Training on {fitting} of {visible} GPUs: batch and tables divide over a power of two.")
        return fitting
    if requested > visible and device_type != "cpu":
        raise UserError(f"processes is {requested} and there is {visible} {device_type} device. Ask for fewer, or -1.")
    return requested
