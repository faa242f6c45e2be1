"""A notebook is its script with every local import unrolled in place. Both ways.

build, script: a spine and its chapters become one notebook, or one flat program. pull: edits made in a notebook go back
to the sources. check: what a person has to put right. new: any Python file becomes a chapter. run: see nb_run.py.
jupytext reads and writes the sources and nbformat the notebooks; these files add only the unrolling.

A *hidden* cell is a spine's cell of local imports: a notebook does not show it, because the chapters stand there.
"""

import argparse
import ast
import hashlib
import io
import itertools
import json
import os
import re
import sys
import tempfile
import tokenize
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import nbformat
from nbformat.v4 import new_notebook

from nb_rules import form_faults, name_faults, undefined_faults
from nb_source import (
    COLAB_LINK,
    DEFINED_ABOVE,
    DEFINITIONS,
    FOLDED_TAG,
    JUPYTEXT_MARKER,
    NEW_CELL,
    PAPERMILL_TAGS,
    SOURCE_STAMP,
    STAMP_PLACEHOLDER,
    Cell,
    Project,
    Refused,
    Source,
    addresses,
    colab_base,
    local_imports,
    names_of,
    nearest,
    read_project,
    read_source,
    write_cell,
)

# ---- cells -> notebook


def unroll(project: Project, spine: Source) -> list[Cell]:
    """The cells of a notebook in order: the spine's, with the chapters in place of its cells of local imports."""
    cells, placed, faults = [], set(), []
    for cell in spine.cells:
        imports = local_imports(project, cell)
        cells += [] if imports else [cell]
        for node in imports:
            chapter = project.chapters.get(getattr(node, "module", None))  # None: a fault of form, found elsewhere
            if chapter is None or chapter in placed:
                continue
            for need in [need for part in chapter.cells for need in local_imports(project, part)]:
                if project.chapters.get(getattr(need, "module", None), spine) not in {spine, *placed}:
                    where = f"nb_src/{spine.path}:{node.lineno}: above this line"
                    add = f"{where} add `from {need.module} import {names_of(need)}`"
                    faults.append(chapter.fault(need.lineno, f"{need.module} is not above this chapter. {add}"))
            placed.add(chapter)
            cells += chapter.cells
    if faults:
        raise Refused(*faults)
    return cells


def import_comments(project: Project, cell: Cell) -> list[tuple[int, int, str]]:
    """For each local import of a chapter's cell: its first line, the one after its last, and the comment for it."""
    imports = local_imports(project, cell)
    first = cell.line + 1
    comments = [f"# defined above: {names_of(node)} ({node.module})" for node in imports]
    return [(n.lineno - first, n.end_lineno + 1 - first, text) for n, text in zip(imports, comments, strict=True)]


def shown(project: Project, cell: Cell, name: str) -> str:
    """A cell's text in the notebook `name`."""
    text = cell.text
    for placeholder, address in addresses(project, name).items() if cell.kind == "markdown" else ():
        text = text.replace(placeholder, address)
    if cell.kind == "code" and STAMP_PLACEHOLDER in text:
        text = text.replace(STAMP_PLACEHOLDER, source_stamp(project, name))
    lines = text.split("\n")
    for start, stop, comment in reversed(import_comments(project, cell)):
        lines[start:stop] = [comment]
    return "\n".join(lines)


def unshown(project: Project, origin: Cell | None, kind: str, text: str, name: str) -> str:
    """The inverse of `shown` for an edited notebook cell (origin: the cell it was) or a new one (None)."""
    if kind == "markdown":
        for placeholder, address in addresses(project, name).items():
            text = text.replace(address, placeholder)
    if kind != "code":
        return text
    text = SOURCE_STAMP.sub(STAMP_PLACEHOLDER, text)
    known, lines = {}, origin.text.split("\n") if origin else []
    for start, stop, comment in import_comments(project, origin) if origin else ():
        known[comment] = "\n".join(lines[start:stop])
    whole_line = re.compile(f"^{DEFINED_ABOVE.pattern}$")
    return "\n".join(known.get(line) or whole_line.sub(r"from \2 import \1", line) for line in text.split("\n"))


def cell_ids(cells: list[Cell]) -> list[str]:
    """`optim-muon_step` for the cell that defines it in nanochat/optim.py, and its like for the others."""
    times, ids = Counter(), []
    for cell in cells:
        stem = re.sub(r"[^a-zA-Z0-9_-]+", "-", f"{Path(cell.source.path).stem}-{cell_title(cell)}")[:56]
        times[stem] += 1
        ids.append(stem if times[stem] == 1 else f"{stem}--{times[stem]}")
    return ids


def cell_title(cell: Cell) -> str:
    """What a reader would call it: what it defines or calls, or the first words of its prose."""
    if not cell.tree:
        first = next((line for line in cell.text.split("\n") if re.search(r"\w", line)), "")
        return re.sub(r"\W+", "-", first.lower()).strip("-")[:40] + "-text"
    for node in sorted(cell.tree.body, key=lambda node: not isinstance(node, DEFINITIONS)):
        if isinstance(node, DEFINITIONS):
            return node.name
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            return "imports"
        named = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        named = named or getattr(getattr(node, "value", None), "func", None)
        if isinstance(named, (ast.Name, ast.Attribute)):
            return named.id if isinstance(named, ast.Name) else named.attr
    return "cell"


def plain(kind: str, text: str, metadata: dict) -> tuple:
    """What makes a cell the same cell for us. Outputs, ids and what Jupyter, Colab or papermill note do not count."""
    text = SOURCE_STAMP.sub(STAMP_PLACEHOLDER, text.replace("\r\n", "\n"))
    return kind, text.rstrip("\n") if kind == "code" else text, tuple(metadata.get("tags", []))


def plain_cells(notebook: dict) -> list[tuple]:
    """A person's cells: without papermill's, and without the empty ones that Jupyter leaves at the end."""
    found = [plain(cell["cell_type"], "".join(cell["source"]), cell["metadata"]) for cell in notebook["cells"]]
    return [cell for cell in found if (cell[1].strip() or cell[0] != "code") and not PAPERMILL_TAGS & set(cell[2])]


def first_difference(have: list, want: list) -> int:
    return next((n for n, (h, w) in enumerate(zip(have, want, strict=False)) if h != w), min(len(have), len(want)))


def first_line(text: str) -> str:
    return text.strip().split("\n")[0]


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def used_sources(cells: list[Cell], spine: Source) -> list[Source]:
    """The chapters in their order, then the spine."""
    return list(dict.fromkeys([cell.source for cell in cells if cell.source is not spine] + [spine]))


def source_stamp(project: Project, name: str) -> str:
    """One number for all sources of a notebook; `source_fingerprint` (nanochat/stages.py) finds it for a script."""
    spine = project.spines[name]
    digests = {source.path: digest(source.text) for source in used_sources(unroll(project, spine), spine)}
    return digest(json.dumps(digests, sort_keys=True))


def build_notebook(project: Project, name: str) -> nbformat.NotebookNode:
    """The notebook of a spine. Raises Refused when its sources break a rule of unrolling."""
    spine = project.spines[name]
    cells = unroll(project, spine)
    used = used_sources(cells, spine)
    faults = [fault for source in used for fault in form_faults(project, source)] + list(name_faults(used))
    if faults:
        raise Refused(*faults)
    gpu = spine.metadata.get("colab", {}).get("gpuType", project.settings["gpu"])
    notebook = new_notebook()
    for cell, cell_id in zip(cells, cell_ids(cells), strict=True):
        metadata = {**cell.options, "unrolled": {"source": cell.source.path, "cell": cell.index}}
        if FOLDED_TAG in cell.options.get("tags", []):
            metadata |= {"cellView": "form", "jupyter": {"source_hidden": True}}  # Colab's word for it, and Jupyter's
        notebook.cells.append(NEW_CELL[cell.kind](shown(project, cell, name), id=cell_id, metadata=metadata))
    notebook.metadata = nbformat.from_dict(
        {
            "accelerator": "GPU",
            "colab": {"gpuType": gpu, "provenance": [], "toc_visible": True},
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
            "unrolled": {  # for pull and build to know later what this came from, and whether either side was edited
                "spine": name,
                "address": {key: project.settings[key] for key in ("repository", "branch")},
                "sources": {source.path: digest(source.text) for source in used},
                "cells": digest(json.dumps(plain_cells(notebook))),
            },
        }
    )
    nbformat.validate(notebook)
    return notebook


def notebook_text(notebook: nbformat.NotebookNode) -> str:
    return nbformat.writes(notebook).rstrip("\n") + "\n"


def source_faults(project: Project, names: Iterable[str]) -> list[str]:
    """Everything that is wrong with the sources."""
    faults = [fault for source in project.sources.values() for fault in form_faults(project, source)]
    for name in names:
        try:
            build_notebook(project, name)
        except Refused as refused:
            faults += refused.args
    return list(dict.fromkeys([*faults, *undefined_faults(project)]))


# ---- build, check, script


def spine_names(project: Project, names: Iterable[str]) -> list[str]:
    for name in names:
        if Path(name).stem not in project.spines:
            raise Refused(f"there is no nb_src/{Path(name).stem}.py{nearest(Path(name).stem, project.spines)}")
    return [Path(name).stem for name in names] or list(project.spines)


def write_all(texts: dict[Path, str]) -> None:
    """Every temporary file is complete before the first one takes its place."""
    temporary = {path: path.with_name(f".{path.name}.tmp") for path in texts}
    try:
        for path, text in texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary[path].write_bytes(text.encode())
        for path in texts:
            os.replace(temporary[path], path)
    finally:
        for leftover in temporary.values():
            leftover.unlink(missing_ok=True)


def readme_texts(project: Project) -> tuple[str, str]:
    """README.md as it is, and with its Colab links at the public address."""
    path = project.root / "README.md"
    text = path.read_text("utf-8") if path.exists() else ""
    return text, COLAB_LINK.sub(colab_base(project), text)


def build(root: Path, names: list[str], force: bool = False) -> list[str]:
    """Write the notebooks that changed; refuses to lose an edit that was made in one. Returns what it did."""
    project, texts = read_project(root), {}
    for name in spine_names(project, names):
        path, notebook = root / "notebooks" / f"{name}.ipynb", build_notebook(project, name)
        old, text = path.read_text("utf-8") if path.exists() else "", notebook_text(notebook)
        if old and not force and holds_edits(old, notebook):
            raise Refused(f"notebooks/{name}.ipynb was edited: `pull` it first, or `build --force` drops the edits")
        texts.update({path: text} if old != text else {})
    readme, readdressed = readme_texts(project)
    texts.update({root / "README.md": readdressed} if readme != readdressed else {})
    write_all(texts)
    return [f"wrote {path.relative_to(root)}" for path in texts] or ["nothing to do"]


def holds_edits(text: str, built: nbformat.NotebookNode) -> bool:
    """Would building over this notebook file lose something that is neither in the sources nor was built before?"""
    try:
        old = json.loads(text)
        cells, stamp = plain_cells(old), old["metadata"].get("unrolled", {}).get("cells")
    except (ValueError, KeyError, TypeError):
        return True  # damaged, perhaps by a merge: a person should look
    return cells != plain_cells(built) and digest(json.dumps(cells)) != stamp


def check(root: Path, names: list[str]) -> list[str]:
    """Every fault of sources and built notebooks. Raises Refused when sources cannot be read."""
    project = read_project(root)
    names = spine_names(project, names)
    faults = source_faults(project, names)
    if faults:
        return faults  # notebooks cannot be compared with such sources
    for name in names:
        faults += notebook_faults(project, name)
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        if path.stem not in project.spines:
            faults.append(f"notebooks/{path.name}: has no nb_src/{path.stem}.py: remove one or add the other")
    readme, readdressed = readme_texts(project)
    if readme != readdressed:
        faults.append("README.md: a Colab link is not at the address in pyproject.toml: run `build`")
    return faults


def notebook_faults(project: Project, name: str) -> list[str]:
    """Where a committed notebook is not what `build` gives."""
    place, built = f"notebooks/{name}.ipynb: ", build_notebook(project, name)
    path = project.root / "notebooks" / f"{name}.ipynb"
    text = path.read_text("utf-8") if path.exists() else ""
    if text == notebook_text(built):
        return []
    try:
        notebook = json.loads(text)
        have, want = plain_cells(notebook), plain_cells(built)
    except (ValueError, KeyError, TypeError):
        return [f"{place}missing or not a notebook: run `build --force {name}`"]
    tops = "|".join(module.split(".")[0] for module in project.chapters)
    ids = Counter(cell.get("id") for cell in notebook["cells"])
    faults = [f"{place}cell id {i} stands twice: run `build --force {name}`" for i, times in ids.items() if times > 1]
    ran = [cell.get("id") for cell in notebook["cells"] if cell.get("outputs") or cell.get("execution_count")]
    if ran:
        others = f" and {len(ran) - 1} more" if len(ran) > 1 else ""
        faults.append(f"{place}cell {ran[0]}{others} with outputs: run `build {name}`, which drops them")
    for cell in notebook["cells"]:
        left = re.search(rf"^\s*(?:from|import) (?:{tops})\..*", "".join(cell["source"]), re.M)
        if left and cell["cell_type"] == "code":
            faults.append(f"{place}cell {cell.get('id')} has a local import left over: `{left[0].strip()}`")
    if have != want or not faults:
        number = first_difference(have, want)
        where = f"at cell {number + 1}" if have != want else "in its metadata"
        faults.append(f"{place}is not what its sources give {where}: `pull` it if you edited it, else `build {name}`")
    return faults


def script(root: Path, name: str) -> str:
    """A spine and its chapters as one program that runs alone."""
    project = read_project(root)
    (name,) = spine_names(project, [name])
    build_notebook(project, name)  # raises what is wrong
    cells = unroll(project, project.spines[name])
    chunks = [write_cell(cell.kind, shown(project, cell, name), cell.options) for cell in cells]
    lead = f"# Made from nb_src/{name}.py by tools/nb_convert.py: edit the sources instead."
    return "\n\n".join([lead, *chunks]) + "\n"


# ---- pull


def pull(root: Path, path: Path) -> list[str]:
    """Bring the edits of a notebook into its sources; only the bytes of edited cells change. Returns what it did."""
    try:
        notebook = nbformat.read(path, as_version=4)
    except (OSError, ValueError, nbformat.reader.NotJSONError) as error:
        raise Refused(f"{path}: not a notebook that can be read: {error}") from None
    stamp = notebook.metadata.get("unrolled")
    if not stamp:
        raise Refused(f"{path}: does not say what it was built from (metadata `unrolled`), so its cells have no home")
    project = read_project(root)
    stale = [p for p, old in stamp["sources"].items() if p not in project.texts or digest(project.texts[p]) != old]
    if stale:
        listed = ", ".join(f"nb_src/{p}" for p in stale)
        raise Refused(f"{path}: these changed after it was built: {listed}. Undo that, or carry the edits over by hand")
    project.settings.update(stamp["address"])
    name, built = stamp["spine"], build_notebook(project, stamp["spine"])
    cells = unroll(project, project.spines[name])
    homes = find_homes(path, notebook, cells, [cell.id for cell in built.cells])
    texts = {}
    for source in dict.fromkeys(cell.source for cell in cells):
        mine = [(origin, cell) for home, origin, cell in homes if home is source]
        if not mine:
            raise Refused(f"{path}: no cell of nb_src/{source.path} is left: remove the file and its imports instead")
        text = edited_text(project, source, mine, cells, name)
        texts.update({source.path: text} if text != source.text else {})
    if texts:
        prove(project, name, path, notebook, {**project.texts, **texts})
        write_all({root / "nb_src" / p: text for p, text in texts.items()})
    return [f"changed nb_src/{p}" for p in texts] or ["nothing to pull"]


def find_homes(path: Path, notebook: nbformat.NotebookNode, base: list[Cell], ids: list[str]) -> list[tuple]:
    """(source, the cell it was or None when it is new, notebook cell) for each cell that is a person's."""
    cells = [cell for cell in notebook.cells if not PAPERMILL_TAGS & set(cell.metadata.get("tags", []))]
    by_id = dict(zip(ids, base, strict=True))
    by_place = {(cell.source.path, cell.index): cell for cell in base}
    origins = {}
    for number, cell in enumerate(cells):
        mark = cell.metadata.get("unrolled", {})
        origin = by_place.get((mark.get("source"), mark.get("cell"))) or by_id.get(cell.get("id"))
        origin = origin or by_id.get(cell.metadata.get("id"))  # Colab keeps ids there
        if origin and origin not in origins.values():  # a copied or split cell takes its metadata along, and is new
            origins[number] = origin
    homes, faults = [], []
    for number, cell in enumerate(cells):
        above = next((origins[n].source for n in range(number, -1, -1) if n in origins), None)
        below = next((origins[n].source for n in range(number, len(cells)) if n in origins), None)
        if number not in origins and not cell.source.strip() and cell.cell_type == "code":
            continue
        if (above or below) is None or (above and below and above is not below):
            between = " and ".join(f"nb_src/{source.path}" for source in (above, below) if source) or "unknown cells"
            which = f"cell {number + 1} (id {cell.get('id')}), which begins `{first_line(cell.source)}`"
            faults.append(f"{path}: {which}, has no home between {between}: move it between two cells of one file")
        homes.append((above or below, origins.get(number), cell))
    if faults:
        raise Refused(*faults)
    return homes


def edited_text(project: Project, source: Source, mine: list[tuple], base: list[Cell], name: str) -> str:
    """A source with its cells as the notebook has them: (the cell it was or None, notebook cell) in `mine`."""
    pieces: list[tuple[str, Cell | None]] = []
    hidden = [cell for cell in source.cells if cell not in base]
    for number, (origin, cell) in enumerate(mine):
        following = next((other.index for other, _ in mine[number:] if other), len(source.cells))
        while hidden and hidden[0].index < following:  # a hidden cell stays above the visible one that followed it
            pieces.append((hidden[0].chunk, hidden.pop(0)))
        kind, text, tags = plain(cell.cell_type, cell.source, cell.metadata)
        if origin and (kind, text, tags) == plain(origin.kind, shown(project, origin, name), origin.options):
            pieces.append((origin.chunk, origin))
            continue
        options = {**(origin.options if origin else {}), "tags": list(tags)}
        options = {key: value for key, value in options.items() if value}
        pieces.append((write_cell(kind, unshown(project, origin, kind, text, name), options), origin))
    pieces += [(cell.chunk, cell) for cell in hidden]
    last = source.cells[-1]
    gaps = [cell.gap if cell not in (None, last) else "\n\n" for _, cell in pieces[:-1]] + [last.gap]
    return source.header + "".join(chunk + gap for (chunk, _), gap in zip(pieces, gaps, strict=True))


def prove(project: Project, name: str, path: Path, notebook: nbformat.NotebookNode, texts: dict[str, str]) -> None:
    """Refuse unless the new sources are as sound as the old ones and build the very notebook that is pulled."""
    lead = f"{path}: nothing was pulled, because "
    try:
        after = read_project(project.root, texts)
        after.settings = project.settings
        faults = source_faults(after, after.spines)
        if faults:  # those of before do not stand in the way
            known = {re.sub(r":\d+:", ":", fault) for fault in source_faults(project, project.spines)}
            faults = [fault for fault in faults if re.sub(r":\d+:", ":", fault) not in known]
    except Refused as refused:
        faults = refused.args
    if faults:
        raise Refused(lead + "these edits would break the sources:", *faults)
    have, want = plain_cells(notebook), plain_cells(build_notebook(after, name))
    if have != want:
        number = first_difference(have, want)
        mine, built = (first_line(cells[number][1]) if number < len(cells) else "" for cells in (have, want))
        hint = "was a cell moved among those of another file, or does one hold a `# %%` or a form feed?"
        raise Refused(f"{lead}where it has the cell `{mine}`, a build would put `{built}`: {hint}")


# ---- new


def new(path: Path) -> str:
    """Any Python file as a chapter with the same syntax tree: a cell and a heading for each class and function."""
    with tokenize.open(path) as file:
        text = file.read()
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise Refused(f"{path}:{error.lineno}: not valid Python: {error.msg}") from None
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and JUPYTEXT_MARKER.match(token.line):
            raise Refused(f"{path}:{token.start[0]}: `{token.string}` would begin a cell: reword the comment")
    lines = text.replace("\f", "").split("\n")
    groups, done, definition = [], 0, True  # groups: (name of a definition or "", first line, last line)
    for node in tree.body:
        alone = isinstance(node, DEFINITIONS)
        if alone or definition:
            groups.append((node.name if alone else "", done, node.end_lineno))
        done, definition = node.end_lineno, alone
        rest = itertools.takewhile(lambda n: lines[n][:1] in ("", " ", "\t"), range(done, len(lines)))
        done = max([done, *(n + 1 for n in rest if lines[n].strip())])  # indented comments after a body belong to it
        groups[-1] = (*groups[-1][:2], done)
    groups = groups or [("", 0, 0)]
    groups[-1] = (*groups[-1][:2], len(lines))
    chunks = [write_cell("markdown", f"## {path.stem}", {})]
    for name, start, stop in groups:
        chunks += [write_cell("markdown", f"### `{name}`", {})] if name else []
        body = "\n".join(lines[start:stop])
        chunks.append("# %%\n" + re.sub(r"\A(\s*\n)+", "", body).rstrip())
    chapter = "\n\n".join(chunks) + "\n"
    read_source(path.name, chapter)
    if ast.dump(ast.parse(chapter)) != ast.dump(tree):
        raise Refused(f"{path}: a string holds a form feed, which ends a line for jupytext: write it as \\f")
    return chapter


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent, help="the repository")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("build", help="sources to notebooks")
    one.add_argument("names", nargs="*", metavar="NAME")
    one.add_argument("--force", action="store_true", help="overwrite a notebook that was edited")
    one = commands.add_parser("pull", help="edits made in a notebook to the sources they came from")
    one.add_argument("notebook", type=Path)
    one = commands.add_parser("check", help="exit 1 and name the lines to fix")
    one.add_argument("names", nargs="*", metavar="NAME")
    one = commands.add_parser("script", help="one flat program that runs alone")
    one.add_argument("name", metavar="NAME")
    one.add_argument("-o", dest="output", type=Path, required=True)
    one = commands.add_parser("run", help="build and execute a notebook")
    one.add_argument("name", metavar="NAME", help="a spine, or a path to a notebook")
    one.add_argument("-p", dest="parameters", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"))
    one.add_argument("-f", dest="file", type=Path, help="YAML file of parameters; -p wins over it")
    one.add_argument("-o", dest="output", type=Path, required=True)
    one = commands.add_parser("new", help="any Python file as a chapter")
    one.add_argument("script", type=Path)
    one.add_argument("-o", dest="output", type=Path, help="default: standard output")
    given = parser.parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # compile() on other people's strings, nbformat on ids that Colab drops
            return obey(given)
    except (Refused, OSError) as error:
        print("\n".join(error.args) if isinstance(error, Refused) else error, file=sys.stderr)
        return 1


def obey(given: argparse.Namespace) -> int:
    root, lines, status = given.root, [], 0
    if given.command == "run":
        import nb_run  # papermill takes long to import, and nothing else here needs it

        with tempfile.TemporaryDirectory() as folder:
            path = Path(given.name)
            if path.suffix != ".ipynb":
                project = read_project(root)
                (name,) = spine_names(project, [given.name])
                path = Path(folder) / f"{name}.ipynb"
                path.write_text(notebook_text(build_notebook(project, name)), "utf-8")
            return nb_run.run(path, given.parameters, given.file, given.output)
    if given.command == "build":
        lines = build(root, given.names, given.force)
    elif given.command == "pull":
        lines = pull(root, given.notebook)
    elif given.command == "check":
        faults = check(root, given.names)
        lines, status = faults or ["every notebook is what its sources say"], min(len(faults), 1)
    else:
        text = script(root, given.name) if given.command == "script" else new(given.script)
        if given.output:
            write_all({given.output: text})
        else:
            lines = [text.rstrip("\n")]
    print("\n".join(lines))
    return status


if __name__ == "__main__":
    sys.exit(main())
