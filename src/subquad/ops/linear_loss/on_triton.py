"""Losses of a chunk's logits by Triton kernels, one program a row."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from subquad.ops import launch
from subquad.ops.linear_loss import kernels

# Of the matrix products' dtype, once for the student and once for the teacher.
LOGITS_AT_ONCE = 2**28

BLOCK, WARPS = 4096, 8


def refusal(*tensors: Tensor) -> str | None:
    """Why the kernels can't run, or None when they can."""
    return launch.refusal(*tensors, widths=())


def kl_(
    logits_cv: Tensor, target_cv: Tensor, scored_c: Tensor, temperature: float = 1.0, reverse: float = 0.0
) -> Tensor:
    """`subquad.ops.linear_loss.on_torch.kl_`."""
    return _kl_(logits_cv, target_cv, scored_c, temperature, reverse)


def cross_entropy_(logits_cv: Tensor, labels_c: Tensor, scored_c: Tensor) -> Tensor:
    """`subquad.ops.linear_loss.on_torch.cross_entropy_`."""
    return _cross_entropy_(logits_cv, labels_c, scored_c)


def tail_(logits_cv: Tensor, top_c: Tensor, p_tail_c: Tensor, scored_c: Tensor) -> Tensor:
    """`subquad.ops.linear_loss.on_torch.tail_`."""
    return _tail_(logits_cv, top_c.contiguous(), p_tail_c.contiguous(), scored_c)


@torch.library.custom_op("subquad::linear_loss_kl_", mutates_args=("logits_cv",))
@launch.guarded
def _kl_(logits_cv: Tensor, target_cv: Tensor, scored_c: Tensor, temperature: float, reverse: float) -> Tensor:
    c, v = logits_cv.shape
    loss_c = launch.scratch(c, like=logits_cv, dtype=torch.float32)
    if loss_c.numel():
        kernels.kl_rows[(c,)](
            logits_cv,
            target_cv,
            scored_c,
            loss_c,
            temperature,
            reverse,
            logits_cv.stride(0),
            target_cv.stride(0),
            v,
            **_mix(temperature, reverse),
            **_shape(v),
        )
    return loss_c


@torch.library.custom_op("subquad::linear_loss_tail_", mutates_args=("logits_cv",))
@launch.guarded
def _tail_(logits_cv: Tensor, top_c: Tensor, p_tail_c: Tensor, scored_c: Tensor) -> Tensor:
    c, v = logits_cv.shape
    tail_c = launch.scratch(c, like=logits_cv, dtype=torch.float32)
    if tail_c.numel():
        kernels.tail_rows[(c,)](logits_cv, top_c, p_tail_c, scored_c, tail_c, logits_cv.stride(0), v, **_shape(v))
    return tail_c


@torch.library.custom_op("subquad::linear_loss_cross_entropy_", mutates_args=("logits_cv",))
@launch.guarded
def _cross_entropy_(logits_cv: Tensor, labels_c: Tensor, scored_c: Tensor) -> Tensor:
    c, v = logits_cv.shape
    loss_c = launch.scratch(c, like=logits_cv, dtype=torch.float32)
    if loss_c.numel():
        kernels.cross_entropy_rows[(c,)](logits_cv, labels_c, scored_c, loss_c, logits_cv.stride(0), v, **_shape(v))
    return loss_c


@_kl_.register_fake
def _(logits_cv: Tensor, target_cv: Tensor, scored_c: Tensor, temperature: float, reverse: float) -> Tensor:
    return logits_cv.new_empty(len(logits_cv), dtype=torch.float32)


@_tail_.register_fake
def _(logits_cv: Tensor, top_c: Tensor, p_tail_c: Tensor, scored_c: Tensor) -> Tensor:
    return logits_cv.new_empty(len(logits_cv), dtype=torch.float32)


@_cross_entropy_.register_fake
def _(logits_cv: Tensor, labels_c: Tensor, scored_c: Tensor) -> Tensor:
    return logits_cv.new_empty(len(logits_cv), dtype=torch.float32)


def _shape(v: int) -> dict[str, Any]:
    """Block and warps for rows of `v` logits."""
    return {"BLOCK": min(BLOCK, triton.next_power_of_2(v)), "num_warps": WARPS}


def _mix(temperature: float, reverse: float) -> dict[str, Any]:
    """Which parts of the kernel are there at all: the plain KL pays for no other."""
    return {"TEMPERED": temperature != 1, "FORWARD": reverse < 1, "REVERSE": reverse > 0}
