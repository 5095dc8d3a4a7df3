"""A trained head on the model's own stream guesses a block of tokens in one read, none knowing the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.core.card import Card
from subquad.core.errors import ConfigError
from subquad.engine.draft import Draft
from subquad.engine.head_draft import HeadDrafter, take_head
from subquad.engine.history import History
from subquad.engine.model_draft import draw
from subquad.engine.sampler import Sampler
from subquad.models.draft_head import BlockHead, Head
from subquad.models.stack import Stack

CARD = Card(
    title="Speculative Decoding: Exploiting Speculative Execution for Accelerating Seq2seq Generation",
    entry="Gad",
    arxiv="2203.16487",
    needs="a block head trained for the model (subquad draft --head --guesses 8): minutes on a GPU",
    gives="a whole block of guesses for one read of one block of layers, however long it is",
    status="incubating",
    claim="around 5 times faster in translation and summarisation, at a quality comparable to beam search",
    measured="not reproduced",
    constant_state=True,
    examples={
        "block": {"window": "6", "guesses": "4"},
        "coupled": {"window": "3", "guesses": "2", "coupled": "true"},
    },
)


class Gad(HeadDrafter):
    """Generalised aggressive decoding: a block head as drafter; see `HeadDrafter`.

    A round reads the masks once, whatever k is. The distributions q_1, ..., q_k follow from the prefix alone, so no
    guess knows those before it. The verifier asks only that each was drawn from its q, and so is exact here too.

    Args:
        head, coupled: as in `HeadDrafter`.
        guesses: of an untrained head, at least 2. Where more are asked for there are as many as the head gives.

    Raises:
        ConfigError: a head of single guesses.

    Example:
        >>> from subquad.engine.generate import generate
        >>> generate(model, prompts, drafter=Gad(load_head("head")))  # doctest: +SKIP
    """

    slug, kind = "gad", BlockHead

    def __init__(self, head: Head | int, *, guesses: int = 8, coupled: bool = False) -> None:
        if guesses < 2:
            raise ConfigError(f"gad: expected at least 2 guesses in a read, got {guesses}; or draft with draft_head")
        super().__init__(head, guesses=guesses, coupled=coupled)

    @classmethod
    def build(cls, options: Mapping[str, str], models: Callable[[str], Stack]) -> Self:
        """Options: ``path`` of a trained head, or ``window=N,guesses=K`` of an untrained one, and ``coupled=true``."""
        head, coupled = take_head(cls.slug, options, "guesses")
        guesses = options.get("guesses", "8")
        if not guesses.isdecimal() or ("guesses" in options and "path" in options):
            raise ConfigError(
                f"gad: expected guesses=K of an untrained head alone, got {dict(options)}; a trained one has its own"
            )
        return cls(head, guesses=int(guesses), coupled=coupled)

    @torch.no_grad()
    def propose(self, rows: int, k: int, sampler: Sampler, history: History) -> Draft:
        """One read of k - 1 masks, and none for rows that nothing was drawn for yet; see `Drafter.propose`."""
        pool, head = self._pool.first(rows), cast("BlockHead", self._head)
        n = min(k, head.config.guesses)
        stream_bkd = head.ahead(self._target, pool.stream_bd, n, pool.block)
        few_bkm = self._guessable.few(stream_bkd.flatten(0, 1)).unflatten(0, (rows, n))

        def few(guesses_bi: Tensor) -> Tensor:
            return few_bkm[:, guesses_bi.shape[1]]

        draft = draw(self._asked(pool, n), n, few, self._guessable, sampler, history, coupled=self.coupled)
        # Columns of which none counts.
        tokens_bk = F.pad(draft.tokens_bk, (0, k - n))
        q_bkm = None if draft.q_bkm is None else F.pad(draft.q_bkm, (0, 0, 0, k - n))
        return replace(draft, tokens_bk=tokens_bk, q_bkm=q_bkm)
