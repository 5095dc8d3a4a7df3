"""A model that guesses for itself: all guesses stand, so what is left is what drafting costs the engine."""

from __future__ import annotations

from subquad.bench.drafting import run_drafter
from subquad.bench.harness import Bench
from subquad.decode.draft_model import DraftModel


def run(bench: Bench) -> None:
    """The bound of acceptance, at the dearest drafter there is."""
    run_drafter(bench, DraftModel)
