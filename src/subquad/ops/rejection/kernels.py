"""Speculative sampling in Triton: programs share the tokens of a column, then those of what guesses leave."""

import triton
import triton.language as tl

from subquad.ops.draw.kernels import best_of, divided, gumbel_of, highest, mass, uniform_of
from subquad.ops.overlap.kernels import begin


@triton.jit
def share_kernel(
    logits_ptr, temperature_ptr, top_ptr, sum_ptr, at_ptr, V, stride_b, stride_t,
    T: tl.constexpr, SHARES: tl.constexpr, TEMPERED: tl.constexpr, BV: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Largest logit of a share of a column's tokens, its token, and the mass relative to it; infinity as in `highest`.

    Grid: columns of all rows, times SHARES.
    """
    column, share = tl.program_id(0) // SHARES, tl.program_id(0) % SHARES
    b, t = column // T, column % T
    v = share * BV + tl.arange(0, BV)
    begin(OVERLAP)
    x = divided(logits_ptr + b.to(tl.int64) * stride_b + t * stride_t + v, v < V, temperature_ptr, b, TEMPERED)
    top = highest(x)
    _, at = tl.max(x, 0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(top_ptr + tl.program_id(0), top)
    tl.store(sum_ptr + tl.program_id(0), mass(x, top))
    tl.store(at_ptr + tl.program_id(0), share * BV + at)


@triton.jit
def residual_kernel(
    logits_ptr, temperature_ptr, guesses_ptr, length_ptr, q_ptr, place_ptr, greedy_ptr, seed_ptr, step_ptr,
    top_ptr, sum_ptr, at_ptr, n_ptr, score_ptr, token_ptr, V, M, rows,
    stride_b, stride_t, stride_guesses, stride_q, stride_column,
    T: tl.constexpr, K: tl.constexpr, SHARES: tl.constexpr, PARTS: tl.constexpr, PLACED: tl.constexpr,
    TEMPERED: tl.constexpr, COIN: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, BV: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """How many guesses of a row stand, and of a part of its tokens the best of what is left, and the best of p.

    All programs of a row judge its guesses: that is cheaper than a launch. What is left scores infinity where q holds a
    NaN, and p where the logits are broken.

    Grid: rows times PARTS.
    """
    b, part = (tl.program_id(0) // PARTS).to(tl.int64), tl.program_id(0) % PARTS
    t, s = tl.arange(0, BT), tl.arange(0, BS)
    v = part * BV + tl.arange(0, BV)
    place_v = v
    if PLACED:
        place_v = tl.load(place_ptr + v, mask=v < V, other=0).to(tl.int32)
    begin(OVERLAP)
    shares = (b * T + t[:, None]) * SHARES + s[None, :]
    there = (t[:, None] < T) & (s[None, :] < SHARES)
    tops = tl.load(top_ptr + shares, mask=there, other=-float("inf"))
    sums = tl.load(sum_ptr + shares, mask=there, other=0.0)
    first = tl.load(at_ptr + shares, mask=there, other=0)
    top = tl.max(tops, 1)
    sound = (top < float("inf")) & (top > -float("inf"))
    top = tl.where(sound, top, 0.0)
    total = tl.sum(sums * tl.exp(tops - top[:, None]), 1)
    likeliest = tl.min(tl.where(tops == top[:, None], first, V), 1)

    greedy, length = tl.load(greedy_ptr + b) != 0, tl.load(length_ptr + b)
    seed, step = tl.load(seed_ptr + b), tl.load(step_ptr + b)
    guess = tl.load(guesses_ptr + b * stride_guesses + t, mask=t < K, other=0)
    judged = (t < K) & (t < length)
    row_ptr = logits_ptr + b * stride_b
    x = divided(row_ptr + t * stride_t + guess, judged, temperature_ptr, b, TEMPERED)
    p = tl.where(greedy, tl.where(guess == likeliest, 1.0, 0.0), tl.exp(x - top) / total)
    place = guess
    if PLACED:
        place = tl.load(place_ptr + guess)
    q = tl.load(q_ptr + b * stride_q + t * stride_column + place, mask=judged & (place < M), other=0.0).to(tl.float32)
    stands = (uniform_of(seed, step + t, t * 0, COIN) * q < p) & sound & judged
    n = tl.min(tl.where(stands, K, t), 0)

    here = t == tl.minimum(n, T - 1)
    top_n, total_n = tl.sum(tl.where(here, top, 0.0), 0), tl.sum(tl.where(here, total, 0.0), 0)
    likeliest_n, sound_n = tl.sum(tl.where(here, likeliest, 0), 0), tl.max((here & sound).to(tl.int32), 0) > 0
    x = divided(row_ptr + tl.minimum(n, T - 1) * stride_t + v, v < V, temperature_ptr, b, TEMPERED)
    p = tl.where(greedy, tl.where(v == likeliest_n, 1.0, 0.0), tl.exp(x - top_n) / total_n)
    p = tl.where(sound_n, p, 0.0)
    taken = (v < V) & (place_v < tl.where(n < length, M, 0))
    column_ptr = q_ptr + b * stride_q + tl.minimum(n, K - 1) * stride_column
    rest = p - tl.load(column_ptr + place_v, mask=taken, other=0.0).to(tl.float32)
    lost = tl.max((rest != rest).to(tl.int32), 0) > 0
    rest, p = tl.log(tl.where(rest > 0, rest, 0.0)), tl.log(p)
    if tl.load(greedy_ptr + b) == 0:
        noise = gumbel_of(seed, step + n, v, 0)
        rest += noise
        p += noise
    best, at = tl.max(rest, 0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(score_ptr + tl.program_id(0), tl.where(lost, float("inf"), best))
    tl.store(token_ptr + tl.program_id(0), part * BV + at)
    best, at = tl.max(p, 0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(score_ptr + rows * PARTS + tl.program_id(0), tl.where(sound_n, best, float("inf")))
    tl.store(token_ptr + rows * PARTS + tl.program_id(0), part * BV + at)
    tl.store(n_ptr + b, n.to(tl.int64), mask=part == 0)


@triton.jit
def accept_kernel(
    guesses_ptr, n_ptr, score_ptr, token_ptr, out_ptr, count_ptr, rows, stride_guesses,
    T: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The guesses that stand and the token behind them. Grid: rows."""
    b, t = tl.program_id(0).to(tl.int64), tl.arange(0, BT)
    begin(OVERLAP)
    score, rest_token = best_of(score_ptr, token_ptr, b * PARTS, PARTS, BS)
    left = (score < float("inf")) & (score > -float("inf"))
    score, token = best_of(score_ptr, token_ptr, (rows + b) * PARTS, PARTS, BS)
    sound = (score < float("inf")) & (score > -float("inf"))
    # Where rounding leaves nothing, p and q are the same, and a draw from p is as good.
    token = tl.where(sound, tl.where(left, rest_token, token), -1).to(tl.int64)
    n = tl.load(n_ptr + b)
    guesses = tl.load(guesses_ptr + b * stride_guesses + t, mask=t < K, other=0)
    tl.store(out_ptr + b * T + t, tl.where(t == n, token, guesses), mask=t < T)
    tl.store(count_ptr + b, 1 + n)
