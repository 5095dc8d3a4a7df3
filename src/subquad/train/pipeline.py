"""The phases of a recipe, one after the other, each over a stream of tokens."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from subquad.core.errors import CheckpointError, ConfigError
from subquad.data import TokenStream
from subquad.models.stack import Stack
from subquad.train.checkpoint import RunFolder
from subquad.train.loop import Budget, Display, Habits, Loop
from subquad.train.memory import Plan, free_bytes, plan_memory
from subquad.train.parallel import Processes, sharded
from subquad.train.recipe import Phase, Recipe
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
    say: Callable[[str], None] | None = None,
    processes: Processes | None = None,
) -> None:
    """Train the student in place by the recipe's phases, in their order.

    A phase goes on in the stream where the one before it with the same length of sequences ended. How many sequences
    run at once, and whether activations are recomputed, is planned before each phase from the memory that is free,
    unless `machine` says it.

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
        say: told in a line what is settled on the way.
        processes: that train together; None is this one alone. All of them call this, with the same arguments.

    Raises:
        ConfigError: not even one sequence at a time fits into the memory, or the processes can't share a batch.
        DivergenceError: a loss was not finite; the last good checkpoint stays.
        StoppedError: a signal asked to stop, and the run was saved.
        CheckpointError: nothing to resume, or a checkpoint of a phase that the recipe has not.
    """
    budgets = recipe.budgets(tokens)
    processes = processes or Processes(models.student.device)
    checkpoint = folder.load() if resume else None
    if checkpoint is not None:
        if checkpoint["stage"] not in budgets:
            raise CheckpointError(
                f"{folder.path}: expected a checkpoint of {' or '.join(budgets) or 'no stage'}, got one of stage "
                f"{checkpoint['stage']}; resume with the recipe and the budgets of that run"
            )
        if processes.main:
            folder.rewind(budgets, checkpoint["stage"], checkpoint["step"])
    # Where the stream of each length stood when the last phase that read it was over.
    standing: dict[int, dict[str, Any]] = dict(checkpoint.get("streams", {})) if checkpoint else {}
    elsewhere = set(standing)  # streams that have not been taken there yet
    trained: set[str] = set()
    for phase in recipe.phases:
        if phase.name not in budgets:
            continue
        if checkpoint is not None and checkpoint["stage"] != phase.name:
            trained |= _names(phase.stage, phase.train, models)
            continue
        length = phase.seq or seq or recipe.seq
        budget, stream = budgets[phase.name], streams(length)
        if length in elsewhere:
            stream.load_state_dict(standing[length])
            elsewhere.remove(length)
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
            processes,
        )
        with _arranged(phase, work, say) as stage:
            loop = Loop(
                stage,
                budget,
                phase.rate,
                folder,
                habits=habits,
                display=display,
                say=say,
                processes=processes,
                flops_per_token=stage.flops_per_token() if stage.device.type == "cuda" else None,
                beside={"streams": dict(standing)},
            )
            if checkpoint is not None:
                loop.resume(checkpoint)
                checkpoint = None
            loop.run()
            stage.finish()
        standing[length] = stream.state_dict()
        trained |= set(stage.names)
    models.student.requires_grad_(False)


@contextmanager
def _arranged(phase: Phase, work: Work, say: Callable[[str], None] | None) -> Generator[StudentStage]:
    """The stage of `phase`, with batches and parameters laid out as the memory asks for."""
    stage, machine, spread = _make(phase, work), work.machine, False
    if machine.rows is None and machine.recompute is None:
        plan, spread = _plan(stage)
        machine = replace(machine, rows=plan.rows, recompute=plan.recompute)
        if say is not None:
            over = f", parameters spread over {stage.processes.world} processes" if spread else ""
            say(f"{phase.name}: {plan.describe(stage.stream.batch // stage.processes.world)}{over}")
    if not spread:
        stage.arrange(machine)
        yield stage
        return
    processes = stage.processes
    del stage  # with its copies of the teacher
    with sharded(work.student, processes) as student:
        yield _make(phase, replace(work, student=student, machine=machine))


def _make(phase: Phase, work: Work) -> StudentStage:
    stage = make_stage(phase.stage, work, phase.options)
    stage.name = phase.name
    return stage


def _plan(stage: StudentStage) -> tuple[Plan, bool]:
    """How a batch of `stage` is run, and whether the student's parameters have to be spread over the processes for it.

    Raises:
        ConfigError: nothing fits.
    """
    work, processes = stage.work, stage.processes
    world, student = processes.world, work.student
    free = processes.least(free_bytes(stage.device))
    if stage.device.type == "cpu":
        free //= world  # they share a host

    def plan(shards: int) -> Plan:
        gained = sum(p.numel() * p.element_size() for p in student.parameters()) * (shards - 1) // shards
        return plan_memory(
            work.teacher,
            student,
            [*stage.new, *stage.old],
            stage.stream.batch // world,
            stage.stream.time,
            stage.device,
            shards=shards,
            layerwise=stage.layerwise,
            free=free + gained,
        )

    # The first one plans for all, for all have to run the same parts.
    try:
        return processes.first(lambda: plan(1)), False
    except ConfigError:
        if world == 1 or not stage.spreads:
            raise
    return processes.first(lambda: plan(world)), True


def _steps(budget: Budget, stream: TokenStream) -> int | None:
    return None if budget.tokens is None else -(-budget.tokens // (stream.batch * stream.time))


def _names(kind: str, patterns: Sequence[str], models: Models) -> set[str]:
    """What a phase that is over has trained."""
    cls: type[StudentStage] = load_stage(kind)
    return set(matching(cls.eligible(models.student, models.layers), patterns))
