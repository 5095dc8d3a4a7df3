"""Attention over quantised keys in PyTorch: matrix products over chunks of 64 tokens, on any device.

Tokens of a chunk meet each other pair by pair, and what came before as counts and sums of the codes. Scores are of
codes, ``[c, s]`` a chunk; the largest of those that have a token is subtracted, so that nothing overflows or vanishes.
Chunks run one after the other: all at once their scores and states would not stay in a processor's cache.
"""

from __future__ import annotations

import torch
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
    book_hks, sum_bhsv, outputs = book_hsk.to(dtype).mT, sum_bhsv.to(dtype), [v_bthv[:, :0]]
    (v_blank_bthv,) = chunks.blank(valid_bt, v_bthv)
    documents_bt = chunks.settle(documents_bt, valid_bt)
    before_b1 = None if documents_bt is None else torch.zeros_like(documents_bt[:, :1])
    with torch.autocast(v_bthv.device.type, enabled=False):
        for part in (slice(i, i + chunks.CHUNK) for i in range(0, v_bthv.shape[1], chunks.CHUNK)):
            q_bhck, v_bhcv = (x[:, part].transpose(1, 2).to(dtype) for x in (q_bthk, v_blank_bthv))
            code_bhc, c = code_bth[:, part].transpose(1, 2), q_bhck.shape[2]
            member_bchs = _members(code_bth[:, part], count_bhs)
            (member_bchs,) = chunks.blank(None if valid_bt is None else valid_bt[:, part], member_bchs)
            member_bhcs = member_bchs.transpose(1, 2).to(dtype)
            pair = torch.ones(c, c, dtype=torch.bool, device=v_bthv.device).tril()
            # Which tokens go on where the state ends, and which are of the document that is the state's behind them.
            goes_on, lasts, kept_b = None, None, None
            if documents_bt is not None and before_b1 is not None:
                documents_b1c1 = documents_bt[:, None, part, None]
                last_b1 = documents_bt[:, part][:, -1:]
                pair = pair & (documents_b1c1 == documents_b1c1.mT)
                goes_on, lasts = (documents_b1c1 == x[..., None, None] for x in (before_b1, last_b1))
                kept_b, before_b1 = (last_b1 == before_b1)[:, 0], last_b1

            n_bhcs = pair.to(dtype) @ member_bhcs + _where(count_bhs[:, :, None].to(dtype), goes_on)
            e_bhcs = _weights(q_bhck @ book_hks, n_bhcs)
            near_bhcc = e_bhcs.gather(-1, code_bhc[:, :, None].expand(-1, -1, c, -1)) * pair
            y_bhcv = near_bhcc @ v_bhcv + _where(e_bhcs, goes_on) @ sum_bhsv
            # Before a row's first token nothing weighs anything.
            total_bhc1 = (e_bhcs * n_bhcs).sum(-1, keepdim=True)
            y_bhcv = y_bhcv / total_bhc1.masked_fill(total_bhc1 == 0, 1)
            outputs.append(y_bhcv.transpose(1, 2).to(v_bthv.dtype))

            member_bhcs = _where(member_bhcs, lasts)
            count_bhs = _carry(count_bhs, kept_b) + member_bhcs.sum(2).long()
            sum_bhsv = _carry(sum_bhsv, kept_b) + member_bhcs.mT @ v_bhcv
    return torch.cat(outputs, dim=1), count_bhs, sum_bhsv


def _weights(score_bhcs: Tensor, n_bhcs: Tensor) -> Tensor:
    """``exp(score)`` of the codes that have a token, over that of the largest of them; 0 of the others."""
    score_bhcs = score_bhcs.masked_fill(n_bhcs == 0, -torch.inf)
    top_bhc1 = score_bhcs.detach().amax(-1, keepdim=True)
    return (score_bhcs - top_bhc1.masked_fill(top_bhc1 == -torch.inf, 0)).exp()


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
    (v_blank_bthv, member_bths) = chunks.blank(valid_bt, v_bthv, _members(code_bth, count_bhs))
    with torch.autocast(v_bthv.device.type, enabled=False):
        added_bhsv = member_bths.to(dtype).permute(0, 2, 3, 1) @ v_blank_bthv.to(dtype).transpose(1, 2)
    return count_bhs + member_bths.sum(1), sum_bhsv + added_bhsv


def _members(code_bth: Tensor, count_bhs: Tensor) -> Tensor:
    """1 at each token's code; `one_hot` would ask the device whether they are in range."""
    return (code_bth[..., None] == torch.arange(count_bhs.shape[2], device=code_bth.device)).long()


def _carry(state: Tensor, goes_on_b: Tensor | None) -> Tensor:
    """The rows of a state that go on, and nothing in the place of the others."""
    return state if goes_on_b is None else state.masked_fill(~goes_on_b.reshape(-1, *(1,) * (state.dim() - 1)), 0)


def _where(x: Tensor, mask: Tensor | None) -> Tensor:
    """`x`, with zeros where `mask` is False."""
    return x if mask is None else x * mask
