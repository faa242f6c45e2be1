"""Execute a notebook with papermill, for a person who waits: parameters are checked before anything starts, a bar shows
the stage and what was printed last, a failing cell is shown with its heading, and the first Ctrl-C (or SIGTERM) becomes
an interrupt of the kernel, so that a training loop can save.
"""

import ast
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
import papermill
import yaml
from nbclient.exceptions import CellExecutionError, DeadKernelError
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import Engine, papermill_engines
from papermill.exceptions import PapermillExecutionError
from tqdm import tqdm

from nb_rules import literal_of
from nb_source import Refused, nearest

ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
SAVE_SECONDS = 5
BAR = "{desc} |{bar:20}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"


class Watch:
    """What is known of a run from outside: where it is, and whether somebody asked it to stop."""

    def __init__(self):
        self.stage, self.heading, self.cell_id, self.source = "", "", "", None
        self.client, self.signal = None, 0

    def stop(self, number: int, frame) -> None:
        """Signal handler. First: interrupt the cell that runs, start no other. Second: kill the kernel."""
        kernel = getattr(getattr(self.client, "km", None), "provisioner", None)
        if kernel is None or kernel.pid is None:
            raise KeyboardInterrupt
        os.kill(kernel.pid, signal.SIGKILL if self.signal else signal.SIGINT)
        self.signal = self.signal or number

    @contextmanager
    def signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self.stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def enter(self, cell: nbformat.NotebookNode) -> bool:
        """Note the headings of a cell; True when a new stage begins."""
        self.cell_id, before = cell.get("id", ""), self.source
        self.source = cell.metadata.get("unrolled", {}).get("source")
        if self.source != before:
            self.heading = ""  # a chapter's last heading is not the heading of what follows the chapter
        headings = re.findall(r"^(#+) +(.+)$", cell.source, re.M) if cell.cell_type == "markdown" else []
        for level, title in headings:
            self.stage, self.heading = (title, "") if level == "#" else (self.stage, title)
        return any(level == "#" for level, _ in headings)

    def place(self) -> str:
        return " > ".join(filter(None, [self.stage, self.heading, f"cell {self.cell_id}"]))


class WatchedClient(PapermillNotebookClient):
    """papermill's client with our bar, and an end before the next cell when somebody asked for it."""

    def papermill_execute_cells(self) -> None:
        patience = 0.5 if sys.stderr.isatty() else 30  # seconds between redraws: a log file needs few
        bar = tqdm(total=len(self.nb.cells), bar_format=BAR, dynamic_ncols=True, mininterval=patience, miniters=0)
        with bar as self.bar:
            for index, cell in enumerate(self.nb.cells):
                if self.watch.signal:
                    break
                if self.watch.enter(cell):
                    bar.set_description_str(self.watch.stage)
                try:
                    self.nb_man.cell_start(cell, index)
                    self.execute_cell(cell, index)
                except CellExecutionError as error:
                    self.nb_man.cell_exception(cell, cell_index=index, exception=error)
                    break
                finally:
                    self.nb_man.cell_complete(cell, cell_index=index)
                bar.update(1)

    def process_message(self, msg, cell, cell_index):
        if msg["msg_type"] == "stream":
            printed = [line for line in re.split(r"[\r\n]+", ANSI.sub("", msg["content"]["text"])) if line.strip()]
            if printed:
                self.bar.set_postfix_str(printed[-1].strip()[:60], refresh=False)
            self.bar.update(0)
        return super().process_message(msg, cell, cell_index)


@contextmanager
def seldom_saved(nb_man) -> Iterator[None]:
    """Save the notebook every few seconds instead of before and after each of its hundreds of definitions."""
    save, last = nb_man.save, time.monotonic()

    def save_when_due(**_):
        nonlocal last
        if time.monotonic() - last > SAVE_SECONDS:
            save()
            last = time.monotonic()

    nb_man.save = save_when_due
    try:
        yield
    finally:
        del nb_man.save  # the last save is papermill's own


class WatchedEngine(Engine):
    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, watch=None, start_timeout=60, **_):
        client = WatchedClient(nb_man, kernel_name=kernel_name, startup_timeout=start_timeout, timeout=None)
        client.watch, watch.client = watch, client
        with seldom_saved(nb_man):
            client.execute()


papermill_engines.register("watched", WatchedEngine)


@contextmanager
def this_python() -> Iterator[None]:
    """Make the kernel `python3` the interpreter that runs us, whatever kernels are installed."""
    before = os.environ.get("JUPYTER_PATH")
    with tempfile.TemporaryDirectory() as folder:
        spec = Path(folder) / "kernels" / "python3" / "kernel.json"
        spec.parent.mkdir(parents=True)
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=ERROR"]
        spec.write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"}))
        os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, [folder, before]))
        try:
            yield
        finally:
            if before is None:
                del os.environ["JUPYTER_PATH"]
            else:
                os.environ["JUPYTER_PATH"] = before


def parameter_values(notebook: nbformat.NotebookNode, given: list[tuple[str, str]], file: Path | None) -> dict:
    """Values for papermill out of a YAML file and -p pairs, each of the type that the notebook's own literal has."""
    cell = next((cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])), None)
    try:
        defaults = dict(filter(None, map(literal_of, ast.parse(cell.source).body))) if cell else {}
        wanted = yaml.safe_load(file.read_text("utf-8")) or {} if file else {}
    except (SyntaxError, yaml.YAMLError) as error:
        raise Refused(f"the parameters cannot be read: {error}") from None
    if not isinstance(wanted, dict):
        raise Refused(f"{file}: write one `name: value` on each line")
    values, faults = {}, []
    for name, value in [*wanted.items(), *given]:
        try:
            if name not in defaults:
                raise Refused(f"unknown parameter `{name}`{nearest(str(name), defaults)}")
            values[name] = typed(name, value, defaults[name])
        except Refused as refused:
            faults += refused.args
    if faults:
        raise Refused(*faults)
    return values


def typed(name: str, value, default):
    """`value`, which a command line gives as text, as the type of `default`."""
    kind = type(default)
    if isinstance(value, str) and kind is not str:
        try:
            if kind is bool:
                value = {"true": True, "false": False}[value.lower()]
            elif kind in (int, float):
                value = kind(value)
            else:
                value = yaml.safe_load(value)
        except (ValueError, KeyError, yaml.YAMLError):
            pass  # the text stays, and is refused below
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        found = f"{value!r} ({type(value).__name__})"
        raise Refused(f"parameter `{name}` is of type {kind.__name__} (like {default!r}) and cannot be {found}")
    return value


def run(path: Path, given: list[tuple[str, str]], file: Path | None, output: Path) -> int:
    """Execute the notebook at `path` into `output`, which is saved after every cell. Returns the exit status."""
    if path.resolve() == output.resolve():
        raise Refused(f"{output}: is the notebook to run: choose another name for the result")
    try:
        values = parameter_values(nbformat.read(path, as_version=4), given, file)
    except nbformat.reader.NotJSONError:
        raise Refused(f"{path}: not a notebook") from None
    output.parent.mkdir(parents=True, exist_ok=True)
    literal = str(output).replace("{", "{{").replace("}", "}}")  # papermill would format it
    watch, problem = Watch(), ""
    try:
        with this_python(), watch.signals():
            papermill.execute_notebook(
                str(path), literal, values, "watched", kernel_name="python3", progress_bar=False, watch=watch
            )
    except PapermillExecutionError as error:
        problem = error.evalue if error.ename == "UserError" else "\n".join(error.traceback)  # the former is a sentence
    except DeadKernelError:
        problem = "The kernel died. Often the machine had no memory left."
    except KeyboardInterrupt:
        watch.signal = watch.signal or signal.SIGINT
    if watch.signal:
        print(f"stopped at: {watch.place()}\nThe notebook up to there: {output}", file=sys.stderr)
        return 128 + watch.signal
    if problem:
        problem = problem if sys.stderr.isatty() else ANSI.sub("", problem)
        print(f"{problem}\nfailed at: {watch.place()}\nThe notebook up to there: {output}", file=sys.stderr)
        return 1
    print(f"wrote {output}")
    return 0
