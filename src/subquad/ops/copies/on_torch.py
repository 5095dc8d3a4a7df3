"""Copies in PyTorch, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# An odd number without structure, whose powers weigh the tokens of a run (a polynomial hash, modulo 2**64).
BASE = 0x5851F42D4C957F2D
# Which of its bits name a bucket.
HIGH, LOW = 31, 11


def refusal(*tensors: Tensor) -> str | None:
    """None: it takes everything."""
    return None


def bucket(runs_btg: Tensor, buckets: int) -> Tensor:
    """The bucket ``[b, t]`` of each run, of `buckets`, a power of two."""
    h_bt = torch.zeros_like(runs_btg[..., 0])
    for token_bt in runs_btg.unbind(-1):
        h_bt = (h_bt + token_bt + 1) * BASE
    return (h_bt >> HIGH ^ h_bt >> LOW) & buckets - 1


def _read(tokens_bn: Tensor, at_bt: Tensor) -> Tensor:
    return tokens_bn.gather(1, at_bt.clamp(0, tokens_bn.shape[1] - 1))


def _runs(tokens_bn: Tensor, end_bt: Tensor, gamma: int) -> Tensor:
    """The `gamma` tokens before each position, ``[b, t, gamma]``."""
    b, t = end_bt.shape
    at_btg = end_bt[..., None] - gamma + torch.arange(gamma, device=end_bt.device)
    return _read(tokens_bn, at_btg.flatten(1)).view(b, t, gamma)


def find(
    tokens_bn: Tensor, length_b: Tensor, table_gbm: Tensor, gammas: Sequence[int], k: int, stretch: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`subquad.ops.copies.find`."""
    end_b1 = length_b[:, None]
    from_b1 = torch.full_like(end_b1, -1)
    for table_bm, gamma in zip(table_gbm, gammas, strict=True):
        last_b1g = _runs(tokens_bn, end_b1, gamma)
        found_b1 = table_bm.gather(1, bucket(last_b1g, table_bm.shape[1] - 1))
        same_b1 = (_runs(tokens_bn, found_b1.clamp(min=0), gamma) == last_b1g).all(-1)
        there_b1 = same_b1 & (found_b1 >= gamma) & (end_b1 >= gamma) & (from_b1 < 0)
        from_b1 = torch.where(there_b1, found_b1, from_b1)
    found_b1 = from_b1 >= 0
    period_b1 = torch.where(found_b1, end_b1 - from_b1, 1)
    columns_k = torch.arange(k, device=end_b1.device)
    tokens_bk = _read(tokens_bn, from_b1 + columns_k % period_b1)
    # No more than k agree: so many have a ground for all.
    before_bk = from_b1 - 1 - columns_k
    alike_bk = (_read(tokens_bn, before_bk) == _read(tokens_bn, end_b1 - 1 - columns_k)) & (before_bk >= 0)
    grounded_b = (stretch * alike_bk.to(torch.int64).cumprod(1).sum(1)).clamp(max=k)
    return tokens_bk, torch.where(found_b1, k, 0)[:, 0], grounded_b


def enter_(
    tokens_bn: Tensor, length_b: Tensor, table_gbm: Tensor, gammas: Sequence[int], new_bt: Tensor, n_b: Tensor
) -> None:
    """`subquad.ops.copies.enter_`."""
    columns_t = torch.arange(new_bt.shape[1], device=new_bt.device)
    ends_bt = length_b[:, None] + columns_t
    kept_bt = columns_t < n_b[:, None]
    tokens_bn.scatter_(1, torch.where(kept_bt, ends_bt, tokens_bn.shape[1] - 1), new_bt)
    length_b.add_(n_b)
    for table_bm, gamma in zip(table_gbm, gammas, strict=True):
        none = table_bm.shape[1] - 1
        bucket_bt = torch.where(kept_bt & (ends_bt >= gamma), bucket(_runs(tokens_bn, ends_bt, gamma), none), none)
        table_bm.scatter_reduce_(1, bucket_bt, ends_bt, "amax")
