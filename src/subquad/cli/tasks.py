"""Train a mixer from nothing on a task: recall, copying, nested lists, winding paths, digits, characters."""

from __future__ import annotations

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from subquad.cli._placement import Device, placement, writable
from subquad.core.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from subquad.bench.results import Row
    from subquad.evals.learning.training import Learned, Settings

# Points of a run's course in the result.
COURSE = 24
MINUTES = 5.0


def run(
    task: Annotated[str, typer.Argument(help="Name of a task; without one, all are listed.")] = "",
    mixer: Annotated[
        list[str] | None,
        typer.Option(help="SLUG, or SLUG,SLUG for a hybrid whose layers take turns; given again, each is a run."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the runs, their table and their picture.")] = None,
    size: Annotated[
        list[str] | None, typer.Option(help="A size of the task by name, or KEY=VALUE; may be given again.")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="[SLUG.]KEY=VALUE, an option of a mixer.")] = None,
    layers: Annotated[int, typer.Option(min=1, help="Blocks of the model.")] = 2,
    d_model: Annotated[int, typer.Option(min=2, help="Width of the model.")] = 64,
    d_mlp: Annotated[
        int | None, typer.Option(min=0, help="Of the SwiGLUs; 0 is none, twice --d-model without it.")
    ] = None,
    norm: Annotated[
        str, typer.Option(help="rms, of each token; or batch, over a batch's tokens, where a row has one class.")
    ] = "rms",
    steps: Annotated[int | None, typer.Option(help="Steps to train; such a run can be repeated to the bit.")] = None,
    minutes: Annotated[
        float | None, typer.Option(help=f"Or minutes, or what comes first of both; {MINUTES:g} without either.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows of a step.")] = 64,
    rows: Annotated[
        int | None, typer.Option(help="Rows to train on again and again; without it every step draws new ones.")
    ] = None,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    warmup: Annotated[float, typer.Option(help="Share of the run in which the rate rises to it.")] = 0.05,
    weight_decay: Annotated[float, typer.Option(min=0, help="Of matrices.")] = 0.0,
    held_out: Annotated[int, typer.Option(min=1, help="Rows to test on, or all where there are fewer.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of models and batches.")] = 0,
    workers: Annotated[int, typer.Option(min=0, help="Processes that make batches ahead; 0 makes them as needed.")] = 0,
    as_json: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file as well, and the chart beside it.")
    ] = None,
    start: Annotated[
        Path | None, typer.Option(help="An --out folder whose runs' weights these begin with: of an easier size, say.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the runs in --out stopped.")] = False,
    device: Device = "",
) -> None:
    """List the tasks, or train mixers on one and test them on rows that no training has seen.

    Example: subquad tasks recall --mixer gla --mixer attention --minutes 2 --out recall

    Leaves in --out a folder a run (log.jsonl, run.json, checkpoint.pt), and result.json with a chart of the accuracy.
    """
    if not task:
        listed()
        return
    from subquad.evals.learning import find_task

    find_task(task)
    if not mixer or out is None:
        raise ConfigError(
            f"expected --mixer and --out with a task, got {task} alone; give both: subquad tasks {task} "
            "--mixer gla --out runs"
        )
    if len(set(mixer)) < len(mixer):
        raise ConfigError(f"--mixer: expected each one once, got {', '.join(mixer)}; drop one")

    import torch

    from subquad.bench.plots import refresh_plots
    from subquad.bench.results import Result, environment
    from subquad.bench.tables import terminal_table
    from subquad.convert.transplant.placement import parse_options
    from subquad.core.config import config_to_dict
    from subquad.evals.learning import load_task
    from subquad.evals.learning.model import check_norm, checked, layers_of
    from subquad.evals.learning.training import Settings, check_folder, check_start, learn
    from subquad.train.checkpoint import RunFolder
    from subquad.train.display import Line
    from subquad.train.loop import Habits

    writable("--json", as_json)
    where, _ = placement(device, "")
    # What products are made in; weights are float32.
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    built = load_task(task, size or [])
    hybrids = {"+".join(slugs): slugs for slugs in ([slug.strip() for slug in one.split(",")] for one in mixer)}
    check_norm(norm, built)
    used = checked([slug for slugs in hybrids.values() for slug in slugs], built)
    options = parse_options(set_ or [], used)
    name = task.replace("-", "_")
    if steps is None and minutes is None:
        minutes = MINUTES
    runs = {
        run: Settings(
            task=name,
            sizes=config_to_dict(built.config),
            layers=layers_of(slugs, layers, d_model, options, built),
            d_model=d_model,
            d_mlp=d_mlp,
            norm=norm,
            batch=batch,
            rows=rows,
            lr=lr,
            warmup=warmup,
            weight_decay=weight_decay,
            steps=steps,
            minutes=minutes,
            held_out=held_out,
            seed=seed,
            start=None if start is None else str(start / run),
        )
        for run, slugs in hybrids.items()
    }
    if not resume:
        for settings in runs.values():
            check_start(settings.start)
    folders = {run: RunFolder(out / run) for run in runs}
    for run, settings in runs.items():
        check_folder(settings, folders[run], resume=resume)
    figures: list[Row] = []
    targets = [out / "result.json", *([as_json] if as_json else [])]
    command = shlex.join(["subquad", *sys.argv[1:]])

    def write(run: str, learned: Learned) -> None:
        """What is known is written now, and not after the last run."""
        figures.extend(rows_of(f"tasks.{name}.{run}", runs[run], learned, dtype))
        typer.echo(f"{run}: {learned.accuracy.format()} right of {learned.rows:,} rows after {learned.steps:,} steps")
        result = Result(f"tasks.{name}", command, environment(where, dtype), list(figures))
        for path in targets:
            result.save(path)
            refresh_plots(path)

    for run, settings in runs.items():
        with Line() as line:
            line.say(f"{run} on {name}")
            learned = learn(
                settings,
                built,
                folders[run],
                resume=resume,
                device=where,
                workers=workers,
                habits=Habits(log_steps=10),
                display=line,
                say=line.say,
                stopped=partial(write, run),
            )
        write(run, learned)
    shown = [row for row in figures if ".step" not in row.id]
    typer.echo(terminal_table(Result(f"tasks.{name}", "", {}, shown)))
    typer.echo(f"table: {targets[0]}, chart: {targets[0].with_suffix('.accuracy.svg')}")


def listed() -> None:
    """Print all tasks, from their cards."""
    from rich import box
    from rich.table import Table

    from subquad.cli._progress import stdout
    from subquad.evals.learning import tasks

    table = Table(box=box.SIMPLE)
    for heading in ("task", "what it asks", "sizes", "source", "by guessing"):
        table.add_column(heading, no_wrap=heading == "task")
    for name, card in tasks().items():
        table.add_row(name, card.title, ", ".join(card.sizes), card.source, card.chance)
    stdout().print(table)


def rows_of(prefix: str, settings: Settings, learned: Learned, dtype: torch.dtype) -> list[Row]:
    """The figures of a run: accuracy beside the commonest answer's, cross-entropy, size, time, and the course."""
    from subquad.bench.results import make_row

    low, high = learned.accuracy.low, learned.accuracy.high
    shape = {**settings.sizes, "d_model": settings.d_model, "d_mlp": settings.d_mlp, "norm": settings.norm}
    shape |= {"layers": list(settings.layers), "batch": settings.batch, "train_rows": settings.rows}
    shape |= {
        "lr": settings.lr,
        "warmup": settings.warmup,
        "steps": learned.steps,
        "rows": learned.rows,
        "seed": settings.seed,
    }
    rows = [
        make_row(
            prefix,
            learned.accuracy.value,
            "1",
            "higher",
            baseline="the commonest answer",
            baseline_value=learned.commonest,
            shape=shape,
            dtype=str(dtype).removeprefix("torch."),
            interval=[] if low is None or high is None else [low, high],
        ),
        make_row(f"{prefix}.loss", learned.loss, "nats", "lower"),
        make_row(f"{prefix}.parameters", learned.parameters, "parameters", "lower"),
        make_row(f"{prefix}.minutes", learned.minutes, "min", "lower"),
    ]
    every = -(-len(learned.course) // COURSE)
    kept = [*learned.course[:-1:every], learned.course[-1]]
    return rows + [
        make_row(f"{prefix}.step{step}", accuracy, "1", "higher", shape={"minutes": round(minutes, 3)})
        for step, minutes, accuracy in kept
    ]
