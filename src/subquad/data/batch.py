"""What a token stream gives at each step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Sequences to train on.

    Attributes:
        tokens_bt: int64 ``[b, t]``, no column of it padding.
        wanted_bt: bool ``[b, t]``: whether the token at t counts as a label; None where every token does.
    """

    tokens_bt: Tensor
    wanted_bt: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`, copied to a GPU from pinned memory, so that nobody waits for it."""

        def move(x_bt: Tensor) -> Tensor:
            return (x_bt.pin_memory() if device.type == "cuda" else x_bt).to(device, non_blocking=True)

        return Batch(move(self.tokens_bt), None if self.wanted_bt is None else move(self.wanted_bt))
