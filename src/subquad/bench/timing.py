"""Times of kernels: contenders in turns, on inputs that no cache holds, without the cost of launching them."""

from __future__ import annotations

import importlib.util
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Call = Callable[..., object]


@dataclass(frozen=True)
class Times:
    """Milliseconds a call takes.

    Attributes:
        reps: every repetition of every contender; repetition i of one ran beside repetition i of the others.
        how: ``graph`` where recorded CUDA graphs were replayed, so that no time goes to launching; ``calls`` where each
            call was made from Python, and why on CUDA.
    """

    reps: dict[str, list[float]]
    how: str

    def median(self, name: str) -> float:
        """Of one contender."""
        return statistics.median(self.reps[name])

    def pairs(self, ours: str, baseline: str = "") -> list[list[float]]:
        """Every repetition as a row has it: ``[ours, baseline]``, or ``[ours]``."""
        columns = [self.reps[name] for name in (ours, baseline) if name]
        return [list(rep) for rep in zip(*columns, strict=True)]


def race(
    contenders: Mapping[str, Call],
    copies: Sequence[tuple[Tensor, ...]],
    device: torch.device,
    *,
    reps: int,
    seconds: float = 0.5,
) -> Times:
    """Time all contenders in turns; a repetition calls one once or more on each of `copies`.

    On CUDA all of them are recorded as graphs, or, where one can't be, none, so that launching costs the same for all.

    Args:
        contenders: called with one of `copies`.
        copies: the same inputs several times over, together larger than four times the cache.
        device: where they lie.
        reps: at most so many repetitions, and five at least, unless this is fewer.
        seconds: a contender's time for them.
    """
    how = "calls"
    runs = {name: _Calls(fn, copies, device) for name, fn in contenders.items()}
    for run in runs.values():
        run.warm()
    if device.type == "cuda":
        try:
            runs = {name: _Graph(fn, copies, device) for name, fn in contenders.items()}
            how = "graph"
        except RuntimeError as error:
            torch.cuda.synchronize(device)
            how = f"calls, since a graph was not recorded: {str(error).splitlines()[0]}"
    slowest = max(run.measure() for run in runs.values())
    reps = max(min(reps, 5), min(reps, int(seconds * 1e3 / slowest)))
    taken: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for rep in range(reps):
        # Alternating who goes first keeps a drifting clock from favouring one.
        for name in names if rep % 2 == 0 else reversed(names):
            taken[name].append(runs[name].measure())
    return Times(taken, how)


class _Calls:
    """Calls over all copies, from Python."""

    def __init__(self, fn: Call, copies: Sequence[tuple[Tensor, ...]], device: torch.device) -> None:
        self.device = device
        self.calls = len(copies)
        self._fn = fn
        self._copies = copies

    def warm(self) -> None:
        """Compile and tune, on a stream of its own as recording asks for."""
        if self.device.type != "cuda":
            self._fn(*self._copies[0])
            return
        torch.cuda.synchronize(self.device)
        with torch.cuda.stream(torch.cuda.Stream(self.device)):
            for _ in range(3):
                self._fn(*self._copies[0])
        torch.cuda.synchronize(self.device)

    def once(self) -> None:
        """All calls of a repetition."""
        for copy in self._copies:
            self._fn(*copy)

    def measure(self) -> float:
        """Milliseconds a call."""
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            self.once()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / self.calls
        began = time.perf_counter()
        self.once()
        return (time.perf_counter() - began) * 1e3 / self.calls


class _Graph(_Calls):
    """The calls recorded as one CUDA graph, repeated in it until it lasts a millisecond."""

    def __init__(self, fn: Call, copies: Sequence[tuple[Tensor, ...]], device: torch.device) -> None:
        super().__init__(fn, copies, device)
        once = max(_Calls(fn, copies, device).measure() * len(copies), 1e-3)
        rounds = min(max(math.ceil(1.0 / once), 1), 20)
        self.calls = rounds * len(copies)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for _ in range(rounds):
                # Results live until the round ends, so that each call writes to memory that no cache holds either.
                self._results = [fn(*copy) for copy in copies]
        self._graph.replay()
        torch.cuda.synchronize(device)

    def once(self) -> None:
        self._graph.replay()


def copies_of(inputs: tuple[Tensor, ...], nbytes: int, most: int = 256) -> list[tuple[Tensor, ...]]:
    """As many copies of `inputs` as it takes to fill `nbytes`, at least one.

    Tiny inputs stop at `most` copies: their calls are bound by overhead, not by memory.
    """
    one = max(sum(x.numel() * x.element_size() for x in inputs), 1)
    n = min(max(math.ceil(nbytes / one), 1), most)
    return [tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in inputs) for _ in range(n)]


@contextmanager
def compiled(*, fresh: bool = False) -> Generator[list[str]]:
    """The names of the Triton kernels compiled inside the block, which fills the list; empty without a compiler.

    Args:
        fresh: with an empty cache on disk, as on a machine that has never run them.
    """
    names: list[str] = []
    if importlib.util.find_spec("triton") is None:
        yield names
        return
    from triton import knobs

    runtime: Any = knobs.runtime
    before = runtime.jit_cache_hook

    def note(**what: Any) -> bool | None:
        names.append(f"{what['fn'].module}.{what['fn'].name}")
        return before(**what) if before else None

    folder = os.environ.get("TRITON_CACHE_DIR")
    runtime.jit_cache_hook = note
    try:
        with tempfile.TemporaryDirectory() as empty:
            if fresh:
                os.environ["TRITON_CACHE_DIR"] = empty
            yield names
    finally:
        runtime.jit_cache_hook = before
        if folder is not None:
            os.environ["TRITON_CACHE_DIR"] = folder
        else:
            os.environ.pop("TRITON_CACHE_DIR", None)
