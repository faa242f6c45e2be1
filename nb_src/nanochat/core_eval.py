# %% [markdown]
# ## CORE: asking them
#
# The model is never asked to say "B". Each possible answer is put behind the question, and the one that the model
# finds least surprising is its choice; or, where there is one answer only, every token of it must be the model's own
# first guess. Before the question stand up to ten solved ones, so that a model that has never been taught to answer
# can see what is wanted.
#
# Done one question at a time this takes longer than it should, for three reasons, and none of the remedies changes an
# answer:
#
# - The answers to one question share everything before them, often more than a thousand tokens. That is read once, and
#   each answer is read against the cache that it left.
# - Questions of similar length are read together, up to a number of tokens that fits.
# - Only a few positions of each text are scored, so only these go through the output head.

# %%
import math
import random
import re
import sys
import time
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from nanochat.core_bundle import CoreTask, load_core_tasks
from nanochat.engine import Engine
from nanochat.gpt import loss_chunk_rows
from nanochat.runtime import UserError, get_dist_info, is_ddp_initialized, print0
from nanochat.tokenizer import SPLIT_PATTERN

# %% [markdown]
# ### Which questions, after which examples
# The shuffle and the draws have fixed seeds, so every model gets the same exam. The draw depends on how many questions
# there are: with `max_per_task` the examples come from the questions that are kept, and scores of a part are not a
# part of the scores of the whole.


# %%
def core_question_order(n: int, max_per_task: int = -1) -> list[int]:
    """The questions to ask, as indices into the file of `n`: shuffled, then cut if max_per_task > 0. Section 13.3."""
    order = list(range(n))
    random.Random(1337).shuffle(order)
    return order[:max_per_task] if max_per_task > 0 else order


def draw_fewshot(position: int, n: int, num_fewshot: int) -> list[int]:
    """Which of the n questions asked are shown, solved, before the one at `position`; never itself. Section 13.3."""
    # what is drawn are places in a list that leaves `position` out; making that list n times would be n² work
    drawn = random.Random(1234 + position).sample(range(n - 1), num_fewshot)
    return [index + (index >= position) for index in drawn]


# %% [markdown]
# ### `core_prompts`
# Whitespace decides which tokens come out, so these few lines must be exact to the character.


# %%
def core_prompts(task: CoreTask, item: dict, fewshot: list[dict]) -> list[str]:
    """The texts to compare: one for each choice or context; for language modeling [without, with continuation].

    Spec section 13.2.
    """
    delimiter = task.delimiter
    if task.task_type == "multiple_choice":
        solved = [f"{shot['query']}{delimiter}{shot['choices'][shot['gold']]}\n\n" for shot in fewshot]
        return ["".join(solved) + f"{item['query']}{delimiter}{choice}" for choice in item["choices"]]
    if task.task_type == "schema":
        solved = [f"{shot['context_options'][shot['gold']]}{delimiter}{shot['continuation']}\n\n" for shot in fewshot]
        contexts = item["context_options"]
        return ["".join(solved) + f"{context}{delimiter}{item['continuation']}" for context in contexts]
    solved = [f"{shot['context'].strip()}{delimiter}{shot['continuation']}\n\n" for shot in fewshot]
    question = "".join(solved) + item["context"].strip() + delimiter
    return [question.strip(), question + item["continuation"]]  # models do not like to begin after a space


# %% [markdown]
# ### `CorePromptEncoder`
# The same solved examples stand in prompt after prompt. Our own split pattern always cuts between a line feed and
# anything that is not whitespace, and looks no further back or ahead than that, so what lies between two such places
# can be turned into tokens once and remembered. Other tokenizers make no such promise and get the whole text.

# %%
PARAGRAPH_START = re.compile(r"(?<=\n)(?=\S)")


class CorePromptEncoder:
    """Token ids of whole prompts, <|bos|> first; the same ids as `tokenizer.encode` gives, sooner."""

    def __init__(self, tokenizer):
        self.tokenizer, self.bos = tokenizer, tokenizer.get_bos_token_id()
        self.by_paragraph = getattr(getattr(tokenizer, "encoding", None), "_pat_str", None) == SPLIT_PATTERN
        self.known: dict[str, list[int]] = {}

    def encode(self, prompts: list[str]) -> list[list[int]]:
        if not self.by_paragraph:
            return self.tokenizer.encode(prompts, prepend=self.bos)
        split_prompts = [PARAGRAPH_START.split(prompt) for prompt in prompts]
        new = list({piece for pieces in split_prompts for piece in pieces if piece not in self.known})
        self.known.update(zip(new, self.tokenizer.encode(new), strict=True))
        encoded = []
        for pieces in split_prompts:
            ids = [self.bos]
            for piece in pieces:
                ids += self.known[piece]
            encoded.append(ids)
        return encoded


# %% [markdown]
# ### `scored_sequences`
# Which tokens of a text count. For endings: all after what the choices have in common. For beginnings: what the
# contexts have in common at the end. "In common" is decided on tokens, not letters, because tokens are what the model
# predicts.


# %%
@dataclass(frozen=True)
class ScoredSequence:
    """Token ids beginning with <|bos|>, of which tokens[start:end] are scored; nothing is when start >= end."""

    tokens: list[int]
    start: int
    end: int

    @property
    def empty(self) -> bool:
        return self.start < 1 or self.start >= self.end  # the first token of all is predicted by nothing


def common_prefix_length(sequences: list[list[int]]) -> int:
    """How many tokens all sequences begin with."""
    first, last = min(sequences), max(sequences)  # in dictionary order: all others lie between these two
    for index, (a, b) in enumerate(zip(first, last, strict=False)):
        if a != b:
            return index
    return min(len(first), len(last))


def scored_sequences(task_type: str, token_lists: list[list[int]], place: str) -> list[ScoredSequence]:
    """Sequences and spans of one question from the ids of its prompts; one sequence for language modeling.

    place: file and line, for the UserError when a continuation's first token has merged with the text before it.
    Spec section 13.4.
    """
    if task_type == "multiple_choice":
        start = common_prefix_length(token_lists)
        return [ScoredSequence(tokens, start, len(tokens)) for tokens in token_lists]
    if task_type == "schema":
        suffix = common_prefix_length([tokens[::-1] for tokens in token_lists])
        return [ScoredSequence(tokens, len(tokens) - suffix, len(tokens)) for tokens in token_lists]
    without, whole = token_lists
    if len(without) >= len(whole) or whole[: len(without)] != without:
        raise UserError(
            f"{place}: the tokens of the context are not the beginning of the tokens of context and continuation, so "
            "it cannot be told which ones to score. Begin the continuation with a new word, or change the task's "
            "continuation_delimiter."
        )
    return [ScoredSequence(whole, len(without), len(whole))]


def cropped_sequence(sequence: ScoredSequence, limit: int, place: str) -> ScoredSequence:
    """The last `limit` tokens. Raises UserError when the scored ones do not fit. Spec section 13.4."""
    excess = len(sequence.tokens) - limit
    if excess <= 0:
        return sequence
    cropped = ScoredSequence(sequence.tokens[excess:], sequence.start - excess, sequence.end - excess)
    if cropped.start < 1 and not sequence.empty:
        raise UserError(
            f"{place}: {sequence.end - sequence.start} tokens are to be scored and the model reads at most {limit}. "
            "Leave the question out, or use a model with a longer context."
        )
    return cropped


# %% [markdown]
# ### `score_rows`
# Where the numbers come from. Rows of different lengths are padded on the right, which nothing before the padding can
# see. The hidden states of scored positions are picked out, and the head runs over these alone, some at a time.

# %%
CORE_PAD_ID = 0  # any token will do: what stands behind a text cannot change it


def padded_rows(rows: list[list[int]]):  # -> (B, T) int64
    ids = torch.full((len(rows), max(map(len, rows))), CORE_PAD_ID)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    return ids


def span_logits(model, ids, lengths, counts, kv_cache=None):  # ids (B, T); lengths, counts (B,) on the CPU
    """Yield the logits of the last counts[b] of the lengths[b] positions of each row in order, (m, V) at a time."""
    rows = torch.arange(len(ids)).repeat_interleave(counts).to(ids.device)
    if not len(rows):
        return
    before_end = torch.cat([torch.arange(-count, 0) for count in counts.tolist()]).to(ids.device)
    lengths = lengths.to(ids.device)
    if hasattr(model, "logits_at"):  # a model from elsewhere, wrapped
        yield from model.logits_at(ids, rows, lengths[rows] + before_end)
        return
    if kv_cache is None:
        hidden = model.trunk(ids, ends=lengths, n=int(counts.max()))[rows, before_end]
    else:
        hidden = model.trunk(ids, kv_cache)[rows, lengths[rows] + before_end]
    for chunk in hidden.split(loss_chunk_rows(hidden.device)):
        yield model.head(chunk)


def score_rows(model, spans: list[tuple[list[int], list[int]]], by_loss: bool, device, kv_cache=None) -> list:
    """One value for each row: the mean loss of its targets in nats, or (by_loss False) whether all are predicted.

    spans: (inputs, targets) for each row; the targets are what should follow the last inputs, one each. A row without
    targets gets nan or True. kv_cache: holds what comes before the inputs.
    """
    lengths, counts = (torch.tensor([len(each) for each in column]) for column in zip(*spans, strict=True))
    ids = padded_rows([inputs for inputs, _ in spans])
    targets = torch.tensor([target for _, targets in spans for target in targets], dtype=torch.long).to(device)
    values, done = [], 0
    for logits in span_logits(model, ids.to(device), lengths, counts, kv_cache):
        wanted = targets[done : done + len(logits)]
        done += len(logits)
        values.append(F.cross_entropy(logits, wanted, reduction="none") if by_loss else logits.argmax(-1) == wanted)
    values = torch.cat(values).cpu().split(counts.tolist()) if values else [torch.empty(0)] * len(spans)
    return [value.mean().item() if by_loss else bool(value.all()) for value in values]


# %% [markdown]
# ### `score_questions`
# The batches. A question whose answers share a beginning gives that to the cache in one row. Then come rounds: one
# answer of each question, all questions side by side, after which the cache is told to forget it. So nothing is
# copied, and the memory is that of one answer however many there are.

# %%
CORE_BATCH_TOKENS = {"cpu": 2048}  # read together, padding included
CORE_BATCH_TOKENS_GPU = 64 * 512
CACHED_BATCHES = 4  # whose answers are read together: these are short, and so many small batches would waste time
MIN_SHARED_TOKENS = 16  # a shorter beginning is read again with each answer


def token_batches(sizes: list[tuple[int, int]], budget: int) -> list[list[int]]:
    """Group items of (rows, length), similar lengths together, so that rows · longest stays within the budget."""
    batches, batch, n_rows = [], [], 0
    for index in sorted(range(len(sizes)), key=lambda index: sizes[index][1]):
        rows, length = sizes[index]
        if batch and (n_rows + rows) * length > budget:
            batches.append(batch)
            batch, n_rows = [], 0
        batch.append(index)
        n_rows += rows
    return batches + [batch] if batch else batches


def position_limit(model) -> int:
    """The most tokens that a model can be given: `max_seq_len` if it has one, else all its rotary positions."""
    return getattr(model, "max_seq_len", None) or model.cos.size(1)


def shared_length(sequences: list[ScoredSequence]) -> int:
    """How many tokens need to be read only once for all of them."""
    if len(sequences) < 2:
        return 0
    # the last shared token is read with each answer: its prediction is the first to be scored
    shared = common_prefix_length([sequence.tokens for sequence in sequences])
    return min(shared, min(sequence.start for sequence in sequences) - 1)


def span_after(sequence: ScoredSequence, offset: int = 0) -> tuple[list[int], list[int]]:
    """(inputs, targets) for `score_rows` when `offset` tokens are in the cache; the last token is no input."""
    return sequence.tokens[offset : sequence.end - 1], sequence.tokens[sequence.start : sequence.end]


def score_shared(model, questions: list[list[ScoredSequence]], shared: list[int], budget: int, device) -> list:
    """Mean losses of the sequences of questions whose first shared[i] tokens are the same in each of them."""
    room = max(max(len(s.tokens) for s in sequences) - n for sequences, n in zip(questions, shared, strict=True))
    cache = Engine(model, None).new_cache(len(questions), max(shared) + room)
    rows_at_once = max(1, budget // max(shared))
    for first in range(0, len(questions), rows_at_once):
        rows = slice(first, first + rows_at_once)
        beginnings = [sequences[0].tokens[:n] for sequences, n in zip(questions[rows], shared[rows], strict=True)]
        ids = padded_rows(beginnings).to(device)
        lengths = torch.tensor(shared[rows], device=device)
        model.trunk(ids, cache.part(first, first + len(ids)), ends=lengths)  # its last layer only caches
    losses = [[] for _ in questions]
    for turn in range(max(map(len, questions))):
        cache.set_lengths(shared)  # what the last round wrote is forgotten
        turns = [turn < len(sequences) for sequences in questions]
        spans = [
            span_after(sequences[turn], n) if here else ([CORE_PAD_ID], [])
            for sequences, n, here in zip(questions, shared, turns, strict=True)
        ]
        values = score_rows(model, spans, True, device, cache)
        for row, value, here in zip(losses, values, turns, strict=True):
            if here:
                row.append(value)
    return losses


@torch.no_grad()
def score_questions(model, questions: list[list[ScoredSequence]], by_loss: bool, device):
    """Yield (index, values) for each question, not in order: a value for each sequence, as `score_rows` gives it.

    A sequence with nothing to score has the loss nan.
    """
    budget, limit = CORE_BATCH_TOKENS.get(device.type, CORE_BATCH_TOKENS_GPU), position_limit(model)
    distinct, shared = [], []  # equal sequences are read once, and then tie exactly
    for sequences in questions:
        live = {tuple(s.tokens): s for s in sequences if not s.empty}
        distinct.append(sorted(live.values(), key=lambda s: len(s.tokens)))  # so that rounds are of similar lengths
        shared.append(shared_length(distinct[-1]) if by_loss and hasattr(model, "trunk") else 0)
    longest = [max((len(s.tokens) for s in sequences), default=0) for sequences in distinct]

    def values_of(index: int, values: list):
        by_tokens = {tuple(s.tokens): value for s, value in zip(distinct[index], values, strict=True)}
        return index, [math.nan if s.empty else by_tokens[tuple(s.tokens)] for s in questions[index]]

    together = [i for i, n in enumerate(shared) if n >= MIN_SHARED_TOKENS]
    for batch in token_batches([(1, longest[i]) for i in together], CACHED_BATCHES * budget):
        batch = [together[i] for i in batch]
        room = max(longest[i] - shared[i] for i in batch)
        if max(shared[i] for i in batch) + room > limit:  # padded, the answers would leave the rotary tables
            for i in batch:
                shared[i] = 0
            continue
        losses = score_shared(model, [distinct[i] for i in batch], [shared[i] for i in batch], budget, device)
        yield from map(values_of, batch, losses)

    apart = [i for i, n in enumerate(shared) if n < MIN_SHARED_TOKENS]
    for batch in token_batches([(len(distinct[i]), longest[i]) for i in apart], budget):
        batch = [apart[i] for i in batch]
        spans = [span_after(sequence) for i in batch for sequence in distinct[i]]
        values = iter(score_rows(model, spans, by_loss, device) if spans else ())
        yield from (values_of(i, [next(values) for _ in distinct[i]]) for i in batch)


# %% [markdown]
# ### `score_examples`
# The questions of one task that are this process's to ask.

# %%
CORE_QUESTIONS_AT_ONCE = 1024  # tokenized and sorted together; bounds the memory for their tokens


@dataclass(frozen=True)
class CoreAnswer:
    """What the model answered. choice: index of the option it took; None for language modeling."""

    line_number: int  # of the question in its file
    correct: bool
    choice: int | None


def check_fewshot_pool(task: CoreTask, max_per_task: int) -> None:
    """Raise UserError when `max_per_task` leaves too few questions to draw the solved ones from."""
    if 0 < max_per_task <= task.num_fewshot:
        raise UserError(
            f"{task.label} asks each question after {task.num_fewshot} others, so max_per_task {max_per_task} is too "
            f"small: it must be at least {task.num_fewshot + 1}, or -1 for all."
        )


def least_loss(losses: list[float]) -> int:
    """Index of the smallest loss, the first on ties. nan neither wins over a number nor is beaten by one."""
    return min(range(len(losses)), key=losses.__getitem__)


def score_examples(
    model, tokenizer, task: CoreTask, device, max_per_task: int = -1, rank: int = 0, world_size: int = 1, report=None
) -> list[CoreAnswer]:
    """The answers to every `world_size`-th question of a task, in the order in which they are asked.

    report: called without arguments after each answer. Raises UserError when max_per_task is too small, or naming file
    and line when a question cannot be scored.
    """
    device = torch.device(device)
    check_fewshot_pool(task, max_per_task)
    order = core_question_order(len(task.examples), max_per_task)
    encoder, limit, by_loss = CorePromptEncoder(tokenizer), position_limit(model), task.task_type != "language_modeling"
    mine, answers = range(rank, len(order), world_size), []
    for begin in range(0, len(mine), CORE_QUESTIONS_AT_ONCE):
        positions = mine[begin : begin + CORE_QUESTIONS_AT_ONCE]
        prompts = []
        for position in positions:
            fewshot = [task.examples[order[i]] for i in draw_fewshot(position, len(order), task.num_fewshot)]
            prompts.append(core_prompts(task, task.examples[order[position]], fewshot))
        token_lists = iter(encoder.encode([prompt for variants in prompts for prompt in variants]))
        questions = []
        for position, variants in zip(positions, prompts, strict=True):
            place = task.place(order[position])
            sequences = scored_sequences(task.task_type, [next(token_lists) for _ in variants], place)
            questions.append([cropped_sequence(sequence, limit, place) for sequence in sequences])
        found = [None] * len(questions)
        for i, values in score_questions(model, questions, by_loss, device):
            index = order[positions[i]]
            choice = least_loss(values) if by_loss else None
            correct = choice == task.examples[index]["gold"] if by_loss else values[0]
            found[i] = CoreAnswer(task.line_numbers[index], correct, choice)
            if report is not None:
                report()
        answers += found
    return answers


# %% [markdown]
# ### `evaluate_core`
# Guessing gives 25 % on one task and 0 % on another, so each accuracy is *centred*: 0 is guessing, 1 is perfect, below
# 0 is worse than guessing. CORE is the mean of that over the tasks.


# %%
def centered_accuracy(accuracy: float, baseline: float) -> float:
    """(accuracy − chance) / (1 − chance), with the baseline in percent. Spec section 13.6."""
    return (accuracy - 0.01 * baseline) / (1 - 0.01 * baseline)


def core_log_line(task: CoreTask, accuracy: float, centered: float, seconds: float) -> str:
    """What is printed when a task is done, in columns. Spec section 13.6."""
    kind = f"({task.num_fewshot}-shot, type: {task.task_type})"
    scores = f"accuracy: {accuracy:.4f} | centered: {centered:.4f} | time: {seconds:.2f}s"
    return f"Evaluating: {task.label:<32} {kind:<34}... {scores}"


def question_work(task: CoreTask) -> float:
    """Characters to read for a question of this task, roughly: the unit of the progress bar."""
    sample = task.examples[:100]
    return (task.num_fewshot + 1) * sum(len(str(item)) for item in sample) / len(sample)


def evaluate_core(model, tokenizer, device, bundle_dir, max_per_task: int = -1, done=None, keep=None) -> dict:
    """Ask a model all tasks of a bundle, or the first `max_per_task` questions of each if that is > 0. Section 13.

    model: a `GPT` or a `TransformersModel`. tokenizer: gives `encode` and `get_bos_token_id`.
    keep: called after each task with the numbers of all that are finished. done: such numbers of an earlier run; those
    tasks are not asked again.
    Returns {"results": accuracy, "centered_results", "correct", "questions", "seconds": each by label, "core_metric"}.
    Every rank must call it: they share the questions, and all get the same result. Raises UserError, before the first
    question is asked, for a bundle or a max_per_task that cannot be used.
    """
    tasks = load_core_tasks(bundle_dir)
    for task in tasks:
        check_fewshot_pool(task, max_per_task)
    _, rank, _, world_size = get_dist_info()
    asked = {task.label: len(core_question_order(len(task.examples), max_per_task)) for task in tasks}
    work = {task.label: question_work(task) for task in tasks}
    outcome = {name: {} for name in ("results", "centered_results", "correct", "questions", "seconds")}
    done = dict(done or {})  # label -> its number under each of these names
    was_training = model.training
    model.eval()
    with tqdm(
        total=sum(work[label] * len(range(rank, n, world_size)) for label, n in asked.items() if label not in done),
        file=sys.stdout, mininterval=1, bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}",
        disable=rank != 0,
    ) as bar:  # fmt: skip
        for task in tasks:
            label, started = task.label, time.perf_counter()
            if label in done:
                continue
            bar.set_description_str(f"CORE: {label}", refresh=False)
            report = partial(bar.update, work[label])
            answers = score_examples(model, tokenizer, task, device, max_per_task, rank, world_size, report)
            correct = torch.tensor(sum(answer.correct for answer in answers), dtype=torch.int64, device=device)
            if is_ddp_initialized():
                dist.all_reduce(correct)
            accuracy = correct.item() / asked[label]
            centered, seconds = centered_accuracy(accuracy, task.baseline), time.perf_counter() - started
            done[label] = [accuracy, centered, correct.item(), asked[label], seconds]
            bar.clear()
            print0(core_log_line(task, accuracy, centered, seconds))
            if keep is not None:
                keep(done)
    model.train(was_training)
    for task in tasks:
        for name, number in zip(outcome, done[task.label], strict=True):
            outcome[name][task.label] = number
    outcome["core_metric"] = sum(outcome["centered_results"].values()) / len(tasks)
    return outcome
