"""Linear attention without decay, with grouped queries and a carried state."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.core.state import precise
from subquad.ops import ssd

CHUNK = 64


def equation(
    q_bthf: Tensor,
    k_btgf: Tensor,
    v_btgv: Tensor,
    state_bgfv: Tensor,
    *,
    q_documents_bt: Tensor | None = None,
    k_documents_bt: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``S_t = S_{t-1} + k_t v_t^T, y_t = q_t S_t`` (arXiv 2006.16236, equations 16 to 20), token by token; the oracle.

    Args:
        q_bthf: feature-mapped queries; head i reads key group ``i // (h // g)``.
        k_btgf: feature-mapped keys, zero where nothing is to be written.
        v_btgv: values.
        state_bgfv: sum of what came before; belongs to document 0.
        q_documents_bt, k_documents_bt: documents of queries and of keys, None for one. Keys of a new document start
            from zero, and a query reads only a state of its own document.

    Returns:
        ``[b, t, h, v]`` in the dtype of `q_bthf`, and the state after the last token.
    """
    r = q_bthf.shape[2] // k_btgf.shape[2]
    document_b = torch.zeros(q_bthf.shape[0], dtype=torch.int64, device=q_bthf.device)
    out: list[Tensor] = []
    for t in range(q_bthf.shape[1]):
        if k_documents_bt is not None:
            fresh_b = k_documents_bt[:, t] != document_b
            state_bgfv = torch.where(fresh_b[:, None, None, None], 0, state_bgfv)
            document_b = k_documents_bt[:, t]
        state_bgfv = state_bgfv + k_btgf[:, t, :, :, None] * v_btgv[:, t, :, None]
        y_bhv = (q_bthf[:, t, :, None] @ state_bgfv.repeat_interleave(r, 1)).squeeze(2)
        if q_documents_bt is not None:
            y_bhv = torch.where((q_documents_bt[:, t] == document_b)[:, None, None], y_bhv, 0)
        out.append(y_bhv)
    return torch.stack(out, 1).to(q_bthf.dtype), state_bgfv


def scan(
    q_bthf: Tensor,
    k_btgf: Tensor,
    v_btgv: Tensor,
    state_bgfv: Tensor,
    *,
    valid_bt: Tensor | None = None,
    documents_bt: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs and final state of `equation` where queries and keys stand together: `ssd.scan` that forgets nothing.

    So whatever runs that runs this, in the same precision; `valid_bt` and `documents_bt` mean what they mean there.
    The heads of a group share keys and values, but each sums a state of its own, of which the first is returned.
    """
    h, g = q_bthf.shape[2], k_btgf.shape[2]
    g_bth = torch.zeros(q_bthf.shape[:3], dtype=precise(k_btgf.dtype), device=q_bthf.device)
    state_bhfv = state_bgfv.repeat_interleave(h // g, 1)
    where = {"valid_bt": valid_bt, "documents_bt": documents_bt}
    y_bthv, end_bhfv = ssd.scan(q_bthf, k_btgf, v_btgv, g_bth, state_bhfv, **where)
    return y_bthv, end_bhfv[:, :: h // g]


def chunked(
    q_bthf: Tensor,
    k_btgf: Tensor,
    v_btgv: Tensor,
    state_bgfv: Tensor,
    *,
    q_documents_bt: Tensor | None = None,
    k_documents_bt: Tensor | None = None,
) -> Tensor:
    """The outputs of `equation` by chunks of 64 tokens, all chunks at once, in at least float32; the same arguments.

    In PyTorch alone, and the only form for keys that lag behind their queries, with documents of their own.
    """
    _, t, h, _ = q_bthf.shape
    g, wide = k_btgf.shape[2], precise(q_bthf.dtype)
    with torch.autocast(q_bthf.device.type, enabled=False):
        size = min(CHUNK, t)
        pad = -t % size

        def chunks(x_bthf: Tensor) -> Tensor:
            """``b t h f -> b h c l f``."""
            return F.pad(x_bthf, (0, 0, 0, 0, 0, pad)).unflatten(1, (-1, size)).movedim(3, 1)

        q_bgrclf = chunks(q_bthf.to(wide)).unflatten(1, (g, h // g))
        k_bgclf, v_bgclv = chunks(k_btgf.to(wide)), chunks(v_btgv.to(wide))
        causal_ll = torch.ones(size, size, dtype=torch.bool, device=q_bthf.device).tril()
        first_bgfv = state_bgfv.to(wide)
        if q_documents_bt is None or k_documents_bt is None:
            sums_bgcfv = k_bgclf.mT @ v_bgclv
            entry_bgcfv = first_bgfv[:, :, None] + F.pad(sums_bgcfv[:, :, :-1], (0, 0, 0, 0, 1, 0)).cumsum(2)
            allowed_bcll = causal_ll[None, None]
            carried_bcl = None
        else:
            # Every state holds one document, that of the last key before it.
            q_doc_bcl, k_doc_bcl = (
                torch.cat((d, d[:, -1:].expand(-1, pad)), 1).unflatten(1, (-1, size))
                for d in (q_documents_bt, k_documents_bt)
            )
            last_bc = k_doc_bcl[..., -1]
            entry_doc_bc = F.pad(last_bc, (1, 0))[:, :-1]
            own_bcl = k_doc_bcl == last_bc[..., None]
            sums_bgcfv = (k_bgclf * own_bcl[:, None, ..., None]).mT @ v_bgclv
            earlier_cc = torch.ones(last_bc.shape[1], last_bc.shape[1], dtype=torch.bool, device=q_bthf.device).tril(-1)
            joins_bcc = (earlier_cc & (last_bc[:, None] == entry_doc_bc[..., None])).to(wide)
            entry_bgcfv = (joins_bcc[:, None] @ sums_bgcfv.flatten(3)).unflatten(-1, sums_bgcfv.shape[3:])
            entry_bgcfv = entry_bgcfv + (entry_doc_bc == 0)[:, None, :, None, None] * first_bgfv[:, :, None]
            allowed_bcll = causal_ll & (q_doc_bcl[..., None] == k_doc_bcl[..., None, :])
            carried_bcl = (q_doc_bcl == entry_doc_bc[..., None])[:, None, None, ..., None]
        scores_bgrcll = q_bgrclf @ k_bgclf[:, :, None].mT * allowed_bcll[:, None, None]
        within = scores_bgrcll @ v_bgclv[:, :, None]
        across = q_bgrclf @ entry_bgcfv[:, :, None]
        y_bgrclv = within + (across if carried_bcl is None else across * carried_bcl)
        return y_bgrclv.flatten(1, 2).flatten(2, 3).transpose(1, 2)[:, :t].to(q_bthf.dtype)


def absorb(k_btgf: Tensor, v_btgv: Tensor, state_bgfv: Tensor, kept_bt: Tensor, continues_b: Tensor) -> Tensor:
    """The state after the kept tokens: ``S + sum k v^T``, from zero in rows that do not continue.

    Args:
        k_btgf, v_btgv: keys and values of the block.
        state_bgfv: before it.
        kept_bt: bool, tokens to add.
        continues_b: bool, rows that keep `state_bgfv`.
    """
    wide = state_bgfv.dtype
    with torch.autocast(k_btgf.device.type, enabled=False):
        k_bgft = (k_btgf.to(wide) * kept_bt[..., None, None]).permute(0, 2, 3, 1)
        added_bgfv = k_bgft @ v_btgv.to(wide).transpose(1, 2)
    return torch.where(continues_b[:, None, None, None], state_bgfv, 0) + added_bgfv
