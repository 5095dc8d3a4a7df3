"""A bounded pool of summaries of earlier tokens, the oldest forgotten first, and attention over it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.core.layout import Layout
from subquad.core.state import State, axes
from subquad.ops import chunks


@dataclass(frozen=True)
class Pool(State):
    """The last p summaries of a row's document, the newest last; `held_b` of them are there, zeros stand before."""

    summaries_bpm: Tensor = axes("b p m")
    held_b: Tensor = axes("b", precision="index")


class Notes(NamedTuple):
    """The summaries of a block's tokens, and the pool before the block.

    Attributes:
        summary_btm: of each token.
        taken_bt: which of them enter the pool.
        pool: before the block.
    """

    summary_btm: Tensor
    taken_bt: Tensor
    pool: Pool


def read(q_btm: Tensor, pools: Sequence[Notes], documents_bt: Tensor | None) -> Tensor:
    """What each token recalls: softmax attention over summaries that were taken before it, which are keys and values.

    ``c_t = sum_j softmax_j(q_t s_j / sqrt(m)) s_j`` over the summaries in all of `pools` when t is read, the last p of
    each; 0 where there are none. Tokens are read in chunks, each against the summaries that its tokens can still see,
    so that the cost is linear in t.

    Args:
        q_btm: queries.
        pools: one or more, of summaries of one width; p may differ.
        documents_bt: document of each token; only document 0 sees what stood in the pools before the block, a later
            one sees its own summaries.

    Returns:
        ``[b, t, m]``.
    """
    t, m = q_btm.shape[1:]
    c = min(max(t, 1), chunks.CHUNK)
    at_nc = torch.arange(-(-t // c) * c, device=q_btm.device).clamp(max=t - 1).unflatten(0, (-1, c))
    key_bnkm, seen_bnck = _visible(pools[0], at_nc, documents_bt)
    if len(pools) > 1:
        others = [_visible(notes, at_nc, documents_bt) for notes in pools[1:]]
        key_bnkm = torch.cat((key_bnkm, *(key for key, _ in others)), dim=2)
        seen_bnck = torch.cat((seen_bnck, *(seen for _, seen in others)), dim=3)
    q_bncm = q_btm[:, at_nc]
    scores_bnck = (q_bncm @ key_bnkm.mT).to(chunks.compute_dtype(q_btm)) * m**-0.5
    # A token that sees nothing has no largest score to subtract; its weights are zeros all the same.
    weights_bnck = scores_bnck.masked_fill(~seen_bnck, torch.finfo(scores_bnck.dtype).min).softmax(-1) * seen_bnck
    return (weights_bnck.to(key_bnkm.dtype) @ key_bnkm).flatten(1, 2)[:, :t]


def _visible(notes: Notes, at_nc: Tensor, documents_bt: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of one pool the summaries that a chunk can see, ``[b, n, k, m]``, and which of its tokens sees which."""
    summary_btm, p, c = notes.summary_btm, notes.pool.summaries_bpm.shape[1], at_nc.shape[1]
    t, m = summary_btm.shape[1:]
    # All that was ever taken, in order and without gaps: of token t, count_t stand before it.
    joint_bjm, taken_bj = _joint(notes, notes.taken_bt)
    order_bj = (~taken_bj).to(torch.int8).argsort(dim=1, stable=True)
    count_bnc = taken_bj.cumsum(1)[:, p - 1 + at_nc]
    rank_bnk = count_bnc[..., :1] + torch.arange(-p, c - 1, device=at_nc.device)
    place_bj = order_bj.gather(1, rank_bnk.flatten(1).clamp(0, p + t - 1))
    key_bnkm = joint_bjm.gather(1, place_bj[..., None].expand(-1, -1, m)).view(*rank_bnk.shape, m)
    behind_bnck = count_bnc[..., None] - rank_bnk[:, :, None]
    seen_bnck = (behind_bnck > 0) & (behind_bnck <= p) & (rank_bnk >= 0)[:, :, None]
    if documents_bt is not None:
        theirs_bnk = F.pad(documents_bt, (p, 0)).gather(1, place_bj).view_as(rank_bnk)
        seen_bnck = seen_bnck & (theirs_bnk[:, :, None] == documents_bt[:, at_nc, None])
    return key_bnkm, seen_bnck


def final_pool(notes: Notes, layout: Layout, n_b: Tensor | None = None) -> Pool:
    """The pool after the first `n_b` tokens of each row, by default all of them."""
    p = notes.pool.summaries_bpm.shape[1]
    kept_bt, continues_b = layout.tail(layout.lengths_b if n_b is None else n_b)
    joint_bjm, taken_bj = _joint(notes, notes.taken_bt & kept_bt)
    taken_bj = torch.cat((taken_bj[:, :p] & continues_b[:, None], taken_bj[:, p:]), dim=1)
    order_bp = taken_bj.to(torch.int8).argsort(dim=1, stable=True)[:, taken_bj.shape[1] - p :]
    held_b = taken_bj.sum(1).clamp(max=p)
    summaries_bpm = joint_bjm.gather(1, order_bp[..., None].expand(-1, -1, joint_bjm.shape[2]))
    return Pool(summaries_bpm.masked_fill(~_filled(held_b, p)[..., None], 0), held_b)


def _joint(notes: Notes, taken_bt: Tensor) -> tuple[Tensor, Tensor]:
    """The pool's slots and the block's tokens in one row, and which of them hold a summary."""
    held_bpm = notes.pool.summaries_bpm
    filled_bp = _filled(notes.pool.held_b, held_bpm.shape[1])
    joint_bjm = torch.cat((held_bpm, notes.summary_btm.to(held_bpm.dtype)), dim=1)
    return joint_bjm, torch.cat((filled_bp, taken_bt), dim=1)


def _filled(held_b: Tensor, p: int) -> Tensor:
    """bool ``[b, p]``: the slots that hold a summary, the last ones."""
    return torch.arange(p, device=held_b.device) >= p - held_b[:, None]
