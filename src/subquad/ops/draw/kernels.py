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
def bits_of(seed, step, v, STREAM: tl.constexpr):
    """The bits that all noise is made of, of tokens `v`, of a step or one for each of them."""
    key = _mix(_mix(seed.to(tl.uint64) + GOLDEN) + step.to(tl.uint64) * GOLDEN)
    if STREAM:
        key = _mix(key + STREAM)
    return _mix(key + (v + 1).to(tl.uint64) * GOLDEN)


@triton.jit
def gumbel_of(seed, step, v, STREAM: tl.constexpr):
    """`subquad.ops.draw.noise.gumbel_of` tokens `v`."""
    bits = (bits_of(seed, step, v, STREAM) >> 11) | 1
    u = tl.minimum(bits.to(tl.int64).to(tl.float32) * 1.1102230246251565e-16, 0.99999994)
    # log(1 - u) with the digits that the difference has lost: the quotient makes up for them.
    w = 1.0 - u
    log = tl.where(w == 1.0, -u, tl.log(w) * (u / tl.where(w == 1.0, 1.0, 1.0 - w)))
    return -tl.log(-log)


@triton.jit
def uniform_of(seed, step, v, STREAM: tl.constexpr):
    """`subquad.ops.draw.uniform` where `v` is 0."""
    return (bits_of(seed, step, v, STREAM) >> 40).to(tl.int64).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def divided(ptrs, mask, temperature_ptr, b, TEMPERED: tl.constexpr):
    """`subquad.ops.draw.probabilities.divided` of row `b`, minus infinity where nothing is."""
    x = tl.load(ptrs, mask=mask, other=-float("inf")).to(tl.float32)
    if TEMPERED:
        # Rounded as PyTorch does, so that both take the same tokens.
        x = tl.div_rn(x, tl.load(temperature_ptr + b) + tl.zeros_like(x))
    return x


@triton.jit
def highest(x):
    """The largest number and whether there is a NaN or an infinity, then it is infinity."""
    broken = tl.max(((x != x) | (x == float("inf"))).to(tl.int32), 0)
    return tl.where(broken > 0, float("inf"), tl.max(x, 0))


@triton.jit
def mass(x, top):
    """Sum of ``exp(x - top)``, 0 where all are minus infinity."""
    return tl.sum(tl.exp(x - tl.where(top == -float("inf"), 0.0, top)), 0)


@triton.jit
def best_of(score_ptr, at_ptr, base, SHARES: tl.constexpr, BS: tl.constexpr):
    """The best score of a row's shares, which begin at `base`, and where it is; of equal ones the first."""
    s = tl.arange(0, BS)
    score = tl.load(score_ptr + base + s, mask=s < SHARES, other=-float("inf"))
    best, share = tl.max(score, 0, return_indices=True, return_indices_tie_break_left=True)
    return best, tl.load(at_ptr + base + share)


@triton.jit(do_not_specialize=["ahead"])
def best_kernel(
    logits_ptr, ids_ptr, temperature_ptr, greedy_ptr, seed_ptr, step_ptr, score_ptr, at_ptr, top_ptr, sum_ptr, V, ahead,
    stride_b, stride_t, T: tl.constexpr, SHARES: tl.constexpr, DRAWS: tl.constexpr, STREAM: tl.constexpr,
    NAMED: tl.constexpr, TEMPERED: tl.constexpr, SUMS: tl.constexpr, BV: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Best score of a share of a row's tokens, and its place; infinity where there is a NaN or an infinity.

    Where SUMS, the largest logit of the share too, and the mass of all of them relative to it.

    Grid: rows of b times t, times SHARES, so many programs a row.
    """
    row, share = tl.program_id(0) // SHARES, tl.program_id(0) % SHARES
    b, t = row // T, row % T
    v = share * BV + tl.arange(0, BV)
    token = v
    if DRAWS and NAMED:
        token = tl.load(ids_ptr + v, mask=v < V, other=0).to(tl.int32)
    begin(OVERLAP)
    ptrs = logits_ptr + b.to(tl.int64) * stride_b + t * stride_t + v
    x = divided(ptrs, v < V, temperature_ptr, b, TEMPERED)
    top = highest(x)
    if SUMS:
        tl.store(top_ptr + tl.program_id(0), top)
        tl.store(sum_ptr + tl.program_id(0), mass(x, top))
    if DRAWS:  # noqa: SIM102  (known to the compiler, what follows is not)
        if tl.load(greedy_ptr + b) == 0:
            x += gumbel_of(tl.load(seed_ptr + b), tl.load(step_ptr + b) + ahead + t, token, STREAM)
    best, at = tl.max(x, 0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(score_ptr + tl.program_id(0), tl.where(top == float("inf"), top, best))
    tl.store(at_ptr + tl.program_id(0), share * BV + at)


@triton.jit
def token_kernel(
    score_ptr, at_ptr, guesses_ptr, length_ptr, stride_guesses, out_ptr, n_ptr,
    T: tl.constexpr, K: tl.constexpr, SHARES: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The best of all shares of each column, and how many count; see `subquad.ops.draw.agree`. Grid: rows of b."""
    b, t, s = tl.program_id(0).to(tl.int64), tl.arange(0, BT), tl.arange(0, BS)
    begin(OVERLAP)
    base = (b * T + t) * SHARES
    there = (t < T)[:, None] & (s < SHARES)[None, :]
    score = tl.load(score_ptr + base[:, None] + s[None, :], mask=there, other=-float("inf"))
    best, share = tl.max(score, 1, return_indices=True, return_indices_tie_break_left=True)
    token = tl.load(at_ptr + base + share, mask=t < T, other=0).to(tl.int64)
    token = tl.where((best < float("inf")) & (best > -float("inf")), token, -1)
    tl.store(out_ptr + b * T + t, token, mask=t < T)
    n = tl.full((), 1, tl.int64)
    if K > 0:
        guess = tl.load(guesses_ptr + b * stride_guesses + t, mask=t < K, other=0)
        stands = (token == guess) & (t < tl.load(length_ptr + b)) & (t < K)
        n += tl.min(tl.where(stands, K, t), 0)
    tl.store(n_ptr + b, n)


@triton.jit(do_not_specialize=["column"])
def guess_kernel(
    logits_ptr, ids_ptr, temperature_ptr, greedy_ptr, score_ptr, at_ptr, top_ptr, sum_ptr, tokens_ptr, q_ptr, M, column,
    stride_logits, stride_tokens, stride_q, stride_column, PARTS: tl.constexpr, SHARES: tl.constexpr, BS: tl.constexpr,
    PROBABILITIES: tl.constexpr, NAMED: tl.constexpr, TEMPERED: tl.constexpr, BM: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The best of all shares by its name, and where PROBABILITIES each program's part of the row's probabilities.

    Grid: rows times PARTS, 1 where nobody asks for probabilities.
    """
    b, part = (tl.program_id(0) // PARTS).to(tl.int64), tl.program_id(0) % PARTS
    begin(OVERLAP)
    best, place = best_of(score_ptr, at_ptr, b * SHARES, SHARES, BS)
    sound = (best < float("inf")) & (best > -float("inf"))
    place = tl.where(sound, place, 0)
    token = place.to(tl.int64)
    if NAMED:
        token = tl.load(ids_ptr + place)
    tl.store(tokens_ptr + b * stride_tokens + column, token, mask=part == 0)
    if PROBABILITIES:
        s, m = tl.arange(0, BS), part * BM + tl.arange(0, BM)
        tops = tl.load(top_ptr + b * SHARES + s, mask=s < SHARES, other=-float("inf"))
        top = tl.where(sound, tl.max(tops, 0), 0.0)
        sums = tl.load(sum_ptr + b * SHARES + s, mask=s < SHARES, other=0.0)
        total = tl.sum(tl.where(s < SHARES, sums * tl.exp(tops - top), 0.0), 0)
        x = divided(logits_ptr + b * stride_logits + m, m < M, temperature_ptr, b, TEMPERED)
        certain = tl.where(m == place, 1.0, 0.0)
        q = tl.where(tl.load(greedy_ptr + b) != 0, certain, tl.exp(x - top) / total)
        tl.store(q_ptr + b * stride_q + column * stride_column + m, tl.where(sound, q, float("nan")), mask=m < M)


@triton.jit
def uniform_kernel(seed_ptr, step_ptr, out_ptr, STREAM: tl.constexpr, OVERLAP: tl.constexpr):
    """`subquad.ops.draw.uniform`. Grid: rows."""
    row, v = tl.program_id(0), tl.arange(0, 1)
    begin(OVERLAP)
    tl.store(out_ptr + row + v, uniform_of(tl.load(seed_ptr + row), tl.load(step_ptr + row), v, STREAM))
