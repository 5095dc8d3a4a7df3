"""Draws in Triton: programs share a row's tokens, and one program a row takes the best of theirs."""

import triton
import triton.language as tl

from subquad.ops.draw import noise
from subquad.ops.overlap.kernels import begin

MIX1, MIX2, GOLDEN = (tl.constexpr(number % 2**64) for number in (noise.MIX1, noise.MIX2, noise.GOLDEN))


@triton.jit
def _mix(x):
    x = (x ^ (x >> 30)) * MIX1
    x = (x ^ (x >> 27)) * MIX2
    return x ^ (x >> 31)


@triton.jit
def _bits(seed, step, v, STREAM: tl.constexpr):
    key = _mix(_mix(seed.to(tl.uint64) + GOLDEN) + step.to(tl.uint64) * GOLDEN)
    if STREAM:
        key = _mix(key + STREAM)
    return _mix(key + (v + 1).to(tl.uint64) * GOLDEN)


@triton.jit
def _gumbel(seed, step, v, STREAM: tl.constexpr):
    """`subquad.ops.draw.gumbel` of tokens `v`."""
    bits = (_bits(seed, step, v, STREAM) >> 11) | 1
    u = tl.minimum(bits.to(tl.int64).to(tl.float32) * 1.1102230246251565e-16, 0.99999994)
    # log(1 - u) with the digits that the difference has lost: the quotient makes up for them.
    w = 1.0 - u
    log = tl.where(w == 1.0, -u, tl.log(w) * (u / tl.where(w == 1.0, 1.0, 1.0 - w)))
    return -tl.log(-log)


@triton.jit
def best_kernel(
    logits_ptr, greedy_ptr, seed_ptr, step_ptr, score_ptr, token_ptr, V, stride_b, stride_t,
    T: tl.constexpr, SHARES: tl.constexpr, DRAWS: tl.constexpr, STREAM: tl.constexpr, BV: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Best score of a share of a row's tokens, and the token; infinity where there is a NaN or an infinity.

    Grid: rows of b times t, times SHARES, so many programs a row.
    """
    row, share = tl.program_id(0) // SHARES, tl.program_id(0) % SHARES
    b, t = row // T, row % T
    v = share * BV + tl.arange(0, BV)
    begin(OVERLAP)
    ptrs = logits_ptr + b.to(tl.int64) * stride_b + t * stride_t + v
    x = tl.load(ptrs, mask=v < V, other=-float("inf")).to(tl.float32)
    broken = tl.max(((x != x) | (x == float("inf"))).to(tl.int32), 0)
    if DRAWS:  # noqa: SIM102  (known to the compiler, what follows is not)
        if tl.load(greedy_ptr + b) == 0:
            x += _gumbel(tl.load(seed_ptr + b), tl.load(step_ptr + b) + t, v, STREAM)
    best, at = tl.max(x, 0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(score_ptr + tl.program_id(0), tl.where(broken > 0, float("inf"), best))
    tl.store(token_ptr + tl.program_id(0), share * BV + at)


@triton.jit
def token_kernel(
    score_ptr, token_ptr, out_ptr, SHARES: tl.constexpr, BS: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    """The best of all shares. Grid: rows."""
    row, s = tl.program_id(0), tl.arange(0, BS)
    begin(OVERLAP)
    score = tl.load(score_ptr + row * SHARES + s, mask=s < SHARES, other=-float("inf"))
    best, at = tl.max(score, 0, return_indices=True, return_indices_tie_break_left=True)
    token = tl.load(token_ptr + row * SHARES + at).to(tl.int64)
    tl.store(out_ptr + row, tl.where((best < float("inf")) & (best > -float("inf")), token, -1))


@triton.jit
def uniform_kernel(seed_ptr, step_ptr, out_ptr, STREAM: tl.constexpr, OVERLAP: tl.constexpr):
    """`subquad.ops.draw.uniform`. Grid: rows."""
    row, v = tl.program_id(0), tl.arange(0, 1)
    begin(OVERLAP)
    bits = _bits(tl.load(seed_ptr + row), tl.load(step_ptr + row), v, STREAM)
    tl.store(out_ptr + row + v, (bits >> 40).to(tl.int64).to(tl.float32) * 5.9604644775390625e-08)
