"""Losses of a chunk's logits in PyTorch, on any device and in any dtype."""

from __future__ import annotations

from torch import Tensor

from subquad.core.state import precise

# Several tensors of a chunk's size, in at least float32, live at a time.
LOGITS_AT_ONCE = 2**25


def refusal(*tensors: Tensor) -> str | None:
    """None: it takes everything."""
    return None


def kl_(logits_cv: Tensor, target_cv: Tensor, scored_c: Tensor) -> Tensor:
    """``KL(softmax(target) || softmax(logits))`` of each row; `logits_cv` becomes its gradient ``q - p``.

    Rows that are not scored have neither.
    """
    log_q_cv, log_p_cv = _log_softmax(logits_cv), _log_softmax(target_cv)
    p_cv = log_p_cv.exp()
    loss_c = (p_cv * (log_p_cv - log_q_cv)).sum(-1)
    logits_cv.copy_(log_q_cv.exp_().sub_(p_cv).mul_(scored_c[:, None]))
    return loss_c * scored_c


def cross_entropy_(logits_cv: Tensor, labels_c: Tensor, scored_c: Tensor) -> Tensor:
    """``-log softmax(logits)[label]`` of each row; `logits_cv` becomes its gradient ``q - [v = label]``."""
    log_q_cv = _log_softmax(logits_cv)
    loss_c = -log_q_cv.gather(1, labels_c[:, None])[:, 0]
    q_cv = log_q_cv.exp_()
    q_cv.scatter_add_(1, labels_c[:, None], q_cv.new_full((len(q_cv), 1), -1))
    logits_cv.copy_(q_cv.mul_(scored_c[:, None]))
    return loss_c * scored_c


def _log_softmax(logits_cv: Tensor) -> Tensor:
    return logits_cv.to(precise(logits_cv.dtype)).log_softmax(-1)
