"""Every mixer that there is, by its examples, and blocks for it to read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from subquad.core.config import config_from_dict
from subquad.core.mixer import Mixer
from subquad.core.registry import load, methods

ALL = [(slug, name) for slug, card in methods("mixers").items() for name in card.examples]
CASES = [(slug, name) for slug, name in ALL if methods("mixers")[slug].causal]
AHEAD = [case for case in ALL if case not in CASES]
# Sums of a few hundred float64 products, reordered: 1e-10 relative to outputs of order one is far above rounding
# (1e-14) and far below any real difference.
EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
CAPACITY = 160


def build(slug: str, name: str) -> Mixer:
    torch.manual_seed(0)
    cls: type[Mixer] = load("mixers", slug)
    built = cls(config_from_dict(cls.Config, methods("mixers")[slug].examples[name])).double()
    with torch.no_grad():
        for p in built.parameters():  # away from special starts, so that every path matters
            p.add_(0.1 * torch.randn_like(p))
    return built.requires_grad_(False)


@pytest.fixture(params=CASES, ids=map("-".join, CASES))
def mixer(request: pytest.FixtureRequest) -> Mixer:
    return build(*request.param)


@pytest.fixture(params=ALL, ids=map("-".join, ALL))
def any_mixer(request: pytest.FixtureRequest) -> Mixer:
    return build(*request.param)


@pytest.fixture(params=AHEAD, ids=map("-".join, AHEAD))
def ahead(request: pytest.FixtureRequest) -> Mixer:
    return build(*request.param)


def block(mixer: Mixer, batch: int, time: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, time, mixer.config.d_model, dtype=torch.float64, generator=generator)
