"""A recurrent layer's rows as they decode: the last block read stays beside the state until the next replays it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from subquad.core.layout import Layout
from subquad.core.mixer import Counts, Update
from subquad.core.state import State, axes
from subquad.ops import decode
from subquad.ops.conv_qkv import ConvQKV, RecurrentState
from subquad.ops.decode import Block, DecodeState, Rule, Weights


@dataclass(frozen=True)
class ReplayState(State):
    """States without the last block read, and what of it is kept: `RecurrentState` in the form that decodes fastest.

    A read carries out the commit before it in its own pass over the state, so that a step reads and writes each state
    once, and no state is ever copied for a token. It holds one block: only the last read's update can be committed.
    """

    held: DecodeState = axes("b")
    seen_b: Tensor = axes("b", precision="index")
    pending_b: Tensor = axes("b", precision="index")

    def settled(self) -> RecurrentState:
        """The state with the kept tokens in it."""
        held, b = self.held.snapshot(), len(self.seen_b)
        none = held.keys_bnhk.new_zeros(b, 0, *held.keys_bnhk.shape[2:])
        g_bthk = held.decays_bnhk.new_zeros(b, 0, *held.decays_bnhk.shape[2:])
        v_bthv = held.values_bnhv.new_zeros(b, 0, *held.values_bnhv.shape[2:])
        block, rule = Block(none, none, v_bthv, g_bthk), Rule(delta=False)
        decode.advance_(block, held, rule, Weights(), self.seen_b, self.pending_b)
        width = max(held.inputs_brd.shape[1] - held.block, 0)
        rows = torch.arange(b, device=self.seen_b.device)
        return RecurrentState(
            held.recurrent_bhkv, held.conv(rows, self.seen_b + self.pending_b, width + 1).contiguous()
        )

    def adopt(self, other: Any) -> ReplayState:
        """Committed states with nothing pending, or rows of such a pool."""
        if isinstance(other, ReplayState):
            return other
        assert isinstance(other, RecurrentState)
        rows = torch.arange(len(other.recurrent_bhkv), device=self.seen_b.device)
        held = self.held.map(lambda t, _: t.new_zeros(len(rows), *t.shape[1:]))
        # The convolution's inputs stand right before position `seen_b`, whatever it is, if there is room before it.
        seen_b = torch.full_like(rows, other.conv_bdw.shape[2])
        held.load_(rows, other.recurrent_bhkv, other.conv_bdw, seen_b)
        return ReplayState(held, seen_b, torch.zeros_like(seen_b))


@dataclass(frozen=True)
class ReplayUpdate(Update):
    """The block that its state holds."""

    state: ReplayState
    layout: Layout

    def commit(self, n_b: Tensor | None = None) -> RecurrentState:
        """The state behind the kept tokens, without anything pending."""
        n_b = self.layout.lengths_b if n_b is None else n_b
        return ReplayState(self.state.held, self.state.seen_b, n_b).settled()

    def commit_(self, pool: State, rows: Tensor | None = None, n_b: Tensor | None = None) -> None:
        """Note how many tokens are kept; the next read carries it out. Without `rows`, `pool` is what was read."""
        n_b = self.layout.lengths_b if n_b is None else n_b
        self.store_(pool, rows, n_b).count_(n_b)

    def store_(self, pool: State, rows: Tensor | None, n_b: Tensor) -> Counts:
        """Nothing where the pool is what was read; see `Update.store_`."""
        if isinstance(pool, ReplayState) and rows is None:
            return Counts(put=(pool.pending_b[: len(n_b)],))
        kept = ReplayState(self.state.held, self.state.seen_b, n_b)
        pool.write_(rows, kept if isinstance(pool, ReplayState) else kept.settled())
        return Counts()


def init_pool(qkv: ConvQKV, rows: int, block: int, *, key_decay: bool = False, **factory: Any) -> State:
    """Empty rows that read blocks of up to `block` tokens; the plain form where a layer's heads are normed or turned.

    Args:
        qkv: the layer's projections.
        rows: of the pool.
        block: most tokens of a read that leaves them pending.
        key_decay: each key channel has its own log decay.
        factory: ``device`` and ``dtype``.
    """
    if qkv.q_norm is not None or qkv.rotary is not None:
        return qkv.init_state(rows, **factory)
    held = decode.init_pool(
        rows,
        block,
        heads=qkv.n_heads,
        q_heads=qkv.q_heads,
        k_heads=qkv.k_heads,
        v_heads=qkv.v_heads,
        key_dim=qkv.key_dim,
        value_dim=qkv.value_dim,
        conv_width=0 if qkv.conv_weight is None else qkv.conv_weight.shape[1],
        key_decay=key_decay,
        **factory,
    )
    seen_b = torch.zeros(rows, dtype=torch.int64, device=factory["device"])
    return ReplayState(held, seen_b, seen_b.clone())


def advance(
    qkv: ConvQKV,
    rule: Rule,
    vkq: tuple[Tensor, Tensor, Tensor],
    g_bthk: Tensor,
    beta_bth: Tensor | None,
    state: ReplayState,
    layout: Layout,
    skip_h: Tensor | None = None,
) -> tuple[Tensor, ReplayUpdate]:
    """Outputs ``[b, t, h, v]`` of a block behind the pending commit, and its update.

    Args:
        qkv: the layer's projections, with its convolution.
        rule: its recurrence.
        vkq: projections of the block, ``[b, t, n]`` each.
        g_bthk, beta_bth, skip_h: as `subquad.ops.decode` takes them.
        state: rows of a pool.
        layout: the block's, one document a row.
    """
    assert layout.documents_bt is None
    v, k, q = (x.unflatten(-1, (-1, w)) for x, w in zip(vkq, (qkv.value_dim, qkv.key_dim, qkv.key_dim), strict=True))
    weights = Weights(qkv.conv_weight, qkv.conv_bias, skip_h)
    block = Block(q, k, v, g_bthk, beta_bth)
    y_bthv = decode.advance_(block, state.held, rule, weights, state.seen_b, state.pending_b)
    state.seen_b.add_(state.pending_b)
    state.pending_b.zero_()
    return y_bthv, ReplayUpdate(state, layout)
