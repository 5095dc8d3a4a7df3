"""Copies from the context beside plain decoding, where there is much to copy and where there is little."""

from __future__ import annotations

from subquad.bench.drafting import run_drafter
from subquad.bench.harness import Bench
from subquad.decode.copyspec import CopySpec


def run(bench: Bench) -> None:
    """The default runs, of 3, 2 and 1 tokens, the number of guesses chosen by what they bring."""
    run_drafter(bench, lambda _: CopySpec())
