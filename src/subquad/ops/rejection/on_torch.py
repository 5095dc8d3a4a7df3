"""Speculative sampling in PyTorch, on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops.draw import draw_residual, probabilities, uniform
from subquad.ops.draw.probabilities import among_all, divided


def refusal(*tensors: Tensor) -> str | None:
    """None: it takes everything."""
    return None


def rejection_sample(
    logits_btv: Tensor, guesses_bk: Tensor, length_b: Tensor, q_bkm: Tensor, place_v: Tensor | None, greedy_b: Tensor,
    seed_b: Tensor, step_b: Tensor, temperature_b: Tensor | None, coin: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`subquad.ops.rejection.rejection_sample`."""
    (b, t), k = logits_btv.shape[:2], guesses_bk.shape[1]
    p_btv = probabilities(divided(logits_btv, temperature_b), greedy_b)
    q_bkv = among_all(q_bkm, place_v).to(p_btv.dtype)
    at_bk1, column_k = guesses_bk[..., None], torch.arange(k, device=length_b.device)
    step_bk = step_b[:, None] + column_k
    coin_bk = uniform(seed_b.repeat_interleave(k), step_bk.flatten(), coin).view(b, k)
    # Where logits are broken p is NaN, and nothing stands.
    stands_bk = coin_bk * q_bkv.gather(2, at_bk1)[..., 0] < p_btv[:, :k].gather(2, at_bk1)[..., 0]
    n_b = (stands_bk & (column_k < length_b[:, None])).to(torch.int64).cumprod(1).sum(1)
    row_b = torch.arange(b, device=n_b.device)
    p_bv, q_bv = p_btv[row_b, n_b.clamp(max=t - 1)], q_bkv[row_b, n_b.clamp(max=k - 1)]
    rest_bv = torch.where((n_b < length_b)[:, None], (p_bv - q_bv).clamp(min=0), p_bv)
    drawn_b = draw_residual(rest_bv, p_bv, greedy_b, seed_b, step_b + n_b)
    drawn_b = torch.where(p_bv.sum(-1).isfinite(), drawn_b, -1)
    tokens_bt = F.pad(guesses_bk, (0, t - k))
    return torch.where(torch.arange(t, device=n_b.device) == n_b[:, None], drawn_b[:, None], tokens_bt), 1 + n_b
