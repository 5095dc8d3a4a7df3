"""The gated delta rule by Triton kernels: what is checked, allocated and launched, and its gradients."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import triton
from torch import Tensor

from subquad.ops import chunks, launch
from subquad.ops.gdn import kernels, kernels_backward

# Triton's types are unknown to Python's checkers.
_kernels: Any = kernels
_backwards: Any = kernels_backward

# The inverse in `kernels` is written for it.
C = chunks.CHUNK

# A shorter segment costs more launches than it saves steps.
SHORTEST = 4

# Programs that run side by side on one multiprocessor, in sweeps.
RESIDENT = 2


class Tiles(NamedTuple):
    """How a kernel is cut: channels of values and of keys at once, warps, stages, registers a thread may have."""

    v: int
    k: int
    warps: int
    stages: int
    registers: int | None = None


def tiles(kernel: str, k: int, v: int, dtype: torch.dtype) -> Tiles:
    """The one table of sizes; nothing else chooses them, so no length, batch or number of heads compiles anew.

    Args:
        kernel: name of the kernel.
        k: channels of a key, a power of two.
        v: channels of a value, a power of two.
        dtype: of queries, keys and values.
    """
    wide = dtype == torch.float32
    if kernel == "combine":
        return Tiles(min(v, 16), k, 8, 1)
    if wide:
        # Products in full float32 run off the tensor cores, out of registers: few of them, among many warps.
        return Tiles(min(v, 32 if kernel == "gradients" else 16), min(k, 32) if kernel != "sweep" else k, 8, 1)
    if kernel == "prepare":
        return Tiles(v, min(k, 128), 4, 1, 128)
    if kernel == "gradients":
        return Tiles(128, 32, 8, 1) if v > 128 else Tiles(v, 64, 4, 2) if k == 64 else Tiles(v, min(k, 32), 4, 3)
    if k > 128:
        return Tiles(min(v, 64), k, 8, 1)
    if kernel == "reverse":
        return Tiles(min(v, 128), k, 8, 2) if k * v >= 128 * 128 else Tiles(min(v, 64), k, 4, 2)
    return Tiles(min(v, 64), k, 4, 2, 168 if k <= 64 else None)


def segments(b: int, h: int, n: int, k: int, v: int, device: torch.device) -> int:
    """Into how many segments the sequence's n chunks are cut, so that sweeps fill the device.

    Every segment but the first and the last costs twice the work, its map of the state: where rows and heads alone fill
    the device there is one. Nor are maps made of keys so wide that one does not fit a multiprocessor.
    """
    if device.type != "cuda" or k > 128:
        return 1
    programs = torch.cuda.get_device_properties(device).multi_processor_count * RESIDENT
    most = programs // (b * h * -(-v // 64))
    return cast(int, torch.sym_max(1, torch.sym_min(most, n // SHORTEST)))


def refusal(*tensors: Tensor) -> str | None:
    """Why the kernels can't run these arguments of `scan`, or None."""
    rows = tensors[3].shape[0] * tensors[3].shape[2]
    if rows > launch.GRID:
        return f"the Triton kernels take up to {launch.GRID} rows times heads, got {rows}"
    return launch.refusal(*tensors, widths=(tensors[1].shape[-1], tensors[2].shape[-1]))


def scan(
    q_bthk: Tensor,
    k_bthk: Tensor,
    v_bthv: Tensor,
    g_bth: Tensor,
    beta_bth: Tensor,
    state_bhkv: Tensor,
    *,
    valid_bt: Tensor | None = None,
    documents_bt: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`subquad.ops.gdn.scan`."""
    _check(k_bthk, v_bthv, g_bth, beta_bth, state_bhkv, valid_bt, documents_bt)
    launch.axes(q_bthk=q_bthk, k_bthk=k_bthk)
    launch.heads(g_bth.shape[2], q_bthk=q_bthk)
    if v_bthv.shape[0] * v_bthv.shape[1] == 0:
        return v_bthv.new_zeros(*g_bth.shape, v_bthv.shape[-1]), state_bhkv.to(torch.float32, copy=True)
    documents_bt = launch.documents(documents_bt, valid_bt)
    q, k, v, g, beta = chunks.blank(valid_bt, q_bthk, k_bthk, v_bthv, g_bth, beta_bth)
    y, final, *_ = _forward(*launch.operands(q, k, v), g, beta, state_bhkv, documents_bt)
    return y.to(v_bthv.dtype), final


def final_state(
    k_bthk: Tensor,
    v_bthv: Tensor,
    g_bth: Tensor,
    beta_bth: Tensor,
    state_bhkv: Tensor,
    *,
    valid_bt: Tensor | None = None,
    documents_bt: Tensor | None = None,
) -> Tensor:
    """`subquad.ops.gdn.final_state`."""
    _check(k_bthk, v_bthv, g_bth, beta_bth, state_bhkv, valid_bt, documents_bt)
    if v_bthv.shape[0] * v_bthv.shape[1] == 0:
        return state_bhkv.to(torch.float32, copy=True)
    documents_bt = launch.documents(documents_bt, valid_bt)
    k, v, g, beta = chunks.blank(valid_bt, k_bthk, v_bthv, g_bth, beta_bth)
    return _final_state(*launch.operands(k, v), g, beta, state_bhkv, documents_bt)


def _check(
    k_bthk: Tensor,
    v_bthv: Tensor,
    g_bth: Tensor,
    beta_bth: Tensor,
    state_bhkv: Tensor,
    valid_bt: Tensor | None,
    documents_bt: Tensor | None,
) -> None:
    launch.axes(g_bth=g_bth, beta_bth=beta_bth, k_bthk=k_bthk, v_bthv=v_bthv, state_bhkv=state_bhkv)
    launch.axes(g_bth=g_bth, valid_bt=valid_bt, documents_bt=documents_bt)
    launch.heads(g_bth.shape[2], k_bthk=k_bthk, v_bthv=v_bthv)


class _Plan:
    """Sizes of one call and the arguments that its launches share."""

    def __init__(self, k: Tensor, v: Tensor, g: Tensor) -> None:
        self.b, self.t, self.h = g.shape
        self.k, self.v = k.shape[-1], v.shape[-1]
        self.k2, self.v2 = (max(16, triton.next_power_of_2(x)) for x in (self.k, self.v))
        self.n = (self.t + C - 1) // C
        wanted = segments(self.b, self.h, self.n, self.k2, self.v2, k.device)
        self.span = (self.n + wanted - 1) // wanted
        self.segments = (self.n + self.span - 1) // self.span
        self.starts = self.b, self.h, self.segments - 1, self.v, self.k
        self.maps = self.b, self.h, cast(int, torch.sym_max(self.segments - 2, 0)), self.k, self.k
        self.like, self.dtype = k, k.dtype
        self.precision = launch.precision(k.dtype)
        # Rounding to TF32 inside disappears behind the rounding of results to 16 bits.
        self.solve = "tf32" if k.dtype != torch.float32 else self.precision

    def tiles(self, kernel: str) -> Tiles:
        return tiles(kernel, self.k2, self.v2, self.dtype)

    def columns(self, kernel: str, width: int) -> int:
        return -(-width // self.tiles(kernel).v)

    def scratch(self, *shape: int, wide: bool = False) -> Tensor:
        return launch.scratch(*shape, like=self.like, dtype=torch.float32 if wide else self.dtype)

    def options(self, kernel: str, *widths: str) -> dict[str, Any]:
        chosen = self.tiles(kernel)
        known = {"K": self.k, "V": self.v, "K2": self.k2, "BV": chosen.v, "BK": chosen.k}
        named = {name: known[name] for name in widths}
        cut = {"num_warps": chosen.warps, "num_stages": chosen.stages, "maxnreg": chosen.registers}
        return {**named, **cut, "PRECISION": self.precision}


class _Chunks(NamedTuple):
    """What `prepare` makes of every chunk; p is empty where no outputs are read."""

    a_bhncc: Tensor
    p_bhncc: Tensor
    factors_bhnfc: Tensor


def _strides(x: Tensor) -> tuple[int, ...]:
    return x.stride()[:3]


def _prepare(plan: _Plan, q: Tensor | None, k: Tensor, g: Tensor, beta: Tensor, documents: Tensor | None) -> _Chunks:
    b, n, h = plan.b, plan.n, plan.h
    a = plan.scratch(b, h, n, C, C)
    p = plan.scratch(*((0,) if q is None else (b, h, n, C, C)))
    made = _Chunks(a, p, plan.scratch(b, h, n, 5, C, wide=True))
    read = k if q is None else q
    _kernels.prepare[(n, b * h)](
        read, k, g, beta, documents, *made,
        plan.t, n, h, read.shape[2], k.shape[2], *_strides(read), *_strides(k), *_strides(g), *_strides(beta),
        C=C, READ=q is not None, DOCUMENTS=documents is not None, SOLVE=plan.solve,
        **plan.options("prepare", "K", "BK"),
    )  # fmt: skip
    return made


def _combine(plan: _Plan, x: Tensor, maps: Tensor, *, forward: bool) -> None:
    count = plan.segments - 2
    begin, step = (0, 1) if forward else (count - 1, -1)
    across = (plan.k, 1) if forward else (1, plan.k)
    options = plan.options("combine", "K", "V", "K2", "BV") | {"PRECISION": plan.solve}
    grid = (plan.columns("combine", plan.v), plan.b * plan.h)
    _kernels.combine[grid](x, maps, count, begin, step, *across, **options)


def _starts(plan: _Plan, k: Tensor, v: Tensor, made: _Chunks, state: Tensor) -> tuple[Tensor, Tensor]:
    """The transposed states before all segments but the first, and maps of those neither first nor last."""
    starts = plan.scratch(*plan.starts, wide=True)
    maps = plan.scratch(*plan.maps, wide=True)
    if plan.segments > 1:
        images = plan.columns("sweep", plan.k) if plan.segments > 2 else 0
        _kernels.maps[(plan.columns("sweep", plan.v) + images, plan.segments - 1, plan.b * plan.h)](
            k, v, made.a_bhncc, made.factors_bhnfc, state, starts, maps,
            plan.t, plan.n, plan.segments, plan.span, plan.h, k.shape[2], v.shape[2], *_strides(k), *_strides(v),
            C=C, **plan.options("sweep", "K", "V", "K2", "BV"),
        )  # fmt: skip
    if plan.segments > 2:
        _combine(plan, starts, maps, forward=True)
    return starts, maps


def _sweep(
    plan: _Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    made: _Chunks,
    state: Tensor,
    starts: Tensor,
    *,
    read: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """y and the final state (`read`), or states and writes of all chunks (`keep`), or nothing and the final state."""
    b, n, h = plan.b, plan.n, plan.h
    if keep:
        first, second = plan.scratch(b, h, n, plan.v, plan.k), plan.scratch(b, h, n, plan.v, C)
    else:
        first = plan.scratch(*((b, plan.t, h, plan.v) if read else (0,)))
        second = plan.scratch(b, h, plan.k, plan.v, wide=True)
    skipped = 0 if read or keep else plan.segments - 1
    _kernels.sweep[(plan.columns("sweep", plan.v), plan.segments - skipped, b * h)](
        q, k, v, *made, state, starts, first, second, first, second,
        plan.t, n, plan.segments, plan.span, skipped, h, q.shape[2], k.shape[2], v.shape[2],
        *_strides(q), *_strides(k), *_strides(v),
        C=C, READ=read, KEEP=keep, **plan.options("sweep", "K", "V", "K2", "BV"),
    )  # fmt: skip
    return first, second


def _reverse(
    plan: _Plan, q: Tensor, k: Tensor, dy: Tensor, made: _Chunks, maps: Tensor, dfinal: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the initial state, and every chunk's dS and D."""
    b, n, h = plan.b, plan.n, plan.h
    ends = plan.scratch(*plan.starts, wide=True)
    dstate = plan.scratch(b, h, plan.k, plan.v, wide=True)
    dstates, d = plan.scratch(b, h, n, plan.v, plan.k), plan.scratch(b, h, n, plan.v, C)
    for keep in (False, True):
        skipped = 0 if keep else 1
        if plan.segments > skipped:
            _backwards.reverse[(plan.columns("reverse", plan.v), plan.segments - skipped, b * h)](
                q, k, dy, *made, dfinal, ends, dstate, dstates, d,
                plan.t, n, plan.segments, plan.span, skipped, h, q.shape[2], k.shape[2],
                *_strides(q), *_strides(k), *_strides(dy),
                C=C, KEEP=keep, **plan.options("reverse", "K", "V", "K2", "BV"),
            )  # fmt: skip
        if not keep and plan.segments > 2:
            _combine(plan, ends, maps, forward=False)
    return dstate, dstates, d


@torch.library.custom_op("subquad::gdn_forward", mutates_args=())
@launch.guarded
def _forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, documents: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs, final state, and what the gradients need beside the inputs."""
    plan = _Plan(k, v, g)
    state = state.contiguous()
    made = _prepare(plan, q, k, g, beta, documents)
    starts, maps = _starts(plan, k, v, made, state)
    y, final = _sweep(plan, q, k, v, made, state, starts, read=True, keep=False)
    return y, final, made.a_bhncc, made.p_bhncc, made.factors_bhnfc, starts, maps


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, documents: Tensor | None
) -> tuple[Tensor, ...]:
    plan = _Plan(k, v, g)
    b, n, h = plan.b, plan.n, plan.h
    y, final = plan.scratch(b, plan.t, h, plan.v), plan.scratch(b, h, plan.k, plan.v, wide=True)
    squares = (plan.scratch(b, h, n, C, C) for _ in range(2))
    wide = (plan.scratch(*shape, wide=True) for shape in ((b, h, n, 5, C), plan.starts, plan.maps))
    return y, final, *squares, *wide


@torch.library.custom_op("subquad::gdn_backward", mutates_args=())
@launch.guarded
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    documents: Tensor | None,
    a: Tensor,
    p: Tensor,
    factors: Tensor,
    starts: Tensor,
    maps: Tensor,
    dy: Tensor,
    dfinal: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g, beta and the initial state."""
    plan = _Plan(k, v, g)
    b, t, h = plan.b, plan.t, plan.h
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    made = _Chunks(a, p, factors)
    states, u = _sweep(plan, q, k, v, made, state.contiguous(), starts, read=False, keep=True)
    dstate, dstates, d = _reverse(plan, q, k, dy, made, maps, dfinal.contiguous())
    dq, dk = plan.scratch(b, t, h, plan.k), plan.scratch(b, t, h, plan.k)
    dv = plan.scratch(b, t, h, plan.v)
    dg, dbeta = plan.scratch(b, t, h, wide=True), plan.scratch(b, t, h, wide=True)
    _backwards.gradients[(plan.n, b * h)](
        q, k, v, dy, documents, factors, states, dstates, u, d, dq, dk, dv, dg, dbeta,
        t, plan.n, h, q.shape[2], k.shape[2], v.shape[2], *_strides(q), *_strides(k), *_strides(v), *_strides(dy),
        C=C, DOCUMENTS=documents is not None, **plan.options("gradients", "K", "V", "BK", "BV"),
    )  # fmt: skip
    dq, dk, dv = (_gathered(dx, x.shape[2]) for dx, x in ((dq, q), (dk, k), (dv, v)))
    return dq, dk, dv, dg.to(g.dtype), dbeta.to(beta.dtype), dstate.to(state.dtype)


def _gathered(dx_bthd: Tensor, heads: int) -> Tensor:
    """The gradient of `heads` heads, each read by a group of h."""
    if dx_bthd.shape[2] == heads:
        return dx_bthd
    return dx_bthd.unflatten(2, (heads, -1)).sum(3)


@_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, *_: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v, g, beta, state))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*inputs, *output[2:])
    ctx.like = output[1].shape


def _differentiate(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    k, v, g = saved[1:4]
    if dy is None:
        dy = k.new_zeros(*g.shape, v.shape[-1])
    if dfinal is None:
        dfinal = k.new_zeros(ctx.like, dtype=torch.float32)
    return (*_backward(*saved, dy, dfinal), None)


_forward.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op("subquad::gdn_final_state", mutates_args=())
@launch.guarded
def _final_state(k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, documents: Tensor | None) -> Tensor:
    """The final state alone: one segment is swept, and no query read."""
    plan = _Plan(k, v, g)
    state = state.contiguous()
    made = _prepare(plan, None, k, g, beta, documents)
    starts, _ = _starts(plan, k, v, made, state)
    return _sweep(plan, k, k, v, made, state, starts, read=False, keep=False)[1]


@_final_state.register_fake
def _(k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, documents: Tensor | None) -> Tensor:
    return torch.empty_like(state, dtype=torch.float32, memory_format=torch.contiguous_format)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_final_state(ctx: Any, dfinal: Tensor) -> tuple[Tensor | None, ...]:
    k, v, g, beta, state, documents = ctx.saved_tensors
    # Nobody reads the outputs, so the keys do for queries, whose gradient is dropped.
    more = _forward(k, k, v, g, beta, state, documents)[2:]
    dy = k.new_zeros(*g.shape, v.shape[-1])
    gradients = _backward(k, k, v, g, beta, state, documents, *more, dy, dfinal)
    return (*cast(tuple[Tensor, ...], gradients)[1:], None)


_final_state.register_autograd(_differentiate_final_state, setup_context=_save_inputs)
