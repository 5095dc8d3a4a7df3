"""Set a new mixer's few decisive numbers from its teacher's own layer, without training: seconds for a whole model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from subquad.convert.transplant.measure import attention_of
from subquad.core.attention import AttentionStats, AttentionWeights
from subquad.core.errors import ConfigError
from subquad.core.layout import Layout
from subquad.core.mixer import Mixer
from subquad.mixers.attention import Attention
from subquad.mixers.gated_deltanet import GatedDeltaNet
from subquad.mixers.gla import GLA
from subquad.mixers.mamba2 import Mamba2
from subquad.mixers.parallel import Parallel
from subquad.models.stack import Stack
from subquad.train.losses import relative_error

HALF_LIVES: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 256.0, float("inf"))
WRITES: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.5)
# Pull to the old output projection, in mean squares of a channel before it.
RIDGES: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
# Tokens for the search, at least a row: every candidate runs over them.
SEARCHED = 1024
HELD_OUT = 0.25


@dataclass(frozen=True)
class Calibration:
    """What it gained on tokens that it was not fitted to: the layer's relative error before and after."""

    before: float
    after: float


def calibrate(
    student: Stack,
    source: Stack,
    placement: Mapping[int, str | Mapping[str, Any]],
    stats: Mapping[int, AttentionStats],
) -> dict[int, Calibration]:
    """Calibrate, in place, every new mixer of a student against the attention that it stands for.

    Args:
        student: what `transplant` returned.
        source: the model it was made from; not changed.
        placement: as `transplant` took it.
        stats: from `measure`, with sampled inputs.

    Raises:
        ConfigError: no inputs were sampled.
    """
    out: dict[int, Calibration] = {}
    for i, placed in sorted(placement.items()):
        inputs_btd = stats[i].inputs_btd
        if inputs_btd is None:
            raise ConfigError(f"layer {i}: expected sampled inputs to calibrate on, got none; measure on some text")
        parts = None if isinstance(placed, str) else placed.get("parts")
        out[i] = calibrate_mixer(student.blocks[i].mixer, attention_of(source, i).weights(), inputs_btd, parts)
    return out


@torch.no_grad()
def calibrate_mixer(
    mixer: Mixer, source: AttentionWeights, inputs_btd: Tensor, parts: Sequence[Mapping[str, Any]] | None = None
) -> Calibration:
    """Fit a mixer's decays, write strengths, output scales and output projection to an attention's outputs, in place.

    Three steps, each with an answer in closed form or on a grid:

    1. Each head takes, of `HALF_LIVES` and then of `WRITES` (where the mixer has one), what brings its output before
       the projection nearest to the attention head's, up to a factor: ``max (y.o)^2 / (y.y)``.
    2. That factor, ``s = y.o / y.y``, goes into the norm's weight.
    3. ``W = argmin sum |W y - o*|^2 + ridge |W - W_0|^2`` replaces the output projection; the last quarter of the
       tokens chooses the ridge, and whether W_0 stays.

    Mixers whose decay isn't one number a head take the last step alone; full attention, which has no error, stays.

    Args:
        mixer: from `from_attention` of `source`.
        source: the attention.
        inputs_btd: its inputs, rows that start at position 0.
        parts: what a `parallel` mixer was made of; each part is calibrated against its own heads.

    Raises:
        ConfigError: a `parallel` mixer without its parts.
    """
    x_btd = inputs_btd.to(source.q_weight)
    attention = Attention.from_attention(source)
    layout = Layout.dense(*x_btd.shape[:2], device=x_btd.device)
    heads_btd, want_btd = _before(attention, attention.o_proj, x_btd, layout)
    held_n = torch.arange(want_btd.shape[0] * want_btd.shape[1], device=x_btd.device)
    held_n = held_n >= (1 - HELD_OUT) * len(held_n)

    def error(y_btd: Tensor) -> float:
        y_nd, want_nd = (z.flatten(0, 1)[held_n][None] for z in (y_btd, want_btd))
        return float(relative_error(y_nd, want_nd, Layout.dense(1, int(held_n.sum()), device=x_btd.device)))

    before = error(mixer(x_btd, layout))
    if isinstance(mixer, Parallel):
        if parts is None:
            raise ConfigError("parallel: expected the parts with their kv_heads to calibrate, got none; give them")
        for part, options in zip(mixer.mixers, parts, strict=True):
            calibrate_mixer(part, source.heads(options["kv_heads"]), inputs_btd)
        return Calibration(before, error(mixer(x_btd, layout)))
    projection = _projection(mixer)
    if projection is None or (isinstance(mixer, Attention) and mixer.config.window is None):
        return Calibration(before, before)
    if isinstance(mixer, Mamba2 | GatedDeltaNet | GLA):
        rows = max(1, SEARCHED // x_btd.shape[1])
        few_btd, few_heads_btd = x_btd[:rows], heads_btd[:rows]
        _search(mixer, few_btd, few_heads_btd)
        _rescale(mixer, few_btd, few_heads_btd)
    y_btd, _ = _before(mixer, projection, x_btd, layout)
    # Without its bias, where it has one.
    bias_d = projection(torch.zeros_like(y_btd[0, 0]))
    fitted_dv = _fit(y_btd.flatten(0, 1), (want_btd - bias_d).flatten(0, 1), projection.weight, held_n)
    projection.weight.copy_(fitted_dv[0])
    after = error(mixer(x_btd, layout))
    projection.weight.copy_(fitted_dv[1])
    return Calibration(before, after)


def _projection(mixer: Mixer) -> nn.Linear | None:
    """The linear layer that ends the mixer, under either of its names."""
    found = [m for name, m in mixer.named_children() if name in ("out_proj", "o_proj") and isinstance(m, nn.Linear)]
    return found[0] if found else None


def _before(mixer: Mixer, projection: nn.Linear, x_btd: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """What enters the output projection, and what the mixer makes of it."""
    caught: list[Tensor] = []
    hook = projection.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    try:
        out_btd = mixer(x_btd, layout)
    finally:
        hook.remove()
    return caught[0], out_btd


def _products(mixer: Mamba2 | GatedDeltaNet | GLA, x_btd: Tensor, heads_btd: Tensor) -> tuple[Tensor, Tensor]:
    """``y.o`` and ``y.y`` of every head, ``[h]`` each."""
    h = mixer.config.n_heads
    layout = Layout.dense(*x_btd.shape[:2], device=x_btd.device)
    y_btd, _ = _before(mixer, mixer.out_proj, x_btd, layout)
    y_bthv, o_bthv = (z.double().unflatten(-1, (h, -1)) for z in (y_btd, heads_btd))
    return (y_bthv * o_bthv).sum((0, 1, 3)), y_bthv.square().sum((0, 1, 3)).clamp(min=1e-30)


def _search(mixer: Mamba2 | GatedDeltaNet | GLA, x_btd: Tensor, heads_btd: Tensor) -> None:
    """Step 1: all heads try a candidate at once, and each keeps its own best."""

    def best(candidates: Sequence[float], start_: Callable[[Tensor], None]) -> None:
        gains: list[Tensor] = []
        ones_h = torch.ones(mixer.config.n_heads, device=x_btd.device, dtype=torch.float64)
        for candidate in candidates:
            start_(candidate * ones_h)
            both_h, own_h = _products(mixer, x_btd, heads_btd)
            gains.append(both_h.square() / own_h)
        start_(ones_h.new_tensor(candidates)[torch.stack(gains).argmax(0)])

    best(HALF_LIVES, mixer.decay.start_)
    if isinstance(mixer, GatedDeltaNet) and mixer.config.beta_bias:
        best(WRITES, mixer.start_writing_)


def _rescale(mixer: Mamba2 | GatedDeltaNet | GLA, x_btd: Tensor, heads_btd: Tensor) -> None:
    """Step 2."""
    if mixer.norm_weight is not None:
        both_h, own_h = _products(mixer, x_btd, heads_btd)
        mixer.norm_weight.unflatten(0, (mixer.config.n_heads, -1)).mul_((both_h / own_h)[:, None])


def _fit(y_nv: Tensor, want_nd: Tensor, weight_dv: Tensor, held_n: Tensor) -> tuple[Tensor, Tensor]:
    """Step 3: the weight fitted without the held-out tokens, by the ridge that suits these best, and with them."""
    old_vd = weight_dv.mT.double()

    def squares(rows_n: Tensor) -> tuple[Tensor, Tensor]:
        """``y y^T`` and ``y (o* - W_0 y)^T``, summed over tokens."""
        y, want = y_nv[rows_n].double(), want_nd[rows_n].double()
        gram_vv = y.mT @ y
        return gram_vv, y.mT @ want - gram_vv @ old_vd

    fit, held = squares(~held_n), squares(held_n)
    whole = fit[0] + held[0], fit[1] + held[1]

    def solve(gram_vv: Tensor, rest_vd: Tensor, ridge: float) -> Tensor:
        """How far to go from W_0."""
        unit = gram_vv.diagonal().mean().clamp(min=1e-30)
        eye_vv = torch.eye(len(gram_vv), dtype=gram_vv.dtype, device=gram_vv.device)
        return torch.cholesky_solve(rest_vd, torch.linalg.cholesky(gram_vv + ridge * unit * eye_vv))

    def gain(step_vd: Tensor) -> float:
        """How much less the held-out error is than that of W_0."""
        return float((step_vd * (2 * held[1] - held[0] @ step_vd)).sum())

    steps = {ridge: solve(*fit, ridge) for ridge in RIDGES}
    ridge = max(RIDGES, key=lambda ridge: gain(steps[ridge]))
    if gain(steps[ridge]) <= 0:
        return weight_dv.clone(), weight_dv.clone()
    return (old_vd + steps[ridge]).mT.to(weight_dv), (old_vd + solve(*whole, ridge)).mT.to(weight_dv)
