"""Chunked SSD against causal softmax attention, and Mamba-2's decode step against a key/value cache."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.bench.harness import Bench
from subquad.bench.recurrent import measure
from subquad.mixers.mamba2 import Mamba2
from subquad.ops import ssd


def run(bench: Bench) -> None:
    """A SmolLM2-135M-shaped layer: forward, training step, decode step, state."""

    def arguments(b: int, t: int, h: int, k: int) -> tuple[Tensor, ...]:
        q, k_, v = (torch.randn(b, t, h, k, **bench.factory) for _ in range(3))
        return q, k_ * k**-0.5, v, -0.1 * torch.rand(b, t, h, **bench.factory)

    # Within a chunk of 64 two products over it, and two with the state.
    measure(bench, ssd, Mamba2, arguments, lambda k: 2 * 64 * 2 * k + 2 * 2 * k * k)
