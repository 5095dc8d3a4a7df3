"""The distributions that tokens are drawn from."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.core.state import precise


def probabilities(scores_xv: Tensor, greedy_b: Tensor | None) -> Tensor:
    """``softmax(scores)``, and in greedy rows all mass on the first of the likeliest tokens.

    NaN where scores hold a NaN or have no finite maximum.

    Args:
        scores_xv: ``[b, v]`` or ``[b, t, v]``, logits behind all processors.
        greedy_b: bool; None promises that no row is.
    """
    if greedy_b is None:
        return scores_xv.softmax(-1)
    certain_xv = torch.zeros_like(scores_xv).scatter_(-1, scores_xv.argmax(-1, keepdim=True), 1)
    certain_xv = certain_xv.masked_fill(~scores_xv.amax(-1, keepdim=True).isfinite(), torch.nan)
    greedy_x1 = greedy_b.view(-1, *[1] * (scores_xv.dim() - 1))
    return torch.where(greedy_x1, certain_xv, scores_xv.softmax(-1))


def divided(logits_xv: Tensor, temperature_b: Tensor | None) -> Tensor:
    """``logits / temperature`` in at least float32; None is 1."""
    scores_xv = logits_xv.to(precise(logits_xv.dtype))
    return scores_xv if temperature_b is None else scores_xv / temperature_b.view(-1, *[1] * (scores_xv.dim() - 1))


def among_all(x_xm: Tensor, place_v: Tensor | None, absent: float = 0.0) -> Tensor:
    """Numbers of some tokens as numbers of all, ``[..., v]``.

    Args:
        x_xm: ``[..., m]``.
        place_v: int64, the place of each token, m where it has none; None where these are all tokens.
        absent: of tokens without a place: 0 for probabilities, minus infinity for logits.
    """
    return x_xm if place_v is None else F.pad(x_xm, (0, 1), value=absent)[..., place_v]
