"""What a token stream gives at each step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from subquad.core.transfer import sent


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
        """The batch on `device`, and nobody waits for it."""
        return Batch(sent(self.tokens_bt, device), None if self.wanted_bt is None else sent(self.wanted_bt, device))
