"""What every task gives: batches that follow from a seed and a step, so that a run can be repeated and resumed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.core.layout import Layout

# A target of this value is none: nothing is learned there, and nothing counts.
IGNORE = -1
# Streams of random numbers that never meet, whatever the seed.
SPLITS = {"train": 0, "test": 1}


@dataclass(frozen=True)
class Batch:
    """Rows of one task.

    Attributes:
        inputs: int64 ``[b, t]``, token ids, or float32 ``[b, t, c]``, values.
        targets: int64, `IGNORE` where there is none: ``[b, t]``, what comes out at each position, or ``[b]``, the
            class of each row.
        lengths_b: int64 ``[b]``, tokens of each row; the rest is padding.
        padded: False promises that there is none, without asking the device; None asks `lengths_b`.
    """

    inputs: Tensor
    targets: Tensor
    lengths_b: Tensor
    padded: bool | None = None

    def __len__(self) -> int:
        """Rows."""
        return len(self.lengths_b)

    @property
    def layout(self) -> Layout:
        """Where the tokens stand."""
        b, t = self.inputs.shape[:2]
        if self.is_padded:
            return Layout.ragged(self.lengths_b, t)
        return Layout.dense(b, t, device=self.inputs.device)

    @property
    def is_padded(self) -> bool:
        """Whether a row is shorter than the batch is wide."""
        return bool((self.lengths_b < self.inputs.shape[1]).any()) if self.padded is None else self.padded

    def rows(self, start: int, stop: int) -> Batch:
        """Some of the rows, without the columns that none of them needs."""
        return self.picked(slice(start, stop))

    def picked(self, which: slice | Tensor) -> Batch:
        """Any of the rows, without the columns that none of them needs."""
        inputs, targets, lengths_b = self.inputs[which], self.targets[which], self.lengths_b[which]
        t = int(lengths_b.max())
        return Batch(inputs[:, :t], targets if targets.ndim == 1 else targets[:, :t], lengths_b)

    def to(self, device: torch.device) -> Batch:
        """The same on `device`."""
        return Batch(self.inputs.to(device), self.targets.to(device), self.lengths_b.to(device), self.is_padded)

    def widened(self, width: int) -> Batch:
        """The same in `width` columns, no fewer than there are, as a batch with padding."""
        more = width - self.inputs.shape[1]
        inputs = F.pad(self.inputs, (0, 0) * (self.inputs.ndim - 2) + (0, more))
        targets = self.targets if self.targets.ndim == 1 else F.pad(self.targets, (0, more), value=IGNORE)
        return Batch(inputs, targets, self.lengths_b, True)


class Task(ABC):
    """One task at one size, built from a frozen ``Config`` that it owns.

    Attributes:
        vocab_size: token ids of the inputs, or None where they are values.
        channels: values of a position, where the inputs are values.
        outputs: classes, or tokens that may come out.
        pooled: one class a row, from the mean over its tokens; else something comes out at each position, and no
            mixer may look ahead.
        length: most tokens of a row.
        held_out: rows that there are for the test, or None where they never end.
    """

    Config: ClassVar[type[Any]]
    config: Any
    vocab_size: int | None
    channels: int = 1
    outputs: int
    pooled: bool = False
    length: int
    held_out: int | None = None

    def batch(self, split: str, seed: int, step: int, rows: int) -> Batch:
        """The batch of a step: the same whenever it is asked for.

        Args:
            split: ``train`` or ``test``, which have no random number in common.
            seed: of the run.
            step: from 0.
            rows: of the batch; the last one of a test that ends may have fewer.
        """
        rng = np.random.default_rng((SPLITS[split], seed, step))
        return self.draw(rng, rows)

    @abstractmethod
    def draw(self, rng: np.random.Generator, rows: int) -> Batch:
        """So many rows of random numbers' making."""


def shuffled(seed: int, step: int, rows: int, total: int) -> np.ndarray[Any, Any]:
    """Which of `total` rows a step takes, in the order of a new shuffle every epoch.

    Epoch follows epoch without a seam: the rows of a step may be of two.
    """
    epochs, places = np.divmod(np.arange(step * rows, (step + 1) * rows), total)
    picked_b = np.empty(rows, np.int64)
    for epoch in np.unique(epochs):
        picked_b[epochs == epoch] = _order(seed, int(epoch), total)[places[epochs == epoch]]
    return picked_b


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, total: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng((seed, epoch)).permutation(total)


def token_batch(inputs_bt: np.ndarray[Any, Any], targets: np.ndarray[Any, Any]) -> Batch:
    """A batch of rows of full length from NumPy's arrays of token ids and targets."""
    b, t = inputs_bt.shape
    return Batch(
        torch.from_numpy(inputs_bt.astype(np.int64)),
        torch.from_numpy(targets.astype(np.int64)),
        torch.full((b,), t),
    )
