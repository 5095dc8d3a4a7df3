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
    temperature: float = 1.0,
    reverse: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """``sum_n T^2 ((1 - r) KL(p_n || q_n) + r KL(q_n || p_n))`` over scored tokens, in nats.

    ``KL(p || q) = sum_v p_v (log p_v - log q_v)``, where ``0 log 0 = 0``. Forward at temperature T, with its square:
    arXiv 1503.02531, section 2.1; reverse: arXiv 2306.08543, equation 2.

    Args:
        hidden_nd: the student's hidden states; ``q_n = softmax(head hidden_n / T)``.
        head_vd: its head.
        target_nd: the teacher's hidden states, whose width may be another; ``p_n`` likewise, without a gradient.
        target_head_vd: its head.
        scored_n: bool, the tokens that count.
        temperature: T.
        reverse: r, the weight of the reverse direction.
        dtype: arithmetic throughout.
    """
    with torch.no_grad():
        p_nv = (target_nd.to(dtype) @ target_head_vd.to(dtype).mT / temperature).log_softmax(-1)
    q_nv = (hidden_nd.to(dtype) @ head_vd.to(dtype).mT / temperature).log_softmax(-1)
    # A direction without weight may be infinite.
    directions = (1 - reverse, p_nv, q_nv), (reverse, q_nv, p_nv)
    total_n = sum((weight * _kl(a_nv, b_nv) for weight, a_nv, b_nv in directions if weight), start=p_nv.new_zeros(()))
    return (temperature**2 * total_n * scored_n).sum()


def _kl(p_nv: Tensor, q_nv: Tensor) -> Tensor:
    """KL of two distributions given as logarithms."""
    # No difference is taken of two minus infinities, whose NaN the gradient would carry even where it is not chosen.
    none_nv = p_nv == -torch.inf
    return (p_nv.exp() * torch.where(none_nv, 0, p_nv - torch.where(none_nv, 0, q_nv))).sum(-1)


def kl_top(
    hidden_nd: Tensor,
    head_vd: Tensor,
    ids_nk: Tensor,
    log_p_nk: Tensor,
    log_tail_n: Tensor,
    scored_n: Tensor,
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """``sum_n (sum_k p_nk (log p_nk - log q_nk) + p_tail (log p_tail - log q_tail))`` over scored tokens, in nats.

    It is the KL of two distributions over k tokens and one that stands for all others, and by the log-sum inequality
    never above the KL over all tokens; what it lacks is ``p_tail`` times the KL within the tail.

    Args:
        hidden_nd: the student's hidden states; ``q_n = softmax(head hidden_n)``, ``q_tail = 1 - sum_k q_nk``.
        head_vd: its head.
        ids_nk: the tokens that are told apart, no two of a row the same.
        log_p_nk: their log-probabilities, up to a constant of the row's, and likewise
        log_tail_n: that of all other tokens together; together they are made to sum to 1.
        scored_n: bool, the tokens that count.
        dtype: arithmetic throughout.
    """
    p_nj = torch.cat((log_p_nk, log_tail_n[:, None]), 1).to(dtype).log_softmax(-1)
    logits_nv = hidden_nd.to(dtype) @ head_vd.to(dtype).mT
    tail_n = logits_nv.scatter(1, ids_nk.long(), -torch.inf).logsumexp(-1)
    q_nj = torch.cat((logits_nv.gather(1, ids_nk.long()), tail_n[:, None]), 1).log_softmax(-1)
    return (_kl(p_nj, q_nj) * scored_n).sum()


def cross_entropy(
    hidden_nd: Tensor, head_vd: Tensor, labels_n: Tensor, scored_n: Tensor, *, dtype: torch.dtype = torch.float64
) -> Tensor:
    """``-sum_n log q_n[label_n]`` over scored tokens, in nats; arguments as in `kl`, `labels_n` int64."""
    q_nv = (hidden_nd.to(dtype) @ head_vd.to(dtype).mT).log_softmax(-1)
    return -(q_nv.gather(1, labels_n[:, None])[:, 0] * scored_n).sum()
