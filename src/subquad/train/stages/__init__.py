"""The stages of training, one file each, chosen by its name; what they all are given, and what they share."""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from subquad.core.config import config_from_dict
from subquad.core.errors import ConfigError, UnsupportedError, nearest
from subquad.data import TokenStream
from subquad.models.stack import Stack
from subquad.train.loop import Stage
from subquad.train.parallel import Processes


@dataclass(frozen=True)
class Machine:
    """How the work is laid out on the device; decides speed and memory, and nothing of the result.

    Attributes:
        rows: sequences run at once; None is all that a process has of a batch.
        recompute: keep only the blocks' inputs for backward (arXiv 1604.06174): less memory, a third more time. Where
            layers learn apart, one at a time, there is nothing to save by it. None is no.
        compiled: compile what is trained, and the teacher.
    """

    rows: int | None = None
    recompute: bool | None = None
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
        processes: that train together; None is this one alone.
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
    processes: Processes | None = None


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
    """A stage that trains parameters of the student, chosen by name; what is new in it at the full rate.

    Attributes:
        layerwise: it trains new mixers only, each for its own layer.
        spreads: the student's parameters may lie spread over the processes (`subquad.train.parallel.sharded`).
    """

    Config: ClassVar[type[Any]]
    layerwise: ClassVar[bool] = False
    spreads: bool = False
    work: Work

    def __init__(self, work: Work) -> None:
        """Freeze everything but what `work` trains here; the student may share nothing of that with its teacher.

        Raises:
            ConfigError: no layers, a pattern that matches nothing, or a batch that can't be shared out evenly.
            UnsupportedError: parameters that are spread over processes, in a stage that needs them whole.
        """
        if not work.layers:
            raise ConfigError(f"{self.name}: expected converted layers, got none; convert at least one")
        if not self.spreads and any(isinstance(p, DTensor) for p in work.student.parameters()):
            raise UnsupportedError(
                f"{self.name}: expected whole parameters, for it runs parts of blocks, or changes modules, "
                "got some spread over the processes; replicate the student instead"
            )
        self.work, self.stream, self.device = work, work.stream, work.student.device
        self.processes, self.machine = work.processes or Processes(self.device), work.machine
        self.parts(work.stream.batch)
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

    def parts(self, batch: int) -> list[slice]:
        """The rows of a batch that are this process's, as many at a time as the machine runs at once.

        Raises:
            ConfigError: a batch that the processes can't share evenly.
        """
        return self.processes.parts(batch, self.machine.rows)

    def arrange(self, machine: Machine) -> None:
        """Run rows, and recompute, as `machine` says from now on; what was compiled stays."""
        self.machine = machine

    def fewer_rows(self) -> int | None:
        """Half as many rows at once from now on; None where it is one already."""
        own = self.stream.batch // self.processes.world
        rows = min(self.machine.rows or own, own) // 2
        if rows == 0:
            return None
        self.arrange(replace(self.machine, rows=rows))
        return rows

    @abstractmethod
    def flops_per_token(self) -> float:
        """Arithmetic that a token of this stage asks for (`subquad.models.flops`), of all models that take part."""

    def by_layer(self) -> list[list[nn.Parameter]]:
        """What trains, layer by layer: sets to clip apart where no gradient crosses from one to another."""
        trained = {id(p) for p in (*self.new, *self.old)}
        mixers = (self.work.student.blocks[i].mixer for i in sorted(self.work.layers))
        sets = [[p for p in mixer.parameters() if id(p) in trained] for mixer in mixers]
        return [s for s in sets if s]

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
