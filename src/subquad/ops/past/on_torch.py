"""No kernel: `subquad.ops.flashconv.past` is PyTorch's form."""

from __future__ import annotations

from torch import Tensor


def refusal(*tensors: Tensor) -> str | None:
    """None: it takes everything, and leaves it."""
    return None


def read(history_bsd: Tensor, seen_b: Tensor, k_lg: Tensor) -> Tensor | None:
    """`subquad.ops.past.read`."""
    return None
