"""A step in Triton: one pass over the state, to read it or to write the next one."""

import triton
import triton.language as tl


@triton.jit
def _part(table, at, inside, k: tl.constexpr, size):
    """Real and imaginary parts of part k of the systems, of a tile of channels and modes."""
    return tl.split(tl.load(table + k * size + at, mask=inside, other=0.0))


@triton.jit(do_not_specialize=["B"])
def step_kernel(
    state_ptr, u_ptr, table_ptr, y_ptr, pool_ptr, rows_ptr, n_ptr,
    B, D, G, stride_state, stride_u, stride_pool,
    N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr,
    LOW: tl.constexpr, WRITE: tl.constexpr, INDEXED: tl.constexpr,
):  # fmt: skip
    """Outputs of ``ROWS`` rows and ``BD`` channels, or, for WRITE, their states. Grid: tiles of channels, of rows."""
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    n, p = tl.arange(0, BN), tl.arange(0, 2)
    within = (n * 2)[None, :, None] + p[None, None, :]
    inside = (d < D)[:, None, None] & (n < N)[None, :, None] & (p < 2)[None, None, :]
    # A system is shared by channels in succession.
    at = (d // (D // G) * (N * 2))[:, None, None] + within
    size = G * N * 2
    keep_re, keep_im = _part(table_ptr, at, inside, 0, size)
    input_re, input_im = _part(table_ptr, at, inside, 1, size)
    if not WRITE:
        output_re, output_im = _part(table_ptr, at, inside, 2, size)
    if LOW:
        low_re, low_im = _part(table_ptr, at, inside, 3, size)
        sees_re, sees_im = _part(table_ptr, at, inside, 4, size)
    place = (d * (N * 2))[:, None, None] + within
    for i in range(ROWS):
        b = tl.program_id(1) * ROWS + i
        row = b.to(tl.int64)
        here = d < tl.where(b < B, D, 0)
        live = inside & here[:, None, None]
        re, im = tl.split(tl.load(state_ptr + row * stride_state + place, mask=live, other=0.0))
        u = tl.load(u_ptr + row * stride_u + d, mask=here, other=0.0).to(tl.float32)[:, None]
        next_re = keep_re * re - keep_im * im + input_re * u
        next_im = keep_re * im + keep_im * re + input_im * u
        if LOW:
            seen = tl.sum(sees_re * re - sees_im * im, 1)[:, None]
            next_re -= low_re * seen
            next_im -= low_im * seen
        if WRITE:
            kept = tl.load(n_ptr + b, mask=b < B, other=0) > 0
            target = row
            if INDEXED:
                target = tl.load(rows_ptr + b, mask=b < B, other=0)
            after = tl.join(tl.where(kept, next_re, re), tl.where(kept, next_im, im))
            tl.store(pool_ptr + target * stride_pool + place, after, mask=live)
        else:
            y = tl.sum(output_re * next_re - output_im * next_im, 1)
            tl.store(y_ptr + row * D + d, y.to(y_ptr.dtype.element_ty), mask=here)
