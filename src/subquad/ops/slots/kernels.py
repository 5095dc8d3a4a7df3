"""The bookkeeping in Triton: a program for each row."""

import triton
import triton.language as tl

from subquad.ops.overlap.kernels import begin


@triton.jit
def lead_kernel(
    last_ptr, alive_ptr, left_ptr, tokens_ptr, length_ptr, block_ptr, count_ptr, kept_ptr, stride,
    K: tl.constexpr, BT: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """See `subquad.ops.slots.lead`. Grid: rows."""
    b, c = tl.program_id(0), tl.arange(0, BT)
    begin(OVERLAP)
    length = tl.minimum(tl.load(length_ptr + b), tl.maximum(tl.load(left_ptr + b) - 1, 0)) * tl.load(alive_ptr + b)
    guess = tl.load(tokens_ptr + b * stride + c - 1, mask=(c > 0) & (c <= K), other=0)
    tl.store(block_ptr + b * (K + 1) + c, tl.where(c == 0, tl.load(last_ptr + b), guess), mask=c <= K)
    tl.store(count_ptr + b, 1 + length)
    tl.store(kept_ptr + b, length)


@triton.jit
def emit_kernel(
    last_ptr, alive_ptr, left_ptr, ends_ptr, out_ptr, fill_ptr, kept_ptr, judged_ptr, guessed_ptr,
    step_ptr, tokens_ptr, n_ptr, length_ptr, given_ptr, told_ptr, E, stride_ends, stride_out, stride_tokens,
    T: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """See `subquad.ops.slots.emit_`. Grid: rows."""
    b, c, e = tl.program_id(0), tl.arange(0, BT), tl.arange(0, BE)
    begin(OVERLAP)
    n, length, left = tl.load(n_ptr + b), tl.load(length_ptr + b), tl.load(left_ptr + b)
    alive, fill = tl.load(alive_ptr + b), tl.load(fill_ptr + b)
    tokens = tl.load(tokens_ptr + b * stride_tokens + c, mask=c < T, other=0)
    ends = tl.load(ends_ptr + b * stride_ends + e, mask=e < E, other=-2)
    ended = tl.max((tokens[:, None] == ends[None, :]).to(tl.int32), 1) > 0
    ended = (ended | (tokens < 0)) & (c < n) & (c < T)
    first = tl.min(tl.where(ended, c + 1, T), 0)
    given = tl.minimum(tl.minimum(n, first), left) * alive
    tl.store(out_ptr + b * stride_out + fill + c, tokens, mask=c < given)
    tokens = tl.maximum(tokens, 0)
    tl.store(told_ptr + b * T + c, tokens, mask=c < T)
    last = tl.sum(tl.where(c == given - 1, tokens, 0), 0)
    tl.store(last_ptr + b, last, mask=given > 0)
    stops = (tl.max((ended & (c < given)).to(tl.int32), 0) > 0) | (left == given)
    tl.store(fill_ptr + b, fill + given)
    tl.store(step_ptr + b, tl.load(step_ptr + b) + given)
    tl.store(left_ptr + b, left - given)
    tl.store(alive_ptr + b, tl.where(stops, 0, alive))
    tl.store(kept_ptr + b, tl.load(kept_ptr + b) + tl.minimum(n - 1, given))
    tl.store(judged_ptr + b, tl.load(judged_ptr + b) + tl.minimum(tl.minimum(length, n), given))
    tl.store(guessed_ptr + b, tl.load(guessed_ptr + b) + length)
    tl.store(given_ptr + b, given)


@triton.jit
def keep_last_kernel(
    last_ptr, x_ptr, n_ptr, D, stride_last, stride_b, stride_t, BD: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    """See `subquad.ops.slots.keep_last_`. Grid: rows times the blocks of a vector."""
    b, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BD + tl.arange(0, BD)
    begin(OVERLAP)
    n = tl.load(n_ptr + b)
    there = d < tl.where(n > 0, D, 0)
    x = tl.load(x_ptr + b * stride_b + (n - 1) * stride_t + d, mask=there)
    tl.store(last_ptr + b * stride_last + d, x, mask=there)
