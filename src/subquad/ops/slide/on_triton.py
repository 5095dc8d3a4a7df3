"""`subquad.ops.slide` in Triton."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from subquad.ops import launch
from subquad.ops.slide.kernels import slide_kernel

# Tokens of a tile; and the least of its other side, since narrow products lose operands (see `subquad.ops.gla`).
TOKENS, LEAST = 64, 64


@torch.library.custom_op(
    "subquad::slide_write",
    mutates_args=("k_pool", "v_pool", "sink_k_pool", "sink_v_pool", "seen_pool", "linear_pool"),
    schema="(Tensor(a!) k_pool, Tensor(b!) v_pool, Tensor(c!) sink_k_pool, Tensor(d!) sink_v_pool, "
    "Tensor(e!) seen_pool, Tensor(f!)? linear_pool, Tensor rows, Tensor n, Tensor k, Tensor v, Tensor old_k, "
    "Tensor old_v, Tensor old_sink_k, Tensor old_sink_v, Tensor seen, Tensor[] far, bool ring) -> ()",
)
@launch.guarded
def write_(
    k_pool: Tensor, v_pool: Tensor, sink_k_pool: Tensor, sink_v_pool: Tensor, seen_pool: Tensor,
    linear_pool: Tensor | None, rows: Tensor, n: Tensor, k: Tensor, v: Tensor, old_k: Tensor, old_v: Tensor,
    old_sink_k: Tensor, old_sink_v: Tensor, seen: Tensor, far: list[Tensor], ring: bool,
) -> None:  # fmt: skip
    """`subquad.ops.slide.write_`, of its tensors."""
    (b, g, t, width), window, sinks = k.shape, old_k.shape[2], old_sink_k.shape[2]
    if b == 0 or t == 0:
        return
    for x in (k_pool, v_pool, sink_k_pool, sink_v_pool, *([] if linear_pool is None else [linear_pool])):
        if not x[0].is_contiguous():
            raise ValueError(f"pool: expected rows without gaps, got strides {x.stride()}")
    # An absent tensor's place is taken by one that no branch reads.
    old_f, f, old_linear = far or (k, k, k)
    features = f.shape[3] if far else 0
    kernel: Any = slide_kernel[(b, g)]
    kernel(
        k, v, f, old_k, old_v, old_f, old_sink_k, old_sink_v, old_linear, seen, n, rows,
        k_pool, v_pool, sink_k_pool, sink_v_pool, k_pool if linear_pool is None else linear_pool, seen_pool,
        t, old_f.shape[2],
        *k.stride()[:3], *v.stride()[:3], *f.stride()[:3], *old_f.stride()[:3],
        k_pool.stride(0), sink_k_pool.stride(0), 0 if linear_pool is None else linear_pool.stride(0),
        seen_pool.stride(0),
        G=g, W=window, S=sinks, R=k_pool.shape[2], K=width, F=features, RING=ring, FAR=bool(far),
        PRECISION=launch.precision(k.dtype), BN=TOKENS, BK=max(LEAST, triton.next_power_of_2(width)),
        BF=max(LEAST, triton.next_power_of_2(max(features, 1))), BS=triton.next_power_of_2(max(sinks, 1)),
        num_warps=4,
    )  # fmt: skip


@write_.register_fake
def _(*_: Any) -> None:
    return
