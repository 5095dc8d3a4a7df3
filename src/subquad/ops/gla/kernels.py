"""Gated linear attention's kernels: products of a chunk, states between chunks, weights within a chunk, gradients.

Time is cut into chunks of C tokens. Between chunks travels the state. Within one, the weight of token j for token i is
``A_ij = sum_k q_ik k_jk exp(g_{j+1,k} + ... + g_ik)``, whose exponent does not split into a part of i and a part of j
without overflow, unless both are measured from a token between them. So pairs are sorted by the highest bit in which i
and j differ: at level l a block of 2^l tokens and its right neighbour meet at their common border, i counts its decay
back to that border, j counts forward to it, and one matrix product serves all blocks of the level. Every exponent is a
sum of log decays, at most 0. Rows with bit l set play the queries of the level, the others its keys; one matrix
``P = where(bit, q, k) exp(E)`` holds both, ``A = P P^T`` at the level's pairs, and the gradients of both are one
product too.
"""

import triton
import triton.language as tl

from subquad.ops import backends

# The interpreter multiplies the bits of bfloat16 as integers: there, products are of the same numbers in float32.
INTERPRETED = tl.constexpr(backends.interpreted())

# exp of it is 0 in float32: a log decay below means the same, and minus infinity could not be summed.
FORGOTTEN = tl.constexpr(-100.0)


@triton.jit
def place(N, H, BLOCKS: tl.constexpr):
    """Of a program: row, head, chunk and block; heads next to each other, as they lie in memory."""
    pid = tl.program_id(0)
    rest = pid // BLOCKS
    h = rest % H
    rest = rest // H
    return rest // N, h, rest % N, pid % BLOCKS


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr):
    """``total + a @ b``; None is no total."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def tile(x, stride_t, n, T, channel, CHANNELS: tl.constexpr, C: tl.constexpr):
    """Some channels of chunk n, ``[c, channels]``; zeros outside."""
    own = tl.arange(0, C)
    inside = (n * C + own < T)[:, None] & (channel < CHANNELS)[None, :]
    x += (n * C).to(tl.int64) * stride_t
    return tl.load(x + own[:, None] * stride_t + channel[None, :], mask=inside, other=0.0)


@triton.jit
def decays(g, stride_t, n, T, channel, K: tl.constexpr, C: tl.constexpr):
    """Log decays in float32; NaN stays NaN."""
    made = tile(g, stride_t, n, T, channel, K, C).to(tl.float32)
    return tl.where(made < FORGOTTEN, FORGOTTEN, made)


@triton.jit
def masks(out, C: tl.constexpr, LEVELS: tl.constexpr):
    """Which decays are summed up: row r of mask l has 1 where the decay of t lies between r and its border of level l.

    A query counts its own decay and those before it in its block, a key those behind it in its block. In the last two
    masks the whole chunk is one block, of queries and of keys: from its start to r, and from r to its end. They stand
    in memory, since a tensor core takes a loaded operand through shared memory, and a computed one through registers,
    which is slower and which some versions of ptxas compile wrongly.
    """
    level = tl.program_id(0)
    own = tl.arange(0, C)
    block = own >> tl.minimum(level, LEVELS)
    asks = tl.where(level < LEVELS, block & 1, (level == LEVELS).to(tl.int32)) == 1
    before = own[None, :] <= own[:, None]
    chosen = (block[:, None] == block[None, :]) & (before == asks[:, None])
    to = out + level * C * C + own[:, None] * C + own[None, :]
    tl.store(to, chosen.to(tl.float32).to(out.dtype.element_ty))


@triton.jit
def mask(x, level, C: tl.constexpr):
    """One of `masks`."""
    own = tl.arange(0, C)
    return tl.load(x + level * C * C + own[:, None] * C + own[None, :])


@triton.jit
def summed(chosen, x, PRECISION: tl.constexpr):
    """``chosen @ x`` for a mask and float32 x, exact to about 16 bits where the mask's dtype has 8."""
    high = x.to(chosen.dtype)
    total = None
    if chosen.dtype.primitive_bitwidth < 32:
        low = (x - high.to(tl.float32)).to(chosen.dtype)
        total = product(chosen, low, None, PRECISION)
    return product(chosen, high, total, PRECISION)


@triton.jit
def border(documents, b, n, T, at, REVERSE: tl.constexpr, C: tl.constexpr):
    """Which tokens of chunk n belong to the document before it, or, in reverse, to the one at its end."""
    row = documents + b.to(tl.int64) * T
    own = tl.load(row + tl.minimum(at, T - 1))
    if REVERSE:
        other = tl.load(row + tl.minimum(n * C + C, T) - 1)
    else:
        other = tl.where(n > 0, tl.load(row + tl.maximum(n * C, 1) - 1), 0)
    return own == other


@triton.jit(do_not_specialize=["T", "N"])
def products(
    x, y, g, documents, chosen, out, across,
    sxb, sxt, sxh, syb, syt, syh, sgb, sgt, sgh, T, N, H, HX, HY,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, LEVELS: tl.constexpr,
    REVERSE: tl.constexpr, DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """What a chunk adds to the state, ``sum_j end_j k_j v_j^T``, or, in reverse, to its gradient, with q, dy, start.

    Forward writes the chunk's whole decay, too.
    """
    BLOCKS_V: tl.constexpr = (V + BV - 1) // BV
    b, h, n, block = place(N, H, ((K + BK - 1) // BK) * BLOCKS_V)
    own = tl.arange(0, C)
    at = n * C + own
    key = block // BLOCKS_V * BK + tl.arange(0, BK)
    value = block % BLOCKS_V * BV + tl.arange(0, BV)
    b64 = b.to(tl.int64)
    g_ck = decays(g + b64 * sgb + h * sgh, sgt, n, T, key, K, C)
    x_ck = tile(x + b64 * sxb + (h // (H // HX)).to(tl.int64) * sxh, sxt, n, T, key, K, C)
    y_cv = tile(y + b64 * syb + (h // (H // HY)).to(tl.int64) * syh, syt, n, T, value, V, C)
    factor = tl.exp(summed(mask(chosen, LEVELS if REVERSE else LEVELS + 1, C), g_ck, SUMS))
    whole = tl.exp(tl.sum(g_ck, 0))
    if DOCUMENTS:
        factor = tl.where(border(documents, b, n, T, at, not REVERSE, C)[:, None], factor, 0.0)
        last = border(documents, b, n, T, n * C + C - 1 + tl.zeros([1], tl.int32), False, C)
        whole = tl.where(last, whole, 0.0)
    made = product(tl.trans((x_ck * factor).to(y_cv.dtype)), y_cv, None, PRECISION)
    to = (b64 * N + n) * H + h
    inside = (key < K)[:, None] & (value < V)[None, :]
    tl.store(out + to * K * V + key[:, None] * V + value[None, :], made.to(out.dtype.element_ty), mask=inside)
    if not REVERSE and block % BLOCKS_V == 0:
        tl.store(across + to * K + key, whole, mask=key < K)


@triton.jit(do_not_specialize=["N"])
def states(
    added, across, start, end, N, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    REVERSE: tl.constexpr, STORE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``S <- across_n S + added_n`` over the chunks; each added_n is overwritten by the S that it meets."""
    BLOCKS_V: tl.constexpr = (V + BV - 1) // BV
    BLOCKS: tl.constexpr = ((K + BK - 1) // BK) * BLOCKS_V
    pid = tl.program_id(0)
    block = pid % BLOCKS
    row = (pid // BLOCKS).to(tl.int64)
    key = block // BLOCKS_V * BK + tl.arange(0, BK)
    value = block % BLOCKS_V * BV + tl.arange(0, BV)
    inside = (key < K)[:, None] & (value < V)[None, :]
    offset = key[:, None] * V + value[None, :]
    state = tl.load(start + row * K * V + offset, mask=inside, other=0.0).to(tl.float32)
    for i in tl.range(0, N, num_stages=STAGES):
        n = N - 1 - i if REVERSE else i
        to = (row // H * N + n) * H + row % H
        new = tl.load(added + to * K * V + offset, mask=inside, other=0.0).to(tl.float32)
        decay = tl.load(across + to * K + key, mask=key < K, other=0.0)
        if STORE:
            tl.store(added + to * K * V + offset, state.to(added.dtype.element_ty), mask=inside)
        state = decay[:, None] * state + new
    tl.store(end + row * K * V + offset, state, mask=inside)


@triton.jit(do_not_specialize=["T", "N"])
def weights(
    q, k, g, documents, chosen, out,
    sqb, sqt, sqh, skb, skt, skh, sgb, sgt, sgh, T, N, H, HQ, HK,
    K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, LEVELS: tl.constexpr,
    DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """A, the weights of the tokens of a chunk for each other, ``[c, c]``; 0 above the diagonal."""
    b, h, n, _ = place(N, H, 1)
    own = tl.arange(0, C)
    at = n * C + own
    b64 = b.to(tl.int64)
    q += b64 * sqb + (h // (H // HQ)).to(tl.int64) * sqh
    k += b64 * skb + (h // (H // HK)).to(tl.int64) * skh
    g += b64 * sgb + h * sgh
    apart = own[:, None] ^ own[None, :]
    a_cc = tl.zeros([C, C], tl.float32)
    same_c = tl.zeros([C], tl.float32)
    for first in range(0, K, BK):
        key = first + tl.arange(0, BK)
        g_ck = decays(g, sgt, n, T, key, K, C)
        q_ck = tile(q, sqt, n, T, key, K, C)
        k_ck = tile(k, skt, n, T, key, K, C)
        same_c += tl.sum(q_ck.to(tl.float32) * k_ck.to(tl.float32), 1)
        for level in range(LEVELS):
            asks = ((own >> level) & 1) == 1
            p_ck = tl.where(asks[:, None], q_ck, k_ck) * tl.exp(summed(mask(chosen, level, C), g_ck, SUMS))
            p_ck = p_ck.to(out.dtype.element_ty)
            made = product(p_ck, tl.trans(p_ck), None, PRECISION)
            a_cc += tl.where((apart >> level) == 1, made, 0.0)
    a_cc = tl.where(own[:, None] > own[None, :], a_cc, 0.0)
    a_cc = tl.where(apart == 0, same_c[:, None], a_cc)
    if DOCUMENTS:
        row = documents + b64 * T
        document = tl.load(row + tl.minimum(at, T - 1))
        a_cc = tl.where(document[:, None] == document[None, :], a_cc, 0.0)
    to = out + ((b64 * N + n) * H + h) * C * C + own[:, None] * C + own[None, :]
    tl.store(to, a_cc.to(out.dtype.element_ty))


@triton.jit(do_not_specialize=["T", "N"])
def outputs(
    a, y, x, g, state, documents, chosen, out,
    syb, syt, syh, sxb, sxt, sxh, sgb, sgt, sgh, T, N, H, HY, HX,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, LEVELS: tl.constexpr,
    REVERSE: tl.constexpr, DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """``A v + (start q) S``, or, in reverse, the gradient of v: ``A^T dy + (end k) dS``."""
    BLOCKS_V: tl.constexpr = (V + BV - 1) // BV
    b, h, n, block = place(N, H, BLOCKS_V)
    own = tl.arange(0, C)
    at = n * C + own
    value = block * BV + tl.arange(0, BV)
    b64 = b.to(tl.int64)
    row = (b64 * N + n) * H + h
    x += b64 * sxb + (h // (H // HX)).to(tl.int64) * sxh
    g += b64 * sgb + h * sgh
    y_cv = tile(y + b64 * syb + (h // (H // HY)).to(tl.int64) * syh, syt, n, T, value, V, C)
    if REVERSE:
        a_cc = tl.load(a + row * C * C + own[None, :] * C + own[:, None])
    else:
        a_cc = tl.load(a + row * C * C + own[:, None] * C + own[None, :])
    made = product(a_cc, y_cv, None, PRECISION)
    counted = mask(chosen, LEVELS + 1 if REVERSE else LEVELS, C)
    if DOCUMENTS:
        seen = border(documents, b, n, T, at, REVERSE, C)
    for first in range(0, K, BK):
        key = first + tl.arange(0, BK)
        factor = tl.exp(summed(counted, decays(g, sgt, n, T, key, K, C), SUMS))
        if DOCUMENTS:
            factor = tl.where(seen[:, None], factor, 0.0)
        x_ck = (tile(x, sxt, n, T, key, K, C) * factor).to(y_cv.dtype)
        inside = (key < K)[:, None] & (value < V)[None, :]
        s_kv = tl.load(state + row * K * V + key[:, None] * V + value[None, :], mask=inside, other=0.0)
        made = product(x_ck, s_kv, made, PRECISION)
    out += ((b64 * T + n * C) * H + h) * V
    inside = (at < T)[:, None] & (value < V)[None, :]
    tl.store(out + own[:, None] * H * V + value[None, :], made.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "N"])
def gradients(
    q, k, v, g, dy, documents, chosen, across, before, after, dq, dk, dg,
    sqb, sqt, sqh, skb, skt, skh, svb, svt, svh, sgb, sgt, sgh, sdb, sdt, sdh, T, N, H, HQ, HK, HV,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, LEVELS: tl.constexpr,
    DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Gradients of q, k and g for a chunk and some key channels.

    A log decay's gradient is the sum over all pairs that it stands between, formed pair by pair within levels and
    across the chunk's ends: no two large sums are subtracted.
    """
    b, h, n, block = place(N, H, (K + BK - 1) // BK)
    own = tl.arange(0, C)
    at = n * C + own
    key = block * BK + tl.arange(0, BK)
    b64 = b.to(tl.int64)
    row = (b64 * N + n) * H + h
    v += b64 * svb + (h // (H // HV)).to(tl.int64) * svh
    dy += b64 * sdb + h * sdh
    da_cc = tl.zeros([C, C], tl.float32)
    same_c = tl.zeros([C], tl.float32)
    dq_ck = tl.zeros([C, BK], tl.float32)
    dk_ck = tl.zeros([C, BK], tl.float32)
    through_k = tl.zeros([BK], tl.float32)
    for first in range(0, V, BV):
        value = first + tl.arange(0, BV)
        v_cv = tile(v, svt, n, T, value, V, C)
        dy_cv = tile(dy, sdt, n, T, value, V, C)
        inside = (key < K)[:, None] & (value < V)[None, :]
        s_kv = tl.load(before + row * K * V + key[:, None] * V + value[None, :], mask=inside, other=0.0)
        ds_kv = tl.load(after + row * K * V + key[:, None] * V + value[None, :], mask=inside, other=0.0)
        da_cc = product(dy_cv, tl.trans(v_cv), da_cc, PRECISION)
        dq_ck = product(dy_cv, tl.trans(s_kv), dq_ck, PRECISION)
        dk_ck = product(v_cv, tl.trans(ds_kv), dk_ck, PRECISION)
        same_c += tl.sum(dy_cv.to(tl.float32) * v_cv.to(tl.float32), 1)
        through_k += tl.sum(s_kv.to(tl.float32) * ds_kv.to(tl.float32), 1)
    g_ck = decays(g + b64 * sgb + h * sgh, sgt, n, T, key, K, C)
    q_ck = tile(q + b64 * sqb + (h // (H // HQ)).to(tl.int64) * sqh, sqt, n, T, key, K, C)
    k_ck = tile(k + b64 * skb + (h // (H // HK)).to(tl.int64) * skh, skt, n, T, key, K, C)
    dtype = q_ck.dtype
    before_cc, behind_cc = mask(chosen, LEVELS, C), mask(chosen, LEVELS + 1, C)
    start_ck = tl.exp(summed(before_cc, g_ck, SUMS))
    end_ck = tl.exp(summed(behind_cc, g_ck, SUMS))
    if DOCUMENTS:
        start_ck = tl.where(border(documents, b, n, T, at, False, C)[:, None], start_ck, 0.0)
        end_ck = tl.where(border(documents, b, n, T, at, True, C)[:, None], end_ck, 0.0)
        document = tl.load(documents + b64 * T + tl.minimum(at, T - 1))
        da_cc = tl.where(document[:, None] == document[None, :], da_cc, 0.0)
    dq_ck *= start_ck
    dk_ck *= end_ck
    through_k *= tl.load(across + row * K + key, mask=key < K, other=0.0)
    dg_ck = tl.zeros([C, BK], tl.float32) + through_k[None, :]
    # The transposes of the sums above: a decay stands between the chunk's start and what follows it, and so on.
    dg_ck = product(tl.trans(before_cc), (q_ck * dq_ck).to(dtype), dg_ck, PRECISION)
    dg_ck = product(tl.trans(behind_cc), (k_ck * dk_ck).to(dtype), dg_ck, PRECISION)
    dq_ck += same_c[:, None] * k_ck
    dk_ck += same_c[:, None] * q_ck
    apart = own[:, None] ^ own[None, :]
    da_cc = da_cc.to(dtype)
    da_cc = tl.where(own[:, None] > own[None, :], da_cc, tl.trans(da_cc))
    for level in range(LEVELS):
        asks = ((own >> level) & 1) == 1
        counted = mask(chosen, level, C)
        factor = tl.exp(summed(counted, g_ck, SUMS))
        p_ck = (tl.where(asks[:, None], q_ck, k_ck) * factor).to(dtype)
        pairs_cc = tl.where((apart >> level) == 1, da_cc, 0.0).to(dtype)
        dp_ck = product(pairs_cc, p_ck, None, PRECISION)
        dq_ck += tl.where(asks[:, None], dp_ck * factor, 0.0)
        dk_ck += tl.where(asks[:, None], 0.0, dp_ck * factor)
        dg_ck = product(tl.trans(counted), (dp_ck * p_ck).to(dtype), dg_ck, PRECISION)
    first = ((b64 * T + n * C) * H + h) * K
    to = own[:, None] * H * K + key[None, :]
    inside = (at < T)[:, None] & (key < K)[None, :]
    tl.store(dq + first + to, dq_ck.to(dq.dtype.element_ty), mask=inside)
    tl.store(dk + first + to, dk_ck.to(dk.dtype.element_ty), mask=inside)
    tl.store(dg + first + to, dg_ck, mask=inside)
