"""The short convolution by Triton kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from subquad.ops import launch
from subquad.ops.short_conv import kernels

# Taps that the kernels can hold; no published mixer has more.
WIDEST = 4


class Tile(NamedTuple):
    """Tokens and channels of a tile, and tiles that a program walks through."""

    rows: int
    channels: int
    tiles: int


FORWARD, BACKWARD = Tile(4, 512, 4), Tile(2, 512, 16)


def refusal(*tensors: Tensor) -> str | None:
    """Why the kernels can't run, or None when they can."""
    taps = tensors[1].shape[-1]
    if taps > WIDEST:
        return f"the Triton kernels take up to {WIDEST} taps, got {taps}"
    b, t = tensors[0].shape[:2]
    if b > launch.GRID or t > launch.GRID * min(FORWARD.rows * FORWARD.tiles, BACKWARD.rows * BACKWARD.tiles):
        return f"the Triton kernels take up to {launch.GRID} rows and about a million tokens, got {b} and {t}"
    return launch.refusal(*tensors, widths=())


def parallel(
    x_btd: Tensor,
    weight_dw: Tensor,
    bias_d: Tensor | None,
    state_bdw: Tensor,
    *,
    documents_bt: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """`subquad.ops.short_conv.parallel`."""
    launch.axes(x_btd=x_btd, weight_dw=weight_dw, bias_d=bias_d, state_bdv=state_bdw, documents_bt=documents_bt)
    bias_d = None if bias_d is None else bias_d.contiguous()
    x_btd = x_btd if x_btd.stride(2) == 1 else x_btd.contiguous()
    documents_bt = launch.documents(documents_bt, None)
    silu = activation == "silu"
    state_bwd = state_bdw.mT.to(x_btd.dtype).contiguous()
    return _forward(x_btd, weight_dw.contiguous(), bias_d, state_bwd, documents_bt, silu)


@torch.library.custom_op("subquad::short_conv", mutates_args=())
@launch.guarded
def _forward(
    x_btd: Tensor, weight_dw: Tensor, bias_d: Tensor | None, state_bwd: Tensor, documents_bt: Tensor | None, silu: bool
) -> Tensor:
    b, t, d = x_btd.shape
    y_btd = launch.scratch(b, t, d, like=x_btd, dtype=x_btd.dtype)
    options = _options(FORWARD, weight_dw, bias_d, documents_bt, silu)
    kernels.conv_forward[(triton.cdiv(d, options["CHANNELS"]), triton.cdiv(t, FORWARD.rows * FORWARD.tiles), b)](
        x_btd, weight_dw, weight_dw if bias_d is None else bias_d, state_bwd,
        weight_dw if documents_bt is None else documents_bt, y_btd, t, d, x_btd.stride(0), x_btd.stride(1), **options,
    )  # fmt: skip
    return y_btd


@torch.library.custom_op("subquad::short_conv_backward", mutates_args=())
@launch.guarded
def _backward(
    dy_btd: Tensor, x_btd: Tensor, weight_dw: Tensor, bias_d: Tensor | None, state_bwd: Tensor,
    documents_bt: Tensor | None, silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of inputs, weights, bias (were there one) and state."""
    b, t, d = x_btd.shape
    w = weight_dw.shape[1]
    options = _options(BACKWARD, weight_dw, bias_d, documents_bt, silu)
    parts = triton.cdiv(t + w - 1, BACKWARD.tiles * BACKWARD.rows)
    dx_btd = launch.scratch(b, t, d, like=x_btd, dtype=x_btd.dtype)
    dstate_bwd = launch.scratch(*state_bwd.shape, like=x_btd, dtype=state_bwd.dtype)
    sums_pwd = launch.scratch(b * parts, w + 1, d, like=x_btd, dtype=torch.float32)
    kernels.conv_backward[(triton.cdiv(d, options["CHANNELS"]), parts, b)](
        dy_btd, x_btd, weight_dw, weight_dw if bias_d is None else bias_d, state_bwd,
        weight_dw if documents_bt is None else documents_bt, dx_btd, dstate_bwd, sums_pwd, t, d,
        x_btd.stride(0), x_btd.stride(1), dy_btd.stride(0), dy_btd.stride(1), **options,
    )  # fmt: skip
    sums_wd = sums_pwd.sum(0)
    dbias_d = sums_wd[w] if bias_d is None else sums_wd[w].to(bias_d.dtype)
    return dx_btd, sums_wd[:w].mT.to(weight_dw.dtype).contiguous(), dbias_d.clone(), dstate_bwd


@_forward.register_fake
def _(
    x_btd: Tensor, weight_dw: Tensor, bias_d: Tensor | None, state_bwd: Tensor, documents_bt: Tensor | None, silu: bool
) -> Tensor:
    return x_btd.new_empty(x_btd.shape)


@_backward.register_fake
def _(
    dy_btd: Tensor, x_btd: Tensor, weight_dw: Tensor, bias_d: Tensor | None, state_bwd: Tensor,
    documents_bt: Tensor | None, silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = torch.float32 if bias_d is None else bias_d.dtype
    dbias_d = weight_dw.new_empty(len(weight_dw), dtype=dtype)
    return x_btd.new_empty(x_btd.shape), torch.empty_like(weight_dw), dbias_d, torch.empty_like(state_bwd)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, dy_btd: Tensor) -> tuple[Tensor | None, ...]:
    x_btd, weight_dw, bias_d, state_bwd, documents_bt = ctx.saved_tensors
    dy_btd = dy_btd if dy_btd.stride(2) == 1 else dy_btd.contiguous()
    dx, dweight, dbias, dstate = _backward(dy_btd, x_btd, weight_dw, bias_d, state_bwd, documents_bt, ctx.silu)
    return dx, dweight, None if bias_d is None else dbias, dstate, None, None


_forward.register_autograd(_gradients, setup_context=_save)


def _options(
    tile: Tile, weight_dw: Tensor, bias_d: Tensor | None, documents_bt: Tensor | None, silu: bool
) -> dict[str, Any]:
    d, w = weight_dw.shape
    channels = min(tile.channels, triton.next_power_of_2(d))
    return {
        "W": w,
        "BIAS": bias_d is not None,
        "SILU": silu,
        "DOCUMENTS": documents_bt is not None,
        "ROWS": tile.rows,
        "TILES": tile.tiles,
        "CHANNELS": channels,
        # A thread holds 8 channels, 16 bytes, of each token.
        "num_warps": max(1, channels // 256),
    }
