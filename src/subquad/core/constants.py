"""Tensors that never change and cost a launch or more to make: made once, and kept for every later call."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

# So many numbers are made once: in a round of decoding each would be a launch. Longer blocks have better to do.
FEW = 64

_made: dict[Hashable, Any] = {}


def constant(key: Hashable, device: torch.device, make: Callable[[], T]) -> T:
    """What ``make()`` returned at the first call with `key`: nobody may write into its tensors.

    Kept for the life of the process, so keys must be few. A compiled region makes its own, and so does a CUDA graph
    that is being captured, whose memory is used again; what is no plain tensor is nothing to keep either.

    Args:
        key: names what is made, and everything it depends on, the device included.
        device: where it lies.
        make: makes a tensor, or a tuple with tensors.
    """
    # Where tensors are imagined (`FakeTensorMode`), so must these be.
    if torch.compiler.is_compiling() or type(torch.empty(0, device=device)) is not Tensor:
        return make()
    if key in _made:
        return _made[key]
    made = make()
    captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    tensors = [x for x in (made if isinstance(made, tuple) else (made,)) if isinstance(x, Tensor)]
    if not captured and all(type(x) is Tensor for x in tensors):
        _made[key] = made
    return made


def counted(n: int, device: torch.device) -> Tensor:
    """``0, 1, ..., n - 1``, int64."""
    if n > FEW:
        return torch.arange(n, device=device)
    return constant(("counted", device), device, lambda: torch.arange(FEW, device=device))[:n]


def ones(n: int, device: torch.device) -> Tensor:
    """As many ones, int64."""
    if n > FEW:
        return torch.ones(n, dtype=torch.int64, device=device)
    return constant(("ones", device), device, lambda: torch.ones(FEW, dtype=torch.int64, device=device))[:n]
