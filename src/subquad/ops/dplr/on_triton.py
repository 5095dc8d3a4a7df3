"""Diagonal plus low-rank state spaces with the Cauchy sums in Triton; all else is PyTorch's."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from subquad.ops import launch
from subquad.ops.dplr import kernels as jitted
from subquad.ops.dplr.equation import System
from subquad.ops.dplr.on_torch import final_state, response, scan

__all__ = ["final_state", "kernel", "refusal", "scan"]

# Triton's types know nothing of launches.
kernels: Any = jitted

# Frequencies of a program.
BLOCK = 128


def refusal(*tensors: Tensor) -> str | None:
    """Why the kernels can't run here, or None."""
    return launch.no_kernels(tensors[0].device)


def kernel(system: System, length: int) -> Tensor:
    """`subquad.ops.dplr.kernel`."""
    return response(system, length, _transform)


def _transform(angle_l: Tensor, step_g: Tensor, poles_gn: Tensor, weights_gnk: Tensor) -> Tensor:
    """`subquad.ops.dplr.on_torch`'s of the same name, with a factor of half the angle taken out of all sums."""
    cross_gnk = (weights_gnk * poles_gn.conj()[..., None]).real
    weights_gn8 = torch.cat((weights_gnk.real, cross_gnk), dim=-1)
    sine_l, cosine_l = 4 * (angle_l / 2).sin(), 2 * (angle_l / 2).cos()
    square_gn = poles_gn.real.square() + poles_gn.imag.square()
    sums_g8l = _sums(sine_l, cosine_l, step_g, poles_gn.real, square_gn, weights_gn8)
    out_in, out_low, low_in, low_low = torch.complex(sums_g8l[:, :4], sums_g8l[:, 4:]).unbind(1)
    back_l = torch.polar(torch.ones_like(angle_l), angle_l / 2)
    return 4 * back_l * (out_in - 2 * cosine_l * out_low * low_in / (1 + 2 * cosine_l * low_low))


@torch.library.custom_op("subquad::dplr_sums", mutates_args=())
@launch.guarded
def _sums(sine: Tensor, cosine: Tensor, step: Tensor, real: Tensor, square: Tensor, weights: Tensor) -> Tensor:
    """The four sums over the poles at each frequency, ``[g, 8, l]``: real parts, then imaginary ones."""
    (g, n), length = real.shape, len(sine)
    step, real, square, weights = (x.contiguous() for x in (step, real, square, weights))
    out = launch.scratch(g, 8, length, like=step, dtype=step.dtype)
    blocks = triton.cdiv(length, BLOCK)
    kernels.sums[(g * blocks,)](
        sine, cosine, step, real, square, weights, out, length, blocks, N=n, BL=BLOCK, num_warps=4
    )
    return out


@_sums.register_fake
def _sums_fake(sine: Tensor, cosine: Tensor, step: Tensor, real: Tensor, square: Tensor, weights: Tensor) -> Tensor:
    return step.new_empty(len(step), 8, len(sine))


@torch.library.custom_op("subquad::dplr_sums_backward", mutates_args=())
@launch.guarded
def _backward(
    grad: Tensor, sine: Tensor, cosine: Tensor, step: Tensor, real: Tensor, square: Tensor, weights: Tensor
) -> Tensor:
    """Gradients of a pole's eight weights, real part, squared length, and of the step by it: ``[g, n, 11]``."""
    g, n = real.shape
    step, real, square, weights = (x.contiguous() for x in (step, real, square, weights))
    out = launch.scratch(g, n, 11, like=step, dtype=step.dtype)
    kernels.gradients[(g * n,)](
        sine, cosine, step, real, square, weights, grad.contiguous(), out, len(sine), N=n, BL=BLOCK, num_warps=4
    )
    return out


@_backward.register_fake
def _backward_fake(
    grad: Tensor, sine: Tensor, cosine: Tensor, step: Tensor, real: Tensor, square: Tensor, weights: Tensor
) -> Tensor:
    return step.new_empty(*real.shape, 11)


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    made_gnx = _backward(grad, *ctx.saved_tensors)
    return None, None, made_gnx[..., 10].sum(1), made_gnx[..., 8], made_gnx[..., 9], made_gnx[..., :8]


_sums.register_autograd(_gradients, setup_context=_setup)
