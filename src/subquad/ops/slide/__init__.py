"""A block slides through a window: what a commit of many tokens writes, in one launch for each layer.

Only where its kernel runs; elsewhere `subquad.ops.window.WindowState.after` and `subquad.ops.linear_attention.absorb`
say the same in some sixty operations, each of which costs a GPU as much as this one.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

from torch import Tensor

from subquad.ops import backends
from subquad.ops.ring import RingState, runs
from subquad.ops.window import WindowState

__all__ = ["Behind", "takes", "write_"]

# Loaded here and not at the first call, so that a compiler tracing a call meets no import.
_kernels: Any = importlib.import_module(f"{__name__}.on_triton") if backends.triton_runs() else None


class Behind(NamedTuple):
    """A linear state behind a window, which takes in what leaves it.

    Attributes:
        window_f_bgnf, f_bgtf: features of the oldest tokens of the window, and of the block; see
            `subquad.ops.window.Far`.
        linear_bgfv: the state before the block, its mass in the last channel.
        into_bgfv: of the pool.
    """

    window_f_bgnf: Tensor
    f_bgtf: Tensor
    linear_bgfv: Tensor
    into_bgfv: Tensor


def takes(k_bgtk: Tensor, behind: Behind | None = None) -> bool:
    """Whether the kernel runs for such keys, and what stands behind their window."""
    features = 0 if behind is None else behind.f_bgtf.shape[3]
    alike = behind is None or behind.f_bgtf.dtype == behind.window_f_bgnf.dtype == k_bgtk.dtype
    return alike and runs(k_bgtk.device, k_bgtk.dtype, k_bgtk.shape[3], features)


def write_(
    pool: WindowState | RingState,
    rows_b: Tensor,
    before: WindowState,
    k_bgtk: Tensor,
    v_bgtk: Tensor,
    n_b: Tensor,
    behind: Behind | None = None,
) -> None:
    """Write the window behind the first `n_b` tokens of a block, and what is behind the window, into rows of a pool.

    Args:
        pool: written in place; right-aligned or a ring.
        rows_b: int64, its row for each of the block's, no two alike.
        before: the window before the block, not the pool's own memory.
        k_bgtk, v_bgtk: the block's keys at their positions, and values, heads first; one document a row.
        n_b: int64.
        behind: the linear state; None for a window alone.
    """
    ring = isinstance(pool, RingState)
    buffers = (pool.keys_bgrk, pool.values_bgrk) if ring else (pool.window_k_bgwk, pool.window_v_bgwk)
    into = *buffers, pool.sink_k_bgsk, pool.sink_v_bgsk, pool.seen_b, None if behind is None else behind.into_bgfv
    old = before.window_k_bgwk, before.window_v_bgwk, before.sink_k_bgsk, before.sink_v_bgsk, before.seen_b
    far: list[Tensor] = []
    if behind is not None:
        far = [_dense(behind.window_f_bgnf), _dense(behind.f_bgtf), behind.linear_bgfv.contiguous()]
    block = _dense(k_bgtk), _dense(v_bgtk)
    _kernels.write_(*into, rows_b.contiguous(), n_b.contiguous(), *block, *(x.contiguous() for x in old), far, ring)


def _dense(x: Tensor) -> Tensor:
    """The same with the numbers of a token side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()
