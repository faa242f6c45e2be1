"""The arithmetic behind "this is a record"."""

import math

import pytest

from golf.seed_planner import (
    RECORD_MARGIN_NATS,
    SeedResult,
    bytes_per_token_of,
    mean_and_sd,
    nats_to_bpb,
    one_sample_test,
    seed_plan_rows,
    seeds_needed,
    significance_table,
    slack_needed,
    student_t_critical,
    student_t_tail,
    t_test_rows,
    welch_test,
)
from nanochat.runtime import UserError

# Spec section 3.2 and 3.3: seeds 1337, 1338, 1339 of the record, and the three logs of the record before it.
BPB = [1.20143417, 1.19945102, 1.20319508]
NATS = [2.02857127, 2.02522281, 2.03154449]
BEFORE_BPB = [1.20576485, 1.20617460, 1.20715923]
BEFORE_NATS = [2.03588345, 2.03657529, 2.03823779]


def results(nats, bpb, **known):
    return [SeedResult(1337 + i, a, b, **known) for i, (a, b) in enumerate(zip(nats, bpb, strict=True))]


@pytest.mark.parametrize(
    ("test", "t", "p"),
    [
        (one_sample_test(BPB, 1.21613611 - 0.005), 9.04, 0.0060),
        (one_sample_test(BPB, 1.20576485 - 0.005), -0.55, 0.68),
        (one_sample_test(NATS, 2.03588345 - 0.005), 1.33, 0.157),
        (one_sample_test(NATS, mean_and_sd(BEFORE_NATS)[0] - 0.005), 1.89, 0.100),
        (welch_test(NATS, BEFORE_NATS, 0.005), 1.77, 0.095),
    ],
)
def test_every_published_row_comes_out(test, t, p):
    """A wrong tail, sign or denominator would turn a claim that does not hold into a record."""
    assert round(test.t, 2) == t
    assert abs(test.p - p) <= 0.5 * 10 ** -(4 if p < 0.01 else 2 if p > 0.5 else 3)
    assert round(test.df, 1) == (2.6 if test.name == "Welch" else 2.0)


def test_means_and_deviations_of_the_published_runs():
    """A deviation with n instead of n - 1 would make every test too sure."""
    assert [round(value, 8) for value in mean_and_sd(BPB)] == [1.20136009, 0.00187313]
    assert round(mean_and_sd(NATS)[0], 8) == 2.02844619
    assert round(mean_and_sd(NATS)[1], 7) == 0.0031627
    assert [round(value, 7) for value in mean_and_sd(BEFORE_BPB)] == [1.2063662, 0.0007167]


@pytest.mark.parametrize(
    ("n", "critical", "slack"), [(3, 6.965, 4.02), (4, 4.541, 2.27), (5, 3.747, 1.68), (10, 2.821, 0.89)]
)
def test_critical_values_are_those_of_the_tables(n, critical, slack):
    """A planner that is wrong here wastes hours of eight GPUs."""
    assert round(student_t_critical(0.01, n - 1), 3) == critical
    assert round(slack_needed(n), 2) == slack


def test_the_tail_has_its_closed_forms():
    """Errors of the quadrature at either end of its range would go unnoticed in the middle."""
    for t in (-40.0, -3.0, -0.1, 0.0, 1e-8, 0.5, 1.0, 9.04, 1000.0):
        assert student_t_tail(t, 1) == pytest.approx(0.5 - math.atan(t) / math.pi, rel=1e-10, abs=1e-14)
        assert student_t_tail(t, 2) == pytest.approx(0.5 - t / (2 * math.sqrt(2 + t * t)), rel=1e-6, abs=1e-13)
    assert student_t_tail(math.inf, 3) == 0 and student_t_tail(-math.inf, 3) == 1
    assert student_t_tail(1.959963985, 1e7) == pytest.approx(0.025, rel=1e-5)


@pytest.mark.parametrize("df", [1.3, 2.6, 4, 17.5, 120])
@pytest.mark.parametrize("t", [0.3, 1.77, 4.0])
def test_the_tail_is_the_area_under_the_curve(df, t):
    """Fractional degrees of freedom (Welch) are in no table."""
    norm = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    n, total = 2000, 0.0  # Simpson from 0 to t
    for i in range(n + 1):
        weight = 1 if i in (0, n) else 4 if i % 2 else 2
        total += weight * norm * (1 + (t * i / n) ** 2 / df) ** (-(df + 1) / 2)
    assert student_t_tail(t, df) == pytest.approx(0.5 - total * t / n / 3, abs=1e-10)


def test_nats_and_bits_per_byte():
    """0.005 nats and 0.005 bits per byte are different margins; the published record mixed them."""
    assert bytes_per_token_of(NATS[0], BPB[0]) == pytest.approx(2.43593, abs=5e-6)
    assert round(nats_to_bpb(0.005, 2.43593), 5) == 0.00296
    assert round(nats_to_bpb(0.005, 3.72663), 5) == 0.00194


def test_both_units_decide_the_same_on_one_text():
    """On one validation text the unit must not matter, so a margin that was not converted shows."""
    tests, sentence = significance_table(results(NATS, BPB), results(BEFORE_NATS, BEFORE_BPB))
    by_name = {(test.unit, test.name.split()[0]): test for test in tests}
    assert len(by_name) == 4 and "does not clear" in sentence
    assert by_name["nats", "Welch"].p == pytest.approx(by_name["bpb", "Welch"].p, rel=1e-3)
    assert round(by_name["nats", "against"].t, 2) == 1.89
    far_away = [SeedResult(0, 2.1, 2.1 / NATS[0] * BPB[0])]
    assert significance_table(results(NATS, BPB), far_away)[1].startswith("clears")


def test_bits_per_byte_decide_between_different_tokens():
    """Smaller tokens have fewer nats each: every old model would beat a record of a larger vocabulary."""
    better = [SeedResult(0, 2.1 * 1.4, 0.98 * BPB[0])]
    tests, sentence = significance_table(results(NATS, BPB), better)
    assert sentence.startswith("does not clear") and "in bits per byte; nats do not compare" in sentence
    assert tests[0].unit == "bpb" and next(test for test in tests if test.unit == "nats").p < 0.01
    worse = [SeedResult(0, 2.1 * 0.7, 2.1 / NATS[0] * BPB[0])]
    assert significance_table(results(NATS, BPB), worse)[1].startswith("clears")


def test_meaningless_samples_are_refused():
    """Chosen seeds, a seed twice, two scripts or two texts: each of them fakes a p."""
    before = results(BEFORE_NATS, BEFORE_BPB)
    with pytest.raises(UserError, match="left out"):
        significance_table(results(NATS, BPB), before, trained_seeds=[1337, 1338, 1339, 1340])
    with pytest.raises(UserError, match="stands twice"):
        significance_table([SeedResult(1, 2.0, 1.2)] * 2, before)
    with pytest.raises(UserError, match="different scripts"):
        significance_table([SeedResult(1, 2.0, 1.2, "a" * 64), SeedResult(2, 2.01, 1.206, "b" * 64)], before)
    with pytest.raises(UserError, match="different texts"):
        significance_table([SeedResult(1, 2.0, 1.2), SeedResult(2, 2.0, 1.3)], before)
    with pytest.raises(UserError, match="different validation texts"):
        significance_table([SeedResult(1, 2.0, 1.2, "", 5), SeedResult(2, 2.01, 1.206, "", 6)], before)
    with pytest.raises(UserError, match="two or more"):
        one_sample_test([2.0], 2.1)
    with pytest.raises(UserError, match="that differ"):
        one_sample_test([2.0, 2.0, 2.0], 2.1)


def test_a_record_on_another_text_is_refused():
    """The early validation text is easier per byte: the baseline's 1.2244 there is a 1.2276 on the frozen one."""
    ours = results(NATS, BPB, validation_targets=62_021_632)
    with pytest.raises(UserError, match="our text has 151.1 million bytes and the record's 155.8"):
        significance_table(ours, [SeedResult(0, 2.07269931, 1.22436570, "", 63_779_840)])
    sp4096 = SeedResult(0, 1.1 * math.log(2) * 3.31968, 1.1, "", 45_508_608)  # other tokens, the same text
    assert significance_table(ours, [sp4096])[1].startswith("does not clear")


@pytest.mark.parametrize("score", [0.0, -1.2, math.nan, math.inf])
def test_a_score_that_is_none_is_refused(score):
    """ZeroDivisionError, or a record set by a run that diverged."""
    with pytest.raises(UserError, match="positive number"):
        significance_table([SeedResult(1, 2.0, 1.2), SeedResult(2, 2.0, score)], results(BEFORE_NATS, BEFORE_BPB))


def test_seeds_needed():
    """The plan must agree with the test that judges afterwards."""
    sd = 0.0031627
    assert seeds_needed(0.005 + 4.03 * sd, sd) == 3
    assert seeds_needed(0.005 + 4.01 * sd, sd) == 4
    assert seeds_needed(0.005 + 0.9 * sd, sd) == 10
    n = seeds_needed(0.008, sd)
    values = [2.0 + sd * math.sqrt((n - 1) / n) * (-1) ** i for i in range(n)]  # exactly this deviation, as n is even
    assert n == 10 and one_sample_test(values, 2.0 + 0.008 - RECORD_MARGIN_NATS).p < 0.01
    with pytest.raises(UserError, match="no number of seeds"):
        seeds_needed(0.004, sd)
    with pytest.raises(UserError, match="more than 1,000 seeds"):
        seeds_needed(0.0051, sd)
    with pytest.raises(UserError, match="above 0"):
        seeds_needed(0.01, 0.0)


def test_the_tables_of_the_notebook():
    """The plan is read before money is spent: three seeds at this scatter need 0.0177 nats."""
    plan = {row[0]: row for row in seed_plan_rows(0.0031627, 2.43593)}
    assert plan[3] == (3, "6.965", "4.02", "0.0177", "0.0105")
    rows = t_test_rows(significance_table(results(NATS, BPB), results(BEFORE_NATS, BEFORE_BPB))[0])
    assert rows[0][1:] == ("nats", "2.03190", "2.02845", "1.89", "2.0", "0.0996")
