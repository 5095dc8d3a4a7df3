"""The decode step in PyTorch, token by token, on any device and in any dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.core.state import precise
from subquad.ops import norm, short_conv
from subquad.ops.attention import expand_heads
from subquad.ops.decode.equation import Block, Rule, Weights
from subquad.ops.decode.pool import DecodeState


def refusal(*tensors: Tensor) -> str | None:
    """None: it takes everything."""
    return None


def advance_(
    block: Block, pool: DecodeState, rule: Rule, weights: Weights, seen_b: Tensor, n_b: Tensor, rows_b: Tensor | None
) -> Tensor:
    """`subquad.ops.decode.advance_`; waits for the device where `rows_b` is given."""
    b, time, h = block.g_bthk.shape[:3]
    active = torch.arange(b, device=seen_b.device)
    if rows_b is not None:
        active = (rows_b >= 0).nonzero().squeeze(1)
    rows = active if rows_b is None else rows_b[active].long()
    seen, n = seen_b[active].long(), n_b[active].long()
    dtype = precise(torch.promote_types(block.v_bthv.dtype, pool.recurrent_bhkv.dtype))
    rows_a1, start_a1 = rows[:, None], (seen + n)[:, None]
    slots = pool.keys_bnhk.shape[1]

    kept_ap = torch.arange(pool.block, device=seen.device) < n[:, None]
    pending_ap = (seen[:, None] + torch.arange(pool.block, device=seen.device)) % slots
    # Slots that nothing was written to may hold anything.
    k_aphk, u_aphv, g_aphk = (
        x[rows_a1, pending_ap].to(dtype).masked_fill(~kept_ap[:, :, None, None], 0)
        for x in (pool.keys_bnhk, pool.values_bnhv, pool.decays_bnhk)
    )
    k_aphk = expand_heads(k_aphk, h)
    state = pool.recurrent_bhkv[rows].to(dtype)
    for p in range(pool.block):
        state = g_aphk[:, p, :, :, None].exp() * state + k_aphk[:, p, :, :, None] * u_aphv[:, p, :, None]
    kept_a111 = (n > 0)[:, None, None, None]
    pool.recurrent_bhkv[rows] = torch.where(kept_a111, state.to(pool.recurrent_bhkv.dtype), pool.recurrent_bhkv[rows])

    v, k, q = _inputs(block, pool, rule, weights, active, rows, start_a1.squeeze(1), dtype)
    new_at = (start_a1 + torch.arange(time, device=seen.device)) % slots
    k = k.to(pool.keys_bnhk.dtype)
    g = block.g_bthk[active].to(dtype)
    pool.keys_bnhk[rows_a1, new_at] = k
    pool.decays_bnhk[rows_a1, new_at] = g.to(pool.decays_bnhk.dtype)
    v, k, q = (expand_heads(x, h) for x in (v, k.to(dtype), q))
    y = torch.zeros(b, time, h, v.shape[-1], dtype=block.v_bthv.dtype, device=v.device)
    for t in range(time):
        state = g[:, t, :, :, None].exp() * state
        u = v[:, t]
        if rule.delta:
            u = u - (k[:, t, :, None] @ state).squeeze(2)
        if block.beta_bth is not None:
            u = block.beta_bth[active, t].to(dtype)[..., None] * u
        u = u.to(pool.values_bnhv.dtype)
        pool.values_bnhv[rows, new_at[:, t]] = u
        state = state + k[:, t, :, :, None] * u.to(dtype)[:, :, None]
        y_ahv = (q[:, t, :, None] @ state).squeeze(2)
        if weights.skip_h is not None:
            y_ahv = y_ahv + weights.skip_h.to(dtype)[:, None] * v[:, t]
        y[active, t] = y_ahv.to(y.dtype)
    return y


def _inputs(
    block: Block,
    pool: DecodeState,
    rule: Rule,
    weights: Weights,
    active: Tensor,
    rows: Tensor,
    start: Tensor,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Values, keys and queries behind convolution, activation and norm; their inputs go into the ring."""
    parts = [x[active] for x in (block.v_bthv, block.k_bthk, block.q_bthk)]
    mixed = [x.to(dtype) for x in parts]
    if weights.conv_dw is not None:
        raw_btd = torch.cat([x.flatten(2) for x in parts], dim=-1)
        history_bdw = pool.conv(rows, start, weights.conv_dw.shape[1])
        bias_d = None if weights.bias_d is None else weights.bias_d.to(dtype)
        y_btd = short_conv.parallel(raw_btd.to(dtype), weights.conv_dw.to(dtype), bias_d, history_bdw)
        sizes = [x.shape[2] * x.shape[3] for x in parts]
        mixed = [y.unflatten(-1, x.shape[2:]) for y, x in zip(y_btd.split(sizes, dim=-1), parts, strict=True)]
        at = start[:, None] + torch.arange(raw_btd.shape[1], device=start.device)
        if pool.inputs_brd.shape[1]:
            pool.inputs_brd[rows[:, None], at % pool.inputs_brd.shape[1]] = raw_btd.to(pool.inputs_brd.dtype)
    if rule.activation == "silu":
        mixed = [F.silu(x) for x in mixed]
    v, k, q = mixed
    if rule.l2_eps is not None:
        k, q = norm.l2(k, rule.l2_eps), norm.l2(q, rule.l2_eps)
    return [v, k, q * rule.scale]
