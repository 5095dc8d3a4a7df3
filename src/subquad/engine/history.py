"""What is known of each row's past tokens: how many, which, how often, and in which order, as far as somebody asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from subquad.core.state import State, axes


@dataclass(frozen=True)
class History(State):
    """What the processors and the noise know of each row's past.

    v is 0 where no row has a penalty, n where no row forbids tokens for those that came just before. What lies beyond
    a row's length in `text_bn` says nothing, and its last column takes what goes beyond all bounds.
    """

    step_b: Tensor = axes("b", precision="index")
    prompt_bv: Tensor = axes("b v", precision="index")
    count_bv: Tensor = axes("b v", precision="index")
    text_bn: Tensor = axes("b n", precision="index")
    length_b: Tensor = axes("b", precision="index")

    @staticmethod
    def start(
        prompts: Sequence[Sequence[int]], vocab_size: int, device: torch.device | str | None = None, tokens: int = 0
    ) -> History:
        """Of rows that have produced nothing yet.

        Args:
            prompts: one a row.
            vocab_size: v; 0 where nothing is penalised.
            device: of the tensors.
            tokens: most of a row behind which another is drawn; 0 where nobody reads them.
        """
        rows = len(prompts)
        prompt_bv = torch.zeros(rows, vocab_size, dtype=torch.bool)
        text_bn = torch.zeros(rows, tokens + 1 if tokens else 0, dtype=torch.int64)
        for row, prompt in enumerate(prompts if vocab_size or tokens else ()):
            ids = torch.tensor(prompt)
            if vocab_size:
                prompt_bv[row, ids] = True
            if tokens:
                text_bn[row, : len(ids)] = ids
        return History(
            torch.zeros(rows, dtype=torch.int64, device=device),
            prompt_bv.to(device),
            torch.zeros(rows, vocab_size, dtype=torch.int32, device=device),
            text_bn.to(device),
            torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int64, device=device),
        )

    @property
    def room(self) -> tuple[int, int]:
        """The ``vocab_size`` and ``tokens`` of `start`."""
        return self.count_bv.shape[1], max(self.text_bn.shape[1] - 1, 0)

    def recall_(self, rows: Tensor, other: History) -> None:
        """Overwrite `rows` in place with `other`'s, as far as both have the same room."""
        for (_, mine), (_, theirs) in zip(self.tensors(), other.tensors(), strict=True):
            if mine.shape[1:] == theirs.shape[1:]:
                mine.index_copy_(0, rows, theirs)

    def observe_(self, tokens_b: Tensor, n_b: Tensor) -> None:
        """Count `tokens_b` in place where `n_b` is 1, and not where it is 0."""
        self.step_b.add_(n_b)
        self._note_(tokens_b, n_b)

    def _note_(self, tokens_b: Tensor, n_b: Tensor) -> None:
        if self.count_bv.shape[1]:
            self.count_bv.scatter_add_(1, tokens_b[:, None], n_b[:, None].to(self.count_bv.dtype))
        if self.text_bn.shape[1]:
            self.text_bn.scatter_(1, self._end(), tokens_b[:, None])
            self.length_b.add_(n_b)

    def observe_block_(self, tokens_bt: Tensor, n_b: Tensor) -> None:
        """Note the first `n_b` of each row's tokens in place; how many, `step_b`, is counted by who gives them."""
        for i in range(tokens_bt.shape[1] if self.room != (0, 0) else 0):
            self._note_(tokens_bt[:, i], (n_b > i).to(torch.int64))

    def after(self, tokens_b: Tensor) -> History:
        """The history if every row went on with `tokens_b`; this one stays as it is."""
        count_bv, text_bn, length_b = self.count_bv, self.text_bn, self.length_b
        if count_bv.shape[1]:
            count_bv = count_bv.scatter_add(1, tokens_b[:, None], torch.ones_like(count_bv[:, :1]))
        if text_bn.shape[1]:
            text_bn, length_b = text_bn.scatter(1, self._end(), tokens_b[:, None]), length_b + 1
        return History(self.step_b + 1, self.prompt_bv, count_bv, text_bn, length_b)

    def _end(self) -> Tensor:
        """The column of each row's next token ``[b, 1]``."""
        return self.length_b.clamp(max=self.text_bn.shape[1] - 1)[:, None]
