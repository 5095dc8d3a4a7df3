"""Short causal depthwise convolution along time, with the last inputs as its state."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.core.errors import ConfigError, nearest
from subquad.ops.backends import Backends
from subquad.ops.short_conv.equation import equation

__all__ = ["equation", "final_state", "parallel"]

_backends = Backends(__name__)


def parallel(
    x_btd: Tensor,
    weight_dw: Tensor,
    bias_d: Tensor | None,
    state_bdw: Tensor,
    *,
    documents_bt: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """The outputs of `equation`, all tokens at once, in the dtype of `x_btd`; arithmetic in at least float32.

    No token sees a later one, so right padding needs no mask.
    """
    if activation not in ("silu", "none"):
        raise ConfigError(f"unknown activation {activation!r}{nearest(activation, ('silu', 'none'))}")
    if state_bdw.shape[2] != weight_dw.shape[1] - 1:
        raise ConfigError(
            f"state_bdw: expected the last {weight_dw.shape[1] - 1} inputs for {weight_dw.shape[1]} taps, got "
            f"{state_bdw.shape[2]}; use the state of this convolution"
        )
    if x_btd.numel() == 0:
        return x_btd.clone()
    chosen = _backends.choose(x_btd, weight_dw, state_bdw)
    return chosen.parallel(x_btd, weight_dw, bias_d, state_bdw, documents_bt=documents_bt, activation=activation)


def final_state(
    x_btd: Tensor, state_bdw: Tensor, *, valid_bt: Tensor | None = None, documents_bt: Tensor | None = None
) -> Tensor:
    """The state of `equation` after the last valid token, in its dtype; valid tokens stand first in a row."""
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
