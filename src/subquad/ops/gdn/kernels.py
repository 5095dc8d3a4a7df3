"""The gated delta rule in Triton, forward: chunks of C tokens, their systems solved at once, states swept in segments.

Of a chunk with the state ``S_0`` before it, ``U`` are the values that its tokens write under their keys, at last:

    A = (I + strict_lower(beta_i pair_ij k_i . k_j))^-1        R = beta (v - start (k S_0))        U = A R
    y = start (q S_0) + (pair * (q k^T)) U                     S_C = across S_0 + k^T (end U)

A and ``P = pair * (q k^T)`` need no state: `prepare` makes them for all chunks at once. `sweep` runs along the chunks.
Where few heads leave most of the chip idle the sequence is cut into segments: `maps` makes each segment's affine map of
the state, `combine` chains the maps, and `sweep` runs in all segments at once. States are kept transposed, ``[v, k]``,
so that each of the sweep's products has what it computed last on its left, in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from subquad.ops import backends

# The interpreter multiplies the bits of bfloat16 as integers; it gets the same numbers in float32.
INTERPRETED = tl.constexpr(backends.interpreted())

# exp of this is 0 in float32; more decay means the same, and could only spoil sums.
FORGOTTEN = tl.constexpr(-100.0)

# Rows of `factors`, float32 [b, h, n, 5, C]: decays of a chunk, the share replaced, sums of log decays; where all is
# float32 (WIDE) also what that cuts off the sums, since their differences cancel.
START = tl.constexpr(0)
END = tl.constexpr(1)
BETA = tl.constexpr(2)
SUM = tl.constexpr(3)
REST = tl.constexpr(4)


@triton.jit
def product(x, y, PRECISION: tl.constexpr, acc=None):
    """``acc + x y`` in float32."""
    if INTERPRETED:
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, acc=acc, input_precision=PRECISION)


@triton.jit
def tokens(ptr, stride, left, first, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Load ``[ROWS, COLUMNS]``: tokens from `ptr`, of which `left` exist, channels from `first` of WIDTH."""
    row = tl.arange(0, ROWS)
    column = first + tl.arange(0, COLUMNS)
    at = ptr + row[:, None] * stride + column[None, :]
    if WIDTH % COLUMNS == 0:
        return tl.load(at, mask=(row < left)[:, None], other=0.0)
    return tl.load(at, mask=(row < left)[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit
def square(ptr, C: tl.constexpr):
    """Load a contiguous ``[C, C]``."""
    i = tl.arange(0, C)
    return tl.load(ptr + i[:, None] * C + i[None, :])


@triton.jit
def factor(ptr, WHICH: tl.constexpr, C: tl.constexpr):
    """Load one row of a chunk's factors."""
    return tl.load(ptr + WHICH * C + tl.arange(0, C))


@triton.jit
def last(x, C: tl.constexpr):
    """A row's last number; of START, the decay across the whole chunk. A load of its own would be waited for."""
    return tl.sum(tl.where(tl.arange(0, C) == C - 1, x, 0.0), axis=0)


@triton.jit
def quarters(x, HALF: tl.constexpr):
    """Top left, bottom left and bottom right of a square."""
    x = tl.permute(tl.reshape(x, (2, HALF, 2, HALF)), (1, 3, 2, 0))
    top, bottom = tl.split(x)
    top_left, _ = tl.split(top)
    bottom_left, bottom_right = tl.split(bottom)
    return top_left, bottom_left, bottom_right


@triton.jit
def merged(a, n, d, HALF: tl.constexpr, PRECISION: tl.constexpr):
    """The inverse of a unit lower triangular matrix of its diagonal blocks' inverses a, d and its third block n."""
    c = -product(product(d, n, PRECISION), a, PRECISION)
    x = tl.join(tl.join(a, tl.zeros_like(a)), tl.join(c, d))
    return tl.reshape(tl.permute(x, (3, 0, 2, 1)), (2 * HALF, 2 * HALF))


@triton.jit
def inverse(n, PRECISION: tl.constexpr):
    """``(I + n)^-1`` of a strictly lower triangular ``[64, 64]``: blocks of 16 by elimination, then merged by products.

    Powers of n would need fewer steps, but grow where keys repeat, and cancel.
    """
    block = tl.arange(0, 4)
    same = block[:, None, None, None] == block[None, None, :, None]
    diagonal = tl.sum(tl.where(same, tl.reshape(n, (4, 16, 4, 16)), 0.0), axis=2)
    row = tl.arange(0, 16)[None, :, None]
    column = tl.arange(0, 16)[None, None, :]
    solved = tl.where((row == column) & (block >= 0)[:, None, None], 1.0, 0.0)
    for j in range(15):
        below = tl.sum(tl.where(column == j, diagonal, 0.0), axis=2)
        pivot = tl.sum(tl.where(row == j, solved, 0.0), axis=1)
        solved -= below[:, :, None] * pivot[:, None, :]
    even, odd = tl.split(tl.permute(tl.reshape(solved, (2, 2, 16, 16)), (2, 3, 0, 1)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    left, corner, right = quarters(n, 32)
    _, upper, _ = quarters(left, 16)
    _, lower, _ = quarters(right, 16)
    a = merged(first, upper, second, 16, PRECISION)
    d = merged(third, lower, fourth, 16, PRECISION)
    return merged(a, corner, d, 32, PRECISION)


@triton.jit
def pairs(sums, rest, ids, C: tl.constexpr, WIDE: tl.constexpr):
    """Decay from token j to token i of a chunk, 0 where j > i or their documents differ."""
    i = tl.arange(0, C)
    seen = (i[:, None] >= i[None, :]) & (ids[:, None] == ids[None, :])
    between = sums[:, None] - sums[None, :]
    if WIDE:
        between += rest[:, None] - rest[None, :]
    return tl.exp(tl.where(seen, between, float("-inf")))


@triton.jit
def documents_of(ptr, b, chunk, T, C: tl.constexpr, DOCUMENTS: tl.constexpr):
    """The documents of a chunk's tokens; behind the last token, its document goes on."""
    t = chunk * C + tl.arange(0, C)
    if DOCUMENTS:
        return tl.load(ptr + b * T + tl.minimum(t, T - 1))
    return tl.zeros((C,), tl.int32)


@triton.jit(do_not_specialize=["T", "chunks", "H", "HQ", "HK", "g_b", "g_t", "g_h", "beta_b", "beta_t", "beta_h"])
def prepare(
    q_ptr, k_ptr, g_ptr, beta_ptr, documents_ptr, a_ptr, p_ptr, factors_ptr,
    T, chunks, H, HQ, HK, q_b, q_t, q_h, k_b, k_t, k_h, g_b, g_t, g_h, beta_b, beta_t, beta_h,
    K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, READ: tl.constexpr, DOCUMENTS: tl.constexpr,
    PRECISION: tl.constexpr, SOLVE: tl.constexpr,
):  # fmt: skip
    """A, P (where outputs are read) and factors of a chunk of one head."""
    chunk = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    at = bh * chunks + chunk
    t0 = chunk.to(tl.int64) * C
    left = T - chunk * C
    i = tl.arange(0, C)
    g = tl.load(g_ptr + b * g_b + h * g_h + (t0 + i) * g_t, mask=i < left, other=0.0).to(tl.float32)
    beta = tl.load(beta_ptr + b * beta_b + h * beta_h + (t0 + i) * beta_t, mask=i < left, other=0.0).to(tl.float32)
    k_ptr += b * k_b + (h // (H // HK)) * k_h + t0 * k_t
    q_ptr += b * q_b + (h // (H // HQ)) * q_h + t0 * q_t
    kk = tl.zeros((C, C), tl.float32)
    qk = tl.zeros((C, C), tl.float32)
    for first in range(0, K, BK):
        k = tokens(k_ptr, k_t, left, first, K, C, BK)
        if READ:
            q = tokens(q_ptr, q_t, left, first, K, C, BK)
            qk = product(q, tl.trans(k), PRECISION, acc=qk)
        kk = product(k, tl.trans(k), PRECISION, acc=kk)
    # A comparison is false for NaN, which stays.
    WIDE: tl.constexpr = a_ptr.dtype.element_ty == tl.float32
    exact = tl.where(g < FORGOTTEN, FORGOTTEN, g)
    exact = tl.cumsum(exact.to(tl.float64) if WIDE else exact, axis=0)
    sums = exact.to(tl.float32)
    rest = (exact - sums).to(tl.float32)
    start, end = tl.exp(sums), tl.exp((last(exact, C) - exact).to(tl.float32))
    ids = documents_of(documents_ptr, b, chunk, T, C, DOCUMENTS)
    if DOCUMENTS:
        before = tl.load(documents_ptr + b * T + t0 - 1, mask=chunk > 0, other=0)
        behind = tl.load(documents_ptr + b * T + tl.minimum(chunk * C + C, T) - 1)
        start = tl.where(ids == before, start, 0.0)
        end = tl.where(ids == behind, end, 0.0)
    factors_ptr += at * 5 * C + i
    tl.store(factors_ptr + START * C, start)
    tl.store(factors_ptr + END * C, end)
    tl.store(factors_ptr + BETA * C, beta)
    tl.store(factors_ptr + SUM * C, sums)
    if WIDE:
        tl.store(factors_ptr + REST * C, rest)
    pair = pairs(sums, rest, ids, C, WIDE)
    square_at = at * C * C + i[:, None] * C + i[None, :]
    if READ:
        tl.store(p_ptr + square_at, (pair * qk).to(p_ptr.dtype.element_ty))
    a = inverse(tl.where(i[:, None] > i[None, :], beta[:, None] * pair * kk, 0.0), SOLVE)
    tl.store(a_ptr + square_at, a.to(a_ptr.dtype.element_ty))


@triton.jit
def written(state, k, v, a, factors_ptr, C: tl.constexpr, PRECISION: tl.constexpr):
    """``U^T``: what a chunk writes, from the state before it ``[BV, K]`` and its values ``[BV, C]``."""
    seen = product(state.to(k.dtype), tl.trans(k), PRECISION)
    start, beta = factor(factors_ptr, START, C), factor(factors_ptr, BETA, C)
    right = beta[None, :] * (v.to(tl.float32) - start[None, :] * seen)
    return product(right.to(k.dtype), tl.trans(a), PRECISION)


@triton.jit
def advanced(state, u, k, factors_ptr, C: tl.constexpr, PRECISION: tl.constexpr):
    """The state after a chunk that writes `u`."""
    end, across = factor(factors_ptr, END, C), last(factor(factors_ptr, START, C), C)
    return product((u * end[None, :]).to(k.dtype), k, PRECISION, acc=state * across)


@triton.jit(do_not_specialize=["T", "chunks", "segments", "span", "H", "HK", "HV"])
def maps(
    k_ptr, v_ptr, a_ptr, factors_ptr, state_ptr, starts_ptr, maps_ptr,
    T, chunks, segments, span, H, HK, HV, k_b, k_t, k_h, v_b, v_t, v_h,
    K: tl.constexpr, V: tl.constexpr, K2: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The affine map of each segment but the last: what it makes of no state, and the images of the unit vectors.

    The first segment starts at the real state, so that it needs no images.
    """
    local = tl.cdiv(V, BV)
    segment = tl.program_id(1)
    image = tl.program_id(0) >= local
    if image and segment == 0:
        return
    first = (tl.program_id(0) - tl.where(image, local, 0)) * BV
    bh = tl.program_id(2).to(tl.int64)
    b, h = bh // H, bh % H
    row, column = first + tl.arange(0, BV), tl.arange(0, K2)
    state = tl.where(image & (row[:, None] == column[None, :]), 1.0, 0.0)
    if segment == 0:
        inside = (row < V)[:, None] & (column < K)[None, :]
        state_at = state_ptr + bh * K * V + column[None, :] * V + row[:, None]
        state = tl.load(state_at, mask=inside, other=0.0).to(tl.float32)
    k_ptr += b * k_b + (h // (H // HK)) * k_h
    v_ptr += b * v_b + (h // (H // HV)) * v_h
    for chunk in range(segment * span, segment * span + span):
        t0 = chunk * tl.full((), C, tl.int64)
        at = bh * chunks + chunk
        k = tokens(k_ptr + t0 * k_t, k_t, T - chunk * C, 0, K, C, K2)
        v = tokens(v_ptr + t0 * v_t, v_t, tl.where(image, 0, T - chunk * C), first, V, C, BV)
        a = square(a_ptr + at * C * C, C)
        u = written(state, k, tl.trans(v), a, factors_ptr + at * 5 * C, C, PRECISION)
        state = advanced(state, u, k, factors_ptr + at * 5 * C, C, PRECISION)
    if image:
        inside = (row < K)[:, None] & (column < K)[None, :]
        at = (bh * (segments - 2) + segment - 1) * K * K + row[:, None] * K + column[None, :]
        tl.store(maps_ptr + at, state, mask=inside)
    else:
        inside = (row < V)[:, None] & (column < K)[None, :]
        at = (bh * (segments - 1) + segment) * V * K + row[:, None] * K + column[None, :]
        tl.store(starts_ptr + at, state, mask=inside)


@triton.jit(do_not_specialize=["count", "begin", "step"])
def combine(
    x_ptr, maps_ptr, count, begin, step, map_row, map_column,
    K: tl.constexpr, V: tl.constexpr, K2: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``x_{m + step} += x_m M_m`` along `count` maps m from `begin`; x is ``[count + 1, v, k]``, M ``[count, k, k]``.

    Forward the map m leads from x m to x m + 1, backward (step -1) from x m + 1 to x m.
    """
    bh = tl.program_id(1).to(tl.int64)
    row, column = tl.program_id(0) * BV + tl.arange(0, BV), tl.arange(0, K2)
    inside = (row < V)[:, None] & (column < K)[None, :]
    x_ptr += bh * (count + 1) * V * K + row[:, None] * K + column[None, :]
    maps_ptr += bh * count * K * K + column[:, None] * map_row + column[None, :] * map_column
    both = (column < K)[:, None] & (column < K)[None, :]
    at = begin + tl.where(step < 0, 1, 0)
    x = tl.load(x_ptr + at * V * K, mask=inside, other=0.0)
    for i in range(count):
        m = tl.load(maps_ptr + (begin + i * step) * K * K, mask=both, other=0.0)
        at += step
        x = product(x, m, PRECISION, acc=tl.load(x_ptr + at * V * K, mask=inside, other=0.0))
        tl.store(x_ptr + at * V * K, x, mask=inside)


@triton.jit(do_not_specialize=["T", "chunks", "segments", "span", "skipped", "H", "HQ", "HK", "HV"])
def sweep(
    q_ptr, k_ptr, v_ptr, a_ptr, p_ptr, factors_ptr, state_ptr, starts_ptr, y_ptr, final_ptr, states_ptr, u_ptr,
    T, chunks, segments, span, skipped, H, HQ, HK, HV, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    K: tl.constexpr, V: tl.constexpr, K2: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    READ: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A segment from its start: outputs (READ) and the final state, or every chunk's state and writes (KEEP)."""
    first = tl.program_id(0) * BV
    segment = tl.program_id(1) + skipped
    bh = tl.program_id(2).to(tl.int64)
    b, h = bh // H, bh % H
    row, column = first + tl.arange(0, BV), tl.arange(0, K2)
    inside = (row < V)[:, None] & (column < K)[None, :]
    if segment == 0:
        state_at = state_ptr + bh * K * V + column[None, :] * V + row[:, None]
        state = tl.load(state_at, mask=inside, other=0.0).to(tl.float32)
    else:
        at = (bh * (segments - 1) + segment - 1) * V * K + row[:, None] * K + column[None, :]
        state = tl.load(starts_ptr + at, mask=inside, other=0.0)
    q_ptr += b * q_b + (h // (H // HQ)) * q_h
    k_ptr += b * k_b + (h // (H // HK)) * k_h
    v_ptr += b * v_b + (h // (H // HV)) * v_h
    i = tl.arange(0, C)
    for chunk in range(segment * span, tl.minimum(segment * span + span, chunks)):
        t0 = chunk * tl.full((), C, tl.int64)
        left = T - chunk * C
        at = bh * chunks + chunk
        k = tokens(k_ptr + t0 * k_t, k_t, left, 0, K, C, K2)
        v = tokens(v_ptr + t0 * v_t, v_t, left, first, V, C, BV)
        a = square(a_ptr + at * C * C, C)
        u = written(state, k, tl.trans(v), a, factors_ptr + at * 5 * C, C, PRECISION)
        if READ:
            q = tokens(q_ptr + t0 * q_t, q_t, left, 0, K, C, K2)
            p = square(p_ptr + at * C * C, C)
            start = factor(factors_ptr + at * 5 * C, START, C)
            y = product(state.to(q.dtype), tl.trans(q), PRECISION) * start[None, :]
            y = product(u.to(p.dtype), tl.trans(p), PRECISION, acc=y)
            y_at = y_ptr + ((b * T + t0 + i) * H + h)[:, None] * V + row[None, :]
            tl.store(y_at, tl.trans(y).to(y_ptr.dtype.element_ty), mask=(i < left)[:, None] & (row < V)[None, :])
        if KEEP:
            states_at = states_ptr + at * V * K + row[:, None] * K + column[None, :]
            tl.store(states_at, state.to(states_ptr.dtype.element_ty), mask=inside)
            u_at = u_ptr + at * V * C + row[:, None] * C + i[None, :]
            tl.store(u_at, u.to(u_ptr.dtype.element_ty), mask=(row < V)[:, None])
        state = advanced(state, u, k, factors_ptr + at * 5 * C, C, PRECISION)
    if not KEEP and segment == segments - 1:
        tl.store(final_ptr + bh * K * V + column[None, :] * V + row[:, None], state, mask=inside)
