"""Noise that is a function of a row's seed and step: there is no generator to carry along."""

from __future__ import annotations

import torch
from torch import Tensor

# Two multipliers of SplitMix64's finaliser, and the increment of its sequence (doi 10.1145/2660193.2660195), as the
# signed integers of the same bits.
MIX1, MIX2, GOLDEN = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15, -0x61C8864680B583EB


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64, a bijection of 64 bits (mix64 variant 13)."""
    x = (x ^ (x >> 30 & 0x3FFFFFFFF)) * MIX1
    x = (x ^ (x >> 27 & 0x1FFFFFFFFF)) * MIX2
    return x ^ (x >> 31 & 0x1FFFFFFFF)


def _bits(seed_b: Tensor, step_b: Tensor, token_m: Tensor, stream: int) -> Tensor:
    key_b = _mix(_mix(seed_b + GOLDEN) + step_b * GOLDEN)
    if stream:
        key_b = _mix(key_b + stream)
    return _mix(key_b[:, None] + (token_m + 1) * GOLDEN)


def gumbel(seed_b: Tensor, step_b: Tensor, vocab_size: int, stream: int = 0) -> Tensor:
    """Standard Gumbel noise ``[b, v]`` in float32, a function of each row's seed and step, and the token.

    A row draws the same in any batch and after any interruption. The bits are the same on every device, their
    logarithms up to rounding.

    Args:
        seed_b: int64 seeds.
        step_b: int64, number of tokens already drawn.
        vocab_size: v.
        stream: noises of different streams are independent.
    """
    return gumbel_of(seed_b, step_b, torch.arange(vocab_size, device=seed_b.device), stream)


def gumbel_of(seed_b: Tensor, step_b: Tensor, token_m: Tensor, stream: int) -> Tensor:
    """`gumbel` of some tokens alone, ``[b, m]``."""
    # The uniform is never 0, and finest near 0, where log1p turns it into the exponentials that win; nor is it ever
    # rounded to 1, where the noise would be minus infinity and a token that is certain could lose.
    bits_bm = (_bits(seed_b, step_b, token_m, stream) >> 11 & 0x1FFFFFFFFFFFFF) | 1
    uniform_bm = (bits_bm.to(torch.float32) * 2.0**-53).clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform_bm))


def uniform(seed_b: Tensor, step_b: Tensor, stream: int) -> Tensor:
    """`subquad.ops.draw.uniform`."""
    first_1 = torch.zeros(1, dtype=torch.int64, device=seed_b.device)
    return (_bits(seed_b, step_b, first_1, stream)[:, 0] >> 40 & 0xFFFFFF).to(torch.float32) * 2.0**-24
