"""S4: a state space for every channel whose matrix is HiPPO's, kept as diagonal plus low rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from subquad.core.card import Card
from subquad.core.errors import ConfigError
from subquad.core.kept import Kept
from subquad.core.layout import Layout
from subquad.core.mixer import NOTHING, Mixer, Shared, Update
from subquad.core.state import State
from subquad.ops import dplr, hippo
from subquad.ops.state_space import SLOWLY, ModalState, StateSpaceLayer, System, filled, log_steps
from subquad.ops.step import Table

CARD = Card(
    title="Efficiently Modeling Long Sequences with Structured State Spaces",
    entry="S4",
    arxiv="2111.00396",
    gives="a long convolution with HiPPO's memory of its whole past, read token by token at constant cost",
    status="incubating",
    claim="86 % on average over the Long Range Arena, 96 % on Path-X; generates 60 times faster than a Transformer",
    measured="124 M, one H100: 7 to 18 x as fast at 4K; 64 % of ListOps, 94 % of Pathfinder-32 within 15 minutes",
    result="s4.generate.vs_transformer.h100.json",
    constant_state=True,
    examples={
        "hippo": {"d_model": 8, "d_state": 64},
        "shared": {"d_model": 12, "d_state": 8, "n_ssm": 3, "dt_min": 0.01, "dt_max": 0.5, "glu": False},
    },
)


class DiagonalPlusLowRank(System):
    """``dx/dt = (diag(a) - p p*) x + B u``, ``y = 2 Re C x``, discretised by the trapezoidal rule.

    ``a = -exp(log_rate) + i frequency``: with the low-rank part of this sign the whole matrix takes length from every
    state, so no pole leaves the disc, whatever training does.

    Args:
        groups: systems.
        d_state: size of the state, even: half as many complex numbers, each standing for a conjugate pair.
        n_ssm: different a, p and B, a divisor of groups; groups in succession share one. None is one a group.
        dt_min, dt_max: steps are drawn log-uniformly between them.

    Raises:
        ConfigError: sets that don't divide the groups, or an odd state.
    """

    SLOW: ClassVar[Mapping[str, float]] = dict.fromkeys(("log_dt", "log_rate", "frequency", "low", "input"), SLOWLY)

    def __init__(self, groups: int, d_state: int, *, n_ssm: int | None, dt_min: float, dt_max: float) -> None:
        super().__init__()
        n_ssm = groups if n_ssm is None else n_ssm
        if n_ssm < 1 or groups % n_ssm:
            raise ConfigError(f"n_ssm={n_ssm}: expected a divisor of the {groups} systems; change it")
        poles_n, low_n, input_n = (x.expand(n_ssm, -1) for x in hippo.normal_plus_low_rank(d_state))
        self.groups, self.modes = groups, d_state // 2
        self.log_dt = nn.Parameter(log_steps(groups, dt_min, dt_max))
        self.log_rate, self.frequency = filled((-poles_n.real).log()), filled(poles_n.imag)
        self.low, self.input = (filled(torch.view_as_real(x.contiguous())) for x in (low_n, input_n))
        drawn_gn = torch.randn(groups, self.modes, dtype=torch.complex128, device="cpu")
        self.output = filled(torch.view_as_real(drawn_gn))
        self._step = Kept[Table]()

    def poles(self) -> Tensor:
        """``dt a``, without the low-rank part; see `System.poles`."""
        system = self.system()
        return system.step_g[:, None] * system.poles_gn

    def system(self) -> dplr.System:
        """As `subquad.ops.dplr` takes it, in the dtype of the parameters."""
        return _system(*self._by_group())

    def _by_group(self) -> tuple[Tensor, ...]:
        """The parameters as `_system` takes them, one of each a group."""
        shared = (self.log_rate, self.frequency, self.low, self.input)
        own = (x if len(x) == self.groups else x.repeat_interleave(self.groups // len(x), dim=0) for x in shared)
        return *own, self.output, self.log_dt

    def step(self) -> Table:
        """See `System.step`."""
        made = self._step(self.parameters(), lambda: dplr.step(self.system()))
        return dplr.step(self.system()) if made is None else made

    def kernel(self, length: int) -> Tensor:
        """See `System.kernel`."""
        return dplr.kernel(self.system(), length)

    @classmethod
    def kernels(cls, systems: Sequence[System], length: int) -> Sequence[Tensor]:
        """See `System.kernels`; side by side, since it takes many small operations."""
        own = [system._by_group() for system in cast("Sequence[DiagonalPlusLowRank]", systems)]
        together = _system(*(torch.cat(x) for x in zip(*own, strict=True)))
        return dplr.kernel(together, length).split([system.groups for system in systems])

    def scan(self, u_btd: Tensor, state_bdnp: Tensor, **where: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `System.scan`."""
        return dplr.scan(u_btd, self.system(), state_bdnp, **where)

    def final_state(self, u_btd: Tensor, state_bdnp: Tensor, **where: Tensor | None) -> Tensor:
        """See `System.final_state`."""
        return dplr.final_state(u_btd, self.system(), state_bdnp, **where)


def _system(
    log_rate_gn: Tensor, frequency_gn: Tensor, low_gn2: Tensor, input_gn2: Tensor, output_gn2: Tensor, log_dt_g: Tensor
) -> dplr.System:
    poles_gn = torch.complex(-log_rate_gn.exp(), frequency_gn)
    low_gn, input_gn, output_gn = (torch.view_as_complex(x) for x in (low_gn2, input_gn2, output_gn2))
    return dplr.System(poles_gn, low_gn, input_gn, output_gn, log_dt_g.exp())


class S4(Mixer):
    """``x_t = A x_{t-1} + B u_t``, ``y_t = C x_t + D u_t`` per channel, with A from HiPPO-LegS.

    Equations 1 to 4 of arXiv 2111.00396. Trained as a convolution with the impulse response of the Cauchy kernel.

    Example:
        >>> import torch
        >>> mixer = S4(S4.Config(d_model=32, d_state=8))
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
            n_ssm: different matrices and inputs, shared by channels in succession; None is one a channel.
            dt_min, dt_max: range of the channels' steps at the start.
            glu: a gated projection behind the channels, else a plain one.
            bidirectional: a second system that runs backwards; `read` is refused then.
        """

        d_model: int
        d_state: int = 64
        n_ssm: int | None = None
        dt_min: float = 1e-3
        dt_max: float = 1e-1
        glu: bool = True
        bidirectional: bool = False

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        steps = {"dt_min": config.dt_min, "dt_max": config.dt_max}
        systems = [
            DiagonalPlusLowRank(config.d_model, config.d_state, n_ssm=config.n_ssm, **steps)
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
