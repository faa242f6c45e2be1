"""Every conversation is seen whole and once, and only what the assistant says is learned."""

import json
from itertools import islice

import pytest
import torch

from helpers import small_tokenizer
from nanochat import sft_dataloader
from nanochat.runtime import UserError
from nanochat.sft_dataloader import (
    ConversationLanes,
    choose_conversation_lanes,
    merge_conversation_states,
    preview_sft_rows,
    row_arrays,
    sft_data_generator_bos_bestfit,
)

BOS, PADDING = 0, 0


class LengthTokenizer:
    """Renders conversation {"messages": [n]} as n tokens 100 + n, of which all but the first are learned."""

    def render_conversation(self, conversation, max_tokens):
        n = conversation["messages"][0]
        return [100 + n] * min(n, max_tokens), ([0] + [1] * (n - 1))[:max_tokens]

    def get_bos_token_id(self):
        return BOS


def lengths_task(*lengths):
    return [{"messages": [n]} for n in lengths]


def packed_lengths(task, capacity, rows, **options):
    lanes = ConversationLanes(LengthTokenizer(), task, capacity, **options)
    return [[len(one.ids) for one in lanes.next_row()] for _ in range(rows)]


@pytest.fixture
def one_lane(monkeypatch):
    monkeypatch.setattr(sft_dataloader, "LANES", 1)


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


def say(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_tools_are_masked_token_by_token(tokenizer):
    """Prevents learning to write the user's part, the calculator's results, or the next conversation's start."""
    parts = [
        {"type": "text", "text": "Let me see. "},
        {"type": "python", "text": "2+2"},
        {"type": "python_output", "text": "4"},
        {"type": "text", "text": "It is 4."},
    ]
    special, plain = tokenizer.encode_special, tokenizer.encode
    expected = [(special("<|bos|>"), 0), (special("<|user_start|>"), 0)]
    expected += [(token, 0) for token in plain("What is 2+2?")]
    expected += [(special("<|user_end|>"), 0), (special("<|assistant_start|>"), 0)]
    expected += [(token, 1) for token in plain("Let me see. ")]
    expected += [(special("<|python_start|>"), 1), *((token, 1) for token in plain("2+2"))]
    expected += [(special("<|python_end|>"), 1), (special("<|output_start|>"), 0)]
    expected += [*((token, 0) for token in plain("4")), (special("<|output_end|>"), 0)]
    expected += [*((token, 1) for token in plain("It is 4.")), (special("<|assistant_end|>"), 1)]
    T, used = 64, len(expected)
    task = [say("What is 2+2?", parts)]
    inputs, targets, state = next(sft_data_generator_bos_bestfit(tokenizer, task, 1, T, "cpu", repeat=False))
    assert inputs.dtype == targets.dtype == torch.int64 and inputs.shape == targets.shape == (1, T)
    assert inputs[0].tolist() == [token for token, _ in expected] + [tokenizer.get_bos_token_id()] * (T - used)
    learned = [token if mask else -1 for token, mask in expected[1:]]
    assert targets[0].tolist() == learned + [-1] * (T - used + 1)
    assert state["targets"] == sum(mask for _, mask in expected)


def test_two_conversations_share_a_row(tokenizer, one_lane):
    """Prevents a target across the border: the end of one conversation must not predict the start of the next."""
    task = [say("One?", "Yes, one."), say("Two?", "No.")]
    (first, first_mask), (second, second_mask) = (tokenizer.render_conversation(one) for one in task)
    assert len(first) > len(second)
    ids, mask = first + second, first_mask + second_mask
    inputs, targets, _ = next(sft_data_generator_bos_bestfit(tokenizer, task, 1, len(ids) - 1, "cpu"))
    assert inputs[0].tolist() == ids[:-1]
    assert targets[0].tolist() == [token if learned else -1 for token, learned in zip(ids[1:], mask[1:], strict=True)]
    assert targets[0, len(first) - 2] == tokenizer.encode_special("<|assistant_end|>")
    assert targets[0, len(first) - 1] == -1
    expected = [(0, len(first), sum(first_mask)), (1, len(second), sum(second_mask))]
    assert preview_sft_rows(tokenizer, task, 1, len(ids) + 2) == [(expected, 3)]


def test_packing_by_hand(one_lane):
    """Prevents another order than best fit, a cropped conversation, and a buffer that is never emptied."""
    task = lengths_task(4, 7, 3, 6, 10, 2)
    assert packed_lengths(task, 10, 4) == [[10], [7, 3], [6, 4], [2, 7]]  # the last row is in the second pass
    assert packed_lengths(task, 10, 4, buffer_size=2) == [[7, 3], [6, 4], [10], [2, 7]]
    assert packed_lengths(task, 10, 6, repeat=False) == [[10], [7, 3], [6, 4], [2], [], []]
    assert packed_lengths(lengths_task(5, 5, 5), 10, 3) == [[5, 5], [5, 5], [5, 5]]


def test_first_to_come_of_equals(one_lane):
    """Prevents an order that depends on anything but the data."""
    lanes = ConversationLanes(LengthTokenizer(), lengths_task(5, 5, 5, 5), 10, repeat=False)
    assert [[one.index for one in lanes.next_row()] for _ in range(2)] == [[0, 1], [2, 3]]


def test_overlong_conversations_are_cut_to_the_row(one_lane):
    """Prevents conversations that never fit from filling the buffer until every row is padding."""
    task = lengths_task(*[50] * 5, 3)
    assert packed_lengths(task, 10, 6, buffer_size=2, repeat=False) == [[10]] * 5 + [[3]]
    inputs, targets, _ = next(sft_data_generator_bos_bestfit(LengthTokenizer(), task, 1, 9, "cpu", buffer_size=2))
    assert inputs[0].tolist() == targets[0].tolist() == [150] * 9


def test_nothing_to_learn_is_passed_over(tokenizer, one_lane):
    """Prevents empty or answerless conversations from taking room, from stalling, and from being an error."""
    only_question = {"messages": [{"role": "user", "content": "Hello?"}]}
    answer_beyond_the_row = say("word " * 200, "never seen")
    task = [{"messages": []}, only_question, answer_beyond_the_row, say("Hi", "Hello"), {"messages": []}]
    T = 40
    batches = list(sft_data_generator_bos_bestfit(tokenizer, task, 1, T, "cpu", repeat=False))
    assert sum(state["targets"] for _, _, state in batches) == len(tokenizer.encode("Hello")) + 1
    assert batches[-1][2]["consumed"] == 5
    endless = islice(sft_data_generator_bos_bestfit(tokenizer, task, 1, T, "cpu"), 20)
    consumed = [state["consumed"] for _, _, state in endless]
    assert consumed == sorted(consumed) and consumed[-1] > 20
    nothing = sft_data_generator_bos_bestfit(tokenizer, task[:3], 2, T, "cpu")
    for inputs, targets, state in islice(nothing, 3):
        assert (targets == -1).all() and (inputs == tokenizer.get_bos_token_id()).all() and state["targets"] == 0


def test_an_all_padding_row():
    """Prevents the last padding token of an empty row from being trained on (an index of -1)."""
    inputs, targets = row_arrays([[]], 5, 7)
    assert inputs.tolist() == [[7] * 5] and targets.tolist() == [[-1] * 5]


def test_one_pass_has_every_conversation_once():
    """Prevents a validation that leaves out what stays in the buffer, or counts something twice."""
    lengths = [3 + (7 * i) % 17 for i in range(61)]
    lanes = ConversationLanes(LengthTokenizer(), lengths_task(*lengths), 20, buffer_size=24, repeat=False)
    seen = []
    while not lanes.is_finished():
        seen += [one.index for one in lanes.next_row()]
    assert sorted(seen) == list(range(61))


def test_passes_do_not_mix():
    """Prevents a conversation from being used again before the others of its lane were used at all."""
    lanes = ConversationLanes(LengthTokenizer(), lengths_task(*[3 + i % 11 for i in range(40)]), 20)
    seen = {lane: [] for lane in range(8)}
    for row in range(60):
        seen[row % 8] += [one.index for one in lanes.next_row()]
    for lane, indices in seen.items():
        mine = list(range(lane, 40, 8))
        for begin in range(0, len(indices) - 4, 5):
            assert sorted(indices[begin : begin + 5]) == mine


def test_the_rows_do_not_depend_on_the_processes():
    """Prevents losses that cannot be compared between one GPU and several."""
    task = lengths_task(*[3 + (5 * i) % 13 for i in range(50)])
    one = packed_lengths(task, 20, 32)
    for world_size in (2, 4, 8):
        ranks = [
            packed_lengths(task, 20, 32 // world_size, rank=rank, world_size=world_size) for rank in range(world_size)
        ]
        assert [ranks[row % world_size][row // world_size] for row in range(32)] == one


def test_lanes_for_every_number():
    """Prevents lanes without conversations in tiny tasks, and processes without a lane."""
    assert choose_conversation_lanes(1000, 1) == choose_conversation_lanes(1000, 4) == 8
    assert choose_conversation_lanes(1000, 3) == 3 and choose_conversation_lanes(1000, 16) == 16
    assert choose_conversation_lanes(3, 1) == 2 and choose_conversation_lanes(1, 2) == 2


@pytest.mark.parametrize("after", [1, 2, 7, 20])
def test_resuming_gives_the_same_batches(after, tokenizer):
    """Prevents a resumed run that repeats conversations or loses those that were waiting."""
    task = [say("word " * (i % 9), "answer " * (1 + i % 5)) for i in range(45)] + [{"messages": []}]

    def loader(state=None):
        return sft_data_generator_bos_bestfit(tokenizer, task, 2, 48, "cpu", buffer_size=32, resume_state_dict=state)

    batches = list(islice(loader(), after + 10))
    state = json.loads(json.dumps(batches[after - 1][2]))
    for (a, b, c), (d, e, f) in zip(batches[after:], islice(loader(state), 10), strict=True):
        assert torch.equal(a, d) and torch.equal(b, e) and c == f


def test_the_states_of_two_ranks_make_one():
    """Prevents a checkpoint of several processes that knows the lanes of rank 0 alone."""
    task = lengths_task(*[3 + (5 * i) % 13 for i in range(50)])
    whole = ConversationLanes(LengthTokenizer(), task, 20)
    for _ in range(6):
        whole.next_row()
    ranks = [ConversationLanes(LengthTokenizer(), task, 20, rank, 2) for rank in range(2)]
    for rank in ranks:
        for _ in range(3):
            rank.next_row()
    states = [rank.state() for rank in ranks]
    assert merge_conversation_states(states) == whole.state()
    with pytest.raises(UserError, match="Start it anew"):
        ConversationLanes(LengthTokenizer(), task, 20, state=states[0])


def test_batches_can_be_kept(tokenizer):
    """Prevents tensors that change under a caller who holds a whole step of them."""
    task = [say(f"question {i}", f"answer {i}") for i in range(30)]
    loader = sft_data_generator_bos_bestfit(tokenizer, task, 2, 32, "cpu")
    kept = [next(loader) for _ in range(4)]
    again = sft_data_generator_bos_bestfit(tokenizer, task, 2, 32, "cpu")
    for inputs, targets, _ in kept:
        fresh = next(again)
        assert torch.equal(inputs, fresh[0]) and torch.equal(targets, fresh[1])


def test_a_broken_conversation_is_named(tokenizer):
    """Prevents a traceback in the middle of training that does not say which of a million conversations it was."""
    task = [say("a", "b"), {"messages": [{"role": "assistant", "content": "b"}]}]
    with pytest.raises(UserError, match="conversation 1 of .* message 1 has the role 'assistant'"):
        preview_sft_rows(tokenizer, task, 2, 16)


def test_the_preview_adds_up():
    """Prevents a picture of the packing that is not the packing."""
    preview = preview_sft_rows(LengthTokenizer(), lengths_task(*range(3, 30)), 10, 31)
    for segments, padding in preview:
        assert sum(tokens for _, tokens, _ in segments) + padding == 32
        assert all(tokens == index + 3 and learned == tokens - 1 for index, tokens, learned in segments)
