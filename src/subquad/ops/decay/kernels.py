"""The decay in Triton: a program for each token."""

import triton
import triton.language as tl

from subquad.ops.overlap.kernels import begin

# Beyond it softplus is the identity, as in PyTorch.
LINEAR = tl.constexpr(20.0)


@triton.jit
def decay_kernel(
    raw_ptr, a_ptr, bias_ptr, g_ptr, dt_ptr, time, stride_b, stride_t,
    H: tl.constexpr, BH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """See `subquad.ops.decay.Decay`. Grid: tokens."""
    token = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BH)
    a, bias = tl.load(a_ptr + h, mask=h < H, other=0.0), tl.load(bias_ptr + h, mask=h < H, other=0.0)
    begin(OVERLAP)
    raw = tl.load(raw_ptr + (token // time) * stride_b + (token % time) * stride_t + h, mask=h < H, other=0.0)
    x = raw.to(tl.float32) + bias
    # log(1 + e) with the digits that the sum has lost: the quotient makes up for them.
    e = tl.exp(tl.minimum(x, LINEAR))
    u = 1.0 + e
    dt = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    dt = tl.where(x > LINEAR, x, dt)
    tl.store(dt_ptr + token * H + h, dt, mask=h < H)
    tl.store(g_ptr + token * H + h, -tl.exp(a) * dt, mask=h < H)
