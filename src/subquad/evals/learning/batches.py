"""Batches of a task by step, made as they are needed or ahead by other processes."""

from __future__ import annotations

import pickle
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context

import torch

from subquad.evals.learning.task import Batch, Task, shuffled

# Batches that each worker makes ahead.
AHEAD = 2
# Rows that are drawn at once where they are drawn once, and seconds between words about it.
DRAWN, SAID = 500, 5.0


class Batches:
    """Batches of a task by step; with workers the next ones are made ahead, and are the same.

    Args:
        task: makes them.
        seed, rows: as in `Task.batch`.
        workers: processes that make them.
        total: rows that there are, drawn at once and taken in a new order every epoch; None draws every batch anew.
        say: told in a line how far the drawing is.
    """

    def __init__(
        self,
        task: Task,
        seed: int,
        rows: int,
        workers: int = 0,
        total: int | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.task, self.seed, self.rows = task, seed, rows
        self.ahead = AHEAD * workers
        # A fork would copy the threads of a device.
        self._pool = ProcessPoolExecutor(workers, get_context("spawn"), _remember, (task,)) if workers else None
        self._waiting: dict[int, Future[bytes]] = {}
        self._all = None if total is None else self._drawn(total, say)

    def __call__(self, step: int) -> Batch:
        """The batch of training's `step`."""
        if self._all is not None:
            return self._all.picked(torch.from_numpy(shuffled(self.seed, step, self.rows, len(self._all))))
        if self._pool is None:
            return self.task.batch("train", self.seed, step, self.rows)
        for i in range(step, step + self.ahead + 1):
            if i not in self._waiting:
                self._waiting[i] = self._pool.submit(_made, self.seed, i, self.rows)
        return pickle.loads(self._waiting.pop(step).result())

    def _drawn(self, total: int, say: Callable[[str], None] | None) -> Batch:
        """So many rows, whatever the number of workers; these are not needed any more then."""
        parts: list[Batch] = []
        sizes = [min(DRAWN, total - start) for start in range(0, total, DRAWN)]
        if self._pool is None:
            made = (self.task.batch("train", self.seed, i, rows) for i, rows in enumerate(sizes))
        else:
            made = map(pickle.loads, self._pool.map(_made, repeat(self.seed), range(len(sizes)), sizes))
        began = said = time.monotonic()
        for part in made:
            parts.append(part if part.inputs.shape[1] == self.task.length else part.widened(self.task.length))
            if say is not None and time.monotonic() - said > SAID:
                said = time.monotonic()
                say(f"{sum(map(len, parts)):,} of {total:,} rows drawn in {said - began:.0f} s")
        self.close()
        inputs, targets, lengths_b = (
            torch.cat(x) for x in zip(*((p.inputs, p.targets, p.lengths_b) for p in parts), strict=True)
        )
        return Batch(inputs, targets, lengths_b)

    def close(self) -> None:
        """End the workers."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


_tasks: list[Task] = []


def _remember(task: Task) -> None:
    """In a worker: hold the task, which may be large."""
    # Ctrl-C is the business of the process that asked.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    _tasks.append(task)


def _made(seed: int, step: int, rows: int) -> bytes:
    # As bytes: tensors would travel by shared memory, of which containers have little.
    return pickle.dumps(_tasks[0].batch("train", seed, step, rows))
