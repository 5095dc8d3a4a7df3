"""A diagonal complex state space as a loop over tokens: the oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.ops import chunks


def equation(
    u_btd: Tensor,
    log_a_gn: Tensor,
    residue_gn: Tensor,
    state_bdnp: Tensor,
    *,
    valid_bt: Tensor | None = None,
    documents_bt: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """A diagonal state space in modal form (2206.11893, section 3), a loop over tokens; the oracle.

    ``x_t = exp(log_a) x_{t-1} + u_t``, ``y_t = Re sum_n residue_n x_tn`` in every channel: its modes all see the same
    real input, and what a discretisation makes of B stands in the residues.

    Args:
        u_btd: inputs.
        log_a_gn: complex; logarithm of each pole, its real part at most 0.
        residue_gn: complex; weight of each mode in the output.
        state_bdnp: state before the first token, real and imaginary part along p.
        valid_bt: True where a token stands, first in every row; elsewhere the state passes unchanged and the output
            means nothing.
        documents_bt: document of each token, never decreasing; document 0 continues `state_bdnp`, a later one starts
            from zero.
        dtype: real dtype of arithmetic and state; None is the widest of the arguments, at least float32.

    Groups g may be fewer than channels d, a divisor of it: ``d / g`` channels in succession share poles and residues.

    Returns:
        Outputs ``[b, t, d]`` in the dtype of the inputs, and the state after the last token in `dtype`.
    """
    dtype = dtype or chunks.compute_dtype(u_btd, log_a_gn.real, residue_gn.real, state_bdnp)
    share = u_btd.shape[2] // log_a_gn.shape[0]
    log_a_dn, residue_dn = (x.to(dtype.to_complex()).repeat_interleave(share, dim=0) for x in (log_a_gn, residue_gn))
    a_dn = log_a_dn.exp()
    (u_btd_blank,) = chunks.blank(valid_bt, u_btd.to(dtype))
    documents_bt = chunks.settle(documents_bt, valid_bt)
    x_bdn = torch.view_as_complex(state_bdnp.to(dtype).contiguous())
    outputs: list[Tensor] = []
    for t in range(u_btd.shape[1]):
        if documents_bt is not None:
            before_b = documents_bt[:, t - 1] if t > 0 else torch.zeros_like(documents_bt[:, 0])
            x_bdn = x_bdn.masked_fill((documents_bt[:, t] != before_b)[:, None, None], 0)
        after_bdn = a_dn * x_bdn + u_btd_blank[:, t, :, None]
        x_bdn = after_bdn if valid_bt is None else torch.where(valid_bt[:, t, None, None], after_bdn, x_bdn)
        outputs.append((residue_dn * x_bdn).sum(-1).real)
    y_btd = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(u_btd)
    return y_btd.to(u_btd.dtype), torch.view_as_real(x_bdn)
