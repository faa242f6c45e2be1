# %% [markdown]
# ## The program as one small file
#
# A submission is a model and the script that made it, and the script counts too. So `train_gpt.py` is not written a
# second time: it is this program, as it ran up to the evaluation, without comments and docstrings and then compressed.
#
# Whether the program runs as a notebook, as a flat script, from the chapters of the repository, or as a packed script
# already: the same code gives the same bytes (under the same version of Python). Otherwise a score that was found in a
# notebook could not be laid at the door of the script that is shipped.

# %%
import ast
import base64
import lzma
import re
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

from nanochat.notebook_program import program_so_far
from nanochat.runtime import UserError

# %% [markdown]
# ### `canonical_source`
# What is left of a program when everything that only people read is gone: its syntax tree, written out by Python.


# %%
def is_plain_text(node: ast.stmt) -> bool:
    """A string that stands alone, such as a docstring."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def canonical_source(source: str) -> str:
    """`source` without comments and docstrings, in Python's own layout. Applying it again changes nothing."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            while node.body and is_plain_text(node.body[0]):
                del node.body[0]
            node.body = node.body or [ast.Pass()]
    text = ast.unparse(tree)
    if ast.dump(ast.parse(text)) != ast.dump(tree):
        raise UserError("Python cannot write this program out unchanged. Reword its most unusual f-strings.")
    return text


# %% [markdown]
# ### `pack_script`
# The oldest of the lzma formats has the shortest header, and base85 is the densest text that needs no escapes. The call
# that runs it has a line of its own, because a traceback shows that line.

# %%
PACKED_SCRIPT = """\
# train_gpt.py, packed. To read the program, run this file with print(source.decode()) in place of the last line.
import base64,lzma
source=lzma.decompress(base64.b85decode("{}"))
exec(compile(source,"train_gpt.py (unpacked)","exec"))
"""


def pack_script(source: str) -> bytes:
    """A small file that does what `source` does when it is run as a script. Golf spec sections 5 and 7."""
    data = canonical_source(source).encode("utf-8")
    data = lzma.compress(data, format=lzma.FORMAT_ALONE, preset=9 | lzma.PRESET_EXTREME)
    return PACKED_SCRIPT.format(base64.b85encode(data).decode("ascii")).encode("ascii")


# %% [markdown]
# ### `unpack_script`
# Others pack their scripts too, in much the same way: some alphabet, some compressor, `exec`. To read such a file it is
# not necessary to run it.

# %%
UNPACKED_LIMIT_BYTES = 1 << 24  # a few kB can decompress to gigabytes
TEXT_DECODERS = {"b85decode": base64.b85decode, "b64decode": base64.b64decode}


def called_name(call: ast.Call) -> str:
    """`f` of `f(...)` and of `module.f(...)`; "" for anything else that is called."""
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def decompressed_text(data: bytes) -> str | None:
    """The Python program in lzma (with or without header), zlib or gzip `data`; None when there is none."""
    raw_filter = {"id": lzma.FILTER_LZMA2, "dict_size": UNPACKED_LIMIT_BYTES}
    for attempt in (
        lzma.LZMADecompressor(memlimit=1 << 28),
        lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[raw_filter]),
        zlib.decompressobj(zlib.MAX_WBITS | 32),  # 32: the header says whether it is zlib or gzip
    ):
        try:
            text = attempt.decompress(data, UNPACKED_LIMIT_BYTES).decode("utf-8")
            ast.parse(text)
        except (lzma.LZMAError, zlib.error, SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        return text if attempt.eof else None
    return None


def unpack_script(data: bytes) -> str | None:
    """The program inside a packed script, ours or one of a similar form; None for any other file. Runs nothing."""
    try:
        tree = ast.parse(data)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    if "exec" not in map(called_name, calls):
        return None
    found = [
        (constant.value, TEXT_DECODERS[called_name(call)])
        for unpacking in calls
        if called_name(unpacking) == "decompress"
        for call in ast.walk(unpacking)
        if isinstance(call, ast.Call) and called_name(call) in TEXT_DECODERS
        for constant in call.args
        if isinstance(constant, ast.Constant) and isinstance(constant.value, str | bytes)
    ]
    try:
        letters, decode = max(found, key=lambda pair: len(pair[0]))
        return decompressed_text(decode(letters))
    except ValueError:  # there is none, or it is not in that alphabet
        return None


# %% [markdown]
# ### `running_program`
# Four ways to run, one program. A script knows all of itself and a notebook only what has run so far, so both end at
# the comment `# end of train_gpt.py`: evaluation lies before it, and what only a person at a notebook wants, behind it.

# %%
END_OF_PROGRAM = re.compile(r"^# end of train_gpt\.py$", re.MULTILINE)


def unrolled_program(spine: Path) -> str:
    """A program of this repository with the chapters that it imports in place."""
    root = spine.parent.parent
    with tempfile.TemporaryDirectory() as folder:
        flat = Path(folder) / "flat.py"
        tool = [root / "tools" / "nb_convert.py", "--root", root, "script", spine.stem, "-o", flat]
        done = subprocess.run([sys.executable, *map(str, tool)], capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{spine.name} cannot be written as one script: {done.stderr.strip()}")
        return flat.read_text(encoding="utf-8")


def program_of_file(path: Path) -> str:
    """The whole program that starts with this file: packed, flat, or one that imports chapters beside it."""
    data = path.read_bytes()
    unpacked = unpack_script(data)
    if unpacked is not None:
        return unpacked
    text = data.decode("utf-8")
    local = re.findall(r"^from (\w+)\.(\w+) import ", text, re.MULTILINE)
    if any((path.parent / package / f"{chapter}.py").is_file() for package, chapter in local):
        return unrolled_program(path)
    return text


def running_program() -> str:
    """The source of the program that runs, up to the line `# end of train_gpt.py`, for `pack_script`.

    In a notebook, call it from the cell that holds this line. Definitions and parameters may be edited and run again at
    any time; other statements that are edited take a restart of the kernel, and before IPython 9 cells that failed too.
    """
    path = getattr(sys.modules["__main__"], "__file__", None)
    text = program_so_far()
    if text is None and path is None:
        raise UserError("This program has no file, so it cannot be packed. Run it as a script or as a notebook.")
    if text is None:
        text = program_of_file(Path(path).resolve())
    return END_OF_PROGRAM.split(text, maxsplit=1)[0]
