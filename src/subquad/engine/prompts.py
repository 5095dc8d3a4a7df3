"""What stands before a row's first new token: read a chunk at a time, or known from an earlier prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from subquad.core.transfer import sent
from subquad.engine.draft import Drafter
from subquad.engine.prefix import PrefixCache
from subquad.engine.reader import Reader
from subquad.engine.rounds import Rounds
from subquad.engine.row import Row

CHUNKS_AT_ONCE = 32
"""Most tokens of prompts in one forward pass, in chunks; it bounds what that holds in memory beside the state."""


class Prompts:
    """Reads the tokens that rows have before they take part in rounds, all but the last.

    Args:
        rounds: with the slots.
        chunk: tokens of a prompt read at once.
        prefixes: keeps states of prompts' beginnings; None keeps nothing.

    Attributes:
        reader: reads the chunks.
    """

    def __init__(self, rounds: Rounds, chunk: int, prefixes: PrefixCache | None) -> None:
        self.chunk, self.prefixes = chunk, prefixes
        self._rounds, self._device = rounds, rounds.model.device
        hears = rounds.drafter is not None and rounds.drafter.hears
        self._drafter: Drafter | None = rounds.drafter if hears else None
        self.reader = Reader(rounds.model, rounds.pool, rounds.capacity, streams=hears, aux_layers=rounds.aux_layers)
        # Around a read of what was read before in that shape, on a GPU, until it is known how long it took.
        self._between: tuple[torch.cuda.Event, torch.cuda.Event] | None = None

    def recall(self, slot: int, row: Row) -> bool:
        """Write into a slot what is known of its tokens already, its own saved state or a beginning's: whether this."""
        if row.saved is not None:
            self._rounds.restore(slot, *row.saved)
            row.saved = None
        elif self.prefixes is not None:
            found = self.prefixes.find(row.tokens[:-1])
            row.marks = self.prefixes.marks(row.tokens[:-1])
            if found is not None:
                self._rounds.restore(slot, found.state)
                row.read = found.tokens
                return True
        return False

    def read(self, slots: Sequence[Row | None]) -> list[int]:
        """Read one chunk of each row that is not filled, or of as many as are read at once; the slots of these."""
        chosen, blocks, kept = list[int](), list[list[int]](), list[int]()
        width = 0
        for slot, row in enumerate(slots):
            if row is None or row.filled:
                continue
            stop = min(row.read + self.chunk, len(row.tokens) - 1)
            # Of a block one state can be kept, so it ends there where another is asked for behind it.
            first, *_ = marks = [*(mark for mark in row.marks if row.read < mark <= stop), row.read]
            stop = first if len(marks) > 2 else stop
            width = max(width, stop - row.read)
            if chosen and (len(chosen) + 1) * width > CHUNKS_AT_ONCE * self.chunk:
                break
            chosen.append(slot)
            blocks.append(row.tokens[row.read : stop])
            kept.append(first - row.read)
        if chosen:
            rows = [row for slot in chosen if (row := slots[slot]) is not None]
            began, steady = self._mark(), True
            for part in self.reader.parts(list(map(len, blocks)), kept):
                own = [[some[i] for i in part] for some in (chosen, kept)]
                self._read([rows[i] for i in part], [blocks[i] for i in part], *own)
                steady &= self.reader.steady
            ended = self._mark() if steady else None
            self._between = None if began is None or ended is None else (began, ended)
        return chosen

    def _read(
        self, rows: Sequence[Row], blocks: Sequence[Sequence[int]], slots: Sequence[int], kept: Sequence[int]
    ) -> None:
        """Read pieces together, tell the drafter, and keep the states after so many tokens of them."""
        hidden_btd = self.reader.read(slots, blocks, kept, before=[row.read for row in rows])
        if self._drafter is not None:
            following = [row.tokens[row.read + 1 :][: len(block)] for row, block in zip(rows, blocks, strict=True)]
            next_bt = self._sent([some + [0] * (hidden_btd.shape[1] - len(some)) for some in following])
            self._drafter.hear(slots, next_bt, self._sent([len(block) for block in blocks]), hidden_btd)
        for i, (row, block, n) in enumerate(zip(rows, blocks, kept, strict=True)):
            if n and self.prefixes is not None:
                self.prefixes.keep(row.tokens[: row.read + n], self.reader.kept(i))
            row.read += len(block)

    def seconds(self) -> float | None:
        """What the last read took of a GPU's time, once it has waited for the GPU; None where that says nothing."""
        between, self._between = self._between, None
        return None if between is None else between[0].elapsed_time(between[1]) / 1000

    def _mark(self) -> torch.cuda.Event | None:
        """A point of the device's time; None on a CPU."""
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _sent(self, numbers: Sequence[Any]) -> Tensor:
        return sent(torch.tensor(numbers), self._device)
