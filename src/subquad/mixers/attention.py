"""Softmax attention: grouped queries, RoPE, QK norms, biases; full, or a sliding window with sinks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from subquad.core.attention import AttentionStats, AttentionWeights, RotarySpec
from subquad.core.card import Card
from subquad.core.config import config_from_dict
from subquad.core.errors import ConfigError
from subquad.core.layout import Layout
from subquad.core.mixer import NOTHING, Counts, Mixer, Shared, Update
from subquad.core.state import State, axes
from subquad.ops import attention, cached, ring, skinny, slide, windowed
from subquad.ops.qkv import QKV
from subquad.ops.ring import RingState, RingUpdate
from subquad.ops.window import WindowState

CARD = Card(
    title="Attention Is All You Need",
    entry="Attention",
    arxiv="1706.03762",
    gives="exact recall of everything, at a cost that grows with the context; a window with sinks bounds it",
    status="incubating",
    claim="a model built on attention alone beats recurrent ones in translation at a fraction of the training cost",
    measured="not reproduced: here it is the teacher's own layer, whose logits equal those of transformers",
    from_attention=True,
    examples={
        "full": {
            "d_model": 32,
            "n_heads": 4,
            "n_kv_heads": 2,
            "head_dim": 8,
            "rotary": {"theta": 10000.0, "dim": 8},
            "qkv_bias": True,
            "qk_norm": True,
        },
        "window": {
            "d_model": 32,
            "n_heads": 4,
            "n_kv_heads": 1,
            "head_dim": 8,
            "rotary": {"theta": 10000.0, "dim": 4},
            "window": 7,
        },
        "sinks": {"d_model": 32, "n_heads": 2, "n_kv_heads": 2, "head_dim": 8, "window": 6, "sinks": 3},
    },
)

# Up to this many queries the scores over the cache are held, and the cache is read in place.
FEW_QUERIES = 16


@dataclass(frozen=True)
class CacheState(State):
    """Keys and values of all tokens, in buffers of a fixed capacity n."""

    k_bgnk: Tensor = axes("b g n k", shard="g", grows="n")
    v_bgnk: Tensor = axes("b g n k", shard="g", grows="n")
    seen_b: Tensor = axes("b", precision="index")


@dataclass(frozen=True)
class CacheUpdate(Update):
    """Keys and values of one block, heads first."""

    state: CacheState
    k_bgtk: Tensor
    v_bgtk: Tensor
    layout: Layout

    def commit(self, n_b: Tensor | None = None) -> State:
        """Copy the buffers and write the kept tokens behind what they hold."""
        n_b = self.layout.lengths_b if n_b is None else n_b
        cached.check_room(self.layout, self.state.seen_b, n_b, self.state.k_bgnk.shape[2], "attention cache")
        new = self.state.map(lambda t, _: t.clone())
        self._write_(new, None, n_b, self.k_bgtk, self.v_bgtk)
        return new

    def commit_(self, pool: State, rows: Tensor | None = None, n_b: Tensor | None = None) -> None:
        """Write only the block's own tokens; the cache is not touched elsewhere.

        Whether they fit is not asked, since the answer would have to come from the device: who owns the pool knows it.
        """
        assert isinstance(pool, CacheState)
        n_b = self.layout.lengths_b if n_b is None else n_b
        self._write_(pool, rows, n_b, self.k_bgtk.detach(), self.v_bgtk.detach())

    def _write_(self, pool: CacheState, rows: Tensor | None, n_b: Tensor, k_bgtk: Tensor, v_bgtk: Tensor) -> None:
        where = cached.places(self.layout, pool.seen_b, n_b, rows)
        cached.append_(pool.k_bgnk, pool.v_bgnk, pool.seen_b, k_bgtk, v_bgtk, n_b, rows, **where)


@dataclass(frozen=True)
class CachePool(CacheState):
    """A cache for decoding: a read of few tokens writes them behind those seen, so that a commit only counts.

    So only the last read's update can be committed.
    """

    def settled(self) -> CacheState:
        """The same buffers as a cache that reads leave alone."""
        return CacheState(self.k_bgnk, self.v_bgnk, self.seen_b)


@dataclass(frozen=True)
class CachePoolUpdate(Update):
    """A block that stands in its state's cache, behind the tokens seen."""

    state: CachePool
    layout: Layout

    def commit(self, n_b: Tensor | None = None) -> State:
        """A cache that holds the kept tokens; see `CacheUpdate.commit`."""
        return self._block().commit(n_b)

    def commit_(self, pool: State, rows: Tensor | None = None, n_b: Tensor | None = None) -> None:
        """Count the kept tokens. Without `rows`, a pool of this form is what was read."""
        n_b = self.layout.lengths_b if n_b is None else n_b
        self.store_(pool, rows, n_b).count_(n_b)

    def store_(self, pool: State, rows: Tensor | None, n_b: Tensor) -> Counts:
        """Nothing where the pool is what was read; see `Update.store_`."""
        if rows is None and isinstance(pool, CachePool):
            return Counts(added=(pool.seen_b[: len(n_b)],))
        self._block().commit_(pool, rows, n_b)
        return Counts()

    def _block(self) -> CacheUpdate:
        """The block taken out again. What found no room is wrong, and `CacheUpdate.commit` refuses to keep it."""
        state, last = self.state, self.state.k_bgnk.shape[2] - 1
        columns_t = torch.arange(self.layout.shape[1], device=state.seen_b.device)
        slot_b1t1 = (state.seen_b[:, None] + columns_t).clamp(max=last)[:, None, :, None]
        buffers = state.k_bgnk, state.v_bgnk
        k_bgtk, v_bgtk = (x.gather(2, slot_b1t1.expand(-1, x.shape[1], -1, x.shape[3])) for x in buffers)
        return CacheUpdate(state.settled(), k_bgtk, v_bgtk, self.layout)


@dataclass(frozen=True)
class WindowUpdate(Update):
    """Keys and values of one block, to be shifted into the window."""

    state: WindowState
    k_bgtk: Tensor
    v_bgtk: Tensor
    layout: Layout

    def commit(self, n_b: Tensor | None = None) -> State:
        """Shift the window by the kept tokens and fill the sinks that have come."""
        return self.state.after(self.k_bgtk, self.v_bgtk, self.layout, self.layout.lengths_b if n_b is None else n_b)

    def commit_(self, pool: State, rows: Tensor | None = None, n_b: Tensor | None = None) -> None:
        """The same in place, in one launch where rows of one document go into others."""
        if rows is None or self.layout.documents_bt is not None or not slide.takes(self.k_bgtk):
            super().commit_(pool, rows, n_b)
            return
        assert isinstance(pool, (WindowState, RingState))
        n_b = self.layout.lengths_b if n_b is None else n_b
        slide.write_(pool, rows, self.state, self.k_bgtk.detach(), self.v_bgtk.detach(), n_b)


class WindowRingUpdate(RingUpdate):
    """A block before a window alone."""

    def absorb_(self, state: Any, n_b: Tensor) -> Tensor:
        """Nothing: it is forgotten."""
        return state.seen_b


class Attention(Mixer):
    """Softmax attention, ``softmax(scale q k^T) v`` per head (arXiv 1706.03762, equation 1).

    Grouped queries (2305.13245), RoPE (2104.09864), QK norms (2302.05442), sinks (2309.17453).

    Example:
        >>> import torch
        >>> mixer = Attention(Attention.Config(d_model=64, n_heads=4, n_kv_heads=2, head_dim=16))
        >>> state = mixer.init_state(batch=2, capacity=8)
        >>> y, update = mixer.read(torch.randn(2, 3, 64), state)
        >>> update.commit(torch.tensor([3, 1])).seen_b
        tensor([3, 1])
    """

    @dataclass(frozen=True)
    class Config:
        """Shape and numerics.

        Attributes:
            d_model: width of the model.
            n_heads, n_kv_heads, head_dim: query heads, key/value heads, channels of a head.
            rotary: fields of `RotarySpec`, or None for no position embedding.
            qkv_bias, o_bias, qk_norm, norm_eps: as the checkpoint has them.
            window: tokens a query may see, itself included; None is all.
            sinks: first tokens that stay visible behind the window.
            scale: factor on the scores, by default ``head_dim ** -0.5``.
        """

        d_model: int
        n_heads: int
        n_kv_heads: int
        head_dim: int
        rotary: Mapping[str, Any] | None = None
        qkv_bias: bool = False
        o_bias: bool = False
        qk_norm: bool = False
        norm_eps: float = 1e-6
        window: int | None = None
        sinks: int = 0
        scale: float | None = None

        def __post_init__(self) -> None:
            """Refuse combinations that mean nothing."""
            if self.window is not None and self.window < 1:
                raise ConfigError(f"window={self.window} must be at least 1; leave it out for full attention")
            if self.window is None and self.sinks:
                raise ConfigError(f"sinks={self.sinks} needs a window, got none; set window or sinks=0")

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.qkv = QKV(
            config.d_model,
            config.n_heads,
            config.n_kv_heads,
            config.head_dim,
            bias=config.qkv_bias,
            norm=config.qk_norm,
            norm_eps=config.norm_eps,
            rotary=None if config.rotary is None else RotarySpec(**config.rotary),
        )
        self.o_proj = nn.Linear(config.n_heads * config.head_dim, config.d_model, bias=config.o_bias)
        self.scale = config.head_dim**-0.5 if config.scale is None else config.scale

    def init_state(self, batch: int, capacity: int = 0, **factory: Any) -> CacheState | WindowState:
        """Buffers for `capacity` tokens, or for the window and sinks."""
        config, like = self.config, self.factory(**factory)
        if config.window is not None:
            return WindowState.empty(batch, config.n_kv_heads, config.window, config.sinks, config.head_dim, **like)
        k_bgnk = torch.zeros(batch, config.n_kv_heads, capacity, config.head_dim, **like)
        return CacheState(k_bgnk, k_bgnk.clone(), torch.zeros(batch, dtype=torch.int64, device=like["device"]))

    def init_pool(self, rows: int, capacity: int, block: int, **factory: Any) -> State:
        """A cache that reads write ahead in, or a window as a ring where its kernels run."""
        config, like = self.config, self.factory(**factory)
        if config.window is None or not ring.runs(like["device"], like["dtype"], config.head_dim):
            state = self.init_state(rows, capacity, **factory)
            return CachePool(state.k_bgnk, state.v_bgnk, state.seen_b) if isinstance(state, CacheState) else state
        return RingState.empty(rows, config.n_kv_heads, config.window, config.sinks, config.head_dim, block, **like)

    def read(
        self, x_btd: Tensor, state: State, layout: Layout | None = None, shared: Shared = NOTHING
    ) -> tuple[Tensor, Update]:
        """Attend to the state and, causally, to the block; see `Mixer.read`."""
        layout = self.dense_layout(x_btd, layout)
        if self._few(x_btd, state, layout):
            return self._step(x_btd, state, layout)
        if isinstance(state, RingState):
            state = state.settled()
        q_bthk, k_btgk, v_btgk = self.qkv(x_btd, layout)
        k_bgtk, v_bgtk = k_btgk.transpose(1, 2), v_btgk.transpose(1, 2)
        if isinstance(state, WindowState):
            y_bthk = self._slide(q_bthk, k_btgk, v_btgk, None if layout.fresh else state, layout)
            update: Update = WindowUpdate(state, k_bgtk, v_bgtk, layout)
        else:
            assert isinstance(state, CacheState)
            if state.k_bgnk.shape[2] == 0 and layout.documents_bt is None:
                y_bthk = attention.causal(q_bthk, k_btgk, v_btgk, self.scale)
            else:
                y_bthk = self._read_cache(q_bthk, k_bgtk, v_bgtk, state, layout)
            update = CacheUpdate(state, k_bgtk, v_bgtk, layout)
        return skinny.project(y_bthk.flatten(2), self.o_proj)[0], update

    def read_stream(
        self, x_btd: Tensor, norm: nn.RMSNorm, state: State, layout: Layout
    ) -> tuple[Tensor, Update] | None:
        """Few tokens, as in decoding; see `Mixer.read_stream`."""
        return self._step(x_btd, state, layout, norm) if self._few(x_btd, state, layout) else None

    def forward(self, x_btd: Tensor, layout: Layout | None = None, shared: Shared = NOTHING) -> Tensor:
        """The training form; a window starts with nothing before the block."""
        if self.config.window is None:
            return super().forward(x_btd, layout, shared)
        layout = self.dense_layout(x_btd, layout)
        q_bthk, k_btgk, v_btgk = self.qkv(x_btd, layout)
        return self.o_proj(self._slide(q_bthk, k_btgk, v_btgk, None, layout).flatten(2))

    def mix_values(self, x_btd: Tensor, v_bthv: Tensor, layout: Layout | None = None) -> Tensor:
        """Softmax attention over given values; see `Mixer.mix_values`."""
        layout = self.dense_layout(x_btd, layout)
        q_bthk, k_btgk, _ = self.qkv(x_btd, layout)
        k_bthk = attention.expand_heads(k_btgk, self.config.n_heads)
        if self.config.window is not None:
            return self._slide(q_bthk, k_bthk, v_bthv, None, layout)
        if layout.documents_bt is None:
            return attention.causal(q_bthk, k_bthk, v_bthv, self.scale)
        columns_t = torch.arange(x_btd.shape[1], device=x_btd.device)
        one_btt = layout.documents_bt[:, :, None] == layout.documents_bt[:, None]
        k_bhtk, v_bhtv = k_bthk.transpose(1, 2), v_bthv.transpose(1, 2)
        return attention.masked(q_bthk, k_bhtk, v_bhtv, one_btt & (columns_t[:, None] >= columns_t), self.scale)

    def _slide(
        self, q_bthk: Tensor, k_btgk: Tensor, v_btgk: Tensor, past: WindowState | None, layout: Layout
    ) -> Tensor:
        assert self.config.window is not None
        size, sinks = self.config.window, self.config.sinks
        return windowed.attend(q_bthk, k_btgk, v_btgk, None, past, layout, window=size, sinks=sinks, scale=self.scale)

    def _few(self, x_btd: Tensor, state: State, layout: Layout) -> bool:
        """Whether `_step` takes the block."""
        t = x_btd.shape[1]
        room = (
            t <= state.block
            if isinstance(state, RingState)
            else isinstance(state, CacheState) and state.k_bgnk.shape[2]
        )
        return bool(room) and t <= FEW_QUERIES and layout.documents_bt is None and not torch.is_grad_enabled()

    def _step(
        self, x_btd: Tensor, state: State, layout: Layout, norm: nn.RMSNorm | None = None
    ) -> tuple[Tensor, Update]:
        """Few tokens, as in decoding, behind `norm` where one is given."""
        q_bthk, k_btgk, v_btgk = self.qkv.project(x_btd, norm)
        tables = self.qkv.tables(layout, q_bthk.dtype)
        if isinstance(state, RingState):
            y_bthk = ring.read(q_bthk, k_btgk, v_btgk, tables, None, state, self.scale)
            update: Update = WindowRingUpdate(state, layout)
        else:
            assert isinstance(state, CacheState)
            k_bgtk, v_bgtk = k_btgk.transpose(1, 2), v_btgk.transpose(1, 2)
            block = q_bthk, k_bgtk, v_bgtk, state.k_bgnk, state.v_bgnk, state.seen_b, self.scale, tables
            if isinstance(state, CachePool):
                y_bthk, update = cached.attend_(*block), CachePoolUpdate(state, layout)
            else:
                y_bthk, k_bgtk = cached.attend(*block)
                update = CacheUpdate(state, k_bgtk, v_bgtk, layout)
        return skinny.project(y_bthk.flatten(2), self.o_proj)[0], update

    def _read_cache(self, q_bthk: Tensor, k_bgtk: Tensor, v_bgtk: Tensor, state: CacheState, layout: Layout) -> Tensor:
        t = q_bthk.shape[1]
        cached_btn, block_btt = cached.visible(state.seen_b, t, state.k_bgnk.shape[2])
        if layout.documents_bt is not None:
            cached_btn = cached_btn & (layout.documents_bt == 0)[..., None]
            block_btt = block_btt & (layout.documents_bt[:, :, None] == layout.documents_bt[:, None])
        if t <= FEW_QUERIES:
            parts = [(state.k_bgnk, state.v_bgnk, cached_btn), (k_bgtk, v_bgtk, block_btt)]
            return attention.pieces(q_bthk, parts, self.scale)[0]
        return attention.masked(
            q_bthk,
            torch.cat((state.k_bgnk, k_bgtk), dim=2),
            torch.cat((state.v_bgnk, v_bgtk), dim=2),
            torch.cat((cached_btn, block_btt), dim=2),
            self.scale,
        )

    def weights(self) -> AttentionWeights:
        """This attention as plain data, sharing its tensors."""
        qkv, config = self.qkv, self.config
        return AttentionWeights(
            q_weight=qkv.q_proj.weight,
            k_weight=qkv.k_proj.weight,
            v_weight=qkv.v_proj.weight,
            o_weight=self.o_proj.weight,
            n_heads=config.n_heads,
            n_kv_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            scale=self.scale,
            q_bias=qkv.q_proj.bias,
            k_bias=qkv.k_proj.bias,
            v_bias=qkv.v_proj.bias,
            o_bias=self.o_proj.bias,
            q_norm=None if qkv.q_norm is None else qkv.q_norm.weight,
            k_norm=None if qkv.k_norm is None else qkv.k_norm.weight,
            norm_eps=config.norm_eps,
            rotary=qkv.rotary,
            window=config.window,
        )

    @classmethod
    def from_attention(cls, source: AttentionWeights, stats: AttentionStats | None = None, **options: Any) -> Self:
        """The same attention, or with `window` and `sinks` among the options a cut one."""
        values = source.config_fields() | {"window": source.window} | options
        mixer = cls(config_from_dict(cls.Config, values, where="mixer attention")).to(source.q_weight)
        mixer.qkv.take_(source)
        with torch.no_grad():
            mixer.o_proj.weight.copy_(source.o_weight)
            if source.o_bias is not None:
                mixer.o_proj.bias.copy_(source.o_bias)
        return mixer
