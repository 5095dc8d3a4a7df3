"""The decay by one Triton launch; without gradients."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from subquad.ops import launch, overlap
from subquad.ops.decay.kernels import decay_kernel


def refusal(*tensors: Tensor) -> str | None:
    """Why the kernel can't run."""
    return launch.refusal(*tensors, widths=())


def decay(raw_bth: Tensor, A_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """`subquad.ops.decay.Decay`."""
    return _decay(raw_bth if raw_bth.stride(-1) == 1 else raw_bth.contiguous(), A_log, dt_bias)


@torch.library.custom_op("subquad::decay", mutates_args=())
@launch.guarded
def _decay(raw: Tensor, a: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    b, t, h = raw.shape
    g, dt = (launch.scratch(b, t, h, like=raw, dtype=torch.float32) for _ in range(2))
    if b * t:
        kernel: Any = decay_kernel[(b * t,)]
        kernel(
            raw, a, bias, g, dt, t, *raw.stride()[:2],
            H=h, BH=triton.next_power_of_2(h), num_warps=1, **overlap.options(raw.device),
        )  # fmt: skip
    return g, dt


@_decay.register_fake
def _(raw: Tensor, a: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return raw.new_empty(raw.shape, dtype=torch.float32), raw.new_empty(raw.shape, dtype=torch.float32)
