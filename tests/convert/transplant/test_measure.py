"""What `measure` finds beside the parked tokens, and what mixers make of it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from subquad.convert.transplant.measure import PARKED, measure
from subquad.core.attention import AttentionStats
from subquad.core.layout import Layout
from subquad.mixers.gated_deltanet import GatedDeltaNet
from subquad.mixers.gla import GLA
from subquad.mixers.mamba2 import Mamba2
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack

LAYER = {"mixer": "attention", "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "rotary": {"theta": 1e4, "dim": 8}}


def stack(**layer: object) -> Stack:
    torch.manual_seed(0)
    made = Stack(ModelConfig(50, 32, 48, (LAYER | layer,) * 2, max_positions=256)).requires_grad_(False)
    for p in made.parameters():
        p.add_(0.3 * torch.randn_like(p))
    return made


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("at_once", [1, 2**24])
def test_median_and_entropy_equal_the_definition(
    window: int | None, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("subquad.convert.transplant.measure.SCORES_AT_ONCE", at_once)
    teacher = stack(window=window)
    batches = [torch.randint(50, (2, 15)) for _ in range(2)]
    got = measure(teacher, batches, [0])[0]
    assert got.entropy_h is not None
    assert got.median_h is not None
    for h in range(4):
        by_distance, entropy, mass = torch.zeros(15, dtype=torch.float64), 0.0, 0.0
        for tokens_bt in batches:
            (b, t), block = tokens_bt.shape, teacher.blocks[0]
            qkv = block.mixer.qkv(block.norm1(teacher.embed(tokens_bt)), Layout.dense(b, t))
            q, k = (x.double() for x in qkv[:2])
            for row in range(b):
                for i in range(t):
                    seen = range(max(0, i + 1 - (window or t)), i + 1)
                    p = torch.stack([(q[row, i, h] @ k[row, j, h // 2]) * 8**-0.5 for j in seen]).softmax(0)
                    beside = [(i - j, float(x)) for j, x in zip(seen, p, strict=True) if j >= PARKED]
                    m = sum(x for _, x in beside)
                    entropy -= sum(x * math.log(x / m) for _, x in beside)
                    mass += m
                    for distance, x in beside:
                        by_distance[distance] += x
        assert float(got.entropy_h[h]) == pytest.approx(entropy / mass, rel=1e-4)
        below = by_distance.cumsum(0) < 0.5 * mass
        assert int(got.median_h[h]) == int(below.sum())


def test_text_of_parked_tokens_alone_has_no_look_back() -> None:
    got = measure(stack(), [torch.randint(50, (1, PARKED))], [0])[0]
    assert got.median_h is not None
    assert got.entropy_h is not None
    assert (got.median_h == 0).all()
    assert got.entropy_h.abs().max() < 1e-6
    mixer = Mamba2.from_attention(stack().blocks[0].mixer.weights(), got)
    assert all(x.isfinite().all() for x in mixer.state_dict().values())


def weights_of(half_life: float) -> Tensor:
    p_j = 2.0 ** (-torch.arange(20_000, dtype=torch.float64) / half_life)
    return p_j / p_j.sum()


@pytest.mark.parametrize("half_life", [20.0, 150.0])
def test_both_estimates_find_the_half_life_of_a_decay(half_life: float) -> None:
    p_j = weights_of(half_life)
    median = float((p_j.cumsum(0) < 0.5).sum())
    entropy = float(torch.special.entr(p_j).sum())

    def estimate(median: float, entropy: float | None) -> float:
        known = None if entropy is None else torch.tensor([entropy], dtype=torch.float64)
        stats = AttentionStats(torch.tensor([1e4]), torch.ones(1), None, torch.tensor([median]), known)
        return float(stats.half_life_h)

    assert estimate(median, None) == pytest.approx(half_life, abs=1)
    # The sums over tokens are integrals but for terms of (ln 2 / H)^2.
    assert estimate(1e9, entropy) == pytest.approx(half_life, rel=1e-3)
    assert estimate(3.0, entropy) == 3.0
    assert float(AttentionStats(torch.tensor([9.0]), torch.ones(1)).half_life_h) == 9.0


@pytest.mark.parametrize("tokens", [1.0, 3.0, 40.0])
def test_write_strength_averages_as_many_tokens_as_are_read(tokens: float) -> None:
    stats = AttentionStats(torch.ones(1), torch.ones(1), entropy_h=torch.tensor([math.log(tokens)]).double())
    assert stats.write_h is not None
    beta = float(stats.write_h)
    shares_j = beta * (1 - beta) ** torch.arange(10_000, dtype=torch.float64)
    assert 1 / float(shares_j.square().sum()) == pytest.approx(tokens, rel=1e-6)


def test_delta_rule_starts_with_it() -> None:
    source = stack().blocks[0].mixer.weights()
    entropy_h = torch.tensor([0.0, 1.0, 3.0, 6.0])
    stats = AttentionStats(torch.ones(4), torch.ones(4), entropy_h=entropy_h)
    mixer = GatedDeltaNet.from_attention(source, stats)
    beta_h = mixer.beta_proj(torch.randn(5, 32)).sigmoid()
    torch.testing.assert_close(beta_h, (2 / (1 + entropy_h.exp())).clamp(max=0.999).expand(5, -1))
    for plain in (GatedDeltaNet.from_attention(source), GatedDeltaNet.from_attention(source, stats, beta_bias=False)):
        assert (plain.beta_proj(torch.randn(5, 32)).sigmoid() == 0.5).all()


@pytest.mark.parametrize("kind", [Mamba2, GLA])
def test_a_constant_write_strength_is_divided_out_elsewhere(kind: type[Mamba2 | GLA]) -> None:
    """Why the entropy sets no write strength there."""
    mixer, x_btd = kind.from_attention(stack().blocks[0].mixer.weights()).double(), torch.randn(1, 30, 32).double()
    y_btd = mixer(x_btd)
    with torch.no_grad():
        mixer.qkv.v_proj.weight.mul_(5)
    torch.testing.assert_close(mixer(x_btd), y_btd, rtol=1e-3, atol=1e-3 * float(y_btd.detach().abs().max()))
