"""Rotation in PyTorch, on any device and with gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.core.constants import counted


def refusal(*tensors: Tensor) -> str | None:
    """None: it takes everything."""
    return None


def turns(starts_bn: Tensor, run: int, freq_f: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``[b, n * run, 1, f]`` of positions times frequencies, `run` positions from each start on."""
    positions_bt = (starts_bn[..., None] + counted(run, starts_bn.device)).flatten(1)
    angle_bt1f = (positions_bt[..., None].to(freq_f.dtype) * freq_f)[:, :, None]
    return angle_bt1f.cos(), angle_bt1f.sin()


def rotate(x_bthk: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`subquad.ops.rope.rotate`."""
    half = cos.shape[-1]
    a, b, rest = x_bthk[..., :half], x_bthk[..., half : 2 * half], x_bthk[..., 2 * half :]
    return torch.cat(((a * cos - b * sin).to(x_bthk.dtype), (b * cos + a * sin).to(x_bthk.dtype), rest), dim=-1)


def rotate_both(q_bthk: Tensor, k_btgk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`subquad.ops.rope.rotate_both`."""
    return rotate(q_bthk, cos, sin), rotate(k_btgk, cos, sin)
