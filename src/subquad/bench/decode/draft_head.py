"""A head as drafter beside plain decoding: trained where ``--drafter`` names it, else what a head costs.

Untrained, no guess of it stands.
"""

from __future__ import annotations

from subquad.bench.drafting import run_drafter, trained_head
from subquad.bench.harness import Bench
from subquad.decode.draft_head import DraftHead

WINDOW = 256


def run(bench: Bench) -> None:
    """Untrained, the window is the one that `subquad draft --head` trains by default."""
    head = trained_head(bench) or WINDOW
    run_drafter(bench, lambda _: DraftHead(head))
