"""Sliding-window attention with sinks against causal full attention of the same weights."""

from __future__ import annotations

from functools import partial

import torch

from subquad.bench.harness import Bench
from subquad.mixers.attention import Attention
from subquad.ops import attention


def run(bench: Bench) -> None:
    """A SmolLM2-135M-shaped layer over a long block: the window's forward, its decode step and its state."""
    time, width, d_model, n_heads, n_kv_heads, head_dim = bench.size(
        (4096, 64, 576, 9, 3, 64), smoke=(65, 8, 32, 4, 2, 8)
    )
    torch.manual_seed(0)
    shape = {"t": time, "w": width, "s": 4, "h": n_heads, "g": n_kv_heads, "k": head_dim}
    config = Attention.Config(d_model, n_heads, n_kv_heads, head_dim, rotary={"theta": 1e5, "dim": head_dim})
    full = Attention(config).to(**bench.factory).requires_grad_(False)
    cut = Attention.from_attention(full.weights(), window=width, sinks=4).requires_grad_(False)
    x_btd = torch.randn(1, time, d_model, **bench.factory)

    small = x_btd[:, : 4 * width]
    exact = Attention.from_attention(full.double().weights(), window=width, sinks=4)
    q, k, v = exact.qkv(small.double(), exact.dense_layout(small, None))
    distance = (torch.arange(4 * width)[:, None] - torch.arange(4 * width)).to(bench.device)
    allowed = (distance >= 0) & ((distance < width) | (torch.arange(4 * width, device=bench.device) < 4))
    want = exact.o_proj(attention.equation(q, k, v, allowed[None], exact.scale).flatten(2))
    full.to(**bench.factory)
    q, k, v = cut.qkv(small, cut.dense_layout(small, None))
    naive = cut.o_proj(attention.equation(q, k, v, allowed[None], cut.scale).flatten(2))
    bench.gate("the band equals the masked equation", cut(small), want, naive=naive)
    bench.compare("fwd", cut, full, baseline_name="causal SDPA", inputs=(x_btd,), tokens=time, shape=shape)

    states = {}
    for name, mixer in (("cut", cut), ("full", full)):
        pool = mixer.init_state(1, time + 1)
        mixer.read(x_btd, mixer.init_state(1, 0))[1].commit_(pool)
        states[name] = pool
    one = torch.randn(1, 1, d_model, **bench.factory)
    bench.compare(
        "step",
        partial(cut.read, state=states["cut"]),
        partial(full.read, state=states["full"]),
        baseline_name="full key/value cache",
        inputs=(one,),
        tokens=1,
        shape=shape,
    )
    bench.value(
        "state",
        states["cut"].nbytes,
        "bytes",
        "lower",
        baseline="full key/value cache",
        baseline_value=full.init_state(1, time, device="meta").nbytes,
        shape=shape,
    )
