"""The Cauchy sums' kernels: poles one after the other, and no matrix of poles and frequencies is ever made.

On the unit circle everything is real but the sums: with ``sigma = 4 sin(w/2) / step`` and ``kappa = 2 cos(w/2)`` the
denominator of a pair of poles is ``D = kappa^2 |a|^2 - sigma^2 - 2 i sigma kappa Re a``, and what is summed is
``(i sigma R - kappa X) / D``. In the dtype of the tensors, which is float64 where the device has it.
"""

import triton
import triton.language as tl


@triton.jit
def inverse(sigma, kappa, real, square):
    """Real and imaginary part of 1 / D."""
    a = kappa * kappa * square - sigma * sigma
    b = -2.0 * sigma * kappa * real
    scale = 1.0 / (a * a + b * b)
    return a * scale, -b * scale


@triton.jit
def term(v, w, sigma, kappa, r, x):
    """``(i sigma r - kappa x) (v + i w)``."""
    p, q = -kappa * x, sigma * r
    return v * p - w * q, w * p + v * q


@triton.jit
def sums(sine, cosine, step, real, square, weights, out, L, BLOCKS, N: tl.constexpr, BL: tl.constexpr):
    """All four sums of one group at BL frequencies: ``[g, 8, l]``, real parts first.

    `weights` is ``[g, n, 8]``: four R and four X a pole.
    """
    g = (tl.program_id(0) // BLOCKS).to(tl.int64)
    at = (tl.program_id(0) % BLOCKS) * BL + tl.arange(0, BL)
    inside = at < L
    kappa = tl.load(cosine + at, mask=inside, other=1.0)
    sigma = tl.load(sine + at, mask=inside, other=1.0) / tl.load(step + g)
    re0, re1, re2, re3 = kappa * 0, kappa * 0, kappa * 0, kappa * 0
    im0, im1, im2, im3 = kappa * 0, kappa * 0, kappa * 0, kappa * 0
    for i in range(N):
        n = g * N + i
        v, w = inverse(sigma, kappa, tl.load(real + n), tl.load(square + n))
        own = weights + n * 8
        p, q = term(v, w, sigma, kappa, tl.load(own), tl.load(own + 4))
        re0, im0 = re0 + p, im0 + q
        p, q = term(v, w, sigma, kappa, tl.load(own + 1), tl.load(own + 5))
        re1, im1 = re1 + p, im1 + q
        p, q = term(v, w, sigma, kappa, tl.load(own + 2), tl.load(own + 6))
        re2, im2 = re2 + p, im2 + q
        p, q = term(v, w, sigma, kappa, tl.load(own + 3), tl.load(own + 7))
        re3, im3 = re3 + p, im3 + q
    out += g * 8 * L + at
    tl.store(out, re0, mask=inside)
    tl.store(out + L, re1, mask=inside)
    tl.store(out + 2 * L, re2, mask=inside)
    tl.store(out + 3 * L, re3, mask=inside)
    tl.store(out + 4 * L, im0, mask=inside)
    tl.store(out + 5 * L, im1, mask=inside)
    tl.store(out + 6 * L, im2, mask=inside)
    tl.store(out + 7 * L, im3, mask=inside)


@triton.jit
def share(grad, at, inside, L, v, w, sigma, kappa, r, x):
    """Of one sum: gradients of R and X, and of both parts of 1 / D, at each frequency."""
    p = tl.load(grad + at, mask=inside, other=0.0)
    q = tl.load(grad + 4 * L + at, mask=inside, other=0.0)
    turned = v * q - w * p
    return sigma * turned, -kappa * (v * p + w * q), sigma * r * q - kappa * x * p, -sigma * r * p - kappa * x * q


@triton.jit
def gradients(sine, cosine, step, real, square, weights, grad, out, L, N: tl.constexpr, BL: tl.constexpr):
    """Of one pole, over all frequencies: those of R and X, of ``Re a``, of ``|a|^2``, and its part of the step's.

    `out` is ``[g, n, 11]`` in this order.
    """
    n = tl.program_id(0).to(tl.int64)
    g = n // N
    tau = tl.load(step + g)
    rate, size, own = tl.load(real + n), tl.load(square + n), weights + n * 8
    r0, r1, r2, r3 = tl.load(own), tl.load(own + 1), tl.load(own + 2), tl.load(own + 3)
    x0, x1, x2, x3 = tl.load(own + 4), tl.load(own + 5), tl.load(own + 6), tl.load(own + 7)
    grad += g * 8 * L
    none = tl.zeros((BL,), dtype=sine.dtype.element_ty)
    dr0, dr1, dr2, dr3 = none, none, none, none
    dx0, dx1, dx2, dx3 = none, none, none, none
    drate, dsize, dtau = none, none, none
    for start in range(0, L, BL):
        at = start + tl.arange(0, BL)
        inside = at < L
        kappa = tl.load(cosine + at, mask=inside, other=1.0)
        sigma = tl.load(sine + at, mask=inside, other=1.0) / tau
        v, w = inverse(sigma, kappa, rate, size)
        a, b, dv, dw = share(grad, at, inside, L, v, w, sigma, kappa, r0, x0)
        dr0, dx0, moved = dr0 + a, dx0 + b, r0 * a
        a, b, p, q = share(grad + L, at, inside, L, v, w, sigma, kappa, r1, x1)
        dr1, dx1, dv, dw, moved = dr1 + a, dx1 + b, dv + p, dw + q, moved + r1 * a
        a, b, p, q = share(grad + 2 * L, at, inside, L, v, w, sigma, kappa, r2, x2)
        dr2, dx2, dv, dw, moved = dr2 + a, dx2 + b, dv + p, dw + q, moved + r2 * a
        a, b, p, q = share(grad + 3 * L, at, inside, L, v, w, sigma, kappa, r3, x3)
        dr3, dx3, dv, dw, moved = dr3 + a, dx3 + b, dv + p, dw + q, moved + r3 * a
        # Through D, of which the gradient is -conj(1 / D)^2 times that of 1 / D.
        p, q = v * v - w * w, -2.0 * v * w
        da, db = q * dw - p * dv, -p * dw - q * dv
        dsize += kappa * kappa * da
        drate += -2.0 * sigma * kappa * db
        # sigma is what the sine is over the step: its gradient times -sigma / step.
        moved += -2.0 * sigma * sigma * da - 2.0 * sigma * kappa * rate * db
        dtau += -moved / tau
    out += n * 11
    tl.store(out, tl.sum(dr0))
    tl.store(out + 1, tl.sum(dr1))
    tl.store(out + 2, tl.sum(dr2))
    tl.store(out + 3, tl.sum(dr3))
    tl.store(out + 4, tl.sum(dx0))
    tl.store(out + 5, tl.sum(dx1))
    tl.store(out + 6, tl.sum(dx2))
    tl.store(out + 7, tl.sum(dx3))
    tl.store(out + 8, tl.sum(drate))
    tl.store(out + 9, tl.sum(dsize))
    tl.store(out + 10, tl.sum(dtau))
