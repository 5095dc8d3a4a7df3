"""The decode step by one Triton launch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from subquad.ops import launch
from subquad.ops.decode.equation import Block, Rule, Weights
from subquad.ops.decode.kernels import advance_kernel
from subquad.ops.decode.pool import DecodeState


class Tiling(NamedTuple):
    """Value channels of a program, its warps, and the most registers of a thread, None for no limit."""

    value: int
    warps: int
    registers: int | None = None


# Of products with the state: the keys, rounded to the pool's dtype already, fix what is worth keeping.
_PRECISION = {torch.float32: "tf32x3", torch.bfloat16: "bf16"}


def tiling(k: int, v: int, time: int, *, key_decay: bool) -> Tiling:
    """The table: 4,096 numbers of a state a program for one token, twice that for several, whose keys it makes once."""
    if time <= 1:
        return Tiling(min(_tile(v), max(16, 4096 // _tile(k))), 2)
    return Tiling(min(_tile(v), max(16, 8192 // _tile(k))), 4, None if key_decay else 128)


def refusal(*tensors: Tensor) -> str | None:
    """Why the kernel can't run: arguments are q, k, v and tensors of the pool, the state last."""
    return launch.refusal(*tensors, widths=(tensors[0].shape[-1], tensors[2].shape[-1]))


def advance_(
    block: Block, pool: DecodeState, rule: Rule, weights: Weights, seen_b: Tensor, n_b: Tensor, rows_b: Tensor | None
) -> Tensor:
    """`subquad.ops.decode.advance_`; shapes are checked there."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (block.q_bthk, block.k_bthk, block.v_bthv))
    g = block.g_bthk if block.g_bthk.shape[-1] == 1 or block.g_bthk.stride(-1) == 1 else block.g_bthk.contiguous()
    own = weights.conv_dw, weights.bias_d, weights.skip_h
    conv_dw, bias_d, skip_h = (None if x is None else x.contiguous() for x in own)
    rows_b = None if rows_b is None else rows_b.contiguous()
    return _advance(
        q, k, v, g, block.beta_bth, skip_h, conv_dw, bias_d,
        pool.recurrent_bhkv, pool.inputs_brd, pool.keys_bnhk, pool.values_bnhv, pool.decays_bnhk,
        seen_b.contiguous(), n_b.contiguous(), rows_b, rule.delta, rule.activation == "silu", rule.l2_eps, rule.scale,
    )  # fmt: skip


@torch.library.custom_op("subquad::decode_advance", mutates_args=("state", "inputs", "keys", "values", "decays"))
@launch.guarded
def _advance(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, skip: Tensor | None, conv: Tensor | None,
    bias: Tensor | None, state: Tensor, inputs: Tensor, keys: Tensor, values: Tensor, decays: Tensor, seen: Tensor,
    n: Tensor, rows: Tensor | None, delta: bool, silu: bool, l2_eps: float | None, scale: float,
) -> Tensor:  # fmt: skip
    (b, time, hq, k_dim), (hv, v_dim), h = q.shape, v.shape[2:], g.shape[2]
    y = launch.scratch(b, time, h, v_dim, like=v, dtype=v.dtype)
    if b == 0:
        return y
    vector, width = g.shape[3] > 1, 1 if conv is None else conv.shape[1]
    slots, tile = keys.shape[1], tiling(k_dim, v_dim, time, key_decay=vector)
    value = min(tile.value, _tile(v_dim))
    grid = (b * h * triton.cdiv(v_dim, value),)
    # An absent tensor's place is taken by one that no branch reads.
    kernel: Any = advance_kernel[grid]
    kernel(
        q, k, v, g, g if beta is None else beta, g if skip is None else skip, g if conv is None else conv,
        g if bias is None else bias, y, state, inputs, keys, values, decays, seen, n, n if rows is None else rows,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *g.stride()[:3],
        *((0, 0, 0) if beta is None else beta.stride()), time, l2_eps or 0.0, scale,
        H=h, HQ=hq, HK=k.shape[2], HV=hv, K=k_dim, V=v_dim, R=max(inputs.shape[1], 1), N=slots, W=width,
        ROWS=rows is not None, BIAS=bias is not None, SILU=silu, L2=l2_eps is not None, BETA=beta is not None,
        SKIP=skip is not None, DELTA=delta, VECTOR=vector,
        PRECISION=_PRECISION.get(keys.dtype, "tf32"),
        TP=1 if time <= 1 else max(8, triton.next_power_of_2(time)),
        BK=_tile(k_dim), BV=value, num_warps=tile.warps, maxnreg=tile.registers,
    )  # fmt: skip
    return y


@_advance.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, skip: Tensor | None, conv: Tensor | None,
    bias: Tensor | None, state: Tensor, inputs: Tensor, keys: Tensor, values: Tensor, decays: Tensor, seen: Tensor,
    n: Tensor, rows: Tensor | None, delta: bool, silu: bool, l2_eps: float | None, scale: float,
) -> Tensor:  # fmt: skip
    return v.new_empty(v.shape[0], v.shape[1], g.shape[2], v.shape[3])


def _tile(width: int) -> int:
    """The smallest tile that holds `width` channels."""
    return max(16, triton.next_power_of_2(width))
