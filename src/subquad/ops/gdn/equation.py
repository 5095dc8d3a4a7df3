"""The gated delta rule of Gated DeltaNet (arXiv 2412.06464)."""

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
    beta_bth: Tensor,
    state_bhkv: Tensor,
    *,
    valid_bt: Tensor | None = None,
    documents_bt: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The gated delta rule as its equation (2412.06464, equation 10), a loop over tokens; the oracle.

    ``S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T``, ``y_t = S_t^T q_t``.
    The paper's state is this one's transpose. The state decays first, and is corrected then.

    Args:
        q_bthk: queries.
        k_bthk: keys, of norm at most 1 (with ``beta |k|^2`` beyond 2 the state grows without bound).
        v_bthv: values.
        g_bth: log decay (``log alpha``), at most 0.
        beta_bth: share of the value under a key that is replaced.
        state_bhkv: state before the first token.
        valid_bt: True where a token stands; elsewhere the state passes unchanged and the output means nothing.
        documents_bt: document of each token, never decreasing; document 0 continues `state_bhkv`, a later one starts
            from zero.
        dtype: of arithmetic and state; None is the widest of the arguments, at least float32.

    Heads of q, k and v may be fewer than h, each a divisor of it: head i of h reads head ``i // (h / n)`` of n.

    Returns:
        Outputs ``[b, t, h, v]`` in the dtype of the values, and the state after the last token in `dtype`.
    """
    dtype = dtype or chunks.compute_dtype(q_bthk, k_bthk, v_bthv, g_bth, beta_bth, state_bhkv)
    q_bthk, k_bthk, v_bthv = (expand_heads(x, g_bth.shape[2]) for x in (q_bthk, k_bthk, v_bthv))
    k, v, g, beta = (x.to(dtype) for x in chunks.blank(valid_bt, k_bthk, v_bthv, g_bth, beta_bth))
    documents_bt = chunks.settle(documents_bt, valid_bt)
    outputs: list[Tensor] = []
    state = state_bhkv.to(dtype)
    for t in range(q_bthk.shape[1]):
        if documents_bt is not None:
            before_b = documents_bt[:, t - 1] if t > 0 else torch.zeros_like(documents_bt[:, 0])
            state = state.masked_fill((documents_bt[:, t] != before_b)[:, None, None, None], 0)
        state = g[:, t, :, None, None].exp() * state
        error_bh1v = v[:, t, :, None] - k[:, t, :, None] @ state
        state = state + k[:, t, :, :, None] * (beta[:, t, :, None, None] * error_bh1v)
        outputs.append((q_bthk[:, t, :, None].to(dtype) @ state).squeeze(2))
    if not outputs:
        return v_bthv.new_empty(*g_bth.shape, v_bthv.shape[3]), state.clone()
    return torch.stack(outputs, dim=1).to(v_bthv.dtype), state
