import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_tree import cell_of, source_of

import nb_convert

TOOL = Path(nb_convert.__file__)


def printed_by(notebook, cell_id):
    outputs = cell_of(notebook, cell_id)["outputs"]
    return "".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream")


def run(tree, *arguments):
    """(exit status, what a person reads) of `run story`, and the notebook that it left."""
    out = tree.root / "results" / "out.ipynb"
    status, printed = tree.run("run", "story", *arguments, "-o", out)
    return status, printed, json.loads(out.read_text()) if out.exists() else None


def test_run_executes_the_built_notebook_in_this_python(tree, monkeypatch):
    """A kernel of another environment, or of another folder: packages missing, results written elsewhere."""
    kernel = tree.root / "jupyter/kernels/python3/kernel.json"
    kernel.parent.mkdir(parents=True)
    kernel.write_text(json.dumps({"argv": ["/bin/false"], "display_name": "wrong", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tree.root / "jupyter"))
    (tree.root / "here").mkdir()
    monkeypatch.chdir(tree.root / "here")
    tree.replace("nb_src/story.py", "say(total)", "import os\nimport sys\n\nsay((total, sys.executable, os.getcwd()))")
    status, printed, notebook = run(tree, "-p", "times", "4", "-p", "factor", "2")
    assert status == 0, printed
    assert printed_by(notebook, "story-imports") == f"{(8.0, sys.executable, str(tree.root / 'here'))}\n"
    assert "▶ Count" in printed and f"wrote {tree.root}/results/out.ipynb" in printed
    assert os.environ["JUPYTER_PATH"] == str(tree.root / "jupyter")
    assert not (tree.root / "notebooks").exists()


def test_parameters_keep_their_types(tree):
    """`-p loud false` arriving as the true string "false", or a number as a name."""
    tree.replace("nb_src/story.py", "say(total)", "say(repr([times, factor, name, loud]))")
    tree.write("some.yaml", "times: 3\nfactor: 1e-3\nname: from the file\n")
    status, printed, notebook = run(tree, "-f", tree.root / "some.yaml", "-p", "name", "7", "-p", "loud", "true")
    assert status == 0, printed
    assert printed_by(notebook, "story-say") == "[3, 0.001, '7', True]\n"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tims", "3", "unknown parameter `tims`; the nearest is `times`"),
        ("times", "three", "parameter `times` is of type int (like 2) and cannot be 'three' (str)"),
        ("times", "1.5", "parameter `times` is of type int (like 2) and cannot be '1.5' (str)"),
        ("times", True, "parameter `times` is of type int (like 2) and cannot be True (bool)"),
        ("loud", "1", "parameter `loud` is of type bool (like False) and cannot be '1' (str)"),
        ("loud", 1, "parameter `loud` is of type bool (like False) and cannot be 1 (int)"),
        ("factor", "half", "parameter `factor` is of type float (like 1.0) and cannot be 'half' (str)"),
        ("name", 3, "parameter `name` is of type str (like '') and cannot be 3 (int)"),
        ("times", None, "parameter `times` is of type int (like 2) and cannot be None (NoneType)"),
    ],
)
def test_wrong_parameters_are_refused_before_anything_starts(tree, key, value, message):
    """Hours of training with the default depth because `-p dept 4` set nothing."""
    if isinstance(value, str):
        given = ["-p", key, value]
    else:
        given = ["-f", tree.write("wrong.yaml", json.dumps({key: value}))]
    assert message in tree.refused("run", "story", *given, "-o", tree.root / "out.ipynb")


def test_files_that_cannot_be_used_are_refused(tree):
    """A traceback for a YAML file that is a list, for text that is no notebook; a notebook overwritten by its run."""
    out = tree.root / "out.ipynb"
    listed = tree.write("list.yaml", "- 1\n")
    assert "list.yaml: write one `name: value` on each line" in tree.refused("run", "story", "-f", listed, "-o", out)
    broken = tree.write("broken.yaml", "a: [")
    assert "the parameters cannot be read" in tree.refused("run", "story", "-f", broken, "-o", out)
    text = tree.write("text.ipynb", "hello")
    assert "text.ipynb: not a notebook" in tree.refused("run", text, "-o", out)
    assert "is the notebook to run: choose another name" in tree.refused("run", text, "-o", text)
    assert "No such file" in tree.refused("run", tree.root / "missing.ipynb", "-o", out)
    assert "there is no nb_src/stori.py; the nearest is `story`" in tree.refused("run", "stori", "-o", out)


def test_a_path_runs_without_sources(tree, tmp_path_factory):
    """The one file, copied alone into an empty folder, that needs the repository after all."""
    tree.build()
    alone = tmp_path_factory.mktemp("alone") / "it.ipynb"
    alone.write_bytes((tree.root / "notebooks/story.ipynb").read_bytes())
    out = alone.with_name("out {1}.ipynb")
    assert nb_convert.main(["--root", str(alone.parent), "run", str(alone), "-o", str(out)]) == 0
    assert printed_by(json.loads(out.read_text()), "story-say") == "2.0\n"


def test_a_failing_cell_is_shown_with_its_heading(tree):
    """A stack of papermill's own frames, with the reader's mistake somewhere in it and exit status 0."""
    tree.replace("nb_src/story.py", "say(total)", "say(total / 0)")
    status, printed, notebook = run(tree)
    assert status == 1
    assert "ZeroDivisionError: float division by zero" in printed and "say(total / 0)" in printed
    assert "failed at: ▶ Count > cell story-say\n" in printed
    assert f"The notebook up to there: {tree.root}/results/out.ipynb" in printed
    assert "papermill" not in printed and "\x1b[" not in printed.split("Traceback")[-1]
    assert "ZeroDivisionError" in json.dumps(notebook)


def test_a_users_error_is_one_sentence(tree):
    """Forty lines of traceback around `times is negative`."""
    status, printed, _ = run(tree, "-p", "times", "-1")
    assert status == 1
    assert "\ntimes is negative: make it positive\nfailed at: ▶ Count > cell story-total\n" in printed
    assert "Traceback" not in printed


def test_a_dead_kernel_is_reported(tree):
    """A run that waits for ever, or ends with a traceback of asyncio, when the machine kills the kernel."""
    tree.replace("nb_src/story.py", "say(total)", "import os\n\nos._exit(9)")
    status, printed, _ = run(tree)
    assert status == 1 and "The kernel died." in printed and "failed at: ▶ Count > cell story-imports" in printed


LOOP = """
import signal
import time

stopped = []
try:
    say("started")
    for _ in range(600):
        time.sleep(0.1)
except KeyboardInterrupt:
    say("saved")
"""


def interrupted(tree, body, numbers):
    """Run a notebook that waits; send it signals as soon as its loop has started, one after another."""
    tree.replace("nb_src/story.py", "say(total)", body + "\n# %%\nsay('next cell')")
    out = tree.root / "out.ipynb"
    command = [sys.executable, TOOL, "--root", tree.root, "run", "story", "-o", out]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 60
        while not (tree.root / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.5)
        printed, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    return process.returncode, printed, json.loads(out.read_text())


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_lets_the_kernel_save(tree, number, status):
    """Ctrl-C, or a scheduler's SIGTERM, that kills a training between two checkpoints and leaves no notebook."""
    body = LOOP.replace('say("started")', f'open({str(tree.root / "started")!r}, "w")')
    returned, printed, notebook = interrupted(tree, body, [number])
    assert returned == status, printed
    assert "stopped at: ▶ Count > cell story-imports\nThe notebook up to there: " in printed
    assert printed_by(notebook, "story-imports") == "saved\n"
    assert notebook["cells"][-1]["outputs"] == [] and source_of(notebook["cells"][-1]) == "say('next cell')"


def test_a_second_signal_ends_a_kernel_that_does_not_listen(tree):
    """A loop that swallows the interrupt and cannot be stopped but by kill -9."""
    body = LOOP.replace('say("started")', f'open({str(tree.root / "started")!r}, "w")')
    body = body.replace("    for _ in", "    signal.signal(signal.SIGINT, signal.SIG_IGN)\n    for _ in")
    returned, printed, notebook = interrupted(tree, body, [signal.SIGINT, signal.SIGINT])
    assert returned == 130, printed
    assert notebook["cells"][-1]["outputs"] == []
