"""Few tokens times a weight in Triton: a program makes a few columns of the output, for all tokens.

UNIT divides the length K of a row. A compiler that knows it loads as wide; by itself it looks for 16 alone, and where 8
is the most it would load number by number, with none under way ahead of its use. Kernels that hold whole rows take K as
a constant.
"""

import triton
import triton.language as tl

from subquad.ops import backends
from subquad.ops.overlap.kernels import begin, prefetch

# The interpreter multiplies the bits of bfloat16 as integers: there, products are of the same numbers in float32.
INTERPRETED = tl.constexpr(backends.interpreted())

# Tiles of a weight that are fetched while the launch before still runs; a long row has more than these.
AHEAD = tl.constexpr(4)


@triton.jit
def _multiply(a, b, sums, PRECISION: tl.constexpr):
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision=PRECISION)


@triton.jit
def _behind(
    pid, weight_ptr, bias_ptr, n, column, biased, next_weight, next_bias, next_n, NEXT_BIASED: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """On to the next layer where the program lies behind this one."""
    blocks = tl.cdiv(n, BN)
    on = pid >= blocks
    return (
        tl.where(on, pid - blocks, pid),
        tl.where(on, next_weight, weight_ptr),
        tl.where(on, next_bias, bias_ptr),
        tl.where(on, next_n, n),
        tl.where(on, column + n, column),
        tl.where(on, next_n * NEXT_BIASED, biased),
    )


@triton.jit
def _weights(weight_ptr, j, k, n, K):
    """A tile ``[BK, BN]`` of a weight ``[n, K]``, transposed."""
    ptrs = weight_ptr + j[None, :].to(tl.int64) * K + k[:, None]
    return tl.load(ptrs, mask=(j < n)[None, :] & (k < K)[:, None], other=0.0)


@triton.jit
def _ahead(weight_ptr, j, n, K, BK: tl.constexpr, OVERLAP: tl.constexpr):
    """Fetch the first tiles of a weight while the launch before this one still runs."""
    LINE: tl.constexpr = 128 // (weight_ptr.dtype.element_ty.primitive_bitwidth // 8)
    k = tl.minimum(tl.arange(0, AHEAD * BK // LINE) * LINE, K - 1)
    prefetch(weight_ptr + tl.minimum(j, n - 1)[:, None].to(tl.int64) * K + k[None, :], OVERLAP)


@triton.jit
def _tokens(x_ptr, m, k, rows, K):
    """A tile ``[BM, BK]`` of the input."""
    return tl.load(x_ptr + m[:, None] * K + k[None, :], mask=(m < rows)[:, None] & (k < K)[None, :], other=0.0)


@triton.jit
def _part(ptr, i, n, K: tl.constexpr, START: tl.constexpr, SIZE: tl.constexpr, SLICES: tl.constexpr):
    """SIZE numbers of each of the rows `i` of the n of a matrix ``[n, K]``."""
    if SLICES:
        k = tl.arange(0, SLICES)[:, None] * (SIZE // SLICES) + tl.arange(0, SIZE // SLICES)[None, :]
        i, k = i[None, :, None], START + k[:, None, :]
    else:
        i, k = i[:, None], START + tl.arange(0, SIZE)[None, :]
    return tl.load(ptr + i.to(tl.int64) * K + k, mask=(i < n) & (k < K), other=0.0)


@triton.jit
def _whole(ptr, i, n, K: tl.constexpr, BK: tl.constexpr, TAIL: tl.constexpr, SLICES: tl.constexpr):
    """Rows `i` of the n of a matrix ``[n, K]``, the first BK numbers and the TAIL behind them.

    Each is ``[i, numbers]``, or ``[SLICES, i, numbers / SLICES]`` for a warp each.
    """
    first = _part(ptr, i, n, K, 0, BK, SLICES)
    return first, _part(ptr, i, n, K, BK, TAIL, SLICES) if TAIL else first


@triton.jit
def _squares(x, SLICES: tl.constexpr):
    """Sums of squares of each token's numbers, by slice where there are slices."""
    wide = x.to(tl.float32)
    return tl.sum(wide * wide, 2 if SLICES else 1)


@triton.jit
def _normed(x, scale, K: tl.constexpr, eps, TAIL: tl.constexpr, SLICES: tl.constexpr):
    """The RMS norm of whole tokens, rounded as by a launch of its own."""
    squares = _squares(x[0], SLICES)
    if TAIL:
        squares += _squares(x[1], SLICES)
    squares = tl.sum(squares, 0) if SLICES else squares
    factor = 1.0 / tl.sqrt(squares / K + eps)
    factor = factor[None, :, None] if SLICES else factor[:, None]
    first = (x[0].to(tl.float32) * factor * scale[0].to(tl.float32)).to(x[0].dtype)
    return first, (x[1].to(tl.float32) * factor * scale[1].to(tl.float32)).to(x[1].dtype) if TAIL else first


@triton.jit
def _slices(w, x, sums):
    """``sums + w x^T``, slice by slice."""
    if INTERPRETED:
        w = w.to(tl.float32)
        x = x.to(tl.float32)
    return tl.dot(w, tl.permute(x, (0, 2, 1)), sums)


@triton.jit
def _product(w, x, TAIL: tl.constexpr, SLICES: tl.constexpr):
    """``x w^T`` of whole rows, ``[m, n]`` in float32.

    Slices are multiplied by the matrix unit, each by a warp of its own: one warp alone would wait for its own last sum
    all along a row. The weight stands first, so that few tokens fill the unit's narrow side.
    """
    if SLICES:
        sums = _slices(w[0], x[0], None)
        if TAIL:
            sums = _slices(w[1], x[1], sums)
        sums = tl.trans(tl.sum(sums, 0))
    else:
        sums = tl.sum(w[0].to(tl.float32)[None, :, :] * x[0].to(tl.float32)[:, None, :], 2)
    return sums


@triton.jit
def _sum(a, b):
    """Rounded as by a launch of its own."""
    return (a.to(tl.float32) + b.to(tl.float32)).to(a.dtype)


@triton.jit
def _layer(
    pid, w0, w1, w2, w3, w4, w5, b0, b1, b2, b3, b4, b5, n0, n1, n2, n3, n4, n5,
    COUNT: tl.constexpr, BIASES: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Of the program's layer: its block of columns, weight, bias, columns, first column in y, and columns with bias."""
    weight_ptr, bias_ptr, n, column, biased = w0, b0, n0, 0, n0 * (BIASES & 1)
    if COUNT > 1:
        pid, weight_ptr, bias_ptr, n, column, biased = _behind(
            pid, weight_ptr, bias_ptr, n, column, biased, w1, b1, n1, (BIASES >> 1) & 1, BN
        )
    if COUNT > 2:
        pid, weight_ptr, bias_ptr, n, column, biased = _behind(
            pid, weight_ptr, bias_ptr, n, column, biased, w2, b2, n2, (BIASES >> 2) & 1, BN
        )
    if COUNT > 3:
        pid, weight_ptr, bias_ptr, n, column, biased = _behind(
            pid, weight_ptr, bias_ptr, n, column, biased, w3, b3, n3, (BIASES >> 3) & 1, BN
        )
    if COUNT > 4:
        pid, weight_ptr, bias_ptr, n, column, biased = _behind(
            pid, weight_ptr, bias_ptr, n, column, biased, w4, b4, n4, (BIASES >> 4) & 1, BN
        )
    if COUNT > 5:
        pid, weight_ptr, bias_ptr, n, column, biased = _behind(
            pid, weight_ptr, bias_ptr, n, column, biased, w5, b5, n5, (BIASES >> 5) & 1, BN
        )
    return pid, weight_ptr, bias_ptr, n, column, biased


@triton.jit
def project_kernel(
    x_ptr, add_ptr, y_ptr, w0, w1, w2, w3, w4, w5, b0, b1, b2, b3, b4, b5, n0, n1, n2, n3, n4, n5,
    rows, K, y_stride,
    UNIT: tl.constexpr, COUNT: tl.constexpr, BIASES: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """``y = [x w0^T + b0, x w1^T + b1, ...] + add``; bit i of BIASES says whether layer i has a bias.

    Grid: blocks of columns, layer after layer, and of tokens. `x` and `add` are contiguous. BM is 1 for one token,
    which needs no matrix unit.
    """
    K = K // UNIT * UNIT
    pid, weight_ptr, bias_ptr, n, column, biased = _layer(
        tl.program_id(0), w0, w1, w2, w3, w4, w5, b0, b1, b2, b3, b4, b5, n0, n1, n2, n3, n4, n5, COUNT, BIASES, BN
    )
    m, j = tl.program_id(1) * BM + tl.arange(0, BM), pid * BN + tl.arange(0, BN)
    if BM == 1:
        parts = tl.zeros((BN, BK), tl.float32)
        _ahead(weight_ptr, j, n, K, BK, OVERLAP)
        begin(OVERLAP)
        for start in tl.range(0, K, BK, num_stages=STAGES):
            k = start + tl.arange(0, BK)
            ptrs = weight_ptr + j[:, None].to(tl.int64) * K + k[None, :]
            w = tl.load(ptrs, mask=(j < n)[:, None] & (k < K)[None, :], other=0.0)
            parts += w.to(tl.float32) * tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
        sums = tl.sum(parts, 1)[None, :]
    else:
        sums = tl.zeros((BM, BN), tl.float32)
        _ahead(weight_ptr, j, n, K, BK, OVERLAP)
        begin(OVERLAP)
        for start in tl.range(0, K, BK, num_stages=STAGES):
            k = start + tl.arange(0, BK)
            w = _weights(weight_ptr, j, k, n, K)
            x = _tokens(x_ptr, m, k, rows, K)
            sums = _multiply(x, w, sums, PRECISION)
    inside = (m < rows)[:, None] & (j < n)[None, :]
    if BIASES:
        sums += tl.load(bias_ptr + j, mask=j < biased, other=0.0).to(tl.float32)[None, :]
    ptrs = m[:, None] * y_stride + column + j[None, :]
    if ADD:
        # Rounded before the sum, as two operations would.
        sums = sums.to(y_ptr.dtype.element_ty).to(tl.float32)
        sums += tl.load(add_ptr + ptrs, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + ptrs, sums.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gate_kernel(
    x_ptr, gate_ptr, up_ptr, gate_bias, up_bias, out_ptr, rows, K, n,
    UNIT: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """``silu(gate(x)) * up(x)``, or with the sigmoid. Grid: blocks of columns, and of tokens."""
    K = K // UNIT * UNIT
    m, j = tl.program_id(1) * BM + tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
    gates, ups = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32)
    _ahead(gate_ptr, j, n, K, BK, OVERLAP)
    _ahead(up_ptr, j, n, K, BK, OVERLAP)
    begin(OVERLAP)
    for start in tl.range(0, K, BK, num_stages=STAGES):
        k = start + tl.arange(0, BK)
        g, u = _weights(gate_ptr, j, k, n, K), _weights(up_ptr, j, k, n, K)
        x = _tokens(x_ptr, m, k, rows, K)
        gates, ups = _multiply(x, g, gates, PRECISION), _multiply(x, u, ups, PRECISION)
    if BIAS:
        gates += tl.load(gate_bias + j, mask=j < n, other=0.0).to(tl.float32)[None, :]
        ups += tl.load(up_bias + j, mask=j < n, other=0.0).to(tl.float32)[None, :]
    inverse = 1.0 + tl.exp(-gates)
    out = gates / inverse * ups if SILU else ups / inverse
    inside = (m < rows)[:, None] & (j < n)[None, :]
    tl.store(out_ptr + m[:, None] * n + j[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def project_few_kernel(
    x_ptr, norm_ptr, add_ptr, more_ptr, y_ptr, w0, w1, w2, w3, w4, w5, b0, b1, b2, b3, b4, b5, n0, n1, n2, n3, n4, n5,
    rows, y_stride, eps,
    K: tl.constexpr, BM: tl.constexpr, COUNT: tl.constexpr, BIASES: tl.constexpr, NORM: tl.constexpr,
    ADD: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TAIL: tl.constexpr, SLICES: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """`project_kernel` of few tokens: a program holds whole rows of a weight and of BM tokens.

    SLICES is 0 where the matrix unit is not worth its way. With NORM it takes the RMS norm of each token before. ADD
    says how many of `add` and `more` there are, whose sum is rounded first. Grid: blocks of columns, layer after layer,
    and of tokens.
    """
    pid, weight_ptr, bias_ptr, n, column, biased = _layer(
        tl.program_id(0), w0, w1, w2, w3, w4, w5, b0, b1, b2, b3, b4, b5, n0, n1, n2, n3, n4, n5, COUNT, BIASES, BN
    )
    j = pid * BN + tl.arange(0, BN)
    w = _whole(weight_ptr, j, n, K, BK, TAIL, SLICES)
    scale = _whole(norm_ptr, tl.arange(0, 1), 1, K, BK, TAIL, SLICES) if NORM else 0.0
    bias = tl.load(bias_ptr + j, mask=j < biased, other=0.0).to(tl.float32) if BIASES else 0.0
    begin(OVERLAP)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    x = _whole(x_ptr, m, rows, K, BK, TAIL, SLICES)
    ptrs, inside = m[:, None] * y_stride + column + j[None, :], (m < rows)[:, None] & (j < n)[None, :]
    add = tl.load(add_ptr + ptrs, mask=inside, other=0.0) if ADD else 0.0
    if ADD == 2:
        add = _sum(add, tl.load(more_ptr + ptrs, mask=inside, other=0.0))
    if NORM:
        x = _normed(x, scale, K, eps, TAIL, SLICES)
    sums = _product(w, x, TAIL, SLICES)
    if BIASES:
        sums += bias[None, :]
    if ADD:
        sums = sums.to(y_ptr.dtype.element_ty).to(tl.float32) + add.to(tl.float32)
    tl.store(y_ptr + ptrs, sums.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gate_few_kernel(
    x_ptr, y_ptr, norm_ptr, gate_ptr, up_ptr, gate_bias, up_bias, out_ptr, rows, n, eps,
    K: tl.constexpr, BM: tl.constexpr, BIAS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TAIL: tl.constexpr,
    SLICES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """``silu(gate(z)) * up(z)`` with ``z = norm(x + y)``, of few tokens. Grid: blocks of columns, and of tokens."""
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    j = tl.program_id(0) * BN + tl.arange(0, BN)
    g, u = _whole(gate_ptr, j, n, K, BK, TAIL, SLICES), _whole(up_ptr, j, n, K, BK, TAIL, SLICES)
    scale = _whole(norm_ptr, tl.arange(0, 1), 1, K, BK, TAIL, SLICES)
    of_gate = tl.load(gate_bias + j, mask=j < n, other=0.0).to(tl.float32) if BIAS else 0.0
    of_up = tl.load(up_bias + j, mask=j < n, other=0.0).to(tl.float32) if BIAS else 0.0
    begin(OVERLAP)
    x, y = _whole(x_ptr, m, rows, K, BK, TAIL, SLICES), _whole(y_ptr, m, rows, K, BK, TAIL, SLICES)
    x = _sum(x[0], y[0]), _sum(x[1], y[1])
    z = _normed(x, scale, K, eps, TAIL, SLICES)
    gates, ups = _product(g, z, TAIL, SLICES), _product(u, z, TAIL, SLICES)
    if BIAS:
        gates, ups = gates + of_gate[None, :], ups + of_up[None, :]
    out = gates / (1.0 + tl.exp(-gates)) * ups
    inside = (m < rows)[:, None] & (j < n)[None, :]
    tl.store(out_ptr + m[:, None] * n + j[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)
