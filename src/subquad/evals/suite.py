"""A model beside its teacher and a baseline: one table of lines, one report, and one way to measure and compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from subquad.core.errors import ConfigError, nearest
from subquad.evals.memo import Memo, digest, fingerprint
from subquad.evals.report import Section
from subquad.evals.scoring import Progress
from subquad.evals.stats import Interval, Paired
from subquad.evals.tasks import ChoiceResult, ClozeResult
from subquad.models.teachers import LoadedModel

ROLES = ("model", "baseline", "teacher")
PAIRS = (("model", "teacher"), ("baseline", "teacher"), ("model", "baseline"))
# A teacher whose lower limit is not this far above chance has nothing that a student could be seen to keep.
INFORMATIVE = 0.05

Score = Callable[[Any], Interval]
Compare = Callable[[Any, Any], Paired]
Begin = Callable[[str, str], Progress]
"""Called with a name and a unit when a measurement begins; returns what to tell of its progress."""


@dataclass(frozen=True)
class Line:
    """One measure.

    Attributes:
        id: dotted and stable.
        name: in words.
        unit: of the figures.
        better: ``higher`` or ``lower``.
        figures: of each role that was measured; ``model`` is always there.
        paired: two roles compared, first against second, paired over what was measured.
        note: why a comparison is missing, or "".
        shape: sizes by name.
    """

    id: str
    name: str
    unit: str
    better: str
    figures: Mapping[str, Interval]
    paired: Mapping[tuple[str, str], Paired] = field(default_factory=dict[tuple[str, str], Paired])
    note: str = ""
    shape: dict[str, Any] = field(default_factory=dict[str, Any])


class Suite:
    """Measures ``model``, ``teacher`` and ``baseline`` on the same windows, items and questions."""

    def __init__(
        self, models: Mapping[str, LoadedModel], begin: Begin, *, batch_tokens: int = 4096, memo: Memo | None = None
    ):
        """Check that all can be compared.

        Args:
            models: by role: ``model``, with its tokenizer, and what it is measured against: ``teacher``, whose share
                is kept, and ``baseline``, which is to be beaten.
            begin: see `Begin`.
            batch_tokens: tokens read at once.
            memo: keeps the figures of all but ``model`` for the next one.

        Raises:
            ConfigError: unknown roles, no tokenizer, or different ones.
        """
        if "model" not in models or not models.keys() <= set(ROLES):
            wrong = next((role for role in models if role not in ROLES), "")
            raise ConfigError(
                f"expected the role model and others of {', '.join(ROLES)}, got {list(models)}{nearest(wrong, ROLES)}"
            )
        first = models["model"]
        if first.tokenizer is None:
            raise ConfigError(f"{first.spec}: expected a model with its tokenizer, got none; put it beside the model")
        for role, other in models.items():
            if other.tokenizer is None or other.tokenizer.get_vocab() != first.tokenizer.get_vocab():
                raise ConfigError(
                    f"expected one tokenizer for all, got another for {role} than for {first.name}; name another {role}"
                )
        self.models = {role: models[role] for role in ROLES if role in models}
        self.labels = {role: role for role in self.models} | ({} if first.name in ROLES else {"model": first.name})
        self.tokenizer, self.begin, self.batch_tokens, self.memo = first.tokenizer, begin, batch_tokens, memo
        self.lines: list[Line] = []
        self.sections: list[Section] = []
        self.tasks: dict[str, dict[str, ClozeResult | ChoiceResult]] = {}
        self._fingerprints: dict[str, str] = {}

    def measure(
        self,
        what: str,
        unit: str,
        kind: type[Any],
        data: tuple[Any, ...],
        make: Callable[[LoadedModel, Progress], Any],
        roles: Sequence[str] = ROLES,
    ) -> dict[str, Any]:
        """What `make` returns for each role, or what was kept of it: a `kind`, from `data` and the batch size."""
        found: dict[str, Any] = {}
        for who in (role for role in self.models if role in roles):
            run = partial(self._run, make, who, f"{what}, {who}", unit)
            if self.memo is None or who == "model":
                found[who] = run()
            else:
                found[who] = self.memo.get(kind, digest(self.fingerprint(who), self.batch_tokens, *data), run)
        return found

    def _run(self, make: Callable[[LoadedModel, Progress], Any], who: str, what: str, unit: str) -> Any:
        return make(self.models[who], self.begin(what, unit))

    def fingerprint(self, role: str) -> str:
        """See `fingerprint`."""
        if role not in self._fingerprints:
            self._fingerprints[role] = fingerprint(self.models[role])
        return self._fingerprints[role]

    def uninformative(self, teacher: Interval, chance: float = 0.0) -> str:
        """Why nothing can be kept of a teacher that scores so, or "" where something can."""
        low = teacher.value if teacher.low is None else teacher.low
        return "" if low > chance + INFORMATIVE else f"the teacher scores {teacher.format('.3f')}: not informative"

    def add(
        self,
        id: str,
        name: str,
        unit: str,
        better: str,
        found: Mapping[str, Any],
        score: Score,
        shape: dict[str, Any],
        compare: Compare,
        *,
        between: Compare | None = None,
        chance: float | None = None,
    ) -> None:
        """Add a line.

        Args:
            id, name, unit, better, shape: see `Line`.
            found: result of each role.
            score: a result's figure.
            compare: two results, the second the teacher's, and any two unless `between` is given.
            between: the model's and the baseline's.
            chance: what guessing scores, where a teacher that hardly scores more leaves nothing to compare with.
        """
        figures = {who: score(result) for who, result in found.items()}
        note = self.uninformative(figures["teacher"], chance) if chance is not None and "teacher" in figures else ""
        paired: dict[tuple[str, str], Paired] = {}
        for first, second in PAIRS:
            if first in found and second in found and not (note and second == "teacher"):
                how = between if between is not None and second == "baseline" else compare
                paired[first, second] = how(found[first], found[second])
        self.lines.append(Line(id, name, unit, better, figures, paired, note, dict(shape)))
