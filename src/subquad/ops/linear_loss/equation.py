"""Losses of a linear head as their definitions, with all logits at once: the oracle."""

from __future__ import annotations

import torch
from torch import Tensor


def kl(
    hidden_nd: Tensor,
    head_vd: Tensor,
    target_nd: Tensor,
    target_head_vd: Tensor,
    scored_n: Tensor,
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """``sum_n sum_v p_nv (log p_nv - log q_nv)`` over scored tokens, in nats (arXiv 1503.02531, at temperature 1).

    Args:
        hidden_nd: the student's hidden states; ``q_n = softmax(head hidden_n)``.
        head_vd: its head.
        target_nd: the teacher's hidden states, whose width may be another; ``p_n`` likewise, without a gradient.
        target_head_vd: its head.
        scored_n: bool, the tokens that count.
        dtype: arithmetic throughout.
    """
    with torch.no_grad():
        p_nv = (target_nd.to(dtype) @ target_head_vd.to(dtype).mT).log_softmax(-1)
    q_nv = (hidden_nd.to(dtype) @ head_vd.to(dtype).mT).log_softmax(-1)
    return ((p_nv.exp() * (p_nv - q_nv)).sum(-1) * scored_n).sum()


def cross_entropy(
    hidden_nd: Tensor, head_vd: Tensor, labels_n: Tensor, scored_n: Tensor, *, dtype: torch.dtype = torch.float64
) -> Tensor:
    """``-sum_n log q_n[label_n]`` over scored tokens, in nats; arguments as in `kl`, `labels_n` int64."""
    q_nv = (hidden_nd.to(dtype) @ head_vd.to(dtype).mT).log_softmax(-1)
    return -(q_nv.gather(1, labels_n[:, None])[:, 0] * scored_n).sum()
