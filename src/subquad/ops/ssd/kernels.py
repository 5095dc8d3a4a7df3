"""Triton kernels of SSD: the states between chunks, outputs and gradients of chunks.

Tokens are cut into chunks of C. A segment is a run of chunks that one program walks with the state in registers. Where
the walk starts from zero, the state before a chunk is what it wrote there and, decayed by `passed`, the state that its
segment met.

Sizes: T tokens, H heads, BH batch times heads, ``chunks`` a segment, ``slots`` segments; RQ, RK and RV are how many
heads share one of q, k and v. Strides end in ``_b``, ``_t`` and ``_h``. Decays are powers of 2.
"""

import triton
import triton.language as tl

from subquad.ops import backends

# The interpreter multiplies the bits of bfloat16 as integers; there, products are taken of the numbers in float32.
INTERPRETED = tl.constexpr(backends.interpreted())

# Sizes that vary from call to call; kernels are never compiled again for them.
_SIZES = ["T", "H", "BH", "chunks", "slots", "groups", "RQ", "RK", "RV", "RX", "RU", "g_b", "g_t", "g_h"]


@triton.jit
def _dot(a, b, sums, PRECISION: tl.constexpr):
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision=PRECISION)


@triton.jit
def _load(base, first, T, stride, column, WIDTH: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    """Rows ``first`` to ``first + C`` and columns from `column` on; zeros beyond either end."""
    i, x = tl.arange(0, C), column + tl.arange(0, BLOCK)
    here = (first + i < T)[:, None] & (x < WIDTH)[None, :]
    return tl.load(base + first.to(tl.int64) * stride + i[:, None] * stride + x[None, :], mask=here, other=0.0)


@triton.jit
def _store(base, first, T, stride, column, tile, WIDTH: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    i, x = tl.arange(0, C), column + tl.arange(0, BLOCK)
    here = (first + i < T)[:, None] & (x < WIDTH)[None, :]
    to = base + first.to(tl.int64) * stride + i[:, None] * stride + x[None, :]
    tl.store(to, tile.to(base.dtype.element_ty), mask=here)


@triton.jit
def _state(base, index, row, column, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """Pointers and mask of a block of state number `index` in a contiguous ``[..., K, V]``."""
    y, x = row + tl.arange(0, BK), column + tl.arange(0, BV)
    here = (y < K)[:, None] & (x < V)[None, :]
    return base + index.to(tl.int64) * (K * V) + y[:, None] * V + x[None, :], here


@triton.jit
def _met(between, passed, entering, number, met, row, column,
         K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):  # fmt: skip
    """A block of the state that chunk `number` meets, in a segment that met state number `met`."""
    at, here = _state(between, number, row, column, K, V, BK, BV)
    to, _ = _state(entering, met, row, column, K, V, BK, BV)
    state = tl.load(at, mask=here, other=0.0).to(tl.float32)
    state += tl.load(passed + number) * tl.load(to, mask=here, other=0.0).to(tl.float32)
    return state.to(between.dtype.element_ty)


@triton.jit
def _decays(g, documents, first, T, g_t, C: tl.constexpr, EXACT: tl.constexpr, DOCUMENTS: tl.constexpr):
    """Of one chunk: cumulative log decay in two parts, factors from the start, to the end and across, and documents.

    EXACT sums in float64, since differences of long sums cancel; the second part is what float32 loses of the first.
    """
    t = first + tl.arange(0, C)
    log = tl.load(g + t.to(tl.int64) * g_t, mask=t < T, other=0.0).to(tl.float32)
    # Not a maximum, which drops NaN. exp of the bound is 0 as far as float32 sums can tell.
    log = tl.where(log < -100.0, -100.0, log)
    if EXACT:
        log = log.to(tl.float64)
    log *= 1.4426950408889634
    sums, whole = tl.cumsum(log, 0), tl.sum(log, 0)
    end, across = tl.exp2((whole - sums).to(tl.float32)), tl.exp2(whole.to(tl.float32))
    high = sums.to(tl.float32)
    low, start = (sums - high).to(tl.float32), tl.exp2(high)
    document = t
    if DOCUMENTS:
        document = tl.load(documents + tl.minimum(t, T - 1))
        last = tl.load(documents + tl.minimum(first + C, T) - 1)
        before = tl.where(first > 0, tl.load(documents + tl.maximum(first, 1) - 1), 0)
        start = tl.where(document == before, start, 0.0)
        end = tl.where(document == last, end, 0.0)
        across = tl.where(last == before, across, 0.0)
    return high, low, start, end, across, document


@triton.jit(do_not_specialize=_SIZES)
def states(
    x, u, g, documents, between, passed, leaving, decay, T, H, BH, chunks, slots, RX, RU,
    x_b, x_t, x_h, u_b, u_t, u_h, g_b, g_t, g_h,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    DOCUMENTS: tl.constexpr, REVERSE: tl.constexpr, BETWEEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk one segment from zero: ``S = across S + sum_j x_j u_j^T``, each term decayed to the end of its chunk.

    In reverse the walk goes from the last chunk to the first, with terms decayed to the start of their chunk: that is
    the gradient of the state, for x = q and u = dy. Segments are counted in the direction of the walk.

    Writes each segment's state to `leaving` ``[slots, BH, K, V]`` and its factor to `decay` ``[slots, BH]``; with
    BETWEEN also the state that each chunk meets to `between` ``[BH, chunks of the sequence, K, V]`` and the factor from
    the segment's start to there to `passed` ``[BH, chunks of the sequence]``.
    """
    blocks: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0)
    column = program % blocks * BV
    slot = program // blocks % slots
    bh = program // blocks // slots
    b, h = (bh // H).to(tl.int64), bh % H
    x += b * x_b + (h // RX).to(tl.int64) * x_h
    u += b * u_b + (h // RU).to(tl.int64) * u_h
    g += b * g_b + h * g_h
    documents += b * T
    exact: tl.constexpr = x.dtype.element_ty == tl.float32
    total = tl.cdiv(T, C)
    begin = slot * chunks
    if REVERSE:
        # The last segment in time comes first and may be short.
        begin = ((total + chunks - 1) // chunks - 1 - slot) * chunks
    count = tl.minimum(chunks, total - begin)
    state = tl.zeros((BK, BV), tl.float32)
    factor = 1.0
    for i in range(0, count):
        n = begin + i
        if REVERSE:
            n = begin + count - 1 - i
        if BETWEEN:
            at, here = _state(between, bh * total + n, 0, column, K, V, BK, BV)
            tl.store(at, state.to(between.dtype.element_ty), mask=here)
            if column == 0:
                tl.store(passed + bh * total + n, factor)
        x_ck = _load(x, n * C, T, x_t, 0, K, C, BK)
        u_cv = _load(u, n * C, T, u_t, column, V, C, BV)
        _, _, start, end, across, _ = _decays(g, documents, n * C, T, g_t, C, exact, DOCUMENTS)
        if REVERSE:
            end = start
        left_cv = (u_cv * end[:, None]).to(u_cv.dtype)
        state = _dot(tl.trans(x_ck), left_cv, state * across, PRECISION)
        factor *= across
    to, inside = _state(leaving, slot * BH + bh, 0, column, K, V, BK, BV)
    tl.store(to, state, mask=inside)
    if column == 0:
        tl.store(decay + slot * BH + bh, factor)


@triton.jit(do_not_specialize=_SIZES)
def combine(added, decay, first, entering, last, BH, slots, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The states that segments meet, `entering`, from what each adds; `last` takes the state after them all."""
    blocks: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    bh = tl.program_id(0) // blocks
    x = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    state = tl.load(first + bh.to(tl.int64) * SIZE + x, mask=x < SIZE, other=0.0)
    for slot in range(0, slots):
        at = (bh.to(tl.int64) + slot * BH) * SIZE + x
        tl.store(entering + at, state.to(entering.dtype.element_ty), mask=x < SIZE)
        state = tl.load(decay + slot * BH + bh) * state + tl.load(added + at, mask=x < SIZE, other=0.0)
    tl.store(last + bh.to(tl.int64) * SIZE + x, state, mask=x < SIZE)


@triton.jit(do_not_specialize=_SIZES)
def outputs(
    q, k, v, g, documents, entering, y, last, T, H, BH, chunks, slots, RQ, RK, RV,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk one segment from the state it meets and write its outputs; the last segment writes the state after it."""
    blocks: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0)
    column = program % blocks * BV
    slot = program // blocks % slots
    bh = program // blocks // slots
    b, h = (bh // H).to(tl.int64), bh % H
    q += b * q_b + (h // RQ).to(tl.int64) * q_h
    k += b * k_b + (h // RK).to(tl.int64) * k_h
    v += b * v_b + (h // RV).to(tl.int64) * v_h
    y += (b * T * H + h) * V
    g += b * g_b + h * g_h
    documents += b * T
    at, here = _state(entering, slot * BH + bh, 0, column, K, V, BK, BV)
    state = tl.load(at, mask=here, other=0.0).to(tl.float32)
    exact: tl.constexpr = q.dtype.element_ty == tl.float32
    c = tl.arange(0, C)
    begin = slot * chunks
    for i in range(0, tl.minimum(chunks, tl.cdiv(T, C) - begin)):
        n = begin + i
        q_ck = _load(q, n * C, T, q_t, 0, K, C, BK)
        k_ck = _load(k, n * C, T, k_t, 0, K, C, BK)
        v_cv = _load(v, n * C, T, v_t, column, V, C, BV)
        sums, low, start, end, across, document = _decays(g, documents, n * C, T, g_t, C, exact, DOCUMENTS)
        # The state first, so that registers hold little beside it when the scores come.
        y_cv = _dot(q_ck, state.to(q_ck.dtype), None, PRECISION) * start[:, None]
        left_cv = (v_cv * end[:, None]).to(v_cv.dtype)
        state = _dot(tl.trans(k_ck), left_cv, state * across, PRECISION)
        seen = c[:, None] >= c[None, :]
        if DOCUMENTS:
            seen = seen & (document[:, None] == document[None, :])
        scores = _dot(q_ck, tl.trans(k_ck), None, PRECISION)
        apart = sums[:, None] - sums[None, :]
        if exact:
            apart += low[:, None] - low[None, :]
        scores *= tl.exp2(tl.where(seen, apart, float("-inf")))
        y_cv += _dot(scores.to(v_cv.dtype), v_cv, None, PRECISION)
        _store(y, n * C, T, H * V, column, y_cv, V, C, BV)
    if slot == slots - 1:
        to, inside = _state(last, bh, 0, column, K, V, BK, BV)
        tl.store(to, state, mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def gradients(
    q, k, v, g, dy, documents, between, passed, entering, dbetween, dpassed, dentering, dq, dk, dv, dg,
    T, H, BH, chunks, groups, RQ, RK, RV,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, dy_b, dy_t, dy_h, g_b, g_t, g_h,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr, GROUPED: tl.constexpr, DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one chunk, COLUMNS columns each, from the state before it and the gradient of the state after it.

    A program takes all heads of one of `groups`, whose keys and values are the same, and adds up their gradients;
    several heads need all columns in one program. Each program adds its share to its own of ``dg [programs, B, T, H]``.
    Pairs of tokens are laid out ``[j, i]``: j writes, i reads.
    """
    total = tl.cdiv(T, C)
    block = tl.program_id(0) % BLOCKS
    column = block * COLUMNS
    programs = BH // H * groups
    bg, n = tl.program_id(0) // BLOCKS % programs, tl.program_id(0) // BLOCKS // programs
    first = n * C
    b, group = (bg // groups).to(tl.int64), bg % groups
    # Segments of the gradients' walk are counted from the end.
    segments = (total + chunks - 1) // chunks
    documents += b * T
    exact: tl.constexpr = q.dtype.element_ty == tl.float32
    c = tl.arange(0, C)
    dk_cx = tl.zeros((C, COLUMNS), tl.float32)
    dv_cx = tl.zeros((C, COLUMNS), tl.float32)
    for r in range(0, H // groups if GROUPED else 1):
        h = group * (H // groups) + r
        bh = bg // groups * H + h
        number, met, dmet = bh * total + n, n // chunks * BH + bh, (segments - 1 - n // chunks) * BH + bh
        q_h_, k_h_ = q + b * q_b + (h // RQ).to(tl.int64) * q_h, k + b * k_b + (h // RK).to(tl.int64) * k_h
        v_h_, dy_h_ = v + b * v_b + (h // RV).to(tl.int64) * v_h, dy + b * dy_b + h.to(tl.int64) * dy_h
        # All that comes from far is asked for before anything is computed.
        q_ck = _load(q_h_, first, T, q_t, 0, K, C, BK)
        k_ck = _load(k_h_, first, T, k_t, 0, K, C, BK)
        v_cv = _load(v_h_, first, T, v_t, 0, V, C, BV)
        dy_cv = _load(dy_h_, first, T, dy_t, 0, V, C, BV)
        dstate_xv = _met(dbetween, dpassed, dentering, number, dmet, column, 0, K, V, COLUMNS, BV)
        state_xv = _met(between, passed, entering, number, met, column, 0, K, V, COLUMNS, BV)
        if BK == COLUMNS and BV == COLUMNS:
            q_cx, k_cx, dy_cx, dstate_kx = q_ck, k_ck, dy_cv, dstate_xv
        else:
            dstate_kx = _met(dbetween, dpassed, dentering, number, dmet, 0, column, K, V, BK, COLUMNS)
        g_h_ = g + b * g_b + h * g_h
        sums, low, start, end, across, document = _decays(g_h_, documents, first, T, g_t, C, exact, DOCUMENTS)
        through = across * tl.sum(tl.sum(state_xv.to(tl.float32) * dstate_xv.to(tl.float32), 1), 0)
        seen = c[:, None] <= c[None, :]
        if DOCUMENTS:
            seen = seen & (document[:, None] == document[None, :])
        apart = sums[None, :] - sums[:, None]
        if exact:
            apart += low[None, :] - low[:, None]
        pair = tl.exp2(tl.where(seen, apart, float("-inf")))
        # Products are added up apart where one could be the other's sums: a chain of products is laid out for as many
        # rows as there are warps.
        scores = _dot(k_ck, tl.trans(q_ck), None, PRECISION) * pair
        dv_cx += _dot(k_ck, dstate_kx, None, PRECISION) * end[:, None]
        if BK != COLUMNS or BV != COLUMNS:
            # The same rows again, from the cache.
            q_cx = _load(q_h_, first, T, q_t, column, K, C, COLUMNS)
            k_cx = _load(k_h_, first, T, k_t, column, K, C, COLUMNS)
            dy_cx = _load(dy_h_, first, T, dy_t, column, V, C, COLUMNS)
        dv_cx += _dot(scores.to(dy_cx.dtype), dy_cx, None, PRECISION)
        dscores = _dot(v_cv, tl.trans(dy_cv), None, PRECISION)
        # The log decay of token t counts in every product of a writer before t and a reader from t on. Only these are
        # added up, chunk by chunk: sums over the whole sequence would cancel. The first block has the pairs inside.
        share = tl.where((c[:, None] == c[None, :]) | (block > 0), 0.0, scores * dscores)
        read = tl.sum(share, 0) - tl.sum(share, 1)
        dscores = (dscores * pair).to(q_ck.dtype)
        later_cx = _dot(v_cv, tl.trans(dstate_xv), None, PRECISION) * end[:, None]
        written = tl.sum(later_cx * k_cx.to(tl.float32), 1)
        dk_cx += later_cx + _dot(dscores, q_cx, None, PRECISION)
        dq_cx = _dot(dy_cv, tl.trans(state_xv), None, PRECISION) * start[:, None]
        read += tl.sum(dq_cx * q_cx.to(tl.float32), 1)
        dq_cx += _dot(tl.trans(dscores), k_cx, None, PRECISION)
        _store(dq + (b * T * H + h) * K, first, T, H * K, column, dq_cx, K, C, COLUMNS)
        dg_c = tl.cumsum(read, 0, reverse=True) + (tl.cumsum(written, 0) - written) + through
        row = (block.to(tl.int64) * (BH // H) + b) * T + first + c
        tl.store(dg + row * H + h, dg_c, mask=first + c < T)
    _store(dk + (b * T * groups + group) * K, first, T, groups * K, column, dk_cx, K, C, COLUMNS)
    _store(dv + (b * T * groups + group) * V, first, T, groups * V, column, dv_cx, V, C, COLUMNS)
