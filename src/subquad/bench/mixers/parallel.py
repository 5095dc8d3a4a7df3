"""A layer that keeps full attention in one key/value head of three against one that keeps all."""

from __future__ import annotations

from functools import partial

import torch

from subquad.bench.harness import Bench
from subquad.mixers.attention import Attention
from subquad.mixers.parallel import Parallel


def run(bench: Bench) -> None:
    """A SmolLM2-135M-shaped layer: forward over a long block, decode step at a long context, state."""
    time, batch, width, d_model, n_heads, n_kv_heads, head_dim = bench.size(
        (8192, 8, 64, 576, 9, 3, 64), smoke=(65, 2, 8, 32, 4, 2, 8)
    )
    torch.manual_seed(0)
    shape = {"b": batch, "t": time, "w": width, "h": n_heads, "g": n_kv_heads, "k": head_dim, "kept": 1}
    config = Attention.Config(d_model, n_heads, n_kv_heads, head_dim, rotary={"theta": 1e5, "dim": head_dim})
    full = Attention(config).to(**bench.factory).requires_grad_(False)
    source, others = full.weights(), list(range(1, n_kv_heads))
    linear = {"mixer": "windowed_linear", "kv_heads": others, "window": width}
    mixer = Parallel.from_attention(source, parts=[{"mixer": "attention", "kv_heads": [0]}, linear])
    mixer.requires_grad_(False)

    x_btd = torch.randn(1, time, d_model, **bench.factory)
    short_btd = x_btd[:, : 4 * width]
    halves = [{"mixer": "attention", "kv_heads": heads} for heads in ([0], others)]
    exact = Attention.from_attention(source).double()
    divided = Parallel.from_attention(source, parts=halves)
    bench.gate("attention in parts equals it", divided(short_btd), exact(short_btd.double()), naive=full(short_btd))
    bench.compare("fwd", mixer, full, baseline_name="causal SDPA", inputs=(x_btd,), tokens=time, shape=shape)

    states = {}
    for name, layer in (("mixer", mixer), ("full", full)):
        pool = layer.init_state(1, time + 1)
        layer.read(x_btd, layer.init_state(1, 0))[1].commit_(pool)
        states[name] = pool.fork(batch)
    one = torch.randn(batch, 1, d_model, **bench.factory)
    bench.compare(
        "step",
        partial(mixer.read, state=states["mixer"]),
        partial(full.read, state=states["full"]),
        baseline_name="full key/value cache",
        inputs=(one,),
        tokens=batch,
        shape=shape,
    )
    bench.value(
        "state",
        mixer.init_state(1, time, device="meta").nbytes,
        "bytes",
        "lower",
        baseline="full key/value cache",
        baseline_value=full.init_state(1, time, device="meta").nbytes,
        shape=shape,
    )
