"""What a source is: a file under nb_src in jupytext's percent format, read into cells.

A *spine* is nb_src/NAME.py, a normal program; the *chapters* that it imports are nb_src/PACKAGE/CHAPTER.py.
A *fault* is one line for a person: "file:line: what is wrong and what to do".
"""

import ast
import difflib
import functools
import io
import re
import tokenize
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import jupytext
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_raw_cell

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

PERCENT = {"extension": ".py", "format_name": "percent", "comment_magics": False}
NEW_CELL = {"code": new_code_cell, "markdown": new_markdown_cell, "raw": new_raw_cell}
MARKER = re.compile(r"# %%( |$)")
# What jupytext takes for the start of a cell: wider than MARKER, the one form that sources may use.
JUPYTEXT_MARKER = re.compile(r"\s*#\s*(%%%*(\s|$)|<codecell>\s*$|In\[[0-9 ]*\]:?\s*$)")
KEPT_OPTIONS = ("tags", "cellView")  # cell metadata that a source may carry; the second is Colab's form view
DEFINED_ABOVE = re.compile(r"# defined above: (\w+(?:, \w+)*) \((\w+\.\w+)\)")
FOLDED_TAG = "folded"  # a cell that a notebook shows closed: what it holds is long, and not the story
PAPERMILL_TAGS = {"injected-parameters", "papermill-error-cell-tag"}
# `source_hash = "{{source_hash}}"` in a spine: the build writes what it was made from, so that a run can say it.
STAMP_PLACEHOLDER = "{{source_hash}}"
SOURCE_STAMP = re.compile(r'(?<=^source_hash = ")[0-9a-f]{64}(?="$)', re.M)
COLAB = "https://colab.research.google.com/"
COLAB_LINK = re.compile(re.escape(COLAB) + r"github/[\w.-]+/[\w.-]+/blob/[\w.-]+/")
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
OTHER_SCOPES = (*DEFINITIONS, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


class Refused(Exception):
    """What a person has to put right: one fault for each argument. Whoever raises it has changed nothing."""


@dataclass(eq=False)
class Source:
    path: str  # relative to nb_src
    text: str
    header: str = ""  # jupytext's YAML header, if there is one
    metadata: dict = field(default_factory=dict)
    cells: list["Cell"] = field(default_factory=list)

    @property
    def module(self) -> str:
        return self.path[:-3].replace("/", ".")

    @property
    def is_spine(self) -> bool:
        return "/" not in self.path

    def fault(self, line: int, message: str) -> str:
        return f"nb_src/{self.path}:{line}: {message}"


@dataclass(eq=False)
class Cell:
    source: Source
    index: int
    line: int  # of its `# %%`, from 1; the text begins on the next line
    kind: str  # code, markdown or raw
    text: str  # as in a notebook
    options: dict  # tags and the like
    chunk: str  # its own bytes in the source, without the blank lines before the next cell
    gap: str  # the end of its last line and those blank lines
    tree: ast.Module | None = None  # of a code cell; its line numbers are those of the source


@dataclass(eq=False)
class Project:
    root: Path
    settings: dict  # [tool.unrolled] of pyproject.toml
    texts: dict[str, str]
    sources: dict[str, Source] = field(default_factory=dict)  # by module

    @property
    def chapters(self) -> dict[str, Source]:
        return {name: source for name, source in self.sources.items() if not source.is_spine}

    @property
    def spines(self) -> dict[str, Source]:
        return {name: source for name, source in self.sources.items() if source.is_spine}


@functools.lru_cache(maxsize=256)  # pull reads most of them twice; nothing changes a Source
def read_source(path: str, text: str) -> Source:
    """Split a source into cells; raises Refused where it is not in the form that jupytext itself would write."""
    source, lines = Source(path, text), text.split("\n")
    for number, line in enumerate(lines, 1):
        if re.search("[\ud800-\udfff]", line):
            raise Refused(source.fault(number, "not UTF-8: save the file as UTF-8"))
        if line and line.splitlines() != [line]:
            strange = next(character for character in line if len(f".{character}.".splitlines()) > 1)
            raise Refused(source.fault(number, f"U+{ord(strange):04X} would end a line for jupytext: write an escape"))
    parse(source, text, whole=True)
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = [token for token in tokens if token.type == tokenize.COMMENT and token.start[1] == 0]
    marks = [token.start[0] for token in comments if MARKER.match(token.string)]
    source.header = "".join(line + "\n" for line in lines[: marks[0] - 1]) if marks else text
    if not marks or source.header.strip() and not source.header.startswith("# ---\n"):
        raise Refused(source.fault(1, "a source begins with a cell: write `# %%` or `# %% [markdown]` above this"))
    bounds = [mark - 1 for mark in marks] + [len(lines)]
    chunks = ["\n".join(lines[a:b] + [""] * (b < len(lines))) for a, b in zip(bounds, bounds[1:], strict=False)]
    source.metadata = jupytext.reads(source.header, PERCENT).metadata
    for mark, chunk in zip(marks, chunks, strict=True):
        source.cells.append(read_cell(source, mark, chunk))
    return source


def read_cell(source: Source, line: int, chunk: str) -> Cell:
    bare = chunk.rstrip("\n")
    found, *more = jupytext.reads(bare + "\n", PERCENT).cells
    if more:
        raise Refused(source.fault(line, "jupytext splits this cell: reword a comment in it like `# %%` or `# In[1]`"))
    options = {key: value for key, value in found.metadata.items() if key != "lines_to_next_cell"}
    active = [tag for tag in options.get("tags", []) if tag.startswith("active")]  # jupytext comments such cells out
    for option in [key for key in options if key not in KEPT_OPTIONS] + active:
        raise Refused(source.fault(line, f"no notebook built here keeps the cell option `{option}`: remove it"))
    written = write_cell(found.cell_type, found.source, options)
    if bare != written:
        pairs = zip((bare + "\n").split("\n"), (written + "\n").split("\n"), strict=False)
        number, (have, want) = next((n, pair) for n, pair in enumerate(pairs, line) if pair[0] != pair[1])
        raise Refused(source.fault(number, f"write `{want}`, as jupytext does, instead of `{have}`"))
    cell = Cell(source, len(source.cells), line, found.cell_type, found.source, options, bare, chunk[len(bare) :])
    if cell.kind == "code":
        cell.tree = parse(source, "\n" * line + cell.text)
    return cell


def write_cell(kind: str, text: str, options: dict) -> str:
    """One cell in percent format as jupytext writes it, without the blank lines after it (and without the indentation
    of the marker, which jupytext takes from the first line)."""
    metadata = {"jupytext": {"notebook_metadata_filter": "-all"}}
    notebook = new_notebook(cells=[NEW_CELL[kind](text, metadata=options)], metadata=metadata)
    return jupytext.writes(notebook, PERCENT).lstrip(" \t").rstrip("\n")


def parse(source: Source, text: str, whole: bool = False) -> ast.Module:
    try:
        tree = ast.parse(text)
        if whole:
            compile(tree, source.path, "exec", dont_inherit=True)  # finds a `return` outside a function and its like
        return tree
    except SyntaxError as error:
        line = text.split("\n")[(error.lineno or 1) - 1].strip()
        hint = " (only IPython knows such lines: write Python)" if line.startswith(("%", "!")) else ""
        raise Refused(source.fault(error.lineno or 1, f"not valid Python: {error.msg}: `{line}`{hint}")) from None


def read_project(root: Path, texts: dict[str, str] | None = None) -> Project:
    """All sources of a tree, or `texts` instead of its files."""
    folder, pyproject = root / "nb_src", root / "pyproject.toml"
    if texts is None:
        paths = sorted(path for path in [*folder.glob("*.py"), *folder.glob("*/*.py")] if path.name != "__init__.py")
        content = [path.read_bytes().decode(errors="surrogateescape") for path in paths]  # read_source refuses such
        texts = {path.relative_to(folder).as_posix(): text for path, text in zip(paths, content, strict=True)}
    settings = {"branch": "main", "gpu": "A100"}
    if pyproject.exists():
        settings.update(tomllib.loads(pyproject.read_text("utf-8")).get("tool", {}).get("unrolled", {}))
    if not settings.get("repository", "").startswith("https://github.com/"):
        raise Refused('pyproject.toml: add to [tool.unrolled] the line repository = "https://github.com/OWNER/NAME"')
    project, faults = Project(root, settings, texts), []
    for path, text in texts.items():
        try:
            source = read_source(path, text)
            project.sources[source.module] = source
        except Refused as refused:
            faults += refused.args
    if faults:
        raise Refused(*faults)
    return project


def is_local(project: Project, node: ast.AST) -> bool:
    """Is this an import of something under nb_src?"""
    if not isinstance(node, (ast.Import, ast.ImportFrom)):
        return False
    modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
    tops = {module.split(".")[0] for module in project.sources}
    return getattr(node, "level", 0) > 0 or any(module.split(".")[0] in tops for module in modules)


def local_imports(project: Project, cell: Cell) -> list[ast.ImportFrom]:
    return [node for node in cell.tree.body if is_local(project, node)] if cell.tree else []


def names_of(node: ast.ImportFrom) -> str:
    return ", ".join(alias.name for alias in node.names)


def addresses(project: Project, name: str) -> dict[str, str]:
    """What markdown writes as a placeholder -> what the notebook `name` shows instead."""
    badge = f"[![Open in Colab]({COLAB}assets/colab-badge.svg)]({colab_base(project)}notebooks/{name}.ipynb)"
    return {"{{colab_badge}}": badge, "{{repository}}": project.settings["repository"]}


def colab_base(project: Project) -> str:
    repository = project.settings["repository"].removeprefix("https://github.com/").rstrip("/")
    return f"{COLAB}github/{repository}/blob/{project.settings['branch']}/"


def nearest(word: str, words: Iterable[str]) -> str:
    match = difflib.get_close_matches(word, list(words), n=1, cutoff=0)
    return f"; the nearest is `{match[0]}`" if match else ""
