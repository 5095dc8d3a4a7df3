"""The phases of a recipe, one after the other, each over a stream of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from subquad.core.errors import CheckpointError
from subquad.data import TokenStream
from subquad.models.stack import Stack
from subquad.train.checkpoint import RunFolder
from subquad.train.loop import Budget, Display, Habits, Loop
from subquad.train.recipe import Recipe
from subquad.train.stages import Machine, StudentStage, Work, load_stage, make_stage, matching

Streams = Callable[[int], TokenStream]
"""The stream of sequences of so many tokens; asked again for the same length, it goes on where it stood."""


@dataclass(frozen=True)
class Models:
    """Who takes part.

    Attributes:
        teacher: whose distribution counts; not changed.
        student: trained in place; shares no trained tensor with the others.
        layers: indices of its converted layers.
        source: whose attention was converted; None is the teacher.
    """

    teacher: Stack
    student: Stack
    layers: Sequence[int]
    source: Stack | None = None


def fit(
    models: Models,
    streams: Streams,
    recipe: Recipe,
    folder: RunFolder,
    *,
    tokens: int | None = None,
    seq: int | None = None,
    resume: bool = False,
    machine: Machine | None = None,
    habits: Habits | None = None,
    display: Display | None = None,
) -> None:
    """Train the student in place by the recipe's phases, in their order.

    A phase goes on in the stream where the one before it with the same length of sequences ended.

    Args:
        models: who takes part.
        streams: where the tokens come from.
        recipe: the phases and their settings.
        folder: takes the log and the checkpoint.
        tokens: of the whole run, for the phases with a share of them.
        seq: tokens of a sequence, by default the recipe's.
        resume: go on from the folder's checkpoint; data and recipe must be those of the run.
        machine: how the work is laid out.
        habits: how often to log and save.
        display: told about the progress.

    Raises:
        DivergenceError: a loss was not finite; the last good checkpoint stays.
        StoppedError: a signal asked to stop, and the run was saved.
        CheckpointError: nothing to resume, or a checkpoint of a phase that the recipe has not.
    """
    budgets = recipe.budgets(tokens)
    checkpoint = folder.load() if resume else None
    if checkpoint is not None:
        if checkpoint["stage"] not in budgets:
            raise CheckpointError(
                f"{folder.path}: expected a checkpoint of {' or '.join(budgets) or 'no stage'}, got one of stage "
                f"{checkpoint['stage']}; resume with the recipe and the budgets of that run"
            )
        folder.rewind(budgets, checkpoint["stage"], checkpoint["step"])
    trained: set[str] = set()
    for phase in recipe.phases:
        if phase.name not in budgets:
            continue
        if checkpoint is not None and checkpoint["stage"] != phase.name:
            trained |= _names(phase.stage, phase.train, models)
            continue
        budget, stream = budgets[phase.name], streams(phase.seq or seq or recipe.seq)
        work = Work(
            models.teacher,
            models.source or models.teacher,
            models.student,
            tuple(sorted(models.layers)),
            stream,
            phase.train,
            phase.new,
            frozenset(trained),
            _steps(budget, stream),
            machine or Machine(),
        )
        stage = make_stage(phase.stage, work, phase.options)
        stage.name = phase.name
        loop = Loop(stage, budget, phase.rate, folder, habits=habits, display=display)
        if checkpoint is not None:
            loop.resume(checkpoint)
            checkpoint = None
        loop.run()
        stage.finish()
        trained |= set(stage.names)
    models.student.requires_grad_(False)


def _steps(budget: Budget, stream: TokenStream) -> int | None:
    return None if budget.tokens is None else -(-budget.tokens // (stream.batch * stream.time))


def _names(kind: str, patterns: Sequence[str], models: Models) -> set[str]:
    """What a phase that is over has trained."""
    cls: type[StudentStage] = load_stage(kind)
    return set(matching(cls.eligible(models.student, models.layers), patterns))
