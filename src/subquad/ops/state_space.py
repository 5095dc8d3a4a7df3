"""The layer of linear state spaces: one system a channel, a skip, GELU and a gated projection; and its state."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.core.errors import CheckpointError, ConfigError, UnsupportedError
from subquad.core.layout import Layout
from subquad.core.mixer import Committed, Update
from subquad.core.precise import Precise
from subquad.core.state import State, axes, precise
from subquad.ops import chunks, flashconv, skinny, step

# The rate that published training gives poles, steps and inputs, whatever the rest learns with.
SLOWLY = 1e-3


@dataclass(frozen=True)
class ModalState(State):
    """A complex number a channel and mode, real and imaginary part along p."""

    modes_bdnp: Tensor = axes("b d n p", shard="d", precision="high")


class System(Precise, ABC):
    """A linear time-invariant system for each of g groups of channels, with learned parameters.

    These stay in at least float32 whatever the model is cast to: a decay of 0.9999 is 1 in bfloat16. They are built
    without a value and filled, so that a model can be laid out without memory.

    Attributes:
        groups: systems; channels in succession share one.
        modes: complex numbers of state of a channel.
        SLOW: parameters that training from nothing moves slowly, and the highest rate that each bears.
    """

    SLOW: ClassVar[Mapping[str, float]]
    groups: int
    modes: int

    @abstractmethod
    def kernel(self, length: int) -> Tensor:
        """Its impulse response ``[g, length]``."""

    @classmethod
    def kernels(cls, systems: Sequence[System], length: int) -> Sequence[Tensor]:
        """The impulse responses of several systems alike, which may be worked out together."""
        return [system.kernel(length) for system in systems]

    @abstractmethod
    def scan(self, u_btd: Tensor, state_bdnp: Tensor, **where: Tensor | None) -> tuple[Tensor, Tensor]:
        """Outputs and final state; arguments as in `subquad.ops.modal.scan`."""

    @abstractmethod
    def final_state(self, u_btd: Tensor, state_bdnp: Tensor, **where: Tensor | None) -> Tensor:
        """The final state alone."""

    @abstractmethod
    def step(self) -> step.Table:
        """`subquad.ops.step.table` of the discrete system, as far as can be kept."""

    @abstractmethod
    def poles(self) -> Tensor:
        """Complex ``[g, n]`` of the continuous system's diagonal part, times the step."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        """Every checkpoint is read through here."""
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.check(prefix)

    @torch.no_grad()
    def check(self, where: str = "") -> None:
        """Refuse parameters that are not finite, or poles that are not in the disc.

        Raises:
            CheckpointError: with the first such parameter, or the number of such poles.
        """
        if any(p.is_meta for p in self.parameters()):
            return
        remedy = "training diverged or the file is damaged, load an earlier checkpoint"
        for name, p in self.named_parameters():
            if not p.isfinite().all():
                bad = int((~p.isfinite()).sum())
                raise CheckpointError(
                    f"{where}{name}: expected finite numbers, got {bad} others of {p.numel()}; {remedy}"
                )
        inside_gn = (self.poles().real <= 0) & self.poles().real.isfinite()
        if not inside_gn.all():
            raise CheckpointError(
                f"{where or 'system'}: expected poles inside the unit disc, got {int((~inside_gn).sum())} others of "
                f"{inside_gn.numel()}; {remedy}"
            )


@dataclass(frozen=True)
class ModalUpdate(Update):
    """One block's inputs to the system, and the states before and behind all of it, None where nobody asked yet."""

    state: ModalState
    end_bdnp: Tensor | None
    u_btd: Tensor
    layout: Layout
    system: System

    def commit(self, n_b: Tensor | None = None) -> ModalState:
        """Run the kept tokens through the system."""
        before_bdnp, end_bdnp = self.state.modes_bdnp, self.end_bdnp
        if end_bdnp is not None and n_b is not None and self.u_btd.shape[1] == 1:
            end_bdnp = torch.where((n_b > 0)[:, None, None, None], end_bdnp, before_bdnp)
        elif end_bdnp is None or n_b is not None:
            where = {"valid_bt": chunks.kept(self.layout, n_b), "documents_bt": self.layout.documents_bt}
            end_bdnp = self.system.final_state(self.u_btd, before_bdnp, **where)
        return ModalState(end_bdnp.to(before_bdnp.dtype))

    def commit_(self, pool: State, rows: Tensor | None = None, n_b: Tensor | None = None) -> None:
        """A single token is stepped where the state lies."""
        assert isinstance(pool, ModalState)
        if self.end_bdnp is not None:
            return super().commit_(pool, rows, n_b)
        n_b = self.layout.lengths_b if n_b is None else n_b
        table, before_bdnp = self.system.step(), self.state.modes_bdnp
        return step.write_(pool.modes_bdnp, rows, self.u_btd[:, 0], table, before_bdnp, n_b)


class StateSpaceLayer(nn.Module):
    """``out(gelu(system(x) + skip x))``, a system a channel, where ``out`` mixes channels (2111.00396, section 3.4).

    Args:
        d_model: width, and number of channels.
        systems: one, or two for both directions: the second runs from the end to the beginning, and both count a
            token's own input.
        glu: a gated linear unit as the projection, else a plain one.

    Attributes:
        responses: of the systems, while `together` holds them.
    """

    def __init__(self, d_model: int, systems: Sequence[System], glu: bool) -> None:
        super().__init__()
        self.glu = glu
        self.systems = cast("Sequence[System]", nn.ModuleList(systems))
        self.skip = nn.Parameter(torch.randn(d_model))
        self.out_proj = nn.Linear(d_model, 2 * d_model if glu else d_model)
        self.responses: Sequence[Tensor] | None = None

    def init_state(self, batch: int, **factory: Any) -> ModalState:
        """Zeros; `factory` is ``device`` and ``dtype``, by default the model's, which the systems don't follow."""
        dtype = precise(factory.get("dtype") or self.skip.dtype)
        device = factory.get("device") or self.skip.device
        return ModalState(torch.zeros(batch, len(self.skip), self.systems[0].modes, 2, device=device, dtype=dtype))

    def forward(self, x_btd: Tensor, layout: Layout) -> Tensor:
        """The training form: a convolution with the impulse response, or with one each way."""
        t, documents_bt = x_btd.shape[1], layout.documents_bt
        if t == 0:
            return x_btd.clone()
        (u_btd,) = chunks.blank(chunks.kept(layout), x_btd)
        kernel_gt, *back = self.responses or type(self.systems[0]).kernels(self.systems, t)
        if back and documents_bt is not None:
            # Padding is zeros now, so that a row's last token meets an empty state though it isn't the first.
            documents_bt = chunks.settle(documents_bt, chunks.kept(layout))
        behind_gl = back[0] if back else None
        y_btd = flashconv.parallel(u_btd, kernel_gt, self.skip, behind_gl=behind_gl, documents_bt=documents_bt)
        return self._leave(F.gelu(y_btd))

    def read(self, x_btd: Tensor, state: ModalState, layout: Layout) -> tuple[Tensor, Update]:
        """Read a block against a state.

        Raises:
            UnsupportedError: the layer looks both ways.
        """
        if len(self.systems) == 2:
            raise UnsupportedError(
                "bidirectional=True: a token's output depends on tokens behind it, so no state of what came before "
                "can stand for them; use forward over whole sequences, or bidirectional=False to generate"
            )
        system, end_bdnp = self.systems[0], None
        if step.alone(layout):
            token = x_btd[:, 0], system.step(), state.modes_bdnp
            if layout.kept_b is not None:
                y_bd = step.advance_(*token, layout.kept_b, self.skip, gelu=True)
                return self._leave(y_bd[:, None]), Committed(state)
            inner_btd = step.read(*token, self.skip, gelu=True)[:, None]
        else:
            where = {"valid_bt": chunks.kept(layout), "documents_bt": layout.documents_bt}
            y_btd, end_bdnp = system.scan(x_btd, state.modes_bdnp, **where)
            inner_btd = F.gelu(torch.addcmul(y_btd, x_btd, self.skip))
        return self._leave(inner_btd), ModalUpdate(state, end_bdnp, x_btd, layout, system)

    def _leave(self, inner_btd: Tensor) -> Tensor:
        if self.glu:
            return skinny.glu(inner_btd, self.out_proj)
        return skinny.project(inner_btd, self.out_proj)[0]


@contextmanager
def together(model: nn.Module, length: int) -> Generator[None]:
    """Work the impulse responses of all layers in `model` out at once, for its passes over rows of `length` meanwhile.

    They take hundreds of small operations, whose launches cost a GPU as much for all layers as for one.
    """
    alike: dict[tuple[type[System], int], list[StateSpaceLayer]] = {}
    for layer in model.modules():
        if isinstance(layer, StateSpaceLayer):
            alike.setdefault((type(layer.systems[0]), layer.systems[0].modes), []).append(layer)
    try:
        for (kind, _), layers in alike.items():
            made = iter(kind.kernels([system for layer in layers for system in layer.systems], length))
            for layer in layers:
                layer.responses = [next(made) for _ in layer.systems]
        yield
    finally:
        for layer in (layer for layers in alike.values() for layer in layers):
            layer.responses = None


def log_steps(groups: int, dt_min: float, dt_max: float) -> Tensor:
    """Logarithms ``[g]`` of steps drawn log-uniformly between two.

    Raises:
        ConfigError: no such range.
    """
    if not 0 < dt_min <= dt_max < math.inf:
        raise ConfigError(f"dt_min={dt_min}, dt_max={dt_max}: expected 0 < dt_min <= dt_max; swap or correct them")
    return torch.empty(groups, dtype=precise(torch.get_default_dtype())).uniform_(math.log(dt_min), math.log(dt_max))


def filled(values: Tensor) -> nn.Parameter:
    """A parameter with these values on the default device, in the default dtype but at least float32."""
    place = torch.empty(values.shape, dtype=precise(torch.get_default_dtype()))
    return nn.Parameter(place.copy_(values))
