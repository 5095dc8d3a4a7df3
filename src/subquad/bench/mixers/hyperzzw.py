"""HyperZ.Z.W over whole images against attention that looks both ways."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.bench.harness import Bench
from subquad.mixers.hyperzzw import HyperZZW


class Full(nn.Module):
    """Softmax attention from every pixel to every pixel."""

    def __init__(self, d_model: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv_proj, self.out_proj = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)

    def forward(self, x_btd: Tensor) -> Tensor:
        """``[b, t, d]``."""
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in self.qkv_proj(x_btd).chunk(3, dim=-1))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def pairs(mixer: HyperZZW, z_mdp: Tensor) -> Tensor:
    """The operator over a line with every pair of places written out."""
    places = torch.arange(z_mdp.shape[-1], device=z_mdp.device)
    behind_pq = (places[:, None] - places) % len(places)
    return torch.einsum("dq,mdq,mdpq->mdp", mixer.whole().to(z_mdp.dtype), z_mdp, z_mdp[..., behind_pq])


def run(bench: Bench) -> None:
    """Images of three sizes: forward, and a training step at the middle one."""
    d, head_dim, sides = bench.size((128, 64, [32, 64, 96]), smoke=(8, 4, [4, 6]))
    line = HyperZZW(HyperZZW.Config(d, (256,))).to(**bench.factory).requires_grad_(False)
    z_mdp = torch.randn(1, d, 256, **bench.factory)
    naive = pairs(line, z_mdp)
    got, exact = line.whole_product(z_mdp), pairs(line.double(), z_mdp.double())
    bench.gate("the global product equals its double sum", got, exact, naive=naive)
    for i, side in enumerate(sides):
        mixer = HyperZZW(HyperZZW.Config(d, (side, side))).to(**bench.factory)
        full, tokens = Full(d, head_dim).to(**bench.factory), side * side
        shape, x_btd = {"b": 1, "t": tokens, "d": d}, torch.randn(1, tokens, d, **bench.factory)
        with torch.no_grad():
            bench.compare(
                f"fwd.t{tokens}", mixer, full, baseline_name="SDPA", inputs=(x_btd,), tokens=tokens, shape=shape
            )
        if i == 1:
            both = (partial(_train, layer) for layer in (mixer, full))
            bench.compare(f"train.t{tokens}", *both, baseline_name="SDPA", inputs=(x_btd,), tokens=tokens, shape=shape)


def _train(layer: nn.Module, x_btd: Tensor) -> None:
    layer(x_btd).sum().backward()
