"""SSD in PyTorch: matrix products over chunks of 64 tokens, on any device and in any dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.ops import chunks
from subquad.ops.attention import expand_heads
from subquad.ops.ssd.equation import equation


def refusal(*tensors: Tensor) -> str | None:
    """None: it takes everything."""
    return None


def scan(
    q_bthk: Tensor,
    k_bthk: Tensor,
    v_bthv: Tensor,
    g_bth: Tensor,
    state_bhkv: Tensor,
    *,
    valid_bt: Tensor | None = None,
    documents_bt: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`subquad.ops.ssd.scan` by section 6, listing 1, of arXiv 2405.21060."""
    time, h = q_bthk.shape[1], g_bth.shape[2]
    if time <= 1:
        arguments = q_bthk, k_bthk, v_bthv, g_bth, state_bhkv
        return equation(*arguments, valid_bt=valid_bt, documents_bt=documents_bt)
    dtype = chunks.compute_dtype(q_bthk, k_bthk, v_bthv, g_bth, state_bhkv)
    with torch.autocast(q_bthk.device.type, enabled=False):
        k_bthk, v, g_bth = chunks.blank(valid_bt, k_bthk, v_bthv, g_bth)
        q, k, v = (chunks.cut(expand_heads(x, h), dtype) for x in (q_bthk, k_bthk, v))
        decay = chunks.decays(g_bth, chunks.settle(documents_bt, valid_bt), dtype)
        y = ((q @ k.mT) * decay.pair_bhncc) @ v
        added_bhnkv = (k * decay.end_bhnc[..., None]).mT @ v
        before_bhnkv, end_bhkv = _states(added_bhnkv, decay, state_bhkv.to(dtype))
        y = y + (q * decay.start_bhnc[..., None]) @ before_bhnkv
        return chunks.join(y, time).to(v_bthv.dtype), end_bhkv


def final_state(
    k_bthk: Tensor,
    v_bthv: Tensor,
    g_bth: Tensor,
    state_bhkv: Tensor,
    *,
    valid_bt: Tensor | None = None,
    documents_bt: Tensor | None = None,
) -> Tensor:
    """`subquad.ops.ssd.final_state` as one matrix product."""
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
        k, v = (expand_heads(x, g.shape[2]).to(dtype) for x in (k, v))
        k_bhkt = (k * end_bth[..., None]).permute(0, 2, 3, 1)
        return across_bh[..., None, None] * state_bhkv.to(dtype) + k_bhkt @ v.transpose(1, 2)


def _states(added_bhnkv: Tensor, decay: chunks.Decays, state_bhkv: Tensor) -> tuple[Tensor, Tensor]:
    """The state before each chunk, ``[b, h, n, k, v]``, and after the last.

    Chunks are to the state what tokens are: ``S_n = across_n S_{n-1} + added_n``. So their states are matrix products
    over groups of 64 chunks, with a loop over the groups only.
    """
    n = added_bhnkv.shape[2]
    if n == 1:
        end_bhkv = decay.across_bhn[:, :, 0, None, None] * state_bhkv + added_bhnkv[:, :, 0]
        return state_bhkv[:, :, None], end_bhkv
    over = chunks.decays(decay.g_bnh, decay.documents_bn, state_bhkv.dtype)
    added_bhmnx = chunks.cut(added_bhnkv.flatten(3).transpose(1, 2), state_bhkv.dtype)
    inside_bhmnx = over.pair_bhncc @ added_bhmnx
    after: list[Tensor] = []
    group = state_bhkv.flatten(2)[:, :, None]
    for inside_bhnx, start_bhn in zip(inside_bhmnx.unbind(2), over.start_bhnc.unbind(2), strict=True):
        after.append(torch.addcmul(inside_bhnx, start_bhn[..., None], group))
        group = after[-1][:, :, -1:]
    after_bhnkv = torch.cat(after, dim=2)[:, :, :n].unflatten(3, state_bhkv.shape[2:])
    return torch.cat((state_bhkv[:, :, None], after_bhnkv[:, :, :-1]), dim=2), after_bhnkv[:, :, -1]
