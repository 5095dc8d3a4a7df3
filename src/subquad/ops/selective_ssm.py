"""A selective state space behind a projection: short convolution, the token's own step, B and C, and the scan."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.core.errors import ConfigError
from subquad.core.layout import Layout
from subquad.core.mixer import Update
from subquad.core.precise import Precise
from subquad.core.state import State, axes, precise
from subquad.ops import chunks, selective_scan, short_conv


@dataclass(frozen=True)
class SelectiveState(State):
    """What the scan remembers, a vector per channel, and the last inputs of the convolution."""

    recurrent_bdn: Tensor = axes("b d n", shard="d", precision="high")
    conv_bdw: Tensor = axes("b d w", shard="d")


class Rates(Precise):
    """The parameters that stay in at least float32 whatever the module is cast to: rates, bias of the step, skip.

    Rates near each other tell memories of different length apart, and bfloat16 would make them equal.

    Args:
        d_inner, state_dim: channels, and entries of a channel's state. The start is the paper's: A = -1, -2, ... along
            a state (S4D-real), steps log-uniform in [0.001, 0.1], D = 1.
    """

    def __init__(self, d_inner: int, state_dim: int) -> None:
        super().__init__()
        dtype = precise(torch.get_default_dtype())
        dt_d = torch.empty(d_inner, dtype=dtype).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt_bias = nn.Parameter(dt_d + (-torch.expm1(-dt_d)).log())
        self.A_log = nn.Parameter(torch.arange(1, state_dim + 1, dtype=dtype).log().repeat(d_inner, 1))
        self.D = nn.Parameter(torch.ones(d_inner, dtype=dtype))

    def forward(self) -> Tensor:
        """``A = -exp(A_log)``, ``[d, n]``."""
        return -self.A_log.exp()


@dataclass(frozen=True)
class SelectiveUpdate(Update):
    """One block's inputs to the scan and to the convolution, and the state behind all of it."""

    state: SelectiveState
    end_bdn: Tensor
    u_btd: Tensor
    dt_btd: Tensor
    B_btgn: Tensor
    rates: Rates
    inputs_btd: Tensor
    layout: Layout

    def commit(self, n_b: Tensor | None = None) -> SelectiveState:
        """Run the kept tokens through the scan and the convolution's history."""
        where = {"valid_bt": chunks.kept(self.layout, n_b), "documents_bt": self.layout.documents_bt}
        old, end_bdn = self.state, self.end_bdn
        if n_b is not None:
            block = self.u_btd, self.dt_btd, self.rates(), self.B_btgn
            end_bdn = selective_scan.final_state(*block, old.recurrent_bdn, **where)
        conv_bdw = short_conv.final_state(self.inputs_btd, old.conv_bdw, **where)
        return SelectiveState(end_bdn.to(old.recurrent_bdn.dtype), conv_bdw)


class SelectiveSSM(nn.Module):
    """``h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t``, ``y_t = C_t h_t + D u_t`` of ``u = silu(conv(x))``.

    Algorithm 2 of arXiv 2312.00752 with section 3.6's parametrisation: B, C and a vector r of `dt_rank` numbers are
    linear in u, ``dt = softplus(dt_proj(r) + dt_bias)`` and ``A = -exp(A_log)``.

    Args:
        d_inner: channels.
        state_dim: entries of a channel's state.
        dt_rank: rank of the step's projection.
        conv_width: taps of the convolution.
        conv_bias: a bias in it.

    Raises:
        ConfigError: a size below 1.
    """

    def __init__(self, d_inner: int, state_dim: int, dt_rank: int, conv_width: int, *, conv_bias: bool) -> None:
        super().__init__()
        sizes = {"d_inner": d_inner, "state_dim": state_dim, "dt_rank": dt_rank, "conv_width": conv_width}
        for name, size in sizes.items():
            if size < 1:
                raise ConfigError(f"{name}: expected at least 1, got {size}; leave it out for the paper's")
        self.sizes = (dt_rank, state_dim, state_dim)
        self.conv_weight = nn.Parameter(torch.empty(d_inner, conv_width).uniform_(-1, 1) * conv_width**-0.5)
        self.conv_bias = nn.Parameter(torch.zeros(d_inner)) if conv_bias else None
        self.x_proj = nn.Linear(d_inner, dt_rank + 2 * state_dim, bias=False)
        self.dt_proj = nn.Linear(dt_rank, d_inner, bias=False)
        nn.init.uniform_(self.dt_proj.weight, -(dt_rank**-0.5), dt_rank**-0.5)
        self.rates = Rates(d_inner, state_dim)

    def init_state(self, batch: int, **factory: Any) -> SelectiveState:
        """Zeros before the first token; `factory` is ``device`` and ``dtype``."""
        d, width = self.conv_weight.shape
        high: dict[str, Any] = factory | {"dtype": precise(factory["dtype"])}
        return SelectiveState(
            torch.zeros(batch, d, self.rates.A_log.shape[1], **high), torch.zeros(batch, d, width - 1, **factory)
        )

    def forward(self, x_btd: Tensor, state: SelectiveState, layout: Layout) -> tuple[Tensor, SelectiveUpdate]:
        """Outputs ``[b, t, d]`` and the update of a block whose projection is `x_btd`."""
        rates, documents_bt = self.rates, layout.documents_bt
        u_btd = short_conv.parallel(
            x_btd, self.conv_weight, self.conv_bias, state.conv_bdw, documents_bt=documents_bt, activation="silu"
        )
        r_btd, b_btn, c_btn = self.x_proj(u_btd).split(self.sizes, dim=-1)
        dt_btd = F.softplus(self.dt_proj(r_btd).to(rates.dt_bias.dtype) + rates.dt_bias)
        b_btgn, c_btgn = b_btn[:, :, None], c_btn[:, :, None]
        where = {"valid_bt": chunks.kept(layout), "documents_bt": documents_bt}
        y_btd, end_bdn = selective_scan.scan(
            u_btd, dt_btd, rates(), b_btgn, c_btgn, rates.D, state.recurrent_bdn, **where
        )
        return y_btd, SelectiveUpdate(state, end_bdn, u_btd, dt_btd, b_btgn, rates, x_btd, layout)
