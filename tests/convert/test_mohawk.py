"""The published stages with their shares of three billion tokens, and a mixer whose matrix can be compared."""

import pytest
import torch

from subquad.convert.mohawk import RECIPE
from subquad.core.attention import RotarySpec
from subquad.core.registry import load
from subquad.mixers.attention import Attention


def test_stages_and_tokens_are_the_published_ones():
    assert [phase.stage for phase in RECIPE.phases] == ["matrix", "align", "distill"]
    budgets = RECIPE.budgets(3_000_000_000)
    assert [budgets[phase.name].tokens for phase in RECIPE.phases] == [80_000_000, 160_000_000, 2_760_000_000]
    assert RECIPE.seq == 2048 and RECIPE.keep == 0.0


@pytest.mark.parametrize("slug", RECIPE.mixers)
def test_its_mixer_has_a_matrix(slug):
    rotary = {"theta": 1e4, "dim": 8}
    attention = Attention(Attention.Config(32, 4, 2, 8, rotary=rotary)).double()
    assert attention.qkv.rotary == RotarySpec(**rotary)
    mixer = load("mixers", slug).from_attention(attention.weights(), write="dt")
    x, one = torch.randn(1, 9, 32, dtype=torch.float64), torch.eye(9, dtype=torch.float64)
    with torch.no_grad():
        m = mixer.mix_values(x, one[None, :, None].expand(1, 9, 4, 9))[0].transpose(0, 1)
        # The entry at lag n is scale q.k times the decay's n-th power, times dt, which is 1.
        q, k, _ = attention.qkv(x, mixer.dense_layout(x, None))
        for h in range(4):
            g, dt = (float(y[0, 0, h]) for y in mixer.decay(mixer.dt_proj(x)))
            lag = (torch.arange(9)[:, None] - torch.arange(9)).double()
            want = attention.scale * (q[0, :, h] @ k[0, :, h // 2].T) * (g * lag).exp() * dt
            # In chunks here and by powers there: sums of 8 channels in float64, times exponentials whose exponent is at
            # most 8 decays of 0.03, are off by some ten roundings, 1e-15. A wrong lag shows in the third digit.
            torch.testing.assert_close(m[h], want.tril(), rtol=1e-9, atol=1e-9)
