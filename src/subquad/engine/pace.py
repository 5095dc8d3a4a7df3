"""How many tokens to guess: from what guesses have brought and what rounds have cost, down to none."""

from __future__ import annotations

from collections.abc import Mapping

from subquad.engine.trace import Look

# What is thought before anything is seen, and as how many guesses it counts.
FIRST_ACCEPTED, FIRST_COVERED, FIRST_WEIGHT = 0.7, 1.0, 4.0
# Guesses after which an older one counts half.
HALF_LIFE = 256.0
# What rounds of one k brought counts half after so many rounds of a row at any k, and less than what guesses that stand
# each by itself would bring while there were fewer than these.
RECENT, DOUBT = 64.0, 16.0
# As how many a guess counts that was made but not read: it costs nothing to see, and there are few of them.
UNREAD_WEIGHT = 4
# Weight of a new cost in the running one. What disturbs a machine makes rounds dearer, never cheaper.
CHEAPER, DEARER = 0.5, 0.1
# What a round with one guess more is thought to cost, until it is measured: little, so that it is tried.
GUESS_COST = 0.05
# Guessing must promise this much to begin; where only a try tells, it goes on while it promises anything.
MARGIN = 1.05
# Stand among costs for the k of a round that asked for guesses and found none, and of those that read what is worth it.
IN_VAIN, WEIGHED = -1, -2
# Looks between two that try what is not the best, while guesses pay; and while they do not, at first and at most,
# with no more guesses than keep such a round within so many plain ones.
TOUR = 24
PATIENCE, LONGEST, DEAREST_TRY = 8, 128, 2.0


class Pace:
    """Chooses k, the guesses a row and round, among 0, 1, 3, 7, ... up to `most`: with its last token a row then reads
    a power of two, as large as a kernel's tile.

    Expected of a round with k guesses are ``1 + c (a + ... + a^k)`` tokens a row, a the share of guesses that stand
    when it is their turn and c the share of those asked for that were there. But guesses come in runs: few rounds may
    keep all and the others none. So what rounds of this k brought lately counts too, and the more the more there were.
    All is measured, what is older counting less and less, and so are the seconds of a round at each k, for each number
    of slots apart: what one row checks for nothing, many may pay for. The k of most tokens a second is taken, none
    unless it is ahead; now and then another is tried, so that what has changed is found out.

    Where rounds ask, and the drafter tells how many guesses are worth a read, each round reads the fewest of the ladder
    that hold those: a long copy is read in long steps at once, and a doubtful guess costs little. It is left to choose
    whether to ask at all.

    Args:
        most: largest k; 0 never guesses.
        fixed: always take `most`.
        watched: `see` tells what guesses would have brought while none are read: where they don't pay, nothing is tried
            but what has no cost yet.
        asks: rounds of up to so many slots ask whether there are guesses, and read none if not.
        weighed: the drafter `weighs` its guesses.
    """

    def __init__(
        self, most: int, *, fixed: bool = False, watched: bool = False, asks: int = 0, weighed: bool = False
    ) -> None:
        self.most, self.fixed, self.watched, self.asks, self.weighed = most, fixed, watched, asks, weighed
        self.ladder = [
            0,
            *((2 << i) - 1 for i in range(most.bit_length()) if (2 << i) - 1 < most),
            *([most] if most else []),
        ]
        self._costs: dict[int, _Costs] = {}
        self._accepted, self._covered = _Share(FIRST_ACCEPTED), _Share(FIRST_COVERED)
        # Guesses that stood of rounds of a row, by k.
        self._brought = {k: _Share(0.0, half_life=RECENT, weight=0.0) for k in self.ladder[1:]}
        self._since, self._patience, self._tours = 0, PATIENCE, 0
        self._last = 0

    @property
    def accepted(self) -> float:
        """Share of guesses that stand when it is their turn."""
        return self._accepted.value

    @property
    def covered(self) -> float:
        """Share of the guesses asked for that there were."""
        return self._covered.value

    def choose(self, slots: int = 1) -> int:
        """The k of the next rounds, which read so many slots."""
        if self.fixed or not self.most:
            return self.most
        costs = self._of(slots)
        if not costs.known(0):
            return 0
        best = self._best(costs)
        if (best > 0) != (self._last > 0):
            self._since = 0
        self._last = best
        if not best and self.watched and all(map(costs.known, self._tried(costs))):
            return 0
        self._since += 1
        if self._since <= (TOUR if best else self._patience):
            return best
        self._since, self._tours = 0, self._tours + 1
        return self._other(best, costs)

    def holding(self, worth: int, k: int) -> int:
        """How many guesses a round reads that asked for `k`, where at most `worth` of a row are worth it."""
        if self.fixed:
            return k if worth else 0
        return next(rung for rung in self.ladder if rung >= min(worth, k))

    def _weighs(self, costs: _Costs) -> bool:
        """Whether each round of so many slots reads what is worth it."""
        return self.weighed and costs.slots <= self.asks

    def _tried(self, costs: _Costs) -> list[int]:
        """What rounds are tried with, as it stands among costs."""
        return [0, WEIGHED] if self._weighs(costs) else self.ladder

    def _best(self, costs: _Costs) -> int:
        """What promises most, none unless it is ahead; by the margin, where it is not what is done."""
        best, ahead = self._likeliest(costs)
        return best if ahead > (1 if self._last and not self.watched else MARGIN) else 0

    def _likeliest(self, costs: _Costs) -> tuple[int, float]:
        """The number of guesses that promises most, and how many times the tokens a second of none."""
        vain = (1 - self.covered) ** costs.slots if costs.slots <= self.asks else 0.0
        seconds = {k: (1 - vain) * costs.of(k) + vain * costs.of(IN_VAIN if k else 0) for k in self.ladder}
        if self._weighs(costs):
            return self.most, self._promise(costs, seconds, vain)
        rates = {k: self.tokens(k) / max(seconds[k], 1e-9) for k in self.ladder}
        best = max(self.ladder[1:], key=rates.__getitem__)
        return best, rates[best] / rates[0]

    def _promise(self, costs: _Costs, seconds: Mapping[int, float], vain: float) -> float:
        """How many times the tokens a second of none rounds give that read what is worth it.

        As much as one k would whose cost is known, while few of them were made; then what those brought.
        """
        ks = [k for k in self.ladder[1:] if k == self.most or costs.known(k)]
        one = max((1 + self._apart(k)) / max(seconds[k], 1e-9) for k in ks)
        seen = self._brought[self.most]
        if not seen.all or not costs.known(WEIGHED):
            return one * seconds[0]
        own = (1 + seen.value) / max((1 - vain) * costs.of(WEIGHED) + vain * costs.of(IN_VAIN), 1e-9)
        return (seen.all * own + DOUBT * one) / (seen.all + DOUBT) * seconds[0]

    def _other(self, best: int, costs: _Costs) -> int:
        """What to try in place of the best: none or one of its neighbours, or a number that is not too dear."""
        ladder = [0, self.most] if self._weighs(costs) else self.ladder
        if best:
            at = ladder.index(best)
            near = [ladder[i] for i in (at - 1, at + 1) if 0 < i < len(ladder)]
            return [0, *near][self._tours % (1 + len(near))]
        if self._likeliest(costs)[1] <= 1:
            # Else a try costs nothing, and tells whether it is more than that.
            self._patience = min(2 * self._patience, LONGEST)
        cheap = [k for k in ladder[1:] if costs.of(k) <= DEAREST_TRY * costs.of(0)] or [ladder[1]]
        return cheap[self._tours % len(cheap)]

    def note(self, slots: int, k: int, seconds: float) -> None:
        """Take what a round over empty rows costs, until looks tell; what they have told of this k is forgotten."""
        costs = self._of(slots)
        costs.noted[k] = seconds
        costs.looked.pop(k, None)

    def learn(self, look: Look) -> None:
        """Take in what some rounds brought."""
        if self.fixed:
            return
        costs = self._of(look.slots)
        if look.steady:
            read = look.rounds if look.read is None or not look.k else look.read
            took = {WEIGHED if look.k and self._weighs(costs) else look.k: read, IN_VAIN: look.rounds - read}
            costs.look({k: rounds for k, rounds in took.items() if rounds}, look.seconds)
        if not look.k:
            # Where what nobody read tells, it is to be heard once there is more of it.
            for brought in self._brought.values() if self.watched else ():
                brought.fade(look.rows * look.rounds)
            return
        asked = look.rows * look.rounds * look.k
        read = look.rounds if look.read is None else look.read
        readable = look.rows * (read * look.k if look.readable is None else look.readable)
        self._covered.add(asked * min(look.guessed / readable, 1) * read / look.rounds if readable else 0.0, asked)
        self._accepted.add(look.kept, look.judged)
        rounds = look.rows * look.rounds
        for k, brought in self._brought.items():
            if k == look.k:
                brought.add(look.kept, rounds)
            else:
                brought.fade(rounds)
        if costs.known(0) and self._best(costs):
            self._patience = PATIENCE

    def see(self, asked: int, guessed: int, judged: int, kept: int) -> None:
        """Take in guesses that were made but not read: of those asked for how many there were, and would have stood."""
        if not self.fixed:
            self._covered.add(UNREAD_WEIGHT * guessed, UNREAD_WEIGHT * asked)
            self._accepted.add(UNREAD_WEIGHT * kept, UNREAD_WEIGHT * judged)

    def looked(self, slots: int, k: int) -> bool:
        """Whether a look has told what a round over so many slots costs that makes so many guesses."""
        costs = self._of(slots)
        return (WEIGHED if k and self._weighs(costs) else k) in costs.looked

    def costs(self, slots: int) -> dict[int, float]:
        """Seconds of a round by k, `IN_VAIN` or `WEIGHED`, as far as they are known, for slots of about this number."""
        costs = self._of(slots)
        return {k: costs.of(k) for k in (*self.ladder, IN_VAIN, WEIGHED) if costs.known(k)}

    def _of(self, slots: int) -> _Costs:
        bits = (slots - 1).bit_length()
        return self._costs.setdefault(bits, _Costs(1 << bits))

    def tokens(self, k: int) -> float:
        """Expected of a row's round with `k` guesses."""
        if not k:
            return 1.0
        seen = self._brought[k]
        return 1 + (seen.some + self._apart(k) * DOUBT) / (seen.all + DOUBT)

    def _apart(self, k: int) -> float:
        """Guesses of a round that stand if each does so by itself."""
        return self.covered * sum(self.accepted**i for i in range(1, k + 1))


class _Costs:
    """Seconds of a round by k: as looks have found them, else as noted, to the scale that looks and notes have.

    A round over empty rows has no context to read, so that notes are too low, but all of them alike.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.looked: dict[int, float] = {}
        self.noted: dict[int, float] = {}

    def look(self, rounds: Mapping[int, int], seconds: float) -> None:
        """Take in what so many rounds of each k cost together: each the same multiple of what it was expected to.

        To subtract what some are expected to cost would leave all the error in that to the few others.
        """
        known = self.known(0) or all(map(self.known, rounds))
        expected = {k: self.of(k) if known else 1.0 for k in rounds}
        ratio = max(seconds, 1e-9) / sum(n * expected[k] for k, n in rounds.items())
        for k, cost in expected.items():
            weight = 1.0 if k not in self.looked or not known else CHEAPER if ratio < 1 else DEARER
            self.looked[k] = cost * (1 + weight * (ratio - 1))

    def known(self, k: int) -> bool:
        """Whether a round was measured."""
        return k in self.looked or k in self.noted

    def of(self, k: int) -> float:
        """What a round costs, or is thought to cost; that with no guess must be known."""
        if k in self.looked:
            return self.looked[k]
        if k in self.noted:
            return self.noted[k] * self._scale()
        return self.of(0) * (1 + GUESS_COST * abs(k))

    def _scale(self) -> float:
        ratios = [cost / self.noted[k] for k, cost in self.looked.items() if k in self.noted]
        return sum(ratios) / len(ratios) if ratios else 1.0


class _Share:
    """A share of many, the older counting less."""

    def __init__(self, first: float, half_life: float = HALF_LIFE, weight: float = FIRST_WEIGHT) -> None:
        self.some, self.all, self.half_life = first * weight, weight, half_life

    @property
    def value(self) -> float:
        return self.some / self.all

    def add(self, some: float, of: float) -> None:
        self.fade(of)
        self.some, self.all = self.some + some, self.all + of

    def fade(self, of: float) -> None:
        """Let what is known count less, as if so many had been added."""
        kept = 0.5 ** (of / self.half_life)
        self.some, self.all = self.some * kept, self.all * kept
