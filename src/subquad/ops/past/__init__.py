"""What a convolution's whole history gives to one more token: how Hyena decodes without a recurrence."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.ops import backends

# Where Triton can't run there is nothing to import.
if backends.triton_runs():
    from subquad.ops.past import on_triton


def read(history_bsd: Tensor, seen_b: Tensor, k_lg: Tensor) -> Tensor | None:
    """``sum_{j < seen} k_{seen - j} history_j`` in one pass over what each row has seen, and not over its buffer.

    Args:
        history_bsd: gated inputs of earlier tokens, the oldest first; what stands behind them is not read.
        seen_b: int64, how many of them each row holds.
        k_lg: the filters' taps, in the history's dtype; ``d / g`` channels in succession share one.

    Returns:
        ``[b, d]`` in the dtype of the history; None where no kernel runs, and nothing has been done:
        `subquad.ops.flashconv.past` does it then.
    """
    if not backends.wants_triton(history_bsd.device) or torch.is_grad_enabled():
        return None
    if on_triton.refusal(history_bsd, k_lg) is not None:
        return None
    return on_triton.read(history_bsd, seen_b, k_lg)
