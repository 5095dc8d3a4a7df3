"""Linear attention with a scalar decay per head and token: the state space duality of Mamba-2 (arXiv 2405.21060)."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.ops import chunks
from subquad.ops.attention import expand_heads


def equation(
    q_bthk: Tensor,
    k_bthk: Tensor,
    v_bthv: Tensor,
    g_bth: Tensor,
    state_bhkv: Tensor,
    *,
    valid_bt: Tensor | None = None,
    documents_bt: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Decaying linear attention as its equation (2405.21060, equation 2), a loop over tokens; the oracle.

    ``S_t = exp(g_t) S_{t-1} + k_t v_t^T``, ``y_t = S_t^T q_t``: the paper's A is ``exp(g)``, B is k, C is q and x is v.

    Args:
        q_bthk: queries.
        k_bthk: keys.
        v_bthv: values, already times dt where the model wants that.
        g_bth: log decay, at most 0.
        state_bhkv: state before the first token.
        valid_bt: True where a token stands; elsewhere the state passes unchanged and the output means nothing.
        documents_bt: document of each token, never decreasing; document 0 continues `state_bhkv`, a later one starts
            from zero.
        dtype: of arithmetic and state; None is the widest of the arguments, at least float32.

    Heads of q, k and v may be fewer than h, each a divisor of it: head i of h reads head ``i // (h / n)`` of n.

    Returns:
        Outputs ``[b, t, h, v]`` in the dtype of the values, and the state after the last token in `dtype`.
    """
    dtype = dtype or chunks.compute_dtype(q_bthk, k_bthk, v_bthv, g_bth, state_bhkv)
    q_bthk, k_bthk, v_bthv = (expand_heads(x, g_bth.shape[2]) for x in (q_bthk, k_bthk, v_bthv))
    k, v, g = (x.to(dtype) for x in chunks.blank(valid_bt, k_bthk, v_bthv, g_bth))
    documents_bt = chunks.settle(documents_bt, valid_bt)
    outputs: list[Tensor] = []
    state = state_bhkv.to(dtype)
    for t in range(q_bthk.shape[1]):
        if documents_bt is not None:
            before_b = documents_bt[:, t - 1] if t > 0 else torch.zeros_like(documents_bt[:, 0])
            state = state.masked_fill((documents_bt[:, t] != before_b)[:, None, None, None], 0)
        state = g[:, t, :, None, None].exp() * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append((q_bthk[:, t, :, None].to(dtype) @ state).squeeze(2))
    if not outputs:
        return v_bthv.new_empty(*g_bth.shape, v_bthv.shape[3]), state.clone()
    return torch.stack(outputs, dim=1).to(v_bthv.dtype), state
