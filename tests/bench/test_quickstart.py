"""The quickstart's plan fits the time; CI runs the whole, shortened, on the real teacher."""

from __future__ import annotations

from pathlib import Path

import pytest

from subquad.bench.quickstart import CONTEXT, NEEDLE_TOKENS, plan, quickstart
from subquad.core.errors import ConfigError


@pytest.mark.parametrize("minutes", [1.0, 2.0, 5.5, 30.0])
@pytest.mark.parametrize("pace", [350.0, 1_000.0, 100_000.0])
def test_what_is_planned_fits_the_minutes(minutes: float, pace: float) -> None:
    todo = plan(minutes, pace)
    read = 3 * todo.windows * CONTEXT + 2 * todo.needles * NEEDLE_TOKENS + 2 * todo.speed_context + todo.measure_tokens
    assert read / pace / 60 + todo.align_minutes < minutes
    assert todo.windows >= 1
    assert todo.needles >= 2


def test_more_minutes_give_more_of_everything() -> None:
    short, long = plan(2.0, 350.0), plan(6.0, 350.0)
    assert long.align_minutes > short.align_minutes
    assert long.windows > short.windows
    assert long.needles > short.needles


def test_too_little_time_is_refused_with_what_would_do() -> None:
    with pytest.raises(ConfigError, match=r"expected at least \d+\.\d at 100 tokens/s, got 1\.0"):
        plan(1.0, 100.0)


def test_a_folder_with_a_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds a run already"):
        quickstart(tmp_path)
    assert (tmp_path / "run.json").read_text() == "{}"
