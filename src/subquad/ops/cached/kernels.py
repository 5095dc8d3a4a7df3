"""Attention over a cache in Triton: programs share a row's tokens, each with one softmax, joined by a second launch."""

import triton
import triton.language as tl

from subquad.ops.kernels import fold
from subquad.ops.overlap.kernels import begin
from subquad.ops.rope.kernels import turned


@triton.jit
def attend_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, cache_k_ptr, cache_v_ptr, seen_ptr, y_ptr, turned_ptr, part_ptr, log_ptr,
    factor, table_stride_b, capacity,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_g, k_stride_t, v_stride_b, v_stride_g, v_stride_t,
    cache_k_stride_b, cache_k_stride_g, cache_k_stride_n, cache_v_stride_b, cache_v_stride_g, cache_v_stride_n,
    T: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, SPLITS: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    TILES: tl.constexpr, STAGES: tl.constexpr, TURN: tl.constexpr, HALF: tl.constexpr, WRITE: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """See `subquad.ops.cached.attend`, and with WRITE `attend_`.

    Grid: shares of a row's tokens, fastest, then TILES of queries, key heads and rows.

    Of the queries of a group and block those of one head stand side by side; a program has BM of them. `factor` is the
    scale times the logarithm of e to base 2. With one share the output is written, else each share's own and its
    logarithm of the sum. With TURN, queries and the block's keys come without position: both are turned here by tables
    ``[b or 1, t, HALF]``, and the keys written out, ``[b, g, t, K]``, unless they go into the cache.
    """
    pid = tl.program_id(0)
    split, tile = pid % SPLITS, (pid // SPLITS) % TILES
    head, b = (pid // (SPLITS * TILES)) % G, (pid // (SPLITS * TILES * G)).to(tl.int64)
    GROUP: tl.constexpr = H // G
    m, j, kc, vc = tile * BM + tl.arange(0, BM), tl.arange(0, BT), tl.arange(0, BK), tl.arange(0, BV)
    t, h, real = m % T, head * GROUP + m // T, m < GROUP * T
    cache_k_ptr += b * cache_k_stride_b + head * cache_k_stride_g
    cache_v_ptr += b * cache_v_stride_b + head * cache_v_stride_g
    begin(OVERLAP)
    # First of all, since what is read next waits for it.
    seen = tl.load(seen_ptr + b).to(tl.int32)
    q_ptrs = q_ptr + b * q_stride_b + t * q_stride_t + h * q_stride_h
    if TURN:
        q_table = b * table_stride_b + t * HALF
        q = turned(q_ptrs, kc, real[:, None] & (kc < K)[None, :], cos_ptr + q_table, sin_ptr + q_table, HALF)
    else:
        q = tl.load(q_ptrs[:, None] + kc[None, :], mask=real[:, None] & (kc < K)[None, :], other=0.0)
    best = tl.full((BM,), -float("inf"), tl.float32)
    total, sums = tl.zeros((BM,), tl.float32), tl.zeros((BM, BV), tl.float32)
    share = tl.cdiv(tl.cdiv(seen, SPLITS), BN) * BN
    first = split * share
    last = tl.minimum(first + share, seen)
    for start in tl.range(first, last, BN, num_stages=STAGES):
        n = start + tl.arange(0, BN)
        at = n[:, None].to(tl.int64)
        known = (n < last)[:, None]
        k_ptrs = cache_k_ptr + at * cache_k_stride_n + kc[None, :]
        k = tl.load(k_ptrs, mask=known & (kc < K)[None, :], other=0.0)
        v = tl.load(cache_v_ptr + at * cache_v_stride_n + vc[None, :], mask=known & (vc < V)[None, :], other=0.0)
        best, total, sums = fold(q, k, v, (n < last)[None, :], factor, best, total, sums, PRECISION)
    if split == SPLITS - 1:
        # Every tile of queries reads the block's keys; one writes them.
        mine, once = (j < T)[:, None], (j < tl.where(tile == 0, T, 0))[:, None]
        k_ptrs = k_ptr + b * k_stride_b + head * k_stride_g + j * k_stride_t
        v_ptrs = v_ptr + b * v_stride_b + head * v_stride_g + j[:, None] * v_stride_t + vc[None, :]
        inside = mine & (kc < K)[None, :]
        if TURN:
            k_table = b * table_stride_b + j * HALF
            k = turned(k_ptrs, kc, inside, cos_ptr + k_table, sin_ptr + k_table, HALF)
            if not WRITE:
                turned_ptrs = turned_ptr + ((b * G + head) * T + j)[:, None] * K + kc[None, :]
                tl.store(turned_ptrs, k, mask=once & (kc < K)[None, :])
        else:
            k = tl.load(k_ptrs[:, None] + kc[None, :], mask=inside, other=0.0)
        v = tl.load(v_ptrs, mask=mine & (vc < V)[None, :], other=0.0)
        if WRITE:
            # No program reads behind the tokens seen.
            slot = (seen + j)[:, None].to(tl.int64)
            room = once & (slot < capacity)
            tl.store(cache_k_ptr + slot * cache_k_stride_n + kc[None, :], k, mask=room & (kc < K)[None, :])
            tl.store(cache_v_ptr + slot * cache_v_stride_n + vc[None, :], v, mask=room & (vc < V)[None, :])
        allowed = (j[None, :] <= t[:, None]) & (j < T)[None, :]
        best, total, sums = fold(q, k, v, allowed, factor, best, total, sums, PRECISION)
    sums = sums / tl.where(total > 0.0, total, 1.0)[:, None]
    row = (b * T + t) * H + h
    if SPLITS == 1:
        y_ptrs = y_ptr + row[:, None] * V + vc[None, :]
        tl.store(y_ptrs, sums.to(y_ptr.dtype.element_ty), mask=real[:, None] & (vc < V)[None, :])
    else:
        part_ptrs = part_ptr + (row * SPLITS + split)[:, None] * V + vc[None, :]
        tl.store(part_ptrs, sums, mask=real[:, None] & (vc < V)[None, :])
        log = tl.where(total > 0.0, best + tl.log2(tl.where(total > 0.0, total, 1.0)), -float("inf"))
        tl.store(log_ptr + row * SPLITS + split, log, mask=real)


@triton.jit
def join_kernel(
    part_ptr, log_ptr, y_ptr, V: tl.constexpr, SPLITS: tl.constexpr, BS: tl.constexpr, BV: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One query's shares into one output. Grid: queries."""
    row = tl.program_id(0).to(tl.int64)
    s, vc = tl.arange(0, BS), tl.arange(0, BV)
    begin(OVERLAP)
    log = tl.load(log_ptr + row * SPLITS + s, mask=s < SPLITS, other=-float("inf"))
    weight = tl.exp2(log - tl.max(log, 0))
    part_ptrs = part_ptr + (row * SPLITS + s)[:, None] * V + vc[None, :]
    part = tl.load(part_ptrs, mask=(s < SPLITS)[:, None] & (vc < V)[None, :], other=0.0)
    y = tl.sum(weight[:, None] * part, 0) / tl.sum(weight, 0)
    tl.store(y_ptr + row * V + vc, y.to(y_ptr.dtype.element_ty), mask=vc < V)


@triton.jit
def _copy(to_ptr, from_ptr, to_g, to_n, from_g, from_t, g, slot, t, kept, WIDTH: tl.constexpr, BW: tl.constexpr):
    """Tokens of a block into the slots of one row of a cache."""
    c = tl.arange(0, BW)
    mask = kept[:, None] & (c < WIDTH)[None, :]
    x = tl.load(from_ptr + (g * from_g + t * from_t)[:, None] + c[None, :], mask=mask, other=0.0)
    to_ptrs = to_ptr + (g.to(tl.int64) * to_g + slot * to_n)[:, None] + c[None, :]
    tl.store(to_ptrs, x.to(to_ptr.dtype.element_ty), mask=mask)


@triton.jit
def append_kernel(
    cache_k_ptr, cache_v_ptr, seen_ptr, k_ptr, v_ptr, n_ptr, rows_ptr, first_ptr, start_ptr, capacity,
    cache_k_stride_b, cache_k_stride_g, cache_k_stride_n, cache_v_stride_b, cache_v_stride_g, cache_v_stride_n,
    k_stride_b, k_stride_g, k_stride_t, v_stride_b, v_stride_g, v_stride_t,
    T: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    ROWS: tl.constexpr, FIRST: tl.constexpr, START: tl.constexpr,
    BX: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """See `subquad.ops.cached.append_`. Grid: rows, one program each, so that it alone counts the row's tokens."""
    b = tl.program_id(0).to(tl.int64)
    begin(OVERLAP)
    row, first = b, tl.zeros((), tl.int64)
    if ROWS:
        row = tl.load(rows_ptr + b).to(tl.int64)
    if FIRST:
        first = tl.load(first_ptr + b).to(tl.int64)
    start = tl.load(start_ptr + b if START else seen_ptr + row).to(tl.int64)
    n = tl.load(n_ptr + b).to(tl.int64)
    x = tl.arange(0, BX)
    g, t = x // T, x % T
    slot = start + t - first
    kept = (x < G * T) & (t >= first) & (t < n) & (slot < capacity)
    _copy(
        cache_k_ptr + row * cache_k_stride_b, k_ptr + b * k_stride_b, cache_k_stride_g, cache_k_stride_n,
        k_stride_g, k_stride_t, g, slot, t, kept, K, BK,
    )  # fmt: skip
    _copy(
        cache_v_ptr + row * cache_v_stride_b, v_ptr + b * v_stride_b, cache_v_stride_g, cache_v_stride_n,
        v_stride_g, v_stride_t, g, slot, t, kept, V, BV,
    )  # fmt: skip
    tl.store(seen_ptr + row, start + n - first)
