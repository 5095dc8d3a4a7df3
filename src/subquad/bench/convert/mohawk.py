"""Steps of its phases (matrix, outputs, whole) against plain ones; first, the distance of matrices is exact."""

from __future__ import annotations

import itertools

import torch

from subquad.bench.conversions import measure
from subquad.bench.harness import Bench
from subquad.convert.mohawk import RECIPE
from subquad.mixers.attention import Attention
from subquad.mixers.mamba2 import Mamba2
from subquad.train.stages.matrix import squared_frobenius


def run(bench: Bench) -> None:
    """Four layers of SmolLM2-135M's shape; before that, the mean over all sign vectors is the Frobenius distance."""
    t = 8
    attention = Attention(Attention.Config(32, 4, 2, 8, rotary={"theta": 1e4, "dim": 8})).double()
    mixer = Mamba2.from_attention(attention.weights())
    x_btd = torch.randn(2, t, 32, dtype=torch.float64)
    every_tn = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=t)), dtype=torch.float64).T
    one_tt = torch.eye(t, dtype=torch.float64)
    with torch.no_grad():
        signs_bthn = every_tn[None, :, None].expand(2, t, 4, 2**t)
        got_h = squared_frobenius(mixer.mix_values(x_btd, signs_bthn) - attention.mix_values(x_btd, signs_bthn))
        ones_btht = one_tt[None, :, None].expand(2, t, 4, t)
        apart_btht = mixer.mix_values(x_btd, ones_btht) - attention.mix_values(x_btd, ones_btht)
        want_h = apart_btht.square().sum((0, 1, 3))
    bench.gate("the estimate over every sign vector", got_h, want_h, rtol=1e-12)
    measure(bench, RECIPE)
