"""The number of guesses follows what guesses bring and cost, simulated: found, given up, and taken up again."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from subquad.engine.pace import IN_VAIN, LONGEST, WEIGHED, Pace
from subquad.engine.trace import Look

Cost = Callable[[int], float]
COSTS: dict[str, Cost] = {
    "cheap": lambda k: 1 + 0.05 * k,
    "middling": lambda k: 1 + 0.15 * k,
    "dear": lambda k: 1 + 0.5 * k,
    "a step and then flat": lambda k: 1.4 + 0.02 * k if k else 1.0,
}


class World:
    """Rounds whose guesses stand with probability `accepted` each, and that cost what `cost` says."""

    def __init__(self, pace: Pace, cost: Cost, *, rows: int = 8, rounds: int = 8) -> None:
        self.pace, self.cost, self.rows, self.rounds = pace, cost, rows, rounds
        self.random = random.Random(0)
        self.seconds, self.tokens, self.chosen = 0.0, 0, list[int]()

    def run(self, looks: int, accepted: float, *, covered: float = 1.0, slow: float = 1.0) -> None:
        """Go on for some looks, and forget what was counted before; every round takes `slow` times as long."""
        self.seconds, self.tokens, self.chosen = 0.0, 0, []
        for _ in range(looks):
            k, kept, judged, guessed = self.pace.choose(), 0, 0, 0
            for _ in range(self.rows * self.rounds if k else 0):
                if self.random.random() < covered:
                    guessed += k
                    stands = 0
                    while stands < k and self.random.random() < accepted:
                        stands += 1
                    kept += stands
                    judged += min(stands + 1, k)
            tokens = self.rows * self.rounds + kept
            seconds = self.rounds * self.cost(k) * slow
            self.pace.learn(Look(self.rows, k, self.rounds, tokens, guessed, judged, kept, seconds))
            self.seconds, self.tokens = self.seconds + seconds, self.tokens + tokens
            self.chosen.append(k)

    def share(self, accepted: float, covered: float = 1.0) -> float:
        """Tokens a second, as a share of what the best k would give."""
        best = max(gain(k, accepted, covered) / self.cost(k) for k in self.pace.ladder)
        return self.tokens / self.rows / self.seconds / best


def gain(k: int, accepted: float, covered: float = 1.0) -> float:
    return 1 + covered * sum(accepted**i for i in range(1, k + 1))


@pytest.mark.parametrize(
    ("most", "ladder"),
    [(0, [0]), (1, [0, 1]), (2, [0, 1, 2]), (3, [0, 1, 3]), (4, [0, 1, 3, 4]), (7, [0, 1, 3, 7]),
     (8, [0, 1, 3, 7, 8]), (15, [0, 1, 3, 7, 15])],
)  # fmt: skip
def test_with_its_last_token_a_row_reads_powers_of_two_up_to_the_most(most: int, ladder: list[int]) -> None:
    assert Pace(most).ladder == ladder


def test_a_fixed_number_is_kept_whatever_it_brings() -> None:
    world = World(Pace(5, fixed=True), COSTS["dear"])
    world.run(50, 0.0)
    assert set(world.chosen) == {5}


def test_none_is_none() -> None:
    world = World(Pace(0), COSTS["cheap"])
    world.run(50, 0.9)
    assert set(world.chosen) == {0}


def test_what_a_plain_round_costs_is_measured_first() -> None:
    pace = Pace(8)
    assert pace.choose() == 0
    assert pace.choose() == 0


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("size", [(1, 1), (4, 4), (16, 8)])
@pytest.mark.parametrize("most", [1, 5, 16])
def test_guesses_that_never_stand_cost_at_most_a_twentieth(cost: str, size: tuple[int, int], most: int) -> None:
    world = World(Pace(most), COSTS[cost], rows=size[0], rounds=size[1])
    world.run(2_000, 0.0)
    assert world.seconds <= 1.05 * 2_000 * size[1]
    # In the long run only one try in so many looks is left, from time to time.
    assert sum(k > 0 for k in world.chosen[1_000:]) <= 1_000 // LONGEST + 1


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("accepted", [0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95])
def test_nearly_the_best_number_is_found(cost: str, accepted: float) -> None:
    """From the sixtieth look on, of 64 rounds each: at least 19 of 20 tokens that the best k would give.

    Neighbours on the ladder are nearly as good where the optimum is flat, so the tokens are compared and not k.
    """
    world = World(Pace(8), COSTS[cost])
    world.run(60, accepted)
    world.run(400, accepted)
    assert world.share(accepted) >= 0.95


def test_the_best_number_itself_is_found_where_it_is_clear() -> None:
    for accepted, cost, best in ((0.95, "cheap", 8), (0.3, "middling", 1), (0.3, "dear", 0), (0.9, "dear", 3)):
        world = World(Pace(8), COSTS[cost])
        assert max(world.pace.ladder, key=lambda k, a=accepted, c=cost: gain(k, a) / COSTS[c](k)) == best
        world.run(60, accepted)
        world.run(200, accepted)
        assert sum(k == best for k in world.chosen) >= 180


def test_a_drafter_that_seldom_has_a_guess_is_rated_by_what_it_covers() -> None:
    """Always right, but only one time in twenty: too seldom for what a round with room for guesses costs."""
    world = World(Pace(4), COSTS["a step and then flat"])
    world.run(60, 0.98, covered=0.05)
    world.run(400, 0.98, covered=0.05)
    assert world.share(0.98, 0.05) >= 0.95
    assert sum(k > 0 for k in world.chosen) < 20


@pytest.mark.parametrize("cost", ["cheap", "middling", "a step and then flat"])
def test_guesses_are_taken_up_again_and_given_up_again(cost: str) -> None:
    """A try comes every LONGEST looks at least, and a few tries are enough; giving up takes some looks."""
    world = World(Pace(8), COSTS[cost])
    for _ in range(2):
        world.run(1_500, 0.0)
        assert world.chosen[-1] == 0 or sum(world.chosen[-LONGEST:]) == 1
        world.run(4 * LONGEST, 0.9)
        world.run(300, 0.9)
        assert world.share(0.9) >= 0.95
        world.run(40, 0.0)
        world.run(200, 0.0)
        assert world.seconds <= 1.05 * 200 * world.rounds


def test_a_first_look_that_took_long_is_not_believed_for_ever() -> None:
    """As compilation and first allocations make it: plain rounds look dear, and guesses that never stand a gain."""
    world = World(Pace(8), COSTS["middling"])
    world.run(1, 0.0, slow=10)
    world.run(200, 0.0)
    world.run(2_000, 0.0)
    assert world.seconds <= 1.05 * 2_000 * world.rounds


def test_rounds_that_have_become_cheaper_all_alike_are_measured_again() -> None:
    """Many rows end and few are left: each round takes a tenth, with guesses that no longer stand."""
    world = World(Pace(8), COSTS["middling"])
    world.run(300, 0.9)
    assert world.chosen[-1] == 8
    world.run(200, 0.0, slow=0.1)
    world.run(2_000, 0.0, slow=0.1)
    assert world.seconds <= 1.05 * 0.1 * 2_000 * world.rounds


@pytest.mark.parametrize("accepted", [0.5, 0.7, 0.8, 0.9])
@pytest.mark.parametrize("cost", ["cheap", "middling", "a step and then flat"])
def test_one_row_and_one_round_a_look_are_enough_to_find_it(cost: str, accepted: float) -> None:
    """Each look tells little here; over 3,000 of them nine of ten tokens that the best k would give."""
    world = World(Pace(8), COSTS[cost], rows=1, rounds=1)
    world.run(200, accepted)
    world.run(3_000, accepted)
    assert world.share(accepted) >= 0.9


def test_what_is_done_for_the_first_time_says_nothing_of_its_cost() -> None:
    """The first rounds of a number compile and are captured: seconds, where later ones take milliseconds."""
    pace = Pace(4)
    for k in pace.ladder:
        pace.learn(Look(1, k, 8, 8, 8 * k, 8 * k, 8 * k, 10.0, steady=False))
    assert pace.choose() == 0  # nothing is measured yet
    pace.learn(Look(1, 0, 8, 8, 0, 0, 0, 0.8))
    for _ in range(3):
        k = pace.choose()
        assert k > 0
        pace.learn(Look(1, k, 8, 8 + 8 * k, 8 * k, 8 * k, 8 * k, 0.8 * (1 + 0.1 * k)))
    assert pace.choose() == 4


def test_numbers_of_slots_have_costs_of_their_own() -> None:
    """Guesses are checked for nothing by one row, and cost many rows dearly: each keeps its own best number."""
    pace, chosen = Pace(4), {1: list[int](), 32: list[int]()}
    for _ in range(60):
        for slots in (1, 32):
            k = pace.choose(slots)
            chosen[slots].append(k)
            cost = (1 + 0.02 * k) if slots == 1 else (1 + 3.0 * k)
            kept = int(0.8 * 8 * k) * slots
            pace.learn(Look(slots, k, 8, 8 * slots + kept, 8 * k * slots, 8 * k * slots, kept, 8 * cost, slots=slots))
    assert sum(k == 4 for k in chosen[1][20:]) >= 36
    assert sum(k == 0 for k in chosen[32][20:]) >= 34


def test_guesses_that_nobody_read_say_at_once_that_reading_them_would_pay() -> None:
    """A text that repeats nothing, then one that is a copy: within a few looks of eight tokens guesses are read."""
    world = World(Pace(8), COSTS["cheap"], rows=1)
    for _ in range(300):
        world.run(1, 0.0, covered=0.0)
        if world.chosen == [0]:
            world.pace.see(8, 0, 0, 0)
    waited = 0
    while not any(world.chosen) and waited <= 8:
        world.pace.see(8, 8, 8, 8)
        world.run(1, 0.98)
        waited += 1
    assert any(world.chosen)
    world.run(60, 0.98)
    assert world.share(0.98) >= 0.9


def test_notes_hold_until_looks_tell_and_follow_their_scale() -> None:
    pace = Pace(4)
    for k, cost in ((0, 1.0), (1, 1.1), (3, 1.2), (4, 1.4)):
        pace.note(8, k, cost)
    assert pace.costs(8) == {0: 1.0, 1: 1.1, 3: 1.2, 4: 1.4}
    assert pace.costs(1) == {}
    pace.learn(Look(8, 0, 8, 64, 0, 0, 0, seconds=8 * 2.0, slots=8))
    assert pace.costs(8) == pytest.approx({0: 2.0, 1: 2.2, 3: 2.4, 4: 2.8})
    pace.learn(Look(8, 3, 8, 64, 0, 0, 0, seconds=8 * 3.6, slots=8))
    # Twice what was noted without guesses, three times with three.
    assert pace.costs(8) == pytest.approx({0: 2.0, 1: 2.75, 3: 3.6, 4: 3.5})
    pace.note(8, 3, 1.2)
    assert pace.costs(8) == pytest.approx({0: 2.0, 1: 2.2, 3: 2.4, 4: 2.8})


def test_what_is_watched_is_not_tried_where_it_does_not_pay() -> None:
    pace = Pace(4, watched=True)
    world = World(pace, COSTS["dear"], rows=1)
    for k in pace.ladder:
        pace.note(1, k, COSTS["dear"](k))
    for _ in range(20):
        pace.see(4, 4, 1, 0)
    world.run(400, 0.0)
    assert set(world.chosen) == {0}
    # What is seen brings it back, at once.
    for _ in range(20):
        pace.see(4, 4, 4, 4)
    assert pace.choose() > 0


class Runs:
    """Rounds of one row whose guesses all stand or all fall; those that nobody reads are seen, as copies are."""

    def __init__(self, cost: Cost, *, asks: int = 0, most: int = 15) -> None:
        self.pace, self.cost, self.asks = Pace(most, watched=True, asks=asks), cost, asks
        self.random = random.Random(0)
        for k in self.pace.ladder:
            self.pace.note(1, k, self._seconds(k, asked=bool(asks and k)))
        if asks:
            self.pace.note(1, IN_VAIN, self._seconds(0, asked=True))

    def _seconds(self, k: int, *, asked: bool) -> float:
        return self.cost(k) + 0.08 * asked

    def run(self, looks: int, covered: float, stands: float) -> float:
        """Tokens a second of some looks at 8 rounds, where plain rounds give one."""
        seconds, tokens = 0.0, 0
        for _ in range(looks):
            k, kept, guessed, read, spent = self.pace.choose(), 0, 0, 0, 0.0
            for _ in range(8):
                there = self.random.random() < covered
                reads = k if there or not self.asks else 0
                read += reads > 0
                spent += self._seconds(reads, asked=bool(self.asks and k))
                guessed += k * there
                kept += k * (there and self.random.random() < stands)
            fell = guessed // k - kept // k if k else 0
            self.pace.learn(Look(1, k, 8, 8 + kept, guessed, kept + fell, kept, spent, read=read))
            if not k:
                there = self.random.random() < covered
                stood = 8 * (there and self.random.random() < stands)
                self.pace.see(8, 8 * there, max(stood, int(there)), stood)
            seconds, tokens = seconds + spent, tokens + 8 + kept
        return tokens / seconds


@pytest.mark.parametrize("asks", [0, 4])
@pytest.mark.parametrize("cost", ["cheap", "middling", "a step and then flat"])
@pytest.mark.parametrize(("covered", "stands"), [(0.3, 0.05), (0.3, 0.3), (0.8, 0.1), (0.8, 0.5), (1.0, 0.9)])
def test_guesses_that_stand_all_or_none_never_cost_a_twentieth(
    covered: float, stands: float, cost: str, asks: int
) -> None:
    runs = Runs(COSTS[cost], asks=asks)
    runs.run(60, covered, stands)
    assert runs.run(1_000, covered, stands) >= 0.95


@pytest.mark.parametrize("cost", ["cheap", "middling", "a step and then flat"])
def test_asking_pays_where_copies_come_and_go(cost: str) -> None:
    """Free writing and copying in turns of 12 looks: far ahead of reading guesses where there are none."""
    rates: dict[int, float] = {}
    for asks in (0, 4):
        runs = Runs(COSTS[cost], asks=asks)
        parts = [(runs.run(12, 0.1, 0.1), runs.run(12, 0.7, 0.8)) for _ in range(60)][5:]
        free, copied = (sum(part) / len(part) for part in zip(*parts, strict=True))
        rates[asks] = 2 / (1 / free + 1 / copied)
        assert rates[asks] >= 0.95
    assert rates[4] > 1.2 * rates[0]


def test_a_round_that_asked_in_vain_has_a_cost_of_its_own() -> None:
    pace = Pace(3, watched=True, asks=4)
    for k, cost in ((0, 1.0), (1, 1.3), (3, 1.5), (IN_VAIN, 1.1)):
        pace.note(1, k, cost)
    pace.learn(Look(1, 3, 8, 14, 6, 6, 6, seconds=2 * 1.5 + 6 * 1.1, read=2))
    assert pace.costs(1) == pytest.approx({0: 1.0, 1: 1.3, 3: 1.5, IN_VAIN: 1.1})
    pace.learn(Look(1, 3, 8, 8, 0, 0, 0, seconds=8 * 1.1, read=0))
    assert pace.costs(1) == pytest.approx({0: 1.0, 1: 1.3, 3: 1.5, IN_VAIN: 1.1})


def test_a_note_that_was_too_high_leaves_no_absurd_cost_to_the_few_rounds_beside_it() -> None:
    """Six of eight rounds asked in vain, which was noted at 1.5 in place of 1.1: two that read took 1.5, not 0.3."""
    pace = Pace(3, watched=True, asks=4)
    for k, cost in ((0, 1.0), (1, 1.3), (3, 1.5), (IN_VAIN, 1.5)):
        pace.note(1, k, cost)
    seconds = 2 * 1.5 + 6 * 1.1
    for _ in range(20):
        pace.learn(Look(1, 3, 8, 14, 6, 6, 6, seconds, read=2))
    costs = pace.costs(1)
    assert 2 * costs[3] + 6 * costs[IN_VAIN] == pytest.approx(seconds)
    assert costs[3] > 1.1
    # Looks that read in none of their rounds tell them apart.
    for _ in range(150):
        pace.learn(Look(1, 3, 8, 8, 0, 0, 0, seconds=8 * 1.1, read=0))
        pace.learn(Look(1, 3, 8, 14, 6, 6, 6, seconds, read=2))
    assert pace.costs(1)[3] == pytest.approx(1.5, rel=0.01)


@pytest.mark.parametrize(
    ("worth", "k", "read"), [(0, 15, 0), (1, 15, 1), (2, 15, 3), (9, 15, 15), (15, 3, 3), (9, 7, 7)]
)
def test_a_round_reads_the_fewest_of_the_ladder_that_hold_what_is_worth_it(worth: int, k: int, read: int) -> None:
    assert Pace(15).holding(worth, k) == read
    assert Pace(15, fixed=True).holding(worth, 15) == (15 if worth else 0)


def test_what_is_weighed_is_asked_for_in_full_or_not_at_all() -> None:
    """Guesses stand now and then: any one k would do worse than none, so many as are worth it do better, and back."""
    pace, chosen = Pace(15, watched=True, asks=4, weighed=True), list[int]()
    for k in pace.ladder:
        pace.note(1, k, COSTS["middling"](k))
    pace.note(1, IN_VAIN, 1.08)
    for stands in (True, False):
        for _ in range(60):
            chosen.append(pace.choose())
            if chosen[-1]:
                # Of eight rounds two read 15 guesses, which stand or fall, and six read one, which falls.
                readable, kept = 2 * 15 + 6, 30 * stands
                judged = kept + 6 + 2 * (not stands)
                seconds = 2 * COSTS["middling"](15) + 6 * COSTS["middling"](1)
                pace.learn(Look(1, 15, 8, 8 + kept, readable, judged, kept, seconds, read=8, readable=readable))
            else:
                pace.learn(Look(1, 0, 8, 8, 0, 0, 0, 8.0))
                pace.see(1, 1, 1, int(stands))
    assert set(chosen) == {0, 15}
    assert sum(k > 0 for k in chosen[10:60]) >= 45
    # What was read fades while nothing is, and after some looks it may be asked once more.
    assert sum(k > 0 for k in chosen[90:]) <= 4
    # What those rounds cost stands by itself: a round that reads 15 costs what it did.
    costs = pace.costs(1)
    assert costs[WEIGHED] == pytest.approx((2 * COSTS["middling"](15) + 6 * COSTS["middling"](1)) / 8)
    assert costs[15] == pytest.approx(COSTS["middling"](15))
    # Among more slots nobody asks, and the ladder is what there is.
    for k in pace.ladder:
        pace.note(8, k, COSTS["dear"](k))
    for _ in range(40):
        pace.see(8, 8, 8, 4)
    assert pace.choose(8) < 15


def test_the_share_of_rounds_with_guesses_is_not_that_of_the_guesses_that_were_not_worth_it() -> None:
    pace = Pace(15, watched=True, asks=4, weighed=True)
    pace.note(1, 0, 1.0)
    for _ in range(40):
        pace.learn(Look(1, 15, 8, 12, 6, 6, 2, 8.0, read=6, readable=6))
    assert pace.covered == pytest.approx(0.75, abs=0.01)
