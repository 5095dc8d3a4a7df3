"""The bookkeeping of rows that decode together: what a round reads of each, and what it gives."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from subquad.ops.backends import Backends

__all__ = ["Slots", "emit_", "keep_last_", "lead"]

_backends = Backends(__name__)


class Slots(NamedTuple):
    """Of each row, int64 in fixed buffers.

    Attributes:
        last_b: the token that begins its next block.
        alive_b: 1 where it is under way, else 0.
        left_b: tokens that it may still be given.
        ends_be: tokens that end it; -2 where there is none.
        out_bn: tokens that it was given since the last look; the last column takes what is not kept.
        fill_b: how many.
        kept_b, judged_b, guessed_b: guesses since then that stood, whose turn came, that were read.
    """

    last_b: Tensor
    alive_b: Tensor
    left_b: Tensor
    ends_be: Tensor
    out_bn: Tensor
    fill_b: Tensor
    kept_b: Tensor
    judged_b: Tensor
    guessed_b: Tensor

    @staticmethod
    def empty(rows: int, width: int, device: torch.device) -> Slots:
        """Rows of which none is under way, which are given at most `width` tokens between two looks."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.int64, device=device)

        last_b, alive_b, left_b, fill_b, kept_b, judged_b, guessed_b = (zeros(rows) for _ in range(7))
        out_bn, ends_be = zeros(rows, width + 1), torch.full((rows, 1), -2, dtype=torch.int64, device=device)
        return Slots(last_b, alive_b, left_b, ends_be, out_bn, fill_b, kept_b, judged_b, guessed_b)

    def first(self, n: int) -> Slots:
        """The first `n` rows, which share their memory with these."""
        return Slots(*(buffer[:n] for buffer in self))


def lead(slots: Slots, tokens_bk: Tensor, length_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The block that a round reads: each row's last token and its guesses, int64 ``[b, 1 + k]``.

    With it come how many of its tokens count, and how many of them are guesses. No more guesses count than the row may
    still be given, one token of them not guessed; none of a row that is not under way.

    Args:
        slots: the rows.
        tokens_bk: guesses.
        length_b: how many of them there are.
    """
    return _backends.choose(tokens_bk, *slots).lead(slots, tokens_bk, length_b)


def emit_(slots: Slots, step_b: Tensor, tokens_bt: Tensor, n_b: Tensor, length_b: Tensor) -> tuple[Tensor, Tensor]:
    """Give each row its tokens up to its end, in place.

    A row ends with a token of `Slots.ends_be`, with one below 0, and where nothing is left.

    Args:
        slots: the rows.
        step_b: int64, tokens that each row has drawn; what it is given is added in place.
        tokens_bt: int64 ``[b, t]``, new tokens.
        n_b: int64, how many of them count.
        length_b: int64, guesses that were read.

    Returns:
        int64 ``[b]``, how many each row was given, 0 where it is not under way, and ``[b, t]``, the tokens with 0 in
        place of what is none.
    """
    return _backends.choose(tokens_bt, *slots).emit_(slots, step_b, tokens_bt, n_b, length_b)


def keep_last_(last_bd: Tensor, x_btd: Tensor, n_b: Tensor) -> None:
    """Write the vector of each row's n-th column over what was kept of the row, in place; nothing where n is 0.

    Args:
        last_bd: what is kept.
        x_btd: as `last_bd`.
        n_b: int64, how many columns count.
    """
    _backends.choose(x_btd, last_bd).keep_last_(last_bd, x_btd, n_b)
