"""The short convolution in PyTorch, as a sum of shifted products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops import chunks


def refusal(*tensors: Tensor) -> str | None:
    """None: it takes everything."""
    return None


def parallel(
    x_btd: Tensor,
    weight_dw: Tensor,
    bias_d: Tensor | None,
    state_bdw: Tensor,
    *,
    documents_bt: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """`subquad.ops.short_conv.parallel`."""
    t, width = x_btd.shape[1], weight_dw.shape[1]
    wide = chunks.compute_dtype(x_btd, weight_dw)
    joint_btd = torch.cat((state_bdw.to(x_btd.dtype).mT, x_btd), dim=1).to(wide)
    # A sum of shifted products keeps the layout [b, t, d], and lets each tap stop at a document's edge.
    y_btd = joint_btd.new_zeros(()).expand_as(x_btd) if bias_d is None else bias_d.to(wide).expand_as(x_btd)
    for j in range(width):
        tap_btd = joint_btd[:, j : j + t]
        if documents_bt is not None:
            source_bt = F.pad(documents_bt, (width - 1 - j, 0))[:, :t]
            tap_btd = tap_btd.masked_fill((source_bt != documents_bt)[..., None], 0)
        y_btd = torch.addcmul(y_btd, tap_btd, weight_dw[:, j].to(wide))
    return (F.silu(y_btd) if activation == "silu" else y_btd).to(x_btd.dtype)
