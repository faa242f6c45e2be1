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

from nanochat.runtime import UserError

# %% [markdown]
# ### `student_t_tail`
# How often would chance alone give a t this large? The area under Student's curve is an incomplete beta function, and
# that is a continued fraction: a dozen lines instead of a dependency.

# %%
RECORD_MARGIN_NATS = 0.005  # per token
RECORD_P = 0.01


def regularised_incomplete_beta(a: float, b: float, x: float) -> float:
    """I_x(a, b) for a, b > 0 and 0 <= x <= 1, by its continued fraction (modified Lentz)."""
    if x <= 0.0 or x >= 1.0:
        return float(x >= 1.0)
    if x > (a + 1) / (a + b + 2):  # the fraction converges quickly on the other side only
        return 1.0 - regularised_incomplete_beta(b, a, 1.0 - x)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    tiny = 1e-300  # stands for a zero that would be divided by
    c, d = 1.0, 1.0 / ((1.0 - (a + b) * x / (a + 1)) or tiny)
    fraction = d
    for m in range(1, 10_000):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1.0 / ((1.0 + numerator * d) or tiny)
            c = (1.0 + numerator / c) or tiny
            fraction *= c * d
        if abs(c * d - 1.0) < 1e-15:
            break
    return math.exp(log_front) * fraction / a


def student_t_tail(t: float, df: float) -> float:
    """P(T > t) for Student's t with df > 0 degrees of freedom, which need not be whole."""
    if not df > 0 or math.isnan(t):
        raise UserError(f"Student's t needs a number and degrees of freedom above 0, not t = {t} with df = {df}.")
    if math.isinf(t):
        return 0.0 if t > 0 else 1.0
    if t * t < df:  # near the middle 1 - I of the complement keeps the digits
        half = 0.5 - 0.5 * regularised_incomplete_beta(0.5, df / 2, t * t / (df + t * t))
    else:
        half = 0.5 * regularised_incomplete_beta(df / 2, 0.5, df / (df + t * t))
    return half if t >= 0 else 1.0 - half


def student_t_critical(p: float, df: float) -> float:
    """The t that chance exceeds with probability p, 0 < p <= 0.5, by bisection."""
    if not 0 < p <= 0.5:
        raise UserError(f"p is {p}, but the probability of a tail lies above 0 and is at most 0.5.")
    low, high = 0.0, 1.0
    while student_t_tail(high, df) > p:
        low, high = high, 2 * high
    for _ in range(200):
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
    """Is the mean of `values` below `reference`? One-sided, n - 1 degrees of freedom. Spec section 3.3."""
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


# %% [markdown]
# ### `significance_table`
# The results of all seeds against the record, in both units. Three things are refused because they make the number
# meaningless: results on different validation texts, results of different scripts, and a choice among the seeds that
# were trained.


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
    ratios = [bytes_per_token_of(result.nats, result.bpb) for result in results]
    if max(ratios) / min(ratios) - 1 > 2e-5:  # what five published digits leave open
        raise UserError(
            f"{whose}: nats and bits per byte give {min(ratios):.5f} to {max(ratios):.5f} bytes per token, so they "
            "were measured on different texts. Evaluate all of them on one."
        )
    return math.fsum(ratios) / len(ratios)


def significance_table(
    results, previous, margin_nats: float = RECORD_MARGIN_NATS, trained_seeds=None
) -> tuple[list[TTest], str]:
    """([tests in nats and in bits per byte], one sentence that decides by the official one).

    results, previous: lists of SeedResult; a single previous result is taken as an exact number.
    trained_seeds: all seeds that were trained; UserError when `results` is a choice among them. Spec sections 0.1, 8.
    """
    bytes_per_token = refuse_mixed_results(results, "our results")
    previous_ratio = refuse_mixed_results(previous, "the record's results")
    left_out = sorted(set(trained_seeds or ()) - {result.seed for result in results})
    if left_out:
        raise UserError(
            f"seeds {left_out} were trained and are left out. A test of chosen seeds says nothing: add them."
        )
    tests = []
    for unit in ("nats", "bpb"):
        margin = margin_nats if unit == "nats" else nats_to_bpb(margin_nats, bytes_per_token)
        ours, theirs = ([getattr(result, unit) for result in group] for group in (results, previous))
        reference = mean_and_sd(theirs)[0] - margin
        tests.append(one_sample_test(ours, reference, unit, "against the record's mean less the margin"))
        if len(theirs) > 1:
            tests.append(welch_test(ours, theirs, margin, unit, "Welch against the record's seeds"))
    official = tests[0]
    verdict = "clears" if official.p < RECORD_P and official.t > 0 else "does not clear"
    sentence = f"{verdict} the rule of {margin_nats} nats at p < {RECORD_P}: p = {official.p:.4f} in nats"
    if abs(previous_ratio / bytes_per_token - 1) > 2e-5:
        sentence += (
            f"; the texts differ ({bytes_per_token:.5f} and {previous_ratio:.5f} bytes per token), so nats do not "
            f"compare and only bits per byte do: p = {next(test for test in tests if test.unit == 'bpb').p:.4f}"
        )
    return tests, sentence


# %% [markdown]
# ### `seeds_needed`
# Before training: with runs that scatter by `sd` and an improvement of `effect`, how many are needed? If everything
# comes out exactly as assumed, the p is reached with this many; real runs fall short of it about every second time, so
# one more seed is cheap insurance.


# %%
def seeds_needed(
    effect: float, sd: float, p: float = RECORD_P, margin: float = RECORD_MARGIN_NATS, at_most: int = 1000
) -> int:
    """The smallest n with critical_t(p, n - 1) * sd / sqrt(n) <= effect - margin.

    effect: how far below the record the mean is expected. All in one unit, nats unless margin is converted too.
    Raises UserError when no number of seeds up to `at_most` is enough. Spec section 8, check 11.
    """
    if not sd > 0:
        raise UserError(f"sd is {sd}, but runs scatter: give a standard deviation above 0.")
    slack = effect - margin
    if slack <= 0:
        raise UserError(
            f"an effect of {effect} is within the margin of {margin}: no number of seeds makes it a record."
        )
    for n in range(2, at_most + 1):
        if student_t_critical(p, n - 1) * sd / math.sqrt(n) <= slack:
            return n
    raise UserError(f"{slack:.3g} beyond the margin at a scatter of {sd:.3g} needs more than {at_most} seeds.")


def slack_needed(n: int, p: float = RECORD_P) -> float:
    """How many standard deviations beyond the margin n seeds have to be, e.g. 4.02 for three. Spec section 8."""
    return student_t_critical(p, n - 1) / math.sqrt(n)
