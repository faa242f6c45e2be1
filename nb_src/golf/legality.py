# %% [markdown]
# ## The legality prover
#
# A scorer that trains while it scores can cheat in many ways, most of them by accident: a mask that lets one token of
# the future through, a step taken a moment too early, a target counted twice. Each of them makes a better score. So the
# four rules of the challenge (issue 1017 of openai/parameter-golf) are not argued about here but tried out, on the
# complete scorer with all its training:
#
# 1. The distribution for target t depends on tokens 0 to t only. So replace everything after token t by other text, and
#    nothing up to there may move: no earlier score, and not one probability of target t.
# 2. It is a distribution, over the whole vocabulary, and the score is the one that it gives to the token that came.
# 3. A score is final before anything is learned from its token.
# 4. Every target is scored, and once.
#
# The scorer is a function of a stream and a watch. The watch hears of every score and every training step. What it is
# told can be a lie, which is why the first rule is tested by experiment and does not rely on it.

# %%
import math
import random
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist

from golf.golf_tokenizers import BOS_ID, BpbSums, ByteTables
from nanochat.runtime import UserError, is_ddp_initialized

# %% [markdown]
# ### `LegalityWatch`
# The listener. It keeps the score of each target, counts how often it came, and writes down the order of events.


# %%
class ScoringEvent(NamedTuple):
    """kind: "score" or "update", of targets first..last. document: the only targets that an update can touch."""

    kind: str
    first: int
    last: int
    document: range | None = None


def sum_over_processes(tensor: torch.Tensor, op=None) -> torch.Tensor:
    """A CPU tensor reduced over all ranks (default: summed). Every rank must call it."""
    if not is_ddp_initialized():
        return tensor
    moved = tensor.to("cuda" if dist.get_backend() == "nccl" else "cpu", copy=True)
    dist.all_reduce(moved, op=op or dist.ReduceOp.SUM)
    return moved.cpu()


class LegalityWatch:
    """What a scorer did on this rank, and after `merge_ranks` the scores of all ranks.

    wanted: the targets whose distributions are kept.
    """

    def __init__(self, n_targets: int, wanted: Iterable[int] = ()):
        self.wanted = set(wanted)
        self.nats = torch.zeros(n_targets, dtype=torch.float64)
        self.counts = torch.zeros(n_targets, dtype=torch.int64)
        self.event_of = torch.full((n_targets,), -1)  # the event that scored a target
        self.events: list[ScoringEvent] = []
        self.log_probs: dict[int, torch.Tensor] = {}
        self.on_cpu = True

    def scored(self, targets, nats: torch.Tensor) -> None:
        """targets: a range or a 1-D tensor. nats: (n,)."""
        if isinstance(targets, range):
            targets = torch.arange(targets.start, targets.stop)
        self.nats[targets] = nats.detach().double().cpu()
        self.counts.index_add_(0, targets, torch.ones_like(targets))
        self.event_of[targets] = len(self.events)
        self.events.append(ScoringEvent("score", int(targets.min()), int(targets.max())))
        self.on_cpu &= nats.device.type == "cpu"

    def updated(self, targets, document: range | None = None) -> None:
        """Something is about to be learned from these targets. document: as in `ScoringEvent`."""
        self.events.append(ScoringEvent("update", int(min(targets)), int(max(targets)), document))

    def distribution(self, target: int, log_probs: torch.Tensor) -> None:
        """log_probs: (V,), of every token that could follow."""
        self.log_probs[target] = log_probs.detach().float().cpu()

    def merge_ranks(self) -> None:
        """Collect scores, counts and distributions. Every rank must call it; events stay those of one rank."""
        self.nats, self.counts = sum_over_processes(self.nats), sum_over_processes(self.counts)
        if is_ddp_initialized() and self.wanted:
            wanted = sorted(self.wanted)
            width = torch.tensor(max(map(len, self.log_probs.values()), default=0))
            shown = torch.zeros(len(wanted), int(sum_over_processes(width, dist.ReduceOp.MAX)) + 1)
            for row, target in zip(shown, wanted, strict=True):
                if target in self.log_probs:
                    row[0] = 1
                    row[1:] = self.log_probs[target]
            shown = sum_over_processes(shown)
            self.log_probs = {target: row[1:] for target, row in zip(wanted, shown, strict=True) if row[0] == 1}


def watched_run(scorer, stream, wanted=()) -> tuple[LegalityWatch, BpbSums | None]:
    """One run of a scorer and what was seen of it, on all ranks."""
    watch = LegalityWatch(len(stream) - 1, wanted)
    sums = scorer(stream, watch)
    watch.merge_ranks()
    return watch, sums


# %% [markdown]
# ### `border_targets`
# Mistakes live at borders: where a batch of windows begins, where a chunk ends and has just been learned from, around
# the begin of a document, at both ends of the stream. They are all visible in one run, so nobody has to tell where
# they are. A few targets are drawn at random, for the mistakes that live elsewhere.


# %%
def border_targets(watch: LegalityWatch, stream, number: int, seed: int, borders: Iterable[int] = ()) -> list[int]:
    """`number` targets at which to look, some of each kind. borders: further first targets of something."""
    n_targets = len(stream) - 1
    marks = torch.zeros(2, n_targets, dtype=torch.int64)
    for event in watch.events:
        place = event.first if event.kind == "score" else event.last
        marks[0 if event.kind == "score" else 1, place] = 1
    begins, trained = (row.nonzero()[:, 0].tolist() for row in sum_over_processes(marks))
    documents = (stream[:-1] == BOS_ID).nonzero()[:, 0].tolist()
    draw = random.Random(f"legality {seed}")
    kinds = [
        [t for first in [*begins, *borders] for t in (first - 1, first)],
        [t for last in trained for t in (last, last + 1)],
        [t for first in documents for t in (first - 1, first, first + 1)],
        draw.choices(range(n_targets), k=number),
    ]
    for kind in kinds:
        draw.shuffle(kind)
    # the two ends first, then the end of the first batch and the begin of the last
    order = [0, n_targets - 1, *(first - 1 for first in begins[1:2]), *begins[-1:]]
    while any(kinds):
        order += [kind.pop() for kind in kinds if kind]
    return sorted(list(dict.fromkeys(t for t in order if 0 <= t < n_targets))[:number])


# %% [markdown]
# ### Check 1: causality
# Everything after token t is replaced by tokens from elsewhere in the stream. What came before must stay the same, to
# the last bit on a CPU. Every other time the new text consists of a few tokens only and has new documents, too: which
# tokens will occur, and the number and lengths of the documents, are also in the future. A scorer that sorts documents
# by length then batches others together, and the order of additions in a matrix product may change, as it may on a GPU;
# this much is tolerated.
#
# If no score moved at all, the scorer does not read what it is given, and the experiment has shown nothing.

# %%
ROUNDING_TOLERANCE = 1e-5  # nats


class LegalityFinding(NamedTuple):
    """One line of the report. verdict: "ok" or "WRONG"."""

    check: str
    tested: str
    found: str
    verdict: str


def legality_finding(check: str, tested: str, problems: list[str], found: str) -> LegalityFinding:
    """found: what to say when there is no problem; otherwise the first one is told, and how many follow."""
    if problems:
        found = problems[0] + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")
    return LegalityFinding(check, tested, found, "WRONG" if problems else "ok")


def replaced_after(stream: torch.Tensor, t: int, seed: int, keep_documents: bool) -> torch.Tensor:
    """The stream with other tokens after token t; the next one is certainly another.

    keep_documents: documents begin where they began, except that token t + 1 is replaced in any case. Otherwise they
    begin anywhere, and all text is of eight tokens: a scorer that knows which tokens occur would not notice a shuffle.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + t)

    def draw(tokens, n):
        return tokens[torch.randint(len(tokens), (n,), generator=generator)]

    begins = stream == BOS_ID
    text = stream if begins.all() else stream[~begins]
    if not keep_documents:
        kinds = text.unique()
        text = torch.cat([kinds[torch.randperm(len(kinds), generator=generator)[:8]], stream[begins][:1]])
    new = draw(text, len(stream))
    if keep_documents:
        new[begins] = BOS_ID
    others = text[text != stream[t + 1]]
    if len(others):
        new[t + 1 : t + 2] = draw(others, 1)
    return torch.cat([stream[: t + 1], new[t + 1 :]])


def prove_causality(scorer, stream, base: LegalityWatch, targets: list[int], seed: int) -> LegalityFinding:
    """base: a run on the stream as it is, that kept the distributions of `targets`. One more run for each of them."""
    problems, largest, any_moved = [], 0.0, False
    for i, t in enumerate(targets):
        changed = replaced_after(stream, t, seed, keep_documents=i % 2 == 0)
        exact = base.on_cpu and torch.equal(changed == BOS_ID, stream == BOS_ID)
        tolerance = 0.0 if exact else ROUNDING_TOLERANCE
        watch, _ = watched_run(scorer, changed, {t})
        moved = (watch.nats[:t] - base.nats[:t]).abs()
        if not (moved <= tolerance).all():
            at = int((~(moved <= tolerance)).nonzero()[0])
            problems.append(f"with new text after token {t} the score of target {at} moved by {moved[at]:.2g} nats")
        if t in base.log_probs:
            shown = watch.log_probs.get(t, torch.full_like(base.log_probs[t], math.nan))
            change = (shown - base.log_probs[t]).abs().max().item()
            largest = max(largest, change)
            if not change <= tolerance:
                problems.append(f"with new text after token {t} the distribution of target {t} moved by {change:.2g}")
        largest = max([largest, *moved.tolist()])
        any_moved |= not torch.equal(watch.nats[t:], base.nats[t:])
    if not any_moved:
        problems.append("no score moved at all: the scorer does not read the stream that it is given")
    found = f"scores before each and its distribution moved by at most {largest:.2g} nats"
    return legality_finding("1 causality", f"new text after {len(targets)} of {len(base.nats)} tokens", problems, found)


# %% [markdown]
# ### Check 2: normalisation
# All probabilities of the vocabulary add up to one, and the score is the logarithm of one of them.

# %%
NORMALISATION_TOLERANCE = 1e-4


def prove_normalisation(stream, base: LegalityWatch) -> LegalityFinding:
    """For all targets that the run was asked to show."""
    problems, excess, difference = [], 0.0, 0.0
    for t in sorted(base.wanted):
        if t not in base.log_probs:
            if base.counts[t]:
                problems.append(f"no distribution was shown for target {t}")
            continue
        log_probs = base.log_probs[t].double()
        total = log_probs.logsumexp(0).item()
        apart = (base.nats[t] + log_probs[int(stream[t + 1])]).abs().item()
        if not abs(total) <= NORMALISATION_TOLERANCE:
            problems.append(f"the probabilities for target {t} add up to {math.exp(total):.6g}")
        if not apart <= NORMALISATION_TOLERANCE:
            problems.append(f"the score of target {t} is not that of its distribution: {apart:.2g} nats apart")
        excess, difference = max(excess, abs(total)), max(difference, apart)
    found = f"|log of the sum| at most {excess:.1g}, scores within {difference:.1g} nats"
    return legality_finding("2 distributions", f"{len(base.wanted)} targets", problems, found)


# %% [markdown]
# ### Check 3: score before update
# At every training step the newest target that it uses must have its score already, and no target up to there may get
# a score later. A step that can touch one document only is compared with the targets of that document.


# %%
def prove_update_order(watch: LegalityWatch) -> LegalityFinding:
    """Over all ranks, that must call it. watch: a run on the unchanged stream."""
    n_targets = len(watch.event_of)
    newest, before, after, shared = [], [], [], []
    for i, event in enumerate(watch.events):
        if event.kind == "update":
            scope = event.document or range(n_targets)
            at = watch.event_of[scope.start : scope.stop]
            earlier, later = ((at >= 0) & (at < i)).nonzero(), (at > i).nonzero()
            newest.append(event.last)
            before.append(scope.start + int(earlier.max()) if len(earlier) else -1)
            after.append(scope.start + int(later.min()) if len(later) else n_targets)
            shared.append(event.document is None)
    counts = torch.tensor([sum(shared), -sum(shared)])
    if is_ddp_initialized():
        counts = sum_over_processes(counts, dist.ReduceOp.MAX)
    problems = []
    if counts[0] != -counts[1]:
        problems.append(f"a rank took {int(counts[0])} steps on the whole stream and another {-int(counts[1])}")
    elif counts[0] and is_ddp_initialized():  # these steps are taken together, and the targets before them divided up
        together = torch.tensor(shared, dtype=torch.bool)
        pairs = torch.tensor([before, [-t for t in after]])
        pairs[:, together] = sum_over_processes(pairs[:, together], dist.ReduceOp.MAX)
        before, after = pairs[0].tolist(), (-pairs[1]).tolist()
    for used, scored, next_scored in zip(newest, before, after, strict=True):
        if used > scored:
            problems.append(f"a step learned from target {used} when targets up to {scored} had been scored")
        elif used >= next_scored:
            problems.append(f"a step learned from targets up to {used}, and target {next_scored} was scored after it")
    wrong, steps = sum_over_processes(torch.tensor([len(problems), len(newest)])).tolist()
    if wrong and not problems:
        problems = ["another rank learned from targets before they were scored"]
    found = "each learned from scored targets only" if steps else "nothing is learned while scoring"
    return legality_finding("3 score before update", f"{steps} training steps", problems, found)


# %% [markdown]
# ### Check 4: every target once
# Counted over all processes, and compared with the sums that the scorer reports.


# %%
def prove_score_once(stream, watch: LegalityWatch, sums: BpbSums | None, byte_tables=None) -> LegalityFinding:
    """sums: what the scorer returned. byte_tables: for the bytes of the whole stream."""
    problems = []
    for what, wrong in (("never scored", watch.counts == 0), ("scored more than once", watch.counts > 1)):
        if wrong.any():
            first = int(wrong.nonzero()[0])
            problems.append(f"{int(wrong.sum())} targets were {what}, the first of them {first}")
    if sums is not None:
        nats, n_targets, n_bytes = sums.sums.tolist()
        expected = watch.nats.sum().item()
        if not math.isclose(nats, expected, rel_tol=1e-9):
            problems.append(f"the scorer reports {nats:.6f} nats, and its scores add up to {expected:.6f}")
        if n_targets != len(watch.counts):
            problems.append(f"the scorer reports {n_targets:.0f} targets of {len(watch.counts)}")
        if byte_tables is not None:
            whole = ByteTables(*(table.cpu() for table in byte_tables)).stream_bytes(stream)
            if n_bytes != whole:
                problems.append(f"the scorer reports {n_bytes:.0f} bytes, and the stream has {whole}")
    return legality_finding("4 every target once", f"{len(watch.counts)} targets", problems, "each scored exactly once")


# %% [markdown]
# ### `prove_legality`
# All four, and one thing before them: the same text must give the same scores again. A scorer that keeps what it
# learned would read the text a second time, knowing it.


# %%
def prove_legality(
    scorer: Callable,
    stream: torch.Tensor,
    byte_tables=None,
    number: int = 12,
    borders: Iterable[int] = (),
    seed: int = 0,
) -> tuple[list[LegalityFinding], LegalityWatch]:
    """Try a scorer on a stream; it runs number + 2 times. Golf spec sections 0.2 and 8, checks 3 to 6.

    scorer(stream, watch): scores a stream of that length and returns BpbSums or None; see `report_scores` for what a
    watch is told, and `score_with_sgd_ttt` and `score_with_lora_ttt` for its `updated`. borders: first targets of
    windows or whatever else deserves a look, beside the borders that the prover finds. Returns the findings and the
    watch of a run, for `order_of_events`. Every rank must call it, with the same arguments; all get the same verdicts.
    """
    stream = stream.to("cpu", torch.int64)
    if len(stream) < 2 or number < 1:
        raise UserError("there is nothing to prove: give a stream of two tokens or more and at least one target.")
    first, _ = watched_run(scorer, stream)
    targets = border_targets(first, stream, number, seed, borders)
    sampled = random.Random(f"sampled {seed}").choices(range(len(stream) - 1), k=5 * number)
    base, sums = watched_run(scorer, stream, {*targets, *sampled})
    moved = (base.nats - first.nats).abs().max().item()
    same = moved <= (0.0 if base.on_cpu else ROUNDING_TOLERANCE)
    again = [] if same else [f"the second time a score moved by {moved:.2g} nats"]
    findings = [
        legality_finding("0 no memory of a run", "the same stream twice", again, "the same scores"),
        prove_causality(scorer, stream, base, targets, seed),
        prove_normalisation(stream, base),
        prove_update_order(base),
        prove_score_once(stream, base, sums, byte_tables),
    ]
    return findings, base


# %% [markdown]
# ### What to show
# The verdicts as one table, and the order of score and update as another. Scores that follow each other without a step
# between them are one row.

# %%
LEGALITY_HEADER = ("check", "tested", "found", "verdict")
EVENT_HEADER = ("event", "targets", "batches or steps", "touches")


def legality_rows(findings: list[LegalityFinding]) -> list[tuple]:
    """Rows for a table under LEGALITY_HEADER."""
    return [tuple(each) for each in findings]


def order_of_events(watch: LegalityWatch, limit: int = 12) -> list[tuple[str, str, int, str]]:
    """What happened on this rank, rows for a table under EVENT_HEADER; the first `limit` of them."""
    rows: list[list] = []
    for event in watch.events:
        touches = "" if event.kind == "score" else "everything after it" if event.document is None else "its document"
        follows = bool(rows) and rows[-1][0] == event.kind and rows[-1][4] == event.document
        if follows and event.kind == "score" and event.first == rows[-1][2] + 1:
            rows[-1][2:4] = event.last, rows[-1][3] + 1
        elif follows and event.kind == "update" and (event.first, event.last) == tuple(rows[-1][1:3]):
            rows[-1][3] += 1
        else:
            rows.append([event.kind, event.first, event.last, 1, event.document, touches])
    return [(kind, f"{first:,} to {last:,}", n, touches) for kind, first, last, n, _, touches in rows[:limit]]
