"""Gated linear attention by flash-linear-attention, for comparison: it runs only where `backends.use` names it."""

from __future__ import annotations

from typing import Any

import fla.ops.gla  # pyright: ignore[reportMissingImports]
import torch
from torch import Tensor

from subquad.core.errors import UnsupportedError
from subquad.ops import chunks, launch
from subquad.ops.attention import expand_heads

_theirs: Any = fla.ops.gla.chunk_gla


def refusal(*tensors: Tensor) -> str | None:
    """Why it can't run these, or None."""
    return None if tensors[0].device.type == "cuda" else f"it needs a CUDA device, got {tensors[0].device}"


def scan(
    q_bthk: Tensor,
    k_bthk: Tensor,
    v_bthv: Tensor,
    g_bthk: Tensor,
    state_bhkv: Tensor,
    *,
    valid_bt: Tensor | None = None,
    documents_bt: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`subquad.ops.gla.scan` by its chunked kernels, which know no documents; log decays below -100 count as -100."""
    if documents_bt is not None:
        raise UnsupportedError("gla on fla: expected no documents, got some; leave the backend's name out")
    q, k, v, g = chunks.blank(valid_bt, q_bthk, k_bthk, v_bthv, g_bthk)
    h = g.shape[2]
    q, k, v = (expand_heads(x, h) for x in launch.operands(q, k, v))
    g = g.float().clamp(min=-100.0)
    y_bthv, end_bhkv = _theirs(q, k, v, g, scale=1.0, initial_state=state_bhkv.float(), output_final_state=True)
    return y_bthv.to(v_bthv.dtype), end_bhkv


def final_state(
    k_bthk: Tensor,
    v_bthv: Tensor,
    g_bthk: Tensor,
    state_bhkv: Tensor,
    *,
    valid_bt: Tensor | None = None,
    documents_bt: Tensor | None = None,
) -> Tensor:
    """`subquad.ops.gla.final_state`: that of a whole `scan`."""
    unread = torch.zeros_like(k_bthk)
    return scan(unread, k_bthk, v_bthv, g_bthk, state_bhkv, valid_bt=valid_bt, documents_bt=documents_bt)[1]
