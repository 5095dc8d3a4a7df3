"""Linear layers as they are written, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from subquad.ops import norm

Layer = tuple[Tensor, Tensor | None]


def refusal(*tensors: Tensor) -> str | None:
    """None: it takes everything."""
    return None


def project(
    x_btd: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], normed: nn.RMSNorm | None
) -> tuple[Tensor, ...]:
    """`subquad.ops.skinny.project`."""
    x_btd = x_btd if normed is None else norm.add_rms(x_btd, None, normed)[1]
    return tuple(F.linear(x_btd, weight, bias) for weight, bias in zip(weights, biases, strict=True))


def glu(x_btd: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`subquad.ops.skinny.glu`."""
    return F.glu(F.linear(x_btd, weight, bias))


def swiglu(x_btd: Tensor, y_btd: Tensor, normed: nn.RMSNorm, gate: Layer, up: Layer, down: Layer) -> Tensor:
    """`subquad.ops.skinny.swiglu`."""
    h_btd = x_btd + y_btd
    n_btd = normed(h_btd)
    return h_btd + F.linear(F.silu(F.linear(n_btd, *gate)) * F.linear(n_btd, *up), *down)
