"""A trained head on the model's own stream guesses for it: one block a guess."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Self

import torch
from torch import Tensor

from subquad.core.card import Card
from subquad.core.layout import Layout
from subquad.engine.draft import Draft
from subquad.engine.head_draft import HeadDrafter, take_head
from subquad.engine.history import History
from subquad.engine.model_draft import draw
from subquad.engine.sampler import Sampler
from subquad.models.draft_head import Head
from subquad.models.stack import Stack

CARD = Card(
    title="EAGLE: Speculative Sampling Requires Rethinking Feature Uncertainty",
    entry="DraftHead",
    arxiv="2401.15077",
    needs="a head trained for the model (subquad draft --head): minutes on a GPU",
    gives="guesses at the price of one block each, out of the model's own stream, with no second model to find",
    status="incubating",
    claim="2.7 to 3.5 times lower latency for LLaMA2-Chat 70B at twice the throughput, same distribution",
    measured="1.63 times plain greedy decoding of SmolLM2-135M at batch 1, 1.96 of its hybrid, one H100",
    result="spec.draft_head.h100.json",
    constant_state=True,
    examples={"window": {"window": "6"}, "coupled": {"window": "3", "coupled": "true"}},
)


class DraftHead(HeadDrafter):
    """A head as drafter; see `HeadDrafter`.

    Every guess but the first is a read of the one before it, behind those before that, and all are forgotten.

    Args:
        head, coupled: as in `HeadDrafter`.

    Example:
        >>> from subquad.engine.generate import generate
        >>> generate(model, prompts, drafter=DraftHead(load_head("head")))  # doctest: +SKIP
    """

    slug, kind = "draft_head", Head

    def __init__(self, head: Head | int, *, coupled: bool = False) -> None:
        super().__init__(head, coupled=coupled)

    @classmethod
    def build(cls, options: Mapping[str, str], models: Callable[[str], Stack]) -> Self:
        """Options: ``path`` of a trained head, or ``window=N`` of an untrained one, and ``coupled=true``."""
        head, coupled = take_head(cls.slug, options)
        return cls(head, coupled=coupled)

    @torch.no_grad()
    def propose(self, rows: int, k: int, sampler: Sampler, history: History) -> Draft:
        """k - 1 reads of guesses, and none for rows that nothing was drawn for yet; see `Drafter.propose`."""
        pool = self._pool.first(rows)
        steps = Layout.steps(pool.block.seen_b, k - 1) if k > 1 else []
        stream_b1d, state = pool.stream_bd[:, None], pool.block

        def few(guesses_bi: Tensor) -> Tensor:
            nonlocal stream_b1d, state
            if ahead := guesses_bi.shape[1]:
                pair = stream_b1d, guesses_bi[:, -1:]
                stream_b1d, update = self._head.read(self._target, *pair, state, steps[ahead - 1])
                if ahead < len(steps):
                    state = self._head.behind(update, ahead, steps[ahead])
            return self._guessable.few(stream_b1d[:, 0])

        return draw(self._asked(pool, k), k, few, self._guessable, sampler, history, coupled=self.coupled)
