"""Attention over quantised keys against softmax attention over the same keys, and LongVQ's decode step and state."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from subquad.bench.harness import Bench
from subquad.core.layout import Layout
from subquad.mixers.attention import Attention
from subquad.mixers.longvq import LongVQ
from subquad.ops import attention, vq_attention

BASELINE = "causal SDPA over the same keys"


def run(bench: Bench) -> None:
    """One head of 128 channels and 512 codes: forward at several lengths, training step, decode step, state."""
    times, h, k, s = bench.size(([1024, 4096, 16384], 1, 128, 512), smoke=([70, 130], 2, 8, 16))
    state = torch.zeros(1, h, s, dtype=torch.int64, device=bench.device), torch.zeros(1, h, s, k, **bench.factory)
    for t in times:
        q_bthk, k_bthk, v_bthk = (torch.randn(1, t, h, k, **bench.factory) for _ in range(3))
        book_hsk = torch.randn(h, s, k, **bench.factory)
        code_bth = vq_attention.assign(k_bthk, book_hsk)
        inputs = q_bthk * k**-0.5, v_bthk, book_hsk

        def ours(q: Tensor, v: Tensor, book: Tensor, code_bth: Tensor = code_bth) -> Tensor:
            return vq_attention.scan(q, code_bth, v, book, *state)[0]

        def softmax(q: Tensor, v: Tensor, book: Tensor, code_bth: Tensor = code_bth) -> Tensor:
            return attention.causal(q, book[torch.arange(h, device=q.device), code_bth], v, 1.0)

        if t == times[0]:
            exact = softmax(*(x.double() for x in inputs))
            bench.gate("it is softmax attention over quantised keys", ours(*inputs), exact, naive=softmax(*inputs))
        shape = {"b": 1, "t": t, "h": h, "k": k, "v": k, "s": s}
        # Scores of all codes, and values of them; within a chunk of 64 counts and values of its tokens.
        least = t * h * 2 * (2 * s * k + 64 * (s + k))
        each: dict[str, Any] = {"baseline_name": BASELINE, "tokens": t, "shape": shape}
        bench.compare(f"fwd.t{t}", ours, softmax, inputs=inputs, flops=least, **each)
        if t == times[1]:
            leaves = tuple(x.requires_grad_() for x in inputs)
            both = (partial(_train, f) for f in (ours, softmax))
            bench.compare(f"train.t{t}", *both, inputs=leaves, flops=3 * least, **each)
    _step(bench, times[-1], h, k, s)


def _train(forward: Callable[..., Tensor], *leaves: Tensor) -> None:
    forward(*leaves).sum().backward()


@torch.no_grad()
def _step(bench: Bench, t: int, h: int, k: int, s: int) -> None:
    """A decode step of the whole layer behind t tokens, and what the layer remembers of them."""
    batch, d_model = 8, 4 * h * k
    layer = LongVQ(LongVQ.Config(d_model, h, k, k, s)).to(**bench.factory)
    heads = d_model // k
    full = Attention(Attention.Config(d_model, heads, heads, k)).to(**bench.factory)
    cache = full.init_state(batch, t)
    cache.seen_b.fill_(t - 1)
    at = Layout.dense(batch, 1, start_b=t - 1, device=bench.device)
    shape = {"b": batch, "t": t, "d": d_model, "h": h, "k": k, "s": s}
    bench.compare(
        f"step.t{t}",
        partial(layer.read, state=layer.init_state(batch), layout=at),
        partial(full.read, state=cache, layout=at),
        baseline_name="full key/value cache",
        inputs=(torch.randn(batch, 1, d_model, **bench.factory),),
        tokens=batch,
        shape=shape,
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
