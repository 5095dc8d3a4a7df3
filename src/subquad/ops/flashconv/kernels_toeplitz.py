"""The long convolution's kernels: Toeplitz tiles against tiles of inputs on the tensor cores, and their correlation.

Time is cut into n tiles of C tokens. The filter's part between tiles ``delta`` apart is one Toeplitz matrix
``T_rs = k_{delta C + r - s}``, the same for all pairs of such tiles and all rows of the batch: so a tile of a row is a
column, columns are multiplied side by side, and the products of one delta share one matrix, built from a slice of k.
Inputs are packed channels first, ``[d, n, b, C]``: the column ``delta`` tiles before column x is ``x - delta b``.

Documents never decrease along a row. Two tokens in different tiles are of one document if both are of the document of
the later tile's first token: a mask of inputs and one of outputs. Within a tile, pairs are sorted by the highest bit in
which their places differ, and the first token of the right block of a pair plays that part.
"""

import triton
import triton.language as tl

from subquad.ops import backends

# The interpreter multiplies the bits of bfloat16 as integers: there, products are of the same numbers in float32.
INTERPRETED = tl.constexpr(backends.interpreted())


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr):
    """``total + a @ b``."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit(do_not_specialize=["T", "N"])
def pack(
    x, gate, out, sxb, sxt, sgb, sgt, B, T, N, D,
    GATE: tl.constexpr, REVERSE: tl.constexpr, C: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """``x gate``, or x alone, from ``[b, t, d]`` to ``[d, n, b, C]``, zeros behind the end; in reverse, backwards."""
    n, b = tl.program_id(0) % N, tl.program_id(0) // N
    channel = tl.program_id(1) * BD + tl.arange(0, BD)
    own = tl.arange(0, C)
    at = n * C + own
    token = T - 1 - at if REVERSE else at
    inside = (at < T)[:, None] & (channel < D)[None, :]
    b64, token = b.to(tl.int64), token.to(tl.int64)
    made = tl.load(x + b64 * sxb + token[:, None] * sxt + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    if GATE:
        made *= tl.load(gate + b64 * sgb + token[:, None] * sgt + channel[None, :], mask=inside, other=0.0).to(
            tl.float32
        )
    to = out + ((channel.to(tl.int64) * N + n) * B + b) * C
    tl.store(to[None, :] + own[:, None], made.to(out.dtype.element_ty), mask=(channel < D)[None, :])


@triton.jit(do_not_specialize=["T", "N"])
def unpack(
    packed, x, gate, bias, one, two, y, z, sxb, sxt, sgb, sgt, s1b, s1t, s2b, s2t, B, T, N, D,
    GATE: tl.constexpr, BIAS: tl.constexpr, ONE: tl.constexpr, TWO: tl.constexpr, REVERSE: tl.constexpr,
    C: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """``w = packed + bias x gate`` back in ``[b, t, d]``: ``y = w one``, and ``z = w two`` where both are wanted."""
    n, b = tl.program_id(0) % N, tl.program_id(0) // N
    channel = tl.program_id(1) * BD + tl.arange(0, BD)
    own = tl.arange(0, C)
    at = n * C + own
    token = T - 1 - at if REVERSE else at
    inside = (at < T)[:, None] & (channel < D)[None, :]
    b64, token = b.to(tl.int64), token.to(tl.int64)
    came = packed + ((channel.to(tl.int64) * N + n) * B + b) * C
    made = tl.load(came[None, :] + own[:, None], mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        direct = tl.load(x + b64 * sxb + token[:, None] * sxt + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        if GATE:
            direct *= tl.load(gate + b64 * sgb + token[:, None] * sgt + channel[None, :], mask=inside, other=0.0)
        made += tl.load(bias + channel, mask=channel < D, other=0.0).to(tl.float32)[None, :] * direct
    to = (b64 * T + token)[:, None] * D + channel[None, :]
    first = made
    if ONE:
        first = made * tl.load(one + b64 * s1b + token[:, None] * s1t + channel[None, :], mask=inside, other=0.0)
    tl.store(y + to, first.to(y.dtype.element_ty), mask=inside)
    if TWO:
        second = made * tl.load(two + b64 * s2b + token[:, None] * s2t + channel[None, :], mask=inside, other=0.0)
        tl.store(z + to, second.to(z.dtype.element_ty), mask=inside)


@triton.jit
def slices(k, delta, L, C: tl.constexpr):
    """``T_rs = k_{delta C + r - s}``, zeros outside the filter."""
    own = tl.arange(0, C)
    lag = delta * C + own[:, None] - own[None, :]
    return tl.load(k + lag, mask=(lag >= 0) & (lag < L), other=0.0)


@triton.jit
def border(own, level):
    """Of each place in a tile, the first of the right block at this level, and whether it stands there itself."""
    block = own >> level
    right = (block & 1) == 1
    return (block | 1) << level, right


@triton.jit(do_not_specialize=["COLUMNS", "B", "L"])
def toeplitz(
    k, u, documents, y, COLUMNS, B, L, SHARED,
    C: tl.constexpr, BC: tl.constexpr, LEVELS: tl.constexpr, DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Some columns of a channel's outputs: the sum over the tiles at and before each."""
    channel = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    own = tl.arange(0, C)
    k += channel // SHARED * L
    u += channel * COLUMNS * C
    y += channel * COLUMNS * C
    inside = column < COLUMNS
    first = column * 0
    if DOCUMENTS:
        first = tl.load(documents + column * C, mask=inside, other=-1)
    last = tl.minimum((tl.minimum(tl.program_id(1) * BC + BC, COLUMNS) - 1) // B, (L + C - 2) // C)
    total = tl.zeros([C, BC], tl.float32)
    for delta in range(1, last + 1):
        source = column - delta * B
        there = (inside & (source >= 0))[None, :]
        x_cx = tl.load(u + source[None, :] * C + own[:, None], mask=there, other=0.0)
        if DOCUMENTS:
            theirs = tl.load(documents + source[None, :] * C + own[:, None], mask=there, other=-2)
            x_cx = tl.where(theirs == first[None, :], x_cx, 0.0)
        total = product(slices(k, delta, L, C), x_cx, total, PRECISION)
    place = column[None, :] * C + own[:, None]
    x_cx = tl.load(u + place, mask=inside[None, :], other=0.0)
    t_cc = slices(k, 0, L, C)
    if DOCUMENTS:
        document = tl.load(documents + place, mask=inside[None, :], other=-2)
        total = tl.where(document == first[None, :], total, 0.0)
        total += tl.load(k).to(tl.float32) * x_cx.to(tl.float32)
        apart = tl.where(own[:, None] > own[None, :], own[:, None] ^ own[None, :], 0)
        for level in range(LEVELS):
            at, right = border(own, level)
            same = document == tl.load(documents + column[None, :] * C + at[:, None], mask=inside[None, :], other=-1)
            x_l = tl.where(same & (~right)[:, None], x_cx, 0.0).to(x_cx.dtype)
            t_l = tl.where((apart >> level) == 1, t_cc, 0.0).to(t_cc.dtype)
            made = product(t_l, x_l, tl.zeros([C, BC], tl.float32), PRECISION)
            total += tl.where(same & right[:, None], made, 0.0)
    else:
        total = product(t_cc, x_cx, total, PRECISION)
    tl.store(y + place, total.to(y.dtype.element_ty), mask=inside[None, :])


@triton.jit
def pairs(
    later, earlier, documents, total, start, delta, COLUMNS, B, level,
    C: tl.constexpr, BC: tl.constexpr, DOCUMENTS: tl.constexpr, WITHIN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``total_rs`` plus the products of place r of some columns with place s of those `delta` tiles before."""
    own = tl.arange(0, C)
    column = start + tl.arange(0, BC)
    inside = column < COLUMNS
    source = column - delta * B
    to_cx = column[None, :] * C + own[:, None]
    from_xc = source[:, None] * C + own[None, :]
    a_cx = tl.load(later + to_cx, mask=inside[None, :], other=0.0)
    b_xc = tl.load(earlier + from_xc, mask=inside[:, None], other=0.0)
    if DOCUMENTS:
        at, right = border(own, level)
        if not WITHIN:
            at, right = own * 0, own >= 0
        theirs = tl.load(documents + column[None, :] * C + at[:, None], mask=inside[None, :], other=-1)
        mine = tl.load(documents + to_cx, mask=inside[None, :], other=-2)
        a_cx = tl.where((mine == theirs) & right[:, None], a_cx, 0.0).to(a_cx.dtype)
        theirs = tl.load(documents + column[:, None] * C + at[None, :], mask=inside[:, None], other=-1)
        mine = tl.load(documents + from_xc, mask=inside[:, None], other=-2)
        b_xc = tl.where((mine == theirs), b_xc, 0.0).to(b_xc.dtype)
        if WITHIN:
            b_xc = tl.where(right[None, :], 0.0, b_xc).to(b_xc.dtype)
    return product(a_cx, b_xc, total, PRECISION)


@triton.jit(do_not_specialize=["COLUMNS", "B"])
def correlate(
    later, earlier, documents, out, COLUMNS, B, DELTAS,
    C: tl.constexpr, BC: tl.constexpr, LEVELS: tl.constexpr, DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of a channel and a `delta`: the sums over all pairs of tokens at each lag, as far as their tiles are so apart.

    Writes those at lags ``delta C + m`` for m from 0 to C - 1, and behind them those at ``(delta - 1) C + m``.
    """
    channel, delta = tl.program_id(0).to(tl.int64), tl.program_id(1)
    later += channel * COLUMNS * C
    earlier += channel * COLUMNS * C
    own = tl.arange(0, C)
    total = tl.zeros([C, C], tl.float32)
    if DOCUMENTS and delta == 0:
        apart = tl.where(own[:, None] > own[None, :], own[:, None] ^ own[None, :], 0)
        for start in range(0, COLUMNS, BC):
            all_cc = pairs(
                later, earlier, documents, tl.zeros([C, C], tl.float32), start, 0, COLUMNS, B, 0, C, BC, False, False,
                PRECISION,
            )  # fmt: skip
            total += tl.where(own[:, None] == own[None, :], all_cc, 0.0)
            for level in range(LEVELS):
                made = pairs(
                    later, earlier, documents, tl.zeros([C, C], tl.float32), start, 0, COLUMNS, B, level, C, BC, True,
                    True, PRECISION,
                )  # fmt: skip
                total += tl.where((apart >> level) == 1, made, 0.0)
    else:
        for start in range(delta * B, COLUMNS, BC):
            total = pairs(
                later, earlier, documents, total, start, delta, COLUMNS, B, 0, C, BC, DOCUMENTS, False, PRECISION
            )
    # Row r is turned by r, so that a lag, or the one C below it, stands in one column.
    turned = tl.gather(total, (own[:, None] - own[None, :]) & (C - 1), 1)
    to = out + (channel * DELTAS + delta) * 2 * C + own
    tl.store(to, tl.sum(tl.where(own[:, None] >= own[None, :], turned, 0.0), 0))
    tl.store(to + C, tl.sum(tl.where(own[:, None] < own[None, :], turned, 0.0), 0))
