"""A step by one Triton launch, and so its commit, or both by one."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from subquad.ops import launch, overlap
from subquad.ops.step.kernels import advance_kernel, read_kernel, write_kernel
from subquad.ops.step.tables import Table

# Of a row a thread takes one load of 16 bytes: then a program's states and its part of the table are laid out alike and
# neither goes through shared memory. With more than four rows the compiler puts some loads behind the use of others.
# So each of Hopper's processors has nine programs or more with 8 KB of states under way; 20 KB keep memory busy. Of the
# table as much is read, out of the cache, as of the states.
WARPS, ROWS = 4, 4
TILE = WARPS * 32 * 4
# Real numbers of a channel that a program can still hold.
WIDEST = 2 * TILE


def refusal(*tensors: Tensor) -> str | None:
    """Why the kernels can't run, or None when they can."""
    if (reason := launch.refusal(*tensors, widths=())) is not None:
        return reason
    wide = next((x.dtype for x in tensors[1:] if x.dtype != torch.float32), None)
    if wide is not None:
        return f"the Triton kernel steps states in float32, got {wide}"
    b, n = len(tensors[0]), tensors[1].shape[2]
    if triton.next_power_of_2(n) * 2 > WIDEST or b > launch.GRID * ROWS:
        return f"the Triton kernel takes up to {WIDEST // 2} modes and {launch.GRID * ROWS} rows, got {n} and {b}"
    return None


def read(u_bd: Tensor, table: Table, state_bdnp: Tensor, skip_d: Tensor | None, gelu: bool) -> Tensor:
    """`subquad.ops.step.read`."""
    reads_gnp, direct_g = table.reads_gnp.contiguous(), table.direct_g.contiguous()
    skip_d = None if skip_d is None else skip_d.contiguous()
    return _read(_dense(u_bd), reads_gnp, direct_g, _rows(state_bdnp), skip_d, gelu)


def write_(
    pool_bdnp: Tensor, rows_b: Tensor | None, u_bd: Tensor, moves_kgnp: Tensor, state_bdnp: Tensor, n_b: Tensor
) -> None:
    """`subquad.ops.step.write_`."""
    u_bd, moves_kgnp, n_b = _dense(u_bd), moves_kgnp.contiguous(), n_b.contiguous()
    if rows_b is None and _same(pool_bdnp, state_bdnp):
        return _write_here(pool_bdnp, u_bd, moves_kgnp, n_b)
    _refuse_gaps(pool_bdnp)
    return _write(pool_bdnp, None if rows_b is None else rows_b.contiguous(), u_bd, moves_kgnp, _rows(state_bdnp), n_b)


def advance_(u_bd: Tensor, table: Table, state_bdnp: Tensor, n_b: Tensor, skip_d: Tensor | None, gelu: bool) -> Tensor:
    """`subquad.ops.step.advance_`."""
    _refuse_gaps(state_bdnp)
    reads_gnp, direct_g, moves_kgnp = (x.contiguous() for x in table)
    skip_d = None if skip_d is None else skip_d.contiguous()
    return _advance(state_bdnp, _dense(u_bd), reads_gnp, direct_g, moves_kgnp, n_b.contiguous(), skip_d, gelu)


def _refuse_gaps(pool_bdnp: Tensor) -> None:
    if _rows(pool_bdnp) is not pool_bdnp:
        raise ValueError(f"pool_bdnp: expected rows without gaps, got strides {pool_bdnp.stride()}; copy it")


def _dense(u_bd: Tensor) -> Tensor:
    return u_bd if u_bd.stride(1) == 1 else u_bd.contiguous()


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
def _read(u: Tensor, reads: Tensor, direct: Tensor, state: Tensor, skip: Tensor | None, gelu: bool) -> Tensor:
    y = launch.scratch(*u.shape, like=u, dtype=u.dtype)
    if u.numel():
        grid, tile = _tile(state)
        kernel: Any = read_kernel[grid]
        # What is absent has its place taken by something that no branch reads.
        kernel(
            state, u, reads, direct, direct if skip is None else skip, y, *u.shape, len(direct), state.stride(0),
            u.stride(0), SKIP=skip is not None, GELU=gelu, **tile,
        )  # fmt: skip
    return y


@_read.register_fake
def _(u: Tensor, reads: Tensor, direct: Tensor, state: Tensor, skip: Tensor | None, gelu: bool) -> Tensor:
    return u.new_empty(u.shape)


@torch.library.custom_op("subquad::step_advance", mutates_args=("state",))
@launch.guarded
def _advance(
    state: Tensor, u: Tensor, reads: Tensor, direct: Tensor, moves: Tensor, n: Tensor, skip: Tensor | None, gelu: bool
) -> Tensor:
    y = launch.scratch(*u.shape, like=u, dtype=u.dtype)
    if u.numel():
        grid, tile = _tile(state)
        kernel: Any = advance_kernel[grid]
        # What is absent has its place taken by something that no branch reads.
        kernel(
            state, u, reads, direct, direct if skip is None else skip, moves, n, y, *u.shape, len(direct),
            state.stride(0), u.stride(0), SKIP=skip is not None, GELU=gelu, LOW=len(moves) == 4, **tile,
        )  # fmt: skip
    return y


@_advance.register_fake
def _(
    state: Tensor, u: Tensor, reads: Tensor, direct: Tensor, moves: Tensor, n: Tensor, skip: Tensor | None, gelu: bool
) -> Tensor:
    return u.new_empty(u.shape)


@torch.library.custom_op("subquad::step_write_here", mutates_args=("state",))
@launch.guarded
def _write_here(state: Tensor, u: Tensor, moves: Tensor, n: Tensor) -> None:
    _launch(state, None, u, moves, state, n)


@torch.library.custom_op("subquad::step_write", mutates_args=("pool",))
@launch.guarded
def _write(pool: Tensor, rows: Tensor | None, u: Tensor, moves: Tensor, state: Tensor, n: Tensor) -> None:
    _launch(pool, rows, u, moves, state, n)


def _launch(pool: Tensor, rows: Tensor | None, u: Tensor, moves: Tensor, state: Tensor, n: Tensor) -> None:
    if u.numel():
        grid, tile = _tile(state)
        kernel: Any = write_kernel[grid]
        kernel(
            state, u, moves, pool, n if rows is None else rows, n, *u.shape, moves.shape[1], state.stride(0),
            u.stride(0), pool.stride(0), LOW=len(moves) == 4, INDEXED=rows is not None, **tile,
        )  # fmt: skip


def _tile(state: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid, and how programs are cut and launched."""
    b, d, modes, _ = state.shape
    wide = 2 * triton.next_power_of_2(modes)
    channels = min(triton.next_power_of_2(d), max(1, TILE // wide))
    tile = {"SIZE": 2 * modes, "BN": wide, "BD": channels, "ROWS": ROWS, "num_warps": WARPS}
    return (triton.cdiv(d, channels), triton.cdiv(b, ROWS)), tile | overlap.options(state.device)
