"""Run bench rooms, and refresh the tables made from their results."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from subquad.cli._placement import Device, DType, placement
from subquad.core.errors import ConfigError


def run(
    names: Annotated[
        list[str] | None, typer.Argument(help="family/slug, or a family for all of it; every bench when left out.")
    ] = None,
    device: Device = "",
    dtype: DType = "",
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves PyTorch's choice.")] = 0,
    smoke: Annotated[bool, typer.Option("--smoke", help="Tiny sizes, once; writes nothing.")] = False,
    hybrid: Annotated[str, typer.Option(help="A converted model, which drafters are measured on as well.")] = "",
    hybrid_rows: Annotated[
        int, typer.Option(min=0, help="Measure the hybrid with so many rows at most, to save time; 0: as its teacher.")
    ] = 0,
    drafter: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a trained drafter, as subquad draft writes it: a head for decode/draft_head and gad, a "
            "model for decode/draft_model, self_draft and spectr."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder with mt_bench.jsonl and human_eval.jsonl, in place of our own prompts; for "
            "convert/laughing_hyena with train.jsonl.xz and valid.jsonl.xz, in place of Python's manual."
        ),
    ] = None,
    minutes: Annotated[
        float,
        typer.Option(min=0, help="Training by the clock in rooms that train so, all runs together; 0: the room's own."),
    ] = 0.0,
    work: Annotated[
        Path | None, typer.Option(help="Folder where rooms that train keep their run; the same command goes on there.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the result files.")] = Path("bench/results"),
    tables: Annotated[
        bool,
        typer.Option(
            "--tables", help="Run nothing; rewrite the tables in README.md and docs, and the charts, from the results."
        ),
    ] = False,
    check: Annotated[bool, typer.Option("--check", help="With --tables: fail if one is out of date.")] = False,
) -> None:
    """Measure the methods: correctness first, then speed against a baseline in turns, written as JSON."""
    if tables:
        from subquad.bench.plots import refresh_plots
        from subquad.bench.tables import refresh

        if not Path("README.md").is_file():
            raise ConfigError(f"--tables: expected a checkout with README.md, got {Path.cwd()}; run it there")
        pages = [Path("README.md"), *sorted(Path("docs").rglob("*.md"))]
        stale = [page for page in pages if refresh(page, out, write=not check)]
        stale += [made for path in sorted(out.glob("*.json")) for made in refresh_plots(path, write=not check)]
        for page in stale:
            typer.echo(f"{'out of date' if check else 'rewrote'}: {page}")
        if check and stale:
            raise ConfigError("tables or charts differ from bench/results; run `subquad bench --tables`")
        return

    import torch

    from subquad.bench.plots import refresh_plots
    from subquad.bench.results import Result, result_path
    from subquad.bench.rooms import find_rooms, run_room
    from subquad.bench.tables import terminal_table

    where, kind = placement(device, dtype)
    # What ends a command that takes too long: as Ctrl-C does, so that the figures so far are kept.
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    def keep(result: Result) -> None:
        path = unfinished(result)
        if not smoke:
            result.save(path)
            typer.echo(f"broken off; the figures so far are in {path}", err=True)

    def unfinished(result: Result) -> Path:
        return result_path(out, result.bench, where).with_suffix(".json.unfinished")

    for room in find_rooms(names or []):
        result = run_room(
            room,
            device=where,
            dtype=kind or torch.float32,
            smoke=smoke,
            say=partial(typer.echo, err=True),
            hybrid=hybrid,
            hybrid_rows=hybrid_rows,
            drafter=drafter,
            data=data,
            minutes=minutes,
            work=work,
            threads=threads,
            unfinished=keep,
        )
        typer.echo(terminal_table(result))
        if not smoke:
            path = result_path(out, result.bench, where)
            result.save(path)
            unfinished(result).unlink(missing_ok=True)
            for made in (path, *refresh_plots(path)):
                typer.echo(f"wrote {made}")
