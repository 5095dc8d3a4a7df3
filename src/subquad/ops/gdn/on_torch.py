"""The gated delta rule in PyTorch: matrix products over chunks of 64 tokens, on any device and in any dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.ops import chunks
from subquad.ops.attention import expand_heads
from subquad.ops.gdn.equation import equation


def refusal(*tensors: Tensor) -> str | None:
    """None: it takes everything."""
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
    """`subquad.ops.gdn.scan` in the WY form of section 3.3 of arXiv 2412.06464."""
    time, h = q_bthk.shape[1], g_bth.shape[2]
    if time <= 1:
        arguments = q_bthk, k_bthk, v_bthv, g_bth, beta_bth, state_bhkv
        return equation(*arguments, valid_bt=valid_bt, documents_bt=documents_bt)
    dtype = chunks.compute_dtype(q_bthk, k_bthk, v_bthv, g_bth, beta_bth, state_bhkv)
    with torch.autocast(q_bthk.device.type, enabled=False):
        k_bthk, v, g_bth, beta_bth = chunks.blank(valid_bt, k_bthk, v_bthv, g_bth, beta_bth)
        q, k, v = (chunks.cut(expand_heads(x, h), dtype) for x in (q_bthk, k_bthk, v))
        decay = chunks.decays(g_bth, chunks.settle(documents_bt, valid_bt), dtype)
        own, reader = _solve(k, v, chunks.cut(beta_bth, dtype), decay)
        *before, end_bhkv = _states(k, own, reader, decay, state_bhkv.to(dtype))
        before_bhnkv = torch.stack(before, dim=2)
        y = ((q @ k.mT) * decay.pair_bhncc) @ (own - reader @ before_bhnkv)
        y = y + (q * decay.start_bhnc[..., None]) @ before_bhnkv
        return chunks.join(y, time).to(v_bthv.dtype), end_bhkv


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
    """`subquad.ops.gdn.final_state`."""
    dtype = chunks.compute_dtype(k_bthk, v_bthv, g_bth, beta_bth, state_bhkv)
    if k_bthk.shape[1] == 0:
        return state_bhkv.to(dtype)
    if k_bthk.shape[1] == 1:
        arguments = k_bthk, k_bthk, v_bthv, g_bth, beta_bth, state_bhkv
        return equation(*arguments, valid_bt=valid_bt, documents_bt=documents_bt)[1]
    with torch.autocast(k_bthk.device.type, enabled=False):
        k, v, g, beta = chunks.blank(valid_bt, k_bthk, v_bthv, g_bth, beta_bth)
        decay = chunks.decays(g, chunks.settle(documents_bt, valid_bt), dtype)
        h = g.shape[2]
        k, v, beta = (chunks.cut(x, dtype) for x in (expand_heads(k, h), expand_heads(v, h), beta))
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
