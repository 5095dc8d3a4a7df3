"""Losses of a chunk's logits in PyTorch, on any device and in any dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.core.state import precise

# Several tensors of a chunk's size, in at least float32, live at a time.
LOGITS_AT_ONCE = 2**25


def refusal(*tensors: Tensor) -> str | None:
    """None: it takes everything."""
    return None


def kl_(
    logits_cv: Tensor, target_cv: Tensor, scored_c: Tensor, temperature: float = 1.0, reverse: float = 0.0
) -> Tensor:
    """``T^2 ((1 - r) KL(p || q) + r KL(q || p))`` of each row, with ``q = softmax(logits / T)``, p of the target.

    `logits_cv` becomes its gradient ``T ((1 - r) (q - p) + r q (log q - log p - KL(q || p)))``. Rows that are not
    scored have neither.
    """
    log_q_cv, log_p_cv = _log_softmax(logits_cv, temperature), _log_softmax(target_cv, temperature)
    q_cv, p_cv = log_q_cv.exp(), log_p_cv.exp()
    gap_cv = log_p_cv.sub_(log_q_cv)
    if reverse == 0:
        loss_c = _expectation(p_cv, gap_cv).sum(-1)
        grad_cv = q_cv.sub_(p_cv)
    else:
        terms_cv = _expectation(q_cv, gap_cv).neg_()
        loss_c = terms_cv.sum(-1)
        grad_cv = terms_cv.sub_(q_cv * loss_c[:, None])
        if reverse < 1:
            loss_c = reverse * loss_c + (1 - reverse) * _expectation(p_cv, gap_cv).sum(-1)
            grad_cv = grad_cv.mul_(reverse).add_(q_cv.sub_(p_cv), alpha=1 - reverse)
    weight_c = temperature * scored_c.to(grad_cv.dtype)
    logits_cv.copy_(grad_cv.mul_(weight_c[:, None]))
    return loss_c * scored_c * temperature**2


def tail_(logits_cv: Tensor, top_c: Tensor, p_tail_c: Tensor, scored_c: Tensor) -> Tensor:
    """``log sum exp`` of each row, where a few logits are minus infinity and have ``log sum exp`` `top_c` themselves.

    `logits_cv` becomes ``softmax(logits) (q_tail - p_tail)``, where ``q_tail`` is the share of this row's sum in that
    of all logits: what a KL that sees the tail as one token gives each of its logits as gradient.
    """
    wide_cv = logits_cv.to(precise(logits_cv.dtype))
    tail_c = wide_cv.logsumexp(-1)
    weight_c = ((tail_c - top_c).sigmoid() - p_tail_c) * scored_c
    # Of nothing left, every share is 0.
    base_c = tail_c.masked_fill(tail_c == -torch.inf, 0)
    logits_cv.copy_((wide_cv - base_c[:, None]).exp_().mul_(weight_c[:, None]))
    return tail_c


def cross_entropy_(logits_cv: Tensor, labels_c: Tensor, scored_c: Tensor) -> Tensor:
    """``-log softmax(logits)[label]`` of each row; `logits_cv` becomes its gradient ``q - [v = label]``."""
    log_q_cv = _log_softmax(logits_cv)
    loss_c = -log_q_cv.gather(1, labels_c[:, None])[:, 0]
    q_cv = log_q_cv.exp_()
    q_cv.scatter_add_(1, labels_c[:, None], q_cv.new_full((len(q_cv), 1), -1))
    logits_cv.copy_(q_cv.mul_(scored_c[:, None]))
    return loss_c * scored_c


def _log_softmax(logits_cv: Tensor, temperature: float = 1.0) -> Tensor:
    wide_cv = logits_cv.to(precise(logits_cv.dtype))
    return (wide_cv if temperature == 1 else wide_cv / temperature).log_softmax(-1)


def _expectation(p_cv: Tensor, x_cv: Tensor) -> Tensor:
    """The terms of ``sum_v p x``: 0 where p is, even if x is infinite there."""
    return (p_cv * x_cv).masked_fill_(p_cv == 0, 0)
