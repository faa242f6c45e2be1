# %% [markdown]
# ## Settings
#
# The challenge configures its scripts through environment variables. Here each of them is a parameter of the same name
# in lower case, and there are three ways to set it: the notebook's cell, a command line (`--matrix_lr=0.02`), and the
# environment (`MATRIX_LR=0.02`), as in the published commands. What nobody sets comes from a preset. All of it is
# printed and logged before the first step, because a record whose hyper-parameters are known only to its author cannot
# be checked by anyone.

# %%
import ast
import difflib
import math
import re

import torch

from nanochat.parameters import is_given, parse_arguments, typed_value
from nanochat.runtime import UserError

# %% [markdown]
# ### `GOLF_BASELINE`
# The defaults of the challenge's own script, under its names, and what this notebook adds to them.

# %%
ARTIFACT_LIMIT_BYTES = 16_000_000  # decimal, the script included

GOLF_BASELINE = dict(
    preset="auto", base_dir="", device_type="", device_batch_tokens=0,
    data_source="hub", variant="sp1024", train_shards=80, data_path="", tokenizer_path="", run_id="", seed=1337,
    torch_compile=1, save_every=0, evaluate="", skip="", author="unnamed", github_id="unnamed",
    val_batch_size=524_288, val_loss_every=1000, train_log_every=200, iterations=20_000, warmdown_iters=1200,
    warmup_steps=20, train_batch_tokens=524_288, train_seq_len=1024, max_wallclock_seconds=600.0,
    vocab_size=1024, num_layers=9, model_dim=512, num_heads=8, num_kv_heads=4, mlp_mult=2, tie_embeddings=1,
    rope_base=10_000.0, logit_softcap=30.0, qk_gain_init=1.5, tied_embed_init_std=0.005, bf16_rope=0,
    tied_embed_lr=0.05, embed_lr=0.6, head_lr=0.008, matrix_lr=0.04, scalar_lr=0.04, beta1=0.9, beta2=0.95,
    adam_eps=1e-8, muon_momentum=0.95, muon_backend_steps=5, muon_momentum_warmup_start=0.85,
    muon_momentum_warmup_steps=500, grad_clip_norm=0.0,
    control_tensor_name_patterns="attn_scale,attn_scales,mlp_scale,mlp_scales,resid_mix,resid_mixes,q_gain,"
                                 "skip_weight,skip_weights",
    int8_keep_float_fp32_name_patterns="attn_scale,attn_scales,mlp_scale,mlp_scales,resid_mix,resid_mixes,q_gain,"
                                       "skip_weight,skip_weights",
    int8_original_floor=2,
)  # fmt: skip

# %% [markdown]
# ### `SEQ4096_PRESETS`
# `record` is the published run, `baseline` what it was compared with. `cpu` is the same program at the size of a coffee
# break: fewer and shorter everything, and higher learning rates, because there are few steps.

# %%
SEQ4096_RECORD = GOLF_BASELINE | dict(
    train_seq_len=4096, train_batch_tokens=393_216, warmdown_iters=3000, tied_embed_lr=0.030, matrix_lr=0.020,
    scalar_lr=0.020, muon_momentum=0.99, muon_momentum_warmup_start=0.92, muon_momentum_warmup_steps=1500,
)  # fmt: skip
SEQ4096_PRESETS = {
    "record": SEQ4096_RECORD,
    "baseline": GOLF_BASELINE,
    "cpu": SEQ4096_RECORD | dict(
        data_source="offline", torch_compile=0, num_layers=6, model_dim=128, num_heads=4, num_kv_heads=2,
        train_seq_len=512, train_batch_tokens=8192, val_batch_size=65_536, iterations=150, warmdown_iters=60,
        warmup_steps=1, max_wallclock_seconds=0.0, val_loss_every=30, train_log_every=1, save_every=50,
        muon_momentum=0.95, muon_momentum_warmup_start=0.85, muon_momentum_warmup_steps=50,
        tied_embed_lr=0.1, matrix_lr=0.04, scalar_lr=0.04,  # 2.079 bits per byte; with the record's own 2.134
    ),
}  # fmt: skip

# %% [markdown]
# ### `RECURRENT_PRESETS`
# The second system. `h100` holds the values that the draft of its design names where they can work, and those of the
# leaderboard's records where it names none; `looped` those of the records for a model that repeats only its middle;
# `cpu` the same program in small, with an artifact limit of its own, so that there is something to solve for.

# %%
RECURRENT_DEFAULTS = GOLF_BASELINE | dict(
    variant="sp8192", train_shards=128, vocab_size=8192, architecture="recurrent",
    model_dim=768, num_heads=12, mlp_mult=4, qk_gain_init=5.25, num_unique_layers=3, num_recurrences=8,
    num_eval_recurrences=0, train_recurrences="", iteration_embeddings=1, parallel_residuals=1,
    num_layers=11, loop_start=3, loop_end=5, num_loops=2, enable_looping_at=0.35, parallel_residual_start=7,
    rope_dims=16, warmdown_iters=3500, warmdown_fraction=0.7, embed_lr=0.05, embed_wd=0.085, adam_wd=0.02,
    muon_weight_decay=0.09, equalise_rows=1, grad_clip_norm=0.3, swa_start_frac=0.4, ema_decay=0.997,
    gptq_bits=6, gptq_group_size=128, gptq_calibration_batches=64, gptq_damp=0.01, gptq_reserve_seconds=12.0,
    matrix_clip_sigmas=0.0, embed_bits=8, embed_clip_sigmas=20.0, keep_float_numel=65_536, compressor="auto",
    artifact_limit_bytes=ARTIFACT_LIMIT_BYTES, sw_seq_len=1024, sw_stride=64,
    ttt_mode="sgd", ttt_chunk_tokens=32_768, ttt_epochs=3, ttt_lr=0.005, ttt_momentum=0.9, ttt_grad_clip=1.0,
    ttt_batch_seqs=32, ttt_params="mlp.proj", ttt_layers="all", ttt_lora_rank=8, ttt_lora_lr=0.01, ttt_chunk_size=256,
    ttt_eval_seq_len=1024, ttt_batch_size=64, ablation_steps=0,
    control_tensor_name_patterns="attn_scale,mlp_scale,resid_mix,q_gain,skip_weight,skip_gate,log_alpha,iter_embed",
)  # fmt: skip
for unused in ("tied_embed_lr", "head_lr", "tie_embeddings", "int8_keep_float_fp32_name_patterns",
               "int8_original_floor", "bf16_rope"):  # fmt: skip
    del RECURRENT_DEFAULTS[unused]
RECURRENT_PRESETS = {
    "h100": RECURRENT_DEFAULTS,
    "looped": RECURRENT_DEFAULTS | dict(
        architecture="looped", model_dim=512, num_heads=8, train_seq_len=2048, sw_seq_len=2048, ttt_eval_seq_len=2048,
        train_batch_tokens=786_432, embed_lr=0.03, matrix_lr=0.02, scalar_lr=0.02, muon_weight_decay=0.085,
        muon_momentum=0.99, muon_momentum_warmup_start=0.92, muon_momentum_warmup_steps=1500,
    ),
    "cpu": RECURRENT_DEFAULTS | dict(
        data_source="offline", variant="sp1024", vocab_size=1024, torch_compile=0, model_dim=0, num_heads=4,
        num_kv_heads=2, num_unique_layers=2, num_recurrences=3, train_seq_len=256, train_batch_tokens=8192,
        val_batch_size=131_072, iterations=80, warmup_steps=1, max_wallclock_seconds=0.0, val_loss_every=20,
        train_log_every=1, save_every=40, muon_momentum_warmup_steps=40, artifact_limit_bytes=410_000,
        num_layers=4, loop_start=1, loop_end=2, num_loops=1, parallel_residual_start=3, rope_dims=8, ttt_mode="lora",
        keep_float_numel=1024, gptq_calibration_batches=16, sw_seq_len=256, ttt_chunk_tokens=8192, ttt_epochs=1,
        ttt_chunk_size=128, ttt_eval_seq_len=256, ablation_steps=4,
    ),
}  # fmt: skip

# %% [markdown]
# ### `resolve_golf_parameters`
# Command line, then cell, then environment, then preset.

# %%
MAY_BE_ZERO_IN_GOLF = {
    "seed", "torch_compile", "save_every", "device_batch_tokens", "val_loss_every", "warmdown_iters", "warmup_steps",
    "max_wallclock_seconds", "tie_embeddings", "bf16_rope", "muon_momentum", "muon_momentum_warmup_start",
    "muon_momentum_warmup_steps", "grad_clip_norm", "int8_original_floor", "beta1", "beta2", "model_dim",
    "num_eval_recurrences", "iteration_embeddings", "parallel_residuals", "loop_start", "num_loops",
    "enable_looping_at", "parallel_residual_start", "warmdown_fraction", "embed_wd", "adam_wd", "muon_weight_decay",
    "equalise_rows", "swa_start_frac", "matrix_clip_sigmas", "gptq_reserve_seconds", "ttt_momentum", "ablation_steps",
}  # fmt: skip


def resolve_golf_parameters(
    cell: dict, presets: dict[str, dict], arguments: list[str] | None = None, environment: dict | None = None
) -> tuple[dict, dict]:
    """(every parameter with the value that takes effect, those of them that were given, the preset's name aside).

    cell: the notebook's parameters, where -1 and "" mean "not given". presets: of the notebook; the first is the one
    for a GPU, "cpu" for everything else. arguments: a command line, or None. environment: os.environ or the like.
    Raises UserError for an unknown name, a wrong type or an impossible value.
    """
    types = {name: type(value) for name, value in next(iter(presets.values())).items()}
    for name in cell.keys() - types.keys():
        near = difflib.get_close_matches(name, types, 1)
        raise UserError(f"there is no parameter {name!r}" + (f"; did you mean {near[0]!r}?" if near else "."))
    chosen = {name: environment[name.upper()] for name in types if (environment or {}).get(name.upper())}
    chosen |= {name: value for name, value in cell.items() if is_given(value)}
    chosen |= parse_arguments(arguments or [], types, "train_gpt.py")
    given = {name: typed_value(name, value, types[name]) for name, value in chosen.items()}
    given = {name: value for name, value in given.items() if is_given(value)}
    preset = given.pop("preset", "auto")
    if preset == "auto":
        on_gpu = torch.cuda.is_available() and given.get("device_type", "cuda") == "cuda"
        preset = next(iter(presets)) if on_gpu else "cpu"
    if preset not in presets:
        raise UserError(f"preset is {preset!r}; it can be auto, {', '.join(presets)}.")
    params = presets[preset] | given | {"preset": preset}
    size = re.fullmatch(r"(?:sp|byte)(\d+)", params["variant"])
    if "variant" in given and "vocab_size" not in given and size:
        params["vocab_size"] = int(size[1])  # sp4096 says how many tokens it has
    for name, value in params.items():
        if name.endswith("_name_patterns"):
            params[name] = ",".join(filter(None, map(str.strip, value.split(","))))
        may_be_zero = value == 0 and name in MAY_BE_ZERO_IN_GOLF
        if types[name] in (int, float) and not (0 < value < math.inf or may_be_zero):
            raise UserError(f"{name} is {value}; it must be positive, or -1 for the preset's value.")
    refuse_impossible_settings(params)
    return params, given


BELOW_ONE = ("beta1", "beta2", "muon_momentum", "muon_momentum_warmup_start", "ema_decay", "enable_looping_at")
AT_MOST_ONE = ("warmdown_fraction", "swa_start_frac")


def refuse_uneven_heads(model_dim: int, num_heads: int, num_kv_heads: int) -> None:
    """Raise UserError when a width cannot be cut into such heads."""
    if model_dim % num_heads or num_heads % num_kv_heads or model_dim // num_heads % 2:
        raise UserError(
            f"model_dim {model_dim}, num_heads {num_heads} and num_kv_heads {num_kv_heads} do not "
            "fit: the width must be an even multiple of the heads, and the heads a multiple of the key-value heads."
        )


def refuse_impossible_settings(params: dict) -> None:
    """Raise UserError for what would only be noticed after the download or the training, or not at all."""
    for name in BELOW_ONE:
        if params.get(name, 0) >= 1:
            raise UserError(f"{name} is {params[name]}; it must be below 1.")
    for name in AT_MOST_ONE:
        if params.get(name, 0) > 1:
            raise UserError(f"{name} is {params[name]}; it must be at most 1.")
    for name, value in params.items():
        if name.endswith("_name_patterns") and not value:
            raise UserError(f"{name} names nothing. Write parts of names, joined by commas.")
    refuse_uneven_heads(params["model_dim"], params["num_heads"], params["num_kv_heads"])
    if params["run_id"] and not re.fullmatch(r"\w[\w.+-]*", params["run_id"], re.A):
        raise UserError(f"run_id is {params['run_id']!r}; it names a folder and may hold letters, digits and _ . + -.")
    if params["data_path"] and not params["tokenizer_path"]:
        raise UserError("data_path is given and tokenizer_path is not. Name the tokenizer that wrote those shards.")
    fitting = [f"{kind}{params['vocab_size']}" for kind in ("sp", "byte")]
    if not params["data_path"] and params["variant"] not in fitting:
        raise UserError(
            f"the variant {params['variant']!r} does not have vocab_size {params['vocab_size']} tokens. Leave one of "
            "them out, or correct it; variants are named like sp1024 or byte260."
        )
    if "ttt_mode" not in params:  # the first system
        if params["int8_original_floor"] > 2:
            raise UserError(f"int8_original_floor is {params['int8_original_floor']}; it can be 0, 1 or 2.")
        return
    if params["architecture"] not in ("recurrent", "looped"):
        raise UserError(f"architecture is {params['architecture']!r}; it can be recurrent or looped.")
    if params["ttt_mode"] not in ("off", "sgd", "lora"):
        raise UserError(f"ttt_mode is {params['ttt_mode']!r}; it can be off, sgd or lora.")
    if params["compressor"] not in ("auto", "brotli", "lzma", "zlib"):
        raise UserError(f"compressor is {params['compressor']!r}; it can be auto, brotli, lzma or zlib.")
    if params["sw_stride"] > params["sw_seq_len"]:
        raise UserError(
            f"sw_stride {params['sw_stride']} is more than sw_seq_len {params['sw_seq_len']}: windows would leave gaps."
        )
    if params["ttt_mode"] != "off" and params["ttt_chunk_tokens"] < params["sw_seq_len"]:
        raise UserError(
            f"ttt_chunk_tokens {params['ttt_chunk_tokens']} is less than sw_seq_len {params['sw_seq_len']}, so there "
            "would be nothing to train on. Use longer chunks or shorter windows."
        )
    if not re.fullmatch(r"([1-9]\d*(\|[1-9]\d*)*)?", params["train_recurrences"]):
        raise UserError(f"train_recurrences is {params['train_recurrences']!r}; write numbers of rounds as in 4|8.")
    scored = params["num_eval_recurrences"] or params["num_recurrences"]
    trained = [int(depth) for depth in params["train_recurrences"].split("|") if depth] or [params["num_recurrences"]]
    if params["architecture"] == "recurrent" and scored not in trained:
        raise UserError(
            f"the file would be scored with {scored} rounds, and the training has {trained}. "
            f"Add {scored} to train_recurrences, or change num_eval_recurrences."
        )
    cap, reserve = params["max_wallclock_seconds"], params["gptq_reserve_seconds"]
    if 0 < cap <= reserve:
        raise UserError(
            f"max_wallclock_seconds is {cap:g} and gptq_reserve_seconds {reserve:g}, so no time is left to train. "
            "Raise the one or lower the other."
        )


def golf_skipped(text: str, stages: tuple[str, ...]) -> set[str]:
    """The stages of "audit, submit". Raises UserError for a name that is none of `stages`."""
    skipped = {name.strip() for name in text.split(",") if name.strip()}
    for name in sorted(skipped - set(stages)):
        raise UserError(f"skip has {name!r}; stages that can be left out are {', '.join(stages)}.")
    return skipped


# %% [markdown]
# ### `golf_accumulation_steps`
# A step has eight slices whatever the number of processes, so that number must divide eight.


# %%
def golf_accumulation_steps(world_size: int) -> int:
    """Micro-steps per step: 8 / world_size. Raises UserError for other numbers of processes. Golf spec section 2.5."""
    if 8 % world_size:
        raise UserError(f"{world_size} processes do not divide the eight slices of a step. Start 1, 2, 4 or 8.")
    return 8 // world_size


# %% [markdown]
# ### `frozen_parameters`
# A submitted script says what it does without being asked: the values that took effect are written into its parameter
# cell. What belongs to one machine or one run stays open: the seed, and where files lie.

# %%
OPEN_PARAMETERS = {
    "base_dir", "device_type", "device_batch_tokens", "data_path", "tokenizer_path", "run_id", "seed", "evaluate",
    "skip", "author", "github_id",
}  # fmt: skip


def open_parameters(params: dict) -> set[str]:
    """OPEN_PARAMETERS, and the source of the data where that is a folder."""
    return OPEN_PARAMETERS | ({"data_source"} if params.get("data_source", "hub") not in ("hub", "offline") else set())


def public_settings(params: dict) -> dict:
    """What a log and a README tell: every setting that takes effect, but not where files lie and who ran it."""
    idle = open_parameters(params) - {"seed"}
    if "tied_embed_lr" in params:
        idle |= {"embed_lr", "head_lr"} if params["tie_embeddings"] else {"tied_embed_lr"}
    return {name: value for name, value in params.items() if name not in idle}


def frozen_parameters(source: str, params: dict) -> str:
    """The program with `params` as the values of its parameter cell, where they do not stay open."""
    tree, done = ast.parse(source), set()
    for node in tree.body:
        name = node.targets[0].id if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) else ""
        if name in params and name not in done:
            not_given = -1 if isinstance(params[name], int) else ""
            node.value = ast.Constant(not_given if name in open_parameters(params) else params[name])
            done.add(name)  # the first assignment is the cell's; a later one is something else
    return ast.unparse(ast.fix_missing_locations(tree))
