"""A token's sum over the history by one Triton launch, or one more to add up the shares of few rows."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from subquad.ops import launch
from subquad.ops.past.kernels import past_kernel

# Tokens and channels of a tile, and programs at a time that fill the device.
TOKENS, CHANNELS, MOST = 32, 64, 1056


def refusal(history_bsd: Tensor, k_lg: Tensor) -> str | None:
    """Why the kernel can't run, or None when it can."""
    if len(history_bsd) > launch.GRID:
        return f"the Triton kernel takes up to {launch.GRID} rows, got {len(history_bsd)}"
    return launch.refusal(history_bsd, k_lg, widths=())


def read(history_bsd: Tensor, seen_b: Tensor, k_lg: Tensor) -> Tensor:
    """`subquad.ops.past.read`."""
    history_bsd = history_bsd if history_bsd.stride(2) == 1 else history_bsd.contiguous()
    return _read(history_bsd, seen_b.contiguous(), k_lg.contiguous())


@torch.library.custom_op("subquad::past_read", mutates_args=())
@launch.guarded
def _read(history: Tensor, seen: Tensor, taps: Tensor) -> Tensor:
    (b, s, d), (length, g) = history.shape, taps.shape
    tiles = triton.cdiv(d, CHANNELS)
    splits = max(1, min(MOST // max(1, tiles * b), triton.cdiv(s, 4 * TOKENS)))
    parts = launch.scratch(splits, b, d, like=history, dtype=torch.float32)
    if parts.numel():
        kernel: Any = past_kernel[(tiles, b, splits)]
        kernel(
            history, seen, taps, parts, d, g, length, history.stride(0), history.stride(1),
            OWN=g == d, SPLITS=splits, BS=TOKENS, BD=CHANNELS, num_warps=4,
        )  # fmt: skip
    return parts.sum(0).to(history.dtype)


@_read.register_fake
def _(history: Tensor, seen: Tensor, taps: Tensor) -> Tensor:
    return history.new_empty(history.shape[0], history.shape[2])
