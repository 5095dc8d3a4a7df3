"""The selective scan's kernels: what chunks add to the state, states between chunks, then all tokens of a chunk.

Time is cut into chunks of C tokens, and a program has one chunk of some channels of one group. The n entries of a
channel's state run one after the other: for each, an associative scan along the chunk's tokens gives all states at
once, in registers, and only the states between chunks ever stand in memory. What is exponentiated is ``A`` times sums
of steps, at most 0.
"""

import triton
import triton.language as tl


@triton.jit
def place(CHUNKS, GROUPS, BLOCKS):
    """Of a program: row, chunk, group and block of channels; blocks next to each other, as they lie in memory."""
    pid = tl.program_id(0)
    block = pid % BLOCKS
    rest = pid // BLOCKS
    group = rest % GROUPS
    rest = rest // GROUPS
    return (rest // CHUNKS).to(tl.int64), rest % CHUNKS, group, block


@triton.jit
def tile(x, stride, n, T, channel, inside, SHIFT: tl.constexpr, C: tl.constexpr):
    """Some channels of chunk n, each row SHIFT tokens later, ``[c, channels]`` in float32; zeros outside the chunk."""
    own = tl.arange(0, C) + SHIFT
    at = n * C + own
    there = (own >= 0) & (own < C) & (at < T)
    x += at.to(tl.int64)[:, None] * stride + channel[None, :]
    return tl.load(x, mask=there[:, None] & inside[None, :], other=0.0).to(tl.float32)


@triton.jit
def column(x, stride, n, T, SHIFT: tl.constexpr, C: tl.constexpr):
    """One number a token of chunk n, ``[c]``, as `tile`."""
    own = tl.arange(0, C) + SHIFT
    at = n * C + own
    there = (own >= 0) & (own < C) & (at < T)
    return tl.load(x + at.to(tl.int64) * stride, mask=there, other=0.0).to(tl.float32)


@triton.jit
def document(documents, b, at, T):
    """Document of the tokens `at`; before the first stands document 0, behind the last its own."""
    return tl.where(at < 0, 0, tl.load(documents + b * T + tl.minimum(tl.maximum(at, 0), T - 1)))


@triton.jit
def decays(dt, rate, documents, b, n, T, SHIFT: tl.constexpr, DOCUMENTS: tl.constexpr, C: tl.constexpr):
    """What each token leaves of the state before it, ``[c, channels]``: nothing where it begins a document."""
    made = tl.exp(dt * rate[None, :])
    if DOCUMENTS:
        at = n * C + tl.arange(0, C) + SHIFT
        goes_on = document(documents, b, at, T) == document(documents, b, at - 1, T)
        made = tl.where(goes_on[:, None], made, 0.0)
    return made


@triton.jit
def follow(a, x, b, y):
    """Two maps ``h -> a h + x`` one after the other."""
    return a * b, x * b + y


@triton.jit(do_not_specialize=["T", "CHUNKS"])
def products(
    x, dt, a, w, documents, added, sums, sxb, sxt, sdb, sdt, swb, swt, swg, T, CHUNKS, GROUPS,
    P: tl.constexpr, N: tl.constexpr, C: tl.constexpr, BD: tl.constexpr,
    REVERSE: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """What a chunk adds to the state, from u and B; or, in reverse, to its gradient, from dy and C.

    Forward writes the sum of the chunk's steps, too.
    """
    BLOCKS: tl.constexpr = (P + BD - 1) // BD
    b, n, group, block = place(CHUNKS, GROUPS, BLOCKS)
    local = block * BD + tl.arange(0, BD)
    inside, channel = local < P, group * P + local
    D = GROUPS * P
    steps = tile(dt + b * sdb, sdt, n, T, channel, inside, 0, C)
    written = tile(x + b * sxb, sxt, n, T, channel, inside, 0, C)
    if REVERSE:
        between = tl.cumsum(steps, 0)
    else:
        written *= steps
        between = tl.cumsum(tile(dt + b * sdb, sdt, n, T, channel, inside, 1, C), 0, reverse=True)
        tl.store(sums + (b * CHUNKS + n) * D + channel, tl.sum(steps, 0), mask=inside)
    if DOCUMENTS:
        at = n * C + tl.arange(0, C)
        edge = n * C - 1 if REVERSE else n * C + C - 1
        same = document(documents, b, at, T) == document(documents, b, edge, T)
        written = tl.where(same[:, None], written, 0.0)
    w += b * swb + group * swg
    for s in range(N):
        rate = tl.load(a + channel * N + s, mask=inside, other=0.0).to(tl.float32)
        made = tl.exp(between * rate[None, :]) * written * column(w + s, swt, n, T, 0, C)[:, None]
        tl.store(added + ((b * CHUNKS + n) * N + s) * D + channel, tl.sum(made, 0), mask=inside)


@triton.jit(do_not_specialize=["T", "CHUNKS"])
def states(
    added, sums, a, documents, start, end, T, CHUNKS, D,
    N: tl.constexpr, C: tl.constexpr, BD: tl.constexpr,
    REVERSE: tl.constexpr, STORE: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """``h <- exp(A sum_n) h + added_n`` over the chunks; each added_n is overwritten by the h that it meets."""
    pid = tl.program_id(0)
    blocks = (D + BD - 1) // BD
    channel = pid % blocks * BD + tl.arange(0, BD)
    inside = channel < D
    s = pid // blocks % N
    b = (pid // blocks // N).to(tl.int64)
    rate = tl.load(a + channel * N + s, mask=inside, other=0.0).to(tl.float32)
    state = tl.load(start + (b * D + channel) * N + s, mask=inside, other=0.0).to(tl.float32)
    for i in range(CHUNKS):
        n = CHUNKS - 1 - i if REVERSE else i
        to = added + ((b * CHUNKS + n) * N + s) * D + channel
        new = tl.load(to, mask=inside, other=0.0)
        decay = tl.exp(rate * tl.load(sums + (b * CHUNKS + n) * D + channel, mask=inside, other=0.0))
        if DOCUMENTS:
            edges = n * C - 1 + tl.arange(0, 2) * C
            both = document(documents, b, edges, T)
            decay = tl.where(tl.min(both, 0) == tl.max(both, 0), decay, 0.0)
        if STORE:
            tl.store(to, state, mask=inside)
        state = decay * state + new
    tl.store(end + (b * D + channel) * N + s, state, mask=inside)


@triton.jit(do_not_specialize=["T", "CHUNKS"])
def outputs(
    u, dt, a, w_in, w_out, skip, before, documents, y,
    sub, sut, sdb, sdt, sib, sit, sig, sob, sot, sog, T, CHUNKS, GROUPS,
    P: tl.constexpr, N: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """``y = sum_n C_n h_n + D u`` of a chunk, from the state before it."""
    BLOCKS: tl.constexpr = (P + BD - 1) // BD
    b, n, group, block = place(CHUNKS, GROUPS, BLOCKS)
    local = block * BD + tl.arange(0, BD)
    inside, channel = local < P, group * P + local
    own = tl.arange(0, C)
    D = GROUPS * P
    first = (own == 0)[:, None]
    u_cd = tile(u + b * sub, sut, n, T, channel, inside, 0, C)
    dt_cd = tile(dt + b * sdb, sdt, n, T, channel, inside, 0, C)
    w_in += b * sib + group * sig
    w_out += b * sob + group * sog
    total = tl.load(skip + channel, mask=inside, other=0.0).to(tl.float32)[None, :] * u_cd
    for s in range(N):
        rate = tl.load(a + channel * N + s, mask=inside, other=0.0).to(tl.float32)
        state = tl.load(before + ((b * CHUNKS + n) * N + s) * D + channel, mask=inside, other=0.0)
        decay = decays(dt_cd, rate, documents, b, n, T, 0, DOCUMENTS, C)
        added = dt_cd * u_cd * column(w_in + s, sit, n, T, 0, C)[:, None]
        added = tl.where(first, added + decay * state[None, :], added)
        _, h = tl.associative_scan((decay, added), 0, follow)
        total += h * column(w_out + s, sot, n, T, 0, C)[:, None]
    at = n * C + own
    to = y + (b * T + at)[:, None] * D + channel[None, :]
    tl.store(to, total.to(y.dtype.element_ty), mask=(at < T)[:, None] & inside[None, :])
