"""One token for every row of logits: the likeliest, or a draw with noise that belongs to the row alone."""

from __future__ import annotations

from torch import Tensor

from subquad.ops.backends import Backends
from subquad.ops.draw.noise import gumbel

__all__ = ["draw", "gumbel", "uniform"]

_backends = Backends(__name__)


def draw(
    logits_btv: Tensor, greedy_b: Tensor, seed_b: Tensor, step_b: Tensor, *, draws: bool = True, stream: int = 0
) -> Tensor:
    """The token of each column, int64 ``[b, t]``; -1 where logits hold a NaN or have no finite maximum.

    ``argmax(logits + Gumbel noise)`` is distributed as ``softmax(logits)``; of equal tokens the first is taken.

    Args:
        logits_btv: behind all processors. Column i of a row is drawn with the noise of step ``step_b + i``.
        greedy_b: bool, rows that take no noise.
        seed_b: int64 seeds of the rows.
        step_b: int64, tokens that each row has drawn.
        draws: False promises that all rows are greedy, without asking the device.
        stream: which of the rows' independent noises.
    """
    return _backends.choose(logits_btv).draw(logits_btv, greedy_b, seed_b, step_b, draws=draws, stream=stream)


def uniform(seed_b: Tensor, step_b: Tensor, stream: int) -> Tensor:
    """A number ``[b]`` in [0, 1) for each row, float32, a function of seed, step and stream as in `gumbel`."""
    return _backends.choose(seed_b).uniform(seed_b, step_b, stream)
