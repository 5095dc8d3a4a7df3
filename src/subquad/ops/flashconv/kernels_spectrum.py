"""Within the tiles of the long convolution: what a filter does to a row at one frequency over tiles.

At the frequency w_f a filter is a Toeplitz matrix of C x C that takes what leaves a tile at its end in again at its
front, times w_f: a circulant but for that factor. With ``theta_f^C = w_f`` it is diagonal at the C points ``theta_f
exp(2 pi i j / C)``. Of a tile of C = P x Q numbers ``x_pq`` at place ``Q p + q``, the value at ``j = k + P l`` is ::

    X_kl = sum_q right_ql middle_kq sum_p left_kp x_pq

with ``left_kp = exp(2 pi i k p / P) theta_f^(Q p)``, ``middle_kq = exp(2 pi i k q / C) theta_f^q``, ``right_ql =
exp(2 pi i q l / Q)``: two complex products of small matrices on the tensor cores, one elementwise between them
(Bailey's four steps), and no transposition. Left and right are scaled to be about unitary: the way back is the adjoint.
"""

import triton
import triton.language as tl

from subquad.ops.flashconv.kernels_toeplitz import product


@triton.jit
def negative(x):
    """``-x``; by way of float32, as the interpreter would negate the bits of bfloat16."""
    return (-x.to(tl.float32)).to(x.dtype)


@triton.jit
def pair(at, C: tl.constexpr):
    """Real and imaginary parts, C numbers apart."""
    return tl.load(at), tl.load(at + C)


@triton.jit
def times(a_re, a_im, b_re, b_im):
    """``a b`` of complex numbers."""
    return a_re * b_re - a_im * b_im, a_re * b_im + a_im * b_re


@triton.jit
def products(a_re, minus_re, a_im, minus_im, b_re, b_im, P: tl.constexpr, Q: tl.constexpr, PRECISION: tl.constexpr):
    """``a_re b_re + minus_re b_im`` and ``a_im b_re + minus_im b_im`` of matrices."""
    re = product(a_re, b_re, tl.zeros([P, Q], tl.float32), PRECISION)
    im = product(a_im, b_re, tl.zeros([P, Q], tl.float32), PRECISION)
    return product(minus_re, b_im, re, PRECISION), product(minus_im, b_im, im, PRECISION)


@triton.jit
def tables(left, middle, right, f, P: tl.constexpr, Q: tl.constexpr):
    """Left and right at a frequency, where its middle is, and the places of a tile's numbers."""
    k, l = tl.arange(0, P), tl.arange(0, Q)  # noqa: E741 -- as in the equation
    left_re, left_im = pair(left + f * (2 * P * P) + k[:, None] * P + k[None, :], P * P)
    right_re, right_im = pair(right + l[:, None] * Q + l[None, :], Q * Q)
    cell = k[:, None] * Q + l[None, :]
    return left_re, left_im, right_re, right_im, middle + f * (2 * P * Q) + cell, cell


@triton.jit
def there(
    x_re, x_im, left_re, left_im, right_re, right_im, middle, P: tl.constexpr, Q: tl.constexpr, PRECISION: tl.constexpr
):
    """The values of a tile at a frequency, float32 ``[k, l]``."""
    re, im = products(left_re, negative(left_im), left_im, left_re, x_re, x_im, P, Q, PRECISION)
    # Read each time: held, it would take the registers of a whole tile.
    m_re, m_im = pair(middle, P * Q)
    re, im = times(re, im, m_re.to(tl.float32), m_im.to(tl.float32))
    re, im = re.to(x_re.dtype), im.to(x_re.dtype)
    return products(re, negative(im), im, re, right_re, right_im, P, Q, PRECISION)


@triton.jit
def back(
    x_re, x_im, left_re, left_im, right_re, right_im, middle, P: tl.constexpr, Q: tl.constexpr, PRECISION: tl.constexpr
):
    """The adjoint of `there`, of operands already rounded: float32 ``[p, q]``."""
    re, im = products(x_re, x_im, x_im, negative(x_re), right_re, right_im, P, Q, PRECISION)
    m_re, m_im = pair(middle, P * Q)
    re, im = times(re, im, m_re.to(tl.float32), -m_im.to(tl.float32))
    re, im = re.to(x_re.dtype), im.to(x_re.dtype)
    left_re, left_im = tl.trans(left_re), tl.trans(left_im)
    return products(left_re, left_im, negative(left_im), left_re, re, im, P, Q, PRECISION)


@triton.jit
def filters(k, left, middle, right, size, N, P: tl.constexpr, Q: tl.constexpr, PRECISION: tl.constexpr):
    """The values of the filters at a frequency over tiles, times `size`, in place."""
    C: tl.constexpr = P * Q
    left_re, left_im, right_re, right_im, middle, cell = tables(left, middle, right, tl.program_id(0) % N, P, Q)
    k += tl.program_id(0).to(tl.int64) * (2 * C) + cell
    re, im = pair(k, C)
    re, im = there(re, im, left_re, left_im, right_re, right_im, middle, P, Q, PRECISION)
    dtype = k.dtype.element_ty
    tl.store(k, (re * size).to(dtype))
    tl.store(k + C, (im * size).to(dtype))


@triton.jit(do_not_specialize=["B"])
def multiply(
    filters, bias, left, middle, right, x, y, size, B, N, SHARED, BIAS: tl.constexpr, ADJOINT: tl.constexpr,
    P: tl.constexpr, Q: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The filter's product, or its adjoint's, at one frequency of one channel for all rows; `size` is the bias's."""
    C: tl.constexpr = P * Q
    f, channel = tl.program_id(0) % N, (tl.program_id(0) // N).to(tl.int64)
    left_re, left_im, right_re, right_im, middle, cell = tables(left, middle, right, f, P, Q)
    filters += (channel // SHARED * N + f) * (2 * C) + cell
    direct = 0.0
    if BIAS:
        direct = tl.load(bias + channel).to(tl.float32) * size
    start = (channel * N + f) * B * (2 * C)
    x += start
    y += start
    dtype = y.dtype.element_ty
    for b in range(B):
        at = b * (2 * C) + cell
        re, im = pair(x + at, C)
        re, im = there(re, im, left_re, left_im, right_re, right_im, middle, P, Q, PRECISION)
        k_re, k_im = pair(filters, C)
        # The bias is a tap at lag 0, which is seen alike at all frequencies.
        k_re, k_im = k_re.to(tl.float32) + direct, k_im.to(tl.float32)
        re, im = times(re, im, k_re, -k_im if ADJOINT else k_im)
        re, im = back(re.to(dtype), im.to(dtype), left_re, left_im, right_re, right_im, middle, P, Q, PRECISION)
        tl.store(y + at, re.to(dtype))
        tl.store(y + at + C, im.to(dtype))


@triton.jit(do_not_specialize=["B"])
def correlate(
    later, earlier, left, middle, right, out, behind, B, N,
    BEHIND: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of a channel's filter at one frequency from those of outputs and from inputs, float32.

    `behind` takes that of the filter backwards in time, whose values are the conjugates.
    """
    C: tl.constexpr = P * Q
    program = tl.program_id(0).to(tl.int64)
    left_re, left_im, right_re, right_im, middle, cell = tables(left, middle, right, tl.program_id(0) % N, P, Q)
    later += program * B * (2 * C)
    earlier += program * B * (2 * C)
    dtype = later.dtype.element_ty
    total_re, total_im = tl.zeros([P, Q], tl.float32), tl.zeros([P, Q], tl.float32)
    for b in range(B):
        at = b * (2 * C) + cell
        re, im = pair(earlier + at, C)
        x_re, x_im = there(re, im, left_re, left_im, right_re, right_im, middle, P, Q, PRECISION)
        # Held rounded, as what it is multiplied by was: registers are what this kernel runs out of.
        x_re, x_im = x_re.to(dtype), x_im.to(dtype)
        re, im = pair(later + at, C)
        re, im = there(re, im, left_re, left_im, right_re, right_im, middle, P, Q, PRECISION)
        re, im = times(re, im, x_re.to(tl.float32), -x_im.to(tl.float32))
        total_re += re
        total_im += im
    total_re, total_im = total_re.to(dtype), total_im.to(dtype)
    to = program * (2 * C) + cell
    re, im = back(total_re, total_im, left_re, left_im, right_re, right_im, middle, P, Q, PRECISION)
    tl.store(out + to, re)
    tl.store(out + to + C, im)
    if BEHIND:
        re, im = back(total_re, negative(total_im), left_re, left_im, right_re, right_im, middle, P, Q, PRECISION)
        tl.store(behind + to, re)
        tl.store(behind + to + C, im)
