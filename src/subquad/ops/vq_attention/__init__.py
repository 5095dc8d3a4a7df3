"""Causal softmax attention over keys that are codes of a fixed book: linear time, a constant state (2309.16354)."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.core.errors import ConfigError
from subquad.ops import chunks
from subquad.ops.backends import Backends
from subquad.ops.vq_attention.equation import equation

__all__ = ["assign", "equation", "final_state", "scan"]

_backends = Backends(__name__)


@torch.no_grad()
def assign(k_bthk: Tensor, book_hsk: Tensor) -> Tensor:
    """The code nearest to each key, int64 ``[b, t, h]``: ``argmin_s |k - C_s|^2``, in at least float32.

    A choice, so no gradient passes; where two codes are as near, either is chosen.

    Args:
        k_bthk: keys.
        book_hsk: codes of each head.
    """
    dtype = chunks.compute_dtype(k_bthk, book_hsk)
    with torch.autocast(k_bthk.device.type, enabled=False):
        book_hsk = book_hsk.to(dtype)
        near_bths = torch.einsum("bthk,hsk->bths", k_bthk.to(dtype), book_hsk) - book_hsk.square().sum(-1) / 2
        return near_bths.argmax(-1)


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
    """Outputs and final state of `equation`, by chunks of tokens; arguments and results are the same.

    The tensors' device chooses the implementation; see `subquad.ops.backends`. Gradients flow through the outputs and
    the final sums, to `book_hsk` too.

    Raises:
        ConfigError: shapes that do not fit together, or codes and counts that are no int64.
    """
    _check(code_bth, v_bthv, count_bhs, sum_bhsv)
    (b, t, h, k), s = q_bthk.shape, count_bhs.shape[2]
    if (b, t, h) != code_bth.shape or book_hsk.shape != (h, s, k):
        raise ConfigError(
            f"q_bthk, book_hsk: expected shapes {(*code_bth.shape, k)} and {(h, s, k)}, got {tuple(q_bthk.shape)} and "
            f"{tuple(book_hsk.shape)}; give every head a query a token, and a book of as many codes as the state's"
        )
    chosen = _backends.choose(q_bthk, code_bth, v_bthv, book_hsk, count_bhs, sum_bhsv)
    return chosen.scan(
        q_bthk, code_bth, v_bthv, book_hsk, count_bhs, sum_bhsv, valid_bt=valid_bt, documents_bt=documents_bt
    )


def final_state(
    code_bth: Tensor,
    v_bthv: Tensor,
    count_bhs: Tensor,
    sum_bhsv: Tensor,
    *,
    valid_bt: Tensor | None = None,
    documents_bt: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The final counts and sums of `scan` alone, where the outputs are not needed; arguments and errors as there."""
    _check(code_bth, v_bthv, count_bhs, sum_bhsv)
    chosen = _backends.choose(v_bthv, code_bth, count_bhs, sum_bhsv)
    return chosen.final_state(code_bth, v_bthv, count_bhs, sum_bhsv, valid_bt=valid_bt, documents_bt=documents_bt)


def _check(code_bth: Tensor, v_bthv: Tensor, count_bhs: Tensor, sum_bhsv: Tensor) -> None:
    if code_bth.dtype != torch.int64 or count_bhs.dtype != torch.int64:
        raise ConfigError(
            f"code_bth, count_bhs: expected int64, got {code_bth.dtype} and {count_bhs.dtype}; "
            "codes come from assign, and counts start as torch.zeros(..., dtype=torch.int64)"
        )
    (b, _, h, v), s = v_bthv.shape, count_bhs.shape[-1]
    if code_bth.shape != v_bthv.shape[:3] or count_bhs.shape != (b, h, s) or sum_bhsv.shape != (b, h, s, v):
        raise ConfigError(
            f"code_bth, count_bhs, sum_bhsv: expected shapes {tuple(v_bthv.shape[:3])}, {(b, h, s)} and "
            f"{(b, h, s, v)}, got {tuple(code_bth.shape)}, {tuple(count_bhs.shape)} and {tuple(sum_bhsv.shape)}; "
            "use the state of these heads and values"
        )
