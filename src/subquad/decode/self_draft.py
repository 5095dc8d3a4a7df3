"""The model's own first layers guess for the whole of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Self

import torch

from subquad.core.card import Card
from subquad.core.errors import ConfigError
from subquad.engine.draft import read_vocab, take_options
from subquad.engine.model_draft import ModelDrafter
from subquad.models.stack import Stack

CARD = Card(
    title="Kangaroo: Lossless Self-Speculative Decoding via Double Early Exiting",
    entry="SelfDraft",
    arxiv="2404.18911",
    needs="some training of the first layers (subquad draft) to be worth it",
    gives="a drafter out of the model itself, with no second model to find",
    status="incubating",
    claim="1.7 times faster on Spec-Bench with 67 M more parameters",
    measured="not reproduced",
    examples={"one_layer": {"layers": "1"}},
)


class SelfDraft(ModelDrafter):
    """The first layers under the model's own norm and head, sharing their weights; see `ModelDrafter`.

    Args:
        layers: how many of them.
        coupled, vocab: as in `ModelDrafter`.
    """

    def __init__(self, layers: int, *, coupled: bool = False, vocab: list[int] | None = None) -> None:
        if layers < 1:
            raise ConfigError(f"self_draft: expected at least 1 layer, got {layers}; a fifth of the model is usual")
        self.layers, self.coupled, self.vocab = layers, coupled, vocab

    @classmethod
    def build(cls, options: Mapping[str, str], models: Callable[[str], Stack]) -> Self:
        """Options: ``layers``, and ``vocab=FILE``; see `Drafter.build`."""
        take_options("self_draft", options, ("layers", "vocab"))
        if not options.get("layers", "").isdecimal():
            raise ConfigError(f"self_draft: expected layers=N, got {dict(options)}; write self_draft,layers=4")
        return cls(int(options["layers"]), vocab=read_vocab(options.get("vocab")))

    def open(self, target: Stack, rows: int, capacity: int) -> None:
        """Take the target's layers; see `Drafter.open`."""
        self.model = first_layers(target, self.layers)
        super().open(target, rows, capacity)


def first_layers(model: Stack, layers: int) -> Stack:
    """The model's first `layers` under its own norm and head, sharing their weights.

    Raises:
        ConfigError: there are not more layers than that.
    """
    if not 0 < layers < len(model.blocks):
        raise ConfigError(
            f"first layers: expected 1 to {len(model.blocks) - 1}, got {layers}; take fewer than there are"
        )
    with torch.device("meta"):
        small = Stack(replace(model.config, layers=model.config.layers[:layers]))
    kept = {name: x for name, x in model.state_dict().items() if name in small.state_dict()}
    small.load_state_dict(kept, assign=True)
    return small.requires_grad_(False)
