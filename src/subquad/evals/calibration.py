"""How hard needles must be for a teacher to have something to lose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from subquad.core.errors import ConfigError
from subquad.evals.needle import NeedleGrid


@dataclass(frozen=True)
class Calibration:
    """A difficulty at which a teacher has something to lose.

    Attributes:
        grid: the grid given, with the distractors and digits that were found.
        score: the share that the teacher found of the questions tried, which are others than those of `grid`.
        tried: ``(distractors, digits, score)`` of each trial, in order.
    """

    grid: NeedleGrid
    score: float
    tried: tuple[tuple[int, int, float], ...]


def calibrate(
    grid: NeedleGrid,
    fits: Callable[[NeedleGrid], bool],
    score: Callable[[NeedleGrid], float],
    *,
    low: float = 0.4,
    high: float = 0.9,
) -> Calibration:
    """The distractors and digits at which a teacher finds between `low` and `high` of the needles.

    Where it finds all, or none, a student can lose unseen. Difficulties rise from 3 digits alone over ever more
    distractors to longer numbers; the search halves them, and asks with another seed than that of `grid`, so that the
    questions of the measurement take no part in the choice. The same teacher gives the same grid.

    Args:
        grid: lengths, depths and samples; its distractors and digits are replaced.
        fits: whether a grid's needles have room.
        score: the share that the teacher finds.
        low, high: limits of the share.

    Raises:
        ConfigError: no difficulty fits, or none gives a share within the limits.
    """
    steps = [(0, 3), (0, 5), *((n, 5) for n in (1, 2, 3, 5, 7, 11, 15, 23, 31, 47, 63)), (63, 7), (63, 9), (63, 12)]
    steps = [s for s in steps if fits(replace(grid, distractors=s[0], digits=s[1]))]
    if (
        steps and steps[-1][1] == 5
    ):  # no room for the most distractors: longer numbers with as many as there is room for
        longer = [(steps[-1][0], digits) for digits in (7, 9, 12)]
        steps += [s for s in longer if fits(replace(grid, distractors=s[0], digits=s[1]))]
    tried: list[tuple[int, int, float]] = []
    first, last = 0, len(steps) - 1
    while first <= last:
        at = (first + last) // 2
        distractors, digits = steps[at]
        trial = replace(grid, distractors=distractors, digits=digits, seed=grid.seed + 1)
        tried.append((distractors, digits, score(trial)))
        if low <= tried[-1][2] <= high:
            return Calibration(replace(trial, seed=grid.seed), tried[-1][2], tuple(tried))
        first, last = (at + 1, last) if tried[-1][2] > high else (first, at - 1)
    found = ", ".join(f"{share:.0%} with {n} distractors of {digits} digits" for n, digits, share in tried)
    raise ConfigError(
        f"needles: expected a difficulty at which the teacher finds {low:.0%} to {high:.0%}, got {found or 'no room'}; "
        "choose other lengths, or set the distractors by hand"
    )
