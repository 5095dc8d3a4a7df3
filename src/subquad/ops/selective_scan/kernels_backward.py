"""The selective scan's gradients, chunk by chunk: its states run again forward, and their gradients backward.

With ``a_t = exp(dt_t A)`` and ``dh`` the gradient of the state behind a token,

    dh_t = C_t dy_t + a_{t+1} dh_{t+1}        d(dt_t A) = dh_t a_t h_{t-1}

The state before a token is scanned for itself, from the token before, since ``h_t - dt_t B_t u_t`` would cancel.
"""

import triton
import triton.language as tl

from subquad.ops.selective_scan.kernels import column, decays, follow, place, tile


@triton.jit(do_not_specialize=["T", "CHUNKS"])
def gradients(
    u, dt, a, w_in, w_out, skip, dy, before, after, documents, du, ddt, da, dw_in, dw_out, dskip,
    sub, sut, sdb, sdt, sib, sit, sig, sob, sot, sog, syb, syt, T, CHUNKS, GROUPS,
    P: tl.constexpr, N: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Of a chunk: gradients of u and dt, and this chunk's and block's part of those of A, B, C and D."""
    BLOCKS: tl.constexpr = (P + BD - 1) // BD
    b, n, group, block = place(CHUNKS, GROUPS, BLOCKS)
    local = block * BD + tl.arange(0, BD)
    inside, channel = local < P, group * P + local
    own = tl.arange(0, C)
    at = n * C + own
    D = GROUPS * P
    first, last = (own == 0)[:, None], (own == C - 1)[:, None]
    u += b * sub
    dt += b * sdb
    u_cd, dt_cd = tile(u, sut, n, T, channel, inside, 0, C), tile(dt, sdt, n, T, channel, inside, 0, C)
    earlier_cd = tile(u, sut, n, T, channel, inside, -1, C) * tile(dt, sdt, n, T, channel, inside, -1, C)
    dy_cd = tile(dy + b * syb, syt, n, T, channel, inside, 0, C)
    w_in += b * sib + group * sig
    w_out += b * sob + group * sog
    dw_in += (b * T * GROUPS + group) * BLOCKS * N + block * N
    dw_out += (b * T * GROUPS + group) * BLOCKS * N + block * N
    to_token = at.to(tl.int64) * GROUPS * BLOCKS * N
    dstep = tl.zeros([C, BD], tl.float32)
    dwritten = tl.zeros([C, BD], tl.float32)
    for s in range(N):
        rate = tl.load(a + channel * N + s, mask=inside, other=0.0).to(tl.float32)
        to = ((b * CHUNKS + n) * N + s) * D + channel
        start = tl.load(before + to, mask=inside, other=0.0)
        dend = tl.load(after + to, mask=inside, other=0.0)
        w_c, v_c = column(w_in + s, sit, n, T, 0, C), column(w_out + s, sot, n, T, 0, C)
        # The state before each token: that of the chunk, then what each token before leaves and adds.
        leaves = decays(tile(dt, sdt, n, T, channel, inside, -1, C), rate, documents, b, n, T, -1, DOCUMENTS, C)
        adds = tl.where(first, start[None, :], earlier_cd * column(w_in + s, sit, n, T, -1, C)[:, None])
        _, past = tl.associative_scan((leaves, adds), 0, follow)
        kept = decays(dt_cd, rate, documents, b, n, T, 0, DOCUMENTS, C) * past
        state = kept + dt_cd * u_cd * w_c[:, None]
        # Its gradient behind each token: what the token reads, and what the next one leaves of the next one's.
        reads = dy_cd * v_c[:, None]
        reads = tl.where(last, reads + dend[None, :], reads)
        passes = decays(tile(dt, sdt, n, T, channel, inside, 1, C), rate, documents, b, n, T, 1, DOCUMENTS, C)
        _, dstate = tl.associative_scan((passes, reads), 0, follow, reverse=True)
        dexponent = dstate * kept
        dstep += dexponent * rate[None, :]
        dwritten += dstate * w_c[:, None]
        tl.store(da + to, tl.sum(dexponent * dt_cd, 0), mask=inside)
        # Channels outside hold zeros of u, dt and dy, so that they add nothing.
        tl.store(dw_in + to_token + s, tl.sum(dstate * dt_cd * u_cd, 1), mask=at < T)
        tl.store(dw_out + to_token + s, tl.sum(state * dy_cd, 1), mask=at < T)
    there = (at < T)[:, None] & inside[None, :]
    place_cd = (b * T + at)[:, None] * D + channel[None, :]
    direct = tl.load(skip + channel, mask=inside, other=0.0).to(tl.float32)[None, :] * dy_cd
    tl.store(du + place_cd, (dwritten * dt_cd + direct).to(du.dtype.element_ty), mask=there)
    tl.store(ddt + place_cd, (dstep + dwritten * u_cd).to(ddt.dtype.element_ty), mask=there)
    tl.store(dskip + (b * CHUNKS + n) * D + channel, tl.sum(dy_cd * u_cd, 0), mask=inside)
