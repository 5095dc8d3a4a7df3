"""Norms of recurrent layers: RMS over groups of channels, with a gate before or after, and L2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from subquad.core.state import precise
from subquad.ops import launch
from subquad.ops.backends import Backends
from subquad.ops.norm import on_torch

_backends = Backends(__name__)

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
    return on_torch.rms(x, weight, eps, groups)


def gated_rms(x: Tensor, gate: Tensor, weight: Tensor, eps: float, groups: int = 1, *, gate_first: bool) -> Tensor:
    """``rms(x * silu(gate))`` when `gate_first`, else ``rms(x) * silu(gate)``.

    The first is Mamba-2's (arXiv 2405.21060, section 7), the second Gated DeltaNet's (2412.06464, section 3.4).

    Args:
        x: ``[..., d]``.
        gate: as `x`, before its SiLU.
        weight, eps, groups: as in `rms`.
        gate_first: whether the norm sees the gated values.
    """
    return _chosen(x, gate, weight).gated_rms(x, gate, weight, eps, groups, gate_first)


def add_rms(x: Tensor, y: Tensor | None, norm: nn.RMSNorm) -> tuple[Tensor, Tensor]:
    """``x + y``, or x itself where y is None, and its RMS norm.

    Args:
        x, y: ``[..., d]`` of one dtype.
        norm: the norm; what is hooked is called as it is.
    """
    if not launch.untouched(norm, nn.RMSNorm) or norm.eps is None or x.dtype != norm.weight.dtype:
        total = x if y is None else x + y
        return total, norm(total)
    return _chosen(x, norm.weight).add_rms(x, y, norm.weight, norm.eps)


def join_rms(
    x_btd: Tensor, ids_bt: Tensor, embed: nn.Module, norm_x: nn.RMSNorm, norm_embedded: nn.RMSNorm
) -> Tensor | None:
    """``[norm(x), norm(embed(ids))]`` side by side, ``[b, t, 2 d]``, or None where it is not one launch.

    Args:
        x_btd: as wide as the embedding.
        ids_bt: int64 rows of it.
        embed: the embedding.
        norm_x, norm_embedded: one for each half.
    """
    norms = norm_x, norm_embedded
    if not launch.untouched(embed, nn.Embedding) or not all(launch.untouched(one, nn.RMSNorm) for one in norms):
        return None
    assert isinstance(embed, nn.Embedding)
    table_vd = embed.weight
    weights, eps = (norm_x.weight, norm_embedded.weight), (norm_x.eps, norm_embedded.eps)
    if None in eps or any(t.dtype != x_btd.dtype for t in (table_vd, *weights)):
        return None
    return _chosen(x_btd, table_vd, *weights).join_rms(x_btd, ids_bt, table_vd, weights, eps)


def _chosen(x: Tensor, *more: Tensor) -> Any:
    """The kernels where no gradient is asked for, nothing is cast around them and they know the dtype."""
    plain = torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type) or x.dtype == torch.float64
    return on_torch if plain else _backends.choose(x, *more)


def l2(x: Tensor, eps: float) -> Tensor:
    """``x / sqrt(sum(x^2) + eps)`` over the last axis, in at least float32; zero stays zero."""
    wide = x.to(precise(x.dtype))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)
