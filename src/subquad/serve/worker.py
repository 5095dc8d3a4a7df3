"""One thread that steps an engine while there is work, and what asynchronous callers see of it."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from subquad.core.errors import ConfigError
from subquad.engine.engine import Engine
from subquad.engine.request import Piece, Request
from subquad.serve.calls import Call, Job, QueueFullError, StoppedError
from subquad.serve.chores import Chore, tell
from subquad.serve.queue import FairQueue, Turns

LOG = logging.getLogger("subquad.serve.worker")
T = TypeVar("T")
TOLD_A_SECOND = 1000
"""Times that all callers together are told something: each costs an event loop about a quarter of a millisecond."""


class Worker:
    """Owns an engine and the thread that steps it.

    Requests wait in a fair queue outside the engine, which gets as many as it has slots. When someone has waited longer
    than `patience` with all slots taken, of the rows that have had theirs for as long the one with most tokens since
    is put aside, and goes on later exactly where it stood.

    Args:
        engine: nobody else may use it from now on.
        queue: most requests that wait.
        patience: seconds; infinite never puts a row aside.
        turns: shared by the workers of a process, since only one should compute at a time.
        on_step: called in the thread after each step with its seconds.

    Attributes:
        untold: what callers are told next, by their loops; the thread's alone.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        queue: int = 1024,
        patience: float = 10.0,
        turns: Turns | None = None,
        on_step: Callable[[float], None] | None = None,
    ) -> None:
        if queue < 1 or not patience >= 0:
            raise ConfigError(f"worker: expected a queue of at least 1 and patience of at least 0, got {queue} and "
                              f"{patience}; give more")  # fmt: skip
        self.engine, self.most_queued, self.patience = engine, queue, patience
        self.steps, self.preemptions = 0, 0
        self.failed: Exception | None = None
        self.ready = False
        self._turns, self._on_step = turns or Turns(), on_step
        self._changed = threading.Condition()
        self._queue = FairQueue[Job]()
        self._cancelled, self._chores = list[Job](), deque[Chore[Any]]()
        self._running, self._aside = dict[int, Job](), set[Job]()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="subquad-worker", daemon=True)
        self._warm: Sequence[Request] = ()
        self.untold: dict[asyncio.AbstractEventLoop, list[tuple[Job, list[Piece]]]] = {}
        # A GPU is told of hundreds of operations before the rounds, and needs the interpreter for each; then it works
        # alone. What came is told in that time: a loop that has it earlier would take the interpreter from this thread
        # just when that needs it.
        self._late = engine.model.device.type == "cuda"
        engine.on_prefix, engine.on_read = self._note_prefix, self._tell

    def start(self, warm: Sequence[Request] = ()) -> None:
        """Begin, and be `ready` once the rounds that requests like `warm` need were done."""
        self._warm = warm
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its step; what has not ended fails with `StoppedError`."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def queued(self) -> int:
        """Requests that wait for a slot, paused ones among them."""
        return len(self._queue)

    @property
    def live(self) -> int:
        """Requests that hold a slot, or get one at the next step."""
        return len(self._running)

    @property
    def paused(self) -> int:
        """Requests that were put aside."""
        return len(self._aside)

    @property
    def state_nbytes(self) -> dict[str, int]:
        """Bytes of state: of slots in use, of what was put aside, of kept prefixes, and of all slots there are."""
        prefixes = 0 if self.engine.prefixes is None else self.engine.prefixes.nbytes
        slots = self.engine.nbytes - prefixes
        used = slots * len(self._running) // self.engine.rows
        return {"slots": used, "aside": self._aside_nbytes, "prefixes": prefixes, "allocated": slots}

    _aside_nbytes = 0

    def check(self, request: Request) -> None:
        """Refuse what can't be generated, before it waits.

        Raises:
            DataError, ConfigError: as `Engine.submit`.
        """
        self.engine.check(request, "prompt")

    def submit(self, requests: Sequence[Request], client: str, seconds: float | None = None) -> Call:
        """Queue requests of one client, all or none; called in an event loop. See `Call`.

        Raises:
            DataError, ConfigError: as `check`.
            QueueFullError: no room for all of them.
            StoppedError: the worker does not run.
        """
        for request in requests:
            self.check(request)
        with self._changed:
            self._running_or_raise()
            if len(self._queue) + len(requests) > self.most_queued:
                raise QueueFullError(f"{len(self._queue)} requests are waiting")
            call = Call(self.cancel, requests, client, seconds)
            for job in call.jobs:
                self._queue.push(job)
            self._changed.notify_all()
        return call

    def _running_or_raise(self) -> None:
        if self.failed is not None or self._stopping:
            raise StoppedError(str(self.failed or "the server is stopping"))

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Forget jobs before the next step; those that are not there (any more) do not matter."""
        with self._changed:
            for job in jobs:
                if job.id is None and self._queue.remove(job):
                    continue
                self._cancelled.append(job)
            self._changed.notify_all()

    async def call(self, work: Callable[[], T]) -> T:
        """Do `work` in the worker's thread, between two steps.

        Raises:
            StoppedError: the worker does not run.
        """
        chore = Chore(work)
        with self._changed:
            self._running_or_raise()
            self._chores.append(chore)
            self._changed.notify_all()
        return await chore.result

    def _run(self) -> None:
        try:
            with self._turns:
                for request in self._warm:
                    self.engine.warm(request)
            self.ready = True
            while self._wait():
                with self._turns:
                    self._turn()
        except Exception as error:  # nothing of the engine is trusted after an error in it
            self.failed = error
            LOG.exception("the worker has failed")
        self.ready = False
        self._give_up()

    def _wait(self) -> bool:
        """Sleep until there is something to do; False once it is to stop."""
        with self._changed:
            while not (self._stopping or self._queue or self._chores or self._cancelled or self._running):
                self._changed.wait()
            return not self._stopping

    def _turn(self) -> None:
        """Let go of what was cancelled, fill the slots, do one chore, and step."""
        with self._changed:
            self._forget(self._cancelled)
            self._cancelled.clear()
            self._make_room()
            self._refill()
            chore = self._chores.popleft() if self._chores else None
        if chore is not None:
            self._tell()
            chore.do()
        if not self._running:
            self._tell()
            return
        began = time.monotonic()
        pieces = self.engine.step()
        self.steps += 1
        if self._on_step is not None:
            self._on_step(time.monotonic() - began)
        self._hand_over(pieces)
        if not (self._late and self._running) or self._turns.wanted:
            self._tell()

    def _forget(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self._queue.remove(job)
            if job.id is not None:
                self.engine.cancel(job.id)
                self._running.pop(job.id, None)
            self._aside.discard(job)
        self._aside_nbytes = self.engine.aside_nbytes

    def _under_way(self) -> Counter[str]:
        return Counter(job.client for job in self._running.values())

    def _make_room(self) -> None:
        """Put a row aside if someone has waited too long; no more of them than there are slots."""
        if len(self._running) < self.engine.rows or not self._queue:
            return
        now, waiting = time.monotonic(), self._queue.peek(self._under_way())
        if waiting is None or now - waiting.since < self.patience:
            return
        if len(self._aside) >= self.engine.rows and waiting not in self._aside:
            return
        had = [job for job in self._running.values() if job.drawn and now - job.since >= self.patience]
        job = max(had, key=lambda job: job.drawn, default=None)
        if job is None or job.id is None or not self.engine.pause(job.id, aside=True):
            return
        if job.held:
            self._show(job)
        # The one that waited gets the slot: its turn comes before the paused one is in the queue.
        del self._running[job.id]
        self._refill()
        job.since = now
        self._aside.add(job)
        self._queue.push_first(job)
        self._aside_nbytes = self.engine.aside_nbytes
        self.preemptions += 1

    def _refill(self) -> None:
        """Give the engine as many as it has slots."""
        while len(self._running) < self.engine.rows:
            job = self._queue.pop(self._under_way())
            if job is None:
                return
            if job in self._aside and job.id is not None:
                self.engine.resume(job.id)
                self._aside.discard(job)
                self._aside_nbytes = self.engine.aside_nbytes
            else:
                job.id = self.engine.submit(job.request)
            job.drawn, job.since = 0, time.monotonic()
            self._running[job.id] = job

    def _note_prefix(self, id: int, tokens: int) -> None:
        self._running[id].cached = tokens

    def _hand_over(self, pieces: Sequence[Piece]) -> None:
        """Have what came be told to the callers; with many of them some wait for more to come."""
        mine: dict[int, list[Piece]] = {}
        for piece in pieces:
            mine.setdefault(piece.row, []).append(piece)
        now, between = time.monotonic(), len(self._running) / TOLD_A_SECOND
        for id, some in mine.items():
            job = self._running[id]
            job.drawn += len(some)
            job.held += some
            ended = some[-1].finish is not None
            if ended:
                del self._running[id]
            if ended or now - job.told >= between:
                self._show(job)
                job.told = now

    def _show(self, job: Job) -> None:
        """What a job has is told next."""
        self.untold.setdefault(job.call.loop, []).append((job, job.held))
        job.held = []

    def _tell(self) -> None:
        """Give the callers what is to be told, each loop all at once."""
        untold, self.untold = self.untold, {}
        for loop, some in untold.items():
            tell(loop, _deliver, some)

    def _give_up(self) -> None:
        self._tell()
        with self._changed:
            jobs = [*self._running.values(), *self._queue.clear()]
            chores, self._chores = list(self._chores), deque()
            self._running.clear()
            self._aside.clear()
            self._aside_nbytes = 0
            error = StoppedError(str(self.failed or "the server is stopping"))
            self._stopping = True
        for job in jobs:
            tell(job.call.loop, job.call.fail, error)
        for chore in chores:
            chore.give_up(error)


def _deliver(some: Sequence[tuple[Job, list[Piece]]]) -> None:
    for job, pieces in some:
        job.call.deliver(job.index, pieces)
