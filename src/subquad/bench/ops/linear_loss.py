"""Losses of a linear head without its logits, against PyTorch's with all logits at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.bench.harness import Bench
from subquad.bench.scans import count, poisoned, rounding
from subquad.bench.timing import Call
from subquad.ops import backends, linear_loss

# Products with a head: one for the logits, two for the gradients; the teacher's logits are one more.
FLOPS = {"cross_entropy": "6*n*v*d", "kl": "8*n*v*d", "kl_mixed": "8*n*v*d", "kl_top": "6*n*v*d"}
# What the mixed one is: 70% forward, 30% reverse, at temperature 2.
MIX = {"temperature": 2.0, "reverse": 0.3}
# Tokens that the cached teacher tells apart.
TOP = 32


def run(bench: Bench) -> None:
    """SmolLM2-135M's head, 49,152 tokens by 576 channels, student and teacher, forward and backward."""
    cuda = bench.device.type == "cuda"
    n, v, d = bench.size((8192, 49152, 576), smoke=(20, 97, 16))
    if not cuda:
        n = min(n, 256)

    def ours(name: str) -> Callable[..., tuple[Tensor, ...]]:
        def loss(*arguments: Tensor) -> Tensor:
            with backends.use("triton" if cuda else "torch"):
                return _named(linear_loss, name)(*arguments)

        return _trained(loss)

    small = _draw(bench, bench.size(200, smoke=20), bench.size(5000, smoke=97), d)
    for name in FLOPS:
        exact = _trained(_named(linear_loss.equation, name))
        with poisoned():
            got = ours(name)(*_of(name, small))
        right = exact(*(x.double() if x.is_floating_point() else x for x in _of(name, small)))
        naive = _trained(_all_at_once(name))(*_of(name, small))
        # Float32 sums over a vocabulary in another order, and rounded products of it.
        rtol = rounding(bench)
        # A single number may be right by luck, so the loss is not compared with the naive one's.
        bench.gate(f"{name}: loss equals the equation", got[0], right[0], rtol=rtol or torch.finfo(bench.dtype).eps)
        for what, x, want, rough in zip(("dhidden", "dhead"), got[1:], right[1:], naive[1:], strict=True):
            bound: dict[str, Any] = {"rtol": 4 * rtol} if rtol else {"naive": rough}
            bench.gate(f"{name}: {what} equals the equation", x, want, **bound)

    arguments = _draw(bench, n, v, d)
    shape = {"n": n, "v": v, "d": d}
    for name, expression in FLOPS.items():
        flops = count(expression, shape)
        contenders = {"ours": ours(name), "logits": _trained(_all_at_once(name))}
        times = bench.race(contenders, bench.copies(_of(name, arguments)))
        bench.speed(
            f"{name}.n{n}",
            times,
            baseline="logits",
            baseline_name="PyTorch with all logits at once",
            flops=flops,
            shape=shape | {"flops": f"{expression} = {flops:.0f}"},
        )


def _draw(bench: Bench, n: int, v: int, d: int) -> dict[str, Tensor]:
    hidden, target = (torch.randn(n, d, **bench.factory) for _ in range(2))
    head, other = (torch.randn(v, d, **bench.factory) * d**-0.5 for _ in range(2))
    k = min(TOP, v // 2)
    # As steep as a teacher's: most of it lies in the first few.
    p = torch.sort(10 * torch.rand(n, k + 1, **bench.factory), descending=True).values.float().log_softmax(-1)
    return {
        "hidden": hidden.requires_grad_(),
        "head": head.requires_grad_(),
        "target": target,
        "target head": other,
        "labels": torch.randint(v, (n,), device=bench.device),
        "ids": torch.stack([torch.randperm(v, device=bench.device)[:k] for _ in range(n)]),
        "log p": p[:, :-1].contiguous(),
        "log tail": p[:, -1].contiguous(),
        "scored": torch.rand(n, device=bench.device) < 0.9,
    }


def _of(name: str, drawn: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """The arguments of one loss."""
    inner = {"cross_entropy": ("labels",), "kl_top": ("ids", "log p", "log tail")}.get(name, ("target", "target head"))
    return tuple(drawn[key] for key in ("hidden", "head", *inner, "scored"))


def _named(module: Any, name: str) -> Callable[..., Tensor]:
    """The loss called `name` here, in the package or its equation."""
    return partial(module.kl, **MIX) if name == "kl_mixed" else getattr(module, name)


def _trained(loss: Call) -> Callable[..., tuple[Tensor, ...]]:
    def step(*arguments: Tensor) -> tuple[Tensor, ...]:
        hidden, head = (x.detach().requires_grad_() for x in arguments[:2])
        made: Any = loss(hidden, head, *arguments[2:])
        return (made.detach(), *torch.autograd.grad(made, (hidden, head)))

    return step


def _all_at_once(name: str) -> Call:
    """As it is usually written: logits in the model's dtype, the loss of them in float32."""

    def cross_entropy(hidden: Tensor, head: Tensor, labels: Tensor, scored: Tensor) -> Tensor:
        return (F.cross_entropy((hidden @ head.mT).float(), labels, reduction="none") * scored).sum()

    def kl(hidden: Tensor, head: Tensor, target: Tensor, target_head: Tensor, scored: Tensor) -> Tensor:
        p, q = logarithms(hidden, head, target, target_head, 1.0)
        return (F.kl_div(q, p, reduction="none", log_target=True).sum(-1) * scored).sum()

    def kl_mixed(hidden: Tensor, head: Tensor, target: Tensor, target_head: Tensor, scored: Tensor) -> Tensor:
        t, r = MIX["temperature"], MIX["reverse"]
        p, q = logarithms(hidden, head, target, target_head, t)
        forward, reverse = (F.kl_div(b, a, reduction="none", log_target=True).sum(-1) for a, b in ((p, q), (q, p)))
        return (t**2 * ((1 - r) * forward + r * reverse) * scored).sum()

    def kl_top(hidden: Tensor, head: Tensor, ids: Tensor, log_p: Tensor, log_tail: Tensor, scored: Tensor) -> Tensor:
        q = (hidden @ head.mT).float().log_softmax(-1)
        tail = q.scatter(1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        p, q = torch.cat((log_p, log_tail[:, None]), 1), torch.cat((q.gather(1, ids), tail), 1)
        return (F.kl_div(q, p, reduction="none", log_target=True).sum(-1) * scored).sum()

    def logarithms(*of: Any) -> tuple[Tensor, Tensor]:
        hidden, head, target, target_head, t = of
        with torch.no_grad():
            p = ((target @ target_head.mT).float() / t).log_softmax(-1)
        return p, ((hidden @ head.mT).float() / t).log_softmax(-1)

    return {"cross_entropy": cross_entropy, "kl": kl, "kl_mixed": kl_mixed, "kl_top": kl_top}[name]
