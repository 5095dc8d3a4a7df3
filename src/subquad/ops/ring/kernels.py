"""A window that decodes, in Triton: read writes a block behind the committed tokens, absorb lets the oldest leave."""

import triton
import triton.language as tl

from subquad.ops.kernels import fold, product
from subquad.ops.overlap.kernels import begin
from subquad.ops.rope.kernels import turned


@triton.jit
def _rows(ptr, at, channels, inside, WIDTH: tl.constexpr):
    """Rows ``at`` of a contiguous ``[n, WIDTH]``; zeros outside."""
    mask = inside[:, None] & (channels < WIDTH)[None, :]
    return tl.load(ptr + at[:, None] * WIDTH + channels[None, :], mask=mask, other=0.0)


@triton.jit
def _features(
    keys_ptr, slot, inside, c, f, cos_ptrs, sin_ptrs, map_ptr, bias_ptr, map_scale,
    K: tl.constexpr, F: tl.constexpr, HALF: tl.constexpr, TURN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Features ``[L, F]`` of keys in a ring, turned back to no position first; rows outside are anything finite."""
    mask = inside[:, None] & (c < K)[None, :]
    if TURN:
        k = turned(keys_ptr + slot * K, c, mask, cos_ptrs, sin_ptrs, HALF)
    else:
        k = tl.load(keys_ptr + slot[:, None] * K + c[None, :], mask=mask, other=0.0)
    weight = tl.load(map_ptr + c[:, None] * F + f[None, :], mask=(c < K)[:, None] & (f < F)[None, :], other=0.0)
    bias = tl.load(bias_ptr + f, mask=f < F, other=0.0).to(tl.float32)
    logits = product(k, weight, PRECISION) * map_scale + bias[None, :]
    logits = tl.where((f < F)[None, :], logits, -float("inf"))
    weights = tl.exp(logits - tl.max(logits, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit
def read_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, back_cos_ptr, back_sin_ptr,
    keys_ptr, values_ptr, sink_k_ptr, sink_v_ptr, linear_ptr, seen_ptr, y_ptr, part_ptr, log_ptr,
    k_map_ptr, k_bias_ptr, q_map_ptr, q_bias_ptr, fade_ptr,
    scale, map_scale, table_stride_b, back_stride_b,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_g, v_stride_b, v_stride_t, v_stride_g,
    T: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
    S: tl.constexpr, F: tl.constexpr, HALF: tl.constexpr, TURN: tl.constexpr, FAR: tl.constexpr, PARTS: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr,
    BF: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """See `subquad.ops.ring.read`. Grid: parts of what a query sees, fastest, then BM queries, key heads, and rows.

    All parts but the last share the window's tokens before the block; the last one has the block, which it alone
    writes, the sinks and what lies behind the window. With one part the output is written, else each part's own and its
    logarithm of the sum to base 2.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    pid = tl.program_id(0)
    GROUP: tl.constexpr = H // G
    BLOCKS: tl.constexpr = (GROUP * T + BM - 1) // BM
    part, block, pid = pid % PARTS, (pid // PARTS) % BLOCKS, pid // (PARTS * BLOCKS)
    g, b = pid % G, (pid // G).to(tl.int64)
    m, j, c, f = block * BM + tl.arange(0, BM), tl.arange(0, BT), tl.arange(0, BK), tl.arange(0, BF)
    t, h, real = m % T, g * GROUP + m // T, m < GROUP * T
    keys_ptr += (b * G + g) * R * K
    values_ptr += (b * G + g) * R * K
    sink_k_ptr += (b * G + g) * S * K
    sink_v_ptr += (b * G + g) * S * K
    begin(OVERLAP)
    seen = tl.load(seen_ptr + b)
    q_rows = q_ptr + b * q_stride_b + t * q_stride_t + h * q_stride_h
    inside = real[:, None] & (c < K)[None, :]
    plain = tl.load(q_rows[:, None] + c[None, :], mask=inside, other=0.0)
    q = plain
    if TURN:
        at = b * table_stride_b + t * HALF
        q = turned(q_rows, c, inside, cos_ptr + at, sin_ptr + at, HALF)
    p, factor = (seen + t)[:, None], scale * LOG2E
    best = tl.full((BM,), -float("inf"), tl.float32)
    total, sums = tl.zeros((BM,), tl.float32), tl.zeros((BM, BK), tl.float32)

    # Near: the window's tokens before the block.
    first, last = tl.maximum(seen - W + 1, 0), seen
    if PARTS > 1:
        share = tl.cdiv(tl.cdiv(last - first, PARTS - 1), BN) * BN
        first = tl.minimum(first + part * share, last)
        last = tl.where(part == PARTS - 1, first, tl.minimum(first + share, last))
    for start in tl.range(first, last, BN):
        n = start + tl.arange(0, BN)
        there = n < last
        slot = tl.where(there, n, 0) % R
        near_k, near_v = _rows(keys_ptr, slot, c, there, K), _rows(values_ptr, slot, c, there, K)
        allowed = there[None, :] & (n[None, :] > p - W)
        best, total, sums = fold(q, near_k, near_v, allowed, factor, best, total, sums, PRECISION)

    if part == PARTS - 1:
        # The block into the ring, and into the sinks, by the first queries' program; what is not kept is written over
        # by the next read.
        mine = j < T
        k_rows = k_ptr + b * k_stride_b + j * k_stride_t + g * k_stride_g
        held = mine[:, None] & (c < K)[None, :]
        written = (j + block * T < T)[:, None] & (c < K)[None, :]
        if TURN:
            k_table = b * table_stride_b + j * HALF
            k = turned(k_rows, c, held, cos_ptr + k_table, sin_ptr + k_table, HALF)
        else:
            k = tl.load(k_rows[:, None] + c[None, :], mask=held, other=0.0)
        v_rows = v_ptr + b * v_stride_b + j * v_stride_t + g * v_stride_g
        v = tl.load(v_rows[:, None] + c[None, :], mask=held, other=0.0)
        to = ((seen + j) % R)[:, None] * K + c[None, :]
        tl.store(keys_ptr + to, k.to(keys_ptr.dtype.element_ty), mask=written)
        tl.store(values_ptr + to, v.to(values_ptr.dtype.element_ty), mask=written)
        if S > 0:
            to = (seen + j)[:, None] * K + c[None, :]
            early = written & (seen + j < S)[:, None]
            tl.store(sink_k_ptr + to, k.to(keys_ptr.dtype.element_ty), mask=early)
            tl.store(sink_v_ptr + to, v.to(values_ptr.dtype.element_ty), mask=early)
        earlier = mine[None, :] & (j[None, :] <= t[:, None]) & (j[None, :] > t[:, None] - W)
        best, total, sums = fold(q, k, v, earlier, factor, best, total, sums, PRECISION)
        # A block longer than the window leaves it at once: what was written is read again.
        tl.debug_barrier()
        if S > 0:
            s = tl.arange(0, BS)
            come = (s < S) & (s <= seen + T - 1 - W)
            first_k, first_v = _rows(sink_k_ptr, s, c, come, K), _rows(sink_v_ptr, s, c, come, K)
            behind = come[None, :] & (s[None, :] <= p - W)
            best, total, sums = fold(q, first_k, first_v, behind, factor, best, total, sums, PRECISION)
        if FAR:
            logs = tl.zeros((BM, BF), tl.float32)
            for i in tl.static_range(GROUP):
                map_ptrs = q_map_ptr + ((g * GROUP + i) * K + c[:, None]) * F + f[None, :]
                weight = tl.load(map_ptrs, mask=(c < K)[:, None] & (f < F)[None, :], other=0.0)
                logs += tl.where((m // T == i)[:, None], product(plain, weight, PRECISION), 0.0)
            far = tl.maximum(seen + t - (W + S - 1), 0).to(tl.float32)
            fade = tl.load(fade_ptr + h, mask=real, other=0.0).to(tl.float32) * tl.log(1.0 + far / W)
            known = real[:, None] & (f < F)[None, :]
            bias = tl.load(q_bias_ptr + h[:, None] * F + f[None, :], mask=known, other=0.0).to(tl.float32)
            logs = tl.where(known, (logs * map_scale - fade[:, None] + bias) * LOG2E, -float("inf"))
            higher = tl.maximum(best, tl.max(logs, 1))
            base = tl.where(higher == -float("inf"), 0.0, higher)
            old, weights = tl.exp2(best - base), tl.exp2(logs - base[:, None])
            best, total, sums = higher, total * old, sums * old[:, None]
            # What left the window before the block, then what leaves it within the block.
            linear_ptr += (b * G + g) * F * (K + 1)
            state = tl.load(
                linear_ptr + f[:, None] * (K + 1) + c[None, :], mask=(f < F)[:, None] & (c < K)[None, :], other=0.0
            )
            mass = tl.load(linear_ptr + f * (K + 1) + K, mask=f < F, other=0.0)
            total += tl.sum(weights * mass[None, :], 1)
            sums += tl.dot(weights, state, input_precision="tf32x3")
            leaves = seen - W + j
            gone = (leaves >= S) & (j < T)
            place = tl.where(gone, leaves, 0) % R
            back = b * back_stride_b + j * HALF
            features = _features(
                keys_ptr, place, gone, c, f, back_cos_ptr + back, back_sin_ptr + back, k_map_ptr + g * K * F,
                k_bias_ptr + g * F, map_scale, K, F, HALF, TURN, PRECISION,
            )  # fmt: skip
            leaving = tl.dot(weights, tl.trans(features), input_precision="tf32x3")
            leaving = tl.where(gone[None, :] & (leaves[None, :] <= p - W), leaving, 0.0)
            total += tl.sum(leaving, 1)
            left_v = _rows(values_ptr, place, c, gone, K)
            sums += tl.dot(leaving, left_v.to(tl.float32), input_precision="tf32x3")

    y = sums / tl.where(total > 0.0, total, 1.0)[:, None]
    row = (b * T + t) * H + h
    if PARTS == 1:
        tl.store(y_ptr + row[:, None] * K + c[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(part_ptr + (row * PARTS + part)[:, None] * K + c[None, :], y, mask=inside)
        log = tl.where(total > 0.0, best + tl.log2(tl.where(total > 0.0, total, 1.0)), -float("inf"))
        tl.store(log_ptr + row * PARTS + part, log, mask=real)


@triton.jit
def absorb_kernel(
    keys_ptr, values_ptr, linear_ptr, seen_ptr, n_ptr, back_cos_ptr, back_sin_ptr, k_map_ptr, k_bias_ptr,
    map_scale, back_stride_b,
    G: tl.constexpr, K: tl.constexpr, R: tl.constexpr, W: tl.constexpr, S: tl.constexpr,
    F: tl.constexpr, HALF: tl.constexpr, TURN: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BF: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """See `subquad.ops.ring.absorb_`. Grid: key heads, fastest, then rows."""
    pid = tl.program_id(0)
    g, b = pid % G, (pid // G).to(tl.int64)
    j, c, f = tl.arange(0, BT), tl.arange(0, BK), tl.arange(0, BF)
    ring = (b * G + g) * R * K
    begin(OVERLAP)
    seen, kept = tl.load(seen_ptr + b), tl.load(n_ptr + b)
    n = seen - W + j
    there = (n >= S) & (j < kept)
    slot = tl.where(there, n, 0) % R
    at = b * back_stride_b + j * HALF
    features = _features(
        keys_ptr + ring, slot, there, c, f, back_cos_ptr + at, back_sin_ptr + at, k_map_ptr + g * K * F,
        k_bias_ptr + g * F, map_scale, K, F, HALF, TURN, PRECISION,
    )  # fmt: skip
    features = tl.where(there[:, None], features, 0.0)
    v = _rows(values_ptr + ring, slot, c, there, K).to(tl.float32)
    state_ptrs = linear_ptr + ((b * G + g) * F + f[:, None]) * (K + 1) + c[None, :]
    inside = (f < F)[:, None] & (c < K)[None, :]
    state = tl.load(state_ptrs, mask=inside, other=0.0)
    state += tl.dot(tl.trans(features), v, input_precision="tf32x3")
    tl.store(state_ptrs, state, mask=inside)
    mass_ptrs = linear_ptr + ((b * G + g) * F + f) * (K + 1) + K
    mass = tl.load(mass_ptrs, mask=f < F, other=0.0) + tl.sum(features, 0)
    tl.store(mass_ptrs, mass, mask=f < F)
