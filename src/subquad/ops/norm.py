"""Norms of recurrent layers: RMS over groups of channels, with a gate before or after, and L2."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.core.state import precise

# silu(OPEN) = 1: the bias of a gate that lets everything pass.
OPEN = 1.2784645427610738


def rms(x: Tensor, weight: Tensor, eps: float, groups: int = 1) -> Tensor:
    """``weight * x / sqrt(mean(x^2) + eps)``, the mean over each of `groups` equal parts of the last axis.

    Arithmetic is in at least float32 and rounded to the dtype of `x` before the weight, as Llama does
    (arXiv 1910.07467, equation 4).

    Args:
        x: ``[..., d]``.
        weight: ``[d]``.
        eps: added to the mean square.
        groups: number of groups; divides d.
    """
    parts = x.to(precise(x.dtype)).unflatten(-1, (groups, -1))
    return weight * (parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + eps)).flatten(-2).to(x.dtype)


def gated_rms(x: Tensor, gate: Tensor, weight: Tensor, eps: float, groups: int = 1, *, gate_first: bool) -> Tensor:
    """``rms(x * silu(gate))`` when `gate_first`, else ``rms(x) * silu(gate)``.

    The first is Mamba-2's (arXiv 2405.21060, section 7), the second Gated DeltaNet's (2412.06464, section 3.4).

    Args:
        x: ``[..., d]``.
        gate: as `x`, before its SiLU.
        weight, eps, groups: as in `rms`.
        gate_first: whether the norm sees the gated values.
    """
    opening = F.silu(gate.to(precise(gate.dtype)))
    if gate_first:
        return rms(x.to(opening.dtype) * opening, weight, eps, groups).to(x.dtype)
    return (rms(x, weight, eps, groups) * opening).to(x.dtype)


def l2(x: Tensor, eps: float) -> Tensor:
    """``x / sqrt(sum(x^2) + eps)`` over the last axis, in at least float32; zero stays zero."""
    wide = x.to(precise(x.dtype))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)
