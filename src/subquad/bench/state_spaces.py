"""What the bench rooms of state space layers share: training and decoding against attention of the same width."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from subquad.bench.harness import Bench
from subquad.core.mixer import Mixer
from subquad.mixers.attention import Attention


def in_steps(layer: Mixer, x_btd: Tensor) -> Tensor:
    """A layer's outputs read token by token, the naive way."""
    state, out = layer.init_state(len(x_btd)), list[Tensor]()
    for t in range(x_btd.shape[1]):
        y_btd, update = layer.read(x_btd[:, t : t + 1], state)
        state = update.commit()
        out.append(y_btd)
    return torch.cat(out, dim=1)


def measure(bench: Bench, build: Callable[[int], Mixer], *, train: int = 2048, rows: int = 64) -> None:
    """A SmolLM2-135M-shaped layer, width 576: training step, decode step behind 4096 tokens, state.

    Args:
        bench: where figures go.
        build: width to the layer.
        train: tokens of the training step.
        rows: rows of the decode step.
    """
    d_model, h, t, context, b = bench.size((576, 9, train, 4096, rows), smoke=(16, 2, 70, 90, 2))
    layer, full = build(d_model), Attention(Attention.Config(d_model, h, h, d_model // h)).to(**bench.factory)

    with torch.no_grad():
        x_btd = torch.randn(1, 100, d_model, **bench.factory)
        exact = in_steps(layer.to(bench.device).double(), x_btd.double())
        layer.to(**bench.factory)
        naive = in_steps(layer, x_btd)
        bench.gate("the training form equals single steps", layer(x_btd), exact, naive=naive)
        read_btd = layer.read(x_btd, layer.init_state(1))[0]
        bench.gate("a block read at once equals single steps", read_btd, exact, naive=naive)

    def step(of: Mixer) -> Callable[[Tensor], None]:
        def run(x_btd: Tensor) -> None:
            of(x_btd).sum().backward()

        return run

    bench.compare(
        f"train.t{t}",
        step(layer),
        step(full),
        baseline_name="causal SDPA layer",
        inputs=(torch.randn(1, t, d_model, **bench.factory).requires_grad_(),),
        tokens=t,
        shape={"b": 1, "t": t, "d": d_model},
    )
    layer.requires_grad_(False)
    full.requires_grad_(False)
    cache = full.init_state(b, context)
    cache.seen_b.fill_(context - 1)
    shape: dict[str, Any] = {"b": b, "t": context, "d": d_model}
    bench.compare(
        f"step.t{context}",
        partial(layer.read, state=layer.init_state(b)),
        partial(full.read, state=cache),
        baseline_name="full key/value cache",
        inputs=(torch.randn(b, 1, d_model, **bench.factory),),
        tokens=b,
        shape=shape,
    )
    bench.value(
        f"state.t{context}",
        layer.init_state(1, context, device="meta").nbytes,
        "bytes",
        "lower",
        baseline="full key/value cache",
        baseline_value=full.init_state(1, context, device="meta").nbytes,
        shape=shape,
    )
