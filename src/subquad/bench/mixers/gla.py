"""Chunked gated linear attention against causal attention, its mixer's decode step against a key/value cache."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.bench.harness import Bench
from subquad.bench.recurrent import measure
from subquad.mixers.gla import GLA
from subquad.ops import gla


def run(bench: Bench) -> None:
    """A SmolLM2-135M-shaped layer: forward, training step, decode step, state."""

    def arguments(b: int, t: int, h: int, k: int) -> tuple[Tensor, ...]:
        q, k_, v = (torch.randn(b, t, h, k, **bench.factory) for _ in range(3))
        return q, k_ * k**-0.5, v, -0.1 * torch.rand(b, t, h, k, **bench.factory)

    # Within a chunk of 64 one product of keys a level, six levels, and one of values; two with the state.
    measure(bench, gla, GLA, arguments, lambda k: 2 * 64 * 7 * k + 2 * 2 * k * k)
