"""Gated linear attention in PyTorch: matrix products over chunks of 64 tokens, on any device and in any dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops import chunks
from subquad.ops.attention import expand_heads
from subquad.ops.gla.equation import equation


def refusal(*tensors: Tensor) -> str | None:
    """None: it takes everything."""
    return None


def scan(
    q_bthk: Tensor,
    k_bthk: Tensor,
    v_bthv: Tensor,
    g_bthk: Tensor,
    state_bhkv: Tensor,
    *,
    valid_bt: Tensor | None = None,
    documents_bt: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`subquad.ops.gla.scan` by chunks as in section 4.2 of arXiv 2312.06635, and within them by levels of blocks."""
    time, h = q_bthk.shape[1], g_bthk.shape[2]
    if time <= 1:
        arguments = q_bthk, k_bthk, v_bthv, g_bthk, state_bhkv
        return equation(*arguments, valid_bt=valid_bt, documents_bt=documents_bt)
    dtype = chunks.compute_dtype(q_bthk, k_bthk, v_bthv, g_bthk, state_bhkv)
    with torch.autocast(q_bthk.device.type, enabled=False):
        k_bthk, v, g_bthk = chunks.blank(valid_bt, k_bthk, v_bthv, g_bthk)
        q, k, v = (chunks.cut(expand_heads(x, h), dtype) for x in (q_bthk, k_bthk, v))
        sum_bhnck = chunks.cut(g_bthk.clamp(min=chunks.FORGOTTEN), chunks.wide(g_bthk)).cumsum(-2)
        last_bhn1k = sum_bhnck[..., -1:, :]
        start_bhnck, end_bhnck = sum_bhnck.exp().to(dtype), (last_bhn1k - sum_bhnck).exp().to(dtype)
        across_bhnk = last_bhn1k.squeeze(-2).exp().to(dtype)
        weight_bhncc = _weights(q, k, sum_bhnck)
        documents_bt = chunks.settle(documents_bt, valid_bt)
        if documents_bt is not None:
            c = q.shape[3]
            whole_bt = F.pad(documents_bt[:, None], (0, q.shape[2] * c - time), mode="replicate")[:, 0]
            own_b1nc = whole_bt.unflatten(1, (-1, c))[:, None]
            last_b1n1 = own_b1nc[..., -1:]
            before_b1n1 = F.pad(last_b1n1[:, :, :-1], (0, 0, 1, 0))
            weight_bhncc = weight_bhncc.masked_fill(own_b1nc[..., :, None] != own_b1nc[..., None, :], 0)
            start_bhnck = start_bhnck.masked_fill((own_b1nc != before_b1n1)[..., None], 0)
            end_bhnck = end_bhnck.masked_fill((own_b1nc != last_b1n1)[..., None], 0)
            across_bhnk = across_bhnk.masked_fill(last_b1n1 != before_b1n1, 0)
        added_bhnkv = (k * end_bhnck).mT @ v
        states = [state_bhkv.to(dtype)]
        for across_bhk, added_bhkv in zip(across_bhnk.unbind(2), added_bhnkv.unbind(2), strict=True):
            states.append(torch.addcmul(added_bhkv, across_bhk[..., None], states[-1]))
        y = weight_bhncc @ v + (q * start_bhnck) @ torch.stack(states[:-1], dim=2)
        return chunks.join(y, time).to(v_bthv.dtype), states[-1]


def final_state(
    k_bthk: Tensor,
    v_bthv: Tensor,
    g_bthk: Tensor,
    state_bhkv: Tensor,
    *,
    valid_bt: Tensor | None = None,
    documents_bt: Tensor | None = None,
) -> Tensor:
    """`subquad.ops.gla.final_state` as one matrix product."""
    dtype = chunks.compute_dtype(k_bthk, v_bthv, g_bthk, state_bhkv)
    if k_bthk.shape[1] == 0:
        return state_bhkv.to(dtype)
    with torch.autocast(k_bthk.device.type, enabled=False):
        k, v, g = chunks.blank(valid_bt, k_bthk, v_bthv, g_bthk)
        sum_bthk = g.clamp(min=chunks.FORGOTTEN).to(chunks.wide(g)).cumsum(1)
        end_bthk = (sum_bthk[:, -1:] - sum_bthk).exp().to(dtype)
        across_bhk = sum_bthk[:, -1].exp().to(dtype)
        documents_bt = chunks.settle(documents_bt, valid_bt)
        if documents_bt is not None:
            end_bthk = end_bthk.masked_fill((documents_bt != documents_bt[:, -1:])[..., None, None], 0)
            across_bhk = across_bhk.masked_fill((documents_bt[:, -1] != 0)[:, None, None], 0)
        k, v = (expand_heads(x, g.shape[2]).to(dtype) for x in (k, v))
        k_bhkt = (k * end_bthk).permute(0, 2, 3, 1)
        return across_bhk[..., None] * state_bhkv.to(dtype) + k_bhkt @ v.transpose(1, 2)


def _weights(q_bhnck: Tensor, k_bhnck: Tensor, sum_bhnck: Tensor) -> Tensor:
    """``A_ij = sum_k q_ik k_jk exp(g_{j+1,k} + ... + g_ik)`` for ``j <= i`` in each chunk, else 0.

    The exponent does not split into a part of i and a part of j without overflow, unless both are measured from a token
    between them. At level l, blocks of 2^l tokens meet their right neighbours at the common border: one product for
    all pairs whose highest differing bit is l, with exponents at most 0 only.
    """
    c, dtype = q_bhnck.shape[3], q_bhnck.dtype
    at_c = torch.arange(c, device=q_bhnck.device)
    apart_cc = torch.where(at_c[:, None] > at_c, at_c[:, None] ^ at_c, 0)
    weight_bhncc = torch.diag_embed((q_bhnck * k_bhnck).sum(-1))
    for level in range((c - 1).bit_length()):
        block_c = at_c >> level
        asks_c1 = (block_c & 1 == 1)[:, None]
        # The last token of the left block: what it sums up to is where both sides count from.
        border_c = torch.where(asks_c1[:, 0], block_c << level, (block_c + 1) << level).clamp(max=c) - 1
        between_bhnck = sum_bhnck - sum_bhnck.index_select(3, border_c)
        factor_bhnck = torch.where(asks_c1, between_bhnck, -between_bhnck).exp().to(dtype)
        met_bhnck = torch.where(asks_c1, q_bhnck, k_bhnck) * factor_bhnck
        pairs_bhncc = met_bhnck @ met_bhnck.mT
        weight_bhncc = weight_bhncc + pairs_bhncc.masked_fill(apart_cc >> level != 1, 0)
    return weight_bhncc
