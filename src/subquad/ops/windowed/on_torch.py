"""Windowed attention in PyTorch: a band of keys for each chunk of queries, chunked linear attention behind it."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.core.layout import Layout
from subquad.core.state import precise
from subquad.ops import attention, linear_attention
from subquad.ops import window as windows
from subquad.ops.window import Far, WindowState


def refusal(*tensors: Tensor) -> str | None:
    """None: it takes everything."""
    return None


def attend(
    q_bthk: Tensor,
    k_btgk: Tensor,
    v_btgv: Tensor,
    far: Far | None,
    past: WindowState | None,
    layout: Layout,
    *,
    window: int,
    sinks: int,
    scale: float,
) -> Tensor:
    """`subquad.ops.windowed.attend` as dense attention over bands of two windows."""
    if q_bthk.shape[0] == 0 or q_bthk.shape[1] == 0:
        return v_btgv.new_zeros(*q_bthk.shape[:3], v_btgv.shape[3])
    if past is None:
        past = WindowState.before(k_btgk, v_btgv, window, sinks)
    k_bgtk, v_bgtv = k_btgk.transpose(1, 2), v_btgv.transpose(1, 2)
    band = windows.band(q_bthk, k_bgtk, v_bgtv, past, layout)
    if far is None:
        return band.join(attention.masked(band.q_xchk, band.k_xgnk, band.v_xgnk, band.allowed_xcn, scale))
    near, lse = attention.pieces(band.q_xchk, [(band.k_xgnk, band.v_xgnk, band.allowed_xcn)], scale)
    near_bthv, lse_bth = band.join(near), band.join(lse)

    weight_bthf = far.weights()
    top_bth1 = weight_bthf.amax(-1, keepdim=True).detach()
    f_bgtf = far.f_btgf.transpose(1, 2)
    window_f_bgnf, state_bgfv = far.window_f_bgnf, far.state_bgfv
    if window_f_bgnf is None:
        window_f_bgnf = f_bgtf.new_zeros(*f_bgtf.shape[:2], window, f_bgtf.shape[3])
    if state_bgfv is None:
        shape = (*f_bgtf.shape[:2], f_bgtf.shape[3], v_bgtv.shape[3] + 1)
        state_bgfv = f_bgtf.new_zeros(shape, dtype=precise(f_bgtf.dtype))
    leaving = windows.leaving(past, window_f_bgnf, v_bgtv, f_bgtf, layout)
    documents = (
        {}
        if layout.documents_bt is None
        else {"q_documents_bt": layout.documents_bt, "k_documents_bt": leaving.documents_bt}
    )
    v_btgv = torch.cat((leaving.v_btgv, torch.ones_like(leaving.v_btgv[..., :1])), dim=-1)
    far_bthv = linear_attention.chunked((weight_bthf - top_bth1).exp(), leaving.f_btgf, v_btgv, state_bgfv, **documents)
    # A mean on either side and the far one's share, by the logarithms of both masses: no size of score overflows, and
    # a query with nothing far behind it takes nothing from it.
    mass_bth1 = far_bthv[..., -1:]
    some_bth1 = mass_bth1 > 0
    mass_bth1 = torch.where(some_bth1, mass_bth1, 1)
    log_mass_bth1 = torch.where(some_bth1, mass_bth1.log() + top_bth1, -torch.inf)
    share_bth1 = torch.sigmoid(log_mass_bth1 - lse_bth[..., None])
    y_bthv = near_bthv + share_bth1 * (far_bthv[..., :-1] / mass_bth1 - near_bthv)
    return y_bthv.to(near_bthv.dtype)
