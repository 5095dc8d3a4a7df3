"""What a bench room works with: gates, interleaved timing, and the share of the physical limit."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from subquad.bench.results import Row, dtype_name, make_row
from subquad.bench.timing import Call, Times, copies_of, race
from subquad.core.errors import ConfigError, SubquadError

T = TypeVar("T")
MEASURES: tuple[str, ...] = ("largest", "norm")


class GateError(SubquadError, AssertionError):
    """What was to be timed computes something else than it should."""


class Bench:
    """One run of one bench room.

    Attributes:
        name: dotted name, which every id starts with: that of the room, unless the room gives itself another.
        device: where to put tensors.
        dtype: the dtype to measure in.
        smoke: tiny sizes, one repetition.
        reps: repetitions of each timed pair.
        say: told one line about each step.
        hybrid: a converted model for the rooms that measure one beside its teacher, or "".
        hybrid_rows: rows at most that the hybrid is measured at; 0 for no such limit.
        drafter: folder of a trained drafter for the rooms whose drafter is trained, or None.
        data: a folder of published prompts, or of texts to train on, for the rooms that would else use ours, or None.
        minutes: of training for the rooms that train by the clock; 0 leaves it to the room.
        work: a folder where the rooms that train keep their run, so that the next one goes on with it, or None.
        rows: the figures so far.
        gates: what has been proved so far.
        limits: the device's measured bandwidth and peak, once a share of them was worked out.
    """

    def __init__(
        self,
        name: str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        smoke: bool = False,
        reps: int = 15,
        say: Callable[[str], None] = lambda line: None,
        hybrid: str = "",
        hybrid_rows: int = 0,
        drafter: Path | None = None,
        data: Path | None = None,
        minutes: float = 0.0,
        work: Path | None = None,
    ) -> None:
        self.name = name
        self.device = torch.device(device)
        self.dtype = dtype
        self.smoke = smoke
        self.reps = 1 if smoke else reps
        self.say = say
        self.hybrid, self.hybrid_rows = hybrid, hybrid_rows
        self.drafter = drafter
        self.data = data
        self.minutes, self.work = minutes, work
        self.rows: list[Row] = []
        self.gates: list[dict[str, Any]] = []
        self.limits: dict[str, float] = {}

    @property
    def factory(self) -> dict[str, Any]:
        """``device`` and ``dtype``, for ``torch.randn(..., **bench.factory)``."""
        return {"device": self.device, "dtype": self.dtype}

    def size(self, full: T, *, smoke: T) -> T:
        """`full`, or `smoke` under ``--smoke``."""
        return smoke if self.smoke else full

    def gate(
        self,
        what: str,
        got: Tensor,
        want: Tensor,
        *,
        naive: Tensor | None = None,
        rtol: float | Mapping[str, float] | None = None,
    ) -> dict[str, float]:
        """Pass if `got` is `want` up to rounding, else stop the bench before a speed is printed.

        The error is measured twice, as the largest difference over the largest magnitude of `want`, which shows a
        single wrong element, and as the norm of the difference over the norm of `want`, which shows many that are
        slightly wrong. Each may be `rtol`, or, given `naive` (the plain computation in the same dtype), twice the error
        of that, and never less than the dtype's epsilon; four of them in float32 and float64, whose sums round in
        another order on each processor, where those of halves are in float32.

        Args:
            what: the claim, in words.
            got: what will be timed.
            want: the truth, computed in float64 where `naive` is given.
            naive: the equation in the dtype of `got`.
            rtol: the relative error allowed, or one for each measure, as this function returned them.

        Returns:
            The error that each measure allowed.

        Raises:
            GateError: it is something else.
        """
        if (naive is None) == (rtol is None):
            raise ConfigError(f"gate {what!r}: expected either naive or rtol, got both or neither; give one")
        if naive is not None:
            # A sum of n numbers in another order is off by some sqrt(n) / 2 epsilons: four are 64 numbers.
            least = torch.finfo(got.dtype).eps * (1 if got.element_size() == 2 else 4)
            limits = {measure: max(2 * error, least) for measure, error in _errors(naive, want).items()}
        else:
            limits = dict(rtol) if isinstance(rtol, Mapping) else dict.fromkeys(MEASURES, float(rtol or 0.0))
        errors = _errors(got, want)
        red = [measure for measure in MEASURES if not errors[measure] <= limits[measure]]
        # Of both measures the one nearest its limit is kept.
        shown = red[0] if red else max(MEASURES, key=lambda m: errors[m] / limits[m] if limits[m] else 0.0)
        error, limit = errors[shown], limits[shown]
        if red:
            claim = f"{self.name}: gate {what!r} is red"
            raise GateError(f"{claim}: expected an error of at most {limit:.2e}, got {error:.2e} ({shown})")
        self.gates.append({"what": what, "measure": shown, "error": error, "limit": limit})
        return limits

    def value(
        self,
        id: str,
        value: float,
        unit: str,
        better: str,
        *,
        baseline: str = "",
        baseline_value: float | None = None,
        shape: Mapping[str, Any] | None = None,
        reps: Sequence[Sequence[float]] = (),
    ) -> None:
        """Record a figure that `compare` and `race` did not find: a quality, a size, a count, a speed of a room's own.

        Args:
            id: what follows the bench's name in the row's id.
            value: the figure.
            unit: its unit, ``1`` for a pure number.
            better: ``higher`` or ``lower``.
            baseline: what it is compared with.
            baseline_value: that one's figure, from the same run.
            shape: sizes by name.
            reps: every repetition, ``[value]`` or ``[value, baseline]``.
        """
        self._add(id, value, unit, better, baseline=baseline, baseline_value=baseline_value, shape=shape, reps=reps)

    def compare(
        self,
        id: str,
        ours: Callable[..., object],
        baseline: Callable[..., object],
        *,
        baseline_name: str,
        inputs: tuple[Tensor, ...] = (),
        tokens: int | None = None,
        moved: float = 0.0,
        flops: float = 0.0,
        shape: Mapping[str, Any] | None = None,
    ) -> None:
        """Time `ours` and `baseline` in turns on the same inputs and record the medians.

        Args:
            id: what follows the bench's name in the row's id.
            ours: called with `inputs`.
            baseline: called with `inputs`.
            baseline_name: what it is.
            inputs: tensors, copied as often as it takes to exceed four times the cache; calls rotate over the copies.
            tokens: how many tokens a call handles: the figure is then tokens/s, else milliseconds.
            moved: bytes `ours` must read and write at least.
            flops: floating-point operations `ours` must do at least.
            shape: sizes by name.

        Raises:
            GateError: nothing was proved yet.
        """
        if not self.gates:
            raise GateError(f"{self.name}: expected a gate before the speed {id!r}, got none; call bench.gate first")
        copies = self.copies(inputs)
        inner = [self._calibrate(fn, copies) for fn in (ours, baseline)]
        pairs: list[list[float]] = []
        for rep in range(self.reps):
            pair = [0.0, 0.0]
            # Alternating who goes first keeps a drifting clock from favouring one.
            for i in (0, 1) if rep % 2 == 0 else (1, 0):
                pair[i] = _seconds((ours, baseline)[i], copies, inner[i], self.device)
            pairs.append(pair)
        seconds = statistics.median(p[0] for p in pairs)

        def scale(s: float) -> float:
            return s * 1e3 if tokens is None else tokens / s

        least = self.least(moved, flops)
        self._add(
            id,
            scale(seconds),
            "ms" if tokens is None else "tokens/s",
            "lower" if tokens is None else "higher",
            baseline=baseline_name,
            baseline_value=scale(statistics.median(p[1] for p in pairs)),
            limit_share=least / seconds if least else None,
            shape=shape,
            reps=[[scale(s) for s in pair] for pair in pairs],
        )

    def race(self, contenders: Mapping[str, Call], copies: Sequence[tuple[Tensor, ...]]) -> Times:
        """Time kernels in turns, without what launching them costs; `speed` makes rows of it.

        Args:
            contenders: called with one of `copies`.
            copies: what `copies` returns, or arguments of the same size that lie elsewhere in memory.

        Raises:
            GateError: nothing was proved yet.
        """
        if not self.gates:
            raise GateError(f"{self.name}: expected a gate before a race, got none; call bench.gate first")
        return race(contenders, copies, self.device, reps=self.reps)

    def speed(
        self,
        id: str,
        times: Times,
        *,
        ours: str = "ours",
        baseline: str = "",
        baseline_name: str = "",
        moved: float = 0.0,
        flops: float = 0.0,
        shape: Mapping[str, Any] | None = None,
    ) -> None:
        """Record the milliseconds that `race` found.

        Args:
            id: what follows the bench's name in the row's id.
            times: of the race.
            ours: the contender whose figure it is.
            baseline: the contender it is compared with, or "".
            baseline_name: what that one is; by default its name.
            moved: bytes `ours` must read and write at least.
            flops: floating-point operations `ours` must do at least.
            shape: sizes by name.
        """
        ms = times.median(ours)
        least = self.least(moved, flops) * 1e3
        self._add(
            id,
            ms,
            "ms",
            "lower",
            baseline=baseline_name or baseline,
            baseline_value=times.median(baseline) if baseline else None,
            limit_share=least / ms if least else None,
            shape={**(shape or {}), "timed": times.how},
            reps=times.pairs(ours, baseline),
        )
        row = self.rows[-1]
        against = f", {row.baseline} {row.baseline_value:.4g}" if row.baseline_value else ""
        self.say(f"{row.id}: {ms:.4g} ms{against}")

    def least(self, moved: float, flops: float) -> float:
        """Seconds that the device needs at least, by its measured bandwidth or its measured peak; 0 for nothing."""
        if moved:
            self.limits["bytes_per_s"] = bandwidth(self.device, self.smoke)
        if flops:
            self.limits["flops_per_s"] = peak(self.device, self.dtype, self.smoke)
        return max(
            moved / self.limits["bytes_per_s"] if moved else 0.0, flops / self.limits["flops_per_s"] if flops else 0.0
        )

    def _add(self, id: str, value: float, unit: str, better: str, **rest: Any) -> None:
        self.rows.append(make_row(f"{self.name}.{id}", value, unit, better, dtype=dtype_name(self.dtype), **rest))

    def copies(self, inputs: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
        """Copies of `inputs` that together exceed four times the cache; one under ``--smoke``."""
        return copies_of(inputs, 0 if self.smoke or not inputs else 4 * cache_bytes(self.device))

    def _calibrate(self, fn: Callable[..., object], copies: list[tuple[Tensor, ...]]) -> int:
        """Calls a repetition needs to last 20 ms, found after two calls to warm up."""
        if self.smoke:
            return 1
        _seconds(fn, copies, 2, self.device)
        return min(max(math.ceil(0.02 / _seconds(fn, copies, 1, self.device)), 1), 1000)


def _seconds(fn: Callable[..., object], copies: list[tuple[Tensor, ...]], calls: int, device: torch.device) -> float:
    """Seconds a call takes, over `calls` calls."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for i in range(calls):
        fn(*copies[i % len(copies)])
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / calls


def _errors(got: Tensor, want: Tensor) -> dict[str, float]:
    if got.shape != want.shape:
        return dict.fromkeys(MEASURES, math.inf)
    want = want.detach().double()
    difference = got.detach().double() - want
    errors = (difference.abs().max(), difference.norm())
    scales = (want.abs().max(), want.norm())
    return {m: (e / s if s else e).item() for m, e, s in zip(MEASURES, errors, scales, strict=True)}


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache; 32 MiB where the system doesn't tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    found = 0
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        found = max(found, int(text[:-1]) * {"K": 2**10, "M": 2**20}[text[-1]])
    return found or 32 * 2**20


@cache
def bandwidth(device: torch.device, smoke: bool = False) -> float:
    """Bytes per second that a copy reads and writes on `device`, the best of seven."""
    n = 2**16 if smoke else max(16 * cache_bytes(device), 2**26)
    source = torch.ones(n, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * n / _best(device, lambda: target.copy_(source))


@cache
def peak(device: torch.device, dtype: torch.dtype, smoke: bool = False) -> float:
    """Floating-point operations per second of a square matrix product on `device`, the best of seven."""
    n = 64 if smoke else (8192 if device.type == "cuda" else 1536)
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / _best(device, lambda: a @ a)


def _best(device: torch.device, fn: Call) -> float:
    fn()
    return min(_seconds(fn, [()], 3, device) for _ in range(7))
