"""Attention over a cache as its equation."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.ops import attention


def visible(seen_b: Tensor, time: int, capacity: int) -> tuple[Tensor, Tensor]:
    """Which slots of a cache, and which tokens of a block, each query sees: bool ``[b, t, n]`` and ``[b, t, t]``."""
    columns_t = torch.arange(time, device=seen_b.device)
    cached_btn = (torch.arange(capacity, device=seen_b.device) < seen_b[:, None])[:, None].expand(-1, time, -1)
    return cached_btn, (columns_t[:, None] >= columns_t).expand(len(seen_b), -1, -1)


def equation(
    q_bthk: Tensor, k_bgtk: Tensor, v_bgtv: Tensor, k_bgnk: Tensor, v_bgnv: Tensor, seen_b: Tensor, scale: float
) -> Tensor:
    """What `subquad.ops.cached.attend` computes, by `subquad.ops.attention.equation` over the joined keys."""
    cached_btn, block_btt = visible(seen_b, q_bthk.shape[1], k_bgnk.shape[2])
    # Nothing that stands behind a row's tokens may be read, whatever it is.
    empty_b1n1 = ~cached_btn[:, :1, :, None]
    k_bgmk = torch.cat((k_bgnk.masked_fill(empty_b1n1, 0), k_bgtk), dim=2)
    v_bgmv = torch.cat((v_bgnv.masked_fill(empty_b1n1, 0), v_bgtv), dim=2)
    allowed_btm = torch.cat((cached_btn, block_btt), dim=2)
    return attention.equation(q_bthk, k_bgmk.transpose(1, 2), v_bgmv.transpose(1, 2), allowed_btm, scale)
