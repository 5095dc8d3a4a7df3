"""H3's layer against softmax attention's: training step, decode step behind 4096 tokens, state."""

from __future__ import annotations

from subquad.bench import state_spaces
from subquad.bench.harness import Bench
from subquad.mixers.h3 import H3


def run(bench: Bench) -> None:
    """A SmolLM2-135M-shaped layer with the paper's states of 64."""
    state_spaces.measure(bench, lambda d_model: H3(H3.Config(d_model)))
