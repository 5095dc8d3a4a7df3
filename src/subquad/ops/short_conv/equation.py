"""The short convolution as a loop over tokens: the oracle."""

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
    activation: str = "none",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """``y_t = bias + sum_j weight_j x_{t - (w - 1) + j}`` for j from 0 to w - 1, a loop over tokens; the oracle.

    The convolution of Mamba (arXiv 2312.00752, section 3.4).

    Args:
        x_btd: inputs.
        weight_dw: taps of each channel, the current token's last, as in ``nn.Conv1d``.
        bias_d: bias or None.
        state_bdw: the last ``w - 1`` inputs, the newest last; zeros stand before the first token.
        valid_bt: True where a token stands, first in every row; elsewhere the state passes unchanged.
        documents_bt: document of each token, never decreasing; document 0 continues `state_bdw`, a later one starts
            from zeros.
        activation: ``silu`` or ``none``, on `y`.
        dtype: arithmetic throughout, by default the inputs'.

    Returns:
        Outputs ``[b, t, d]`` and the state after the last token.
    """
    documents_bt = chunks.settle(documents_bt, valid_bt)
    if dtype is not None:
        x_btd, weight_dw, state_bdw = x_btd.to(dtype), weight_dw.to(dtype), state_bdw.to(dtype)
        bias_d = None if bias_d is None else bias_d.to(dtype)
    outputs: list[Tensor] = []
    state = state_bdw
    for t in range(x_btd.shape[1]):
        if documents_bt is not None:
            before_b = documents_bt[:, t - 1] if t > 0 else torch.zeros_like(documents_bt[:, 0])
            state = state.masked_fill((documents_bt[:, t] != before_b)[:, None, None], 0)
        seen_bdw = torch.cat((state, x_btd[:, t, :, None]), dim=-1)
        y_bd = (seen_bdw * weight_dw).sum(-1)
        y_bd = y_bd if bias_d is None else y_bd + bias_d
        outputs.append(F.silu(y_bd) if activation == "silu" else y_bd)
        after = seen_bdw[..., 1:]
        state = after if valid_bt is None else torch.where(valid_bt[:, t, None, None], after, state)
    return torch.stack(outputs, dim=1), state
