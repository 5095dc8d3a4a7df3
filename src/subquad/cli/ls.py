"""List the methods there are, from their cards."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from subquad.core.registry import FAMILIES, methods


def run(
    family: Annotated[str, typer.Argument(help=f"One of {', '.join(FAMILIES)}; all when left out.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print whole cards as JSON.")] = False,
) -> None:
    """List the published methods, their status and what each is for; --json tells what was measured too."""
    found = {name: methods(name) for name in ((family,) if family else FAMILIES)}
    if as_json:
        typer.echo(json.dumps({f: {s: asdict(c) for s, c in cards.items()} for f, cards in found.items()}, indent=2))
        return

    from rich import box
    from rich.table import Table

    from subquad.cli._progress import stdout

    table = Table(box=box.SIMPLE)
    for heading in ("method", "status", "arXiv"):
        table.add_column(heading, no_wrap=True)
    table.add_column("for")
    for name, cards in found.items():
        for slug, card in cards.items():
            table.add_row(f"{name}/{slug}", card.status, card.arxiv, card.gives)
    if table.row_count:
        stdout().print(table)
    else:
        typer.echo(f"no methods{f' in {family}' if family else ''} yet; `subquad new` lays one out")
