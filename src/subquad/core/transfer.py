"""From the host to a device."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(x: Tensor, device: torch.device) -> Tensor:
    """`x` of the host on `device`, without waiting for what a GPU still has to do.

    A copy from memory that is not locked begins only once the GPU has done all before it.
    """
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)
