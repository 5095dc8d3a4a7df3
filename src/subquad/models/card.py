"""The model card written with every checkpoint: what it was made from, with what, how, and how well it does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from subquad.models.config import ModelConfig


@dataclass(frozen=True)
class ModelCard:
    """What the README of a checkpoint says beyond its layers; what is empty is left out.

    Attributes:
        name: title.
        teacher: the model it was converted from.
        license: licence identifier, the teacher's unless said otherwise.
        data: what it was trained on.
        recipe: settings of the conversion, by name.
        evaluation: figures, by name; with the conditions in the name.
        notes: paragraphs of Markdown put at the end.
    """

    name: str = ""
    teacher: str = ""
    license: str = ""
    data: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict[str, Any])
    evaluation: Mapping[str, Any] = field(default_factory=dict[str, Any])
    notes: str = ""


def render(card: ModelCard, config: ModelConfig, *, library: str = "subquad") -> str:
    """The Markdown of a model card, with the metadata that the hub reads at its head.

    Args:
        card: what is to be said.
        config: the model's, whose layers are listed.
        library: what loads it, ``subquad`` or ``transformers`` alone.
    """
    head: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation"}
    if card.license:
        head["license"] = card.license
    if card.teacher and ":" not in card.teacher and card.teacher.count("/") == 1:
        head["base_model"] = card.teacher
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items()), "---", ""]
    lines += [f"# {card.name or 'A subquad model'}", ""]
    lines += [f"- {what}: {value}" for what, value in _facts(card, config)]
    lines += ["", "| layers | mixer |", "|---|---|", *_layer_rows(config), ""]
    for title, table in (("Recipe", card.recipe), ("Evaluation", card.evaluation)):
        if table:
            lines += [f"## {title}", "", "| | |", "|---|---|", *(f"| {k} | {_cell(v)} |" for k, v in table.items()), ""]
    if card.notes:
        lines += [card.notes, ""]
    lines += [
        "## Use",
        "",
        "```python",
        *(["import subquad.hf  # registers the model type"] if library == "subquad" else []),
        "from transformers import AutoModelForCausalLM",
        "",
        'model = AutoModelForCausalLM.from_pretrained("this folder")',
        "```",
        "",
    ]
    return "\n".join(lines)


def _facts(card: ModelCard, config: ModelConfig) -> list[tuple[str, str]]:
    facts = [
        ("teacher", card.teacher),
        ("licence", card.license),
        ("data", card.data),
        ("width", str(config.d_model)),
        ("context trained for", f"{config.max_positions} tokens"),
    ]
    return [(what, value) for what, value in facts if value]


def _layer_rows(config: ModelConfig) -> list[str]:
    def described(indexed: tuple[int, Mapping[str, Any]]) -> str:
        layer = indexed[1]
        fields = ", ".join(f"{k} {_cell(v)}" for k, v in layer.items() if k != "mixer" and v not in (None, False, 0))
        return f"{layer['mixer']} ({fields})"

    rows: list[str] = []
    for text, run in groupby(enumerate(config.layers), described):
        indices = [i for i, _ in run]
        span = str(indices[0]) if len(indices) == 1 else f"{indices[0]} to {indices[-1]}"
        rows.append(f"| {span} | {text} |")
    return rows


def _cell(value: Any) -> str:
    text = (
        f"{value:.6g}"
        if isinstance(value, float)
        else value
        if isinstance(value, str)
        else json.dumps(value, default=str)
    )
    return text.replace("|", "\\|").replace("\n", " ")
