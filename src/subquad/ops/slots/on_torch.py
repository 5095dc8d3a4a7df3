"""The bookkeeping in PyTorch, on any device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from subquad.ops.slots import Slots


def refusal(*tensors: Tensor) -> str | None:
    """None: it takes everything."""
    return None


def lead(slots: Slots, tokens_bk: Tensor, length_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`subquad.ops.slots.lead`."""
    length_b = torch.minimum(length_b, (slots.left_b - 1).clamp(min=0)) * slots.alive_b
    return torch.cat((slots.last_b[:, None], tokens_bk), dim=1), 1 + length_b, length_b


def emit_(slots: Slots, step_b: Tensor, tokens_bt: Tensor, n_b: Tensor, length_b: Tensor) -> tuple[Tensor, Tensor]:
    """`subquad.ops.slots.emit_`."""
    t = tokens_bt.shape[1]
    columns_t = torch.arange(t, device=tokens_bt.device)
    ends_bt = (tokens_bt[..., None] == slots.ends_be[:, None]).any(-1) | (tokens_bt < 0)
    ends_bt = ends_bt & (columns_t < n_b[:, None])
    first_b = torch.where(ends_bt.any(1), ends_bt.to(torch.int64).argmax(1) + 1, t)
    given_b = torch.minimum(torch.minimum(n_b, first_b), slots.left_b) * slots.alive_b
    given_bt = columns_t < given_b[:, None]
    at_bt = torch.where(given_bt, slots.fill_b[:, None] + columns_t, slots.out_bn.shape[1] - 1)
    slots.out_bn.scatter_(1, at_bt, tokens_bt)
    tokens_bt = tokens_bt.clamp(min=0)
    last_b = tokens_bt.gather(1, (given_b - 1).clamp(min=0)[:, None])[:, 0]
    slots.last_b.copy_(torch.where(given_b > 0, last_b, slots.last_b))
    slots.fill_b.add_(given_b)
    step_b.add_(given_b)
    slots.left_b.sub_(given_b)
    slots.alive_b.mul_(~((ends_bt & given_bt).any(1) | (slots.left_b == 0)))
    slots.kept_b.add_(torch.minimum(n_b - 1, given_b))
    slots.judged_b.add_(torch.minimum(torch.minimum(length_b, n_b), given_b))
    slots.guessed_b.add_(length_b)
    return given_b, tokens_bt


def keep_last_(last_bd: Tensor, x_btd: Tensor, n_b: Tensor) -> None:
    """`subquad.ops.slots.keep_last_`."""
    at_b11 = (n_b - 1).clamp(min=0)[:, None, None].expand(-1, 1, x_btd.shape[2])
    last_bd.copy_(torch.where(n_b[:, None] > 0, x_btd.gather(1, at_b11)[:, 0], last_bd))
