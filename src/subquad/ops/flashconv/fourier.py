"""Launches of the Fourier way: transforms over tiles, products with Toeplitz matrices at each frequency, and back."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from subquad.ops import launch
from subquad.ops.flashconv import kernels_fourier as jitted

# Triton's types know nothing of launches.
kernels: Any = jitted

# In some columns of the table few magnitudes repeat, 1 in tile 0, or cosines of odd eighths of pi in tile n / 4:
# there roundings to bfloat16 add up instead of cancelling. Of all factors this one lets them change a tile the least:
# by 1.6e-3, where the worst lets them by 7.8e-3.
FACTOR = 1.7333984375


class Transform(NamedTuple):
    """How a transform is cut.

    Attributes:
        channels, places: of a program's columns, their product; memory is read by runs of channels and written by runs
            of places, or the other way round, so both are whole sectors of 32 bytes where they are 16.
        rows: of the product at once, frequencies or tiles.
        depth: of the product at once, tiles or frequencies. The transform holds so many tiles of a row; where that
            has more, it reads them again for each block of rows, 64 at a time.
        warps: of a program.
        stages: of the pipeline.
    """

    channels: int
    places: int
    rows: int
    depth: int
    warps: int
    stages: int


class Product(NamedTuple):
    """How the products at a frequency are cut.

    Attributes:
        rows: of the matrix at once.
        width: rows of the batch at once.
        warps: of a program.
        stages: of the pipeline.
    """

    rows: int
    width: int
    warps: int
    stages: int


class Tilings(NamedTuple):
    """The tilings of all kernels."""

    transform: Transform
    restore: Transform
    multiply: Product
    correlate: Product


# Swept on an H100 in bfloat16 from 1,024 to 32,768 tokens; runs of 16 channels and of 16 places halve a transform.
HALF = Tilings(
    transform=Transform(channels=16, places=16, rows=64, depth=256, warps=8, stages=1),
    restore=Transform(channels=16, places=8, rows=64, depth=64, warps=4, stages=2),
    multiply=Product(rows=64, width=64, warps=4, stages=1),
    correlate=Product(rows=64, width=64, warps=4, stages=1),
)
# From so many tiles on the way back takes twice the rows at once, which then read the spectrum half as often.
MANY, MANY_ROWS, MANY_WARPS = 128, 128, 8
# Exact products take no tensor core; small blocks keep them in registers.
SINGLE = Tilings(
    transform=Transform(channels=8, places=8, rows=64, depth=32, warps=8, stages=1),
    restore=Transform(channels=8, places=8, rows=64, depth=32, warps=8, stages=1),
    multiply=Product(rows=16, width=16, warps=8, stages=1),
    correlate=Product(rows=64, width=16, warps=8, stages=1),
)


class Plan(NamedTuple):
    """How a row is cut: `n` tiles of `c` tokens."""

    n: int
    c: int


def plan(t: int, dtype: torch.dtype) -> Plan:
    """The tiles of a row of `t` tokens; a multiple of 16 of them, so that rows of tables are aligned.

    Products grow with n and c alike, and programs with the square of c.
    """
    c = 64 if t <= 8192 or dtype == torch.float32 else 128
    return Plan(16 * triton.cdiv(t, 16 * c), c)


def tilings(dtype: torch.dtype, n: int) -> Tilings:
    """Those for operands of `dtype` in n tiles."""
    if dtype == torch.float32:
        return SINGLE
    if n < MANY:
        return HALF
    return HALF._replace(restore=HALF.restore._replace(rows=MANY_ROWS, warps=MANY_WARPS))


def convolve(u: Tensor, k: Tensor, bias: Tensor | None, gate_in: Tensor | None, gate_out: Tensor | None) -> Tensor:
    """`subquad.ops.flashconv.parallel` of operands of one dtype; the filters' dtype is their own."""
    tensors = (u, k, bias, gate_in, gate_out)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    return _forward(*tensors, keep)[0]


def scale(n: int) -> float:
    """The size of the table's entries: `FACTOR` by the power of two that comes nearest to ``1 / sqrt(n)``."""
    return FACTOR * 2.0 ** -round(math.log2(FACTOR * math.sqrt(n)))


def undone(n: int) -> float:
    """What is left to multiply by behind ``F^T F``; the filters' spectra are, in float32."""
    return 1 / (n * scale(n) ** 2)


def table(n: int, device: torch.device) -> Tensor:
    """``F``, ``[2n, n]``, float32: see `subquad.ops.flashconv.kernels_fourier`."""
    # Whole turns are taken off while the angle is an integer.
    f = torch.arange(n, device=device)
    angle = ((2 * f[:, None] + 1) * f % (4 * n)).double() * (math.pi / (2 * n))
    return (torch.stack((angle.cos(), angle.sin()), dim=1) * scale(n)).flatten(0, 1).float()


def turns(table_fn: Tensor) -> Tensor:
    """``w_f``, ``[n, 2]``, real part and imaginary part: what the transform multiplies tile 1 by."""
    return (table_fn[:, 1] / scale(table_fn.shape[1])).view(-1, 2)


def tables(n: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`table`, the same in the dtype of `like`, and `turns`; made once, since over short rows they are half of all."""
    key = n, like.dtype, like.device
    if key in _known:
        return _known[key]
    table_fn = table(n, like.device)
    made = table_fn, table_fn.to(like.dtype), turns(table_fn)
    # What a captured graph computes lies in its own memory, and what is no plain tensor is nothing to keep.
    captured = like.is_cuda and torch.cuda.is_current_stream_capturing()
    if not captured and type(table_fn) is Tensor:
        _known[key] = made
    return made


_known: dict[tuple[int, torch.dtype, torch.device], tuple[Tensor, Tensor, Tensor]] = {}


def spectra(k: Tensor, table_fn: Tensor, c: int) -> Tensor:
    """The filters' spectra over tiles, float32 ``[g, n, 2, c]``."""
    n = table_fn.shape[1]
    with torch.autocast(k.device.type, enabled=False):
        tiles_gnc = F.pad(k.float(), (0, n * c - k.shape[1])).view(len(k), n, c)
        return (table_fn * (undone(n) / scale(n)) @ tiles_gnc).view(len(k), n, 2, c)


def transform(
    x: Tensor, gate: Tensor | None, table_fn: Tensor, c: int, behind: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """``F (x gate)``, ``[d, n, b, 2, c]``, and ``x behind`` where that is given."""
    (b, t, d), n = x.shape, table_fn.shape[1]
    made = launch.scratch(d, n, b, 2, c, like=x, dtype=x.dtype)
    into = None if behind is None else launch.scratch(b, t, d, like=x, dtype=x.dtype)
    tiles = tilings(x.dtype, n).transform
    whole = max(64, triton.next_power_of_2(n))
    depth = whole if whole <= tiles.depth else min(tiles.depth, 64)
    places = min(tiles.places, c)
    # An absent tensor's place is taken by one that no branch reads.
    gate_ = x if gate is None else gate
    kernels.transform[(triton.cdiv(d, tiles.channels) * (c // places) * b,)](
        x, gate_, x if behind is None else behind, table_fn, x if into is None else into, made,
        *x.stride()[:2], *gate_.stride()[:2], t, b, n, d,
        GATE=gate is not None, BEHIND=behind is not None, WHOLE=n <= depth, C=c, BC=places, BD=tiles.channels,
        BF=tiles.rows, BK=depth, **_options(x, tiles),
    )  # fmt: skip
    return made, into


def restore(
    spectrum: Tensor, table_fn: Tensor, one: Tensor | None, two: Tensor | None, *, t: int, second: bool
) -> tuple[Tensor, Tensor | None]:
    """``w = F^T spectrum``: ``w one``, and where a second is wanted ``w two``, ``[b, t, d]``; None multiplies by 1."""
    d, n, b, _, c = spectrum.shape
    y = launch.scratch(b, t, d, like=spectrum, dtype=spectrum.dtype)
    z = launch.scratch(b, t, d, like=spectrum, dtype=spectrum.dtype) if second else None
    tiles = tilings(spectrum.dtype, n).restore
    places = min(tiles.places, c)
    one_, two_ = (y if other is None else other for other in (one, two))
    grid = triton.cdiv(d, tiles.channels) * (c // places) * b * triton.cdiv(n, tiles.rows)
    kernels.restore[(grid,)](
        spectrum, table_fn, one_, two_, y, y if z is None else z, *one_.stride()[:2], *two_.stride()[:2], t, b, n, d,
        ONE=one is not None, TWO=two is not None, SECOND=second, C=c, BC=places, BD=tiles.channels, BR=tiles.rows,
        BK=tiles.depth, **_options(spectrum, tiles),
    )  # fmt: skip
    return y, z


def multiply(spectrum: Tensor, filters: Tensor, turns_n2: Tensor, bias: Tensor | None, *, adjoint: bool) -> Tensor:
    """The product with the Toeplitz matrix of each frequency, or with its adjoint."""
    d, n, b, _, c = spectrum.shape
    bias = None if bias is None else bias.float() * undone(n)
    made = launch.scratch(*spectrum.shape, like=spectrum, dtype=spectrum.dtype)
    tiles = tilings(spectrum.dtype, n).multiply
    rows = min(tiles.rows, c)
    kernels.multiply[(d * n * (c // rows),)](
        filters, turns_n2, filters if bias is None else bias, spectrum, made, b, n, d // len(filters),
        BIAS=bias is not None, ADJOINT=adjoint, C=c, BR=rows, BB=_width(b, tiles), **_options(spectrum, tiles),
    )  # fmt: skip
    return made


def correlate(later: Tensor, earlier: Tensor, turns_n2: Tensor) -> Tensor:
    """The gradient of each channel's filter spectrum from those of outputs and inputs, float32 ``[d, n, 2, c]``."""
    d, n, b, _, c = later.shape
    made = launch.scratch(d, n, 2, c, like=later, dtype=torch.float32)
    tiles = tilings(later.dtype, n).correlate
    kernels.correlate[(d * n,)](
        later, earlier, turns_n2, made, b, n,
        C=c, BR=min(tiles.rows, c), BB=_width(b, tiles), **_options(later, tiles),
    )  # fmt: skip
    return made


def _width(b: int, tiles: Product) -> int:
    return min(tiles.width, max(16, triton.next_power_of_2(b)))


def _options(like: Tensor, tiles: Transform | Product) -> dict[str, Any]:
    return {"PRECISION": launch.precision(like.dtype), "num_warps": tiles.warps, "num_stages": tiles.stages}


@torch.library.custom_op("subquad::flashconv_fourier_forward", mutates_args=())
@launch.guarded
def _forward(
    u: Tensor, k: Tensor, bias: Tensor | None, gate_in: Tensor | None, gate_out: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, and to keep for the backward the inputs' spectra and what gate_out multiplied; empty where not needed.

    Saved spectra are as large as two inputs, and spare the backward four inputs' worth of reading and writing.
    """
    t, (n, c) = u.shape[1], plan(u.shape[1], u.dtype)
    table_fn, cut, turns_n2 = tables(n, u)
    spectrum, _ = transform(u, gate_in, cut, c)
    made = multiply(spectrum, spectra(k, table_fn, c), turns_n2, bias, adjoint=False)
    y, alone = restore(made, cut, gate_out, None, t=t, second=keep and gate_out is not None)
    nothing = u.new_empty(0)
    return y, spectrum if keep else nothing, nothing.clone() if alone is None else alone


@_forward.register_fake
def _forward_fake(
    u: Tensor, k: Tensor, bias: Tensor | None, gate_in: Tensor | None, gate_out: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    (b, t, d), (n, c) = u.shape, plan(u.shape[1], u.dtype)
    return (
        u.new_empty(u.shape),
        u.new_empty((d, n, b, 2, c) if keep else (0,)),
        u.new_empty((b, t, d) if keep and gate_out is not None else (0,)),
    )


@torch.library.custom_op("subquad::flashconv_fourier_backward", mutates_args=())
@launch.guarded
def _backward(
    dy: Tensor,
    u: Tensor,
    k: Tensor,
    bias: Tensor | None,
    gate_in: Tensor | None,
    gate_out: Tensor | None,
    spectrum: Tensor,
    alone: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, k, bias and both gates; empty for what is not there."""
    t, (n, c) = u.shape[1], plan(u.shape[1], u.dtype)
    table_fn, cut, turns_n2 = tables(n, u)
    dy_spectrum, dgate_out = transform(dy, gate_out, cut, c, None if gate_out is None else alone)
    made = multiply(dy_spectrum, spectra(k, table_fn, c), turns_n2, bias, adjoint=True)
    du, dgate_in = restore(made, cut, gate_in, None if gate_in is None else u, t=t, second=gate_in is not None)
    spectra_dn2c = correlate(dy_spectrum, spectrum, turns_n2)
    with torch.autocast(u.device.type, enabled=False):
        spectra_gfc = spectra_dn2c.view(len(k), -1, 2 * n, c).sum(1)
        dk_gl = (table_fn.mT * (undone(n) / scale(n)) @ spectra_gfc).flatten(1)[:, : k.shape[1]]
    nothing = u.new_empty(0)
    return (
        du,
        dk_gl.to(k.dtype, copy=True),
        # What a token gives to itself is what the bias multiplies.
        nothing if bias is None else (spectra_dn2c[:, :, 0, 0].sum(1) * undone(n)).to(bias.dtype),
        nothing.clone() if dgate_in is None else dgate_in,
        nothing.clone() if dgate_out is None else dgate_out,
    )


@_backward.register_fake
def _backward_fake(
    dy: Tensor,
    u: Tensor,
    k: Tensor,
    bias: Tensor | None,
    gate_in: Tensor | None,
    gate_out: Tensor | None,
    spectrum: Tensor,
    alone: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        u.new_empty(u.shape),
        torch.empty_like(k),
        u.new_empty(0) if bias is None else torch.empty_like(bias),
        u.new_empty(0 if gate_in is None else u.shape),
        u.new_empty(0 if gate_out is None else u.shape),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:-1], *output[1:])


def _gradients(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 6
    tensors = ctx.saved_tensors
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    made = _backward(dy, *tensors)
    return *(d if x is not None else None for d, x in zip(made, tensors[:5], strict=True)), None


_forward.register_autograd(_gradients, setup_context=_setup)
