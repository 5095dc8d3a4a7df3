"""The chunked gated delta rule against causal attention, Gated DeltaNet's decode step against a key/value cache."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.bench.harness import Bench
from subquad.bench.recurrent import measure
from subquad.mixers.gated_deltanet import GatedDeltaNet
from subquad.ops import gdn


def run(bench: Bench) -> None:
    """A SmolLM2-135M-shaped layer: forward, training step, decode step, state."""

    def arguments(b: int, t: int, h: int, k: int) -> tuple[Tensor, ...]:
        q, k_, v = (torch.randn(b, t, h, k, **bench.factory) for _ in range(3))
        g, beta = -0.1 * torch.rand(b, t, h, **bench.factory), torch.rand(b, t, h, **bench.factory)
        return q, F.normalize(k_, dim=-1), v, g, beta

    # Within a chunk of 64 three products over it and a triangular system for k + v columns, and three with the state.
    measure(bench, gdn, GatedDeltaNet, arguments, lambda k: 2 * 64 * 3 * k + 64 * 2 * k + 2 * 3 * k * k)
