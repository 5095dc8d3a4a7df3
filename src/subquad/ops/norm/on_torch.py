"""Norms in PyTorch, on any device and with gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.core.state import precise


def refusal(*tensors: Tensor) -> str | None:
    """None: it takes everything."""
    return None


def rms(x: Tensor, weight: Tensor, eps: float, groups: int) -> Tensor:
    """`subquad.ops.norm.rms`."""
    parts = x.to(precise(x.dtype)).unflatten(-1, (groups, -1))
    return weight * (parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + eps)).flatten(-2).to(x.dtype)


def gated_rms(x: Tensor, gate: Tensor, weight: Tensor, eps: float, groups: int, gate_first: bool) -> Tensor:
    """`subquad.ops.norm.gated_rms`."""
    opening = F.silu(gate.to(precise(gate.dtype)))
    if gate_first:
        return rms(x.to(opening.dtype) * opening, weight, eps, groups).to(x.dtype)
    return (rms(x, weight, eps, groups) * opening).to(x.dtype)


def add_rms(x: Tensor, y: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`subquad.ops.norm.add_rms`."""
    total = x if y is None else x + y
    return total, F.rms_norm(total, weight.shape, weight, eps)


def join_rms(*args: object) -> None:
    """`subquad.ops.norm.join_rms`: its parts are as fast."""
