"""How many tokens to guess: from what guesses have brought and what rounds have cost, down to none."""

from __future__ import annotations

from subquad.engine.trace import Look

# Weight of a new figure in the running ones.
NEW = 0.2
# Plain rounds before one with guesses is tried again, doubled as long as it does not pay.
PATIENCE, LONGEST = 8, 128
# What a round with one guess more is thought to cost, until it is measured: little, so that it is tried.
GUESS_COST = 0.05
# Guessing must promise this much.
MARGIN = 1.02


class Pace:
    """Chooses k, the guesses a row and round, among 0, 1, 2, 4, ... up to `most`.

    Expected of a round with k guesses are ``1 + c (a + ... + a^k)`` tokens a row, a the share of guesses that stand
    when it is their turn and c the share of those asked for that were there; both and the seconds of a round at each k
    are measured as running means. The k of most tokens a second is taken, none unless it is ahead; while none is taken,
    one try now and then finds out whether that has changed.

    Args:
        most: largest k; 0 never guesses.
        fixed: always take `most`.
    """

    def __init__(self, most: int, *, fixed: bool = False) -> None:
        self.most, self.fixed = most, fixed
        self.ladder = [0, *(1 << i for i in range(most.bit_length()) if 1 << i < most), *([most] if most else [])]
        self.accepted, self.covered = 0.7, 1.0
        self.seconds: dict[int, float] = {}
        self._plain, self._patience = 0, PATIENCE

    def choose(self) -> int:
        """The k of the next rounds."""
        if self.fixed or not self.most:
            return self.most
        if 0 not in self.seconds:
            return 0
        best = max(self.ladder, key=self._rate)
        if best and self._rate(best) > MARGIN * self._rate(0):
            return best
        if self._plain >= self._patience:
            return self.ladder[1]
        return 0

    def learn(self, look: Look) -> None:
        """Take in what some rounds brought."""
        if self.fixed:
            return
        cost = look.seconds / look.rounds
        before = self.seconds.get(look.k)
        self.seconds[look.k] = cost if before is None else before + NEW * (cost - before)
        if look.k == 0:
            self._plain += 1
            return
        asked = look.rows * look.rounds * look.k
        if asked:
            self.covered += NEW * (min(look.guessed / asked, 1.0) - self.covered)
        if look.guessed:
            # Of the guesses whose turn came: those that stood, and one more in every round that ended early.
            turned = min(look.guessed, look.kept + max(1, look.rows * look.rounds - look.kept // look.k))
            self.accepted += NEW * (min(look.kept / turned, 0.98) - self.accepted)
        pays = self._rate(look.k) > MARGIN * self._rate(0)
        if self._plain:
            self._patience = PATIENCE if pays else min(2 * self._patience, LONGEST)
        self._plain = 0

    def _rate(self, k: int) -> float:
        a = self.accepted
        tokens = 1 + self.covered * sum(a**i for i in range(1, k + 1))
        cost = self.seconds.get(k, self.seconds[0] * (1 + GUESS_COST * k))
        return tokens / max(cost, 1e-9)
