"""Linear layers over few tokens, as in decoding: one launch for all that read the same input, each weight read once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.ops import launch
from subquad.ops.backends import Backends
from subquad.ops.norm import add_rms

__all__ = ["glu", "project", "swiglu"]

_backends = Backends(__name__)

MOST_TOKENS = 16
MOST_OF_NARROW, NARROW = 320, 1024
"""More tokens than that are read by cuBLAS at less cost; of a narrow input more are still few."""
MOST_LAYERS = 6


def project(x_btd: Tensor, *layers: nn.Module, norm: nn.RMSNorm | None = None) -> tuple[Tensor, ...]:
    """What each of `layers` makes of the same input, side by side in one tensor ``[b, t, n]`` where it is one launch.

    Args:
        x_btd: the input.
        layers: linear layers; what is hooked, adapted or trained is called as it is.
        norm: what the layers read is this of the input, for a few tokens in the same launch.
    """
    if len(layers) > MOST_LAYERS or not _few(x_btd, *layers):
        x_btd = x_btd if norm is None else add_rms(x_btd, None, norm)[1]
        return tuple(layer(x_btd) for layer in layers)
    weights, biases = zip(*map(_parts, layers), strict=True)
    return _backends.choose(x_btd, *weights).project(x_btd, weights, biases, norm)


def glu(x_btd: Tensor, layer: nn.Module) -> Tensor:
    """``a * sigmoid(b)``, a and b the halves of what `layer` makes (arXiv 1612.08083), for a few tokens in one launch.

    Args:
        x_btd: the input.
        layer: a linear layer; one that is hooked, adapted or trained is called as it is.
    """
    if not _few(x_btd, layer):
        return F.glu(layer(x_btd))
    weight, bias = _parts(layer)
    return _backends.choose(x_btd, weight).glu(x_btd, weight, bias)


def swiglu(
    x_btd: Tensor, y_btd: Tensor, norm: nn.RMSNorm, gate: nn.Module, up: nn.Module, down: nn.Module
) -> Tensor | None:
    """``h + down(silu(gate(norm(h))) * up(norm(h)))`` with ``h = x + y``, or None where no kernel is faster at it.

    A block's second half (arXiv 2002.05202, equation 6) in three launches, for a few tokens in two.
    """
    if not _few(x_btd, gate, up, down) or y_btd.dtype != x_btd.dtype:
        return None
    layers = [_parts(layer) for layer in (gate, up, down)]
    chosen = _backends.choose(x_btd, norm.weight, *(weight for weight, _ in layers))
    return chosen.swiglu(x_btd, y_btd, norm, *layers)


def _few(x_btd: Tensor, *layers: nn.Module) -> bool:
    tokens = x_btd.shape[0] * x_btd.shape[1]
    narrow = x_btd.shape[2] <= NARROW and x_btd.element_size() <= 2
    most = MOST_OF_NARROW if narrow else MOST_TOKENS
    return (
        0 < tokens <= most
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(x_btd.device.type)
        and all(launch.untouched(layer, nn.Linear) and layer.weight.dtype == x_btd.dtype for layer in layers)
    )


def _parts(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    assert isinstance(layer, nn.Linear)
    return layer.weight, layer.bias
