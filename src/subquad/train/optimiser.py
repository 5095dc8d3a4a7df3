"""AdamW with a rate for what is new, lower ones for what was there or asks for it, and the course of the rate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from subquad.core.errors import ConfigError, nearest

SCHEDULES = ("cosine", "linear", "constant")


@dataclass(frozen=True)
class Rate:
    """Learning rate and the rest of AdamW's settings (arXiv 1711.05101).

    Attributes:
        lr: peak rate of what is new.
        old: factor on it for what was taken over from the teacher.
        warmup: share of the stage in which the rate rises from 0.
        schedule: how it falls afterwards: cosine, linear or constant.
        floor: share of the peak at the end.
        betas: decay of the two moments.
        weight_decay: of matrices; vectors are never decayed.
        clip: largest norm of a gradient.
    """

    lr: float
    old: float = 0.1
    warmup: float = 0.05
    schedule: str = "cosine"
    floor: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what no stage could run with."""
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"unknown schedule {self.schedule!r}{nearest(self.schedule, SCHEDULES)}")
        if not self.lr > 0 or not 0 <= self.warmup <= 1:
            raise ConfigError(f"expected lr > 0 and warmup in 0..1, got {self.lr} and {self.warmup}; change them")

    def factor(self, progress: float) -> float:
        """Share of the peak rate at `progress` in 0..1 of the stage."""
        if progress < self.warmup:
            return progress / self.warmup
        if self.schedule == "constant":
            return 1.0
        x = (min(progress, 1.0) - self.warmup) / max(1 - self.warmup, 1e-9)
        fall = 0.5 * (1 + math.cos(math.pi * x)) if self.schedule == "cosine" else 1 - x
        return self.floor + (1 - self.floor) * fall


def slow(model: nn.Module) -> dict[nn.Parameter, float]:
    """The parameters that ask for a low rate, and the highest that they bear.

    A module names them by ``SLOW``, a mapping from its own parameters' names: what a state space remembers with leaves
    its start for ever at the rate that a matrix learns with (2111.00396, appendix D.2).
    """
    return {
        module.get_parameter(name): most
        for module in model.modules()
        for name, most in getattr(module, "SLOW", {}).items()
    }


def adamw(
    new: Iterable[nn.Parameter],
    old: Iterable[nn.Parameter],
    rate: Rate,
    *,
    device: torch.device,
    most: Mapping[nn.Parameter, float] | None = None,
) -> torch.optim.AdamW:
    """AdamW over `new` at the rate and `old` at its lower one; each group keeps its peak as ``peak``.

    Args:
        new, old: parameters.
        rate: theirs.
        device: where they are.
        most: of some of them the highest rate; these are never decayed.
    """
    most = most or {}
    groups: list[dict[str, Any]] = []
    for parameters, factor in ((list(new), 1.0), (list(old), rate.old)):
        for matrices in (True, False):
            chosen = [p for p in parameters if (p.ndim >= 2) == matrices and p not in most]
            if chosen:
                decay = rate.weight_decay if matrices else 0.0
                groups.append({"params": chosen, "weight_decay": decay, "peak": rate.lr * factor})
        for bound in sorted({most[p] for p in parameters if p in most}):
            chosen = [p for p in parameters if most.get(p) == bound]
            groups.append({"params": chosen, "weight_decay": 0.0, "peak": min(rate.lr * factor, bound)})
    if not groups:
        raise ConfigError("expected parameters to train, got none; loosen the phase's patterns: --stage PHASE.train=*")
    # The fused form takes the rate from the device's side of the queue and waits for nothing.
    return torch.optim.AdamW(groups, lr=rate.lr, betas=rate.betas, fused=device.type == "cuda")


def set_rate(optimiser: torch.optim.Optimizer, factor: float) -> None:
    """Set every group to `factor` of its peak."""
    for group in optimiser.param_groups:
        group["lr"] = group["peak"] * factor
