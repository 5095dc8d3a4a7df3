"""A window that decodes: its tokens stay where they are, in a ring, and a block is read in one launch.

A pool's form of `subquad.ops.window.WindowState`, alone or before a linear state; only where its kernels run.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from subquad.core.layout import Layout
from subquad.core.mixer import Counts, Update
from subquad.core.state import State, axes
from subquad.ops import backends
from subquad.ops.window import WindowState

# Loaded here and not at the first call, so that a compiler tracing a call meets no import.
_kernels: Any = importlib.import_module(f"{__name__}.on_triton") if backends.triton_runs() else None


@dataclass(frozen=True)
class RingState(State):
    """Keys and values of the last tokens at their position modulo r, and of the first s; r is window and block.

    What a read writes stands behind the committed tokens, so that only the last read's update can be committed.
    `window_bw` has no elements: its length is the window's.
    """

    keys_bgrk: Tensor = axes("b g r k", shard="g")
    values_bgrk: Tensor = axes("b g r k", shard="g")
    sink_k_bgsk: Tensor = axes("b g s k", shard="g")
    sink_v_bgsk: Tensor = axes("b g s k", shard="g")
    seen_b: Tensor = axes("b", precision="index")
    window_bw0: Tensor = axes("b w k")

    @staticmethod
    def empty(
        rows: int, n_kv_heads: int, window: int, sinks: int, head_dim: int, block: int, **factory: Any
    ) -> RingState:
        """Before the first token, for blocks of up to `block` tokens; `factory` is ``device`` and ``dtype``."""
        ring_bgrk = torch.zeros(rows, n_kv_heads, window + block, head_dim, **factory)
        sink_bgsk = torch.zeros(rows, n_kv_heads, sinks, head_dim, **factory)
        seen_b = torch.zeros(rows, dtype=torch.int64, device=factory["device"])
        spare = torch.zeros(rows, window, 0, **factory)
        return RingState(ring_bgrk, ring_bgrk.clone(), sink_bgsk, sink_bgsk.clone(), seen_b, spare)

    @property
    def window(self) -> int:
        """Tokens that a query sees, itself included."""
        return self.window_bw0.shape[1]

    @property
    def block(self) -> int:
        """Most tokens of a read."""
        return self.keys_bgrk.shape[2] - self.window

    def ahead(self, seen_b: Tensor) -> RingState:
        """The same memory, of rows that have seen `seen_b` tokens: the last were written by reads and not committed.

        What is read there is to be forgotten, and there are at most `block` such tokens.
        """
        return replace(self, seen_b=seen_b)

    def settled(self) -> WindowState:
        """The window right-aligned."""
        at_bw = self.seen_b[:, None] + torch.arange(-self.window, 0, device=self.seen_b.device)
        slot_bw = at_bw % self.keys_bgrk.shape[2]

        def aligned(ring_bgrk: Tensor) -> Tensor:
            g, k = ring_bgrk.shape[1], ring_bgrk.shape[3]
            kept_bgwk = ring_bgrk.gather(2, slot_bw[:, None, :, None].expand(-1, g, -1, k))
            return kept_bgwk.masked_fill((at_bw < 0)[:, None, :, None], 0)

        keys, values = aligned(self.keys_bgrk), aligned(self.values_bgrk)
        return WindowState(keys, values, self.sink_k_bgsk.clone(), self.sink_v_bgsk.clone(), self.seen_b.clone())

    def adopt(self, other: Any) -> RingState:
        """A right-aligned window's tokens at their places, or rows of such a pool."""
        if isinstance(other, RingState):
            return other
        assert isinstance(other, WindowState)
        at_bw = other.seen_b[:, None] + torch.arange(-self.window, 0, device=other.seen_b.device)
        slot_bw = at_bw % self.keys_bgrk.shape[2]

        def around(window_bgwk: Tensor) -> Tensor:
            b, g, _, k = window_bgwk.shape
            ring_bgrk = window_bgwk.new_zeros(b, g, self.keys_bgrk.shape[2], k)
            return ring_bgrk.scatter(2, slot_bw[:, None, :, None].expand(-1, g, -1, k), window_bgwk)

        keys, values = around(other.window_k_bgwk), around(other.window_v_bgwk)
        spare = self.window_bw0.new_zeros(len(other.seen_b), self.window, 0)
        return RingState(keys, values, other.sink_k_bgsk, other.sink_v_bgsk, other.seen_b, spare)


@dataclass(frozen=True)
class RingUpdate(Update, ABC):
    """A block that stands in its state's ring, behind what is committed."""

    state: State
    layout: Layout

    @abstractmethod
    def absorb_(self, state: Any, n_b: Tensor) -> Tensor:
        """Let what leaves the window of `state`, rows that hold the block, go where it goes, and return their count."""

    def commit(self, n_b: Tensor | None = None) -> State:
        """The settled state behind the kept tokens."""
        return self._behind(self.layout.lengths_b if n_b is None else n_b).settled()

    def commit_(self, pool: State, rows: Tensor | None = None, n_b: Tensor | None = None) -> None:
        """The same in place. Without `rows`, a pool of this form is what was read."""
        n_b = self.layout.lengths_b if n_b is None else n_b
        self.store_(pool, rows, n_b).count_(n_b)

    def store_(self, pool: State, rows: Tensor | None, n_b: Tensor) -> Counts:
        """Without the counting where the pool is what was read; see `Update.store_`."""
        if rows is None and isinstance(pool, type(self.state)):
            return Counts(added=(self.absorb_(pool.first(len(n_b)), n_b),))
        pool.write_(rows, self._behind(n_b))
        return Counts()

    def _behind(self, n_b: Tensor) -> State:
        state = self.state.snapshot()
        self.absorb_(state, n_b).add_(n_b)
        return state


@dataclass(frozen=True)
class Maps:
    """Of a linear state behind the window: see `subquad.mixers.windowed_linear`.

    Attributes:
        k_weight_gkf, k_bias_gf: key features are the softmax of their product and sum.
        q_weight_hkf, q_bias_hf: log weights of queries are theirs, less `fade_h` times the log of the far tokens.
    """

    k_weight_gkf: Tensor
    k_bias_gf: Tensor
    q_weight_hkf: Tensor
    q_bias_hf: Tensor
    fade_h: Tensor


Tables = tuple[Tensor, Tensor]


def runs(device: torch.device, dtype: torch.dtype, head_dim: int, features: int = 0) -> bool:
    """Whether the kernels take such a layer here; elsewhere the plain form decodes."""
    fits = head_dim <= 128 and features <= 128
    return backends.wants_triton(device) and dtype in (torch.bfloat16, torch.float32) and fits


def read(
    q_bthk: Tensor,
    k_btgk: Tensor,
    v_btgk: Tensor,
    tables: Tables | None,
    back: Tables | None,
    state: RingState,
    scale: float,
    linear_bgfv: Tensor | None = None,
    maps: Maps | None = None,
) -> Tensor:
    """Outputs ``[b, t, h, k]`` of a block of at most `state.block` tokens, one document a row; no gradient.

    Args:
        q_bthk, k_btgk, v_btgk: as projected, without position.
        tables: turn the block's queries and keys; None where they have no position.
        back: turn back keys from a window before the block on, as `subquad.ops.rope.tables_back` gives t of them.
        state: rows of a pool; its ring is written behind the committed tokens.
        scale: factor on the scores.
        linear_bgfv: the linear state behind the window with its mass in the last channel, and `maps`; None for none.
        maps: of it.
    """
    return _kernels.read(q_bthk, k_btgk, v_btgk, tables, back, state, scale, linear_bgfv, maps)


def absorb_(state: RingState, n_b: Tensor, time: int, back: Tables | None, linear_bgfv: Tensor, maps: Maps) -> None:
    """Bring into the linear state, in place, what leaves the window when the last block's first `n_b` tokens stay.

    Args:
        state: the rows that were read; they are not counted yet.
        n_b: int64 ``[b]``.
        time: t of that block.
        back, linear_bgfv, maps: as in `read`.
    """
    _kernels.absorb_(state, n_b, time, back, linear_bgfv, maps)
