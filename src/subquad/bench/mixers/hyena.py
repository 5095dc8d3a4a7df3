"""Hyena's operator and its layer over lengths, against causal attention and an attention layer."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.bench.harness import Bench
from subquad.mixers.attention import Attention
from subquad.mixers.hyena import Hyena
from subquad.ops import attention, flashconv


def run(bench: Bench) -> None:
    """Width 768, 12 heads of 64 channels beside it, some rows: forward of the operator alone, then of the layer."""
    bench.name = "hyena"
    cuda = bench.device.type == "cuda"
    b, d, h = bench.size((8, 768, 12) if cuda else (1, 128, 2), smoke=(2, 16, 2))
    lengths = bench.size((2048, 8192, 65536) if cuda else (1024, 4096, 16384), smoke=(70,))
    for t in lengths:
        u, gate, v = (torch.randn(b, t, d, **bench.factory) for _ in range(3))
        k_gl = torch.randn(d, t, device=bench.device) / t**0.5

        def convolution(u: Tensor, gate: Tensor, v: Tensor, k_gl: Tensor = k_gl) -> Tensor:
            return flashconv.parallel(v, k_gl, gate_in_btd=u, gate_out_btd=gate)

        def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.unflatten(-1, (h, -1)) for x in (q, k, v))
            return attention.causal(q, k, v, q.shape[-1] ** -0.5)

        few = [x[:, :200] for x in (u, gate, v)]
        wide = [x.double() for x in few]
        exact = flashconv.equation(wide[2], k_gl.double(), gate_in_btd=wide[0], gate_out_btd=wide[1])
        # Sums of two hundred products, about as many roundings as its root.
        bench.gate("the operator equals its sum", convolution(*few), exact, rtol=16 * torch.finfo(bench.dtype).eps)
        shape = {"b": b, "t": t, "d": d, "h": h}
        with torch.no_grad():
            bench.compare(
                f"op_vs_flash.t{t}", convolution, softmax, baseline_name="causal SDPA", inputs=(u, gate, v), shape=shape
            )
            layer = Hyena(Hyena.Config(d, t)).to(**bench.factory)
            full = Attention(Attention.Config(d, h, h, d // h)).to(**bench.factory)
            bench.compare(f"vs_flash.t{t}", layer, full, baseline_name="attention layer", inputs=(u,), shape=shape)
