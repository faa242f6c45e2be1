# %% [markdown]
# ## The page
#
# What one sends to a friend: one page that says what was trained, on what, for how long and for how much, how good it
# got beside what others got, and what it says when it is asked. The friend may read it in a browser (`report.html`,
# one file with its pictures inside), anywhere Markdown is shown (`report.md`, with the pictures beside it), or with a
# program (`metrics.json`).
#
# It is made from whatever the stages have left, so it can be made at any time: after the tokenizer, without CORE, and
# twice the same from the same. Two rules keep it honest. Published scores appear only beside the published exams,
# never beside the offline ones. And what a model wrote stays text, whatever it looks like.

# %%
import base64
import html
import re
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

from nanochat.base_train import SAMPLE_PROMPTS
from nanochat.chat_eval import CHAT_CHANCE, D12_CHAT_REFERENCE
from nanochat.core_report import GPT2_CORE, ORIGINAL_D12_CENTERED, ORIGINAL_D12_CORE
from nanochat.plots import D12_REFERENCE, numeric_columns, table_cell
from nanochat.report import (
    REPORT_RL_SECTIONS,
    REPORT_SECTIONS,
    Report,
    SilentReport,
    code_span,
    fenced_text,
    plain_lines,
    report_lines,
    section_slug,
)
from nanochat.runtime import atomic_path, print0, write_atomic
from nanochat.settings import skipped_stages

# %% [markdown]
# ### Words and numbers
# Exact numbers go into tables; sentences say "7.3 million" and "3 min 16 s".


# %%
def spoken_count(number: float) -> str:
    """7340296 -> "7.34 million"."""
    for size, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{number / size:.3g} {name}" if number / size < 999.5 else f"{number / size:.0f} {name}"
    return f"{number:,.0f}"


def spoken_seconds(seconds: float) -> str:
    """196.4 -> "3 min 16 s"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min"


def spoken_price(dollars: float) -> str:
    """0.0142 -> "1.4 ¢"."""
    if dollars >= 0.995:
        return f"${dollars:,.2f}"
    if dollars < 0.0005:
        return "under 0.1 ¢"
    return f"{100 * dollars:.1f} ¢" if dollars < 0.0995 else f"{100 * dollars:.0f} ¢"


def spoken_list(words: list[str]) -> str:
    """["a", "b", "c"] -> "a, b and c"."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def markdown_table(rows, header) -> list[str]:
    """A table in Markdown, numbers on the right and as `table_cell` writes them; strings are Markdown already."""
    rule = ["---:" if right else "---" for right in numeric_columns(rows, header)]
    cells = [header, rule, *([table_cell(value).replace("|", "\\|") for value in row] for row in rows)]
    return [*("| " + " | ".join(row) + " |" for row in cells), ""]


# %% [markdown]
# ### What is on the page
# A stage that was left out this time may have left its numbers in an earlier run, with another model perhaps. They
# wait in the folder, but they are not shown. The time and the price are added up over the stages, each of which knows
# its own: between the first and the last may lie a night or a week in which the machine did something else.


# %%
def shown_sections(names, parameters: dict) -> list[str]:
    """Those of the sections that belong to a run with these parameters."""
    skipped = skipped_stages(parameters.get("skip", ""))
    compared = f"CORE {parameters['compare_model'].replace('/', '-')}" if parameters.get("compare_model") else None
    hidden = set()
    if "core" in skipped:
        hidden |= {name for name in names if name.startswith("CORE")}
    if "compare_model" in parameters:
        hidden |= {name for name in names if name.startswith("CORE ") and name != compared}
    if "sft" in skipped:
        hidden |= {"SFT", "Chat samples", "Chat evaluation sft"}
    if "chat_eval" in skipped:
        hidden |= {"Chat evaluation sft"}
    return [name for name in names if name not in hidden]


def run_metrics(metrics: dict) -> dict:
    """The section "Run": wall clock by stage and in all, without RL, and the price; None for what nobody knows."""
    parameters = metrics.get("Provenance", {}).get("parameters", {})
    shown = [name for name in shown_sections(metrics, parameters) if name not in REPORT_RL_SECTIONS]
    spent = {name: metrics[name]["wall seconds"] for name in shown if metrics[name].get("wall seconds") is not None}
    total = sum(spent.values()) if spent else None
    rate = parameters.get("price_per_hour") or None
    price = rate * total / 3600 if rate and total is not None else None
    return {"wall seconds by stage": spent, "total wall seconds": total, "price in dollars": price}


# %% [markdown]
# ### At a glance
# From "Base model training" come `Number of parameters`, `Number of training tokens`, `training seconds` and
# `model config` (the fields of a GPTConfig); from "SFT" `training seconds` and `Number of conversations`; the choices
# are in "Provenance" under `parameters`.

# %%
PAGE_TEXTS = {
    "offline": "the documentation of the Python packages on this machine",
    "fineweb-edu": "FineWeb-Edu, educational pages of the web",
    "climbmix": "ClimbMix, a blend of web text",
}


def text_source(parameters: dict) -> str | None:
    """What the model read, in words."""
    source = parameters.get("data_source")
    return PAGE_TEXTS.get(source, code_span(source)) if source else None


def model_words(metrics: dict) -> str | None:
    """ "4 layers, 256 wide, 7.34 million parameters", as much of it as is known."""
    training = metrics.get("Base model training", {})
    config = training.get("model config", {})
    words = [f"{config['n_layer']} layers", f"{config['n_embd']} wide"] if config else []
    if "Number of parameters" in training:
        words.append(f"{spoken_count(training['Number of parameters'])} parameters")
    return ", ".join(words) or None


def glance_sentences(metrics: dict) -> str:
    """What happened, for someone who reads no further."""
    training, base, tuning = (metrics.get(name, {}) for name in ("Base model training", "Base model evaluation", "SFT"))
    run, parameters = metrics["Run"], metrics.get("Provenance", {}).get("parameters", {})
    if not training:
        return "No model has been trained yet; this page tells what there is so far."
    tokens, source = training.get("Number of training tokens"), text_source(parameters)
    read = f" It read {spoken_count(tokens)} tokens" + (f" of {source}." if source else ".") if tokens else ""
    sentences = [f"A language model, trained from nothing: {model_words(metrics) or 'of unknown size'}.{read}"]
    times = {"pretraining": training.get("training seconds"), "fine-tuning": tuning.get("training seconds")}
    times["all stages together"] = run["total wall seconds"]
    (first, seconds), *rest = [(name, spoken_seconds(time)) for name, time in times.items() if time] or [("", "")]
    if seconds:
        words = spoken_list([f"{first.capitalize()} took {seconds}", *(" ".join(pair) for pair in rest)])
        price = run["price in dollars"]
        sentences.append(words + (f", which cost {spoken_price(price)}." if price is not None else "."))
    if "same bytes bpb" in base and "xz -9e" in base:
        ours, xz = f"{base['same bytes bpb']:.2f}", f"{base['xz -9e']:.2f}"
        sentences.append(f"It needs {ours} bits for each byte of text that it never saw, where xz needs {xz}.")
    return " ".join(sentences)


def glance_rows(metrics: dict) -> list[tuple[str, str]]:
    """The same and the results, as exact as they are known."""
    training, tuning, run = metrics.get("Base model training", {}), metrics.get("SFT", {}), metrics["Run"]
    base, core, chat = (metrics.get(name, {}) for name in ("Base model evaluation", "CORE", "Chat evaluation sft"))
    parameters = metrics.get("Provenance", {}).get("parameters", {})
    rows = [("model", model_words(metrics))]
    tokens, source = training.get("Number of training tokens"), text_source(parameters)
    rows.append(("text", f"{tokens:,} tokens" + (f" of {source}" if source else "") if tokens else source))
    if "Number of conversations" in tuning:
        rows.append(("fine-tuning", f"{tuning['Number of conversations']:,} conversations"))
    seconds, price = run["total wall seconds"], run["price in dollars"]
    if seconds is not None:
        rows.append(("time", spoken_seconds(seconds)))
    if price is not None:
        rows.append(("price", f"{spoken_price(price)} at ${parameters['price_per_hour']:,.2f} an hour"))
    bpb = base.get("same bytes bpb", base.get("val bpb"))
    if bpb is not None:
        compared = "xz -9e" in base and "same bytes bpb" in base
        xz = f"; xz needs {base['xz -9e']:.4f} for the same text" if compared else ""
        rows.append(("bits per byte", f"**{bpb:.4f}**{xz}"))
    if "CORE" in core:
        known = f"; GPT-2 124M has {GPT2_CORE['GPT-2 124M']:.4f}, the original d12 {ORIGINAL_D12_CORE:.4f}"
        compared = known if set(core_scores(core)) == set(ORIGINAL_D12_CENTERED) else ""
        rows.append(("CORE", f"**{core['CORE']:.4f}**; 0 is guessing, 1 is perfect{compared}"))
    if "CORE offline" in core:
        rows.append(("CORE offline", f"**{core['CORE offline']:.4f}**; 0 is guessing, 1 is perfect"))
    if "ChatCORE" in chat:
        real = chat_exams_are_real(metrics)
        rows.append(("ChatCORE" if real else "ChatCORE offline", f"**{chat['ChatCORE']:.4f}**"))
    return [(name, value) for name, value in rows if value]


# %% [markdown]
# ### Pretraining
# From "Base model evaluation": `same bytes bpb` and the compressors on the same text. The original's last bits per
# byte stands beside it if the text is the same.


# %%
def pretraining_part(metrics: dict) -> list[str]:
    """Bits per byte of the model and of its opponents."""
    base = metrics.get("Base model evaluation", {})
    names = {"zlib -9": "zlib -9", "xz -9e": "xz -9e", "same bytes bpb": "**this model**"}
    rows = [(label, base[name]) for name, label in names.items() if name in base]
    if not rows:
        return []
    lines = [
        "### Pretraining",
        "",
        "How small can the text be made that it was never trained on? A language model is a compressor too; all of "
        "these got the same bytes.",
        "",
        *markdown_table(rows, ("", "bits per byte")),
    ]
    if "val bpb" in base:
        measured = f"In the measure of the training curve, which cuts long documents, it is {base['val bpb']:.4f}"
        if metrics.get("Provenance", {}).get("parameters", {}).get("data_source") == "fineweb-edu":
            step, original = max(D12_REFERENCE["val_bpb"].items())
            measured += f"; the original d12 came to {original:.4f} on this text in {step:,} steps"
        lines += [measured + ".", ""]
    return lines


# %% [markdown]
# ### CORE
# From "CORE": the mean under `CORE`, or under `CORE offline` for the offline exams, and the centred score of each task
# under its name; `accuracy` and `questions` hold two more columns. Other models have sections "CORE <name>".


# %%
def core_scores(values: dict) -> dict[str, float]:
    """task -> centred score."""
    others = ("CORE", "CORE offline", "wall seconds")
    return {name: value for name, value in values.items() if isinstance(value, float) and name not in others}


def core_part(metrics: dict) -> list[str]:
    """The tasks, and the means beside the published ones where the exams are the published ones."""
    core = metrics.get("CORE", {})
    scores, parameters = core_scores(core), metrics.get("Provenance", {}).get("parameters", {})
    real = "CORE" in core
    if not real and "CORE offline" not in core:
        return []
    others = {values.get("model", name): values for name, values in metrics.items() if name.startswith("CORE ")}
    others = {name: values for name, values in others.items() if ("CORE" in values) == real}
    mean = "CORE" if real else "CORE offline"
    if real:
        lines = ["### CORE", "", "Exams for a model that can only continue text. 0 is guessing and 1 is perfect.", ""]
    else:
        lines = [
            "### CORE offline",
            "",
            f"{len(scores)} small exams made from the validation text, for a machine without a network. 0 is guessing "
            "and 1 is perfect. They are other exams than those of CORE: **this score and published CORE scores have "
            "nothing to do with each other.**",
            "",
        ]
    whole = real and set(scores) == set(ORIGINAL_D12_CENTERED)
    if whole:
        means = GPT2_CORE | {"the original d12": ORIGINAL_D12_CORE, "**this model**": core["CORE"]}
        means |= {code_span(name): values["CORE"] for name, values in others.items()}
        lines += markdown_table(sorted(means.items(), key=lambda item: item[1]), ("", "CORE"))
        if parameters.get("core_max_per_task"):
            limit = parameters["core_max_per_task"]
            lines += [f"This model got {limit:,} questions of each task at most, the others all of them.", ""]
    header, columns = ["task"], [[name.replace("_", " ") for name in scores]]
    for name in ("questions", "accuracy"):
        if name in core:
            header.append(name)
            columns.append([core[name].get(task) for task in scores])
    header.append("centred")
    columns.append(list(scores.values()))
    if real and set(scores) & set(ORIGINAL_D12_CENTERED):
        header.append("original d12")
        columns.append([ORIGINAL_D12_CENTERED.get(task) for task in scores])
    for name, values in others.items():
        header.append(code_span(name))
        columns.append([core_scores(values).get(task) for task in scores])
    last = {"task": f"**{mean}**", "centred": core[mean]}
    last |= {"original d12": ORIGINAL_D12_CORE} if whole else {}
    last |= {code_span(name): values[mean] for name, values in others.items()}
    rows = [*zip(*columns, strict=True), tuple(last.get(name) for name in header)]
    return [*lines, *markdown_table(rows, header)]


# %% [markdown]
# ### Fine-tuning
# From "SFT": `Number of conversations` and `Final validation bpb`.


# %%
def fine_tuning_part(metrics: dict, picture: list[str]) -> list[str]:
    """What the second training was, and its curve."""
    tuning = metrics.get("SFT", {})
    words = []
    if "Number of conversations" in tuning:
        words.append(f"From {tuning['Number of conversations']:,} conversations it learned how an assistant answers.")
    if "Final validation bpb" in tuning:
        words.append(
            f"On conversations that it never saw it came to {tuning['Final validation bpb']:.4f} bits per byte."
        )
    if not words and not picture:
        return []
    return ["### Fine-tuning", "", *([" ".join(words), ""] if words else []), *picture]


# %% [markdown]
# ### Chat
# From "Chat evaluation sft": the accuracy in each exam under its name, `ChatCORE`, `problems` (exam -> how many),
# `base model` and `base problems` (the same for the base model), and `exams`, which is "hub" for the published ones.


# %%
def chat_exams_are_real(metrics: dict) -> bool:
    """Whether the chat exams are the published ones. Who does not know it may not compare."""
    parameters = metrics.get("Provenance", {}).get("parameters", {})
    return metrics.get("Chat evaluation sft", {}).get("exams", parameters.get("task_source")) == "hub"


def original_chatcore() -> float:
    """ChatCORE of the original's d12, from its marks."""
    chances = {task: CHAT_CHANCE.get(task, 0.0) for task in D12_CHAT_REFERENCE}
    return sum((D12_CHAT_REFERENCE[task] - p) / (1 - p) for task, p in chances.items()) / len(chances)


def chat_part(metrics: dict) -> list[str]:
    """The marks: guessing, before and after fine-tuning, and the original's where the exams are the same."""
    chat, real = metrics.get("Chat evaluation sft", {}), chat_exams_are_real(metrics)
    tasks = [task for task in D12_CHAT_REFERENCE if task in chat]
    if not tasks:
        return []
    lines = ["### Chat", "", "The part of the problems that it solves; none of them was among its lessons.", ""]
    if not real:
        lines[2] += (
            " These are the **offline exams**, small ones of its own kind: they share a name with the published exams "
            "and nothing else, so their marks must not be compared."
        )
    base, base_problems = chat.get("base model", {}), chat.get("base problems", {})
    header = ["exam", *(["problems"] if "problems" in chat else []), "guessing", *(["base model"] if base else [])]
    header += ["fine-tuned", *(["original d12"] if real else [])]
    rows = []
    for task in tasks:
        marks = {"exam": task, "problems": chat.get("problems", {}).get(task), "guessing": CHAT_CHANCE.get(task, 0.0)}
        marks |= {"base model": base.get(task), "fine-tuned": chat[task], "original d12": D12_CHAT_REFERENCE[task]}
        rows.append(tuple(marks[name] for name in header))
    for name in ("ChatCORE", "ChatCORE without SpellingBee"):
        if name in chat:
            original = original_chatcore() if name == "ChatCORE" else None
            marks = {"exam": f"**{name}**", "guessing": 0.0, "fine-tuned": chat[name], "original d12": original}
            rows.append(tuple(marks.get(column) for column in header))
    lines += markdown_table(rows, header)
    fewer = sorted({n for task, n in base_problems.items() if n < chat.get("problems", {}).get(task, 0)})
    if fewer:
        counts = spoken_list([str(count) for count in fewer])
        lines += [f"The base model got the first {counts} problems of the longer exams.", ""]
    limit = metrics.get("Provenance", {}).get("parameters", {}).get("max_problems")
    if real and limit:
        lines += [f"This model got {limit:,} problems of each exam at most, the original all of them.", ""]
    return lines


# %% [markdown]
# ### Time
# Every stage says how long it took as `wall seconds`, interruptions not counted.


# %%
def time_part(metrics: dict) -> list[str]:
    """Where the time went, and the money."""
    run, parameters = metrics["Run"], metrics.get("Provenance", {}).get("parameters", {})
    if run["total wall seconds"] is None:
        return []
    spent = {**run["wall seconds by stage"], "**together**": run["total wall seconds"]}
    rate = parameters.get("price_per_hour") or None
    rows = [(name, spoken_seconds(seconds), rate and seconds / 3600 * rate) for name, seconds in spent.items()]
    if rate is None:
        return ["### Time", "", *markdown_table([row[:2] for row in rows], ("stage", "time"))]
    rows = [(*row[:2], spoken_price(row[2])) for row in rows]
    lines = [f"At ${rate:,.2f} an hour, which is what this machine was said to cost.", ""]
    return ["### Time and price", "", *lines, *markdown_table(rows, ("stage", "time", "price"))]


# %% [markdown]
# ### Samples
# From "Base model evaluation": `samples`, each beginning with one of our prompts, and `unconditioned`; from
# "Chat samples": `samples`, a list of `question` and `answer`.


# %%
def samples_part(metrics: dict) -> list[str]:
    """What the models say."""
    base, chat = metrics.get("Base model evaluation", {}), metrics.get("Chat samples", {}).get("samples", [])
    lines = []
    if base.get("samples"):
        lines += ["### The base model continues", "", "The beginning is ours; it always takes the likeliest token.", ""]
        for text in base["samples"]:
            prompt = next((prompt for prompt in SAMPLE_PROMPTS if text.startswith(prompt)), "")
            beginning = "**" + prompt.replace("*", "\\*") + "** " if prompt else ""
            lines.append(f"- {beginning}{code_span(text[len(prompt) :])}")
        lines.append("")
    if base.get("unconditioned"):
        lines += ["### The base model dreams", "", "From nothing, drawing each token by its probability.", ""]
        for text in base["unconditioned"][:2]:
            shown = [line for line in plain_lines(text).split("\n") if line.strip()]
            lines += [*fenced_text("\n".join(shown[:10] + ["…"] * (len(shown) > 10))), ""]
    if chat:
        lines += ["### The chat model answers", ""]
        if any("⟦" in sample["answer"] for sample in chat):
            lines += ["Between ⟦ and ⟧ it asks its calculator, which says what follows the arrow.", ""]
        for sample in chat:
            lines += [*fenced_text(sample["question"], "question"), ""]
            lines += [*fenced_text(sample["answer"], "answer"), ""]
    return ["## Samples", "", *lines] if lines else []


# %% [markdown]
# ### Pictures
# Stages save them beside the page. One that is missing is replaced by a sentence, so that nobody looks at a broken
# icon.

# %%
PAGE_PICTURES = {  # section -> what its picture shows
    "Base model training": "Training loss, validation bits per byte and tokens per second, step by step",
    "Base model evaluation": "Bits per byte of two compressors and of the model, as bars",
    "CORE": "Centred score of each CORE task, as bars",
    "SFT": "Fine-tuning: loss, validation bits per byte and tokens per second, step by step",
    "Chat evaluation sft": "Part of the problems solved in each exam, as bars, with a mark where guessing would be",
}
# What stands in a section at the beginning of a line was put there by a stage; text of a model is indented.
PICTURE_LINE = re.compile(r"^!\[([^\]\n]*)\]\(([^()/\\\s]+)\)$", re.MULTILINE)


def picture_shown(picture: tuple[str, str], folder: Path) -> str:
    """Markdown for a picture, given what it shows and its file; a sentence if there is no such file."""
    words, name = picture
    return f"![{words}]({name})" if (folder / name).is_file() else f"(The picture {name} is missing.)"


def lift_picture(section: str, texts: dict[str, str], folder: Path) -> list[str]:
    """Take the picture of a section out of its text, for the upper part of the page."""
    slug = section_slug(section)
    found = PICTURE_LINE.search(texts.get(slug, ""))
    if found is None:
        return []
    texts[slug] = texts[slug][: found.start()] + texts[slug][found.end() :]
    return [picture_shown((PAGE_PICTURES[section], found[2]), folder), ""]


# %% [markdown]
# ### The summary
# The table with which the original's report ends, in the same shape.

# %%
PAGE_COLUMNS = {
    "BASE": ("Base model training", "Base model evaluation", "CORE"),
    "SFT": ("SFT", "Chat evaluation sft"),
    "RL": ("Chat RL", "Chat evaluation rl"),
}
PAGE_ROWS = (
    "CORE", "CORE offline", "val bpb", "ARC-Challenge", "ARC-Easy", "GSM8K", "HumanEval", "MMLU", "SpellingBee",
    "ChatCORE",
)  # fmt: skip


def summary_part(metrics: dict, header: str) -> list[str]:
    """How much code, the metric table, the wall clock. Spec section 3."""
    values = {}  # (row, column) -> number
    for section, found in metrics.items():
        for column, names in PAGE_COLUMNS.items():
            if section_slug(section) in map(section_slug, names):
                numbers = {name: value for name, value in found.items() if isinstance(value, int | float)}
                values |= {(row, column): numbers[row] for row in PAGE_ROWS if row in numbers}
    bloat = re.search(r"^### Bloat\n((?:- .*\n)+)", header, re.MULTILINE)
    lines = ["## Summary", "", *([bloat.group(1)] if bloat else [])]
    table = []
    for row in PAGE_ROWS:
        cells = [values.get((row, column)) for column in PAGE_COLUMNS]
        if any(cell is not None for cell in cells):
            shown = ["-" if cell is None else f"{cell:.4f}" for cell in cells]
            table.append(f"| {row:15} | " + " | ".join(f"{cell:8}" for cell in shown) + " |")
    if table:
        lines.append("| Metric          | " + " | ".join(f"{column:8}" for column in PAGE_COLUMNS) + " |")
        lines.append("|-----------------|" + "----------|" * len(PAGE_COLUMNS))
        lines += [*table, ""]
    if metrics.get("Chat evaluation sft") and not chat_exams_are_real(metrics):
        lines += ["The exams of this run are the offline ones.", ""]
    seconds = metrics["Run"]["total wall seconds"]
    clock = "unknown" if seconds is None else "{}h{}m".format(*divmod(round(seconds / 60), 60))
    return [*lines, f"Total wall clock time: {clock}", ""]


# %% [markdown]
# ### `report_markdown`
# All parts in their order: first what everybody wants to know, then the stages with all their settings, last what
# somebody needs who wants to do it again.


# %%
def provenance_part(metrics: dict) -> list[str]:
    """Where the numbers come from: what "Provenance" holds."""
    facts = metrics.get("Provenance", {})
    plain = {name: value for name, value in facts.items() if name != "parameters"}
    trained_by = metrics.get("Base model training", {}).get("source hash")
    if trained_by not in (None, facts.get("source hash")):
        plain["source hash of pretraining"] = trained_by
    lines = ["## Provenance", "", *report_lines(plain), ""] if facts else []
    if "parameters" in facts:
        lines += ["### Parameters", "", *report_lines(facts["parameters"]), ""]
    return lines


def report_markdown(texts: dict[str, str], metrics: dict, header: str, folder: Path) -> str:
    """The whole page. texts: slug -> text of the sections to show. folder: where the pictures lie."""
    texts = dict(texts)
    stamps = [text.split("\n", 2)[1].removeprefix("timestamp: ") for text in texts.values()]
    environment = re.sub(r"^### Bloat\n(- .*\n)+\n?", "", header.split("## Environment")[-1], flags=re.MULTILINE)
    curve = lift_picture("Base model training", texts, folder)
    results = [
        *[*pretraining_part(metrics), *lift_picture("Base model evaluation", texts, folder)],
        *[*core_part(metrics), *lift_picture("CORE", texts, folder)],
        *fine_tuning_part(metrics, lift_picture("SFT", texts, folder)),
        *[*chat_part(metrics), *lift_picture("Chat evaluation sft", texts, folder)],
        *time_part(metrics),
    ]
    rows = glance_rows(metrics)
    lines = [
        "# nanochat training report",
        "",
        *([f"Finished {max(stamps)[:16]}", ""] if stamps else []),
        "## At a glance",
        "",
        *[glance_sentences(metrics), ""],
        *(markdown_table(rows, ("", "")) if rows else []),
        *curve,
        *(["## Results", "", *results] if results else []),
        *samples_part(metrics),
    ]
    lines += ["## Stage by stage", "", "What each stage was told, and what it found.", ""] if texts else []
    for text in texts.values():
        pictures = PICTURE_LINE.sub(lambda found: picture_shown(found.groups(), folder), text)
        lines += [pictures.rstrip("\n"), ""]
    lines += ["## Environment", environment.rstrip("\n -"), ""]
    return "\n".join([*lines, *provenance_part(metrics), *summary_part(metrics, header)])


# %% [markdown]
# ### The look
# Letters in the system's own type, colours that follow the reader's light or dark, tables that scroll by themselves on
# a phone. Pictures keep their white paper.

# %%
PAGE_STYLE = """
:root { color-scheme: light dark; --ink: #1d1f23; --paper: #fff; --soft: #5f6670; --line: #d9dde3; --tint: #f4f6f8;
  --said: #dcebf5; --accent: #0072b2 }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6ea; --paper: #15171a; --soft: #9aa2ad; --line: #34383f;
  --tint: #1f2226; --said: #17364a; --accent: #56b4e9 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 1rem/1.55 system-ui, sans-serif;
  overflow-wrap: anywhere }
main { max-width: 47rem; margin: 0 auto; padding: 2rem 1.1rem 4rem }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .2rem }
h1 + p { color: var(--soft); margin: 0 }
h2 { font-size: 1.35rem; margin: 2.4rem 0 .6rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line) }
h3 { font-size: 1.08rem; margin: 1.7rem 0 .4rem }
p, ul { margin: .5rem 0 }
h2:first-of-type + p { font-size: 1.13rem }
.table { overflow-x: auto; margin: .7rem 0 }
table { border-collapse: collapse; font-size: .95rem; font-variant-numeric: tabular-nums }
th { color: var(--soft); font-weight: 600; text-align: left }
th, td { padding: .28rem 1.1rem .28rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: normal }
td:last-child, th:last-child { padding-right: .2rem }
td strong { color: var(--accent) }
img { display: block; max-width: 100%; height: auto; margin: 1rem 0; background: #fff; border-radius: 6px }
pre { font: inherit; background: var(--tint); border-radius: 6px; padding: .7rem .9rem; white-space: pre-wrap }
pre:has(.language-question, .language-answer) { width: fit-content; max-width: 88%; border-radius: 14px }
pre:has(.language-question) { margin: 1.4rem 0 .5rem auto; background: var(--said) }
pre:has(.language-answer) { margin: .5rem auto 1.4rem 0 }
pre .language-question, pre .language-answer { font: inherit }
thead:not(:has(th:not(:empty))) { display: none }
code { font: .87em/1.5 ui-monospace, Menlo, Consolas, monospace }
li code, p code, td code { background: var(--tint); border-radius: 4px; padding: .08em .3em }
details { border: 1px solid var(--line); border-radius: 6px; margin: .45rem 0; padding: 0 .9rem }
summary { cursor: pointer; margin: 0 -.9rem; padding: .5rem .9rem }
summary h2, summary h3 { display: inline; font-size: 1rem; border: 0; margin: 0; padding: 0 }
details[open] { padding-bottom: .7rem }
details ul { columns: 17rem 2; column-gap: 2rem; padding-left: 1.1rem; font-size: .92rem }
details ul:has(pre) { columns: 1 }
@media (max-width: 30rem) { table { font-size: .8rem } th, td { padding-right: .4rem } ul { padding-left: 1.2rem } }
@media print {
  :root { --ink: #000; --paper: #fff; --soft: #444; --line: #bbb; --tint: #f4f4f4; --said: #e8e8e8; --accent: #000 }
  html { font-size: 10pt }
  main { max-width: none; padding: 0 }
  h2, h3, summary { break-after: avoid }
  img, tr, pre { break-inside: avoid }
  details { border: 0; padding: 0 }
  details::details-content { content-visibility: visible; display: block }
  summary { list-style: none; margin: 0; padding: 0 }
}
"""
PAGE_FRAME = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body><main>
{body}</main></body>
</html>
"""

# %% [markdown]
# ### `report_html`
# The same page for the browser. A library reads the Markdown, told that HTML in it is text; the page also forbids the
# browser to run or to fetch anything. Pictures come inside, the facts of the stages are folded away.


# %%
def folded_tokens(tokens: list[Token], headings) -> list[Token]:
    """Each part whose heading, (tag, title), is one of `headings` inside a <details>, the heading as its summary."""
    folded, level, in_summary = [], 0, False  # level: of the heading that is folded now, 0 for none
    for i, token in enumerate(tokens):
        if token.type == "heading_open" and token.level == 0:
            if level and int(token.tag[1]) <= level:
                folded.append(Token("html_block", "", 0, content="</details>\n"))
                level = 0
            if not level and (token.tag, tokens[i + 1].content) in headings:
                level, in_summary = int(token.tag[1]), True
                folded.append(Token("html_block", "", 0, content="<details><summary>"))
        folded.append(token)
        if token.type == "heading_close" and in_summary:
            in_summary = False
            folded.append(Token("html_block", "", 0, content="</summary>\n"))
    return [*folded, Token("html_block", "", 0, content="</details>\n")] if level else folded


def report_html(markdown: str, folder, title: str, folded=()) -> str:
    """The page as one HTML file that needs no other.

    folder: where its pictures lie. folded: headings whose parts are folded away, as ("h2", "CORE").
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")

    def image(renderer, tokens, i, options, env) -> str:
        name, alt = tokens[i].attrs["src"], html.escape(tokens[i].content)
        path = Path(folder, name)
        if Path(name).name != name or not path.is_file():
            return f"(The picture {html.escape(name)} is missing.)"
        data = base64.b64encode(path.read_bytes()).decode("ascii")
        return f'<img src="data:image/png;base64,{data}" alt="{alt}">'

    parser.add_render_rule("image", image)
    parser.add_render_rule("table_open", lambda *_: '<div class="table"><table>\n')
    parser.add_render_rule("table_close", lambda *_: "</table></div>\n")
    tokens = folded_tokens(parser.parse(markdown), folded)
    body = parser.renderer.render(tokens, parser.options, {})
    return PAGE_FRAME.format(title=html.escape(title), style=PAGE_STYLE, body=body)


# %% [markdown]
# ### `generate_report`
# Writes the page and says where it is.


# %%
def generate_report(report: Report, copy_to=None) -> str:
    """Write `report.md` and `report.html` into the report's folder; returns the path of `report.md`.

    copy_to: a folder for a second copy of both, with the pictures. By default there is none: the folder that someone
    happens to start from may be a git checkout or hold another `report.md`; it is not ours. On ranks above 0 it does
    nothing and returns "".
    """
    if isinstance(report, SilentReport):
        return ""
    report.add_metrics("Run", run_metrics(report.metrics()))
    every = report.metrics()
    parameters = every.get("Provenance", {}).get("parameters", {})
    metrics = {name: every[name] for name in shown_sections(every, parameters)}
    texts = {slug: path.read_text(encoding="utf-8") for slug, path in report.sections().items()}
    titles = {slug: text.split("\n", 1)[0].removeprefix("## ") for slug, text in texts.items()}
    shown = shown_sections(titles.values(), parameters)
    texts = {slug: text for slug, text in texts.items() if titles[slug] in shown}
    markdown = report_markdown(texts, metrics, report.header(), report.folder)
    path = report.folder / "report.md"
    write_atomic(path, markdown)
    title = " ".join(["nanochat", *filter(None, [metrics.get("Base model evaluation", {}).get("model")]), "report"])
    folded = [*(("h2", section) for section in shown), ("h3", "Parameters")]
    write_atomic(report.folder / "report.html", report_html(markdown, report.folder, title, folded))
    if copy_to is not None:
        pictures = {found[2] for text in texts.values() for found in PICTURE_LINE.finditer(text)}
        for name in ["report.md", "report.html", *sorted(pictures)]:
            if (report.folder / name).is_file():
                with atomic_path(Path(copy_to) / name) as temporary:
                    temporary.write_bytes((report.folder / name).read_bytes())
    missing = [name for name in REPORT_SECTIONS if name not in REPORT_RL_SECTIONS and name not in shown]
    print0(f"report: {path.with_suffix('.html')}" + (f" (not run: {', '.join(missing)})" if missing else ""))
    return str(path)
