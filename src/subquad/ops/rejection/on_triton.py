"""Speculative sampling by three Triton launches, which write neither p nor what is left of it."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from subquad.ops import launch, overlap
from subquad.ops.draw.on_triton import share
from subquad.ops.rejection.kernels import accept_kernel, residual_kernel, share_kernel


def refusal(*tensors: Tensor) -> str | None:
    """Why the kernels can't run."""
    return launch.refusal(*tensors, widths=())


def rejection_sample(
    logits_btv: Tensor, guesses_bk: Tensor, length_b: Tensor, q_bkm: Tensor, place_v: Tensor | None, greedy_b: Tensor,
    seed_b: Tensor, step_b: Tensor, temperature_b: Tensor | None, coin: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`subquad.ops.rejection.rejection_sample`."""
    wide = (x if x.stride(-1) == 1 else x.contiguous() for x in (logits_btv, guesses_bk, q_bkm))
    others = launch.contiguous(length_b, greedy_b, seed_b, step_b, place_v, temperature_b)
    return _rejection_sample(*wide, *others, coin)


@torch.library.custom_op("subquad::rejection_sample", mutates_args=())
@launch.guarded
def _rejection_sample(
    logits: Tensor, guesses: Tensor, q: Tensor, length: Tensor, greedy: Tensor, seed: Tensor, step: Tensor,
    place: Tensor | None, temperature: Tensor | None, coin: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (b, t, v), k = logits.shape, guesses.shape[1]
    tokens, count = guesses.new_empty(b, t), torch.empty_like(length)
    if b == 0:
        return tokens, count
    options, tempered = overlap.options(logits.device), temperature is not None
    size, part = share(b * t, v), share(b, v)
    shares, parts, bt = triton.cdiv(v, size), triton.cdiv(v, part), triton.next_power_of_2(max(t, k))
    top, total = launch.scratch(2, b * t, shares, like=logits, dtype=torch.float32)
    at = launch.scratch(b * t, shares, like=logits, dtype=torch.int32)
    # Of what is left, and of p.
    score = launch.scratch(2, b, parts, like=logits, dtype=torch.float32)
    token = launch.scratch(2, b, parts, like=logits, dtype=torch.int32)
    n = torch.empty_like(length)
    # What is absent has its place taken by something that no branch reads.
    scale = top if temperature is None else temperature
    kernel: Any = share_kernel[(b * t * shares,)]
    kernel(
        logits, scale, top, total, at, v, *logits.stride()[:2],
        T=t, SHARES=shares, TEMPERED=tempered, BV=size, num_warps=4, **options,
    )  # fmt: skip
    kernel = residual_kernel[(b * parts,)]
    kernel(
        logits, scale, guesses, length, q, at if place is None else place, greedy, seed, step, top, total, at, n, score,
        token, v, q.shape[2], b, *logits.stride()[:2], guesses.stride(0), *q.stride()[:2],
        T=t, K=k, SHARES=shares, PARTS=parts, PLACED=place is not None, TEMPERED=tempered, COIN=coin,
        BT=bt, BS=triton.next_power_of_2(shares), BV=part, num_warps=4, **options,
    )  # fmt: skip
    kernel = accept_kernel[(b,)]
    kernel(
        guesses, n, score, token, tokens, count, b, guesses.stride(0),
        T=t, K=k, PARTS=parts, BT=bt, BS=triton.next_power_of_2(parts), num_warps=1, **options,
    )  # fmt: skip
    return tokens, count


@_rejection_sample.register_fake
def _(
    logits: Tensor, guesses: Tensor, q: Tensor, length: Tensor, greedy: Tensor, seed: Tensor, step: Tensor,
    place: Tensor | None, temperature: Tensor | None, coin: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return guesses.new_empty(logits.shape[:2]), torch.empty_like(length)
