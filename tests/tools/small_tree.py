"""A small project of two chapters and a spine, and a way to run the tool on it."""

import json

import nb_convert

SPINE = """\
# %% [markdown]
# # Story
# {{colab_badge}} and [the code]({{repository}}).

# %% tags=["parameters"]
# How many times.
times = 2
# A factor, 1 for none.
factor = 1.0
# Who asks, empty for nobody.
name = ""
# Say more.
loud = False

# %%
from alpha.base import ask, say

# %% [markdown]
# # ▶ Count

# %%
from alpha.base import UserError
from alpha.count import count

# %%
total = count(times) * factor
source_hash = "{{source_hash}}"

# %%
from alpha.base import say

# %%
say(total)
"""

BASE = '''\
# %% [markdown]
# ## Basics
# What everybody needs.

# %%
import math


# %%
class UserError(Exception):
    """One sentence."""


# %% [markdown]
# ### `say`

# %%
def say(text):
    print(text)


def ask(n):
    """A string with a line that looks like a cell:
# %%
    and it is none."""
    if n < 0:
        raise UserError("times is negative: make it positive")
    return math.sqrt(n)
'''

COUNT = """\
# %% [markdown]
# ## Counting

# %%
import math

from alpha.base import (
    UserError,
    ask,
)
from alpha.base import say  # twice, for the test

# %% [markdown]
# ### `count`

# %%
def count(n):
    say(f"counting to {n}")
    return math.floor(ask(n) ** 2 + 0.5)
"""


class Tree:
    def __init__(self, root, capsys):
        self.root, self.capsys = root, capsys
        self.write("pyproject.toml", '[tool.unrolled]\nrepository = "https://github.com/someone/unrolled"\n')

    def write(self, path, text):
        path = self.root / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
        return path

    def read(self, path):
        return (self.root / path).read_bytes().decode()

    def replace(self, path, old, new):
        assert old in self.read(path)
        self.write(path, self.read(path).replace(old, new))

    def files(self):
        return {path: path.read_bytes() for path in sorted(self.root.rglob("*")) if path.is_file()}

    def run(self, *arguments):
        """(exit status, what a person reads)"""
        status = nb_convert.main(["--root", str(self.root), *map(str, arguments)])
        printed = self.capsys.readouterr()
        return status, printed.out + printed.err

    def build(self):
        status, printed = self.run("build")
        assert status == 0, printed

    def notebook(self, name="story"):
        return json.loads(self.read(f"notebooks/{name}.ipynb"))

    def save(self, notebook, name="story"):
        return self.write(f"notebooks/{name}.ipynb", json.dumps(notebook))

    def refused(self, *arguments):
        """What the tool says when it refuses; nothing may have changed."""
        before = self.files()
        status, printed = self.run(*arguments)
        assert status == 1, printed
        assert self.files() == before
        return printed


def cell_of(notebook, cell_id):
    return next(cell for cell in notebook["cells"] if cell["id"] == cell_id)


def source_of(cell):
    return "".join(cell["source"])
