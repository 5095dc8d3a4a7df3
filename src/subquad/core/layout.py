"""Layout: where the tokens of a block stand."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from subquad.core.constants import counted, ones
from subquad.core.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """Which columns of a block ``[b, t]`` are tokens, and where they stand.

    Rows are padded on the right: row ``i`` holds tokens in columns ``[0, lengths_b[i])``. What stands beyond is
    read by nobody and changes nothing; outputs there are finite and otherwise unspecified. (Left padding is turned
    into right padding at the door, by `from_mask`.)

    Attributes:
        lengths_b: int64 ``[b]``, number of tokens of each row.
        starts_bn: int64 ``[b, t / run]``, the position of the first of each `run` tokens that stand in succession. It
            may be a counter itself: what depends on it is made before that counts on.
        documents_bt: int64 ``[b, t]``, or None when a row is one document. Document 0 continues the incoming
            state; every later one starts from an empty state. Never decreases along a row.
        padded: False promises that every column is a token, without asking the device.
        fresh: True promises that the state before the block has seen nothing, likewise.
        kept_b: int64 ``[b]``, promises that exactly so many tokens of each row will be committed into the state that is
            read, and before it is read again: a mixer may then do so on the way. None promises nothing.
        run: 1 where `starts_bn` holds every position.
        part: a layout that this one is some rows of, and which, where `steps` made it: what is made of its positions
            is made for all at once.
    """

    lengths_b: Tensor
    starts_bn: Tensor
    documents_bt: Tensor | None = None
    padded: bool = True
    fresh: bool = False
    kept_b: Tensor | None = None
    run: int = 1
    # Of no value that is made of this one, as `dataclasses.replace` makes them.
    part: tuple[Layout, slice] | None = field(default=None, init=False, repr=False, compare=False)
    _made: dict[Hashable, Any] = field(default_factory=lambda: {}, init=False, repr=False, compare=False)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make()`` returned at the first call with `key`: all layers of a model share it.

        Args:
            key: names what is made, and everything it depends on beside this layout.
            make: makes it; must not depend on gradients.
        """
        if key in self._made:
            return self._made[key]
        made = make()
        # A compiled region keeps nothing: else its first call would run another way than the later ones, and what it
        # made may lie in memory that it uses again.
        if not torch.compiler.is_compiling():
            self._made[key] = made
        return made

    @property
    def shape(self) -> tuple[int, int]:
        """``(b, t)``."""
        b, n = self.starts_bn.shape
        return b, n * self.run

    @property
    def positions_bt(self) -> Tensor:
        """int64 ``[b, t]``: position of each token in its document, as the model's rotary embedding counts them."""
        if self.run == 1:
            return self.starts_bn
        steps_r = counted(self.run, self.starts_bn.device)
        return self.once("positions", lambda: (self.starts_bn[..., None] + steps_r).flatten(1))

    @property
    def valid_bt(self) -> Tensor:
        """bool ``[b, t]``: True where a token stands."""
        t, lengths_b = self.shape[1], self.lengths_b
        return self.once("valid", lambda: torch.arange(t, device=lengths_b.device) < lengths_b[:, None])

    @staticmethod
    def dense(
        batch: int,
        time: int,
        *,
        start_b: Tensor | int = 0,
        device: torch.device | str | None = None,
        kept_b: Tensor | None = None,
    ) -> Layout:
        """Every column a token; row ``i`` starts at position ``start_b[i]``."""
        if isinstance(start_b, Tensor) and time == 1:
            lengths_b = ones(batch, start_b.device)
        else:
            lengths_b = torch.full((batch,), time, device=start_b.device if isinstance(start_b, Tensor) else device)
        starts_bn, run = Layout._starts(batch, time, start_b, device)
        return Layout(lengths_b, starts_bn, padded=False, kept_b=kept_b, run=run)

    @staticmethod
    def steps(start_b: Tensor, count: int) -> list[Layout]:
        """`count` blocks of one token a row, one behind the other, from `start_b` on."""
        b, device = len(start_b), start_b.device
        positions_nb = start_b + counted(count, device)[:, None]
        lengths_n = ones(count * b, device)
        whole = Layout(lengths_n, positions_nb.view(-1, 1), padded=False)
        steps: list[Layout] = []
        for own in (slice(i * b, (i + 1) * b) for i in range(count)):
            steps.append(Layout(lengths_n[own], whole.positions_bt[own], padded=False))
            object.__setattr__(steps[-1], "part", (whole, own))
        return steps

    @staticmethod
    def _starts(batch: int, time: int, start_b: Tensor | int, device: torch.device | str | None) -> tuple[Tensor, int]:
        """`starts_bn` and `run`."""
        if isinstance(start_b, Tensor):
            return start_b[:, None].expand(batch, 1), time
        # Rows alike are one row in memory, and what is computed from them is computed once.
        return (torch.arange(time, device=device) + start_b).expand(batch, time), 1

    @staticmethod
    def ragged(lengths_b: Tensor, time: int, *, start_b: Tensor | int = 0) -> Layout:
        """Right-padded rows of `lengths_b` tokens in `time` columns, starting at `start_b`."""
        starts_bn, run = Layout._starts(len(lengths_b), time, start_b, lengths_b.device)
        return Layout(lengths_b.to(torch.int64), starts_bn, run=run)

    @staticmethod
    def packed(document_lengths: Sequence[Sequence[int]], *, device: torch.device | str | None = None) -> Layout:
        """Several documents a row, one after the other; rows may sum to different lengths.

        Args:
            document_lengths: for each row the lengths of its documents, each at least 1. The first document of a
                row continues the incoming state.
        """
        if any(n < 1 for row in document_lengths for n in row):
            raise ConfigError(f"expected document lengths of at least 1, got {document_lengths}; drop the empty ones")
        lengths = [sum(row) for row in document_lengths]
        time = max(lengths, default=0)
        positions_bt = torch.zeros(len(lengths), time, dtype=torch.int64)
        documents_bt = torch.zeros(len(lengths), time, dtype=torch.int64)
        for i, row in enumerate(document_lengths):
            at = 0
            for j, n in enumerate(row):
                positions_bt[i, at : at + n] = torch.arange(n)
                documents_bt[i, at : at + n] = j
                at += n
            documents_bt[i, at:] = max(len(row) - 1, 0)
        return Layout(
            torch.tensor(lengths, device=device),
            positions_bt.to(device),
            documents_bt.to(device),
            padded=any(n != time for n in lengths),
        )

    @staticmethod
    def from_mask(mask_bt: Tensor, *, start_b: Tensor | int = 0) -> tuple[Layout, Tensor]:
        """Turn an attention mask with left or right padding into a layout and the columns to gather.

        Args:
            mask_bt: ``[b, t]``, non-zero where a token stands; the ones of a row must be contiguous.

        Returns:
            The layout and int64 ``columns_bt``: ``x.gather(1, columns_bt)`` moves the tokens to the left.

        Raises:
            ConfigError: a row's tokens have a hole between them.
        """
        real_bt = mask_bt != 0
        lengths_b = real_bt.sum(1)
        first_b = real_bt.to(torch.int64).argmax(1)
        columns_bt = torch.arange(mask_bt.shape[1], device=mask_bt.device)
        inside_bt = (columns_bt >= first_b[:, None]) & (columns_bt < (first_b + lengths_b)[:, None])
        if not torch.equal(inside_bt, real_bt):
            raise ConfigError(
                "attention_mask: expected one contiguous run of tokens in each row, got a hole; "
                "pad on one side only, or pack documents with Layout.packed"
            )
        order_bt = (columns_bt + first_b[:, None]) % max(mask_bt.shape[1], 1)
        return Layout.ragged(lengths_b, mask_bt.shape[1], start_b=start_b), order_bt

    def index_bt(self, seen_b: Tensor) -> Tensor:
        """int64 ``[b, t]``: how many tokens of its own document stand before each token.

        Args:
            seen_b: tokens of document 0 that the state already holds.
        """
        columns_t = torch.arange(self.shape[1], device=seen_b.device)
        if self.documents_bt is None:
            return seen_b[:, None] + columns_t
        previous_bt = torch.nn.functional.pad(self.documents_bt, (1, 0))[:, :-1]
        starts_bt = torch.where(self.documents_bt != previous_bt, columns_t, -seen_b[:, None])
        return columns_t - starts_bt.cummax(1).values

    def tail(self, n_b: Tensor) -> tuple[Tensor, Tensor]:
        """What a commit of `n_b` tokens keeps: tokens of the document that the last of them belongs to.

        Returns:
            bool ``[b, t]``, the kept tokens, and bool ``[b]``, whether they continue the incoming state.
        """
        kept_bt = torch.arange(self.shape[1], device=n_b.device) < n_b[:, None]
        if self.documents_bt is None:
            return kept_bt, torch.ones_like(n_b, dtype=torch.bool)
        last_b = torch.where(kept_bt, self.documents_bt, 0).amax(1)
        return kept_bt & (self.documents_bt == last_b[:, None]), last_b == 0

    def narrow(self, start: int, stop: int) -> Layout:
        """The layout of columns ``[start, stop)``, read after the columns before `start` were committed.

        `positions_bt` must have been asked for before, where the layout begins at a counter that the commit moves.
        """
        documents_bt = None
        if self.documents_bt is not None:
            before_b1 = self.documents_bt[:, start - 1 : start] if start > 0 else 0
            documents_bt = self.documents_bt[:, start:stop] - before_b1
        lengths_b = (self.lengths_b - start).clamp(0, stop - start)
        return Layout(lengths_b, self.positions_bt[:, start:stop], documents_bt, self.padded)
