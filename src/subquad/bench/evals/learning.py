"""How many rows of each task a processor core makes in a second."""

from __future__ import annotations

import time

from subquad.bench.harness import Bench
from subquad.evals.learning import load_task, tasks

# Rows of a batch, and batches that are timed; long rows come fewer at a time.
ROWS = {"pathfinder.128": 64, "selective_copy.mamba": 16}
REPS = 3
# What is read and not drawn costs nothing worth a figure.
READ = ("characters", "digits")


def run(bench: Bench) -> None:
    """Every published size of every task that draws its rows, in time of the processor, which others may share."""
    for name, card in tasks().items():
        if name in READ:
            continue
        for size in card.sizes:
            task, id = load_task(name, [size]), f"{name}.{size}"
            rows = bench.size(ROWS.get(id, 128), smoke=2)
            task.batch("train", 0, 0, 2)  # makes the tables that all batches share
            reps: list[list[float]] = []
            for step in range(bench.size(REPS, smoke=1)):
                began = time.process_time()
                task.batch("train", 0, step, rows)
                reps.append([rows / max(time.process_time() - began, 1e-9)])
            middle = sorted(reps)[len(reps) // 2][0]
            bench.value(id, middle, "rows/s", "higher", shape={"rows": rows, "length": task.length}, reps=reps)
