"""Log-probabilities under the model itself: of the tokens that came, and of the likeliest ones at their places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

MOST_TOP = 20
"""Most of the likeliest tokens that a request may ask for. Whoever asks for any has a round note so many."""


class Scored(NamedTuple):
    """What one slot asked for, of each token that it was given: empty where it asked for nothing.

    Attributes:
        own: the token's log-probability.
        top: the likeliest tokens with theirs, likeliest first.
    """

    own: list[float]
    top: list[list[tuple[int, float]]]


class Scores:
    """What the slots of an engine ask for, and fixed buffers for it, which are made when someone first asks.

    Args:
        rows: slots.
        width: most tokens of a slot between two looks.
        vocab_size: v.
        device: of the model.

    Attributes:
        level: how many of the likeliest tokens rounds note beside the token's own score; None where no slot asks for
            any. Rounds of another level do other work.
    """

    def __init__(self, rows: int, width: int, vocab_size: int, device: torch.device) -> None:
        self.rows, self.width, self.most, self.device = rows, width, min(MOST_TOP, vocab_size), device
        self.level: int | None = None
        self._asked: list[int | None] = [None] * rows
        # The last column is for what is given to nobody.
        self._own_bn: Tensor | None = None
        self._token_bnk: Tensor | None = None
        self._top_bnk: Tensor | None = None

    def put(self, slots: Sequence[int], asked: Sequence[int | None]) -> None:
        """From now on `slots` ask for their tokens' scores and so many likeliest ones, or for nothing."""
        for slot, k in zip(slots, asked, strict=True):
            self._asked[slot] = k
        wanted = [k for k in self._asked if k is not None]
        self.level = None if not wanted else self.most if any(wanted) else 0
        if self.level is not None and self._own_bn is None:
            self._own_bn = torch.zeros(self.rows, self.width + 1, device=self.device)
        if self.level and self._token_bnk is None:
            shape = (self.rows, self.width + 1, self.most)
            self._token_bnk = torch.zeros(shape, dtype=torch.int64, device=self.device)
            self._top_bnk = torch.zeros(shape, device=self.device)

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """What `sources` ask for the slots `targets` ask from now on."""
        asked = [self._asked[slot] for slot in sources]
        self.put([*targets, *sources], [*asked, *[None] * len(sources)])

    def note(self, tokens_bt: Tensor, kept_b: Tensor, logits_btv: Tensor, fill_b: Tensor) -> None:
        """Score the first `kept_b` tokens of the first slots, behind the `fill_b` that are there, if any slot asks.

        Args:
            tokens_bt: what was chosen; below 0 is no token, and its score is of no use.
            logits_btv: the model's own, behind which they were chosen.
        """
        if self.level is None or self._own_bn is None:
            return
        b, t = tokens_bt.shape
        columns_t = torch.arange(t, device=tokens_bt.device)
        at_bt = torch.where(columns_t < kept_b[:, None], fill_b[:, None] + columns_t, self.width)
        own_btv = logits_btv.float()
        sum_bt1 = own_btv.logsumexp(-1, keepdim=True)
        own_bt1 = own_btv.gather(2, tokens_bt.clamp(min=0)[..., None]) - sum_bt1
        self._own_bn[:b].scatter_(1, at_bt, own_bt1[..., 0])
        if self.level and self._token_bnk is not None and self._top_bnk is not None:
            top_btk, token_btk = own_btv.topk(self.level, dim=-1)
            at_btk = at_bt[..., None].expand_as(token_btk)
            self._token_bnk[:b].scatter_(1, at_btk, token_btk)
            self._top_bnk[:b].scatter_(1, at_btk, top_btk - sum_bt1)

    def take(self, fills: Sequence[int]) -> list[Scored]:
        """What was noted for the first slots, of which each was given so many tokens."""
        scored = [Scored([], []) for _ in fills]
        asking = [slot for slot, fill in enumerate(fills) if fill and self._asked[slot] is not None]
        if not asking or self._own_bn is None:
            return scored
        most = max(fills[slot] for slot in asking)
        for slot, own in zip(asking, self._rows(self._own_bn, asking, most), strict=True):
            scored[slot].own.extend(own[: fills[slot]])
        asking = [slot for slot in asking if self._asked[slot]]
        if not asking or self._token_bnk is None or self._top_bnk is None:
            return scored
        found = (self._rows(buffer, asking, most) for buffer in (self._token_bnk, self._top_bnk))
        for slot, tokens, scores in zip(asking, *found, strict=True):
            k = self._asked[slot]
            for some, theirs in zip(tokens[: fills[slot]], scores[: fills[slot]], strict=True):
                scored[slot].top.append(list(zip(some[:k], theirs[:k], strict=True)))
        return scored

    def _rows(self, buffer: Tensor, slots: Sequence[int], most: int) -> list[Any]:
        return buffer[torch.tensor(slots, device=self.device), :most].tolist()
