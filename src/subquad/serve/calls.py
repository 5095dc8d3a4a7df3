"""What callers hold of the requests that a worker does for them, and why those may fail."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence

from subquad.engine.request import Piece, Request


class QueueFullError(Exception):
    """The queue takes no more."""


class StoppedError(Exception):
    """The worker has failed, was stopped, or gave up what was asked of it."""


class LateError(Exception):
    """It took longer than was allowed."""


class Job:
    """One request on its way through a worker.

    Attributes:
        call: who waits for it, and `index`, which of the call's requests it is.
        request, client: what is asked, and by whom.
        id: the engine's number, once it is there.
        cached: tokens of its prompt that a prefix saved.
        drawn: tokens since it last got a slot.
        since: seconds of the clock since when it waits or has its slot.
        held, told: what its caller is not told yet, and when that was told something.
    """

    def __init__(self, call: Call, index: int, request: Request, client: str) -> None:
        self.call, self.index, self.request, self.client = call, index, request, client
        self.id: int | None = None
        self.cached, self.drawn, self.since = 0, 0, time.monotonic()
        self.held, self.told = list[Piece](), -math.inf


class Call:
    """Requests that were made together: an asynchronous iterator of ``(index, pieces)``, some at a time.

    It belongs to the event loop that made it. `close` frees what is still held.

    Args:
        cancel: forgets jobs.
        requests, client: what is asked, and by whom.
        seconds: after which it fails; None is never.
    """

    def __init__(
        self,
        cancel: Callable[[Sequence[Job]], None],
        requests: Sequence[Request],
        client: str,
        seconds: float | None = None,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.jobs = [Job(self, i, request, client) for i, request in enumerate(requests)]
        self._cancel = cancel
        self._arrived = dict[int, list[Piece]]()
        self._event = asyncio.Event()
        self._left = len(self.jobs)
        self._error: Exception | None = None
        self._timer = None
        if seconds is not None:
            self._timer = self.loop.call_later(seconds, self.fail, LateError(f"expected to end within {seconds:g} s"))

    @property
    def cached(self) -> int:
        """Most tokens of a prompt that a prefix saved."""
        return max(job.cached for job in self.jobs)

    def deliver(self, index: int, pieces: list[Piece]) -> None:
        """Called in the loop: what a step gave one of the requests."""
        # What comes before the last was taken joins it: a busy loop writes longer pieces, not more of them.
        self._arrived.setdefault(index, []).extend(pieces)
        self._event.set()

    def fail(self, error: Exception) -> None:
        """Called in the loop: nothing more will come."""
        self._error = error
        self._event.set()

    async def __aiter__(self) -> AsyncIterator[tuple[int, list[Piece]]]:
        """What came, until all have ended.

        Raises:
            StoppedError: the worker gave up.
            LateError: it has taken too long.
        """
        while self._left:
            while not self._arrived:
                if self._error is not None:
                    raise self._error
                self._event.clear()
                await self._event.wait()
            index = next(iter(self._arrived))
            pieces = self._arrived.pop(index)
            self._left -= pieces[-1].finish is not None
            yield index, pieces

    def close(self) -> None:
        """Cancel what has not ended: its slot is free before the next step."""
        if self._timer is not None:
            self._timer.cancel()
        if self._left:
            self._cancel(self.jobs)
