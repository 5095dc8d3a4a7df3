"""Windowed linear attention against causal full attention of the same weights."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from subquad.bench.harness import Bench
from subquad.core.layout import Layout
from subquad.mixers.attention import Attention
from subquad.mixers.windowed_linear import WindowedLinear
from subquad.ops import attention


def naive(mixer: WindowedLinear, x_btd: Tensor) -> Tensor:
    """The mixer's equation with one weight for every pair of tokens."""
    config, (b, t) = mixer.config, x_btd.shape[:2]
    plain_q, plain_k, v = mixer.qkv.project(x_btd)
    q, k = mixer.qkv.rotate(plain_q, plain_k, Layout.dense(b, t, device=x_btd.device))
    k, v, f = (attention.expand_heads(y, config.n_heads) for y in (k, v, mixer.key_features(plain_k)))
    columns_t = torch.arange(t, device=x_btd.device)
    distance_tt = columns_t[:, None] - columns_t
    near_tt = (distance_tt < config.window) | (columns_t < config.sinks)
    near_bhtt = torch.einsum("bthk,bnhk->bhtn", q, k) * mixer.scale
    far_bt = (columns_t - config.window - config.sinks + 1).clamp(min=0).expand(b, t)
    far_bhtt = torch.einsum("bthf,bnhf->bhtn", mixer.query_weights(plain_q, far_bt).exp(), f).log()
    scores_bhtt = torch.where(near_tt, near_bhtt, far_bhtt).masked_fill(distance_tt < 0, -torch.inf)
    return mixer.o_proj(torch.einsum("bhtn,bnhk->bthk", scores_bhtt.softmax(-1), v).flatten(2))


def run(bench: Bench) -> None:
    """A SmolLM2-135M-shaped layer over a long block: forward, decode step and state."""
    time, width, d_model, h, g, k = bench.size((4096, 64, 576, 9, 3, 64), smoke=(65, 8, 32, 4, 2, 8))
    torch.manual_seed(0)
    shape = {"t": time, "w": width, "s": 4, "f": 64, "h": h, "g": g, "k": k}
    config = Attention.Config(d_model, h, g, k, rotary={"theta": 1e5, "dim": k})
    full = Attention(config).to(**bench.factory).requires_grad_(False)
    mixer = WindowedLinear.from_attention(full.weights(), window=width).requires_grad_(False)
    x_btd = torch.randn(1, time, d_model, **bench.factory)

    small = x_btd[:, : 6 * width]
    plain = naive(mixer, small)
    exact = naive(mixer.double(), small.double())
    mixer.to(**bench.factory)
    bench.gate("the mixer equals its equation", mixer(small), exact, naive=plain)
    bench.compare("fwd", mixer, full, baseline_name="causal SDPA", inputs=(x_btd,), tokens=time, shape=shape)

    states = [m.init_state(1, time + 1) for m in (mixer, full)]
    for m, state in zip((mixer, full), states, strict=True):
        m.read(x_btd, m.init_state(1, 0))[1].commit_(state)
    bench.compare(
        "step",
        partial(mixer.read, state=states[0]),
        partial(full.read, state=states[1]),
        baseline_name="full key/value cache",
        inputs=(torch.randn(1, 1, d_model, **bench.factory),),
        tokens=1,
        shape=shape,
    )
    sizes = [m.init_state(1, time, device="meta").nbytes for m in (mixer, full)]
    bench.value(
        "state", sizes[0], "bytes", "lower", baseline="full key/value cache", baseline_value=sizes[1], shape=shape
    )
