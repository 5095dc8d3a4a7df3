"""A trained head on the model's own stream guesses for it: one block a guess."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from subquad.core.card import Card
from subquad.core.errors import ConfigError
from subquad.core.layout import Layout
from subquad.core.state import State, axes
from subquad.engine.draft import Draft, Drafter, take_options
from subquad.engine.model_draft import Guessable, draw, last
from subquad.engine.sampler import History, Sampler
from subquad.models.draft_head import Head, HeadConfig, load_head, untrained
from subquad.models.stack import Stack
from subquad.ops.ring import RingState
from subquad.ops.window import WindowState

CARD = Card(
    title="EAGLE: Speculative Sampling Requires Rethinking Feature Uncertainty",
    entry="DraftHead",
    arxiv="2401.15077",
    needs="a head trained for the model (subquad draft --head): minutes on a GPU",
    gives="guesses at the price of one block each, out of the model's own stream, with no second model to find",
    status="incubating",
    claim="2.7 to 3.5 times lower latency for LLaMA2-Chat 70B at twice the throughput, same distribution",
    measured="not reproduced",
    constant_state=True,
    examples={"window": {"window": "6"}, "coupled": {"window": "3", "coupled": "true"}},
)


# Pairs of a read that are usual: what stood since the last one, or guesses.
FEW_PAIRS = 16


@dataclass(frozen=True)
class HeadState(State):
    """The pairs that each row's head has read, and what stands for the model's stream at the last token."""

    block: WindowState | RingState = axes("b")
    stream_bd: Tensor = axes("b d")


class DraftHead(Drafter):
    """A head as drafter; see `subquad.models.draft_head.Head`.

    All that `observe` is told is read at once, for in a round there is little of it and one block is cheap; the first
    guess of the next round is then at hand, and every further one is a read of the guesses before it, which is
    forgotten.

    The head begins anew behind every prompt, for a drafter is told the prompt's tokens but not the model's stream over
    them. So there is no guess for a row's first token, and what the prompt says reaches the head through the stream
    alone; it is trained to begin so.

    Args:
        head: what was trained, or how many pairs the attention of an untrained one sees.
        coupled: as in `subquad.engine.model_draft.draw`.

    Example:
        >>> from subquad.engine.generate import generate
        >>> generate(model, prompts, drafter=DraftHead(load_head("head")))  # doctest: +SKIP
    """

    always = True

    def __init__(self, head: Head | int, *, coupled: bool = False) -> None:
        self.head, self.coupled = head, coupled

    @classmethod
    def build(cls, options: Mapping[str, str], models: Callable[[str], Stack]) -> Self:
        """Options: ``path`` of a trained head, or ``window=N`` of an untrained one, and ``coupled=true``."""
        take_options("draft_head", options, ("path", "window", "coupled"))
        coupled, window = options.get("coupled", "false"), options.get("window", "1")
        if ("path" in options) == ("window" in options) or coupled not in ("true", "false") or not window.isdecimal():
            raise ConfigError(
                "draft_head: expected path=FOLDER, or window=N for an untrained head, and coupled=true or false, got "
                f"{dict(options)}; write draft_head,path=FOLDER with what subquad draft --head wrote"
            )
        return cls(load_head(options["path"]) if "path" in options else int(window), coupled=coupled == "true")

    def open(self, target: Stack, rows: int, capacity: int) -> None:
        """Put the head beside `target`, in its dtype; see `Drafter.open`."""
        if isinstance(self.head, Head):
            self.head.config.check(target.config)
            head = copy.deepcopy(self.head)
        else:
            head = untrained(HeadConfig.like(target.config, self.head))
        self._target, self._head = target, head.to(target.device, target.dtype).requires_grad_(False)
        self._guessable = Guessable(target, head.ids_m.tolist() or None)
        stream_bd = torch.zeros(rows, head.config.d_model, device=target.device, dtype=target.dtype)
        self._pool = HeadState(self._head.init_pool(rows, FEW_PAIRS), stream_bd)

    def prepare(self, rows: int, k: int) -> None:
        """Nothing; see `Drafter.prepare`."""

    @torch.no_grad()
    def put(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """Forget; see `Drafter.put`."""
        self._pool.clear_(torch.tensor(rows, device=self._target.device))

    @torch.no_grad()
    def propose(self, rows: int, k: int, sampler: Sampler, history: History) -> Draft:
        """k - 1 reads of guesses, and none for rows that nothing was drawn for yet; see `Drafter.propose`."""
        pool = self._pool.first(rows)
        streams = [pool.stream_bd]

        def logits(guesses: Sequence[Tensor]) -> Tensor:
            if guesses:
                layout = Layout.dense(rows, len(guesses), start_b=pool.block.seen_b)
                pairs = (torch.stack(streams, dim=1), torch.stack(list(guesses), dim=1))
                stream_btd, _ = self._head.read(self._target, *pairs, pool.block, layout)
                streams.append(stream_btd[:, -1])
            return self._guessable.logits(streams[-1])

        draft = draw(k, logits, sampler, history, coupled=self.coupled)
        return Draft(draft.tokens_bk, draft.length_b * (pool.block.seen_b > 0), draft.q_bkv)

    @torch.no_grad()
    def observe(self, tokens_bt: Tensor, n_b: Tensor, hidden_btd: Tensor) -> None:
        """Read the pairs that stand; see `Drafter.observe`."""
        rows, t = tokens_bt.shape
        pool = self._pool.first(rows)
        layout = Layout.ragged(n_b, t, start_b=pool.block.seen_b)
        stream_btd, update = self._head.read(self._target, hidden_btd, tokens_bt, pool.block, layout)
        pool.stream_bd.copy_(torch.where(n_b[:, None] > 0, last(stream_btd, n_b), pool.stream_bd))
        update.commit_(pool.block, None, n_b)

    @torch.no_grad()
    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """The state; see `Drafter.move`."""
        at, to = (torch.tensor(slots, device=self._target.device) for slots in (sources, targets))
        self._pool.write_(to, self._pool.select(at))
