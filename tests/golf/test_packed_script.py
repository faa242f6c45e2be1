"""One program, run in four ways, gives one packed script; and reading a packed script never runs it."""

import ast
import base64
import lzma
import os
import shutil
import subprocess
import sys
import zlib
from types import SimpleNamespace

import pytest

import nb_convert
from golf.packed_script import (
    canonical_source,
    pack_script,
    program_of_file,
    running_program,
    unpack_script,
)
from helpers import REPOSITORY
from nanochat.runtime import UserError

SOURCE = '''\
"""A module."""
import sys
from dataclasses import dataclass

# A comment.
@dataclass
class Point:
    """A point."""

    x: int = 1


class Empty:
    """Only words."""


def total(*points):
    """A sum."""
    "and another string"
    return sum(point.x for point in points)


def nothing():
    """Nothing."""


if __name__ == "__main__":
    print(total(Point(), Point(2)), nothing(), Empty.__name__, sys.argv[1:], __file__, "total" in globals())
'''


def run_script(path, *arguments, **variables):
    done = subprocess.run(
        [sys.executable, path, *arguments], capture_output=True, text=True, env={**os.environ, **variables}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_packed_script_does_what_the_script_does(tmp_path):
    """A submission that prints other numbers than the program that was measured."""
    path = tmp_path / "train_gpt.py"
    path.write_text(SOURCE)
    before = run_script(path, "--seed=1")
    path.write_bytes(pack_script(SOURCE))
    assert run_script(path, "--seed=1") == before
    assert before.startswith("3 None Empty ['--seed=1']")


def test_a_traceback_does_not_show_the_packed_text(tmp_path):
    """An error of one line that arrives below twenty thousand letters of base85."""
    path = tmp_path / "train_gpt.py"
    path.write_bytes(pack_script("def fail():\n    raise ValueError('no')\n\nfail()\n"))
    done = subprocess.run([sys.executable, path], capture_output=True, text=True)
    assert done.returncode == 1 and "ValueError: no" in done.stderr and "in fail" in done.stderr
    assert "b85decode" not in done.stderr


def test_the_first_line_tells_the_truth(tmp_path):
    """Instructions for reading the file that do not work."""
    lines = pack_script(SOURCE).decode().splitlines()
    assert "print(source.decode()) in place of the last line" in lines[0]
    path = tmp_path / "reader.py"
    path.write_text("\n".join([*lines[:-1], "print(source.decode())"]))
    assert run_script(path) == canonical_source(SOURCE) + "\n"


def test_the_canonical_form_loses_words_and_nothing_else():
    """Code that vanishes with the docstrings, or bytes that change when a packed script packs itself."""
    text = canonical_source(SOURCE)
    assert "A point" not in text and "Only words" not in text and "another" not in text and "comment" not in text
    assert canonical_source(text) == text
    words = 'def f():\n    """One."""\n    return 1\n'
    assert canonical_source(words) == "def f():\n    return 1"
    assert canonical_source('"""Nothing else."""') == "pass"


def test_every_chapter_can_be_packed():
    """A chapter with a construct that Python does not write out as it read it."""
    paths = sorted((REPOSITORY / "nb_src" / "golf").glob("*.py"))
    assert len(paths) > 10
    for path in paths:
        assert ast.parse(canonical_source(path.read_text(encoding="utf-8"))), path


def test_unpacking_is_the_inverse():
    """A linter that looks at the wrapping instead of the program."""
    assert unpack_script(pack_script(SOURCE)) == canonical_source(SOURCE)


def others_packing(data: bytes) -> dict[str, str]:
    """Forms in which others ship their scripts."""
    raw = lzma.compress(data, format=lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "lc": 4, "preset": 9}])
    letters = {"raw": raw, "xz": lzma.compress(data), "zlib": zlib.compress(data)}
    letters = {name: base64.b85encode(packed).decode() for name, packed in letters.items()}
    b64 = base64.b64encode(zlib.compress(data)).decode()
    return {
        "raw": "import lzma as L,base64 as B\n"
        f'exec(L.decompress(B.b85decode("{letters["raw"]}"),format=L.FORMAT_RAW,filters=[{{"id":L.FILTER_LZMA2}}]))',
        "xz": f"import lzma,base64\nexec(compile(lzma.decompress(base64.b85decode(b'{letters['xz']}')),'x','exec'))",
        "zlib": f"from zlib import *\nfrom base64 import *\nexec(decompress(b85decode('{letters['zlib']}')).decode())",
        "b64": f"import zlib,base64;exec(zlib.decompress(base64.b64decode('{b64}')))",
    }


@pytest.mark.parametrize("form", ["raw", "xz", "zlib", "b64"])
def test_the_packing_of_others_is_understood(form):
    """A published script that the linter takes for four lines without imports."""
    assert unpack_script(others_packing(SOURCE.encode())[form].encode()) == SOURCE


def test_what_is_no_packed_script_is_none(tmp_path):
    """A program that is taken for the data it carries, and a linter that falls over somebody's broken file."""
    packed = pack_script(SOURCE).decode()
    letters = base64.b85encode(lzma.compress(b"x = 1")).decode()
    no_python = base64.b85encode(lzma.compress(b"some data, no program")).decode()
    for text in (
        SOURCE,
        "print(",
        "x = 1\0",
        f"import lzma,base64\ndata = lzma.decompress(base64.b85decode('{letters}'))",  # carries text, runs none of it
        f"import lzma,base64\nexec(lzma.decompress(base64.b85decode('{no_python}')))",
        packed.replace('b85decode("', 'b85decode("~~~~~'),
        packed.replace('decompress(base64.b85decode("', 'decompress(base64.b85decode("é'),
        "(" * 5000,
    ):
        assert unpack_script(text.encode()) is None, text[:80]


def test_a_file_that_would_fill_the_memory_is_none():
    """A few kB from a stranger that decompress to gigabytes."""
    bomb = lzma.compress(b"#" * (1 << 25))
    text = f"import lzma,base64\nexec(lzma.decompress(base64.b85decode('{base64.b85encode(bomb).decode()}')))"
    assert len(text) < 20_000 and unpack_script(text.encode()) is None


def test_reading_a_packed_script_runs_nothing(tmp_path):
    """A stranger's script that runs in the linter."""
    mark = tmp_path / "ran"
    assert unpack_script(pack_script(f"open({str(mark)!r}, 'w')")) == f"open({str(mark)!r}, 'w')"
    assert not mark.exists()


# ---- the running program


SPINE = """\
# %% [markdown]
# # Small
# The end is not `# end of train_gpt.py` here.

# %% tags=["parameters"]
# Who is greeted.
who = "world"

# %% [markdown]
# # Set up

# %%
import os
from pathlib import Path

source_hash = "{{source_hash}}"

# %%
from nanochat.runtime import UserError
from golf.greeting import greeting
from nanochat.notebook_program import program_so_far
from golf.packed_script import pack_script, running_program

# %%
# The longest line.
print(greeting(who))

# %%
Path(os.environ["PACKED"]).write_bytes(pack_script(running_program()))
# end of train_gpt.py

# %%
print("only for a person")
"""
GREETING = '''\
# %% [markdown]
# ## Greeting

# %%
from nanochat.runtime import UserError

# %% [markdown]
# ### `greeting`

# %%
def greeting(who):
    """A sentence."""
    if not who:
        raise UserError("nobody is greeted: name somebody")
    return f"hello {who}"
'''
RUNTIME = '''\
# %% [markdown]
# ## Runtime

# %%
class UserError(Exception):
    """One sentence."""
'''
RUN_NOTEBOOK = """\
import sys
from IPython.core.interactiveshell import InteractiveShell
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

notebook = parameterize_notebook(load_notebook_node(sys.argv[1]), {"who": "reader"})
shell = InteractiveShell.instance()
cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
for cell in [*cells[:2], "%pwd", *cells[2:], *cells]:  # and once more, as "run all" does
    shell.run_cell(cell, store_history=True).raise_error()
"""


@pytest.fixture
def project(tmp_path):
    """A spine, two small chapters and the real one."""
    root = tmp_path / "project"
    for name, text in {
        "pyproject.toml": '[tool.unrolled]\nrepository = "https://github.com/someone/unrolled"\n',
        "nb_src/small.py": SPINE,
        "nb_src/golf/greeting.py": GREETING,
        "nb_src/nanochat/runtime.py": RUNTIME,
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for chapter in ("golf/packed_script.py", "nanochat/notebook_program.py"):
        shutil.copy(REPOSITORY / "nb_src" / chapter, root / "nb_src" / chapter)
    (root / "tools").mkdir()
    for path in (REPOSITORY / "tools").glob("nb_*.py"):
        shutil.copy(path, root / "tools")
    return root


def test_four_ways_to_run_give_one_packed_script(project, tmp_path, monkeypatch):
    """A score from a notebook that the shipped script cannot claim, because its bytes are others."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    assert nb_convert.main(["--root", str(project), "build"]) == 0
    assert nb_convert.main(["--root", str(project), "script", "small", "-o", str(tmp_path / "flat.py")]) == 0
    runner = tmp_path / "run_notebook.py"
    runner.write_text(RUN_NOTEBOOK)
    packed = [tmp_path / name for name in ("by_spine.py", "by_script.py", "by_notebook.py", "by_itself.py")]
    printed = [
        run_script(project / "nb_src/small.py", PACKED=str(packed[0])),
        run_script(tmp_path / "flat.py", PACKED=str(packed[1])),
        run_script(runner, str(project / "notebooks/small.ipynb"), PACKED=str(packed[2])),
        run_script(packed[0], PACKED=str(packed[3])),
    ]
    assert len({path.read_bytes() for path in packed}) == 1
    program = unpack_script(packed[0].read_bytes())
    assert "only for a person" not in program and "def running_program" in program and "{{" not in program
    assert printed[0] == printed[1] == "hello world\nonly for a person\n" and printed[3] == "hello world\n"
    assert "hello reader" in printed[2]


def test_cells_that_failed_are_left_out(monkeypatch):
    """A typing error in a cell of one's own, made hours ago, that stops the new process which is to score the model."""
    cells = ["", "x = 1", "misspelt + 1", "def f(:", "def f():\n    return x", "f()\n# end of train_gpt.py\nmore"]
    history = SimpleNamespace(input_hist_raw=cells, exceptions={2: {"ename": "NameError"}})
    shell = SimpleNamespace(history_manager=history)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert canonical_source(running_program()) == "x = 1\n\ndef f():\n    return x\nf()"
    del history.exceptions  # an older IPython
    assert "misspelt" in running_program()


def test_a_program_without_a_file_says_so(monkeypatch):
    """A traceback about an attribute of a module, for someone at Python's prompt."""
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    with pytest.raises(UserError, match="This program has no file"):
        running_program()


def test_a_spine_that_cannot_be_unrolled_says_why(project):
    """A fault in a chapter that shows as a missing temporary file."""
    chapter = project / "nb_src/golf/greeting.py"
    chapter.write_text(chapter.read_text().replace("def greeting", "print = 1\n\n\ndef greeting"))
    with pytest.raises(UserError, match="hide Python's own `print`"):
        program_of_file(project / "nb_src/small.py")
