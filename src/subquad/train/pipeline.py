"""The two stages of a conversion, one after the other, over one stream of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from subquad.core.errors import CheckpointError
from subquad.data import TokenStream
from subquad.models.stack import Stack
from subquad.train.align import Align
from subquad.train.checkpoint import RunFolder
from subquad.train.distill import Distill
from subquad.train.loop import Budget, Display, Habits, Loop, Stage
from subquad.train.optimiser import Rate


@dataclass(frozen=True)
class Recipe:
    """How a student is trained; a stage without a budget is left out.

    Attributes:
        align: budget of the first stage.
        distill: budget of the second.
        align_rate, distill_rate: their learning rates.
        passes: how often align sees each batch.
        cache_bytes: memory for that.
        patterns: which parameters of the new mixers align trains, by name.
        labels: weight of the cross-entropy beside the token KL.
        recompute: keep only the blocks' inputs for backward.
        compiled: compile what is trained.
    """

    align: Budget | None = None
    distill: Budget | None = None
    align_rate: Rate = field(default_factory=lambda: Rate(lr=1e-3))
    distill_rate: Rate = field(default_factory=lambda: Rate(lr=1e-3))
    passes: int = 1
    cache_bytes: int = 2**30
    patterns: tuple[str, ...] = ("*",)
    labels: float = 0.0
    recompute: bool = False
    compiled: bool = False


def fit(
    teacher: Stack,
    student: Stack,
    layers: Sequence[int],
    stream: TokenStream,
    recipe: Recipe,
    folder: RunFolder,
    *,
    resume: bool = False,
    habits: Habits | None = None,
    display: Display | None = None,
) -> None:
    """Train `student` in place by the recipe's stages, in the order align, distill.

    The second stage goes on in the stream where the first one ended.

    Args:
        teacher: not changed.
        student: on the teacher's device; distill needs it to share no tensor with the teacher.
        layers: indices of the converted layers.
        stream: tokens to train on.
        recipe: the stages and their settings.
        folder: takes the log and the checkpoint.
        resume: go on from the folder's checkpoint; data and recipe must be those of the run.
        habits: how often to log and save.
        display: told about the progress.

    Raises:
        DivergenceError: a loss was not finite; the last good checkpoint stays.
        StoppedError: a signal asked to stop, and the run was saved.
        CheckpointError: nothing to resume, or a checkpoint of a stage that the recipe leaves out.
    """
    budgets = {Align.name: recipe.align, Distill.name: recipe.distill}
    order = [name for name, budget in budgets.items() if budget is not None]
    checkpoint = folder.load() if resume else None
    if checkpoint is not None:
        if checkpoint["stage"] not in order:
            raise CheckpointError(
                f"{folder.path}: expected a checkpoint of {' or '.join(order) or 'no stage'}, got one of stage "
                f"{checkpoint['stage']}; resume with that stage's budget"
            )
        folder.rewind(budgets, checkpoint["stage"], checkpoint["step"])
        order = order[order.index(checkpoint["stage"]) :]
    for name in order:
        budget = budgets[name]
        assert budget is not None
        stage: Stage
        if name == Align.name:
            steps = None if budget.tokens is None else -(-budget.tokens // (stream.batch * stream.time))
            stage, rate = _align(teacher, student, layers, stream, recipe, steps), recipe.align_rate
        else:
            stage, rate = _distill(teacher, student, layers, stream, recipe), recipe.distill_rate
        loop = Loop(stage, budget, rate, folder, habits=habits, display=display)
        if checkpoint is not None:
            loop.resume(checkpoint)
            checkpoint = None
        loop.run()
    student.requires_grad_(False)


def _align(
    teacher: Stack, student: Stack, layers: Sequence[int], stream: TokenStream, recipe: Recipe, steps: int | None
) -> Align:
    return Align(
        teacher,
        student,
        layers,
        stream,
        passes=recipe.passes,
        cache_bytes=recipe.cache_bytes,
        most_steps=steps,
        patterns=recipe.patterns,
        compile_mixers=recipe.compiled,
    )


def _distill(teacher: Stack, student: Stack, layers: Sequence[int], stream: TokenStream, recipe: Recipe) -> Distill:
    return Distill(
        teacher,
        student,
        layers,
        stream,
        labels=recipe.labels,
        recompute=recipe.recompute,
        compile_blocks=recipe.compiled,
    )
