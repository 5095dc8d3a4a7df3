"""Linear layers over few tokens by Triton."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor, nn

from subquad.ops import launch, norm, overlap
from subquad.ops.skinny.kernels import gate_few_kernel, gate_kernel, project_few_kernel, project_kernel
from subquad.ops.skinny.on_torch import Layer


class Tiling(NamedTuple):
    """Columns of a program, inputs at once, tiles of weights under way, warps, most tokens."""

    columns: int
    inputs: int
    stages: int
    warps: int
    tokens: int = 64


# The matrix unit's smallest tile, and its narrow side.
FEWEST, NARROW = 16, 8
# Most tokens before programs that hold whole rows: of numbers for the matrix unit, and of float32, which goes without.
FEW, VERY_FEW = 32, 2
# A program holds whole rows of a weight of at most so many bytes.
ROW_BYTES = 4096
# It makes sixteen columns at once where it holds at most so many numbers for each: more take the place of a program.
WIDEST = 2048
# Numbers for a column that two warps hold.
SHORT = 1152
# One token before a long row of a weight: no matrix unit reads as fast.
LONG, SINGLE = 2048, Tiling(4, 1024, 3, 4)


def tiling(tokens: int, width: int, size: int) -> Tiling:
    """The table, for bytes of a number, of rows that come in tiles."""
    if size > 2:
        return Tiling(16, 128, 3, 4)
    if tokens > 64:
        return Tiling(32, 128, 3, 4)
    if tokens > FEWEST:
        return Tiling(16, 64, 5, 4) if width <= 1024 else Tiling(16, 128, 4, 4)
    return Tiling(32, 128, 5, 4)


def refusal(*tensors: Tensor) -> str | None:
    """Why the kernels can't run."""
    return launch.refusal(*tensors, widths=())


def unit(width: int) -> int:
    """The kernels' UNIT for rows of so many numbers."""
    return math.gcd(width, 16)


def few(rows: int, width: int, size: int) -> bool:
    """Whether programs hold whole rows of the weight and of tokens: one wait for a weight, and a norm on the way."""
    return width * size <= ROW_BYTES and rows <= (FEW if size <= 2 else VERY_FEW)


def parts(width: int, least: int) -> tuple[int, int]:
    """The least powers of two, from `least` on, that hold a row: one, or one and a smaller one behind it."""
    first = max(1 << (width.bit_length() - 1), least)
    tail = max(triton.next_power_of_2(width - first), least) if width > first else 0
    return (first, tail) if tail < first else (2 * first, 0)


def whole(rows: int, width: int, size: int, weights: int = 1) -> dict[str, int]:
    """How programs that hold whole rows of one or two weights are cut and launched, for bytes of a number.

    One token is few columns a program, so that all processors have some; more are tiles of the matrix unit.
    """
    if rows == 1 or size > 2:
        columns, inputs = 2 if rows == 1 else 4, triton.next_power_of_2(width)
        tokens = triton.next_power_of_2(rows)
        return {"BM": tokens, "BN": columns, "BK": inputs, "TAIL": 0, "SLICES": 0, "num_warps": 4}
    # The sums over slices take longer the more tokens there are; two are as few as a thread has registers for.
    slices = 2 if rows > 4 and weights * width <= SHORT else 4
    first, tail = parts(width, slices * FEWEST)
    return {
        "BM": NARROW,
        "BN": 2 * NARROW if weights * (first + tail) <= WIDEST else NARROW,
        "BK": first,
        "TAIL": tail,
        "SLICES": slices,
        "num_warps": slices,
    }


def takes(normed: nn.RMSNorm, x_btd: Tensor) -> bool:
    """Whether each program has all inputs of all tokens, so that it can norm them itself."""
    plain = launch.untouched(normed, nn.RMSNorm) and normed.eps is not None and normed.weight.dtype == x_btd.dtype
    return plain and few(x_btd.shape[0] * x_btd.shape[1], x_btd.shape[2], x_btd.element_size())


def project(
    x_btd: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], normed: nn.RMSNorm | None
) -> tuple[Tensor, ...]:
    """`subquad.ops.skinny.project`."""
    scale, eps = None, 0.0
    if normed is not None and takes(normed, x_btd):
        scale, eps = normed.weight, normed.eps or 0.0
    elif normed is not None:
        x_btd = norm.add_rms(x_btd, None, normed)[1]
    y_btn = _project(x_btd.contiguous(), list(weights), list(biases), scale, eps, [])
    return y_btn.split([len(weight) for weight in weights], dim=-1)


def glu(x_btd: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`subquad.ops.skinny.glu`."""
    return _glu(x_btd.contiguous(), weight, bias)


def swiglu(x_btd: Tensor, y_btd: Tensor, normed: nn.RMSNorm, gate: Layer, up: Layer, down: Layer) -> Tensor:
    """`subquad.ops.skinny.swiglu`."""
    layers = gate[0], up[0], gate[1], up[1]
    if takes(normed, x_btd) and few(x_btd.shape[0] * x_btd.shape[1], down[0].shape[1], x_btd.element_size()):
        x_btd, y_btd = x_btd.contiguous(), y_btd.contiguous()
        inner_btn = _gate(x_btd, y_btd, normed.weight, normed.eps or 0.0, *layers)
        return _project(inner_btn, [down[0]], [down[1]], None, 0.0, [x_btd, y_btd])
    h_btd, n_btd = norm.add_rms(x_btd, y_btd, normed)
    return _project(_gate(n_btd, None, None, 0.0, *layers), [down[0]], [down[1]], None, 0.0, [h_btd])


@torch.library.custom_op(
    "subquad::skinny_project",
    mutates_args=(),
    schema="(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor? scale, float eps, Tensor[] add) -> Tensor",
)
@launch.guarded
def _project(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], scale: Tensor | None, eps: float,
    add: Sequence[Tensor],
) -> Tensor:  # fmt: skip
    (b, t, k), sizes = x.shape, [len(weight) for weight in weights]
    y = launch.scratch(b, t, sum(sizes), like=x, dtype=x.dtype)
    rows = b * t
    # What is absent has its place taken by something that no branch reads.
    more = [weights[0]] * (6 - len(weights))
    absent = [weights[0] if bias is None else bias for bias in biases]
    layers = *weights, *more, *absent, *more, *sizes, *[0] * len(more)
    biased = sum(1 << i for i, bias in enumerate(biases) if bias is not None)
    if few(rows, k, x.element_size()):
        cut = whole(rows, k, x.element_size())
        grid = sum(triton.cdiv(n, cut["BN"]) for n in sizes), triton.cdiv(rows, cut["BM"])
        kernel: Any = project_few_kernel[grid]
        kernel(
            x, x if scale is None else scale, *[*add, x, x][:2], y, *layers, rows, sum(sizes), eps,
            K=k, COUNT=len(weights), BIASES=biased, NORM=scale is not None, ADD=len(add), **cut,
            **overlap.options(x.device),
        )  # fmt: skip
        return y
    single = rows == 1 and k > LONG and x.element_size() == 2
    tile = SINGLE if single else tiling(rows, k, x.element_size())
    bm = 1 if single else _tokens(rows, tile)
    kernel = project_kernel[(sum(triton.cdiv(n, tile.columns) for n in sizes), triton.cdiv(rows, bm))]
    kernel(
        x, *[*add, x][:1], y, *layers, rows, k, sum(sizes),
        UNIT=unit(k), COUNT=len(weights), BIASES=biased, ADD=len(add) > 0, PRECISION=launch.precision(x.dtype),
        BM=bm, BN=tile.columns, BK=tile.inputs, STAGES=tile.stages,
        num_warps=tile.warps, **overlap.options(x.device),
    )  # fmt: skip
    return y


@_project.register_fake
def _(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], scale: Tensor | None, eps: float,
    add: Sequence[Tensor],
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], x.shape[1], sum(len(weight) for weight in weights))


@torch.library.custom_op("subquad::skinny_gate", mutates_args=())
@launch.guarded
def _gate(
    x: Tensor, y: Tensor | None, scale: Tensor | None, eps: float, gate: Tensor, up: Tensor, gate_bias: Tensor | None,
    up_bias: Tensor | None,
) -> Tensor:  # fmt: skip
    (b, t, k), n, rows = x.shape, len(gate), x.shape[0] * x.shape[1]
    out = launch.scratch(b, t, n, like=x, dtype=x.dtype)
    biases = gate if gate_bias is None else gate_bias, up if up_bias is None else up_bias
    if y is not None:
        cut = whole(rows, k, x.element_size(), weights=2)
        kernel: Any = gate_few_kernel[(triton.cdiv(n, cut["BN"]), triton.cdiv(rows, cut["BM"]))]
        kernel(
            x, y, x if scale is None else scale, gate, up, *biases, out, rows, n, eps, K=k,
            BIAS=gate_bias is not None, **cut, **overlap.options(x.device),
        )  # fmt: skip
        return out
    _launch_gate(x, gate, up, gate_bias, up_bias, out, silu=True)
    return out


@_gate.register_fake
def _(
    x: Tensor, y: Tensor | None, scale: Tensor | None, eps: float, gate: Tensor, up: Tensor, gate_bias: Tensor | None,
    up_bias: Tensor | None,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], x.shape[1], len(gate))


@torch.library.custom_op("subquad::skinny_glu", mutates_args=())
@launch.guarded
def _glu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = launch.scratch(x.shape[0], x.shape[1], len(weight) // 2, like=x, dtype=x.dtype)
    up, gate = weight.chunk(2)
    up_bias, gate_bias = (None, None) if bias is None else bias.chunk(2)
    _launch_gate(x, gate, up, gate_bias, up_bias, out, silu=False)
    return out


@_glu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], len(weight) // 2)


def _launch_gate(
    x: Tensor, gate: Tensor, up: Tensor, gate_bias: Tensor | None, up_bias: Tensor | None, out: Tensor, *, silu: bool
) -> None:
    """Fill `out` with one layer's columns times the SiLU, or the sigmoid, of another's."""
    (b, t, k), n = x.shape, len(gate)
    rows, tile = b * t, tiling(b * t, k, x.element_size())
    bm = _tokens(rows, tile)
    # What is absent has its place taken by something that no branch reads.
    biases = gate if gate_bias is None else gate_bias, up if up_bias is None else up_bias
    kernel: Any = gate_kernel[(triton.cdiv(n, tile.columns), triton.cdiv(rows, bm))]
    kernel(
        x, gate, up, *biases, out, rows, k, n,
        UNIT=unit(k), BIAS=gate_bias is not None, SILU=silu, PRECISION=launch.precision(x.dtype),
        BM=bm, BN=tile.columns, BK=tile.inputs, STAGES=tile.stages,
        num_warps=tile.warps, **overlap.options(x.device),
    )  # fmt: skip


def _tokens(rows: int, tile: Tiling) -> int:
    """Tokens of a program, no fewer than a matrix unit takes."""
    return min(tile.tokens, max(FEWEST, triton.next_power_of_2(rows)))
