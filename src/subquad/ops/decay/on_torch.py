"""The decay in PyTorch, on any device and with gradients."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def refusal(*tensors: Tensor) -> str | None:
    """None: it takes everything."""
    return None


def decay(raw_bth: Tensor, A_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """`subquad.ops.decay.Decay`."""
    dt_bth = F.softplus(raw_bth.to(dt_bias.dtype) + dt_bias)
    return -A_log.exp() * dt_bth, dt_bth
