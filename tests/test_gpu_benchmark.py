"""The script that measures a GPU must bring something home from a machine that nobody has seen before."""

import importlib.util
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu():
    specification = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_a_row_that_fails_is_a_sentence_and_a_traceback(gpu, tmp_path):
    """A kernel that does not run there and takes the other rows along, or leaves no trace of the reason."""
    case = gpu.case_of("d12, varlen", "generate", attention="varlen", depth=2, batch=4) | {"tiny": True, "data": ""}
    result = gpu.run_case(case, 120, tmp_path / "gpu.log")
    reason = r"attention varlen cannot be used here: it computes in bf16 and fp16 on CUDA, not in \w+ on cpu\. Set .*"
    assert list(result) == ["error"] and re.fullmatch(reason, result["error"])
    log = (tmp_path / "gpu.log").read_text()
    assert log.startswith("===== d12, varlen: attention varlen cannot") and "Traceback" in log


def test_a_row_that_hangs_is_stopped_with_all_that_it_started(gpu, tmp_path):
    """One kernel that never returns, and nine minutes are gone; or its workers keep the GPU for themselves."""
    case, started = gpu.case_of("d12 generation", "generate") | {"tiny": True, "data": ""}, time.monotonic()
    assert gpu.run_case(case, 0.3, tmp_path / "log") == {"error": "stopped after 0 s"}
    assert time.monotonic() - started < 20
    alive = tmp_path / "alive"
    worker = f"import time\nwhile True: open({str(alive)!r}, 'w').close(); time.sleep(0.05)"
    parent = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {worker!r}]).wait()"
    with open(tmp_path / "said", "w+") as said:
        assert gpu.run_within([sys.executable, "-c", parent], 3, said) == (None, [])
    alive.unlink()
    time.sleep(0.5)
    assert not alive.exists()


@pytest.mark.parametrize("end, answer", [
    ("print('ANSWER {\"step ms\": 1.5}'); print('bye', flush=True); os.abort()", {"step ms": 1.5}),
    ("print('CUDA error: an illegal memory access', flush=True); os.abort()",
     {"error": "exit status -6: CUDA error: an illegal memory access"}),
    ("pass", {"error": "exit status 0: no word"}),
])  # fmt: skip
def test_a_process_that_crashes_costs_no_more_than_it_must(gpu, monkeypatch, tmp_path, end, answer):
    """A number that was measured and is lost because the driver crashes at exit; a crash that ends the whole script."""
    script = tmp_path / "row.py"
    script.write_text(f"import os\n{end}\n")
    monkeypatch.setattr(gpu, "__file__", str(script))
    assert gpu.run_case(gpu.case_of("row"), 30, tmp_path / "log") == answer


def test_the_table_shows_numbers_reasons_and_what_was_left_out(gpu):
    """A row that breaks the table, or an MFU of 0 % where the peak is unknown."""
    good = {"kernel": "fa3", "first step s": 50.0, "step ms": 1000.0, "tokens/s": 524288.0, "MFU": 0.45,
            "peak GiB": 9.5, "device batch": 16, "profile": [("all", 0.9, 900.0)]}  # fmt: skip
    plain = good | {"tokens/s": 262144.0, "MFU": None}
    del plain["profile"]
    results = [
        (gpu.case_of("d12"), good), (gpu.case_of("plain", plain=True), plain),
        (gpu.case_of("d12, fa4"), {"error": "a | b"}), (gpu.case_of("d12 CORE", "core"), {"error": "crashed"}),
    ]  # fmt: skip
    lines = gpu.table_of(results, "A GPU", ["d26"]).splitlines()
    rows = [line for line in lines if line.startswith("| ") and "---" not in line][:4]
    assert {row.count("|") for row in rows} == {10}
    assert rows[1] == "| d12 | 16 | 1,000 | 524,288 | 2.00 | 45.0% | 9.50 | 50.00 | fa3 |"
    assert rows[2].split("|")[6].strip() == "–" and "a / b" in rows[3]
    assert "| `all` | 90.0% | 900.0 |" in lines and "d12 CORE: error crashed." in lines
    assert lines[-1] == "Left out, because the time was spent: d26."


def test_no_kernel_is_measured_twice_and_one_failure_costs_one_row(gpu, monkeypatch, tmp_path, capsys):
    """Minutes spent on the kernel that auto has chosen already; a table that is lost with the last row."""
    order = ("fa3", "varlen", "sdpa")
    monkeypatch.setattr(gpu, "attention_order", lambda machine: order)
    monkeypatch.setattr(gpu, "hub_answers", lambda: True)
    monkeypatch.setattr(gpu, "run_tests", lambda seconds: (True, "\nTests: 3 passed.\n"))
    ran = []

    def run_case(case, timeout, log):
        ran.append(case["name"])
        assert timeout <= 0.4 * 60 * 9
        if case["kind"] != "train" or case["attention"] == "sdpa":
            return {"error": "crashed"}
        return {"kernel": "k", "first step s": 1.0, "step ms": 1.0, "tokens/s": 1.0, "MFU": None, "peak GiB": None,
                "device batch": 16, "candidate": "fa3"}  # fmt: skip

    monkeypatch.setattr(gpu, "run_case", run_case)
    for name in ("NANOCHAT_BASE_DIR", "TORCHINDUCTOR_CACHE_DIR", "KERNELS_CACHE", "PYTORCH_ALLOC_CONF"):
        monkeypatch.setenv(name, str(tmp_path / name))
    output = tmp_path / "out" / "gpu.md"
    given = SimpleNamespace(minutes=9.0, tiny=True, data="", output=str(output), only="", tests=True)
    assert gpu.measure_all(given)
    assert ran[0] == "attention" and "d12, varlen" in ran and "d12, sdpa" in ran and "d12, fa3" not in ran
    text = output.read_text()
    assert "| d12, sdpa | crashed |" in text and text.endswith("\nTests: 3 passed.\n")
    given.minutes = 0.1
    assert not gpu.measure_all(given), "no time, no number"
    assert "Left out, because the time was spent: attention, d12, kernels not compiled yet, " in output.read_text()


def test_kernels_are_counted_once(gpu, monkeypatch):
    """Shares of a step in which compiled regions stand beside the kernels that they are made of."""
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [
        SimpleNamespace(key="matmul", device_type=cuda, is_user_annotation=False, self_device_time_total=30_000),
        SimpleNamespace(key="norm|`<4>", device_type=cuda, self_device_time_total=10_000),
        SimpleNamespace(key="Torch-Compiled Region", device_type=cuda, is_user_annotation=True,
                        self_device_time_total=40_000),
        SimpleNamespace(key="aten::mm", device_type=cpu, is_user_annotation=False, self_device_time_total=30_000),
    ]  # fmt: skip

    class Profile:
        def __init__(self, activities):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def key_averages(self):
            return events

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(gpu.time, "perf_counter", iter([0.0, 0.1]).__next__)
    everything, *kernels = gpu.profile_of(lambda: None, torch.device("cuda"))
    assert everything[1:] == (pytest.approx(0.4), 40.0)
    assert kernels == [("matmul", pytest.approx(0.3), 30.0), ("norm/'<4>", pytest.approx(0.1), 10.0)]


def test_a_failed_test_is_told_and_the_rows_are_kept(gpu, monkeypatch, tmp_path):
    """`make gpu` that stops at the first test which fails on a new GPU, before anything is measured."""
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\naddopts = -q\n")
    (tmp_path / "test_it.py").write_text(
        "import pytest\n@pytest.mark.gpu\ndef test_one(): assert 1 == 2\n"
        "@pytest.mark.gpu\ndef test_two(): pytest.skip('no FlashAttention')\ndef test_three(): raise SystemExit\n"
    )
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    passed, text = gpu.run_tests(60)
    assert not passed and text.startswith("\nTests that need a GPU: 1 failed, 1 skipped, 1 deselected")
    assert "no FlashAttention" in text and "assert 1 == 2" in text
    passed, text = gpu.run_tests(0.1)
    assert not passed and text.startswith("\nTests that need a GPU: stopped after 0 s.")


def test_synthetic_tokens_need_no_packages_but_torch_and_numpy():
    """A closed machine with a GPU and PyTorch, on which the script ends at an import of what it does not use."""
    blocked = ["kernels", "fastapi", "matplotlib", "psutil", "huggingface_hub", "pyarrow", "requests", "rustbpe",
               "safetensors", "tiktoken", "tokenizers", "tqdm", "yaml"]  # fmt: skip
    source = f"""
import importlib.machinery, importlib.util, sys
find = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = classmethod(
    lambda cls, name, *more: None if name.partition(".")[0] in {blocked} else find(name, *more)
)
sys.argv = ["gpu.py", "--tiny", "--data", "texts"]
sys.path.insert(0, {str(SCRIPT.parent)!r})
import gpu
assert gpu.plan_of(gpu.case_of("row", depth=2, batch=4) | dict(tiny=True)).total_batch_size == 8192
assert gpu.plan_of(gpu.case_of("row", depth=26) | dict(tiny=False)).total_batch_size == 524288
assert importlib.util.find_spec("requests") is None and "requests" not in sys.modules
gpu.main()
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip() == (
        "--data needs packages that are not installed: huggingface_hub, pyarrow, requests, rustbpe, safetensors, "
        "tiktoken, tokenizers, tqdm, yaml."
    ), done.stderr
