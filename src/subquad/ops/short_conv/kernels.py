"""Triton: a short causal convolution of rows of channels, and its gradients, each tap read where it stands.

The inputs before the first token, the state, are rows like those of the tokens: ``[b, W - 1, d]``.
"""

import triton
import triton.language as tl


@triton.jit
def _weight(weight, channel, inside, j: tl.constexpr, W: tl.constexpr):
    """Weights of tap j, zeros where there is none."""
    if j < W:
        return tl.load(weight + channel * W + j, mask=inside, other=0.0).to(tl.float32)
    else:
        return tl.zeros(channel.shape, tl.float32)


@triton.jit
def _one_of(a, b, c, d, j: tl.constexpr):
    return a if j == 0 else (b if j == 1 else (c if j == 2 else d))


@triton.jit
def _tap(x, state, documents, at, own, channel, inside, t, d, stride, W: tl.constexpr, DOCUMENTS: tl.constexpr):
    """Inputs at positions `at`, as tokens of documents `own` see them."""
    before = tl.load(
        state + ((at + W - 1).to(tl.int64) * d)[:, None] + channel[None, :],
        mask=((at < 0) & (at > -W))[:, None] & inside[None, :], other=0.0,
    )  # fmt: skip
    value = tl.load(
        x + (at.to(tl.int64) * stride)[:, None] + channel[None, :],
        mask=((at >= 0) & (at < t))[:, None] & inside[None, :], other=before,
    ).to(tl.float32)  # fmt: skip
    if DOCUMENTS:
        theirs = tl.load(documents + at, mask=(at >= 0) & (at < t), other=0)
        value = tl.where((theirs == own)[:, None], value, 0.0)
    return value


@triton.jit
def _sum(
    x, start, w0, w1, w2, w3, state, documents, at, own, channel, inside, t, d, stride,
    W: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """The convolution at positions `at`, before its activation."""
    total = tl.zeros((at.shape[0], channel.shape[0]), tl.float32) + start[None, :]
    for j in tl.static_range(W):
        seen = _tap(x, state, documents, at - (W - 1) + j, own, channel, inside, t, d, stride, W, DOCUMENTS)
        total += _one_of(w0, w1, w2, w3, j)[None, :] * seen
    return total


@triton.jit(do_not_specialize=["t"])
def conv_forward(
    x, weight, bias, state, documents, y, t, d, stride_b, stride_t,
    W: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, DOCUMENTS: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Outputs of ``TILES * ROWS`` tokens and ``CHANNELS`` channels."""
    row = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < d
    x += row * stride_b
    state += row * d * (W - 1)
    documents += row * t
    start = tl.zeros((CHANNELS,), tl.float32)
    if BIAS:
        start = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    w0, w1 = _weight(weight, channel, inside, 0, W), _weight(weight, channel, inside, 1, W)
    w2, w3 = _weight(weight, channel, inside, 2, W), _weight(weight, channel, inside, 3, W)
    for tile in range(TILES):
        at = (tl.program_id(1) * TILES + tile) * ROWS + tl.arange(0, ROWS)
        own = at
        if DOCUMENTS:
            own = tl.load(documents + at, mask=at < t, other=0)
        z = _sum(x, start, w0, w1, w2, w3, state, documents, at, own, channel, inside, t, d, stride_t, W, DOCUMENTS)
        if SILU:
            z = z * tl.sigmoid(z)
        place = (row * t + at.to(tl.int64))[:, None] * d + channel[None, :]
        tl.store(y + place, z.to(y.dtype.element_ty), mask=(at < t)[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["t"])
def conv_backward(
    dy, x, weight, bias, state, documents, dx, dstate, partial, t, d, stride_b, stride_t, stride_dy_b, stride_dy_t,
    W: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, DOCUMENTS: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Gradients of the inputs at ``TILES * ROWS`` positions, and their part in those of weights and bias.

    The state's inputs stand at the positions ``-(W - 1)`` to -1, so the first tile begins there.
    """
    row = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < d
    x += row * stride_b
    dy += row * stride_dy_b
    dx += row * t * d
    state += row * d * (W - 1)
    dstate += row * d * (W - 1)
    documents += row * t
    start = tl.zeros((CHANNELS,), tl.float32)
    if BIAS:
        start = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    w0, w1 = _weight(weight, channel, inside, 0, W), _weight(weight, channel, inside, 1, W)
    w2, w3 = _weight(weight, channel, inside, 2, W), _weight(weight, channel, inside, 3, W)
    dbias = tl.zeros((CHANNELS,), tl.float32)
    dw0, dw1, dw2, dw3 = dbias, dbias, dbias, dbias
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
                dy + (later.to(tl.int64) * stride_dy_t)[:, None] + channel[None, :],
                mask=here[:, None] & inside[None, :], other=0.0,
            ).to(tl.float32)  # fmt: skip
            theirs = later
            if DOCUMENTS:
                theirs = tl.load(documents + later, mask=here, other=0)
            if SILU:
                z = _sum(
                    x, start, w0, w1, w2, w3, state, documents, later, theirs, channel, inside, t, d, stride_t,
                    W, DOCUMENTS,
                )  # fmt: skip
                gate = tl.sigmoid(z)
                dz = dz * gate * (1 + z * (1 - gate))
            if i == 0:
                dbias += tl.sum(dz, 0)
                for j in tl.static_range(W):
                    seen = _tap(
                        x, state, documents, later - (W - 1) + j, theirs, channel, inside, t, d, stride_t,
                        W, DOCUMENTS,
                    )  # fmt: skip
                    part = tl.sum(dz * seen, 0)
                    if j == 0:
                        dw0 += part
                    elif j == 1:
                        dw1 += part
                    elif j == 2:
                        dw2 += part
                    else:
                        dw3 += part
            if DOCUMENTS:
                dz = tl.where((theirs == own)[:, None], dz, 0.0)
            total += _one_of(w0, w1, w2, w3, W - 1 - i)[None, :] * dz
        total = total.to(dx.dtype.element_ty)
        mine, before = ((at >= 0) & (at < t))[:, None] & inside[None, :], (at < 0)[:, None] & inside[None, :]
        tl.store(dx + (at.to(tl.int64) * d)[:, None] + channel[None, :], total, mask=mine)
        tl.store(dstate + ((at + W - 1).to(tl.int64) * d)[:, None] + channel[None, :], total, mask=before)
    partial += (row * tl.num_programs(1) + tl.program_id(1)) * (W + 1) * d + channel
    for j in tl.static_range(W):
        tl.store(partial + j * d, _one_of(dw0, dw1, dw2, dw3, j), mask=inside)
    tl.store(partial + W * d, dbias, mask=inside)
