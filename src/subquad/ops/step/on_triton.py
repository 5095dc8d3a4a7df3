"""A step by one Triton launch, and so its commit."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from subquad.ops import launch
from subquad.ops.step.kernels import step_kernel

# Real numbers of a row's states that a program holds, in eights a thread; and rows that it goes through with one table.
TILE, ROWS, WARPS = 1024, 8, 4


def refusal(*tensors: Tensor) -> str | None:
    """Why the kernels can't run, or None when they can."""
    if (reason := launch.refusal(*tensors, widths=())) is not None:
        return reason
    wide = next((x.dtype for x in tensors[1:] if x.dtype != torch.float32), None)
    if wide is not None:
        return f"the Triton kernel steps states in float32, got {wide}"
    b, n = len(tensors[0]), tensors[1].shape[2]
    if triton.next_power_of_2(n) * 2 > TILE or b > launch.GRID * ROWS:
        return f"the Triton kernel takes up to {TILE // 2} modes and {launch.GRID * ROWS} rows, got {n} and {b}"
    return None


def read(u_bd: Tensor, table_kgnp: Tensor, state_bdnp: Tensor) -> Tensor:
    """`subquad.ops.step.read`."""
    u_bd = u_bd if u_bd.stride(1) == 1 else u_bd.contiguous()
    return _read(u_bd, table_kgnp.contiguous(), _rows(state_bdnp))


def write_(
    pool_bdnp: Tensor, rows_b: Tensor | None, u_bd: Tensor, table_kgnp: Tensor, state_bdnp: Tensor, n_b: Tensor
) -> None:
    """`subquad.ops.step.write_`."""
    u_bd = u_bd if u_bd.stride(1) == 1 else u_bd.contiguous()
    table_kgnp, n_b = table_kgnp.contiguous(), n_b.contiguous()
    if rows_b is None and _same(pool_bdnp, state_bdnp):
        return _advance(pool_bdnp, u_bd, table_kgnp, n_b)
    if _rows(pool_bdnp) is not pool_bdnp:
        raise ValueError(f"pool_bdnp: expected rows without gaps, got strides {pool_bdnp.stride()}")
    return _write(pool_bdnp, None if rows_b is None else rows_b.contiguous(), u_bd, table_kgnp, _rows(state_bdnp), n_b)


def _rows(state_bdnp: Tensor) -> Tensor:
    """The same with no gaps within a row."""
    n = state_bdnp.shape[2]
    return state_bdnp if state_bdnp.stride()[1:] == (2 * n, 2, 1) else state_bdnp.contiguous()


def _same(pool_bdnp: Tensor, state_bdnp: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return pool_bdnp is state_bdnp
    return pool_bdnp.data_ptr() == state_bdnp.data_ptr() and pool_bdnp.stride() == state_bdnp.stride()


@torch.library.custom_op("subquad::step_read", mutates_args=())
@launch.guarded
def _read(u: Tensor, table: Tensor, state: Tensor) -> Tensor:
    y = launch.scratch(*u.shape, like=u, dtype=u.dtype)
    _launch(state, u, table, y, None, None, None)
    return y


@_read.register_fake
def _(u: Tensor, table: Tensor, state: Tensor) -> Tensor:
    return u.new_empty(u.shape)


@torch.library.custom_op("subquad::step_advance", mutates_args=("state",))
@launch.guarded
def _advance(state: Tensor, u: Tensor, table: Tensor, n: Tensor) -> None:
    _launch(state, u, table, None, state, None, n)


@torch.library.custom_op("subquad::step_write", mutates_args=("pool",))
@launch.guarded
def _write(pool: Tensor, rows: Tensor | None, u: Tensor, table: Tensor, state: Tensor, n: Tensor) -> None:
    _launch(state, u, table, None, pool, rows, n)


def _launch(
    state: Tensor,
    u: Tensor,
    table: Tensor,
    y: Tensor | None,
    pool: Tensor | None,
    rows: Tensor | None,
    n: Tensor | None,
) -> None:
    (b, d), (parts, g, modes, _) = u.shape, table.shape
    if u.numel() == 0:
        return
    wide = triton.next_power_of_2(modes)
    channels = min(triton.next_power_of_2(d), TILE // (2 * wide))
    kernel: Any = step_kernel[(triton.cdiv(d, channels), triton.cdiv(b, ROWS))]
    # An absent tensor's place is taken by one that no branch reads.
    kernel(
        state, u, table, u if y is None else y, state if pool is None else pool, u if rows is None else rows,
        u if n is None else n, b, d, g, state.stride(0), u.stride(0), (state if pool is None else pool).stride(0),
        N=modes, BN=wide, BD=channels, ROWS=ROWS, LOW=parts == 5, WRITE=pool is not None, INDEXED=rows is not None,
        num_warps=WARPS,
    )  # fmt: skip
