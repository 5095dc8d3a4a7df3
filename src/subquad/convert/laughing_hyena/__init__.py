"""LaughingHyena: every long filter of a Hyena becomes a few modes, which decode in constant time and memory."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from subquad.convert.laughing_hyena import fit
from subquad.core.card import Card
from subquad.core.config import config_to_dict
from subquad.core.errors import ConfigError, nearest
from subquad.mixers.hyena import Hyena
from subquad.mixers.laughing_hyena import LEAST_RATE, LaughingHyena
from subquad.models.stack import Block, Stack

CARD = Card(
    title="Laughing Hyena Distillery: Extracting Compact Recurrences From Convolutions",
    entry="distil",
    arxiv="2310.18780",
    needs="a model with hyena layers; no data and no training",
    gives="the same model with laughing_hyena layers, each filter fitted to a bound: decoding never slows down",
    status="incubating",
    claim="1.5 x Hyena's and 10 x a Transformer's peak generation throughput at 1.3 B parameters, quality kept",
    measured="105 M, one H100: 12 x Hyena's by history, 20 x attention's; the perplexity of its teacher",
    result="laughing_hyena.h100.json",
)

NORMS = ("l2", "linf")


@dataclass(frozen=True)
class FilterFit:
    """How one filter was met, by the taps that its modes have in the student's own precision.

    Attributes:
        layer, convolution, head: which filter.
        modes: complex poles used; its order is twice that.
        l2, linf, hankel, aak: see `subquad.convert.laughing_hyena.fit.Errors`.
    """

    layer: int
    convolution: int
    head: int
    modes: int
    l2: float
    linf: float
    hankel: float
    aak: float


@dataclass(frozen=True)
class Distillation:
    """What `distil` returns.

    Attributes:
        student: the model with laughing_hyena layers.
        fits: one for each filter, in the order of layers.
    """

    student: Stack
    fits: tuple[FilterFit, ...]


def distil(
    teacher: Stack,
    *,
    modes: int = 16,
    bound: float | None = 0.01,
    norm: str = "l2",
    say: Callable[[str], None] | None = None,
) -> Distillation:
    """Replace every hyena layer by a laughing_hyena one whose filters have as few modes as meet a bound.

    A filter's start is a realisation from its Hankel singular vectors, truncated to the modes that carry most; poles
    and residues are then refined together. All other weights are the teacher's.

    Args:
        teacher: not changed.
        modes: most complex poles of a filter, half the paper's order.
        bound: of each filter's error behind tap 0, relative to the filter; None takes what `modes` give.
        norm: the error is that of the taps in ``l2``, or their largest, ``linf``.
        say: told of each layer.

    Raises:
        ConfigError: no hyena layer, an unknown norm, or a filter that can't be met within the bound.

    Example:
        >>> from subquad.models.config import ModelConfig
        >>> layer = {"mixer": "hyena", "max_len": 24, "bands": 2, "frequency": 1.0}
        >>> teacher = Stack(ModelConfig(vocab_size=11, d_model=8, d_mlp=16, layers=(layer,)))
        >>> made = distil(teacher, modes=6)
        >>> len(made.fits), max(one.l2 for one in made.fits) <= 0.01
        (8, True)
    """
    layers = [i for i, block in enumerate(teacher.blocks) if isinstance(block.mixer, Hyena)]
    if not layers:
        there = ", ".join(sorted({layer["mixer"] for layer in teacher.config.layers}))
        raise ConfigError(f"distil: expected a model with hyena layers, got {there}; train one, or convert otherwise")
    if norm not in NORMS:
        raise ConfigError(f"distil: unknown norm {norm!r}{nearest(norm, NORMS)}")
    if modes < 1 or (bound is not None and not bound > 0):
        raise ConfigError(f"distil: expected at least one mode and a bound above 0, got {modes} and {bound}; raise it")
    mixers: dict[int, LaughingHyena] = {}
    fits: list[FilterFit] = []
    for i in layers:
        mixer, found = _layer(teacher.blocks[i], i, modes, bound, norm)
        mixers[i] = mixer
        fits += found
        if say is not None:
            most, worst = mixer.config.modes, max(one.l2 for one in found)
            say(f"layer {i}: {len(found)} filters by up to {most} modes, the farthest {worst:.2e} off in l2")
    student = copy.deepcopy(teacher, {id(p): p for i in layers for p in teacher.blocks[i].mixer.parameters()})
    described = [dict(layer) for layer in teacher.config.layers]
    for i, mixer in mixers.items():
        student.blocks[i].mixer = mixer.train(teacher.training)
        values = config_to_dict(mixer.config)
        described[i] = {"mixer": "laughing_hyena"} | {k: v for k, v in values.items() if k != "d_model"}
    student.config = dataclasses.replace(teacher.config, layers=tuple(described))
    return Distillation(student, tuple(fits))


@torch.no_grad()
def filters_of(block: Block) -> Tensor:
    """All taps of a hyena layer's filters, ``[convolutions, heads, max_len]`` in float64."""
    assert isinstance(block.mixer, Hyena)
    return copy.deepcopy(block.mixer.filters).double()(block.mixer.config.max_len)


@torch.no_grad()
def _layer(block: Block, i: int, most: int, bound: float | None, norm: str) -> tuple[LaughingHyena, list[FilterFit]]:
    """The new mixer of layer i, and how its filters are met."""
    assert isinstance(block.mixer, Hyena)
    config, k_ngl = block.mixer.config, filters_of(block)
    k_gl = k_ngl.flatten(0, 1)
    found, used_g = fit.choose(k_gl, most, bound, norm)
    size = max(1, int(used_g.max()))
    shape = LaughingHyena.Config(
        config.d_model, size, order=config.order, n_heads=config.n_heads, conv_width=config.conv_width
    )
    mixer = LaughingHyena(shape).to(block.mixer.recurrence.in_proj.weight)
    mixer.recurrence.load_state_dict(block.mixer.recurrence.state_dict())
    log_a_gm, residue_gm = (x[:, :size] for x in found)
    made = mixer.filters
    for parameter, value_gx in (
        (made.log_rate_ngm, (-log_a_gm.real - LEAST_RATE).log()),
        (made.angle_ngm, log_a_gm.imag),
        (made.residue_ngmp, torch.view_as_real(residue_gm)),
        (made.first_ng, k_gl[:, 0] - residue_gm.real.sum(1)),
    ):
        parameter.copy_(value_gx.view_as(parameter))
    fitted_gl = copy.deepcopy(made).double().taps(config.max_len).flatten(0, 1)
    off = fit.errors(k_gl, fitted_gl, used_g)
    figures = zip(*(x.tolist() for x in (used_g, off.l2, off.linf, off.hankel, off.aak)), strict=True)
    fits = [FilterFit(i, *divmod(j, k_ngl.shape[1]), *each) for j, each in enumerate(figures)]
    far_g = off.l2 if norm == "l2" else off.linf
    if bound is not None and bool((far_g > bound).any()):
        worst = fits[int(far_g.argmax())]
        raise ConfigError(
            f"distil: layer {i}, convolution {worst.convolution}, filter {worst.head}: expected a relative {norm} "
            f"error of at most {bound:g}, got {float(far_g.max()):.2g} with {most} modes (order {2 * most}), as the "
            f"farthest of {int((far_g > bound).sum())} of {len(fits)} filters; in the Hankel norm no filter of that "
            f"order is nearer than {worst.aak:.2g}: allow more modes, or a larger bound"
        )
    return mixer, fits
