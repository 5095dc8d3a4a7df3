import math

import pytest
import torch

from subquad.core.errors import ConfigError
from subquad.evals.stats import Interval, bootstrap_mean, bootstrap_ratio, mcnemar, student_quantile, wilson


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
