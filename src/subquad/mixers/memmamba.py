"""MemMamba: Mamba that writes notes of important tokens into a bounded pool, and reads them where it has forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.core.card import Card
from subquad.core.errors import ConfigError
from subquad.core.layout import Layout
from subquad.core.mixer import NOTHING, Mixer, Shared, Update
from subquad.core.state import State, axes
from subquad.ops import skinny, summaries
from subquad.ops.selective_ssm import SelectiveSSM, SelectiveState, SelectiveUpdate
from subquad.ops.summaries import Notes, Pool

CARD = Card(
    title="MemMamba: Rethinking Memory Patterns in State Space Model",
    entry="MemMamba",
    arxiv="2510.03279",
    gives="Mamba with a bounded pool of notes, attention over it and those of layers below, and a constant state",
    status="incubating",
    claim="lower perplexity on PG19 and better passkey retrieval than Mamba far beyond the training length",
    measured="not reproduced: trained for minutes on one H100 it is 1.8 % behind Mamba at every length",
    result="memmamba.h100.json",
    constant_state=True,
    examples={
        "paper": {"d_model": 16, "state_dim": 4, "summary_dim": 6, "pool": 5},
        "eager": {"d_model": 12, "state_dim": 2, "summary_dim": 3, "pool": 1, "take_above": 0.2, "recall_above": 0.0},
    },
)


@dataclass(frozen=True)
class MemMambaState(State):
    """Mamba's state, and the pool."""

    ssm: SelectiveState = axes("b")
    pool: Pool = axes("b")


@dataclass(frozen=True)
class MemMambaUpdate(Update):
    """One block's inputs to the scan, its notes and which of them are taken, and the pool behind all of it."""

    ssm: SelectiveUpdate
    pool: Pool
    summary_btm: Tensor
    taken_bt: Tensor
    layout: Layout

    def commit(self, n_b: Tensor | None = None) -> MemMambaState:
        """Run the kept tokens through the scan, and take the notes among them."""
        notes = Notes(self.summary_btm, self.taken_bt, self.pool)
        return MemMambaState(self.ssm.commit(n_b), summaries.final_pool(notes, self.layout, n_b))

    def offers(self) -> Shared:
        """The notes, from which a layer above knows the pool as any of the block's tokens finds it."""
        pool = self.pool
        return {"notes": self.summary_btm, "taken": self.taken_bt, "pool": pool.summaries_bpm, "held": pool.held_b}


class MemMamba(Mixer):
    """Mamba of ``x_t + f_t fuse(c_t)``, where c is what x recalls of the pool and f how much it wants to.

    Section 4 of arXiv 2510.03279. With ``i = sigmoid(importance(x))`` a token's note ``i note(x)`` enters the pool if
    ``i > take_above``, and the oldest leaves; ``f = sigmoid(forgotten(x))`` counts where it is above `recall_above`. A
    token sees the notes of those before it, in the layer's own pool and in those of `below` layers below it. Mamba is
    that of `SelectiveSSM`.

    Example:
        >>> import torch
        >>> mixer = MemMamba(MemMamba.Config(d_model=32, pool=8))
        >>> state = mixer.init_state(batch=2)
        >>> y, update = mixer.read(torch.randn(2, 3, 32), state)
        >>> update.commit(torch.tensor([3, 1])).pool.summaries_bpm.shape
        torch.Size([2, 8, 64])
    """

    @dataclass(frozen=True)
    class Config:
        """Shape and thresholds; the defaults are the paper's where it gives them.

        Attributes:
            d_model: width of the model.
            d_inner: channels; None is twice the width.
            state_dim: entries of a channel's state.
            dt_rank: rank of the step's projection; None is a sixteenth of the width, rounded up.
            conv_width: taps of the convolution.
            summary_dim: width of a note.
            pool: notes that are kept.
            take_above: importance above which a note is taken, from 0 to 1.
            recall_above: wish above which the pool is read, from 0 to 1.
            below: of how many MemMamba layers below it, the nearest ones, a layer reads the pools beside its own.
        """

        d_model: int
        d_inner: int | None = None
        state_dim: int = 16
        dt_rank: int | None = None
        conv_width: int = 4
        summary_dim: int = 64
        pool: int = 50
        take_above: float = 0.5
        recall_above: float = 0.5
        below: int = 0

        def __post_init__(self) -> None:
            """Refuse a pool that holds nothing, and thresholds that no probability passes."""
            for name, size in (("summary_dim", self.summary_dim), ("pool", self.pool)):
                if size < 1:
                    raise ConfigError(f"{name}: expected at least 1, got {size}; mamba1 is the layer without a pool")
            for name, value in (("take_above", self.take_above), ("recall_above", self.recall_above)):
                if not 0 <= value < 1:
                    raise ConfigError(f"{name}: expected at least 0 and below 1, got {value}; 0.5 is even odds")
            if self.below < 0:
                raise ConfigError(f"below: expected at least 0, got {self.below}; 0 is the layer's own pool alone")

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        d_inner = 2 * config.d_model if config.d_inner is None else config.d_inner
        dt_rank = -(-config.d_model // 16) if config.dt_rank is None else config.dt_rank
        self.ssm = SelectiveSSM(d_inner, config.state_dim, dt_rank, config.conv_width, conv_bias=True)
        self.in_proj = nn.Linear(config.d_model, 2 * d_inner, bias=False)
        self.out_proj = nn.Linear(d_inner, config.d_model, bias=False)
        self.importance = nn.Linear(config.d_model, 1)
        self.forgotten = nn.Linear(config.d_model, 1)
        self.note = nn.Linear(config.d_model, config.summary_dim, bias=False)
        self.query = nn.Linear(config.d_model, config.summary_dim, bias=False)
        self.fuse = nn.Linear(config.summary_dim, config.d_model, bias=False)
        nn.init.zeros_(self.fuse.weight)

    def init_state(self, batch: int, capacity: int = 0, **factory: Any) -> MemMambaState:
        """Zeros and an empty pool; `capacity` is not needed."""
        made = self.factory(**factory)
        notes = torch.zeros(batch, self.config.pool, self.config.summary_dim, **made)
        held_b = torch.zeros(batch, dtype=torch.int64, device=made["device"])
        return MemMambaState(self.ssm.init_state(batch, **made), Pool(notes, held_b))

    def sources(self, lower: Sequence[Mixer]) -> Sequence[int]:
        """The nearest MemMamba layers, as many as `Config.below` says, the nearest first; see `Mixer.sources`."""
        below, width = self.config.below, self.config.summary_dim
        if not below:
            return ()
        found = [(i, mixer.config.summary_dim) for i, mixer in enumerate(lower) if isinstance(mixer, MemMamba)]
        if len(found) < below:
            raise ConfigError(
                f"layer {len(lower)}: expected below of at most {len(found)}, the memmamba layers under it, got "
                f"{below}; lower it, or make the layer a higher one"
            )
        for i, theirs in found[-below:]:
            if theirs != width:
                raise ConfigError(
                    f"layer {len(lower)}: expected summary_dim={theirs}, as in layer {i} whose notes it reads, got "
                    f"{width}; give both the same"
                )
        return [i for i, _ in reversed(found[-below:])]

    def _lower(self, shared: Shared) -> list[Notes]:
        """The notes of the layers below."""
        below = self.config.below
        if below and f"{below - 1}.notes" not in shared:
            raise ConfigError(
                f"shared: expected what {below} memmamba layers below offer, got {sorted(shared) or 'nothing'}; run "
                "the layer in a Stack, or set below to 0"
            )
        of = [[shared[f"{k}.{name}"] for name in ("notes", "taken", "pool", "held")] for k in range(below)]
        return [Notes(notes_btm, taken_bt, Pool(*pool)) for notes_btm, taken_bt, *pool in of]

    def read(
        self, x_btd: Tensor, state: State, layout: Layout | None = None, shared: Shared = NOTHING
    ) -> tuple[Tensor, Update]:
        """Recall, then run the block through convolution and scan; see `Mixer.read`."""
        assert isinstance(state, MemMambaState)
        layout, config = self.dense_layout(x_btd, layout), self.config
        importance_bt1, wish_bt1 = self.importance(x_btd).sigmoid(), self.forgotten(x_btd).sigmoid()
        taken_bt = importance_bt1[..., 0] > config.take_above
        summary_btm = importance_bt1 * self.note(x_btd)
        notes = Notes(summary_btm, taken_bt, state.pool)
        recalled_btm = summaries.read(self.query(x_btd), [notes, *self._lower(shared)], layout.documents_bt)
        wish_bt1 = wish_bt1.masked_fill(wish_bt1 <= config.recall_above, 0)
        x_btd = x_btd + wish_bt1 * self.fuse(recalled_btm)
        x_btd, z_btd = skinny.project(x_btd, self.in_proj)[0].chunk(2, dim=-1)
        y_btd, update = self.ssm(x_btd, state.ssm, layout)
        y_btd = skinny.project(y_btd * F.silu(z_btd), self.out_proj)[0]
        return y_btd, MemMambaUpdate(update, state.pool, summary_btm, taken_bt, layout)
