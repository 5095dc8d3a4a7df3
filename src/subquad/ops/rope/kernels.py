"""Rotation in Triton: a program turns all heads of one token."""

import triton
import triton.language as tl

from subquad.ops.overlap.kernels import begin


@triton.jit(do_not_specialize=["run"])
def turns_kernel(start_ptr, freq_ptr, cos_ptr, sin_ptr, run, F, BF: tl.constexpr, OVERLAP: tl.constexpr):
    """See `subquad.ops.rope.on_torch.turns`. Grid: tokens."""
    pid, f = tl.program_id(0), tl.arange(0, BF)
    token, start, step = pid.to(tl.int64), pid // run, pid % run
    freq = tl.load(freq_ptr + f, mask=f < F, other=0.0)
    begin(OVERLAP)
    angle = (tl.load(start_ptr + start) + step).to(tl.float32) * freq
    tl.store(cos_ptr + token * F + f, tl.cos(angle), mask=f < F)
    tl.store(sin_ptr + token * F + f, tl.sin(angle), mask=f < F)


@triton.jit
def turned(row_ptrs, c, inside, cos_ptrs, sin_ptrs, HALF: tl.constexpr):
    """Channels c of rows of a tile, turned by the angles of the rows' tables.

    Args:
        row_ptrs: where each row's channels begin, ``[M]``; `cos_ptrs` and `sin_ptrs` likewise, HALF numbers a row.
        c: channels ``[C]``; the first ``2 * HALF`` are turned.
        inside: ``[M, C]``, what is read at all; 0 elsewhere.
    """
    x = tl.load(row_ptrs[:, None] + c[None, :], mask=inside, other=0.0)
    pairs = inside & (c < 2 * HALF)[None, :]
    partner = tl.where(c < HALF, c + HALF, c - HALF)
    other = tl.load(row_ptrs[:, None] + partner[None, :], mask=pairs, other=0.0)
    f = (c % HALF)[None, :]
    cos = tl.load(cos_ptrs[:, None] + f, mask=pairs, other=1.0)
    sin = tl.load(sin_ptrs[:, None] + f, mask=pairs, other=0.0)
    sin = tl.where((c < HALF)[None, :], -sin, sin)
    return (x.to(tl.float32) * cos + other.to(tl.float32) * sin).to(x.dtype)


@triton.jit
def _turn(x_ptr, y_ptr, stride_h, cos, sin, HEADS: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr,
          BH: tl.constexpr, BF: tl.constexpr, BR: tl.constexpr):  # fmt: skip
    h, f = tl.arange(0, BH)[:, None], tl.arange(0, BF)[None, :]
    inside = (h < HEADS) & (f < HALF)
    a = tl.load(x_ptr + h * stride_h + f, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + h * stride_h + HALF + f, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + h * K + f, (a * cos - b * sin).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(y_ptr + h * K + HALF + f, (b * cos + a * sin).to(y_ptr.dtype.element_ty), mask=inside)
    if K > 2 * HALF:
        r = 2 * HALF + tl.arange(0, BR)[None, :]
        rest = (h < HEADS) & (r < K)
        tl.store(y_ptr + h * K + r, tl.load(x_ptr + h * stride_h + r, mask=rest), mask=rest)


@triton.jit
def rotate_both_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, time, table_stride_b,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr,
    BH: tl.constexpr, BG: tl.constexpr, BF: tl.constexpr, BR: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """See `subquad.ops.rope.rotate_both`. Grid: tokens. Tables are ``[b or 1, t, HALF]``."""
    token = tl.program_id(0).to(tl.int64)
    b, t, f = token // time, token % time, tl.arange(0, BF)
    begin(OVERLAP)
    at = b * table_stride_b + t * HALF + f
    cos = tl.load(cos_ptr + at, mask=f < HALF, other=0.0)[None, :]
    sin = tl.load(sin_ptr + at, mask=f < HALF, other=0.0)[None, :]
    q_ptr += b * q_stride_b + t * q_stride_t
    k_ptr += b * k_stride_b + t * k_stride_t
    _turn(q_ptr, q_out_ptr + token * H * K, q_stride_h, cos, sin, H, K, HALF, BH, BF, BR)
    _turn(k_ptr, k_out_ptr + token * G * K, k_stride_h, cos, sin, G, K, HALF, BG, BF, BR)
