"""Steps of its phases (feature maps alone, low-rank adapters) against plain training steps of the teacher."""

from __future__ import annotations

from subquad.bench.conversions import measure
from subquad.bench.harness import Bench
from subquad.convert.lolcats import RECIPE


def run(bench: Bench) -> None:
    """Four layers of SmolLM2-135M's shape; before that, what is not converted is the teacher's."""
    measure(bench, RECIPE)
