"""Gated linear attention in Triton: chunks in parallel, their states by a scan, forward and backward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from subquad.ops import chunks, launch
from subquad.ops.gla import kernels as jitted

# Triton's types know nothing of launches.
kernels: Any = jitted

CHUNK = 64
LEVELS = CHUNK.bit_length() - 1


class Tiling(NamedTuple):
    """How a kernel is cut.

    Attributes:
        k, v: channels of a block.
        warps: of a program.
        stages: of the pipeline.
        registers: of a thread at most, so that more programs share a processor; None leaves it to ptxas.
    """

    k: int
    v: int
    warps: int
    stages: int
    registers: int | None = None


def tiling(kernel: str, k: int, v: int, dtype: torch.dtype) -> Tiling:
    """The blocks of `kernel` for head dims `k` and `v`, from sweeps on one H200."""
    k, v = _block(k), _block(v)
    if dtype == torch.float32:
        widest = 32 if launch.precision(dtype) == "ieee" else 64
        return Tiling(min(k, widest), min(v, widest), 8, 1 if kernel != "states" else 3)
    tiles = TABLE[kernel]
    return tiles._replace(k=min(k, tiles.k), v=min(v, tiles.v))


TABLE = {
    "products": Tiling(64, 128, 4, 1),
    "states": Tiling(16, 128, 4, 4),
    "weights": Tiling(64, 0, 4, 1),
    "outputs": Tiling(64, 128, 4, 2),
    "gradients": Tiling(64, 64, 4, 1),
}


def refusal(*tensors: Tensor) -> str | None:
    """Why the kernels can't run these, or None."""
    return launch.refusal(*tensors, widths=(tensors[0].shape[-1], tensors[2].shape[-1]))


def scan(
    q_bthk: Tensor,
    k_bthk: Tensor,
    v_bthv: Tensor,
    g_bthk: Tensor,
    state_bhkv: Tensor,
    *,
    valid_bt: Tensor | None = None,
    documents_bt: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`subquad.ops.gla.scan` by levels of blocks within chunks of 64 tokens, see `subquad.ops.gla.kernels`."""
    _check(q_bthk, k_bthk, v_bthv, g_bthk, state_bhkv, valid_bt, documents_bt)
    q, k, v, g = chunks.blank(valid_bt, q_bthk, k_bthk, v_bthv, g_bthk)
    operands = launch.operands_of_a_sum(q, k, v)
    y_bthv, end_bhkv, *_ = _forward(*operands, _whole(g), state_bhkv, launch.documents(documents_bt, valid_bt))
    return y_bthv.to(v_bthv.dtype), end_bhkv


def final_state(
    k_bthk: Tensor,
    v_bthv: Tensor,
    g_bthk: Tensor,
    state_bhkv: Tensor,
    *,
    valid_bt: Tensor | None = None,
    documents_bt: Tensor | None = None,
) -> Tensor:
    """`subquad.ops.gla.final_state`, without the outputs' kernels where no gradient is wanted."""
    inputs = k_bthk, v_bthv, g_bthk, state_bhkv
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return scan(k_bthk, *inputs, valid_bt=valid_bt, documents_bt=documents_bt)[1]
    _check(k_bthk, *inputs, valid_bt, documents_bt)
    k, v, g = chunks.blank(valid_bt, k_bthk, v_bthv, g_bthk)
    return _final_state(
        *launch.operands_of_a_sum(k, v), _whole(g), state_bhkv, launch.documents(documents_bt, valid_bt)
    )


def _check(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, valid: Tensor | None, documents: Tensor | None):
    launch.axes(q_bthk=q, k_bthk=k, v_bthv=v, g_bthk=g, state_bhkv=state, valid_bt=valid, documents_bt=documents)
    launch.heads(g.shape[2], q_bthk=q, k_bthk=k, v_bthv=v)


def _whole(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _block(n: int) -> int:
    """The next power of two, at least 64.

    Of narrower products, as Triton 3.6 writes them for Hopper, its ptxas (12.8) loses operands' addresses: garbage, or
    an illegal access.
    """
    return max(64, 1 << (n - 1).bit_length())


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(s for x in tensors for s in x.stride()[:3])


def _options(dtype: torch.dtype, documents_bt: Tensor | None, tiles: Tiling) -> dict[str, Any]:
    precision = launch.precision(dtype)
    return ({} if tiles.registers is None else {"maxnreg": tiles.registers}) | {
        "DOCUMENTS": documents_bt is not None,
        "PRECISION": precision,
        # Sums of log decays are exponents: TF32's eleven bits are too few for them.
        "SUMS": "tf32x3" if precision == "tf32" else precision,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def _masks(like: Tensor) -> Tensor:
    """What the kernels sum up with, ``[levels, c, c]``."""
    made = launch.scratch(LEVELS + 2, CHUNK, CHUNK, like=like, dtype=like.dtype)
    kernels.masks[(LEVELS + 2,)](made, C=CHUNK, LEVELS=LEVELS)
    return made


def _states(
    x: Tensor,
    y: Tensor,
    g: Tensor,
    state: Tensor,
    documents: Tensor | None,
    masks: Tensor,
    across: Tensor,
    *,
    back: bool,
    store: bool,
) -> tuple[Tensor, Tensor]:
    """The state before each chunk, ``[b, n, h, k, v]``, and the last; `back`, of its gradient behind each, the first.

    Forward fills `across`, the decay of each chunk.
    """
    (b, t, h, dim_k), dim_v, n = g.shape, y.shape[-1], across.shape[1]
    added = launch.scratch(b, n, h, dim_k, dim_v, like=x, dtype=x.dtype)
    end = torch.empty(b, h, dim_k, dim_v, dtype=torch.float32, device=x.device)
    tiles = tiling("products", dim_k, dim_v, x.dtype)
    blocks = -(-dim_k // tiles.k) * -(-dim_v // tiles.v)
    kernels.products[(b * h * n * blocks,)](
        x, y, g, documents, masks, added, across, *_strides(x, y, g), t, n, h, x.shape[2], y.shape[2],
        K=dim_k, V=dim_v, C=CHUNK, BK=tiles.k, BV=tiles.v, LEVELS=LEVELS, REVERSE=back,
        **_options(x.dtype, documents, tiles),
    )  # fmt: skip
    tiles = tiling("states", dim_k, dim_v, x.dtype)
    blocks = -(-dim_k // tiles.k) * -(-dim_v // tiles.v)
    kernels.states[(b * h * blocks,)](
        added, across, state, end, n, h,
        K=dim_k, V=dim_v, BK=tiles.k, BV=tiles.v, REVERSE=back, STORE=store, STAGES=tiles.stages,
        num_warps=tiles.warps,
    )  # fmt: skip
    return added, end


def _weights(q: Tensor, k: Tensor, g: Tensor, documents: Tensor | None, masks: Tensor) -> Tensor:
    """What the tokens of each chunk weigh for each other, ``[b, n, h, c, c]``."""
    (b, t, h, dim_k), n = g.shape, _chunks(g)
    a = launch.scratch(b, n, h, CHUNK, CHUNK, like=q, dtype=q.dtype)
    tiles = tiling("weights", dim_k, 1, q.dtype)
    kernels.weights[(b * h * n,)](
        q, k, g, documents, masks, a, *_strides(q, k, g), t, n, h, q.shape[2], k.shape[2],
        K=dim_k, C=CHUNK, BK=tiles.k, LEVELS=LEVELS, **_options(q.dtype, documents, tiles),
    )  # fmt: skip
    return a


def _outputs(
    a: Tensor,
    y: Tensor,
    x: Tensor,
    g: Tensor,
    states: Tensor,
    documents: Tensor | None,
    masks: Tensor,
    *,
    back: bool,
) -> Tensor:
    (b, t, h, dim_k), dim_v, n = g.shape, y.shape[-1], states.shape[1]
    made = torch.empty(b, t, h, dim_v, dtype=y.dtype, device=y.device)
    tiles = tiling("outputs", dim_k, dim_v, y.dtype)
    kernels.outputs[(b * h * n * -(-dim_v // tiles.v),)](
        a, y, x, g, states, documents, masks, made, *_strides(y, x, g), t, n, h, y.shape[2], x.shape[2],
        K=dim_k, V=dim_v, C=CHUNK, BK=tiles.k, BV=tiles.v, LEVELS=LEVELS, REVERSE=back,
        **_options(y.dtype, documents, tiles),
    )  # fmt: skip
    return made


@torch.library.custom_op("subquad::gla_forward", mutates_args=())
@launch.guarded
def _forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, documents: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs and final state; and for the backward the states before chunks, their decays, the weights within."""
    (b, _, h, dim_k), n = g.shape, _chunks(g)
    if g.numel() == 0:
        y, end, *rest = _forward_fake(q, k, v, g, state, documents)
        return y, end.copy_(state), *rest
    state = state.contiguous()
    across = launch.scratch(b, n, h, dim_k, like=q, dtype=torch.float32)
    masks = _masks(q)
    before, end = _states(k, v, g, state, documents, masks, across, back=False, store=True)
    a = _weights(q, k, g, documents, masks)
    return _outputs(a, v, q, g, before, documents, masks, back=False), end, before, across, a


@_forward.register_fake
def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, documents: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (b, t, h, dim_k), dim_v, n = g.shape, v.shape[-1], _chunks(g)
    return (
        q.new_empty(b, t, h, dim_v),
        q.new_empty(b, h, dim_k, dim_v, dtype=torch.float32),
        q.new_empty(b, n, h, dim_k, dim_v),
        q.new_empty(b, n, h, dim_k, dtype=torch.float32),
        q.new_empty(b, n, h, CHUNK, CHUNK),
    )


def _chunks(g: Tensor) -> int:
    return (g.shape[1] + CHUNK - 1) // CHUNK


@torch.library.custom_op("subquad::gla_backward", mutates_args=())
@launch.guarded
def _backward(
    dy: Tensor,
    dend: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    documents: Tensor | None,
    before: Tensor,
    across: Tensor,
    a: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, with h heads each, of g and of the initial state, the last two in float32."""
    if g.numel() == 0:
        *nothing, dstate = _backward_fake(dy, dend, q, k, v, g, documents, before, across, a)
        return *nothing, dstate.copy_(dend)
    dy, masks = _whole(dy), _masks(q)
    after, dstate = _states(q, dy, g, dend.contiguous(), documents, masks, across, back=True, store=True)
    dv = _outputs(a, dy, k, g, after, documents, masks, back=True)
    dq, dk, dg = _keys(dy, q, k, v, g, documents, masks, before, after, across)
    return dq, dk, dv, dg, dstate


def _keys(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    documents: Tensor | None,
    masks: Tensor,
    before: Tensor,
    after: Tensor,
    across: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and g."""
    (b, t, h, dim_k), dim_v, n = g.shape, v.shape[-1], across.shape[1]
    dq, dk = (torch.empty(b, t, h, dim_k, dtype=q.dtype, device=q.device) for _ in range(2))
    dg = torch.empty(b, t, h, dim_k, dtype=torch.float32, device=q.device)
    tiles = tiling("gradients", dim_k, dim_v, q.dtype)
    kernels.gradients[(b * h * n * -(-dim_k // tiles.k),)](
        q, k, v, g, dy, documents, masks, across, before, after, dq, dk, dg,
        *_strides(q, k, v, g, dy), t, n, h, q.shape[2], k.shape[2], v.shape[2],
        K=dim_k, V=dim_v, C=CHUNK, BK=tiles.k, BV=tiles.v, LEVELS=LEVELS,
        **_options(q.dtype, documents, tiles),
    )  # fmt: skip
    return dq, dk, dg


@_backward.register_fake
def _backward_fake(
    dy: Tensor,
    dend: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    documents: Tensor | None,
    before: Tensor,
    across: Tensor,
    a: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (b, t, h, dim_k), dim_v = g.shape, v.shape[-1]
    keys = (b, t, h, dim_k)
    return (
        q.new_empty(keys),
        q.new_empty(keys),
        q.new_empty(b, t, h, dim_v),
        q.new_empty(keys, dtype=torch.float32),
        q.new_empty(b, h, dim_k, dim_v, dtype=torch.float32),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, state, documents = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.state_dtype = state.dtype
    ctx.save_for_backward(*tensors, documents, *output[2:])


def _gradients(ctx: Any, dy: Tensor | None, dend: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    q, k, v, g, documents, before, across, a = ctx.saved_tensors
    (b, t, h, dim_k), dim_v = g.shape, v.shape[-1]
    dy = q.new_zeros(b, t, h, dim_v) if dy is None else dy
    dend = q.new_zeros(b, h, dim_k, dim_v, dtype=torch.float32) if dend is None else dend
    dq, dk, dv, dg, dstate = _backward(dy, dend, q, k, v, g, documents, before, across, a)
    grouped = (_grouped(d, x) for d, x in ((dq, q), (dk, k), (dv, v)))
    return *grouped, dg.to(g.dtype), dstate.to(ctx.state_dtype), None


def _grouped(grad_bthx: Tensor, x: Tensor) -> Tensor:
    """Sum over the heads that read one head of x."""
    n = x.shape[2]
    return grad_bthx if n == grad_bthx.shape[2] else grad_bthx.unflatten(2, (n, -1)).sum(3)


_forward.register_autograd(_gradients, setup_context=_setup)


@torch.library.custom_op("subquad::gla_final_state", mutates_args=())
@launch.guarded
def _final_state(k: Tensor, v: Tensor, g: Tensor, state: Tensor, documents: Tensor | None) -> Tensor:
    """The state after the last token."""
    (b, _, h, dim_k), n = g.shape, _chunks(g)
    if g.numel() == 0:
        return state.to(torch.float32, copy=True)
    across = launch.scratch(b, n, h, dim_k, like=k, dtype=torch.float32)
    return _states(k, v, g, state.contiguous(), documents, _masks(k), across, back=False, store=False)[1]


@_final_state.register_fake
def _final_state_fake(k: Tensor, v: Tensor, g: Tensor, state: Tensor, documents: Tensor | None) -> Tensor:
    return torch.empty_like(state, dtype=torch.float32, memory_format=torch.contiguous_format)
