"""Attention over a cache by Triton."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from subquad.ops import launch, overlap
from subquad.ops.cached.kernels import append_kernel, attend_kernel, join_kernel

# Programs that keep a GPU's memory busy, in multiples of its multiprocessors, and the least that one reads of a cache.
WAVES, LEAST = 2, 512
# Of a cache of at most so many tokens one reads less: what it waits for is not the memory's width but its answer.
SHORT, LEAST_OF_SHORT = 1024, 64
MULTIPROCESSORS = 132
# The matrix unit's smallest tile.
SMALLEST = 16


def refusal(*tensors: Tensor) -> str | None:
    """Why the kernels can't run: arguments are of `attend`, or the four of `append_`."""
    return launch.refusal(*tensors, widths=(tensors[0].shape[-1], tensors[-1].shape[-1]))


def shares(rows: int, capacity: int) -> int:
    """How many programs share the tokens of each of `rows` (a row of the batch and a key head)."""
    if capacity <= SHORT:
        wanted = min(WAVES * MULTIPROCESSORS // max(rows, 1), triton.cdiv(capacity, LEAST_OF_SHORT))
    else:
        wanted = min(triton.cdiv(WAVES * MULTIPROCESSORS, max(rows, 1)), triton.cdiv(capacity, LEAST))
    return max(1, wanted)


def tiling(width: int, share: int, size: int) -> tuple[int, int]:
    """The table, for bytes of a number: keys at once, and how many such tiles are under way."""
    if size > 2:
        return 32, 2
    if share <= 2 * LEAST_OF_SHORT:
        return LEAST_OF_SHORT, 2
    # A short row in few large tiles: what it waits for is the first.
    return (256, 1) if width <= 64 and share <= SHORT else (64, 3)


def queries(group: int, capacity: int) -> int:
    """Queries of a program, of so many that a key head has.

    Beside a short row several tiles take no longer than one, and a large one does: its keys are read again, from the L2
    cache. Of a long row each program reads much, so that there one has them all.
    """
    return SMALLEST if capacity <= SHORT else max(SMALLEST, triton.next_power_of_2(group))


def attend(
    q_bthk: Tensor, k_bgtk: Tensor, v_bgtv: Tensor, k_bgnk: Tensor, v_bgnv: Tensor, seen_b: Tensor, scale: float,
    tables: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`subquad.ops.cached.attend`; shapes are checked there."""
    tensors = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_bthk, k_bgtk, v_bgtv, k_bgnk, v_bgnv))
    y_bthv, turned_bgtk = _attend(*tensors, seen_b.contiguous(), scale, *_pair(tables))
    return y_bthv, k_bgtk if tables is None else turned_bgtk


def attend_(
    q_bthk: Tensor, k_bgtk: Tensor, v_bgtv: Tensor, k_bgnk: Tensor, v_bgnv: Tensor, seen_b: Tensor, scale: float,
    tables: tuple[Tensor, Tensor] | None,
) -> Tensor:  # fmt: skip
    """`subquad.ops.cached.attend_`."""
    block = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_bthk, k_bgtk, v_bgtv))
    return _attend_writing(*block, k_bgnk, v_bgnv, seen_b.contiguous(), scale, *_pair(tables))


def _pair(tables: tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if tables is None else (tables[0].contiguous(), tables[1].contiguous())


@torch.library.custom_op("subquad::cached_attend", mutates_args=())
@launch.guarded
def _attend(
    q: Tensor, k: Tensor, v: Tensor, cache_k: Tensor, cache_v: Tensor, seen: Tensor, scale: float, cos: Tensor | None,
    sin: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    turned = launch.scratch(
        k.shape[0], k.shape[1], k.shape[2] if cos is not None else 0, k.shape[3], like=k, dtype=k.dtype
    )
    return _launch(q, k, v, cache_k, cache_v, seen, scale, cos, sin, turned), turned


@_attend.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, cache_k: Tensor, cache_v: Tensor, seen: Tensor, scale: float, cos: Tensor | None,
    sin: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    b, t, _, k_dim = q.shape
    turned = k.new_empty(b, k.shape[1], t if cos is not None else 0, k_dim)
    return q.new_empty(*q.shape[:3], cache_v.shape[3]), turned


@torch.library.custom_op("subquad::cached_attend_", mutates_args=("cache_k", "cache_v"))
@launch.guarded
def _attend_writing(
    q: Tensor, k: Tensor, v: Tensor, cache_k: Tensor, cache_v: Tensor, seen: Tensor, scale: float, cos: Tensor | None,
    sin: Tensor | None,
) -> Tensor:  # fmt: skip
    return _launch(q, k, v, cache_k, cache_v, seen, scale, cos, sin, None)


@_attend_writing.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, cache_k: Tensor, cache_v: Tensor, seen: Tensor, scale: float, cos: Tensor | None,
    sin: Tensor | None,
) -> Tensor:  # fmt: skip
    return q.new_empty(*q.shape[:3], cache_v.shape[3])


def _launch(
    q: Tensor, k: Tensor, v: Tensor, cache_k: Tensor, cache_v: Tensor, seen: Tensor, scale: float, cos: Tensor | None,
    sin: Tensor | None, turned: Tensor | None,
) -> Tensor:  # fmt: skip
    """The outputs; without `turned` the block goes into the cache."""
    (b, t, h, k_dim), (g, capacity, v_dim) = q.shape, cache_v.shape[1:]
    y = launch.scratch(b, t, h, v_dim, like=q, dtype=q.dtype)
    if y.numel() == 0:
        return y
    splits = shares(b * g, capacity)
    part = launch.scratch(b, t, h, splits, v_dim, like=q, dtype=torch.float32) if splits > 1 else q
    log = launch.scratch(b, t, h, splits, like=q, dtype=torch.float32) if splits > 1 else q
    tokens, stages = tiling(k_dim, triton.cdiv(capacity, splits), q.element_size())
    group, rows = h // g * t, queries(h // g * t, capacity)
    tiles = triton.cdiv(group, rows)
    kernel: Any = attend_kernel[(b * g * tiles * splits,)]
    kernel(
        q, k, v, q if cos is None else cos, q if sin is None else sin, cache_k, cache_v, seen, y,
        q if turned is None else turned, part, log, scale * math.log2(math.e),
        0 if cos is None or len(cos) == 1 else t * cos.shape[-1], capacity,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *cache_k.stride()[:3], *cache_v.stride()[:3],
        T=t, H=h, G=g, K=k_dim, V=v_dim, SPLITS=splits, PRECISION=launch.precision(q.dtype),
        BM=rows, BN=tokens, BT=_tile(t), BK=_tile(k_dim), BV=_tile(v_dim), TILES=tiles, STAGES=stages,
        TURN=cos is not None, HALF=1 if cos is None else cos.shape[-1], WRITE=turned is None,
        num_warps=4, **overlap.options(q.device),
    )  # fmt: skip
    if splits > 1:
        kernel = join_kernel[(b * t * h,)]
        kernel(
            part, log, y, V=v_dim, SPLITS=splits, BS=triton.next_power_of_2(splits), BV=_tile(v_dim), num_warps=2,
            **overlap.options(q.device),
        )  # fmt: skip
    return y


def append_(
    k_bgnk: Tensor, v_bgnv: Tensor, seen_b: Tensor, k_bgtk: Tensor, v_bgtv: Tensor, n_b: Tensor,
    rows_b: Tensor | None, first_b: Tensor | None, start_b: Tensor | None,
) -> None:  # fmt: skip
    """`subquad.ops.cached.append_`."""
    k_bgtk, v_bgtv = (x if x.stride(-1) == 1 else x.contiguous() for x in (k_bgtk, v_bgtv))
    rows_b, first_b, start_b = (None if x is None else x.contiguous() for x in (rows_b, first_b, start_b))
    _append(k_bgnk, v_bgnv, seen_b, k_bgtk, v_bgtv, n_b.contiguous(), rows_b, first_b, start_b)


@torch.library.custom_op("subquad::cached_append", mutates_args=("cache_k", "cache_v", "seen"))
@launch.guarded
def _append(
    cache_k: Tensor, cache_v: Tensor, seen: Tensor, k: Tensor, v: Tensor, n: Tensor, rows: Tensor | None,
    first: Tensor | None, start: Tensor | None,
) -> None:  # fmt: skip
    b, g, t, k_dim = k.shape
    v_dim = v.shape[3]
    if b == 0 or t == 0:
        return
    # An absent tensor's place is taken by one that no branch reads.
    kernel: Any = append_kernel[(b,)]
    kernel(
        cache_k, cache_v, seen, k, v, n, *(n if x is None else x for x in (rows, first, start)), cache_k.shape[2],
        *cache_k.stride()[:3], *cache_v.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        T=t, G=g, K=k_dim, V=v_dim, ROWS=rows is not None, FIRST=first is not None, START=start is not None,
        BX=triton.next_power_of_2(g * t), BK=_tile(k_dim), BV=_tile(v_dim), num_warps=4, **overlap.options(k.device),
    )  # fmt: skip


def _tile(width: int) -> int:
    return max(SMALLEST, triton.next_power_of_2(width))
