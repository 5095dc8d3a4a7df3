import math

import pytest
import torch

from subquad.core.errors import ConfigError
from subquad.evals.stats import (
    Interval,
    bootstrap_mean,
    bootstrap_ratio,
    bootstrap_strata,
    mcnemar,
    paired_difference,
    paired_ratio,
    sign_flip,
    student_quantile,
    wilson,
)


def test_wilson_solves_the_score_equation():
    # The limits are where |p_hat - p| = z sqrt(p (1 - p) / n).
    for k, n in [(1, 10), (7, 20), (90, 100), (2500, 5153)]:
        interval = wilson(k, n)
        for limit in (interval.low, interval.high):
            assert abs(k / n - limit) == pytest.approx(1.959963984540054 * math.sqrt(limit * (1 - limit) / n), rel=1e-9)
        assert interval.low < interval.value < interval.high


def test_wilson_at_the_ends_and_refusals():
    assert wilson(0, 20).low == 0.0
    assert wilson(20, 20).high == 1.0
    assert wilson(20, 20).low == pytest.approx(20 / (20 + 1.959963984540054**2), rel=1e-9)
    with pytest.raises(ConfigError, match="at least one trial"):
        wilson(0, 0)


@pytest.mark.parametrize(("df", "expected"), [(4, 2.776445), (9, 2.262157), (30, 2.042272), (1000, 1.962339)])
def test_student_quantile_matches_the_table(df, expected):
    assert student_quantile(0.975, df) == pytest.approx(expected, rel=2e-3)


def test_bootstrap_covers_as_often_as_it_says():
    # 400 samples of 8 skewed values: a 95 % interval misses 20 times on average; plain percentiles miss over 45 times.
    generator = torch.Generator().manual_seed(1)
    missed = 0
    for _ in range(400):
        interval = bootstrap_mean(torch.randn(8, generator=generator).double(), resamples=500)
        missed += not interval.low <= 0 <= interval.high
    assert missed <= 36


def test_bootstrap_width_is_that_of_the_t_interval():
    x = torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    interval = bootstrap_mean(x, resamples=20000)
    half = student_quantile(0.975, 199) * float(x.std()) / math.sqrt(200)
    assert interval.value == pytest.approx(float(x.mean()), rel=1e-12)
    assert (interval.high - interval.low) / 2 == pytest.approx(half, rel=0.03)
    assert bootstrap_mean(x, resamples=20000) == interval


def test_bootstrap_ratio_of_sums():
    x, y = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([1.0, 3.0, 4.0])
    ratio = bootstrap_ratio(x, y)
    assert ratio.value == pytest.approx(3 / 8, rel=1e-12)
    assert 0 <= ratio.low < 3 / 8 < ratio.high <= 1
    assert bootstrap_mean(x[:1]) == Interval(1.0, None, None)
    # Resamples that miss the only unit with a denominator say nothing.
    assert bootstrap_ratio(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0])) == Interval(1.0, 1.0, 1.0)
    for empty in (x[:0], torch.zeros(3)):
        with pytest.raises(ConfigError, match="more data"):
            bootstrap_ratio(empty, empty)


def test_mcnemar_counts_only_the_discordant():
    first = torch.tensor([True] * 8 + [False] * 2 + [True] * 50)
    second = torch.tensor([False] * 8 + [True] * 2 + [True] * 50)
    assert mcnemar(first, second) == pytest.approx(2 * (1 + 10 + 45) / 1024, rel=1e-12)
    assert mcnemar(first, first) == 1.0
    assert mcnemar(first, second) == mcnemar(second, first)


def test_interval_map_and_format():
    interval = Interval(0.0, -1.0, 1.0).map(math.exp)
    assert interval == Interval(1.0, math.exp(-1), math.exp(1))
    assert interval.format(".2f") == "1.00 [0.37, 2.72]"
    assert Interval(2.0).format(".1f") == "2.0"


def test_strata_count_alike_however_many_units_they_have():
    few, many = torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([0.0, 1.0] * 50)
    ones = [torch.ones_like(few), torch.ones_like(many)]
    kept = bootstrap_strata([(few, ones[0]), (many, ones[1])])
    assert kept.value == pytest.approx((0.75 + 0.5) / 2, rel=1e-12)
    assert kept.low < kept.value < kept.high
    assert bootstrap_strata([(few, ones[0])]) == bootstrap_ratio(few, ones[0])
    # The limits of a sum of independent means: its variance is the sum of theirs.
    x, y = (torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (400, 100))
    interval = bootstrap_strata([(x, torch.ones_like(x)), (y, torch.ones_like(y))], resamples=20000)
    half = 1.96 * math.sqrt(float(x.var()) / 400 + float(y.var()) / 100) / 2
    assert (interval.high - interval.low) / 2 == pytest.approx(half, rel=0.06)
    with pytest.raises(ConfigError, match="more data"):
        bootstrap_strata([(few, ones[0]), (few[:0], few[:0])])


def test_sign_flip_counts_the_signs():
    # Of 2^5 signs two give a sum as far from 0 as five equal ones.
    assert sign_flip(torch.ones(5), resamples=20000) == pytest.approx(2 / 32, abs=0.006)
    assert sign_flip(torch.tensor([1.0, -1.0, 2.0, -2.0])) == 1.0
    assert sign_flip(torch.zeros(3)) == 1.0
    assert sign_flip(torch.tensor([0.1] * 40)) == 1 / 10000
    # Without a difference, p is below 0.1 about as often as it says: 200 samples, 20 expected.
    generator = torch.Generator().manual_seed(3)
    low = sum(sign_flip(torch.randn(12, generator=generator), resamples=400) < 0.1 for _ in range(200))
    assert 8 <= low <= 33


def test_pairs_of_right_and_wrong_and_of_figures():
    a = torch.tensor([True] * 30 + [False] * 10)
    b = torch.tensor([True] * 20 + [False] * 20)
    difference, ratio = paired_difference(a, b), paired_ratio(a, b)
    assert (difference.how, ratio.how) == ("difference", "ratio")
    assert difference.interval.value == pytest.approx(0.25) and difference.interval.low > 0
    assert ratio.interval.value == pytest.approx(1.5) and ratio.interval.low > 1
    assert difference.p_value == ratio.p_value == pytest.approx(2 / 1024)
    x = torch.randn(50, dtype=torch.float64)
    figures = paired_difference(x + 1, x)
    assert figures.interval.value == pytest.approx(1) and figures.p_value == sign_flip(torch.ones(50))
    assert figures.map(math.exp, "ratio").interval.value == pytest.approx(math.e)
    with pytest.raises(ConfigError, match="the same units"):
        paired_difference(x, x[:2])
