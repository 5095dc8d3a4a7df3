"""Rounds over long contexts: an 8B shape with a quarter of its attention beside the same with all of it, on one card.

Ids are ``decode.8b_quarter.ctx32k.<rows>``, rows being ``b12``, which fits for both, and ``largest``, the most that the
card holds of each: ``.vs_attention`` is tokens a second of all rows together, ``.ms`` a round, ``.state_bytes`` what
the rows remember, ``.peak_bytes`` all memory with weights, and ``largest.rows`` how many rows that is. ``b12.vs_hf``
has transformers beside it, attention in every layer over a static cache, in a loop by hand. Tokens a second
over shorter contexts are ``decode.8b_quarter.context.b<rows>.t<tokens>``.
"""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import dataclass, field

import torch

from subquad.bench import shapes
from subquad.bench.engine.generate import Reference
from subquad.bench.harness import Bench
from subquad.engine.prefill import prefill
from subquad.engine.request import Limits, Request
from subquad.engine.rounds import Rounds
from subquad.models.stack import Stack

# Attention in every so many layers.
MODELS = {"quarter": 4, "attention": 1}
BASELINE = "attention in every layer"
CHUNK = 1024
# Rounds until all is captured; then looks, each behind so many rounds: 64 tokens a row.
WARM, LOOKS, ROUNDS = 3, 4, 16
# What a card needs beside weights and states: the prompt's activations, kernels, the libraries' workspaces.
MARGIN = 5 * 2**30


@dataclass
class _Measured:
    """What so many rows took.

    Attributes:
        rows: how many.
        seconds: a round, of each look.
        state_bytes: of the rows.
        peak_bytes: most that was allocated; 0 on a CPU.
    """

    rows: int
    seconds: list[float]
    state_bytes: int
    peak_bytes: int

    @property
    def rates(self) -> list[float]:
        """Tokens a second of all rows together, of each look."""
        return [self.rows / seconds for seconds in self.seconds]


@dataclass
class _Course:
    """All of one model: at the longest context by ``b12`` and ``largest``, and over contexts by rows and tokens."""

    longest: dict[str, _Measured] = field(default_factory=dict[str, _Measured])
    over: dict[tuple[int, int], _Measured] = field(default_factory=dict[tuple[int, int], _Measured])


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
            _prove(bench, name, model)
            courses[name] = _course(bench, name, model, few, longest, contexts)
            if name == "attention":
                theirs = _transformers(bench, model, few, longest)
            del model
            _forget(bench)
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


def _prove(bench: Bench, name: str, model: Stack) -> None:
    """A prompt read in pieces, its last token against the state, as a round reads it."""
    tokens = _tokens(model, 160)
    pool = model.init_pool(1, len(tokens), 1)
    prefill(model, [tokens[:-1]], pool, 64)
    hidden_btd, _ = model.read(torch.tensor([tokens[-1:]], device=model.device), pool)
    want = model(torch.tensor([tokens], device=model.device))[0, -1]
    rtol = 1e-3 if bench.dtype == torch.float32 else shapes.ROUNDING
    bench.gate(f"{name}: logits against the state equal those at once", model.head(hidden_btd)[0, -1], want, rtol=rtol)


def _course(bench: Bench, name: str, model: Stack, few: int, longest: int, contexts: tuple[int, ...]) -> _Course:
    course = _Course()
    _forget(bench)
    most = max(few, _fitting(bench, model, longest))
    while True:
        measured = _measure(bench, model, most, longest, {"largest": most, f"b{few}": few})
        if measured is not None:
            break
        if most <= few:
            raise torch.OutOfMemoryError(f"{name}: expected room for {few} rows of {longest} tokens; use a larger card")
        most = max(few, most - max(1, most // 16))
        _forget(bench)
    course.longest = measured
    bench.say(f"{bench.name}: {name}, {most} rows of {longest} tokens, {measured['largest'].rates[0]:.4g} tokens/s")
    for context in contexts:
        _forget(bench)
        found = _measure(bench, model, few, context, {str(rows): rows for rows in (1, few)})
        for rows, one in (found or {}).items():
            course.over[int(rows), context] = one
    return course


def _transformers(bench: Bench, model: Stack, rows: int, context: int) -> list[float]:
    """Seconds of a step of transformers at the end of so long a context, of each look; none where it has no room."""
    _forget(bench)
    looks, each = bench.size((LOOKS, ROUNDS), smoke=(1, 2))
    try:
        reference = Reference(model, rows, context, compiled=bench.device.type == "cuda")
        taken = [reference.far(each) for _ in range(looks)]
    except torch.OutOfMemoryError as error:
        bench.say(f"{bench.name}: transformers has no room for {rows} rows of {context} tokens: {error}")
        return []
    bench.say(f"{bench.name}: transformers, {rows} rows of {context} tokens, {rows / taken[0]:.4g} tokens/s")
    return taken


def _fitting(bench: Bench, model: Stack, context: int) -> int:
    """Rows that the card holds beside the weights; two on a CPU."""
    if bench.device.type != "cuda":
        return 2
    # What does not grow with the context may be written anew by a round.
    a_row = model.init_pool(1, context, 1, device="meta").nbytes + model.init_state(1, device="meta").nbytes
    free, _ = torch.cuda.mem_get_info(bench.device)
    return int((free - MARGIN) // a_row)


def _measure(bench: Bench, model: Stack, rows: int, context: int, parts: dict[str, int]) -> dict[str, _Measured] | None:
    """Decode with the first so many of `rows` rows, for each of `parts`; None where they do not fit."""
    cuda = bench.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(bench.device)
    looks, each = bench.size((LOOKS, ROUNDS), smoke=(1, 2))
    new = len(parts) * (WARM + looks * each) + 1
    found: dict[str, _Measured] = {}
    try:
        rounds = _filled(model, rows, context - new, new, each)
        for part, n in parts.items():
            for _ in range(WARM):
                rounds.run(n, 0)
            rounds.take(n)
            if cuda and not rounds.graphs.captures:  # there was no room for a graph's own memory
                return None
            seconds: list[float] = []
            for _ in range(looks):
                began = time.perf_counter()
                for _ in range(each):
                    rounds.run(n, 0)
                given = rounds.take(n)
                seconds.append((time.perf_counter() - began) / each)
                assert all(len(one.tokens) == each for one in given)
            peak = torch.cuda.max_memory_allocated(bench.device) if cuda else 0
            found[part] = _Measured(n, seconds, rounds.pool.first(n).nbytes, peak)
    except torch.OutOfMemoryError:
        return None
    return found


def _filled(model: Stack, rows: int, prompt: int, new: int, width: int) -> Rounds:
    """Rounds of `rows` rows that have read the same prompt: one reads it, its state is copied into the others'."""
    rounds = Rounds(model, rows, prompt + new, 1, width, None, compile=False)
    tokens = _tokens(model, prompt)
    request = Request(tokens, Limits(max_new_tokens=new, end_tokens=[]))
    rounds.admit(range(rows), [request] * rows, [0] * rows)
    prefill(model, [tokens[:-1]], rounds.pool.first(1), CHUNK)
    for _, x in rounds.pool.tensors():
        x[1:].copy_(x[:1])
    rounds.start(range(rows), [tokens] * rows)
    return rounds


def _tokens(model: Stack, n: int) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (n,), generator=generator).tolist()


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


def _rate(bench: Bench, id: str, mine: _Measured, other: _Measured, shape: dict[str, int]) -> None:
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


def _forget(bench: Bench) -> None:
    """Give back what is no longer used, so that it can be allocated in one piece."""
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
