"""Triton: a short causal convolution of rows of channels, and its gradients, each tap read where it stands."""

import triton
import triton.language as tl


@triton.jit
def _tap(x, state, documents, at, own, here, channel, inside, t, stride, W: tl.constexpr, DOCUMENTS: tl.constexpr):
    """Inputs at positions `at`, those before the first from the state, as seen by tokens `here` of documents `own`."""
    value = tl.load(
        x + at.to(tl.int64)[:, None] * stride + channel[None, :],
        mask=((at >= 0) & (at < t))[:, None] & inside[None, :], other=0.0,
    ).to(tl.float32)  # fmt: skip
    before = (at < 0) & (at > -W) & here
    value += tl.load(
        state + channel[None, :] * (W - 1) + (at + W - 1)[:, None], mask=before[:, None] & inside[None, :], other=0.0
    ).to(tl.float32)
    if DOCUMENTS:
        theirs = tl.load(documents + at, mask=(at >= 0) & (at < t), other=0)
        value = tl.where((theirs == own)[:, None], value, 0.0)
    return value


@triton.jit
def _sum(
    x, weight, bias, state, documents, at, own, here, channel, inside, t, stride,
    W: tl.constexpr, BIAS: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """The convolution at positions `at`, before its activation."""
    if BIAS:
        start = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    else:
        start = tl.zeros_like(channel).to(tl.float32)
    total = tl.zeros((at.shape[0], channel.shape[0]), tl.float32) + start[None, :]
    for j in tl.static_range(W):
        w = tl.load(weight + channel * W + j, mask=inside, other=0.0).to(tl.float32)
        total += w[None, :] * _tap(
            x, state, documents, at - (W - 1) + j, own, here, channel, inside, t, stride, W, DOCUMENTS
        )
    return total


@triton.jit(do_not_specialize=["t"])
def conv_forward(
    x, weight, bias, state, documents, y, t, d, stride_b, stride_t,
    W: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, DOCUMENTS: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Outputs of ``ROWS`` tokens and ``CHANNELS`` channels."""
    row = tl.program_id(2).to(tl.int64)
    at = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    here, inside = at < t, channel < d
    x += row * stride_b
    state += row * d * (W - 1)
    documents += row * t
    own = at
    if DOCUMENTS:
        own = tl.load(documents + at, mask=here, other=0)
    z = _sum(x, weight, bias, state, documents, at, own, here, channel, inside, t, stride_t, W, BIAS, DOCUMENTS)
    if SILU:
        z = z * tl.sigmoid(z)
    place = (row * t + at.to(tl.int64))[:, None] * d + channel[None, :]
    tl.store(y + place, z.to(y.dtype.element_ty), mask=here[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["t"])
def conv_backward(
    dy, x, weight, bias, state, documents, dx, dstate, partial, t, d, stride_b, stride_t, stride_dy_b, stride_dy_t,
    W: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, DOCUMENTS: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, TILES: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Gradients of the inputs of ``TILES * ROWS`` tokens, and their part in those of weights and bias.

    The state's inputs stand at the positions ``-(W - 1)`` to -1, so the first tile begins there.
    """
    row = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < d
    x += row * stride_b
    dy += row * stride_dy_b
    state += row * d * (W - 1)
    dstate += row * d * (W - 1)
    documents += row * t
    index = tl.arange(0, SUMS)
    sums = tl.zeros((SUMS, CHANNELS), tl.float32)
    for tile in range(TILES):
        at = (tl.program_id(1) * TILES + tile) * ROWS - (W - 1) + tl.arange(0, ROWS)
        own = at
        if DOCUMENTS:
            own = tl.load(documents + at, mask=(at >= 0) & (at < t), other=0)
        total = tl.zeros((ROWS, CHANNELS), tl.float32)
        for i in tl.static_range(W):
            # The output i tokens later, which reads this input with the weight W - 1 - i.
            later = at + i
            here = (later >= 0) & (later < t)
            dz = tl.load(
                dy + later.to(tl.int64)[:, None] * stride_dy_t + channel[None, :],
                mask=here[:, None] & inside[None, :], other=0.0,
            ).to(tl.float32)  # fmt: skip
            theirs = later
            if DOCUMENTS:
                theirs = tl.load(documents + later, mask=here, other=0)
            if SILU:
                z = _sum(
                    x, weight, bias, state, documents, later, theirs, here, channel, inside, t, stride_t,
                    W, BIAS, DOCUMENTS,
                )  # fmt: skip
                gate = tl.sigmoid(z)
                dz = dz * gate * (1 + z * (1 - gate))
            if i == 0:
                sums += tl.where((index == W)[:, None], tl.sum(dz, 0)[None, :], 0.0)
                for j in tl.static_range(W):
                    seen = _tap(
                        x, state, documents, later - (W - 1) + j, theirs, here, channel, inside, t, stride_t,
                        W, DOCUMENTS,
                    )  # fmt: skip
                    sums += tl.where((index == j)[:, None], tl.sum(dz * seen, 0)[None, :], 0.0)
            if DOCUMENTS:
                dz = tl.where((theirs == own)[:, None], dz, 0.0)
            w = tl.load(weight + channel * W + (W - 1 - i), mask=inside, other=0.0).to(tl.float32)
            total += w[None, :] * dz
        place = (row * t + at.to(tl.int64))[:, None] * d + channel[None, :]
        mine = ((at >= 0) & (at < t))[:, None] & inside[None, :]
        tl.store(dx + place, total.to(dx.dtype.element_ty), mask=mine)
        before = (at < 0)[:, None] & inside[None, :]
        tl.store(
            dstate + channel[None, :] * (W - 1) + (at + W - 1)[:, None], total.to(dstate.dtype.element_ty), mask=before
        )
    part = row * tl.num_programs(1) + tl.program_id(1)
    place = (part * (W + 1) + index)[:, None] * d + channel[None, :]
    tl.store(partial + place, sums, mask=(index <= W)[:, None] & inside[None, :])
