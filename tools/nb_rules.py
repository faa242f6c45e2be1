"""The rules that let many sources share one notebook. Each function gives the faults that it finds."""

import ast
import builtins
import functools
import io
import json
import subprocess
import sys
import tempfile
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from nb_source import (
    DEFINED_ABOVE,
    DEFINITIONS,
    OTHER_SCOPES,
    Cell,
    Project,
    Refused,
    Source,
    addresses,
    is_local,
    nearest,
)


@functools.lru_cache(maxsize=256)
def bindings(source: Source) -> dict[str, tuple[str, int]]:
    """Each top-level name of a source -> (what it means, line). An import means the same thing wherever it stands
    ("torch.nn"), a definition only here ("nanochat.optim.muon_step")."""
    imported, defined = defaultdict(list), {}
    todo = [node for cell in source.cells if cell.tree for node in cell.tree.body][::-1]
    while todo:
        node, names = todo.pop(), []
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                meaning = alias.name if prefix or alias.asname else alias.name.split(".")[0]
                imported[alias.asname or meaning].append((prefix + meaning, node.lineno))
        elif isinstance(node, DEFINITIONS):
            shared = [part.names for part in ast.walk(node) if isinstance(part, ast.Global)]
            names = sum(shared, [node.name])
        elif isinstance(node, (ast.MatchAs, ast.MatchStar, ast.MatchMapping)):
            names = [getattr(node, "name", None), getattr(node, "rest", None)]
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names = [node.id]
        for name in filter(None, names):
            defined.setdefault(name, (f"{source.module}.{name}", node.lineno))
        todo += [] if isinstance(node, OTHER_SCOPES) else list(ast.iter_child_nodes(node))[::-1]
    for name, places in imported.items():  # more than one where an import has an alternative in try/except
        defined.setdefault(name, ("|".join(sorted({meaning for meaning, _ in places})), places[0][1]))
    return defined


def import_fault(project: Project, source: Source, cell: Cell, node: ast.Import | ast.ImportFrom) -> str | None:
    """What is wrong with one local import."""
    if isinstance(node, ast.Import) or node.level:
        return "write a local import as `from package.chapter import name`"
    if node.module not in project.chapters:
        return f"there is no chapter `{node.module}`{nearest(node.module, project.chapters)}"
    if any(alias.asname or alias.name == "*" for alias in node.names):
        return f"import names of {node.module} one by one and without `as`: a notebook has one namespace"
    defined = bindings(project.chapters[node.module])
    for alias in node.names:
        if alias.name not in defined:
            own = [name for name, (meaning, _) in defined.items() if meaning == f"{node.module}.{name}"]
            return f"{node.module} defines no `{alias.name}`{nearest(alias.name, own)}"
        if defined[alias.name][0] != f"{node.module}.{alias.name}":
            return f"{node.module} only imports `{alias.name}`: import it from where it is defined"
    if node not in cell.tree.body:
        return "a local import stands at the top level, not inside a block"
    if source.is_spine and not all(is_local(project, other) for other in cell.tree.body):
        return "local imports stand alone in a cell of a spine: move the other statements into another cell"
    around = source.text.split("\n")[node.end_lineno - 1].encode()[node.end_col_offset :].decode().strip()
    if node.col_offset or around and not around.startswith("#"):
        return "a local import stands alone on its lines"


def form_faults(project: Project, source: Source) -> Iterator[str]:
    """What one source does that does not work in a notebook of many."""
    written_out = [(address, name) for name, address in addresses(project, source.module).items()]
    for cell in source.cells:
        for number, line in enumerate(cell.text.split("\n"), cell.line + 1):
            for address, placeholder in written_out if cell.kind == "markdown" else ():
                if address in line:
                    yield source.fault(number, f"write {placeholder}: the address has its one place in pyproject.toml")
            if DEFINED_ABOVE.fullmatch(line):
                yield source.fault(number, "such a comment stands for an import in notebooks: write the import itself")
        for node in ast.walk(cell.tree) if cell.tree else ():
            if is_local(project, node) and (message := import_fault(project, source, cell, node)):
                yield source.fault(node.lineno, message)
            if isinstance(node, ast.Name) and node.id in ("__file__", "__name__", "globals") and not source.is_spine:
                yield source.fault(node.lineno, f"a chapter cannot use `{node.id}`: it is another one in a notebook")
            if isinstance(node, ast.ImportFrom) and node.module == "__future__" and not source.is_spine:
                yield source.fault(node.lineno, "a __future__ import would change every chapter below: do without it")
    tagged = [cell for cell in source.cells if "parameters" in cell.options.get("tags", []) and cell.tree]
    for extra in tagged[1:]:
        yield source.fault(extra.line, f"a second cell tagged `parameters`: keep the one at line {tagged[0].line}")
    for cell in tagged[:1]:
        for node in cell.tree.body:
            if not literal_of(node):
                yield source.fault(node.lineno, "a parameter is one name and one plain literal, like `depth = -1`")
        for token in tokenize.generate_tokens(io.StringIO(cell.text + "\n").readline):
            if token.type == tokenize.COMMENT and "=" in token.string:
                yield source.fault(cell.line + token.start[0], "no `=` in a comment here: papermill reads it as a type")


def literal_of(node: ast.AST) -> tuple | None:
    """(name, value) when this statement is `name = literal` with a value that has a type to infer."""
    try:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            value = ast.literal_eval(node.value)
            return None if value is None else (node.targets[0].id, value)
    except (ValueError, TypeError):
        pass
    return None


def name_faults(used: list[Source]) -> Iterator[str]:
    """A notebook is one namespace: a name has one meaning in it. `used`: the chapters in order, then the spine."""
    taken = {}
    for source in used:
        for name, (meaning, line) in bindings(source).items():
            if hasattr(builtins, name):
                yield source.fault(line, f"`{name}` would hide Python's own `{name}` from every cell below: rename it")
            other, where, at_line = taken.setdefault(name, (meaning, source, line))
            if other != meaning:
                place = where.fault(at_line, "rename one of them")
                yield source.fault(line, f"`{name}` means something else at {place}")


def undefined_faults(project: Project) -> Iterator[str]:
    """Names that nothing defines, found by ruff. Each source by itself: what holds there holds in every notebook, where
    the chapters of its local imports stand above it."""
    with tempfile.TemporaryDirectory() as folder:
        sources = {f"{module}.py": source for module, source in project.sources.items()}
        for name, source in sources.items():
            (Path(folder) / name).write_text(source.text, "utf-8")
        options = ["--isolated", "--no-cache", "--select=F821", "--output-format=json"]
        ruff = subprocess.run([sys.executable, "-m", "ruff", "check", *options, folder], capture_output=True, text=True)
    if ruff.returncode not in (0, 1):
        raise Refused(f"ruff, which finds undefined names, did not run (is it installed?): {ruff.stderr.strip()}")
    for found in sorted(json.loads(ruff.stdout), key=lambda found: (found["filename"], found["location"]["row"])):
        name = found["message"].split("`")[1]
        source = sources[Path(found["filename"]).name]
        yield source.fault(found["location"]["row"], f"nothing defines `{name}`: import or define it above")
