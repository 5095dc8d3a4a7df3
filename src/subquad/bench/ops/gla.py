"""Gated linear attention's kernels over lengths, forward and with backward, and its decode step."""

from __future__ import annotations

import torch

from subquad.bench.decoding import Step, run_steps
from subquad.bench.harness import Bench
from subquad.bench.scans import Arguments, Scan, decays, run_scan
from subquad.ops import gla
from subquad.ops.decode import Rule


def draw(bench: Bench, b: int, t: int, h: int, k: int, v: int) -> Arguments:
    """Keys and queries of norm about 1; every key channel forgets at its own rate."""
    q, k_ = (torch.randn(b, t, h, k, **bench.factory) * k**-0.5 for _ in range(2))
    state = torch.randn(b, h, k, v, device=bench.device)
    return q, k_, torch.randn(b, t, h, v, **bench.factory), decays(bench, b, t, h, k), state


SCAN = Scan(
    op=gla,
    names=("q", "k", "v", "g", "state"),
    draw=draw,
    moved="b*t*h*((2*k + 2*v)*e + 4*k) + 8*b*h*k*v",
    flops="4*b*t*h*k*v",
    train_moved="b*t*h*((6*k + 5*v)*e + 12*k) + 12*b*h*k*v",
    train_flops="12*b*t*h*k*v",
)
STEP = Step(Rule(delta=False, activation="silu", scale=128**-0.5), key_decay=True)


def run(bench: Bench) -> None:
    """One sequence, 16 heads of 128 channels, 2,048 to 65,536 tokens; then steps at batch 1 to 256."""
    run_scan(bench, SCAN)
    run_steps(bench, STEP)
