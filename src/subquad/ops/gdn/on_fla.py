"""The gated delta rule by flash-linear-attention's `chunk_gated_delta_rule`, for comparison; only where asked for."""

from __future__ import annotations

from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # pyright: ignore[reportMissingImports]
from torch import Tensor

from subquad.core.errors import UnsupportedError
from subquad.ops import launch
from subquad.ops.attention import expand_heads


def refusal(*tensors: Tensor) -> str | None:
    """Why flash-linear-attention can't run the operation's arguments, or None."""
    if tensors[0].device.type != "cuda":
        return f"flash-linear-attention needs a CUDA device, got {tensors[0].device}"
    return None


def scan(
    q_bthk: Tensor,
    k_bthk: Tensor,
    v_bthv: Tensor,
    g_bth: Tensor,
    beta_bth: Tensor,
    state_bhkv: Tensor,
    *,
    valid_bt: Tensor | None = None,
    documents_bt: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`subquad.ops.gdn.scan`; heads of q, k and v are repeated to h.

    Its gradients are refused by flash-linear-attention itself on Hopper with Triton from 3.4 to 3.7.0.

    Raises:
        UnsupportedError: padded or packed rows.
    """
    if valid_bt is not None or documents_bt is not None:
        raise UnsupportedError(
            "gdn on fla: expected rows of one whole document each, got padded or packed ones; pack none"
        )
    q, k, v = launch.operands(q_bthk, k_bthk, v_bthv)
    q, k, v = (expand_heads(x, g_bth.shape[2]) for x in (q, k, v))
    y_bthv, end_bhkv = chunk_gated_delta_rule(
        q, k, v, g_bth.float(), beta_bth, scale=1.0, initial_state=state_bhkv.float(), output_final_state=True
    )
    return y_bthv.to(v_bthv.dtype), end_bhkv


def final_state(
    k_bthk: Tensor,
    v_bthv: Tensor,
    g_bth: Tensor,
    beta_bth: Tensor,
    state_bhkv: Tensor,
    *,
    valid_bt: Tensor | None = None,
    documents_bt: Tensor | None = None,
) -> Tensor:
    """`subquad.ops.gdn.final_state`, by `scan`: there is no launch for the state alone."""
    return scan(k_bthk, k_bthk, v_bthv, g_bth, beta_bth, state_bhkv, valid_bt=valid_bt, documents_bt=documents_bt)[1]
