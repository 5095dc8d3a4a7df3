"""Attention over quantised keys as a loop over tokens: the oracle."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops import chunks


def equation(
    q_bthk: Tensor,
    code_bth: Tensor,
    v_bthv: Tensor,
    book_hsk: Tensor,
    count_bhs: Tensor,
    sum_bhsv: Tensor,
    *,
    valid_bt: Tensor | None = None,
    documents_bt: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention over quantised keys, a loop over tokens; the oracle.

    ``N_ts`` and ``S_ts`` are number and sum of the values up to token t whose key is code s. Then
    ``y_t = sum_s softmax_s(q_t C_s + log N_ts) S_ts / N_ts``, which is softmax attention over all keys up to t, each
    replaced by its code (2309.16354, section 3: tokens of one code share their score).

    Args:
        q_bthk: queries, scaled already.
        code_bth: int64; the code that stands for each token's key, see `assign`.
        v_bthv: values.
        book_hsk: C, the codes of each head.
        count_bhs: int64; N before the first token.
        sum_bhsv: S before the first token.
        valid_bt: True where a token stands, first in every row; elsewhere the state passes unchanged and the output is
            finite and means nothing.
        documents_bt: document of each token, never decreasing; document 0 continues the state, a later one starts
            from nothing.
        dtype: of arithmetic and S; None is the widest of the arguments, at least float32.

    Returns:
        Outputs ``[b, t, h, v]`` in the dtype of the values, and N and S behind the last token.
    """
    dtype = dtype or chunks.compute_dtype(q_bthk, v_bthv, book_hsk, sum_bhsv)
    (v_bthv_blank,) = chunks.blank(valid_bt, v_bthv.to(dtype))
    (member_bths,) = chunks.blank(valid_bt, F.one_hot(code_bth, count_bhs.shape[2]))
    documents_bt = chunks.settle(documents_bt, valid_bt)
    score_bths = torch.einsum("bthk,hsk->bths", q_bthk.to(dtype), book_hsk.to(dtype))
    sum_bhsv = sum_bhsv.to(dtype)
    outputs: list[Tensor] = []
    for t in range(v_bthv.shape[1]):
        if documents_bt is not None:
            before_b = documents_bt[:, t - 1] if t > 0 else torch.zeros_like(documents_bt[:, 0])
            begins_b11 = (documents_bt[:, t] != before_b)[:, None, None]
            count_bhs = count_bhs.masked_fill(begins_b11, 0)
            sum_bhsv = sum_bhsv.masked_fill(begins_b11[..., None], 0)
        count_bhs = count_bhs + member_bths[:, t]
        sum_bhsv = sum_bhsv + member_bths[:, t, :, :, None] * v_bthv_blank[:, t, :, None]
        # Before a row's first token there is no code to attend to.
        none_bh1 = (count_bhs == 0).all(-1, keepdim=True)
        weight_bhs = (score_bths[:, t] + count_bhs.to(dtype).log()).masked_fill(none_bh1, 0).softmax(-1)
        mean_bhsv = sum_bhsv / count_bhs.clamp(min=1)[..., None]
        outputs.append((weight_bhs[..., None] * mean_bhsv).sum(2))
    y_bthv = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(v_bthv)
    return y_bthv.to(v_bthv.dtype), count_bhs, sum_bhsv
