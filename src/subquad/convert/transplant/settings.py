"""What is decided before a conversion, what surrounds it, and what it gave."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from subquad.evals.perplexity import Perplexity
from subquad.models.stack import Stack
from subquad.models.teachers import LoadedModel
from subquad.train.loop import Display, Habits
from subquad.train.parallel import Processes
from subquad.train.recipe import PLAIN, Recipe
from subquad.train.stages import Machine

Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """Everything that decides what comes out of a conversion; written to ``run.json``.

    Attributes:
        teacher: what `load_model` takes.
        data: as in `parse_source`, and ``self`` for the teacher's own samples.
        recipe: mixers and training; what is said below goes before what it says.
        tokens: of the whole training, for the phases with a share.
        mixers, layers, keep: as in `place`.
        heads: key/value heads that stay full attention, by layer; all others are converted.
        heads_of: how many key/value heads each attention layer of the model has that they were chosen for, where known.
        options: as in `parse_options`; they go before the recipe's own, which are for its own mixers.
        start: the model to convert and train, as `load_model` takes it; None is the teacher.
        samples: how many documents of the teacher's own; None is as many as the budget asks for, or 256.
        held_out: share of the documents kept for evaluation.
        batch, seq: sequences of a batch, tokens of a sequence.
        seed: of shuffles and samples.
        measure_tokens: tokens over which the attention is measured before the start; 0 is data-free.
        eval_tokens: held-out tokens for the evaluation at the end.
        eval_context: tokens of its windows; None is as many as leave 8 windows, `seq` at most.
        eval_texts: texts that no training should have seen; data that holds parts of them is named in a warning.
    """

    teacher: str
    data: tuple[str, ...]
    recipe: Recipe = PLAIN
    tokens: int | None = None
    mixers: tuple[str, ...] = ()
    layers: str | None = None
    keep: float | None = None
    heads: Mapping[str, list[int]] | None = None
    heads_of: Mapping[str, int] | None = None
    options: tuple[str, ...] = ()
    start: str | None = None
    samples: int | None = None
    held_out: float = 0.05
    batch: int | None = None
    seq: int | None = None
    seed: int = 0
    measure_tokens: int = 8192
    eval_tokens: int = 8192
    eval_context: int | None = None
    eval_texts: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        """Sequences of a batch."""
        return self.batch or self.recipe.batch

    @property
    def time(self) -> int:
        """Tokens of a sequence."""
        return self.seq or self.recipe.seq

    def rows_of(self, seq: int) -> int:
        """Sequences of `seq` tokens that make as many tokens as a batch."""
        return max(1, self.rows * self.time // seq)

    def lengths(self) -> dict[str, int]:
        """Tokens of a sequence in each phase that has a budget.

        Raises:
            ConfigError: as in `Recipe.budgets`.
        """
        budgets = self.recipe.budgets(self.tokens)
        return {phase.name: phase.seq or self.time for phase in self.recipe.phases if phase.name in budgets}


@dataclass(frozen=True)
class Conversion:
    """What a conversion gave.

    Attributes:
        teacher, student: both models.
        placement: the new mixer by layer, as `transplant` takes it.
        teacher_perplexity, student_perplexity: on the same held-out windows.
        seconds: wall time of this call.
    """

    teacher: LoadedModel
    student: Stack
    placement: Mapping[int, Mapping[str, Any]]
    teacher_perplexity: Perplexity
    student_perplexity: Perplexity
    seconds: float


@dataclass(frozen=True)
class Surroundings:
    """What decides nothing of the result: where, how often, and who is told.

    Attributes:
        device: where to train; on a GPU in bfloat16 over float32 weights.
        machine: how the work is laid out there.
        habits: how often to log and save.
        display: told about the progress of each stage.
        say: told one line about each thing that is settled.
        report: given the conversion before the run counts as finished, so that a resumed run reports too.
        processes: that convert together, on `device` this one; all of them call `convert`, and all get the result. The
            first one alone writes, samples, evaluates and tells. None is this one alone.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    machine: Machine = field(default_factory=Machine)
    habits: Habits | None = None
    display: Display | None = None
    say: Say = lambda line: None
    report: Callable[[Conversion], None] = lambda conversion: None
    processes: Processes | None = None

    @property
    def together(self) -> Processes:
        """All processes of the run."""
        return self.processes or Processes(self.device)
