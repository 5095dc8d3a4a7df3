"""A smaller model that guesses several chains where ``--drafter`` names it, else a model that does so for itself.

Then all depths stand, so what is left is what reading chains costs.
"""

from __future__ import annotations

from subquad.bench.drafting import run_drafter, trained_model
from subquad.bench.harness import Bench
from subquad.decode.spectr import SpecTr


def run(bench: Bench) -> None:
    """Four independent chains, beside `draft_model`, which guesses one; without ``--drafter`` the dearest there are."""
    small, vocab = trained_model(bench)
    run_drafter(bench, lambda model: SpecTr(small or model, (4,), vocab=vocab))
