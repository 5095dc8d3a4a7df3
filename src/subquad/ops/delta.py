"""The gated delta rule of Gated DeltaNet (arXiv 2412.06464)."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.ops import chunks


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

    Returns:
        Outputs ``[b, t, h, v]`` in the dtype of the values, and the state after the last token in at least float32.
    """
    dtype = chunks.compute_dtype(q_bthk, k_bthk, v_bthv, g_bth, beta_bth, state_bhkv)
    k, v, g, beta = (x.to(dtype) for x in chunks.blank(valid_bt, k_bthk, v_bthv, g_bth, beta_bth))
    documents_bt = chunks.settle(documents_bt, valid_bt)
    state, outputs = state_bhkv.to(dtype), list[Tensor]()
    for t in range(q_bthk.shape[1]):
        if documents_bt is not None:
            before_b = documents_bt[:, t - 1] if t > 0 else torch.zeros_like(documents_bt[:, 0])
            state = state.masked_fill((documents_bt[:, t] != before_b)[:, None, None, None], 0)
        state = g[:, t, :, None, None].exp() * state
        error_bh1v = v[:, t, :, None] - k[:, t, :, None] @ state
        state = state + k[:, t, :, :, None] * (beta[:, t, :, None, None] * error_bh1v)
        outputs.append((q_bthk[:, t, :, None].to(dtype) @ state).squeeze(2))
    return torch.stack(outputs, dim=1).to(v_bthv.dtype), state


def chunked(
    q_bthk: Tensor,
    k_bthk: Tensor,
    v_bthv: Tensor,
    g_bth: Tensor,
    beta_bth: Tensor,
    state_bhkv: Tensor,
    *,
    valid_bt: Tensor | None = None,
    documents_bt: Tensor | None = None,
) -> Tensor:
    """The outputs of `equation` by matrix products over chunks of 64 tokens, in the WY form of section 3.3.

    Arguments and result as in `equation`, without the state; see `final_state`.
    """
    time = q_bthk.shape[1]
    if time == 1:
        arguments = q_bthk, k_bthk, v_bthv, g_bth, beta_bth, state_bhkv
        return equation(*arguments, valid_bt=valid_bt, documents_bt=documents_bt)[0]
    dtype = chunks.compute_dtype(q_bthk, k_bthk, v_bthv, g_bth, beta_bth, state_bhkv)
    with torch.autocast(q_bthk.device.type, enabled=False):
        k_bthk, v, g_bth, beta_bth = chunks.blank(valid_bt, k_bthk, v_bthv, g_bth, beta_bth)
        q, k, v = (chunks.cut(x, dtype) for x in (q_bthk, k_bthk, v))
        decay = chunks.decays(g_bth, chunks.settle(documents_bt, valid_bt), dtype)
        own, reader = _solve(k, v, chunks.cut(beta_bth, dtype), decay)
        before_bhnkv = torch.stack(_states(k, own, reader, decay, state_bhkv.to(dtype))[:-1], dim=2)
        y = ((q @ k.mT) * decay.pair_bhncc) @ (own - reader @ before_bhnkv)
        y = y + (q * decay.start_bhnc[..., None]) @ before_bhnkv
        return chunks.join(y, time).to(v_bthv.dtype)


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
    """The state of `equation` after the last valid token, without outputs. Arguments as in `equation`."""
    dtype = chunks.compute_dtype(k_bthk, v_bthv, g_bth, beta_bth, state_bhkv)
    if k_bthk.shape[1] == 0:
        return state_bhkv.to(dtype)
    if k_bthk.shape[1] == 1:
        arguments = k_bthk, k_bthk, v_bthv, g_bth, beta_bth, state_bhkv
        return equation(*arguments, valid_bt=valid_bt, documents_bt=documents_bt)[1]
    with torch.autocast(k_bthk.device.type, enabled=False):
        k, v, g, beta = chunks.blank(valid_bt, k_bthk, v_bthv, g_bth, beta_bth)
        decay = chunks.decays(g, chunks.settle(documents_bt, valid_bt), dtype)
        k, v, beta = (chunks.cut(x, dtype) for x in (k, v, beta))
        return _states(k, *_solve(k, v, beta, decay), decay, state_bhkv.to(dtype))[-1]


def _solve(k_bhnck: Tensor, v_bhncv: Tensor, beta_bhnc: Tensor, decay: chunks.Decays) -> tuple[Tensor, Tensor]:
    """What each chunk writes under its keys, ``u = own - reader S_0``, with S_0 the state before the chunk.

    Within a chunk ``S_i = start_i S_0 + sum_{j <= i} pair_ij k_j u_j^T``, where the written values u solve
    ``u_i + beta_i sum_{j < i} pair_ij (k_i . k_j) u_j = beta_i (v_i - start_i S_0^T k_i)``: one unit lower triangular
    system for the values and for the keys that read S_0. No decay is ever divided by.
    """
    beta_bhnc1 = beta_bhnc[..., None]
    system_bhncc = beta_bhnc1 * (k_bhnck @ k_bhnck.mT) * decay.pair_bhncc
    right_bhncx = beta_bhnc1 * torch.cat((v_bhncv, decay.start_bhnc[..., None] * k_bhnck), dim=-1)
    # Only what lies below the diagonal is read, which is the strict sum over j < i.
    solved = torch.linalg.solve_triangular(system_bhncc, right_bhncx, upper=False, unitriangular=True)
    own_bhncv, reader_bhnck = solved.split((v_bhncv.shape[-1], k_bhnck.shape[-1]), dim=-1)
    return own_bhncv, reader_bhnck


def _states(
    k_bhnck: Tensor, own_bhncv: Tensor, reader_bhnck: Tensor, decay: chunks.Decays, state_bhkv: Tensor
) -> list[Tensor]:
    """The state before the first chunk and after each, by one matrix product a chunk.

    ``S <- across S + sum_j end_j k_j u_j^T`` with ``u = own - reader S`` is affine in S.
    """
    kept_bhnkc = (k_bhnck * decay.end_bhnc[..., None]).mT
    kept_state = torch.eye(k_bhnck.shape[-1], dtype=k_bhnck.dtype, device=k_bhnck.device)
    transition_bhnkk = decay.across_bhn[..., None, None] * kept_state - kept_bhnkc @ reader_bhnck
    added_bhnkv = kept_bhnkc @ own_bhncv
    batch, state_xkv = state_bhkv.shape[:2], state_bhkv.flatten(0, 1)
    states = [state_bhkv]
    for transition_xkk, added_xkv in zip(
        transition_bhnkk.flatten(0, 1).unbind(1), added_bhnkv.flatten(0, 1).unbind(1), strict=True
    ):
        state_xkv = torch.baddbmm(added_xkv, transition_xkk, state_xkv)
        states.append(state_xkv.unflatten(0, batch))
    return states
