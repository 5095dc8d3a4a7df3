"""Triton kernels of windowed attention, backward; tiles and chunks are those of the forward ones."""

import triton
import triton.language as tl

from subquad.ops.windowed.kernels import VARYING, band, dot, load, log_weights, matrix, scores, store


@triton.jit(do_not_specialize=VARYING)
def queries(
    q, k, v, weight, bias, f, sink_k, sink_v, seen, state, norm, y, dy, rows, delta,
    dq, dweight, dbias, dsink_k, dsink_v,
    T, N, H, R, NC, P, origin, SN, ROWS, scale,
    q_b, q_t, q_h, k_b, k_t, k_g, v_b, v_t, v_g, w_b, w_t, w_h, f_b, f_t, f_g, sk_b, sk_n, sk_g, sv_b, sv_n, sv_g,
    K: tl.constexpr, V: tl.constexpr, F: tl.constexpr, W: tl.constexpr, S: tl.constexpr,
    FAR: tl.constexpr, BIAS: tl.constexpr, SEEN: tl.constexpr,
    BC: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr,
    BS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a chunk's queries and log weights, its part of the sinks', and ``delta = dy . y``."""
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
    gap = i[None, :] - i[:, None]
    there = (at + i >= 0) & (at + i < N) & (at + i + base >= 0)
    y += ((b * T + start) * H + h) * V + i[:, None] * (H * V)
    dy += ((b * T + start) * H + h) * V + i[:, None] * (H * V)
    row = (b * H + h) * T + t
    y_iv = load(y, live, vv, V, BV)
    dy_iv = load(dy, live, vv, V, BV)
    v_nv = load(v + i[:, None] * v_t, there, vv, V, BV)
    q_ik = load(q + b * q_b + h * q_h + start * q_t + i[:, None] * q_t, live, kk, K, BK)
    k_nk = load(k + i[:, None] * k_t, there, kk, K, BK)
    lse = tl.load(rows + row, mask=live, other=0.0)
    delta_i = tl.sum(dy_iv.to(tl.float32) * y_iv.to(tl.float32), 1)
    tl.store(delta + row, delta_i, mask=live)
    dp = dot(dy_iv, tl.trans(v_nv), PRECISION) - delta_i[:, None]
    if FAR:
        factor = tl.load(rows + ROWS + row, mask=live, other=0.0)
        top = tl.load(rows + 2 * ROWS + row, mask=live, other=0.0)
        weight += b * w_b + h * w_h + start * w_t + i[:, None] * w_t
        bias += h * F
        f += b * f_b + g * f_g + at.to(tl.int64) * f_t + i[:, None] * f_t
        dweight += ((b * T + start) * H + h) * F + i[:, None] * (H * F)
        cell = (b * (H // R) + g) * NC + c
        old = there & (at + i + base >= S)
        dfar = tl.where((gap < 0) & old[None, :], dp, 0.0).to(v_nv.dtype)
        for x in tl.static_range(0, F, BF):
            ff = x + tl.arange(0, BF)
            w_if = log_weights(weight, bias, ff, live, F, BF, BIAS)
            f_nf = load(f, old, ff, F, BF).to(v_nv.dtype)
            z_f = tl.load(norm + cell * F + ff, mask=ff < F, other=0.0)
            s_fv = matrix(state + cell * F * V, ff, vv, F, V, BF, BV)
            dphi = dot(dfar, f_nf, PRECISION) + dot(dy_iv, tl.trans(s_fv), PRECISION) - delta_i[:, None] * z_f
            dw_if = dphi * tl.exp(w_if - top[:, None]) * factor[:, None]
            store(dweight, dw_if, live, ff, F, BF)
            if BIAS:
                tl.store(dbias + ((b * H + h) * NC + c) * F + ff, tl.sum(dw_if, 0), mask=ff < F)
    score = scores(q_ik, k_nk, band(gap, W, BC) & there[None, :] & live[:, None], scale, PRECISION)
    dq_ik = dot((tl.exp(score - lse[:, None]) * dp).to(k_nk.dtype), k_nk, PRECISION)
    for d in range(1, (BC + W - 2) // BC + 1):
        token = at + d * BC + i
        gap = i[None, :] + d * BC - i[:, None]
        there = (token >= 0) & (token < N) & (token + base >= 0)
        k_nk = load(k + d * BC * k_t + i[:, None] * k_t, there, kk, K, BK)
        v_nv = load(v + d * BC * v_t + i[:, None] * v_t, there, vv, V, BV)
        score = scores(q_ik, k_nk, (gap < W) & there[None, :] & live[:, None], scale, PRECISION)
        dp = dot(dy_iv, tl.trans(v_nv), PRECISION) - delta_i[:, None]
        dq_ik += dot((tl.exp(score - lse[:, None]) * dp).to(k_nk.dtype), k_nk, PRECISION)
    for x in tl.static_range(0, S, BS):
        slot = x + tl.arange(0, BS)
        there = slot < SN
        at_k, at_v = b * sk_b + g * sk_g + slot[:, None] * sk_n, b * sv_b + g * sv_g + slot[:, None] * sv_n
        k_sk = load(sink_k + at_k, there, kk, K, BK)
        v_sv = load(sink_v + at_v, there, vv, V, BV)
        near = there[None, :] & (slot[None, :] <= (t + base + P - W)[:, None]) & live[:, None]
        p = tl.exp(scores(q_ik, k_sk, near, scale, PRECISION) - lse[:, None])
        dp = dot(dy_iv, tl.trans(v_sv), PRECISION) - delta_i[:, None]
        ds = (p * dp).to(k_sk.dtype)
        dq_ik += dot(ds, k_sk, PRECISION)
        cell_s = ((b * H + h) * NC + c) * SN + slot[:, None]
        dk_sk = dot(tl.trans(ds), q_ik, PRECISION) * scale
        store(dsink_k + cell_s * K, dk_sk, there, kk, K, BK)
        dv_sv = dot(tl.trans(p.to(dy_iv.dtype)), dy_iv, PRECISION)
        store(dsink_v + cell_s * V, dv_sv, there, vv, V, BV)
    store(dq + ((b * T + start) * H + h) * K + i[:, None] * (H * K), dq_ik * scale, live, kk, K, BK)


@triton.jit(do_not_specialize=VARYING)
def own(
    weight, bias, dy, rows, delta, own_s, own_z, T, H, R, NC, ROWS, w_b, w_t, w_h,
    V: tl.constexpr, F: tl.constexpr, BIAS: tl.constexpr, BC: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the state and the normaliser at the entry of one chunk, from its own queries."""
    pid = tl.program_id(0).to(tl.int64)
    bg, c = pid // NC, pid % NC
    G = H // R
    b, g = bg // G, bg % G
    i = tl.arange(0, BC)
    ff, vv = tl.program_id(1) * BF + tl.arange(0, BF), tl.arange(0, BV)
    start = c * BC
    live = start + i < T
    weight += b * w_b + start * w_t + i[:, None] * w_t
    dy += (b * T + start) * H * V + i[:, None] * (H * V)
    s_fv, z_f = tl.zeros((BF, BV), tl.float32), tl.zeros((BF,), tl.float32)
    for r in range(0, R):
        h = g * R + r
        row = (b * H + h) * T + start + i
        factor = tl.load(rows + ROWS + row, mask=live, other=0.0)
        top = tl.load(rows + 2 * ROWS + row, mask=live, other=0.0)
        delta_i = tl.load(delta + row, mask=live, other=0.0)
        w_if = log_weights(weight + h * w_h, bias + h * F, ff, live, F, BF, BIAS)
        dy_iv = load(dy + h * V, live, vv, V, BV)
        phi_if = tl.exp(w_if - top[:, None]) * factor[:, None]
        s_fv += dot(tl.trans(phi_if.to(dy_iv.dtype)), dy_iv, PRECISION)
        z_f -= tl.sum(phi_if * delta_i[:, None], 0)
    store(own_s + pid * F * V + ff[:, None] * V, s_fv, ff < F, vv, V, BV)
    tl.store(own_z + pid * F + ff, z_f, mask=ff < F)


@triton.jit(do_not_specialize=VARYING)
def keys(
    q, k, v, weight, bias, f, seen, dy, rows, delta, dstate, dnorm, dk, dv, df,
    T, N, H, R, NC, NT, P, origin, ROWS, scale,
    q_b, q_t, q_h, k_b, k_t, k_g, v_b, v_t, v_g, w_b, w_t, w_h, f_b, f_t, f_g,
    K: tl.constexpr, V: tl.constexpr, F: tl.constexpr, W: tl.constexpr, S: tl.constexpr,
    FAR: tl.constexpr, BIAS: tl.constexpr, SEEN: tl.constexpr,
    BC: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr,
    BX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile's keys, values and features, over all heads of the group and all chunks that see the tile."""
    pid = tl.program_id(0).to(tl.int64)
    bg, j = pid // NT, (pid % NT).to(tl.int32)
    G = H // R
    b, g = bg // G, (bg % G).to(tl.int32)
    i = tl.arange(0, BC)
    kk, vv, ff = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BF)
    token = origin + (j - 1) * BC + i
    base = -P
    if SEEN:
        base += tl.load(seen + b).to(tl.int32)
    given = (token >= 0) & (token < N)
    there = given & (token + base >= 0)
    old = there & (token + base >= S)
    first = (origin + (j - 1) * BC).to(tl.int64)
    k_nk = load(k + b * k_b + g * k_g + first * k_t + i[:, None] * k_t, there, kk, K, BK)
    v += b * v_b + g * v_g + first * v_t + i[:, None] * v_t
    v_nv = load(v, there, vv, V, BV)
    dk_nk, dv_nv = tl.zeros((BC, BK), tl.float32), tl.zeros((BC, BV), tl.float32)
    df_nf = tl.zeros((BC, BF), tl.float32)
    if FAR:
        f += b * f_b + g * f_g + first * f_t + i[:, None] * f_t
        f_nf = load(f, old, ff, F, BF).to(v_nv.dtype)
    q += b * q_b + i[:, None] * q_t
    weight += b * w_b + i[:, None] * w_t
    dy += b * T * H * V + i[:, None] * (H * V)
    # Chunk j - 1 sees the tile as its first one: exactly from the later queries on, from the earlier ones as far.
    gap = i[:, None] - i[None, :]
    start = (j - 1) * BC
    live = (start + i >= 0) & (start + i < T)
    near = band(gap, W, BC) & there[:, None] & live[None, :]
    left = (gap < 0) & old[:, None] & live[None, :]
    for r in range(0, R):
        h = g * R + r
        row = (b * H + h) * T + start + i
        lse = tl.load(rows + row, mask=live, other=0.0)
        delta_i = tl.load(delta + row, mask=live, other=0.0)
        q_ik = load(q + h * q_h + start.to(tl.int64) * q_t, live, kk, K, BK)
        dy_iv = load(dy + (start.to(tl.int64) * H + h) * V, live, vv, V, BV)
        p = tl.exp(scores(k_nk, q_ik, near, scale, PRECISION) - lse[None, :])
        dp = dot(v_nv, tl.trans(dy_iv), PRECISION) - delta_i[None, :]
        dk_nk += dot((p * dp).to(q_ik.dtype), q_ik, PRECISION)
        if FAR:
            factor = tl.load(rows + ROWS + row, mask=live, other=0.0)
            top = tl.load(rows + 2 * ROWS + row, mask=live, other=0.0)
            w_if = log_weights(weight + h * w_h + start.to(tl.int64) * w_t, bias + h * F, ff, live, F, BF, BIAS)
            phi_if = tl.exp(w_if - top[:, None]).to(q_ik.dtype)
            p += tl.where(left, dot(f_nf, tl.trans(phi_if), PRECISION) * factor[None, :], 0.0)
            dfar = tl.where(left, dp * factor[None, :], 0.0).to(q_ik.dtype)
            df_nf += dot(dfar, phi_if, PRECISION)
        dv_nv += dot(p.to(dy_iv.dtype), dy_iv, PRECISION)
    # Chunks before it see the tile as a later one, exactly.
    if W > 1:
        LATER: tl.constexpr = (BC + W - 2) // BC
        for n in range(0, R * LATER):
            h, d = g * R + n // LATER, 1 + n % LATER
            start = (j - 1 - d) * BC
            live = (start + i >= 0) & (start + i < T)
            gap = i[:, None] + d * BC - i[None, :]
            row = (b * H + h) * T + start + i
            lse = tl.load(rows + row, mask=live, other=0.0)
            delta_i = tl.load(delta + row, mask=live, other=0.0)
            q_ik = load(q + h * q_h + start.to(tl.int64) * q_t, live, kk, K, BK)
            dy_iv = load(dy + (start.to(tl.int64) * H + h) * V, live, vv, V, BV)
            near = (gap < W) & there[:, None] & live[None, :]
            p = tl.exp(scores(k_nk, q_ik, near, scale, PRECISION) - lse[None, :])
            dp = dot(v_nv, tl.trans(dy_iv), PRECISION) - delta_i[None, :]
            dk_nk += dot((p * dp).to(q_ik.dtype), q_ik, PRECISION)
            dv_nv += dot(p.to(dy_iv.dtype), dy_iv, PRECISION)
    cell = (b * N + first) * G + g
    ahead = i[:, None] * G
    if FAR:
        if j < NC:
            dstate += (bg * NC + j) * F * V
            for x in tl.static_range(0, V, BX):
                xx = x + tl.arange(0, BX)
                v_nx = load(v, old, xx, V, BX)
                s_fx = matrix(dstate, ff, xx, F, V, BF, BX)
                df_nf += dot(v_nx, tl.trans(s_fx), PRECISION)
            for x in tl.static_range(0, F, BX):
                xx = x + tl.arange(0, BX)
                f_nx = load(f, old, xx, F, BX).to(v_nv.dtype)
                s_xv = matrix(dstate, xx, vv, F, V, BX, BV)
                dv_nv += dot(f_nx, s_xv, PRECISION)
            df_nf += tl.load(dnorm + (bg * NC + j) * F + ff, mask=ff < F, other=0.0)
        df_nf = tl.where(old[:, None], df_nf, 0.0)
        store(df + cell * F + ahead * F, df_nf, given, ff, F, BF)
    store(dk + cell * K + ahead * K, dk_nk * scale, given, kk, K, BK)
    store(dv + cell * V + ahead * V, dv_nv, given, vv, V, BV)
