# %% [markdown]
# ## A notebook as a program
#
# A kernel is one process and cannot become eight. But it remembers every cell that it ran, and those cells are a
# program: written to a file, any number of processes can run it.

# %%
import ast
import sys

from nanochat.runtime import UserError

# %% [markdown]
# ### `notebook_program`
# A notebook's program is what was run, not what is on the screen. Run a cell again and it is still one cell; change a
# definition or a parameter and run it, and the new one takes the place of the old. Parameters that papermill put in are
# left out: they travel on the command line.


# %% tags=["folded"]
def is_setting(node: ast.stmt) -> bool:
    """Is it `name = literal`?"""
    try:
        ast.literal_eval(node.value)
    except (AttributeError, TypeError, ValueError):
        return False
    return isinstance(node, ast.Assign)


def cell_key(cell: str):
    """The same for two versions of a cell: the names of what it defines, or of its settings if it is nothing else.

    None for a cell that is not plain Python, such as `%pip install`.
    """
    try:
        tree = ast.parse(cell)
        compile(tree, "cell", "exec")  # refuses what only IPython runs, such as `await` outside a function
    except (SyntaxError, ValueError):
        return None
    names = [node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)]
    if all(map(is_setting, tree.body)):
        names = [ast.unparse(node.targets[0]) for node in tree.body]
    return tuple(names) or cell


def notebook_program(inputs: list[str], failed=()) -> str:
    """The cells that ran, in the order of their first run, up to the last of `inputs`, which is running now.

    inputs: IPython's history, one cell each. failed: the numbers of those that ended with an error; they only keep a
    place. What is not plain Python is left out. Raises UserError when the running cell is of that kind.
    """
    cells = {}
    for number, cell in enumerate(inputs):
        key = cell_key(cell)
        if key is None or cell.startswith("# Parameters\n"):
            continue
        if number in failed:
            cells.setdefault(key, "")
        else:
            cells[key] = cell
    running = cell_key(inputs[-1])
    if running is None:
        raise UserError("this cell has more than Python in it, so it cannot be a program. Take out its % and ! lines.")
    keys = list(cells)
    return "\n\n".join(filter(None, (cells[key] for key in keys[: keys.index(running) + 1])))


# %% [markdown]
# ### `program_so_far`
# The history of the kernel that this runs in.


# %% tags=["folded"]
def program_so_far() -> str | None:
    """The program of this notebook up to the running cell; None where there is no IPython.

    Before IPython 9 a cell that failed is a part of it too.
    """
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if shell is None:
        return None
    history = shell.history_manager
    return notebook_program(history.input_hist_raw, getattr(history, "exceptions", {}))
