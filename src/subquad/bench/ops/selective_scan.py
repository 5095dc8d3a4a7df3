"""The selective scan, forward and with backward, against its chunks in PyTorch; on a CPU against the plain loop."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.bench.harness import Bench
from subquad.bench.scans import count, poisoned, rounding
from subquad.bench.timing import Call
from subquad.ops import backends, selective_scan

NAMES = ("u", "dt", "A", "B", "C", "D", "state")
# Bytes: u, dt, B and C read and y written; then these and dy read again, and their gradients written.
MOVED = {"fwd": "b*t*(2*d*e + 4*d + 2*n*e)", "fwdbwd": "b*t*(5*d*e + 12*d + 6*n*e)"}
Arguments = tuple[Tensor, ...]


def run(bench: Bench) -> None:
    """One sequence through the channels of Mamba-1.4B, 2,048 to 32,768 tokens."""
    cuda = bench.device.type == "cuda"
    b, d, n = bench.size((1, 4096 if cuda else 512, 16), smoke=(1, 8, 2))

    def ours(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        with backends.use("triton" if cuda else "torch"):
            return selective_scan.scan(*arguments)

    def plain(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        if not cuda:
            return selective_scan.equation(*arguments)
        with backends.use("torch"):
            return selective_scan.scan(*arguments)

    def trained(fn: Call) -> Call:
        def both(*given: Tensor) -> None:
            *arguments, dy = given
            made: Any = fn(*arguments)
            leaves = [x for x in arguments if x.requires_grad]
            torch.autograd.grad(made[0], leaves, dy)

        return both

    _prove(bench, ours, _draw(bench, 1, bench.size(333, smoke=37), bench.size(64, smoke=d), n))
    baseline_name = "PyTorch, by chunks" if cuda else "the equation's loop"
    for t in bench.size((2048, 8192, 32768) if cuda else (1024,), smoke=(70,)):
        arguments = _draw(bench, b, t, d, n)
        shape = {"b": b, "t": t, "d": d, "n": n, "e": arguments[0].element_size()}
        with torch.no_grad():
            forward = bench.race({"ours": ours, "plain": plain}, bench.copies(arguments))
        leaves = (*(x.requires_grad_() for x in arguments[:-1]), arguments[-1], torch.randn_like(arguments[0]))
        # Of the loop every token's gradient is as large as the sequence: it is no baseline there.
        contenders = {"ours": trained(ours), "plain": trained(plain)} if cuda else {"ours": trained(ours)}
        both = bench.race(contenders, bench.copies(leaves))
        for what, times in (("fwd", forward), ("fwdbwd", both)):
            raced = "plain" in times.reps
            moved = count(MOVED[what], shape)
            bench.speed(
                f"{what}.t{t}",
                times,
                baseline="plain" if raced else "",
                baseline_name=baseline_name if raced else "",
                moved=moved,
                shape=shape | {"moved": f"{MOVED[what]} = {moved:.0f} bytes"},
            )


def _draw(bench: Bench, b: int, t: int, d: int, n: int) -> Arguments:
    """At Mamba's start: rates from 1 to n, steps from a thousandth to a tenth; these, D and the state in float32."""
    u = torch.randn(b, t, d, **bench.factory)
    dt = F.softplus(torch.randn(b, t, d, device=bench.device) - 4)
    rates = -torch.arange(1.0, n + 1, device=bench.device).repeat(d, 1)
    w_in, w_out = (torch.randn(b, t, 1, n, **bench.factory) for _ in range(2))
    return u, dt, rates, w_in, w_out, torch.randn(d, device=bench.device), torch.randn(b, d, n, device=bench.device)


def _prove(bench: Bench, ours: Call, arguments: Arguments) -> None:
    """Gate outputs, final state and all gradients against the loop in float64."""
    dy, dend = torch.randn_like(arguments[0]), torch.randn_like(arguments[-1])

    def results(fn: Any, *, wide: bool = False, **options: Any) -> list[Tensor]:
        leaves = [(x.detach().double() if wide else x.detach()).requires_grad_() for x in arguments]
        y, end = fn(*leaves, **options)
        gradients = torch.autograd.grad((y, end), leaves, (dy.to(y.dtype), dend.to(end.dtype)))
        return [y.detach(), end.detach(), *gradients]

    with poisoned():
        got = results(ours)
    exact, rtol = results(selective_scan.equation, wide=True), rounding(bench)
    naive = results(selective_scan.equation, dtype=bench.dtype)
    for name, x, want, rough in zip(("y", "final state", *(f"d{n}" for n in NAMES)), got, exact, naive, strict=True):
        bound: dict[str, Any] = {"rtol": rtol} if rtol else {"naive": rough}
        bench.gate(f"{name} equals the equation", x, want, **bound)
