"""Pieces of prompts, read into the slots of a pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from subquad.core.layout import Layout
from subquad.core.packed import Packed
from subquad.core.transfer import sent
from subquad.engine.graphs import Graphs
from subquad.models.stack import Stack, StackState, StackUpdate

# Columns of a piece that is read as a graph: few widths, so that few are recorded, and little padding.
WIDTHS = (16, 32, 64, 128, 192, 256, 384, 512, 768, 1024)
# Tokens that a graph reads at most. What is longer keeps a device busy while its launches come one by one.
MOST = 4096
# Most rows of a read whose states inside their pieces are kept: there are buffers for them, a state for each.
KEPT = 16


class Shape(NamedTuple):
    """What reads have in common that are one graph.

    Attributes:
        rows, width: of the pieces together.
        fresh: whether nothing was read into their slots before.
        room: tokens for which states that are kept have room, 0 where none is.
    """

    rows: int
    width: int
    fresh: bool
    room: int


class Reader:
    """Reads many pieces at once, each into its slot.

    A read of a few tokens is thousands of launches that take a host longer than a device, so on a GPU pieces are put
    together to shapes that come again, powers of two of rows at one of `WIDTHS`, and these are graphs.

    An update can be committed up to any of its tokens, so a state that is asked for somewhere inside a piece is
    committed beside the slots', and the piece is read once.

    Args:
        model: that reads.
        pool: with the slots.
        capacity: most tokens of a slot.
        streams: whether somebody asks for the stream.
        aux_layers: of which they ask for it too; see `Stack.read`.

    Attributes:
        steady: whether all of the last read had been done before, so that its time says what such a read takes.
    """

    def __init__(
        self, model: Stack, pool: StackState, capacity: int, *, streams: bool, aux_layers: Sequence[int] = ()
    ) -> None:
        self.model, self.pool, self.capacity = model, pool, capacity
        self.aux_layers, self._width = aux_layers, (1 + len(aux_layers)) * model.config.d_model if streams else 0
        self.graphs = Graphs(model.device.type == "cuda", "reads of prompts")
        self._given: dict[Shape, tuple[Tensor, Tensor]] = {}
        self._empty: dict[int, StackState] = {}
        # Where states inside pieces are committed, and where they are then put side by side.
        self._beside: StackState | None = None
        self._sides: dict[torch.dtype, Tensor] = {}
        self._most_kept = max(1, min(KEPT, pool.batch // 8))
        self._kept: dict[Shape, Packed] = {}
        self._last = Shape(0, 0, True, 0)
        self.steady = False

    def parts(self, lengths: Sequence[int], kept: Sequence[int]) -> list[list[int]]:
        """Which of so long pieces to read together: as many as a graph takes, those of like lengths.

        Args:
            lengths: tokens.
            kept: tokens of each after which its state is kept, 0 for none.
        """
        wanted = [i for i in range(len(lengths)) if kept[i]]
        others = [i for i in range(len(lengths)) if not kept[i]]
        parts: list[list[int]] = []
        for some, most in ((wanted, self._most_kept), (others, len(others))):
            some.sort(key=lambda i: -lengths[i])
            while some:
                count = min(len(some), most)
                if self.graphs.captures:
                    count = max(1, min(count, MOST // _width(lengths[some[0]])))
                    count = 1 << (count.bit_length() - 1)
                parts.append(some[:count])
                del some[:count]
        return parts

    def read(
        self, slots: Sequence[int], blocks: Sequence[Sequence[int]], kept: Sequence[int], *, before: Sequence[int]
    ) -> Tensor:
        """Read `blocks` into `slots`; the stream as `Stack.read` gives it, which is right until the next read.

        Args:
            slots: each once.
            blocks: tokens, at least one each.
            kept: tokens of each after which its state is kept, 0 for none; see `kept`.
            before: tokens that each slot has read before.
        """
        width, rows = max(map(len, blocks)), len(blocks)
        wide, fresh = _width(width), not any(before)
        graph = self.graphs.captures and rows * wide <= MOST and rows.bit_count() == 1
        room = max((read + n for read, n in zip(before, kept, strict=True) if n), default=0)
        room = min(_width(room), self.capacity) if graph and room else room
        padded = [[*block, *[0] * ((wide if graph else width) - len(block))] for block in blocks]
        numbers = zip(padded, map(len, blocks), kept, slots, strict=True)
        given_bt = sent(torch.tensor([[*row, *three] for row, *three in numbers]), self.model.device)
        self._last = key = Shape(rows, wide if graph else width, fresh, room)
        if not graph:
            self.steady = False
            return self._read(given_bt, key, ragged=any(len(b) < width for b in blocks))
        if key not in self._given:
            hidden_btd = torch.zeros(rows, wide, self._width, device=self.model.device, dtype=self.model.dtype)
            self._given[key] = given_bt, hidden_btd
        held_bt, hidden_btd = self._given[key]
        held_bt.copy_(given_bt)

        def work() -> None:
            read_btd = self._read(held_bt, key, ragged=True)
            if self._width:
                hidden_btd.copy_(read_btd)

        self.steady = self.graphs.launch(key, work)
        return hidden_btd[:, :width]

    def kept(self, i: int) -> Packed:
        """The state of row `i` of the last read, after the tokens named there; it may have room for a few more."""
        return self._kept[self._last].row(i)

    def _read(self, given_bt: Tensor, key: Shape, *, ragged: bool) -> Tensor:
        """Tokens, with their number, that of the kept ones and the slot behind them."""
        tokens_bt, (lengths_b, kept_b, at_b) = given_bt[:, :-3].contiguous(), given_bt[:, -3:].mT.contiguous()
        state = self._nothing(key.rows) if key.fresh else self.pool.select(at_b).settled()
        b, t = tokens_bt.shape
        start = 0 if key.fresh else state.seen_b
        layout = (
            Layout.ragged(lengths_b, t, start_b=start)
            if ragged
            else Layout.dense(b, t, start_b=start, device=given_bt.device)
        )
        layout = replace(layout, fresh=key.fresh)
        hidden_btd, update = self.model.read(tokens_bt, state, layout=layout, aux_layers=self.aux_layers)
        if key.room:
            self._kept[key] = self._commit_beside(update, None if key.fresh else state, kept_b, key.room)
        update.commit_(self.pool, at_b, lengths_b)
        return hidden_btd

    def _nothing(self, rows: int) -> StackState:
        """An empty state, without a buffer for what grows: nothing to look at costs less. Reads leave it as it is."""
        if rows not in self._empty:
            self._empty[rows] = self.model.init_state(rows)
        return self._empty[rows]

    def _commit_beside(self, update: StackUpdate, state: StackState | None, kept_b: Tensor, room: int) -> Packed:
        """The first `kept_b` tokens of a read of `state`, None being an empty one."""
        if self._beside is None:
            self._beside = self.model.init_state(self._most_kept, self.capacity)
            for _, x in self._beside.tensors():
                side = self._sides.get(x.dtype, x.new_empty(0))
                self._sides[x.dtype] = x.new_empty(len(side) + x.numel())
        rows_b = torch.arange(len(kept_b), device=kept_b.device)
        beside = self._beside.first(len(kept_b))
        if state is None:
            for dtype in self._sides:
                some = [x for _, x in beside.tensors() if x.dtype == dtype]
                torch._foreach_zero_(some)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
        else:
            beside.write_(None, state.cut(room))
        update.commit_(beside, rows_b, kept_b)
        return Packed.of(beside.cut(room), out=self._sides)


def _width(tokens: int) -> int:
    """Columns of a graph for so many tokens, or these where there is none."""
    return next((width for width in WIDTHS if width >= tokens), tokens)
