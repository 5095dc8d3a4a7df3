"""S4D: a diagonal state space for every channel, started from HiPPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from subquad.core.card import Card
from subquad.core.layout import Layout
from subquad.core.mixer import NOTHING, Mixer, Shared, Update
from subquad.core.state import State
from subquad.ops.diagonal import Diagonal
from subquad.ops.state_space import ModalState, StateSpaceLayer

CARD = Card(
    title="On the Parameterization and Initialization of Diagonal State Space Models",
    entry="S4D",
    arxiv="2206.11893",
    gives="a long convolution that is a recurrence too: trained by transforms, read token by token at constant cost",
    status="incubating",
    claim="a diagonal state matrix does nearly as well as S4's: 85 % on average over the Long Range Arena",
    measured="fails at induction heads (18 %) as the H3 paper says; the Long Range Arena was not run",
    result="tasks.induction.state_spaces.cpu.json",
    constant_state=True,
    examples={
        "legs": {"d_model": 12, "d_state": 16},
        "shared": {
            "d_model": 8,
            "d_state": 8,
            "n_ssm": 2,
            "init": "lin",
            "discretization": "bilinear",
            "dt_min": 0.01,
            "dt_max": 0.5,
            "glu": False,
        },
    },
)


class S4D(Mixer):
    """``x_t = exp(dt A) x_{t-1} + B u_t``, ``y_t = 2 Re C x_t + D u_t`` per channel, A diagonal and complex.

    Section 3 of arXiv 2206.11893. Trained as a convolution with the impulse response, by FFT.

    Example:
        >>> import torch
        >>> mixer = S4D(S4D.Config(d_model=32, d_state=8))
        >>> y, update = mixer.read(torch.randn(2, 3, 32), mixer.init_state(batch=2))
        >>> update.commit(torch.tensor([3, 1])).modes_bdnp.shape
        torch.Size([2, 32, 4, 2])
    """

    @dataclass(frozen=True)
    class Config:
        """Shape and start; the defaults are the paper's.

        Attributes:
            d_model: width of the model.
            d_state: size of each channel's state, even.
            n_ssm: different sets of poles, shared by channels in succession; None is one a channel.
            init: ``legs``, ``inv`` or ``lin``.
            discretization: ``zoh`` or ``bilinear``.
            dt_min, dt_max: range of the channels' steps at the start.
            glu: a gated projection behind the channels, else a plain one.
            bidirectional: a second system that runs backwards; `read` is refused then.
        """

        d_model: int
        d_state: int = 64
        n_ssm: int | None = None
        init: str = "legs"
        discretization: str = "zoh"
        dt_min: float = 1e-3
        dt_max: float = 1e-1
        glu: bool = True
        bidirectional: bool = False

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        systems = [
            Diagonal(
                config.d_model,
                config.d_state,
                n_ssm=config.n_ssm,
                init=config.init,
                discretization=config.discretization,
                dt_min=config.dt_min,
                dt_max=config.dt_max,
            )
            for _ in range(1 + config.bidirectional)
        ]
        self.layer = StateSpaceLayer(config.d_model, systems, config.glu)

    def init_state(self, batch: int, capacity: int = 0, **factory: Any) -> ModalState:
        """Zeros; `capacity` is not needed."""
        return self.layer.init_state(batch, **factory)

    def forward(self, x_btd: Tensor, layout: Layout | None = None, shared: Shared = NOTHING) -> Tensor:
        """The training form, a long convolution."""
        return self.layer(x_btd, self.dense_layout(x_btd, layout))

    def read(
        self, x_btd: Tensor, state: State, layout: Layout | None = None, shared: Shared = NOTHING
    ) -> tuple[Tensor, Update]:
        """Run the block through the recurrence; see `Mixer.read`."""
        assert isinstance(state, ModalState)
        return self.layer.read(x_btd, state, self.dense_layout(x_btd, layout))
