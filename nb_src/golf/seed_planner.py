# %% [markdown]
# ## Is it a record, or luck?
#
# Two trainings that differ in nothing but the seed end some thousandths of a nat apart, and the rule of the challenge
# is about thousandths: beat the standing record by 0.005 nats per token, with less than one chance in a hundred that
# luck did it. With three seeds that is a t-test with two degrees of freedom, whose tails are so fat that the difference
# has to be four standard deviations. So plan before training: how many seeds does an effect of this size need?
#
# The rule is in *nats per token* and many a text applied it in bits per byte, which is another number: a bit per byte
# weighs 1.7 nats per token with a vocabulary of 1,024 and 2.6 with one of 8,192. Everything here is said in both.

# %%
import math
from dataclasses import dataclass

import numpy as np

from nanochat.runtime import UserError

# %% [markdown]
# ### `student_t_tail`
# How often would chance alone give a t this large? With t = √df · tan θ the area under Student's curve becomes the
# integral of a power of a cosine, which Gauss's rule gives in five lines.

# %%
RECORD_MARGIN_NATS = 0.005  # per token
RECORD_P = 0.01
GAUSS_NODES, GAUSS_WEIGHTS = np.polynomial.legendre.leggauss(200)  # on -1 to 1


def student_t_tail(t: float, df: float) -> float:
    """P(T > t) for Student's t with df >= 1 degrees of freedom, which need not be whole; to about 1e-8."""
    if not df >= 1 or math.isnan(t):
        raise UserError(f"Student's t needs a number and 1 or more degrees of freedom, not t = {t} with df = {df}.")
    angle = math.atan(t / math.sqrt(df))
    area = angle / 2 * float(GAUSS_WEIGHTS @ np.cos(angle * (GAUSS_NODES + 1) / 2) ** (df - 1))
    norm = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)
    return min(max(0.5 - area * norm, 0.0), 1.0)


def student_t_critical(p: float, df: float) -> float:
    """The t that chance exceeds with probability p, by bisection."""
    if not 1e-6 <= p <= 0.5:
        raise UserError(f"p is {p}, but the probability of a tail has to lie between 0.000001 and 0.5.")
    low, high = 0.0, 1.0
    while student_t_tail(high, df) > p:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if student_t_tail(middle, df) > p else (low, middle)
    return (low + high) / 2


# %% [markdown]
# ### From nats to bits per byte
# One conversion, used in both directions and wherever a margin changes its unit.


# %%
def nats_to_bpb(nats_per_token: float, bytes_per_token: float) -> float:
    """Bits per byte of a loss, or of a difference of losses, over a text with so many bytes for each token."""
    return nats_per_token / (math.log(2) * bytes_per_token)


def bytes_per_token_of(nats_per_token: float, bpb: float) -> float:
    """Bytes per token of the text on which a loss and its bits per byte were measured together."""
    return nats_per_token / (math.log(2) * bpb)


# %% [markdown]
# ### The two tests
# Both are one-sided, and both count a *lower* loss as better. The first takes the record as an exact number, as the
# rule says. The second (Welch) knows that the record is a mean of noisy runs as well, and is the fairer question
# whenever the record's seeds are known.


# %%
@dataclass(frozen=True)
class TTest:
    """t = (reference - mean) / standard error; p: the chance of such a t if there were no difference."""

    name: str
    unit: str  # "nats" or "bpb"
    reference: float  # what the mean has to be below, the margin included
    mean: float
    sd: float  # n - 1 in the denominator
    n: int
    t: float
    df: float
    p: float

    def __str__(self) -> str:
        place = f"{self.mean:.6f} ± {self.sd:.6f} {self.unit} (n = {self.n}) against {self.reference:.6f}"
        return f"{self.name}: {place}: t = {self.t:.2f}, df = {self.df:.3g}, p = {self.p:.4f}"


def mean_and_sd(values) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1); nan for the deviation of a single value."""
    values = [float(value) for value in values]
    if not values or not all(map(math.isfinite, values)):
        raise UserError(f"a mean needs at least one value and finite ones only, not {values}.")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def mean_and_varying_sd(values) -> tuple[float, float]:
    mean, sd = mean_and_sd(values)
    if len(values) < 2 or sd == 0:
        raise UserError(
            f"a t-test needs two or more results that differ; there {'is' if len(values) == 1 else 'are'} {len(values)}"
            f"{' and all are ' + str(values[0]) if len(values) > 1 else ''}. Train with more seeds."
        )
    return mean, sd


def one_sample_test(values, reference: float, unit: str = "nats", name: str = "one sample") -> TTest:
    """Is the mean of `values` below `reference`? One-sided, n - 1 degrees of freedom. Golf spec section 3.3."""
    mean, sd = mean_and_varying_sd(values)
    n = len(values)
    t = (reference - mean) / (sd / math.sqrt(n))
    return TTest(name, unit, reference, mean, sd, n, t, n - 1, student_t_tail(t, n - 1))


def welch_test(values, previous, margin: float, unit: str = "nats", name: str = "Welch") -> TTest:
    """Is the mean of `values` below that of `previous` by more than `margin`? One-sided, unequal variances."""
    mean, sd = mean_and_varying_sd(values)
    previous_mean, previous_sd = mean_and_varying_sd(previous)
    ours, theirs = sd**2 / len(values), previous_sd**2 / len(previous)
    reference = previous_mean - margin
    t = (reference - mean) / math.sqrt(ours + theirs)
    df = (ours + theirs) ** 2 / (ours**2 / (len(values) - 1) + theirs**2 / (len(previous) - 1))
    return TTest(name, unit, reference, mean, sd, len(values), t, df, student_t_tail(t, df))


T_TEST_HEADER = ("test", "unit", "has to be below", "mean", "t", "df", "p")


def t_test_rows(tests: list[TTest]) -> list[tuple[str, ...]]:
    """One row for each test, under T_TEST_HEADER."""
    return [
        (test.name, test.unit, f"{test.reference:.5f}", f"{test.mean:.5f}")
        + (f"{test.t:.2f}", f"{test.df:.1f}", f"{test.p:.4f}")
        for test in tests
    ]


# %% [markdown]
# ### `significance_table`
# The results of all seeds against the record, in both units. Three things are refused because they make the number
# meaningless: results on different validation texts, results of different scripts, and a choice among the seeds that
# were trained. Two results are of one text when they have scored the same number of bytes, whatever their tokens are.


# %%
@dataclass(frozen=True)
class SeedResult:
    """What one training ended with. script_sha256, validation_targets: "" and 0 when they are not known."""

    seed: int
    nats: float  # per token
    bpb: float
    script_sha256: str = ""
    validation_targets: int = 0


def refuse_mixed_results(results, whose: str = "the results") -> float:
    """Bytes per token of results that may be averaged. UserError when seeds, texts or scripts do not allow it."""
    seeds = [result.seed for result in results]
    if not results:
        raise UserError(f"{whose}: there is none.")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"{whose}: a seed stands twice ({seeds}). A run counts once.")
    for name, known in (
        ("scripts", {result.script_sha256 for result in results if result.script_sha256}),
        ("validation texts", {result.validation_targets for result in results if result.validation_targets}),
    ):
        if len(known) > 1:
            listed = ", ".join(sorted(str(value)[:12] for value in known))
            raise UserError(f"{whose} come from different {name} ({listed}). Train all seeds with one.")
    if not all(0 < number < math.inf for result in results for number in (result.nats, result.bpb)):
        raise UserError(f"{whose}: every score has to be a positive number. Look into the logs of these runs.")
    ratios = [bytes_per_token_of(result.nats, result.bpb) for result in results]
    if max(ratios) / min(ratios) - 1 > 2e-5:  # what five published digits leave open
        raise UserError(
            f"{whose}: nats and bits per byte give {min(ratios):.5f} to {max(ratios):.5f} bytes per token, so they "
            "were measured on different texts. Evaluate all of them on one."
        )
    return math.fsum(ratios) / len(ratios)


def refuse_other_text(results, previous) -> None:
    """UserError when ours and the record's are known to be scores on different texts, by their numbers of bytes."""
    sizes = []
    for group in (results, previous):
        targets = max(result.validation_targets for result in group)
        sizes.append(targets * refuse_mixed_results(group))
    if all(sizes) and max(sizes) / min(sizes) > 1.001:  # a few thousandths of a percent are the ends of the stream
        raise UserError(
            f"our text has {sizes[0] / 1e6:.1f} million bytes and the record's {sizes[1] / 1e6:.1f}, so the scores do "
            "not compare. Take the record's results on our text."
        )


def significance_table(results, previous, trained_seeds=None) -> tuple[list[TTest], str]:
    """([tests in both units, the one that decides first], one sentence with the verdict).

    Nats decide, as the rule says, unless the record has other tokens. results, previous: lists of SeedResult; a single
    previous result is taken as an exact number.
    trained_seeds: all seeds that were trained; UserError when `results` is a choice among them.
    Golf spec sections 0.1, 8.
    """
    bytes_per_token = refuse_mixed_results(results, "our results")
    previous_ratio = refuse_mixed_results(previous, "the record's results")
    refuse_other_text(results, previous)
    left_out = sorted(set(trained_seeds or ()) - {result.seed for result in results})
    if left_out:
        raise UserError(
            f"seeds {left_out} were trained and are left out. A test of chosen seeds says nothing: add them."
        )
    tests = []
    for unit in ("nats", "bpb"):
        margin = RECORD_MARGIN_NATS if unit == "nats" else nats_to_bpb(RECORD_MARGIN_NATS, bytes_per_token)
        ours, theirs = ([getattr(result, unit) for result in group] for group in (results, previous))
        reference = mean_and_sd(theirs)[0] - margin
        tests.append(one_sample_test(ours, reference, unit, "against the record's mean less the margin"))
        if len(theirs) > 1:
            tests.append(welch_test(ours, theirs, margin, unit, "Welch against the record's seeds"))
    one_unit = abs(previous_ratio / bytes_per_token - 1) <= 2e-5
    tests.sort(key=lambda test: test.unit != ("nats" if one_unit else "bpb"))
    official = tests[0]
    verdict = "clears" if official.p < RECORD_P and official.t > 0 else "does not clear"
    sentence = f"{verdict} the rule of {RECORD_MARGIN_NATS} nats at p < {RECORD_P}: p = {official.p:.4f} in nats"
    if not one_unit:
        ratios = f"{bytes_per_token:.5f} and {previous_ratio:.5f} bytes each"
        sentence = sentence.removesuffix("nats")
        sentence += f"bits per byte; nats do not compare, since the tokens differ ({ratios}), if not the texts"
    return tests, sentence


# %% [markdown]
# ### `seeds_needed`
# Before training: with runs that scatter by `sd` and an improvement of `effect`, how many are needed? If everything
# comes out exactly as assumed, the p is reached with this many; real runs fall short of it about every second time, so
# one more seed is cheap insurance.


# %%
def slack_needed(n: int, p: float = RECORD_P) -> float:
    """How many standard deviations beyond the margin n seeds have to be, e.g. 4.02 for three. Golf spec section 8."""
    return student_t_critical(p, n - 1) / math.sqrt(n)


def seeds_needed(effect: float, sd: float, p: float = RECORD_P, margin: float = RECORD_MARGIN_NATS) -> int:
    """The smallest n with slack_needed(n) * sd <= effect - margin.

    effect: how far below the record the mean is expected. All in one unit, nats unless margin is converted too.
    Raises UserError when no number of seeds up to 1,000 is enough. Golf spec section 8, check 11.
    """
    if not sd > 0:
        raise UserError(f"sd is {sd}, but runs scatter: give a standard deviation above 0.")
    slack = effect - margin
    if slack <= 0:
        raise UserError(
            f"an effect of {effect} is within the margin of {margin}: no number of seeds makes it a record."
        )
    for n in range(2, 1001):
        if slack_needed(n, p) * sd <= slack:
            return n
    raise UserError(f"{slack:.3g} beyond the margin at a scatter of {sd:.3g} needs more than 1,000 seeds.")


SEED_PLAN_HEADER = ("seeds", "critical t", "scatters beyond the margin", "nats below the record", "bits per byte below")


def seed_plan_rows(sd: float, bytes_per_token: float, seeds=(2, 3, 4, 5, 6, 8, 10)) -> list[tuple]:
    """What so many seeds have to gain to be a record when runs scatter by `sd` nats; under SEED_PLAN_HEADER."""
    rows = []
    for n in seeds:
        effect = RECORD_MARGIN_NATS + slack_needed(n) * sd
        gains = (f"{effect:.4f}", f"{nats_to_bpb(effect, bytes_per_token):.4f}")
        rows.append((n, f"{student_t_critical(RECORD_P, n - 1):.3f}", f"{slack_needed(n):.2f}", *gains))
    return rows
