"""LaughingHyena: Hyena whose long filters are impulse responses of small state spaces, so that it decodes by steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from subquad.core.card import Card
from subquad.core.errors import CheckpointError, ConfigError
from subquad.core.kept import Kept
from subquad.core.layout import Layout
from subquad.core.mixer import NOTHING, Mixer, Shared, Update
from subquad.core.precise import Precise
from subquad.core.state import State, axes, precise
from subquad.ops import chunks, modal, short_conv, step
from subquad.ops.hyena import Recurrence

CARD = Card(
    title="Laughing Hyena Distillery: Extracting Compact Recurrences From Convolutions",
    entry="LaughingHyena",
    arxiv="2310.18780",
    gives="a Hyena that decodes with a state of constant size, distilled from one by convert/laughing_hyena or trained",
    status="incubating",
    claim="10 x a Transformer's and 1.5 x Hyena's peak generation throughput at 1.3 B parameters, quality kept",
    measured="105 M, one H100: 12 x Hyena's by history and 20 x attention's over 16K new tokens",
    result="laughing_hyena.throughput.h100.json",
    constant_state=True,
    examples={
        "third": {"d_model": 8, "modes": 3, "order": 3, "conv_width": 4},
        "heads": {"d_model": 8, "modes": 2, "n_heads": 2, "conv_width": 1},
    },
)


# Of the rate of a mode, so that no rounding puts its pole on the unit circle: a time constant of a million tokens.
LEAST_RATE = 1e-6


class ModalFilter(Precise):
    """``h_t = Re sum_m residue_m a_m^t``, ``a = exp(-1e-6 - exp(log_rate) + i angle)``: no pole leaves the unit disc.

    To the first tap, which a state space passes on beside its state, `first` is added (section 3 of 2310.18780).

    The parameters stay in at least float32 whatever the module is cast to: between decays of 0.996 and 1 bfloat16 has
    no numbers.

    Args:
        filters: number of filters for each of several convolutions, ``(convolutions, heads)``.
        modes: complex poles of each; each stands for itself and its conjugate, so this is half the order.
    """

    def __init__(self, filters: tuple[int, int], modes: int) -> None:
        super().__init__()
        high: dict[str, Any] = {"dtype": precise(torch.get_default_dtype())}
        # Time constants from a thousand tokens to two, at all frequencies.
        log_rate_m = torch.linspace(math.log(1e-3), math.log(0.5), modes, **high)
        self.log_rate_ngm = nn.Parameter(log_rate_m.expand(*filters, modes).clone())
        self.angle_ngm = nn.Parameter(math.pi * torch.rand(*filters, modes, **high))
        self.residue_ngmp = nn.Parameter(torch.randn(*filters, modes, 2, **high) / modes)
        self.first_ng = nn.Parameter(torch.zeros(*filters, **high))
        self._step = Kept[tuple[step.Table, ...]]()
        self.register_load_state_dict_post_hook(_check_loaded)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Logarithms of the poles, and residues: complex, ``[convolutions, heads, modes]``."""
        # Above a rate of a hundred a mode leaves nothing, and far above it there would be an infinity.
        rate_ngm = LEAST_RATE + self.log_rate_ngm.clamp(max=math.log(100.0)).exp()
        return torch.complex(-rate_ngm, self.angle_ngm), torch.view_as_complex(self.residue_ngmp)

    def step(self) -> tuple[step.Table, ...]:
        """`subquad.ops.step.table` of each convolution, kept while it holds."""

        def make() -> tuple[step.Table, ...]:
            log_a_ngm, residue_ngm = self()
            one_gm = torch.ones_like(log_a_ngm[0])
            return tuple(step.table(a, one_gm, c) for a, c in zip(log_a_ngm.exp(), residue_ngm, strict=True))

        made = self._step(self.parameters(), make)
        return make() if made is None else made

    def taps(self, length: int) -> Tensor:
        """The filters as their first `length` taps, ``[convolutions, heads, length]``."""
        log_a_ngm, residue_ngm = (x.flatten(0, 1) for x in self())
        k_ngl = modal.impulse(log_a_ngm, residue_ngm, length).unflatten(0, self.first_ng.shape)
        return torch.cat((k_ngl[..., :1] + self.first_ng[..., None], k_ngl[..., 1:]), dim=-1)


def _check_loaded(module: nn.Module, _: Any) -> None:
    """Refuse poles that are none: all finite rates lie inside the disc, what is not finite came of a broken run."""
    for name, x in module.named_parameters():
        if not x.is_meta and not bool(x.isfinite().all()):
            raise CheckpointError(
                f"{name}: expected finite poles and residues, got others; distil or train the filters again"
            )


@dataclass(frozen=True)
class LaughingState(State):
    """Every mode of every long convolution, and the last inputs of the short one."""

    modal_bndmp: Tensor = axes("b n d m p", shard="d", precision="high")
    conv_bdw: Tensor = axes("b d w", shard="d")


@dataclass(frozen=True)
class LaughingUpdate(Update):
    """One block's inputs of the long convolutions and of the short one, and the states behind all of it.

    Of a single token nobody has worked those out yet, unless it was known to be kept: then they are in the state read.
    """

    state: LaughingState
    filters: ModalFilter
    u_btd: tuple[Tensor, ...]
    ends_bdmp: tuple[Tensor, ...]
    inputs_btd: Tensor
    layout: Layout

    def commit(self, n_b: Tensor | None = None) -> LaughingState:
        """Run the kept tokens through the modes and the short convolution's history."""
        where = {"valid_bt": chunks.kept(self.layout, n_b), "documents_bt": self.layout.documents_bt}
        old, ends_bdmp = self.state, self.ends_bdmp
        if self._stepped:
            ends_bdmp = old.modal_bndmp.unbind(1)
        elif n_b is not None or len(ends_bdmp) == 0:
            each = zip(self.u_btd, self.filters()[0], old.modal_bndmp.unbind(1), strict=True)
            ends_bdmp = tuple(modal.final_state(u, log_a, state, **where) for u, log_a, state in each)
        return LaughingState(torch.stack(ends_bdmp, dim=1).to(old.modal_bndmp.dtype), self._conv_bdw(n_b))

    def commit_(self, pool: State, rows: Tensor | None = None, n_b: Tensor | None = None) -> None:
        """A single token is stepped where the state lies."""
        assert isinstance(pool, LaughingState)
        if self.ends_bdmp:
            return super().commit_(pool, rows, n_b)
        n_b = self.layout.lengths_b if n_b is None else n_b
        conv_bdw = self._conv_bdw(n_b)
        if not self._stepped:
            for n, (u_btd, table) in enumerate(zip(self.u_btd, self.filters.step(), strict=True)):
                step.write_(pool.modal_bndmp[:, n], rows, u_btd[:, 0], table, self.state.modal_bndmp[:, n], n_b)
        if rows is None:
            pool.conv_bdw.copy_(conv_bdw)
        else:
            pool.conv_bdw.index_copy_(0, rows, conv_bdw)
        return None

    @property
    def _stepped(self) -> bool:
        return self.layout.kept_b is not None and len(self.ends_bdmp) == 0

    def _conv_bdw(self, n_b: Tensor | None) -> Tensor:
        where = {"valid_bt": chunks.kept(self.layout, n_b), "documents_bt": self.layout.documents_bt}
        return short_conv.final_state(self.inputs_btd, self.state.conv_bdw, **where)


class LaughingHyena(Mixer):
    """The recurrence of `subquad.mixers.hyena` over filters in modal form (arXiv 2310.18780, section 3).

    A prompt runs through `subquad.ops.modal` in chunks, in time linear in its length; a token costs a step of modes.

    Example:
        >>> import torch
        >>> mixer = LaughingHyena(LaughingHyena.Config(d_model=64, modes=8))
        >>> state = mixer.init_state(batch=2)
        >>> y, update = mixer.read(torch.randn(2, 3, 64), state)
        >>> update.commit(torch.tensor([3, 1])).modal_bndmp.shape
        torch.Size([2, 1, 64, 8, 2])
    """

    @dataclass(frozen=True)
    class Config:
        """Shape.

        Attributes:
            d_model: width of the model.
            modes: complex poles of a filter, half the paper's order.
            order: gates; one long convolution less.
            n_heads: heads whose channels share a filter, over outer products; None is one a channel, without.
            conv_width: taps of the short convolution.
        """

        d_model: int
        modes: int
        order: int = 2
        n_heads: int | None = None
        conv_width: int = 3

        def __post_init__(self) -> None:
            """Refuse a filter of nothing."""
            if self.modes < 1:
                raise ConfigError(f"modes={self.modes} must be at least 1; raise it")

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.recurrence = Recurrence(config.d_model, config.order, config.n_heads, config.conv_width)
        self.filters = ModalFilter((self.recurrence.convolutions, self.recurrence.heads), config.modes)

    def init_state(self, batch: int, capacity: int = 0, **factory: Any) -> LaughingState:
        """Zeros; `capacity` is not needed."""
        recurrence, like = self.recurrence, self.factory(**factory)
        width, taps = recurrence.conv_weight.shape
        modes = recurrence.convolutions, recurrence.channels, self.config.modes
        return LaughingState(
            torch.zeros(batch, *modes, 2, device=like["device"], dtype=precise(like["dtype"])),
            torch.zeros(batch, width, taps - 1, **like),
        )

    def read(
        self, x_btd: Tensor, state: State, layout: Layout | None = None, shared: Shared = NOTHING
    ) -> tuple[Tensor, Update]:
        """Run the block through the modes; see `Mixer.read`."""
        layout = self.dense_layout(x_btd, layout)
        assert isinstance(state, LaughingState)
        where = {"valid_bt": chunks.kept(layout), "documents_bt": layout.documents_bt}
        inputs: list[Tensor] = []
        ends: list[Tensor] = []
        if step.alone(layout):
            tables = self.filters.step()

            def run(n: int, u_btd: Tensor, direct_d: Tensor) -> Tensor:
                token = u_btd[:, 0], tables[n], state.modal_bndmp[:, n]
                if layout.kept_b is not None:
                    return step.advance_(*token, layout.kept_b, direct_d)[:, None]
                return step.read(*token, direct_d)[:, None]
        else:
            log_a_ngm, residue_ngm = self.filters()

            def run(n: int, u_btd: Tensor, direct_d: Tensor) -> Tensor:
                y_btd, end_bdmp = modal.scan(u_btd, log_a_ngm[n], residue_ngm[n], state.modal_bndmp[:, n], **where)
                ends.append(end_bdmp)
                return (y_btd + direct_d * u_btd).to(u_btd.dtype)

        def convolve(n: int, z_btd: Tensor, gate_in: Tensor | None, gate_out: Tensor | None) -> Tensor:
            u_btd = z_btd if gate_in is None else z_btd * gate_in
            inputs.append(u_btd)
            y_btd = run(n, u_btd, self.recurrence.direct_d(n, self.filters.first_ng))
            return y_btd if gate_out is None else y_btd * gate_out

        y_btd, inputs_btd = self.recurrence(x_btd, state.conv_bdw, layout, convolve)
        return y_btd, LaughingUpdate(state, self.filters, tuple(inputs), tuple(ends), inputs_btd, layout)
