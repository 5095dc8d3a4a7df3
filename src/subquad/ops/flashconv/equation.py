"""The long causal convolution as a sum over earlier tokens: the oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.ops import chunks


def equation(
    u_btd: Tensor,
    k_gl: Tensor,
    bias_d: Tensor | None = None,
    *,
    behind_gl: Tensor | None = None,
    gate_in_btd: Tensor | None = None,
    gate_out_btd: Tensor | None = None,
    documents_bt: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``y_t = gate_out_t (sum_{j <= t} k_{t-j} u'_j + bias u'_t)`` with ``u' = gate_in u``, a loop over tokens.

    One step of the Hyena recurrence (arXiv 2302.10866, definition 3.1), or of H3 (arXiv 2212.14052).

    Args:
        u_btd: inputs.
        k_gl: filters, the weight of the current token first; at least one tap, and zeros stand behind the last.
            d is a multiple of g, and ``d / g`` consecutive channels share a filter.
        bias_d: what each channel's input adds directly, or None.
        behind_gl: filters backwards in time, as many as `k_gl`: ``sum_{j >= t} behind_{j-t} u'_j`` is added, or None.
        gate_in_btd: multiplies the inputs, or None.
        gate_out_btd: multiplies the outputs, or None.
        documents_bt: document of each token, never decreasing; a token sees only its own document.
        dtype: of arithmetic; None is the widest of inputs and filters, at least float32.

    Returns:
        ``[b, t, d]`` in the dtype of `u_btd`.
    """
    dtype = dtype or chunks.compute_dtype(u_btd, k_gl)
    time, length = u_btd.shape[1], k_gl.shape[1]
    u = u_btd.to(dtype) if gate_in_btd is None else u_btd.to(dtype) * gate_in_btd.to(dtype)
    k_ld, behind_ld = (
        None if x is None else x.to(dtype).repeat_interleave(u_btd.shape[2] // len(x), dim=0).mT
        for x in (k_gl, behind_gl)
    )
    assert k_ld is not None
    outputs: list[Tensor] = []
    for t in range(time):
        first = max(0, t - length + 1)
        own = None if documents_bt is None else documents_bt == documents_bt[:, t, None]

        def seen(terms_bjd: Tensor, where: slice, own: Tensor | None = own) -> Tensor:
            return (terms_bjd if own is None else terms_bjd.masked_fill(~own[:, where, None], 0)).sum(1)

        before = slice(first, t + 1)
        y_bd = seen(k_ld[: t - first + 1].flip(0) * u[:, before], before)
        if behind_ld is not None:
            after = slice(t, min(time, t + len(behind_ld)))
            y_bd = y_bd + seen(behind_ld[: after.stop - t] * u[:, after], after)
        outputs.append(y_bd)
    y = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(u)
    y = y if bias_d is None else y + bias_d.to(dtype) * u
    return (y if gate_out_btd is None else y * gate_out_btd.to(dtype)).to(u_btd.dtype)
