"""Draws in PyTorch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.ops.draw.noise import gumbel, gumbel_of, uniform
from subquad.ops.draw.probabilities import divided, probabilities

__all__ = ["draw", "guess_", "refusal", "uniform"]


def refusal(*tensors: Tensor) -> str | None:
    """None: it takes everything."""
    return None


def draw(
    logits_btv: Tensor, greedy_b: Tensor, seed_b: Tensor, step_b: Tensor, temperature_b: Tensor | None, *, draws: bool,
    stream: int,
) -> Tensor:  # fmt: skip
    """`subquad.ops.draw.draw`."""
    b, t, v = logits_btv.shape
    score_btv = divided(logits_btv, temperature_b)
    # One reduction tells: the maximum of a row is NaN when any of it is.
    sound_bt = score_btv.amax(-1).isfinite()
    if draws:
        step_bt = step_b[:, None] + torch.arange(t, device=step_b.device)
        noise_btv = gumbel(seed_b.repeat_interleave(t), step_bt.flatten(), v, stream).view(b, t, v)
        score_btv = score_btv + noise_btv.masked_fill(greedy_b[:, None, None], 0)
    return torch.where(sound_bt, score_btv.argmax(-1), -1)


def guess_(
    tokens_bk: Tensor, q_bkm: Tensor | None, at: int, logits_bm: Tensor, greedy_b: Tensor, seed_b: Tensor,
    step_b: Tensor, ids_m: Tensor | None, temperature_b: Tensor | None, *, draws: bool, stream: int,
) -> None:  # fmt: skip
    """`subquad.ops.draw.guess_`."""
    score_bm = divided(logits_bm, temperature_b)
    if q_bkm is not None:
        q_bkm[:, at] = probabilities(score_bm, greedy_b)
    ids_m = torch.arange(logits_bm.shape[1], device=logits_bm.device) if ids_m is None else ids_m
    if draws:
        score_bm = score_bm + gumbel_of(seed_b, step_b + at, ids_m, stream).masked_fill(greedy_b[:, None], 0)
    tokens_bk[:, at] = ids_m[score_bm.argmax(-1)]
