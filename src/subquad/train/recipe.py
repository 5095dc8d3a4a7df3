"""A recipe: which mixers a conversion puts where, and in which stages they are trained. Data, not code."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from subquad.core.config import misfit
from subquad.core.errors import ConfigError, nearest
from subquad.train.loop import Budget
from subquad.train.optimiser import Rate
from subquad.train.stages import load_stage

PLACES = ("uniform", "chosen")
UNITS = {"k": 10**3, "m": 10**6, "b": 10**9}


@dataclass(frozen=True)
class Phase:
    """One stage of a recipe, with its budget and rate.

    Attributes:
        stage: file under ``train/stages``.
        rate: learning rate and its course.
        name: in logs, and for overriding; by default the stage's.
        share: of the recipe's tokens.
        tokens, minutes: a budget of its own instead.
        train: patterns of names of the parameters that train.
        new: patterns of those among them that train at the full rate, all others at `rate.old` times it; none is all of
            the new mixers' parameters, whether they came from the teacher or not.
        seq: tokens of a sequence, where it is another than the run's; a batch holds as many tokens.
        options: fields of the stage's ``Config``.
    """

    stage: str
    rate: Rate
    name: str = ""
    share: float | None = None
    tokens: int | None = None
    minutes: float | None = None
    train: tuple[str, ...] = ("*",)
    new: tuple[str, ...] = ()
    seq: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        """Be called like the stage, and refuse a share that is none."""
        object.__setattr__(self, "name", self.name or self.stage)
        object.__setattr__(self, "train", tuple(self.train))
        object.__setattr__(self, "new", tuple(self.new))
        if self.share is not None and not 0 <= self.share <= 1:
            raise ConfigError(
                f"phase {self.name}: expected a share of the tokens from 0 to 1, got {self.share}; fix it"
            )

    def budget(self, tokens: int | None) -> Budget | None:
        """What it may use when the whole recipe may use `tokens`; None leaves the phase out.

        Raises:
            ConfigError: it has a share of tokens that nobody gave; only 0 leaves such a phase out.
        """
        own = self.tokens
        if own is None and self.share is not None and (tokens is not None or self.share == 0):
            own = round(self.share * (tokens or 0))
        if own == 0 or self.minutes == 0:
            return None
        if own is not None or self.minutes is not None:
            return Budget(own, self.minutes)
        if self.share is not None:
            raise ConfigError(
                f"phase {self.name}: expected --tokens, of which it takes {self.share:.3g}, got none; give --tokens, "
                f"or the phase its own: --stage {self.name}.tokens=100k (0 leaves it out)"
            )
        return None


@dataclass(frozen=True)
class Recipe:
    """How a student is made and trained.

    Attributes:
        phases: in their order.
        mixer: slug of the new mixer, or of several that take turns; "" leaves it to whoever converts.
        options: ``KEY=VALUE`` or ``MIXER.KEY=VALUE``, for the mixers' configs.
        place: ``uniform`` spreads what stays attention evenly over the layers; ``chosen`` keeps the key/value heads
            whose loss of sight costs most.
        keep: share of the attention that stays, where nobody says another.
        batch, seq: sequences of a batch and tokens of a sequence, where nobody says others.
        calibrate: fit decay, write strength, output scale and output projection of each layer before training.
    """

    phases: tuple[Phase, ...]
    mixer: str | tuple[str, ...] = ""
    options: tuple[str, ...] = ()
    place: str = "uniform"
    keep: float | None = None
    batch: int = 8
    seq: int = 1024
    calibrate: bool = False

    def __post_init__(self) -> None:
        """Refuse phases that can't be told apart or go back, stages and ways of placing that are not known."""
        names = [phase.name for phase in self.phases]
        if len(set(names)) < len(names):
            raise ConfigError(f"recipe: expected phases of different names, got {', '.join(names)}; rename one")
        if self.place not in PLACES:
            raise ConfigError(f"recipe: unknown place {self.place!r}{nearest(self.place, PLACES)}")
        whole, converted = "", 0.0
        for phase in self.phases:
            if load_stage(phase.stage).layerwise:
                if whole:
                    raise ConfigError(
                        f"recipe: expected phase {phase.name} before {whole}, got it after: it learns layer by layer "
                        "from the teacher's stream, and the student has one of its own by then; move it up"
                    )
                continue
            whole = whole or phase.name
            # Only stepwise leaves layers to the teacher; later it would set aside what has learned already.
            share = float(phase.options.get("converted", 1.0)) if phase.stage == "stepwise" else 1.0
            if share < converted:
                raise ConfigError(
                    f"recipe: expected phase {phase.name} to convert at least {converted:g} of the layers, as one "
                    f"before it does, got {share:g}; raise {phase.name}.converted"
                )
            converted = share

    @property
    def mixers(self) -> tuple[str, ...]:
        """The slugs."""
        return (self.mixer,) if isinstance(self.mixer, str) and self.mixer else tuple(self.mixer)

    def budgets(self, tokens: int | None) -> dict[str, Budget]:
        """Budget of every phase that has one, by name, in order; none at all where 0 was asked for.

        Raises:
            ConfigError: nothing has one, or a phase has a share of `tokens` that nobody gave.
        """
        found = {phase.name: phase.budget(tokens) for phase in self.phases}
        budgets = {name: budget for name, budget in found.items() if budget is not None}
        if not budgets and 0 not in (tokens, *(x for phase in self.phases for x in (phase.tokens, phase.minutes))):
            first = self.phases[0].name if self.phases else "align"
            got = "none" if tokens is None else f"--tokens {tokens} and no phase with a share of them"
            raise ConfigError(
                f"expected a budget, got {got}; give a stage its own: --stage {first}.tokens=100k (0 for no training)"
            )
        return budgets

    def schedule(self, tokens: int | None, seq: int) -> list[str]:
        """What every phase will do, a line each.

        Args:
            tokens: as in `budgets`.
            seq: tokens of a sequence, of phases that have no length of their own.

        Raises:
            ConfigError: as in `budgets`.
        """
        budgets, lines = self.budgets(tokens), list[str]()
        for phase in self.phases:
            if phase.name not in budgets:
                lines.append(f"{phase.name}: left out")
                continue
            budget = budgets[phase.name]
            ends = [] if budget.tokens is None else [f"{budget.tokens:,} tokens"]
            ends += [] if budget.minutes is None else [f"{budget.minutes:.3g} minutes"]
            size = f"in sequences of {phase.seq or seq:,}"
            lines.append(f"{phase.name}: {' or '.join(ends)} {size}, rate {phase.rate.lr:g}")
        return lines

    def layerwise(self, tokens: int | None) -> bool:
        """Whether nothing but the new mixers is trained, each for its own layer."""
        budgets = self.budgets(tokens)
        return all(load_stage(phase.stage).layerwise for phase in self.phases if phase.name in budgets)


# For whoever names mixers and budgets and no recipe.
PLAIN = Recipe((Phase("align", Rate(1e-3)), Phase("distill", Rate(1e-3))))


def cached(recipe: Recipe, folder: str) -> Recipe:
    """`recipe` with every phase of the stage distill reading the teacher's logits from `folder`: no teacher runs there.

    Raises:
        ConfigError: no such phase, or one whose loss can't be had of a cache.
    """
    if all(phase.stage != "distill" for phase in recipe.phases):
        names = ", ".join(phase.stage for phase in recipe.phases)
        raise ConfigError(f"--teacher-logits: expected a recipe with a stage distill, got {names}; leave it out")

    def changed(phase: Phase) -> Phase:
        if phase.stage != "distill":
            return phase
        options = dict(phase.options)
        if (options.pop("temperature", 1), options.pop("reverse", 0)) != (1, 0):
            raise ConfigError(
                f"--teacher-logits: expected phase {phase.name} at temperature 1 and reverse 0, got {phase.options}; "
                "other losses need the whole distribution, and so the teacher"
            )
        return dataclasses.replace(phase, stage="distill_cached", options={"cache": folder, **options})

    return dataclasses.replace(recipe, phases=tuple(map(changed, recipe.phases)))


def override(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """`recipe` with ``PHASE.KEY=VALUE`` put in: a field of the phase, of its rate, or of its stage's ``Config``.

    Args:
        recipe: unchanged.
        settings: ``distill.lr=3e-4``, ``align.tokens=5M``, ``align.train=*.k_map_*,*.q_map_*``; values are numbers,
            JSON, or words; tokens take k, M and B.

    Raises:
        ConfigError: a phase or key that is not there, with the nearest, or a value of another type.
    """
    phases = {phase.name: phase for phase in recipe.phases}
    for setting in settings:
        name, equals, text = setting.partition("=")
        phase, dot, key = name.partition(".")
        if not equals or not dot:
            raise ConfigError(f"--stage {setting}: expected PHASE.KEY=VALUE, got no {'=' if dot else '.'!r}; add it")
        if phase not in phases:
            raise ConfigError(f"--stage {setting}: unknown phase {phase!r}{nearest(phase, phases)}")
        phases[phase] = _changed(phases[phase], setting, key, text)
    return dataclasses.replace(recipe, phases=tuple(phases.values()))


def _changed(phase: Phase, setting: str, key: str, text: str) -> Phase:
    owners = {
        "phase": {f.name: f for f in dataclasses.fields(Phase) if f.name not in ("stage", "name", "rate", "options")},
        "rate": {f.name: f for f in dataclasses.fields(Rate)},
        "options": {f.name: f for f in dataclasses.fields(load_stage(phase.stage).Config)},
    }
    known = [name for fields in owners.values() for name in fields]
    if key not in known:
        raise ConfigError(f"--stage {setting}: unknown key {key!r}{nearest(key, known)}")
    if key == "tokens":
        return dataclasses.replace(phase, tokens=count(f"--stage {phase.name}.tokens", text))
    if key in ("train", "new"):
        return dataclasses.replace(phase, **{key: tuple(text.split(",")) if text else ()})
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    owner = next(name for name, fields in owners.items() if key in fields)
    cls: Any = {"phase": Phase, "rate": Rate, "options": load_stage(phase.stage).Config}[owner]
    if expected := misfit(value, typing.get_type_hints(cls)[key]):
        raise ConfigError(f"--stage {setting}: expected {expected}, got {text!r}; write a value of that type")
    if owner == "phase":
        return dataclasses.replace(phase, **{key: value})
    if owner == "rate":
        return dataclasses.replace(phase, rate=dataclasses.replace(phase.rate, **{key: value}))
    return dataclasses.replace(phase, options={**phase.options, key: value})


def count(option: str, text: str) -> int:
    """A number of tokens: ``30000``, ``30k``, ``5M``, ``1.5B``.

    Raises:
        ConfigError: something else.
    """
    unit = UNITS.get(text[-1:].lower(), 1)
    try:
        number = float((text[:-1] if unit > 1 else text).replace("_", ""))
    except ValueError:
        number = -1.0
    if number < 0 or number == float("inf"):
        raise ConfigError(f"{option} {text}: expected a number of tokens like 30000, 30k or 5M; write it so")
    return round(number * unit)
