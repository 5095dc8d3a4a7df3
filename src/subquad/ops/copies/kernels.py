"""Copies in Triton: a program for each row."""

import triton
import triton.language as tl

from subquad.ops.copies import on_torch
from subquad.ops.overlap.kernels import begin

BASE, HIGH, LOW = (tl.constexpr(number) for number in (on_torch.BASE, on_torch.HIGH, on_torch.LOW))


@triton.jit
def _bucket(h, buckets):
    return ((h >> HIGH) ^ (h >> LOW)).to(tl.int64) & (buckets - 1)


@triton.jit
def _seek(row, table, end, buckets, GAMMA: tl.constexpr):
    """The position behind the last run like the GAMMA tokens before `end`, -1 where there is none."""
    h = tl.full((), 0, tl.uint64)
    for j in tl.static_range(GAMMA):
        h = (h + tl.load(row + tl.maximum(end - GAMMA + j, 0)).to(tl.uint64) + 1) * BASE
    found = tl.load(table + _bucket(h, buckets))
    there = (found >= GAMMA) & (end >= GAMMA)
    for j in tl.static_range(GAMMA):
        mine = tl.load(row + tl.maximum(end - GAMMA + j, 0))
        there = there & (tl.load(row + tl.maximum(found - GAMMA + j, 0)) == mine)
    return tl.where(there, found, -1)


@triton.jit
def _enter(row, new, table, length, kept, c, buckets, GAMMA: tl.constexpr, BT: tl.constexpr):
    """Enter the run of GAMMA tokens before each new one."""
    h = tl.zeros((BT,), tl.uint64)
    for j in tl.static_range(GAMMA):
        # Of the run before a new token some tokens are new themselves, and not yet in the text.
        at = c - GAMMA + j
        old = tl.load(row + length + at, mask=kept & (at < 0) & (length + at >= 0), other=0)
        token = tl.where(at < 0, old, tl.load(new + at, mask=kept & (at >= 0), other=0))
        h = (h + token.to(tl.uint64) + 1) * BASE
    tl.atomic_max(table + _bucket(h, buckets), length + c, mask=kept & (length + c >= GAMMA))


@triton.jit
def find_kernel(
    tokens_ptr, length_ptr, table_ptr, out_ptr, count_ptr, grounded_ptr, stride, stride_g, stride_b, buckets,
    GAMMAS: tl.constexpr, K: tl.constexpr, STRETCH: tl.constexpr, BT: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """See `subquad.ops.copies.find`. Grid: rows."""
    b, c = tl.program_id(0).to(tl.int64), tl.arange(0, BT)
    row = tokens_ptr + b * stride
    begin(OVERLAP)
    end = tl.load(length_ptr + b)
    start = tl.full((), -1, tl.int64)
    for g in tl.static_range(len(GAMMAS)):
        found = _seek(row, table_ptr + g * stride_g + b * stride_b, end, buckets, GAMMAS[g])
        start = tl.where(start < 0, found, start)
    period = tl.where(start >= 0, end - start, 1)
    at = tl.maximum(start, 0) + c % period
    tl.store(out_ptr + b * K + c, tl.load(row + at, mask=c < K, other=0), mask=c < K)
    tl.store(count_ptr + b, tl.where(start >= 0, K, 0).to(tl.int64))
    before = start - 1 - c
    mine = tl.load(row + tl.maximum(end - 1 - c, 0))
    alike = (tl.load(row + tl.maximum(before, 0)) == mine) & (before >= 0)
    tl.store(grounded_ptr + b, tl.minimum(STRETCH * tl.min(tl.where(alike, BT, c)), K).to(tl.int64))


@triton.jit
def enter_kernel(
    tokens_ptr, length_ptr, table_ptr, new_ptr, n_ptr, stride, stride_g, stride_b, stride_new, buckets,
    GAMMAS: tl.constexpr, T: tl.constexpr, BT: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """See `subquad.ops.copies.enter_`. Grid: rows."""
    b, c = tl.program_id(0).to(tl.int64), tl.arange(0, BT)
    row, new = tokens_ptr + b * stride, new_ptr + b * stride_new
    begin(OVERLAP)
    length, n = tl.load(length_ptr + b), tl.load(n_ptr + b)
    kept = (c < n) & (c < T)
    for g in tl.static_range(len(GAMMAS)):
        _enter(row, new, table_ptr + g * stride_g + b * stride_b, length, kept, c, buckets, GAMMAS[g], BT)
    tl.store(row + length + c, tl.load(new + c, mask=kept, other=0), mask=kept)
    tl.store(length_ptr + b, length + n)
