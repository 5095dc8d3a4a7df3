"""The gated long convolution over lengths, forward with backward, against PyTorch's transforms as they are written."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.bench.harness import Bench
from subquad.ops import flashconv


def plain(u_btd: Tensor, k_gl: Tensor, bias_d: Tensor, gate_in_btd: Tensor, gate_out_btd: Tensor) -> Tensor:
    """The convolution as published models write it: float32 transforms of twice the length, channels first."""
    t = u_btd.shape[1]
    u_bdt = (u_btd * gate_in_btd).mT.float()
    spectrum = torch.fft.rfft(u_bdt, 2 * t) * torch.fft.rfft(k_gl.float(), 2 * t)
    y_bdt = torch.fft.irfft(spectrum, 2 * t)[..., :t] + bias_d[:, None] * u_bdt
    return y_bdt.mT.to(u_btd.dtype) * gate_out_btd


def run(bench: Bench) -> None:
    """Batch 64 and 768 channels, gated, with a bias: 1,024 to 32,768 tokens; a fraction of that on a CPU."""
    bench.name = "ops.flashconv"
    cuda = bench.device.type == "cuda"
    b, d = bench.size((64, 768) if cuda else (4, 64), smoke=(2, 8))
    for t in bench.size((1024, 4096, 8192, 32768) if cuda else (1024, 4096), smoke=(70,)):
        # At 32,768 tokens the transforms of 64 rows do not fit beside each other.
        rows = min(b, 64 * 8192 // t)
        u, gate_in, gate_out = (torch.randn(rows, t, d, **bench.factory) for _ in range(3))
        k_gl = torch.randn(d, t, device=bench.device) * (-torch.arange(t, device=bench.device) * 8 / t).exp() / t**0.5
        bias_d = torch.randn(d, device=bench.device)
        inputs = tuple(x.requires_grad_() for x in (u, k_gl, bias_d, gate_in, gate_out))

        def ours(u: Tensor, k: Tensor, bias: Tensor, gate_in: Tensor, gate_out: Tensor) -> Tensor:
            return flashconv.parallel(u, k, bias, gate_in_btd=gate_in, gate_out_btd=gate_out)

        # A gradient that is given, and none that is added to what is there: that is the caller's work.
        dy = torch.randn_like(u)

        def step(*inputs: Tensor, dy: Tensor = dy) -> None:
            torch.autograd.grad(ours(*inputs), inputs, dy)

        def baseline(*inputs: Tensor, dy: Tensor = dy) -> None:
            torch.autograd.grad(plain(*inputs), inputs, dy)

        few = [x[:1].detach() if x.dim() == 3 else x.detach() for x in inputs]
        exact = plain(*(x.double() for x in few)) if t <= 4096 else ours(*(x.double() for x in few))
        bench.gate(f"equals the transforms at {t} tokens", ours(*few), exact, naive=plain(*few))
        shape = {"b": rows, "t": t, "d": d}
        # Forward, inputs and gates are read and outputs written; backward, these and a gradient read, three written.
        moved = 11 * u.numel() * u.element_size()
        times = bench.race({"ours": step, "torch.fft": baseline}, bench.copies(inputs))
        bench.speed(f"fwdbwd.t{t}", times, baseline="torch.fft", moved=moved, shape=shape)
        # As layers call them one by one; short rows then wait for Python.
        bench.compare(f"calls.t{t}", step, baseline, baseline_name="torch.fft", inputs=inputs, shape=shape)
