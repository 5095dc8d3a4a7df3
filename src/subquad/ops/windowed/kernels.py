"""Triton kernels of windowed attention with a linear far part.

Queries stand in chunks of BC. Keys stand in tiles of BC, tile j beginning at token ``origin + (j - 1) BC`` where origin
is the first key that is near to query 0: so tile c + 1 holds those keys that leave the window inside chunk c, the state
at the entry of chunk c is the sum over the tiles up to c, and whatever else chunk c sees is near to it.
Tokens are counted from the first key given, index from the first of the document: token + base.
"""

import triton
import triton.language as tl

from subquad.ops import backends

# The interpreter multiplies the bits of bfloat16 as integers: there, products are of the same numbers in float32.
INTERPRETED = tl.constexpr(backends.interpreted())

# Sizes that vary from call to call; kernels are never compiled again for them.
VARYING = ["T", "N", "NC", "NT", "NX", "NO", "P", "origin", "SN", "ROWS"]


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """A matrix product, summed in float32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def load(at, there, x, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Columns `x`, a block of BLOCK, of the rows that begin at the pointers `at`; zeros where nothing is."""
    mask = there[:, None]
    if WIDTH % BLOCK != 0:
        mask = mask & (x < WIDTH)[None, :]
    return tl.load(at + x[None, :], mask=mask, other=0.0)


@triton.jit
def store(at, tile, there, x, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Write what `load` would read."""
    mask = there[:, None]
    if WIDTH % BLOCK != 0:
        mask = mask & (x < WIDTH)[None, :]
    tl.store(at + x[None, :], tile.to(at.dtype.element_ty), mask=mask)


@triton.jit
def matrix(at, y, x, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BY: tl.constexpr, BX: tl.constexpr):
    """A block of a matrix ``[HEIGHT, WIDTH]`` without gaps between its rows."""
    if HEIGHT % BY != 0:
        return load(at + y[:, None] * WIDTH, y < HEIGHT, x, WIDTH, BX)
    elif WIDTH % BX != 0:
        return tl.load(at + y[:, None] * WIDTH + x[None, :], mask=(x < WIDTH)[None, :], other=0.0)
    else:
        return tl.load(at + y[:, None] * WIDTH + x[None, :])


@triton.jit
def log_weights(weight, bias, ff, live, F: tl.constexpr, BF: tl.constexpr, BIAS: tl.constexpr):
    """Log weights of rows for features `ff`, minus infinity where there is none."""
    mask = live[:, None]
    if F % BF != 0:
        mask = mask & (ff < F)[None, :]
    w_if = tl.load(weight + ff[None, :], mask=mask, other=float("-inf")).to(tl.float32)
    if BIAS:
        w_if += tl.load(bias + ff, mask=ff < F, other=0.0).to(tl.float32)[None, :]
    return w_if


@triton.jit
def band(gap, W: tl.constexpr, BC: tl.constexpr):
    """Where the first tile is near; of later ones every key is, that the window still reaches."""
    near = gap >= 0
    if W < BC:
        near = near & (gap < W)
    return near


@triton.jit
def scores(q_ik, k_nk, near, scale, PRECISION: tl.constexpr):
    """Scaled products, minus infinity where they do not count."""
    return tl.where(near, dot(q_ik, tl.trans(k_nk), PRECISION) * scale, float("-inf"))


@triton.jit
def _steady(peak):
    """`peak`, or where a row has seen nothing yet something to subtract from minus infinity."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def _join(score, v_nv, best, mass, acc, PRECISION: tl.constexpr):
    """One more tile of a softmax: its largest score, mass and weighted values so far, relative to that score."""
    peak = tl.maximum(best, tl.max(score, 1))
    p = tl.exp(score - _steady(peak)[:, None])
    fade = tl.exp(best - _steady(peak))
    return peak, mass * fade + tl.sum(p, 1), acc * fade[:, None] + dot(p.to(v_nv.dtype), v_nv, PRECISION)


@triton.jit(do_not_specialize=VARYING)
def sums(
    v, f, seen, sum_s, sum_z,
    N, G, NC, P, origin, v_b, v_t, v_g, f_b, f_t, f_g,
    F: tl.constexpr, V: tl.constexpr, S: tl.constexpr, SEEN: tl.constexpr,
    BC: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``sum f_j v_j^T`` and ``sum f_j`` over one tile of keys, sinks left out."""
    pid = tl.program_id(0).to(tl.int64)
    bg, j = pid // NC, pid % NC
    b, g = bg // G, bg % G
    m = origin + (j - 1) * BC + tl.arange(0, BC)
    ff, vv = tl.program_id(1) * BF + tl.arange(0, BF), tl.program_id(2) * BV + tl.arange(0, BV)
    base = -P
    if SEEN:
        base += tl.load(seen + b)
    far = (m >= 0) & (m < N) & (m + base >= S)
    n = tl.arange(0, BC)[:, None]
    first = origin + (j - 1) * BC
    f_nf = load(f + b * f_b + g * f_g + first * f_t + n * f_t, far, ff, F, BF)
    v_nv = load(v + b * v_b + g * v_g + first * v_t + n * v_t, far, vv, V, BV)
    s_fv = dot(tl.trans(f_nf.to(v_nv.dtype)), v_nv, PRECISION)
    store(sum_s + pid * F * V + ff[:, None] * V, s_fv, ff < F, vv, V, BV)
    if tl.program_id(2) == 0:
        tl.store(sum_z + pid * F + ff, tl.sum(f_nf.to(tl.float32), 0), mask=ff < F)


@triton.jit(do_not_specialize=VARYING)
def cumulate(
    x, first, out, total, NX, NO, L,
    REVERSE: tl.constexpr, FIRST: tl.constexpr, TOTAL: tl.constexpr, BN: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """Running sums of rows ``[NX, L]`` from `first` on, each with its own row in it; backward when REVERSE."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BL + tl.arange(0, BL)
    inside = at < L
    carry = tl.zeros((BL,), tl.float32)
    if FIRST:
        carry += tl.load(first + row * L + at, mask=inside, other=0.0)
    for start in range(0, NX, BN):
        i = start + tl.arange(0, BN)
        mask = (i < NX)[:, None] & inside
        if REVERSE:
            i = NX - 1 - i
        x_nl = tl.load(x + (row * NX + i[:, None]) * L + at, mask=mask, other=0.0)
        sum_nl = tl.cumsum(x_nl, 0) + carry
        tl.store(out + (row * NO + i[:, None]) * L + at, sum_nl.to(out.dtype.element_ty), mask=mask)
        carry += tl.sum(x_nl, 0)
    if TOTAL:
        tl.store(total + row * L + at, carry, mask=inside)


@triton.jit(do_not_specialize=VARYING)
def forward(
    q, k, v, weight, bias, f, sink_k, sink_v, seen, state, norm, y, rows,
    T, N, H, R, NC, P, origin, SN, ROWS, scale,
    q_b, q_t, q_h, k_b, k_t, k_g, v_b, v_t, v_g, w_b, w_t, w_h, f_b, f_t, f_g, sk_b, sk_n, sk_g, sv_b, sv_n, sv_g,
    K: tl.constexpr, V: tl.constexpr, F: tl.constexpr, W: tl.constexpr, S: tl.constexpr,
    FAR: tl.constexpr, BIAS: tl.constexpr, SEEN: tl.constexpr,
    BC: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr,
    BS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs of one chunk of one head, and what backward needs of each row.

    That is the logarithm of the whole mass, the factor from ``exp(weight - top) . f`` to a share of it, and top.
    """
    pid = tl.program_id(0)
    h, c, b = pid % H, (pid // H) % NC, (pid // H // NC).to(tl.int64)
    g = h // R
    i = tl.arange(0, BC)
    kk, vv = tl.arange(0, BK), tl.arange(0, BV)
    t = c * BC + i
    live = t < T
    start = (c * BC).to(tl.int64)
    at = origin + c * BC
    # What comes after the chunk is not read: even a NaN there changes nothing here.
    N = tl.minimum(N, P + (c + 1) * BC)
    base = -P
    if SEEN:
        base += tl.load(seen + b).to(tl.int32)
    k += b * k_b + g * k_g + at.to(tl.int64) * k_t
    v += b * v_b + g * v_g + at.to(tl.int64) * v_t
    # The first tile holds keys that some queries of the chunk see exactly and others no more.
    gap = i[None, :] - i[:, None]
    there = (at + i >= 0) & (at + i < N) & (at + i + base >= 0)
    # Loads stand as far ahead of their use as they can: little else hides their latency here.
    q_ik = load(q + b * q_b + h * q_h + start * q_t + i[:, None] * q_t, live, kk, K, BK)
    k_nk = load(k + i[:, None] * k_t, there, kk, K, BK)
    v_nv = load(v + i[:, None] * v_t, there, vv, V, BV)
    if FAR:
        weight += b * w_b + h * w_h + start * w_t + i[:, None] * w_t
        bias += h * F
        f += b * f_b + g * f_g + at.to(tl.int64) * f_t + i[:, None] * f_t
        cell = (b * (H // R) + g) * NC + c
        top = tl.full((BC,), float("-inf"), tl.float32)
        for x in tl.static_range(0, F, BF):
            ff = x + tl.arange(0, BF)
            top = tl.maximum(top, tl.max(log_weights(weight, bias, ff, live, F, BF, BIAS), 1))
        top = tl.where(live, top, 0.0)
        old = there & (at + i + base >= S)
        mass = tl.zeros((BC,), tl.float32)
        acc = tl.zeros((BC, BV), tl.float32)
        far_in = tl.zeros((BC, BC), tl.float32)
        for x in tl.static_range(0, F, BF):
            ff = x + tl.arange(0, BF)
            phi_if = tl.exp(log_weights(weight, bias, ff, live, F, BF, BIAS) - top[:, None])
            f_nf = load(f, old, ff, F, BF).to(q_ik.dtype)
            z_f = tl.load(norm + cell * F + ff, mask=ff < F, other=0.0)
            s_fv = matrix(state + cell * F * V, ff, vv, F, V, BF, BV)
            mass += tl.sum(phi_if * z_f, 1)
            acc += dot(phi_if.to(q_ik.dtype), s_fv, PRECISION)
            far_in += dot(phi_if.to(q_ik.dtype), tl.trans(f_nf), PRECISION)
        far_in = tl.where((gap < 0) & old[None, :], far_in, 0.0)
        # The state, and what leaves the window inside the chunk; not ``> 0``, since NaN has to stay.
        some = ~(mass + tl.sum(far_in, 1) <= 0)
        score = scores(q_ik, k_nk, band(gap, W, BC) & there[None, :], scale, PRECISION)
        best = tl.maximum(tl.max(score, 1), tl.where(some, top, float("-inf")))
        share = tl.where(some, tl.exp(top - _steady(best)), 0.0)
        p = tl.exp(score - _steady(best)[:, None]) + far_in * share[:, None]
        mass = mass * share + tl.sum(p, 1)
        acc = acc * share[:, None] + dot(p.to(v_nv.dtype), v_nv, PRECISION)
    else:
        score = scores(q_ik, k_nk, band(gap, W, BC) & there[None, :], scale, PRECISION)
        best = tl.max(score, 1)
        p = tl.exp(score - _steady(best)[:, None])
        mass = tl.sum(p, 1)
        acc = dot(p.to(v_nv.dtype), v_nv, PRECISION)
    for d in range(1, (BC + W - 2) // BC + 1):
        token = at + d * BC + i
        gap = i[None, :] + d * BC - i[:, None]
        there = (token >= 0) & (token < N) & (token + base >= 0)
        k_nk = load(k + d * BC * k_t + i[:, None] * k_t, there, kk, K, BK)
        v_nv = load(v + d * BC * v_t + i[:, None] * v_t, there, vv, V, BV)
        score = scores(q_ik, k_nk, (gap < W) & there[None, :], scale, PRECISION)
        best, mass, acc = _join(score, v_nv, best, mass, acc, PRECISION)
    for x in tl.static_range(0, S, BS):
        slot = x + tl.arange(0, BS)
        there = slot < SN
        at_k, at_v = b * sk_b + g * sk_g + slot[:, None] * sk_n, b * sv_b + g * sv_g + slot[:, None] * sv_n
        k_sk = load(sink_k + at_k, there, kk, K, BK)
        v_sv = load(sink_v + at_v, there, vv, V, BV)
        near = there[None, :] & (slot[None, :] <= (t + base + P - W)[:, None])
        best, mass, acc = _join(scores(q_ik, k_sk, near, scale, PRECISION), v_sv, best, mass, acc, PRECISION)
    mass = tl.where(live, mass, 1.0)
    best = tl.where(live, best, 0.0)
    store(y + ((b * T + start) * H + h) * V + i[:, None] * (H * V), acc / mass[:, None], live, vv, V, BV)
    lse = best + tl.log(mass)
    rows += (b * H + h) * T + t
    tl.store(rows, lse, mask=live)
    if FAR:
        tl.store(rows + ROWS, tl.where(some, tl.exp(top - lse), 0.0), mask=live)
        tl.store(rows + 2 * ROWS, top, mask=live)
