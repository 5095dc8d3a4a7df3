"""Mamba: a selective state space of each channel, behind a short convolution and in front of a gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from subquad.core.card import Card
from subquad.core.layout import Layout
from subquad.core.mixer import NOTHING, Mixer, Shared, Update
from subquad.core.state import State
from subquad.ops import skinny
from subquad.ops.selective_ssm import SelectiveSSM, SelectiveState

CARD = Card(
    title="Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
    entry="Mamba1",
    arxiv="2312.00752",
    gives="a small state in every channel, whose steps the token chooses; reads published Mamba-1 layers",
    status="incubating",
    claim="5 times the inference throughput of Transformers, scaling linearly to million-length sequences",
    measured="not reproduced; on one H100 the scan is 749 x as fast as transformers' loop over tokens",
    result="mixers.mamba1.h100.json",
    constant_state=True,
    examples={
        "paper": {"d_model": 16, "state_dim": 4},
        "narrow": {
            "d_model": 12,
            "d_inner": 10,
            "state_dim": 1,
            "dt_rank": 3,
            "conv_width": 1,
            "conv_bias": False,
            "bias": True,
        },
    },
)


class Mamba1(Mixer):
    """``out_proj(ssm(x) * silu(z))`` with ``x, z = in_proj(...)``; the state space is `SelectiveSSM`.

    Section 3.4 of arXiv 2312.00752.

    Example:
        >>> import torch
        >>> mixer = Mamba1(Mamba1.Config(d_model=32))
        >>> state = mixer.init_state(batch=2)
        >>> y, update = mixer.read(torch.randn(2, 3, 32), state)
        >>> update.commit(torch.tensor([3, 1])).recurrent_bdn.shape
        torch.Size([2, 64, 16])
    """

    @dataclass(frozen=True)
    class Config:
        """Shape; the defaults are the paper's.

        Attributes:
            d_model: width of the model.
            d_inner: channels; None is twice the width.
            state_dim: entries of a channel's state.
            dt_rank: rank of the step's projection; None is a sixteenth of the width, rounded up.
            conv_width: taps of the convolution.
            conv_bias: a bias in the convolution.
            bias: biases in the projections in and out.
        """

        d_model: int
        d_inner: int | None = None
        state_dim: int = 16
        dt_rank: int | None = None
        conv_width: int = 4
        conv_bias: bool = True
        bias: bool = False

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        d_inner = 2 * config.d_model if config.d_inner is None else config.d_inner
        dt_rank = -(-config.d_model // 16) if config.dt_rank is None else config.dt_rank
        self.ssm = SelectiveSSM(d_inner, config.state_dim, dt_rank, config.conv_width, conv_bias=config.conv_bias)
        self.in_proj = nn.Linear(config.d_model, 2 * d_inner, bias=config.bias)
        self.out_proj = nn.Linear(d_inner, config.d_model, bias=config.bias)

    def init_state(self, batch: int, capacity: int = 0, **factory: Any) -> SelectiveState:
        """Zeros; `capacity` is not needed."""
        return self.ssm.init_state(batch, **self.factory(**factory))

    def read(
        self, x_btd: Tensor, state: State, layout: Layout | None = None, shared: Shared = NOTHING
    ) -> tuple[Tensor, Update]:
        """Run the block through convolution and scan; see `Mixer.read`."""
        return self._read(x_btd, None, state, self.dense_layout(x_btd, layout))

    def read_stream(self, x_btd: Tensor, norm: nn.RMSNorm, state: State, layout: Layout) -> tuple[Tensor, Update]:
        """The same behind `norm`, which for a few tokens is part of the projection; see `Mixer.read_stream`."""
        return self._read(x_btd, norm, state, layout)

    def _read(self, x_btd: Tensor, norm: nn.RMSNorm | None, state: State, layout: Layout) -> tuple[Tensor, Update]:
        assert isinstance(state, SelectiveState)
        x_btd, z_btd = skinny.project(x_btd, self.in_proj, norm=norm)[0].chunk(2, dim=-1)
        y_btd, update = self.ssm(x_btd, state, layout)
        return skinny.project(y_btd * F.silu(z_btd), self.out_proj)[0], update
