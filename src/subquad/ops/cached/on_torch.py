"""Attention over a cache in PyTorch, on any device and in any dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.ops import attention, rope
from subquad.ops.cached.equation import visible


def refusal(*tensors: Tensor) -> str | None:
    """None: it takes everything."""
    return None


def attend(
    q_bthk: Tensor, k_bgtk: Tensor, v_bgtv: Tensor, k_bgnk: Tensor, v_bgnv: Tensor, seen_b: Tensor, scale: float,
    tables: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`subquad.ops.cached.attend`; the scores are held."""
    if tables is not None:
        q_bthk, k_btgk = rope.rotate_both(q_bthk, k_bgtk.transpose(1, 2), tables)
        k_bgtk = k_btgk.transpose(1, 2)
    cached_btn, block_btt = visible(seen_b, q_bthk.shape[1], k_bgnk.shape[2])
    parts = [(k_bgnk, v_bgnv, cached_btn), (k_bgtk, v_bgtv, block_btt)]
    return attention.pieces(q_bthk, parts, scale)[0], k_bgtk


def attend_(
    q_bthk: Tensor, k_bgtk: Tensor, v_bgtv: Tensor, k_bgnk: Tensor, v_bgnv: Tensor, seen_b: Tensor, scale: float,
    tables: tuple[Tensor, Tensor] | None,
) -> Tensor:  # fmt: skip
    """`subquad.ops.cached.attend_`."""
    y_bthv, k_bgtk = attend(q_bthk, k_bgtk, v_bgtv, k_bgnk, v_bgnv, seen_b, scale, tables)
    n_b = (k_bgnk.shape[2] - seen_b).clamp(max=k_bgtk.shape[2])
    append_(k_bgnk, v_bgnv, seen_b.clone(), k_bgtk, v_bgtv, n_b, None, None, None)
    return y_bthv


def append_(
    k_bgnk: Tensor, v_bgnv: Tensor, seen_b: Tensor, k_bgtk: Tensor, v_bgtv: Tensor, n_b: Tensor,
    rows_b: Tensor | None, first_b: Tensor | None, start_b: Tensor | None,
) -> None:  # fmt: skip
    """`subquad.ops.cached.append_`."""
    t, capacity = k_bgtk.shape[2], k_bgnk.shape[2]
    rows_b = torch.arange(len(n_b), device=n_b.device) if rows_b is None else rows_b
    first_b = torch.zeros_like(n_b) if first_b is None else first_b
    start_b = seen_b[rows_b] if start_b is None else start_b
    if t and capacity:
        # Dropped tokens must write somewhere: they repeat one that is kept, or, if none is, slot 0 as it is.
        columns_t, nothing_b1 = torch.arange(t, device=n_b.device), (n_b == first_b)[:, None]
        source_bt = columns_t.clamp(first_b[:, None], (n_b - 1).clamp(min=0)[:, None])
        slot_bt = torch.where(nothing_b1, 0, (start_b - first_b)[:, None] + source_bt).clamp(max=capacity - 1)
        for buffer_bgnk, block_bgtk in ((k_bgnk, k_bgtk), (v_bgnv, v_bgtv)):
            g, k = block_bgtk.shape[1], block_bgtk.shape[3]
            value_bgtk = block_bgtk.gather(2, source_bt[:, None, :, None].expand(-1, g, -1, k)).to(buffer_bgnk.dtype)
            value_bgtk = torch.where(nothing_b1[:, None, :, None], buffer_bgnk[rows_b, :, :1], value_bgtk)
            buffer_bgnk[rows_b[:, None], :, slot_bt] = value_bgtk.transpose(1, 2)
    seen_b[rows_b] = start_b + n_b - first_b
