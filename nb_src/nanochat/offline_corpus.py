# %% [markdown]
# ## Text without a network
#
# A language model needs text, and a machine without a network has more of it than one thinks. Whoever can run this
# notebook has some twenty million characters of technical English on the disk, written by thousands of people: the
# documentation inside Python and the scientific packages. This chapter collects it. The files are read as text and
# taken apart with `ast`; nothing is imported, so no package starts for the sake of its docstrings.
#
# Two things decide whether so small a corpus is any good. Duplicates must go: documentation repeats itself, and a
# passage that stands in training and in validation text turns a measurement into a memory test. And tables, plots
# drawn with characters and lists of names must go, because they are not English.

# %%
import ast
import gc
import hashlib
import importlib.machinery
import importlib.metadata
import inspect
import os
import random
import re
import sys
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from nanochat.runtime import UserError

# %% [markdown]
# ### Where the text comes from
# Packages are read in this order until the corpus is full. All of them come with the notebook itself, so two machines
# with the same requirements get the same corpus whatever else lies on them. One that is missing is passed over.

# %% tags=["folded"]
OFFLINE_CHARACTERS = 20_000_000
OFFLINE_RULES = 1  # raise it when a rule of this chapter changes: corpora of the old rules are then built anew
OFFLINE_PACKAGES = (
    "numpy", "torch", "sympy", "networkx", "matplotlib", "pyarrow", "mpmath", "mpl_toolkits", "huggingface_hub",
    "IPython", "tornado", "prompt_toolkit", "fontTools", "pydantic", "PIL", "fsspec", "pyparsing", "jinja2", "requests",
    "urllib3", "zmq", "jupyter_client", "traitlets", "filelock", "dateutil", "psutil", "tqdm", "setuptools", "pip",
)  # fmt: skip

# Tests, generated files, and copies of packages that stand elsewhere.
OFFLINE_SKIPPED_FOLDERS = frozenset(
    "test tests testing __pycache__ site-packages dist-packages lib2to3 idlelib ensurepip _vendor vendor _vendored "
    "externals third_party thirdparty generated _generated".split()
)


def offline_folders() -> dict[str, list[str]]:
    """Name → folders with its Python files, in reading order, of everything in the list that is installed."""
    folders = {"python": [sysconfig.get_paths()["stdlib"]]}
    for name in OFFLINE_PACKAGES:
        spec = importlib.machinery.PathFinder.find_spec(name)  # looks, and runs nothing
        if spec is not None and spec.submodule_search_locations:
            folders[name] = sorted(spec.submodule_search_locations)
    return folders


def offline_installation() -> str:
    """16 hex digits that change with the version of Python, of any package in the list, or of the rules here."""
    distribution_names = {"PIL": "pillow", "zmq": "pyzmq", "dateutil": "python-dateutil", "mpl_toolkits": "matplotlib"}
    versions = [f"rules {OFFLINE_RULES}", f"characters {OFFLINE_CHARACTERS}", f"python {sys.version.split()[0]}"]
    for name in offline_folders():
        try:
            versions.append(f"{name} {importlib.metadata.version(distribution_names.get(name, name))}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(name)  # Python itself, or a folder that no installer knows
    return hashlib.sha256("\n".join(versions).encode()).hexdigest()[:16]


# %% [markdown]
# ### `docstrings_of`
# The docstrings of one file, in the order of the source, each with the name under which a reader would look it up.
# Functions that are written in C get their documentation through calls such as `add_docstr(torch.asin, r"""...""")`,
# and those texts are among the best there are.


# %% tags=["folded"]
def docstrings_of(source: str, module: str):
    """Yield (name, docstring) of a Python file given as text; nothing when it does not parse.

    Names are relative to `module`; the docstring of the module itself has the name "".
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's code
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    yield "", ast.get_docstring(tree) or ""
    stack = [(node, "") for node in reversed(tree.body)]
    while stack:
        node, prefix = stack.pop()
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield prefix + node.name, ast.get_docstring(node) or ""
            if isinstance(node, ast.ClassDef):
                stack.extend((child, f"{prefix}{node.name}.") for child in reversed(node.body))
        elif isinstance(node, (ast.If, ast.Try)):
            stack.extend((child, prefix) for child in reversed(node.body))
        elif isinstance(node, (ast.Expr, ast.Assign)) and isinstance(node.value, ast.Call):
            yield from attached_docstring(node.value)
        elif isinstance(node, ast.Assign) and module == "pydoc_data.topics" and isinstance(node.value, ast.Dict):
            yield from sorted(ast.literal_eval(node.value).items())  # the chapters that help() shows


def attached_docstring(call: ast.Call):
    """Yield (name, text) when `call` attaches documentation to an object; nothing for any other call."""
    function = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
    if not re.search("add_?(new)?doc", function):
        return
    nodes = list(ast.walk(call))
    formatted = [node.value for node in nodes if isinstance(node, ast.Attribute) and node.attr == "format"]
    strings = [node for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    names, parts = [], []
    for node in sorted(strings, key=lambda node: (node.lineno, node.col_offset)):
        text = node.value
        if node in formatted:  # what str.format would fill in is left out, its doubled braces are undone
            text = re.sub(r"^\s*\{\w+\}\s*?\n", "", text, flags=re.MULTILINE)
            text = text.replace("{{", "{").replace("}}", "}")
        (names if re.fullmatch(r"[\w.]+", text) else parts).append(text)
    described = call.args[0] if call.args else None
    name = ast.unparse(described) if isinstance(described, ast.Attribute) else ".".join(names)
    yield name, inspect.cleandoc("".join(parts))


# %% [markdown]
# ### `ParagraphFilter`
# The unit of cleaning is the paragraph. One goes when the same letters have been seen anywhere before (case, digits
# and punctuation do not count, so a copy with another number in it is a copy), or when most of it is not letters.
# This holds over the whole corpus, so no long paragraph can stand on both sides of the validation split.

# %% tags=["folded"]
NOT_A_LETTER = bytes(code for code in range(256) if not chr(code).isascii() or not chr(code).isalpha())
LONG_PARAGRAPH = 80  # letters; shorter ones ("Returns", ">>> import numpy as np") are part of the language


def letters_of(text: str) -> bytes:
    """The ASCII letters of a text in lower case, and nothing else."""
    return text.lower().encode("ascii", "ignore").translate(None, NOT_A_LETTER)


class ParagraphFilter:
    """Call it with a text to get its paragraphs that are new and made of letters, joined by blank lines."""

    def __init__(self):
        self.seen = set()

    def __call__(self, text: str) -> str:
        kept = []
        for paragraph in re.split(r"\n\s*\n", text.expandtabs(4)):
            letters = letters_of(paragraph)
            if len(paragraph) > 100 and len(letters) < 0.5 * sum(map(len, paragraph.split())):
                continue
            if len(letters) >= LONG_PARAGRAPH:
                key = hashlib.blake2b(letters, digest_size=8).digest()
                if key in self.seen:
                    continue
                self.seen.add(key)
            kept.append(paragraph.rstrip())
        return "\n\n".join(kept).strip("\n")


# %% [markdown]
# ### `is_english`
# Lists of names, grammars and generated tables have words, but hardly any of the small ones that hold sentences
# together.

# %% tags=["folded"]
ENGLISH_SMALL_WORDS = frozenset(
    "the of and to in a is that for it as with be by this are on or from an if not can which at will when has".split()
)


def is_english(text: str) -> bool:
    """Whether at least a tenth of the words are the small ones that no English prose does without."""
    words = re.findall("[a-z]+", text.lower())
    return sum(word in ENGLISH_SMALL_WORDS for word in words) > 0.1 * len(words)


# %% [markdown]
# ### `collect_offline_documents`
# One document is what a reader would read in one sitting: the docstrings of a module under its name, cut between two
# definitions when it grows too long. A row of training tokens shows the model the beginning of a document and little
# of what comes after its end, so many documents of a page each teach more than a few long ones.

# %% tags=["folded"]
DOCUMENT_CHARACTERS = 3000
SHORTEST_DOCSTRING = 80  # characters; "See torch.lgamma." teaches nothing


@dataclass(frozen=True)
class OfflineDocument:
    """A text and the package that it comes from."""

    source: str
    text: str


def documents_of_module(source: str, module: str, paragraph_filter: ParagraphFilter):
    """Yield the documents of one Python file, each headed by the module's name, mostly 500 to 5000 characters long."""
    sections, size = [], 0
    for name, docstring in docstrings_of(source, module):
        text = paragraph_filter(docstring)
        if len(text) < SHORTEST_DOCSTRING:
            continue
        if size + len(text) > DOCUMENT_CHARACTERS and size > 500:
            yield "\n\n".join([module, *sections])
            sections, size = [], 0
        sections.append(f"{name}\n\n{text}" if name else text)
        size += len(text)
    if size > 200:
        yield "\n\n".join([module, *sections])


def collect_offline_documents(max_characters: int = OFFLINE_CHARACTERS) -> list[OfflineDocument]:
    """The corpus in reading order, without duplicates; the same list for the same installation.

    About ten seconds, nearly all of it `ast.parse`. Raises UserError when next to nothing is installed.
    """
    documents, characters, paragraph_filter = [], 0, ParagraphFilter()
    collecting = gc.isenabled()
    gc.disable()  # a syntax tree is a million objects without cycles: looking for some is time lost
    try:
        with tqdm(total=max_characters, desc="reading documentation", unit="char", unit_scale=True, mininterval=1,
                  file=sys.stdout) as bar:  # fmt: skip
            for package, module, path in offline_modules():
                source = path.read_text(encoding="utf-8", errors="ignore")
                in_triple_quotes = re.split("\"\"\"|'''", source)[1::2]
                if sum(map(len, in_triple_quotes)) < 300 and module != "pydoc_data.topics":
                    continue
                for text in documents_of_module(source, module, paragraph_filter):
                    text = text.encode("utf-8", "ignore").decode("utf-8")  # some hold half a surrogate pair
                    if is_english(text):
                        documents.append(OfflineDocument(package, text))
                        characters += len(text)
                        bar.update(len(text))
                if characters >= max_characters:
                    break
    finally:
        if collecting:
            gc.enable()
    if characters < 200_000:
        raise UserError(
            f"only {characters:,} characters of documentation were found in this Python installation, too few to train "
            "on. Install numpy, sympy or networkx, or name another data source."
        )
    return documents


def offline_modules():
    """Yield (package, module name, path) of every Python file to read, in a fixed order."""
    for package, folders in offline_folders().items():
        for folder in folders:
            above = folder if package == "python" else os.path.dirname(folder)
            for path, subfolders, files in os.walk(folder):
                subfolders[:] = sorted(set(subfolders) - OFFLINE_SKIPPED_FOLDERS)
                for file in sorted(files):
                    if file.endswith(".py"):
                        relative = Path(path, file).relative_to(above).with_suffix("")
                        yield package, ".".join(relative.parts).removesuffix(".__init__"), Path(path, file)


# %% [markdown]
# ### `split_offline_documents`
# A random twentieth is held out. Some documents differ from another only in a word here and there (a padding layer
# for one dimension, the same for two), which the paragraph filter cannot see. So a held-out document whose runs of
# thirteen words occur in the training text too often goes back to training.


# %% tags=["folded"]
def word_runs(text: str) -> set[tuple[str, ...]]:
    """The runs of 13 words that begin with a long word: a sample that two texts with a passage in common share."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + 13]) for i in range(len(words) - 12) if len(words[i]) >= 8}


def split_offline_documents(
    documents: list[OfflineDocument], held_out_share: float = 0.055, max_overlap: float = 0.2
) -> tuple[list[OfflineDocument], list[OfflineDocument]]:
    """(training, validation) in random but fixed order. No validation document shares more than `max_overlap` of its
    sampled runs of 13 words with the training text."""
    shuffled = list(documents)
    random.Random(0).shuffle(shuffled)
    wanted = held_out_share * sum(len(document.text) for document in documents)
    held_out = 0
    while wanted > 0:
        wanted -= len(shuffled[held_out].text)
        held_out += 1
    training, validation = shuffled[held_out:], shuffled[:held_out]
    runs = [word_runs(document.text) for document in validation]
    in_validation = set().union(*runs)
    in_training = set()
    arrived = training
    while arrived:  # what goes back to training may resemble another held-out document
        for document in arrived:
            in_training |= word_runs(document.text) & in_validation
        back = {i for i, sample in enumerate(runs) if len(sample & in_training) > max_overlap * len(sample)}
        arrived = [validation[i] for i in sorted(back)]
        training = training + arrived
        runs = [sample for i, sample in enumerate(runs) if i not in back]
        validation = [document for i, document in enumerate(validation) if i not in back]
    return training, validation


# %% [markdown]
# ### `offline_readme`
# Whoever opens the folder later should not have to guess what is in it.


# %% tags=["folded"]
def offline_readme(training: list[OfflineDocument], validation: list[OfflineDocument]) -> str:
    """The text of README.txt: what the corpus is, how large, and each source with its share."""
    characters = {}
    for document in training + validation:
        characters[document.source] = characters.get(document.source, 0) + len(document.text)
    total = sum(characters.values())
    lines = [
        "The documentation of the Python packages installed on this machine, as training text.",
        f"{total:,} characters in {len(training):,} training and {len(validation):,} validation documents.",
        "Each package's own licence applies to its text.",
        "",
    ]
    for source, count in sorted(characters.items(), key=lambda item: -item[1]):
        lines.append(f"{source:<20} {count:>12,} characters {count / total:>7.1%}")
    return "\n".join(lines) + "\n"
