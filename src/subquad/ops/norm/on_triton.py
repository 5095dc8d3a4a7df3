"""Norms by one Triton launch each; without gradients."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from subquad.ops import launch, overlap
from subquad.ops.norm.kernels import add_rms_kernel, gated_rms_kernel, join_rms_kernel


def refusal(*tensors: Tensor) -> str | None:
    """Why the kernels can't run."""
    return launch.refusal(*tensors, widths=())


def gated_rms(x: Tensor, gate: Tensor, weight: Tensor, eps: float, groups: int, gate_first: bool) -> Tensor:
    """`subquad.ops.norm.gated_rms`."""
    return _gated_rms(_rows(x), _rows(gate), weight, eps, groups, gate_first).view(x.shape)


def add_rms(x: Tensor, y: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`subquad.ops.norm.add_rms`."""
    total, out = _add_rms(x.contiguous(), None if y is None else y.contiguous(), weight, eps)
    return (x if y is None else total), out


def join_rms(x: Tensor, ids: Tensor, table: Tensor, weights: tuple[Tensor, Tensor], eps: tuple[float, float]) -> Tensor:
    """`subquad.ops.norm.join_rms`."""
    return _join_rms(x.contiguous(), ids.contiguous(), table.contiguous(), *weights, *eps)


def _rows(x: Tensor) -> Tensor:
    """``[tokens, d]``, without a copy where one stride leads from token to token."""
    rows = x.flatten(0, -2)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


@torch.library.custom_op("subquad::gated_rms", mutates_args=())
@launch.guarded
def _gated_rms(x: Tensor, gate: Tensor, weight: Tensor, eps: float, groups: int, gate_first: bool) -> Tensor:
    tokens, d = x.shape
    y = launch.scratch(tokens, d, like=x, dtype=x.dtype)
    if tokens:
        width = d // groups
        kernel: Any = gated_rms_kernel[(tokens * groups,)]
        kernel(
            x, gate, weight, y, x.stride(0), gate.stride(0), eps, GROUPS=groups, WIDTH=width, FIRST=gate_first,
            BW=triton.next_power_of_2(width), num_warps=_warps(width), **overlap.options(x.device),
        )  # fmt: skip
    return y


@_gated_rms.register_fake
def _(x: Tensor, gate: Tensor, weight: Tensor, eps: float, groups: int, gate_first: bool) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("subquad::add_rms", mutates_args=())
@launch.guarded
def _add_rms(x: Tensor, y: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    d = x.shape[-1]
    total, out = (launch.scratch(*x.shape, like=x, dtype=x.dtype) for _ in range(2))
    if x.numel():
        kernel: Any = add_rms_kernel[(x.numel() // d,)]
        kernel(
            x, x if y is None else y, weight, total, out, eps, WIDTH=d, ADD=y is not None,
            BW=triton.next_power_of_2(d), num_warps=_warps(d), **overlap.options(x.device),
        )  # fmt: skip
    return total, out


@_add_rms.register_fake
def _(x: Tensor, y: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@torch.library.custom_op("subquad::join_rms", mutates_args=())
@launch.guarded
def _join_rms(
    x: Tensor, ids: Tensor, table: Tensor, x_weight: Tensor, table_weight: Tensor, x_eps: float, table_eps: float
) -> Tensor:
    d = x.shape[-1]
    out = launch.scratch(*x.shape[:-1], 2 * d, like=x, dtype=x.dtype)
    if x.numel():
        kernel: Any = join_rms_kernel[(2 * ids.numel(),)]
        kernel(
            x, ids, table, x_weight, table_weight, out, x_eps, table_eps, WIDTH=d, BW=triton.next_power_of_2(d),
            num_warps=_warps(d), **overlap.options(x.device),
        )  # fmt: skip
    return out


@_join_rms.register_fake
def _(
    x: Tensor, ids: Tensor, table: Tensor, x_weight: Tensor, table_weight: Tensor, x_eps: float, table_eps: float
) -> Tensor:
    return x.new_empty(*x.shape[:-1], 2 * x.shape[-1])


def _warps(width: int) -> int:
    return 8 if width > 2048 else 4 if width > 512 else 2 if width > 128 else 1
