"""Diagonal state spaces in PyTorch: matrix products over chunks of 64 tokens, on any device.

Between chunks travels the state, within one stands the Toeplitz matrix of the impulse response; nothing is ever as
large as tokens times modes. Powers are exponentials of multiples of log_a, at most 1, worked out in float64 where the
device has it: the phase of a far power is a product of large numbers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops import chunks


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
    (b, t, d), g = u_btd.shape, len(log_a_gn)
    dtype = chunks.compute_dtype(u_btd, log_a_gn.real, residue_gn.real, state_bdnp)
    with torch.autocast(u_btd.device.type, enabled=False):
        end_bdnp = final_state(u_btd, log_a_gn, state_bdnp.to(dtype), valid_bt=valid_bt, documents_bt=documents_bt)
        if t <= 1:
            return _readout(end_bdnp, residue_gn, t).to(u_btd.dtype), end_bdnp
        (u_btd_blank,) = chunks.blank(valid_bt, u_btd)
        documents_bt = chunks.settle(documents_bt, valid_bt)
        c = min(chunks.CHUNK, 1 << (t - 1).bit_length())
        powers_gnc = _powers(log_a_gn, torch.arange(c + 1, device=u_btd.device))
        weights_gnc = residue_gn[..., None] * powers_gnc
        kernel_gc = weights_gnc[..., :c].sum(1).real.to(dtype)
        u_gbmrc = _cut(u_btd_blank.to(dtype), g, c)
        m, r = u_gbmrc.shape[2:4]
        ends_gbmrc, own_bmc = u_gbmrc, None
        if documents_bt is None:
            y_gbmrc = u_gbmrc.flatten(1, 3) @ _toeplitz(kernel_gc, c, 0)
        else:
            padded_bt = F.pad(documents_bt[:, None], (0, m * c - t), mode="replicate")[:, 0]
            own_bmc = padded_bt.unflatten(1, (m, c))
            y_gbmrc = _by_levels(kernel_gc, u_gbmrc, own_bmc)
            ends_gbmrc = _only(own_bmc == own_bmc[..., -1:], u_gbmrc)
        added_gbmrn = _add(powers_gnc[..., :c].flip(-1), ends_gbmrc)
        before_gbmrn = _states(added_gbmrn, powers_gnc[..., c], state_bdnp.to(dtype), own_bmc)
        states_gbmrp = torch.cat((before_gbmrn.real, before_gbmrn.imag), dim=-1)
        w_gnc = weights_gnc[..., 1:]
        read_gpc = torch.cat((w_gnc.real, -w_gnc.imag), dim=1).to(dtype)
        carried_gbmrc = (states_gbmrp.flatten(1, 3) @ read_gpc).unflatten(1, (b, m, r))
        if own_bmc is not None:
            last_bm1 = F.pad(own_bmc[:, :-1, -1], (1, 0))[..., None]
            carried_gbmrc = _only(own_bmc == last_bm1, carried_gbmrc)
        y_gbmrc = y_gbmrc.view_as(carried_gbmrc) + carried_gbmrc
        y_btd = y_gbmrc.permute(1, 2, 4, 0, 3).reshape(b, m * c, d)[:, :t]
        return y_btd.to(u_btd.dtype), end_bdnp


def final_state(
    u_btd: Tensor,
    log_a_gn: Tensor,
    state_bdnp: Tensor,
    *,
    valid_bt: Tensor | None = None,
    documents_bt: Tensor | None = None,
) -> Tensor:
    """`subquad.ops.modal.final_state`: each row's last token is moved to the last column, then all rows are alike."""
    (b, t, d), g = u_btd.shape, len(log_a_gn)
    dtype = chunks.compute_dtype(u_btd, log_a_gn.real, state_bdnp)
    if t <= 1:
        return _step(u_btd.to(dtype), log_a_gn, state_bdnp.to(dtype), valid_bt, documents_bt)
    x_bdn = torch.view_as_complex(state_bdnp.to(dtype).contiguous())
    with torch.autocast(u_btd.device.type, enabled=False):
        (u_btd,) = chunks.blank(valid_bt, u_btd.to(dtype))
        n_b = torch.full((b,), t, device=u_btd.device) if valid_bt is None else valid_bt.sum(1)
        documents_bt = chunks.settle(documents_bt, valid_bt)
        if documents_bt is not None:
            u_btd = u_btd.masked_fill((documents_bt != documents_bt[:, -1:])[..., None], 0)
            x_bdn = x_bdn.masked_fill((documents_bt[:, -1] != 0)[:, None, None], 0)
        if valid_bt is not None:
            source_bt = torch.arange(t, device=u_btd.device) - (t - n_b)[:, None]
            u_btd = u_btd.gather(1, source_bt.clamp(min=0)[..., None].expand_as(u_btd))
            u_btd = u_btd.masked_fill((source_bt < 0)[..., None], 0)
        c = min(chunks.CHUNK, t)
        u_gbmrc = _cut(F.pad(u_btd, (0, 0, -t % c, 0)), g, c)
        m = u_gbmrc.shape[2]
        added_gbmrn = _add(_powers(log_a_gn, torch.arange(c - 1, -1, -1, device=u_btd.device)), u_gbmrc)
        across_gnm = _powers(log_a_gn, c * torch.arange(m - 1, -1, -1, device=u_btd.device)).to(added_gbmrn.dtype)
        sum_gbrn = (across_gnm.mT[:, None, :, None] * added_gbmrn).sum(2)
        start_gnb = _powers(log_a_gn, n_b).to(added_gbmrn.dtype)
        start_bdn = start_gnb.permute(2, 0, 1).repeat_interleave(d // g, dim=1)
        return torch.view_as_real(start_bdn * x_bdn + sum_gbrn.transpose(0, 1).flatten(1, 2))


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


def _step(
    u_btd: Tensor, log_a_gn: Tensor, state_bdnp: Tensor, valid_bt: Tensor | None, documents_bt: Tensor | None
) -> Tensor:
    """The state after a block of one token or none, in real arithmetic, which compilers fuse."""
    if u_btd.shape[1] == 0:
        return state_bdnp
    a_gn = log_a_gn.exp()
    a_real_g1n, a_imag_g1n = (x.to(u_btd.dtype)[:, None] for x in (a_gn.real, a_gn.imag))
    x_bdnp = state_bdnp
    if documents_bt is not None:
        x_bdnp = x_bdnp.masked_fill((documents_bt[:, 0] != 0)[:, None, None, None], 0)
    real_bgrn, imag_bgrn = x_bdnp.unflatten(1, (len(log_a_gn), -1)).unbind(-1)
    u_bgr1 = u_btd[:, 0, :, None].unflatten(1, (len(log_a_gn), -1))
    after_bgrnp = torch.stack(
        (
            a_real_g1n * real_bgrn - a_imag_g1n * imag_bgrn + u_bgr1,
            a_real_g1n * imag_bgrn + a_imag_g1n * real_bgrn,
        ),
        dim=-1,
    )
    after_bdnp = after_bgrnp.flatten(1, 2)
    return after_bdnp if valid_bt is None else torch.where(valid_bt[:, 0, None, None, None], after_bdnp, state_bdnp)


def _readout(state_bdnp: Tensor, residue_gn: Tensor, time: int) -> Tensor:
    """The output ``[b, time, d]`` behind the last token, for a time of 0 or 1."""
    x_bgrnp = state_bdnp.unflatten(1, (len(residue_gn), -1))
    y_bgr = (residue_gn.real[:, None] * x_bgrnp[..., 0] - residue_gn.imag[:, None] * x_bgrnp[..., 1]).sum(-1)
    return y_bgr.flatten(1)[:, None].expand(-1, time, -1)


def _cut(u_btd: Tensor, g: int, c: int) -> Tensor:
    """``[b, t, d]`` with zeros behind the end as ``[g, b, m, r, c]``: m chunks, r channels of a group."""
    m = -(-u_btd.shape[1] // c)
    u_btd = F.pad(u_btd, (0, 0, 0, m * c - u_btd.shape[1]))
    return u_btd.unflatten(1, (m, c)).unflatten(-1, (g, -1)).permute(3, 0, 1, 4, 2).contiguous()


def _toeplitz(kernel_gl: Tensor, c: int, shift: int) -> Tensor:
    """``[g, c, c]`` from token j to token i: ``k_{shift + i - j}``, 0 where that would look ahead."""
    at_c = torch.arange(c, device=kernel_gl.device)
    apart_cc = shift + at_c - at_c[:, None]
    return kernel_gl[:, apart_cc.clamp(min=0)].masked_fill(apart_cc < 0, 0)


def _only(keep_bmc: Tensor, x_gbmrc: Tensor) -> Tensor:
    """`x_gbmrc` with zeros where `keep_bmc` is False."""
    return x_gbmrc.masked_fill(~keep_bmc[:, :, None], 0)


def _by_levels(kernel_gc: Tensor, u_gbmrc: Tensor, own_bmc: Tensor) -> Tensor:
    """The products within chunks where tokens of one document are seen only by those of the same.

    Blocks of 1, 2, 4, ... tokens meet their right neighbours at the common border. Whether j of the left and i of the
    right one are of the same document is whether both are of the document at the border, so a mask on each side of one
    Toeplitz matrix does it, and no matrix is ever made for a single chunk.
    """
    c = u_gbmrc.shape[-1]
    y_gbmrc = kernel_gc[:, None, None, None, :1] * u_gbmrc
    for level in range((c - 1).bit_length()):
        s = 1 << level
        left_bmks, right_bmks = own_bmc.unflatten(-1, (-1, 2, s)).unbind(-2)
        border_bmk1 = left_bmks[..., -1:]
        left_gbmrks = u_gbmrc.unflatten(-1, (-1, 2, s))[..., 0, :]
        seen_gbmrks = left_gbmrks.masked_fill((left_bmks != border_bmk1)[:, :, None], 0)
        made_gxs = seen_gbmrks.flatten(1, -2) @ _toeplitz(kernel_gc, s, s)
        made_gbmrks = made_gxs.view_as(seen_gbmrks).masked_fill((right_bmks != border_bmk1)[:, :, None], 0)
        y_gbmrc = y_gbmrc + F.pad(made_gbmrks, (s, 0)).flatten(-2)
    return y_gbmrc


def _add(powers_gnc: Tensor, u_gbmrc: Tensor) -> Tensor:
    """What each chunk adds to the state, complex ``[g, b, m, r, n]``: its tokens times their powers."""
    powers_gcp = torch.cat((powers_gnc.real, powers_gnc.imag), dim=1).mT.to(u_gbmrc.dtype)
    added_gbmrp = (u_gbmrc.flatten(1, 3) @ powers_gcp).unflatten(1, u_gbmrc.shape[1:4])
    return torch.complex(*added_gbmrp.chunk(2, dim=-1))


def _states(added_gbmrn: Tensor, across_gn: Tensor, state_bdnp: Tensor, own_bmc: Tensor | None) -> Tensor:
    """The state before each chunk, complex ``[g, b, m, r, n]``."""
    g, r = added_gbmrn.shape[0], added_gbmrn.shape[3]
    across_gb1n = across_gn[:, None, None].to(added_gbmrn.dtype)
    state_gbrn = torch.view_as_complex(state_bdnp.contiguous()).unflatten(1, (g, r)).transpose(0, 1)
    states = [state_gbrn]
    for i in range(added_gbmrn.shape[2] - 1):
        kept_gbrn = across_gb1n * states[-1]
        if own_bmc is not None:
            before_b = own_bmc[:, i - 1, -1] if i > 0 else torch.zeros_like(own_bmc[:, 0, 0])
            kept_gbrn = kept_gbrn.masked_fill((own_bmc[:, i, -1] != before_b)[:, None, None], 0)
        states.append(kept_gbrn + added_gbmrn[:, :, i])
    return torch.stack(states, dim=2)
