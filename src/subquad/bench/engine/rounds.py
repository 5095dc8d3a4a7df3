"""Rounds over long contexts: an 8B shape with a quarter of its attention beside the same with all of it, on one card.

Ids are ``decode.8b_quarter.ctx32k.<rows>``, rows being ``b12``, which fits for both, and ``largest``, the most that the
card holds of each: ``.vs_attention`` is tokens a second of all rows together, ``.ms`` a round, ``.state_bytes`` what
the rows remember, ``.peak_bytes`` all memory with weights, and ``largest.rows`` how many rows that is. ``b12.vs_hf``
has transformers beside it, attention in every layer over a static cache, in a loop by hand. Tokens a second
over shorter contexts are ``decode.8b_quarter.context.b<rows>.t<tokens>``.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

import torch

from subquad.bench import shapes
from subquad.bench.engine.generate import Reference
from subquad.bench.generating import LOOKS, ROUNDS, Measured, fitting, forget, measure, prove
from subquad.bench.harness import Bench
from subquad.models.stack import Stack

# Attention in every so many layers.
MODELS = {"quarter": 4, "attention": 1}
BASELINE = "attention in every layer"


@dataclass
class _Course:
    """All of one model: at the longest context by ``b12`` and ``largest``, and over contexts by rows and tokens."""

    longest: dict[str, Measured] = field(default_factory=dict[str, Measured])
    over: dict[tuple[int, int], Measured] = field(default_factory=dict[tuple[int, int], Measured])


def run(bench: Bench) -> None:
    """A context of 32k, 12 rows and as many as fit; contexts from 1k on, one row and 12."""
    bench.name = "decode.8b_quarter"
    few, longest = bench.size((12, 32768), smoke=(2, 192))
    contexts = bench.size((1024, 4096, 16384), smoke=(128,))
    courses: dict[str, _Course] = {}
    theirs: list[float] = []
    with torch.no_grad():
        for name, every in MODELS.items():
            model = shapes.shape_8b(bench, every)
            prove(bench, name, model)
            courses[name] = _course(bench, name, model, few, longest, contexts)
            if name == "attention":
                theirs = _transformers(bench, model, few, longest)
            del model
            forget(bench)
    _record(bench, courses["quarter"], courses["attention"], few, longest)
    if not theirs:
        return
    mine = courses["quarter"].longest[f"b{few}"]
    bench.value(
        f"ctx{longest // 1024}k.b{few}.vs_hf",
        statistics.median(mine.rates),
        "tokens/s",
        "higher",
        baseline=f"transformers in a bare loop, {BASELINE}, static cache",
        baseline_value=few / statistics.median(theirs),
        shape={"rows": few, "context": longest},
        reps=[[rate, few / seconds] for rate, seconds in zip(mine.rates, theirs, strict=False)],
    )


def _course(bench: Bench, name: str, model: Stack, few: int, longest: int, contexts: tuple[int, ...]) -> _Course:
    course = _Course()
    forget(bench)
    most = max(few, fitting(bench, model, longest))
    while True:
        measured = measure(bench, model, most, longest, {"largest": most, f"b{few}": few})
        if measured is not None:
            break
        if most <= few:
            raise torch.OutOfMemoryError(f"{name}: expected room for {few} rows of {longest} tokens; use a larger card")
        most = max(few, most - max(1, most // 16))
        forget(bench)
    course.longest = measured
    bench.say(f"{bench.name}: {name}, {most} rows of {longest} tokens, {measured['largest'].rates[0]:.4g} tokens/s")
    for context in contexts:
        forget(bench)
        found = measure(bench, model, few, context, {str(rows): rows for rows in (1, few)})
        for rows, one in (found or {}).items():
            course.over[int(rows), context] = one
    return course


def _transformers(bench: Bench, model: Stack, rows: int, context: int) -> list[float]:
    """Seconds of a step of transformers at the end of so long a context, of each look; none where it has no room."""
    forget(bench)
    looks, each = bench.size((LOOKS, ROUNDS), smoke=(1, 2))
    try:
        reference = Reference(model, rows, context, compiled=bench.device.type == "cuda")
        taken = [reference.far(each) for _ in range(looks)]
    except torch.OutOfMemoryError as error:
        bench.say(f"{bench.name}: transformers has no room for {rows} rows of {context} tokens: {error}")
        return []
    bench.say(f"{bench.name}: transformers, {rows} rows of {context} tokens, {rows / taken[0]:.4g} tokens/s")
    return taken


def _record(bench: Bench, ours: _Course, theirs: _Course, few: int, longest: int) -> None:
    at = f"ctx{longest // 1024}k"
    for part in (f"b{few}", "largest"):
        mine, other = ours.longest[part], theirs.longest[part]
        shape = {"rows": mine.rows, "baseline_rows": other.rows, "context": longest}
        _rate(bench, f"{at}.{part}.vs_attention", mine, other, shape)
        figures = {
            "ms": (statistics.median(mine.seconds) * 1e3, statistics.median(other.seconds) * 1e3, "ms"),
            "state_bytes": (mine.state_bytes, other.state_bytes, "bytes"),
        }
        if part == "largest":
            # Both parts are decoded in the memory of the larger.
            figures["peak_bytes"] = (mine.peak_bytes, other.peak_bytes, "bytes")
            bench.value(f"{at}.largest.rows", mine.rows, "rows", "higher", baseline=BASELINE, baseline_value=other.rows)
        for what, (value, baseline, unit) in figures.items():
            bench.value(
                f"{at}.{part}.{what}", value, unit, "lower", baseline=BASELINE, baseline_value=baseline, shape=shape
            )
    # The longest context belongs to the curve as well.
    ours.over[few, longest], theirs.over[few, longest] = ours.longest[f"b{few}"], theirs.longest[f"b{few}"]
    for (rows, context), mine in sorted(ours.over.items()):
        if (other := theirs.over.get((rows, context))) is not None:
            _rate(bench, f"context.b{rows}.t{context}", mine, other, {"rows": rows, "context": context})


def _rate(bench: Bench, id: str, mine: Measured, other: Measured, shape: dict[str, int]) -> None:
    bench.value(
        id,
        statistics.median(mine.rates),
        "tokens/s",
        "higher",
        baseline=BASELINE,
        baseline_value=statistics.median(other.rates),
        shape=shape,
        reps=[list(pair) for pair in zip(mine.rates, other.rates, strict=True)],
    )
