"""What a window with a linear state behind it keeps, right-aligned and as a ring, and how a block is kept in both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from subquad.core.layout import Layout
from subquad.core.mixer import Update
from subquad.core.state import State, axes
from subquad.ops import linear_attention, ring, slide, window
from subquad.ops.ring import RingState, RingUpdate
from subquad.ops.slide import Behind
from subquad.ops.window import WindowState

if TYPE_CHECKING:
    from subquad.mixers.windowed_linear import WindowedLinear


@dataclass(frozen=True)
class WindowedLinearState(State):
    """The window with its sinks, and the linear state of the tokens before it.

    The linear state's last value channel is the normaliser: the sum of the key features. Those of the window's own
    tokens come from its keys again when they leave it; schema 1 kept them.
    """

    schema: ClassVar[int] = 2

    window: WindowState = axes("b")
    linear_bgfv: Tensor = axes("b g f v", shard="g", precision="high")

    @classmethod
    def migrate(cls, fields: dict[str, Any], schema: int) -> dict[str, Any]:
        """Schema 1 is this one and the window's features."""
        if schema != 1:
            return super().migrate(fields, schema)
        return {name: value for name, value in fields.items() if name != "window_f_bgwf"}


@dataclass(frozen=True)
class WindowedLinearUpdate(Update):
    """Keys, values and key features of one block, and features of the oldest tokens before it, all heads first."""

    state: WindowedLinearState
    window_f_bgnf: Tensor
    k_bgtk: Tensor
    v_bgtk: Tensor
    f_bgtf: Tensor
    layout: Layout

    def commit(self, n_b: Tensor | None = None) -> WindowedLinearState:
        """Shift the window by the kept tokens and absorb those that leave it."""
        n_b = self.layout.lengths_b if n_b is None else n_b
        old = self.state
        leaving = window.leaving(old.window, self.window_f_bgnf, self.v_bgtk, self.f_bgtf, self.layout)
        # With the normaliser's 1.
        v_btgv = torch.cat((leaving.v_btgv, torch.ones_like(leaving.v_btgv[..., :1])), dim=-1)
        kept_bt = torch.arange(self.layout.shape[1], device=n_b.device) < n_b[:, None]
        _, continues_b = self.layout.tail(n_b)
        if self.layout.documents_bt is not None:
            last_b = torch.where(kept_bt, self.layout.documents_bt, 0).amax(1)
            kept_bt = kept_bt & (leaving.documents_bt == last_b[:, None])
        return WindowedLinearState(
            old.window.after(self.k_bgtk, self.v_bgtk, self.layout, n_b),
            linear_attention.absorb(leaving.f_btgf, v_btgv, old.linear_bgfv, kept_bt, continues_b),
        )

    def commit_(self, pool: State, rows: Tensor | None = None, n_b: Tensor | None = None) -> None:
        """The same in place, in one launch where rows of one document go into others."""
        n_b = self.layout.lengths_b if n_b is None else n_b
        assert isinstance(pool, (WindowedLinearState, LinearRingState))
        features = self.window_f_bgnf.detach(), self.f_bgtf.detach()
        behind = Behind(*features, self.state.linear_bgfv.detach(), pool.linear_bgfv)
        if rows is None or self.layout.documents_bt is not None or not slide.takes(self.k_bgtk, behind):
            super().commit_(pool, rows, n_b)
            return
        near = pool.ring if isinstance(pool, LinearRingState) else pool.window
        slide.write_(near, rows, self.state.window, self.k_bgtk.detach(), self.v_bgtk.detach(), n_b, behind)


@dataclass(frozen=True)
class LinearRingState(State):
    """`WindowedLinearState` as it decodes: its window is a ring."""

    ring: RingState = axes("b")
    linear_bgfv: Tensor = axes("b g f v", shard="g", precision="high")

    def settled(self) -> WindowedLinearState:
        """The window right-aligned."""
        return WindowedLinearState(self.ring.settled(), self.linear_bgfv.clone())

    def adopt(self, other: Any) -> LinearRingState:
        """A right-aligned window's tokens at their places, or rows of such a pool."""
        if isinstance(other, LinearRingState):
            return other
        return LinearRingState(self.ring.adopt(other.window), other.linear_bgfv)


@dataclass(frozen=True)
class LinearRingUpdate(RingUpdate):
    """A block before a window with a linear state behind it."""

    mixer: WindowedLinear

    def absorb_(self, state: Any, n_b: Tensor) -> Tensor:
        """Into the linear state."""
        back, maps, time = self.mixer.tables_back(self.layout), self.mixer.maps, self.layout.shape[1]
        ring.absorb_(state.ring, n_b, time, back, state.linear_bgfv, maps)
        return state.ring.seen_b
