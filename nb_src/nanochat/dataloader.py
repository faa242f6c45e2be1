# %% [markdown]
# ## Dataloader
#
# Documents have every length; a batch is a rectangle. Padding wastes compute and cutting wastes text, so each row is
# packed like a suitcase: of a thousand waiting documents take the longest that still fits, again and again, and only
# when nothing fits cut the shortest to fill the gap. Every row begins with `<|bos|>` and is full to the last token.
#
# Best fit leaves documents waiting for a long time, so "which file was I reading" is not enough to continue a run.
# The state that comes with each batch also lists the documents still waiting, by their coordinates in the corpus. A
# run that continues from it sees exactly the batches that an uninterrupted one would have seen.
#
# None of this depends on how many processes share the work: the corpus is dealt to eight *lanes*, each packs its own
# rows, and the rows of the run come from the lanes in turn. One process reads all lanes, eight read one each, and the
# rows of a step are the same: the losses of one and of eight GPUs can be compared, and a run can move between machines.

# %%
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pyarrow.parquet as pq
import torch

from nanochat.dataset import Corpus, read_row_group
from nanochat.runtime import UserError, get_dist_info

# %% [markdown]
# ### `DocumentStream`
# An endless walk over one lane of the corpus. Of every file, lane v of V has row groups v, v + V, v + 2V and so on, so
# that no two lanes share a document and no process has to read what belongs to another.


# %%
def split_files(corpus: Corpus, split: str) -> list[str]:
    """The files of "train" or "val". Raises UserError when there are none."""
    if split not in ("train", "val"):
        raise ValueError(f"split is {split!r}; it can be train or val")
    if split == "train" and not corpus.train_files:
        raise UserError(
            f"corpus {corpus.name} has no training files: it needs at least two, as one is kept for validation. "
            "Download or build more."
        )
    return list(corpus.train_files) if split == "train" else [corpus.val_file]


class DocumentStream:
    """Texts of one lane of a split in order, epoch after epoch, and where it stands: spec section 7.1.

    pq_idx, rg_idx, epoch: file, row group and pass (from 1) of the most recent documents.
    next_doc: the first document of that row group that has not been handed out yet.
    """

    def __init__(self, corpus: Corpus, split: str, lane: int, lanes: int, state: dict | None = None):
        """Raises UserError when `state` is not of this corpus."""
        self.files = split_files(corpus, split)
        self.text_column, self.lane, self.lanes = corpus.text_column, lane, lanes
        self.row_groups: dict[int, int] = {}  # file → its number of row groups, as files are opened
        start = state or {"pq_idx": 0, "rg_idx": lane - lanes, "next_doc": 0, "epoch": 1}
        self.pq_idx, self.rg_idx = start["pq_idx"], start["rg_idx"]
        self.next_doc, self.epoch = start["next_doc"], start["epoch"]
        self.texts: list[str] = []
        if self.rg_idx >= 0:  # else nothing was read yet
            self.texts = self.read(self.pq_idx, self.rg_idx)
            if self.next_doc > len(self.texts):
                raise UserError(f"{self.files[self.pq_idx]} has fewer documents than when this run was saved.")

    def count_row_groups(self, pq_idx: int) -> int:
        if pq_idx not in self.row_groups:
            self.row_groups[pq_idx] = pq.read_metadata(self.files[pq_idx]).num_row_groups
        return self.row_groups[pq_idx]

    def read(self, pq_idx: int, rg_idx: int) -> list[str]:
        """The documents of one row group. Raises UserError when the corpus has no such row group."""
        if not (0 <= pq_idx < len(self.files) and 0 <= rg_idx < self.count_row_groups(pq_idx)):
            raise UserError(
                f"the saved position (file {pq_idx}, row group {rg_idx}) is not in this corpus, so the data has "
                "changed since. Restore it, or start this run anew."
            )
        return read_row_group(self.files[pq_idx], rg_idx, self.text_column)

    def next_batch(self, size: int) -> tuple[list[str], list[list[int]]]:
        """Up to `size` texts of one row group, and for each its coordinates [file, row group, index]."""
        epochs_begun = 0
        while self.next_doc >= len(self.texts):
            self.rg_idx += self.lanes
            self.next_doc = 0
            while self.rg_idx >= self.count_row_groups(self.pq_idx):
                self.pq_idx, self.rg_idx = self.pq_idx + 1, self.lane
                if self.pq_idx == len(self.files):
                    self.pq_idx, self.epoch, epochs_begun = 0, self.epoch + 1, epochs_begun + 1
                    if epochs_begun == 2:
                        raise UserError(f"lane {self.lane} of {self.lanes} has no document in {len(self.files)} files.")
            self.texts = self.read(self.pq_idx, self.rg_idx)
        first, self.next_doc = self.next_doc, min(self.next_doc + size, len(self.texts))
        where = [[self.pq_idx, self.rg_idx, index] for index in range(first, self.next_doc)]
        return self.texts[first : self.next_doc], where


# %% [markdown]
# ### `BestFitPacker`
# The waiting documents live in two structures: a dict in order of arrival, and their lengths in a sorted list, where
# the best fit is one binary search away.
#
# A document longer than a row can never go in whole, so only its first T + 1 tokens are worth keeping. It waits until
# it is the shortest of those that wait, and ends as the piece that fills a gap.


# %%
@dataclass(slots=True)
class WaitingDocument:
    where: list[int]  # [file, row group, index in the row group]
    length: int  # in tokens, with <|bos|>
    tokens: np.ndarray  # the first T + 1 of them, int32


class BestFitPacker:
    """Fills rows of `capacity` tokens with the documents of one lane: spec section 7.2."""

    def __init__(
        self, tokenizer, stream: DocumentStream, capacity: int, buffer_size: int, batch_size: int, threads: int
    ):
        self.tokenizer, self.stream, self.capacity = tokenizer, stream, capacity
        self.buffer_size, self.batch_size, self.threads = buffer_size, batch_size, threads
        self.waiting: dict[int, WaitingDocument] = {}  # by number of arrival, oldest first
        self.by_length: list[tuple[int, int]] = []  # (length, number of arrival), sorted
        self.arrived = 0

    def add(self, texts: list[str], where: list[list[int]]) -> None:
        """Tokenize documents and let them wait."""
        bos = self.tokenizer.get_bos_token_id()
        encoded = self.tokenizer.encode(texts, prepend=bos, num_threads=self.threads)
        for ids, place in zip(encoded, where, strict=True):
            tokens = np.array(ids[: self.capacity], dtype=np.int32)
            self.waiting[self.arrived] = WaitingDocument(place, len(ids), tokens)
            self.by_length.append((len(ids), self.arrived))
            self.arrived += 1
        self.by_length.sort()

    def restore(self, places: list[list[int]]) -> None:
        """Read the documents at these coordinates again; they wait in this order."""
        texts: dict[tuple[int, ...], str] = {}
        wanted: dict[tuple[int, int], list[int]] = {}
        for pq_idx, rg_idx, index in places:
            wanted.setdefault((pq_idx, rg_idx), []).append(index)
        for (pq_idx, rg_idx), indices in wanted.items():
            group = self.stream.read(pq_idx, rg_idx)
            if max(indices) >= len(group):
                raise UserError(f"{self.stream.files[pq_idx]} has fewer documents than when this run was saved.")
            texts.update({(pq_idx, rg_idx, index): group[index] for index in indices})
        self.add([texts[tuple(place)] for place in places], [list(place) for place in places])

    def take(self, remaining: int) -> WaitingDocument:
        """Remove the longest document that fits into `remaining` tokens, else the shortest; first come of equals."""
        fitting = bisect_right(self.by_length, (remaining, self.arrived))
        index = bisect_left(self.by_length, (self.by_length[fitting - 1][0], -1)) if fitting else 0
        return self.waiting.pop(self.by_length.pop(index)[1])

    def next_row(self) -> list[tuple[WaitingDocument, int]]:
        """Documents of one row, and how many tokens of each are in it; the numbers add up to the capacity."""
        row, remaining = [], self.capacity
        while remaining:
            while len(self.waiting) < self.buffer_size:
                self.add(*self.stream.next_batch(self.batch_size))
            document = self.take(remaining)
            used = min(document.length, remaining)
            row.append((document, used))
            remaining -= used
        return row

    def state(self) -> dict:
        """Everything needed to go on from here, JSON-able."""
        stream = self.stream
        return {
            "pq_idx": stream.pq_idx,
            "rg_idx": stream.rg_idx,
            "epoch": stream.epoch,
            "next_doc": stream.next_doc,
            "waiting": [document.where for document in self.waiting.values()],
        }


# %% [markdown]
# ### `LanePacker`
# The rows of a run are numbered, row i comes from lane i mod V, and the processes take rows in turn. When their number
# W divides V, a process always comes back to the same V / W lanes, and tokenizes nothing else.
#
# The lanes divide one buffer between them, so more of them do not make the start slower. But each chooses among fewer
# documents: on the offline corpus, in rows of 2048 tokens, eight lanes throw away about 8% of the text, one about 5%.

# %%
LANES = 8  # a machine has up to 8 GPUs; every smaller power of two divides it


def choose_lanes(corpus: Corpus, split: str, world_size: int) -> int:
    """LANES, or fewer when no file has as many row groups, or one for each process when it cannot be shared evenly."""
    most = 0
    for path in split_files(corpus, split):
        most = max(most, pq.read_metadata(path).num_row_groups)
        if most >= max(LANES, world_size):
            break
    lanes = LANES
    while lanes > max(most, 1):
        lanes //= 2
    if lanes % world_size:
        lanes = world_size
    if lanes > most:
        raise UserError(
            f"the {split} files of corpus {corpus.name} have at most {most} row groups, too few for {world_size} "
            f"processes that each read their own. Use at most {most} processes, or files with more row groups."
        )
    return lanes


class LanePacker:
    """Packs the rows of one process: every W-th row of the run, from the lane whose turn it is.

    row: the number of rows that all processes together have packed, mod V.
    """

    def __init__(
        self, tokenizer, corpus: Corpus, split: str, capacity: int, rank: int = 0, world_size: int = 1,
        lanes: int | None = None, state: dict | None = None, buffer_size: int = 1000, batch_size: int = 128,
        threads: int = 4,
    ):  # fmt: skip
        """Raises UserError when the processes cannot share the lanes, or `state` is not of this corpus."""
        lanes = state["lanes"] if state else lanes or choose_lanes(corpus, split, world_size)
        if lanes % world_size:
            divisors = ", ".join(str(count) for count in range(1, lanes + 1) if lanes % count == 0)
            raise UserError(
                f"the documents of this run are dealt to {lanes} lanes, which {world_size} processes cannot share "
                f"evenly. Use a number of processes that can: {divisors}."
            )
        self.rank, self.world_size, self.lanes = rank, world_size, lanes
        self.row = state["row"] if state else 0
        self.packers: dict[int, BestFitPacker] = {}
        # Not simply from lane `rank` on: one process may have saved after an odd number of rows, and now there are two.
        for lane in sorted((self.row + rank + turn) % lanes for turn in range(0, lanes, world_size)):
            saved = state["packers"][str(lane)] if state else None
            stream = DocumentStream(corpus, split, lane, lanes, saved)
            packer = BestFitPacker(tokenizer, stream, capacity, max(1, buffer_size // lanes), batch_size, threads)
            if saved:
                packer.restore(saved["waiting"])
            self.packers[lane] = packer

    def next_row(self) -> list[tuple[WaitingDocument, int]]:
        """The next row of this process, see BestFitPacker."""
        lane = (self.row + self.rank) % self.lanes
        self.row = (self.row + self.world_size) % self.lanes
        return self.packers[lane].next_row()

    def state(self) -> dict:
        """Everything that this process needs to go on from here, JSON-able."""
        return state_of_lanes(self.row, self.lanes, {str(lane): one.state() for lane, one in self.packers.items()})


# %% [markdown]
# ### `packed_batches`
# Each batch is one copy to the device, from pinned memory when there is a GPU, and the tensors are new each time:
# hold on to as many batches as you like.


# %%
def packed_batches(packer: LanePacker, B: int, T: int, device: torch.device):
    """Endless (inputs, targets, state); see the loader."""
    on_gpu = device.type == "cuda"
    rows = np.empty((B, T + 1), dtype=np.int64)
    staging = torch.empty((2, B, T), dtype=torch.int64, pin_memory=on_gpu)
    staging_array = staging.numpy()  # the same memory
    copied = torch.cuda.Event() if on_gpu else None
    while True:
        for row in rows:
            position = 0
            for document, used in packer.next_row():
                row[position : position + used] = document.tokens[:used]
                position += used
        if copied is not None:
            copied.synchronize()  # the previous batch has left the staging buffer
        staging_array[0], staging_array[1] = rows[:, :-1], rows[:, 1:]
        batch = staging.to(device, non_blocking=on_gpu, copy=True)
        if copied is not None:
            copied.record()
        yield batch[0], batch[1], packer.state()


# %% [markdown]
# ### The state
# Each process knows about its own lanes; a checkpoint should know about all. Merged, the states of W processes are the
# state that one process would have had, so any number of processes that can share the lanes can go on from it.


# %%
def state_of_lanes(row: int, lanes: int, packers: dict[str, dict]) -> dict:
    """pq_idx, rg_idx, epoch: where the first of these lanes stands, for logs. packers: by lane, in order."""
    first = next(iter(packers.values()))
    position = {key: first[key] for key in ("pq_idx", "rg_idx", "epoch")}
    return {**position, "row": row, "lanes": lanes, "packers": packers}


def merge_loader_states(states: list[dict]) -> dict:
    """One state with all lanes, from the states that all processes have after the same number of batches."""
    if len({(state["row"], state["lanes"]) for state in states}) != 1:
        raise ValueError("these states are not of one moment of one run")
    packers = {lane: packer for state in states for lane, packer in state["packers"].items()}
    in_order = {lane: packers[lane] for lane in sorted(packers, key=int)}
    return state_of_lanes(states[0]["row"], states[0]["lanes"], in_order)


def check_loader_state(state: dict) -> None:
    """Raise UserError unless a run can go on from `state`."""
    missing = {"row", "lanes", "packers"} - set(state)
    if missing:
        raise UserError(
            f"the saved dataloader state lacks {', '.join(sorted(missing))}, so the run cannot continue exactly where "
            "it stopped. Start it anew."
        )
    if len(state["packers"]) < state["lanes"]:
        raise UserError(
            f"the saved dataloader state has lanes {', '.join(state['packers'])} of {state['lanes']} alone: it is of "
            "one process of several. Merge the states of all with merge_loader_states."
        )


# %% [markdown]
# ### The loader
# The name is long and says everything: it tokenizes, each process reads its own lanes, every row begins with
# `<|bos|>`, and rows are packed by best fit.


# %%
def tokenizing_distributed_data_loader_with_state_bos_bestfit(
    tokenizer,
    B: int,
    T: int,
    split: str,
    tokenizer_threads: int = 4,
    tokenizer_batch_size: int = 128,
    device="cuda",
    resume_state_dict: dict | None = None,
    buffer_size: int = 1000,
    *,
    corpus: Corpus,
    lanes: int | None = None,
):
    """Endless (inputs, targets, state) of this rank: inputs and targets (B, T) int64 on `device`. Spec section 7.2.

    Row j of rank r of W is row j * W + r of the run: a step of as many rows sees the same ones with any W that divides
    the lanes. buffer_size: documents waiting, in all lanes together. lanes: None for `choose_lanes`.

    state: a JSON-able dict. A loader that gets it as resume_state_dict yields the batches after this one, bit for bit;
    B and T may change on the way, the corpus may not. Of several processes the states must be merged, then their
    number may change too. Raises UserError, at once, when the corpus cannot feed every process or the state does not
    fit.
    """
    _, rank, _, world_size = get_dist_info()
    if resume_state_dict is not None:
        check_loader_state(resume_state_dict)
    packer = LanePacker(
        tokenizer, corpus, split, T + 1, rank, world_size, lanes, resume_state_dict,
        buffer_size, tokenizer_batch_size, tokenizer_threads,
    )  # fmt: skip
    return packed_batches(packer, B, T, torch.device(device))


def tokenizing_distributed_data_loader_bos_bestfit(*args, **kwargs):
    """The same loader without the state: endless (inputs, targets)."""
    batches = tokenizing_distributed_data_loader_with_state_bos_bestfit(*args, **kwargs)
    return ((inputs, targets) for inputs, targets, _ in batches)


# %% [markdown]
# ### Looking at the packing
# The same packer, asked for the shape of its rows instead of their tokens.


# %%
def packed_rows(tokenizer, corpus: Corpus, T: int):
    """Endless rows of the training split as one process would pack them, each a list of (WaitingDocument, used)."""
    packer = LanePacker(tokenizer, corpus, "train", T + 1)
    while True:
        yield packer.next_row()


def pack_rows_preview(tokenizer, corpus: Corpus, rows: int, T: int) -> list[list[tuple[int, int, bool]]]:
    """For each of the first `rows` rows its pieces (document, tokens in this row, was it cropped).

    Documents are numbered from 0 as they first appear; the tokens of a row add up to T + 1.
    """
    numbers: dict[tuple[int, ...], int] = {}
    return [
        [
            (numbers.setdefault(tuple(document.where), len(numbers)), used, used < document.length)
            for document, used in row
        ]
        for row in islice(packed_rows(tokenizer, corpus, T), rows)
    ]


def packing_statistics(tokenizer, corpus: Corpus, rows: int, T: int) -> dict:
    """How the first `rows` rows were packed: documents, how many were cropped, and the share of tokens thrown away."""
    pieces = [piece for row in islice(packed_rows(tokenizer, corpus, T), rows) for piece in row]
    tokens_read = sum(document.length for document, _ in pieces)
    return {
        "rows": rows,
        "documents": len(pieces),
        "cropped_documents": sum(used < document.length for document, used in pieces),
        "cropped_tokens_percent": 100 * (1 - rows * (T + 1) / tokens_read),
    }
