# %% [markdown]
# ## All GPUs, from one notebook
#
# A kernel is one process and a process trains on one GPU. So where there are several GPUs the training cell writes down
# the program that this notebook is so far, itself included, starts it once for each GPU with the variables that
# `torchrun` would set, and reads along: the records come out of the log that rank 0 writes, and the chart is drawn here
# as if the training were here too. What was done before the training, the processes find on disk.
#
# They are started directly. A training that is stopped must have the time to save, however large the model, and
# `torchrun` kills by default half a minute after its signal; and when one process fails, the reader is to hear which
# and why, and not that all did.

# %%
import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from nanochat.checkpoint_files import find_last_step, read_meta
from nanochat.notebook_program import program_so_far
from nanochat.runtime import UserError, free_port, get_base_dir, get_dist_info, lock_base_dir, print0, write_atomic
from nanochat.training_loop import StopRequest, TrainLog, TrainRecord

# %% [markdown]
# ### `is_trained`
# A training that is over needs no processes: its records are read here.


# %% tags=["folded"]
def is_trained(folder, fingerprint: str, last_step: int | None = None) -> bool:
    """Whether the newest checkpoint in `folder` is the last one of the training with this fingerprint.

    last_step: where it is known; older checkpoints do not say that they are finished.
    """
    try:
        step = find_last_step(folder)
    except FileNotFoundError:
        return False
    meta = read_meta(folder, step)
    return meta.get("fingerprint") == fingerprint and (step == last_step or bool(meta.get("finished")))


# %% [markdown]
# ### `LogReader`
# The log of a training, while others write it. What it holds at first is from an earlier run; a run that goes on cuts
# it back to its checkpoint, and writes a new file for that. So the first new file is the beginning, and a record that
# stood in the old one just so was not computed now.


# %% tags=["folded"]
class LogReader:
    """New records of `log` each time they are asked for. Make it before the processes start."""

    def __init__(self, log: TrainLog):
        self.log, self.file, self.rest = log, None, ""
        self.earlier, self.earlier_file = {}, self.file_now()
        if self.earlier_file:
            for line in log.path.read_text().splitlines():
                try:
                    fields = json.loads(line)
                except json.JSONDecodeError:  # the line during which a process was killed
                    break
                self.earlier[fields["step"]] = fields

    def file_now(self):
        """What changes when the file is written anew; None when there is none."""
        try:
            found = os.stat(self.log.path)
            return found.st_ino, found.st_mtime_ns
        except FileNotFoundError:
            return None

    def new_records(self) -> list[TrainRecord]:
        """Records that were written since the last call."""
        if self.file is None:
            if self.file_now() in (None, self.earlier_file):
                return []
            self.file = open(self.log.path, encoding="utf-8")
        *lines, self.rest = (self.rest + self.file.read()).split("\n")
        every = map(json.loads, lines)
        return [self.log.kind(**fields, replayed=self.earlier.get(fields["step"]) == fields) for fields in every]

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


# %% [markdown]
# ### `Ranks`
# The processes. They hold one end of a pipe and the notebook the other; when that is closed they do what they would do
# on a signal: finish the step, save, and end. The system closes it when the kernel is killed, so nothing lives on.

# %% tags=["folded"]
END_WITH_THE_NOTEBOOK = """\
# A notebook wrote this file and starts it once for each GPU.
import os
import signal
import threading


def end_with_the_notebook():
    os.read(0, 1)  # returns when the other end is closed
    os.kill(os.getpid(), signal.SIGTERM)


threading.Thread(target=end_with_the_notebook, daemon=True).start()

"""
FAILURE_PATIENCE = 10.0  # seconds for the others to end by themselves when one is gone


# A UserError as a process prints it; PyTorch puts the rank before what is printed at the end.
COMPLAINT = re.compile(r"^(?:\[rank\d+\]: )?✗ (.*)", re.MULTILINE)
FOLLOWED = "lost another process"  # what the others say
BEGINS = "─── the training begins ───"


def rank_environment(rank: int, processes: int, port: int) -> dict[str, str]:
    """The environment of this kernel without what is Jupyter's, with the variables of `torchrun`."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("JPY_") and name != "MPLBACKEND"}
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    own.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    own["WANDB_MODE"] = "disabled"  # the notebook logs
    return own | {name: str(value) for name, value in place.items()}


class Ranks:
    """`processes` times the same script. Rank R prints into the file NAME-R.log beside it."""

    def __init__(self, script: Path, arguments: list[str], processes: int):
        self.command = [sys.executable, "-u", str(script), *arguments]
        self.logs = [script.with_name(f"{script.stem}-{rank}.log") for rank in range(processes)]
        self.processes, self.pipe, self.stopping, self.killed = [], None, False, False
        self.first_failure, self.first_ended_at = None, None
        self.lines_shown = 0

    def start(self) -> None:
        """Start all of them."""
        port = free_port()
        reading_end, self.pipe = os.pipe()
        try:
            for rank, log in enumerate(self.logs):
                with open(log, "wb") as sink:
                    process = subprocess.Popen(
                        self.command,
                        env=rank_environment(rank, len(self.logs), port),
                        stdin=reading_end,
                        stdout=sink,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,  # Ctrl-C is for the notebook alone
                    )
                self.processes.append(process)
        finally:
            os.close(reading_end)

    def ask_to_stop(self) -> None:
        """Let them finish the step, save and end."""
        self.stopping = True
        if self.pipe is not None:
            os.close(self.pipe)
            self.pipe = None

    def are_running(self) -> bool:
        """Whether one of them runs; when one has ended before its time, the others soon do not."""
        codes = [process.poll() for process in self.processes]
        fine = {None, 0, -signal.SIGINT} if self.stopping else {None, 0}  # after saving it is SIGINT
        ended = [rank for rank, code in enumerate(codes) if code not in fine]
        if ended and not self.killed:
            self.first_ended_at = self.first_ended_at or time.monotonic()
            # who was killed, or does not say so, did not follow another; it may be the last to be gone
            first = min(ended, key=lambda rank: (codes[rank] != -signal.SIGKILL, FOLLOWED in self.printed_by(rank)))
            if not (self.stopping and codes[first] == -signal.SIGTERM):  # the stop came before the first step
                self.first_failure = first
        if ended and time.monotonic() > self.first_ended_at + FAILURE_PATIENCE:
            self.kill()
        return None in codes

    def kill(self) -> None:
        """End what still runs, at once."""
        self.killed = True
        self.ask_to_stop()
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()

    def printed_by(self, rank: int) -> str:
        return self.logs[rank].read_text(encoding="utf-8", errors="replace")

    def words_before_the_first_step(self) -> list[str]:
        """What rank 0 has said of the training since the last call: a smaller batch, no compiler..."""
        lines = self.printed_by(0).partition(f"{BEGINS}\n")[2].split("\n")[:-1]
        self.lines_shown, new = len(lines), lines[self.lines_shown :]
        return [line for line in new if not line.lower().startswith("step")]

    def failure(self) -> str:
        """What went wrong first, and how to go on; "" when nothing did."""
        if self.first_failure is None:
            return ""
        texts = [self.printed_by(rank) for rank in (self.first_failure, *range(len(self.logs)))]
        complaints = [words for text in texts for words in COMPLAINT.findall(text) if FOLLOWED not in words]
        if complaints:  # a UserError says all there is to say
            return complaints[0]
        code = self.processes[self.first_failure].returncode
        how = f"failed with status {code}"
        if code < 0:
            how = f"was killed by signal {-code} ({signal.Signals(-code).name})"
            how += ", as systems do when memory runs out" if code == -signal.SIGKILL else ""
        return (
            f"rank {self.first_failure} {how}. Run the cell again to go on from the last checkpoint. The end of "
            f"{self.logs[self.first_failure]}:\n" + "\n".join(texts[0].rstrip().splitlines()[-15:])
        )


# %% [markdown]
# ### `train_on`
# Stands around a training: `for record in train_on(processes, pretrain(...), ...)`. With one process, or when the
# training is over, it does nothing.


# %% tags=["folded"]
def train_on(
    processes: int, training, name: str, folder, fingerprint: str, params: dict, kind: type[TrainRecord] = TrainRecord,
    last_step: int | None = None,
):  # fmt: skip
    """Yield the records of `training`, a generator that was not started, from `processes` processes.

    name: of the script and the logs in `<base>/launch`. folder, fingerprint, kind: of the checkpoints and the log that
    the training writes. params: go on the command line. last_step: as for is_trained. The stop button saves and raises
    KeyboardInterrupt, as the training itself does; twice, it ends everything at once. Raises UserError when a process
    fails. To be called in the cell that trains: the program ends with it. What this kernel has on the first GPU stays
    there: hold no model.
    """
    order = f"{name} {fingerprint}"  # the program also passes by what was trained before
    if os.environ.get("NANOCHAT_LAUNCHED_FOR", order) != order and not is_trained(folder, fingerprint, last_step):
        raise UserError(
            "the cells that this notebook remembers, in the order of their first run, lead to another training than "
            "the one that it shows. Restart the kernel and run all cells."
        )
    if processes == get_dist_info()[3] or is_trained(folder, fingerprint, last_step):
        if "NANOCHAT_LAUNCHED_FOR" in os.environ:
            print0(BEGINS)
        yield from training
        return
    script = Path(get_base_dir()) / "launch" / f"{name}.py"
    beginning = f'{END_WITH_THE_NOTEBOOK}os.environ["NANOCHAT_LAUNCHED_FOR"] = "{order}"\n\n'
    write_atomic(script, f"{beginning}{program_so_far()}\n\ncompute_cleanup()\n")
    arguments = [f"--{key}={value}" for key, value in params.items()]
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    reader, lock = LogReader(TrainLog(folder, kind)), lock_base_dir()
    logs = f"{script.with_name(name)}-*.log"
    print0(f"{name}: starting {processes} processes, which print into {logs}; loading and compiling takes minutes")
    lock.release()  # to rank 0
    ranks, begun = Ranks(script, arguments, processes), False
    try:
        with StopRequest() as stop:
            ranks.start()
            while ranks.are_running():
                for line in [] if begun else ranks.words_before_the_first_step():
                    print0(f"│ {line}")
                for record in reader.new_records():
                    begun |= not record.replayed
                    yield record
                if stop.requested:
                    ranks.ask_to_stop()
                time.sleep(0.1)
            yield from reader.new_records()
    finally:
        ranks.kill()
        reader.close()
        lock_base_dir()
    if problem := ranks.failure():
        raise UserError(f"{name}: {problem}")
    if stop.requested:
        raise KeyboardInterrupt("stopped and saved; run again to go on from there")
    if not is_trained(folder, fingerprint, last_step):
        raise UserError(f"{name}: the processes ended well and did not train this model. Their program is {script}.")
