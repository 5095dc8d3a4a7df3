"""The worker: fair turns, rows put aside and resumed, slots freed, failures told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import pytest

from subquad.core.errors import ConfigError
from subquad.decode.copyspec import CopySpec
from subquad.engine.engine import Engine
from subquad.engine.generate import generate
from subquad.engine.request import Limits, Piece, Request
from subquad.engine.sampler import SamplingConfig
from subquad.models.stack import Stack
from subquad.serve.calls import Call, LateError, QueueFullError, StoppedError
from subquad.serve.queue import FairQueue
from subquad.serve.worker import Worker

from .conftest import make_model, wait_for


@pytest.fixture(scope="module")
def model() -> Stack:
    return make_model()


@pytest.fixture
def worker(model: Stack) -> Iterator[Worker]:
    worker = make(model)
    yield worker
    worker.stop()


def make(model: Stack, *, rows: int = 2, start: bool = True, **options: Any) -> Worker:
    worker = Worker(Engine(model, rows=rows, capacity=4096, drafter=CopySpec()), **options)
    if start:
        worker.start()
    return worker


def ask(prompt: list[int], n: int, sampling: SamplingConfig | None = None) -> Request:
    return Request(prompt, Limits(n, end_tokens=[]), sampling or SamplingConfig())


def alone(model: Stack, request: Request) -> list[int]:
    return generate(model, [request.prompt], limits=request.limits, sampling=[request.sampling])[0].tokens


async def take(call: Call) -> list[list[int]]:
    got: list[list[int]] = [[] for _ in call.jobs]
    async for index, pieces in call:
        got[index] += [piece.token for piece in pieces]
    return got


class Slow(Engine):
    """Steps when it is told to."""

    gate: Callable[[], None]

    def step(self) -> list[Piece]:
        self.gate()
        return super().step()


def test_requests_of_one_call_give_what_each_gives_alone(model: Stack, worker: Worker) -> None:
    requests = [ask([i + 1, 2, 3], 10 + i, SamplingConfig(0.8 * (i % 2), seed=i)) for i in range(5)]

    async def main() -> list[list[int]]:
        return await take(worker.submit(requests, "a"))

    assert asyncio.run(main()) == [alone(model, request) for request in requests]
    assert worker.live == worker.queued == 0


def test_an_idle_worker_sleeps(worker: Worker) -> None:
    asyncio.run(take_one(worker))
    steps = worker.steps
    with pytest.raises(AssertionError):
        wait_for(lambda: worker.steps > steps, 0.2)


async def take_one(worker: Worker) -> None:
    await take(worker.submit([ask([1], 3)], "a"))


def test_a_closed_call_is_gone_before_the_next_step(worker: Worker) -> None:
    async def main() -> None:
        call = worker.submit([ask([1], 4000), ask([2], 4000), ask([3], 4000)], "a")
        async for _ in call:
            break
        assert (worker.live, worker.queued) == (2, 1)
        call.close()
        steps = worker.steps
        while worker.live or worker.engine.live:
            await asyncio.sleep(0)
        # One step may have been under way.
        assert worker.steps <= steps + 1
        assert worker.queued == 0 and worker.state_nbytes["slots"] == 0

    asyncio.run(main())


def test_one_client_does_not_starve_another(model: Stack) -> None:
    worker = make(model, rows=1, start=False)
    ended: list[str] = []

    async def one(client: str) -> None:
        await take(worker.submit([ask([1], 2)], client))
        ended.append(client)

    async def main() -> None:
        tasks = [asyncio.create_task(one(client)) for client in "aaaaaaabab"]
        await asyncio.sleep(0)
        worker.start()
        await asyncio.gather(*tasks)

    asyncio.run(main())
    worker.stop()
    assert ended[:4] == ["a", "b", "a", "b"] and sorted(ended[4:]) == ["a"] * 6


def test_the_one_with_the_fewest_under_way_comes_next() -> None:
    class Item:
        def __init__(self, client: str) -> None:
            self.client = client

    queue = FairQueue[Item]()
    for client in "aab":
        queue.push(Item(client))
    first = queue.peek({"a": 1})
    assert first is not None and first.client == "b"
    assert queue.pop({"a": 1}) is first and queue.remove(first) is False
    last = Item("a")
    queue.push_first(last)
    assert queue.pop({}) is last and len(queue) == 2 and len(queue.clear()) == 2 and queue.pop({}) is None


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_row_that_was_put_aside_goes_on_where_it_stood(model: Stack, temperature: float) -> None:
    worker = make(model, rows=1, patience=0.0)
    requests = [ask([5 + i, 6], 24, SamplingConfig(temperature, presence_penalty=0.3, seed=i)) for i in range(3)]

    async def main() -> list[Any]:
        calls = [worker.submit([request], f"client {i}") for i, request in enumerate(requests)]
        return await asyncio.gather(*map(take, calls))

    got = asyncio.run(main())
    worker.stop()
    assert worker.preemptions > 2
    assert [tokens for (tokens,) in got] == [alone(model, request) for request in requests]
    assert worker.paused == 0 and worker.engine.aside_nbytes == 0 and not worker.engine.busy


def test_one_that_was_put_aside_can_be_cancelled(model: Stack) -> None:
    worker = make(model, rows=1, patience=0.0)

    async def main() -> None:
        calls = [worker.submit([ask([i + 1], 4000)], f"client {i}") for i in range(2)]
        while not worker.paused:
            await asyncio.sleep(0)
        assert worker.state_nbytes["aside"] > 0
        for call in calls:
            call.close()
        while worker.live or worker.paused or worker.queued:
            await asyncio.sleep(0)
        assert worker.state_nbytes["aside"] == worker.engine.aside_nbytes == 0
        assert await take(worker.submit([ask([9], 5)], "c")) == [alone(model, ask([9], 5))]

    asyncio.run(main())
    worker.stop()


def test_a_full_queue_takes_all_of_a_call_or_nothing(model: Stack) -> None:
    worker = make(model, queue=2, start=False)

    async def main() -> None:
        worker.submit([ask([1], 2)], "a")
        with pytest.raises(QueueFullError):
            worker.submit([ask([1], 2), ask([1], 2)], "a")
        assert worker.queued == 1

    asyncio.run(main())


def test_what_can_not_fit_is_refused_before_it_waits(worker: Worker) -> None:
    async def main() -> None:
        with pytest.raises(ConfigError, match="4096"):
            worker.submit([ask([1] * 3000, 3000)], "a")

    asyncio.run(main())


def test_a_call_that_takes_too_long_fails(worker: Worker) -> None:
    async def main() -> None:
        call = worker.submit([ask([1], 4000)], "a", seconds=0.05)
        with pytest.raises(LateError):
            await take(call)
        call.close()
        while worker.engine.live:
            await asyncio.sleep(0)

    asyncio.run(main())


def test_work_is_done_between_steps(worker: Worker) -> None:
    async def main() -> None:
        call = worker.submit([ask([1], 200)], "a")
        names = await asyncio.gather(*(worker.call(lambda i=i: i * i) for i in range(4)))
        assert names == [0, 1, 4, 9]
        with pytest.raises(ZeroDivisionError):
            await worker.call(lambda: 1 // 0)
        assert len((await take(call))[0]) == 200

    asyncio.run(main())


def test_an_error_in_the_engine_is_told_to_all(model: Stack) -> None:
    def broken() -> None:
        raise RuntimeError("out of memory")

    engine = Slow(model, rows=1, capacity=64)
    engine.gate = broken
    worker = Worker(engine)
    worker.start()

    async def main() -> None:
        calls = [worker.submit([ask([1], 4)], "a") for _ in range(2)]
        for call in calls:
            with pytest.raises(StoppedError, match="out of memory"):
                await take(call)
        with pytest.raises(StoppedError):
            worker.submit([ask([1], 4)], "a")
        with pytest.raises(StoppedError):
            await worker.call(lambda: 1)

    asyncio.run(main())
    assert isinstance(worker.failed, RuntimeError) and not worker.ready


def test_a_worker_that_stops_tells_those_who_wait(model: Stack) -> None:
    worker = make(model, rows=1)

    async def main() -> None:
        call = worker.submit([ask([1], 4000)], "a")
        async for _ in call:
            break
        await asyncio.to_thread(worker.stop)
        with pytest.raises(StoppedError):
            await take(call)

    asyncio.run(main())


async def parts(call: Call) -> list[list[int]]:
    return [[piece.token for piece in pieces] async for _, pieces in call]


def test_what_comes_while_a_caller_is_busy_is_one_part() -> None:
    async def main() -> list[list[int]]:
        call = Call(lambda jobs: None, [ask([1], 2)], "a")
        call.deliver(0, [Piece(0, 5, "", 0.0, None)])
        call.deliver(0, [Piece(0, 6, "", 0.0, "length")])
        return await parts(call)

    assert asyncio.run(main()) == [[5, 6]]


def test_of_many_rows_each_is_told_its_first_token_and_its_last_at_once(
    model: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("subquad.serve.worker.TOLD_A_SECOND", 1e-6)
    worker, request = make(model), ask([1, 2, 3], 200)

    async def main() -> list[list[int]]:
        return await parts(worker.submit([request], "a"))

    got = asyncio.run(main())
    worker.stop()
    assert [*chain(*got)] == alone(model, request)
    assert len(got) == 2 and len(got[1]) > 100


def test_a_row_that_is_put_aside_keeps_nothing_back(model: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subquad.serve.worker.TOLD_A_SECOND", 1e-6)
    worker, requests = make(model, rows=1, patience=0.0), [ask([i, 2, 3], 100) for i in (1, 2)]

    async def main() -> list[list[list[int]]]:
        return await asyncio.gather(*(parts(worker.submit([request], "a")) for request in requests))

    got = asyncio.run(main())
    worker.stop()
    assert [[*chain(*one)] for one in got] == [alone(model, request) for request in requests]
    assert worker.preemptions and max(map(len, got)) > 2


def test_what_is_told_late_as_on_a_gpu_is_all_told(model: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, requests = make(model, start=False), [ask([i, 2, 3], n) for i, n in ((1, 40), (2, 7), (3, 1), (4, 20))]
    monkeypatch.setattr(worker, "_late", True)
    waited, tell = list[bool](), worker.engine.on_read
    assert tell is not None

    def noting() -> None:
        waited.append(bool(worker.untold))
        tell()

    worker.engine.on_read = noting
    worker.start()

    async def main() -> list[list[list[int]]]:
        gone = worker.submit([ask([5], 4000)], "b")
        await anext(aiter(gone))
        gone.close()
        return await asyncio.gather(*(take(worker.submit([request], "a")) for request in requests))

    got = asyncio.run(asyncio.wait_for(main(), 60))
    worker.stop()
    assert [one for (one,) in got] == [alone(model, request) for request in requests]
    assert any(waited) and not worker.untold
