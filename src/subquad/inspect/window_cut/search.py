"""Which units to keep: by rank, by greedy or beam search, with swaps at the end; evenly spread as the baseline."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from subquad.core.errors import ConfigError, nearest
from subquad.evals.scoring import Progress
from subquad.inspect.window_cut.cut import Measured, Unit, WindowCut, Yardstick

SEARCHES = ("rank", "greedy", "beam")

Report = Callable[[str], None]


@dataclass(frozen=True)
class Choice:
    """A set of units that keep their whole context while all others are cut.

    Attributes:
        kept: in order.
        measured: with all others cut at once.
        cost: of it, from `Yardstick.cost`.
    """

    kept: tuple[Unit, ...]
    measured: Measured
    cost: float


def joint(cut: WindowCut, yardstick: Yardstick, kept: Collection[Unit]) -> Choice:
    """What it costs to cut all but `kept` at once."""
    measured = cut.toggle(sorted(set(cut.units) - set(kept)), ())[None]
    return Choice(tuple(sorted(kept)), measured, yardstick.cost(measured))


def spreads(cut: WindowCut, yardstick: Yardstick, n: int) -> dict[str, Choice]:
    """The baselines of `n` kept units: evenly spread, and where units are heads also evenly spread whole layers."""
    sets = {"evenly spread": uniform(cut.units, n)}
    if len({unit.layer for unit in cut.units}) < len(cut.units):
        sets["evenly spread layers"] = uniform_layers(cut.units, n)
    return {name: joint(cut, yardstick, kept) for name, kept in sets.items()}


def uniform(units: Sequence[Unit], n: int) -> tuple[Unit, ...]:
    """`n` of `units`, evenly spread."""
    return tuple(units[int((i + 0.5) * len(units) / n)] for i in range(n))


def uniform_layers(units: Sequence[Unit], n: int) -> tuple[Unit, ...]:
    """Evenly spread whole layers, as many as `n` units fill."""
    layers = sorted({unit.layer for unit in units})
    of = {layer: [unit for unit in units if unit.layer == layer] for layer in layers}
    stay = n * len(layers) // len(units)
    return tuple(u for i in range(stay) for u in of[layers[int((i + 0.5) * len(layers) / stay)]])


def choose(
    cut: WindowCut,
    yardstick: Yardstick,
    keeps: Sequence[float],
    *,
    search: str = "greedy",
    backward: bool = False,
    picks: int = 1,
    width: int = 4,
    swaps: int = 0,
    ranked: dict[Unit | None, Measured] | None = None,
    report: Report | None = None,
    progress: Progress | None = None,
) -> tuple[dict[float, Choice], list[Choice]]:
    """The units to keep at each share of `keeps`, and the course of the search.

    Args:
        cut: the model.
        yardstick: of it.
        keeps: shares of the units, from 0 to below 1.
        search: ``rank`` keeps the units whose cut alone costs most; ``greedy`` is `grow` of width 1, whose choices are
            nested; ``beam`` is `grow` of `width`.
        backward, picks: as in `grow`.
        width: sets that a beam search follows.
        swaps: most swaps that then improve each choice; see `refine`.
        ranked: what each unit costs alone, for ``rank``, where it was measured already.
        report: called with a line for every round and swap.
        progress: as in `WindowCut.toggle`, for every round.

    Raises:
        ConfigError: an unknown search, a share that is none, or a count below 1.
    """
    if search not in SEARCHES:
        raise ConfigError(f"search: unknown {search!r}{nearest(search, SEARCHES)}")
    sizes = {keep: cut.count(keep) for keep in keeps}
    rounds: list[Choice] = []
    if search == "rank":
        alone = ranked or cut.toggle((), cut.units, progress)
        order = sorted(cut.units, key=lambda unit: (-yardstick.cost(alone[unit]), unit))
        found = {keep: joint(cut, yardstick, order[:n]) for keep, n in sizes.items()}
    else:
        rounds = grow(
            cut,
            yardstick,
            list(sizes.values()),
            backward=backward,
            picks=picks,
            width=width if search == "beam" else 1,
            report=report,
            progress=progress,
        )
        by_size = {len(choice.kept): choice for choice in rounds}
        found = {keep: by_size[n] for keep, n in sizes.items()}
    if swaps:
        refined = {
            keep: refine(cut, yardstick, choice, swaps=swaps, report=report, progress=progress)
            for keep, choice in found.items()
        }
        return refined, rounds
    return found, rounds


def grow(
    cut: WindowCut,
    yardstick: Yardstick,
    sizes: Sequence[int],
    *,
    backward: bool = False,
    picks: int = 1,
    width: int = 1,
    report: Report | None = None,
    progress: Progress | None = None,
) -> list[Choice]:
    """From everything cut, keep more and more: the best choice of each round, through every size asked for.

    A round measures each cut unit whole again, with all other cuts in place, and keeps the `picks` whose return helps
    most. With `width` above 1 each of the best sets is followed by as many children, which differ in the last pick, and
    the best `width` of all children, measured, go on.

    Args:
        cut: the model.
        yardstick: of it.
        sizes: numbers of kept units to pass through.
        backward: start from the whole model instead and cut more and more, those that are missed least.
        picks: units that change in a round, at most.
        width: sets that are followed.
        report: called with a line a round.
        progress: as in `WindowCut.toggle`, for every round.

    Raises:
        ConfigError: a count below 1.
    """
    if picks < 1 or width < 1:
        raise ConfigError(f"expected picks and width of at least 1, got {picks} and {width}; 1 and 1 is plain greedy")
    units = frozenset(cut.units)
    start, measured = (units, yardstick.base) if backward else (frozenset[Unit](), yardstick.everything)
    rounds = [Choice(tuple(sorted(start)), measured, yardstick.cost(measured))]
    sets = [start]
    for size in sorted(set(sizes), reverse=backward):
        while left := abs(size - len(sets[0])):
            step = min(picks, left)
            children = dict[frozenset[Unit], None]()  # in order, each once
            for kept in sets:
                changing = sorted(kept if backward else units - kept)
                alone = cut.toggle(sorted(units - kept), changing, progress)
                costs = {unit: yardstick.cost(alone[unit]) for unit in changing}
                order = sorted(changing, key=lambda unit, costs=costs: (costs[unit], unit))
                first, last = order[: step - 1], order[step - 1 : step - 1 + width]
                children |= {kept ^ {*first, unit}: None for unit in last}
            found = sorted((joint(cut, yardstick, kept) for kept in children), key=lambda c: (c.cost, c.kept))
            rounds.append(found[0])
            sets = [frozenset(choice.kept) for choice in found[:width]]
            if report is not None:
                report(f"{len(found[0].kept)} of {len(units)} kept: joint cost {found[0].cost:.4f}")
    return rounds


def refine(
    cut: WindowCut,
    yardstick: Yardstick,
    choice: Choice,
    *,
    swaps: int = 1,
    report: Report | None = None,
    progress: Progress | None = None,
) -> Choice:
    """Swap units while that lowers the cost of the joint cut.

    A swap restores the cut unit that is missed most and cuts the kept one that is missed least, both measured with all
    other cuts in place; the search ends when the best swap does not help.

    Args:
        cut: the model.
        yardstick: of it.
        choice: where to start.
        swaps: most swaps; each costs about as much as measuring every unit.
        report: called with a line for every swap.
        progress: as in `WindowCut.toggle`, for each half of a swap.
    """
    units = set(cut.units)
    for _ in range(swaps):
        gone = units - set(choice.kept)
        if not gone or not choice.kept:
            break
        without = cut.toggle(sorted(gone), sorted(gone), progress)
        restored = min(sorted(gone), key=lambda unit: yardstick.cost(without[unit]))
        swapped = cut.toggle(sorted(gone - {restored}), choice.kept, progress)
        added = min(choice.kept, key=lambda unit: yardstick.cost(swapped[unit]))
        cost = yardstick.cost(swapped[added])
        if cost >= choice.cost:
            break
        if report is not None:
            report(f"{name(restored)} stays, {name(added)} is cut: joint cost {choice.cost:.4f} -> {cost:.4f}")
        kept = tuple(sorted({*choice.kept, restored} - {added}))
        choice = Choice(kept, swapped[added], cost)
    return choice


def name(unit: Unit) -> str:
    """A unit in words: of several heads, the layer is meant."""
    return f"layer {unit.layer}" + (f" head {unit.heads[0]}" if len(unit.heads) == 1 else "")
