"""The gated delta rule in Triton, backward: the gradient of the state swept in reverse, then chunks at once.

With the names of the forward kernels, ``dS`` the gradient of the state after a chunk, and

    dU = P^T dy + end (k dS)        D = A^T dU

the gradient of the state before it is ``across dS + q^T (start dy) - k^T (start beta D)``; and as the inverse's own
gradient is ``-D U^T`` under the diagonal, the chunk's inputs need no other solve:

    dv = beta D        d(q k^T) = pair (dy U^T)        d(k k^T) = -beta pair (D U^T), strictly lower
"""

from __future__ import annotations

import triton
import triton.language as tl

from subquad.ops.gdn.kernels import (
    BETA,
    END,
    REST,
    START,
    SUM,
    documents_of,
    factor,
    last,
    pairs,
    product,
    square,
    tokens,
)


@triton.jit(do_not_specialize=["T", "chunks", "segments", "span", "skipped", "H", "HQ", "HK", "HV"])
def reverse(
    q_ptr, k_ptr, dy_ptr, a_ptr, p_ptr, factors_ptr, dfinal_ptr, ends_ptr, dstate_ptr, dstates_ptr, d_ptr,
    T, chunks, segments, span, skipped, H, HQ, HK, q_b, q_t, q_h, k_b, k_t, k_h, dy_b, dy_t, dy_h,
    K: tl.constexpr, V: tl.constexpr, K2: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A segment from its end: every chunk's dS and D, or (not KEEP) the part of dS before it that starts in it."""
    first = tl.program_id(0) * BV
    segment = tl.program_id(1) + skipped
    bh = tl.program_id(2).to(tl.int64)
    b, h = bh // H, bh % H
    row, column = first + tl.arange(0, BV), tl.arange(0, K2)
    inside = (row < V)[:, None] & (column < K)[None, :]
    ends_ptr += bh * (segments - 1) * V * K + row[:, None] * K + column[None, :]
    if segment == segments - 1:
        state_at = dfinal_ptr + bh * K * V + column[None, :] * V + row[:, None]
        state = tl.load(state_at, mask=inside, other=0.0).to(tl.float32)
    elif KEEP:
        state = tl.load(ends_ptr + segment * V * K, mask=inside, other=0.0)
    else:
        state = tl.zeros((BV, K2), tl.float32)
    q_ptr += b * q_b + (h // (H // HQ)) * q_h
    k_ptr += b * k_b + (h // (H // HK)) * k_h
    dy_ptr += b * dy_b + h * dy_h
    i = tl.arange(0, C)
    begin, stop = segment * span, tl.minimum(segment * span + span, chunks)
    for step in range(begin, stop):
        chunk = stop - 1 - (step - begin)
        t0 = chunk * tl.full((), C, tl.int64)
        left = T - chunk * C
        at = bh * chunks + chunk
        q = tokens(q_ptr + t0 * q_t, q_t, left, 0, K, C, K2)
        k = tokens(k_ptr + t0 * k_t, k_t, left, 0, K, C, K2)
        dy = tl.trans(tokens(dy_ptr + t0 * dy_t, dy_t, left, first, V, C, BV))
        a, p = square(a_ptr + at * C * C, C), square(p_ptr + at * C * C, C)
        start, end = factor(factors_ptr + at * 5 * C, START, C), factor(factors_ptr + at * 5 * C, END, C)
        beta = factor(factors_ptr + at * 5 * C, BETA, C)
        across = last(start, C)
        if KEEP:
            dstates_at = dstates_ptr + at * V * K + row[:, None] * K + column[None, :]
            tl.store(dstates_at, state.to(dstates_ptr.dtype.element_ty), mask=inside)
        du = product(state.to(k.dtype), tl.trans(k), PRECISION) * end[None, :]
        du = product(dy, p, PRECISION, acc=du)
        d = product(du.to(a.dtype), a, PRECISION)
        if KEEP:
            d_at = d_ptr + at * V * C + row[:, None] * C + i[None, :]
            tl.store(d_at, d.to(d_ptr.dtype.element_ty), mask=(row < V)[:, None])
        early = (dy.to(tl.float32) * start[None, :]).to(q.dtype)
        state = product(early, q, PRECISION, acc=state * across)
        state = product((-d * (start * beta)[None, :]).to(k.dtype), k, PRECISION, acc=state)
    if not KEEP:
        tl.store(ends_ptr + (segment - 1) * V * K, state, mask=inside)
    elif segment == 0:
        tl.store(dstate_ptr + bh * K * V + column[None, :] * V + row[:, None], state, mask=inside)


@triton.jit
def turned(ptr, first, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr):
    """Load ``[BV, C]`` of a chunk's ``[v, C]``."""
    row = first + tl.arange(0, BV)
    at = ptr + row[:, None] * C + tl.arange(0, C)[None, :]
    if V % BV == 0:
        return tl.load(at)
    return tl.load(at, mask=(row < V)[:, None], other=0.0)


@triton.jit
def part(ptr, first, second, V: tl.constexpr, K: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr):
    """Load ``[BV, BK]`` of a state ``[v, k]``."""
    row, column = first + tl.arange(0, BV), second + tl.arange(0, BK)
    at = ptr + row[:, None] * K + column[None, :]
    if V % BV == 0 and K % BK == 0:
        return tl.load(at)
    return tl.load(at, mask=(row < V)[:, None] & (column < K)[None, :], other=0.0)


@triton.jit(do_not_specialize=["T", "chunks", "H", "HQ", "HK", "HV"])
def gradients(
    q_ptr, k_ptr, v_ptr, dy_ptr, documents_ptr, factors_ptr, states_ptr, dstates_ptr, u_ptr, d_ptr,
    dq_ptr, dk_ptr, dv_ptr, dg_ptr, dbeta_ptr,
    T, chunks, H, HQ, HK, HV, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, dy_b, dy_t, dy_h,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, DOCUMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a chunk's inputs, for one of the h heads each.

    That of a log decay sums over what passes it by: pairs of tokens, what the tokens before it leave to the state
    behind the chunk, what the tokens from it on read of the state before the chunk, and the state itself. No sum leaves
    the chunk, so that its rounding does not grow with the sequence.
    """
    chunk = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    at = bh * chunks + chunk
    t0 = chunk.to(tl.int64) * C
    left = T - chunk * C
    i = tl.arange(0, C)
    q_ptr += b * q_b + (h // (H // HQ)) * q_h + t0 * q_t
    k_ptr += b * k_b + (h // (H // HK)) * k_h + t0 * k_t
    v_ptr += b * v_b + (h // (H // HV)) * v_h + t0 * v_t
    dy_ptr += b * dy_b + h * dy_h + t0 * dy_t
    u_ptr += at * V * C
    d_ptr += at * V * C
    states_ptr += at * V * K
    dstates_ptr += at * V * K
    factors_ptr += at * 5 * C
    token = (b * T + t0 + i) * H + h
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    start, end = factor(factors_ptr, START, C), factor(factors_ptr, END, C)
    beta, sums = factor(factors_ptr, BETA, C), factor(factors_ptr, SUM, C)

    # Where all channels of a value fit at once, they stay for the states below.
    WHOLE: tl.constexpr = BV >= V
    dqk = tl.zeros((C, C), tl.float32)
    dkk = tl.zeros((C, C), tl.float32)
    dbeta = tl.zeros((C,), tl.float32)
    if WHOLE:
        dy = tokens(dy_ptr, dy_t, left, 0, V, C, BV)
        u, d = turned(u_ptr, 0, V, BV, C), turned(d_ptr, 0, V, BV, C)
    for first in range(0, V, BV):
        if not WHOLE:
            dy = tokens(dy_ptr, dy_t, left, first, V, C, BV)
            u, d = turned(u_ptr, first, V, BV, C), turned(d_ptr, first, V, BV, C)
        dqk = product(dy, u, PRECISION, acc=dqk)
        dkk = product(tl.trans(d), u, PRECISION, acc=dkk)
        v = tokens(v_ptr, v_t, left, first, V, C, BV)
        own = tl.trans(d).to(tl.float32)
        dbeta += tl.sum(own * v.to(tl.float32), axis=1)
        channel = first + tl.arange(0, BV)
        dv = (beta[:, None] * own).to(dv_ptr.dtype.element_ty)
        tl.store(dv_ptr + token[:, None] * V + channel[None, :], dv, mask=(i < left)[:, None] & (channel < V)[None, :])
    kk = tl.zeros((C, C), tl.float32)
    qk = tl.zeros((C, C), tl.float32)
    for first in range(0, K, BK):
        k = tokens(k_ptr, k_t, left, first, K, C, BK)
        q = tokens(q_ptr, q_t, left, first, K, C, BK)
        kk = product(k, tl.trans(k), PRECISION, acc=kk)
        qk = product(q, tl.trans(k), PRECISION, acc=qk)
    WIDE: tl.constexpr = dtype == tl.float32
    rest = factor(factors_ptr, REST, C) if WIDE else sums
    ids = documents_of(documents_ptr, b, chunk, T, C, DOCUMENTS)
    pair = pairs(sums, rest, ids, C, WIDE)
    dqk *= pair
    dkk = tl.where(i[:, None] > i[None, :], -dkk * pair, 0.0)
    dbeta += tl.sum(dkk * kk, axis=1)
    dkk *= beta[:, None]
    # A token's pair with itself knows no decay; left in, it would cancel only up to rounding.
    between = tl.where(i[:, None] > i[None, :], dqk * qk + dkk * kk, 0.0)
    after = tl.sum(between, axis=1) - tl.sum(tl.trans(between), axis=1)
    before = tl.zeros((C,), tl.float32)
    crossed = 0.0
    dkq = tl.trans(dqk).to(dtype)
    dqk = dqk.to(dtype)
    dkk = (dkk + tl.trans(dkk)).to(dtype)

    for first in range(0, K, BK):
        dq = tl.zeros((C, BK), tl.float32)
        replaced = tl.zeros((C, BK), tl.float32)
        kept = tl.zeros((C, BK), tl.float32)
        for second in range(0, V, BV):
            state = part(states_ptr, second, first, V, K, BV, BK)
            dstate = part(dstates_ptr, second, first, V, K, BV, BK)
            if not WHOLE:
                dy = tokens(dy_ptr, dy_t, left, second, V, C, BV)
                u, d = turned(u_ptr, second, V, BV, C), turned(d_ptr, second, V, BV, C)
            dq = product(dy, state, PRECISION, acc=dq)
            replaced = product(tl.trans(d), state, PRECISION, acc=replaced)
            kept = product(tl.trans(u), dstate, PRECISION, acc=kept)
            crossed += tl.sum(tl.sum(state.to(tl.float32) * dstate.to(tl.float32), axis=1), axis=0)
        k = tokens(k_ptr, k_t, left, first, K, C, BK)
        q = tokens(q_ptr, q_t, left, first, K, C, BK)
        dq *= start[:, None]
        kept *= end[:, None]
        replaced *= start[:, None]
        wide = k.to(tl.float32)
        by_key = tl.sum(replaced * wide, axis=1)
        dbeta -= by_key
        after += tl.sum(dq * q.to(tl.float32), axis=1) - beta * by_key
        before += tl.sum(kept * wide, axis=1)
        dq = product(dqk, k, PRECISION, acc=dq)
        dk = product(dkq, q, PRECISION, acc=kept - beta[:, None] * replaced)
        dk = product(dkk, k, PRECISION, acc=dk)
        column = first + tl.arange(0, BK)
        to = token[:, None] * K + column[None, :]
        inside = (i < left)[:, None] & (column < K)[None, :]
        tl.store(dq_ptr + to, dq.to(dq_ptr.dtype.element_ty), mask=inside)
        tl.store(dk_ptr + to, dk.to(dk_ptr.dtype.element_ty), mask=inside)
    dg = tl.cumsum(after, axis=0, reverse=True) + tl.cumsum(before, axis=0) - before + last(start, C) * crossed
    tl.store(dg_ptr + token, dg, mask=i < left)
    tl.store(dbeta_ptr + token, dbeta, mask=i < left)
