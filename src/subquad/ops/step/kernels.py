"""A step in Triton: one pass over the states, to read them, to write the next ones, or both.

A program holds a tile of channels and rows whole, so that all its loads are under way at once. Channels come first: the
compiler then deals them out to threads before rows, and a thread has what it needs of its systems once for all rows.
"""

import triton
import triton.language as tl

from subquad.ops.overlap.kernels import begin, prefetch

# Real numbers of a line of the cache.
LINE = tl.constexpr(32)


@triton.jit
def _tile(D, SIZE: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr):
    """A program's channels, rows and numbers of a state, and which of these there are."""
    d, b = tl.program_id(0) * BD + tl.arange(0, BD), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, BN)[None, None, :]
    return d, b, n, (d < D)[:, None, None] & (n < SIZE)


@triton.jit
def _ahead(state_ptr, d, b, D, B, stride, SIZE: tl.constexpr, BN: tl.constexpr, OVERLAP: tl.constexpr):
    """Fetch states while the launch before this one runs: into the cache that it writes to, so never too early."""
    LINES: tl.constexpr = (BN + LINE - 1) // LINE
    at = tl.minimum(tl.arange(0, LINES) * LINE, SIZE - 1)[None, None, :]
    row = tl.minimum(b, B - 1).to(tl.int64) * stride
    prefetch(state_ptr + row[None, :, None] + (tl.minimum(d, D - 1) * SIZE)[:, None, None] + at, OVERLAP)


@triton.jit
def _output(state, u, reads, direct, skip, SKIP: tl.constexpr, GELU: tl.constexpr):
    """What is read behind a token, ``[BD, ROWS]``."""
    if SKIP:
        direct += skip.to(tl.float32)
    y = tl.sum(state * reads, 2) + direct[:, None] * u
    if GELU:
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    return y


@triton.jit
def _parts(x, BD: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr):
    """Real and imaginary parts that lie side by side."""
    return tl.split(tl.reshape(x, (BD, ROWS, BN // 2, 2)))


@triton.jit
def _moves(ptrs, size, among, LOW: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr):
    """The parts of keep and input, and of low and sees where a system has these."""
    keep_re, keep_im = _parts(tl.load(ptrs, mask=among, other=0.0), BD, 1, BN)
    input_re, input_im = _parts(tl.load(ptrs + size, mask=among, other=0.0), BD, 1, BN)
    # Of a diagonal system what nobody reads.
    low_re, low_im, sees_re, sees_im = keep_re, keep_im, keep_re, keep_im
    if LOW:
        low_re, low_im = _parts(tl.load(ptrs + 2 * size, mask=among, other=0.0), BD, 1, BN)
        sees_re, sees_im = _parts(tl.load(ptrs + 3 * size, mask=among, other=0.0), BD, 1, BN)
    return keep_re, keep_im, input_re, input_im, low_re, low_im, sees_re, sees_im


@triton.jit
def _next(
    state, u, keep_re, keep_im, input_re, input_im, low_re, low_im, sees_re, sees_im,
    LOW: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The state behind a token."""
    re, im = _parts(state, BD, ROWS, BN)
    u = u[:, :, None]
    next_re = keep_re * re - keep_im * im + input_re * u
    next_im = keep_re * im + keep_im * re + input_im * u
    if LOW:
        seen = tl.sum(sees_re * re - sees_im * im, 2)[:, :, None]
        next_re -= low_re * seen
        next_im -= low_im * seen
    return tl.reshape(tl.join(next_re, next_im), (BD, ROWS, BN))


@triton.jit(do_not_specialize=["B"])
def read_kernel(
    state_ptr, u_ptr, reads_ptr, direct_ptr, skip_ptr, y_ptr,
    B, D, G, stride_state, stride_u,
    SIZE: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr,
    SKIP: tl.constexpr, GELU: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Outputs. Grid: tiles of channels, of rows."""
    d, b, n, among = _tile(D, SIZE, BN, BD, ROWS)
    wide = b.to(tl.int64)
    # A system is shared by channels in succession.
    g = d // (D // G)
    reads = tl.load(reads_ptr + (g * SIZE)[:, None, None] + n, mask=among, other=0.0)
    direct = tl.load(direct_ptr + g, mask=d < D, other=0.0)
    skip = tl.load(skip_ptr + d, mask=d < D, other=0.0) if SKIP else 0.0
    _ahead(state_ptr, d, b, D, B, stride_state, SIZE, BN, OVERLAP)
    begin(OVERLAP)
    place = (wide * stride_state)[None, :, None] + (d * SIZE)[:, None, None] + n
    state = tl.load(state_ptr + place, mask=among & (b < B)[None, :, None], other=0.0)
    inside = (d < D)[:, None] & (b < B)[None, :]
    u = tl.load(u_ptr + (wide * stride_u)[None, :] + d[:, None], mask=inside, other=0.0).to(tl.float32)
    y = _output(state, u, reads, direct, skip, SKIP, GELU)
    tl.store(y_ptr + (wide * D)[None, :] + d[:, None], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["B"])
def write_kernel(
    state_ptr, u_ptr, moves_ptr, pool_ptr, rows_ptr, n_ptr,
    B, D, G, stride_state, stride_u, stride_pool,
    SIZE: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr,
    LOW: tl.constexpr, INDEXED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Next states. Grid: tiles of channels, of rows."""
    d, b, n, among = _tile(D, SIZE, BN, BD, ROWS)
    wide = b.to(tl.int64)
    # A system is shared by channels in succession.
    moves = _moves(moves_ptr + (d // (D // G) * SIZE)[:, None, None] + n, G * SIZE, among, LOW, BD, BN)
    _ahead(state_ptr, d, b, D, B, stride_state, SIZE, BN, OVERLAP)
    begin(OVERLAP)
    place = (d * SIZE)[:, None, None] + n
    inside = among & (b < B)[None, :, None]
    state = tl.load(state_ptr + (wide * stride_state)[None, :, None] + place, mask=inside, other=0.0)
    u_ptrs = u_ptr + (wide * stride_u)[None, :] + d[:, None]
    u = tl.load(u_ptrs, mask=(d < D)[:, None] & (b < B)[None, :], other=0.0).to(tl.float32)
    kept = (tl.load(n_ptr + b, mask=b < B, other=0) > 0)[None, :, None]
    target = wide
    if INDEXED:
        target = tl.load(rows_ptr + b, mask=b < B, other=0)
    after = tl.where(kept, _next(state, u, *moves, LOW, BD, ROWS, BN), state)
    tl.store(pool_ptr + (target * stride_pool)[None, :, None] + place, after, mask=inside)


@triton.jit(do_not_specialize=["B"])
def advance_kernel(
    state_ptr, u_ptr, reads_ptr, direct_ptr, skip_ptr, moves_ptr, n_ptr, y_ptr,
    B, D, G, stride_state, stride_u,
    SIZE: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr,
    SKIP: tl.constexpr, GELU: tl.constexpr, LOW: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Outputs, and next states where the states lie. Grid: tiles of channels, of rows."""
    d, b, n, among = _tile(D, SIZE, BN, BD, ROWS)
    wide = b.to(tl.int64)
    # A system is shared by channels in succession.
    g = d // (D // G)
    own = (g * SIZE)[:, None, None] + n
    reads = tl.load(reads_ptr + own, mask=among, other=0.0)
    direct = tl.load(direct_ptr + g, mask=d < D, other=0.0)
    skip = tl.load(skip_ptr + d, mask=d < D, other=0.0) if SKIP else 0.0
    moves = _moves(moves_ptr + own, G * SIZE, among, LOW, BD, BN)
    _ahead(state_ptr, d, b, D, B, stride_state, SIZE, BN, OVERLAP)
    begin(OVERLAP)
    ptrs = state_ptr + (wide * stride_state)[None, :, None] + (d * SIZE)[:, None, None] + n
    there = among & (b < B)[None, :, None]
    state = tl.load(ptrs, mask=there, other=0.0)
    inside = (d < D)[:, None] & (b < B)[None, :]
    u = tl.load(u_ptr + (wide * stride_u)[None, :] + d[:, None], mask=inside, other=0.0).to(tl.float32)
    kept = (tl.load(n_ptr + b, mask=b < B, other=0) > 0)[None, :, None]
    y = _output(state, u, reads, direct, skip, SKIP, GELU)
    tl.store(y_ptr + (wide * D)[None, :] + d[:, None], y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(ptrs, _next(state, u, *moves, LOW, BD, ROWS, BN), mask=there & kept)
