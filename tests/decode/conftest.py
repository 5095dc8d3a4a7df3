"""Tiny models of any mixer, in float64, and prompts of several lengths."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from subquad.core.registry import methods
from subquad.engine.translate import Foreign, Translation
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack

V = 23
LENGTHS = (5, 1, 9, 3)
MIXERS = {
    f"{slug}-{name}": {"mixer": slug, **example}
    for slug, card in methods("mixers").items()
    if card.causal and card.splittable
    for name, example in card.examples.items()
}

FIRST_MIXERS = set({name.partition("-")[0]: name for name in reversed(MIXERS)}.values())


def build(layer: dict[str, Any], seed: int = 0, vocab_size: int = V, layers: int = 2) -> Stack:
    torch.manual_seed(seed)
    bare = {k: v for k, v in layer.items() if k != "d_model"}
    model = Stack(ModelConfig(vocab_size, layer.get("d_model", 32), 48, (bare,) * layers))
    with torch.no_grad():
        for p in model.parameters():  # far from uniform logits, and no special starts
            p.add_(0.1 * torch.randn_like(p))
    return model.double().requires_grad_(False)


def foreign(slug: str) -> Foreign:
    """A small model of 19 tokens: it has 14 of the others' under other ids and reads the rest as 0 to 3 of its own."""
    pieces = [[(5 * i + 2) % 19] for i in range(14)] + [[j % 19 for j in range(i, i + i % 4)] for i in range(14, V)]
    model = build(next(layer for name, layer in MIXERS.items() if name.startswith(f"{slug}-")), seed=7, vocab_size=19)
    return Foreign(model, Translation(pieces, frozenset(range(14)), start=[4]))


def named(slug: str, layers: int = 2) -> Stack:
    """A small model of the first example of a mixer, or one of another vocabulary."""
    if slug == "foreign":
        return foreign("attention")
    return build(next(layer for name, layer in MIXERS.items() if name.startswith(f"{slug}-")), seed=7, layers=layers)


@pytest.fixture
def models() -> Callable[[str], Stack]:
    return named


@pytest.fixture
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(V, (n,), generator=generator).tolist() for n in LENGTHS]
