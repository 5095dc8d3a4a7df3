"""Launches of the Toeplitz way: products on the tensor cores, with the gates and the bias in between."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from subquad.ops import launch
from subquad.ops.flashconv import kernels_toeplitz as jitted

# Triton's types know nothing of launches.
kernels: Any = jitted

# Tokens of a tile. Of narrower products Triton for Hopper loses operands' addresses, see `subquad.ops.gla.on_triton`.
TILE = 64
LEVELS = TILE.bit_length() - 1


class Tiling(NamedTuple):
    """How a kernel is cut; swept on an H100 in bfloat16, rows of 1,024 tokens.

    Attributes:
        width: columns, or channels where tokens are packed, of a block.
        warps: of a program.
        stages: of the pipeline.
    """

    width: int
    warps: int
    stages: int


PACK, PRODUCT, CORRELATION = Tiling(128, 4, 1), Tiling(256, 4, 3), Tiling(32, 4, 1)
# With documents, which are loaded beside the columns: wider ones would not fit.
MASKED = Tiling(128, 4, 2)


def convolve(
    u: Tensor,
    k: Tensor,
    bias: Tensor | None,
    gate_in: Tensor | None,
    gate_out: Tensor | None,
    documents: Tensor | None,
) -> Tensor:
    """`subquad.ops.flashconv.parallel` by tiles of 64 tokens, of operands of one dtype; documents as launched.

    Filters are rounded to the dtype of inputs and gates, as any matrix is that a tensor core multiplies.
    """
    return _forward(u, k.to(u.dtype).contiguous(), bias, gate_in, gate_out, documents)[0]


def _pack(x: Tensor, gate: Tensor | None, *, reverse: bool) -> Tensor:
    """``x gate``, ``[d, n, b, c]``."""
    (b, t, d), n = x.shape, _tiles(x)
    made = launch.scratch(d, n, b, TILE, like=x, dtype=x.dtype)
    other = x if gate is None else gate
    kernels.pack[(n * b, triton.cdiv(d, PACK.width))](
        x, other, made, *x.stride()[:2], *other.stride()[:2], b, t, n, d,
        GATE=gate is not None, REVERSE=reverse, C=TILE, BD=PACK.width, num_warps=PACK.warps,
    )  # fmt: skip
    return made


def _unpack(
    packed: Tensor,
    x: Tensor,
    gate: Tensor | None,
    bias: Tensor | None,
    one: Tensor | None,
    two: Tensor | None,
    *,
    reverse: bool,
) -> tuple[Tensor, Tensor | None]:
    """``w = packed + bias x gate``: ``w one``, and ``w two`` where that is given, ``[b, t, d]``."""
    (b, t, d), n = x.shape, _tiles(x)
    y = launch.scratch(b, t, d, like=x, dtype=x.dtype)
    z = None if two is None else launch.scratch(b, t, d, like=x, dtype=x.dtype)
    # An absent tensor's place is taken by one that no branch reads.
    gate_, one_, two_ = (x if other is None else other for other in (gate, one, two))
    strides = (s for other in (x, gate_, one_, two_) for s in other.stride()[:2])
    kernels.unpack[(n * b, triton.cdiv(d, PACK.width))](
        packed, x, gate_, x if bias is None else bias, one_, two_, y, y if z is None else z, *strides, b, t, n, d,
        GATE=gate is not None, BIAS=bias is not None, ONE=one is not None, TWO=two is not None, REVERSE=reverse,
        C=TILE, BD=PACK.width, num_warps=PACK.warps,
    )  # fmt: skip
    return y, z


def _convolve(packed: Tensor, k: Tensor, documents: Tensor | None) -> Tensor:
    """Of packed inputs the packed outputs."""
    d, n, b, _ = packed.shape
    made = launch.scratch(*packed.shape, like=packed, dtype=packed.dtype)
    tiles = PRODUCT if documents is None else MASKED
    kernels.toeplitz[(d, triton.cdiv(n * b, tiles.width))](
        k, packed, packed if documents is None else documents, made, n * b, b, k.shape[1], d // len(k),
        C=TILE, BC=tiles.width, LEVELS=LEVELS, **_options(packed, documents, tiles),
    )  # fmt: skip
    return made


def _correlate(later: Tensor, earlier: Tensor, documents: Tensor | None, length: int) -> Tensor:
    """``sum_t later_t earlier_{t - l}`` of packed tokens for each lag below `length`, float32 ``[d, length]``."""
    d, n, b, _ = later.shape
    deltas = min(n, (length + TILE - 2) // TILE + 1)
    made = launch.scratch(d, deltas, 2, TILE, like=later, dtype=torch.float32)
    kernels.correlate[(d, deltas)](
        later, earlier, later if documents is None else documents, made, n * b, b, deltas,
        C=TILE, BC=CORRELATION.width, LEVELS=LEVELS, **_options(later, documents, CORRELATION),
    )  # fmt: skip
    return (made[:, :, 0] + F.pad(made[:, 1:, 1], (0, 0, 0, 1))).flatten(1)[:, :length]


def _documents(documents_bt: Tensor | None, *, reverse: bool) -> Tensor | None:
    """Documents packed like a channel, ``[n, b, c]``."""
    if documents_bt is None:
        return None
    b, t = documents_bt.shape
    n = triton.cdiv(t, TILE)
    documents_bt = documents_bt.flip(1) if reverse else documents_bt
    return F.pad(documents_bt, (0, n * TILE - t), value=-1).view(b, n, TILE).transpose(0, 1).contiguous()


def _tiles(x_btd: Tensor) -> int:
    return triton.cdiv(x_btd.shape[1], TILE)


def _options(like: Tensor, documents: Tensor | None, tiles: Tiling) -> dict[str, Any]:
    return {
        "DOCUMENTS": documents is not None,
        "PRECISION": launch.precision(like.dtype),
        "num_warps": tiles.warps,
        "num_stages": 1 if like.dtype == torch.float32 else tiles.stages,
    }


@torch.library.custom_op("subquad::flashconv_forward", mutates_args=())
@launch.guarded
def _forward(
    u: Tensor, k: Tensor, bias: Tensor | None, gate_in: Tensor | None, gate_out: Tensor | None, documents: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Outputs, and for the backward the convolution alone, packed; empty where no gate stands behind it."""
    packed = _convolve(_pack(u, gate_in, reverse=False), k, _documents(documents, reverse=False))
    y, _ = _unpack(packed, u, gate_in, bias, gate_out, None, reverse=False)
    return y, packed if gate_out is not None else packed.new_empty(0)


@_forward.register_fake
def _forward_fake(
    u: Tensor, k: Tensor, bias: Tensor | None, gate_in: Tensor | None, gate_out: Tensor | None, documents: Tensor | None
) -> tuple[Tensor, Tensor]:
    b, _, d = u.shape
    return u.new_empty(u.shape), u.new_empty((d, _tiles(u), b, TILE) if gate_out is not None else (0,))


@torch.library.custom_op("subquad::flashconv_backward", mutates_args=())
@launch.guarded
def _backward(
    dy: Tensor,
    u: Tensor,
    k: Tensor,
    bias: Tensor | None,
    gate_in: Tensor | None,
    gate_out: Tensor | None,
    documents: Tensor | None,
    packed: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, k, bias and both gates; empty for what is not there.

    Backwards in time the transposed convolution is the convolution, and a token that another sees is the one that sees.
    """
    back = _documents(documents, reverse=True)
    dy_packed, u_packed = _pack(dy, gate_out, reverse=True), _pack(u, gate_in, reverse=True)
    lags_dl = _correlate(u_packed, dy_packed, back, k.shape[1])
    du, dgate_in = _unpack(
        _convolve(dy_packed, k, back), dy, gate_out, bias, gate_in, None if gate_in is None else u, reverse=True
    )
    nothing = u.new_empty(0)
    dgate_out = nothing
    if gate_out is not None:
        dgate_out, _ = _unpack(packed, u, gate_in, bias, dy, None, reverse=False)
    dk = lags_dl.unflatten(0, (len(k), -1)).sum(1).to(k.dtype)
    # What a token gives to itself is what the bias multiplies.
    dbias = nothing if bias is None else lags_dl[:, 0].to(bias.dtype, copy=True)
    return (
        du,
        dk,
        dbias,
        nothing.clone() if dgate_in is None else dgate_in,
        dgate_out.clone() if gate_out is None else dgate_out,
    )


@_backward.register_fake
def _backward_fake(
    dy: Tensor,
    u: Tensor,
    k: Tensor,
    bias: Tensor | None,
    gate_in: Tensor | None,
    gate_out: Tensor | None,
    documents: Tensor | None,
    packed: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        u.new_empty(u.shape),
        torch.empty_like(k),
        u.new_empty(0) if bias is None else torch.empty_like(bias),
        u.new_empty(0 if gate_in is None else u.shape),
        u.new_empty(0 if gate_out is None else u.shape),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, output[1])


def _gradients(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 6
    *tensors, packed = ctx.saved_tensors
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    made = _backward(dy, *tensors, packed)
    return *(d if x is not None else None for d, x in zip(made, tensors[:5], strict=True)), None


_forward.register_autograd(_gradients, setup_context=_setup)
