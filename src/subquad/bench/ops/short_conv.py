"""The short convolution with its activation, forward and with backward, against PyTorch's compiled form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from subquad.bench.harness import Bench
from subquad.bench.scans import count, poisoned, rounding, trained
from subquad.bench.timing import Call
from subquad.ops import backends, short_conv
from subquad.ops.short_conv import on_torch

# Bytes: x read and y written; then x and dy read again and dx written.
MOVED = {"fwd": "2*b*t*d*e", "fwdbwd": "5*b*t*d*e"}
NAMES = ("y", "dx", "dweight", "dstate")


def run(bench: Bench) -> None:
    """Four taps over the channels of 16 heads' queries, keys and values of 128 each."""
    cuda = bench.device.type == "cuda"
    b, d, w = bench.size((1, 6144, 4), smoke=(1, 32, 4))

    def ours(x_btd: Tensor, weight_dw: Tensor, state_bdw: Tensor) -> Tensor:
        with backends.use("triton" if cuda else "torch"):
            return short_conv.parallel(x_btd, weight_dw, None, state_bdw, activation="silu")

    def plain(x_btd: Tensor, weight_dw: Tensor, state_bdw: Tensor) -> Tensor:
        return on_torch.parallel(x_btd, weight_dw, None, state_bdw, activation="silu")

    def draw(t: int) -> tuple[Tensor, Tensor, Tensor]:
        x, state = torch.randn(b, t, d, **bench.factory), torch.randn(b, d, w - 1, **bench.factory)
        return x, torch.randn(d, w, **bench.factory), state

    _prove(bench, ours, draw(bench.size(333, smoke=37)))
    baseline: Call = torch.compile(plain) if cuda else plain
    for t in bench.size((2048, 8192, 32768) if cuda else (2048,), smoke=(70,)):
        x, weight, state = draw(t)
        shape = {"b": b, "t": t, "d": d, "w": w, "e": x.element_size()}
        with torch.no_grad():
            forward = bench.race({"ours": ours, "PyTorch": baseline}, bench.copies((x, weight, state)))
        leaves = (x.requires_grad_(), weight.requires_grad_(), state, torch.randn_like(x))
        both = bench.race({"ours": trained(ours), "PyTorch": trained(baseline)}, bench.copies(leaves))
        for what, times in (("fwd", forward), ("fwdbwd", both)):
            moved = count(MOVED[what], shape)
            bench.speed(
                f"{what}.t{t}",
                times,
                baseline="PyTorch",
                baseline_name="PyTorch, compiled" if cuda else "PyTorch",
                moved=moved,
                shape=shape | {"moved": f"{MOVED[what]} = {moved:.0f} bytes"},
            )


def _prove(bench: Bench, ours: Call, arguments: tuple[Tensor, Tensor, Tensor]) -> None:
    """Gate outputs and gradients against the loop in float64."""
    dy = torch.randn_like(arguments[0])

    def results(fn: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in arguments]
        y: Tensor = fn(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]

    def loop(x: Tensor, weight: Tensor, state: Tensor) -> Tensor:
        return short_conv.equation(x, weight, None, state, activation="silu")[0]

    with poisoned():
        got = results(ours, bench.dtype)
    exact, naive, rtol = results(loop, torch.float64), results(loop, bench.dtype), rounding(bench)
    for name, x, want, rough in zip(NAMES, got, exact, naive, strict=True):
        bound: dict[str, Any] = {"rtol": rtol} if rtol else {"naive": rough}
        bench.gate(f"{name} equals the equation", x, want, **bound)
