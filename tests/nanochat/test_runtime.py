import ast
import errno
import http.server
import os
import stat
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from helpers import PYTHON, python_environment, run_ranks
from nanochat import runtime
from nanochat.runtime import (
    UserError,
    atomic_path,
    autodetect_device_type,
    choose_compute_dtype,
    compute_init,
    device_name_of,
    devices_in_use,
    download_file_with_lock,
    get_base_dir,
    get_dist_info,
    get_peak_flops,
    is_ddp_initialized,
    is_ddp_requested,
    lock_base_dir,
    print0,
    require_free_space,
    write_atomic,
)


@pytest.fixture(autouse=True)
def base_dir(monkeypatch, tmp_path):
    """A base directory of its own for each test, and one process."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NANOCHAT_DTYPE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "base"


def run_python(code, **variables):
    return subprocess.run(
        [PYTHON, "-c", code], env=python_environment(**variables), capture_output=True, text=True, timeout=120
    )


# ---- errors of the person running this


def test_a_script_shows_a_user_error_as_one_line():
    """Forty lines of traceback for a number that was mistyped; an exit status that says all went well."""
    code = "from nanochat.runtime import *\nshow_user_errors_plainly()\nraise UserError('depth is 0; take more.')"
    done = run_python(code)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "✗ depth is 0; take more.\n")


def test_a_script_shows_other_errors_with_their_traceback():
    """A bug that is shown without the place where it happened."""
    done = run_python("from nanochat.runtime import *\nshow_user_errors_plainly()\n1 / 0")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "ZeroDivisionError" in done.stderr and "✗" not in done.stderr


def test_a_notebook_shows_a_user_error_as_one_line():
    """The same in Jupyter, which asks the exception how it wants to be shown."""
    assert UserError("depth is 0; take more.")._render_traceback_() == ["✗ depth is 0; take more."]
    shell_module = pytest.importorskip("IPython.core.interactiveshell")
    shell = shell_module.InteractiveShell()
    shown = []
    shell._showtraceback = lambda kind, error, lines: shown.append(lines)
    shell.run_cell("from nanochat.runtime import UserError\nraise UserError('depth is 0; take more.')")
    assert shown == [["✗ depth is 0; take more."]]


# ---- ranks


def test_without_a_launcher_there_is_one_process(monkeypatch):
    """A notebook that waits for processes which no one started."""
    assert not is_ddp_requested() and not is_ddp_initialized()
    assert get_dist_info() == (False, 0, 0, 1)
    monkeypatch.setenv("RANK", "3")
    assert not is_ddp_requested() and get_dist_info() == (False, 0, 0, 1), "one variable alone is not a launcher"


def test_the_launcher_says_who_this_is(monkeypatch):
    """Rank and local rank swapped: right on one machine, wrong on two."""
    for name, value in dict(RANK="9", LOCAL_RANK="1", WORLD_SIZE="16").items():
        monkeypatch.setenv(name, value)
    assert is_ddp_requested() and get_dist_info() == (True, 9, 1, 16)


def test_only_the_first_process_prints(monkeypatch, capsys):
    """Everything eight times on the screen."""
    print0("one", end="!")
    monkeypatch.setenv("RANK", "1")
    print0("two")
    monkeypatch.setenv("RANK", "0")
    print0("three")
    print0()
    assert capsys.readouterr().out == "one!three\n\n"


# ---- the base directory


def test_the_base_directory_comes_from_the_environment_and_is_created(monkeypatch, tmp_path, base_dir):
    """Gigabytes in a home directory although another disk was named."""
    assert get_base_dir() == str(base_dir) and base_dir.is_dir()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert get_base_dir() == str(tmp_path / "home" / ".cache" / "nanochat")
    assert os.path.isdir(get_base_dir())


def test_a_base_directory_that_cannot_be_made_is_one_clear_sentence(monkeypatch, tmp_path):
    """A traceback from the first download for a path that was wrong from the start."""
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "base", tmp_path / "file"):
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder))
        with pytest.raises(UserError, match="base directory .*file.*NANOCHAT_BASE_DIR"):
            get_base_dir()


def test_a_base_directory_without_permission_is_one_clear_sentence(monkeypatch):
    """The same for a folder of somebody else. (Asked of the system, because a test may run as root.)"""
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    with pytest.raises(UserError, match="is not writable.*NANOCHAT_BASE_DIR"):
        get_base_dir()


HOLD_THE_LOCK = "from nanochat.runtime import lock_base_dir\nlock = lock_base_dir()\nprint('held', flush=True)\ninput()"


def test_a_second_run_in_the_same_base_directory_is_refused(monkeypatch, base_dir, tmp_path):
    """Two runs that write the same checkpoints; a killed run that blocks its folder for ever."""
    environment = python_environment(NANOCHAT_BASE_DIR=base_dir)
    first = subprocess.Popen([PYTHON, "-c", HOLD_THE_LOCK], env=environment, stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True)  # fmt: skip
    try:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another run is using .*base.*NANOCHAT_BASE_DIR"):
            lock_base_dir()
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "other"))
        lock_base_dir().release()
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base_dir))
        for name, value in dict(RANK="1", LOCAL_RANK="1", WORLD_SIZE="2").items():
            monkeypatch.setenv(name, value)
        assert not lock_base_dir().is_locked, "the other processes of the same run do not ask"
    finally:
        first.kill()
        first.wait()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name)
    lock = lock_base_dir()
    assert lock.is_locked
    assert lock_base_dir().is_locked, "running the cell again in the same process is no second run"
    lock.release(force=True)


def test_too_little_space_is_said_before_the_work(monkeypatch):
    """A disk that is full after the tenth hour."""
    monkeypatch.setattr(runtime.shutil, "disk_usage", lambda path: SimpleNamespace(free=2e9))
    require_free_space(1.9e9, "training d12")
    with pytest.raises(UserError, match=r"training d12 needs about 3\.0 GB .* and 2\.0 GB are free"):
        require_free_space(3e9, "training d12")


# ---- files


def test_a_file_appears_whole_under_its_name(tmp_path):
    """A reader that sees the first half; a file that only its owner may read."""
    path = tmp_path / "new folder" / "notes.txt"
    write_atomic(path, "grün\n")
    assert path.read_bytes() == "grün\n".encode()
    write_atomic(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    with atomic_path(path) as temporary:
        assert temporary.parent == path.parent and temporary != path
        temporary.write_text("next")
        assert path.read_bytes() == b"\x00\xff", "the old file until the end"
    assert path.read_text() == "next"
    assert os.listdir(path.parent) == ["notes.txt"]


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), OSError(errno.EIO, "bad disk")])
def test_an_error_in_the_middle_leaves_the_old_file_and_nothing_else(tmp_path, error):
    """Half a checkpoint under the name of a whole one, or temporary files that pile up."""
    path = tmp_path / "model.safetensors"
    path.write_text("old")
    with pytest.raises(type(error)) as caught, atomic_path(path) as temporary:
        temporary.write_text("half of the ne")
        raise error
    assert caught.value is error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["model.safetensors"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("where", ["write", "flush"])
def test_a_full_disk_is_one_clear_sentence(monkeypatch, tmp_path, where, number):
    """errno 28 (or that of a used-up quota) and a traceback; or a file that is cut off where the disk was full."""
    path = tmp_path / "model.safetensors"
    path.write_text("old")

    def full(*arguments):
        raise OSError(number, "No space left on device")

    if where == "write":
        monkeypatch.setattr(Path, "write_bytes", full)
    else:
        monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="no space left while writing .*model.safetensors.*run again"):
        write_atomic(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["model.safetensors"]


def test_what_is_written_has_reached_the_disk_before_it_is_renamed(monkeypatch, tmp_path):
    """A rename that survives a power cut while the contents do not."""
    calls = []
    monkeypatch.setattr(os, "fsync", lambda handle: calls.append("fsync"))
    real_replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), real_replace(*paths)))
    write_atomic(tmp_path / "file", "data")
    assert calls[:2] == ["fsync", "replace"]


# ---- download


@pytest.fixture
def server():
    """A web server on this machine: /file answers slowly, /short promises more than it sends, the rest is an error."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.requests.append(self.path)
            if self.path == "/file":
                self.server.arrived.wait(0.3)  # long enough for a second caller to come
                self.answer(200, b"contents" * 1000, 8000)
            elif self.path == "/short":
                self.answer(200, b"contents", 8000)
            else:
                self.answer(500, b"out of order", 12)

        def answer(self, status, body, length):
            self.send_response(status)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.requests, running.arrived = [], threading.Event()
        running.url = f"http://127.0.0.1:{running.server_port}"
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_a_file_is_downloaded_once(server, base_dir, capsys):
    """The same gigabytes again at each run; a file that is used before it was unpacked."""
    seen = []
    for _ in range(2):
        path = download_file_with_lock(
            server.url + "/file", "data.bin", lambda path: seen.append((path, os.path.getsize(path)))
        )
        assert path == str(base_dir / "data.bin")
    assert (base_dir / "data.bin").read_bytes() == b"contents" * 1000
    assert server.requests == ["/file"] and seen == [(path, 8000)]
    output = capsys.readouterr().out
    assert output.count("Downloading") == output.count("Downloaded to") == 1


DOWNLOAD = """
import sys
from nanochat.runtime import download_file_with_lock
print(len(open(download_file_with_lock(sys.stdin.read(), "data.bin"), "rb").read()))
"""


def test_two_processes_download_a_file_once(server, base_dir):
    """Two ranks that write one file at once, or one that reads what the other has not finished."""
    both = [
        subprocess.Popen(
            [PYTHON, "-c", DOWNLOAD], env=python_environment(NANOCHAT_BASE_DIR=base_dir), stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    outputs = []

    def feed(process):
        outputs.append(process.communicate(server.url + "/file", timeout=120)[0].split()[-1])

    feeders = [threading.Thread(target=feed, args=(process,)) for process in both]
    for feeder in feeders:
        feeder.start()
    for feeder in feeders:
        feeder.join()
    assert outputs == ["8000", "8000"] and [process.returncode for process in both] == [0, 0]
    assert server.requests == ["/file"]


def test_two_threads_download_a_file_once(server, base_dir):
    """The same within one process, where a lock per process would let both in."""
    sizes = []
    threads = [
        threading.Thread(
            target=lambda: sizes.append(os.path.getsize(download_file_with_lock(server.url + "/file", "data.bin")))
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sizes == [8000] * 3 and server.requests == ["/file"]


@pytest.mark.parametrize("page", ["/broken", "/short"])
def test_a_failing_server_leaves_nothing(server, base_dir, page):
    """An error page, or the first half of a file, that every later run takes for the data."""
    for _ in range(2):
        with pytest.raises(runtime.requests.RequestException):
            download_file_with_lock(server.url + page, "data.bin")
    assert server.requests == [page] * 2, "the next run tries again"
    assert set(os.listdir(base_dir)) <= {"data.bin.lock"}
    download_file_with_lock(server.url + "/file", "data.bin")
    assert (base_dir / "data.bin").stat().st_size == 8000


# ---- device and precision


@pytest.mark.parametrize(
    "capability, dtype", [((6, 1), torch.float32), ((7, 0), torch.float16), ((7, 5), torch.float16),
                          ((8, 0), torch.bfloat16), ((8, 9), torch.bfloat16), ((9, 0), torch.bfloat16),
                          ((12, 0), torch.bfloat16)],
)  # fmt: skip
def test_precision_follows_the_compute_capability(monkeypatch, capability, dtype):
    """A T4 that says it knows bf16 and emulates it, many times slower; a training without a scaler in fp16."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a, **k: True)  # what a T4 answers
    chosen, reason = choose_compute_dtype("cuda")
    assert chosen == dtype and f"{capability[0]}.{capability[1]}" in reason
    without_scaler, _ = choose_compute_dtype("cuda", allow_float16=False)
    assert without_scaler == (torch.float32 if dtype == torch.float16 else dtype)


@pytest.mark.parametrize("native, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_precision_on_a_cpu_follows_its_instructions(monkeypatch, native, dtype):
    """bf16 on a processor without it runs several times slower than fp32, and the other way round."""
    monkeypatch.setattr(runtime, "cpu_has_native_bf16", lambda: native)
    assert choose_compute_dtype("cpu")[0] == dtype
    assert choose_compute_dtype("mps")[0] == torch.float32


@pytest.mark.parametrize(
    "flags, native", [("fpu avx512_bf16 sse", True), ("fpu amx_bf16", True), ("asimd bf16", True), ("avx512f", False)]
)
def test_native_bf16_is_read_from_the_processor_flags(monkeypatch, flags, native):
    """A name that Intel, AMD and Arm write differently."""
    monkeypatch.setattr(Path, "read_text", lambda self: f"flags\t\t: {flags}\n")
    assert runtime.cpu_has_native_bf16() is native


def test_an_operating_system_without_processor_flags_has_no_native_bf16(monkeypatch):
    """A Mac, where the file does not exist."""

    def missing(self):
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", missing)
    assert runtime.cpu_has_native_bf16() is False
    assert device_name_of(torch.device("cpu")).startswith("CPU, ")


def test_the_environment_overrules_the_precision(monkeypatch):
    """A wish that is ignored, or a wrong word that becomes some default."""
    for name in ("bfloat16", "float16", "float32"):
        monkeypatch.setenv("NANOCHAT_DTYPE", name)
        dtype, reason = choose_compute_dtype("cpu")
        assert dtype == getattr(torch, name) and "NANOCHAT_DTYPE" in reason
    for name in ("bf16", "float64", "int8"):
        monkeypatch.setenv("NANOCHAT_DTYPE", name)
        with pytest.raises(UserError, match=f"NANOCHAT_DTYPE is '{name}'; it can be bfloat16"):
            choose_compute_dtype("cpu")
    monkeypatch.setenv("NANOCHAT_DTYPE", "float16")
    with pytest.raises(UserError, match="NANOCHAT_DTYPE is 'float16'; it can be bfloat16 or float32 here"):
        choose_compute_dtype("cpu", allow_float16=False)


@pytest.mark.parametrize("cuda, mps, expected", [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_the_best_device_is_found(monkeypatch, capsys, cuda, mps, expected):
    """A GPU that stands idle."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert autodetect_device_type() == expected
    assert capsys.readouterr().out == f"Autodetected device type: {expected}\n"


def test_a_device_that_is_not_here_is_one_clear_sentence(monkeypatch):
    """A device that is silently replaced by a slower one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="device_type is cuda but .* finds no such device"):
        compute_init("cuda")
    with pytest.raises(UserError, match="device_type is 'tpu'; it can be cuda, mps or cpu"):
        compute_init("tpu")


def test_a_single_process_on_the_cpu(capsys):
    """Weights that differ from run to run, because nothing was seeded."""
    draws = []
    for _ in range(2):
        assert compute_init("cpu") == (False, 0, 0, 1, torch.device("cpu"))
        draws.append(torch.rand(4).tolist())
    torch.manual_seed(42)
    assert draws == [torch.rand(4).tolist()] * 2
    assert "Distributed world size: 1" in capsys.readouterr().out


@pytest.fixture
def gpus(monkeypatch):
    """As rank 5 of 8, with two GPUs in each machine, in front of stand-ins that note what they are asked."""
    asked = []
    for name, value in dict(RANK="5", LOCAL_RANK="1", WORLD_SIZE="8").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.append(("set_device", device)))
    monkeypatch.setattr(runtime.dist, "init_process_group", lambda *args, **more: asked.append((*args, more)))
    monkeypatch.setattr(runtime.dist, "barrier", lambda: asked.append("barrier"))
    precision = torch.get_float32_matmul_precision()
    yield asked
    torch.set_float32_matmul_precision(precision)


def test_every_process_takes_its_own_gpu_before_it_talks(gpus):
    """All processes of a machine on its first GPU, where NCCL hangs or refuses, or the rank's number on the second."""
    device = torch.device("cuda", 1)
    assert compute_init("cuda") == (True, 5, 1, 8, device)
    assert gpus == [
        ("set_device", device), ("nccl", {"device_id": device, "timeout": runtime.NCCL_PATIENCE}), "barrier"
    ]  # fmt: skip


def test_more_processes_than_gpus_are_one_clear_sentence(gpus, monkeypatch):
    """CUDA's "invalid device ordinal", from a launcher that started too many or that shows each one GPU alone."""
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="rank 5 has LOCAL_RANK 2, and the number of GPUs that it sees is 2"):
        compute_init("cuda")
    assert gpus == []
    assert compute_init("cpu")[4] == torch.device("cpu"), "a CPU has room for all"


WAITING = """
import sys, time
import torch.distributed as dist
from nanochat.runtime import compute_cleanup, compute_init, wait_for_everyone
rank = compute_init("cpu")[1]
dist.get_backend = lambda: "nccl"
times = []
for turn in range(3):
    time.sleep(0.3 * ((rank + turn) % 3))
    arrived = time.monotonic()
    wait_for_everyone()
    times.append([arrived, time.monotonic()])
print(times)
compute_cleanup()
"""


def test_everyone_waits_for_the_last_also_without_the_network_of_the_gpus():
    """A rank that goes on before rank 0 has written its file, or that waits for a turn that is over."""
    ranks = [ast.literal_eval(out.splitlines()[-1]) for out in run_ranks(WAITING, world_size=3)]
    for turn in zip(*ranks, strict=True):
        assert max(arrived for arrived, _ in turn) <= min(left for _, left in turn)


SHARING = """
import os, sys
from nanochat.runtime import UserError, compute_cleanup, compute_init, require_shared_base_dir
rank = compute_init("cpu")[1]
for folders in (sys.argv[1:3], [sys.argv[1]] * 2):
    os.environ["NANOCHAT_BASE_DIR"] = folders[rank]
    try:
        require_shared_base_dir()
        print("shared")
    except UserError as error:
        print(error)
compute_cleanup()
"""


def test_machines_without_a_shared_disk_are_refused(tmp_path):
    """A second machine that finds no data after an hour, and checkpoints of which each machine has a part."""
    outputs = run_ranks(SHARING, tmp_path / "one", tmp_path / "two")
    for output in outputs:
        first, second = output.splitlines()[-2:]
        assert first.startswith("rank 1 does not see the files that rank 0 writes") and second == "shared"
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "nothing is left behind"


@pytest.mark.parametrize(
    "message, plain",
    [
        ("[gloo/pair.cc:537] Read error [127.0.0.1]:1720: Connection reset by peer. GLHF!", True),
        ("NCCL error: remote process exited or there was a network error", True),
        ("NCCL error: Duplicate GPU detected", False),
    ],
)
def test_a_lost_process_is_one_sentence(message, plain):
    """Pages of traceback from processes that did nothing wrong, or a real error that is hidden behind a sentence."""
    code = f"from nanochat.runtime import *\nshow_user_errors_plainly()\nraise RuntimeError({message!r})"
    for ranked in (True, False):
        place = dict(RANK=3, LOCAL_RANK=3, WORLD_SIZE=4) if ranked else {}
        done = run_python(code, **place)
        assert done.returncode == 1 and ("Traceback" in done.stderr) != (plain and ranked)
        assert ("✗ rank 3 lost another process and ends too" in done.stderr) == (plain and ranked)


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA A100-SXM4-40GB", 312), ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989), ("NVIDIA H200 NVL", 836),
        ("NVIDIA GH200 480GB", 989), ("NVIDIA GB200", 2500), ("NVIDIA B200", 2250), ("NVIDIA H800", 756),
        ("NVIDIA L4", 121), ("NVIDIA L40S", 362), ("NVIDIA A40", 149.7), ("NVIDIA A30", 165),
        ("NVIDIA GeForce RTX 4090", 165.2), ("NVIDIA GeForce RTX 3090", 71), ("NVIDIA GeForce RTX 5090", 209.5),
        ("AMD Instinct MI300X", 1307.4), ("AMD Instinct MI250X", 383),
        ("Tesla T4", 65), ("Tesla V100-SXM2-16GB", 125), ("CPU, 2 threads", float("inf")),
    ],
)  # fmt: skip
def test_peak_flops_of_real_device_names(name, tflops):
    """An MFU against the peak of another card: an L40S is no L4, a GB200 no B200 (spec 2)."""
    assert get_peak_flops(name) == pytest.approx(tflops * 1e12)


def test_peak_flops_of_a_card_that_has_to_be_asked(monkeypatch):
    """One row of the table depends on how many units are switched on."""
    properties = SimpleNamespace(max_compute_units=1024)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda *device: properties)
    assert get_peak_flops("Intel(R) Data Center GPU Max 1550") == 512 * 1024 * 1300 * 10**6


def test_idle_gpus_are_mentioned(monkeypatch):
    """Seven GPUs that are paid for and do nothing, while the table says "1 × H100" and all looks well."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    assert devices_in_use(torch.device("cuda"), 1) == "1 × NVIDIA H100; 8 are here, and torchrun would use them"
    assert devices_in_use(torch.device("cuda"), 8) == "8 × NVIDIA H100"
    assert "torchrun" not in devices_in_use(torch.device("cpu"), 1)
