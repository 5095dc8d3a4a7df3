"""Diagonal plus low-rank state spaces in PyTorch: the Cauchy kernel, steps in linear time, chunks by matrix powers.

The state stays in the coordinates in which the normal part is diagonal. There a step takes length from every state, so
all powers of the matrix are at most 1 and blocks of tokens are as exact as single ones. Eigenvectors would make a modal
state of it, but at HiPPO's start they are useless: their condition grows as 2^(4N/3) (2111.00396, lemma 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from subquad.ops import chunks, lti
from subquad.ops.dplr.equation import System

# Complex numbers of the Cauchy matrix that are held at once; more groups of channels are worked out one after another.
SLICE = 1 << 22


def refusal(*tensors: Tensor) -> str | None:
    """None: it takes everything."""
    return None


def scan(
    u_btd: Tensor,
    system: System,
    state_bdnp: Tensor,
    *,
    valid_bt: Tensor | None = None,
    documents_bt: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`subquad.ops.dplr.scan`."""
    dtype = chunks.compute_dtype(u_btd, system.step_g, state_bdnp)
    t, where = u_btd.shape[1], {"valid_bt": valid_bt, "documents_bt": documents_bt}
    with torch.autocast(u_btd.device.type, enabled=False):
        state_bdnp = state_bdnp.to(dtype)
        if t <= 1:
            end_bdnp = _single(u_btd.to(dtype), system.to(dtype), state_bdnp, **where)
            return _readout(end_bdnp, system, t).to(u_btd.dtype), end_bdnp
        wide = system.to(chunks.wide(system.step_g))
        state_gbrp = lti.grouped(state_bdnp, len(system.step_g))
        chunk, powers, state_g1p = _chunk(wide, t, dtype)
        row_g1p = _row(wide.output_gn)
        reads_gcp = row_g1p @ powers[0]
        for power_gpp in powers[:-1]:
            reads_gcp = torch.cat((reads_gcp, reads_gcp @ power_gpp), dim=1)
        before_gcp = torch.cat((row_g1p, reads_gcp[:, :-1]), dim=1)
        kernel_gc = (before_gcp * state_g1p).sum(-1).to(dtype)
        y_btd = lti.outputs(u_btd, kernel_gc, reads_gcp.mT.to(dtype), chunk, state_gbrp, **where)
        return y_btd.to(u_btd.dtype), lti.by_channel(lti.final_state(u_btd, chunk, state_gbrp, **where))


def final_state(
    u_btd: Tensor,
    system: System,
    state_bdnp: Tensor,
    *,
    valid_bt: Tensor | None = None,
    documents_bt: Tensor | None = None,
) -> Tensor:
    """`subquad.ops.dplr.final_state`."""
    dtype = chunks.compute_dtype(u_btd, system.step_g, state_bdnp)
    t, where = u_btd.shape[1], {"valid_bt": valid_bt, "documents_bt": documents_bt}
    with torch.autocast(u_btd.device.type, enabled=False):
        state_bdnp = state_bdnp.to(dtype)
        if t <= 1:
            return _single(u_btd.to(dtype), system.to(dtype), state_bdnp, **where)
        chunk, _, _ = _chunk(system.to(chunks.wide(system.step_g)), t, dtype)
        state_gbrp = lti.grouped(state_bdnp, len(system.step_g))
        return lti.by_channel(lti.final_state(u_btd, chunk, state_gbrp, **where))


def kernel(system: System, length: int) -> Tensor:
    """`subquad.ops.dplr.kernel`."""
    return response(system, length, _by_slices)


def response(system: System, length: int, transform: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """`subquad.ops.dplr.kernel` with any way to its `transform`, whose arguments are `_transform`'s."""
    dtype = chunks.compute_dtype(system.step_g)
    with torch.autocast(system.step_g.device.type, enabled=False):
        system = system.to(chunks.wide(system.step_g))
        n = system.poles_gn.shape[1]
        power_gpp, row_g1p, left = _matrix(system), _row(system.output_gn), length
        end_g1p = row_g1p
        while left:
            end_g1p = end_g1p @ power_gpp if left & 1 else end_g1p
            left >>= 1
            power_gpp = power_gpp @ power_gpp if left else power_gpp
        cut_gp = (row_g1p - end_g1p)[:, 0] / 2
        cut_gn = torch.complex(cut_gp[:, :n], -cut_gp[:, n:])
        # A factor (1 + z) less in the resolvent, and nothing is divided by 0 at z = -1.
        back_gn, place_l = system.low_gn.conj(), torch.arange(length // 2 + 1, device=cut_gn.device)
        ahead_gn = torch.stack((system.input_gn, system.low_gn), dim=-1)
        weights_gnk = torch.cat((cut_gn[..., None] * ahead_gn, back_gn[..., None] * ahead_gn), dim=-1)
        angle_l = 2 * math.pi / length * place_l.to(cut_gp.dtype)
        return torch.fft.irfft(transform(angle_l, system.step_g, system.poles_gn, weights_gnk), length).to(dtype)


def _by_slices(angle_l: Tensor, step_g: Tensor, poles_gn: Tensor, weights_gnk: Tensor) -> Tensor:
    """`_transform` of as many groups at once as `SLICE` allows, made again for gradients where that is not all."""
    per = max(SLICE // (len(angle_l) * poles_gn.shape[1]), 1)
    if len(step_g) <= per:
        return _transform(angle_l, step_g, poles_gn, weights_gnk)
    again = partial(checkpoint, _transform, angle_l, use_reentrant=False, preserve_rng_state=False)
    pieces = zip(*(x.split(per) for x in (step_g, poles_gn, weights_gnk)), strict=True)
    return torch.cat([again(*piece) for piece in pieces])


def _transform(angle_l: Tensor, step_g: Tensor, poles_gn: Tensor, weights_gnk: Tensor) -> Tensor:
    """The generating function at ``z = exp(-i angle)``: four sums over the poles, put together by Woodbury's identity.

    Those of a conjugate pair are one term, ``v / (s - q a) + conj(v) / (s - q conj(a))`` with ``s = 2 (1 - z) / step``
    and ``q = 1 + z``.
    """
    z_l = torch.polar(torch.ones_like(angle_l), -angle_l)
    s_gl1, q_l1 = (2 * (1 - z_l) / step_g[:, None])[..., None], (1 + z_l)[:, None]
    # The denominators ``s^2 - 2 s q Re a + q^2 |a|^2`` are a product of what is z's and what is the poles'.
    ones_gn, square_gn = torch.ones_like(poles_gn), poles_gn * poles_gn.conj()
    poles_g3n = torch.stack((ones_gn, -2 * poles_gn.real + 0j, square_gn), dim=1)
    z_gl3 = torch.cat((s_gl1 * s_gl1, s_gl1 * q_l1, (q_l1 * q_l1).expand_as(s_gl1)), dim=-1)
    cauchy_gln = (z_gl3 @ poles_g3n).reciprocal()
    real_gnk, cross_gnk = weights_gnk.real, (weights_gnk * poles_gn.conj()[..., None]).real
    sums_glk = 2 * (s_gl1 * (cauchy_gln @ (real_gnk + 0j)) - q_l1 * (cauchy_gln @ (cross_gnk + 0j)))
    out_in, out_low, low_in, low_low = sums_glk.unbind(-1)
    q_l = q_l1[:, 0]
    return 2 * (out_in - q_l * out_low * low_in / (1 + q_l * low_low))


def _once(x_gxn: Tensor, u_gx1: Tensor | None, system: System) -> Tensor:
    """One step of many states, by Woodbury's identity (2111.00396, appendix C.2)."""
    half_g11 = system.step_g[:, None, None] / 2
    a_g1n, low_g1n, b_g1n = (x[:, None] for x in system[:3])

    def along(v_gxn: Tensor) -> Tensor:
        return 2 * (low_g1n.conj() * v_gxn).sum(-1, keepdim=True).real

    implicit_g1n = 1 / (1 - half_g11 * a_g1n)
    right_gxn = x_gxn + half_g11 * (a_g1n * x_gxn - low_g1n * along(x_gxn))
    if u_gx1 is not None:
        right_gxn = right_gxn + 2 * half_g11 * b_g1n * u_gx1
    solved_gxn, low_g1n_solved = implicit_g1n * right_gxn, half_g11 * implicit_g1n * low_g1n
    return solved_gxn - low_g1n_solved * along(solved_gxn) / (1 + along(low_g1n_solved))


def _matrix(system: System) -> Tensor:
    """The discrete A ``[g, p, p]`` in real coordinates, applied from the left: ``2 (1 - step / 2 A)^-1 - 1``.

    By Woodbury's identity that is the diagonal part's own, less an outer product.
    """
    half_g1, n = system.step_g[:, None] / 2, system.poles_gn.shape[1]
    implicit_gn = 1 / (1 - half_g1 * system.poles_gn)
    keep_gn, left_gn, right_gn = 2 * implicit_gn - 1, implicit_gn * system.low_gn, implicit_gn.conj() * system.low_gn
    share_g1 = half_g1 / (1 + 2 * half_g1 * (system.low_gn.conj() * left_gn).real.sum(-1, keepdim=True))
    left_gp, right_gp = (torch.cat((x.real, x.imag), dim=-1) for x in (-4 * share_g1 * left_gn, right_gn))
    # A complex factor is a block of two rows: itself on the diagonal, its imaginary part on both sides of it.
    own_gpp = torch.diag_embed(torch.cat((keep_gn.real, keep_gn.real), dim=-1))
    across_gpp = torch.diag_embed(keep_gn.imag, offset=-n) - torch.diag_embed(keep_gn.imag, offset=n)
    return torch.baddbmm(own_gpp + across_gpp, left_gp[..., None], right_gp[:, None])


def _row(output_gn: Tensor) -> Tensor:
    """``2 Re (output x)`` as a row ``[g, 1, p]`` in real coordinates."""
    return 2 * torch.cat((output_gn.real, -output_gn.imag), dim=-1)[:, None]


def _chunk(system: System, time: int, dtype: torch.dtype) -> tuple[lti.Chunk, list[Tensor], Tensor]:
    """A chunk's tensors, ``A^1, A^2, A^4, ... A^c``, and what one input leaves, ``[g, 1, p]``; all by doubling."""
    c = lti.length(time)
    zero_g1n = torch.zeros_like(system.poles_gn)[:, None]
    left_g1n = _once(zero_g1n, torch.ones_like(zero_g1n[..., :1].real), system)
    left_g1p = torch.cat((left_g1n.real, left_g1n.imag), dim=-1)
    powers, adds_gcp = [_matrix(system)], left_g1p
    while adds_gcp.shape[1] < c:
        adds_gcp = torch.cat((adds_gcp @ powers[-1].mT, adds_gcp), dim=1)
        powers.append(powers[-1] @ powers[-1])
    narrow = [power_gpp.mT[:, None].to(dtype) for power_gpp in powers]

    def across(state_gbrp: Tensor) -> Tensor:
        return state_gbrp @ narrow[-1]

    def advance(state_gbrp: Tensor, n_b: Tensor) -> Tensor:
        for bit, power_g1pp in enumerate(narrow[:-1]):
            state_gbrp = torch.where((n_b >> bit & 1 == 1)[:, None, None], state_gbrp @ power_g1pp, state_gbrp)
        return state_gbrp

    return lti.Chunk(adds_gcp.to(dtype), across, advance), powers, left_g1p


def _single(
    u_btd: Tensor, system: System, state_bdnp: Tensor, *, valid_bt: Tensor | None, documents_bt: Tensor | None
) -> Tensor:
    """The state after a block of one token or none."""
    if u_btd.shape[1] == 0:
        return state_bdnp
    before_bdnp = state_bdnp
    if documents_bt is not None:
        before_bdnp = before_bdnp.masked_fill((documents_bt[:, 0] != 0)[:, None, None, None], 0)
    g = len(system.step_g)
    x_bgrn = torch.complex(*before_bdnp.unbind(-1)).unflatten(1, (g, -1))
    after_bdnp = torch.view_as_real(_once(x_bgrn, u_btd[:, 0, :, None].unflatten(1, (g, -1)), system)).flatten(1, 2)
    return after_bdnp if valid_bt is None else torch.where(valid_bt[:, 0, None, None, None], after_bdnp, state_bdnp)


def _readout(state_bdnp: Tensor, system: System, time: int) -> Tensor:
    """The output ``[b, time, d]`` behind the last token, for a time of 0 or 1."""
    row_g1np = 2 * torch.view_as_real(system.output_gn.conj().resolve_conj())[:, None].to(state_bdnp.dtype)
    y_bgr = (state_bdnp.unflatten(1, (len(system.step_g), -1)) * row_g1np).sum((-1, -2))
    return y_bgr.flatten(1)[:, None].expand(-1, time, -1)
