"""Rounds from one look at the device to the next: how many guesses they make, what they took, what is learned."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

from subquad.engine.given import Given
from subquad.engine.pace import IN_VAIN, Pace
from subquad.engine.rounds import Rounds
from subquad.engine.trace import Look

# A round is captured at its second time or, where that fails, its third; what is done once a look comes once a look.
REHEARSALS = 3


class Turn(NamedTuple):
    """The rounds between two looks.

    Attributes:
        pace: chose their number of guesses.
        slots, k: read, and guesses of each asked for.
        steady: whether its time says what rounds take: none did anything for the first time.
        rounds, read, readable: how many, how many of them read guesses, and how many guesses of a row those could read.
        began: second of the clock.
        given: to each slot.
    """

    pace: Pace
    slots: int
    k: int
    steady: bool
    rounds: int
    read: int
    readable: int
    began: float
    given: list[Given]


class Course:
    """Runs rounds by turns, with as many guesses as pay.

    Args:
        rounds: of an engine's slots.
        count: most rounds between two looks. While a row has a grammar it is 1.
        most: guesses a row and round.
        fixed: always so many.

    Attributes:
        pace: chooses the guesses.
        ruled_pace: the same while a row has a grammar, when rounds cost more, and other guesses stand.
    """

    def __init__(self, rounds: Rounds, count: int, *, most: int, fixed: bool) -> None:
        self._rounds, self._count, self._drafter = rounds, count, rounds.drafter
        self._seldom = self._drafter is not None and not self._drafter.always
        weighed = self._drafter is not None and self._drafter.weighs
        self.pace = Pace(most, fixed=fixed, watched=self._seldom, asks=rounds.most_asked, weighed=weighed)
        self.ruled_pace = Pace(most, fixed=fixed, watched=self._seldom)

    @property
    def _now(self) -> tuple[Pace, int]:
        """What chooses the number of guesses, and most rounds before the next look: masks follow from it."""
        return (self.ruled_pace, 1) if self._rounds.masks.on else (self.pace, self._count)

    def run(self, n: int, left: int) -> Turn:
        """The next rounds of the first `n` slots, and what they gave; `look` comes behind what is done with it.

        Args:
            n: slots.
            left: tokens that some slot may still be given, and none more. There are no more rounds than are likely to
                give them: those behind would run for nobody. (Rounds that ask for guesses end with their rows.)
        """
        pace, most = self._now
        k = pace.choose(n) if self._drafter is not None else 0
        rounds = most if k and self._rounds.asks(n) else min(most, math.ceil(left / pace.tokens(k)))
        began = time.perf_counter()
        steady, done, read, readable = self._run(n, k, rounds)
        # Of a short turn the look is too large a part for it to tell what a round takes, unless nothing else has.
        telling = 2 * rounds > most or not pace.looked(n, k)
        return Turn(pace, n, k, steady and telling, done, read, readable, began, self._rounds.take(n))

    def look(self, turn: Turn) -> Look:
        """What a turn was, which the pace learns from; it ends now."""
        given = turn.given
        look = Look(
            rows=sum(1 for new in given if new.tokens),
            k=turn.k,
            rounds=turn.rounds,
            tokens=sum(len(new.tokens) for new in given),
            guessed=sum(new.guessed for new in given),
            judged=sum(new.judged for new in given),
            kept=sum(new.kept for new in given),
            seconds=time.perf_counter() - turn.began,
            slots=turn.slots,
            steady=turn.steady,
            loose=sum(new.loose for new in given),
            read=turn.read,
            readable=turn.readable,
        )
        turn.pace.learn(look)
        if not turn.k and self._seldom:
            self._compare(given, turn.pace)
        return look

    def rehearse(self, n: int) -> None:
        """Do all kinds of rounds of `n` slots, and note what they take when nothing is done for the first time."""
        pace, _ = self._now
        for k in [pace.most] if pace.fixed else pace.ladder:
            pace.note(n, k, self._seconds(n, k, found=True))
        if self._rounds.asks(n):
            pace.note(n, IN_VAIN, self._seconds(n, pace.most, found=False))

    def _seconds(self, n: int, k: int, *, found: bool) -> float:
        """Of a round where guesses are found, or none."""
        taken: list[float] = []
        for _ in range(2 * REHEARSALS):
            began = time.perf_counter()
            self._run(n, k, self._now[1], found=found)
            self._rounds.take(n)
            taken.append((time.perf_counter() - began) / self._now[1])
        return min(taken[REHEARSALS:])

    def _run(self, n: int, k: int, rounds: int, *, found: bool | None = None) -> tuple[bool, int, int, int]:
        """`Turn.steady`, `rounds`, `read` and `readable`.

        Args:
            n, k, rounds: slots, guesses, and at most so many rounds.
            found: what is held to be found where rounds ask for guesses; None asks.
        """
        if k and self._drafter is not None:
            self._drafter.prepare(n, k)
        elif self._seldom:
            # Such a guess costs next to nothing: so what is not worth a read now is seen as soon as it would be.
            self._rounds.foresee(n, self._foreseen)
        if k and self._rounds.asks(n):
            return self._ask_and_run(n, k, rounds, found)
        steady = sum(self._rounds.run(n, k) for _ in range(rounds)) == rounds
        if not k and self._drafter is not None:
            self._rounds.catch_up(n)
        return steady, rounds, rounds if k else 0, rounds * k

    @property
    def _foreseen(self) -> int:
        """Guesses that are made and not read: no more than plain rounds tell of."""
        pace, rounds = self._now
        return min(pace.most, rounds)

    def _ask_and_run(self, n: int, k: int, rounds: int, found: bool | None) -> tuple[bool, int, int, int]:
        """`_run` where every round first asks for guesses; once no row is under way there is nothing more to run."""
        steady, done, read, readable = True, 0, 0, 0
        for _ in range(rounds):
            worth, alive, known = self._rounds.ask(n, k)
            if found is None and not alive:
                break
            reads = self.pace.holding(worth, k) if found is None else k * found
            steady = self._rounds.run(n, reads, asked=True) and known and steady
            done, read, readable = done + 1, read + (reads > 0), readable + reads
        return steady, done, read, readable

    def _compare(self, given: Sequence[Given], pace: Pace) -> None:
        """Let the pace know what guesses that nobody read would have brought."""
        asked = guessed = judged = kept = 0
        for new in given:
            if new.tokens:
                found = len(new.foreseen)
                # A drafter that weighs its guesses has as many as it is asked for, or none; fewer are worth a read.
                asked, guessed = asked + self._foreseen, guessed + (self._foreseen if found and pace.weighed else found)
                most = min(found, len(new.tokens))
                stood = next((i for i in range(most) if new.foreseen[i] != new.tokens[i]), most)
                judged, kept = judged + min(stood + 1, most), kept + stood
        pace.see(asked, guessed, judged, kept)
