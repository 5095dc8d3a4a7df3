"""Run a study: several conversions of one teacher, measured side by side."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from subquad.cli._placement import placement, writable
from subquad.core.errors import ConfigError


def run(
    study: Annotated[Path, typer.Argument(help="TOML file of runs; bench/studies/best.toml is one.")],
    out: Annotated[Path, typer.Option(help="Folder for the runs, one folder each.")],
    data: Annotated[Path, typer.Option(help="What {data} stands for in the file.")] = Path(),
    only: Annotated[list[str] | None, typer.Option(help="Only this run; may be given again.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at once; several share a GPU well.")] = 1,
    dry: Annotated[bool, typer.Option("--dry", help="Print the commands and run nothing.")] = False,
    as_json: Annotated[
        Path | None, typer.Option("--json", help="Write the figures of all runs to this file, and charts beside it.")
    ] = None,
) -> None:
    """Convert and measure every run of a study; what is finished stays, what was broken off goes on.

    Leaves in --out a folder a run (model, log, eval.json, report), and report.html with the table and the curves.
    Example: subquad study bench/studies/best.toml --out runs --data texts --only keep25 --only windows25
    """
    from functools import partial

    import torch

    from subquad.bench.plots import refresh_plots
    from subquad.bench.results import environment
    from subquad.bench.study import collect, read_study, run_study, write_page

    writable("--json", as_json)
    found = read_study(study, out, data)
    if dry:
        for each in found.runs.values():
            for command in (each.convert, each.difference, each.evaluate):
                if command:
                    typer.echo(shlex.join(["subquad", *command]))
        return
    failed = run_study(found, only or [], jobs=jobs, say=partial(typer.echo, err=True))
    if any(map(found.ended, found.runs)):
        command = shlex.join(["subquad", *sys.argv[1:]])
        where, kind = placement("", "")
        result = collect(found, command, environment(where, kind or torch.float32))
        page = write_page(found, result, command)
        typer.echo(f"report: {page}")
        if as_json is not None:
            result.save(as_json)
            refresh_plots(as_json)
    if failed:
        raise ConfigError(f"expected every run to end well, got failures in {', '.join(failed)}; see their run.log")
