"""A smaller model as drafter where ``--drafter`` names it, else a model that guesses for itself.

Then all guesses stand, so what is left is what drafting costs the engine.
"""

from __future__ import annotations

from subquad.bench.drafting import run_drafter, trained_model
from subquad.bench.harness import Bench
from subquad.decode.draft_model import DraftModel


def run(bench: Bench) -> None:
    """Without ``--drafter`` the bound of acceptance, at the dearest drafter there is."""
    small, vocab = trained_model(bench)
    run_drafter(bench, lambda model: DraftModel(small or model, vocab=vocab))
