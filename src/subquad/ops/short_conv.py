"""Short causal depthwise convolution along time, with the last inputs as its state."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops import chunks


def equation(
    x_btd: Tensor,
    weight_dw: Tensor,
    bias_d: Tensor | None,
    state_bdw: Tensor,
    *,
    valid_bt: Tensor | None = None,
    documents_bt: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``y_t = bias + sum_j weight_j x_{t - (w - 1) + j}`` for j from 0 to w - 1, a loop over tokens; the oracle.

    The convolution of Mamba (arXiv 2312.00752, section 3.4); no activation.

    Args:
        x_btd: inputs.
        weight_dw: taps of each channel, the current token's last, as in ``nn.Conv1d``.
        bias_d: bias or None.
        state_bdw: the last ``w - 1`` inputs, the newest last; zeros stand before the first token.
        valid_bt: True where a token stands, first in every row; elsewhere the state passes unchanged.
        documents_bt: document of each token, never decreasing; document 0 continues `state_bdw`, a later one starts
            from zeros.

    Returns:
        Outputs ``[b, t, d]`` and the state after the last token.
    """
    documents_bt = chunks.settle(documents_bt, valid_bt)
    outputs, state = list[Tensor](), state_bdw
    for t in range(x_btd.shape[1]):
        if documents_bt is not None:
            before_b = documents_bt[:, t - 1] if t > 0 else torch.zeros_like(documents_bt[:, 0])
            state = state.masked_fill((documents_bt[:, t] != before_b)[:, None, None], 0)
        seen_bdw = torch.cat((state, x_btd[:, t, :, None]), dim=-1)
        y_bd = (seen_bdw * weight_dw).sum(-1)
        outputs.append(y_bd if bias_d is None else y_bd + bias_d)
        after = seen_bdw[..., 1:]
        state = after if valid_bt is None else torch.where(valid_bt[:, t, None, None], after, state)
    return torch.stack(outputs, dim=1), state


def parallel(
    x_btd: Tensor,
    weight_dw: Tensor,
    bias_d: Tensor | None,
    state_bdw: Tensor,
    *,
    documents_bt: Tensor | None = None,
) -> Tensor:
    """The outputs of `equation`, all tokens at once. No token sees a later one, so right padding needs no mask."""
    t, width = x_btd.shape[1], weight_dw.shape[1]
    joint_btd = torch.cat((state_bdw.to(x_btd.dtype).mT, x_btd), dim=1)
    # A sum of shifted products keeps the layout [b, t, d], and lets each tap stop at a document's edge.
    y_btd = x_btd.new_zeros(()).expand_as(x_btd) if bias_d is None else bias_d.expand_as(x_btd)
    for j in range(width):
        tap_btd = joint_btd[:, j : j + t]
        if documents_bt is not None:
            source_bt = F.pad(documents_bt, (width - 1 - j, 0))[:, :t]
            tap_btd = tap_btd.masked_fill((source_bt != documents_bt)[..., None], 0)
        y_btd = torch.addcmul(y_btd, tap_btd, weight_dw[:, j])
    return y_btd


def final_state(
    x_btd: Tensor, state_bdw: Tensor, *, valid_bt: Tensor | None = None, documents_bt: Tensor | None = None
) -> Tensor:
    """The state of `equation` after the last valid token, in the dtype of the state."""
    kept = state_bdw.shape[2]
    b, t = x_btd.shape[:2]
    joint_bnd = torch.cat((state_bdw.mT, x_btd.to(state_bdw.dtype)), dim=1)
    if valid_bt is None and documents_bt is None:
        return joint_bnd[:, t:].mT.clone()
    n_b = x_btd.new_full((b,), t, dtype=torch.int64) if valid_bt is None else valid_bt.sum(1)
    source_bw = n_b[:, None] + torch.arange(kept, device=x_btd.device)
    state_bwd = joint_bnd.gather(1, source_bw[..., None].expand(-1, -1, joint_bnd.shape[2]))
    if documents_bt is not None:
        joint_documents_bn = F.pad(documents_bt, (kept, 0))
        last_b1 = joint_documents_bn.gather(1, (n_b + kept - 1).clamp(min=0)[:, None])
        state_bwd = state_bwd.masked_fill((joint_documents_bn.gather(1, source_bw) != last_b1)[..., None], 0)
    return state_bwd.mT
