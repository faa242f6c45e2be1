from functools import partial

import pytest
import torch
import torch.nn.functional as F
from test_golf_scoring import byte_tables, golf_model, recurrent_model
from test_golf_ttt import SMALL, documents_stream

from golf.golf_scoring import report_scores, score_banded, score_stream, scoring_windows, window_losses
from golf.golf_tokenizers import BpbSums, ByteTables
from golf.golf_ttt import TTTSettings, score_with_lora_ttt, score_with_sgd_ttt, stream_documents
from golf.legality import (
    EVENT_HEADER,
    LEGALITY_HEADER,
    LegalityWatch,
    border_targets,
    legality_rows,
    order_of_events,
    prove_legality,
    replaced_after,
)
from nanochat.runtime import UserError

pytestmark = pytest.mark.usefixtures("one_thread")

L, S = 16, 4
TABLES, SETTINGS = byte_tables(), TTTSettings(**SMALL)


def wrong(scorer, number: int = 10, **arguments) -> set[str]:
    """The numbers of the checks that fail."""
    findings, _ = prove_legality(scorer, documents_stream(), TABLES, number=number, **arguments)
    assert [finding.check[0] for finding in findings] == list("01234")
    return {finding.check[0] for finding in findings if finding.verdict == "WRONG"}


def losses_of_model(model):
    return partial(model, reduction="none")


@pytest.mark.parametrize("make", [golf_model, recurrent_model])
@pytest.mark.parametrize("stride", [S, L])
def test_plain_scoring_is_legal(make, stride):
    """A prover that finds fault with an honest scorer is switched off, and then it finds nothing."""
    model = make()
    borders = [window.first for window in scoring_windows(150, L, stride)]
    scorer = lambda s, watch: score_stream(losses_of_model(model), s, TABLES, L, stride, 5, watch=watch)  # noqa: E731
    assert wrong(scorer, number=20, borders=borders) == set()


@pytest.mark.parametrize("make", [golf_model, recurrent_model])
@pytest.mark.parametrize("length", [4, 16])
def test_banded_scoring_is_legal(make, length):
    """A band is a mask of its own: one token too far to the right and every layer sees the future."""
    model = make()
    scorer = lambda s, watch: score_banded(losses_of_model(model), s, TABLES, length, S, 5, watch=watch)  # noqa: E731
    borders = [window.first for window in scoring_windows(150, 9 * length - S, 8 * length)]
    assert wrong(scorer, number=20, borders=borders) == set()


@pytest.mark.parametrize("make", [golf_model, recurrent_model])
def test_both_forms_of_training_are_legal(make):
    """They are what the prover is for: one step taken a chunk too early would be seen here."""
    model = make()
    assert wrong(lambda s, w: score_with_sgd_ttt(model, s, TABLES, L, S, SETTINGS, 3, watch=w), number=20) == set()
    assert wrong(lambda s, w: score_with_lora_ttt(model, s, TABLES, SETTINGS, watch=w), number=20) == set()


def trains_before_scoring(tells: bool, lag: int = 0):
    """A scorer that now and then learns from the last 16 targets before `lag` more than it has scored."""
    weights = golf_model().state_dict()

    def scorer(stream, watch):
        model = golf_model()
        model.load_state_dict(weights)
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        done = 0
        windows = scoring_windows(len(stream) - 1, L, S)
        for targets, _ in window_losses(losses_of_model(model), stream, windows, L, 1, watch=watch):
            if targets.stop - done >= 20:
                done = targets.stop + lag
                rows = stream[None, done - 17 : done]
                model(rows[:, :-1], rows[:, 1:]).backward()
                if tells:
                    watch.updated(range(done - 17, done - 1))
                optimizer.step()
                optimizer.zero_grad()

    return scorer


def test_scoring_after_the_update_is_found():
    """The oldest trick: learn the text, then be surprised how well it is known; found also when it is not told."""
    assert wrong(trains_before_scoring(tells=True)) == set()
    assert wrong(trains_before_scoring(tells=True, lag=4)) == {"1", "3"}
    assert wrong(trains_before_scoring(tells=False, lag=4)) == {"1"}


def test_a_mask_that_shows_the_future_is_found(monkeypatch):
    """A mask can be right in training and wrong in the one shape that only scoring uses."""
    model, attention = golf_model(), F.scaled_dot_product_attention

    def sees_all(q, k, v, mask=None, is_causal=False, enable_gqa=False):
        return attention(q, k, v, enable_gqa=enable_gqa)

    scorer = lambda s, watch: score_stream(losses_of_model(model), s, TABLES, L, S, 5, watch=watch)  # noqa: E731
    assert wrong(scorer) == set()
    monkeypatch.setattr(F, "scaled_dot_product_attention", sees_all)
    assert wrong(scorer) == {"1"}


def test_a_context_that_knows_the_end_of_its_document_is_found():
    """A last context that is counted back from the end of its document depends on where that is: in the future."""
    model = golf_model()

    def scorer(stream, watch, whole_chunks):
        for document, _ in stream_documents(stream):
            for start in range(document.start, document.stop, 8):
                end = min(start + 8, document.stop)
                low = max(document.start, (start + 8 if whole_chunks else end) - L)
                with torch.no_grad():
                    logits = model(stream[None, low:end])
                    nats = F.cross_entropy(logits[0], stream[low + 1 : end + 1], reduction="none")[start - low :]
                report_scores(watch, range(start, end), nats, lambda: logits[0, start - low :], slice(None))  # noqa: B023

    assert wrong(partial(scorer, whole_chunks=True), number=40) == set()
    assert wrong(partial(scorer, whole_chunks=False), number=40) == {"1"}


@pytest.mark.parametrize("what", ["twice", "never", "sums", "bytes"])
def test_targets_scored_twice_or_never_are_found(what):
    """The published scorers leave out the beginning or the end; a target counted twice can be the easier one."""
    model = golf_model()

    def scorer(stream, watch):
        windows = scoring_windows(len(stream) - 1, L, S)
        if what == "never":
            windows = windows[:-1]
        if what == "twice":
            windows[5] = windows[5]._replace(first=windows[5].first - 1)
        base, space, boundary = TABLES
        tables = ByteTables(base, space, boundary & (what != "bytes"))
        sums = BpbSums()
        for targets, nats in window_losses(losses_of_model(model), stream, windows, L, 1, watch=watch):
            tokens = stream[targets.start : targets.stop + 1]
            keep = slice(1, None) if what == "sums" and targets.start == 40 else slice(None)
            sums.add(nats[keep], tokens[:-1][keep], tokens[1:][keep], tables)
        return sums

    assert wrong(scorer) == {"4"}


class Inflates:
    """A watch in between, that is shown probabilities times 1.1."""

    def __init__(self, watch):
        self.watch, self.wanted, self.updated = watch, watch.wanted, watch.updated

    def scored(self, targets, nats):
        self.watch.scored(targets, nats - 0.0953)

    def distribution(self, target, log_probs):
        self.watch.distribution(target, log_probs + 0.0953)


def test_a_distribution_that_does_not_add_up_is_found():
    """Mixtures made at the realised token alone give every token a bit more than there is."""
    model = golf_model()
    scorer = lambda s, w: [*window_losses(losses_of_model(model), s, scoring_windows(150, L, S), L, 3, watch=w)]  # noqa
    assert wrong(lambda s, w: scorer(s, Inflates(w)) and None) == {"2"}
    findings, _ = prove_legality(lambda s, w: scorer(s, Inflates(w)) and None, documents_stream())
    assert "add up to 1.09999" in findings[2].found


@pytest.mark.parametrize("shows", [False, True])
def test_a_gate_that_reads_the_target_is_found(shows):
    """Sharpen the distribution when it happens to be right. Its distribution then depends on the token to come; and
    if another one is shown, that is not the one that was scored."""
    model, seen = golf_model(), {}

    def losses_of(inputs, targets, last):
        logits = model(inputs, last=last)
        if targets is None and not shows:
            return logits
        truth = seen["targets"] = seen["targets"] if targets is None else targets[:, -last:]
        right = logits.argmax(-1) == truth
        logits = torch.where(right | (truth % 2 == 0), 1.5, 0.8)[..., None] * logits
        return logits if targets is None else F.cross_entropy(logits.mT, truth, reduction="none")

    scorer = lambda s, watch: score_stream(losses_of, s, TABLES, L, S, 5, watch=watch)  # noqa: E731
    assert wrong(scorer) == ({"1"} if shows else {"2"})


def test_a_vocabulary_of_the_tokens_to_come_is_found():
    """To spread the probability over the tokens that the text will use is a better score for nothing, and a shuffled
    text uses the same ones."""
    model, stream = golf_model(), documents_stream().repeat(6)

    def scorer(text, watch):
        unused = torch.ones(model.config.vocab_size, dtype=torch.bool).index_fill(0, text, False)

        def losses_of(inputs, targets, last):
            logits = model(inputs, last=last).masked_fill(unused, -1e9)
            return logits if targets is None else F.cross_entropy(logits.mT, targets[:, -last:], reduction="none")

        return score_stream(losses_of, text, TABLES, L, S, 5, watch=watch)

    findings, _ = prove_legality(scorer, stream, TABLES, number=4)
    assert [finding.check[0] for finding in findings if finding.verdict == "WRONG"] == ["1"]


def test_scorers_that_prove_nothing_are_found():
    """One that remembers the last run knows the text; one that reads another stream passes every experiment."""
    model, stream = golf_model(), documents_stream()
    settled = lambda s, watch: score_stream(losses_of_model(model), stream, TABLES, L, S, 5, watch=watch)  # noqa: E731
    assert wrong(settled) == {"1"}

    def remembers(s, watch):
        score_stream(losses_of_model(model), s, TABLES, L, S, 5, watch=watch)
        with torch.no_grad():
            model.tok_emb.weight.mul_(1.01)

    assert {"0", "1"} <= wrong(remembers)
    silent = lambda s, watch: watch.scored(range(150), model(s[None, :64]).new_zeros(150))  # noqa: E731
    assert wrong(silent) == {"1", "2"}
    with pytest.raises(UserError, match="nothing to prove"):
        prove_legality(settled, stream[:1])


def test_new_text_begins_right_after_the_token():
    """New text that happens to be the old one tests nothing, and text that begins too early accuses the innocent."""
    stream = documents_stream()
    for t in (0, 4, 5, 59, 148, 149):
        for keep in (False, True):
            changed = replaced_after(stream, t, 0, keep)
            assert torch.equal(changed[: t + 1], stream[: t + 1]) and changed[t + 1] != stream[t + 1]
            assert len(changed) == 151 and torch.equal(changed, replaced_after(stream, t, 0, keep))
            if keep and stream[t + 1] != 1:
                assert torch.equal(changed == 1, stream == 1)


def test_borders_are_looked_at():
    """Random targets alone would meet a border of a long stream about never."""
    watch = LegalityWatch(150)
    for begin in range(0, 150, 50):
        watch.scored(range(begin, begin + 50), torch.zeros(50))
        watch.updated(range(begin, begin + 37))
    targets = border_targets(watch, documents_stream(begins=(0, 77)), 40, 0, borders=[23])
    assert {0, 149, 22, 23, 49, 50, 99, 100, 36, 37, 86, 87, 76, 77, 78} <= set(targets) and len(targets) == 40
    assert {0, 149, 49, 100} == set(border_targets(watch, documents_stream(), 4, 0))


def test_tables_show_the_order():
    """The reader is to see that each chunk is scored before it is learned from."""
    model = golf_model()
    findings, watch = prove_legality(
        lambda s, w: score_with_sgd_ttt(model, s, TABLES, L, S, SETTINGS, 3, watch=w), documents_stream(), number=1
    )
    assert [len(row) for row in legality_rows(findings)] == [len(LEGALITY_HEADER)] * 5
    rows = order_of_events(watch, limit=3)
    assert all(len(row) == len(EVENT_HEADER) for row in rows)
    assert [(kind, targets, n) for kind, targets, n, _ in rows] == [
        ("score", "0 to 39", 3), ("update", "0 to 31", 3), ("score", "40 to 79", 4)
    ]  # fmt: skip
