"""Losses of a linear head, whose logits exist for one chunk of tokens at a time, in forward and in backward."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from subquad.core.errors import ConfigError
from subquad.core.state import precise
from subquad.ops import launch
from subquad.ops.backends import Backends
from subquad.ops.linear_loss import equation

__all__ = ["cross_entropy", "equation", "kl", "kl_top"]

_backends = Backends(__name__)

Rows = Callable[[Tensor, slice], Tensor]
"""Puts the gradient of a chunk's logits ``[c, v]`` in their place and returns the loss of each token."""


def kl(
    hidden_nd: Tensor,
    head_vd: Tensor,
    target_nd: Tensor,
    target_head_vd: Tensor,
    scored_n: Tensor,
    *,
    temperature: float = 1.0,
    reverse: float = 0.0,
) -> Tensor:
    """`equation.kl` by chunks of tokens; gradients flow into `hidden_nd` and `head_vd`, and nowhere else.

    Logits have the dtype of the matrix product (autocast's where it is on), the arithmetic on them is in at least
    float32, and the gradient of the head is summed over chunks in at least float32.
    """
    if not (0 < temperature < math.inf and 0 <= reverse <= 1):
        raise ConfigError(
            f"expected temperature > 0 and reverse in 0..1, got {temperature} and {reverse}; 1 and 0 is plain KL"
        )
    launch.axes(hidden_nd=hidden_nd, head_vd=head_vd, scored_n=scored_n)
    launch.axes(hidden_n=hidden_nd[:, 0], head_v=head_vd[:, 0], target_nc=target_nd, target_head_vc=target_head_vd)
    scored_n = scored_n.bool().contiguous()
    chosen = _backends.choose(hidden_nd, head_vd, target_nd, target_head_vd)
    (target_nd, target_head_vd) = launch.operands(target_nd.detach(), target_head_vd.detach())
    targets_cv: Tensor | None = None

    def rows(logits_cv: Tensor, part: slice) -> Tensor:
        nonlocal targets_cv
        if targets_cv is None:
            targets_cv = target_nd.new_empty(len(logits_cv), len(target_head_vd))
        target_cv = torch.mm(target_nd[part], target_head_vd.mT, out=targets_cv[: len(logits_cv)])
        return chosen.kl_(logits_cv, target_cv, scored_n[part], temperature, reverse)

    return _Chunked.apply(hidden_nd, head_vd, rows, chosen.LOGITS_AT_ONCE)  # type: ignore[no-any-return]


def kl_top(
    hidden_nd: Tensor, head_vd: Tensor, ids_nk: Tensor, log_p_nk: Tensor, log_tail_n: Tensor, scored_n: Tensor
) -> Tensor:
    """`equation.kl_top` by chunks of tokens; otherwise as `kl`."""
    launch.axes(hidden_nd=hidden_nd, head_vd=head_vd, ids_nk=ids_nk, log_p_nk=log_p_nk, log_tail_n=log_tail_n)
    launch.axes(hidden_nd=hidden_nd, scored_n=scored_n)
    scored_n = scored_n.bool().contiguous()
    chosen = _backends.choose(hidden_nd, head_vd)
    wide = precise(hidden_nd.dtype)
    k = ids_nk.shape[1]

    def rows(logits_cv: Tensor, part: slice) -> Tensor:
        ids_ck, scored_c = ids_nk[part].long(), scored_n[part]
        log_p_cj = torch.cat((log_p_nk[part], log_tail_n[part, None]), 1).to(wide).log_softmax(-1)
        p_cj = log_p_cj.exp()
        top_ck = logits_cv.gather(1, ids_ck).to(wide)
        # The tail is summed without the top, since all less the top leaves nothing of a small tail but rounding.
        logits_cv.scatter_(1, ids_ck, -torch.inf)
        tail_c = chosen.tail_(logits_cv, top_ck.logsumexp(-1), p_cj[:, k], scored_c)
        log_q_cj = torch.cat((top_ck, tail_c[:, None]), 1).log_softmax(-1)
        loss_c = (p_cj * (log_p_cj - log_q_cj)).masked_fill_(p_cj == 0, 0).sum(-1)
        grad_ck = (log_q_cj.exp() - p_cj)[:, :k].masked_fill_(~scored_c[:, None], 0)
        logits_cv.scatter_(1, ids_ck, grad_ck.to(logits_cv.dtype))
        return loss_c.masked_fill_(~scored_c, 0)

    return _Chunked.apply(hidden_nd, head_vd, rows, chosen.LOGITS_AT_ONCE)  # type: ignore[no-any-return]


def cross_entropy(hidden_nd: Tensor, head_vd: Tensor, labels_n: Tensor, scored_n: Tensor) -> Tensor:
    """`equation.cross_entropy` by chunks of tokens; otherwise as `kl`."""
    launch.axes(hidden_nd=hidden_nd, head_vd=head_vd, labels_n=labels_n, scored_n=scored_n)
    labels_n, scored_n = labels_n.long().contiguous(), scored_n.bool().contiguous()
    chosen = _backends.choose(hidden_nd, head_vd)

    def rows(logits_cv: Tensor, part: slice) -> Tensor:
        return chosen.cross_entropy_(logits_cv, labels_n[part], scored_n[part])

    return _Chunked.apply(hidden_nd, head_vd, rows, chosen.LOGITS_AT_ONCE)  # type: ignore[no-any-return]


class _Chunked(torch.autograd.Function):
    """Sum of a loss over chunks whose gradients are made on the way, so that no chunk's logits outlive it."""

    @staticmethod
    def forward(ctx: Any, hidden_nd: Tensor, head_vd: Tensor, rows: Rows, at_once: int) -> Tensor:
        n, v = len(hidden_nd), len(head_vd)
        wide = precise(hidden_nd.dtype)
        of_hidden, of_head = ctx.needs_input_grad[:2]
        x_nd, w_vd = launch.operands(hidden_nd.detach(), head_vd.detach())
        # Chunks of one size, so that the last is not a small one.
        size = -(-n // max(1, -(-n * v // at_once)))
        logits_cv = x_nd.new_empty(size, v)
        loss_n = torch.zeros(n, dtype=wide, device=x_nd.device)
        grad_nd = torch.empty_like(hidden_nd) if of_hidden else None
        grad_vd = torch.zeros_like(head_vd, dtype=wide) if of_head else None
        with torch.autocast(x_nd.device.type, enabled=False):
            for start in range(0, n, max(size, 1)):
                part = slice(start, min(start + size, n))
                x_cd = x_nd[part]
                z_cv = torch.mm(x_cd, w_vd.mT, out=logits_cv[: len(x_cd)])
                loss_n[part] = rows(z_cv, part)
                if grad_nd is not None:
                    grad_nd[part] = z_cv @ w_vd
                if grad_vd is not None:
                    _add_product_(grad_vd, z_cv.mT, x_cd)
        ctx.save_for_backward(grad_nd, None if grad_vd is None else grad_vd.to(head_vd.dtype))
        return loss_n.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grad_outputs
        return *(None if g is None else g * grad.to(g.dtype) for g in ctx.saved_tensors), None, None


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a b`` without rounding the product to the dtype of `a` and `b`."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
