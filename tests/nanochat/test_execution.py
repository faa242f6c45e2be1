import os
import resource
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nanochat.execution import (
    SANDBOX_CHANNEL,
    check_solution,
    execute_code,
    run_in_sandbox,
    sandbox_level,
)
from nanochat.runtime import UserError

needs_confinement = pytest.mark.skipif(
    sys.platform != "linux" or sandbox_level()[0] != "full", reason="this kernel offers no seccomp"
)
MEMORY = 256 << 20


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path, monkeypatch):
    """Every run's folder is made below tmp_path, and must be gone after the test."""
    folder = tmp_path / "sandboxes"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []
    assert processes_of(folder) == []


def processes_of(folder) -> list[str]:
    """The processes that still run in a sandbox below `folder`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder) in path.read_text(errors="replace"):
                found.append(path.parent.name)
        except OSError:
            pass
    return found


def unconfined(code: str, folder) -> subprocess.CompletedProcess:
    """The same code in a plain interpreter: the proof that an attack would have worked."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=folder, stdin=subprocess.DEVNULL)


# Problems in the shape of HumanEval's: (prompt, solution, test, entry point).
MEAN = (
    '''from typing import List


def mean_gap(numbers: List[float]) -> float:
    """Mean distance of neighbours.
    >>> mean_gap([1.0, 2.0, 4.0])
    1.5
    """
''',
    """    gaps = [abs(a - b) for a, b in zip(numbers, numbers[1:])]
    return sum(gaps) / len(gaps)
""",
    """METADATA = {'author': 'test'}


def check(candidate):
    assert candidate([1.0, 2.0, 4.0]) == 1.5
    assert abs(candidate([0.1, 0.4]) - 0.3) < 1e-6
""",
    "mean_gap",
)
HELPER = (
    '''def shift(text: str):
    """Each letter, three further."""
    return ''.join(chr((ord(c) - 94) % 26 + 97) for c in text)


def unshift(text: str):
    """Take back what shift did."""
''',
    "    return ''.join(chr((ord(c) - 100) % 26 + 97) for c in text)\n",
    """def check(candidate):
    from random import choice
    import string
    for _ in range(5):
        text = ''.join(choice(string.ascii_lowercase) for _ in range(12))
        assert candidate(shift(text)) == text
""",
    "unshift",
)
MIXED = (
    '''def describe(items):
    """(sum, longest string or None, half of the sum as float)"""
''',
    """    words = [x for x in items if isinstance(x, str)]
    numbers = [x for x in items if not isinstance(x, str)]
    return sum(numbers), max(words, key=len, default=None), sum(numbers) / 2
""",
    """def check(candidate):
    assert candidate([1, 2]) == (3, None, 1.5)
    assert candidate([]) == (0, None, 0.0)
    assert candidate(['ab', 'c', -7])[1] == 'ab'
    assert candidate([1, 2])[1] is None
    assert type(candidate([3])) is tuple
""",
    "describe",
)
EXCEPTION = (
    '''class TooSmall(Exception):
    pass


def root(x: int, k=2) -> int:
    """Whole root; ValueError below 0, TooSmall for k=0"""
''',
    """    if x < 0:
        raise ValueError('negative')
    if k == 0:
        raise TooSmall()
    return round(x ** (1 / k))
""",
    """def check(candidate):
    assert candidate(9) == 3 and candidate(27, k=3) == 3
    try:
        candidate(-1)
        assert False
    except ValueError as error:
        assert str(error) == 'negative'
    try:
        candidate(4, k=0)
        assert False
    except TooSmall:
        pass
""",
    "root",
)
IN_PLACE = (
    'def ordered(items: list) -> list:\n    """Sorted."""\n',
    "    items.sort()\n    return items\n",
    """def check(candidate):
    given = [3, 1, 2]
    assert candidate(given) == [1, 2, 3]
    assert given == [3, 1, 2]
""",
    "ordered",
)
BY_NAME = (
    'def thirds(items: list):\n    """Every third item."""\n',
    "    return items[::3]\n",
    """def check(candidate):
    assert tuple(candidate([1, 2, 3])) == tuple(thirds([1, 2, 3]))
    assert candidate([1, 2, 3, 4]) == [1, 4]
""",
    "thirds",
)
CONTAINERS = (
    '''import hashlib
from collections import Counter


def letters(text):
    """Counts, set, md5, bytes, complex, big and negative numbers"""
''',
    """    md5 = hashlib.md5(text.encode()).hexdigest()
    return [Counter(text), set(text), frozenset(text), md5, text.encode(), 1j, -(2 ** 200), True]
""",
    """def check(candidate):
    ab = {'a', 'b'}
    md5 = 'e62595ee98b585153dac87ce1ab69c3c'
    assert candidate('aab') == [{'a': 2, 'b': 1}, ab, ab, md5, b'aab', 1j, -2 ** 200, True]
    assert candidate('é')[0] == {'é': 1}
""",
    "letters",
)
PROBLEMS = [MEAN, HELPER, MIXED, EXCEPTION, IN_PLACE, BY_NAME, CONTAINERS]


def solve(problem, program, **settings):
    prompt, _, test, entry_point = problem
    return check_solution(prompt, program, test, entry_point, **{"timeout": 4.0, "allow_weak": True} | settings)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem[3])
def test_right_solutions_pass(problem):
    """A right answer counted as wrong because its values do not survive the channel."""
    result = solve(problem, problem[0] + problem[1], timeout=20)
    assert result.success and result.error is None, result


@pytest.mark.parametrize("without", ["landlock", "counting", "landlock counting"])
@pytest.mark.parametrize("problem", [MEAN, HELPER, CONTAINERS], ids=lambda problem: problem[3])
@needs_confinement
def test_right_solutions_pass_on_older_kernels(problem, without):
    """Without Landlock no file can be opened: a solution whose imports were not made beforehand would fail."""
    prompt, solution, test, entry_point = problem
    result = run_in_sandbox("check", prompt + solution, (prompt, test, entry_point), 20, MEMORY, False, without)
    assert result.success, result


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem[3])
def test_wrong_solutions_fail(problem):
    """A checker that passes whatever runs without an error."""
    result = solve(problem, problem[0] + "    return None\n", timeout=20)
    assert not result.success and result.error.startswith(("AssertionError", "TypeError")), result


def test_a_candidate_of_the_wrong_name_or_broken_syntax():
    """A program that defines nothing to call is a failure that says so, not a crash."""
    assert "no function mean_gap" in solve(MEAN, "def other(): pass").error
    assert solve(MEAN, "def mean_gap(:").error.startswith("SyntaxError")
    assert solve(MEAN, "mean_gap = 3").error.startswith("NameError")
    assert solve(MEAN, "").error.startswith("NameError")


EQUALS_ALL = (
    "    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n    __hash__ = None\n"
)
EQUALS_ALL += "    def __sub__(self, other): return self\n    def __abs__(self): return self\n"
EQUALS_ALL += "    def __lt__(self, other): return True\n"

# Programs for MEAN that compute nothing. True: with the tests simply appended to the program, the naive way, they pass.
FORGERIES = {
    "sys.exit(0)": (True, "import sys\nsys.exit(0)"),
    "os._exit(0)": (True, "import os\nos._exit(0)"),
    "SystemExit inside": (True, "def mean_gap(x): raise SystemExit(0)"),
    "os._exit inside": (True, "import os\ndef mean_gap(x): os._exit(0)"),
    "KeyboardInterrupt inside": (False, "def mean_gap(x): raise KeyboardInterrupt"),
    "equals everything": (True, f"class Any:\n{EQUALS_ALL}def mean_gap(x): return Any()"),
    "a float that equals everything": (True, f"class Any(float):\n{EQUALS_ALL}def mean_gap(x): return Any()"),
    "claims to be a float": (
        True,
        f"class Any:\n    __class__ = float\n    def __float__(self): return 1.5\n{EQUALS_ALL}"
        "def mean_gap(x): return Any()",
    ),
    "frames": (
        True,
        "import sys\ndef mean_gap(x):\n    frame = sys._getframe(1)\n"
        "    frame.f_globals['check'] = lambda c: None\n    sys.settrace(lambda *a: None)\n    import os\n"
        "    while frame:\n"
        "        for value in list(frame.f_locals.values()) + list(frame.f_globals.values()):\n"
        "            if getattr(value, '__name__', '') in ('say', 'packed'):\n                value(b'P', b'')\n"
        "        frame = frame.f_back\n    os._exit(0)",
    ),
    "gc": (
        True,
        "import gc, os\ndef mean_gap(x):\n    for thing in gc.get_objects():\n"
        "        if isinstance(thing, dict) and 'check' in thing: thing['check'] = lambda c: None\n"
        "        if isinstance(thing, dict) and 'encode' in thing and 'VERDICT' in thing:\n"
        "            thing['encode'] = lambda *a: b'T'; thing['describe'] = lambda e: ([], '')\n    os._exit(0)",
    ),
    "a check of its own": (
        False,
        "def check(candidate): pass\nimport builtins\nbuiltins.check = check\nclass A(Exception): pass\n"
        "builtins.AssertionError = A\nbuiltins.abs = lambda x: 0\ndef mean_gap(x): return 0",
    ),
    "verdict channel": (
        True,
        "import os\nfor text in (b'P', b'T', b'\\0' * 16 + b'P', b'\\0\\0\\0\\1T'):\n    for fd in range(64):\n"
        "        try: os.write(fd, text)\n        except OSError: pass\ndef mean_gap(x): os._exit(0)\nmean_gap(0)",
    ),
    "supervisor's job": (
        True,
        "import os\nfor fd in (0, 3, 4):\n    os.set_blocking(fd, False) if hasattr(os, 'x') else None\n"
        "    for fd2 in range(7):\n        try: os.dup2(6, fd2)\n        except OSError: pass\nos._exit(0)",
    ),
    "forged answers": (
        True,
        "import os, struct\nanswer = b'U\\0\\0\\0\\2S\\0\\0\\0\\5valueT'\nfor _ in range(20):\n"
        "    try: os.write(5, struct.pack('>I', len(answer)) + answer)\n    except OSError: pass\n"
        "def mean_gap(x): os._exit(0)\nmean_gap(0)",
    ),
    "an answer of 4 GB": (True, "import os\ntry: os.write(5, b'\\xff' * 100)\nexcept OSError: pass\nos._exit(0)"),
    "an answer of 4 billion items": (
        True,
        "import os\ntry: os.write(5, b'\\0\\0\\0\\5L' + b'\\xff' * 4)\nexcept OSError: pass\nos._exit(0)",
    ),
    "a forged exception": (
        True,
        "import os\nbody = b'U\\0\\0\\0\\3S\\0\\0\\0\\6raisedL\\0\\0\\0\\1L\\0\\0\\0\\0N'\n"
        "try: os.write(5, len(body).to_bytes(4, 'big') + body)\nexcept OSError: pass\nos._exit(0)",
    ),
    "oversized": (False, "def mean_gap(x): return 'x' * (5 << 20)"),
    "many items": (False, "def mean_gap(x): return [0] * (5 << 20)"),
    "a huge number": (False, "def mean_gap(x): return 1 << (8 << 25)"),
    "shared items": (False, "def mean_gap(x):\n    y = []\n    for _ in range(50): y = [y, y]\n    return y"),
    "deeply nested": (False, "def mean_gap(x):\n    y = []\n    for _ in range(10 ** 5): y = [y]\n    return y"),
    "contains itself": (False, "def mean_gap(x):\n    y = []\n    y.append(y)\n    return y"),
    "unhashable in a set": (
        True,
        "import os\nbody = b'U\\0\\0\\0\\2S\\0\\0\\0\\5valueE\\0\\0\\0\\1L\\0\\0\\0\\0'\n"
        "try: os.write(5, len(body).to_bytes(4, 'big') + body)\nexcept OSError: pass\nos._exit(0)",
    ),
    "atexit": (True, "import atexit, os\natexit.register(lambda: os._exit(0))\ndef mean_gap(x): return 0"),
    "excepthook": (True, "import sys, os\nsys.excepthook = lambda *a: os._exit(0)\ndef mean_gap(x): return 0"),
    "threads": (
        True,
        "import threading, os, time\ndef late():\n    time.sleep(0.05)\n    for fd in range(3, 9):\n"
        "        try: os.write(fd, b'P')\n        except OSError: pass\n    os._exit(0)\n"
        "threading.Thread(target=late).start()\ndef mean_gap(x): time.sleep(1); return 0",
    ),
    "an exception that lies": (
        False,
        "class E(Exception):\n    def __str__(self): raise SystemExit(0)\ndef mean_gap(x): raise E()",
    ),
    "a metaclass that lies": (
        False,
        "class M(type):\n    __name__ = property(lambda self: 1 / 0)\n    mro = lambda self: type.mro(self)\n"
        "class E(Exception, metaclass=M): pass\ndef mean_gap(x): raise E()",
    ),
    "a generator": (False, "def mean_gap(x): return (y for y in [1.5])"),
    "the function itself": (False, "def mean_gap(x): return mean_gap"),
    "wants to import the checker": (False, "import __main__\n__main__.say(b'P', b'')\ndef mean_gap(x): return 0"),
    "stack overflow": (
        False,
        "import sys\nsys.setrecursionlimit(10 ** 9)\nclass A:\n    def __repr__(self): return repr([self])\n"
        "def mean_gap(x): return repr(A())",
    ),
    "a crash": (False, "import ctypes\ndef mean_gap(x): ctypes.string_at(0)"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_the_verdict_cannot_be_forged(name, tmp_path):
    """A program that computes nothing and is counted as solved."""
    naive, program = FORGERIES[name]
    if naive:
        appended = f"{program}\n{MEAN[2]}\ncheck(mean_gap)\n"
        assert unconfined(appended, tmp_path).returncode == 0, "this attack is none"
    result = solve(MEAN, program)
    assert not result.success and result.error, result
    assert not result.timeout, result


@pytest.mark.parametrize("ending", ["os._exit(0)", "sys.exit()", "raise KeyboardInterrupt", "return object()"])
def test_the_end_of_the_program_is_not_the_expected_exception(ending):
    """A test that expects an error must not take the program's death, or a value that cannot pass, for it."""
    test = "def check(candidate):\n    try: candidate()\n    except BaseException: return\n    assert False\n"
    assert solve(("def f():\n", "", test, "f"), "def f():\n    raise ValueError\n").success
    result = solve(("def f():\n", "", test, "f"), f"import os, sys\ndef f():\n    {ending}\n")
    assert not result.success, result


def test_helpers_of_the_prompt_cannot_be_replaced():
    """`candidate(shift(text)) == text` holds for the identity if the program may bring its own shift."""
    assert not solve(HELPER, "def shift(text): return text\ndef unshift(text): return text\n").success


@needs_confinement
def test_the_candidate_never_sees_the_test():
    """Expected answers that lie in the candidate's memory can be returned instead of computed.

    The marker is letters alone, which no address in a repr can contain.
    """
    test = "def check(candidate):\n    assert candidate() == 'EXPECTED' + '-QZXWVK-' + 'ANSWER'\n"
    program = (
        "import gc, sys, ctypes, re\ndef f():\n    found = [x for x in gc.get_objects()"
        " if 'QZX' + 'WVK' in repr(x)[:9999]]\n"
        "    def memory():\n        import io\n        return open('/proc/self/maps').read()\n"
        "    try: return str(found) + memory()\n    except OSError as error: return f'nothing {len(found)}'\n"
    )
    result = solve(("def f():\n", "", test, "f"), program + "print(f())\n")
    assert not result.success and result.stdout.startswith("nothing 0"), result


def test_execute_code_reports_what_happened():
    """Output, errors and the end of a program mixed up with each other."""
    result = execute_code("import sys\nprint('out')\nprint('err', file=sys.stderr)", allow_weak=True)
    assert (result.success, result.stdout, result.stderr, result.error) == (True, "out\n", "err\n", None)
    result = execute_code("print('before')\n1 / 0", allow_weak=True)
    assert (result.success, result.stdout, result.error) == (False, "before\n", "ZeroDivisionError: division by zero")
    lines = [line for line in result.stderr.splitlines() if not set(line) <= set(" ~^")]  # newer Pythons point at it
    assert lines[1:] == ['  File "<program>", line 2, in <module>', result.error]
    assert execute_code("import sys\nprint(sys.argv)", allow_weak=True).stdout == "['program']\n"
    assert execute_code("x = 1\n" * 3 + "def", allow_weak=True).error.startswith("SyntaxError")
    assert execute_code(
        "assert __name__ == '__main__' and not {'text', 'job', 'os'} & set(globals())", allow_weak=True
    ).success
    assert (
        execute_code("""print('''it's "quoted" \\\\ {x} %s $(ls)''')""", allow_weak=True).stdout
        == 'it\'s "quoted" \\ {x} %s $(ls)\n'
    )


@pytest.mark.parametrize(
    "code",
    ["import sys\nsys.exit(0)", "import os\nos._exit(0)", "raise SystemExit", "raise KeyboardInterrupt", "exit()"]
    + ["import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'P' * 40)\n    except OSError: pass\nos._exit(0)"]
    + ["import atexit, os, sys\natexit.register(os._exit, 0)\nsys.excepthook = print\n1 / 0"],
)
def test_only_the_last_line_is_success(code):
    """A program that leaves early, with a clean exit status, and counts as completed."""
    result = execute_code(code, timeout=4.0, allow_weak=True)
    assert not result.success and result.error and not result.timeout, result


@pytest.mark.parametrize(
    "source, reason",
    [
        ("x = 1\0", "NUL"),
        ("x = '\ud800'", "surrogate"),
        ("#" * (2 << 20), "bytes"),
        ("(" * 5000, "nested|Memory|parent"),
    ],
    ids=["nul", "surrogate", "huge", "nested"],
)
def test_source_that_is_no_program(source, reason):
    """Text from a model may be anything: it must come back as a failure, not as an exception in the notebook."""
    for result in execute_code(source, allow_weak=True), solve(MEAN, source):
        assert not result.success
        assert any(word in result.error for word in reason.split("|")), result.error


def test_settings_that_make_no_sense():
    """A time limit of zero or a memory limit in which Python cannot start, found out after the run."""
    for wrong in (
        {"timeout": 0},
        {"timeout": float("inf")},
        {"timeout": "5"},
        {"maximum_memory_bytes": -1},
        {"maximum_memory_bytes": 2e8},
    ):
        with pytest.raises(UserError, match=next(iter(wrong))):
            execute_code("pass", **wrong)


def test_the_environment_is_empty_and_input_is_closed(monkeypatch):
    """Tokens in the environment that end up in generated code; a program that waits for the keyboard."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    code = "import os\nprint(sorted(os.environ), os.environ['OMP_NUM_THREADS'])\nos.getcwd()"
    result = execute_code(code, allow_weak=True)
    assert "HF_TOKEN" not in result.stdout and result.stdout.endswith("1\n"), result
    assert result.error.startswith("PermissionError: [Errno 1] disabled in the sandbox")
    assert execute_code("input()", allow_weak=True).error.startswith("EOFError")
    assert execute_code("import psutil", allow_weak=True).error.startswith("ModuleNotFoundError")


@needs_confinement
def test_a_program_may_use_its_folder_and_the_library(own_temporary_folder):
    """So tight a lock that ordinary programs fail."""
    code = (
        "import json, random, hashlib, decimal, datetime, threading, asyncio, csv, sqlite3, ctypes\n"
        "open('a.txt', 'w').write('hello')\nprint(open('a.txt').read(), hashlib.sha256(b'').hexdigest()[:4])\n"
        "thread = threading.Thread(target=print, args=('thread',))\nthread.start()\nthread.join()\n"
        "print(datetime.datetime.strptime('2024', '%Y').year, random.random() < 1, True)\n"
    )
    result = execute_code(code, timeout=20)
    assert result.success and result.stdout == "hello e3b0\nthread\n2024 True True\n", result


# Every attack is a function; it has succeeded when it returns without an error.
ATTACKS = r"""
import ctypes, fcntl, os, struct, time
import _socket as socket
libc = ctypes.CDLL(None, use_errno=True)

def call(number, *arguments):
    result = libc.syscall(*(ctypes.c_long(a) if isinstance(a, int) else a for a in (number, *arguments)))
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return result

def c(function, *arguments):
    if getattr(libc, function)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), "refused")

def after_fork(fork):
    child = fork()
    if child == 0:
        libc._exit(0)
    if child < 0:
        raise OSError("refused")
    return child

def pick(x86, arm):
    return x86 if os.uname().machine == "x86_64" else arm

def setown():
    read, write = os.dup(1), os.dup(2)
    fcntl.fcntl(read, fcntl.F_SETOWN, PARENT)

def spawn():
    import _posixsubprocess, subprocess
    subprocess.run(["/bin/true"], check=True)

def remote_memory():
    buffer, me = ctypes.create_string_buffer(8), ctypes.create_string_buffer(b"1234567")
    local = struct.pack("PN", ctypes.addressof(buffer), 8)
    remote = struct.pack("PN", ctypes.addressof(me), 8)
    call(pick(310, 270), os.getpid(), local, 1, remote, 1, 0)

def rename_over():
    open("mine", "w").write("x")
    c("rename", b"mine", PATH("renamed"))

def escape_by_link(make, name):
    make(PATH("secret"), name)
    open(name).read()

def daemon():
    child = libc.fork()
    if child < 0:
        raise OSError("refused")
    if child == 0:
        libc.setsid()
        time.sleep(0.5)
        open(PATH("daemon"), "w").write("alive")
        libc._exit(0)

def write_tcp():
    connection = socket.socket()
    connection.connect(("127.0.0.1", TCP))
    connection.send(WHO)

def write_udp():
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(WHO, ("127.0.0.1", UDP))

attacks = {
    "read a secret": lambda: open(PATH("secret")).read(),
    "read a secret with a raw call": lambda: call(pick(257, 56), -100, PATH("secret"), 0, 0),
    "openat2": lambda: call(437, -100, PATH("secret"), bytes(24), 24),
    "list a folder": lambda: os.listdir(PATH("")),
    "/etc/passwd": lambda: open("/etc/passwd").read(),
    "parent's environment": lambda: open(f"/proc/{PARENT}/environ").read(),
    "parent's memory": lambda: open(f"/proc/{PARENT}/mem", "rb"),
    "parent's descriptors": lambda: os.readlink(f"/proc/{PARENT}/exe"),
    "own memory map": lambda: open("/proc/self/maps").read(),
    "own root": lambda: os.readlink("/proc/self/root"),
    "write outside": lambda: open(PATH("written"), "w").write("x"),
    "append outside": lambda: open(PATH("victim"), "a").write("x"),
    "write in ..": lambda: open("../written", "w").write("x"),
    "truncate": lambda: c("truncate", PATH("victim"), ctypes.c_long(1)),
    "delete": lambda: c("unlink", PATH("delete-me")),
    "rmdir": lambda: c("rmdir", PATH("empty-folder")),
    "mkdir": lambda: c("mkdir", PATH("new-folder"), 0o700),
    "rename": rename_over,
    "chmod": lambda: c("chmod", PATH("victim"), 0o777),
    "chown": lambda: c("chown", PATH("victim"), os.getuid(), os.getgid()),
    "utime": lambda: os.utime(PATH("victim")),
    "setxattr-free times": lambda: os.utime(PATH("victim"), (1, 1)),
    "symlink": lambda: escape_by_link(os.symlink, "soft"),
    "hard link": lambda: escape_by_link(os.link, "hard"),
    "fifo": lambda: os.mkfifo("fifo"),
    "chdir": lambda: c("chdir", PATH("")),
    "TCP": write_tcp,
    "UDP": write_udp,
    "DNS": lambda: socket.getaddrinfo("localhost", 80),
    "bind": lambda: socket.socket().bind(("127.0.0.1", 0)),
    "unix socket": lambda: socket.socket(socket.AF_UNIX).bind("\0nanochat" + str(os.getpid())),
    "socket pair": lambda: socket.socketpair(),
    "fork": lambda: after_fork(libc.fork),
    "vfork by hand": lambda: after_fork(lambda: call(pick(56, 220), 17, 0, 0, 0, 0)),
    "clone3": lambda: after_fork(lambda: call(435, struct.pack("Q" * 8, 0, 0, 0, 0, 17, 0, 0, 0), 64)),
    "spawn": spawn,
    "system": lambda: 1 / (libc.system(b"exit 0") == 0),
    "daemon": daemon,
    "signal 0 to the parent": lambda: c("kill", PARENT, 0),
    "signal by descriptor": setown,
    "queue a signal": lambda: call(pick(129, 138), PARENT, 0, struct.pack("iii", 0, 0, -1) + bytes(116)),
    "tgkill": lambda: call(pick(234, 131), os.getpid(), os.getpid(), 0),
    "pidfd": lambda: call(434, PARENT, 0),
    "priority of the parent": lambda: os.setpriority(os.PRIO_PROCESS, PARENT, os.getpriority(os.PRIO_PROCESS, PARENT)),
    "affinity of the parent": lambda: os.sched_setaffinity(PARENT, os.sched_getaffinity(PARENT)),
    "limits of the parent": lambda: call(pick(302, 261), PARENT, 7, None, bytes(16)),
    "own limits": lambda: call(pick(302, 261), 0, 4, bytes(16), None),
    "ptrace": lambda: call(pick(101, 117), 0, 0, 0, 0),
    "process_vm_readv": remote_memory,
    "memfd": lambda: call(pick(319, 279), b"x", 0),
    "pipe": lambda: os.pipe(),
    "prctl": lambda: c("prctl", 15, b"name"),
    "new session": lambda: call(pick(124, 156), 0),
    "personality": lambda: call(pick(135, 92), 0xFFFFFFFF),
    "shared memory": lambda: call(pick(29, 194), 0, 4096, 0o1600),
    "O_TMPFILE": lambda: os.open(".", os.O_TMPFILE | os.O_RDWR),
    "mlock": lambda: call(pick(149, 228), 0, 0),
    "eventfd": lambda: call(pick(290, 19), 0, 0),
    "inotify": lambda: call(pick(294, 26), 0),
    "timerfd": lambda: call(pick(283, 85), 1, 0),
    "sync": lambda: call(pick(162, 81)),
    # Often forbidden already, so they prove nothing outside: they only must not work inside.
    "? io_uring": lambda: call(425, 4, bytes(120)),
    "? user namespace": lambda: call(pick(272, 97), 0x10000000),
    "? mount": lambda: call(pick(165, 40), b"none", b"/", b"tmpfs", 0, None),
    "? chroot": lambda: call(pick(161, 51), b"/"),
    "? bpf": lambda: call(pick(321, 280), 0, bytes(120), 120),
    "? perf": lambda: call(pick(298, 241), bytes(120), 0, -1, -1, 0),
    "? keyctl": lambda: call(pick(250, 219), 0, -3, 1),
    "? userfaultfd": lambda: call(pick(323, 282), 1),
    "? setuid": lambda: call(pick(105, 146), 0),
    "? open_by_handle": lambda: call(pick(303, 264), -100, PATH("victim"), b"\x08" + bytes(15), bytes(8), 0),
    "? another seccomp": lambda: call(pick(317, 277), 2, 0, struct.pack("I", 0x7FFF0000)),
    "? landlock": lambda: call(444, struct.pack("Q", 1), 8, 0),
    "? mqueue": lambda: call(pick(240, 180), b"x", 0o100, 0o600, None),
    "? msgget": lambda: call(pick(68, 186), 0, 0o1600),
    "? aio": lambda: call(pick(206, 0), 1, ctypes.byref(ctypes.c_long(0))),
    "? splice": lambda: call(pick(278, 75), 1, None, 0, 0),
    "? terminal input": lambda: fcntl.ioctl(0, 0x5412, b"x"),
    "? exec": lambda: call(pick(59, 221), b"/nonexistent", None, None),
    "? device": lambda: os.mknod("node", 0o20600, 259),
}
tried, succeeded = [], []
for name, attack in attacks.items():
    tried.append(name)
    try:
        attack()
    except (OSError, ZeroDivisionError, ImportError) as error:
        continue
    succeeded.append(name)
print(len(tried), "|".join(succeeded))
"""


def prepared_victims(folder) -> None:
    (folder / "empty-folder").mkdir(parents=True)
    for name in "secret", "victim", "delete-me":
        (folder / name).write_text(f"{name} of the parent")


def snapshot(folder) -> dict:
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mode,
            path.stat().st_mtime_ns,
            path.is_file() and path.read_text(),
        )
        for path in folder.rglob("*")
    }


class Listener:
    """A TCP and a UDP socket on the loopback; `heard` keeps what arrived."""

    def __init__(self):
        self.tcp, self.udp = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", 0))
        self.ports, self.heard = (self.tcp.getsockname()[1], self.udp.getsockname()[1]), []
        threading.Thread(target=self.accept, daemon=True).start()
        threading.Thread(target=self.receive, daemon=True).start()

    def accept(self):
        while True:
            try:
                connection = self.tcp.accept()[0]
            except OSError:
                return
            with connection:
                self.heard.append(("tcp", connection.recv(20)))

    def receive(self):
        while data := self.udp.recv(20):
            self.heard.append(("udp", data))

    def close(self):
        for each in self.tcp, self.udp:
            try:
                each.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            each.close()


@needs_confinement
def test_nothing_outside_can_be_reached(tmp_path):
    """Generated code that reads, writes, connects, starts, signals or inspects anything beyond its folder.

    Every attack also runs in a plain interpreter, where it must work: one that fails for another reason proves nothing.
    """
    listener, succeeded, count = Listener(), {}, {}
    for without in None, "", "counting", "landlock", "landlock counting":
        who = "plain" if without is None else f"without {without}"
        folder = tmp_path / who
        prepared_victims(folder)
        before = snapshot(folder)
        head = f"TCP, UDP = {listener.ports}\nPARENT, WHO = {os.getpid()}, {who.encode()!r}\n"
        head += f"def PATH(name):\n    return {str(folder).encode()!r} + b'/' + name.encode()\n"
        if without is None:
            start = tmp_path / "start"
            start.mkdir()
            result = unconfined(head + ATTACKS, start)
            assert result.returncode == 0, result.stderr
        else:
            result = run_in_sandbox("run", head + ATTACKS, (), 20, MEMORY, False, without)
            assert result.success, result
        count[who], names = result.stdout.rstrip("\n").split(" ", 1)
        succeeded[who] = set(filter(None, names.split("|")))
        time.sleep(0.7)
        if without is None:
            assert (folder / "daemon").exists()
        else:
            assert snapshot(folder) == before
    heard = sorted(listener.heard)
    listener.close()
    certain = {line.split('"')[1] for line in ATTACKS.splitlines() if line.startswith('    "')}
    assert set(count.values()) == {str(len(certain))}
    plain = succeeded.pop("plain")
    assert {name for name in certain if name[0] != "?"} - plain == set()
    assert succeeded == {who: set() for who in succeeded} and len(succeeded) == 4
    assert heard == [("tcp", b"plain"), ("udp", b"plain")]


@needs_confinement
@pytest.mark.parametrize(
    "call",
    [
        "libc.syscall(ctypes.c_long(0x40000000 + 39))",  # getpid of x32
        # getpid by the 32-bit entry: mov eax, 20; int 0x80; ret
        "page = mmap.mmap(-1, 4096, prot=7); page.write(b'\\xb8\\x14\\0\\0\\0\\xcd\\x80\\xc3');"
        " ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()",
    ],
)
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="other machines have no second set of calls")
def test_calls_of_other_architectures(call, tmp_path):
    """The same call under another number passes a filter that looks at numbers alone."""
    code = f"import ctypes, mmap\nlibc = ctypes.CDLL(None)\n{call}\n"
    assert unconfined(code, tmp_path).returncode in (0, -11)  # the kernel may be built without them
    assert "signal 31" in execute_code(code).error


@needs_confinement
def test_bombs_are_bounded(tmp_path):
    """Memory, files, disk, threads and descriptors without end: the program must run into a wall, not the machine."""
    result = execute_code("x = bytearray(1 << 30)")
    assert result.memory_exceeded and result.error.startswith("Memory limit exceeded"), result
    assert not execute_code("x = []\nwhile True: x.append(bytearray(1 << 20))").success
    assert solve(MEAN, "def mean_gap(x): return len(bytearray(1 << 30))").memory_exceeded
    assert execute_code("x = bytearray(100 << 20)").success
    assert not execute_code("x = bytearray(100 << 20)", maximum_memory_bytes=64 << 20).success
    assert execute_code("import typing, random, math", maximum_memory_bytes=64 << 20).success
    assert execute_code("x = bytearray(300 << 20)", maximum_memory_bytes=None).success

    code = (
        "import os, threading, time\nfiles = size = threads = 0\n"
        "try:\n    while True:\n        with open(f'file{files}', 'wb', 0) as file:\n            files += 1\n"
        "            try:\n                while True: size += file.write(bytes(1 << 18))\n"
        "            except OSError: pass\n"
        "except OSError as error: reason = error.errno\n"
        "opened = []\ntry:\n    while True: opened.append(os.dup(1))\nexcept OSError: [os.close(x) for x in opened]\n"
        "threading.stack_size(1 << 16)\n"
        "try:\n    while True:\n        threading.Thread(target=time.sleep, args=(9,), daemon=True).start()\n"
        "        threads += 1\n"
        "except RuntimeError: pass\n"
        "print(files, size >> 20, len(opened) < 64, threads, sum(x.stat().st_size for x in os.scandir()) >> 20)\n"
    )
    result = execute_code(code, timeout=20)
    assert result.success and result.stdout == "64 64 True 16 64\n", result
    result = run_in_sandbox("run", code, (), 20, MEMORY, False, "counting")
    assert result.success and result.stdout == "0 0 True 0 0\n", result


def test_the_time_limit_holds():
    """Endless loops, ignored signals, raised limits and stopped processes: none may outlive the limit or block."""
    stubborn = (
        "import os, signal, threading\n"
        "for number in range(1, 64):\n    try: signal.signal(number, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\n"
        "try:\n    import ctypes\n    ctypes.CDLL(None).setrlimit(0, bytes(16))\nexcept Exception: pass\n"
        "try: threading.Thread(target=lambda: [0 for _ in iter(int, 1)]).start()\nexcept RuntimeError: pass\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 64))\n"
    )
    endings = [
        "while True: pass",
        "import time; time.sleep(1000)",
        "threading.Lock().acquire(); threading.Event().wait()",
    ]
    for ending in endings:
        result = execute_code(stubborn + ending, timeout=0.6, allow_weak=True)
        assert result.timeout and not result.success and result.error == "Execution timed out", result
    program = stubborn + "def mean_gap(x):\n    while True: pass\n"
    assert solve(MEAN, program, timeout=0.6).timeout
    assert solve(MEAN, "import os, signal\nos.write(5, b'\\0')\nwhile True: pass", timeout=0.6).timeout
    assert (
        execute_code("import time\nprint('kept', end='', flush=True)\ntime.sleep(60)", 0.8, allow_weak=True).stdout
        == "kept"
    )


def test_output_is_bounded_and_always_text():
    """A program that prints for ever fills the notebook's memory; one that prints bytes breaks the decoding."""
    execute_code("pass", allow_weak=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    flood = "import os\nwhile True:\n    os.write(1, b'\\xff\\0x' * 20000)\n    os.write(2, b'y' * 60000)\n"
    result = execute_code(flood, timeout=1.0, allow_weak=True)
    assert result.timeout and len(result.stdout) == len(result.stderr) == 65536 and result.stdout[0] == "\ufffd"
    flood = "import os\nfor _ in range(2000):\n    for fd in range(3, 7):\n"
    flood += "        try: os.write(fd, b'z' * 60000)\n        except OSError: pass\n"
    assert not execute_code(flood + "os._exit(0)", timeout=4.0, allow_weak=True).success
    assert not solve(MEAN, flood).success
    result = execute_code("raise ValueError('x' * 10 ** 7)", allow_weak=True)
    assert len(result.error) < 1000 and len(result.stderr) == 65536
    unit = 1 if sys.platform == "darwin" else 1024
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < 50 << 20


def test_several_threads_at_once():
    """Results of one program reported for another when two evaluations run side by side."""
    jobs = [(n, f"print({n})\n" + ("1 / 0" if n % 2 else "")) for n in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for n, result in pool.map(lambda job: (job[0], execute_code(job[1], 20, allow_weak=True)), jobs):
            assert (result.stdout, result.success) == (f"{n}\n", n % 2 == 0)


@pytest.mark.skipif(sys.platform != "linux", reason="leaves out mechanisms of Linux")
def test_without_confinement_nothing_runs_unless_asked_for(tmp_path):
    """A machine that cannot confine, and generated code that runs there as if it could."""
    marker = tmp_path / "marker"
    code = f"open({str(marker)!r}, 'w').write('x')"
    problem = ("def f(): 'x'", "def check(candidate): candidate()", "f")
    for mode, others, program in ("run", (), code), ("check", problem, f"{code}\ndef f(): pass"):
        with pytest.raises(UserError, match="allow_weak"):
            run_in_sandbox(mode, program, others, 20, MEMORY, False, "landlock seccomp")
        assert not marker.exists()
        assert run_in_sandbox(mode, program, others, 20, MEMORY, True, "landlock seccomp").success
        assert marker.read_text() == "x"
        marker.unlink()
    for name in "import os; os.kill(0, 0)", "import subprocess; subprocess.Popen('ls')", "import os; os.remove('x')":
        assert "disabled" in run_in_sandbox("run", name, (), 20, MEMORY, True, "landlock seccomp").error


@pytest.mark.skipif(sys.platform != "linux", reason="leaves out mechanisms of Linux")
def test_the_level_is_what_a_program_could_do():
    """A level that is read off the kernel's version instead of being tried."""
    assert sandbox_level("landlock seccomp")[0] == "none"
    level, sentence = sandbox_level("seccomp")
    assert level != "full" and "use the network" in sentence
    assert sandbox_level("landlock")[0] == sandbox_level()[0]


def test_the_channel_believes_nothing():
    """Messages that make the reader crash, allocate without bound, or build something other than plain data."""
    scope = {"__builtins__": __builtins__}
    exec("import struct\n" + SANDBOX_CHANNEL, scope)
    encode, decode = scope["encode"], scope["decode"]
    for value in [
        None,
        True,
        0,
        -1,
        255,
        -(1 << 300),
        0.5,
        float("inf"),
        1 - 2j,
        "é\ud800\0",
        b"\xff",
        bytearray(b"x"),
    ]:
        assert decode(encode(value)) == value and type(decode(encode(value))) is type(value)
    nested = [(), [], {}, set(), frozenset({(1, "a"), frozenset()}), {"a": [1, {2: (3, None)}], (1,): {4, 5}}]
    assert decode(encode(nested)) == nested and [type(x) for x in decode(encode(nested))] == [type(x) for x in nested]
    whole = encode({"key": [1, 2.0, "three", (None, {4})]})
    for size in range(len(whole)):
        with pytest.raises((ValueError, TypeError)):
            decode(whole[:size])
    for data in [b"", b"X", whole + b"N", b"L\xff\xff\xff\xff", b"L\0\0\0\1" * 100 + b"N", b"S\0\0\0\1\xff", b"I" * 9]:
        with pytest.raises(ValueError):
            decode(data)
    for data in [b"E\0\0\0\1L\0\0\0\0", b"M\0\0\0\1M\0\0\0\0N"]:
        with pytest.raises(TypeError):
            decode(data)
    for value in [object(), iter([]), range(3), len, "x" * (5 << 20), [["x" * (1 << 20)]] * 5]:
        with pytest.raises(scope["Unpassable"]):
            encode(value)
