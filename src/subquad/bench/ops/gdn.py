"""The gated delta rule's kernels over lengths, forward and with backward, and its decode step."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from subquad.bench.decoding import Step, run_steps
from subquad.bench.harness import Bench
from subquad.bench.scans import Arguments, Scan, decays, run_scan
from subquad.ops import gdn
from subquad.ops.decode import Rule


def draw(bench: Bench, b: int, t: int, h: int, k: int, v: int) -> Arguments:
    """Keys of norm 1 and all shares of replacement, as in the paper's model."""
    q, k_ = (F.normalize(torch.randn(b, t, h, k, **bench.factory), dim=-1) for _ in range(2))
    beta = torch.rand(b, t, h, **bench.factory)
    state = torch.randn(b, h, k, v, device=bench.device)
    return q, k_, torch.randn(b, t, h, v, **bench.factory), decays(bench, b, t, h), beta, state


SCAN = Scan(
    op=gdn,
    names=("q", "k", "v", "g", "beta", "state"),
    draw=draw,
    moved="b*t*h*((2*k + 2*v + 1)*e + 4) + 8*b*h*k*v",
    flops="6*b*t*h*k*v",
    train_moved="b*t*h*((6*k + 5*v + 3)*e + 12) + 12*b*h*k*v",
    train_flops="18*b*t*h*k*v",
)
STEP = Step(Rule(delta=True, activation="silu", l2_eps=1e-6, scale=128**-0.5), beta=True)


def run(bench: Bench) -> None:
    """One sequence, 16 heads of 128 channels, 2,048 to 65,536 tokens; then steps at batch 1 to 256."""
    run_scan(bench, SCAN)
    run_steps(bench, STEP)
