# %% [markdown]
# ## Upload
#
# A model that lies on a rented machine is gone tomorrow. On the hub it has an address: anybody whom you allow can load
# it in three lines, read how it was made, and see what it can and cannot do.
#
# The base directory is full of things that nobody asked for: gigabytes of other people's text, optimizer state, caches.
# So what goes up is a list of names, never "everything except". Without an access token this chapter only shows the
# list. With one, every large file is stored first and one commit makes all of it visible at the end: whoever looks at
# the repository sees the old model or the new one. An upload that was interrupted goes on, because the hub is
# asked which contents it has already.

# %%
import hashlib
import json
import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open

from nanochat.checkpoint_files import checkpoint_path, find_last_step
from nanochat.dataset import HUB_SHARDS, hub_endpoint
from nanochat.plots import show_table
from nanochat.report import fenced_text
from nanochat.report_page import shown_sections
from nanochat.runtime import UserError, get_base_dir, get_dist_info, print0
from nanochat.settings import check_hub_names
from nanochat.stages import read_stage
from nanochat.tracking import read_secret

# %% [markdown]
# ### What may go up
# Folders of the repository and the names that may lie in them. Whatever is not in this table stays here, and so does
# a symbolic link, because a good name may point at anything. A file must also be what its name says: a pickle does not
# pass as `model.safetensors`.

# %%
UPLOAD_MANIFEST = "nanochat_upload.json"
UPLOAD_ALLOWED = {  # folder -> patterns of names
    "": (
        r"model\.safetensors", r"model-\d{5}-of-\d{5}\.safetensors", r"model\.safetensors\.index\.json",
        r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map)\.json", r"chat_template\.jinja",
        r"(configuration|modeling|tokenization)_\w+\.py", r"README\.md", re.escape(UPLOAD_MANIFEST),
    ),
    "report": (r"report\.(md|html)", r"metrics\.json", r"\w[\w.-]*\.png"),
    "checkpoint": (r"model_\d{6,}\.safetensors", r"meta_\d{6,}\.json"),
    "checkpoint/tokenizer": (r"tokenizer\.tiktoken", r"tokenizer_config\.json"),
    ".eval_results": (r"[a-z0-9-]+\.yaml",),
}  # fmt: skip


def may_be_uploaded(path_in_repo: str) -> bool:
    """Whether UPLOAD_ALLOWED has a place for this path in the repository."""
    folder, _, name = path_in_repo.rpartition("/")
    return any(re.fullmatch(pattern, name, re.ASCII) for pattern in UPLOAD_ALLOWED.get(folder, ()))


@dataclass(frozen=True)
class UploadFile:
    """Something to upload: a path on this disk, or the content itself."""

    path_in_repo: str
    source: Path | bytes

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size

    def read(self) -> bytes:
        return self.source if isinstance(self.source, bytes) else self.source.read_bytes()

    @property
    def is_weights(self) -> bool:
        return self.path_in_repo.endswith(".safetensors")


def checked_upload_file(path: Path, path_in_repo: str) -> UploadFile:
    """The file at `path`, to be stored as `path_in_repo`. Raises UserError when it is missing or not what it should be.

    A file that is not in UPLOAD_ALLOWED is a ValueError: no caller may ask for one.
    """
    if not may_be_uploaded(path_in_repo):
        raise ValueError(f"{path_in_repo} is not in UPLOAD_ALLOWED")
    if path.is_symlink():
        raise UserError(f"{path} is a symbolic link, and only real files are uploaded. Put a copy in its place.")
    if not path.is_file():
        raise UserError(f"{path} is missing. Run the stage that makes it again, then upload.")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                pass
        elif path.suffix == ".json":
            json.loads(path.read_bytes())
        elif path.suffix == ".png":
            if not path.read_bytes().startswith(b"\x89PNG\r\n"):
                raise ValueError("it is not a picture")
        elif path.stat().st_size:
            path.read_text(encoding="utf-8")
        else:
            raise ValueError("it is empty")
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).split("\n")[0][:200].rstrip(".")
        raise UserError(
            f"{path} is damaged or not what its name says ({reason}). Run the stage that makes it again, then upload."
        ) from error
    return UploadFile(path_in_repo, path)


# %% [markdown]
# ### Three folders
# The export, the report and, if you want others to train on, a checkpoint. Each is asked for the names that belong to
# it, and complains about one that is needed and not there.


# %%
def export_upload_files(export_dir) -> list[UploadFile]:
    """The exported model. Raises UserError when a file that loading needs is missing."""
    folder = Path(export_dir)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}. Export the model first.")
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        weights = ["model.safetensors"]
    elif (folder / "model.safetensors").exists():
        raise UserError(f"{folder} holds model.safetensors and {index.name}: two models. Export into an empty folder.")
    else:
        checked_upload_file(index, index.name)
        weights = [index.name, *sorted(set(json.loads(index.read_bytes()).get("weight_map", {}).values()))]
        if foreign := [name for name in weights if "/" in name or not may_be_uploaded(name)]:
            raise UserError(f"{index} names {foreign[0]!r}, which is no file of an export. Export the model again.")
    config_file = checked_upload_file(folder / "config.json", "config.json")
    code = {
        f"{target.split('--')[-1].split('.')[0]}.py"
        for targets in json.loads(config_file.read()).get("auto_map", {}).values()
        for target in (targets if isinstance(targets, list) else [targets])
        if target
    }
    needed = {*weights, "config.json", "tokenizer.json", "tokenizer_config.json"}
    if foreign := [name for name in sorted(code) if not may_be_uploaded(name)]:
        raise UserError(f"{folder / 'config.json'} names {foreign[0]!r}, which is no file of an export. Export again.")
    more = {path.name for path in folder.iterdir() if may_be_uploaded(path.name) and not path.is_dir()}
    more -= {name for name in more if re.match(r"model[.-]", name)}  # the index has named those that belong
    names = needed | code | more - {"README.md", UPLOAD_MANIFEST}  # those two are made for each upload
    return [checked_upload_file(folder / name, name) for name in sorted(names)]


def report_upload_files(report_dir) -> list[UploadFile]:
    """`report.md` with the pictures that it shows, and `report.html` and `metrics.json` where there are such files."""
    folder = Path(report_dir)
    page = checked_upload_file(folder / "report.md", "report/report.md")
    shown = re.findall(r"!\[[^\]]*\]\(([^()/\\]+)\)", page.read().decode("utf-8"))
    names = [name for name in dict.fromkeys(shown) if may_be_uploaded(f"report/{name}") and (folder / name).exists()]
    names += [name for name in ("report.html", "metrics.json") if (folder / name).exists()]
    return [page, *(checked_upload_file(folder / name, f"report/{name}") for name in sorted(names))]


def checkpoint_upload_files(checkpoint_dir, tokenizer_dir) -> list[UploadFile]:
    """The newest complete checkpoint without its optimizer, and our tokenizer. Raises UserError without one."""
    step = find_last_step(checkpoint_dir)
    paths = [checkpoint_path(checkpoint_dir, step, kind) for kind in ("model", "meta")]
    files = [checked_upload_file(path, f"checkpoint/{path.name}") for path in paths]
    for name in ("tokenizer.tiktoken", "tokenizer_config.json"):
        files.append(checked_upload_file(Path(tokenizer_dir) / name, f"checkpoint/tokenizer/{name}"))
    return files


# %% [markdown]
# ### The marks
# How well the model did stands in `metrics.json`. How many problems that were, and whether they were the published
# exams or the small ones that were made offline, stands in the records of the stages. A record counts only where it
# agrees with the metrics, so an older one cannot lend its number of problems to a newer mark.

# %%
PUBLISHED_EXAMS = {  # exam -> (dataset on the hub, task, all its problems)
    "ARC-Easy": ("allenai/ai2_arc", "ARC-Easy", 2376),
    "ARC-Challenge": ("allenai/ai2_arc", "ARC-Challenge", 1172),
    "MMLU": ("cais/mmlu", "all", 14042),
    "GSM8K": ("openai/gsm8k", "gsm8k", 1319),
    "HumanEval": ("openai/openai_humaneval", "openai_humaneval", 164),
}


@dataclass(frozen=True)
class ExamMark:
    """One exam. passed, total and source ("hub" or "offline") are None where no record tells."""

    exam: str
    accuracy: float
    passed: int | None = None
    total: int | None = None
    source: str | None = None
    samples: int = 1
    temperature: float = 0.0
    finished: str = ""
    papers: tuple = ()

    @property
    def is_published(self) -> bool:
        """Whether all problems of the published exam were answered, once each."""
        full = PUBLISHED_EXAMS.get(self.exam, (None, None, None))[2]
        return self.source == "hub" and self.total == full and self.samples == 1

    @property
    def description(self) -> str:
        if self.total is None:
            return "number of problems not recorded"
        counted = f"{self.passed:,} of {self.total:,}"
        if self.source == "offline":
            return f"{counted}; **offline exam**, made for this run: not comparable with published numbers"
        if self.exam not in PUBLISHED_EXAMS:
            return f"{counted}; made by this project"
        return f"{counted}; " + ("all problems" if self.is_published else "a part of the problems, or several attempts")


def exam_marks(metrics: dict, source: str, base_dir) -> list[ExamMark]:
    """The chat exams of the checkpoint `source` ("sft" or "base") in metrics.json, with what the stages know of them.

    metrics: the content of metrics.json. base_dir: the folder that has the stages' records.
    """
    marks = []
    for exam, accuracy in metrics.get(f"Chat evaluation {source}", {}).items():
        if exam not in PUBLISHED_EXAMS and exam != "SpellingBee" or not isinstance(accuracy, int | float):
            continue
        record = read_stage(f"chat evaluation {source} {exam}", base_dir) or {"results": {}, "inputs": {}}
        results, inputs = record["results"], record["inputs"]
        if not results.get("total") or abs(results["passed"] / results["total"] - accuracy) > 1e-9:
            marks.append(ExamMark(exam, accuracy))
            continue
        marks.append(
            ExamMark(
                exam,
                accuracy,
                results["passed"],
                results["total"],
                inputs.get("source"),
                inputs.get("num_samples", 1),
                inputs.get("temperature", 0.0),
                record.get("finished", ""),
                tuple(results.get("papers", ())),
            )  # fmt: skip
        )
    return marks


# %% [markdown]
# ### Results that the hub can read
# Files under `.eval_results/` appear on the model's page and on the leaderboard of the dataset. A leaderboard compares,
# so only whole published exams go there, never the offline ones. One file for each exam: if the hub does not keep a
# leaderboard for one of them, the others still count.


# %%
def eval_result_files(marks: list[ExamMark]) -> list[UploadFile]:
    """One YAML file for each published exam that was taken in full. Values in percent."""
    files = []
    for mark in marks:
        if not mark.is_published:
            continue
        dataset, task, _ = PUBLISHED_EXAMS[mark.exam]
        drawn = "greedy" if mark.temperature == 0 else f"temperature {mark.temperature:g}"
        # Written by hand: the client's helper for it is younger than the client on many machines.
        entry = {"dataset": {"id": dataset, "task_id": task}, "value": round(100 * mark.accuracy, 2)}
        entry |= {"date": mark.finished[:10]} if mark.finished else {}
        entry["notes"] = f"0-shot, {drawn}, {mark.passed} of {mark.total} right, reported by the uploader"
        text = yaml.safe_dump([entry], sort_keys=False)
        files.append(UploadFile(f".eval_results/{mark.exam.lower()}.yaml", text.encode()))
    return files


# %% [markdown]
# ### The model card
# The page that everybody sees first. It says what the model is, what it scored, and what not to expect. What the model
# wrote stands in it as a quotation: in a code block that the text cannot close, so a model that writes Markdown cannot
# write the card.


# %%
CARD_TALK = 1500  # characters of a sample chat


def card_datasets(data_source: str, marks: list[ExamMark]) -> list[str]:
    """The hub datasets that the model learned from, as far as they are known."""
    names = []
    if data_source in HUB_SHARDS:
        names.append(HUB_SHARDS[data_source].repository)
    elif re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(/[\w.-]+)*", data_source) and not Path(data_source).exists():
        names.append("/".join(data_source.split("/")[:2]))
    if any(mark.source == "hub" for mark in marks):  # exams from the hub come with lessons from the hub
        names += ["HuggingFaceTB/smol-smoltalk", "cais/mmlu", "openai/gsm8k"]
    return names


def card_results(metrics: dict, marks: list[ExamMark]) -> list[str]:
    """The lines of the results table."""
    rows = []
    evaluation, tuning = metrics.get("Base model evaluation", {}), metrics.get("SFT", {})
    for name, value, meaning in (
        ("bits per byte", evaluation.get("val bpb"), "base model, text that it was not trained on; lower is better"),
        ("bits per byte, chat", tuning.get("Final validation bpb"), "fine-tuned, conversations that it did not see"),
        ("CORE", metrics.get("CORE", {}).get("CORE"), "base model; 22 tasks, 0 is guessing, 1 is perfect"),
        ("CORE offline", metrics.get("CORE", {}).get("CORE offline"),
         "base model; **offline exam**, made for this run: not comparable with CORE"),
    ):  # fmt: skip
        if isinstance(value, int | float):
            rows.append(f"| {name} | {value:.4f} | {meaning} |")
    rows += [f"| {mark.exam} | {mark.accuracy:.2%} | {mark.description} |" for mark in marks]
    return ["| what | result | of what |", "| --- | ---: | --- |", *rows] if rows else ["Nothing was measured."]


def card_loading(repo: str, config: dict, checkpoint: str) -> list[str]:
    """How to load the model with transformers and, where a checkpoint is there, with the project's chat."""
    trust = ", trust_remote_code=True" if config.get("auto_map") else ""
    lines = [
        "With transformers 5.4 or newer:" if trust else "With transformers:",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{repo}"{trust})',
        f'model = AutoModelForCausalLM.from_pretrained("{repo}"{trust})',
        'messages = [{"role": "user", "content": "Why is the sky blue?"}]',
        "inputs = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
        ")",
        "output = model.generate(**inputs, max_new_tokens=200)",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))',
        "```",
        "",
    ]
    if trust:
        lines += ["`trust_remote_code=True` runs the Python files of this repository: read them first.", ""]
    if checkpoint:
        lines += [
            "To chat with it as the notebook does, with its calculator, fetch the checkpoint into its folders and",
            "start the project's `python tools/chat.py`:",
            "",
            "```bash",
            f'hf download {repo} --include "checkpoint/*" --local-dir .',
            f"mkdir -p ~/.cache/nanochat/{checkpoint} ~/.cache/nanochat/tokenizer",
            "mv checkpoint/tokenizer/* ~/.cache/nanochat/tokenizer/ && rmdir checkpoint/tokenizer",
            f"mv checkpoint/* ~/.cache/nanochat/{checkpoint}/",
            "```",
            "",
        ]
    return lines


@dataclass(frozen=True)
class ModelCard:
    """What the card tells; `text(repo)` writes it. checkpoint: its folder below the base directory, "" for none."""

    license: str
    data_source: str
    config: dict
    metrics: dict
    marks: tuple[ExamMark, ...]
    checkpoint: str
    provenance: dict

    def text(self, repo: str) -> str:
        """The whole README.md for the repository `repo`, "user/name"."""
        front = {
            "license": self.license,
            "language": ["en"],
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            "tags": ["nanochat", "gpt", "trained-from-scratch"],
        }
        if datasets := card_datasets(self.data_source, list(self.marks)):
            front["datasets"] = datasets
        training, tuning = self.metrics.get("Base model training", {}), self.metrics.get("SFT", {})
        facts = {
            "parameters": training.get("Number of parameters"),
            "trained on": training.get("Number of training tokens"),
            "training time": training.get("Total training time"),
            "fine-tuned on": tuning.get("Number of conversations"),
            "fine-tuning time": tuning.get("Total training time"),
        }
        units = {"trained on": " tokens", "fine-tuned on": " conversations"}
        known = {name: value for name, value in facts.items() if value is not None}
        lines = ["---", yaml.safe_dump(front, sort_keys=False).rstrip(), "---", "", f"# {repo.rpartition('/')[2]}", ""]
        lines += [
            "A small GPT, trained from random weights by the nanochat speedrun: tokenizer, pretraining, "
            + ("fine-tuning to a chat model, " if tuning else "")
            + "and the evaluations below, all in one notebook.",
            "",
            *(f"- {name}: {table_number(value)}{units.get(name, '')}" for name, value in known.items()),
            f"- text: {self.data_description()}",
            "",
            "## Results",
            "",
            *card_results(self.metrics, list(self.marks)),
            "",
            "The whole report, with curves and samples: [report/report.md](report/report.md).",
            "",
        ]
        if talks := [(mark, paper) for mark in self.marks for paper in mark.papers[:1] if len(paper["answer"]) > 1]:
            lines += ["## Sample chat", "", "The first problem of each written exam, whether it went well or not.", ""]
            for mark, paper in talks:
                lines += [f"{mark.exam}, {'right' if paper['passed'] else 'wrong'}:", ""]
                talk = f"User: {paper['question']}\n\nAssistant: {paper['answer']}"
                lines += [*fenced_text(talk if len(talk) <= CARD_TALK else talk[:CARD_TALK] + " […]"), ""]
        lines += ["## How to load it", "", *card_loading(repo, self.config, self.checkpoint)]
        lines += [
            "## Limits",
            "",
            "This is a model to learn from, not to rely on. It is small, it saw little text, and it has had no safety",
            "training: it states falsehoods with confidence, repeats itself, and reflects whatever its text contained.",
            "It speaks English, forgets what lies outside its context, and marks near chance mean that it guesses.",
            "Do not use it where an answer matters.",
            "",
            "## Provenance",
            "",
            *(f"- {name}: `{value}`" for name, value in self.provenance.items() if value),
            f"- licence: the code that made it is MIT; the licence of the weights, {self.license}, was chosen by the",
            "  uploader. The texts that it learned from have their own terms.",
            "",
        ]
        return "\n".join(lines)

    def data_description(self) -> str:
        """Where the text came from, without paths of this machine."""
        if self.data_source == "offline":
            return "the documentation of the Python packages of one machine"
        return ", ".join(card_datasets(self.data_source, [])) or "the uploader's own files"


def table_number(value) -> str:
    """An integer with thousands separated, anything else as it is."""
    return f"{value:,}" if isinstance(value, int) else str(value)


# %% [markdown]
# ### `plan_upload`
# Everything that would go, before anything goes.


# %%
@dataclass(frozen=True)
class UploadPlan:
    """What an upload consists of. `name` is what the repository is called if nobody says otherwise."""

    name: str
    files: tuple[UploadFile, ...]
    card: ModelCard
    left_out: tuple[str, ...] = ()

    def files_for(self, repo: str) -> list[UploadFile]:
        """All files for the repository `repo`: those of the plan, the card, and the list of what is ours."""
        card = UploadFile("README.md", self.card.text(repo).encode())
        manifest = {
            "about": "written by the nanochat speedrun; its next upload replaces these files and no others",
            "files": sorted([*(file.path_in_repo for file in self.files), "README.md", UPLOAD_MANIFEST]),
            "card": git_blob_id(card.read()),
        }
        made = UploadFile(UPLOAD_MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
        files = [card, *self.files, made]
        if foreign := [file.path_in_repo for file in files if not may_be_uploaded(file.path_in_repo)]:
            raise ValueError(f"{foreign[0]} is not in UPLOAD_ALLOWED")
        return files

    def show(self, repo: str = "") -> None:
        """Print what would go, its size, and what stays."""
        files = self.files_for(repo or f"you/{self.name}")
        rows = [(file.path_in_repo, file.size) for file in files]
        rows.append((f"{len(files)} files", sum(file.size for file in files)))
        show_table(rows, header=("in the repository", "bytes"), caption=f"upload of {repo or self.name}")
        if self.left_out:
            more = f" and {len(self.left_out) - 20} more" if len(self.left_out) > 20 else ""
            print0(f"stays here: {', '.join(self.left_out[:20])}{more}")


def plan_upload(
    export_dir, source: str = "sft", checkpoint_dir=None, data_source: str = "", weights_license: str = "mit",
    base_dir=None,
) -> UploadPlan:  # fmt: skip
    """The plan for one model: its export, the report and, with checkpoint_dir, its newest checkpoint. Spec section 19.

    export_dir: a folder that the export wrote. source: which model that is, "sft" or "base"; decides the exams in the
    card. data_source: as in the parameters. weights_license: a hub identifier such as "mit" or "cc-by-4.0". base_dir:
    the base directory, for report, tokenizer and the stages' records. Reads the disk alone, no network. Raises
    UserError when something is missing or not what it should be.
    """
    check_hub_names("", weights_license)
    base, export = Path(base_dir or get_base_dir()), Path(export_dir)
    files = export_upload_files(export) + report_upload_files(base / "report")
    folders, checkpoint = [export, base / "report"], ""
    provenance = {"exported from": f"{source} {export.name}"}
    if checkpoint_dir is not None:
        checkpoint_dir = Path(checkpoint_dir)
        files += checkpoint_upload_files(checkpoint_dir, base / "tokenizer")
        folders += [checkpoint_dir, base / "tokenizer"]
        checkpoint = f"{checkpoint_dir.parent.name}/{checkpoint_dir.name}"
        meta = json.loads(next(file for file in files if "/meta_" in file.path_in_repo).read())
        provenance |= {"checkpoint step": meta.get("step"), "training fingerprint": meta.get("fingerprint")}
    tokenizer_stage = read_stage("tokenizer", base) or {"inputs": {}}
    provenance["text of the tokenizer"] = tokenizer_stage["inputs"].get("files")
    config = json.loads(next(file for file in files if file.path_in_repo == "config.json").read())
    numbers = next((file for file in files if file.path_in_repo == "report/metrics.json"), None)
    metrics = json.loads(numbers.read()) if numbers else {}
    parameters = metrics.get("Provenance", {}).get("parameters", {})
    wanted = {"schema", *shown_sections(metrics, parameters)}  # the others are of earlier runs, with another model
    wanted -= {"SFT", "Chat samples", "Chat evaluation sft"} if source == "base" else set()
    metrics = {name: values for name, values in metrics.items() if name in wanted}
    if numbers:
        text = json.dumps(metrics, indent=2, allow_nan=False) + "\n"
        files[files.index(numbers)] = UploadFile(numbers.path_in_repo, text.encode())
    marks = tuple(exam_marks(metrics, source, base))
    card = ModelCard(weights_license, data_source, config, metrics, marks, checkpoint, provenance)
    files += eval_result_files(list(marks))
    taken = {file.source for file in files if isinstance(file.source, Path)} | {base / "report" / "metrics.json"}
    left_out = tuple(sorted({path.name for folder in folders for path in folder.iterdir() if path not in taken}))
    return UploadPlan(export.name, tuple(files), card, left_out)


# %% [markdown]
# ### The token
# Looked for in Colab's secrets, then in the environment, then where `hf auth login` keeps it. It is sent to the hub and
# goes nowhere else: not into a message, not into a file, and a file that contains it is not uploaded.


# %%
def find_hub_token() -> str | None:
    """The hub access token from Colab's secrets, HF_TOKEN, or a stored login; None without one. Never printed."""
    return read_secret("HF_TOKEN") or get_token()


def refuse_leaked_token(files: list[UploadFile], token: str) -> None:
    """Raise UserError when a file other than the weights contains the token."""
    for file in files:
        if not file.is_weights and token.encode() in file.read():
            raise UserError(f"{file.path_in_repo} contains your access token. Remove it from there, then upload.")


# %% [markdown]
# ### Is it the same?
# The hub tells of each file its size, and either the sha256 of its content or, for a small text, the id that git gives
# it. So both questions, what must be sent and did it arrive, are answered without sending or fetching anything.


# %%
def git_blob_id(data: bytes) -> str:
    """The id under which git stores this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class UploadContents:
    """What the client is told to send, by the path in the repository. Made once: it remembers what has been stored."""

    def __init__(self):
        self.operations: dict[str, CommitOperationAdd] = {}

    def operation(self, file: UploadFile) -> CommitOperationAdd:
        if file.path_in_repo not in self.operations:
            self.operations[file.path_in_repo] = CommitOperationAdd(file.path_in_repo, file.source)
        return self.operations[file.path_in_repo]

    def same(self, file: UploadFile, entry) -> bool:
        """Whether `entry`, a file of the hub's listing (or None), has the content of `file`."""
        if entry is None or entry.size != file.size:
            return False
        if entry.lfs is not None:
            return entry.lfs.sha256 == self.operation(file).upload_info.sha256.hex()
        return entry.blob_id == git_blob_id(file.read())


# %% [markdown]
# ### `HubUpload`
# The steps of one upload. Each step is tried again when the hub or the network had a bad moment; the client itself
# does that for the large files. What cannot be mended by waiting ends in one sentence.

# %%
HUB_TRANSIENT = (408, 429, 500, 502, 503, 504)


class HubUpload:
    """An upload of `plan` to `repo` ("name" or "user/name"). retry_seconds: the pauses between attempts."""

    def __init__(self, plan: UploadPlan, repo: str, token: str, retry_seconds=(2, 8)):
        self.plan, self.repo, self.token, self.retry_seconds = plan, repo, token, retry_seconds
        self.api = HfApi(endpoint=hub_endpoint(), token=token)
        self.contents, self.stored, self.committed = UploadContents(), 0, False

    def step(self, what: str, action, retry_seconds=None):
        """The result of `action()`, a request to the hub; its failure as a UserError. what: "making the commit"."""
        for pause in (*(self.retry_seconds if retry_seconds is None else retry_seconds), None):
            try:
                return action()
            except UserError:  # from a step inside this one
                raise
            except Exception as error:  # the errors of the client's HTTP library have no common base that is public
                cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
                status = getattr(getattr(cause, "response", None), "status_code", None)
                reason = str(getattr(cause, "server_message", None) or cause or "").replace(self.token, "***")
                reason = " ".join(reason.split())[:300].rstrip(".")
                hopeless = isinstance(cause, ValueError | OfflineModeIsEnabled)
            if pause is None or (status not in HUB_TRANSIENT if status else hopeless):
                break
            print0(f"{what}: {f'answer {status}' if status else reason}; again in {pause} s")
            time.sleep(pause)
        raise self.failure(what, status, type(cause).__name__, reason)  # outside the handler: no request comes along

    def failure(self, what: str, status: int | None, kind: str, reason: str) -> UserError:
        """The sentence for a failed step."""
        tokens = f"{hub_endpoint()}/settings/tokens"
        if status == 401:
            return UserError(
                f"the hub does not accept the access token (answer 401). Make one with write permission at {tokens} "
                "and put it into Colab's secrets or the environment variable HF_TOKEN."
            )
        if status == 403:
            return UserError(
                f"the access token may not write to {self.repo} (answer 403: {reason}). Use a repository of your own, "
                f"or a token with write permission, made at {tokens}."
            )
        if status in (409, 412):
            return UserError(f"somebody else changed {self.repo} during the upload (answer {status}). Run again.")
        if "xet" in reason.lower() and (status == 404 or "404" in reason):
            return UserError(
                f"{hub_endpoint()} has no Xet storage, which the client wants to use. Set the environment variable "
                "HF_HUB_DISABLE_XET=1, restart, and upload again."
            )
        said = f"answer {status}: {reason}" if status else f"{kind}: {reason}"
        large = sum(file.is_weights for file in self.plan.files)
        state = f"Nothing of it is visible yet; {self.stored} of {large} large files are stored."
        return UserError(
            f"the upload to {self.repo} stopped while {what} ({said}). {'All is there.' if self.committed else state} "
            "Run again to go on: what the hub has is not sent again."
        )

    def open_repository(self, private: bool) -> None:
        """Check the token, complete the repository's name and create it if it is not there."""
        user = self.step("checking the access token", self.api.whoami)["name"]
        if "/" not in self.repo:
            self.repo = f"{user}/{self.repo}"
        if not self.step("looking for the repository", lambda: self.api.repo_exists(self.repo)):
            self.step(
                "creating the repository", lambda: self.api.create_repo(self.repo, private=private, exist_ok=True)
            )

    def listing(self, revision: str) -> dict:
        """{path: entry} of all files at a revision."""
        entries = self.api.list_repo_tree(self.repo, recursive=True, revision=revision)
        return {entry.path: entry for entry in entries if hasattr(entry, "size")}

    def fetch_manifest(self, revision: str) -> dict:
        """The list that our last upload left behind."""
        with tempfile.TemporaryDirectory() as folder:
            path = self.api.hf_hub_download(self.repo, UPLOAD_MANIFEST, revision=revision, local_dir=folder)
            return json.loads(Path(path).read_bytes())

    def changes(self):
        """(files to send, paths to delete, the hub's word on the repository) as it is now.

        Raises UserError when files would be overwritten that no upload of ours has put there.
        """
        info = self.step("reading the repository", lambda: self.api.model_info(self.repo))
        entries = self.step("listing the repository", lambda: self.listing(info.sha))
        old = {"files": [], "card": ""}
        if UPLOAD_MANIFEST in entries:
            old |= self.step("reading the last upload's list", lambda: self.fetch_manifest(info.sha))
        files = self.plan.files_for(self.repo)
        new = [file for file in files if not self.contents.same(file, entries.get(file.path_in_repo))]
        if foreign := [
            file.path_in_repo
            for file in new
            if file.path_in_repo in entries and file.path_in_repo not in (*old["files"], "README.md")
        ]:
            raise UserError(
                f"{self.repo} holds another model: {', '.join(foreign[:3])} would be overwritten, which this notebook "
                "did not upload. Choose another name for the repository, or delete those files on the hub."
            )
        card = entries.get("README.md")
        if card and old["card"] and card.blob_id != old["card"]:
            new = [file for file in new if file.path_in_repo != "README.md"]
            print0("README.md was edited on the hub and stays as it is. Delete it there to get the new one.")
        paths = {file.path_in_repo for file in files}
        stale = [path for path in old["files"] if path in entries and path not in paths and may_be_uploaded(path)]
        return new, stale, info

    def send_weights(self, new: list[UploadFile]) -> None:
        """Store the large files, one after the other. Nothing becomes visible; what the hub has is not sent."""
        pending = {file.path_in_repo for file in new}
        for file in self.plan.files:
            if file.is_weights and file.path_in_repo in pending:
                started = time.perf_counter()
                self.step(
                    f"sending {file.path_in_repo}",
                    lambda file=file: self.api.preupload_lfs_files(
                        self.repo, [self.contents.operation(file)], free_memory=False
                    ),
                    retry_seconds=(),  # the client has tried six times
                )
                print0(f"{file.path_in_repo}: {file.size:,} bytes stored in {time.perf_counter() - started:.0f} s")
            self.stored += file.is_weights

    def commit(self) -> str:
        """Make all files visible at once; returns the revision to verify."""

        def attempt():
            # Looked at anew each time: a commit whose answer got lost has been made all the same.
            new, stale, info = self.changes()
            if not new and not stale:
                return info.sha
            operations = [self.contents.operation(file) for file in new]
            operations += [CommitOperationDelete(path, is_folder=False) for path in stale]
            message = f"Upload of {self.plan.name} by the nanochat speedrun"
            return self.api.create_commit(self.repo, operations, commit_message=message, parent_commit=info.sha).oid

        revision = self.step("making the commit", attempt)
        self.committed = True
        return revision

    def verify(self, revision: str) -> None:
        """Compare sizes and checksums of everything with what the hub lists. Raises UserError."""
        entries = self.step("checking what arrived", lambda: self.listing(revision))
        for file in self.plan.files:
            if not self.contents.same(file, entries.get(file.path_in_repo)):
                raise UserError(
                    f"{file.path_in_repo} did not arrive as it was sent: the hub lists another content. Run again."
                )


# %% [markdown]
# ### `upload_to_hub`
# The one call of this chapter that the pipeline makes, with or without a token.


# %%
def upload_to_hub(plan: UploadPlan, repo: str, token: str | None, private: bool = True, retry_seconds=(2, 8)):
    """Upload a plan and return the address of its page. Without a repository or a token only say what would go.

    repo: "name" (below your own name) or "user/name"; created, private by default, when it is not there. One that holds
    an earlier upload of ours gets a new version; its other files, and a model card that was edited there, stay.
    private: refuse a repository that is public. One that is private stays so.
    token: see `find_hub_token`. retry_seconds: pauses before a failed request is tried again.
    Raises UserError, which never contains the token. Rank 0 alone does anything.
    """
    if get_dist_info()[1] != 0:
        return None
    check_hub_names(repo)
    plan.show(repo)
    if not repo or not token:
        print0(
            "Dry run: nothing was sent. To upload, name a repository with hub_repo and put an access token with write "
            f"permission ({hub_endpoint()}/settings/tokens) into Colab's secrets or the environment variable HF_TOKEN."
        )
        return None
    refuse_leaked_token(plan.files_for(repo), token)
    upload = HubUpload(plan, repo, token, retry_seconds)
    upload.open_repository(private)
    new, _, info = upload.changes()
    if private and not info.private:
        raise UserError(
            f"{upload.repo} is public, and this upload is meant to be private. Set hub_public to publish the model "
            "there, or choose another name."
        )
    upload.send_weights(new)
    upload.verify(upload.commit())
    address = f"{hub_endpoint()}/{upload.repo}"
    print0(f"uploaded: {address} ({'private' if info.private else 'public'})")
    return address
