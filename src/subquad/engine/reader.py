"""Pieces of prompts, read into the slots of a pool."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from subquad.engine.graphs import Graphs
from subquad.models.stack import Stack, StackState

# Columns of a piece that is read as a graph: few widths, so that few are recorded, and little padding.
WIDTHS = (16, 32, 64, 128, 192, 256, 384, 512, 768, 1024)
# Tokens that a graph reads at most. What is longer keeps a device busy while its launches come one by one.
MOST = 4096


class Reader:
    """Reads many pieces at once, each into its slot.

    A read of a few tokens is thousands of launches that take a host longer than a device, so on a GPU pieces are put
    together to shapes that come again, powers of two of rows at one of `WIDTHS`, and these are graphs.

    Args:
        model: that reads.
        pool: with the slots.
        streams: whether somebody asks for the stream.
    """

    def __init__(self, model: Stack, pool: StackState, *, streams: bool) -> None:
        self.model, self.pool, self.streams = model, pool, streams
        self.graphs = Graphs(model.device.type == "cuda", "reads of prompts")
        self._given: dict[tuple[int, int, bool], tuple[Tensor, Tensor]] = {}

    def parts(self, lengths: Sequence[int]) -> list[list[int]]:
        """Which of so long pieces to read together: all, or as many as a graph takes, those of like lengths."""
        if not self.graphs.captures:
            return [list(range(len(lengths)))]
        longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        parts: list[list[int]] = []
        while longest_first:
            most = max(1, min(len(longest_first), MOST // _width(lengths[longest_first[0]])))
            count = 1 << (most.bit_length() - 1)
            parts.append(longest_first[:count])
            del longest_first[:count]
        return parts

    def read(self, slots: Sequence[int], blocks: Sequence[Sequence[int]], *, fresh: bool) -> Tensor:
        """Read `blocks` into `slots`; the stream ``[b, t, d]``, which is right until the next read.

        Args:
            slots: each once.
            blocks: tokens, at least one each.
            fresh: nothing was read into any of these slots.
        """
        width, rows = max(map(len, blocks)), len(blocks)
        wide = _width(width)
        graph = self.graphs.captures and rows * wide <= MOST and rows.bit_count() == 1
        padded = [[*block, *[0] * ((wide if graph else width) - len(block))] for block in blocks]
        given_bt = torch.tensor([[*row, len(b), slot] for row, b, slot in zip(padded, blocks, slots, strict=True)])
        if not graph:
            return self._read(given_bt.to(self.model.device), fresh, ragged=any(len(b) < width for b in blocks))
        key = (rows, wide, fresh)
        if key not in self._given:
            size = self.model.config.d_model if self.streams else 0
            hidden_btd = torch.zeros(rows, wide, size, device=self.model.device, dtype=self.model.dtype)
            self._given[key] = given_bt.to(self.model.device), hidden_btd
        held_bt, hidden_btd = self._given[key]
        held_bt.copy_(given_bt)

        def work() -> None:
            read_btd = self._read(held_bt, fresh, ragged=True)
            if self.streams:
                hidden_btd.copy_(read_btd)

        self.graphs.launch(key, work)
        return hidden_btd[:, :width]

    def _read(self, given_bt: Tensor, fresh: bool, *, ragged: bool) -> Tensor:
        """Tokens, with their number and the slot behind them."""
        tokens_bt, (lengths_b, at_b) = given_bt[:, :-2].contiguous(), given_bt[:, -2:].mT.contiguous()
        # Nothing to look at costs less than an empty buffer.
        state = self.model.init_state(len(given_bt)) if fresh else self.pool.select(at_b).settled()
        hidden_btd, update = self.model.read(tokens_bt, state, lengths_b if ragged else None)
        update.commit_(self.pool, at_b, lengths_b)
        return hidden_btd


def _width(tokens: int) -> int:
    """Columns of a graph for so many tokens, or these where there is none."""
    return next((width for width in WIDTHS if width >= tokens), tokens)
