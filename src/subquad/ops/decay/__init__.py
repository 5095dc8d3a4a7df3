"""The decay of Mamba-2 and Gated DeltaNet, its parameters kept in float32."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from subquad.core.precise import Precise
from subquad.core.state import precise
from subquad.ops.backends import Backends
from subquad.ops.decay import on_torch

_backends = Backends(__name__)


class Decay(Precise):
    """``dt = softplus(raw + dt_bias)``, ``g = -exp(A_log) dt`` per head.

    Of Mamba-2 (arXiv 2405.21060, section 7) and, by the same formula, Gated DeltaNet.

    A_log and dt_bias stay in at least float32 whatever the module is cast to: bfloat16 has no numbers between decays of
    0.996 and 1, so rounding them would change a head's memory by hundreds of tokens.

    Args:
        n_heads: h. The start is the paper's: A uniform in [1, 16], dt log-uniform in [0.001, 0.1].
    """

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        dtype = precise(torch.get_default_dtype())
        dt_h = torch.empty(n_heads, dtype=dtype).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.A_log = nn.Parameter(torch.empty(n_heads, dtype=dtype).uniform_(1, 16).log())
        self.dt_bias = nn.Parameter(dt_h + (-torch.expm1(-dt_h)).log())

    def forward(self, raw_bth: Tensor) -> tuple[Tensor, Tensor]:
        """Log decay g and dt, ``[b, t, h]`` each, in at least float32."""
        exact = torch.is_grad_enabled() or self.dt_bias.dtype == torch.float64
        chosen = on_torch if exact else _backends.choose(raw_bth, self.A_log, self.dt_bias)
        return chosen.decay(raw_bth, self.A_log, self.dt_bias)

    @torch.no_grad()
    def start_(self, half_life_h: Tensor | None) -> None:
        """Make ``dt = 1`` where raw is 0, and let each head forget half in `half_life_h` tokens.

        Args:
            half_life_h: in tokens; less than 1 counts as 1, infinite is no decay at all. None spreads the heads
                from 32 to 2048.
        """
        if half_life_h is None:
            half_life_h = 2.0 ** torch.linspace(5, 11, len(self.A_log))
        self.dt_bias.fill_(math.log(math.expm1(1.0)))
        self.A_log.copy_((math.log(2.0) / half_life_h.to(self.A_log).clamp(min=1.0)).log())
