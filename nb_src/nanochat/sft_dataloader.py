# %% [markdown]
# ## Packing conversations
#
# A document can be cut to fill the last gap of a row; a conversation cannot, because what would be cut off is the
# answer. So rows are filled with whole conversations, the longest that fits first, and what stays empty is padding.
# Two more things differ from pretraining:
#
# - Only what the assistant says is learned. Questions and the results of tools are read, never imitated.
# - Everything happens exactly once in a pass. The buffer runs empty before the next pass begins, so no conversation is
#   left behind in it and none comes twice.
#
# The rest is as before: conversations are dealt to eight lanes, rows come from the lanes in turn, so the rows of a step
# do not depend on how many processes share them; and the state that comes with each batch is enough to go on from it.

# %%
from dataclasses import dataclass

import numpy as np
import torch

from nanochat.dataloader import LANES
from nanochat.runtime import UserError, get_dist_info

# %% [markdown]
# ### `render_for_training`
# A conversation as tokens, and for each whether it is learned. What is longer than a row is cut to the row; a broken
# conversation is named.


# %%
def render_for_training(tokenizer, task, index: int, max_tokens: int) -> tuple[list[int], list[int]]:
    """(ids, mask) of conversation `index`, at most max_tokens long; mask 1: learned. Both empty without messages.

    Raises UserError when the conversation is not a valid one.
    """
    conversation = task[index]
    if isinstance(conversation, dict) and conversation.get("messages") == []:
        return [], []
    try:
        return tokenizer.render_conversation(conversation, max_tokens)
    except ValueError as error:
        raise UserError(f"conversation {index} of the fine-tuning data is broken: {error}. Repair it.") from error


# %% [markdown]
# ### `ConversationPacker`
# One lane. A conversation in which nothing is left to learn (empty, or cut before the assistant's turn) only takes up
# room, so it is passed over.


# %%
@dataclass(slots=True, eq=False)
class WaitingConversation:
    index: int
    ids: list[int]
    mask: list[int]


class ConversationPacker:
    """Fills rows of `capacity` tokens with conversations lane, lane + lanes, … of a task: spec section 16.3.

    read: how many of them were read since the beginning of the first pass.
    """

    def __init__(
        self, tokenizer, task, capacity: int, lane: int, lanes: int, buffer_size: int, repeat: bool,
        state: dict | None = None,
    ):  # fmt: skip
        self.tokenizer, self.task, self.capacity = tokenizer, task, capacity
        self.mine, self.buffer_size, self.repeat = range(lane, len(task), lanes), buffer_size, repeat
        self.waiting: list[WaitingConversation] = []  # in order of arrival
        self.read = state["read"] if state else 0
        for index in state["waiting"] if state else ():
            self.add(index)

    def add(self, index: int) -> None:
        """Render a conversation and let it wait, unless it has nothing to learn."""
        ids, mask = render_for_training(self.tokenizer, self.task, index, self.capacity)
        if any(mask):
            self.waiting.append(WaitingConversation(index, ids, mask))

    def refill(self) -> None:
        """Read until the buffer is full or the pass ends; the next pass begins with an empty buffer."""
        first = self.read
        while len(self.waiting) < self.buffer_size and self.mine:
            place = self.read % len(self.mine)
            if place == 0 and (self.waiting or self.read and not self.repeat):
                return
            if self.read - first == len(self.mine):  # a whole pass with nothing to learn: do not search again
                self.read, self.mine = first, range(0)
                return
            self.add(self.mine[place])
            self.read += 1

    def next_row(self) -> list[WaitingConversation]:
        """Conversations for one row, at most `capacity` tokens together; none when there is nothing (more) to learn."""
        row, remaining = [], self.capacity
        while True:
            self.refill()
            fitting = [conversation for conversation in self.waiting if len(conversation.ids) <= remaining]
            if not fitting:
                return row
            longest = max(fitting, key=lambda conversation: len(conversation.ids))  # the first to come of equals
            self.waiting.remove(longest)
            row.append(longest)
            remaining -= len(longest.ids)

    def consumed(self) -> int:
        """How many conversations were put into rows or passed over."""
        return self.read - len(self.waiting)

    def is_finished(self) -> bool:
        """Whether the only pass is over."""
        return not self.repeat and not self.waiting and self.read == len(self.mine)

    def state(self) -> dict:
        """Everything needed to go on from here, JSON-able."""
        return {"read": self.read, "waiting": [conversation.index for conversation in self.waiting]}


# %% [markdown]
# ### `ConversationLanes`
# Row i of the run comes from lane i mod V. A process packs every W-th row and renders the conversations of its own
# lanes only.


# %%
def choose_conversation_lanes(conversations: int, world_size: int) -> int:
    """LANES, fewer when there are not as many conversations, or one for each process when those cannot share them."""
    lanes = LANES if LANES % world_size == 0 else world_size
    while lanes > max(conversations, world_size):
        lanes //= 2
    return lanes


class ConversationLanes:
    """Packs the rows of one process.

    row: the number of rows that all processes together have packed, mod V.
    """

    def __init__(
        self, tokenizer, task, capacity: int, rank: int = 0, world_size: int = 1, buffer_size: int = 100,
        repeat: bool = True, state: dict | None = None,
    ):  # fmt: skip
        """Raises UserError when the processes cannot share the lanes, or `state` does not have all of them."""
        self.rank, self.world_size = rank, world_size
        self.lanes = state["lanes"] if state else choose_conversation_lanes(len(task), world_size)
        if self.lanes % world_size:
            divisors = ", ".join(str(count) for count in range(1, self.lanes + 1) if self.lanes % count == 0)
            raise UserError(
                f"the conversations of this run are dealt to {self.lanes} lanes, which {world_size} processes cannot "
                f"share evenly. Use a number of processes that can: {divisors}."
            )
        self.row = state["row"] if state else 0
        mine = [lane for lane in range(self.lanes) if (lane - self.row - rank) % world_size == 0]
        if state and not {str(lane) for lane in mine} <= set(state["packers"]):
            raise UserError(
                "the saved position in the conversations is that of one process of several, so the run cannot "
                "continue where it stopped. Start it anew."
            )
        self.packers = {
            lane: ConversationPacker(
                tokenizer, task, capacity, lane, self.lanes, max(1, buffer_size // self.lanes), repeat,
                state["packers"][str(lane)] if state else None,
            )
            for lane in mine
        }  # fmt: skip

    def next_row(self) -> list[WaitingConversation]:
        """The next row of this process, see ConversationPacker."""
        lane = (self.row + self.rank) % self.lanes
        self.row = (self.row + self.world_size) % self.lanes
        return self.packers[lane].next_row()

    def is_finished(self) -> bool:
        return all(packer.is_finished() for packer in self.packers.values())

    def state(self) -> dict:
        """Everything that this process needs to go on from here, JSON-able.

        consumed: conversations of these lanes that were put into rows or passed over.
        """
        return {
            "row": self.row,
            "lanes": self.lanes,
            "consumed": sum(packer.consumed() for packer in self.packers.values()),
            "packers": {str(lane): packer.state() for lane, packer in self.packers.items()},
        }


def merge_conversation_states(states: list[dict]) -> dict:
    """One state with all lanes, from the states that all processes have after the same number of batches."""
    packers = {lane: packer for state in states for lane, packer in state["packers"].items()}
    return {
        "row": states[0]["row"],
        "lanes": states[0]["lanes"],
        "consumed": sum(state["consumed"] for state in states),
        "packers": {lane: packers[lane] for lane in sorted(packers, key=int)},
    }


# %% [markdown]
# ### `row_arrays`
# One rule makes the targets: a token is one when its mask is 1. That leaves out the user, the tools, every `<|bos|>`,
# and all padding, down to a row of nothing else.


# %%
def row_arrays(rows: list[list[WaitingConversation]], T: int, bos: int) -> np.ndarray:
    """Inputs and targets of these rows, (2, B, T) int64; targets that are not learned are -1."""
    ids = np.full((len(rows), T + 1), bos, dtype=np.int64)
    learned = np.zeros(ids.shape, dtype=bool)
    for number, row in enumerate(rows):
        position = 0
        for conversation in row:
            end = position + len(conversation.ids)
            ids[number, position:end], learned[number, position:end] = conversation.ids, conversation.mask
            position = end
    return np.stack([ids[:, :-1], np.where(learned[:, 1:], ids[:, 1:], -1)])


# %% [markdown]
# ### The loader
# Each batch is one copy to the device and its tensors are new: a whole step of them may be kept.


# %%
def sft_data_generator_bos_bestfit(
    tokenizer,
    task,
    B: int,
    T: int,
    device="cuda",
    buffer_size: int = 100,
    repeat: bool = True,
    resume_state_dict: dict | None = None,
):
    """(inputs, targets, state) of this rank: inputs and targets (B, T) int64 on `device`, targets -1 where not learned.

    task: len() and [i] -> conversation. buffer_size: conversations waiting, in all lanes together. Endless with
    `repeat`; without, every conversation comes once, and rows that are left over at the end are padding.

    state: a JSON-able dict; `targets` in it is the number of targets of this batch that are learned. The merged states
    of all ranks as resume_state_dict give the batches after this one, bit for bit.
    """
    _, rank, _, world_size = get_dist_info()
    lanes = ConversationLanes(tokenizer, task, T + 1, rank, world_size, buffer_size, repeat, resume_state_dict)
    bos, device = tokenizer.get_bos_token_id(), torch.device(device)
    while not lanes.is_finished():
        batch = torch.from_numpy(row_arrays([lanes.next_row() for _ in range(B)], T, bos))
        n_targets = int((batch[1] >= 0).sum())
        if device.type == "cuda":
            batch = batch.pin_memory().to(device, non_blocking=True)
        else:
            batch = batch.to(device)
        yield batch[0], batch[1], lanes.state() | {"targets": n_targets}


# %% [markdown]
# ### Looking at the packing
# The rows as one process packs them, as shapes: what stands in each, how much of it is learned, how much is empty.


# %%
def preview_sft_rows(tokenizer, task, rows: int, T: int) -> list[tuple[list[tuple[int, int, int]], int]]:
    """For each of the first `rows` rows (segments, padding).

    A segment is (conversation, its tokens, how many of them are learned); with the padding they add up to T + 1.
    """
    lanes = ConversationLanes(tokenizer, task, T + 1)
    preview = []
    for row in (lanes.next_row() for _ in range(rows)):
        segments = [(one.index, len(one.ids), sum(one.mask)) for one in row]
        preview.append((segments, T + 1 - sum(tokens for _, tokens, _ in segments)))
    return preview
