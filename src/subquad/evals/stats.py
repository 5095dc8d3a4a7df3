"""Intervals and paired tests, so that no figure stands without what is known of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from subquad.core.errors import ConfigError

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % confidence limits, which are None where one unit is all there is."""

    value: float
    low: float | None = None
    high: float | None = None

    def map(self, increasing: Callable[[float], float]) -> Interval:
        """The interval of an increasing function of the estimate."""
        low, high = (None if x is None else increasing(x) for x in (self.low, self.high))
        return Interval(increasing(self.value), low, high)

    def format(self, spec: str = ".3f") -> str:
        """``value [low, high]``."""
        if self.low is None or self.high is None:
            return f"{self.value:{spec}}"
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def wilson(successes: int, n: int) -> Interval:
    """A proportion with Wilson's score interval.

    ``(p + z²/2n ± z sqrt(p (1-p) / n + z²/4n²)) / (1 + z²/n)``

    Args:
        successes: from 0 to n.
        n: trials, at least 1.
    """
    if not 0 <= successes <= n or n < 1:
        raise ConfigError(f"expected 0 <= successes <= n and n >= 1, got {successes} of {n}; count at least one trial")
    z, p = NormalDist().inv_cdf(0.5 + LEVEL / 2), successes / n
    middle, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((middle + sign * spread) / (1 + z * z / n) for sign in (-1, 1))
    # The limits at none and all are 0 and 1 exactly; rounding would put p a hair outside.
    return Interval(p, 0.0 if successes == 0 else low, 1.0 if successes == n else high)


def student_quantile(p: float, df: int) -> float:
    """The `p` quantile of Student's t with `df` degrees of freedom, by Cornish and Fisher's expansion.

    Within 0.2 % at ``p = 0.975`` from 4 degrees of freedom on (Abramowitz and Stegun 26.7.5).
    """
    z = NormalDist().inv_cdf(p)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / df ** (i + 1) for i, term in enumerate(terms))


def bootstrap_strata(strata: Sequence[tuple[Tensor, Tensor]], *, resamples: int = 4000, seed: int = 0) -> Interval:
    """``sum_k mean(above_k) / sum_k mean(below_k)`` with a bootstrap interval over the units of each stratum.

    The percentiles are widened for small samples as by Hesterberg (arXiv 1411.5279, section 5.3): the plain ones
    are too narrow by ``sqrt((n-1)/n)`` and use normal instead of Student quantiles. The smallest stratum counts.

    Args:
        strata: ``(above_n, below_n)`` each, one value per independent unit (window, item, prompt).
        resamples: bootstrap samples; those whose denominator is 0 are left out.
        seed: of the resampling.

    Raises:
        ConfigError: no stratum, one without a unit, or a denominator of 0.
    """
    pairs = [(x.detach().to("cpu", torch.float64), y.detach().to("cpu", torch.float64)) for x, y in strata]
    sizes = [len(x) for x, _ in pairs]
    if not sizes or 0 in sizes or float(sum(y.mean() for _, y in pairs)) == 0:
        raise ConfigError(f"expected at least one unit and a denominator, got {sizes} that sum to 0; give more data")
    value = float(sum(x.mean() for x, _ in pairs) / sum(y.mean() for _, y in pairs))
    if min(sizes) == 1:
        return Interval(value)
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, 2**22 // max(sizes))
    ratios: list[Tensor] = []
    for start in range(0, resamples, rows):
        above_r, below_r = torch.zeros(2, min(rows, resamples - start), dtype=torch.float64)
        for x_n, y_n in pairs:
            pick_rn = torch.randint(len(x_n), (len(above_r), len(x_n)), generator=generator)
            above_r = above_r + x_n[pick_rn].mean(1)
            below_r = below_r + y_n[pick_rn].mean(1)
        ratios.append((above_r / below_r)[below_r != 0])
    n = min(sizes)
    tail = NormalDist().cdf(-math.sqrt(n / (n - 1)) * student_quantile(0.5 + LEVEL / 2, n - 1))
    low, high = torch.cat(ratios).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(value, low, high)


def bootstrap_ratio(above_n: Tensor, below_n: Tensor, *, resamples: int = 4000, seed: int = 0) -> Interval:
    """``sum(above) / sum(below)`` over the same units, with a bootstrap interval; see `bootstrap_strata`."""
    return bootstrap_strata([(above_n, below_n)], resamples=resamples, seed=seed)


def bootstrap_mean(values_n: Tensor, *, resamples: int = 4000, seed: int = 0) -> Interval:
    """The mean with a bootstrap interval; see `bootstrap_ratio`. Paired differences give a paired interval."""
    return bootstrap_ratio(values_n, torch.ones_like(values_n), resamples=resamples, seed=seed)


def sign_flip(differences_n: Tensor, *, resamples: int = 9999, seed: int = 0) -> float:
    """The two-sided p-value of paired differences: how often would random signs give a sum as far from 0?

    ``(1 + #{|sum s_i d_i| >= |sum d_i|}) / (1 + resamples)`` with each ``s_i`` drawn from {-1, 1} (Fisher's
    randomisation test for pairs, by sampling). It never falls below ``1 / (1 + resamples)``.

    Args:
        differences_n: of the same units, first minus second; differences of 0 say nothing and change nothing.
        resamples: draws of all signs.
        seed: of the signs.
    """
    d_n = differences_n.detach().to("cpu", torch.float64)
    d_n = d_n[d_n != 0]
    if not len(d_n):
        return 1.0
    generator = torch.Generator().manual_seed(seed)
    # A sum of the same terms in another order is the same sum.
    least = abs(float(d_n.sum())) * (1 - 1e-12)
    as_far, rows = 0, max(1, 2**22 // len(d_n))
    for start in range(0, resamples, rows):
        sign_rn = torch.randint(2, (min(rows, resamples - start), len(d_n)), generator=generator) * 2 - 1
        as_far += int(((sign_rn.double() @ d_n).abs() >= least).sum())
    return (1 + as_far) / (1 + resamples)


def mcnemar(first_n: Tensor, second_n: Tensor) -> float:
    """The exact two-sided p-value of McNemar's test: are two systems right equally often on the same items?

    ``min(1, 2 P(X <= min(b, c)))`` with X binomial over the b + c items that only one of them has right.

    Args:
        first_n, second_n: bool, whether each item was right.
    """
    if first_n.shape != second_n.shape:
        raise ConfigError(
            f"expected the same items, got {len(first_n)} and {len(second_n)}; score both on one list of items"
        )
    b, c = int((first_n & ~second_n).sum()), int((~first_n & second_n).sum())
    below = sum(math.comb(b + c, i) for i in range(min(b, c) + 1))
    return min(1.0, 2 * below / 2 ** (b + c))


@dataclass(frozen=True)
class Paired:
    """One system against another on the same units.

    Attributes:
        how: ``difference`` (first - second) or ``ratio`` (first / second).
        interval: of it, paired over the units.
        p_value: of both being equal.
    """

    how: str
    interval: Interval
    p_value: float

    def map(self, increasing: Callable[[float], float], how: str) -> Paired:
        """The same comparison on another scale, as the ratio ``exp(difference of logarithms)``."""
        return Paired(how, self.interval.map(increasing), self.p_value)


def paired_difference(first_n: Tensor, second_n: Tensor) -> Paired:
    """How much higher the first is per unit; see `paired_p` for the test."""
    p_value = paired_p(first_n, second_n)
    return Paired("difference", bootstrap_mean(first_n.double() - second_n.double()), p_value)


def paired_ratio(first_n: Tensor, second_n: Tensor) -> Paired:
    """``sum(first) / sum(second)``; see `paired_p` for the test."""
    p_value = paired_p(first_n, second_n)
    return Paired("ratio", bootstrap_ratio(first_n.double(), second_n.double()), p_value)


def paired_p(first_n: Tensor, second_n: Tensor) -> float:
    """`mcnemar` for units that are right or wrong (bool), else `sign_flip`."""
    if first_n.shape != second_n.shape:
        raise ConfigError(
            f"expected the same units, got {tuple(first_n.shape)} and {tuple(second_n.shape)}; measure both on one list"
        )
    if first_n.dtype == second_n.dtype == torch.bool:
        return mcnemar(first_n, second_n)
    return sign_flip(first_n.double() - second_n.double())
