"""Linear attention with a decay per key channel, head and token: gated linear attention (arXiv 2312.06635)."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.ops import chunks
from subquad.ops.attention import expand_heads


def equation(
    q_bthk: Tensor,
    k_bthk: Tensor,
    v_bthv: Tensor,
    g_bthk: Tensor,
    state_bhkv: Tensor,
    *,
    valid_bt: Tensor | None = None,
    documents_bt: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated linear attention as its equation (2312.06635, equation 3), a loop over tokens; the oracle.

    ``S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T``, ``y_t = S_t^T q_t``: each row of the state, a key channel, has a decay
    of its own; the paper's alpha is ``exp(g)``.

    Args:
        q_bthk: queries, scaled already where the model wants that.
        k_bthk: keys.
        v_bthv: values.
        g_bthk: log decay of each key channel, at most 0, minus infinity too.
        state_bhkv: state before the first token.
        valid_bt: True where a token stands; elsewhere the state passes unchanged and the output means nothing.
        documents_bt: document of each token, never decreasing; document 0 continues `state_bhkv`, a later one starts
            from zero.
        dtype: of arithmetic and state; None is the widest of the arguments, at least float32.

    Heads of q, k and v may be fewer than h, each a divisor of it: head i of h reads head ``i // (h / n)`` of n.

    Returns:
        Outputs ``[b, t, h, v]`` in the dtype of the values, and the state after the last token in `dtype`.
    """
    dtype = dtype or chunks.compute_dtype(q_bthk, k_bthk, v_bthv, g_bthk, state_bhkv)
    h = g_bthk.shape[2]
    q_bthk, k_bthk, v_bthv = (expand_heads(x, h) for x in (q_bthk, k_bthk, v_bthv))
    k, v, g = (x.to(dtype) for x in chunks.blank(valid_bt, k_bthk, v_bthv, g_bthk))
    documents_bt = chunks.settle(documents_bt, valid_bt)
    outputs: list[Tensor] = []
    state = state_bhkv.to(dtype)
    for t in range(q_bthk.shape[1]):
        if documents_bt is not None:
            before_b = documents_bt[:, t - 1] if t > 0 else torch.zeros_like(documents_bt[:, 0])
            state = state.masked_fill((documents_bt[:, t] != before_b)[:, None, None, None], 0)
        state = g[:, t, :, :, None].exp() * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append((q_bthk[:, t, :, None].to(dtype) @ state).squeeze(2))
    y_bthv = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(v, dtype=dtype)
    return y_bthv.to(v_bthv.dtype), state
