# %% [markdown]
# # nanochat speedrun: from raw text to a language model, in one notebook
#
# {{colab_badge}}
#
# Run all. Every stage shows what it does and leaves its result on disk, so running again skips what is finished and
# continues what was interrupted. No cell needs editing: the parameters below decide everything, and a preset fills them
# in for the machine at hand.
#
# | stage | what comes out | A100 40 GB | CPU, 2 cores |
# | --- | --- | --- | --- |
# | ▶ Plan | the model and the budget, worked out from its depth | seconds | seconds |
# | ▶ Data | shards of text on disk | 2.5 GB to fetch | 15 s |
# | ▶ Tokenizer | 32,768 pieces that text is made of | 1.5 min · 1 ¢ | 3 s |
# | ▶ Pretrain | a base model that continues text | 77 min · 70 ¢ | 4 min |
# | ▶ Base evaluation | bits per byte, samples, CORE | 35 min · 32 ¢ | 30 s |
# | ▶ Fine-tune | a model that answers, and uses a calculator | 50 min · 45 ¢ | 2.5 min |
# | ▶ Chat evaluation | six exams, marked | 85 min · 77 ¢ | 30 s |
# | ▶ Report | one page with all of it | seconds | seconds |
# | ▶ Export | a folder for `transformers` | seconds | seconds |
# | ▶ Chat | a page to talk to it, and a server for programs | | |
# | ▶ Upload | a repository on the hub, if you want one | minutes | |
#
# The A100 column is the original run that the `a100` preset repeats value for value, at $0.54 an hour; its exams were
# taken one question at a time, here they are batched, and nobody has timed that on a GPU yet. The CPU column is the
# `cpu` preset: the same program, a smaller model, and as its text the documentation of the installed Python packages,
# so that it needs no network.

# %% tags=["parameters"]
# Which machine: auto, cpu, t4, a100 or h100. The preset fills in every -1 and "" below.
preset = "auto"  # @param ["auto", "cpu", "t4", "a100", "h100"]
# Where all files go; "" is $NANOCHAT_BASE_DIR or ~/.cache/nanochat.
base_dir = ""  # @param {type:"string"}
# cuda, mps or cpu; "" picks the best that is here.
device_type = ""  # @param {type:"string"}

# Text: fineweb-edu, climbmix, offline, a folder of parquet or text files, or a hub dataset (user/name).
data_source = ""  # @param {type:"string"}
# The column of the parquet files that holds the text; "" finds it.
text_column = ""  # @param {type:"string"}
# Shards to train on; -1 computes the number from the training horizon.
train_shards = -1  # @param {type:"integer"}
# Characters that the tokenizer learns from.
tokenizer_max_chars = -1  # @param {type:"integer"}
# The most characters that it takes of one document.
tokenizer_doc_cap = -1  # @param {type:"integer"}
# Tokens in the vocabulary, the nine special ones included.
vocab_size = -1  # @param {type:"integer"}

# Layers: the one dial from which the rest follows.
depth = -1  # @param {type:"integer"}
# Width for each layer of depth, rounded up to whole heads.
aspect_ratio = -1  # @param {type:"integer"}
# Width of one attention head.
head_dim = -1  # @param {type:"integer"}
# Tokens that the model sees at once.
max_seq_len = -1  # @param {type:"integer"}
# How far back each layer looks, repeated over the layers: L all tokens, S half of them.
window_pattern = ""  # @param {type:"string"}

# How long to train, as a number of steps. This and the next two are three ways to say it; one is enough.
num_iterations = -1  # @param {type:"integer"}
# How long to train, in FLOPs.
target_flops = -1.0  # @param {type:"number"}
# How long to train, in tokens for each scaling parameter.
target_param_data_ratio = -1.0  # @param {type:"number"}
# Sequences in one forward pass; -1 is the most that the memory holds. What does not fit is halved in any case.
device_batch_size = -1  # @param {type:"integer"}
# Tokens in one optimizer step.
total_batch_size = -1  # @param {type:"integer"}

# Learning rate of the embeddings, like the next three at a batch of 524,288 tokens.
embedding_lr = -1.0  # @param {type:"number"}
# Learning rate of the output head.
unembedding_lr = -1.0  # @param {type:"number"}
# Learning rate of the matrices inside the layers (Muon).
matrix_lr = -1.0  # @param {type:"number"}
# Learning rate of the scalars that mix each layer's input.
scalar_lr = -1.0  # @param {type:"number"}
# Weight decay of the matrices, at depth 12.
weight_decay = -1.0  # @param {type:"number"}
# How much of its past AdamW keeps in its mean gradient.
adam_beta1 = -1.0  # @param {type:"number"}
# The same for its mean squared gradient.
adam_beta2 = -1.0  # @param {type:"number"}
# The part of the run in which the learning rate rises.
warmup_ratio = -1.0  # @param {type:"number"}
# The part at the end in which it falls.
warmdown_ratio = -1.0  # @param {type:"number"}
# Where it ends, as a part of its height.
final_lr_frac = -1.0  # @param {type:"number"}

# Steps between validations; 0 is only at the end.
eval_every = -1  # @param {type:"integer"}
# Tokens in a validation.
eval_tokens = -1  # @param {type:"integer"}
# Steps between samples; 0 is only at the end.
sample_every = -1  # @param {type:"integer"}
# Steps between checkpoints; 0 leaves it at one every ten minutes and one at the end.
save_every = -1  # @param {type:"integer"}
# Tokens of each split in the base evaluation.
eval_split_tokens = -1  # @param {type:"integer"}

# Where exam questions and conversations come from; "" is offline with offline text, the hub otherwise.
task_source = ""  # @param ["", "hub", "offline"]
# Questions of each CORE task; 0 is all of them.
core_max_per_task = -1  # @param {type:"integer"}
# Another model of the hub to put through CORE beside this one, such as openai-community/gpt2 (needs transformers).
compare_model = ""  # @param {type:"string"}

# How long to fine-tune, in steps; 0 is once through all conversations.
sft_num_iterations = -1  # @param {type:"integer"}
# Tokens in one step of fine-tuning; -1 without a preset is as in pretraining.
sft_total_batch_size = -1  # @param {type:"integer"}
# Learning rates of fine-tuning, as a part of those of pretraining.
sft_init_lr_frac = -1.0  # @param {type:"number"}
# The part at the end in which they fall to zero.
sft_warmdown_ratio = -1.0  # @param {type:"number"}
# Steps between validations of fine-tuning; 0 is only at the end.
sft_eval_every = -1  # @param {type:"integer"}
# Tokens in such a validation.
sft_eval_tokens = -1  # @param {type:"integer"}
# Conversations that spell a word.
simple_spelling_size = -1  # @param {type:"integer"}
# Conversations that count a letter.
spelling_bee_size = -1  # @param {type:"integer"}

# Exams for the chat model, joined by |, such as ARC-Easy|GSM8K; "" is all six.
chat_tasks = ""  # @param {type:"string"}
# Problems of each exam; 0 is all of them.
max_problems = -1  # @param {type:"integer"}
# Problems that the base model gets too, for comparison; 0 leaves it out.
base_max_problems = -1  # @param {type:"integer"}
# Problems in one batch.
chat_batch_size = -1  # @param {type:"integer"}
# The longest answer, in tokens.
chat_max_new_tokens = -1  # @param {type:"integer"}
# 0 always takes the likeliest token; above it, tokens are drawn.
chat_temperature = -1.0  # @param {type:"number"}
# Answers to each problem, of which one must be right.
chat_num_samples = -1  # @param {type:"integer"}
# Run model-written programs even where they cannot be kept from files and network.
allow_weak_sandbox = False  # @param {type:"boolean"}
# Stages to leave out, joined by commas: core, sft, chat_eval, export, chat.
skip = ""  # @param {type:"string"}

# Repository on the Hugging Face hub, as name or user/name; "" only shows what would be uploaded.
hub_repo = ""  # @param {type:"string"}
# Whether everybody may see it.
hub_public = False  # @param {type:"boolean"}
# Whether a checkpoint goes along, for others to train on.
upload_checkpoint = False  # @param {type:"boolean"}
# Under which licence the weights go there, by the hub's name for it.
weights_license = "mit"  # @param {type:"string"}

# The checkpoint's name; "" is d and the depth.
model_tag = ""  # @param {type:"string"}
# The attention backend; auto takes the fastest that runs here.
attention = "auto"  # @param {type:"string"}
# Whether to compile the model, which takes a minute and is worth it.
torch_compile = True  # @param {type:"boolean"}
# Whether to compute activations a second time instead of keeping them: less memory, about a third more time.
recompute = False  # @param {type:"boolean"}
# Whether large matrices multiply in eight bits (L4, H100 and newer): faster from depth 20 or so.
fp8 = False  # @param {type:"boolean"}
# A name turns on Weights & Biases: online with a WANDB_API_KEY, offline without.
run = ""  # @param {type:"string"}
# Processes that train, one for each GPU; -1 uses all GPUs that this notebook sees.
processes = -1  # @param {type:"integer"}
# What this machine costs in dollars per hour, for the report; 0 leaves the price out.
price_per_hour = 0.0  # @param {type:"number"}

# %% [markdown]
# # ▶ Set up
# Installs what is missing and nothing else. PyTorch is never touched: the one that came with the machine fits its GPU.

# %%
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from math import ceil

source_hash = "{{source_hash}}"
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # before torch is imported
needed = (
    "fastapi filelock huggingface_hub markdown_it matplotlib numpy psutil pyarrow requests rustbpe safetensors "
    "tiktoken tokenizers tqdm uvicorn yaml"
).split()
needed += ["wandb"] * bool(run) + ["transformers"] * bool(compare_model)
needed += ["kernels"] * bool(shutil.which("nvidia-smi"))  # fetches FlashAttention
packages = {"markdown_it": "markdown-it-py", "yaml": "PyYAML", "kernels": "kernels>=0.17,<0.18"}
missing = [packages.get(name, name) for name in needed if importlib.util.find_spec(name) is None]
if missing:
    print("Installing", *missing)
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *missing], check=True)
if importlib.util.find_spec("torch") is None:
    raise ModuleNotFoundError("PyTorch is not installed; get it from pytorch.org for your device, then run again.")

# %%
from nanochat.runtime import (
    choose_compute_dtype,
    compute_init,
    compute_cleanup,
    device_name_of,
    autodetect_device_type,
    get_base_dir,
    lock_base_dir,
    print0,
    rank0_first,
    require_shared_base_dir,
    show_user_errors_plainly,
)
from nanochat.parameters import command_line
from nanochat.settings import PARAMETER_TYPES, processes_to_train, resolve_parameters, skipped_stages

# %% [markdown]
# Now the parameters are checked, and this process (one of several, under `torchrun`) takes its place.

# %%
show_user_errors_plainly()
params = resolve_parameters({name: globals()[name] for name in PARAMETER_TYPES}, command_line())
if params["base_dir"]:
    os.environ["NANOCHAT_BASE_DIR"] = params["base_dir"]
skipped = skipped_stages(params["skip"])
run_lock = lock_base_dir()
# Compiled kernels are kept, so the second start is quick.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(get_base_dir(), "compile_cache"))
ddp, rank, local_rank, world_size, device = compute_init(params["device_type"] or autodetect_device_type())
require_shared_base_dir()
compute_dtype, dtype_reason = choose_compute_dtype(device.type)
training_processes = processes_to_train(params["processes"], device.type)

# %% [markdown]
# # ▶ Plan
# What will be built, before anything is built: first the parts (attention, optimizer, model), then the arithmetic
# that turns a depth into a budget.

# %%
from nanochat.plots import (
    D12_REFERENCE,
    LiveChart,
    compressor_bpb,
    conversation_html,
    plot_bpb_bars,
    plot_conversations,
    plot_marks,
    plot_packing,
    plot_schedules,
    plot_windows,
    show_figure,
    show_html,
    show_markdown,
    show_table,
    tokens_html,
)
from nanochat.attention import flash_attn
from nanochat.attention_kernels import load_sdpa
from nanochat.hub_kernels import load_hub_flash3
from nanochat.attention_selection import select_attention
from nanochat.optim import MuonAdamW
from nanochat.gpt import GPT
from nanochat.precision import LossScaler
from nanochat.fp8 import require_fp8
from nanochat.device_batch import starting_device_batch
from nanochat.planning import (
    PretrainSettings,
    TrainingOptions,
    accumulation_steps,
    estimate_minutes,
    lr_multiplier,
    muon_momentum,
    muon_weight_decay,
    plan_pretraining,
)

# %%
attention_choice = select_attention(device, compute_dtype, params["attention"], compiled=params["torch_compile"])
options = TrainingOptions(compile=params["torch_compile"], recompute=params["recompute"], fp8=params["fp8"])
settings = PretrainSettings(**{name: params[name] for name in PretrainSettings.__dataclass_fields__})
plan = plan_pretraining(settings, params["vocab_size"], training_processes, device, compute_dtype, options.recompute)
settings = plan.settings
if options.fp8:
    require_fp8(device, settings.device_batch_size * settings.max_seq_len, options.compile)
sft_batch = plan.total_batch_size if params["sft_total_batch_size"] == -1 else params["sft_total_batch_size"]
accumulation_steps("sft_total_batch_size", sft_batch, 1, settings.max_seq_len, training_processes)
minutes = estimate_minutes(plan, device, compute_dtype)
model_config = plan.model_config
show_table(
    [
        ("preset", params["preset"]),
        ("device", f"{training_processes} × {device_name_of(device)}"),
        ("precision", f"{str(compute_dtype).removeprefix('torch.')} products, fp32 weights: {dtype_reason}"),
        ("attention", attention_choice.sentence),
        ("model", f"{model_config.n_layer} layers, width {model_config.n_embd}, {model_config.n_head} heads"),
        ("parameters", f"{plan.parameters['total']:,}, of which {plan.scaling_params:,} multiply every token"),
        ("batch", f"{plan.total_batch_size:,} tokens: {plan.gradient_accumulation} × {settings.device_batch_size} "
                  f"sequences × {settings.max_seq_len} on {training_processes} "
                  f"process{'es' if training_processes > 1 else ''}"),
        ("horizon", f"{plan.iterations:,} steps, {plan.tokens:,} tokens, "
                    f"{plan.flops_per_token * plan.tokens:.2e} FLOPs"),
        ("text", params["data_source"]),
        ("lessons and exams", params["task_source"]),
        ("pretraining takes about", "unknown" if minutes is None else f"{minutes:,.0f} minutes"),
        ("files", get_base_dir()),
    ],
    header=("", "this run"),
)  # fmt: skip

# %% [markdown]
# How far back each layer looks, and what the learning rate, momentum and weight decay will do.

# %%
show_figure(plot_windows(model_config.window_sizes(), model_config.sequence_len), "windows")
show_figure(
    plot_schedules(
        plan.iterations,
        lambda step: lr_multiplier(plan, step),
        muon_momentum,
        lambda step: muon_weight_decay(plan, step),
    ),
    "schedules",
)

# %% [markdown]
# # ▶ Data
# Text, as parquet shards of documents. One shard is never trained on: it measures.

# %%
from nanochat.stages import finish_stage, finished_stage, fingerprint_of, source_fingerprint, what_changed
from nanochat.offline_corpus import collect_offline_documents
from nanochat.dataset import (
    check_hub_token,
    epoch_sentence,
    files_holding,
    plan_data,
    prepare_corpus,
    training_characters,
)

# %%
n_shards, sentence = plan_data(
    params["data_source"], plan.tokens, params["train_shards"], params["tokenizer_max_chars"]
)
print0(sentence)
with rank0_first():
    corpus = prepare_corpus(params["data_source"], n_shards, params["text_column"])
print0(f"{len(corpus.train_files)} training shards; {os.path.basename(corpus.val_file)} is for validation.")
print0(epoch_sentence(training_characters(corpus), plan.tokens))

# %% [markdown]
# # ▶ Tokenizer
# The model reads and writes pieces of text, not letters. Which pieces is learned from the data.

# %%
from nanochat.tokenizer import describe_token_bytes, get_token_bytes, get_tokenizer, train_tokenizer
from nanochat.tok_eval import evaluate_tokenizer, tokenizer_report_tables, tokenizer_summary_table
from nanochat.report import get_report, section_slug, without_folders

# %%
report = get_report()
tokenizer_dir = os.path.join(get_base_dir(), "tokenizer")
tokenizer_files = files_holding(corpus, params["tokenizer_max_chars"])
tokenizer_inputs = {
    "files": replace(corpus, train_files=tokenizer_files).fingerprint(),
    "vocab_size": params["vocab_size"],
    "max_chars": params["tokenizer_max_chars"],
    "doc_cap": params["tokenizer_doc_cap"],
}
if finished_stage("tokenizer", tokenizer_inputs) is not None:
    print0("tokenizer: trained earlier, nothing to do")
else:
    reason = what_changed("tokenizer", tokenizer_inputs)
    print0(f"tokenizer: trained anew because {reason}" if reason else "tokenizer: training it")
    with rank0_first():
        if rank == 0:
            started = time.time()
            trained = train_tokenizer(
                tokenizer_files,
                corpus.text_column,
                params["vocab_size"],
                params["tokenizer_max_chars"],
                params["tokenizer_doc_cap"],
            )
            trained.save(tokenizer_dir)
            facts = tokenizer_inputs | {"train_time": time.time() - started}
            report.log("Tokenizer training", [facts, describe_token_bytes(get_token_bytes(tokenizer=trained))])
            report.add_metrics("Tokenizer training", {"wall seconds": facts["train_time"]})
            written = [os.path.join(tokenizer_dir, name) for name in os.listdir(tokenizer_dir)]
            finish_stage("tokenizer", tokenizer_inputs, {}, written)
tokenizer = get_tokenizer()
report.set_provenance(
    {
        "follows": "karpathy/nanochat, commit 5fdd5cd",
        "source hash": source_fingerprint(source_hash),
        "data fingerprint": corpus.fingerprint(),
        "tokenizer fingerprint": tokenizer.fingerprint(),
        "settings fingerprint": fingerprint_of(asdict(settings)),
        "precision": f"{str(compute_dtype).removeprefix('torch.')}: {dtype_reason}",
        "attention": attention_choice.sentence,
        "parameters": params,
    }
)

# %% [markdown]
# A sentence as the model will see it. Hover over a piece for its number.

# %%
sentence = "Tokenizers don't read letters: strawberry is a handful of pieces, 1234567 a few more, и это тоже."
show_html(tokens_html(tokenizer, sentence))

# %% [markdown]
# How many bytes one token covers, on different kinds of text and beside the tokenizers of GPT-2 and GPT-4, which are
# three times as large.

# %%
evaluation_inputs = {"tokenizer": tokenizer.fingerprint(), "files": tokenizer_inputs["files"]}
evaluation = finished_stage("tokenizer evaluation", evaluation_inputs)
if evaluation is None:
    started = time.time()
    with rank0_first():
        evaluation = evaluate_tokenizer(tokenizer, corpus) if rank == 0 else None
    report.log("Tokenizer evaluation", [tokenizer_report_tables(evaluation)] if rank == 0 else [])
    report.add_metrics("Tokenizer evaluation", {"wall seconds": time.time() - started})
    finish_stage("tokenizer evaluation", evaluation_inputs, evaluation)
if rank == 0:
    show_markdown(tokenizer_summary_table(evaluation))

# %% [markdown]
# # ▶ Pretrain
# Random weights in, base model out. It continues where it stopped, so interrupting is safe: the stop button finishes
# the step and saves. Where this notebook sees several GPUs, all of them train.

# %%
from nanochat.dataloader import pack_rows_preview, tokenizing_distributed_data_loader_bos_bestfit
from nanochat.engine import Engine
from nanochat.checkpoint_files import read_meta
from nanochat.checkpoint_manager import checkpoint_folder, load_model
from nanochat.loss_eval import evaluate_bpb, every_byte_batches, first_texts
from nanochat.training_loop import summarize_training, training_times
from nanochat.base_train import pretrain, pretraining_inputs, sample_text
from nanochat.notebook_program import program_so_far
from nanochat.launch import train_on
from nanochat.tracking import open_tracker, read_secret, wandb_eval_record, wandb_train_record

# %% [markdown]
# Some of the first rows: documents packed side by side, each colour one document. The hatched ends were cut to fit.

# %%
if rank == 0:
    show_figure(plot_packing(pack_rows_preview(tokenizer, corpus, rows=96, T=settings.max_seq_len)[::12]), "packing")

# %%
if params["hub_repo"] and (sentence := check_hub_token(read_secret("HF_TOKEN"))):
    print0(sentence)
reference = D12_REFERENCE if settings.depth == 12 else None
chart = LiveChart(plan.iterations, f"base model d{settings.depth}", reference)
tracker = open_tracker(params["run"], "nanochat", params, rank)
training = pretrain(plan, corpus, tokenizer, device, compute_dtype, options)
trained_model = fingerprint_of(pretraining_inputs(plan, corpus, tokenizer))
records = []
try:
    for record in train_on(
        training_processes, training, "pretrain", settings.checkpoint_dir, trained_model, params,
        last_step=plan.iterations,
    ):  # fmt: skip
        records.append(record)
        chart.add(record)
        if not record.replayed:
            if record.val_bpb is not None:
                tracker.log(wandb_eval_record(record))
            if record.step % 100 == 0 and record.loss is not None:
                tracker.log(wandb_train_record(record))
finally:  # also when it is stopped: the picture so far is worth keeping
    chart.finish()
    tracker.finish()

# %% [markdown]
# The numbers, for the report too.

# %%
if rank == 0 and records:  # a checkpoint from elsewhere has no log
    facts = {
        "Number of parameters": plan.parameters["total"],
        "Number of FLOPs per token": f"{plan.flops_per_token:e}",
        "Calculated number of iterations": plan.iterations,
        "Number of training tokens": plan.tokens,
        "Tokens : Scaling params ratio": plan.tokens / plan.scaling_params,
        "DDP world size": training_processes,
    }
    facts |= summarize_training(records, params["price_per_hour"])
    about = {"fingerprint": read_meta(settings.checkpoint_dir, plan.iterations)["fingerprint"]}
    if not report.is_about("Base model training", about) or not all(record.replayed for record in records):
        report.log("Base model training", [facts, f"![training]({chart.file_name()}.png)"])
        about |= {"source hash": source_fingerprint(source_hash), "model config": asdict(model_config)}
        report.add_metrics("Base model training", facts | training_times(records) | about)
    show_table(list(facts.items()), header=("pretraining", ""))

# %% [markdown]
# # ▶ Base evaluation
# What has it learned? The unit is bits per byte of text that it never trained on, the same unit in which file
# compressors work. So they are the first opponents: all three get the same bytes.

# %%
model_tag_used = os.path.basename(settings.checkpoint_dir)
model, _, meta = load_model("base", device, "eval", model_tag=model_tag_used)
validation_texts = first_texts(corpus, "val", 1_000_000)
base_inputs = {
    "model": meta["fingerprint"], "step": meta["step"], "split_tokens": params["eval_split_tokens"],
    "device_batch_size": settings.device_batch_size,
}  # fmt: skip
base_results = finished_stage("base model evaluation", base_inputs)
if base_results is not None:
    print0("base model evaluation: done earlier, nothing to do")
else:
    started = time.time()
    B, T = settings.device_batch_size, settings.max_seq_len
    token_bytes = get_token_bytes(device, tokenizer)
    steps = max(1, params["eval_split_tokens"] // (B * T * world_size))
    base_results = {}
    for split in ("train", "val"):
        loader = tokenizing_distributed_data_loader_bos_bestfit(tokenizer, B, T, split, device=device, corpus=corpus)
        base_results[f"{split} bpb"] = evaluate_bpb(model, loader, steps, token_bytes)
    batches = every_byte_batches(tokenizer, validation_texts, B, T, device)
    base_results["same bytes bpb"] = evaluate_bpb(model, batches, len(batches), token_bytes)
    base_results |= compressor_bpb("".join(validation_texts).encode("utf-8"))
    base_results["samples"] = list(sample_text(model, tokenizer)) if rank == 0 else []
    bos = tokenizer.get_bos_token_id()
    if rank == 0:
        rows, _ = Engine(model, tokenizer).generate_batch([bos], num_samples=8, max_tokens=128, temperature=1.0)
        base_results["unconditioned"] = [tokenizer.decode(row[1:]) for row in rows]
        numbers = {name: value for name, value in base_results.items() if isinstance(value, float)}
        texts = {f"sample {i}": text for i, text in enumerate(base_results["samples"])}
        texts |= {f"unconditioned {i}": text for i, text in enumerate(base_results["unconditioned"])}
        picture = "![bits per byte](bits-per-byte.png)"
        report.log("Base model evaluation", [{"model": f"base {model_tag_used}"} | numbers, picture, texts])
        written = {name: base_results[name] for name in ("samples", "unconditioned")}
        written |= {"model": model_tag_used, "wall seconds": time.time() - started}
        report.add_metrics("Base model evaluation", numbers | written)
    finish_stage("base model evaluation", base_inputs, base_results)

# %%
show_figure(
    plot_bpb_bars(
        {
            "zlib -9": base_results["zlib -9"],
            "xz -9e": base_results["xz -9e"],
            "this model": base_results["same bytes bpb"],
        }
    ),
    "bits-per-byte",
)
show_table(
    [(name, base_results[name]) for name in ("train bpb", "val bpb", "same bytes bpb", "zlib -9", "xz -9e")],
    header=("", "bits per byte"),
)

# %% [markdown]
# What it says when it is given a beginning, always taking the likeliest token; and what it dreams of from nothing.

# %%
if rank == 0:
    show_table([(" ".join(text.split()),) for text in base_results["samples"]], header=("greedy, 16 tokens",))
    show_table([(" ".join(text.split()),) for text in base_results["unconditioned"]], header=("from nothing",))

# %% [markdown]
# ### CORE
# Exams for a model that can only continue text, each with examples of how it is done: which of four endings is the
# likeliest, which word comes next? 0 is guessing and 1 is perfect. Offline there are six small exams, made from the
# validation text; on the hub's side it is the benchmark's 22.

# %%
from tasks.offline_problems import offline_word_problems
from tasks.offline_tasks import prepare_offline_tasks
from nanochat.offline_bundle import prepare_offline_bundle
from nanochat.core_bundle import prepare_core_bundle
from nanochat.core_eval import evaluate_core
from nanochat.core_transformers import load_transformers_model
from nanochat.core_report import core_table, plot_core, write_core_csv

# %%
offline_tasks = params["task_source"] == "offline"
task_source = {"source": params["task_source"], "corpus": corpus.fingerprint() if offline_tasks else None}
if "core" in skipped:
    print0("CORE: left out, as asked")
else:
    with rank0_first():
        bundle_dir = prepare_offline_bundle(corpus) if offline_tasks else prepare_core_bundle()
    for hub_model in filter(None, ["this model", params["compare_model"]]):
        ours = hub_model == "this model"
        name = f"this model, d{settings.depth}" if ours else without_folders(hub_model)
        stage = "CORE" if ours else f"CORE {name.replace('/', '-')}"
        core_inputs = {"tasks": task_source, "max_per_task": params["core_max_per_task"]}
        core_inputs["model"] = [meta["fingerprint"], meta["step"]] if ours else hub_model
        core = finished_stage(stage, core_inputs)
        if core is not None:
            print0(f"{stage}: done earlier, nothing to do")
        else:
            core_model = (model, tokenizer) if ours else load_transformers_model(hub_model, device)
            so_far = f"{stage} so far"  # an interrupted benchmark goes on with its next exam
            core = evaluate_core(
                *core_model,
                device,
                bundle_dir,
                params["core_max_per_task"],
                done=finished_stage(so_far, core_inputs),
                keep=partial(finish_stage, so_far, core_inputs),
            )
            csv_file = write_core_csv(core, f"base_model_{meta['step']:06d}" if ours else hub_model)
            if rank == 0:
                metric = "CORE offline" if offline_tasks else "CORE"  # other exams, not to be compared
                scores = {"model": name, metric: core["core_metric"]} | core["centered_results"]
                report.log(stage, [scores, f"![CORE]({section_slug(stage)}.png)"])
                details = {"accuracy": core["results"], "questions": core["questions"]}
                report.add_metrics(stage, scores | details | {"wall seconds": sum(core["seconds"].values())})
            finish_stage(stage, core_inputs, core, [csv_file] if rank == 0 else [])
            del core_model
        show_table(*core_table(core), caption=name)
        show_figure(plot_core(core, name), section_slug(stage))

# %% [markdown]
# # ▶ Fine-tune
# So far the model continues text. Now it reads conversations and learns the assistant's part in them: to answer, to
# stop, to write a sum between two special tokens and go on with what the calculator says.

# %%
from tasks.common import TaskMixture, TaskSequence
from tasks.hub import hub_rows
from tasks.smoltalk import SmolTalk
from tasks.mmlu import MMLU
from tasks.gsm8k import GSM8K
from tasks.customjson import CustomJSON, identity_conversations
from tasks.spellingbee import SimpleSpelling, SpellingBee
from nanochat.sft_dataloader import preview_sft_rows, render_for_training
from nanochat.chat_sft import SFTSettings, fine_tune, plan_fine_tuning

# %% [markdown]
# The lessons: conversation, multiple choice, word problems, who it is, and the letters of words, which a model that
# reads tokens cannot see. What is learned twice is listed twice.

# %%
with rank0_first():
    data_dir = prepare_offline_tasks(corpus) if offline_tasks else None
fine_tuning = "sft" not in skipped
if not fine_tuning:
    print0("fine-tuning: left out, as asked")
else:
    with rank0_first():
        gsm8k = GSM8K("main", "train", data_dir=data_dir)
        identity = CustomJSON(identity_conversations(data_dir))
        lessons = [
            SmolTalk("train", data_dir=data_dir),
            MMLU("all", "auxiliary_train", data_dir=data_dir),
            gsm8k,
            gsm8k,
            identity,
            identity,
            SimpleSpelling(params["simple_spelling_size"], "train", data_dir=data_dir),
            SpellingBee(params["spelling_bee_size"], "train", data_dir=data_dir),
        ]
        validation_lessons = [
            SmolTalk("test", data_dir=data_dir),
            MMLU("all", "test", data_dir=data_dir, stop=5200),
            GSM8K("main", "test", data_dir=data_dir, stop=420),
        ]
    train_task, val_task = TaskMixture(lessons), TaskSequence(validation_lessons)
    sft_data = task_source | {name: params[name] for name in ("simple_spelling_size", "spelling_bee_size")}
    sft_settings = SFTSettings(
        model_tag=model_tag_used,
        num_iterations=params["sft_num_iterations"] or -1,  # 0 is one pass
        max_seq_len=-1,  # as in pretraining, and so are the batch and the learning rates
        device_batch_size=-1,
        total_batch_size=sft_batch,
        embedding_lr=-1,
        unembedding_lr=-1,
        matrix_lr=-1,
        scalar_lr=-1,
        init_lr_frac=params["sft_init_lr_frac"],
        warmup_ratio=0.0,
        warmdown_ratio=params["sft_warmdown_ratio"],
        final_lr_frac=0.0,
        eval_every=params["sft_eval_every"],
        eval_tokens=params["sft_eval_tokens"],
        save_every=params["save_every"],
        load_optimizer=True,
    )
    sft_plan = plan_fine_tuning(sft_settings, train_task, val_task, tokenizer, sft_data, training_processes)
    show_table([(type(lesson).__name__, len(lesson)) for lesson in lessons], header=("lesson", "conversations"))

# %% [markdown]
# Conversations are packed into rows, whole ones only; what stays empty is padding. Only what the assistant says is
# learned. Below, some rows, and one conversation: green is learned, grey is only read. The calculator's output is grey,
# because the model will never have to write it.

# %%
if fine_tuning:
    T, conversations = sft_plan.settings.max_seq_len, len(train_task)
    sft_rows = preview_sft_rows(tokenizer, train_task, rows=48, T=T)
    per_row = sum(len(segments) for segments, _ in sft_rows) / len(sft_rows)
    sft_steps = params["sft_num_iterations"] or ceil(conversations / per_row * T / sft_plan.settings.total_batch_size)
    print0(f"{conversations:,} conversations, about {per_row:.1f} in a row; about {sft_steps:,} steps")
    if rank == 0:
        show_figure(plot_conversations(sft_rows[::6]), "conversations")
        show_html(conversation_html(tokenizer, *render_for_training(tokenizer, lessons[-1], 0, T)))

# %%
model = None  # the base model's memory is needed now
if fine_tuning:
    sft_chart = LiveChart(sft_steps, f"fine-tuning d{settings.depth}")
    tracker = open_tracker(params["run"], "nanochat-sft", params, rank)
    training = fine_tune(sft_plan, train_task, val_task, tokenizer, device, compute_dtype, options)
    sft_records = []
    try:
        for record in train_on(
            training_processes, training, "finetune", sft_plan.checkpoint_dir, fingerprint_of(sft_plan.inputs), params
        ):
            sft_records.append(record)
            sft_chart.add(record)
            if not record.replayed:
                if record.val_bpb is not None:
                    tracker.log(wandb_eval_record(record))
                if record.step % 10 == 0 and record.loss is not None:
                    tracker.log(wandb_train_record(record))
    finally:
        sft_chart.finish()
        tracker.finish()

# %%
if fine_tuning and rank == 0 and sft_records:
    facts = {
        "Number of iterations": sft_records[-1].step,
        "Number of conversations": len(train_task),
        "DDP world size": training_processes,
    }
    facts |= summarize_training(sft_records, params["price_per_hour"])
    tuned = read_meta(checkpoint_folder("sft", model_tag_used), sft_records[-1].step)
    about = {"fingerprint": tuned["fingerprint"]}
    if not report.is_about("SFT", about) or not all(record.replayed for record in sft_records):
        report.log("SFT", [asdict(sft_plan.settings), facts, f"![fine-tuning]({sft_chart.file_name()}.png)"])
        report.add_metrics("SFT", facts | training_times(sft_records) | about)
    show_table(list(facts.items()), header=("fine-tuning", ""))

# %% [markdown]
# # ▶ Chat evaluation
# Six exams, and the base model sits them too: what it can do already was not learned in fine-tuning. Programs that the
# model writes run in a sandbox, because nobody has read them.

# %%
from nanochat.execution import check_solution, sandbox_level
from tasks.arc import ARC
from tasks.humaneval import HumanEval
from nanochat.chat_eval import (
    CHAT_CHANCE,
    D12_CHAT_REFERENCE,
    ChatResult,
    chatcore_metric,
    chat_tasks_to_run,
    run_chat_eval,
)

# %%
marks = {"base": {}, "sft": {}}  # checkpoint -> task -> result
chat_tasks, sentence = chat_tasks_to_run(params["chat_tasks"], params["allow_weak_sandbox"])
print0("chat evaluation: left out, as asked" if "chat_eval" in skipped else sentence)
for source, results in marks.items():
    limits = [n for n in (params["max_problems"], params["base_max_problems"] if source == "base" else 0) if n]
    if "chat_eval" in skipped or (source == "base" and not params["base_max_problems"]):
        continue
    if source == "sft" and not fine_tuning:
        print0("There is no fine-tuned model to evaluate.")
        continue
    model, _, meta = load_model(source, device, "eval", model_tag=model_tag_used)
    for task in chat_tasks:
        stage = f"chat evaluation {source} {task}"
        chat_inputs = task_source | {"model": [meta["fingerprint"], meta["step"]], "problems": min(limits, default=0)}
        chat_inputs |= {name: params[f"chat_{name}"] for name in ("max_new_tokens", "num_samples", "temperature")}
        done = finished_stage(stage, chat_inputs)
        if done is not None:
            print0(f"{stage}: done earlier, nothing to do")
            results[task] = ChatResult(**done)
            continue
        results[task] = run_chat_eval(
            task,
            model,
            tokenizer,
            data_dir,
            max_problems=min(limits, default=0),
            batch_size=params["chat_batch_size"],
            max_new_tokens=params["chat_max_new_tokens"],
            num_samples=params["chat_num_samples"],
            temperature=params["chat_temperature"],
            allow_weak=params["allow_weak_sandbox"],
        )
        finish_stage(stage, chat_inputs, asdict(results[task]))
    model = None

# %% [markdown]
# The marks. ChatCORE is how far from guessing to perfect the model got, averaged over the exams. SpellingBee asks about
# words from the list that the model was drilled with, so the mean without it says more about everything else.

# %%
if marks["sft"] and rank == 0:
    columns = ["exam", "problems", "guessing", "base model", "fine-tuned"] + ["original d12"] * (not offline_tasks)
    rows = []
    for task, result in marks["sft"].items():
        base = marks["base"].get(task)
        row = (task, result.total, CHAT_CHANCE.get(task, 0.0), base and base.accuracy, result.accuracy)
        rows.append((*row, D12_CHAT_REFERENCE[task])[: len(columns)])
    show_table(rows, columns)
    candidates = {"base model": [row[3] for row in rows]} if marks["base"] else {}
    candidates |= {"fine-tuned": [row[4] for row in rows]}
    show_figure(plot_marks([row[0] for row in rows], [row[2] for row in rows], candidates), "chat-evaluation")
    scores = {task: result.accuracy for task, result in marks["sft"].items()}
    chatcore = {
        "ChatCORE": chatcore_metric(marks["sft"]),
        "ChatCORE without SpellingBee": chatcore_metric(marks["sft"], with_spelling=False),
    }
    scores |= {name: value for name, value in chatcore.items() if value is not None}
    show_table(list(scores.items()), header=("fine-tuned model", ""))
    if marks["base"]:
        task = max(marks["base"], key=lambda task: marks["sft"][task].accuracy - marks["base"][task].accuracy)
        before, after = (marks[source][task] for source in ("base", "sft"))
        print0(
            f"What fine-tuning taught it most: {task}, {before.accuracy:.1%} of {before.total} problems before and "
            f"{after.accuracy:.1%} of {after.total} after, on problems that it had not seen."
        )
    report.log("Chat evaluation sft", [scores, "![marks](chat-evaluation.png)"])
    taken = [result for results in marks.values() for result in results.values()]
    details = {"exams": params["task_source"], "wall seconds": sum(result.seconds for result in taken)}
    details |= {"problems": {task: result.total for task, result in marks["sft"].items()}}
    details |= {"base problems": {task: result.total for task, result in marks["base"].items()}}
    details |= {"base model": {task: result.accuracy for task, result in marks["base"].items()}}
    report.add_metrics("Chat evaluation sft", scores | details)

# %% [markdown]
# Some of the papers.

# %%
if rank == 0:
    for task, result in marks["sft"].items():
        papers = [(paper["question"], paper["answer"], "✓" if paper["passed"] else "✗") for paper in result.papers[:3]]
        show_table(
            [(text[:400], answer[:400], mark) for text, answer, mark in papers], ("question", "answer", ""), task
        )

# %% [markdown]
# And what it says when it is simply talked to. What it asks its calculator stands between ⟦ and ⟧.

# %%
from nanochat.chat_terminal import sample_answers

# %%
chat_source = "sft" if fine_tuning else "base"
chat_model, _, chat_meta = load_model(chat_source, device, "eval", model_tag=model_tag_used)
if chat_source == "sft" and rank == 0:
    started = time.time()
    chat_samples = sample_answers(chat_model, tokenizer)
    report.add_metrics("Chat samples", {"samples": chat_samples, "wall seconds": time.time() - started})
    show_table([tuple(sample.values()) for sample in chat_samples], header=("you", "the model"))

# %% [markdown]
# # ▶ Report
# Everything above on one page: `report.html` is one file to send to a friend, `report.md` has the pictures beside it,
# and all numbers are again in `metrics.json` for programs.

# %%
from nanochat.report_page import generate_report

# %%
report_file = generate_report(report)

# %% [markdown]
# # ▶ Export
# The model as a folder that the `transformers` library loads, with its tokenizer and its chat template.

# %%
from nanochat.export_modeling import EXPORT_MODELING_SOURCE
from nanochat.export import export_checkpoint, export_files

# %%
export_dir = os.path.join(get_base_dir(), "export", model_tag_used)
export_inputs = {"model": [chat_meta["fingerprint"], chat_meta["step"]], "source": chat_source}
export_inputs |= {"code": source_fingerprint(source_hash)}  # a part of it travels with the model
if "export" in skipped:
    print0("export: left out, as asked")
elif finished_stage("export", export_inputs) is not None:
    print0(f"export: done earlier, nothing to do: {export_dir}")
else:
    with rank0_first():
        if rank == 0:
            export_checkpoint(chat_source, export_dir, model_tag_used)
    finish_stage("export", export_inputs, {}, export_files(export_dir))

# %% [markdown]
# # ▶ Chat
# A page to talk to the model, here below, and beside it a server for programs that know OpenAI's protocol. It runs as
# long as this notebook's kernel.

# %%
from nanochat.chat_server import ChatServer
from nanochat.chat_page import CHAT_PAGE, show_chat

# %%
if "chat" in skipped:
    print0("chat: left out, as asked")
elif chat_source != "sft":
    print0("chat: a base model only continues text; fine-tune it to talk to it.")
elif command_line() is not None:
    print0("chat: a script does not wait for visitors; start tools/chat.py, or open the notebook.")
else:
    port, token = 0, ""  # any that is free, and a new one
    if earlier := globals().get("chat_server"):  # of an earlier run of this cell: pages that are open stay good
        earlier.stop()
        port, token = earlier.port, earlier.token
    name = f"nanochat-{model_tag_used}"
    chat_server = ChatServer(chat_model, tokenizer, CHAT_PAGE, name, port=port, token=token).start()
    show_chat(chat_server.port, chat_server.token)

# %% [markdown]
# # ▶ Upload
# Export and report can go to the Hugging Face hub, as one repository with a model card. This shows what would go. It
# goes when `hub_repo` names the repository and there is an access token: in Colab's secrets or the environment as
# `HF_TOKEN`, or from `hf auth login`. Optimizer state and training data never leave.

# %%
from nanochat.upload import find_hub_token, plan_upload, upload_to_hub

# %%
if "export" in skipped:
    print0("upload: left out, because the export was")
elif rank == 0:
    trained_in = checkpoint_folder(chat_source, model_tag_used) if params["upload_checkpoint"] else None
    upload_plan = plan_upload(export_dir, chat_source, trained_in, params["data_source"], params["weights_license"])
    token = find_hub_token() if params["hub_repo"] else None
    upload_to_hub(upload_plan, params["hub_repo"], token, private=not params["hub_public"])

# %%
compute_cleanup()
