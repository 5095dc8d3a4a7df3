"""Chunked gated linear attention against causal attention, its mixer's decode step against a key/value cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from subquad.bench.harness import Bench
from subquad.mixers.attention import Attention
from subquad.mixers.gla import GLA
from subquad.ops import attention, gla


def run(bench: Bench) -> None:
    """A SmolLM2-135M-shaped layer, 9 heads of 64 channels: forward, training step, decode step, state."""
    b, t, h, k = bench.size((1, 4096, 9, 64), smoke=(1, 70, 2, 8))
    shape = {"b": b, "t": t, "h": h, "k": k, "v": k}
    q, k_, v = (torch.randn(b, t, h, k, **bench.factory) for _ in range(3))
    k_ = k_ * k**-0.5
    g = -0.1 * torch.rand(b, t, h, k, **bench.factory)
    state = torch.zeros(b, h, k, k, device=bench.device)

    short_q, short_k, short_v, short_g = (x[:, :300] for x in (q, k_, v, g))
    short = (short_q, short_k, short_v, short_g, state)
    exact, _ = gla.equation(*(x.double() for x in short))
    naive, _ = gla.equation(*short)
    bench.gate("chunked equals the loop", gla.scan(*short)[0], exact, naive=naive)

    def ours(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        return gla.scan(q, k, v, g, state)[0]

    def softmax(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
        return attention.causal(q, k, v, q.shape[-1] ** -0.5)

    # Within a chunk of 64 one product of keys a level, six levels, and one of values; two with the state.
    flops = b * t * h * (2 * 64 * 7 * k + 2 * 2 * k * k)
    inputs = (q, k_, v, g)
    bench.compare(
        f"fwd.t{t}", ours, softmax, baseline_name="causal SDPA", inputs=inputs, tokens=b * t, flops=flops, shape=shape
    )

    def training(forward: Callable[..., Tensor]) -> Callable[..., None]:
        def step(*leaves: Tensor) -> None:
            forward(*leaves).sum().backward()

        return step

    leaves = tuple(x.requires_grad_() for x in inputs)
    bench.compare(
        f"train.t{t}",
        training(ours),
        training(softmax),
        baseline_name="causal SDPA",
        inputs=leaves,
        tokens=b * t,
        flops=3 * flops,
        shape=shape,
    )

    d_model, batch = h * k, 8
    mixer = GLA(GLA.Config(d_model, h, k, k)).to(**bench.factory).requires_grad_(False)
    full = Attention(Attention.Config(d_model, h, h, k)).to(**bench.factory).requires_grad_(False)
    cache = full.init_state(batch, t)
    cache.seen_b.fill_(t - 1)
    one = torch.randn(batch, 1, d_model, **bench.factory)
    bench.compare(
        f"step.t{t}",
        partial(mixer.read, state=mixer.init_state(batch)),
        partial(full.read, state=cache),
        baseline_name="full key/value cache",
        inputs=(one,),
        tokens=batch,
        shape={"b": batch, "t": t, "d": d_model, "h": h, "k": k},
    )
    bench.value(
        f"state.t{t}",
        mixer.init_state(1, t, device="meta").nbytes,
        "bytes",
        "lower",
        baseline="full key/value cache",
        baseline_value=full.init_state(1, t, device="meta").nbytes,
        shape=shape,
    )
