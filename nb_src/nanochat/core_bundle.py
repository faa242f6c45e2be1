# %% [markdown]
# ## CORE: the questions
#
# Bits per byte says how well a model predicts text. CORE asks what it can do with that: 22 public tests, from
# completing a sentence to closing brackets, chosen because even small models move on them. The questions come as one
# archive, the *bundle*: a list of tasks, a table of what guessing would score, and a file of questions for each task.
#
# Archives and data files come from elsewhere, so nothing in them is taken on trust: the archive cannot write outside
# its folder or fill the disk, and every question is checked before the first one is asked. A wrong line found after
# half an hour of evaluation is half an hour too late.

# %%
import csv
import json
import os
import shutil
import stat
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import requests
import yaml
from filelock import FileLock

from nanochat.runtime import UserError, atomic_path, download_file_with_lock, get_base_dir

# %% [markdown]
# ### `CoreTask`
# One test with all of its questions. There are three types. In `multiple_choice` one question has several endings; in
# `schema` several beginnings have one ending; in `language_modeling` there is one ending and the model must write it.

# %%
CORE_TASK_FIELDS = {  # the fields of a question, by type
    "multiple_choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "language_modeling": ("context", "continuation"),
}


@dataclass(frozen=True)
class CoreTask:
    """One task of the bundle. Spec section 13.1."""

    label: str
    task_type: str  # a key of CORE_TASK_FIELDS
    num_fewshot: int  # solved examples shown before each question
    delimiter: str  # between question and answer
    baseline: float  # accuracy of guessing, in percent
    path: Path
    examples: list[dict]  # in the order of the file
    line_numbers: list[int]  # where each example stands in it, from 1

    def place(self, index: int) -> str:
        """File and line of an example, for messages."""
        return f"{self.path}, line {self.line_numbers[index]}"


# %% [markdown]
# ### `unpack_core_bundle`
# A zip file can name any path, link anywhere, and unfold a kilobyte into a terabyte. All of this is refused by its
# table of contents, before a byte is written. While unpacking, every file must have the size and the checksum that the
# table promised.

# %%
CORE_BUNDLE_MAX_BYTES = 2 << 30  # unpacked; the real one has a tenth of that
CORE_BUNDLE_MAX_ENTRIES = 1000


def check_bundle_entry(entry: zipfile.ZipInfo, zip_path) -> None:
    """Raise UserError unless this entry is a plain file or folder that stays where it is unpacked."""
    name, mode = entry.filename, entry.external_attr >> 16
    problem = ""
    if name.startswith("/") or "\\" in name or ":" in name or "\0" in entry.orig_filename:
        problem = "has an absolute or malformed path"
    elif ".." in PurePosixPath(name).parts:
        problem = "leads out of the folder"
    elif stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        problem = "is a link or a device"
    elif entry.flag_bits & 1:
        problem = "is encrypted"
    if problem:
        raise UserError(f"{zip_path}: the entry {name!r} {problem}, so nothing was unpacked. Get the file again.")


def check_bundle_entries(entries: list[zipfile.ZipInfo], zip_path) -> list[zipfile.ZipInfo]:
    """The files below `eval_bundle/` in the archive. Raises UserError when any entry is unsafe or all are too much."""
    if len(entries) > CORE_BUNDLE_MAX_ENTRIES:
        raise UserError(
            f"{zip_path} has {len(entries):,} entries; a bundle has at most {CORE_BUNDLE_MAX_ENTRIES:,}. "
            "Nothing was unpacked: get the file again."
        )
    for entry in entries:
        check_bundle_entry(entry, zip_path)
    total_bytes = sum(entry.file_size for entry in entries)
    if total_bytes > CORE_BUNDLE_MAX_BYTES:
        raise UserError(
            f"{zip_path} would unpack to {total_bytes:,} bytes; a bundle has at most {CORE_BUNDLE_MAX_BYTES:,}. "
            "Nothing was unpacked: get the file again."
        )
    files = [entry for entry in entries if PurePosixPath(entry.filename).parts[:1] == ("eval_bundle",)]
    files = [entry for entry in files if not entry.is_dir()]
    names = {entry.filename.casefold() for entry in files}
    if not files or len(names) < len(files):
        raise UserError(f"{zip_path} has no folder eval_bundle, or the same file twice. Get the file again.")
    return files


def unpack_core_bundle(zip_path, target) -> None:
    """Unpack the `eval_bundle` of an archive and put it at `target`, in one move when all of it is there.

    Raises UserError for an archive that is damaged, unsafe, too large, or has no bundle in it.
    """
    target = Path(target)
    folder = tempfile.mkdtemp(dir=target.parent, prefix=".eval_bundle.")
    try:
        with zipfile.ZipFile(zip_path) as archive:
            for entry in check_bundle_entries(archive.infolist(), zip_path):
                with archive.open(entry) as source, atomic_path(Path(folder) / entry.filename) as temporary:
                    with open(temporary, "wb") as file:  # zipfile stops at the promised size and checks the CRC
                        shutil.copyfileobj(source, file, 1 << 20)
                    if temporary.stat().st_size != entry.file_size:
                        raise zipfile.BadZipFile(f"{entry.filename} is shorter than the archive says")
        bundle = Path(folder) / "eval_bundle"
        try:
            check_core_files(bundle)
        except UserError as error:
            reason = str(error).replace(folder + os.sep, "")
            raise UserError(f"{zip_path} holds an incomplete bundle: {reason}") from None
        if target.exists():
            shutil.rmtree(target)
        os.replace(bundle, target)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError) as error:
        raise UserError(f"{zip_path} cannot be unpacked ({error}). Delete it, to have it downloaded again.") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# %% [markdown]
# ### `read_core_entries` and `read_core_baselines`
# The list of tasks and the table of guesses. `core.yaml` is written by hand, so a message about it names the line on
# which the entry begins.


# %%
def read_core_entries(bundle_dir) -> list[tuple[str, dict]]:
    """(place, entry) for each entry of `icl_tasks` in `core.yaml`; place is file and line, for messages."""
    path = Path(bundle_dir) / "core.yaml"
    try:
        text = path.read_text(encoding="utf-8")
        document, tree = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except FileNotFoundError:
        raise UserError(f"there is no {path}, so {bundle_dir} is not a CORE bundle.") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}, line {line}: not YAML ({error.problem}).") from None
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}).") from None
    entries = document.get("icl_tasks") if isinstance(document, dict) else None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path} has no list icl_tasks with at least one task in it.")
    nodes = next(value for key, value in tree.value if key.value == "icl_tasks").value
    return [(f"{path}, line {node.start_mark.line + 1}", entry) for node, entry in zip(nodes, entries, strict=True)]


def read_core_baselines(bundle_dir) -> dict[str, tuple[int, str]]:
    """Task label -> (line, text of its "Random baseline") from `eval_meta_data.csv`."""
    path = Path(bundle_dir) / "eval_meta_data.csv"
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            missing = {"Eval Task", "Random baseline"} - set(reader.fieldnames or ())
            if missing:
                raise UserError(f"{path}, line 1: there is no column {sorted(missing)[0]!r}.")
            return {row["Eval Task"]: (reader.line_num, row["Random baseline"] or "") for row in reader}
    except FileNotFoundError:
        raise UserError(f"there is no {path}. Get the bundle again.") from None
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} cannot be read ({error}).") from None


# %% [markdown]
# ### `read_core_examples`
# One JSON object a line. Numbers are accepted where text is wanted, since they turn into text in the prompt anyway.


# %%
def question_text(value, name: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f'"{name}" must be text, not {value!r:.60}')
    return str(value)


def checked_question(item, task_type: str) -> dict:
    """The fields of one question that its type needs, checked. Raises ValueError that says what is wrong."""
    if not isinstance(item, dict):
        raise ValueError(f"not a JSON object: {item!r:.60}")
    missing = [name for name in CORE_TASK_FIELDS[task_type] if name not in item]
    if missing:
        raise ValueError(f'a {task_type} question without "{missing[0]}"')
    question = {}
    for name in CORE_TASK_FIELDS[task_type]:
        value = item[name]
        if name in ("choices", "context_options"):
            if not isinstance(value, list) or len(value) < 2:
                raise ValueError(f'"{name}" must be a list of at least two texts')
            value = options = [question_text(option, name) for option in value]
        elif name == "gold":
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(options):
                raise ValueError(f'"gold" is {value!r:.60}; it must be 0 to {len(options) - 1}, one of the options')
        else:
            value = question_text(value, name)
        question[name] = value
    return question


def read_core_examples(path, task_type: str) -> tuple[list[dict], list[int]]:
    """(questions, their line numbers) of a JSON lines file; empty lines are passed over.

    Raises UserError naming file and line for one that is not a question of this type, or a file without questions.
    """
    examples, line_numbers = [], []
    with open(path, "rb") as file:  # bytes: a line ends at \n and at no other character that Unicode calls a line end
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                examples.append(checked_question(json.loads(line.rstrip()), task_type))
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number}: not JSON ({error.msg} at column {error.colno}).") from None
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number}: {error}.") from None
            line_numbers.append(number)
    if not examples:
        raise UserError(f"{path} has no examples in it. Get the bundle again.")
    return examples, line_numbers


# %% [markdown]
# ### `load_core_tasks`
# Everything that can be wrong with a bundle is found here, in seconds.


# %%
def core_task_file(bundle_dir, place: str, entry) -> Path:
    """The question file that an entry of `core.yaml` names. Raises UserError when it is missing or outside."""
    uri = entry.get("dataset_uri") if isinstance(entry, dict) else None
    if not isinstance(uri, str) or not uri:
        raise UserError(f"{place}: a task without dataset_uri, the name of its question file.")
    folder = Path(bundle_dir) / "eval_data"
    path = folder / uri
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{place}: dataset_uri {uri!r} leads out of {folder}.")
    if not path.is_file():
        raise UserError(f"{place}: there is no {path}. Get the bundle again, or take the task out of core.yaml.")
    return path


def check_core_files(bundle_dir) -> None:
    """Raise UserError naming the first file of the bundle that is missing."""
    for place, entry in read_core_entries(bundle_dir):
        core_task_file(bundle_dir, place, entry)
    read_core_baselines(bundle_dir)


def load_core_task(bundle_dir, place: str, entry, baselines: dict[str, tuple[int, str]]) -> CoreTask:
    """One task with its questions. Raises UserError naming file and line."""
    path = core_task_file(bundle_dir, place, entry)
    label, task_type, shots = entry.get("label"), entry.get("icl_task_type"), entry.get("num_fewshot")
    delimiter = entry.get("continuation_delimiter", " ")
    if not isinstance(label, str) or not label:
        raise UserError(f"{place}: a task without label.")
    if not isinstance(task_type, str) or task_type not in CORE_TASK_FIELDS:
        raise UserError(
            f"{place}: {label} has the icl_task_type {task_type!r}; it can be {', '.join(CORE_TASK_FIELDS)}."
        )
    shots = shots[0] if isinstance(shots, list) and shots else None
    if isinstance(shots, bool) or not isinstance(shots, int) or shots < 0:
        raise UserError(f"{place}: {label} needs num_fewshot, a list with one number of examples, as [10].")
    if not isinstance(delimiter, str):
        raise UserError(f"{place}: {label} has the continuation_delimiter {delimiter!r}; it must be text.")
    metadata = Path(bundle_dir) / "eval_meta_data.csv"
    if label not in baselines:
        raise UserError(f"{metadata} has no row for {label}, so its random baseline is unknown. Add one.")
    line, baseline_text = baselines[label]
    try:
        baseline = float(baseline_text)
    except ValueError:
        baseline = -1.0
    if not 0 <= baseline < 100:
        raise UserError(
            f"{metadata}, line {line}: the random baseline of {label} is {baseline_text!r}; "
            "it must be a percentage from 0 to below 100."
        )
    examples, line_numbers = read_core_examples(path, task_type)
    if len(examples) <= shots:
        raise UserError(
            f"{path} has {len(examples)} examples, too few for {label}: each is asked after {shots} others."
        )
    return CoreTask(label, task_type, shots, delimiter, baseline, path, examples, line_numbers)


def load_core_tasks(bundle_dir) -> list[CoreTask]:
    """All tasks of a bundle in the order of its `core.yaml`, read and checked. Spec section 13.1."""
    entries, baselines = read_core_entries(bundle_dir), read_core_baselines(bundle_dir)
    tasks = [load_core_task(bundle_dir, place, entry, baselines) for place, entry in entries]
    labels = [task.label for task in tasks]
    for index, (place, _) in enumerate(entries):
        if labels[index] in labels[:index]:
            raise UserError(f"{place}: the label {labels[index]} is there twice.")
    return tasks


# %% [markdown]
# ### `prepare_core_bundle`
# Downloads and unpacks once; a bundle that has lost a file is unpacked again from the archive. No checksum of the
# archive has been published, so what is verified is that every file in it arrived whole and that none is missing.

# %%
CORE_BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"


def prepare_core_bundle(bundle_dir=None) -> str:
    """The folder of a complete bundle: `bundle_dir`, or `<base>/eval_bundle`, downloaded on demand.

    Raises UserError when a file is missing, the download fails, or the archive is damaged or unsafe.
    """
    if bundle_dir is not None:
        check_core_files(bundle_dir)
        return str(bundle_dir)
    target = Path(get_base_dir()) / "eval_bundle"
    with FileLock(f"{target}.lock"):  # every rank comes by; the first one does the work
        if target.is_dir():
            try:
                check_core_files(target)
                return str(target)
            except UserError:
                pass  # incomplete: unpacked again below
        try:
            zip_path = download_file_with_lock(CORE_BUNDLE_URL, "eval_bundle.zip")
        except requests.RequestException as error:
            raise UserError(
                f"CORE's questions could not be downloaded from {CORE_BUNDLE_URL} ({type(error).__name__}). "
                f"Try again when the network is back, or put the bundle at {target} yourself."
            ) from None
        unpack_core_bundle(zip_path, target)
    return str(target)
