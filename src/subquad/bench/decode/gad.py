"""A block head as drafter beside plain decoding, exactly and relaxed: trained where ``--drafter`` names it.

Without one the head is untrained, and no guess of it stands but by relaxing: what a block of guesses costs.
"""

from __future__ import annotations

from subquad.bench.drafting import run_drafter, trained_head
from subquad.bench.harness import Bench
from subquad.decode.gad import Gad
from subquad.engine.relax import Relaxed

WINDOW = 256


def run(bench: Bench) -> None:
    """Untrained, the window is the one that `subquad draft --head` trains by default."""
    head = trained_head(bench) or WINDOW
    run_drafter(bench, lambda _: Gad(head), relaxed=Relaxed())
