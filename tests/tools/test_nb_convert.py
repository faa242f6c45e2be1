import ast
import io
import json
import random
import re
import subprocess
import sys
import sysconfig
import tokenize
import warnings
from pathlib import Path

import nbformat
import pytest
from small_tree import cell_of, source_of

import nb_convert


def ids(notebook):
    return [cell["id"] for cell in notebook["cells"]]


# ---- build


def test_chapters_stand_where_the_spine_imports_them(tree):
    """A chapter that is missing, repeated or in the wrong place."""
    tree.build()
    assert ids(tree.notebook()) == [
        "story-story-text", "story-times",
        "base-basics-text", "base-imports", "base-UserError", "base-say-text", "base-say",
        "story-count-text",
        "count-counting-text", "count-imports", "count-count-text", "count-count",
        "story-total", "story-say",
    ]  # fmt: skip


def test_local_imports_of_a_chapter_become_comments(tree):
    """A notebook that imports files which the reader does not have."""
    tree.build()
    assert source_of(cell_of(tree.notebook(), "count-imports")).split("\n") == [
        "import math",
        "",
        "# defined above: UserError, ask (alpha.base)",
        "# defined above: say (alpha.base)",
    ]


def test_build_twice_gives_the_same_bytes(tree):
    """Notebooks that differ in a diff although nothing changed, and a checkout that looks modified after `build`."""
    tree.build()
    first = tree.files()
    (tree.root / "notebooks/story.ipynb").unlink()
    tree.build()
    assert tree.files() == first
    assert tree.run("build") == (0, "nothing to do\n")


def test_a_change_in_one_definition_changes_one_cell_and_the_stamp(tree):
    """Cell ids that shift, so that one edit shows as a diff of the whole notebook."""
    tree.build()
    before = tree.notebook()
    tree.replace("nb_src/alpha/base.py", "    print(text)", "    print(text, flush=True)")
    tree.build()
    after = tree.notebook()
    assert ids(after) == ids(before)
    assert [b["id"] for a, b in zip(after["cells"], before["cells"], strict=True) if a != b] == [
        "base-say",
        "story-total",  # holds the stamp
    ]


def test_what_a_built_notebook_carries(tree):
    """A notebook that Colab opens without GPU, that shows old outputs, or that leaks jupytext's own metadata."""
    tree.build()
    notebook = tree.notebook()
    metadata = notebook["metadata"]
    assert metadata["kernelspec"] == {"display_name": "Python 3", "language": "python", "name": "python3"}
    assert metadata["accelerator"] == "GPU"
    assert metadata["colab"] == {"gpuType": "A100", "provenance": [], "toc_visible": True}
    assert set(metadata) == {"accelerator", "colab", "kernelspec", "language_info", "unrolled"}
    assert all(set(cell["metadata"]) <= {"unrolled", "tags"} for cell in notebook["cells"])
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in notebook["cells"])
    assert cell_of(notebook, "story-times")["metadata"]["tags"] == ["parameters"]
    assert cell_of(notebook, "count-count")["metadata"]["unrolled"] == {"source": "alpha/count.py", "cell": 3}
    nbformat.validate(nbformat.from_dict(notebook))


def test_the_gpu_comes_from_the_header_of_the_spine(tree):
    """A notebook for another GPU that asks Colab for the default one, or that shows the header as a cell."""
    header = "# ---\n# jupyter:\n#   colab:\n#     gpuType: H100\n# ---\n\n"
    tree.write("nb_src/story.py", header + tree.read("nb_src/story.py"))
    tree.build()
    assert tree.notebook()["metadata"]["colab"]["gpuType"] == "H100"
    assert tree.notebook()["cells"][0]["id"] == "story-story-text"
    assert tree.run("pull", tree.root / "notebooks/story.ipynb") == (0, "nothing to pull\n")


def test_a_folded_cell_is_closed_and_still_pulled(tree):
    """A page of HTML that a reader must scroll past, or one that hides so well that an edit in it is lost."""
    tree.replace("nb_src/alpha/base.py", "# %%\nclass UserError", '# %% tags=["folded"]\nclass UserError')
    tree.build()
    cell = cell_of(tree.notebook(), "base-UserError")
    assert cell["metadata"]["cellView"] == "form" and cell["metadata"]["jupyter"] == {"source_hidden": True}
    assert tree.run("pull", tree.root / "notebooks/story.ipynb") == (0, "nothing to pull\n")
    assert tree.run("check")[0] == 0


def test_the_public_address_has_one_place(tree):
    """Badges and links that point at the old repository after it was moved."""
    link = "https://colab.research.google.com/github/{}/blob/{}/notebooks/story.ipynb"
    tree.write("README.md", f"[badge]({link.format('someone/unrolled', 'main')})\n")
    tree.build()
    assert f"({link.format('someone/unrolled', 'main')})" in source_of(tree.notebook()["cells"][0])
    address = '[tool.unrolled]\nrepository = "https://github.com/else-where/un.rolled"\nbranch = "dev"\n'
    tree.write("pyproject.toml", address)
    assert "README.md: a Colab link is not at the address in pyproject.toml: run `build`" in tree.refused("check")
    tree.build()
    text = source_of(tree.notebook()["cells"][0])
    assert f"({link.format('else-where/un.rolled', 'dev')})" in text
    assert "[the code](https://github.com/else-where/un.rolled)" in text
    assert tree.read("README.md") == f"[badge]({link.format('else-where/un.rolled', 'dev')})\n"
    assert tree.run("check")[0] == 0


def test_the_stamp_is_of_all_sources_of_the_notebook(tree):
    """A report that names code which did not run, or the same code by two names."""
    tree.build()
    one = re.search(r'source_hash = "([0-9a-f]{64})"', json.dumps(tree.notebook()).replace('\\"', '"'))[1]
    assert one == nb_convert.source_stamp(nb_convert.read_project(tree.root), "story")
    flat = tree.root / "flat.py"
    assert tree.run("script", "story", "-o", flat)[0] == 0 and f'source_hash = "{one}"' in flat.read_text()
    tree.write("nb_src/alpha/base.py", tree.read("nb_src/alpha/base.py") + "# more\n")
    tree.build()
    assert one not in json.dumps(tree.notebook())


def test_cell_ids_are_valid_and_unique(empty):
    """Ids that Jupyter rejects: too long, with foreign characters, or twice."""
    cells = ["# %%\nprint(1)\n", "# %%\nprint(2)\n", f"# %%\ndef {'long' * 30}():\n    pass\n", "# %%\nñandú = 1\n"]
    prose = ("# ▶ Ünïcode, and more of it than any id can ever hold", "…", "")
    cells += [f"# %% [markdown]\n# {text}\n" for text in prose]
    empty.write("nb_src/odd.py", "\n".join(cells).replace("# \n", "#\n"))
    empty.build()
    nbformat.validate(nbformat.from_dict(empty.notebook("odd")))
    found = ids(empty.notebook("odd"))
    assert found[:2] == ["odd-print", "odd-print--2"]
    assert len(set(found)) == len(found) == 7


def test_build_does_not_lose_edits_of_a_notebook(tree):
    """An hour of work in Jupyter, overwritten by `make notebooks`."""
    tree.build()
    notebook = tree.notebook()
    cell_of(notebook, "base-say")["source"] = "def say(text):\n    print('edited')"
    path = tree.save(notebook)
    message = "notebooks/story.ipynb was edited: `pull` it first, or `build --force` drops the edits"
    assert message in tree.refused("build")
    tree.replace("nb_src/story.py", "# ▶ Count", "# ▶ Counting")  # so that pull cannot help either
    assert message in tree.refused("build")
    assert tree.run("build", "--force")[0] == 0
    assert "edited" not in path.read_text()
    path.write_text("<<<<<<< HEAD\n" + path.read_text())
    assert message in tree.refused("build")


def test_build_replaces_a_notebook_that_was_only_executed(tree):
    """Refusing to build over outputs, which are not edits."""
    tree.build()
    notebook = tree.notebook()
    cell_of(notebook, "story-say").update(execution_count=1, outputs=[])
    tree.save(notebook)
    tree.replace("nb_src/story.py", "say(total)", "say(-total)")
    assert tree.run("build") == (0, "wrote notebooks/story.ipynb\n")


# ---- check: sources

FAULTS = {
    "a source without cells": ("alpha/base.py", "x = 1\n", "alpha/base.py:1: a source begins with a cell"),
    "a title on a marker": (
        "story.py",
        "# %% A title\nx = 1\n",
        "story.py:1: no notebook built here keeps the cell option `title`",
    ),
    "an inactive cell": (
        "story.py",
        '# %% tags=["active-ipynb"]\n# x = 1\n',
        "story.py:1: no notebook built here keeps the cell option `active-ipynb`",
    ),
    "markdown that is no comment": (
        "story.py",
        "# %% [markdown]\n# a\nb = 1\n",
        "story.py:3: write `# b = 1`, as jupytext does, instead of `b = 1`",
    ),
    "a marker in a body": (
        "story.py",
        "# %%\nx = 1\n\n# %%\nif x:\n    # %% y\n    y = 2\n",
        "story.py:4: jupytext splits this cell",
    ),
    "a marker without space": ("story.py", "# %%\nx = 1\n\n#%%\ny = 2\n", "story.py:1: jupytext splits this cell"),
    "an old marker": ("story.py", "# %%\nx = 1\n# In[3]:\ny = 2\n", "story.py:1: jupytext splits this cell"),
    "a form feed": ("story.py", "# %%\nx = 1\n\f\ny = 2\n", "story.py:3: U+000C would end a line for jupytext"),
    "line ends of Windows": ("story.py", "# %%\r\nx = 1\r\n", "story.py:1: U+000D would end a line for jupytext"),
    "bad syntax": (
        "story.py",
        "# %%\nx = 1\n\n# %%\nx = = 2\n",
        "story.py:5: not valid Python: invalid syntax: `x = = 2`",
    ),
    "a cell that ends in the middle": (
        "story.py",
        "# %%\nif True:\n# %%\n    x = 1\n",
        "story.py:2: not valid Python: expected an indented block",
    ),
    "a magic": (
        "story.py",
        "# %%\n!pip install x\n",
        "story.py:2: not valid Python: invalid syntax: `!pip install x` (only IPython knows such lines: write Python)",
    ),
    "a name that nothing defines": (
        "alpha/base.py",
        "# %%\ndef say():\n    return missing\n",
        "alpha/base.py:3: nothing defines `missing`: import or define it above",
    ),
    "a name used too early": ("story.py", "# %%\nprint(later)\nlater = 1\n", "story.py:2: nothing defines `later`"),
    "__file__": (
        "alpha/base.py",
        "# %%\ndef say():\n    return __file__\n",
        "alpha/base.py:3: a chapter cannot use `__file__`",
    ),
    "__name__": (
        "alpha/base.py",
        '# %%\nif __name__ == "__main__":\n    print()\n',
        "alpha/base.py:2: a chapter cannot use `__name__`",
    ),
    "globals": (
        "alpha/base.py",
        "# %%\ndef say():\n    return globals()\n",
        "alpha/base.py:3: a chapter cannot use `globals`",
    ),
    "__future__": (
        "alpha/base.py",
        "# %%\nfrom __future__ import annotations\n",
        "alpha/base.py:2: a __future__ import would change every chapter below",
    ),
    "a builtin's name": (
        "story.py",
        "# %%\nsum = 1\n",
        "story.py:2: `sum` would hide Python's own `sum` from every cell below: rename it",
    ),
    "the comment of an import": (
        "alpha/base.py",
        "# %%\n# defined above: say (alpha.base)\n",
        "alpha/base.py:2: such a comment stands for an import",
    ),
    "the address in prose": (
        "story.py",
        "# %% [markdown]\n# x\n# see https://github.com/someone/unrolled\n",
        "story.py:3: write {{repository}}: the address",
    ),
    "a parameter that is computed": (
        "story.py",
        '# %% tags=["parameters"]\nx = 2 * 3\n',
        "story.py:2: a parameter is one name and one plain literal",
    ),
    "a parameter without type": (
        "story.py",
        '# %% tags=["parameters"]\nx = None\n',
        "story.py:2: a parameter is one name and one plain literal",
    ),
    "code among parameters": (
        "story.py",
        '# %% tags=["parameters"]\nprint(1)\n',
        "story.py:2: a parameter is one name and one plain literal",
    ),
    "a comment that looks like a type": (
        "story.py",
        '# %% tags=["parameters"]\n# depth=4 is small\nx = 1\n',
        "story.py:2: no `=` in a comment here",
    ),
    "two cells of parameters": (
        "story.py",
        '# %% tags=["parameters"]\nx = 1\n\n# %% tags=["parameters"]\ny = 1\n',
        "story.py:4: a second cell tagged `parameters`: keep the one at line 1",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_check_names_the_line_to_fix(empty, case):
    """Each rule of a single source, broken unnoticed or reported without the place and the remedy."""
    path, text, message = FAULTS[case]
    empty.write(f"nb_src/{path}", text)
    assert f"nb_src/{message}" in empty.refused("check")


IMPORT_FAULTS = {
    "import alpha.base": "write a local import as `from package.chapter import name`",
    "import alpha.base as b": "write a local import as `from package.chapter import name`",
    "from .base import say": "write a local import as `from package.chapter import name`",
    "from alpha import base": "there is no chapter `alpha`; the nearest is `alpha.",
    "from alpha.bass import say": "there is no chapter `alpha.bass`; the nearest is `alpha.base`",
    "from story import total": "there is no chapter `story`",
    "from alpha.base import say as s": "import names of alpha.base one by one and without `as`",
    "from alpha.base import *": "import names of alpha.base one by one and without `as`",
    "from alpha.base import says": "alpha.base defines no `says`; the nearest is `say`",
    "from alpha.base import math": "alpha.base only imports `math`: import it from where it is defined",
    "def late():\n    from alpha.base import say": "a local import stands at the top level, not inside a block",
}


@pytest.mark.parametrize("statement", IMPORT_FAULTS)
@pytest.mark.parametrize("path", ["nb_src/other.py", "nb_src/alpha/more.py"])
def test_check_knows_one_form_of_local_import(tree, path, statement):
    """A local import in a form that cannot be unrolled, left over in the notebook or fatal in it."""
    tree.write(path, f"# %%\n{statement}\n")
    line = 2 + statement.count("\n")
    printed = tree.refused("check")
    assert f"{path}:{line}: {IMPORT_FAULTS[statement]}" in printed, printed


def test_a_local_import_stands_alone(tree):
    """A statement beside a local import, lost when the cell is replaced by the chapter."""
    tree.write("nb_src/other.py", "# %%\nfrom alpha.base import say\nsay(1)\n")
    tree.write("nb_src/alpha/more.py", "# %%\nimport os; from alpha.base import say\n")
    printed = tree.refused("check")
    assert "nb_src/other.py:2: local imports stand alone in a cell of a spine" in printed
    assert "nb_src/alpha/more.py:2: a local import stands alone on its lines" in printed


def test_a_chapter_needs_its_own_imports_above_it(tree):
    """A notebook that stops with a NameError because the spine imports its chapters in the wrong order."""
    tree.replace("nb_src/story.py", "from alpha.base import ask, say\n", "import os\n")
    message = (
        "nb_src/alpha/count.py:7: alpha.base is not above this chapter."
        " nb_src/story.py:22: above this line add `from alpha.base import UserError, ask`"
    )
    tree.replace("nb_src/story.py", "from alpha.base import UserError\nfrom alpha.count", "from alpha.count")
    line = tree.read("nb_src/story.py").split("\n").index("from alpha.count import count") + 1
    printed = tree.refused("build")
    assert message.replace("story.py:22", f"story.py:{line}") in printed
    assert message.split(" nb_src")[0] in tree.refused("check")


def test_two_chapters_may_not_give_a_name_two_meanings(tree):
    """The later chapter's helper silently taking the place of the earlier one's."""
    base, count = "nb_src/alpha/base.py", "nb_src/alpha/count.py"
    tree.write(base, tree.read(base) + "\n\n# %%\nfor LIMIT in range(3):\n    pass\n")
    tree.write(count, tree.read(count) + "\n\n# %%\nLIMIT = 3\n\n\ndef math():\n    pass\n")
    printed = tree.refused("check")
    assert f"{count}:23: `LIMIT` means something else at {base}:32: rename one of them" in printed
    assert f"{count}:26: `math` means something else at {base}:6: rename one of them" in printed
    assert printed == tree.refused("build")


def test_a_spine_may_not_rebind_a_name_of_a_chapter(tree):
    """`count = 3` in the story, and the next stage calls an int."""
    tree.replace("nb_src/story.py", "say(total)", "count = total\nsay(count)")
    line = tree.read("nb_src/story.py").split("\n").index("count = total") + 1
    where = "nb_src/alpha/count.py:17: rename one of them"
    assert f"nb_src/story.py:{line}: `count` means something else at {where}" in tree.refused("check")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("import torch.nn as nn", "from torch import nn", True),
        ("import os.path", "import os", True),
        ("try:\n    import tomllib\nexcept ImportError:\n    import tomli as tomllib", "import tomllib", False),
        ("import time", "from time import time", False),
        ("with open('x') as f:\n    pass", "match 1:\n    case f:\n        pass", False),
        ("def g():\n    global state\n    state = 1", "state = 2", False),
        ("[i for i in range(3)]", "i = 1", True),
    ],
)
def test_what_counts_as_one_meaning(empty, one, other, same):
    """Refusing two identical imports, or missing a name that is bound in an unusual way."""
    empty.write("nb_src/pack/one.py", f"# %%\n{one}\nx1 = 1\n")
    empty.write("nb_src/pack/two.py", f"# %%\n{other}\nx2 = 1\n")
    empty.write("nb_src/spine.py", "# %%\nfrom pack.one import x1\nfrom pack.two import x2\n\n# %%\nx1 + x2\n")
    assert empty.run("build")[0] == (0 if same else 1)


def test_address_is_required(tree):
    """Badges that lead nowhere because the address was never set."""
    tree.write("pyproject.toml", "[tool.unrolled]\n")
    message = 'pyproject.toml: add to [tool.unrolled] the line repository = "https://github.com/OWNER/NAME"'
    assert message in tree.refused("check")


def test_files_that_are_not_utf8_are_named(tree):
    """A traceback of the decoder instead of the file to fix."""
    (tree.root / "nb_src/latin.py").write_bytes(b"# %%\nx = 1\ny = '\xe9'\n")
    assert "nb_src/latin.py:3: not UTF-8: save the file as UTF-8" in tree.refused("check")


def test_an_unknown_name_gets_the_nearest(tree):
    """A typo answered by silence: nothing built, and nobody told."""
    for command in (["build", "stori"], ["check", "stori"], ["script", "stori", "-o", tree.root / "x.py"]):
        assert "there is no nb_src/stori.py; the nearest is `story`" in tree.refused(*command)


# ---- check: notebooks


def test_check_passes_on_what_build_gives(tree):
    """A check that fails on a fresh build is a check that people switch off."""
    tree.build()
    assert tree.run("check") == (0, "every notebook is what its sources say\n")


def test_check_finds_missing_stale_and_stray_notebooks(tree):
    """Committed notebooks that are not what the sources say."""
    assert "notebooks/story.ipynb: missing or not a notebook: run `build --force story`" in tree.refused("check")
    tree.build()
    tree.replace("nb_src/alpha/base.py", "One sentence.", "One clear sentence.")
    remedy = "`pull` it if you edited it, else `build story`"
    assert f"notebooks/story.ipynb: is not what its sources give at cell 5: {remedy}" in tree.refused("check")
    tree.build()
    tree.save(tree.notebook(), "ghost")
    assert "notebooks/ghost.ipynb: has no nb_src/ghost.py: remove one or add the other" in tree.refused("check")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c[-1].update(outputs=[{"output_type": "stream"}]), "cell story-say with outputs"),
        (lambda c: c[-1].update(execution_count=3), "cell story-say with outputs"),
        (lambda c: c[-1].update(id=c[-2]["id"]), "cell id story-total stands twice"),
        (
            lambda c: c[9].update(source="from alpha.base import a"),
            "cell count-imports has a local import left over: `from",
        ),
        (lambda c: c[-1].update(metadata={}), "is not what its sources give in its metadata"),
        (lambda c: c.pop(), "is not what its sources give at cell 14"),
        (lambda c: c.append(c[0]), "is not what its sources give at cell 15"),
    ],
)
def test_check_says_what_is_wrong_in_a_notebook(tree, damage, message):
    """A committed notebook with outputs, doubled ids or leftovers, reported only as 'differs'."""
    tree.build()
    notebook = tree.notebook()
    damage(notebook["cells"])
    tree.save(notebook)
    assert f"notebooks/story.ipynb: {message}" in tree.refused("check")


# ---- script


def test_the_flat_program_runs_alone(tree, tmp_path_factory):
    """A golf record that needs the repository beside it, or that does something else than the spine."""
    alone = tmp_path_factory.mktemp("alone") / "train.py"
    assert tree.run("script", "story", "-o", alone)[0] == 0
    flat = subprocess.run([sys.executable, "-I", alone], capture_output=True, text=True, cwd=alone.parent)
    spine = subprocess.run([sys.executable, tree.root / "nb_src/story.py"], capture_output=True, text=True)
    assert flat.returncode == 0 and flat.stdout == spine.stdout == "counting to 2\n2.0\n", flat.stderr


# ---- new


def comments_of(text):
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [token.string for token in tokens if token.type == tokenize.COMMENT]


def test_new_makes_a_cell_and_a_heading_for_each_definition(tmp_path, capsys):
    """A first conversion that loses a comment, splits a statement, or leaves a wall of code."""
    script = tmp_path / "trainer.py"
    script.write_text(
        '#!/usr/bin/env python\n"""Trains."""\nimport os\nx = 1; y = 2\n\n\n# about f\n@staticmethod\ndef f():\n'
        "    return 1\n    # end of f\n\n# loose\nz = 3\nclass A: pass\nasync def g(): pass\nif x:\n"
        "    def h(): pass\n# end\n"
    )
    assert nb_convert.main(["new", str(script)]) == 0
    assert capsys.readouterr().out == (
        '# %% [markdown]\n# ## trainer\n\n# %%\n#!/usr/bin/env python\n"""Trains."""\nimport os\nx = 1; y = 2\n\n'
        "# %% [markdown]\n# ### `f`\n\n# %%\n# about f\n@staticmethod\ndef f():\n    return 1\n    # end of f\n\n"
        "# %%\n# loose\nz = 3\n\n# %% [markdown]\n# ### `A`\n\n# %%\nclass A: pass\n\n"
        "# %% [markdown]\n# ### `g`\n\n# %%\nasync def g(): pass\n\n# %%\nif x:\n    def h(): pass\n# end\n"
    )


STDLIB = Path(sysconfig.get_paths()["stdlib"])
MODULES = sorted(
    path for path in STDLIB.rglob("*.py") if not {"site-packages", "test", "tests", "idle_test"} & set(path.parts)
)


@pytest.mark.parametrize("part", range(5))
def test_new_keeps_the_meaning_of_the_standard_library(part, tmp_path):
    """A conversion that changes what a module does: strings with `# %%`, form feeds, decorators, odd comments."""
    hard = [STDLIB / name for name in ("shutil.py", "idlelib/pyparse.py", "heapq.py", "email/errors.py")]
    for path in random.Random(part).sample(MODULES, 30) + [path for path in hard if path.exists() and part == 0]:
        with tokenize.open(path) as file:
            text = file.read()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes
            chapter = nb_convert.new(path)
            assert ast.dump(ast.parse(chapter)) == ast.dump(ast.parse(text)), path
        before, after = (
            [comment for comment in comments_of(one) if not comment.startswith(("# %%", "# ## ", "# ### "))]
            for one in (text, chapter)
        )
        assert before == after, path


@pytest.mark.parametrize("comment", ["# %%", "    # %% indented", "#%%", "# In[3]:", "# <codecell>"])
def test_new_refuses_a_comment_that_would_begin_a_cell(empty, comment):
    """A function cut into two cells, neither of which compiles."""
    script = empty.write("script.py", f"x = 1\ndef f():\n    pass\n{comment}\n    return\n")
    message = f"script.py:4: `{comment.strip()}` would begin a cell: reword the comment"
    assert message in empty.refused("new", script)


def test_new_takes_such_lines_inside_strings(empty):
    """Refusing a harmless docstring, or cutting it in two."""
    strings = ['def f():\n    """\n# %%\n    # In[1]:\n    """\n', "y = '''\n# %% [markdown]\n'''\n"]
    script = empty.write("script.py", "\n\n".join(strings))
    assert empty.run("new", script, "-o", empty.root / "nb_src/alpha/made.py")[0] == 0
    chapter = empty.read("nb_src/alpha/made.py")
    assert ast.dump(ast.parse(chapter)) == ast.dump(ast.parse(script.read_text()))
    assert len(nb_convert.read_source("alpha/made.py", chapter).cells) == 4


@pytest.mark.parametrize("text", ["", "# only a comment\n", "x = 1", '"""doc"""', "\n\n\f\nx = 1\n\n"])
def test_new_takes_tiny_files(empty, text):
    """An IndexError for a file without statements."""
    script = empty.write("script.py", text)
    status, chapter = empty.run("new", script)
    assert status == 0 and ast.dump(ast.parse(chapter)) == ast.dump(ast.parse(text))


def test_new_refuses_what_it_cannot_keep(empty):
    """A string whose form feed is lost in silence; a traceback for a file that is not Python 3."""
    assert "form feed" in empty.refused("new", empty.write("feed.py", "x = '\f'\n"))
    assert "old.py:1: not valid Python" in empty.refused("new", empty.write("old.py", "print 1\n"))


def test_the_tool_runs_as_a_program(tree):
    """An import that works under pytest and not from the command line."""
    tool = Path(nb_convert.__file__)
    command = [sys.executable, tool, "--root", tree.root]
    assert subprocess.run([*command, "build"], capture_output=True, text=True).stdout == "wrote notebooks/story.ipynb\n"
    assert json.loads(tree.read("notebooks/story.ipynb"))["cells"]
    assert subprocess.run([*command, "nonsense"], capture_output=True).returncode == 2
