"""Batches of a task by step, made as they are needed or ahead by other processes."""

from __future__ import annotations

import pickle
import signal
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context

import torch

from subquad.evals.learning.task import Batch, Task

# Batches that each worker makes ahead.
AHEAD = 2


class Batches:
    """Batches of a task by step; with workers the next ones are made ahead, and are the same.

    Args:
        task: makes them.
        seed, rows: as in `Task.batch`.
        workers: processes that make them.
    """

    def __init__(self, task: Task, seed: int, rows: int, workers: int = 0) -> None:
        self.task, self.seed, self.rows = task, seed, rows
        self.ahead = AHEAD * workers
        # A fork would copy the threads of a device.
        self._pool = ProcessPoolExecutor(workers, get_context("spawn"), _remember, (task,)) if workers else None
        self._waiting: dict[int, Future[bytes]] = {}

    def __call__(self, step: int) -> Batch:
        """The batch of training's `step`."""
        if self._pool is None:
            return self.task.batch("train", self.seed, step, self.rows)
        for i in range(step, step + self.ahead + 1):
            if i not in self._waiting:
                self._waiting[i] = self._pool.submit(_made, self.seed, i, self.rows)
        return pickle.loads(self._waiting.pop(step).result())

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
