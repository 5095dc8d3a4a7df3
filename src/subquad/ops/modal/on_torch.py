"""Diagonal state spaces in PyTorch: matrix products over chunks of 64 tokens, on any device; see `subquad.ops.lti`.

Powers are exponentials of multiples of log_a, at most 1, worked out in float64 where the device has it: the phase of a
far power is a product of large numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.ops import chunks, lti


def refusal(*tensors: Tensor) -> str | None:
    """None: it takes everything."""
    return None


def scan(
    u_btd: Tensor,
    log_a_gn: Tensor,
    residue_gn: Tensor,
    state_bdnp: Tensor,
    *,
    valid_bt: Tensor | None = None,
    documents_bt: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`subquad.ops.modal.scan`."""
    dtype = chunks.compute_dtype(u_btd, log_a_gn.real, residue_gn.real, state_bdnp)
    t, where = u_btd.shape[1], {"valid_bt": valid_bt, "documents_bt": documents_bt}
    with torch.autocast(u_btd.device.type, enabled=False):
        state_bdnp = state_bdnp.to(dtype)
        if t <= 1:
            end_bdnp = _step(u_btd.to(dtype), log_a_gn, state_bdnp, **where)
            return _readout(end_bdnp, residue_gn, t).to(u_btd.dtype), end_bdnp
        chunk, state_gbrp = _chunk(log_a_gn, t, dtype), lti.grouped(state_bdnp, len(log_a_gn))
        c = chunk.tokens
        weights_gnc = residue_gn[..., None] * _powers(log_a_gn, torch.arange(c + 1, device=u_btd.device))
        kernel_gc, read_gnc = weights_gnc[..., :c].sum(1).real.to(dtype), weights_gnc[..., 1:]
        reads_gpc = torch.cat((read_gnc.real, -read_gnc.imag), dim=1).to(dtype)
        y_btd = lti.outputs(u_btd, kernel_gc, reads_gpc, chunk, state_gbrp, **where)
        return y_btd.to(u_btd.dtype), lti.by_channel(lti.final_state(u_btd, chunk, state_gbrp, **where))


def final_state(
    u_btd: Tensor,
    log_a_gn: Tensor,
    state_bdnp: Tensor,
    *,
    valid_bt: Tensor | None = None,
    documents_bt: Tensor | None = None,
) -> Tensor:
    """`subquad.ops.modal.final_state`."""
    dtype = chunks.compute_dtype(u_btd, log_a_gn.real, state_bdnp)
    t, where = u_btd.shape[1], {"valid_bt": valid_bt, "documents_bt": documents_bt}
    with torch.autocast(u_btd.device.type, enabled=False):
        state_bdnp = state_bdnp.to(dtype)
        if t <= 1:
            return _step(u_btd.to(dtype), log_a_gn, state_bdnp, **where)
        chunk, state_gbrp = _chunk(log_a_gn, t, dtype), lti.grouped(state_bdnp, len(log_a_gn))
        return lti.by_channel(lti.final_state(u_btd, chunk, state_gbrp, **where))


def impulse(log_a_gn: Tensor, residue_gn: Tensor, length: int) -> Tensor:
    """`subquad.ops.modal.impulse` as a product of coarse and of fine powers, about ``sqrt(length)`` of each."""
    dtype = chunks.compute_dtype(log_a_gn.real, residue_gn.real)
    with torch.autocast(log_a_gn.device.type, enabled=False):
        c = 1 << (length.bit_length() + 1) // 2
        fine_gnc = _powers(log_a_gn, torch.arange(c, device=log_a_gn.device))
        coarse_gnm = residue_gn[..., None] * _powers(log_a_gn, torch.arange(0, length, c, device=log_a_gn.device))
        coarse_gpm = torch.cat((coarse_gnm.real, -coarse_gnm.imag), dim=1).to(dtype)
        fine_gpc = torch.cat((fine_gnc.real, fine_gnc.imag), dim=1).to(dtype)
        return (coarse_gpm.mT @ fine_gpc).flatten(1)[:, :length]


def _powers(log_a_gn: Tensor, exponents_e: Tensor) -> Tensor:
    """``exp(e log_a)``, complex ``[g, n, e]`` in the widest dtype of the device."""
    wide = torch.promote_types(log_a_gn.dtype, chunks.wide(log_a_gn))
    return (log_a_gn.to(wide)[..., None] * exponents_e).exp()


def _chunk(log_a_gn: Tensor, time: int, dtype: torch.dtype) -> lti.Chunk:
    """The modes over a chunk; their state lies as all real parts and then all imaginary ones."""
    c, device = lti.length(time), log_a_gn.device
    adds_gnc = _powers(log_a_gn, torch.arange(c - 1, -1, -1, device=device))
    adds_gcp = torch.cat((adds_gnc.real, adds_gnc.imag), dim=1).mT.to(dtype)
    across_g11n = _powers(log_a_gn, torch.full((1,), c, device=device)).mT[:, None].to(lti.complex_of(dtype))

    def across(state_gbrp: Tensor) -> Tensor:
        return _times(state_gbrp, across_g11n)

    def advance(state_gbrp: Tensor, n_b: Tensor) -> Tensor:
        return _times(state_gbrp, _powers(log_a_gn, n_b).mT[:, :, None].to(lti.complex_of(dtype)))

    return lti.Chunk(adds_gcp, across, advance)


def _times(state_gbrp: Tensor, factor_gbrn: Tensor) -> Tensor:
    """Complex multiplication of a state of real parts and imaginary ones."""
    real, imag = state_gbrp.chunk(2, dim=-1)
    a, b = factor_gbrn.real, factor_gbrn.imag
    return torch.cat((a * real - b * imag, a * imag + b * real), dim=-1)


def _step(
    u_btd: Tensor, log_a_gn: Tensor, state_bdnp: Tensor, *, valid_bt: Tensor | None, documents_bt: Tensor | None
) -> Tensor:
    """The state after a block of one token or none."""
    if u_btd.shape[1] == 0:
        return state_bdnp
    g, before_bdnp = len(log_a_gn), state_bdnp
    if documents_bt is not None:
        before_bdnp = before_bdnp.masked_fill((documents_bt[:, 0] != 0)[:, None, None, None], 0)
    a_g1n = log_a_gn.exp().to(lti.complex_of(u_btd.dtype))[:, None]
    x_bgrn = torch.view_as_complex(before_bdnp.contiguous()).unflatten(1, (g, -1))
    after_bgrn = a_g1n * x_bgrn + u_btd[:, 0, :, None].unflatten(1, (g, -1))
    after_bdnp = torch.view_as_real(after_bgrn.flatten(1, 2))
    return after_bdnp if valid_bt is None else torch.where(valid_bt[:, 0, None, None, None], after_bdnp, state_bdnp)


def _readout(state_bdnp: Tensor, residue_gn: Tensor, time: int) -> Tensor:
    """The output ``[b, time, d]`` behind the last token, for a time of 0 or 1."""
    g, row_gnp = len(residue_gn), torch.view_as_real(residue_gn.conj().resolve_conj()).to(state_bdnp.dtype)
    y_bgr = torch.einsum("bgrk,gk->bgr", state_bdnp.unflatten(1, (g, -1)).flatten(3), row_gnp.flatten(1))
    return y_bgr.flatten(1)[:, None].expand(-1, time, -1)
