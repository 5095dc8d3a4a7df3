"""The long convolution's kernels for long rows: Fourier transforms over tiles, Toeplitz products at each frequency.

Time is cut into n tiles of C tokens, ``t = r C + c``. Over tiles the convolution is again one, whose coefficients are
Toeplitz matrices of C x C. A transform over r alone makes of it one product per frequency, of a complex Toeplitz matrix
with columns of C: per token some ``4 n + 4 C`` multiplications, where Toeplitz tiles alone take ``n C / 2``.

The frequencies are the odd multiples ``w_f = exp(i pi (2 f + 1) / 2n)`` for f below n. Of a real row of n numbers and
as many zeros, they are one of each conjugate pair: so all n are complex, none is a special case, and what wraps around
n zeros never reaches the outputs. ``F``, ``[2n, n]``, holds ``cos`` in row 2f and ``sin`` in row 2f + 1, of about
``1 / sqrt(n)``. Up to that factor's rest ``F^T F = 1``, inverse and adjoint of F are both ``F^T``, and spectra are as
large as their inputs, so that half precision holds them. Spectra lie as ``[d, f, b, 2, C]``, the real part first.
"""

import triton
import triton.language as tl

from subquad.ops.flashconv.kernels_toeplitz import product


@triton.jit
def places(D, B, C: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr):
    """Channels and places of a program's tile, its row, and what is left of its number.

    Programs that run side by side hold neighbouring channels, then places: they share sectors of memory.
    """
    program = tl.program_id(0)
    blocks = tl.cdiv(D, BD)
    channel = program % blocks * BD
    program //= blocks
    place = program % (C // BC) * BC
    program //= C // BC
    return channel, place, program % B, program // B


@triton.jit
def offsets(sb, st, sd, b, tile, place, channel, T, D, C: tl.constexpr):
    """Offsets of ``[tile, place, channel]`` of a row in ``[b, t, d]``, and which of them there are."""
    token = tile[:, None, None] * C + place[None, :, None]
    inside = (token < T) & (channel < D)[None, None, :]
    return b.to(tl.int64) * sb + token.to(tl.int64) * st + channel.to(tl.int64)[None, None, :] * sd, inside


@triton.jit
def columns(channel, place, N, B, b, D, C: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr):
    """Offsets of ``(channel, place)``, places side by side, in the spectra of a row, and which of them there are."""
    own = tl.arange(0, BD * BC)
    mine = channel + own // BC
    at = mine.to(tl.int64) * (N * B.to(tl.int64)) * (2 * C) + b * (2 * C) + place + own % BC
    return at, mine < D


@triton.jit
def gated(
    x, gate, behind, into, sxb, sxt, sxd, sgb, sgt, b, tile, place, channel, T, D, power, first,
    GATE: tl.constexpr, SCALED: tl.constexpr, BEHIND: tl.constexpr, C: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """``power x gate`` of some tiles, ``[tile, (channel, place)]``; writes ``x behind`` where it is the first."""
    at, inside = offsets(sxb, sxt, sxd, b, tile, place, channel, T, D, C)
    made = tl.load(x + at, mask=inside, other=0.0)
    if BEHIND:
        own, _ = offsets(T.to(tl.int64) * D, D, 1, b, tile, place, channel, T, D, C)
        other = made.to(tl.float32) * tl.load(behind + own, mask=inside & first, other=0.0).to(tl.float32)
        tl.store(into + own, other.to(into.dtype.element_ty), mask=inside & first)
    if GATE:
        at, _ = offsets(sgb, sgt, 1, b, tile, place, channel, T, D, C)
        made = made.to(tl.float32) * tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        made = made.to(tl.float32) * power
    turned = tl.permute(made.to(DTYPE), (0, 2, 1))
    return tl.reshape(turned, (made.shape[0], made.shape[1] * made.shape[2]))


@triton.jit(do_not_specialize=["T", "B"])
def transform(
    x, gate, behind, table, into, out, sxb, sxt, sxd, sgb, sgt, T, B, N, D, power,
    GATE: tl.constexpr, SCALED: tl.constexpr, BEHIND: tl.constexpr, WHOLE: tl.constexpr, C: tl.constexpr,
    BC: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``F (power x gate)`` over the tiles of ``[b, t, d]``, and ``x behind``; WHOLE where BK holds all tiles."""
    dtype: tl.constexpr = out.dtype.element_ty
    channel, place, b, _ = places(D, B, C, BC, BD)
    at, mine = columns(channel, place, N, B, b, D, C, BC, BD)
    channel += tl.arange(0, BD)
    place += tl.arange(0, BC)
    tile = tl.arange(0, BK)
    if WHOLE:
        x_kc = gated(
            x, gate, behind, into, sxb, sxt, sxd, sgb, sgt, b, tile, place, channel, T, D, power, True, GATE, SCALED,
            BEHIND, C, dtype,
        )  # fmt: skip
    for first in range(0, 2 * N, BF):
        row = first + tl.arange(0, BF)
        total = tl.zeros([BF, BD * BC], tl.float32)
        if WHOLE:
            f_rk = tl.load(table + row[:, None] * N + tile[None, :], (row < 2 * N)[:, None] & (tile < N)[None, :], 0.0)
            total = product(f_rk, x_kc, total, PRECISION)
        else:
            for start in range(0, N, BK):
                k = start + tile
                f_rk = tl.load(table + row[:, None] * N + k[None, :], (row < 2 * N)[:, None] & (k < N)[None, :], 0.0)
                x_kc = gated(
                    x, gate, behind, into, sxb, sxt, sxd, sgb, sgt, b, k, place, channel, T, D, power, first == 0,
                    GATE, SCALED, BEHIND, C, dtype,
                )  # fmt: skip
                total = product(f_rk, x_kc, total, PRECISION)
        to = row // 2 * (B * 2 * C) + row % 2 * C
        tl.store(out + to[:, None] + at[None, :], total.to(dtype), mask=(row < 2 * N)[:, None] & mine[None, :])


@triton.jit(do_not_specialize=["T", "B"])
def restore(
    spectrum, table, one, two, y, z, s1b, s1t, s2b, s2t, T, B, N, D,
    ONE: tl.constexpr, TWO: tl.constexpr, SECOND: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr,
    BR: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``w = F^T spectrum``, back in ``[b, t, d]``: ``y = w one``, and ``z = w two`` where a second is wanted."""
    channel, place, b, tile = places(D, B, C, BC, BD)
    at, mine = columns(channel, place, N, B, b, D, C, BC, BD)
    channel += tl.arange(0, BD)
    place += tl.arange(0, BC)
    tile = tile * BR + tl.arange(0, BR)
    total = tl.zeros([BR, BD * BC], tl.float32)
    for start in range(0, 2 * N, BK):
        k = start + tl.arange(0, BK)
        came = k // 2 * (B * 2 * C) + k % 2 * C
        f_rk = tl.load(table + k[None, :] * N + tile[:, None], (k < 2 * N)[None, :] & (tile < N)[:, None], 0.0)
        x_kc = tl.load(spectrum + came[:, None] + at[None, :], (k < 2 * N)[:, None] & mine[None, :], 0.0)
        total = product(f_rk, x_kc, total, PRECISION)
    made = tl.permute(tl.reshape(total, (BR, BD, BC)), (0, 2, 1))
    to, inside = offsets(T.to(tl.int64) * D, D, 1, b, tile, place, channel, T, D, C)
    first = made
    if ONE:
        at, _ = offsets(s1b, s1t, 1, b, tile, place, channel, T, D, C)
        first = made * tl.load(one + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + to, first.to(y.dtype.element_ty), mask=inside)
    if SECOND:
        if TWO:
            at, _ = offsets(s2b, s2t, 1, b, tile, place, channel, T, D, C)
            made *= tl.load(two + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(z + to, made.to(z.dtype.element_ty), mask=inside)
