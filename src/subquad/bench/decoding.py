"""What the benches of recurrences share for decoding: the step of one token, and the verification of drafts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from subquad.bench.harness import Bench, cache_bytes
from subquad.bench.scans import count, poisoned, rounding
from subquad.ops import backends, decode
from subquad.ops.decode import Block, DecodeState, Rule, Weights

DRAFTED = 4
WIDTH = 4
MOVED = "8*b*h*k*v"


@dataclass(frozen=True)
class Step:
    """A recurrent layer as it decodes, behind a convolution of four taps.

    Attributes:
        rule: its recurrence.
        beta: whether tokens have a write strength.
        key_decay: whether each key channel has its own decay.
    """

    rule: Rule
    beta: bool = False
    key_decay: bool = False


@dataclass(frozen=True)
class _Sizes:
    h: int
    k: int
    v: int

    @property
    def channels(self) -> int:
        return self.h * (2 * self.k + self.v)


def run_steps(bench: Bench, step: Step) -> None:
    """A step and a verification at several batch sizes, each after its gate, over a pool larger than the cache."""
    sizes = _Sizes(*bench.size((16, 128, 128), smoke=(2, 16, 16)))
    backend = "triton" if bench.device.type == "cuda" else "torch"
    for tokens in (1, 1 + DRAFTED):
        _prove(bench, step, sizes, tokens, backend)
    for b in bench.size((1, 64, 256), smoke=(2,)):
        single = _step(bench, step, sizes, b, backend)
        verified = _verify(bench, step, sizes, b, backend)
        bench.value(f"verify4_in_steps.b{b}", verified / single, "1", "lower", shape={"b": b, "tokens": 1 + DRAFTED})


def run_verification(bench: Bench, step: Step, b: int, id: str) -> None:
    """The verification of `run_steps` alone, behind its gate, at one batch size and under an id of its own."""
    sizes = _Sizes(*bench.size((16, 128, 128), smoke=(2, 16, 16)))
    backend = "triton" if bench.device.type == "cuda" else "torch"
    _prove(bench, step, sizes, 1 + DRAFTED, backend)
    _verify(bench, step, sizes, b, backend, id)


def _step(bench: Bench, step: Step, sizes: _Sizes, b: int, backend: str) -> float:
    """A token a row: milliseconds, beside a copy of the same states."""
    pool, copies = _pools(bench, step, sizes, b, 1)
    weights, block = _weights(bench, sizes), _block(bench, step, sizes, b, 1)
    other = torch.empty_like(pool.recurrent_bhkv[:b])
    states = [pool.recurrent_bhkv[i * b : (i + 1) * b] for i in range(len(copies))]

    def ours(rows_b: Tensor, seen_b: Tensor, n_b: Tensor, _: Tensor) -> Tensor:
        with backends.use(backend):
            return decode.advance_(block, pool, step.rule, weights, seen_b, n_b, rows_b)

    def copy(_: Tensor, __: Tensor, ___: Tensor, state_bhkv: Tensor) -> Tensor:
        return other.copy_(state_bhkv)

    times = bench.race({"ours": ours, "copy": copy}, [(*c, state) for c, state in zip(copies, states, strict=True)])
    shape = _shape(sizes, b, 1)
    moved = count(MOVED, shape)
    bench.speed(
        f"step.b{b}", times, baseline="copy", baseline_name="a copy of the states", moved=moved, shape=_told(shape)
    )
    return times.median("ours")


def _verify(bench: Bench, step: Step, sizes: _Sizes, b: int, backend: str, id: str = "") -> float:
    """Drafted tokens and one more a row: milliseconds, beside a step a token that keeps a copy of every state."""
    tokens = 1 + DRAFTED
    weights, block = _weights(bench, sizes), _block(bench, step, sizes, b, tokens)
    pool, copies = _pools(bench, step, sizes, b, tokens)
    plain, _ = _pools(bench, step, sizes, b, 1)
    singles = [_tokens(block, slice(i, i + 1)) for i in range(tokens)]
    kept = torch.empty(tokens, *plain.recurrent_bhkv[:b].shape, device=bench.device)
    row_b = torch.arange(b, device=bench.device)
    one_b = torch.ones_like(row_b)

    def ours(rows_b: Tensor, seen_b: Tensor, n_b: Tensor) -> Tensor:
        with backends.use(backend):
            return decode.advance_(block, pool, step.rule, weights, seen_b, n_b, rows_b)

    def naive(rows_b: Tensor, seen_b: Tensor, n_b: Tensor) -> list[Tensor]:
        outputs: list[Tensor] = []
        with backends.use(backend):
            for i, single in enumerate(singles):
                outputs.append(decode.advance_(single, plain, step.rule, weights, seen_b + i, one_b, rows_b))
                torch.index_select(plain.recurrent_bhkv, 0, rows_b, out=kept[i])
        plain.recurrent_bhkv.index_copy_(0, rows_b, kept[n_b - 1, row_b])
        return outputs

    times = bench.race({"ours": ours, "naive": naive}, copies)
    shape = _shape(sizes, b, tokens)
    moved = count(MOVED, shape)
    bench.speed(
        id or f"verify{DRAFTED}.b{b}",
        times,
        baseline="naive",
        baseline_name="a step and a state copy a token",
        moved=moved,
        shape=_told(shape),
    )
    return times.median("ours")


def _prove(bench: Bench, step: Step, sizes: _Sizes, tokens: int, backend: str) -> None:
    """Two blocks, accepted in part, against the equation in float64: all outputs and the state behind them."""
    b, device = 5, bench.device
    weights = _weights(bench, sizes)
    pool = _pool(bench, step, sizes, 2 * b, tokens)
    rows_b = torch.randperm(2 * b, device=device)[:b]
    start_bhkv = torch.randn(b, sizes.h, sizes.k, sizes.v, device=device)
    conv_bdw = torch.randn(b, sizes.channels, WIDTH - 1, **bench.factory)
    seen_b = torch.randint(WIDTH, 100, (b,), device=device)
    pool.load_(rows_b, start_bhkv, conv_bdw, seen_b)
    blocks = [_block(bench, step, sizes, b, tokens) for _ in range(2)]
    accepted = [torch.randint(tokens + 1, (b,), device=device) for _ in range(2)]
    none_b = torch.zeros_like(seen_b)

    def course(dtype: torch.dtype) -> dict[str, Tensor]:
        state, conv = start_bhkv.to(dtype), conv_bdw.to(dtype)
        named: dict[str, Tensor] = {}
        for i, (block, n_b) in enumerate(zip(blocks, accepted, strict=True)):
            named[f"y of block {i + 1}"] = decode.equation(block, state, conv, step.rule, weights)[0]
            _, state, conv = decode.equation(block, state, conv, step.rule, weights, n_b)
        return named | {"state": state}

    got: dict[str, Tensor] = {}
    advance = partial(decode.advance_, pool=pool, rule=step.rule, weights=weights, rows_b=rows_b)
    with backends.use(backend), poisoned():
        for i, (block, n_b) in enumerate(zip(blocks, (none_b, accepted[0]), strict=True)):
            got[f"y of block {i + 1}"] = advance(block, seen_b=seen_b, n_b=n_b)
            seen_b = seen_b + n_b
        advance(_tokens(blocks[0], slice(0)), seen_b=seen_b, n_b=accepted[1])
    got["state"] = pool.recurrent_bhkv[rows_b]
    exact, naive, rtol = course(torch.float64), course(bench.dtype), rounding(bench)
    for name, x in got.items():
        bound: dict[str, Any] = {"rtol": rtol} if rtol else {"naive": naive[name]}
        bench.gate(f"{name} of {tokens} tokens equals the equation", x, exact[name], **bound)
    bench.say(f"{bench.name}: {len(got)} gates on blocks of {tokens} tokens")


def _pools(
    bench: Bench, step: Step, sizes: _Sizes, b: int, tokens: int
) -> tuple[DecodeState, list[tuple[Tensor, Tensor, Tensor]]]:
    """A pool larger than four times the cache, and batches that take its rows in turn, each with something pending."""
    row = 4 * sizes.h * sizes.k * sizes.v
    n = 1 if bench.smoke else math.ceil(4 * cache_bytes(bench.device) / (row * b))
    pool = _pool(bench, step, sizes, n * b, tokens)
    for x in (pool.recurrent_bhkv, pool.inputs_brd, pool.keys_bnhk, pool.values_bnhv):
        x.normal_(std=0.1)
    pool.decays_bnhk.uniform_(-1.0, -0.1)
    batches: list[tuple[Tensor, Tensor, Tensor]] = []
    for i in range(n):
        rows_b = torch.arange(i * b, (i + 1) * b, device=bench.device)
        batches.append((rows_b, rows_b + WIDTH, torch.randint(1, tokens + 1, (b,), device=bench.device)))
    return pool, batches


def _pool(bench: Bench, step: Step, sizes: _Sizes, rows: int, tokens: int) -> DecodeState:
    return decode.init_pool(
        rows,
        tokens,
        heads=sizes.h,
        key_dim=sizes.k,
        value_dim=sizes.v,
        conv_width=WIDTH,
        key_decay=step.key_decay,
        **bench.factory,
    )


def _block(bench: Bench, step: Step, sizes: _Sizes, b: int, tokens: int) -> Block:
    q, k = (torch.randn(b, tokens, sizes.h, sizes.k, **bench.factory) for _ in range(2))
    v = torch.randn(b, tokens, sizes.h, sizes.v, **bench.factory)
    g = -torch.rand(b, tokens, sizes.h, sizes.k if step.key_decay else 1, device=bench.device)
    return Block(q, k, v, g, torch.rand(b, tokens, sizes.h, **bench.factory) if step.beta else None)


def _tokens(block: Block, which: slice) -> Block:
    beta = None if block.beta_bth is None else block.beta_bth[:, which]
    return Block(block.q_bthk[:, which], block.k_bthk[:, which], block.v_bthv[:, which], block.g_bthk[:, which], beta)


def _weights(bench: Bench, sizes: _Sizes) -> Weights:
    return Weights(conv_dw=torch.randn(sizes.channels, WIDTH, **bench.factory) * WIDTH**-0.5)


def _shape(sizes: _Sizes, b: int, tokens: int) -> dict[str, Any]:
    return {"b": b, "tokens": tokens, "h": sizes.h, "k": sizes.k, "v": sizes.v, "state": "float32"}


def _told(shape: dict[str, Any]) -> dict[str, Any]:
    return shape | {"moved": f"{MOVED} = {count(MOVED, shape):.0f} bytes, states read and written"}
