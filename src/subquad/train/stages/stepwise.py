"""Stage stepwise: some of the new mixers learn in a student whose other layers still hold the teacher's attention."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from subquad.core.errors import ConfigError
from subquad.models.stack import Stack
from subquad.train.precision import frozen
from subquad.train.stages import Machine, StudentStage, Work
from subquad.train.stages.distill import Distill


def first(layers: Sequence[int], share: float) -> list[int]:
    """An evenly spread `share` of `layers`, at least one; a half of every second layer is every fourth."""
    count = max(1, round(share * len(layers)))
    return [layers[j * len(layers) // count] for j in range(count)]


def halfway(student: Stack, source: Stack, waiting: Sequence[int]) -> Stack:
    """`student` with the attention of `source` where layers wait for their new mixer; every tensor is shared."""
    tensors = (*student.parameters(), *student.buffers())
    model = copy.deepcopy(student, {id(x): x for x in tensors})
    for i in waiting:
        model.blocks[i].mixer = source.blocks[i].mixer
    return model


class Stepwise(StudentStage):
    """Distil while a share of the converted layers holds its new mixer and the others still attend.

    The progressive conversion of arXiv 2408.15237: several phases of this stage with a growing share, each from where
    the last one ended. Only new mixers train, those of the layers that hold theirs; MLPs, norms, embeddings and the
    attention that stays are frozen throughout.
    """

    name = "stepwise"

    @dataclass(frozen=True)
    class Config:
        """How far the conversion is, and what is minimised.

        Attributes:
            converted: share of the layers to convert that hold their new mixer, spread evenly.
            labels: weight of the cross-entropy beside the token KL.
        """

        converted: float = 1.0
        labels: float = 0.0

        def __post_init__(self) -> None:
            """Refuse a share that is none."""
            if not 0 < self.converted <= 1:
                raise ConfigError(f"stepwise: expected converted above 0 and up to 1, got {self.converted}; fix it")

    def __init__(self, work: Work, config: Config | None = None) -> None:
        """Train a share of the new mixers of `work`.

        Raises:
            ConfigError: a pattern that matches nothing in the layers that hold their new mixer.
            UnsupportedError: parameters that are spread over processes.
        """
        super().__init__(work)
        config = config or self.Config()
        work.student.requires_grad_(False)
        layers = first(sorted(work.layers), config.converted)
        mixers = tuple(f"blocks.{i}.mixer." for i in layers)
        names = tuple(name for name in self.names if name.startswith(mixers))
        if not names:
            raise ConfigError(
                f"stepwise: expected parameters to train in layers {layers}, got none by {', '.join(work.train)}; "
                "loosen the patterns"
            )
        waiting = [i for i in work.layers if i not in layers]
        source = frozen(work.source) if self.device.type == "cuda" and waiting else work.source
        model = halfway(work.student, source.eval(), waiting)
        # What trains at which rate is settled above, where patterns are those of all layers.
        inner = replace(work, student=model, layers=tuple(layers), train=names, new=())
        self._inner = Distill(inner, Distill.Config(labels=config.labels))
        chosen = {id(p) for p in (*self._inner.new, *self._inner.old)}
        self.names = list(names)
        self.new, self.old = ([p for p in group if id(p) in chosen] for group in (self.new, self.old))
        self.clipped = [[*self.new, *self.old]]

    @classmethod
    def eligible(cls, student: Stack, layers: Sequence[int]) -> list[str]:
        """The new mixers' own."""
        mixers = tuple(f"blocks.{i}.mixer." for i in layers)
        return [name for name, _ in student.named_parameters() if name.startswith(mixers)]

    def arrange(self, machine: Machine) -> None:
        """The same for the stage that does the work."""
        super().arrange(machine)
        self._inner.arrange(machine)

    def flops_per_token(self) -> float:
        """Those of distilling the half-converted student."""
        return self._inner.flops_per_token()

    def step(self) -> dict[str, Tensor]:
        """One batch."""
        return self._inner.step()


STAGE = Stepwise
