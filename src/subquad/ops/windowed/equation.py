"""Attention to the last tokens and the sinks, alone or joined in one normaliser with a linear state for all before."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.core.layout import Layout
from subquad.ops import chunks
from subquad.ops.attention import expand_heads
from subquad.ops.window import Far, WindowState


def equation(
    q_bthk: Tensor,
    k_btgk: Tensor,
    v_btgv: Tensor,
    far: Far | None,
    past: WindowState | None,
    layout: Layout,
    *,
    window: int,
    sinks: int,
    scale: float,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Softmax over the near keys and linear weights for the far ones in one normaliser, query by query; the oracle.

    ``y_t = (sum_near e^(scale q.k_j) v_j + sum_far (phi.f_j) v_j + phi S) / (the same without values)``, after arXiv
    2410.10254, equation 6: near are the last `window` tokens of the query's document, its own included, and the first
    `sinks`; far are all others before it; ``phi = exp(weight)``.

    Args:
        q_bthk: queries; head i reads key/value head ``i // (h / g)``.
        k_btgk: keys.
        v_btgv: values.
        far: weights and features of what is far; None leaves it out, and this is sliding-window attention.
        past: what stands before the block; None is nothing.
        layout: the block's; document 0 continues `past`. Padding changes nothing, and outputs there mean nothing.
        window: tokens seen exactly.
        sinks: first tokens of a document seen exactly for ever.
        scale: factor on the scores.
        dtype: of all arithmetic; None is the widest of the arguments, at least float32.

    Returns:
        ``[b, t, h, v]`` in the dtype of the values.
    """
    dtype = dtype or chunks.compute_dtype(q_bthk, k_btgk, v_btgv)
    h, (b, t), device = q_bthk.shape[2], layout.shape, q_bthk.device
    if past is None:
        empty = WindowState.empty(b, k_btgk.shape[2], window, sinks, k_btgk.shape[3], dtype=dtype, device=device)
        past = WindowState(
            empty.window_k_bgwk,
            v_btgv.new_zeros(b, v_btgv.shape[2], window, v_btgv.shape[3]),
            empty.sink_k_bgsk,
            v_btgv.new_zeros(b, v_btgv.shape[2], sinks, v_btgv.shape[3]),
            empty.seen_b,
        )
    seen_b1 = past.seen_b[:, None]
    # Keys: the stored sinks, the window, the block; of each its place in its document and which document that is.
    k_bnhk, v_bnhv = (
        expand_heads(torch.cat((old.transpose(1, 2), last.transpose(1, 2), new), 1).to(dtype), h)
        for old, last, new in (
            (past.sink_k_bgsk, past.window_k_bgwk, k_btgk),
            (past.sink_v_bgsk, past.window_v_bgwk, v_btgv),
        )
    )
    slots_bs = torch.arange(sinks, device=device).expand(b, -1)
    past_bw = seen_b1 - window + torch.arange(window, device=device)
    stored_bs = torch.where(slots_bs < seen_b1, slots_bs, -1)
    index_bt = layout.index_bt(past.seen_b)
    index_bn = torch.cat((stored_bs, past_bw, index_bt), 1)
    documents_bt = torch.zeros_like(index_bt) if layout.documents_bt is None else layout.documents_bt
    documents_bn = torch.cat((documents_bt.new_zeros(b, sinks + window), documents_bt), 1)
    place_n = torch.arange(index_bn.shape[1], device=device)
    weight_bthf, f_bnhf = None, None
    if far is not None:
        weight_bthf = far.weights().to(dtype)
        window_f = far.f_btgf.new_zeros(b, far.f_btgf.shape[2], window, far.f_btgf.shape[3])
        if far.window_f_bgnf is not None:
            window_f = torch.cat((far.window_f_bgnf, window_f[:, :, far.window_f_bgnf.shape[2] :]), 2)
        window_f = window_f.transpose(1, 2)
        f_bnhf = torch.cat((window_f.new_zeros(b, sinks, *window_f.shape[2:]), window_f, far.f_btgf), 1)
        f_bnhf = expand_heads(f_bnhf.to(dtype), h)
    out: list[Tensor] = []
    for i in range(t):
        own_bn = (documents_bn == documents_bt[:, i, None]) & (index_bn >= 0)
        own_bn = own_bn & (place_n <= sinks + window + i)
        in_window_bn = index_bt[:, i, None] - index_bn < window
        # A stored sink may stand in the window as well: the store counts once the window has left it.
        near_bn = own_bn & torch.where(place_n < sinks, ~in_window_bn, in_window_bn | (index_bn < sinks))
        near_bn = near_bn & ((place_n < sinks) | (place_n >= sinks + window) | in_window_bn)
        scores_bhn = scale * torch.einsum("bhk,bnhk->bhn", q_bthk[:, i].to(dtype), k_bnhk)
        scores_bhn = scores_bhn.masked_fill(~near_bn[:, None], -torch.inf)
        most_bh1 = scores_bhn.amax(-1, keepdim=True)
        if far is None or f_bnhf is None or weight_bthf is None:
            out.append(torch.einsum("bhn,bnhv->bhv", scores_bhn.softmax(-1), v_bnhv))
            continue
        weight_bhf = weight_bthf[:, i]
        top_bh1 = weight_bhf.amax(-1, keepdim=True)
        phi_bhf = (weight_bhf - top_bh1).exp()
        far_bhn = (
            torch.einsum("bhf,bnhf->bhn", phi_bhf, f_bnhf) * (own_bn & ~in_window_bn & (index_bn >= sinks))[:, None]
        )
        rest_bhv, rest_bh1 = torch.einsum("bhn,bnhv->bhv", far_bhn, v_bnhv), far_bhn.sum(-1, keepdim=True)
        if far.state_bgfv is not None:
            state_bhfv = far.state_bgfv.to(dtype).repeat_interleave(h // far.state_bgfv.shape[1], 1)
            state_bhfv = state_bhfv * (documents_bt[:, i] == 0)[:, None, None, None]
            carried_bhv = torch.einsum("bhf,bhfv->bhv", phi_bhf, state_bhfv)
            rest_bhv, rest_bh1 = rest_bhv + carried_bhv[..., :-1], rest_bh1 + carried_bhv[..., -1:]
        # Both parts relative to the larger one; no far mass, no claim of its weights to be that.
        base_bh1 = torch.where(rest_bh1 > 0, torch.maximum(most_bh1, top_bh1), most_bh1).detach()
        near_bhn = (scores_bhn - base_bh1).exp()
        share_bh1 = torch.where(rest_bh1 > 0, (top_bh1 - base_bh1).exp(), 0)
        total_bh1 = near_bhn.sum(-1, keepdim=True) + share_bh1 * rest_bh1
        out.append((torch.einsum("bhn,bnhv->bhv", near_bhn, v_bnhv) + share_bh1 * rest_bhv) / total_bh1)
    return torch.stack(out, 1).to(v_btgv.dtype)
