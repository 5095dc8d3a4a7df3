"""SSD in Triton: a segmented scan forward, gradients by chunks; bfloat16 on tensor cores, states in float32.

A sequence is cut into segments, as many as fill the device. One launch finds what each adds to the state, one joins
this into the states that segments meet, and one walks the segments again and writes the outputs; the states between
chunks never leave the registers. With one segment the last launch is the only one.

Backward walks forward for the states and in reverse for their gradients, writes both before every chunk, and then takes
each chunk alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from subquad.ops import chunks, launch
from subquad.ops.ssd import kernels as jitted

# Triton's compiler gives what it is handed other types than Python's checkers see.
kernels: Any = jitted

# What a run without a GPU, under the interpreter, plans for.
PROCESSORS = 132


class Tile(NamedTuple):
    """How one kernel is cut: tokens a chunk, columns of the values a program, warps, stages of its pipeline.

    `registers` is the most that a thread takes, so that more programs share a processor; None leaves it to ptxas.
    """

    chunk: int
    columns: int
    warps: int
    stages: int
    registers: int | None = None


class Tiles(NamedTuple):
    """The kernels' tiles for one pair of head dims and one dtype."""

    states: Tile
    outputs: Tile
    gradients: Tile


def tiles(k: int, v: int, dtype: torch.dtype) -> Tiles:
    """The table of tiles.

    No product on tensor cores is 32 columns wide: some versions of ptxas lose its operands' addresses on Hopper.
    """
    if dtype == torch.float32:
        # Exact products take no tensor core; small blocks keep them in registers.
        tile = Tile(32 if max(k, v) <= 64 else 16, min(_power(max(k, v)), 32), 8, 1)
        return Tiles(tile, tile, tile)
    if max(k, v) > 128:
        return Tiles(Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(32, 64, 8, 1))
    if max(k, v) > 64:
        return Tiles(Tile(64, 128, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 1))
    return Tiles(Tile(64, 64, 4, 3), Tile(64, 64, 4, 3, 168), Tile(64, 64, 4, 1))


def segment(time: int, heads: int, k: int, v: int, dtype: torch.dtype) -> int:
    """Tokens a segment, a multiple of 128: `heads`, batch times heads, walk every segment at once.

    Two programs a processor hide each other's waits. A segment of less than 256 tokens isn't worth its state.
    """
    programs = heads * -(-v // tiles(k, v, dtype).outputs.columns)
    segments = max(1, min(2 * _processors() // programs, time // 256))
    return max(1, -(-time // (128 * segments))) * 128


def refusal(*tensors: Tensor) -> str | None:
    """Why the kernels can't run the operation's arguments, or None."""
    return launch.refusal(*tensors, widths=(tensors[1].shape[-1], tensors[2].shape[-1]))


def scan(
    q_bthk: Tensor,
    k_bthk: Tensor,
    v_bthv: Tensor,
    g_bth: Tensor,
    state_bhkv: Tensor,
    *,
    valid_bt: Tensor | None = None,
    documents_bt: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`subquad.ops.ssd.scan` by Triton kernels."""
    launch.axes(
        q_bthk=q_bthk, k_bthk=k_bthk, v_bthv=v_bthv, g_bth=g_bth, state_bhkv=state_bhkv,
        valid_bt=valid_bt, documents_bt=documents_bt,
    )  # fmt: skip
    launch.heads(g_bth.shape[2], q_bthk=q_bthk, k_bthk=k_bthk, v_bthv=v_bthv)
    if g_bth.numel() == 0:
        return v_bthv.new_empty(*g_bth.shape, v_bthv.shape[-1]), state_bhkv.to(torch.float32, copy=True)
    blank = chunks.blank(valid_bt, q_bthk, k_bthk, v_bthv, g_bth)
    q, k, v = launch.operands_of_a_sum(*blank[:3])
    y_bthv, end_bhkv = _scan(q, k, v, blank[3].float(), *_rest(q, v, g_bth, state_bhkv, valid_bt, documents_bt))
    return y_bthv.to(v_bthv.dtype), end_bhkv


def final_state(
    k_bthk: Tensor,
    v_bthv: Tensor,
    g_bth: Tensor,
    state_bhkv: Tensor,
    *,
    valid_bt: Tensor | None = None,
    documents_bt: Tensor | None = None,
) -> Tensor:
    """`subquad.ops.ssd.final_state` by Triton kernels; where gradients are asked for, by `scan`."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (k_bthk, v_bthv, g_bth, state_bhkv)):
        unread = k_bthk.detach()
        arguments = unread, k_bthk, v_bthv, g_bth, state_bhkv
        return scan(*arguments, valid_bt=valid_bt, documents_bt=documents_bt)[1]
    launch.axes(
        k_bthk=k_bthk, v_bthv=v_bthv, g_bth=g_bth, state_bhkv=state_bhkv, valid_bt=valid_bt, documents_bt=documents_bt
    )
    launch.heads(g_bth.shape[2], k_bthk=k_bthk, v_bthv=v_bthv)
    if g_bth.numel() == 0:
        return state_bhkv.to(torch.float32, copy=True)
    k, v, g = chunks.blank(valid_bt, k_bthk, v_bthv, g_bth)
    k, v = launch.operands_of_a_sum(k, v)
    return _final_state(k, v, g.float(), *_rest(k, v, g_bth, state_bhkv, valid_bt, documents_bt))


def _rest(
    k: Tensor, v: Tensor, g_bth: Tensor, state_bhkv: Tensor, valid_bt: Tensor | None, documents_bt: Tensor | None
) -> tuple[Tensor, Tensor | None, int]:
    """What the custom operations take behind the decays: state, documents, tokens a segment."""
    documents_bt = launch.documents(documents_bt, valid_bt)
    b, t, h = g_bth.shape
    return state_bhkv.float().contiguous(), documents_bt, segment(t, b * h, k.shape[-1], v.shape[-1], k.dtype)


@torch.library.custom_op("subquad::ssd_scan", mutates_args=())
@launch.guarded
def _scan(
    q_bthk: Tensor, k_bthk: Tensor, v_bthv: Tensor, g_bth: Tensor, state_bhkv: Tensor,
    documents_bt: Tensor | None, length: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Outputs and final state, by segments of `length` tokens."""
    (b, t, h), k, v = g_bth.shape, k_bthk.shape[-1], v_bthv.shape[-1]
    tile, slots = tiles(k, v, q_bthk.dtype), -(-t // length)
    y = launch.scratch(b, t, h, v, like=v_bthv, dtype=v_bthv.dtype)
    entering, last = state_bhkv, torch.empty_like(state_bhkv)
    if slots > 1:
        walk, _ = _walk(k_bthk, v_bthv, g_bth, state_bhkv, documents_bt, length, tile.states, whole=False)
        entering = walk.entering
    kernels.outputs[(b * h * slots * -(-v // tile.outputs.columns),)](
        q_bthk, k_bthk, v_bthv, g_bth, _documents(documents_bt, g_bth), entering, y, last,
        t, h, b * h, length // tile.outputs.chunk, slots, *_shared(h, q_bthk, k_bthk, v_bthv),
        *_strides(q_bthk, k_bthk, v_bthv), *g_bth.stride(),
        **_blocks(k, v, tile.outputs, q_bthk.dtype), BV=tile.outputs.columns, DOCUMENTS=documents_bt is not None,
    )  # fmt: skip
    return y, last


@_scan.register_fake
def _(
    q_bthk: Tensor, k_bthk: Tensor, v_bthv: Tensor, g_bth: Tensor, state_bhkv: Tensor,
    documents_bt: Tensor | None, length: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return v_bthv.new_empty(*g_bth.shape, v_bthv.shape[-1]), torch.empty_like(state_bhkv)


@torch.library.custom_op("subquad::ssd_final_state", mutates_args=())
@launch.guarded
def _final_state(
    k_bthk: Tensor, v_bthv: Tensor, g_bth: Tensor, state_bhkv: Tensor, documents_bt: Tensor | None, length: int
) -> Tensor:
    tile = tiles(k_bthk.shape[-1], v_bthv.shape[-1], k_bthk.dtype).states
    return _walk(k_bthk, v_bthv, g_bth, state_bhkv, documents_bt, length, tile)[1]


@_final_state.register_fake
def _(
    k_bthk: Tensor, v_bthv: Tensor, g_bth: Tensor, state_bhkv: Tensor, documents_bt: Tensor | None, length: int
) -> Tensor:
    return torch.empty_like(state_bhkv)


@torch.library.custom_op("subquad::ssd_scan_backward", mutates_args=())
@launch.guarded
def _scan_backward(
    dy_bthv: Tensor, dend_bhkv: Tensor, q_bthk: Tensor, k_bthk: Tensor, v_bthv: Tensor, g_bth: Tensor,
    state_bhkv: Tensor, documents_bt: Tensor | None, length: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, g and the first state."""
    (b, t, h), k, v = g_bth.shape, k_bthk.shape[-1], v_bthv.shape[-1]
    tile = tiles(k, v, q_bthk.dtype)
    chunk, columns = tile.gradients.chunk, tile.gradients.columns
    blocks = -(-max(k, v) // columns)
    groups = k_bthk.shape[2]
    if groups != v_bthv.shape[2] or blocks > 1:
        # The gradients that one program has go to different heads, or are not all: they are added up afterwards.
        groups = h
    met, _ = _walk(k_bthk, v_bthv, g_bth, state_bhkv, documents_bt, length, tile.states, between=chunk)
    dmet, dstate = _walk(
        q_bthk, dy_bthv, g_bth, dend_bhkv, documents_bt, length, tile.states, between=chunk, reverse=True
    )
    made: list[Tensor] = []
    for x, heads in ((q_bthk, h), (k_bthk, groups), (v_bthv, groups)):
        # What is still to be added up over heads is not rounded before.
        kind = x.dtype if heads == x.shape[2] else torch.float32
        made.append(launch.scratch(b, t, heads, x.shape[-1], like=x, dtype=kind))
    dg = launch.scratch(blocks, b, t, h, like=g_bth, dtype=torch.float32)
    kernels.gradients[(b * groups * -(-t // chunk) * blocks,)](
        q_bthk, k_bthk, v_bthv, g_bth, dy_bthv, _documents(documents_bt, g_bth), *met, *dmet, *made, dg,
        t, h, b * h, length // chunk, groups, *_shared(h, q_bthk, k_bthk, v_bthv),
        *_strides(q_bthk, k_bthk, v_bthv, dy_bthv), *g_bth.stride(),
        **_blocks(k, v, tile.gradients, q_bthk.dtype), BV=_power(v), COLUMNS=columns, BLOCKS=blocks,
        GROUPED=groups < h, DOCUMENTS=documents_bt is not None,
    )  # fmt: skip
    dq, dk, dv = (_gather(d, x) for d, x in zip(made, (q_bthk, k_bthk, v_bthv), strict=True))
    return dq, dk, dv, dg[0] if blocks == 1 else dg.sum(0), dstate


@_scan_backward.register_fake
def _(
    dy_bthv: Tensor, dend_bhkv: Tensor, q_bthk: Tensor, k_bthk: Tensor, v_bthv: Tensor, g_bth: Tensor,
    state_bhkv: Tensor, documents_bt: Tensor | None, length: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv, dg = (x.new_empty(x.shape) for x in (q_bthk, k_bthk, v_bthv, g_bth))
    return dq, dk, dv, dg, torch.empty_like(dend_bhkv)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:-1])
    ctx.length = inputs[-1]


def _backward(ctx: Any, dy: Tensor | None, dend: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, g, state, documents = ctx.saved_tensors
    read = torch.zeros(*g.shape, v.shape[-1], dtype=v.dtype, device=v.device) if dy is None else dy
    read = read if read.stride(-1) == 1 else read.contiguous()
    kept = torch.zeros_like(state) if dend is None else dend.contiguous()
    return *_scan_backward(read, kept, q, k, v, g, state, documents, ctx.length), None, None


_scan.register_autograd(_backward, setup_context=_remember)


class Met(NamedTuple):
    """What `kernels.states` leaves of a walk: the states before chunks are `between` + `passed` times `entering`."""

    between: Tensor
    passed: Tensor
    entering: Tensor


def _walk(
    x: Tensor, u: Tensor, g: Tensor, first: Tensor, documents: Tensor | None, length: int, tile: Tile, *,
    between: int = 0, reverse: bool = False, whole: bool = True,
) -> tuple[Met, Tensor]:  # fmt: skip
    """Walk the segments from the state `first`: what they and chunks of `between` tokens meet, and the last state.

    Without `whole` the last segment is left out, and the last state is the one it meets.
    """
    (b, t, h), k, v = g.shape, x.shape[-1], u.shape[-1]
    entering = launch.scratch(-(-t // length), b, h, k, v, like=g, dtype=x.dtype if between else torch.float32)
    slots, last = (len(entering), torch.empty_like(first)) if whole else (len(entering) - 1, entering[-1])
    chunk = between or tile.chunk
    total = -(-t // chunk)
    added = launch.scratch(slots, b, h, k, v, like=g, dtype=torch.float32)
    decay = launch.scratch(slots, b, h, like=g, dtype=torch.float32)
    states = launch.scratch(b, h, total if between else 0, k, v, like=g, dtype=x.dtype)
    passed = launch.scratch(b, h, total if between else 0, like=g, dtype=torch.float32)
    kernels.states[(b * h * slots * -(-v // tile.columns),)](
        x, u, g, _documents(documents, g), states, passed, added, decay,
        t, h, b * h, length // chunk, slots, *_shared(h, x, u), *_strides(x, u), *g.stride(),
        **_blocks(k, v, tile._replace(chunk=chunk), x.dtype), BV=tile.columns, DOCUMENTS=documents is not None,
        REVERSE=reverse, BETWEEN=between > 0,
    )  # fmt: skip
    block = min(1024, _power(k * v))
    kernels.combine[(b * h * -(-k * v // block),)](
        added, decay, first, entering, last, b * h, slots, SIZE=k * v, BLOCK=block, num_warps=4
    )
    return Met(states, passed, entering), last


def _blocks(k: int, v: int, tile: Tile, dtype: torch.dtype) -> dict[str, Any]:
    return ({} if tile.registers is None else {"maxnreg": tile.registers}) | {
        "K": k, "V": v, "BK": _power(k), "C": tile.chunk, "PRECISION": launch.precision(dtype),
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip


def _gather(gradient: Tensor, x: Tensor) -> Tensor:
    """Add up a gradient over the heads that share one of `x`."""
    if gradient.shape == x.shape:
        return gradient
    return gradient.unflatten(2, (x.shape[2], -1)).sum(3).to(x.dtype)


def _documents(documents: Tensor | None, g: Tensor) -> Tensor:
    return g if documents is None else documents


def _shared(h: int, *tensors: Tensor) -> list[int]:
    return [h // x.shape[2] for x in tensors]


def _strides(*tensors: Tensor) -> list[int]:
    return [step for x in tensors for step in x.stride()[:3]]


def _power(n: int) -> int:
    """The next power of two, at least the 16 that a tensor core takes."""
    return max(16, 1 << (n - 1).bit_length())


@torch.compiler.assume_constant_result
def _processors() -> int:
    if not torch.cuda.is_available():
        return PROCESSORS
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
