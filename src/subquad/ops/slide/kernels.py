"""A block slides through a window, in Triton."""

import triton
import triton.language as tl


@triton.jit
def _joint(old, block, at, columns, inside, W, T, WIDTH: tl.constexpr, stride_t):
    """Rows ``at`` of the old window's w tokens and the block's behind them."""
    early = at < W
    kept = tl.load(old + at[:, None] * WIDTH + columns[None, :], mask=inside & early[:, None], other=0.0)
    place = (at - W)[:, None] * stride_t + columns[None, :]
    new = tl.load(block + place, mask=inside & (~early & (at - W < T))[:, None], other=0.0)
    return tl.where(early[:, None], kept, new)


@triton.jit(do_not_specialize=["T", "NF"])
def slide_kernel(
    k_ptr, v_ptr, f_ptr, old_k_ptr, old_v_ptr, old_f_ptr, old_sink_k_ptr, old_sink_v_ptr, old_linear_ptr, seen_ptr,
    n_ptr, rows_ptr, k_pool, v_pool, sink_k_pool, sink_v_pool, linear_pool, seen_pool,
    T, NF,
    k_b, k_g, k_t, v_b, v_g, v_t, f_b, f_g, f_t, old_f_b, old_f_g, old_f_n,
    pool_row, sink_row, linear_row, seen_row,
    G: tl.constexpr, W: tl.constexpr, S: tl.constexpr, R: tl.constexpr, K: tl.constexpr, F: tl.constexpr,
    RING: tl.constexpr, FAR: tl.constexpr, PRECISION: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BF: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """One row's key head. Grid: rows, key heads. R is the slots that a row of the pool's window has."""
    b, g = tl.program_id(0), tl.program_id(1)
    n, seen, row = tl.load(n_ptr + b).to(tl.int32), tl.load(seen_ptr + b).to(tl.int32), tl.load(rows_ptr + b)
    wide = b.to(tl.int64)
    k_ptr += wide * k_b + g * k_g
    v_ptr += wide * v_b + g * v_g
    old_k_ptr += (wide * G + g) * W * K
    old_v_ptr += (wide * G + g) * W * K
    columns = tl.arange(0, BK)
    at_n = tl.arange(0, BN)
    for start in range(0, W, BN):
        j = start + at_n
        inside = (j < W)[:, None] & (columns < K)[None, :]
        k = _joint(old_k_ptr, k_ptr, n + j, columns, inside, W, T, K, k_t)
        v = _joint(old_v_ptr, v_ptr, n + j, columns, inside, W, T, K, v_t)
        slot = j
        if RING:
            # What was never seen has no place in a ring.
            index = seen + n - W + j
            slot = index % R
            inside = inside & (index >= 0)[:, None]
        place = row * pool_row + (g * R + slot)[:, None] * K + columns[None, :]
        tl.store(k_pool + place, k, mask=inside)
        tl.store(v_pool + place, v, mask=inside)
    if S > 0:
        j = tl.arange(0, BS)
        there, inside = (j < seen)[:, None], (j < S)[:, None] & (columns < K)[None, :]
        held = (wide * G + g) * S * K + j[:, None] * K + columns[None, :]
        place = row * sink_row + (g * S + j)[:, None] * K + columns[None, :]
        new = tl.minimum(tl.maximum(j - seen, 0), T - 1)[:, None]
        sink_k = tl.load(old_sink_k_ptr + held, mask=inside & there, other=0.0)
        sink_k += tl.load(k_ptr + new * k_t + columns[None, :], mask=inside & ~there, other=0.0)
        tl.store(sink_k_pool + place, sink_k, mask=inside)
        sink_v = tl.load(old_sink_v_ptr + held, mask=inside & there, other=0.0)
        sink_v += tl.load(v_ptr + new * v_t + columns[None, :], mask=inside & ~there, other=0.0)
        tl.store(sink_v_pool + place, sink_v, mask=inside)
    if FAR:
        f_ptr += wide * f_b + g * f_g
        old_f_ptr += wide * old_f_b + g * old_f_g
        features = tl.arange(0, BF)
        added, mass = tl.zeros((BF, BK), tl.float32), tl.zeros((BF,), tl.float32)
        for start in range(0, n, BN):
            at = start + at_n
            # A sink stays, and what stands before the first token is nothing.
            leaves = (at < n) & (seen - W + at >= S)
            early, far = at < W, leaves[:, None] & (features < F)[None, :]
            f = tl.load(
                old_f_ptr + at[:, None] * old_f_n + features[None, :],
                mask=far & (early & (at < NF))[:, None],
                other=0.0,
            )
            f += tl.load(f_ptr + (at - W)[:, None] * f_t + features[None, :], mask=far & ~early[:, None], other=0.0)
            lost_v = _joint(old_v_ptr, v_ptr, at, columns, leaves[:, None] & (columns < K)[None, :], W, T, K, v_t)
            added = tl.dot(tl.trans(f), lost_v, added, input_precision=PRECISION)
            mass += tl.sum(f.to(tl.float32), 0)
        inside = (features < F)[:, None] & (columns < K)[None, :]
        held = (wide * G + g) * F * (K + 1)
        place = features[:, None] * (K + 1) + columns[None, :]
        into = linear_pool + row * linear_row + g * F * (K + 1)
        tl.store(into + place, tl.load(old_linear_ptr + held + place, mask=inside, other=0.0) + added, mask=inside)
        last = features * (K + 1) + K
        before = tl.load(old_linear_ptr + held + last, mask=features < F, other=0.0)
        tl.store(into + last, before + mass, mask=features < F)
    if g == 0:
        tl.store(seen_pool + row * seen_row, tl.load(seen_ptr + b) + n)
