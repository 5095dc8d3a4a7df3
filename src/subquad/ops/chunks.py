"""What chunked recurrences with a scalar decay share: masking, cutting into chunks, decays between positions."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.core.layout import Layout
from subquad.core.state import precise

CHUNK = 64

# exp of this is 0 in every dtype; a log decay below it means the same, and could only spoil sums of log decays.
FORGOTTEN = -1000.0


class Decays(NamedTuple):
    """Factors, each at most 1 and exactly 0 across a document boundary, for n chunks of c tokens.

    Attributes:
        pair_bhncc: from token j to token i of a chunk, ``exp(g_{j+1} + ... + g_i)`` for ``j <= i``, else 0.
        start_bhnc: from the state before the chunk to token i.
        end_bhnc: from token j to the state after the chunk.
        across_bhn: from the state before the chunk to the state after it.
        g_bnh: log decay of a whole chunk, not yet 0 across a boundary.
        documents_bn: document of a chunk's last token, or None.
    """

    pair_bhncc: Tensor
    start_bhnc: Tensor
    end_bhnc: Tensor
    across_bhn: Tensor
    g_bnh: Tensor
    documents_bn: Tensor | None


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The widest dtype of `tensors`, but at least float32."""
    dtype = tensors[0].dtype
    for x in tensors[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    return precise(dtype)


def wide(x: Tensor) -> torch.dtype:
    """The dtype for sums of log decays: float64 where the device has it, since differences of long sums cancel."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def kept(layout: Layout, n_b: Tensor | None = None) -> Tensor | None:
    """bool ``[b, t]``: the first `n_b` tokens of each row, by default all of them; None when that is every column."""
    if n_b is None:
        return layout.valid_bt if layout.padded else None
    return torch.arange(layout.shape[1], device=n_b.device) < n_b[:, None]


def blank(valid_bt: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """`tensors` with zeros where no token stands, whatever stood there."""
    if valid_bt is None:
        return tensors
    empty_bt = ~valid_bt
    return tuple(x.masked_fill(empty_bt.reshape(empty_bt.shape + (1,) * (x.dim() - 2)), 0) for x in tensors)


def settle(documents_bt: Tensor | None, valid_bt: Tensor | None) -> Tensor | None:
    """Documents in which a column without a token belongs to the last token before it, so that it changes nothing."""
    if documents_bt is None or valid_bt is None:
        return documents_bt
    return documents_bt.masked_fill(~valid_bt, 0).cummax(1).values


def cut(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cut time into chunks, heads first: ``[b, t, h, ...] -> [b, h, n, c, ...]`` in `dtype`, zeros behind the end."""
    t = x.shape[1]
    c = min(t, CHUNK)
    n = -(-t // c)
    x = x.transpose(1, 2)
    if n * c > t:
        x = F.pad(x, (0, 0) * (x.dim() - 3) + (0, n * c - t))
    return x.to(dtype=dtype, memory_format=torch.contiguous_format).unflatten(2, (n, c))


def join(y_bhncv: Tensor, time: int) -> Tensor:
    """Undo `cut`: ``[b, h, n, c, v] -> [b, time, h, v]``."""
    return y_bhncv.flatten(2, 3)[:, :, :time].transpose(1, 2)


def decays(g_bth: Tensor, documents_bt: Tensor | None, dtype: torch.dtype) -> Decays:
    """All decays that a chunked recurrence needs.

    Only sums of log decays from an earlier to a later position are exponentiated, so nothing overflows, however strong
    the forgetting; and each difference of cumulative sums is as exact as the sum itself.

    Args:
        g_bth: log decay of each token, at most 0.
        documents_bt: document of each token, or None when there is one.
        dtype: of the result.
    """
    sum_bhnc = cut(g_bth.clamp(min=FORGOTTEN), wide(g_bth)).cumsum(-1)
    c = sum_bhnc.shape[-1]
    last_bhn1 = sum_bhnc[..., -1:]
    # High and low parts give the difference of two float64 sums at the cost of float32 arithmetic; the low parts are
    # rounding errors of the high ones, so no gradient flows through them.
    high_bhnc = sum_bhnc.to(dtype)
    between_bhncc = high_bhnc[..., :, None] - high_bhnc[..., None, :]
    if dtype != sum_bhnc.dtype:
        low_bhnc = (sum_bhnc - high_bhnc).detach().to(dtype)
        between_bhncc = between_bhncc.add_(low_bhnc[..., :, None]).sub_(low_bhnc[..., None, :])
    start_bhnc, end_bhnc = sum_bhnc.exp().to(dtype), (last_bhn1 - sum_bhnc).exp().to(dtype)
    g_bnh = last_bhn1.squeeze(-1).transpose(1, 2)
    across_bhn = last_bhn1.squeeze(-1).exp().to(dtype)
    unseen = torch.ones(c, c, dtype=torch.bool, device=g_bth.device).triu(1)
    if documents_bt is None:
        pair_bhncc = between_bhncc.masked_fill_(unseen, -torch.inf).exp_()
        return Decays(pair_bhncc, start_bhnc, end_bhnc, across_bhn, g_bnh, None)
    t, n = documents_bt.shape[1], sum_bhnc.shape[2]
    padded_bt = F.pad(documents_bt[:, None], (0, n * c - t), mode="replicate")[:, 0]
    documents_b1nc = padded_bt.unflatten(1, (n, c))[:, None]
    last_b1n = documents_b1nc[..., -1]
    before_b1n = F.pad(last_b1n[..., :-1], (1, 0))
    unseen = unseen | (documents_b1nc[..., :, None] != documents_b1nc[..., None, :])
    return Decays(
        between_bhncc.masked_fill_(unseen, -torch.inf).exp_(),
        start_bhnc.masked_fill(documents_b1nc != before_b1n[..., None], 0),
        end_bhnc.masked_fill(documents_b1nc != last_b1n[..., None], 0),
        across_bhn.masked_fill(last_b1n != before_b1n, 0),
        g_bnh,
        last_b1n.squeeze(1),
    )
