"""Losses of students: token KL and cross-entropy in chunks of tokens, and the relative error of a layer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from subquad.core.layout import Layout
from subquad.core.state import precise
from subquad.ops import linear_loss


def scored_bt(layout: Layout) -> Tensor:
    """bool ``[b, t]``: True where the next column is a token of the same document, so that there is a label."""
    valid_bt = layout.valid_bt
    next_bt = valid_bt[:, :-1] & valid_bt[:, 1:]
    if layout.documents_bt is not None:
        next_bt = next_bt & (layout.documents_bt[:, :-1] == layout.documents_bt[:, 1:])
    return F.pad(next_bt, (0, 1))


def token_kl(
    student_btd: Tensor, student_head_vd: Tensor, teacher_btd: Tensor, teacher_head_vd: Tensor, layout: Layout
) -> Tensor:
    """Mean over tokens of ``KL(p_teacher || p_student) = sum_v p_teacher (log p_teacher - log p_student)``, in nats.

    Positions without a label (a row's or document's last token, padding) don't count. Logits exist for one chunk of
    tokens at a time, in forward and in backward.

    Args:
        student_btd: hidden states after the final norm.
        student_head_vd: the head's weight.
        teacher_btd: the teacher's hidden states; no gradient.
        teacher_head_vd: the teacher's head; no gradient.
        layout: where the tokens stand.
    """
    scored_n = scored_bt(layout).flatten()
    student_nd, teacher_nd = student_btd.flatten(0, 1), teacher_btd.flatten(0, 1)
    return linear_loss.kl(student_nd, student_head_vd, teacher_nd, teacher_head_vd, scored_n) / scored_n.sum()


def token_cross_entropy(hidden_btd: Tensor, head_vd: Tensor, tokens_bt: Tensor, layout: Layout) -> Tensor:
    """Mean over tokens of ``-log p(next token)``, in nats, with the same shift, mask and chunks as `token_kl`.

    Args:
        hidden_btd: hidden states after the final norm.
        head_vd: the head's weight.
        tokens_bt: the tokens that were read; the label of a column is the next one's.
        layout: where the tokens stand.
    """
    scored_n = scored_bt(layout).flatten()
    labels_n = tokens_bt.roll(-1, dims=1).flatten()
    return linear_loss.cross_entropy(hidden_btd.flatten(0, 1), head_vd, labels_n, scored_n) / scored_n.sum()


def relative_error(y_btd: Tensor, target_btd: Tensor, layout: Layout) -> Tensor:
    """``||y - y*||^2 / ||y*||^2`` over the tokens of a block: 0 is the teacher's layer, 1 is what silence scores.

    Args:
        y_btd: a layer's output.
        target_btd: what it should have been; no gradient.
        layout: padding doesn't count.
    """
    wide = precise(y_btd.dtype)
    y_btd, target_btd = y_btd.to(wide), target_btd.detach().to(wide)
    error_bt, norm_bt = (y_btd - target_btd).square().sum(-1), target_btd.square().sum(-1)
    if layout.padded:
        error_bt, norm_bt = error_bt * layout.valid_bt, norm_bt * layout.valid_bt
    return error_bt.sum() / norm_bt.sum()
