"""The decode step in Triton: one program carries one head's block of value channels through commit and read."""

import triton
import triton.language as tl

from subquad.ops import backends

# The interpreter multiplies the bits of bfloat16 as integers: there, products are of the same numbers in float32.
INTERPRETED = tl.constexpr(backends.interpreted())

# exp of this is 0 in float32: a log decay below it means the same.
FORGOTTEN = tl.constexpr(-100.0)


@triton.jit
def _clamped(g):
    """Log decays that no sum of a block can spoil; NaN stays NaN."""
    return tl.where(g < FORGOTTEN, FORGOTTEN, g)


@triton.jit
def _across(channels, ROWS: tl.constexpr):
    """A row of channels beside one token, or beside a tile of tokens."""
    return channels if ROWS == 1 else channels[None, :]


@triton.jit
def _tokens(ROWS: tl.constexpr):
    """Indices of new tokens, a column of a tile; a tile of one token has no such axis."""
    return 0 if ROWS == 1 else tl.arange(0, ROWS)[:, None]


@triton.jit
def _convolved(
    x_ptr, stride_t, ring_ptr, weight_ptr, bias_ptr, width, channels, start, time, D, R: tl.constexpr,
    W: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Tokens ``[ROWS, channels]`` behind convolution and activation in float32, and as they came.

    The taps reach back over the block's start into the ring, where position p stands in slot ``p mod R``; `start` is
    the position of the block's first token, and nothing but zeros stands before position 0.
    """
    t = _tokens(ROWS)
    at = _across(channels, ROWS)
    now = tl.load(x_ptr + t * stride_t + at, mask=at < tl.where(t < time, width, 0), other=0.0)
    y = now.to(tl.float32)
    if W > 1:
        known = channels < width
        y *= _across(tl.load(weight_ptr + channels * W + W - 1, mask=known, other=0.0).to(tl.float32), ROWS)
        held = tl.minimum(start, W - 1).to(tl.int32)
        first = (start % R).to(tl.int32)
        for j in tl.static_range(W - 1):
            source = t + (j - (W - 1))
            slot = (first + source + R) % R
            if ROWS == 1:
                ptrs = ring_ptr + slot * D + at
            else:
                ptrs = tl.where(source < 0, ring_ptr + slot * D, x_ptr + source * stride_t) + at
            mask = at < tl.where((source >= -held) & (source < time), width, 0)
            before = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
            y += before * _across(tl.load(weight_ptr + channels * W + j, mask=known, other=0.0).to(tl.float32), ROWS)
        if BIAS:
            y += _across(tl.load(bias_ptr + channels, mask=known, other=0.0).to(tl.float32), ROWS)
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    return tl.where(at < width, y, 0.0), now


@triton.jit
def _keep(ring_ptr, x, width, channels, start, time, stride, SLOTS: tl.constexpr, ROWS: tl.constexpr):
    """Write the first `width` channels of tokens into their slots of a ring."""
    t = _tokens(ROWS)
    at = _across(channels, ROWS)
    slot = ((start % SLOTS).to(tl.int32) + t) % SLOTS
    tl.store(
        ring_ptr + slot * stride + at, x.to(ring_ptr.dtype.element_ty), mask=at < tl.where(t < time, width, 0)
    )  # fmt: skip


@triton.jit
def _unit(x, eps, ROWS: tl.constexpr):
    if ROWS == 1:
        y = x * (1.0 / tl.sqrt(tl.sum(x * x, 0) + eps))
    else:
        y = x * (1.0 / tl.sqrt(tl.sum(x * x, 1) + eps))[:, None]
    return y


@triton.jit
def _product(a, b, PRECISION: tl.constexpr):
    """``a @ b`` of bfloat16 operands, or of float32 ones in the precision named."""
    if PRECISION == "bf16":
        a = a.to(tl.bfloat16)
        b = b.to(tl.bfloat16)
        product = tl.dot(a.to(tl.float32), b.to(tl.float32)) if INTERPRETED else tl.dot(a, b)
    else:
        product = tl.dot(a, b, input_precision=PRECISION)
    return product


@triton.jit
def advance_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, skip_ptr, weight_ptr, bias_ptr, y_ptr,
    state_ptr, inputs_ptr, keys_ptr, values_ptr, decays_ptr, seen_ptr, n_ptr, rows_ptr,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h,
    g_stride_b, g_stride_t, g_stride_h, beta_stride_b, beta_stride_t, beta_stride_h,
    time, l2_eps, scale,
    H: tl.constexpr, HQ: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    R: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
    ROWS: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, L2: tl.constexpr, BETA: tl.constexpr,
    SKIP: tl.constexpr, DELTA: tl.constexpr, VECTOR: tl.constexpr, PRECISION: tl.constexpr,
    TP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """See `subquad.ops.decode.advance_`. Grid: value blocks, fastest, then heads, then batch rows.

    Slots of the ring of inputs are R, of the ring of pending tokens N; TP is the tiles' rows for new tokens, 1 for one.
    Loads stand before all arithmetic, the state's first, so that they are under way together.
    """
    blocks: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    v_block = pid % blocks
    h = pid // blocks % H
    b = (pid // (blocks * H)).to(tl.int64)
    row = b
    if ROWS:
        row = tl.load(rows_ptr + b).to(tl.int64)

    kc = tl.arange(0, BK)
    vc = v_block * BV + tl.arange(0, BV)
    t = tl.arange(0, TP)
    in_k = kc < K
    in_v = vc < V
    live = t < time
    y_ptr += (b * time * H + h) * V
    values_type = values_ptr.dtype.element_ty
    if row < 0:
        zero = tl.zeros((TP, BV), y_ptr.dtype.element_ty)
        tl.store(y_ptr + t[:, None] * (H * V) + vc[None, :], zero, mask=live[:, None] & in_v[None, :])
        return

    seen = tl.load(seen_ptr + b).to(tl.int64)
    n = tl.load(n_ptr + b).to(tl.int32)
    state_ptrs = state_ptr + (row * H + h) * (K * V) + (kc[:, None] * V + vc[None, :])
    state_mask = in_k[:, None] & in_v[None, :]
    state = tl.load(state_ptrs, mask=state_mask, other=0.0).to(tl.float32)
    g_ptr += b * g_stride_b + h * g_stride_h
    beta_ptr += b * beta_stride_b + h * beta_stride_h
    if VECTOR:
        at = _across(kc, TP)
        tokens = _tokens(TP)
        g = tl.load(g_ptr + tokens * g_stride_t + at, mask=at < tl.where(tokens < time, K, 0), other=0.0).to(tl.float32)
    elif TP == 1:
        g = tl.load(g_ptr, mask=time > 0, other=0.0).to(tl.float32)
    else:
        g = tl.load(g_ptr + t * g_stride_t, mask=live, other=0.0).to(tl.float32)
    if BETA:
        if TP == 1:
            beta = tl.load(beta_ptr, mask=time > 0, other=0.0).to(tl.float32)
        else:
            beta = tl.load(beta_ptr + t * beta_stride_t, mask=live, other=0.0).to(tl.float32)
    if SKIP:
        skip = tl.load(skip_ptr + h).to(tl.float32)

    h_q = h // (H // HQ)
    h_k = h // (H // HK)
    h_v = h // (H // HV)
    start = seen + n
    base = (seen % N).to(tl.int32)
    keys_ptr += row * (N * HK * K) + h_k * K
    values_ptr += row * (N * H * V) + h * V
    DECAYS: tl.constexpr = H * K if VECTOR else H
    decays_ptr += row * (N * DECAYS) + (h * K if VECTOR else h)
    k_p = tl.load(keys_ptr + base * (HK * K) + kc, mask=kc < tl.where(n > 0, K, 0), other=0.0)
    u_p = tl.load(values_ptr + base * (H * V) + vc, mask=vc < tl.where(n > 0, V, 0), other=0.0)
    if VECTOR:
        g_p = tl.load(decays_ptr + base * DECAYS + kc, mask=kc < tl.where(n > 0, K, 0), other=0.0)
    else:
        g_p = tl.load(decays_ptr + base * DECAYS)

    # Channels of the ring of inputs and of the weights are in the order v, k, q.
    D: tl.constexpr = HV * V + HK * K + HQ * K
    inputs_ptr += row * (R * D)
    v_at = h_v * V
    k_at = HV * V + h_k * K
    q_at = HV * V + HK * K + h_q * K
    v, v_raw = _convolved(
        v_ptr + b * v_stride_b + h_v * v_stride_h, v_stride_t, inputs_ptr + v_at, weight_ptr + v_at * W,
        bias_ptr + v_at, V, vc, start, time, D, R, W, BIAS, SILU, TP,
    )  # fmt: skip
    k, k_raw = _convolved(
        k_ptr + b * k_stride_b + h_k * k_stride_h, k_stride_t, inputs_ptr + k_at, weight_ptr + k_at * W,
        bias_ptr + k_at, K, kc, start, time, D, R, W, BIAS, SILU, TP,
    )  # fmt: skip
    q, q_raw = _convolved(
        q_ptr + b * q_stride_b + h_q * q_stride_h, q_stride_t, inputs_ptr + q_at, weight_ptr + q_at * W,
        bias_ptr + q_at, K, kc, start, time, D, R, W, BIAS, SILU, TP,
    )  # fmt: skip
    if L2:
        k = _unit(k, l2_eps, TP)
        q = _unit(q, l2_eps, TP)
    q *= scale
    # Read as what will be committed, so that a token sees the same past pending and committed.
    k = k.to(keys_ptr.dtype.element_ty).to(tl.float32)

    # Commit, the next pending token on its way while one is added.
    for p in range(n):
        k_now = k_p.to(tl.float32)
        u_now = u_p.to(tl.float32)
        g_now = tl.exp(_clamped(g_p))
        slot = (base + p + 1) % N
        more = p + 1 < n
        k_p = tl.load(keys_ptr + slot * (HK * K) + kc, mask=kc < tl.where(more, K, 0), other=0.0)
        u_p = tl.load(values_ptr + slot * (H * V) + vc, mask=vc < tl.where(more, V, 0), other=0.0)
        if VECTOR:
            g_p = tl.load(decays_ptr + slot * DECAYS + kc, mask=kc < tl.where(more, K, 0), other=0.0)
            g_now = g_now[:, None]
        else:
            g_p = tl.load(decays_ptr + slot * DECAYS)
        state = state * g_now + k_now[:, None] * u_now[None, :]
    if n > 0:
        tl.store(state_ptrs, state.to(state_ptr.dtype.element_ty), mask=state_mask)

    # What the tokens write, u, and y from the state before the block; then token by token what the block itself holds.
    g_raw = g
    g = _clamped(g)
    if TP == 1:
        from_start = tl.exp(g)
        y = tl.sum((q * from_start)[:, None] * state, 0)
        if SKIP:
            y += skip * v
        u = v
        if DELTA:
            u -= tl.sum((k * from_start)[:, None] * state, 0)
        if BETA:
            u *= beta
        u = u.to(values_type).to(tl.float32)
        y += tl.sum(q * k, 0) * u
        tl.store(y_ptr + vc, y.to(y_ptr.dtype.element_ty), mask=vc < tl.where(time > 0, V, 0))
        _keep(values_ptr, u, V, vc, start, time, H * V, N, TP)
    else:
        # Tokens are columns here, so that warps share out value channels and a token is found without leaving a warp.
        i = t[None, :]
        j_ = t[:, None]
        v = tl.trans(v)
        u = v
        state_t = tl.trans(state)
        from_start = tl.exp(tl.cumsum(g, 0))
        if VECTOR:
            y = _product(state_t, tl.trans(q * from_start), PRECISION)
            if DELTA:
                u -= _product(state_t, tl.trans(k * from_start), PRECISION)
            read = tl.zeros((TP, TP), tl.float32)
            found = tl.zeros((TP, TP), tl.float32)
            between = tl.zeros((TP, BK), tl.float32)
            for back in range(time):
                j = time - 1 - back
                seen_k = tl.sum(tl.where(j_ == j, k, 0.0), 0)[None, :] * tl.exp(between)
                here = (j_ == j) & (i >= j)
                read = tl.where(here, tl.sum(q * seen_k, 1)[None, :], read)
                if DELTA:
                    found = tl.where(here, tl.sum(k * seen_k, 1)[None, :], found)
                g_j = _clamped(tl.load(g_ptr + j * g_stride_t + kc, mask=in_k, other=0.0).to(tl.float32))
                between = tl.where(j_ >= j, between + g_j[None, :], between)
        else:
            y = _product(state_t, tl.trans(q), PRECISION) * from_start[None, :]
            # From token j to token i: decays behind j, up to i.
            pair = tl.exp(tl.cumsum(tl.where(i > j_, g[None, :], 0.0), 1))
            read = pair * _product(k, tl.trans(q), PRECISION)
            if DELTA:
                u -= _product(state_t, tl.trans(k), PRECISION) * from_start[None, :]
                found = pair * _product(k, tl.trans(k), PRECISION)
        if not DELTA:
            # As laid out as a product: a token's values within one warp.
            u = tl.where(live[None, :], v, y)
        if SKIP:
            y += skip * v
        if BETA:
            u *= beta[None, :]
        if DELTA:
            found *= beta[None, :]
        for j in range(time):
            u_j = tl.sum(tl.where(i == j, u, 0.0), 1).to(values_type).to(tl.float32)[:, None]
            y += tl.where(i >= j, tl.sum(tl.where(j_ == j, read, 0.0), 0)[None, :] * u_j, 0.0)
            if DELTA:
                u -= tl.where(i > j, tl.sum(tl.where(j_ == j, found, 0.0), 0)[None, :] * u_j, 0.0)
        here = live[None, :] & in_v[:, None]
        tl.store(y_ptr + i * (H * V) + vc[:, None], y.to(y_ptr.dtype.element_ty), mask=here)
        slots = ((start % N).to(tl.int32) + i) % N
        tl.store(values_ptr + slots * (H * V) + vc[:, None], u.to(values_type), mask=here)

    # What heads and value blocks share is written by the first of them.
    k_width = tl.where((h % (H // HK) == 0) & (v_block == 0), K, 0)
    _keep(keys_ptr, k, k_width, kc, start, time, HK * K, N, TP)
    if VECTOR:
        _keep(decays_ptr, g_raw, tl.where(v_block == 0, K, 0), kc, start, time, DECAYS, N, TP)
    else:
        slots = ((start % N).to(tl.int32) + t) % N
        tl.store(decays_ptr + slots * DECAYS, g_raw, mask=t < tl.where(v_block == 0, time, 0))
    if W > 1:
        v_width = tl.where(h % (H // HV) == 0, V, 0)
        q_width = tl.where((h % (H // HQ) == 0) & (v_block == 0), K, 0)
        _keep(inputs_ptr + v_at, v_raw, v_width, vc, start, time, D, R, TP)
        _keep(inputs_ptr + k_at, k_raw, k_width, kc, start, time, D, R, TP)
        _keep(inputs_ptr + q_at, q_raw, q_width, kc, start, time, D, R, TP)
