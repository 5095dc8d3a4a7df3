"""The ring's two launches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from subquad.ops import launch, overlap
from subquad.ops.cached.kernels import join_kernel
from subquad.ops.ring.kernels import absorb_kernel, read_kernel

# Programs at a time, and the least of a window's tokens that one reads.
MOST, LEAST = 264, 64
# Queries of a program. Of 64 the products go to Hopper's wide units, and a round of 16 tokens died of an illegal
# access; see `subquad.ops.gla.on_triton` for what Triton does there.
QUERIES = 32

if TYPE_CHECKING:
    from subquad.ops.ring import Maps, RingState, Tables


def read(
    q_bthk: Tensor, k_btgk: Tensor, v_btgk: Tensor, tables: Tables | None, back: Tables | None, state: RingState,
    scale: float, linear_bgfv: Tensor | None, maps: Maps | None,
) -> Tensor:  # fmt: skip
    """`subquad.ops.ring.read`."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_bthk, k_btgk, v_btgk))
    return _read(
        q, k, v, *_pair(tables), *_pair(back), state.keys_bgrk, state.values_bgrk, state.sink_k_bgsk,
        state.sink_v_bgsk, state.seen_b, linear_bgfv, _weights(maps), state.window, scale,
    )  # fmt: skip


def absorb_(state: RingState, n_b: Tensor, time: int, back: Tables | None, linear_bgfv: Tensor, maps: Maps) -> None:
    """`subquad.ops.ring.absorb_`."""
    _absorb(
        state.keys_bgrk, state.values_bgrk, linear_bgfv, state.seen_b, n_b.contiguous(), *_pair(back), _weights(maps),
        state.window, state.sink_k_bgsk.shape[2], time,
    )  # fmt: skip


def parts(rows: int, window: int) -> int:
    """How many programs share what the queries of each of `rows` (a row of the batch and a key head) see."""
    shares = min(MOST // max(rows, 1) - 1, triton.cdiv(window, LEAST))
    return 1 + max(0, shares)


def _pair(tables: Tables | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if tables is None else (tables[0].contiguous(), tables[1].contiguous())


def _weights(maps: Maps | None) -> list[Tensor]:
    if maps is None:
        return []
    return [maps.k_weight_gkf, maps.k_bias_gf, maps.q_weight_hkf, maps.q_bias_hf, maps.fade_h]


@torch.library.custom_op(
    "subquad::ring_read",
    mutates_args=("keys", "values", "sink_k", "sink_v"),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? cos, Tensor? sin, Tensor? back_cos, Tensor? back_sin, "
    "Tensor(a!) keys, Tensor(b!) values, Tensor(c!) sink_k, Tensor(d!) sink_v, Tensor seen, Tensor? linear, "
    "Tensor[] maps, int window, float scale) -> Tensor",
)
@launch.guarded
def _read(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, back_cos: Tensor | None,
    back_sin: Tensor | None, keys: Tensor, values: Tensor, sink_k: Tensor, sink_v: Tensor, seen: Tensor,
    linear: Tensor | None, maps: list[Tensor], window: int, scale: float,
) -> Tensor:  # fmt: skip
    (b, t, h, width), g, sinks = q.shape, k.shape[2], sink_k.shape[2]
    y = launch.scratch(b, t, h, width, like=q, dtype=q.dtype)
    if y.numel() == 0:
        return y
    half = 1 if cos is None else cos.shape[-1]
    features = 0 if linear is None else linear.shape[2]
    # An absent tensor's place is taken by one that no branch reads.
    some = [q if x is None else x for x in (cos, sin, back_cos, back_sin)]
    queries = min(QUERIES, _tile(h // g * t))
    blocks = triton.cdiv(h // g * t, queries)
    count = parts(b * g * blocks, window)
    part = launch.scratch(b, t, h, count, width, like=q, dtype=torch.float32) if count > 1 else q
    log = launch.scratch(b, t, h, count, like=q, dtype=torch.float32) if count > 1 else q
    kernel: Any = read_kernel[(b * g * blocks * count,)]
    kernel(
        q, k, v, *some, keys, values, sink_k, sink_v, q if linear is None else linear, seen, y, part, log,
        *(maps or [q] * 5),
        scale, width**-0.5, _stride(cos), _stride(back_cos), *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        T=t, H=h, G=g, K=width, R=keys.shape[2], W=window, S=sinks, F=features, HALF=half, TURN=cos is not None,
        FAR=linear is not None, PARTS=count, PRECISION=launch.precision(q.dtype), BM=queries, BT=_tile(t),
        BN=min(LEAST, _tile(window)), BS=_tile(sinks), BK=_tile(width), BF=_tile(features), num_warps=4,
        **overlap.options(q.device),
    )  # fmt: skip
    if count > 1:
        kernel = join_kernel[(b * t * h,)]
        kernel(
            part, log, y, V=width, SPLITS=count, BS=triton.next_power_of_2(count), BV=_tile(width), num_warps=2,
            **overlap.options(q.device),
        )  # fmt: skip
    return y


@_read.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, back_cos: Tensor | None,
    back_sin: Tensor | None, keys: Tensor, values: Tensor, sink_k: Tensor, sink_v: Tensor, seen: Tensor,
    linear: Tensor | None, maps: list[Tensor], window: int, scale: float,
) -> Tensor:  # fmt: skip
    return q.new_empty(q.shape)


@torch.library.custom_op(
    "subquad::ring_absorb",
    mutates_args=("linear",),
    schema="(Tensor keys, Tensor values, Tensor(a!) linear, Tensor seen, Tensor n, Tensor? back_cos, "
    "Tensor? back_sin, Tensor[] maps, int window, int sinks, int time) -> ()",
)
@launch.guarded
def _absorb(
    keys: Tensor, values: Tensor, linear: Tensor, seen: Tensor, n: Tensor, back_cos: Tensor | None,
    back_sin: Tensor | None, maps: list[Tensor], window: int, sinks: int, time: int,
) -> None:  # fmt: skip
    b, g, slots, width = keys.shape
    if b == 0:
        return
    features = linear.shape[2]
    kernel: Any = absorb_kernel[(b * g,)]
    kernel(
        keys, values, linear, seen, n, keys if back_cos is None else back_cos,
        keys if back_sin is None else back_sin, *maps[:2], width**-0.5, _stride(back_cos),
        G=g, K=width, R=slots, W=window, S=sinks, F=features, HALF=1 if back_cos is None else back_cos.shape[-1],
        TURN=back_cos is not None, PRECISION=launch.precision(keys.dtype), BT=_tile(time), BK=_tile(width),
        BF=_tile(features), num_warps=4, **overlap.options(keys.device),
    )  # fmt: skip


@_absorb.register_fake
def _(
    keys: Tensor, values: Tensor, linear: Tensor, seen: Tensor, n: Tensor, back_cos: Tensor | None,
    back_sin: Tensor | None, maps: list[Tensor], window: int, sinks: int, time: int,
) -> None:  # fmt: skip
    return None


def _stride(table: Tensor | None) -> int:
    """From row to row of tables ``[b or 1, t, 1, half]``."""
    return 0 if table is None or len(table) == 1 else table.shape[1] * table.shape[-1]


def _tile(size: int) -> int:
    return max(16, triton.next_power_of_2(max(size, 1)))
