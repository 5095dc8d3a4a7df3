"""What a bench room works with: gates, interleaved timing, and the share of the physical limit."""

from __future__ import annotations

import importlib
import math
import statistics
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from subquad.bench.results import Result, Row, dtype_name, environment, make_row
from subquad.core.errors import ConfigError, SubquadError, nearest

T = TypeVar("T")
HERE = Path(__file__).resolve().parent


class GateError(SubquadError, AssertionError):
    """What was to be timed computes something else than it should."""


class Bench:
    """One run of one bench room.

    Attributes:
        name: dotted name, which every id starts with.
        device: where to put tensors.
        dtype: the dtype to measure in.
        smoke: tiny sizes, one repetition.
        reps: repetitions of each timed pair.
        rows: the figures so far.
        gates: what has been proved so far.
    """

    def __init__(
        self,
        name: str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        smoke: bool = False,
        reps: int = 15,
    ) -> None:
        self.name = name
        self.device = torch.device(device)
        self.dtype = dtype
        self.smoke = smoke
        self.reps = 1 if smoke else reps
        self.rows: list[Row] = []
        self.gates: list[dict[str, Any]] = []

    @property
    def factory(self) -> dict[str, Any]:
        """``device`` and ``dtype``, for ``torch.randn(..., **bench.factory)``."""
        return {"device": self.device, "dtype": self.dtype}

    def size(self, full: T, *, smoke: T) -> T:
        """`full`, or `smoke` under ``--smoke``."""
        return smoke if self.smoke else full

    def gate(
        self, what: str, got: Tensor, want: Tensor, *, naive: Tensor | None = None, rtol: float | None = None
    ) -> None:
        """Pass if `got` is `want` up to rounding, else stop the bench before a speed is printed.

        The error is the largest difference over the largest magnitude of `want`. It may be `rtol`, or, given `naive`
        (the plain computation in the same dtype), twice that one's error, and never less than the dtype's epsilon.

        Args:
            what: the claim, in words.
            got: what will be timed.
            want: the truth, computed in float64 where `naive` is given.
            naive: the equation in the dtype of `got`.
            rtol: the relative error allowed.

        Raises:
            GateError: it is something else.
        """
        if (naive is None) == (rtol is None):
            raise ConfigError(f"gate {what!r}: expected either naive or rtol, got both or neither; give one")
        limit = rtol if naive is None else max(2 * _error(naive, want), torch.finfo(got.dtype).eps)
        assert limit is not None
        error = _error(got, want)
        if not error <= limit:
            raise GateError(
                f"{self.name}: gate {what!r} is red: expected an error of at most {limit:.2e}, got {error:.2e}"
            )
        self.gates.append({"what": what, "error": error, "limit": limit})

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
    ) -> None:
        """Record a figure that is no speed: a quality, a size, a count.

        Args:
            id: what follows the bench's name in the row's id.
            value: the figure.
            unit: its unit, ``1`` for a pure number.
            better: ``higher`` or ``lower``.
            baseline: what it is compared with.
            baseline_value: that one's figure, from the same run.
            shape: sizes by name.
        """
        self._add(id, value, unit, better, baseline=baseline, baseline_value=baseline_value, shape=shape, reps=())

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
        copies = self._copies(inputs)
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

        share = None
        if moved or flops:
            least = max(
                moved / bandwidth(self.device, self.smoke) if moved else 0.0,
                flops / peak(self.device, self.dtype, self.smoke) if flops else 0.0,
            )
            share = least / seconds
        self._add(
            id,
            scale(seconds),
            "ms" if tokens is None else "tokens/s",
            "lower" if tokens is None else "higher",
            baseline=baseline_name,
            baseline_value=scale(statistics.median(p[1] for p in pairs)),
            limit_share=share,
            shape=shape,
            reps=[[scale(s) for s in pair] for pair in pairs],
        )

    def _add(self, id: str, value: float, unit: str, better: str, **rest: Any) -> None:
        self.rows.append(make_row(f"{self.name}.{id}", value, unit, better, dtype=dtype_name(self.dtype), **rest))

    def _copies(self, inputs: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
        nbytes = max(sum(x.numel() * x.element_size() for x in inputs), 1)
        n = 1 if self.smoke or not inputs else math.ceil(4 * cache_bytes(self.device) / nbytes)
        # Tiny inputs stop at 256 copies: their calls are bound by overhead, not by memory.
        n = min(max(n, 1), 256)
        return [tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in inputs) for _ in range(n)]

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


def _error(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape:
        return math.inf
    difference = (got.detach().double() - want.detach().double()).abs().max().item()
    scale = want.detach().double().abs().max().item()
    return difference / scale if scale else difference


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
    n = 2**16 if smoke else max(4 * cache_bytes(device), 2**26)
    source = torch.ones(n, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * n / _best(device, lambda: target.copy_(source))


@cache
def peak(device: torch.device, dtype: torch.dtype, smoke: bool = False) -> float:
    """Floating-point operations per second of a square matrix product on `device`, the best of seven."""
    n = 64 if smoke else (8192 if device.type == "cuda" else 1536)
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / _best(device, lambda: a @ a)


def _best(device: torch.device, fn: Callable[[], object]) -> float:
    return min(_seconds(fn, [()], 3, device) for _ in range(7))


def rooms() -> list[str]:
    """``family/slug`` of every bench room there is, sorted."""
    found: list[str] = []
    for folder in HERE.iterdir():
        if folder.is_dir() and folder.name != "__pycache__":
            for room in folder.iterdir():
                if (room.suffix == ".py" and room.stem != "__init__") or (room / "__init__.py").exists():
                    found.append(f"{folder.name}/{room.stem}")
    return sorted(found)


def find_rooms(names: list[str]) -> list[str]:
    """The rooms that `names` mean: a ``family/slug``, or a family for all of its own; every room for an empty list.

    Raises:
        ConfigError: no such room, with the nearest name.
    """
    known = rooms()
    families = {room.split("/")[0] for room in known}
    chosen: list[str] = []
    for name in names or sorted(families):
        if name in known:
            chosen.append(name)
        elif name in families:
            chosen.extend(room for room in known if room.startswith(f"{name}/"))
        else:
            raise ConfigError(f"unknown bench {name!r}{nearest(name, [*known, *families])}")
    return list(dict.fromkeys(chosen))


def run_room(
    room: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, smoke: bool = False
) -> Result:
    """Run one bench room and return its result.

    Args:
        room: ``family/slug``.
        device: where to measure.
        dtype: the dtype to measure in.
        smoke: tiny sizes, one repetition.

    Raises:
        GateError: what was to be timed computes something else than it should.
    """
    device = torch.device(device)
    bench = Bench(room.replace("/", "."), device=device, dtype=dtype, smoke=smoke)
    module = importlib.import_module(f"subquad.bench.{bench.name}")
    torch.manual_seed(0)
    module.run(bench)
    command = f"subquad bench {room} --device {device.type} --dtype {dtype_name(dtype)}" + (" --smoke" if smoke else "")
    return Result(bench.name, command, environment(device, dtype), bench.rows, bench.gates)
