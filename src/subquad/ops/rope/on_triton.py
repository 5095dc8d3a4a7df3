"""Rotation by one Triton launch; without gradients."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from subquad.ops import launch, overlap
from subquad.ops.rope.kernels import rotate_both_kernel, turns_kernel


def refusal(*tensors: Tensor) -> str | None:
    """Why the kernels can't run; positions are integers."""
    return launch.refusal(*(x for x in tensors if x.is_floating_point()), widths=())


def turns(starts_bn: Tensor, run: int, freq_f: Tensor) -> tuple[Tensor, Tensor]:
    """`subquad.ops.rope.on_torch.turns`."""
    return _turns(starts_bn.contiguous(), run, freq_f.contiguous())


@torch.library.custom_op("subquad::rope_turns", mutates_args=())
@launch.guarded
def _turns(starts: Tensor, run: int, freq: Tensor) -> tuple[Tensor, Tensor]:
    shape = (len(starts), starts.shape[1] * run, 1, len(freq))
    cos, sin = (launch.scratch(*shape, like=freq, dtype=freq.dtype) for _ in range(2))
    if cos.numel():
        kernel: Any = turns_kernel[(starts.numel() * run,)]
        kernel(
            starts, freq, cos, sin, run, len(freq), BF=triton.next_power_of_2(len(freq)), num_warps=1,
            **overlap.options(freq.device),
        )  # fmt: skip
    return cos, sin


@_turns.register_fake
def _(starts: Tensor, run: int, freq: Tensor) -> tuple[Tensor, Tensor]:
    shape = (len(starts), starts.shape[1] * run, 1, len(freq))
    return freq.new_empty(shape), freq.new_empty(shape)


def rotate_both(q_bthk: Tensor, k_btgk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`subquad.ops.rope.rotate_both`."""
    q_bthk, k_btgk = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_bthk, k_btgk))
    return _rotate_both(q_bthk, k_btgk, cos.contiguous(), sin.contiguous())


@torch.library.custom_op("subquad::rotate_both", mutates_args=())
@launch.guarded
def _rotate_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    b, t, h, width = q.shape
    g, half = k.shape[2], cos.shape[-1]
    out = tuple(launch.scratch(*x.shape, like=x, dtype=x.dtype) for x in (q, k))
    if b * t:
        kernel: Any = rotate_both_kernel[(b * t,)]
        kernel(
            q, k, cos, sin, *out, t, 0 if len(cos) == 1 else t * half, *q.stride()[:3], *k.stride()[:3],
            H=h, G=g, K=width, HALF=half, BH=triton.next_power_of_2(h), BG=triton.next_power_of_2(g),
            BF=triton.next_power_of_2(half), BR=triton.next_power_of_2(max(width - 2 * half, 1)), num_warps=4,
            **overlap.options(q.device),
        )  # fmt: skip
    return out[0], out[1]


@_rotate_both.register_fake
def _(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)
