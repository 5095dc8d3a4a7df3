"""Races are fair and leave nothing behind; compilations are counted."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from subquad.bench.timing import Times, compiled, copies_of, race

CPU = torch.device("cpu")


def test_contenders_take_turns_and_see_every_copy() -> None:
    calls: list[tuple[str, float]] = []
    contenders = {name: lambda x, name=name: calls.append((name, float(x))) for name in "ab"}
    copies = [(torch.tensor(1.0),), (torch.tensor(2.0),)]
    times = race(contenders, copies, CPU, reps=3)
    one = {name: [(name, 1.0), (name, 2.0)] for name in "ab"}
    warm, measured = [("a", 1.0), ("b", 1.0)], one["a"] + one["b"]
    assert calls == warm + measured + one["a"] + one["b"] + one["b"] + one["a"] + one["a"] + one["b"]
    assert times.how == "calls" and {name: len(reps) for name, reps in times.reps.items()} == {"a": 3, "b": 3}


class Recorder:
    """Stands for CUDA: a graph runs what was called inside `graph` again, an event has the time of its recording."""

    recording: Recorder | None = None

    def __init__(self, **_: object) -> None:
        self.calls: list[Callable[[], object]] = []
        self.at = 0.0

    def replay(self) -> None:
        for call in self.calls:
            call()

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Recorder) -> float:
        return (end.at - self.at) * 1e3


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    @contextmanager
    def graph(recorder: Recorder) -> Generator[None]:
        Recorder.recording = recorder
        try:
            yield
        finally:
            Recorder.recording = None

    for name, fake in {"CUDAGraph": Recorder, "Event": Recorder, "graph": graph}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    for name in ("synchronize", "Stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: nullcontext())
    return torch.device("cuda")


def sleeper(seconds: float, counts: list[int], *, recordable: bool = True) -> Callable[..., None]:
    def work(*_: object) -> None:
        if Recorder.recording is not None:
            if not recordable:
                raise RuntimeError("not while a stream records\nmore")
            Recorder.recording.calls.append(work)
            return
        counts[0] += 1
        time.sleep(seconds)

    return work


def test_graphs_are_replayed_and_a_call_is_what_is_told(cuda: torch.device) -> None:
    counts = [0]
    times = race({"a": sleeper(0.002, counts), "b": sleeper(0.0, [0])}, [(torch.ones(1),)] * 3, cuda, reps=2)
    # Three to warm up, three to see how long they take, then the first replay, the one that is measured, and the two.
    assert times.how == "graph" and counts[0] == 3 + 3 + 4 * 3
    assert 2 <= times.median("a") < 20


def test_when_one_is_not_recorded_none_is(cuda: torch.device) -> None:
    contenders = {"a": sleeper(0.0, [0]), "b": sleeper(0.0, [0], recordable=False)}
    times = race(contenders, [(torch.ones(1),)], cuda, reps=2)
    assert times.how == "calls, since a graph was not recorded: not while a stream records"


def test_slow_contenders_have_fewer_repetitions_but_five() -> None:
    times = race({"slow": lambda _: time.sleep(0.02)}, [(torch.ones(1),)], CPU, reps=50, seconds=0.2)
    assert 5 <= len(times.reps["slow"]) <= 10 and times.median("slow") >= 20


def test_pairs_are_of_one_repetition() -> None:
    times = Times({"a": [1.0, 2.0], "b": [3.0, 4.0], "c": [5.0, 6.0]}, "graph")
    assert times.pairs("c", "a") == [[5.0, 1.0], [6.0, 2.0]] and times.pairs("b") == [[3.0], [4.0]]


def test_copies_fill_the_bytes_asked_for_and_keep_who_learns() -> None:
    x, y = torch.ones(10, requires_grad=True), torch.ones(6)
    copies = copies_of((x, y), 1000)
    assert len(copies) == 16 and all(a.requires_grad and not b.requires_grad for a, b in copies)
    assert len({a.data_ptr() for a, _ in copies}) == 16
    assert len(copies_of((x, y), 0)) == 1 and len(copies_of((), 10**6, most=7)) == 7


def test_compilations_are_counted_and_the_cache_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    knobs = pytest.importorskip("triton.knobs")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/some/where")
    seen: list[str] = []
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", lambda **what: seen.append(what["fn"].name))
    kernel = SimpleNamespace(module="subquad.ops.some.kernels", name="forward")
    with compiled(fresh=True) as names:
        empty = os.environ["TRITON_CACHE_DIR"]
        assert empty != "/some/where" and os.listdir(empty) == []
        knobs.runtime.jit_cache_hook(fn=kernel, key="")
    knobs.runtime.jit_cache_hook(fn=kernel, key="")
    assert names == ["subquad.ops.some.kernels.forward"] and seen == ["forward", "forward"]
    assert os.environ["TRITON_CACHE_DIR"] == "/some/where" and not os.path.exists(empty)
