"""What the Fourier way multiplies by: its transforms over tiles and within them, and what undoes their scales."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from subquad.core.constants import constant

# In some columns of the table few magnitudes repeat, 1 in tile 0, or cosines of odd eighths of pi in tile n / 4:
# there roundings to bfloat16 add up instead of cancelling. Of all factors this one lets them change a tile the least:
# by 1.6e-3, where the worst lets them by 7.8e-3.
FACTOR = 1.7333984375


class Plan(NamedTuple):
    """How a row is cut: `n` tiles of ``p x q`` tokens."""

    n: int
    p: int
    q: int


def scale(n: int) -> float:
    """The size of the table's entries: `FACTOR` by the power of two that comes nearest to ``1 / sqrt(n)``."""
    return FACTOR * 2.0 ** -round(math.log2(FACTOR * math.sqrt(n)))


def undone(n: int) -> float:
    """What is left to multiply by behind ``F^T F``; the filters' spectra are, in float32."""
    return 1 / (n * scale(n) ** 2)


def table(n: int, device: torch.device) -> Tensor:
    """``F``, ``[2n, n]``, float32: see `subquad.ops.flashconv.kernels_fourier`."""
    # Whole turns are taken off while the angle is an integer.
    f = torch.arange(n, device=device)
    angle = ((2 * f[:, None] + 1) * f % (4 * n)).double() * (math.pi / (2 * n))
    return (torch.stack((angle.cos(), angle.sin()), dim=1) * scale(n)).flatten(0, 1).float()


class Tables(NamedTuple):
    """What the kernels multiply by, see `subquad.ops.flashconv.kernels_fourier` and `kernels_spectrum`.

    Attributes:
        plan: how rows are cut.
        over_fn: ``F`` over tiles, in the dtype of operands.
        power, rest: what filters are multiplied by to undo the scales of all tables on the way there and back: a power
            of two before they are rounded, so that small ones stay normal numbers, and a factor near 1 behind.
        taps_fn: ``F`` in float32, times both.
        left, middle, right: within a tile, ``[n, 2, p, p]``, ``[n, 2, p, q]`` and ``[2, q, q]``, complex in real and
            imaginary parts, in the dtype of operands.
    """

    plan: Plan
    over_fn: Tensor
    power: float
    rest: float
    taps_fn: Tensor
    left: Tensor
    middle: Tensor
    right: Tensor

    @property
    def within(self) -> tuple[Tensor, Tensor, Tensor]:
        """Those of a tile, as kernels take them."""
        return self.left, self.middle, self.right

    @property
    def undone(self) -> float:
        """What values of filters are multiplied by to undo the scales on the way there and back."""
        return math.prod(undone(size) for size in self.plan)


def tables(cut: Plan, like: Tensor) -> Tables:
    """Those in the dtype of `like`; made once, since over short rows they are half of all."""
    dtype, device = like.dtype, like.device
    return constant(("flashconv", cut, dtype, device), device, lambda: _tables(cut, dtype, device))


def _tables(cut: Plan, dtype: torch.dtype, device: torch.device) -> Tables:
    n, p, q = cut
    exact_fn = table(n, device)
    f, row, column = (torch.arange(size, device=device) for size in cut)
    # Angles in parts of a turn, whole turns taken off while they are integers; theta_f turns by 2 f + 1 of them.
    parts = 4 * n * p * q
    theta_f11 = (2 * f + 1)[:, None, None]
    left_fkp = row[:, None] * row * (4 * n * q) + theta_f11 * q * row
    middle_fkq = row[:, None] * column * (4 * n) + theta_f11 * column
    right_ql = column[:, None] * column * (4 * n * p)

    def values(turned: Tensor, size: float) -> Tensor:
        angle = (turned % parts).double() * (2 * math.pi / parts)
        return (torch.stack((angle.cos(), angle.sin()), dim=-3) * size).to(dtype)

    # On their own way there, filters are scaled like all else.
    factor = math.prod(undone(size) / scale(size) for size in cut)
    power = 2.0 ** round(math.log2(factor))
    return Tables(
        cut, exact_fn.to(dtype), power, factor / power, exact_fn * factor,
        values(left_fkp, scale(p)), values(middle_fkq, 1), values(right_ql, scale(q)),
    )  # fmt: skip
