# %% [markdown]
# ## Running what the model wrote
#
# To find out whether a function is right one has to run it, and it was written by a language model: it may loop for
# ever, eat the memory, delete files, or pass the tests by ending the program before they start. So each problem gets
# three processes of its own, and none of them is this one:
#
# ```
#  notebook ──job──▶ supervisor ──program──▶ candidate   the model's text, and nothing else
#           ◀report─     │                     ▲ │       plain values: calls in, answers out
#                        │                     │ ▼
#                        └──prompt, test────▶ checker ──verdict──▶ supervisor
# ```
#
# The **candidate** never sees the tests, the expected answers or the channel of the verdict. The **checker** never runs
# a line of the candidate's: what arrives is numbers, strings and containers, rebuilt by a decoder of our own, so there
# is no object that equals everything. Both are locked in by the kernel before they read a word of code, with the
# standard library alone: resource limits, no capabilities, Landlock for files, seccomp for everything else.

# %%
import functools
import math
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from nanochat.runtime import UserError

# %% [markdown]
# ### `ExecutionResult`
# What comes back, whatever the program did.


# %%
@dataclass
class ExecutionResult:
    """success: it ran to its end (or: passed its checks). error: one line, None on success.

    stdout, stderr: the first 64 KiB of each; bytes that are not UTF-8 are replaced. Spec section 18.
    """

    success: bool
    stdout: str = ""
    stderr: str = ""
    error: str | None = None
    timeout: bool = False
    memory_exceeded: bool = False


# %% [markdown]
# ### Inside, part 1: the lock
# From here on three pieces of text: the program of the other processes, which start as `python -c` because a notebook
# has no files to point at. This first part takes rights away.
#
# Landlock knows paths: the Python library may be read, one temporary folder may be filled, everything else is gone.
# Seccomp knows system calls: about eighty are allowed, some of them with harmless arguments alone, and the rest, future
# inventions included, fail. Where Landlock is missing, seccomp forbids to open any file at
# all, and the modules that a program mentions are imported for it beforehand.

# %%
SANDBOX_LOCK = r'''
import os, resource, struct, sys

LINUX = sys.platform == "linux"
if LINUX:
    import ctypes
    LIBC = ctypes.CDLL(None, use_errno=True)

FILE_BYTES = 1 << 20

# name, number on x86_64, number on aarch64 ("-": does not exist there). None of these reaches another process, and the
# ones that open files are held by Landlock. Not here on purpose: kill and its kin, sockets, exec, pipes, epoll, every
# way to rename, remove, link or chmod, readlink (it would tell what other processes have open), memfd, mlock.
HARMLESS_CALLS = """
read 0 63, write 1 64, close 3 57, fstat 5 80, lseek 8 62, mmap 9 222, mprotect 10 226, munmap 11 215, brk 12 214,
rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, pread64 17 67, pwrite64 18 68, readv 19 65,
writev 20 66, sched_yield 24 124, mremap 25 216, madvise 28 233, dup 32 23, dup3 292 24, nanosleep 35 101,
getitimer 36 102, setitimer 38 103, getpid 39 172, exit 60 93, uname 63 160, ftruncate 77 46, getdents64 217 61,
getcwd 79 17, gettimeofday 96 169, getrlimit 97 163, getrusage 98 165, sysinfo 99 179, times 100 153, getuid 102 174,
getgid 104 176, geteuid 107 175, getegid 108 177, getppid 110 173, rt_sigpending 127 136, rt_sigtimedwait 128 137,
rt_sigsuspend 130 133, sigaltstack 131 132, gettid 186 178, futex 202 98, sched_getaffinity 204 123,
set_tid_address 218 96, restart_syscall 219 128, fadvise64 221 223, clock_gettime 228 113, clock_getres 229 114,
clock_nanosleep 230 115, exit_group 231 94, newfstatat 262 79, faccessat 269 48, pselect6 270 72, ppoll 271 73,
set_robust_list 273 99, getcpu 309 168, getrandom 318 278, membarrier 324 283, statx 332 291, rseq 334 293,
close_range 436 436, faccessat2 439 439, stat 4 -, lstat 6 -, poll 7 -, access 21 -, select 23 -, dup2 33 -, alarm 37 -,
time 201 -
"""
CONDITIONAL_CALLS = """
open 2 -, openat 257 56, clone 56 220, fcntl 72 25, ioctl 16 29, prlimit64 302 261, clone3 435 435, openat2 437 437,
futex_waitv 449 449
"""
COLUMN, ARCHITECTURE, SECCOMP = {
    "x86_64": (1, 0xC000003E, 317), "aarch64": (2, 0xC00000B7, 277)
}.get(os.uname().machine if sys.maxsize > 1 << 32 else "", (0, 0, 0))


def numbers(table):
    rows = (row.split() for row in table.split(","))
    return {row[0]: int(row[COLUMN]) for row in rows if row[COLUMN] != "-"}


def kernel(number, *arguments):
    """A raw system call; -1 when the kernel refuses."""
    return LIBC.syscall(*(ctypes.c_long(a) if isinstance(a, int) else a for a in (number, *arguments)))


def prctl(option, value=0):
    return LIBC.prctl(option, *(ctypes.c_ulong(a) for a in (value, 0, 0, 0)))


def drop_privileges():
    """No capability, none to be regained, and no debugger (or core file) for this process, even if it is root's."""
    prctl(47, 4)  # PR_CAP_AMBIENT, clear all
    for capability in range(64):
        prctl(24, capability)  # PR_CAPBSET_DROP
    LIBC.capset(struct.pack("Ii", 0x20080522, 0), bytes(24))
    if prctl(38, 1):  # PR_SET_NO_NEW_PRIVS
        raise OSError("no_new_privs was refused")
    prctl(4, 0)  # PR_SET_DUMPABLE


def die_with(parent):
    """The kernel kills this process when its parent is gone."""
    prctl(1, 9)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def set_limits(memory, seconds, processes):
    wanted = {"CORE": 0, "CPU": seconds, "FSIZE": FILE_BYTES, "NOFILE": 64, "STACK": 8 << 20, "MEMLOCK": 0,
              "MSGQUEUE": 0}
    if memory:
        wanted |= {"AS": memory, "DATA": memory}
    if not processes:
        wanted["NPROC"] = 0
    for name, value in wanted.items():
        kind = getattr(resource, "RLIMIT_" + name, None)
        if kind is None:
            continue
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(kind, (value, value))
        except (ValueError, OSError):
            if LINUX:  # macOS refuses a few
                raise


def confine_files(folder):
    """Landlock: read the Python library and what it links to, read and fill `folder`. False: the kernel has none."""
    abi = kernel(444, None, 0, 1)
    if abi < 1:
        return False
    read, fill = 1 << 2 | 1 << 3, 1 << 1 | 1 << 8 | (1 << 14 if abi >= 3 else 0)  # fill: write, make files, truncate
    rights = (1 << 13) - 1 | (abi >= 2) << 13 | (abi >= 3) << 14 | (abi >= 5) << 15
    attributes = struct.pack("QQQ", rights, 3, 3)  # all of: files, TCP, signals and abstract sockets
    rules = kernel(444, attributes, 8 if abi < 4 else 16 if abi < 6 else 24, 0)
    if rules < 0:
        return False
    libraries = {os.path.dirname(os.__file__), *(p for p in sys.path if p.startswith("/"))}
    libraries |= {prefix + "/lib" for prefix in (sys.base_prefix, sys.base_exec_prefix)}
    libraries |= {"/lib", "/lib64", "/usr/lib", "/usr/lib64"}
    grants = {path: read for path in libraries if os.path.isdir(path)} | {folder: read | fill}
    grants |= {"/etc/ld.so.cache": 1 << 2} if os.path.exists("/etc/ld.so.cache") else {}
    for path, allowed in grants.items():
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if kernel(445, rules, 1, struct.pack("=Qi", allowed, place), 0):
            raise OSError("a Landlock rule was refused")
        os.close(place)
    if kernel(446, rules, 0):
        raise OSError("Landlock was refused")
    os.close(rules)
    return True


# Seccomp filters are programs for a tiny machine: load a word of the call, compare, jump, return what to do.
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOWED, ASK, REFUSED, KILLED = 0x7FFF0000, 0x7FC00000, 0x00050000, 0x80000000
NOT_PERMITTED, NOT_A_TERMINAL, NOT_KNOWN = REFUSED | 1, REFUSED | 25, REFUSED | 38
CREATE, SIGNAL_ME, NAMELESS, THREAD = 0x40, 0x2000, 0x400000, 0x10000  # O_CREAT, O_ASYNC, O_TMPFILE, CLONE_THREAD


def op(code, value, if_true=0, if_false=0):
    return struct.pack("HBBI", code, if_true, if_false, value)


def argument(index, upper=False):
    return op(LOAD, 16 + 8 * index + 4 * upper)


def one_of(index, values, otherwise):
    tests = [part for value in values for part in (op(EQUAL, value, 0, 1), op(RETURN, ALLOWED))]
    return [argument(index), *tests, op(RETURN, otherwise)]


def only_zero(index, upper=False):
    return [argument(index, upper), op(EQUAL, 0, 1, 0), op(RETURN, NOT_PERMITTED)]


def unless_bits(index, bits, verdict=NOT_PERMITTED):
    return [argument(index), op(ANY_BIT, bits, 0, 1), op(RETURN, verdict)]


def call_filter(may_open, may_create):
    """The allow-list. may_create: the supervisor counts new files and threads, so a few may be made."""
    allow, deny = op(RETURN, ALLOWED), op(RETURN, NOT_PERMITTED)
    forbidden = NAMELESS | SIGNAL_ME | (0 if may_create else CREATE)
    conditions = {
        # Not even F_SETOWN: together with F_SETSIG it sends any signal to any process of the same user.
        "fcntl": one_of(1, (0, 1, 2, 3, 1030), NOT_PERMITTED),  # duplicate, get and set close-on-exec, get flags
        "ioctl": one_of(1, (0x5450, 0x5451, 0x5401, 0x5413), NOT_A_TERMINAL),  # close-on-exec, "is it a terminal?"
        "open": unless_bits(1, forbidden) + [allow] if may_open else [deny],
        "openat": unless_bits(2, forbidden) + [allow] if may_open else [deny],
        # Exactly the flags of a thread of this process.
        "clone": [
            *unless_bits(0, 0xFFFFFFFF & ~0x7D0F00),
            *unless_bits(0, THREAD, ALLOWED if may_create else NOT_PERMITTED),
            deny,
        ],
        # Its own limits, and only to look: no process id, no pointer to new limits.
        "prlimit64": [*only_zero(0), *only_zero(2), *only_zero(2, True), allow],
        # The C library tries these first; for "unknown" it takes the older call, for "forbidden" it gives up.
        "clone3": [op(RETURN, NOT_KNOWN)], "openat2": [op(RETURN, NOT_KNOWN)], "futex_waitv": [op(RETURN, NOT_KNOWN)],
    }
    blocks = [(number, [allow]) for number in numbers(HARMLESS_CALLS).values()]
    blocks += [(number, conditions[name]) for name, number in numbers(CONDITIONAL_CALLS).items()]
    return native_calls_only() + [part for block in blocks for part in when_call(*block)] + [deny]


def native_calls_only():
    """Calls of another architecture have other numbers, and so have those of x32."""
    return [op(LOAD, 4), op(EQUAL, ARCHITECTURE, 1, 0), op(RETURN, KILLED),
            op(LOAD, 0), op(AT_LEAST, 0x40000000, 0, 1), op(RETURN, KILLED)]


def when_call(number, block):
    return [op(EQUAL, number, 0, len(block)), *block]


def counting_filter():
    """Every new file and every new thread asks the supervisor first."""
    calls = numbers(CONDITIONAL_CALLS)
    allow = op(RETURN, ALLOWED)
    blocks = when_call(calls["openat"], unless_bits(2, CREATE, ASK) + [allow])
    blocks += when_call(calls["clone"], unless_bits(0, THREAD, ASK) + [allow])
    if "open" in calls:
        blocks += when_call(calls["open"], unless_bits(1, CREATE, ASK) + [allow])
    return native_calls_only() + blocks + [allow]


def install(operations, listener=False):
    """Put a filter on this process and all that it starts, for ever. The listener's descriptor, or 0; -1: refused."""
    code = ctypes.create_string_buffer(b"".join(operations))
    program = struct.pack("HP", len(operations), ctypes.addressof(code))
    return kernel(SECCOMP, 1, 8 if listener else 0, program)


IMPORTED_AHEAD = """_socket abc array base64 binascii bisect calendar cmath collections contextlib copy dataclasses
datetime _strptime decimal enum fractions functools hashlib heapq inspect io itertools json math numbers operator os
random re statistics string struct sys textwrap time traceback types typing unicodedata zlib""".split()


def import_mentioned(text):
    for name in IMPORTED_AHEAD:
        if name.strip("_") in text:
            __import__(name)


def confine(job, text):
    """Lock this process in. False: seccomp is not to be had, so network and processes are open."""
    set_limits(job.memory, int(job.seconds) + 2, job.counted)
    if not LINUX:
        return False
    die_with(job.supervisor)
    files = "landlock" not in job.without and confine_files(job.folder)
    if not files:
        import_mentioned(text)
    if not SECCOMP or "seccomp" in job.without:
        return False
    return install(call_filter(may_open=files, may_create=files and job.counted)) == 0
'''

# %% [markdown]
# ### Inside, part 2: the channel
# A value travels as a letter, a length and its bytes. The reader believes nothing: lengths are compared with what is
# left, nesting is bounded, and the result is made of exactly the built-in types, whatever the sender's objects claimed
# to be. Pickle would run code here, and JSON would turn tuples into lists.

# %%
SANDBOX_CHANNEL = r'''
MESSAGE_BYTES, MAX_NESTING = 4 << 20, 60


class Unpassable(Exception):
    """A value that is no plain data, or too much of it."""


def packed(letter, content):
    if len(content) > MESSAGE_BYTES:
        raise Unpassable("a value of more than 4 MiB")
    return letter + struct.pack(">I", len(content)) + content


def encode(value, nesting=0):
    if nesting > MAX_NESTING:
        raise Unpassable(f"a value nested more than {MAX_NESTING} deep")
    if value is None or value is True or value is False:
        return {None: b"N", True: b"T", False: b"F"}[value]
    if isinstance(value, int):
        return packed(b"I", int.to_bytes(value, int.bit_length(value) // 8 + 1, "big", signed=True))
    if isinstance(value, float):
        return b"D" + struct.pack(">d", value)
    if isinstance(value, complex):
        return b"C" + struct.pack(">dd", value.real, value.imag)
    if isinstance(value, str):
        return packed(b"S", str.encode(value, "utf-8", "surrogatepass"))
    if isinstance(value, (bytes, bytearray)):
        return packed(b"B" if isinstance(value, bytes) else b"A", bytes(value))
    for letter, kind in (b"L", list), (b"U", tuple), (b"E", set), (b"Z", frozenset), (b"M", dict):
        if isinstance(value, kind):
            break
    else:
        raise Unpassable(f"an object of type {type(value).__name__}")
    items = [item for pair in dict.items(value) for item in pair] if kind is dict else kind.__iter__(value)
    parts, size, count = [], 0, 0
    for item in items:
        parts.append(encode(item, nesting + 1))
        size, count = size + len(parts[-1]), count + 1
        if size > MESSAGE_BYTES:
            raise Unpassable("a value of more than 4 MiB")
    return letter + struct.pack(">I", count // 2 if kind is dict else count) + b"".join(parts)


class Decoder:
    """Rebuilds one value; ValueError for anything that `encode` does not write."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, size):
        if size > len(self.data) - self.at:
            raise ValueError("the message ends early")
        self.at += size
        return self.data[self.at - size : self.at]

    def length(self):
        return struct.unpack(">I", self.take(4))[0]

    def value(self, nesting=0):
        if nesting > MAX_NESTING:
            raise ValueError("nested too deeply")
        letter = self.take(1)
        if letter in b"NTF":
            return {b"N": None, b"T": True, b"F": False}[letter]
        if letter == b"D":
            return struct.unpack(">d", self.take(8))[0]
        if letter == b"C":
            return complex(*struct.unpack(">dd", self.take(16)))
        if letter == b"I":
            return int.from_bytes(self.take(self.length()), "big", signed=True)
        if letter == b"S":
            return self.take(self.length()).decode("utf-8", "surrogatepass")
        if letter in b"BA":
            return (bytes if letter == b"B" else bytearray)(self.take(self.length()))
        if letter not in b"LUEZM":
            raise ValueError("an unknown kind of value")
        items = (self.value(nesting + 1) for _ in range(self.length() * (1 + (letter == b"M"))))
        if letter == b"M":
            return {key: next(items) for key in items}
        return {b"L": list, b"U": tuple, b"E": set, b"Z": frozenset}[letter](items)


def decode(data):
    decoder = Decoder(data)
    value = decoder.value()
    if decoder.at != len(data):
        raise ValueError("something follows the value")
    return value


def read_exactly(descriptor, size):
    data = bytearray()
    while len(data) < size:
        chunk = os.read(descriptor, min(size - len(data), 1 << 16))
        if not chunk:
            raise EOFError
        data += chunk
    return bytes(data)


def read_message(descriptor):
    """EOFError when the other side is gone, ValueError when it wants to send too much."""
    size = struct.unpack(">I", read_exactly(descriptor, 4))[0]
    if size > MESSAGE_BYTES:
        raise ValueError("a message of more than 4 MiB")
    return read_exactly(descriptor, size)


def write_message(descriptor, data):
    if len(data) > MESSAGE_BYTES:
        raise Unpassable("a value of more than 4 MiB")
    data = memoryview(struct.pack(">I", len(data)) + data)
    while data:
        data = data[os.write(descriptor, data) :]
'''

# %% [markdown]
# ### Inside, part 3: the processes
# The supervisor starts the other two by forking before it has read anything, so that neither inherits what the other is
# told. Then it counts files and threads, collects output, watches the clock, and ends everything.

# %%
SANDBOX_PROCESSES = r'''
import builtins, fcntl, select, time

OUTPUT_BYTES, MAX_NEW_FILES, MAX_THREADS = 1 << 16, 64, 16
# What each child finds at these descriptors; the rest is closed.
JOB, CALLS, ANSWERS, VERDICT = 3, 4, 5, 6
DISABLED = """kill system putenv remove removedirs rmdir fchdir setuid fork forkpty killpg rename renames truncate
replace unlink fchmod fchown chmod chown chroot lchflags lchmod lchown getcwd chdir""".split()


class Job:
    """What the notebook wants, from the command line."""

    def __init__(self, mode, seconds, memory, weak, folder, without, parent, shared):
        self.shared = shared.split()
        self.mode, self.seconds, self.memory, self.weak = mode, float(seconds), int(memory), weak == "weak"
        self.folder, self.without, self.parent = folder, without.split(), int(parent)
        self.supervisor, self.counted = os.getpid(), False


def fresh_module():
    """An empty __main__, so that a program finds neither these functions nor this command line."""
    sys.argv[:] = sys.orig_argv[:] = ["program"]
    module = type(sys)("__main__")
    module.__builtins__ = builtins
    sys.modules["__main__"] = module
    return module.__dict__


def run_text(text, name, namespace):
    exec(compile(text, name, "exec", dont_inherit=True), namespace)


def disable_functions(confined):
    """For programs that mean no harm: a clear error. What keeps the others in is the kernel."""
    def disabled(*_, **__):
        raise PermissionError(1, "disabled in the sandbox")

    for name in DISABLED:
        if hasattr(os, name):
            setattr(os, name, disabled)
    for name in "ipdb", "joblib", "resource", "psutil", "tkinter":
        sys.modules[name] = None
    for name in "exit", "quit", "help":
        vars(builtins).pop(name, None)
    os.environ.pop("LD_LIBRARY_PATH", None)
    if not confined:
        import shutil, subprocess
        shutil.rmtree = shutil.move = shutil.chown = subprocess.Popen = disabled


def describe(error):
    """(names of the exception's classes, its message), whatever its __str__ does."""
    try:
        message = str(error)[:500]
    except BaseException:
        message = ""
    return [kind.__name__ for kind in type(error).__mro__][:20], message


def one_line(error):
    names, message = describe(error)
    return f"{names[0]}: {message}" if message else names[0]


def flush_output():
    for stream in sys.stdout, sys.stderr:
        if not getattr(stream, "closed", True):
            stream.flush()


def say(verdict, token, message=""):
    """P passed, F failed, M out of memory, R refused to run. Then the end, without clean-up handlers."""
    os.write(VERDICT, token + verdict + message.encode("utf-8", "replace")[:2000])
    os._exit(0)


def locked_in(job, *texts):
    """(confined, whether to go on)."""
    try:
        confined = confine(job, " ".join(texts))
    except OSError:
        confined = False
    return confined, confined or job.weak


def run_program(job):
    """The candidate of `execute_code`: runs the text once."""
    text = read_message(JOB).decode()
    confined, allowed = locked_in(job, text)
    if not allowed:
        say(b"R", read_message(JOB))
    disable_functions(confined)
    verdict, message = b"P", ""
    try:
        run_text(text, "<program>", fresh_module())
        flush_output()
    except BaseException as error:
        verdict, message = b"M" if isinstance(error, MemoryError) else b"F", one_line(error)
        trace = error.__traceback__
        while trace and trace.tb_frame.f_code.co_filename != "<program>":
            trace = trace.tb_next
        sys.__excepthook__(type(error), BaseException.with_traceback(error, trace), trace)
    # Only now does the token leave the pipe: nothing that a program comes across in passing holds it.
    say(verdict, read_message(JOB), message)


def serve_program(job):
    """The candidate of `check_solution`: answers calls of one function."""
    text, entry_point = read_message(JOB).decode(), read_message(JOB).decode()
    confined, allowed = locked_in(job, text)
    if not allowed:
        os._exit(1)
    disable_functions(confined)
    namespace = fresh_module()

    def answer(work):
        try:
            value = work()
            flush_output()
            return encode(("value", value))
        except Exception as error:
            if isinstance(error, Unpassable):
                return encode(("ended", ["it"], f"returned {error}"))
            return encode(("raised", *describe(error)))
        except BaseException as error:
            return encode(("ended", *describe(error)))

    def load():
        run_text(text, "<program>", namespace)
        if not callable(namespace.get(entry_point)):
            raise NameError(f"the program defines no function {entry_point}")

    write_message(ANSWERS, answer(load))
    while True:
        positional, named = decode(read_message(CALLS))
        write_message(ANSWERS, answer(lambda: namespace[entry_point](*positional, **named)))


def check_program(job):
    """The checker: runs the test, with calls of the function going to the candidate."""
    prompt, test, entry_point = (read_message(JOB).decode() for _ in range(3))
    token = read_message(JOB)
    if not locked_in(job, prompt, test)[1]:
        say(b"R", token)
    namespace = fresh_module()

    def answer():
        try:
            kind, *rest = decode(read_message(ANSWERS))
            if kind == "value":
                [value] = rest
                return value
            names, message = rest
            error = None if kind == "ended" else rebuilt_exception(namespace, names, message)
            ended = f"{names[0]} {message}".strip()
        except EOFError:
            say(b"F", token, "the program ended before it answered")
        except BaseException:
            say(b"F", token, "the program sent a malformed answer")
        # Not raised: a test that expects some exception would take the end of the program for it.
        if error is None:
            say(b"F", token, ended)
        raise error

    def candidate(*positional, **named):
        message = encode((positional, named))
        try:
            write_message(CALLS, message)
        except OSError:
            say(b"F", token, "the program ended before it answered")
        return answer()

    try:
        try:
            run_text(prompt, "<prompt>", namespace)
        except SyntaxError:
            run_text(prompt + "\n    pass\n", "<prompt>", namespace)
        namespace[entry_point] = candidate
        run_text(test, "<test>", namespace)
        answer()  # to the question whether the program could be loaded
        namespace["check"](candidate)
    except MemoryError as error:
        say(b"M", token, one_line(error))
    except BaseException as error:
        say(b"F", token, one_line(error))
    say(b"P", token)


def rebuilt_exception(namespace, names, message):
    """An exception of the nearest class that exists on this side: the prompt's own or a built-in one."""
    for name in names:
        for known in namespace, vars(builtins):
            kind = known.get(name)
            if isinstance(kind, type) and issubclass(kind, Exception):
                try:
                    return kind(message)
                except TypeError:  # one that wants more than a message
                    continue
    return Exception(message)


def start(work, job, output, errors, descriptors):
    """Fork a child that has these descriptors and no others."""
    nothing = os.open(os.devnull, os.O_RDWR)
    wanted = [nothing, output or nothing, errors or nothing] + [
        descriptors.get(place, nothing) for place in (JOB, CALLS, ANSWERS, VERDICT)
    ]
    child = os.fork()
    if child:
        os.close(nothing)
        return child
    try:
        # First out of the way: a pipe's number may be one that is to be overwritten.
        for place, source in enumerate([fcntl.fcntl(each, fcntl.F_DUPFD, 40) for each in wanted]):
            os.dup2(source, place)
        os.closerange(len(wanted), 256)
        sys.stdout.reconfigure(line_buffering=True)
        work(job)
    finally:
        os._exit(1)


def answer_request(listener, budget):
    """A child wants to make a file or a thread. What is looked at is in registers: it cannot change any more."""
    request = bytearray(80)
    try:
        fcntl.ioctl(listener, 0xC0502100, request)
        identity, _, _, call = struct.unpack_from("QIIi", request)
        kind = "thread" if call == numbers(CONDITIONAL_CALLS)["clone"] else "file"
        budget[kind] -= 1
        error, go_on = (0, 1) if budget[kind] >= 0 else (-122 if kind == "file" else -11, 0)  # EDQUOT, EAGAIN
        fcntl.ioctl(listener, 0xC0182101, struct.pack("QqiI", identity, 0, error, go_on))
    except OSError:  # it has died meanwhile
        pass


def watch(kept, verdict, listener, deadline):
    """Collect output until the verdict's pipe closes. False: the time was up."""
    poller = select.poll()
    for descriptor in [*kept, *([listener] if listener >= 0 else [])]:
        poller.register(descriptor, select.POLLIN)
    budget = {"file": MAX_NEW_FILES, "thread": MAX_THREADS}
    while (left := deadline - time.monotonic()) > 0:
        for descriptor, _ in poller.poll(min(left * 1000 + 1, 1e6)):
            if descriptor == listener:
                answer_request(listener, budget)
                continue
            chunk = os.read(descriptor, 1 << 16)
            kept[descriptor] += chunk[: OUTPUT_BYTES - len(kept[descriptor])]
            if not chunk:
                poller.unregister(descriptor)
                if descriptor == verdict:
                    return True
    return False


def drain(kept):
    """What was written before the end. Bounded: where forking could not be forbidden, a pipe may still be open."""
    poller = select.poll()
    for descriptor in kept:
        poller.register(descriptor, select.POLLIN)
    for _ in range(8):
        for descriptor, _ in poller.poll(0):
            chunk = os.read(descriptor, 1 << 16)
            kept[descriptor] += chunk[: OUTPUT_BYTES - len(kept[descriptor])]
            if not chunk:
                poller.unregister(descriptor)


def supervise(job):
    listener = -1
    for name in job.shared:
        __import__(name)
    if LINUX:
        try:
            with open("/proc/self/oom_score_adj", "w") as file:
                file.write("1000")  # when memory runs out, these processes go first
        except OSError:
            pass
        drop_privileges()
        die_with(job.parent)
        if SECCOMP and not {"seccomp", "counting"} & set(job.without):
            listener = install(counting_filter(), listener=True)
    job.counted = listener >= 0
    (out, out_end), (err, err_end), (verdict, verdict_end) = os.pipe(), os.pipe(), os.pipe()
    job_source, job_end = os.pipe()
    if job.mode == "run":
        children = [start(run_program, job, out_end, err_end, {JOB: job_source, VERDICT: verdict_end})]
        inner = [job_source]
    else:
        check_source, check_end = os.pipe()
        (calls, calls_end), (answers, answers_end) = os.pipe(), os.pipe()
        to_serve = {JOB: job_source, CALLS: calls, ANSWERS: answers_end}
        to_check = {JOB: check_source, CALLS: calls_end, ANSWERS: answers, VERDICT: verdict_end}
        children = [start(serve_program, job, out_end, err_end, to_serve), start(check_program, job, 0, 0, to_check)]
        inner = [job_source, check_source, calls, calls_end, answers, answers_end]
    for descriptor in [out_end, err_end, verdict_end, *inner]:
        os.close(descriptor)
    deadline = time.monotonic() + job.seconds

    token = os.urandom(16)
    try:
        if job.mode == "run":
            write_message(job_end, read_message(0))
            write_message(job_end, token)
        else:
            prompt, program, test, entry_point = (read_message(0) for _ in range(4))
            for target, parts in (job_end, (program, entry_point)), (check_end, (prompt, test, entry_point, token)):
                for part in parts:
                    write_message(target, part)
    except BrokenPipeError:
        pass  # a child died while it was being locked in: there will be no verdict

    kept = {out: bytearray(), err: bytearray(), verdict: bytearray()}
    in_time = watch(kept, verdict, listener, deadline)
    for child in children:
        os.kill(child, 9)
    status = [os.waitpid(child, 0)[1] for child in children][-1]
    said = bytes(kept.pop(verdict))
    drain(kept)
    if said.startswith(token):
        said = said[len(token) :]
    elif not in_time:
        said = b"T"
    else:
        how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit status {os.WEXITSTATUS(status)}"
        said = b"F" + f"the program ended before its last line ({how})".encode()
    for part in said, kept[out], kept[err]:
        write_message(1, bytes(part))
    os.killpg(0, 9)  # itself included, and whatever could not be kept from forking


supervise(Job(*sys.argv[1:]))
'''

# %% [markdown]
# ### `run_in_sandbox`
# The notebook's side: start the supervisor, hand over the texts, read one report of bounded size. It cannot hang: the
# supervisor keeps the time, and if even that fails, its whole process group is killed a few seconds later.

# %%
SANDBOX_PROGRAM = SANDBOX_LOCK + SANDBOX_CHANNEL + SANDBOX_PROCESSES
SANDBOX_MAX_SOURCE_BYTES = 1 << 20
SANDBOX_GRACE_SECONDS = 5.0  # for starting and reporting, on a busy machine


def sandbox_report(mode, texts: list[bytes], timeout, memory_bytes: int, weak: bool, without: str) -> list[bytes]:
    """[verdict and message, stdout, stderr] as the supervisor reports them; [] when there is no report."""
    if not hasattr(os, "fork") or not sys.executable:
        raise UserError("Running generated code needs Linux or macOS and a Python that can be started again.")
    environment = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    if "LD_LIBRARY_PATH" in os.environ:  # some interpreters do not start without it
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    # Most solutions import typing, and importing it once for both processes saves a quarter of the time.
    shared = "typing" if any(b"typing" in text for text in texts) else ""
    with tempfile.TemporaryDirectory(prefix="nanochat-sandbox-", ignore_cleanup_errors=True) as folder:
        options = [mode, timeout, memory_bytes, "weak" if weak else "full", folder, without, os.getpid(), shared]
        with subprocess.Popen(
            [sys.executable, "-I", "-S", "-E", "-B", "-X", "utf8", "-c", SANDBOX_PROGRAM, *map(str, options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=environment,
            start_new_session=True,
        ) as process:
            try:
                job = b"".join(len(text).to_bytes(4, "big") + text for text in texts)
                data, _ = process.communicate(job, timeout=timeout + SANDBOX_GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                return []
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
    parts = []
    while len(data) >= 4:
        size = int.from_bytes(data[:4], "big")
        parts.append(data[4 : 4 + size])
        data = data[4 + size :]
    return parts if len(parts) == 3 else []


def run_in_sandbox(mode, program, others, timeout, maximum_memory_bytes, allow_weak, without="") -> ExecutionResult:
    """Run `program`, which may be anything. mode: "run", or "check" with others = (prompt, test, entry_point).

    without: mechanisms to leave out, for the tests. UserError for settings and for a machine that cannot confine.
    """
    if not (isinstance(timeout, int | float) and 0 < timeout < math.inf):
        raise UserError(f"timeout is {timeout!r}, but has to be a number of seconds above 0.")
    memory_bytes = 64 << 20 if maximum_memory_bytes is None else maximum_memory_bytes
    if not isinstance(memory_bytes, int) or memory_bytes < 64 << 20:
        raise UserError(f"maximum_memory_bytes is {maximum_memory_bytes!r}, but Python itself needs {64 << 20}.")
    try:
        source = program.encode("utf-8")
    except UnicodeEncodeError:
        return ExecutionResult(False, error="the program holds half of a surrogate pair, which is no text")
    if "\0" in program:
        return ExecutionResult(False, error="the program holds a NUL character")
    if len(source) > SANDBOX_MAX_SOURCE_BYTES:
        return ExecutionResult(False, error=f"the program has more than {SANDBOX_MAX_SOURCE_BYTES} bytes")
    texts = [text.encode("utf-8") for text in others]
    texts.insert(1 if others else 0, source)
    parts = sandbox_report(mode, texts, timeout, maximum_memory_bytes or 0, allow_weak, without)
    if not parts:
        return ExecutionResult(False, error="the sandbox did not report: it was killed, or the machine is overloaded")
    said, stdout, stderr = (part.decode("utf-8", "replace") for part in parts)
    verdict, message = said[:1], said[1:]
    if verdict == "R":
        raise UserError(
            "This machine cannot lock in generated code (no seccomp), so it could reach files and network. "
            "Run it in a virtual machine or container that holds nothing of value, and pass allow_weak=True."
        )
    error = {"P": None, "T": "Execution timed out", "M": f"Memory limit exceeded: {message}"}.get(verdict, message)
    return ExecutionResult(
        verdict == "P", stdout, stderr, error, timeout=verdict == "T", memory_exceeded=verdict == "M"
    )


# %% [markdown]
# ### `execute_code`
# For a program that stands alone. Its success means that the last line was reached: not `exit(0)`, not a clean exit
# status. The last step is reported from inside the program's own process, though, so a program that knows this chapter
# could report it early. To judge an answer use `check_solution`.


# %%
def execute_code(code: str, timeout=5.0, maximum_memory_bytes=256 << 20, allow_weak=False) -> ExecutionResult:
    """Run `code` as a program of its own, in an empty temporary folder. Never raises because of what `code` is.

    timeout: seconds. maximum_memory_bytes: None for no limit. allow_weak: run it even where network and files stay
    open, see `sandbox_level`; otherwise that is a UserError. Spec sections 18, 21.48 to 21.50.
    """
    return run_in_sandbox("run", code, (), timeout, maximum_memory_bytes, allow_weak)


# %% [markdown]
# ### `check_solution`
# The test calls the candidate as if it were an ordinary function. Helpers that the prompt defines run on the checker's
# side from the prompt's own text, so a program cannot replace them. Arguments travel by value: what a program does to
# the list it was given does not reach the test.


# %%
def check_solution(
    prompt: str,
    program: str,
    test: str,
    entry_point: str,
    timeout=5.0,
    maximum_memory_bytes=256 << 20,
    allow_weak=False,
) -> ExecutionResult:
    """Does `program` define an `entry_point` that passes `test`? success only if `check(entry_point)` returned.

    program: untrusted text. prompt, test: trusted; the test defines check(candidate). Arguments and results may be
    None, numbers, strings, bytes and the built-in containers; any other result is a failure, as is leaving the program.
    The limits hold for each of the two processes, the time for both together.
    """
    others = (prompt, test, entry_point)
    return run_in_sandbox("check", program, others, timeout, maximum_memory_bytes, allow_weak)


# %% [markdown]
# ### `sandbox_level`
# Trying is better than asking: a program attempts what it must not do, and what it managed is the answer.

# %%
SANDBOX_PROBE = """
import _socket, posix

def succeeds(attempt, *arguments):
    try:
        attempt(*arguments)
    except OSError:
        return False
    return True

secret, marker = {secret!r}, {marker!r}
if succeeds(open, secret): print("read files")
if succeeds(open, marker, "w"): print("write files")
if succeeds(_socket.socket): print("use the network")
if succeeds(lambda: posix.fork() or posix._exit(0)): print("start processes")
if succeeds(posix.kill, {parent}, 0): print("send signals")
"""


@functools.cache
def sandbox_level(without: str = "") -> tuple[str, str]:
    """("full" | "partial" | "none", a sentence to print). Tried once, then remembered.

    Below "full", code runs only with allow_weak=True. without: mechanisms to leave out, for the tests.
    """
    if not hasattr(os, "fork"):
        return "none", "sandbox: none (this system cannot run generated code at all)"
    with tempfile.TemporaryDirectory() as folder:
        secret, marker = Path(folder, "secret"), Path(folder, "marker")
        secret.write_text("secret")
        program = SANDBOX_PROBE.format(secret=str(secret), marker=str(marker), parent=os.getpid())
        result = run_in_sandbox("run", program, (), 20.0, 256 << 20, True, without)
    if not result.success:
        return "none", f"sandbox: none (its own test failed: {result.error})"
    reachable = result.stdout.split("\n")[:-1]
    if not reachable:
        return "full", "sandbox: full (no files but the Python library and an empty folder, no network, no processes)"
    level = "none" if {"read files", "use the network"} <= set(reachable) else "partial"
    return level, f"sandbox: {level} (generated code could {', '.join(reachable)})"
