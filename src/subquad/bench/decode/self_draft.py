"""The model's own first layers as drafter, not trained, beside plain decoding: the least that training starts from."""

from __future__ import annotations

from subquad.bench.drafting import run_drafter
from subquad.bench.harness import Bench
from subquad.decode.self_draft import SelfDraft


def run(bench: Bench) -> None:
    """A third of the layers guesses."""
    run_drafter(bench, lambda model: SelfDraft(max(1, len(model.config.layers) // 3)))
