"""What was guessed, what stood, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Look:
    """Some rounds of an engine between two looks.

    Attributes:
        rows: rows under way.
        k: guesses asked for, a row and round.
        rounds: how many.
        tokens: given by all rows together.
        guessed: guesses that were verified.
        kept: guesses that stood.
        seconds: they took.
    """

    rows: int
    k: int
    rounds: int
    tokens: int
    guessed: int
    kept: int
    seconds: float
