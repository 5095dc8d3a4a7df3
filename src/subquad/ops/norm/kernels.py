"""Norms in Triton: a program for each group of channels of a token."""

import triton
import triton.language as tl

from subquad.ops.overlap.kernels import begin


@triton.jit
def gated_rms_kernel(
    x_ptr, gate_ptr, weight_ptr, y_ptr, x_stride, gate_stride, eps,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, FIRST: tl.constexpr, BW: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """See `subquad.ops.norm.gated_rms`. Grid: groups, fastest, then tokens."""
    pid = tl.program_id(0)
    token, group = (pid // GROUPS).to(tl.int64), pid % GROUPS
    c = tl.arange(0, BW)
    at, inside = group * WIDTH + c, c < WIDTH
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    begin(OVERLAP)
    x = tl.load(x_ptr + token * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + token * gate_stride + at, mask=inside, other=0.0).to(tl.float32)
    gate = gate / (1.0 + tl.exp(-gate))
    if FIRST:
        x = x * gate
    y = x * (1.0 / tl.sqrt(tl.sum(x * x, 0) / WIDTH + eps)) * weight
    if not FIRST:
        y = y * gate
    tl.store(y_ptr + token * GROUPS * WIDTH + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def join_rms_kernel(
    x_ptr, ids_ptr, table_ptr, x_weight_ptr, table_weight_ptr, out_ptr, x_eps, table_eps,
    WIDTH: tl.constexpr, BW: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """See `subquad.ops.norm.join_rms`. Grid: halves, fastest, then tokens; all tensors are contiguous."""
    pid = tl.program_id(0)
    token, named = (pid // 2).to(tl.int64), pid % 2 == 1
    c = tl.arange(0, BW)
    inside = c < WIDTH
    weight = tl.load(tl.where(named, table_weight_ptr, x_weight_ptr) + c, mask=inside, other=0.0).to(tl.float32)
    begin(OVERLAP)
    row = tl.where(named, table_ptr + tl.load(ids_ptr + token) * WIDTH, x_ptr + token * WIDTH)
    x = tl.load(row + c, mask=inside, other=0.0).to(tl.float32)
    out = x * (1.0 / tl.sqrt(tl.sum(x * x, 0) / WIDTH + tl.where(named, table_eps, x_eps))) * weight
    tl.store(out_ptr + pid.to(tl.int64) * WIDTH + c, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def add_rms_kernel(
    x_ptr, y_ptr, weight_ptr, total_ptr, out_ptr, eps,
    WIDTH: tl.constexpr, ADD: tl.constexpr, BW: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """See `subquad.ops.norm.add_rms`. Grid: tokens; all tensors are contiguous."""
    token = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BW)
    at, inside = token * WIDTH + c, c < WIDTH
    weight = tl.load(weight_ptr + c, mask=inside, other=0.0).to(tl.float32)
    begin(OVERLAP)
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    if ADD:
        x = (x.to(tl.float32) + tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(total_ptr + at, x, mask=inside)
    wide = x.to(tl.float32)
    out = wide * (1.0 / tl.sqrt(tl.sum(wide * wide, 0) / WIDTH + eps)) * weight
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)
