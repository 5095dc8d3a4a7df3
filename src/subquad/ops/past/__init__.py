"""What a convolution's whole history gives to one more token: how Hyena decodes without a recurrence."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.ops.backends import Backends

__all__ = ["read"]

_backends = Backends(__name__)


def read(history_bsd: Tensor, seen_b: Tensor, k_lg: Tensor) -> Tensor | None:
    """``sum_{j < seen} k_{seen - j} history_j`` in one pass over what each row has seen, and not over its buffer.

    Args:
        history_bsd: gated inputs of earlier tokens, the oldest first; what stands behind them is not read.
        seen_b: int64, how many of them each row holds.
        k_lg: the filters' taps, in the history's dtype; ``d / g`` channels in succession share one.

    Returns:
        ``[b, d]`` in the dtype of the history; None where no kernel runs or gradients are wanted, and nothing has been
        done: `subquad.ops.flashconv.past` does it then.
    """
    if torch.is_grad_enabled():
        return None
    return _backends.choose(history_bsd, k_lg).read(history_bsd, seen_b, k_lg)
