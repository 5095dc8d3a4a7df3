"""Calibration finds what was planted, gains on tokens it has not seen, and leaves alone what is right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from subquad.convert.transplant import calibrate as module
from subquad.convert.transplant import transplant
from subquad.convert.transplant.calibrate import calibrate, calibrate_mixer
from subquad.convert.transplant.measure import measure
from subquad.core.attention import AttentionStats
from subquad.core.errors import ConfigError
from subquad.core.layout import Layout
from subquad.core.registry import load
from subquad.mixers.attention import Attention
from subquad.mixers.gated_deltanet import GatedDeltaNet
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack

RECURRENT = ("mamba2", "gated_deltanet", "gla")
LAYER = {"mixer": "attention", "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "rotary": {"theta": 1e4, "dim": 8}}


def teacher(**options: Any) -> Attention:
    torch.manual_seed(0)
    fields = {k: v for k, v in LAYER.items() if k != "mixer"}
    return Attention(Attention.Config(32, **fields, **options)).double().requires_grad_(False)


def text(rows: int, time: int, seed: int = 1) -> Tensor:
    """Inputs whose keys have directions in common, as those of a language model do."""
    generator = torch.Generator().manual_seed(seed)
    topics = torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    at = torch.randint(5, (rows, time), generator=generator)
    return topics[at] + 0.3 * torch.randn(rows, time, 32, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("slug", RECURRENT)
@torch.no_grad()
def test_planted_half_lives_and_scales_are_found(slug: str) -> None:
    x_btd, planted_h = text(2, 200), torch.tensor([1.0, 8.0, 64.0, float("inf")])
    scale_h = torch.tensor([0.5, 3.0, -2.0, 1.0], dtype=torch.float64)
    mixer: Any = load("mixers", slug).from_attention(teacher().weights())
    mixer.decay.start_(planted_h)
    if slug == "gated_deltanet":
        mixer.start_writing_(torch.tensor([0.02, 0.1, 0.1, 0.5], dtype=torch.float64))
    layout = Layout.dense(2, 200)
    heads_btd, _ = module._before(mixer, mixer.out_proj, x_btd, layout)
    heads_btd = (heads_btd.unflatten(-1, (4, -1)) * scale_h[:, None]).flatten(2)
    want = {name: x.clone() for name, x in mixer.state_dict().items()}
    mixer.decay.start_(torch.full((4,), 30.0))
    module._search(mixer, x_btd, heads_btd)
    module._rescale(mixer, x_btd, heads_btd)
    for name, x in mixer.state_dict().items():
        factor = scale_h.repeat_interleave(8) if name == "norm_weight" else 1
        torch.testing.assert_close(x, want[name] * factor, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_projection_is_the_least_squares_one_where_the_text_tells() -> None:
    generator = torch.Generator().manual_seed(0)
    y_nv = torch.randn(4000, 12, dtype=torch.float64, generator=generator)
    true_dv, old_dv = (torch.randn(7, 12, dtype=torch.float64, generator=generator) for _ in range(2))
    held_n = torch.arange(4000) >= 3000
    for got_dv, rows in zip(module._fit(y_nv, y_nv @ true_dv.mT, old_dv, held_n), (3000, 4000), strict=True):
        gram_vv = y_nv[:rows].mT @ y_nv[:rows]
        pull_vv = min(module.RIDGES) * gram_vv.diagonal().mean() * torch.eye(12, dtype=torch.float64)
        want_vd = torch.linalg.solve(gram_vv + pull_vv, gram_vv @ true_dv.mT + pull_vv @ old_dv.mT)
        torch.testing.assert_close(got_dv, want_vd.mT, rtol=1e-9, atol=1e-9)


def test_projection_stays_where_the_text_tells_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    y_nv = torch.randn(40, 12, dtype=torch.float64, generator=generator)
    old_dv = torch.randn(7, 12, dtype=torch.float64, generator=generator)
    noise_nd = torch.randn(40, 7, dtype=torch.float64, generator=generator)
    held_n = torch.arange(40) >= 30
    noise_nd[held_n] = 0  # what fits the noise is wrong here
    fitted, whole = module._fit(y_nv, y_nv @ old_dv.mT + noise_nd, old_dv, held_n)
    assert torch.equal(fitted, old_dv)
    assert torch.equal(whole, old_dv)


@pytest.mark.parametrize("slug", [*RECURRENT, "windowed_linear"])
@pytest.mark.parametrize("o_bias", [False, True])
@torch.no_grad()
def test_every_mixer_gains_on_text_it_has_not_seen(slug: str, o_bias: bool) -> None:
    source = teacher(o_bias=o_bias)
    options = {"window": 8, "sinks": 2, "features": 8} if slug == "windowed_linear" else {}
    mixer = load("mixers", slug).from_attention(source.weights(), **options)
    held_btd = text(2, 200, seed=2)

    def error() -> float:
        return float((mixer(held_btd) - source(held_btd)).norm() / source(held_btd).norm()) ** 2

    before = error()
    found = calibrate_mixer(mixer, source.weights(), text(8, 200))
    assert found.after < 0.9 * found.before
    assert error() < 0.9 * before
    assert found.after == pytest.approx(error(), rel=0.5)


@torch.no_grad()
def test_what_is_exact_stays() -> None:
    source, x_btd = teacher(), text(4, 60)
    for slug, options in (("attention", {}), ("windowed_linear", {"window": 60}), ("attention", {"window": 60})):
        mixer = load("mixers", slug).from_attention(source.weights(), **options)
        before = {name: x.clone() for name, x in mixer.state_dict().items()}
        found = calibrate_mixer(mixer, source.weights(), x_btd)
        assert found.before < 1e-20
        assert found.after < 1e-20
        for name, x in mixer.state_dict().items():
            torch.testing.assert_close(x, before[name], rtol=1e-9, atol=1e-9)


def test_a_student_is_calibrated_layer_by_layer_and_head_by_head() -> None:
    torch.manual_seed(0)
    model = Stack(ModelConfig(50, 32, 48, (LAYER,) * 3, max_positions=256)).requires_grad_(False)
    parts = [{"mixer": "attention", "kv_heads": [1]}, {"mixer": "mamba2", "kv_heads": [0]}]
    placement: dict[int, Any] = {0: "gla", 2: {"mixer": "parallel", "parts": parts}}
    stats = measure(model, [torch.randint(50, (4, 100))], [0, 2], sample_tokens=400)
    student = transplant(model, placement, stats=stats).requires_grad_(False)
    kept = student.blocks[2].mixer.parts[0].o_proj.weight.clone()
    found = calibrate(student, model, placement, stats)
    assert sorted(found) == [0, 2]
    assert all(c.after < c.before for c in found.values())
    assert torch.equal(student.blocks[2].mixer.parts[0].o_proj.weight, kept)
    with pytest.raises(ConfigError, match="expected the parts with their kv_heads"):
        calibrate_mixer(student.blocks[2].mixer, model.blocks[2].mixer.weights(), text(1, 20).float())
    with pytest.raises(ConfigError, match="layer 0: expected sampled inputs"):
        calibrate(student, model, {0: "gla"}, {0: AttentionStats(torch.ones(4), torch.ones(4))})


def test_without_a_bias_beta_is_not_searched() -> None:
    mixer = GatedDeltaNet.from_attention(teacher().weights(), beta_bias=False)
    calibrate_mixer(mixer, teacher().weights(), text(2, 60))
    assert mixer.beta_proj.weight.abs().max() == 0
