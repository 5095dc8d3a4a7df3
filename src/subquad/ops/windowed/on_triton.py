"""Windowed attention in Triton: launchers and the operations that autograd and the compiler see."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.core.layout import Layout
from subquad.ops import launch
from subquad.ops import window as windows
from subquad.ops.window import Far, WindowState
from subquad.ops.windowed import kernels, kernels_backward

# Of queries, keys, values, log weights, their bias, features, sinks' keys and values, state and normaliser.
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class Blocks(NamedTuple):
    """Tokens of a chunk, features at a time; of each kernel warps, pipeline stages and most registers (0: any)."""

    chunk: int
    features: int
    forward: tuple[int, int, int] = (4, 2, 0)
    queries: tuple[int, int, int] = (4, 2, 0)
    own: tuple[int, int, int] = (4, 2, 168)
    keys: tuple[int, int, int] = (4, 2, 0)


def blocks(time: int, widths: tuple[int, ...], dtype: torch.dtype) -> Blocks:
    """The sizes for a block of `time` tokens and head dims and features `widths`."""
    widest, short = max(_power(w) for w in widths), time <= 16
    if dtype == torch.float32:
        return Blocks(16 if short or widest > 64 else 32, 32, *(((8, 1, 0),) * 4))
    if widest <= 64:
        return Blocks(16 if short else 64, 64)
    return Blocks(16 if short else 64 if widest == 128 else 32, 64, *(((8, 1, 0),) * 4))


def refusal(*tensors: Tensor) -> str | None:
    """Why the kernels can't run queries, keys, values and what else there is, or None when they can."""
    floats = [x for x in tensors if x.is_floating_point()]
    if len(floats) < len(tensors):
        return "the Triton kernels take one document a row, got packed documents"
    q, _, v, *far = floats
    widths = (q.shape[-1], v.shape[-1], *(x.shape[-1] for x in far[:1]))
    device, dtype = q.device.type, q.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    if dtype == torch.float16:
        return "the Triton kernels take bfloat16 and float32, got float16, in which weights of the past can overflow"
    if dtype == torch.float32 and max(widths) > 128:
        return f"the Triton kernels take head dims and features up to 128 in float32, got {widths}"
    return launch.refusal(*floats, widths=widths)


def attend(
    q_bthk: Tensor,
    k_btgk: Tensor,
    v_btgv: Tensor,
    far: Far | None,
    past: WindowState | None,
    layout: Layout,
    *,
    window: int,
    sinks: int,
    scale: float,
) -> Tensor:
    """`subquad.ops.windowed.attend` in Triton; the window of a carried state is joined to the block's keys."""
    if q_bthk.numel() == 0 or v_btgv.numel() == 0:
        return v_btgv.new_zeros(*q_bthk.shape[:3], v_btgv.shape[-1])
    q_bthk, k_btgk, v_btgv = launch.operands(q_bthk, k_btgk, v_btgv)
    weight_bthf, f_bngf, bias_hf = None, None, None
    if far is not None:
        weight_bthf, f_bngf = _last(far.weight_bthf), _last(far.f_btgf)
        bias_hf = None if far.bias_hf is None else far.bias_hf.contiguous()
    k_bngk, v_bngv, sink_k, sink_v, state, norm, seen_b = k_btgk, v_btgv, None, None, None, None, None
    if past is not None:
        seen_b, dtype = past.seen_b, q_bthk.dtype
        k_bngk, v_bngv = (
            torch.cat((old.transpose(1, 2).to(dtype), new), 1)
            for old, new in ((past.window_k_bgwk, k_btgk), (past.window_v_bgwk, v_btgv))
        )
        if sinks:
            sink_k, sink_v = (
                windows.fill_sinks(old.to(dtype), new.transpose(1, 2), seen_b)
                for old, new in ((past.sink_k_bgsk, k_btgk), (past.sink_v_bgsk, v_btgv))
            )
        if far is not None:
            assert f_bngf is not None
            assert far.window_f_bgnf is not None
            assert far.state_bgfv is not None
            # What stays in the window all along has no part in the far sum: any features would do.
            window_f = far.window_f_bgnf.transpose(1, 2).to(f_bngf.dtype)
            f_bngf = torch.cat((F.pad(window_f, (0, 0, 0, 0, 0, window - window_f.shape[1])), f_bngf), 1)
            sums_bgfv = far.state_bgfv.float()
            state, norm = sums_bgfv[..., :-1].contiguous(), sums_bgfv[..., -1].contiguous()
    return _forward(
        q_bthk, k_bngk, v_bngv, weight_bthf, bias_hf, f_bngf, sink_k, sink_v, state, norm, seen_b, window, sinks, scale
    )[0]


def _last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _power(n: int, least: int = 16) -> int:
    return max(least, 1 << (n - 1).bit_length())


def _width(n: int, dtype: torch.dtype) -> int:
    """Columns of a tile.

    No bfloat16 tile is 16 or 32 wide: some versions of ptxas lose the addresses of such operands on Hopper.
    """
    return _power(max(n, 1), 16 if dtype == torch.float32 else 64)


class _Plan(NamedTuple):
    """What both directions compute from the arguments."""

    blocks: Blocks
    chunks: int
    tiles: int
    past: int
    origin: int
    n_sinks: int
    r: int
    sizes: dict[str, Any]
    widths: dict[str, Any]


def _plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    f: Tensor | None,
    seen: Tensor | None,
    window_: int,
    sinks: int,
) -> _Plan:
    t, n, wide = q.shape[1], k.shape[1], 0 if f is None else f.shape[3]
    size = blocks(t, (k.shape[3], v.shape[3], max(wide, 1)), q.dtype)
    past, c = n - t, size.chunk
    sizes = {"K": k.shape[3], "V": v.shape[3], "F": wide, "W": window_, "S": sinks}
    flags = {
        "FAR": f is not None,
        "BIAS": bias is not None,
        "SEEN": seen is not None,
        "BC": c,
        "PRECISION": launch.precision(q.dtype),
    }
    widths: dict[str, Any] = {
        "BK": _width(k.shape[3], q.dtype),
        "BV": _width(v.shape[3], q.dtype),
        "BF": min(_width(wide, q.dtype), size.features),
    }
    n_sinks = sinks if seen is not None else min(sinks, n)
    chunks, tiles = -(-t // c), -(-(t + window_ - 1) // c) + 1
    heads = q.shape[2] // k.shape[2]
    return _Plan(size, chunks, tiles, past, past - window_ + 1, n_sinks, heads, sizes | flags, widths)


def _how(choice: tuple[int, int, int] = (4, 2, 0)) -> dict[str, Any]:
    warps, stages, registers = choice
    return {"num_warps": warps, "num_stages": stages} | ({"maxnreg": registers} if registers else {})


def _strides(*tensors: Tensor | None) -> list[Any]:
    return [s for x in tensors for s in ((0, 0, 0) if x is None else x.stride()[:3])]


def _sink_block(sinks: int) -> dict[str, Any]:
    return {"BS": 16 if sinks <= 16 else 64}


def _sink_strides(sink_k: Tensor | None, sink_v: Tensor | None, k: Tensor, v: Tensor) -> list[Any]:
    """Of ``[b, slot, g]``; without a store the sinks are the first keys given."""
    if sink_k is None or sink_v is None:
        return _strides(k, v)
    return _strides(sink_k.transpose(1, 2), sink_v.transpose(1, 2))


@torch.library.custom_op("subquad::windowed_forward", mutates_args=())
@launch.guarded
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    f: Tensor | None,
    sink_k: Tensor | None,
    sink_v: Tensor | None,
    state: Tensor | None,
    norm: Tensor | None,
    seen: Tensor | None,
    window: int,
    sinks: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs ``[b, t, h, v]``, three figures of every row, and the linear state and normaliser before every chunk."""
    plan = _plan(q, k, v, bias, f, seen, window, sinks)
    b, t, h, _ = q.shape
    y, rows, entry, norms = _outputs(q, k, v, f, plan)
    n, g = k.shape[1], k.shape[2]
    if f is not None:
        at = {x: plan.sizes[x] for x in ("F", "V", "S", "SEEN", "BC", "PRECISION")}
        bf, bv = min(plan.widths["BF"], 64), min(plan.widths["BV"], 64)
        added_s, added_z = (launch.scratch(*x.shape, like=q, dtype=torch.float32) for x in (entry, norms))
        grid = (b * g * plan.chunks, -(-f.shape[3] // bf), -(-v.shape[3] // bv))
        kernels.sums[grid](
            v, f, _any(seen, q), added_s, added_z, n, g, plan.chunks, plan.past, plan.origin,
            *_strides(v, f), BF=bf, BV=bv, **_how(), **at,
        )  # fmt: skip
        _cumulate(added_s, state, entry)
        _cumulate(added_z, norm, norms)
    kernels.forward[(b * h * plan.chunks,)](
        q, k, v, _any(weight, q), _any(bias, q), _any(f, q), _any(sink_k, k), _any(sink_v, v), _any(seen, q),
        entry, norms, y, rows,
        t, n, h, plan.r, plan.chunks, plan.past, plan.origin, plan.n_sinks, b * h * t, scale,
        *_strides(q, k, v, weight, f), *_sink_strides(sink_k, sink_v, k, v),
        **_sink_block(sinks), **_how(plan.blocks.forward), **plan.sizes, **plan.widths,
    )  # fmt: skip
    return y, rows, entry, norms


def _outputs(q: Tensor, k: Tensor, v: Tensor, f: Tensor | None, plan: _Plan) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b, t, h, _ = q.shape
    g, chunks = k.shape[2], plan.chunks if f is not None else 0
    wide = 0 if f is None else f.shape[3]
    return (
        launch.scratch(b, t, h, v.shape[3], like=q, dtype=v.dtype),
        launch.scratch(3 if f is not None else 1, b, h, t, like=q, dtype=torch.float32),
        launch.scratch(b, g, chunks, wide, v.shape[3], like=q, dtype=q.dtype),
        launch.scratch(b, g, chunks, wide, like=q, dtype=torch.float32),
    )


def _any(x: Tensor | None, other: Tensor) -> Tensor:
    """`x`, or where there is none something that the kernel gets and never reads."""
    return other if x is None else x


def _cumulate(
    x: Tensor, first: Tensor | None, out: Tensor, *, reverse: bool = False, total: Tensor | None = None
) -> None:
    """Running sums over axis 2 of ``[b, g, n, ...]`` into `out`."""
    b, g, n = x.shape[:3]
    wide = x.numel() // (b * g * n)
    size: dict[str, Any] = {"BN": 16 if n > 1 else 1, "BL": min(_power(wide), 256)}
    size |= {"REVERSE": reverse, "FIRST": first is not None, "TOTAL": total is not None}
    kernels.cumulate[(b * g, -(-wide // size["BL"]))](
        x, _any(first, x), out, _any(total, x), n, n, wide,
        **size, **_how(),
    )  # fmt: skip


@_forward.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, _, bias, f, _, _, _, _, seen, window, sinks, _ = inputs
    return _outputs(q, k, v, f, _plan(q, k, v, bias, f, seen, window, sinks))


@torch.library.custom_op("subquad::windowed_backward", mutates_args=())
@launch.guarded
def _backward(
    dy: Tensor,
    y: Tensor,
    rows: Tensor,
    entry: Tensor,
    norms: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    f: Tensor | None,
    sink_k: Tensor | None,
    sink_v: Tensor | None,
    seen: Tensor | None,
    window: int,
    sinks: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients, empty where their tensor is not there."""
    plan = _plan(q, k, v, bias, f, seen, window, sinks)
    dq, dk, dv, dweight, dbias, df, dsink_k, dsink_v, dstate, dnorm = made = _gradients(
        q, k, v, weight, bias, f, sink_k, seen, plan
    )
    (b, t, h, _), (n, g) = q.shape, k.shape[1:3]
    c, count = plan.chunks, b * h * t
    dy = dy.to(q.dtype).contiguous()
    delta = launch.scratch(b, h, t, like=q, dtype=torch.float32)
    part_k, part_v = (
        launch.scratch(b, g, plan.r, c, plan.n_sinks, x.shape[3], like=q, dtype=torch.float32) for x in (k, v)
    )
    part_b = launch.scratch(b, h, c, plan.sizes["F"], like=q, dtype=torch.float32)
    kernels_backward.queries[(b * h * c,)](
        q, k, v, _any(weight, q), _any(bias, q), _any(f, q), _any(sink_k, k), _any(sink_v, v), _any(seen, q),
        entry, norms, y, dy, rows, delta, dq, dweight, part_b, part_k, part_v,
        t, n, h, plan.r, c, plan.past, plan.origin, plan.n_sinks, count, scale,
        *_strides(q, k, v, weight, f), *_sink_strides(sink_k, sink_v, k, v),
        **_sink_block(sinks), **_how(plan.blocks.queries), **plan.sizes, **plan.widths,
    )  # fmt: skip
    later_s, later_z = entry, norms
    if f is not None:
        own_s, own_z = (launch.scratch(*x.shape, like=q, dtype=torch.float32) for x in (entry, norms))
        later_s, later_z = (launch.scratch(*x.shape, like=q, dtype=x.dtype) for x in (entry, norms))
        wide = min(plan.widths["BF"], 64)
        kernels_backward.own[(b * g * c, -(-f.shape[3] // wide))](
            weight, _any(bias, q), dy, rows, delta, own_s, own_z, t, h, plan.r, c, count, *_strides(weight),
            **{x: plan.sizes[x] for x in ("V", "F", "BIAS", "BC", "PRECISION")}, BV=plan.widths["BV"], BF=wide,
            **_how(plan.blocks.own),
        )  # fmt: skip
        _cumulate(own_s, None, later_s, reverse=True, total=None if seen is None else dstate)
        _cumulate(own_z, None, later_z, reverse=True, total=None if seen is None else dnorm)
    widths = plan.widths | {"BF": _width(plan.sizes["F"], q.dtype), "BX": plan.blocks.features}
    kernels_backward.keys[(b * g * plan.tiles,)](
        q, k, v, _any(weight, q), _any(bias, q), _any(f, q), _any(seen, q), dy, rows, delta, later_s, later_z,
        dk, dv, df,
        t, n, h, plan.r, c, plan.tiles, plan.past, plan.origin, count, scale, *_strides(q, k, v, weight, f),
        **_how(plan.blocks.keys), **plan.sizes, **widths,
    )  # fmt: skip
    if bias is not None:
        dbias.copy_(part_b.sum((0, 2)))
    if sinks:
        sums_k, sums_v = (x.sum((2, 3)) for x in (part_k, part_v))
        if seen is None:
            dk[:, : plan.n_sinks] += sums_k.transpose(1, 2)
            dv[:, : plan.n_sinks] += sums_v.transpose(1, 2)
        else:
            dsink_k.copy_(sums_k)
            dsink_v.copy_(sums_v)
    return made


def _gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    f: Tensor | None,
    sink_k: Tensor | None,
    seen: Tensor | None,
    plan: _Plan,
) -> Gradients:
    def like(x: Tensor | None, *shape: int) -> Tensor:
        return launch.scratch(*shape, like=q, dtype=q.dtype if x is None else x.dtype)

    (b, _, g, wide_k), wide_v = k.shape, v.shape[3]
    wide = 0 if f is None else f.shape[3]
    slots = 0 if sink_k is None else plan.n_sinks
    state = (b, g, wide, wide_v) if seen is not None and f is not None else (0, 0, 0, 0)
    return (
        like(q, *q.shape),
        like(k, *k.shape),
        like(v, *v.shape),
        like(weight, *((0,) if weight is None else weight.shape)),
        like(bias, *((0,) if bias is None else bias.shape)),
        like(f, *((0,) if f is None else f.shape)),
        like(sink_k, b, g, slots, wide_k),
        like(sink_k, b, g, slots, wide_v),
        launch.scratch(*state, like=q, dtype=torch.float32),
        launch.scratch(*state[:3], like=q, dtype=torch.float32),
    )


@_backward.register_fake
def _(*inputs: Any) -> Gradients:
    _, _, _, _, _, q, k, v, weight, bias, f, sink_k, _, seen, window, sinks, _ = inputs
    return _gradients(q, k, v, weight, bias, f, sink_k, seen, _plan(q, k, v, bias, f, seen, window, sinks))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    q, k, v, weight, bias, f, sink_k, sink_v, state, _, seen, *options = inputs
    ctx.save_for_backward(*output, q, k, v, weight, bias, f, sink_k, sink_v, seen)
    ctx.options, ctx.carried = options, state is not None
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 14
    y, rows, entry, norms, q, k, v, weight, bias, f, sink_k, sink_v, seen = ctx.saved_tensors
    dq, dk, dv, dweight, dbias, df, dsink_k, dsink_v, dstate, dnorm = _backward(
        dy, y, rows, entry, norms, q, k, v, weight, bias, f, sink_k, sink_v, seen, *ctx.options
    )
    far = (None if x is None else dx for x, dx in ((weight, dweight), (bias, dbias), (f, df)))
    store = (None, None) if sink_k is None else (dsink_k, dsink_v)
    state = (dstate, dnorm) if ctx.carried else (None, None)
    return dq, dk, dv, *far, *store, *state, None, None, None, None


_forward.register_autograd(_gradient, setup_context=_save)
