import pytest

from subquad.core.errors import ConfigError
from subquad.evals.calibration import calibrate
from subquad.evals.needle import NeedleGrid

GRID = NeedleGrid(lengths=(512, 900), depths=(0.2, 0.8), samples=3, seed=7)


def falling(grid):
    """A teacher that finds less the more there is."""
    return 1 - grid.distractors / 40 - (grid.digits - 3) / 100


def test_finds_a_difficulty_between_the_limits_on_other_questions():
    asked = []

    def score(grid):
        asked.append(grid)
        return falling(grid)

    found = calibrate(GRID, lambda grid: True, score)
    assert 0.4 <= falling(found.grid) == found.score <= 0.9
    assert (found.grid.lengths, found.grid.depths, found.grid.samples, found.grid.seed) == (
        (512, 900),
        (0.2, 0.8),
        3,
        7,
    )
    assert all(grid.seed == 8 for grid in asked)
    assert found.tried == tuple((g.distractors, g.digits, falling(g)) for g in asked)
    assert len(asked) <= 4
    assert calibrate(GRID, lambda grid: True, falling) == found


@pytest.mark.parametrize("share", [0.45, 0.65, 0.88])
def test_every_range_that_a_step_falls_into_is_found(share):
    found = calibrate(GRID, lambda grid: True, falling, low=share - 0.05, high=share + 0.05)
    assert abs(found.score - share) <= 0.05


def test_where_there_is_no_room_numbers_grow_instead():
    # Only what is longer than 5 digits is hard, and at most 7 distractors fit.
    found = calibrate(GRID, lambda grid: grid.distractors <= 7, lambda grid: 1.0 if grid.digits <= 5 else 0.7)
    assert (found.grid.distractors, found.grid.digits, found.score) == (7, 7, 0.7)


@pytest.mark.parametrize(
    ("share", "words"), [(1.0, "100% with 63 distractors of 12 digits"), (0.0, "0% with 0 distractors")]
)
def test_a_teacher_that_finds_all_or_nothing_is_named(share, words):
    with pytest.raises(ConfigError, match=words):
        calibrate(GRID, lambda grid: True, lambda grid: share)
    with pytest.raises(ConfigError, match="no room"):
        calibrate(GRID, lambda grid: False, lambda grid: share)
