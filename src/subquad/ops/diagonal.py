"""Diagonal continuous systems with learned poles, discretised: what S4D and H3 remember with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from subquad.core.errors import ConfigError, nearest
from subquad.core.kept import Kept
from subquad.ops import chunks, hippo, lti, modal, step
from subquad.ops.state_space import SLOWLY, System, filled, log_steps

DISCRETIZATIONS = ("zoh", "bilinear")


class Diagonal(System):
    """``dx/dt = A x + u``, ``y = 2 Re sum_n C_n x_n`` with A diagonal (2206.11893), a step and a C for each group.

    ``A = -exp(log_rate) + i frequency``, so that a pole never leaves the disc, whatever training does.

    Args:
        groups: systems.
        d_state: size of the state, even: half as many complex modes, each standing for a conjugate pair.
        n_ssm: different sets of poles, a divisor of groups; groups in succession share one. None is one a group.
        init: see `subquad.ops.hippo.diagonal`.
        discretization: ``zoh`` (the input is held over a step) or ``bilinear`` (the trapezoidal rule).
        dt_min, dt_max: steps are drawn log-uniformly between them.

    Raises:
        ConfigError: sets that don't divide the groups, or an unknown name.
    """

    SLOW: ClassVar[Mapping[str, float]] = dict.fromkeys(("log_dt", "log_rate", "frequency"), SLOWLY)

    def __init__(
        self,
        groups: int,
        d_state: int,
        *,
        n_ssm: int | None = None,
        init: str = "legs",
        discretization: str = "zoh",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
    ) -> None:
        super().__init__()
        n_ssm = groups if n_ssm is None else n_ssm
        if n_ssm < 1 or groups % n_ssm:
            raise ConfigError(f"n_ssm={n_ssm}: expected a divisor of the {groups} systems; change it")
        if discretization not in DISCRETIZATIONS:
            raise ConfigError(f"unknown discretization {discretization!r}{nearest(discretization, DISCRETIZATIONS)}")
        poles_n, inputs_n = hippo.diagonal(init, d_state)
        self.groups, self.modes, self.discretization = groups, d_state // 2, discretization
        self.log_dt = nn.Parameter(log_steps(groups, dt_min, dt_max))
        self.log_rate = filled((-poles_n.real).log().expand(n_ssm, -1))
        self.frequency = filled(poles_n.imag.expand(n_ssm, -1))
        drawn_gn = torch.randn(groups, self.modes, dtype=torch.complex128, device="cpu")
        # B only ever appears as C B, so C takes it in.
        self.output = filled(torch.view_as_real(drawn_gn * inputs_n))
        self._step = Kept[step.Table]()

    def poles(self) -> Tensor:
        """``dt A``, complex ``[g, n]`` in the widest dtype of the device."""
        wide = torch.promote_types(self.log_dt.dtype, chunks.wide(self.log_dt))
        a_sn = torch.complex(-self.log_rate.to(wide).exp(), self.frequency.to(wide))
        return self.log_dt.to(wide).exp()[:, None] * a_sn.repeat_interleave(self.groups // len(a_sn), dim=0)

    def discrete(self) -> tuple[Tensor, Tensor]:
        """``log_a_gn`` and ``residue_gn`` as `subquad.ops.modal` takes them."""
        z_gn = self.poles()
        dt_g1 = self.log_dt.to(z_gn.real.dtype).exp()[:, None]
        if self.discretization == "zoh":
            log_a_gn, held_gn = z_gn, dt_g1 * torch.expm1(z_gn) / z_gn
        else:
            log_a_gn, held_gn = _log_bilinear(z_gn), dt_g1 / (1 - z_gn / 2)
        # What forgets more than that at once is 0 in every dtype, and must stay a number when it is made float32.
        log_a_gn = torch.complex(log_a_gn.real.clamp(min=chunks.FORGOTTEN), log_a_gn.imag)
        residue_gn = 2 * torch.view_as_complex(self.output.to(dt_g1.dtype)) * held_gn
        narrow = lti.complex_of(self.log_dt.dtype)
        return log_a_gn.to(narrow), residue_gn.to(narrow)

    def step(self) -> step.Table:
        """See `System.step`."""

        def make() -> step.Table:
            log_a_gn, residue_gn = self.discrete()
            return step.table(log_a_gn.exp(), torch.ones_like(log_a_gn), residue_gn)

        made = self._step(self.parameters(), make)
        return make() if made is None else made

    def kernel(self, length: int) -> Tensor:
        """See `System.kernel`."""
        return modal.impulse(*self.discrete(), length)

    def scan(self, u_btd: Tensor, state_bdnp: Tensor, **where: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `System.scan`."""
        return modal.scan(u_btd, *self.discrete(), state_bdnp, **where)

    def final_state(self, u_btd: Tensor, state_bdnp: Tensor, **where: Tensor | None) -> Tensor:
        """See `System.final_state`."""
        return modal.final_state(u_btd, self.discrete()[0], state_bdnp, **where)


def _log_bilinear(z_gn: Tensor) -> Tensor:
    """``log((1 + z / 2) / (1 - z / 2))`` with a real part that rounding never makes positive where z's is not."""
    ahead_gn, behind_gn = 1 + z_gn / 2, 1 - z_gn / 2
    shrunk_gn = 2 * z_gn.real / (behind_gn.real.square() + behind_gn.imag.square())
    least = torch.finfo(shrunk_gn.dtype).eps - 1
    return torch.complex(torch.log1p(shrunk_gn.clamp(min=least)) / 2, ahead_gn.angle() - behind_gn.angle())
