"""Attention over quantised keys in PyTorch: matrix products over chunks of 64 tokens, on any device.

Tokens of a chunk meet each other pair by pair, and what came before as counts and sums of the codes. Scores are of
codes only, ``[t, s]``; the largest of a token's populated ones is subtracted, so that nothing overflows or vanishes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops import chunks


def refusal(*tensors: Tensor) -> str | None:
    """None: it takes everything."""
    return None


def scan(
    q_bthk: Tensor,
    code_bth: Tensor,
    v_bthv: Tensor,
    book_hsk: Tensor,
    count_bhs: Tensor,
    sum_bhsv: Tensor,
    *,
    valid_bt: Tensor | None = None,
    documents_bt: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`subquad.ops.vq_attention.scan`."""
    dtype = chunks.compute_dtype(q_bthk, v_bthv, book_hsk, sum_bhsv)
    t = v_bthv.shape[1]
    sum_bhsv = sum_bhsv.to(dtype)
    if t == 0:
        return v_bthv.clone(), count_bhs, sum_bhsv
    with torch.autocast(v_bthv.device.type, enabled=False):
        (v_blank_bthv, member_bths) = chunks.blank(valid_bt, v_bthv, F.one_hot(code_bth, count_bhs.shape[2]))
        v_bhncv, member_bhncs = chunks.cut(v_blank_bthv, dtype), chunks.cut(member_bths, dtype)
        score_bhncs = chunks.cut(q_bthk, dtype) @ book_hsk.to(dtype).mT[:, None]
        n, c = v_bhncv.shape[2:4]
        pair = torch.ones(c, c, dtype=torch.bool, device=v_bthv.device).tril()
        start, last, goes_on_bn = None, None, None
        documents_bt = chunks.settle(documents_bt, valid_bt)
        if documents_bt is not None:
            padded_bt = F.pad(documents_bt[:, None], (0, n * c - t), mode="replicate")[:, 0]
            documents_b1nc = padded_bt.unflatten(1, (n, c))[:, None]
            last_b1n = documents_b1nc[..., -1]
            before_b1n = F.pad(last_b1n[..., :-1], (1, 0))
            pair = pair & (documents_b1nc[..., :, None] == documents_b1nc[..., None, :])
            start = (documents_b1nc == before_b1n[..., None])[..., None]
            last = (documents_b1nc == last_b1n[..., None])[..., None]
            goes_on_bn = (last_b1n == before_b1n)[:, 0]

        written_bhncs = _where(member_bhncs, last)
        add_count_bhns, add_sum_bhnsv = written_bhncs.sum(3).long(), written_bhncs.mT @ v_bhncv
        counts, sums = [count_bhs], [sum_bhsv]
        for i in range(n):
            goes_on_b = None if goes_on_bn is None else goes_on_bn[:, i]
            counts.append(_carry(counts[-1], goes_on_b) + add_count_bhns[:, :, i])
            sums.append(_carry(sums[-1], goes_on_b) + add_sum_bhnsv[:, :, i])

        before_bhn1s = torch.stack(counts[:-1], dim=2).to(dtype)[..., None, :]
        n_bhncs = pair.to(dtype) @ member_bhncs + _where(before_bhn1s, start)
        score_bhncs = score_bhncs.masked_fill(n_bhncs == 0, -torch.inf)
        top_bhnc1 = score_bhncs.detach().amax(-1, keepdim=True)
        e_bhncs = (score_bhncs - top_bhnc1.masked_fill(top_bhnc1 == -torch.inf, 0)).exp()
        total_bhnc1 = (e_bhncs * n_bhncs).sum(-1, keepdim=True)
        codes_bhn1c = chunks.cut(code_bth, torch.int64)[..., None, :]
        near_bhncc = e_bhncs.gather(-1, codes_bhn1c.expand(-1, -1, -1, c, -1)) * pair
        y_bhncv = near_bhncc @ v_bhncv + _where(e_bhncs, start) @ torch.stack(sums[:-1], dim=2)
        # No token weighs anything before a row's first one.
        y_bhncv = y_bhncv / total_bhnc1.masked_fill(total_bhnc1 == 0, 1)
    return chunks.join(y_bhncv, t).to(v_bthv.dtype), counts[-1], sums[-1]


def final_state(
    code_bth: Tensor,
    v_bthv: Tensor,
    count_bhs: Tensor,
    sum_bhsv: Tensor,
    *,
    valid_bt: Tensor | None = None,
    documents_bt: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`subquad.ops.vq_attention.final_state`: the members of each code, counted and summed at once."""
    dtype = chunks.compute_dtype(v_bthv, sum_bhsv)
    sum_bhsv = sum_bhsv.to(dtype)
    if v_bthv.shape[1] == 0:
        return count_bhs, sum_bhsv
    documents_bt = chunks.settle(documents_bt, valid_bt)
    if documents_bt is not None:
        last_b1 = documents_bt[:, -1:]
        goes_on_b, ends_bt = last_b1[:, 0] == 0, documents_bt == last_b1
        count_bhs, sum_bhsv = _carry(count_bhs, goes_on_b), _carry(sum_bhsv, goes_on_b)
        valid_bt = ends_bt if valid_bt is None else valid_bt & ends_bt
    (v_blank_bthv, member_bths) = chunks.blank(valid_bt, v_bthv, F.one_hot(code_bth, count_bhs.shape[2]))
    with torch.autocast(v_bthv.device.type, enabled=False):
        added_bhsv = member_bths.to(dtype).permute(0, 2, 3, 1) @ v_blank_bthv.to(dtype).transpose(1, 2)
    return count_bhs + member_bths.sum(1), sum_bhsv + added_bhsv


def _carry(state: Tensor, goes_on_b: Tensor | None) -> Tensor:
    """The rows of a state that go on, and nothing in the place of the others."""
    return state if goes_on_b is None else state.masked_fill(~goes_on_b.reshape(-1, *(1,) * (state.dim() - 1)), 0)


def _where(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask
