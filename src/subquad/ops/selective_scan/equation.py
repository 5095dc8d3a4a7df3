"""The selective scan as a loop over tokens: the oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.ops import chunks


def equation(
    u_btd: Tensor,
    dt_btd: Tensor,
    A_dn: Tensor,
    B_btgn: Tensor,
    C_btgn: Tensor,
    D_d: Tensor,
    state_bdn: Tensor,
    *,
    valid_bt: Tensor | None = None,
    documents_bt: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The selective state space (arXiv 2312.00752, algorithm 2), a loop over tokens; the oracle.

    ``h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t``, ``y_t = C_t h_t + D u_t``: each channel has a state of its own, whose
    n entries decay at rates of their own. A is discretised by zero-order hold (equation 4), B by Euler's rule, as the
    paper's code does.

    Args:
        u_btd: inputs.
        dt_btd: step of each channel, at least 0.
        A_dn: rates, at most 0.
        B_btgn: how the input enters the state. Consecutive channels share a group's: g divides d.
        C_btgn: how the state leaves.
        D_d: what of the input passes by the state.
        state_bdn: state before the first token.
        valid_bt: True where a token stands; elsewhere the state passes unchanged and the output means nothing.
        documents_bt: document of each token, never decreasing; document 0 continues `state_bdn`, a later one starts
            from zero.
        dtype: of arithmetic and state; None is the widest of the arguments, at least float32.

    Returns:
        Outputs ``[b, t, d]`` in the dtype of the inputs, and the state after the last token in `dtype`.
    """
    dtype = dtype or chunks.compute_dtype(u_btd, dt_btd, A_dn, B_btgn, C_btgn, D_d, state_bdn)
    u, dt, B, C = (x.to(dtype) for x in chunks.blank(valid_bt, u_btd, dt_btd, B_btgn, C_btgn))
    A, D, state = A_dn.to(dtype), D_d.to(dtype), state_bdn.to(dtype)
    share = u.shape[2] // B.shape[2]
    documents_bt = chunks.settle(documents_bt, valid_bt)
    outputs: list[Tensor] = []
    for t in range(u.shape[1]):
        if documents_bt is not None:
            before_b = documents_bt[:, t - 1] if t > 0 else torch.zeros_like(documents_bt[:, 0])
            state = state.masked_fill((documents_bt[:, t] != before_b)[:, None, None], 0)
        B_bdn, C_bdn = (x[:, t].repeat_interleave(share, dim=1) for x in (B, C))
        state = (dt[:, t, :, None] * A).exp() * state + (dt[:, t] * u[:, t])[..., None] * B_bdn
        outputs.append((state * C_bdn).sum(-1) + D * u[:, t])
    y_btd = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(u)
    return y_btd.to(u_btd.dtype), state
