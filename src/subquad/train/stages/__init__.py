"""The stages of training, one file each, chosen by its name; what they all are given, and what they share."""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from subquad.core.config import config_from_dict
from subquad.core.errors import ConfigError, nearest
from subquad.data import TokenStream
from subquad.models.stack import Stack
from subquad.train.loop import Stage


@dataclass(frozen=True)
class Machine:
    """How the work is laid out on the device; decides speed and memory, and nothing of the result.

    Attributes:
        rows: sequences run at once, a divisor of the batch; None is the whole batch.
        recompute: keep only the blocks' inputs for backward (arXiv 1604.06174): less memory, a third more time.
        compiled: compile what is trained, and the teacher.
    """

    rows: int | None = None
    recompute: bool = False
    compiled: bool = False


@dataclass(frozen=True)
class Work:
    """What a stage is given.

    Attributes:
        teacher: whose distribution counts; not changed.
        source: whose attention the new mixers stand for; not changed. The teacher itself, or a smaller model.
        student: trained in place.
        layers: indices of its converted layers.
        stream: batches of tokens.
        train: patterns of parameter names (``*`` is anything) that this stage trains.
        new: patterns of those among them that train at the full rate; none is all of the new mixers'.
        trained: names of what earlier stages have trained, so that a checkpoint of this one holds them too.
        steps: how many steps there will be, where the budget tells.
        machine: see `Machine`.
    """

    teacher: Stack
    source: Stack
    student: Stack
    layers: tuple[int, ...]
    stream: TokenStream
    train: tuple[str, ...] = ("*",)
    new: tuple[str, ...] = ()
    trained: frozenset[str] = field(default_factory=frozenset[str])
    steps: int | None = None
    machine: Machine = field(default_factory=Machine)


def matching(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The names that match one of `patterns`, in their order.

    Raises:
        ConfigError: a pattern that matches nothing.
    """
    names = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"train {pattern}: no such parameter among {len(names)} like {names[0] if names else 'none'}"
                f"{nearest(pattern, names)}"
            )
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


class StudentStage(Stage):
    """A stage that trains parameters of the student, chosen by name; what is new in it at the full rate."""

    Config: ClassVar[type[Any]]
    layerwise: ClassVar[bool] = False  # trains new mixers only, each for its own layer
    work: Work

    def __init__(self, work: Work) -> None:
        """Freeze everything but what `work` trains here; the student may share nothing of that with its teacher.

        Raises:
            ConfigError: no layers, or a pattern that matches nothing.
        """
        if not work.layers:
            raise ConfigError(f"{self.name}: expected converted layers, got none; convert at least one")
        self.work, self.stream, self.device = work, work.stream, work.student.device
        self.tokens_per_step = work.stream.batch * work.stream.time
        named = dict(work.student.named_parameters())
        self.names = matching(self.eligible(work.student, work.layers), work.train)
        chosen = set(self.names)
        theirs = {p.data_ptr() for model in (work.teacher, work.source) for p in model.parameters()}
        shared = [name for name in self.names if named[name].data_ptr() in theirs]
        assert not shared, f"the student would train its teacher: {shared[:3]}"
        for name, parameter in named.items():
            parameter.requires_grad_(name in chosen)
        mixers = tuple(f"blocks.{i}.mixer." for i in work.layers)
        new = set(matching(self.names, work.new) if work.new else (n for n in self.names if n.startswith(mixers)))
        self.new = [named[name] for name in self.names if name in new]
        self.old = [named[name] for name in self.names if name not in new]
        self.clipped: Sequence[Sequence[nn.Parameter]] = [[*self.new, *self.old]]

    @classmethod
    def eligible(cls, student: Stack, layers: Sequence[int]) -> list[str]:
        """Names of the parameters that this kind of stage can train at all."""
        return [name for name, _ in student.named_parameters()]

    def finish(self) -> None:
        """Leave the student as a plain model; called when the stage has run to its end."""

    def weights(self) -> dict[str, Tensor]:
        """Every tensor of the new mixers and whatever was trained so far: the mapping need not be run again."""
        mixers = tuple(f"blocks.{i}.mixer." for i in self.work.layers)
        kept = {*self.names, *self.work.trained}
        return {k: x for k, x in self.work.student.state_dict().items() if k in kept or k.startswith(mixers)}

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Put `weights` back."""
        unknown = self.work.student.load_state_dict(weights, strict=False).unexpected_keys
        assert not unknown, f"no such tensors: {unknown[:3]}"

    def state_dict(self) -> dict[str, Any]:
        """The stream's position."""
        return {"stream": self.stream.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set it."""
        self.stream.load_state_dict(state["stream"])

    @abstractmethod
    def step(self) -> dict[str, Tensor]:
        """See `Stage.step`."""


def kinds() -> list[str]:
    """Names of the stages there are."""
    return sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem != "__init__")


def load_stage(kind: str) -> type[StudentStage]:
    """The stage of that name.

    Raises:
        ConfigError: no such stage, with the nearest name.
    """
    if kind not in kinds():
        raise ConfigError(f"unknown stage {kind!r}{nearest(kind, kinds())}")
    return importlib.import_module(f"subquad.train.stages.{kind}").STAGE  # type: ignore[no-any-return]


def make_stage(kind: str, work: Work, options: Mapping[str, Any]) -> StudentStage:
    """The stage of that name at `work`, with `options` for the fields of its ``Config``.

    Raises:
        ConfigError: no such stage or option.
    """
    cls: Any = load_stage(kind)
    return cls(work, config_from_dict(cls.Config, options, where=f"stage {kind}"))  # type: ignore[no-any-return]
