"""A trained head on the model's own stream as drafter: it reads the pairs that stood, whatever way it guesses."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from subquad.core.constants import ones
from subquad.core.errors import ConfigError
from subquad.core.layout import Layout
from subquad.core.state import State, axes
from subquad.engine.draft import Drafter, take_options
from subquad.engine.model_draft import Guessable
from subquad.models.draft_head import Head, load_head, untrained
from subquad.models.head_config import HeadConfig
from subquad.models.stack import Stack
from subquad.ops.ring import RingState
from subquad.ops.slots import keep_last_
from subquad.ops.window import WindowState

# Pairs of a read that are usual: what stood since the last one, or guesses.
FEW_PAIRS = 16


@dataclass(frozen=True)
class HeadState(State):
    """The pairs that each row's head has read, and what stands for the model's stream at the last token."""

    block: WindowState | RingState = axes("b")
    stream_bd: Tensor = axes("b d")


class HeadDrafter(Drafter):
    """What drafters with a head have in common; see `subquad.models.draft_head.Head`.

    All that `observe` is told is read at once, for in a round there is little of it and one block is cheap; the first
    guess of the next round is then at hand.

    It reads the prompt as the model does, so that it guesses from the first token on. Where the model did not read it
    all, since its beginning was known, the head begins behind that; it is trained to begin anywhere.

    Args:
        head: what was trained, or how many pairs the attention of an untrained one sees.
        guesses: of one read of an untrained one.
        coupled: as in `subquad.engine.model_draft.draw`.

    Attributes:
        slug: of the drafter.
        kind: of its head.

    Raises:
        ConfigError: a head of another kind.
    """

    always = True
    hears = True
    slug: ClassVar[str]
    kind: ClassVar[type[Head]]

    def __init__(self, head: Head | int, *, guesses: int = 1, coupled: bool = False) -> None:
        if isinstance(head, Head) and type(head) is not self.kind:
            raise ConfigError(
                f"{self.slug}: expected a head that guesses {'one token' if self.kind is Head else 'several tokens'} "
                f"in a read, got {head.config.guesses}; take another, or draft with "
                f"{'gad' if head.config.guesses > 1 else 'draft_head'}"
            )
        self.head, self.guesses, self.coupled = head, guesses, coupled

    def open(self, target: Stack, rows: int, capacity: int) -> None:
        """Put the head beside `target`, in its dtype; see `Drafter.open`."""
        if isinstance(self.head, Head):
            self.head.config.check(target.config)
            head = copy.deepcopy(self.head)
        else:
            head = untrained(HeadConfig.like(target.config, self.head, guesses=self.guesses))
        self.aux_layers = head.config.aux_layers
        self._target, self._head = target, head.to(target.device, target.dtype).requires_grad_(False)
        self._guessable = Guessable(target, head.ids_m.tolist() or None)
        stream_bd = torch.zeros(rows, head.config.d_model, device=target.device, dtype=target.dtype)
        self._pool = HeadState(self._head.init_pool(rows, max(FEW_PAIRS, head.config.guesses)), stream_bd)

    def prepare(self, rows: int, k: int) -> None:
        """Nothing; see `Drafter.prepare`."""

    def put(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """Nothing; see `Drafter.put`."""

    @torch.no_grad()
    def drop(self, rows: Sequence[int]) -> None:
        """Begin anew; see `Drafter.drop`."""
        self._pool.clear_(torch.tensor(rows, device=self._target.device))

    @torch.no_grad()
    def hear(self, rows: Sequence[int], tokens_bt: Tensor, n_b: Tensor, hidden_btd: Tensor) -> None:
        """Read the pairs of a piece; see `Drafter.hear`."""
        at = torch.tensor(rows, device=self._target.device)
        block = self._pool.block.select(at).settled()
        layout = Layout.ragged(n_b, tokens_bt.shape[1], start_b=block.seen_b)
        stream_btd, update = self._head.read(self._target, self._head.fused(hidden_btd), tokens_bt, block, layout)
        last_bd = self._pool.stream_bd[at]
        keep_last_(last_bd, stream_btd, n_b)
        self._pool.stream_bd[at] = last_bd
        update.commit_(self._pool.block, at, n_b)

    @torch.no_grad()
    def observe(self, tokens_bt: Tensor, n_b: Tensor, hidden_btd: Tensor) -> None:
        """Read the pairs that stand; see `Drafter.observe`."""
        rows, t = tokens_bt.shape
        pool = self._pool.first(rows)
        layout = Layout.ragged(n_b, t, start_b=pool.block.seen_b)
        stream_btd, update = self._head.read(self._target, self._head.fused(hidden_btd), tokens_bt, pool.block, layout)
        keep_last_(pool.stream_bd, stream_btd, n_b)
        update.commit_(pool.block, None, n_b)

    def _asked(self, pool: HeadState, k: int) -> Tensor:
        """How many guesses of `k` count: none for rows that nothing was drawn for yet."""
        # In one launch: as many of k ones as are no more than the pairs seen.
        return torch.bucketize(pool.block.seen_b, ones(k, pool.block.seen_b.device), right=True)

    @torch.no_grad()
    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """The state; see `Drafter.move`."""
        at, to = (torch.tensor(slots, device=self._target.device) for slots in (sources, targets))
        self._pool.write_(to, self._pool.select(at))


def take_head(slug: str, options: Mapping[str, str], *more: str) -> tuple[Head | int, bool]:
    """What ``path`` of a trained head or ``window=N`` of an untrained one names, and whether ``coupled=true``.

    Args:
        slug: of the drafter.
        options: as in `Drafter.build`.
        more: options that the drafter knows beside these.

    Raises:
        ConfigError: an unknown option, or a value that can't be.
        CheckpointError: as in `load_head`.
    """
    take_options(slug, options, ("path", "window", "coupled", *more))
    coupled, window = options.get("coupled", "false"), options.get("window", "1")
    if ("path" in options) == ("window" in options) or coupled not in ("true", "false") or not window.isdecimal():
        raise ConfigError(
            f"{slug}: expected path=FOLDER, or window=N for an untrained head, and coupled=true or false, got "
            f"{dict(options)}; write {slug},path=FOLDER with what subquad draft --head wrote"
        )
    return load_head(options["path"]) if "path" in options else int(window), coupled == "true"
