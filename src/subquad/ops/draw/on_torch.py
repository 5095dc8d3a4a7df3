"""Draws in PyTorch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.ops.draw.noise import gumbel, gumbel_of, uniform
from subquad.ops.draw.probabilities import divided, probabilities

__all__ = ["agree", "draw", "guess_", "refusal", "uniform"]


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


def agree(
    logits_btv: Tensor, guesses_bk: Tensor, length_b: Tensor, greedy_b: Tensor, seed_b: Tensor, step_b: Tensor,
    temperature_b: Tensor | None, *, draws: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`subquad.ops.draw.agree`."""
    tokens_bt, k = draw(logits_btv, greedy_b, seed_b, step_b, temperature_b, draws=draws, stream=0), guesses_bk.shape[1]
    there_bk = torch.arange(k, device=tokens_bt.device) < length_b[:, None]
    return tokens_bt, 1 + ((tokens_bt[:, :k] == guesses_bk) & there_bk).to(torch.int64).cumprod(1).sum(1)


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
