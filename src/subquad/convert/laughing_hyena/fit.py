"""Filters as sums of modes: Hankel singular values, the realisation they give, and its refinement by least squares.

All of it is about taps 1, 2, ...: tap 0 passes a state space by. Filters are rows of norm 1, in float64.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.mixers.laughing_hyena import LEAST_RATE

# More directions than asked for, and rounds, so that those asked for are exact to rounding.
SPARE, ROUNDS = 10, 6
# No mode lasts longer than so many lengths of its filter: what lies behind the filter's end is nobody's wish.
SLOWEST = 100
# A mode of this rate is gone with its first token.
FASTEST = 20.0
# Zeros behind a filter, in its lengths, with which its poles are looked for.
REACHES = (0.0, 0.5, 1.0)
# What an error may be larger by for smaller residues. Large ones that cancel each other fit as well on paper, but each
# mode's rounding in float32 is multiplied by them.
RIDGE = 1e-5
# What falls this far short of its bound at the start is not refined but given more modes.
HOPELESS = 10
# Levenberg and Marquardt's: steps at most, and the damping at the start.
STEPS, DAMPING = 40, 1e-3
# Rounds in which the largest errors get the larger weights.
REWEIGHTED = 30
# Bytes that a Jacobian may take, on a CPU and on a GPU.
WORKSPACE, GPU_WORKSPACE = 2**28, 2**30


class Modes(NamedTuple):
    """Logarithms of poles inside the unit disc, and residues: complex ``[g, m]``, ``h_l = Re sum residue a^l``."""

    log_a_gm: Tensor
    residue_gm: Tensor


@dataclass(frozen=True)
class Errors:
    """How far fits are from their filters, a row each, relative to the filter in the same norm.

    Attributes:
        l2, linf: of the taps.
        hankel: largest singular value of the Hankel matrix of the error.
        aak: the least that any filter of this order has there, the filter's own next singular value (Adamyan, Arov and
            Krein; Eckart and Young for the matrix of the taps there are).
    """

    l2: Tensor
    linf: Tensor
    hankel: Tensor
    aak: Tensor


def singular(h_gl: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Leading Hankel singular values and vectors of filters, ``[g, r]`` and ``[g, p, r]``.

    The matrix ``H_ij = h_{i + j}`` of the taps there are, p by p, is never made: it is symmetric, products with it are
    transforms, and its leading eigenvectors come from random ones by subspace iteration.

    Args:
        h_gl: taps from 1 on.
        rank: how many are wanted; r is that, or the p there are.
    """
    p = (h_gl.shape[1] + 1) // 2
    r = min(p, rank + SPARE)
    n = 1 << (2 * p - 1).bit_length()
    spectrum_g1f = torch.fft.rfft(h_gl[:, : 2 * p - 1], n)[:, None]

    def times(x_gpr: Tensor) -> Tensor:
        return torch.fft.irfft(spectrum_g1f * torch.fft.rfft(x_gpr.mT, n).conj(), n)[..., :p].mT

    rng = torch.Generator().manual_seed(0)
    start = torch.randn(p, r, generator=rng, dtype=torch.float64).to(h_gl)
    q_gpr = start.expand(len(h_gl), -1, -1)
    for _ in range(ROUNDS):
        q_gpr = _orthonormal(times(q_gpr))
    small_grr = q_gpr.mT @ times(q_gpr)
    value_gr, vector_grr = _small(_eigh, (small_grr + small_grr.mT) / 2)
    order_gr = value_gr.abs().argsort(dim=1, descending=True)[:, : min(p, rank)]
    vector_gpr = q_gpr @ vector_grr.gather(2, order_gr[:, None].expand(-1, vector_grr.shape[1], -1))
    return value_gr.abs().gather(1, order_gr), vector_gpr


def _orthonormal(x_gpr: Tensor) -> Tensor:
    """An orthonormal basis of the columns, the first of it one of the first of them."""
    # A GPU's factorisation takes one matrix after the other.
    return gram_schmidt(x_gpr) if x_gpr.is_cuda else torch.linalg.qr(x_gpr)[0]


def gram_schmidt(x_gpr: Tensor) -> Tensor:
    """The same column by column, of all matrices at once; what is taken out twice is gone."""
    q_gpr, tiny = torch.empty_like(x_gpr), torch.finfo(x_gpr.dtype).tiny
    for i in range(x_gpr.shape[2]):
        v_gp1, done_gpi = x_gpr[:, :, i : i + 1], q_gpr[:, :, :i]
        for _ in range(2):
            v_gp1 = v_gp1 - done_gpi @ (done_gpi.mT @ v_gp1)
            v_gp1 = v_gp1 / v_gp1.norm(dim=1, keepdim=True).clamp(min=tiny)
        q_gpr[:, :, i : i + 1] = v_gp1
    return q_gpr


def _eigh(x_gxx: Tensor) -> tuple[Tensor, Tensor]:
    value_gx, vector_gxx = torch.linalg.eigh(x_gxx)
    return value_gx, vector_gxx


def _eigvals(x_gxx: Tensor) -> Tensor:
    return torch.linalg.eigvals(x_gxx)


def _small(function: Callable[[Tensor], Any], x_gxx: Tensor) -> Any:
    """`function` of many small matrices, whose eigenvalues a GPU finds one matrix after the other."""
    return on_cores(function, x_gxx) if x_gxx.is_cuda else function(x_gxx)


def on_cores(function: Callable[[Tensor], Any], x_gxx: Tensor) -> Any:
    """`function` by all cores of the CPU, a share of the matrices each; where `x_gxx` lies."""
    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(cores) as pool:
            parts = list(pool.map(function, x_gxx.cpu().split(-(-len(x_gxx) // cores))))
    finally:
        torch.set_num_threads(threads)
    if isinstance(parts[0], Tensor):
        return torch.cat(parts).to(x_gxx.device)
    return tuple(torch.cat(part).to(x_gxx.device) for part in zip(*parts, strict=True))


def realise(h_gl: Tensor, modes: int) -> Modes:
    """Poles by Kung's method at order ``2 modes``, then the `modes` that carry most, with their best residues.

    The eigenvectors of the Hankel matrix are an observability matrix: a row further on it is itself times a matrix
    whose eigenvalues are the poles. Of conjugate ones one stands for both. The taps there are may be met best by modes
    that grow, which none here may; with zeros behind their end the poles lie inside the disc. What comes nearest of
    some such ends is taken, filter by filter.

    Args:
        h_gl: taps from 1 on.
        modes: complex poles of a filter.
    """
    best: Modes | None = None
    for zeros in (int(reach * h_gl.shape[1]) for reach in REACHES):
        log_a_gm = _poles(F.pad(h_gl, (0, zeros)), modes, h_gl.shape[1])
        residue_gm = residues(log_a_gm, h_gl)
        energy_gm = residue_gm.abs().square() / -torch.expm1(2 * log_a_gm.real)
        kept_gm = energy_gm.topk(modes, dim=1).indices
        log_a_gm = log_a_gm.gather(1, kept_gm)
        made = Modes(log_a_gm, residues(log_a_gm, h_gl))
        if best is not None:
            nearer_g1 = (_far(made, h_gl, "l2") < _far(best, h_gl, "l2"))[:, None]
            made = Modes(*(torch.where(nearer_g1, x, y) for x, y in zip(made, best, strict=True)))
        best = made
    assert best is not None
    return best


def _poles(h_gl: Tensor, modes: int, length: int) -> Tensor:
    """Logarithms of poles, of conjugate ones the upper; as many more that stand for those that are not there."""
    r = min(2 * modes, (h_gl.shape[1] + 1) // 2 - 1)
    spare_gm = h_gl.new_full((len(h_gl), modes), -1.0, dtype=torch.complex128)
    if r < 1:
        return spare_gm
    _, vector_gpr = singular(h_gl, r)
    # The pseudoinverse of orthonormal columns without their last row, by Sherman and Morrison.
    shifted_grr, last_gr1 = vector_gpr[:, :-1].mT @ vector_gpr[:, 1:], vector_gpr[:, -1:].mT
    left_g11 = (1 - last_gr1.square().sum(1, keepdim=True)).clamp(min=1e-12)
    a_grr = shifted_grr + last_gr1 @ (last_gr1.mT @ shifted_grr) / left_g11
    a_gr = _small(_eigvals, a_grr)
    size_gr = a_gr.abs().clamp(1e-6, math.exp(-_slowest(length)))
    # A lower one, like one too many, becomes a pole at 1/e, of which any number is no more than one.
    log_a_gr = torch.complex(size_gr.log(), a_gr.angle())
    return torch.cat((torch.where(a_gr.imag >= 0, log_a_gr, spare_gm[:, :1]), spare_gm), dim=1)


def residues(log_a_gm: Tensor, h_gl: Tensor) -> Tensor:
    """The residues by which these poles come nearest to the taps in l2, and which are not large to little avail."""
    power_glm = _powers(log_a_gm, h_gl.shape[1])
    design_glx = torch.cat((power_glm.real, -power_glm.imag), dim=2)
    square_gxx = design_glx.mT @ design_glx
    square_gxx.diagonal(dim1=1, dim2=2).add_(RIDGE**2)
    x_gx1 = torch.zeros_like(square_gxx[..., :1])
    # The second round takes back what squaring cost the first in precision.
    for _ in range(2):
        slope_gx1 = design_glx.mT @ (h_gl[..., None] - design_glx @ x_gx1) - RIDGE**2 * x_gx1
        x_gx1 = x_gx1 + torch.linalg.solve_ex(square_gxx, slope_gx1)[0]
    return torch.complex(*x_gx1[..., 0].chunk(2, dim=1))


def refine(start: Modes, h_gl: Tensor, norm: str) -> Modes:
    """Poles and residues moved together until the error no longer falls, by Levenberg and Marquardt's method.

    Poles are moved as logarithms of their rate and as angles, so none leaves the disc.

    Args:
        start: of `realise`.
        h_gl: taps from 1 on.
        norm: ``l2``, or ``linf``, the largest error of a tap.
    """
    weight_gl = torch.ones_like(h_gl)
    best = _descend(start, h_gl, weight_gl, STEPS)
    best = Modes(best.log_a_gm, residues(best.log_a_gm, h_gl))
    if norm == "l2":
        return best
    modes, best_g = best, error(best, h_gl).abs().amax(1)
    for _ in range(REWEIGHTED):
        # Lawson's rule: each tap's weight is multiplied by its error, until the largest errors are equal.
        weight_gl = weight_gl * error(modes, h_gl).abs()
        weight_gl = weight_gl / weight_gl.mean(1, keepdim=True).clamp(min=1e-300)
        modes = _descend(modes, h_gl, weight_gl.sqrt(), 4)
        now_g = error(modes, h_gl).abs().amax(1)
        better_g1 = (now_g < best_g)[:, None]
        best = Modes(*(torch.where(better_g1, a, b) for a, b in zip(modes, best, strict=True)))
        best_g = torch.minimum(best_g, now_g)
    return best


def _descend(modes: Modes, h_gl: Tensor, weight_gl: Tensor, steps: int) -> Modes:
    rate, angle = (-modes.log_a_gm.real).log(), modes.log_a_gm.imag
    x_gx = torch.cat((rate, angle, modes.residue_gm.real, modes.residue_gm.imag), dim=1)
    damping_g = torch.full_like(h_gl[:, 0], DAMPING)
    # The residues stand behind the rates and the angles.
    ridge_x = RIDGE**2 * (torch.arange(x_gx.shape[1], device=h_gl.device) >= x_gx.shape[1] // 2)

    def cost(x_gx: Tensor) -> Tensor:
        return (weight_gl * error(_modes(x_gx), h_gl)).square().sum(1) + (ridge_x * x_gx.square()).sum(1)

    cost_g = cost(x_gx)
    for _ in range(steps):
        j_glx = _jacobian(x_gx, h_gl.shape[1]) * weight_gl[..., None]
        slope_gx = (j_glx.mT @ (weight_gl * error(_modes(x_gx), h_gl))[..., None])[..., 0] + ridge_x * x_gx
        curve_gxx = j_glx.mT @ j_glx + torch.diag_embed(ridge_x)
        diagonal_gx = curve_gxx.diagonal(dim1=1, dim2=2)
        floor_g1 = 1e-14 * diagonal_gx.amax(1, keepdim=True).clamp(min=1e-300)
        damped_gxx = curve_gxx + torch.diag_embed(damping_g[:, None] * diagonal_gx + floor_g1)
        step_gx = torch.linalg.solve_ex(damped_gxx, slope_gx)[0].nan_to_num(0.0, 0.0, 0.0)
        rates_gm, rest_gx = (x_gx - step_gx).tensor_split([modes.log_a_gm.shape[1]], dim=1)
        tried_gx = torch.cat((rates_gm.clamp(math.log(_slowest(h_gl.shape[1])), math.log(FASTEST)), rest_gx), dim=1)
        tried_g = cost(tried_gx)
        better_g = tried_g < cost_g
        gained_g = torch.where(better_g, 1 - tried_g / cost_g.clamp(min=1e-300), 0.0)
        x_gx = torch.where(better_g[:, None], tried_gx, x_gx)
        cost_g = torch.where(better_g, tried_g, cost_g)
        damping_g = torch.where(better_g, damping_g / 4, damping_g * 8).clamp(min=1e-12)
        if bool(((gained_g < 1e-4) & (better_g | (damping_g > 1e6))).all()):
            break
    return _modes(x_gx)


def error(modes: Modes, h_gl: Tensor) -> Tensor:
    """What the modes have more than the taps."""
    return (modes.residue_gm[:, None] * _powers(modes.log_a_gm, h_gl.shape[1])).real.sum(2) - h_gl


def _far(modes: Modes, h_gl: Tensor, norm: str) -> Tensor:
    e_gl = error(modes, h_gl)
    return e_gl.norm(dim=1) if norm == "l2" else e_gl.abs().amax(1)


def errors(k_gl: Tensor, fitted_gl: Tensor, modes_g: Tensor) -> Errors:
    """Those of the taps from 1 on, tap 0 included in both arguments.

    Args:
        k_gl, fitted_gl: filters, and what stands for them.
        modes_g: int64, of each fit.
    """
    h_gl, e_gl = k_gl[:, 1:], (fitted_gl - k_gl)[:, 1:]
    if h_gl.shape[1] == 0:
        return Errors(*(h_gl.new_zeros(len(h_gl)) for _ in range(4)))
    rank = 2 * int(modes_g.max()) + 1
    value_gr, tiny = singular(h_gl, rank)[0], torch.finfo(h_gl.dtype).tiny
    value_gr, largest_g = F.pad(value_gr, (0, rank - value_gr.shape[1])), value_gr[:, 0].clamp(min=tiny)
    return Errors(
        e_gl.norm(dim=1) / h_gl.norm(dim=1).clamp(min=tiny),
        e_gl.abs().amax(1) / h_gl.abs().amax(1).clamp(min=tiny),
        singular(e_gl, 1)[0][:, 0] / largest_g,
        value_gr.gather(1, 2 * modes_g[:, None])[:, 0] / largest_g,
    )


def choose(k_gl: Tensor, most: int, bound: float | None, norm: str) -> tuple[Modes, Tensor]:
    """The fewest modes by which each filter is met within `bound`, as ``[g, most]`` with residues of 0 behind them.

    A filter that no number up to `most` meets has `most`, as has each without a bound.

    Args:
        k_gl: filters, tap 0 included.
        most: modes allowed.
        bound: of the error in `norm`, relative to the filter.
        norm: ``l2`` or ``linf``.

    Returns:
        The modes, and int64 ``[g]``, how many of each filter.
    """
    g, h_gl = len(k_gl), k_gl[:, 1:]
    log_a_gm = k_gl.new_full((g, most), -1.0, dtype=torch.complex128)
    found, used_g = Modes(log_a_gm, torch.zeros_like(log_a_gm)), torch.zeros(g, dtype=torch.int64, device=k_gl.device)
    if h_gl.shape[1] == 0:
        return found, used_g
    size_g = h_gl.norm(dim=1) if norm == "l2" else h_gl.abs().amax(1)
    scaled_gl = h_gl / size_g.clamp(min=torch.finfo(h_gl.dtype).tiny)[:, None]
    least_gr = None if bound is None else _least(scaled_gl, most, norm)
    left_g = torch.arange(g, device=k_gl.device)[size_g > 0]
    for m in _counts(most) if bound is not None else [most]:
        # Where the singular values say that so few can't be enough, nothing is tried; with all allowed, always.
        tried_g = left_g if m == most or bound is None or least_gr is None else left_g[least_gr[left_g, m - 1] <= bound]
        limit = math.inf if bound is None or m == most else bound
        for part in tried_g.split(_rows(h_gl, m)) if len(tried_g) else ():
            start = realise(scaled_gl[part], m)
            near_g = _far(start, scaled_gl[part], norm) <= HOPELESS * limit
            if not bool(near_g.any()):
                continue
            near, near_gl = part[near_g], scaled_gl[part[near_g]]
            modes = refine(Modes(*(x[near_g] for x in start)), near_gl, norm)
            met_g = _far(modes, near_gl, norm) <= limit
            at = near[met_g]
            found.log_a_gm[at, :m] = modes.log_a_gm[met_g]
            found.residue_gm[at, :m] = modes.residue_gm[met_g] * size_g[at, None]
            used_g[at] = m
        left_g = left_g[used_g[left_g] == 0]
    return found, used_g


def _counts(most: int) -> Iterator[int]:
    """1, 2, 3, 4, 6, 8, 12, ... and the last: what each try costs grows with it, so do their distances."""
    m = 1
    while m < most:
        yield m
        m += 1 << max(0, m.bit_length() - 2)
    yield most


def _least(h_gl: Tensor, most: int, norm: str) -> Tensor:
    """No filter of m modes comes nearer than column m - 1: its Hankel matrix would be one of rank 2 m.

    A matrix's largest singular value is at most the root of its sum of squares, in which a tap stands at most p times.
    """
    p = (h_gl.shape[1] + 1) // 2
    value_gr, _ = singular(h_gl, 2 * most + 1)
    value_gr = F.pad(value_gr, (0, 2 * most + 1 - value_gr.shape[1]))
    return value_gr[:, 2::2] / (math.sqrt(p) if norm == "l2" else p)


def _slowest(length: int) -> float:
    return max(1 / (SLOWEST * length), 2 * LEAST_RATE)


def _rows(h_gl: Tensor, m: int) -> int:
    return max(1, (GPU_WORKSPACE if h_gl.is_cuda else WORKSPACE) // (h_gl.shape[1] * 4 * m * 8))


def _powers(log_a_gm: Tensor, length: int) -> Tensor:
    """``a^l`` for l from 1 on, ``[g, length, m]``."""
    # Coarse times fine powers: a product costs a fraction of an exponential.
    c = math.isqrt(length) + 1
    fine_gcm = (torch.arange(1, c + 1, device=log_a_gm.device)[:, None] * log_a_gm[:, None]).exp()
    coarse_gem = (torch.arange(0, length, c, device=log_a_gm.device)[:, None] * log_a_gm[:, None]).exp()
    return (coarse_gem[:, :, None] * fine_gcm[:, None]).flatten(1, 2)[:, :length]


def _modes(x_gx: Tensor) -> Modes:
    rate, angle, real, imag = x_gx.chunk(4, dim=1)
    return Modes(torch.complex(-rate.exp(), angle), torch.complex(real, imag))


def _jacobian(x_gx: Tensor, length: int) -> Tensor:
    """Of the taps by the logarithms of rates, angles, and both parts of residues, ``[g, length, 4 m]``."""
    modes = _modes(x_gx)
    power_glm = _powers(modes.log_a_gm, length)
    l_l1 = torch.arange(1, length + 1, device=x_gx.device)[:, None]
    along_glm = l_l1 * modes.residue_gm[:, None] * power_glm
    parts = (along_glm.real * modes.log_a_gm.real[:, None], -along_glm.imag, power_glm.real, -power_glm.imag)
    return torch.cat(parts, dim=2)
