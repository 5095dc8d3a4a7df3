"""Losses of students: token KL and cross-entropy in chunks of tokens, and the relative error of a layer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from subquad.core.layout import Layout
from subquad.core.state import precise
from subquad.ops import linear_loss
from subquad.train.logits import TopK


def scored_bt(layout: Layout, wanted_bt: Tensor | None = None) -> Tensor:
    """bool ``[b, t]``: True where the next column is a token of the same document, so that there is a label.

    Args:
        layout: where the tokens stand.
        wanted_bt: bool, the tokens that count as labels, as those of a completion; None is all.
    """
    valid_bt = layout.valid_bt
    next_bt = valid_bt[:, :-1] & valid_bt[:, 1:]
    if layout.documents_bt is not None:
        next_bt = next_bt & (layout.documents_bt[:, :-1] == layout.documents_bt[:, 1:])
    if wanted_bt is not None:
        next_bt = next_bt & wanted_bt[:, 1:]
    return F.pad(next_bt, (0, 1))


def token_kl(
    student_btd: Tensor,
    student_head_vd: Tensor,
    teacher_btd: Tensor,
    teacher_head_vd: Tensor,
    layout: Layout,
    wanted_bt: Tensor | None = None,
    *,
    temperature: float = 1.0,
    reverse: float = 0.0,
) -> Tensor:
    """Mean over tokens of ``T^2 ((1 - r) KL(p || q) + r KL(q || p))``, in nats; p of the teacher, q of the student.

    ``p = softmax(logits / T)``, q likewise, ``KL(p || q) = sum_v p (log p - log q)``. Positions without a label that
    counts (a row's or document's last token, padding, what is not wanted) don't count; none at all is a loss of 0.
    Logits exist for one chunk of tokens at a time, in forward and in backward.

    Args:
        student_btd: hidden states after the final norm.
        student_head_vd: the head's weight.
        teacher_btd: the teacher's hidden states; no gradient.
        teacher_head_vd: the teacher's head; no gradient.
        layout: where the tokens stand.
        wanted_bt: bool, the tokens that count as labels; None is all.
        temperature: T, of both; its square keeps the gradient's size (arXiv 1503.02531, section 2.1).
        reverse: r, the weight of the mode-seeking KL(q || p) (arXiv 2306.08543).

    Raises:
        ConfigError: a temperature that is not positive, or a weight outside 0..1.
    """
    scored_n = scored_bt(layout, wanted_bt).flatten()
    total = linear_loss.kl(
        student_btd.flatten(0, 1),
        student_head_vd,
        teacher_btd.flatten(0, 1),
        teacher_head_vd,
        scored_n,
        temperature=temperature,
        reverse=reverse,
    )
    return _mean(total, scored_n)


def token_kl_top(
    hidden_btd: Tensor, head_vd: Tensor, top: TopK, layout: Layout, wanted_bt: Tensor | None = None
) -> Tensor:
    """Mean over tokens of ``sum_k p_k log(p_k / q_k) + p_tail log(p_tail / q_tail)``, in nats.

    The k tokens that `top` tells apart, and one for all others: with the whole vocabulary it is `token_kl`, and with
    less of it never more. Its gradient is exact; shift, mask and chunks are those of `token_kl`.

    Args:
        hidden_btd: the student's hidden states after the final norm.
        head_vd: its head's weight.
        top: what the teacher said; no gradient. What storage has rounded is made to sum to 1.
        layout: where the tokens stand.
        wanted_bt: bool, the tokens that count as labels; None is all.
    """
    scored_n = scored_bt(layout, wanted_bt).flatten()
    parts = (top.ids_btk.flatten(0, 1), top.log_p_btk.flatten(0, 1), top.log_tail_bt.flatten())
    return _mean(linear_loss.kl_top(hidden_btd.flatten(0, 1), head_vd, *parts, scored_n), scored_n)


def token_cross_entropy(
    hidden_btd: Tensor, head_vd: Tensor, tokens_bt: Tensor, layout: Layout, wanted_bt: Tensor | None = None
) -> Tensor:
    """Mean over tokens of ``-log p(next token)``, in nats, with the same shift, mask and chunks as `token_kl`.

    Args:
        hidden_btd: hidden states after the final norm.
        head_vd: the head's weight.
        tokens_bt: the tokens that were read; the label of a column is the next one's.
        layout: where the tokens stand.
        wanted_bt: bool, the tokens that count as labels; None is all.
    """
    scored_n = scored_bt(layout, wanted_bt).flatten()
    labels_n = tokens_bt.roll(-1, dims=1).flatten()
    return _mean(linear_loss.cross_entropy(hidden_btd.flatten(0, 1), head_vd, labels_n, scored_n), scored_n)


def _mean(total: Tensor, scored_n: Tensor) -> Tensor:
    # A batch may hold prompts alone: nothing is learnt from it, and nothing is divided by zero.
    return total / scored_n.sum().clamp(min=1)


def relative_error(y_btd: Tensor, target_btd: Tensor, layout: Layout) -> Tensor:
    """``||y - y*||^2 / ||y*||^2`` over the tokens of a block: 0 is the teacher's layer, 1 is what silence scores.

    Args:
        y_btd: a layer's output.
        target_btd: what it should have been; no gradient.
        layout: padding doesn't count.
    """
    target_btd = target_btd.detach()
    return squared_error(y_btd, target_btd, layout) / squared_norm(target_btd, layout)


def squared_error(y_btd: Tensor, target_btd: Tensor, layout: Layout) -> Tensor:
    """``||y - y*||^2`` over the tokens of a block, the part of `relative_error` that adds up over parts of a batch."""
    wide = precise(y_btd.dtype)
    return squared_norm(y_btd.to(wide) - target_btd.to(wide), layout)


def squared_norm(x_btd: Tensor, layout: Layout) -> Tensor:
    """``||x||^2`` over the tokens of a block, in at least float32; padding doesn't count."""
    norm_bt = x_btd.to(precise(x_btd.dtype)).square().sum(-1)
    return (norm_bt * layout.valid_bt if layout.padded else norm_bt).sum()
