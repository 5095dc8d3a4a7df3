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
        guessed: guesses that were read.
        judged: those whose turn came: all that stood, and the first that did not.
        kept: those that stood.
        seconds: they took.
        slots: that a round read, idle ones included.
        steady: whether no round did anything for the first time, such as to compile or to capture a graph.
        read: rounds that read guesses; None is all where any were asked for.
        readable: guesses that those could read of a row, all rounds together; None is k each.
        loose: tokens that are not what plain decoding gives behind the same text; only where guesses are relaxed.
    """

    rows: int
    k: int
    rounds: int
    tokens: int
    guessed: int
    judged: int
    kept: int
    seconds: float
    slots: int = 1
    steady: bool = True
    loose: int = 0
    read: int | None = None
    readable: int | None = None
