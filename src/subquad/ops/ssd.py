"""Linear attention with a scalar decay per head and token: the state space duality of Mamba-2 (arXiv 2405.21060)."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.ops import chunks


def equation(
    q_bthk: Tensor,
    k_bthk: Tensor,
    v_bthv: Tensor,
    g_bth: Tensor,
    state_bhkv: Tensor,
    *,
    valid_bt: Tensor | None = None,
    documents_bt: Tensor | None = None,
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

    Returns:
        Outputs ``[b, t, h, v]`` in the dtype of the values, and the state after the last token in at least float32.
    """
    dtype = chunks.compute_dtype(q_bthk, k_bthk, v_bthv, g_bth, state_bhkv)
    k, v, g = (x.to(dtype) for x in chunks.blank(valid_bt, k_bthk, v_bthv, g_bth))
    documents_bt = chunks.settle(documents_bt, valid_bt)
    state, outputs = state_bhkv.to(dtype), list[Tensor]()
    for t in range(q_bthk.shape[1]):
        if documents_bt is not None:
            before_b = documents_bt[:, t - 1] if t > 0 else torch.zeros_like(documents_bt[:, 0])
            state = state.masked_fill((documents_bt[:, t] != before_b)[:, None, None, None], 0)
        state = g[:, t, :, None, None].exp() * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append((q_bthk[:, t, :, None].to(dtype) @ state).squeeze(2))
    return torch.stack(outputs, dim=1).to(v_bthv.dtype), state


def chunked(
    q_bthk: Tensor,
    k_bthk: Tensor,
    v_bthv: Tensor,
    g_bth: Tensor,
    state_bhkv: Tensor,
    *,
    valid_bt: Tensor | None = None,
    documents_bt: Tensor | None = None,
) -> Tensor:
    """The outputs of `equation` by matrix products over chunks of 64 tokens (2405.21060, section 6, listing 1).

    Arguments and result as in `equation`, without the state; see `final_state`.
    """
    time = q_bthk.shape[1]
    if time == 1:
        arguments = q_bthk, k_bthk, v_bthv, g_bth, state_bhkv
        return equation(*arguments, valid_bt=valid_bt, documents_bt=documents_bt)[0]
    dtype = chunks.compute_dtype(q_bthk, k_bthk, v_bthv, g_bth, state_bhkv)
    with torch.autocast(q_bthk.device.type, enabled=False):
        k_bthk, v, g_bth = chunks.blank(valid_bt, k_bthk, v_bthv, g_bth)
        q, k, v = (chunks.cut(x, dtype) for x in (q_bthk, k_bthk, v))
        decay = chunks.decays(g_bth, chunks.settle(documents_bt, valid_bt), dtype)
        y = ((q @ k.mT) * decay.pair_bhncc) @ v
        added_bhnkv = (k * decay.end_bhnc[..., None]).mT @ v
        y = y + (q * decay.start_bhnc[..., None]) @ _before(added_bhnkv, decay, state_bhkv.to(dtype))
        return chunks.join(y, time).to(v_bthv.dtype)


def final_state(
    k_bthk: Tensor,
    v_bthv: Tensor,
    g_bth: Tensor,
    state_bhkv: Tensor,
    *,
    valid_bt: Tensor | None = None,
    documents_bt: Tensor | None = None,
) -> Tensor:
    """The state of `equation` after the last valid token, without outputs: one matrix product.

    ``S_T = exp(g_1 + ... + g_T) S_0 + sum_j exp(g_{j+1} + ... + g_T) k_j v_j^T``. Arguments as in `equation`.
    """
    dtype = chunks.compute_dtype(k_bthk, v_bthv, g_bth, state_bhkv)
    if k_bthk.shape[1] == 0:
        return state_bhkv.to(dtype)
    with torch.autocast(k_bthk.device.type, enabled=False):
        k, v, g = chunks.blank(valid_bt, k_bthk, v_bthv, g_bth)
        sum_bth = g.clamp(min=chunks.FORGOTTEN).to(chunks.wide(g)).cumsum(1)
        end_bth = (sum_bth[:, -1:] - sum_bth).exp().to(dtype)
        across_bh = sum_bth[:, -1].exp().to(dtype)
        documents_bt = chunks.settle(documents_bt, valid_bt)
        if documents_bt is not None:
            end_bth = end_bth.masked_fill((documents_bt != documents_bt[:, -1:])[..., None], 0)
            across_bh = across_bh.masked_fill((documents_bt[:, -1] != 0)[:, None], 0)
        k_bhkt = (k.to(dtype) * end_bth[..., None]).permute(0, 2, 3, 1)
        return across_bh[..., None, None] * state_bhkv.to(dtype) + k_bhkt @ v.to(dtype).transpose(1, 2)


def _before(added_bhnkv: Tensor, decay: chunks.Decays, state_bhkv: Tensor) -> Tensor:
    """The state before each chunk, ``[b, h, n, k, v]``.

    Chunks are to the state what tokens are: ``S_n = across_n S_{n-1} + added_n``. So their states are matrix products
    over groups of 64 chunks, with a loop over the groups only.
    """
    n = added_bhnkv.shape[2]
    if n == 1:
        return state_bhkv[:, :, None]
    over = chunks.decays(decay.g_bnh, decay.documents_bn, state_bhkv.dtype)
    added_bhmnx = chunks.cut(added_bhnkv.flatten(3).transpose(1, 2), state_bhkv.dtype)
    inside_bhmnx = over.pair_bhncc @ added_bhmnx
    group, after = state_bhkv.flatten(2)[:, :, None], list[Tensor]()
    for inside_bhnx, start_bhn in zip(inside_bhmnx.unbind(2), over.start_bhnc.unbind(2), strict=True):
        after.append(torch.addcmul(inside_bhnx, start_bhn[..., None], group))
        group = after[-1][:, :, -1:]
    after_bhnkv = torch.cat(after, dim=2)[:, :, : n - 1].unflatten(3, state_bhkv.shape[2:])
    return torch.cat((state_bhkv[:, :, None], after_bhnkv), dim=2)
