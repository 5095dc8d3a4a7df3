"""How fast the engine's rounds go over long contexts: what the rooms share that decode many rows of one model.

A context is not generated but read once, by one row whose state the others take over: what a round costs does not ask
where its context came from. A generation's course is a few such contexts, and what lies between is as the next of them.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from subquad.bench import shapes
from subquad.bench.harness import Bench
from subquad.engine.prefill import prefill
from subquad.engine.request import Limits, Request
from subquad.engine.rounds import Rounds
from subquad.models.stack import Stack

CHUNK = 1024
# Rounds until all is captured; then looks, each behind so many rounds: 64 tokens a row.
WARM, LOOKS, ROUNDS = 3, 4, 16
# What a card needs beside weights and states: the prompt's activations, kernels, the libraries' workspaces.
MARGIN = 5 * 2**30
# Where a generation is looked at, in shares of its new tokens.
SHARES = (1 / 8, 3 / 8, 5 / 8, 7 / 8)
# Fewest rows that are tried for the best, and by how much twice as many must be faster, so that still more are tried.
FEWEST, GAIN = 64, 1.05


@dataclass
class Measured:
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

    @property
    def rate(self) -> float:
        """The median of them."""
        return statistics.median(self.rates)


@dataclass(frozen=True)
class Generation:
    """A whole generation by so many rows, from looks at its `SHARES`.

    Attributes:
        rows: that decode together.
        looks: at each share.
    """

    rows: int
    looks: tuple[Measured, ...]

    @property
    def rate(self) -> float:
        """Tokens a second of all rows together, over the whole of it."""
        return self.rows / statistics.mean(statistics.median(look.seconds) for look in self.looks)

    @property
    def peak_bytes(self) -> int:
        """Most that was allocated; 0 on a CPU."""
        return max(look.peak_bytes for look in self.looks)


def compare(
    bench: Bench,
    id: str,
    ours: Measured | Generation,
    theirs: Measured | Generation,
    baseline: str,
    shape: Mapping[str, Any],
) -> None:
    """Record tokens a second of all rows together, beside the baseline's, each by its own rows."""
    rows = {"rows": ours.rows, "baseline_rows": theirs.rows}
    bench.value(
        id, ours.rate, "tokens/s", "higher", baseline=baseline, baseline_value=theirs.rate, shape={**shape, **rows}
    )
    bench.say(f"{bench.name}.{id}: {ours.rate:.4g} tokens/s, {baseline} {theirs.rate:.4g}")


def prove(bench: Bench, name: str, model: Stack) -> None:
    """A prompt read in pieces, its last token against the state, as a round reads it."""
    ids = tokens(model, 160)
    pool = model.init_pool(1, len(ids), 1)
    prefill(model, [ids[:-1]], pool, 64)
    hidden_btd, _ = model.read(torch.tensor([ids[-1:]], device=model.device), pool)
    want = model(torch.tensor([ids], device=model.device))[0, -1]
    rtol = 1e-3 if bench.dtype == torch.float32 else shapes.ROUNDING
    bench.gate(f"{name}: logits against the state equal those at once", model.head(hidden_btd)[0, -1], want, rtol=rtol)


def fitting(bench: Bench, model: Stack, context: int) -> int:
    """Rows that the card holds beside the weights; few on a CPU."""
    if bench.device.type != "cuda":
        return bench.size(8, smoke=2)
    # What does not grow with the context may be written anew by a round.
    a_row = model.init_pool(1, context, 1, device="meta").nbytes + model.init_state(1, device="meta").nbytes
    free, _ = torch.cuda.mem_get_info(bench.device)
    return int((free - MARGIN) // a_row)


def measure(bench: Bench, model: Stack, rows: int, context: int, parts: dict[str, int]) -> dict[str, Measured] | None:
    """Decode with the first so many of `rows` rows, for each of `parts`; None where they do not fit."""
    cuda = bench.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(bench.device)
    looks, each = bench.size((LOOKS, ROUNDS), smoke=(1, 2))
    new = len(parts) * (WARM + looks * each) + 1
    found: dict[str, Measured] = {}
    try:
        rounds = filled(model, rows, context - new, new, each)
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
            found[part] = Measured(n, seconds, rounds.pool.first(n).nbytes, peak)
    except torch.OutOfMemoryError:
        return None
    return found


def generation(bench: Bench, model: Stack, rows: int, prompt: int, new: int) -> Generation | None:
    """`rows` rows from a prompt of so many tokens on; None where they do not fit.

    At each look the buffers are as long as what they hold, so that a mixer that reads them whole reads no more either.
    """
    looks: list[Measured] = []
    for share in SHARES:
        found = measure(bench, model, rows, prompt + int(share * new), {"": rows})
        if found is None:
            return None
        looks.append(found[""])
    return Generation(rows, tuple(looks))


def best(bench: Bench, name: str, model: Stack, context: int, room: int) -> Measured:
    """Behind `context` tokens, by as many rows as have `room` for their tokens, or fewer where more are not faster.

    Rows are doubled while that gains; the last try is of all that fit.

    Raises:
        torch.OutOfMemoryError: not even one row fits.
    """
    most = fitting(bench, model, room)
    rows, found = min(FEWEST, most), None
    while rows >= 1:
        forget(bench)
        made = measure(bench, model, rows, context, {"": rows})
        if made is None:
            # The estimate of the room was too high; what is found already needs no more.
            most = rows = rows - max(1, rows // 8)
            if found is not None and rows <= found.rows:
                return found
            continue
        one = made[""]
        bench.say(f"{bench.name}: {name}, {rows} rows of {context} tokens, {one.rate:.4g} tokens/s")
        enough = found is not None and one.rate < GAIN * found.rate
        found = one if found is None or one.rate > found.rate else found
        if enough or rows >= most:
            return found
        rows = min(2 * rows, most)
    raise torch.OutOfMemoryError(f"{name}: expected room for one row of {room} tokens, got none; use a larger card")


def filled(model: Stack, rows: int, prompt: int, new: int, width: int) -> Rounds:
    """Rounds of `rows` rows that have read the same prompt: one reads it, its state is copied into the others'."""
    rounds = Rounds(model, rows, prompt + new, 1, width, None, compile=False)
    ids = tokens(model, prompt)
    request = Request(ids, Limits(max_new_tokens=new, end_tokens=[]))
    rounds.admit(range(rows), [request] * rows, [0] * rows)
    prefill(model, [ids[:-1]], rounds.pool.first(1), CHUNK)
    for _, x in rounds.pool.tensors():
        x[1:].copy_(x[:1])
    rounds.start(range(rows), [ids] * rows)
    return rounds


def tokens(model: Stack, n: int) -> list[int]:
    """Any ids of the vocabulary, the same each time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (n,), generator=generator).tolist()


def forget(bench: Bench) -> None:
    """Give back what is no longer used, so that it can be allocated in one piece."""
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
