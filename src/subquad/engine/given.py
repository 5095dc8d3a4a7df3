"""What rounds gave."""

from __future__ import annotations

from dataclasses import dataclass

from subquad.engine.scores import Scored


@dataclass(frozen=True)
class Given:
    """What some rounds gave one slot.

    Attributes:
        tokens: new ones; -1 where logits were not finite, `EXHAUSTED` where a rule and other settings leave none.
        scored: their log-probabilities and those of the likeliest, as the slot asks for them.
        kept, judged, guessed: guesses that stood, whose turn came, that were read.
        foreseen: what `Rounds.foresee` guessed for the first of them, which nobody read.
        loose: tokens that stood though another was likelier.
    """

    tokens: list[int]
    scored: Scored
    kept: int
    judged: int
    guessed: int
    foreseen: list[int]
    loose: int = 0
