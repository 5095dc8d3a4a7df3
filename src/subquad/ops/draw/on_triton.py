"""Draws by two Triton launches, which never write the noise."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from subquad.ops import launch, overlap
from subquad.ops.draw.kernels import best_kernel, token_kernel, uniform_kernel

# Tokens of a program.
SHARE = 2048


def refusal(*tensors: Tensor) -> str | None:
    """Why the kernels can't run."""
    if not tensors[0].is_floating_point():
        return launch.no_kernels(tensors[0].device)
    return launch.refusal(*tensors, widths=())


def draw(logits_btv: Tensor, greedy_b: Tensor, seed_b: Tensor, step_b: Tensor, *, draws: bool, stream: int) -> Tensor:
    """`subquad.ops.draw.draw`."""
    logits_btv = logits_btv if logits_btv.stride(-1) == 1 else logits_btv.contiguous()
    return _draw(logits_btv, greedy_b.contiguous(), seed_b.contiguous(), step_b.contiguous(), draws, stream)


@torch.library.custom_op("subquad::draw", mutates_args=())
@launch.guarded
def _draw(logits: Tensor, greedy: Tensor, seed: Tensor, step: Tensor, draws: bool, stream: int) -> Tensor:
    b, t, v = logits.shape
    token = torch.empty(b, t, dtype=torch.int64, device=logits.device)
    if b * t == 0:
        return token
    shares = triton.cdiv(v, SHARE)
    best = launch.scratch(b * t, shares, like=logits, dtype=torch.float32)
    at = launch.scratch(b * t, shares, like=logits, dtype=torch.int32)
    options = overlap.options(logits.device)
    kernel: Any = best_kernel[(b * t * shares,)]
    kernel(
        logits, greedy, seed, step, best, at, v, *logits.stride()[:2],
        T=t, SHARES=shares, DRAWS=draws, STREAM=stream, BV=SHARE, num_warps=4, **options,
    )  # fmt: skip
    kernel = token_kernel[(b * t,)]
    kernel(best, at, token, SHARES=shares, BS=triton.next_power_of_2(shares), num_warps=1, **options)
    return token


@_draw.register_fake
def _(logits: Tensor, greedy: Tensor, seed: Tensor, step: Tensor, draws: bool, stream: int) -> Tensor:
    return logits.new_empty(logits.shape[:2], dtype=torch.int64)


def uniform(seed_b: Tensor, step_b: Tensor, stream: int) -> Tensor:
    """`subquad.ops.draw.uniform`."""
    return _uniform(seed_b.contiguous(), step_b.contiguous(), stream)


@torch.library.custom_op("subquad::uniform", mutates_args=())
@launch.guarded
def _uniform(seed: Tensor, step: Tensor, stream: int) -> Tensor:
    out = torch.empty(seed.shape, dtype=torch.float32, device=seed.device)
    if len(seed):
        kernel: Any = uniform_kernel[(len(seed),)]
        kernel(seed, step, out, STREAM=stream, num_warps=1, **overlap.options(seed.device))
    return out


@_uniform.register_fake
def _(seed: Tensor, step: Tensor, stream: int) -> Tensor:
    return seed.new_empty(seed.shape, dtype=torch.float32)
