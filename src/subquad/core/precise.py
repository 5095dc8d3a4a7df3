"""Parameters that no cast rounds away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from torch import Tensor, nn

from subquad.core.state import precise


class Precise(nn.Module):
    """A module whose parameters and buffers stay in at least float32 whatever the model is cast to; moves are followed.

    For rates, decays and what else bfloat16 would round to one value: it has no numbers between 0.996 and 1.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Every cast and move of a module comes through here."""

        def keep(x: Tensor) -> Tensor:
            moved = fn(x)
            return moved if moved.dtype == precise(moved.dtype) else x.to(moved.device)

        return super()._apply(keep, recurse)
