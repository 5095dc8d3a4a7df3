"""Losses of students: token KL and cross-entropy in chunks of tokens, and the relative error of a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.core.layout import Layout
from subquad.core.state import precise
from subquad.train.precision import operand

LOGITS_AT_ONCE = 2**25

ChunkLoss = Callable[[Tensor, Tensor, slice], Tensor]
"""Loss summed over a chunk, of its hidden states ``[c, d]``, the head's weight ``[v, d]`` and its place among all."""


def scored_bt(layout: Layout) -> Tensor:
    """bool ``[b, t]``: True where the next column is a token of the same document, so that there is a label."""
    valid_bt = layout.valid_bt
    next_bt = valid_bt[:, :-1] & valid_bt[:, 1:]
    if layout.documents_bt is not None:
        next_bt = next_bt & (layout.documents_bt[:, :-1] == layout.documents_bt[:, 1:])
    return F.pad(next_bt, (0, 1))


class _Chunked(torch.autograd.Function):
    """Sum of a loss over chunks whose gradients are made on the way, so that no chunk's logits outlive it."""

    @staticmethod
    def forward(ctx: Any, hidden_nd: Tensor, weight_vd: Tensor, loss: ChunkLoss) -> Tensor:
        needs = [bool(n) for n in ctx.needs_input_grad[:2]]
        wide = precise(hidden_nd.dtype)
        total = torch.zeros((), dtype=wide, device=hidden_nd.device)
        grads = [
            torch.zeros_like(x, dtype=wide) if n else None for x, n in zip((hidden_nd, weight_vd), needs, strict=True)
        ]
        w_vd = operand(weight_vd.detach()).requires_grad_(needs[1])
        step = max(1, LOGITS_AT_ONCE // len(weight_vd))
        for start in range(0, len(hidden_nd), step):
            part = slice(start, min(start + step, len(hidden_nd)))
            h_cd = hidden_nd[part].detach().requires_grad_(needs[0])
            with torch.enable_grad():
                chunk = loss(h_cd, w_vd, part)
            total += chunk.detach()
            inputs = [x for x, n in zip((h_cd, w_vd), needs, strict=True) if n]
            made = iter(torch.autograd.grad(chunk, inputs) if inputs else ())
            if grads[0] is not None:
                grads[0][part] = next(made)
            if grads[1] is not None:
                grads[1] += next(made)
        ctx.grads = [None if g is None else g.to(x.dtype) for g, x in zip(grads, (hidden_nd, weight_vd), strict=True)]
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (grad,) = grad_outputs
        return *(None if g is None else g * grad.to(g.dtype) for g in ctx.grads), None


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
    teacher_nd, teacher_vd = teacher_btd.detach().flatten(0, 1), operand(teacher_head_vd.detach())

    def loss(h_cd: Tensor, w_vd: Tensor, part: slice) -> Tensor:
        with torch.no_grad():
            target_cv = _log_softmax(F.linear(teacher_nd[part], teacher_vd))
        kl_c = F.kl_div(_log_softmax(F.linear(h_cd, w_vd)), target_cv, reduction="none", log_target=True).sum(-1)
        return (kl_c * scored_n[part]).sum()

    return _Chunked.apply(student_btd.flatten(0, 1), student_head_vd, loss) / scored_n.sum()


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

    def loss(h_cd: Tensor, w_vd: Tensor, part: slice) -> Tensor:
        nll_c = -_log_softmax(F.linear(h_cd, w_vd)).gather(1, labels_n[part, None])[:, 0]
        return (nll_c * scored_n[part]).sum()

    return _Chunked.apply(hidden_btd.flatten(0, 1), head_vd, loss) / scored_n.sum()


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


def _log_softmax(logits_cv: Tensor) -> Tensor:
    return logits_cv.to(precise(logits_cv.dtype)).log_softmax(-1)
