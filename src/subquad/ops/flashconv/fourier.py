"""Launches of the Fourier way: transforms over tiles and within them, a product, and back."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from subquad.ops import launch
from subquad.ops.flashconv import kernels_fourier, kernels_spectrum
from subquad.ops.flashconv.tables import Plan, Tables, scale, tables

# Triton's types know nothing of launches.
over: Any = kernels_fourier
within: Any = kernels_spectrum

# The least side of a product on tensor cores.
LEAST = 16


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


class Tilings(NamedTuple):
    """The tilings of all kernels.

    Attributes:
        transform, restore: over tiles.
        warps, stages: of the programs within a tile.
    """

    transform: Transform
    restore: Transform
    warps: int
    stages: int


# Of rows of up to so many tokens the tiles. Programs within a tile take longer the larger it is; transforms over tiles
# are bound by memory up to 16 of them, and hardly slower up to 32.
SHAPES = {4096: (16, 16), 8192: (32, 16), 32_768: (32, 32)}
LARGEST = (64, 64)
# Exact products would not fit into larger ones.
EXACT = (32, 32)
FEW = 16


def plan(t: int, dtype: torch.dtype) -> Plan:
    """The tiles of a row of `t` tokens."""
    largest = EXACT if dtype == torch.float32 else LARGEST
    p, q = next((shape for longest, shape in SHAPES.items() if t <= longest), largest)
    return Plan(triton.cdiv(t, p * q), p, q)


def tilings(dtype: torch.dtype, cut: Plan) -> Tilings:
    """Those for operands of `dtype`; swept on an H100 in bfloat16, rows of 1,024 to 262,144 tokens."""
    if dtype == torch.float32:
        # Exact products take no tensor core; small blocks keep them in registers.
        exact = Transform(channels=8, places=8, rows=64, depth=64, warps=8, stages=1)
        return Tilings(exact, exact, warps=8, stages=1)
    # Of the largest tiles, what a pipeline holds beside takes the place of another program.
    warps, stages = {256: (1, 3), 512: (1, 3), 1024: (2, 3), 4096: (4, 1)}[cut.p * cut.q]
    if cut.n <= FEW:
        transform = Transform(channels=64, places=16, rows=64, depth=256, warps=4, stages=1)
        restore = Transform(channels=16, places=32, rows=64, depth=64, warps=8, stages=1)
    else:
        transform = Transform(channels=16, places=16, rows=64, depth=256, warps=4, stages=1)
        restore = Transform(channels=16, places=16, rows=64, depth=64, warps=4, stages=1)
    return Tilings(transform, restore, warps, stages)


def convolve(
    u: Tensor,
    k: Tensor,
    behind: Tensor | None,
    bias: Tensor | None,
    gate_in: Tensor | None,
    gate_out: Tensor | None,
) -> Tensor:
    """`subquad.ops.flashconv.parallel` of operands of one dtype; the filters' dtype is their own."""
    tensors = (u, k, behind, bias, gate_in, gate_out)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    return _forward(*tensors, keep)[0]


def spectra(k: Tensor, behind: Tensor | None, known: Tables) -> Tensor:
    """The filters' values ``[g, n, 2, p, q]``, in the dtype of operands; with those of filters backwards in time."""
    n, p, q = known.plan
    spectrum, _ = transform(k.mT[None], None, known, power=known.power)
    made = spectrum.view(len(k), n, 2, p, q)
    # In place: a program writes where it alone has read.
    within.filters[(len(k) * n,)](made, *known.within, known.rest, n, P=p, Q=q, **_within(known))
    if behind is not None:
        # Backwards in time is the adjoint. Rows are as long again of zeros, so that nothing comes round.
        other = spectra(behind, None, known)
        made[:, :, 0] += other[:, :, 0]
        made[:, :, 1] -= other[:, :, 1]
    return made


def transform(
    x: Tensor, gate: Tensor | None, known: Tables, behind: Tensor | None = None, *, power: float = 1.0
) -> tuple[Tensor, Tensor | None]:
    """``F (power x gate)``, ``[d, n, b, 2, c]``, and ``x behind`` where that is given."""
    (b, t, d), (n, p, q), table = x.shape, known.plan, known.over_fn
    c = p * q
    made = launch.scratch(d, n, b, 2, c, like=x, dtype=table.dtype)
    into = None if behind is None else launch.scratch(b, t, d, like=x, dtype=x.dtype)
    tiles = tilings(table.dtype, known.plan).transform
    whole = max(LEAST, triton.next_power_of_2(n))
    depth = whole if whole <= tiles.depth else min(tiles.depth, 64)
    # Filters' places lie side by side, where inputs' channels do.
    channels, places = (tiles.places, tiles.channels) if x.stride(1) == 1 else (tiles.channels, tiles.places)
    places, rows = min(places, c), min(tiles.rows, max(LEAST, triton.next_power_of_2(2 * n)))
    # An absent tensor's place is taken by one that no branch reads.
    gate_ = x if gate is None else gate
    over.transform[(triton.cdiv(d, channels) * (c // places) * b,)](
        x, gate_, x if behind is None else behind, table, x if into is None else into, made,
        *x.stride(), *gate_.stride()[:2], t, b, n, d, power,
        GATE=gate is not None, SCALED=power != 1, BEHIND=behind is not None, WHOLE=n <= depth, C=c, BC=places,
        BD=channels, BF=rows, BK=depth, **_options(table, tiles),
    )  # fmt: skip
    return made, into


def restore(
    spectrum: Tensor, known: Tables, one: Tensor | None, two: Tensor | None, *, t: int, second: bool
) -> tuple[Tensor, Tensor | None]:
    """``w = F^T spectrum``: ``w one``, and where a second is wanted ``w two``, ``[b, t, d]``; None multiplies by 1."""
    d, n, b, _, c = spectrum.shape
    y = launch.scratch(b, t, d, like=spectrum, dtype=spectrum.dtype)
    z = launch.scratch(b, t, d, like=spectrum, dtype=spectrum.dtype) if second else None
    tiles = tilings(spectrum.dtype, known.plan).restore
    places, rows = min(tiles.places, c), min(tiles.rows, max(LEAST, triton.next_power_of_2(n)))
    depth = min(tiles.depth, max(LEAST, triton.next_power_of_2(2 * n)))
    one_, two_ = (y if other is None else other for other in (one, two))
    grid = triton.cdiv(d, tiles.channels) * (c // places) * b * triton.cdiv(n, rows)
    over.restore[(grid,)](
        spectrum, known.over_fn, one_, two_, y, y if z is None else z, *one_.stride()[:2], *two_.stride()[:2],
        t, b, n, d, ONE=one is not None, TWO=two is not None, SECOND=second, C=c, BC=places, BD=tiles.channels, BR=rows,
        BK=depth, **_options(spectrum, tiles),
    )  # fmt: skip
    return y, z


def multiply(spectrum: Tensor, filters: Tensor, known: Tables, bias: Tensor | None, *, adjoint: bool) -> Tensor:
    """The product with the filters at each frequency, or with their adjoint."""
    d, n, b, _, _ = spectrum.shape
    made = launch.scratch(*spectrum.shape, like=spectrum, dtype=spectrum.dtype)
    within.multiply[(d * n,)](
        filters, filters if bias is None else bias, *known.within, spectrum, made, known.undone, b, n,
        d // len(filters), BIAS=bias is not None, ADJOINT=adjoint, P=known.plan.p, Q=known.plan.q, **_within(known),
    )  # fmt: skip
    return made


def correlate(later: Tensor, earlier: Tensor, known: Tables, *, behind: bool) -> tuple[Tensor, Tensor | None]:
    """The gradient of each channel's filter over tiles from those of outputs and inputs, float32 ``[d, n, 2, c]``.

    The second is that of the filter backwards in time, where there is one.
    """
    d, n, b, _, c = later.shape
    made = launch.scratch(d, n, 2, c, like=later, dtype=torch.float32)
    other = launch.scratch(d, n, 2, c, like=later, dtype=torch.float32) if behind else None
    within.correlate[(d * n,)](
        later, earlier, *known.within, made, made if other is None else other, b, n,
        BEHIND=behind, P=known.plan.p, Q=known.plan.q, **_within(known),
    )  # fmt: skip
    return made, other


def taps(spectra_dn2c: Tensor, known: Tables, like: Tensor) -> Tensor:
    """The gradient of filters from `correlate`'s, shaped and of the dtype of `like`."""
    d, n, _, c = spectra_dn2c.shape
    spectra_gfc = spectra_dn2c.view(d, 2 * n, c)
    if len(like) < d:
        spectra_gfc = spectra_gfc.unflatten(0, (len(like), -1)).sum(1)
    with torch.autocast(like.device.type, enabled=False):
        return (known.taps_fn.mT @ spectra_gfc).flatten(1)[:, : like.shape[1]].to(like.dtype).contiguous()


def _within(known: Tables) -> dict[str, Any]:
    dtype = known.right.dtype
    tiles = tilings(dtype, known.plan)
    return {"PRECISION": launch.precision(dtype), "num_warps": tiles.warps, "num_stages": tiles.stages}


def _options(like: Tensor, tiles: Transform) -> dict[str, Any]:
    return {"PRECISION": launch.precision(like.dtype), "num_warps": tiles.warps, "num_stages": tiles.stages}


@torch.library.custom_op("subquad::flashconv_fourier_forward", mutates_args=())
@launch.guarded
def _forward(
    u: Tensor,
    k: Tensor,
    behind: Tensor | None,
    bias: Tensor | None,
    gate_in: Tensor | None,
    gate_out: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs, and for the backward the spectra of inputs and filters and what gate_out multiplied; empty if not kept.

    Saved spectra are as large as two inputs, and spare the backward four inputs' worth of reading and writing.
    """
    t = u.shape[1]
    known = tables(plan(t, u.dtype), u)
    spectrum, _ = transform(u, gate_in, known)
    filters = spectra(k, behind, known)
    made = multiply(spectrum, filters, known, bias, adjoint=False)
    y, alone = restore(made, known, gate_out, None, t=t, second=keep and gate_out is not None)
    nothing = u.new_empty(0)
    if not keep:
        return y, nothing, nothing.clone(), nothing.clone()
    return y, spectrum, filters, nothing if alone is None else alone


@_forward.register_fake
def _forward_fake(u: Tensor, k: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (b, t, d), (n, p, q), (*_, gate_out, keep) = u.shape, plan(u.shape[1], u.dtype), others
    return (
        u.new_empty(u.shape),
        u.new_empty((d, n, b, 2, p * q) if keep else (0,)),
        u.new_empty((len(k), n, 2, p, q) if keep else (0,)),
        u.new_empty((b, t, d) if keep and gate_out is not None else (0,)),
    )


@torch.library.custom_op("subquad::flashconv_fourier_backward", mutates_args=())
@launch.guarded
def _backward(
    dy: Tensor,
    u: Tensor,
    k: Tensor,
    behind: Tensor | None,
    bias: Tensor | None,
    gate_in: Tensor | None,
    gate_out: Tensor | None,
    spectrum: Tensor,
    filters: Tensor,
    alone: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, both filters, bias and both gates; empty for what is not there."""
    t = u.shape[1]
    known = tables(plan(t, u.dtype), u)
    dy_spectrum, dgate_out = transform(dy, gate_out, known, None if gate_out is None else alone)
    made = multiply(dy_spectrum, filters, known, bias, adjoint=True)
    du, dgate_in = restore(made, known, gate_in, None if gate_in is None else u, t=t, second=gate_in is not None)
    own_dn2c, other_dn2c = correlate(dy_spectrum, spectrum, known, behind=behind is not None)
    # What a token gives to itself, at lag 0, is what the bias multiplies: on the way back, the first place's.
    _, p, q = known.plan
    direct = known.undone / (scale(p) * scale(q))
    nothing = u.new_empty(0)
    return (
        du,
        taps(own_dn2c, known, k),
        nothing if behind is None or other_dn2c is None else taps(other_dn2c, known, behind),
        nothing.clone() if bias is None else (own_dn2c[:, :, 0, 0].sum(1) * direct).to(bias.dtype),
        nothing.clone() if dgate_in is None else dgate_in,
        nothing.clone() if dgate_out is None else dgate_out,
    )


@_backward.register_fake
def _backward_fake(dy: Tensor, *inputs: Tensor | None) -> tuple[Tensor, ...]:
    # Of the two filters, the bias and the gates, and of the inputs in front of them; behind them stands what was kept.
    return tuple(dy.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs[:6])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:-1], *output[1:])


def _gradients(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 7
    tensors = ctx.saved_tensors
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    made = _backward(dy, *tensors)
    return *(d if x is not None else None for d, x in zip(made, tensors[:6], strict=True)), None


_forward.register_autograd(_gradients, setup_context=_setup)
