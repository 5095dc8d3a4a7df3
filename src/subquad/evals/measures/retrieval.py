"""Retrieval: needles among distractors, at a difficulty that a teacher has something to lose at, and passkeys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from subquad.core.errors import ConfigError
from subquad.evals.calibration import calibrate
from subquad.evals.needle import (
    FILLER,
    NUMBERS,
    PASSKEY,
    NeedleGrid,
    NeedleResult,
    Wording,
    evaluate_needles,
    make_questions,
    needle_retention,
)
from subquad.evals.report import Section, needle_map
from subquad.evals.stats import Paired, paired_difference, paired_ratio
from subquad.evals.suite import ROLES, Suite


def needles(suite: Suite, hay: str, grid: NeedleGrid, by: str = "generation", *, calibrated: bool = False) -> None:
    """Needle retrieval over lengths and depths.

    Args:
        hay: see `make_questions`.
        grid: what to ask.
        by: see `NeedleResult`.
        calibrated: replace the grid's distractors and digits by those at which the teacher, or a model without
            one, finds 40 to 90 %; see `calibrate`.
    """
    more: dict[str, Any] = {}
    if calibrated:
        who = "teacher" if "teacher" in suite.models else "model"
        found = calibrate(
            grid,
            lambda trial: _has_room(suite, trial),
            lambda trial: float(_ask(suite, hay, trial, by, NUMBERS, [who])[who].hit_n.double().mean()),
        )
        grid, more = found.grid, {"calibrated": found.score}
    shape = {"distractors": grid.distractors, "digits": grid.digits} | more
    _retrieval(suite, "needle", "needles", _ask(suite, hay, grid, by, NUMBERS), grid, by, shape)


def passkeys(suite: Suite, grid: NeedleGrid, by: str = "generation") -> None:
    """Passkey retrieval over lengths and depths: one number in a text that repeats itself."""
    found = _ask(suite, FILLER, grid, by, PASSKEY)
    _retrieval(suite, "passkey", "passkeys", found, grid, by, {"digits": grid.digits})


def _has_room(suite: Suite, grid: NeedleGrid) -> bool:
    """Whether the needles fit into nine tenths of the shortest text, since the next ones may be longer."""
    shortest = replace(grid, lengths=(min(grid.lengths) * 9 // 10,), depths=grid.depths[:1], samples=1)
    try:
        make_questions(suite.tokenizer, FILLER, shortest)
    except ConfigError:
        return False
    return True


def _ask(
    suite: Suite, hay: str, grid: NeedleGrid, by: str, wording: Wording, roles: Sequence[str] = ROLES
) -> dict[str, NeedleResult]:
    questions = make_questions(suite.tokenizer, hay, grid, wording)
    return suite.measure(
        f"{'needles' if wording is NUMBERS else 'passkeys'}, {grid.distractors} distractors",
        "tokens",
        NeedleResult,
        ("needles", questions, by),
        lambda m, progress: evaluate_needles(
            m.model, suite.tokenizer, questions, by=by, batch_tokens=suite.batch_tokens, progress=progress
        ),
        roles,
    )


def _retrieval(
    suite: Suite, id: str, name: str, found: dict[str, NeedleResult], grid: NeedleGrid, by: str, shape: dict[str, Any]
) -> None:
    def kept(first: NeedleResult, second: NeedleResult) -> Paired:
        needle_retention(first, second)  # refuses different questions
        return paired_ratio(first.hit_n, second.hit_n)

    def add(parts: dict[str, NeedleResult], cell: str, words: str) -> None:
        suite.add(
            f"{id}.{by}.{cell}",
            f"{name} by {by}, {words}",
            "1",
            "higher",
            parts,
            lambda r: r.accuracy(),
            {"depths": len(grid.depths), "samples": grid.samples} | shape | {"questions": len(parts["model"].hit_n)},
            kept,
            between=lambda a, b: paired_difference(a.hit_n, b.hit_n),
            chance=found["model"].chance,
        )

    for length in grid.lengths:
        add({who: r.at(length) for who, r in found.items()}, str(length), f"{length:,} tokens")
    if len(grid.lengths) > 1:
        longest = max(grid.lengths)
        add(found, f"upto{longest}", f"all lengths to {longest:,}")
    note = f"{grid.distractors} distractors, {grid.digits} digits." if id == "needle" else ""
    maps = [needle_map(suite.labels[who], r) for who, r in found.items()]
    suite.sections.append(Section(name.capitalize(), maps, note))
