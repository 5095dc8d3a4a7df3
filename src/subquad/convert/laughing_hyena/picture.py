"""What a distillation looks like: its errors, and the filter that it met worst."""

from __future__ import annotations

from pathlib import Path

import torch

from subquad.convert.laughing_hyena import Distillation, filters_of
from subquad.mixers.laughing_hyena import LaughingHyena
from subquad.models.stack import Stack


def draw(teacher: Stack, made: Distillation, path: Path) -> None:
    """A PNG of two panels: every filter's error over its modes, and the worst filter with what stands for it.

    Args:
        teacher: what was distilled.
        made: of `distil`.
        path: where it goes.
    """
    from matplotlib.figure import Figure

    worst = max(made.fits, key=lambda one: one.l2)
    mixer = made.student.blocks[worst.layer].mixer
    assert isinstance(mixer, LaughingHyena)
    with torch.no_grad():
        taps_l = filters_of(teacher.blocks[worst.layer])[worst.convolution, worst.head]
        fitted_l = mixer.filters.taps(len(taps_l))[worst.convolution, worst.head]
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    modes = [one.modes for one in made.fits]
    # A filter of zeros is met exactly, which has no place on this axis.
    for name, marker, values in (
        ("l2", "o", [one.l2 for one in made.fits]),
        ("Hankel norm", "^", [one.hankel for one in made.fits]),
        ("least in the Hankel norm (AAK)", "_", [one.aak for one in made.fits]),
    ):
        left.scatter(modes, [max(v, 1e-16) for v in values], marker=marker, s=18, alpha=0.6, label=name)
    left.set(yscale="log", xlabel="modes", ylabel="relative error", title=f"{len(made.fits)} filters")
    left.legend()
    right.plot(taps_l.cpu(), label="filter")
    right.plot(fitted_l.cpu(), "--", label=f"{worst.modes} modes, {worst.l2:.1e} off in l2")
    place = f"layer {worst.layer}, convolution {worst.convolution}, filter {worst.head}"
    right.set(xlabel="tokens back", ylabel="weight", title=f"the farthest: {place}")
    right.legend()
    figure.savefig(path, dpi=120)
