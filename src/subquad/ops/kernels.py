"""What several operations' kernels share."""

import triton
import triton.language as tl

from subquad.ops import backends

# The interpreter multiplies the bits of bfloat16 as integers: there, products are of the same numbers in float32.
INTERPRETED = tl.constexpr(backends.interpreted())


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """``a @ b``, summed in float32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def fold(q, k, v, allowed, factor, best, total, sums, PRECISION: tl.constexpr):
    """More keys and values into a softmax under way, in powers of two: `factor` is the scale times ``log2(e)``."""
    scores = tl.where(allowed, product(q, tl.trans(k), PRECISION) * factor, -float("inf"))
    higher = tl.maximum(best, tl.max(scores, 1))
    # Where nothing was allowed so far there is nothing to scale.
    base = tl.where(higher == -float("inf"), 0.0, higher)
    weights, old = tl.exp2(scores - base[:, None]), tl.exp2(best - base)
    sums = sums * old[:, None] + product(weights.to(v.dtype), v, PRECISION)
    return higher, total * old + tl.sum(weights, 1), sums
