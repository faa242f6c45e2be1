"""What the process that evaluates gets to see, what it gives back, and that nothing waits for a dead one."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from golf.fresh_process import clean_environment, run_in_fresh_process
from helpers import python_environment, run_ranks
from nanochat.runtime import UserError

LOOK = b"""
import json, os, sys
files = sorted(os.path.join(d, f) for d, _, names in os.walk(".") for f in names)
text = open("val/a.bin").read()
print("looking")
json.dump({"files": files, "env": dict(os.environ), "text": text, "arguments": sys.argv[1:], "cwd": os.getcwd(),
           "links": sum(map(os.path.islink, files)), "path": sys.path}, open("result.json", "w"))
"""


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A model, and two shards of which one is a symbolic link; temporary folders go to tmp_path."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    for name in ("temporary", "home"):
        (tmp_path / name).mkdir()
    (tmp_path / "home" / "model").write_bytes(b"weights")
    (tmp_path / "home" / "b.bin").write_text("second")
    (tmp_path / "home" / "blob").write_text("first")
    (tmp_path / "home" / "a.bin").symlink_to(tmp_path / "home" / "blob")
    home = tmp_path / "home"
    return {"artifact.golf": home / "model", "val": [home / "a.bin", str(home / "b.bin")]}


def test_the_process_sees_what_it_is_given_and_nothing_else(files, tmp_path, monkeypatch, capsys):
    """A score that needs a variable, a module path or a file that only the machine of its author has."""
    for name in ("VOCAB_SIZE", "PYTHONPATH", "TORCHELASTIC_USE_AGENT_STORE", "HF_TOKEN"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "ours"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")  # or the new process would compute in another precision
    seen = run_in_fresh_process(LOOK, ["--evaluate=artifact.golf"], files, "result.json", 60)
    assert seen["files"] == ["./artifact.golf", "./train_gpt.py", "./val/a.bin", "./val/b.bin"]
    assert seen["text"] == "first" and seen["links"] == 0
    assert seen["arguments"] == ["--evaluate=artifact.golf"]
    secret = {"VOCAB_SIZE", "PYTHONPATH", "TORCHELASTIC_USE_AGENT_STORE", "HF_TOKEN", "RANK"}
    assert not secret & set(seen["env"])
    assert (
        seen["env"]["OMP_NUM_THREADS"] == "1"
        and seen["env"]["NANOCHAT_DTYPE"] == "float32"
        and seen["env"]["PATH"] == os.environ["PATH"]
    )
    assert seen["env"]["NANOCHAT_BASE_DIR"].startswith(seen["cwd"])
    assert str(tmp_path) not in "".join(path for path in seen["path"] if not path.startswith(seen["cwd"]))
    assert "│ looking\n" in capsys.readouterr().out
    assert list((tmp_path / "temporary").iterdir()) == []


def test_lines_are_shown_while_the_process_runs(files, tmp_path, monkeypatch):
    """A notebook that shows nothing for the ten minutes of an evaluation."""
    proceed = tmp_path / "proceed"
    seen = []

    def show(text, **_):
        seen.append(text)
        proceed.touch()

    monkeypatch.setattr("golf.fresh_process.print0", show)
    script = f"""
import os, time
print("waiting for a reader")
while not os.path.exists({str(proceed)!r}):
    time.sleep(0.01)
print("no newline at the end", end="")
open("r.json", "w").write("{{}}")
"""
    assert run_in_fresh_process(script.encode(), [], files, "r.json", 30) == {}
    assert seen == ["│ waiting for a reader", "│ no newline at the end"]


@pytest.mark.parametrize(
    "script, words",
    [
        ("print('so far')\nraise ValueError('broken model')", ["exit status 1", "so far", "ValueError: broken model"]),
        ("import time\nprint('begun')\ntime.sleep(60)", ["stopped after 2 seconds", "begun"]),
        ("print('done')", ["left no JSON in result.json"]),
        ("open('result.json', 'w').write('{')", ["left no JSON in result.json"]),
    ],
    ids=["raises", "takes too long", "no result", "no JSON"],
)
def test_a_process_that_fails_says_why(files, tmp_path, script, words):
    """A notebook that waits forever, or shows "exit status 1" and nothing more."""
    with pytest.raises(UserError) as caught:
        run_in_fresh_process(script.encode(), [], files, "result.json", 2 if "sleep" in script else 60)
    assert [word for word in words if word not in str(caught.value)] == []
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_missing_file_is_named_before_anything_starts(files, tmp_path):
    """Ten minutes of evaluation that end at a wrong path."""
    with pytest.raises(UserError, match="nowhere.model is not there"):
        run_in_fresh_process(LOOK, [], files | {"tokenizer.model": tmp_path / "nowhere.model"}, "result.json", 60)
    assert list((tmp_path / "temporary").iterdir()) == []


def alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True


def test_an_interrupt_ends_the_process(tmp_path):
    """The stop button, after which an evaluation nobody sees keeps the GPU."""
    program = f"""
import signal, tempfile
from golf.fresh_process import run_in_fresh_process
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
tempfile.tempdir = {str(tmp_path)!r}
run_in_fresh_process(b"import os, time\\nprint(os.getpid())\\ntime.sleep(60)", [], {{}}, "result.json", 60)
"""
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=python_environment(),
    )  # fmt: skip
    child = int(process.stdout.readline().removeprefix("│ "))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert "KeyboardInterrupt" in errors
    assert not alive(child)
    assert list(tmp_path.iterdir()) == []


# ---- several ranks

CHILD = """
import json, os
import torch, torch.distributed as dist
dist.init_process_group("gloo")
rank = dist.get_rank()
total = torch.tensor([rank + 1.0])
dist.all_reduce(total)
print("sum", total.item())
if rank == 0:
    json.dump({"total": total.item(), "world": dist.get_world_size(), "cwd": os.getcwd()}, open("result.json", "w"))
dist.destroy_process_group()
"""
FAILING_CHILD = """
import os, time
if os.environ["RANK"] == "1":
    raise ValueError("broken on rank 1")
time.sleep(100)  # in place of a collective that nobody else enters
"""
PARENT = f"""
import json, os, sys, tempfile
import torch.distributed as dist
from golf.fresh_process import run_in_fresh_process
from nanochat.runtime import UserError
dist.init_process_group("gloo")
os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # with it, a child would join its parents' store
tempfile.tempdir = sys.argv[1]
print(json.dumps(run_in_fresh_process({CHILD!r}.encode(), [], {{}}, "result.json", 100)))
try:
    run_in_fresh_process({FAILING_CHILD!r}.encode(), [], {{}}, "result.json", 100)
except UserError as error:
    print(json.dumps(str(error)))
dist.barrier()  # the group of the parents is still of use
dist.destroy_process_group()
"""


def test_ranks_share_the_result_and_the_failure(tmp_path):
    """Ranks that evaluate each by itself, or that wait hours in a collective for one that is gone."""
    first, second = (text.splitlines() for text in run_ranks(PARENT, tmp_path))
    assert first[0] == "│ sum 3.0" and first[1:] == second and len(second) == 2
    result, error = map(json.loads, second)
    assert result["total"] == 3.0 and result["world"] == 2 and not Path(result["cwd"]).exists()
    assert "process of rank 1 failed with exit status 1" in error and "broken on rank 1" in error
    assert list(tmp_path.iterdir()) == []


def test_ranks_on_several_machines_are_refused(files, monkeypatch):
    """A hang: the ranks of another machine would wait for files that they cannot see."""
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match="one machine"):
        run_in_fresh_process(LOOK, [], files, "result.json", 60)


def test_the_new_group_meets_elsewhere(monkeypatch):
    """A child that joins the group of its parents, which breaks both."""
    place = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (place | {"MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "x"}).items():
        monkeypatch.setenv(name, value)
    environment = clean_environment("base", 31234)
    assert environment["MASTER_PORT"] == "31234" and "TORCHELASTIC_RUN_ID" not in environment
    assert {name: environment[name] for name in place} == place
