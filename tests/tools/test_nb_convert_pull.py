import copy
import json

import nbformat
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_tree import BASE, COUNT, SPINE, Tree, cell_of, source_of

import nb_convert

SOURCES = {"nb_src/story.py": SPINE, "nb_src/alpha/base.py": BASE, "nb_src/alpha/count.py": COUNT}


@pytest.fixture
def built(tree):
    tree.build()
    return tree


def pull(tree, notebook, name="story"):
    return tree.run("pull", tree.save(notebook, name))


def refused(tree, notebook):
    return tree.refused("pull", tree.save(notebook))


def sources(tree):
    return {p.relative_to(tree.root).as_posix(): p.read_bytes().decode() for p in tree.root.glob("nb_src/**/*.py")}


def new_cell(text, kind="code", **metadata):
    return {"cell_type": kind, "id": "fresh", "metadata": metadata, "source": text}


def expect(tree, notebook, **changed):
    """Pull gives exactly these texts (story, base, count), and building again gives the notebook that was pulled."""
    before = nb_convert.plain_cells(notebook)
    status, printed = pull(tree, notebook)
    assert status == 0, printed
    paths = {"story": "nb_src/story.py", "base": "nb_src/alpha/base.py", "count": "nb_src/alpha/count.py"}
    assert sources(tree) == SOURCES | {paths[key]: text for key, text in changed.items()}
    assert sorted(printed.splitlines()) == sorted(f"changed {paths[key]}" for key in changed)
    tree.build()
    assert nb_convert.plain_cells(tree.notebook()) == before
    assert tree.run("check")[0] == 0


# ---- what pull does


def test_pull_of_an_unedited_notebook_changes_nothing(built):
    """A round trip that reformats sources."""
    assert built.run("pull", built.root / "notebooks/story.ipynb") == (0, "nothing to pull\n")
    assert sources(built) == SOURCES


def test_an_edit_comes_back_as_the_same_edit_in_one_file(built):
    """An edit that lands in the wrong file, or takes other lines with it."""
    notebook = built.notebook()
    cell = cell_of(notebook, "base-say")
    cell["source"] = source_of(cell).replace("print(text)", "print(text, flush=True)  # ünïcode\n")
    base = BASE.replace("print(text)", "print(text, flush=True)  # ünïcode\n")
    expect(built, notebook, base=base)


def test_edits_of_several_files_come_together(built):
    """Only the first edit surviving."""
    notebook = built.notebook()
    for cell_id, old, new in [
        ("story-total", "* factor", "* factor + 0"),
        ("count-count-text", "count", "counting on"),
    ]:
        cell_of(notebook, cell_id)["source"] = source_of(cell_of(notebook, cell_id)).replace(old, new)
    count = COUNT.replace("### `count`", "### `counting on`")
    expect(built, notebook, story=SPINE.replace("* factor", "* factor + 0"), count=count)


def test_the_comment_of_an_import_is_the_import_again(built):
    """`# defined above` written into a chapter, which then fails as a module."""
    notebook = built.notebook()
    cell = cell_of(notebook, "count-imports")
    cell["source"] = "import os\n" + source_of(cell)
    expect(built, notebook, count=COUNT.replace("import math", "import os\nimport math", 1))


def test_an_edited_comment_is_an_edited_import(built):
    """A name added to the comment and lost, or a removed comment whose import comes back."""
    notebook = built.notebook()
    text = "import math\n\n# defined above: UserError, ask, say (alpha.base)"
    cell_of(notebook, "count-imports")["source"] = text
    start, stop = COUNT.index("from alpha.base import ("), COUNT.index("\n\n# %% [markdown]\n# ### `count`")
    expect(built, notebook, count=COUNT[:start] + "from alpha.base import UserError, ask, say" + COUNT[stop:])


def test_the_badge_is_a_placeholder_again(built):
    """The public address frozen into a source."""
    notebook = built.notebook()
    cell = notebook["cells"][0]
    cell["source"] = source_of(cell).replace("# Story", "# A story")
    expect(built, notebook, story=SPINE.replace("# # Story", "# # A story"))


def test_pull_knows_the_address_that_the_notebook_was_built_with(built):
    """After the repository moved, every old notebook showing its badge as an edit."""
    notebook = built.notebook()
    notebook["cells"][0]["source"] = source_of(notebook["cells"][0]).replace("# Story", "# A story")
    built.write("pyproject.toml", '[tool.unrolled]\nrepository = "https://github.com/new/home"\n')
    assert pull(built, notebook)[0] == 0
    assert built.read("nb_src/story.py") == SPINE.replace("# # Story", "# # A story")


def test_tags_survive_in_both_directions(built):
    """A `parameters` tag lost on the way, so that papermill injects nothing."""
    notebook = built.notebook()
    cell_of(notebook, "story-total")["metadata"]["tags"] = ["slow"]
    cell = cell_of(notebook, "story-times")
    cell["source"] = source_of(cell).replace("times = 2", "times = 3")
    story = SPINE.replace("# %%\ntotal", '# %% tags=["slow"]\ntotal').replace("times = 2", "times = 3")
    expect(built, notebook, story=story)
    notebook = built.notebook()
    del cell_of(notebook, "story-total")["metadata"]["tags"]
    expect(built, notebook, story=SPINE.replace("times = 2", "times = 3"))


def test_a_cell_may_change_its_kind(built):
    """Markdown written into a source as code."""
    notebook = built.notebook()
    cell_of(notebook, "story-count-text").update(cell_type="raw", source="raw")
    expect(built, notebook, story=SPINE.replace("# %% [markdown]\n# # ▶ Count", "# %% [raw]\n# raw"))


def test_a_new_cell_goes_to_the_file_of_its_neighbours(built):
    """A cell added in a chapter that ends up in the spine, above the code it needs, or nowhere."""
    notebook = built.notebook()
    place = notebook["cells"].index(cell_of(notebook, "base-say-text"))
    notebook["cells"].insert(place, new_cell("## More\n\n- a\n", "markdown"))
    notebook["cells"].insert(place, new_cell("LIMIT = 3", tags=["x"]))
    notebook["cells"].append(new_cell("say(LIMIT)"))
    added = '# %% tags=["x"]\nLIMIT = 3\n\n# %% [markdown]\n# ## More\n#\n# - a\n#\n\n'
    base = BASE.replace("# %% [markdown]\n# ### `say`", added + "# %% [markdown]\n# ### `say`")
    notebook["cells"].pop()
    expect(built, notebook, base=base)


def test_a_new_cell_stands_below_the_hidden_one(built):
    """A new cell put above the local import that the notebook does not show: a NameError under python."""
    notebook = built.notebook()
    notebook["cells"].insert(-1, new_cell("say(0)"))
    notebook["cells"].append(new_cell("say(9)"))
    story = SPINE.replace("# %%\nsay(total)\n", "# %%\nsay(0)\n\n# %%\nsay(total)\n\n# %%\nsay(9)\n")
    expect(built, notebook, story=story)


def test_a_copied_or_split_cell_is_a_new_cell(built):
    """Jupyter copies a cell with its metadata: two cells that claim the same place, one of them lost."""
    notebook = built.notebook()
    cell = cell_of(notebook, "story-say")
    first = copy.deepcopy(cell) | {"id": "other", "source": "say(1)"}
    last = copy.deepcopy(cell) | {"id": "another", "source": "say(2)"}
    notebook["cells"][-1:] = [first, cell, last]
    expect(built, notebook, story=SPINE.replace("say(total)\n", "say(1)\n\n# %%\nsay(total)\n\n# %%\nsay(2)\n"))


def test_a_deleted_cell_is_deleted(built):
    """A deleted cell that comes back with the next build."""
    notebook = built.notebook()
    notebook["cells"] = [c for c in notebook["cells"] if c["id"] not in ("count-count-text", "story-say")]
    count = COUNT.replace("# %% [markdown]\n# ### `count`\n\n", "")
    story = SPINE.replace("\n# %%\nsay(total)\n", "")
    expect(built, notebook, count=count, story=story)


def test_cells_may_move_within_their_file(built):
    """A reordered chapter that pull silently puts back, or writes twice."""
    notebook = built.notebook()
    cells = notebook["cells"]
    cells[3], cells[4] = cells[4], cells[3]
    one, two = "# %%\nimport math\n\n\n", '# %%\nclass UserError(Exception):\n    """One sentence."""\n\n\n'
    expect(built, notebook, base=BASE.replace(one + two, two + one))


def test_what_jupyter_colab_and_papermill_add_is_ignored(built):
    """Outputs, timings and ids of other programs written into sources, or taken for edits."""
    notebook = built.notebook()
    notebook["metadata"]["widgets"] = {}
    notebook["metadata"]["kernelspec"] = {"name": "venv", "display_name": "mine", "language": "python"}
    for number, cell in enumerate(notebook["cells"]):
        cell["metadata"] |= {
            "id": f"x{number}",
            "execution": {"iopub.status.busy": "2024"},
            "papermill": {"status": "done"},
        }
        cell["metadata"].setdefault("tags", [])
        if cell["cell_type"] == "code":
            stream = {"output_type": "stream", "name": "stdout", "text": "hello"}
            cell.update(execution_count=number, outputs=[stream])
    notebook["cells"].insert(2, new_cell("times = 5", tags=["injected-parameters"]))
    notebook["cells"].insert(0, new_cell("An Exception was encountered", "markdown", tags=["papermill-error-cell-tag"]))
    notebook["cells"].insert(7, new_cell(""))
    notebook["cells"].append(new_cell("  \n"))
    for cell in notebook["cells"]:
        cell.setdefault("outputs", [])
        cell.setdefault("execution_count", None)
        if cell["cell_type"] != "code":
            del cell["outputs"], cell["execution_count"]
    assert pull(built, notebook) == (0, "nothing to pull\n")
    assert sources(built) == SOURCES


def test_a_notebook_from_colab_keeps_its_places(built):
    """Colab drops cell ids and writes nbformat 4.0: every cell homeless."""
    notebook = built.notebook()
    notebook["nbformat_minor"] = 0
    for cell in notebook["cells"]:
        cell["metadata"]["id"] = cell.pop("id")
    cell = notebook["cells"][-1]
    cell["source"] = "say(-total)"
    assert pull(built, notebook) == (0, "changed nb_src/story.py\n")
    assert built.read("nb_src/story.py") == SPINE.replace("say(total)", "say(-total)")
    for cell in notebook["cells"]:
        del cell["metadata"]["unrolled"]
    built.write("nb_src/story.py", SPINE)
    assert pull(built, notebook) == (0, "changed nb_src/story.py\n")


def test_a_file_without_line_end_keeps_none(tree):
    """A new line at the end of a file as the only trace of an edit elsewhere, or two cells on one line."""
    tree.write("nb_src/story.py", SPINE.rstrip("\n"))
    tree.build()
    notebook = tree.notebook()
    notebook["cells"].append(new_cell("say(9)"))
    assert pull(tree, notebook)[0] == 0
    assert tree.read("nb_src/story.py") == SPINE + "\n# %%\nsay(9)"


# ---- what pull refuses


def test_a_source_that_changed_since_the_build(built):
    """The newer edit of a colleague overwritten by an old notebook."""
    notebook = built.notebook()
    built.replace("nb_src/alpha/count.py", "counting to", "counting up to")
    cell_of(notebook, "story-say")["source"] = "say(1)"
    printed = refused(built, notebook)
    assert "story.ipynb: these changed after it was built: nb_src/alpha/count.py. Undo that, or carry" in printed
    (built.root / "nb_src/alpha/count.py").unlink()
    built.replace("nb_src/story.py", "from alpha.count import count\n", "")
    assert "these changed after it was built: nb_src/alpha/count.py, nb_src/story.py." in refused(built, notebook)


def test_a_cell_without_a_home(built):
    """A cell between two files, put into one of them by a guess."""
    notebook = built.notebook()
    place = notebook["cells"].index(cell_of(notebook, "count-counting-text"))
    notebook["cells"].insert(place, new_cell("\nLIMIT = 3\nMORE = 4"))
    message = (
        f"cell {place + 1} (id fresh), which begins `LIMIT = 3`, has no home between nb_src/story.py"
        " and nb_src/alpha/count.py: move it between two cells of one file"
    )
    assert message in refused(built, notebook)


def test_cells_that_lost_their_metadata(built):
    """A cell whose metadata and id are gone, attached to a file by a guess."""
    notebook = built.notebook()
    place = notebook["cells"].index(cell_of(notebook, "count-counting-text"))
    notebook["cells"][place].update(metadata={}, id="strange")
    assert f"cell {place + 1} (id strange), which begins `## Counting`, has no home" in refused(built, notebook)


def test_a_deletion_that_leaves_something_broken(built):
    """A chapter that no longer compiles after a pull."""
    notebook = built.notebook()
    notebook["cells"].remove(cell_of(notebook, "base-say"))
    printed = refused(built, notebook)
    assert "nothing was pulled, because these edits would break the sources:" in printed
    assert "nb_src/story.py:16: alpha.base defines no `ask`; the nearest is" in printed
    assert "nb_src/alpha/count.py:7: alpha.base defines no `ask`" in printed


def test_a_chapter_that_is_gone(built):
    """An empty source, which no later build can read."""
    notebook = built.notebook()
    notebook["cells"] = [cell for cell in notebook["cells"] if not cell["id"].startswith("count-")]
    assert "no cell of nb_src/alpha/count.py is left: remove the file and its imports instead" in refused(
        built, notebook
    )


def test_a_cell_moved_into_another_file(built):
    """A cell that a build would put back where it was."""
    notebook = built.notebook()
    notebook["cells"].append(notebook["cells"].pop(5))
    message = (
        "where it has the cell `# ▶ Count`, a build would put `### `say``: was a cell moved among those of another"
    )
    assert message in refused(built, notebook)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("!pip install x", "not valid Python: invalid syntax: `!pip install x` (only IPython knows such lines"),
        ("%matplotlib inline", "not valid Python: invalid syntax: `%matplotlib inline` (only IPython knows"),
        ("say(", "not valid Python: '(' was never closed: `say(`"),
        ("say(missing)", "nothing defines `missing`: import or define it above"),
        ("count = 3\nsay(count)", "`count` means something else at nb_src/alpha/count.py:17"),
        ("from alpha.base import say\nsay(1)", "local imports stand alone in a cell of a spine"),
        ("from alpha.base import say", "where it has the cell `from alpha.base import say`, a build would put ``"),
        ("say(1)\n\n# %%\nsay(2)", "where it has the cell `say(1)`, a build would put `say(1)`: was"),
        ("say(1)\x0c", "or does one hold a `# %%` or a form feed?"),
    ],
)
def test_edits_that_a_source_cannot_hold(built, text, message):
    """A source that no longer runs under python, or that builds another notebook than the one that was pulled."""
    notebook = built.notebook()
    cell_of(notebook, "base-say")["source"] += "\n# an edit of another file, which must not come through either"
    cell_of(notebook, "story-say")["source"] = text
    assert message in refused(built, notebook)


def test_notebooks_that_were_not_built_here(built):
    """A traceback for a file that is no notebook; a foreign notebook spread over the sources."""
    foreign = built.write("foreign.ipynb", json.dumps(built.notebook() | {"metadata": {}}))
    assert "foreign.ipynb: does not say what it was built from (metadata `unrolled`)" in built.refused("pull", foreign)
    text = built.write("text.ipynb", "hello")
    assert "text.ipynb: not a notebook that can be read" in built.refused("pull", text)
    assert "missing.ipynb: not a notebook that can be read" in built.refused("pull", built.root / "missing.ipynb")


# ---- properties

LINES = st.text(
    st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]) | st.sampled_from("#%`'\"\\ \t"), max_size=20
)
GAPS = st.sampled_from(["\n", "\n\n", "\n\n\n", "\n\n\n\n"])
TAGS = st.sampled_from(["", ' tags=["one"]', ' tags=["one", "two words"]', ' cellView="form"'])
CODE = [
    "NAME = 1",
    "def NAME(x):\n    return x\n\n\n# a comment\n",
    'class NAME:\n    """\n# %%\n    # %% [markdown]\n\n    ünï"""\n\n    x = 1   ',
    "NAME = '''\n# %%\n   \n'''\n\n\n\nOTHER_NAME = [\n    1,\n\n]",
    "",
    "\n\n# only comments, after blank lines\n#\n\n\t\n#%not a marker",
    "# %matplotlib inline\n# !ls\nNAME = 5 % 3",
    'NAME = "\\\\"; OTHER_NAME = r"""\n# text\n"""',
]


@st.composite
def cells(draw, prefix):
    """Cells in percent format, with names that no other source has."""
    text = ""
    for number in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from(["code", "markdown", "raw"]))
        tags = draw(TAGS)
        if kind == "code":
            body = draw(st.sampled_from(CODE)).replace("NAME", f"{prefix}_{number}").rstrip("\n")
            text += f"# %%{tags}" + f"\n{body}" * bool(body)
        else:
            lines = draw(st.lists(LINES, min_size=1, max_size=4))
            body = "\n".join(f"# {line}" if line else "#" for line in lines)
            text += f"# %% [{kind}]{tags}\n{body}"
        text += draw(GAPS)
    return text


@st.composite
def trees(draw):
    """Sources of two chapters and a spine that imports them, some of it twice."""
    one = "# %%\ndef first():\n    pass\n\n" + draw(cells("one"))
    imported = ["import first", "import (  # why\n    first,\n)", "import first  # x"]
    two = draw(cells("two")).rstrip("\n") + "\n\n# %%\nimport os\nfrom pack.one " + draw(st.sampled_from(imported))
    two += "\n\n\n# %%\ndef second():\n    return first()\n" + draw(cells("extra"))
    again = "# %%\nfrom pack.one import first\n\n" * draw(st.integers(0, 2))
    spine = draw(cells("spine")) + "# %%\nfrom pack.one import first\nfrom pack.two import second\n\n"
    spine += draw(cells("story")) + again + draw(cells("end"))
    end = draw(st.sampled_from(["", "\n", "\n\n\n"]))
    return {"nb_src/pack/one.py": one, "nb_src/pack/two.py": two, "nb_src/spine.py": spine.rstrip("\n") + end}


def planted(tmp_path_factory, files):
    tree = Tree(tmp_path_factory.mktemp("tree"), None)
    for path, text in files.items():
        tree.write(path, text)
    return tree


def canonical(files):
    """Not every text is: a markdown line like `%% x` is a marker. Such trees are refused, which is tested elsewhere."""
    try:
        for path, text in files.items():
            nb_convert.read_source(path.removeprefix("nb_src/"), text)
        return True
    except nb_convert.Refused:
        return False


PROPERTY = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@PROPERTY
@given(files=trees().filter(canonical))
def test_pull_of_build_is_the_identity(files, tmp_path_factory):
    """Any byte of a source that does not survive the way to a notebook and back."""
    tree = planted(tmp_path_factory, files)
    nb_convert.build(tree.root, [])
    first = tree.files()
    assert nb_convert.build(tree.root, []) == ["nothing to do"]
    assert nb_convert.check(tree.root, []) == []
    assert nb_convert.pull(tree.root, tree.root / "notebooks/spine.ipynb") == ["nothing to pull"]
    assert tree.files() == first
    assert sources(tree) == files


@PROPERTY
@given(files=trees().filter(canonical), data=st.data())
def test_an_edit_and_its_undoing_are_the_identity(files, data, tmp_path_factory):
    """A cell whose text is written back in another way than it was read: every cell is edited, pulled, and restored."""
    tree = planted(tmp_path_factory, files)
    path = tree.root / "notebooks/spine.ipynb"
    nb_convert.build(tree.root, [])
    before, notebook = path.read_text(), tree.notebook("spine")
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code" or data.draw(st.booleans()):
            cell["source"] = "# edited\n" + source_of(cell)
    tree.save(notebook, "spine")
    edited = nb_convert.plain_cells(notebook)
    assert len(nb_convert.pull(tree.root, path)) == 3
    nb_convert.build(tree.root, [])
    rebuilt = tree.notebook("spine")
    assert nb_convert.plain_cells(rebuilt) == edited

    by_place = {json.dumps(cell["metadata"]["unrolled"]): cell["source"] for cell in json.loads(before)["cells"]}
    for cell in rebuilt["cells"]:
        cell["source"] = by_place[json.dumps(cell["metadata"]["unrolled"])]
    tree.save(rebuilt, "spine")
    nb_convert.pull(tree.root, path)
    assert sources(tree) == files


@PROPERTY
@given(files=trees().filter(canonical), data=st.data())
def test_any_edits_come_back_or_are_refused_whole(files, data, tmp_path_factory):
    """A pull that loses, doubles or misplaces a cell, or that changes something before it refuses."""
    tree = planted(tmp_path_factory, files)
    path = tree.root / "notebooks/spine.ipynb"
    nb_convert.build(tree.root, [])
    notebook = tree.notebook("spine")
    for step in range(data.draw(st.integers(1, 4))):
        cells, place = notebook["cells"], data.draw(st.integers(0, len(notebook["cells"]) - 1))
        match data.draw(st.sampled_from(["insert", "delete", "edit", "swap", "copy"])):
            case "insert":
                kind = data.draw(st.sampled_from(["code", "markdown"]))
                cells.insert(place, new_cell("# " + data.draw(LINES), kind) | {"id": f"new{step}"})
            case "delete" if len(cells) > 1:
                del cells[place]
            case "edit":
                cells[place]["source"] = "# " + data.draw(LINES) + "\n" + source_of(cells[place])
            case "swap":
                cells[place], cells[place - 1] = cells[place - 1], cells[place]
            case "copy":
                cells.insert(place, copy.deepcopy(cells[place]) | {"id": f"copy{step}"})
    tree.save(notebook, "spine")
    before, wanted = tree.files(), nb_convert.plain_cells(notebook)
    try:
        nb_convert.pull(tree.root, path)
    except nb_convert.Refused:
        assert tree.files() == before
    else:
        nb_convert.build(tree.root, [])
        assert nb_convert.plain_cells(tree.notebook("spine")) == wanted
        nbformat.validate(nbformat.from_dict(tree.notebook("spine")))


REAL = nb_convert.Path(nb_convert.__file__).resolve().parent.parent


def test_the_identity_holds_on_the_real_sources(tmp_path):
    """A source of this repository that does not survive the round trip."""
    project = nb_convert.read_project(REAL)
    for path, text in project.texts.items():
        (tmp_path / "nb_src" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "nb_src" / path).write_bytes(text.encode())
    (tmp_path / "pyproject.toml").write_bytes((REAL / "pyproject.toml").read_bytes())
    for name in project.spines:
        nb_convert.build(tmp_path, [name])
        path = tmp_path / "notebooks" / f"{name}.ipynb"
        before = path.read_text()
        assert nb_convert.pull(tmp_path, path) == ["nothing to pull"]
        notebook = json.loads(before)
        for cell in notebook["cells"]:
            cell["source"] = "# edited\n" + source_of(cell)
        path.write_text(json.dumps(notebook))
        used = {cell["metadata"]["unrolled"]["source"] for cell in notebook["cells"]}
        assert len(nb_convert.pull(tmp_path, path)) == len(used)
        nb_convert.build(tmp_path, [name])
        edited = json.loads(path.read_text())
        for cell, original in zip(edited["cells"], json.loads(before)["cells"], strict=True):
            have, want = (nb_convert.SOURCE_STAMP.sub("", source_of(one)) for one in (cell, original))
            assert have == "# edited\n" + want
            cell["source"] = original["source"]
        path.write_text(json.dumps(edited))
        nb_convert.pull(tmp_path, path)
    for path, text in project.texts.items():
        assert (tmp_path / "nb_src" / path).read_bytes().decode() == text
