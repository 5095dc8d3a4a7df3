"""The model's own first layers as drafter beside plain decoding: as they are, the least that training starts from.

Trained, where ``--drafter`` names them, they are a model of their own.
"""

from __future__ import annotations

from subquad.bench.drafting import run_drafter, trained_model
from subquad.bench.harness import Bench
from subquad.decode.draft_model import DraftModel
from subquad.decode.self_draft import SelfDraft
from subquad.engine.draft import Drafter
from subquad.models.stack import Stack


def run(bench: Bench) -> None:
    """Without ``--drafter`` a third of the layers guesses."""
    small, vocab = trained_model(bench)

    def drafter(model: Stack) -> Drafter:
        return DraftModel(small, vocab=vocab) if small else SelfDraft(max(1, len(model.config.layers) // 3))

    run_drafter(bench, drafter)
