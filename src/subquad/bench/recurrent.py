"""What the bench rooms of recurrent mixers share: their operation and their decode step against softmax attention's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from subquad.bench.harness import Bench
from subquad.mixers.attention import Attention
from subquad.ops import attention


def measure(
    bench: Bench,
    operation: Any,
    mixer: Any,
    arguments: Callable[[int, int, int, int], tuple[Tensor, ...]],
    flops: Callable[[int], float],
) -> None:
    """A SmolLM2-135M-shaped layer, 9 heads of 64 channels: forward, training step, decode step, state.

    Args:
        bench: where figures go.
        operation: a package of `subquad.ops` with ``equation`` and ``scan``.
        mixer: the mixer's class; its config starts with width, heads and channels of keys and values.
        arguments: ``(b, t, h, k)`` to the operation's arguments without the state: q, k, v and its gates.
        flops: channels of a head to the least operations of a token and head, forward.
    """
    b, t, h, k = bench.size((1, 4096, 9, 64), smoke=(1, 70, 2, 8))
    shape = {"b": b, "t": t, "h": h, "k": k, "v": k}
    inputs, state = arguments(b, t, h, k), torch.zeros(b, h, k, k, device=bench.device)

    short = (*(x[:, :300] for x in inputs), state)
    exact, _ = operation.equation(*(x.double() for x in short))
    naive, _ = operation.equation(*short)
    bench.gate("chunked equals the loop", operation.scan(*short)[0], exact, naive=naive)

    def ours(*inputs: Tensor) -> Tensor:
        return operation.scan(*inputs, state)[0]

    def softmax(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
        return attention.causal(q, k, v, q.shape[-1] ** -0.5)

    least = b * t * h * flops(k)
    bench.compare(
        f"fwd.t{t}", ours, softmax, baseline_name="causal SDPA", inputs=inputs, tokens=b * t, flops=least, shape=shape
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
        flops=3 * least,
        shape=shape,
    )

    d_model, batch = h * k, 8
    layer = mixer(mixer.Config(d_model, h, k, k)).to(**bench.factory).requires_grad_(False)
    full = Attention(Attention.Config(d_model, h, h, k)).to(**bench.factory).requires_grad_(False)
    cache = full.init_state(batch, t)
    cache.seen_b.fill_(t - 1)
    one = torch.randn(batch, 1, d_model, **bench.factory)
    bench.compare(
        f"step.t{t}",
        partial(layer.read, state=layer.init_state(batch)),
        partial(full.read, state=cache),
        baseline_name="full key/value cache",
        inputs=(one,),
        tokens=batch,
        shape={"b": batch, "t": t, "d": d_model, "h": h, "k": k},
    )
    bench.value(
        f"state.t{t}",
        layer.init_state(1, t, device="meta").nbytes,
        "bytes",
        "lower",
        baseline="full key/value cache",
        baseline_value=full.init_state(1, t, device="meta").nbytes,
        shape=shape,
    )
