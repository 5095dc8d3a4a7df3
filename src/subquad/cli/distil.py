"""Distil a model's long convolutions into recurrences: hyena layers become laughing_hyena ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def run(
    model: Annotated[str, typer.Argument(help="Folder of a model with hyena layers.")],
    out: Annotated[Path, typer.Option(help="Folder for the new model, distil.json and filters.png.")],
    modes: Annotated[int, typer.Option(min=1, help="Most complex poles of a filter; its order is twice that.")] = 16,
    bound: Annotated[
        float, typer.Option(min=0, help="Of each filter's relative error; 0 takes what --modes give.")
    ] = 0.01,
    norm: Annotated[str, typer.Option(help="Of the error: l2, or linf for the largest of a tap.")] = "l2",
) -> None:
    """Fit every filter by as few modes as meet the bound, and save the model with a table of errors and a picture.

    Example: subquad distil my-hyena --out my-laughing-hyena --modes 16 --bound 0.01
    """
    import dataclasses
    import json
    from statistics import median

    from subquad.convert.laughing_hyena import distil
    from subquad.convert.laughing_hyena.picture import draw
    from subquad.models.card import ModelCard
    from subquad.models.checkpoint import check_target, save_pretrained
    from subquad.models.load import load_model

    check_target(out)
    loaded = load_model(model)
    made = distil(loaded.model, modes=modes, bound=bound or None, norm=norm, say=typer.echo)
    worst, middle = max(one.l2 for one in made.fits), median(one.l2 for one in made.fits)
    recipe = {"method": "laughing_hyena", "modes": modes, "bound": bound or None, "norm": norm}
    errors = {"filters": len(made.fits), "relative l2 error, median": middle, "relative l2 error, largest": worst}
    card = ModelCard(f"{loaded.name}, distilled", model, loaded.license or "", recipe=recipe, evaluation=errors)
    save_pretrained(made.student, out, loaded.tokenizer, card)
    folder = out.expanduser()
    table = {"settings": recipe, "fits": [dataclasses.asdict(one) for one in made.fits]}
    (folder / "distil.json").write_text(json.dumps(table, indent=1), encoding="utf-8")
    draw(loaded.model, made, folder / "filters.png")
    typer.echo(f"{len(made.fits)} filters, relative l2 error {middle:.2e} in the median, {worst:.2e} at most")
    typer.echo(f"saved in {out}: the model, distil.json with every filter's errors, filters.png")
