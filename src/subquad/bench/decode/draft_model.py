"""A drafter made of the model's own first layers, not trained, beside plain decoding: the least a draft model gives."""

from __future__ import annotations

from dataclasses import replace

import torch

from subquad.bench.drafting import run_drafter
from subquad.bench.harness import Bench
from subquad.decode.draft_model import DraftModel
from subquad.models.stack import Stack


def first_layers(model: Stack, layers: int) -> Stack:
    """The model's first `layers` under its own norm and head, sharing their weights."""
    with torch.device("meta"):
        small = Stack(replace(model.config, layers=model.config.layers[:layers]))
    kept = {name: x for name, x in model.state_dict().items() if name in small.state_dict()}
    small.load_state_dict(kept, assign=True)
    return small.requires_grad_(False)


def run(bench: Bench) -> None:
    """A third of the layers guesses."""
    run_drafter(bench, lambda model: DraftModel(first_layers(model, max(1, len(model.config.layers) // 3))))
