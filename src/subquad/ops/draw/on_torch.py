"""Draws in PyTorch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.core.state import precise
from subquad.ops.draw.noise import gumbel, uniform

__all__ = ["draw", "refusal", "uniform"]


def refusal(*tensors: Tensor) -> str | None:
    """None: it takes everything."""
    return None


def draw(logits_btv: Tensor, greedy_b: Tensor, seed_b: Tensor, step_b: Tensor, *, draws: bool, stream: int) -> Tensor:
    """`subquad.ops.draw.draw`."""
    b, t, v = logits_btv.shape
    score_btv = logits_btv.to(precise(logits_btv.dtype))
    # One reduction tells: the maximum of a row is NaN when any of it is.
    sound_bt = score_btv.amax(-1).isfinite()
    if draws:
        step_bt = step_b[:, None] + torch.arange(t, device=step_b.device)
        noise_btv = gumbel(seed_b.repeat_interleave(t), step_bt.flatten(), v, stream).view(b, t, v)
        score_btv = score_btv + noise_btv.masked_fill(greedy_b[:, None, None], 0)
    return torch.where(sound_bt, score_btv.argmax(-1), -1)
