"""Softmax attention over pieces of keys: dense, cached, banded."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.core.state import precise


def equation(q_bthk: Tensor, k_bngk: Tensor, v_bngv: Tensor, allowed_btn: Tensor, scale: float) -> Tensor:
    """Softmax attention as its equation (arXiv 1706.03762, equation 1), a loop over heads; the oracle of all versions.

    Args:
        q_bthk: queries; head ``i`` reads key/value head ``i // (h // g)``.
        k_bngk: keys.
        v_bngv: values.
        allowed_btn: bool, True where query t may see key n; every query must see at least one.
        scale: factor on the scores.

    Returns:
        ``[b, t, h, v]``.
    """
    group = q_bthk.shape[2] // k_bngk.shape[2]
    heads: list[Tensor] = []
    for head in range(q_bthk.shape[2]):
        scores_btn = scale * q_bthk[:, :, head] @ k_bngk[:, :, head // group].mT
        weights_btn = scores_btn.masked_fill(~allowed_btn, -torch.inf).softmax(-1)
        heads.append(weights_btn @ v_bngv[:, :, head // group])
    return torch.stack(heads, dim=2)


def expand_heads(x_btgk: Tensor, n_heads: int) -> Tensor:
    """Repeat key/value *heads* for grouped queries: ``b t g k -> b t (g r) k``, so head i reads group ``i // r``."""
    return x_btgk.repeat_interleave(n_heads // x_btgk.shape[2], dim=2)


def causal(q_bthk: Tensor, k_btgk: Tensor, v_btgv: Tensor, scale: float) -> Tensor:
    """Causal attention of a block to itself, ``[b, t, h, v]``; right padding needs no mask."""
    h = q_bthk.shape[2]
    grouped = h != k_btgk.shape[2]
    if grouped and q_bthk.is_cuda and q_bthk.dtype == torch.float32 and not torch.is_autocast_enabled("cuda"):
        # In float32 only a kernel that takes no groups is better than all scores at once.
        k_btgk, v_btgv, grouped = expand_heads(k_btgk, h), expand_heads(v_btgv, h), False
    q_bhtk, k_bgtk, v_bgtv = (x.transpose(1, 2) for x in (q_bthk, k_btgk, v_btgv))
    y_bhtv = F.scaled_dot_product_attention(q_bhtk, k_bgtk, v_bgtv, is_causal=True, scale=scale, enable_gqa=grouped)
    return y_bhtv.transpose(1, 2)


def masked(q_bthk: Tensor, k_bgnk: Tensor, v_bgnv: Tensor, allowed_btn: Tensor, scale: float) -> Tensor:
    """Attention under any mask, ``[b, t, h, v]``; keys and values are heads first.

    No fast kernel takes both a mask and grouped queries. The queries of a group share their keys, so they stand one
    after the other in time, each with its own copy of the mask, and neither keys nor values are repeated.
    """
    (b, t, h, _), g = q_bthk.shape, k_bgnk.shape[1]
    r = h // g
    q_bgxk = q_bthk.transpose(1, 2).unflatten(1, (g, r)).flatten(2, 3)
    allowed_b1xn = allowed_btn.repeat(1, r, 1)[:, None]
    y_bgxv = F.scaled_dot_product_attention(q_bgxk, k_bgnk, v_bgnv, attn_mask=allowed_b1xn, scale=scale)
    return y_bgxv.reshape(b, h, t, -1).transpose(1, 2)


def pieces(q_bthk: Tensor, parts: list[tuple[Tensor, Tensor, Tensor]], scale: float) -> tuple[Tensor, Tensor]:
    """One softmax over several pieces of keys, without joining or copying them.

    Args:
        q_bthk: queries, few of them: the scores are held.
        parts: ``(k_bgnk, v_bgnv, allowed_btn)`` each, heads first; every query must see a key in at least one.
        scale: factor on the scores.

    Returns:
        Output ``[b, t, h, v]`` and the logarithm of the softmax's denominator ``[b, t, h]``.
    """
    b, t, h, _ = q_bthk.shape
    g = parts[0][0].shape[1]
    # Queries of one group share their keys: one matrix product for all of them, and no copy of the cache.
    q_bgrtk = q_bthk.transpose(1, 2).unflatten(1, (g, h // g))
    scores: list[Tensor] = []
    for k_bgnk, _, allowed_btn in parts:
        s_bgrtn = (scale * q_bgrtk.flatten(2, 3) @ k_bgnk.mT).unflatten(2, (h // g, t))
        scores.append(s_bgrtn.to(precise(s_bgrtn.dtype)).masked_fill(~allowed_btn[:, None, None], -torch.inf))
    joint_bgrtn = torch.cat(scores, dim=-1)
    lse_bgrt = joint_bgrtn.logsumexp(-1)
    weights_bgrtn = (joint_bgrtn - lse_bgrt[..., None]).exp().to(q_bthk.dtype).flatten(2, 3)
    at, y_bgrtv = 0, None
    for _, v_bgnv, _ in parts:
        part = weights_bgrtn[..., at : at + v_bgnv.shape[2]] @ v_bgnv
        y_bgrtv = part if y_bgrtv is None else y_bgrtv + part
        at += v_bgnv.shape[2]
    assert y_bgrtv is not None
    return y_bgrtv.reshape(b, h, t, -1).transpose(1, 2), lse_bgrt.reshape(b, h, t).transpose(1, 2)
