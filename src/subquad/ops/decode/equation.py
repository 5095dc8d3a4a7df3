"""Decode as its equation: the kept tokens run through convolution and recurrence one by one, then the new ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops import norm, short_conv
from subquad.ops.attention import expand_heads


@dataclass(frozen=True)
class Rule:
    """What a layer computes between its projections and its outputs.

    ``S_t = exp(g_t) S_{t-1} + beta_t k_t (v_t - delta exp(g_t) S_{t-1}^T k_t)^T``, ``y_t = S_t^T q_t + skip v_t``.

    Attributes:
        delta: 1 for the gated delta rule (arXiv 2412.06464, equation 10), 0 for SSD (2405.21060, equation 2) and GLA
            (2312.06635, equation 3), which differ in g: one of a head, or one of each of its key channels.
        activation: ``silu`` or ``none``, on q, k and v behind the convolution.
        l2_eps: queries and keys are then divided by ``sqrt(sum of squares + l2_eps)``; None leaves them.
        scale: factor on the queries behind that.
    """

    delta: bool
    activation: str = "none"
    l2_eps: float | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class Block:
    """Tokens as they come.

    Attributes:
        q_bthk, k_bthk, v_bthv: before the convolution; heads may be fewer than those of g, each a divisor of them.
        g_bthk: log decay, at most 0; k is 1 where all channels of a head share one.
        beta_bth: factor on what is written, or None for 1.
    """

    q_bthk: Tensor
    k_bthk: Tensor
    v_bthv: Tensor
    g_bthk: Tensor
    beta_bth: Tensor | None = None


@dataclass(frozen=True)
class Weights:
    """A layer's own: taps ``[d, w]`` and bias of the convolution over the channels of v, k, q, and a skip per head."""

    conv_dw: Tensor | None = None
    bias_d: Tensor | None = None
    skip_h: Tensor | None = None


def equation(
    block: Block, state_bhkv: Tensor, conv_bdw: Tensor | None, rule: Rule, weights: Weights, n_b: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Outputs of every token of `block`, and the state and the convolution's last inputs behind the first `n_b`.

    The loop over tokens that all of `subquad.ops.decode` is checked against: a course of blocks is one call a block to
    commit it and one to read the next. Arithmetic is in the dtype of the state.

    Args:
        block: the tokens.
        state_bhkv: state before the first.
        conv_bdw: the convolution's last inputs before the first, or None without one.
        rule: the recurrence.
        weights: the layer's own.
        n_b: how many tokens of each row the states that come out have seen; None is all.
    """
    dtype, (b, time, h) = state_bhkv.dtype, block.g_bthk.shape[:3]
    valid_bt = None if n_b is None else torch.arange(time, device=state_bhkv.device) < n_b[:, None]
    parts = [x.to(dtype) for x in (block.v_bthv, block.k_bthk, block.q_bthk)]
    if weights.conv_dw is not None and conv_bdw is not None:
        taps_dw = weights.conv_dw.to(dtype)
        bias_d = None if weights.bias_d is None else weights.bias_d.to(dtype)
        raw_btd = torch.cat([x.flatten(2) for x in parts], dim=-1)
        mixed_btd, _ = short_conv.equation(raw_btd, taps_dw, bias_d, conv_bdw.to(dtype))
        parts = [
            y.unflatten(-1, x.shape[2:])
            for y, x in zip(mixed_btd.split([x.shape[2] * x.shape[3] for x in parts], dim=-1), parts, strict=True)
        ]
        conv_bdw = short_conv.final_state(raw_btd, conv_bdw.to(dtype), valid_bt=valid_bt)
    if rule.activation == "silu":
        parts = [F.silu(x) for x in parts]
    v, k, q = parts
    if rule.l2_eps is not None:
        k, q = norm.l2(k, rule.l2_eps), norm.l2(q, rule.l2_eps)
    q, k, v = (expand_heads(x, h) for x in (q * rule.scale, k, v))
    g = block.g_bthk.to(dtype)
    beta = g.new_ones(b, time, h) if block.beta_bth is None else block.beta_bth.to(dtype)
    state, kept, outputs = state_bhkv, state_bhkv, list[Tensor]()
    for t in range(time):
        state = g[:, t, :, :, None].exp() * state
        target_bhv = v[:, t]
        if rule.delta:
            target_bhv = target_bhv - (k[:, t, :, None] @ state).squeeze(2)
        state = state + k[:, t, :, :, None] * (beta[:, t, :, None] * target_bhv)[:, :, None]
        y_bhv = (q[:, t, :, None] @ state).squeeze(2)
        if weights.skip_h is not None:
            y_bhv = y_bhv + weights.skip_h.to(dtype)[:, None] * v[:, t]
        outputs.append(y_bhv)
        kept = state if valid_bt is None else torch.where(valid_bt[:, t, None, None, None], state, kept)
    return torch.stack(outputs, dim=1), kept, conv_bdw
