"""S4D's layer against softmax attention's: training step, decode step behind 4096 tokens, state."""

from __future__ import annotations

from subquad.bench import state_spaces
from subquad.bench.harness import Bench
from subquad.mixers.s4d import S4D


def run(bench: Bench) -> None:
    """A SmolLM2-135M-shaped layer with the paper's state of 64."""
    state_spaces.measure(bench, lambda d_model: S4D(S4D.Config(d_model)))
