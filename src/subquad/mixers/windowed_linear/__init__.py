"""Softmax over the last tokens and the sinks, a linear state for all before, joined in one normaliser."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from subquad.core.attention import AttentionStats, AttentionWeights, RotarySpec
from subquad.core.card import Card
from subquad.core.config import config_from_dict
from subquad.core.errors import ConfigError, UnsupportedError
from subquad.core.layout import Layout
from subquad.core.mixer import NOTHING, Mixer, Shared, Update
from subquad.core.state import State, precise
from subquad.mixers.windowed_linear import start
from subquad.mixers.windowed_linear.state import (
    LinearRingState,
    LinearRingUpdate,
    WindowedLinearState,
    WindowedLinearUpdate,
)
from subquad.ops import attention, ring, rope, skinny, windowed
from subquad.ops.qkv import QKV
from subquad.ops.ring import RingState
from subquad.ops.window import Far, WindowState

CARD = Card(
    title="LoLCATs: On Low-Rank Linearizing of Large Language Models",
    entry="WindowedLinear",
    arxiv="2410.10254",
    gives="attention's local precision and its sinks exactly, everything older in a state of constant size",
    status="incubating",
    claim="closes 77.8 % and 78.1 % of the gap between linearised and original Llama 3.1 70B and 405B, 5-shot MMLU",
    measured="not reproduced at that size; wins back 87 % of what windows alone cost half of SmolLM2-135M's layers",
    result="quickstart.cpu.json",
    from_attention=True,
    constant_state=True,
    examples={
        "grouped": {
            "d_model": 32,
            "n_heads": 4,
            "n_kv_heads": 2,
            "head_dim": 8,
            "features": 6,
            "window": 7,
            "sinks": 2,
            "rotary": {"theta": 10000.0, "dim": 8},
            "qkv_bias": True,
            "qk_norm": True,
        },
        "bare": {"d_model": 32, "n_heads": 2, "n_kv_heads": 2, "head_dim": 8, "features": 4, "window": 1, "sinks": 0},
    },
)

# Log weight of a feature when nothing is known of the text: a few hundred old tokens count as much as one near one.
QUIET = -5.0


class WindowedLinear(Mixer):
    """Exact attention nearby, a linear state for the rest, one softmax-like normaliser over both.

    ``o_t = (sum_near e^(s q.k_j) v_j + phi(q_t) S) / (sum_near e^(s q.k_j) + phi(q_t) z)``, where near are the last w
    tokens and the first s, and ``S = sum phi_k(k_j) v_j^T``, ``z = sum phi_k(k_j)`` run over all others before
    (after arXiv 2410.10254, equation 6). ``phi_k = softmax(W_k k / sqrt(d) + b_k)`` assigns a key softly to one of f
    features, and ``phi(q) = (1 + n / w)^-a exp(W_q q / sqrt(d) + b_q)`` weighs them, both before RoPE, n the number of
    far tokens and a of its own for each query head: softmax gives an old token the less the more there are of them, and
    a sum without that outgrows the window with the length. From a teacher's text the rows of ``W`` start as centroids
    of its keys.

    Example:
        >>> import torch
        >>> config = WindowedLinear.Config(d_model=64, n_heads=4, n_kv_heads=2, head_dim=16, window=8, sinks=2)
        >>> mixer = WindowedLinear(config)
        >>> mixer(torch.randn(1, 100, 64)).shape
        torch.Size([1, 100, 64])
    """

    @dataclass(frozen=True)
    class Config:
        """Shape and numerics; the fields of attention, and

        Attributes:
            window: tokens seen exactly, the query's own included.
            sinks: first tokens seen exactly for ever.
            features: f, rows of the linear state.
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
        window: int = 64
        sinks: int = 4
        features: int = 64
        scale: float | None = None

        def __post_init__(self) -> None:
            """Refuse sizes that mean nothing."""
            if self.window < 1 or self.sinks < 0 or self.features < 1:
                raise ConfigError(
                    f"expected window >= 1, sinks >= 0 and features >= 1, got {self.window}, {self.sinks} and "
                    f"{self.features}; the published range is a window of 16 to 128"
                )

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        h, g, k, f = config.n_heads, config.n_kv_heads, config.head_dim, config.features
        self.qkv = QKV(
            config.d_model,
            h,
            g,
            k,
            bias=config.qkv_bias,
            norm=config.qk_norm,
            norm_eps=config.norm_eps,
            rotary=None if config.rotary is None else RotarySpec(**config.rotary),
        )
        self.o_proj = nn.Linear(h * k, config.d_model, bias=config.o_bias)
        self.scale = k**-0.5 if config.scale is None else config.scale
        self.k_map_weight = nn.Parameter(0.3 * torch.randn(g, k, f))
        self.k_map_bias = nn.Parameter(torch.zeros(g, f))
        self.q_map_weight = nn.Parameter(torch.zeros(h, k, f))
        self.q_map_bias = nn.Parameter(torch.full((h, f), QUIET))
        self.q_map_fade = nn.Parameter(torch.zeros(h))

    def init_state(self, batch: int, capacity: int = 0, **factory: Any) -> WindowedLinearState:
        """A state of constant size, whatever `capacity`."""
        config, like = self.config, self.factory(**factory)
        g, k, f = config.n_kv_heads, config.head_dim, config.features
        high: dict[str, Any] = like | {"dtype": precise(like["dtype"])}
        return WindowedLinearState(
            WindowState.empty(batch, g, config.window, config.sinks, k, **like),
            torch.zeros(batch, g, f, k + 1, **high),
        )

    def init_pool(self, rows: int, capacity: int, block: int, **factory: Any) -> State:
        """The window as a ring where its kernels run."""
        config, like = self.config, self.factory(**factory)
        g, k, f = config.n_kv_heads, config.head_dim, config.features
        if not ring.runs(like["device"], like["dtype"], k, f):
            return self.init_state(rows, capacity, **factory)
        high: dict[str, Any] = like | {"dtype": precise(like["dtype"])}
        return LinearRingState(
            RingState.empty(rows, g, config.window, config.sinks, k, block, **like),
            torch.zeros(rows, g, f, k + 1, **high),
        )

    @property
    def maps(self) -> ring.Maps:
        """What the linear state is read and written with."""
        keys, queries = (self.k_map_weight, self.k_map_bias), (self.q_map_weight, self.q_map_bias)
        return ring.Maps(*keys, *queries, self.q_map_fade)

    def tables_back(self, layout: Layout) -> tuple[Tensor, Tensor] | None:
        """What takes their position from the keys that may leave the window within a block."""
        if self.qkv.rotary is None:
            return None
        dtype = self.k_map_weight.dtype
        return rope.tables_back(self.qkv.rotary, layout, self.config.window, layout.shape[1], dtype)

    def read(
        self, x_btd: Tensor, state: State, layout: Layout | None = None, shared: Shared = NOTHING
    ) -> tuple[Tensor, Update]:
        """Attend to window and sinks, add what the linear state holds; see `Mixer.read`."""
        layout = self.dense_layout(x_btd, layout)
        if isinstance(state, LinearRingState):
            if x_btd.shape[1] <= state.ring.block and not torch.is_grad_enabled():
                return self._turn(x_btd, state, layout)
            state = state.settled()
        assert isinstance(state, WindowedLinearState)
        window_f_bgnf = None if layout.fresh else self._leaving_features(state.window, layout)
        past = None if window_f_bgnf is None else (state, window_f_bgnf)
        y_btd, k_btgk, v_btgk, f_btgf = self._mix(x_btd, past, layout)
        k_bgtk, v_bgtk, f_bgtf = (x.transpose(1, 2) for x in (k_btgk, v_btgk, f_btgf))
        if window_f_bgnf is None:
            # Any: an empty window has no token that could leave it.
            window_f_bgnf = f_bgtf[:, :, : self.config.window]
        return y_btd, WindowedLinearUpdate(state, window_f_bgnf, k_bgtk, v_bgtk, f_bgtf, layout)

    def read_stream(
        self, x_btd: Tensor, norm: nn.RMSNorm, state: State, layout: Layout
    ) -> tuple[Tensor, Update] | None:
        """Few tokens before a ring; see `Mixer.read_stream`."""
        if isinstance(state, LinearRingState) and x_btd.shape[1] <= state.ring.block and not torch.is_grad_enabled():
            return self._turn(x_btd, state, layout, norm)
        return None

    def _turn(
        self, x_btd: Tensor, state: LinearRingState, layout: Layout, norm: nn.RMSNorm | None = None
    ) -> tuple[Tensor, LinearRingUpdate]:
        """Few tokens before a ring, behind `norm` where one is given."""
        assert layout.documents_bt is None
        q_bthk, k_btgk, v_btgk = self.qkv.project(x_btd, norm)
        tables, back = self.qkv.tables(layout, q_bthk.dtype), self.tables_back(layout)
        block = q_bthk, k_btgk, v_btgk, tables, back
        y_bthk = ring.read(*block, state.ring, self.scale, state.linear_bgfv, self.maps)
        return skinny.project(y_bthk.flatten(2), self.o_proj)[0], LinearRingUpdate(state, layout, self)

    def forward(self, x_btd: Tensor, layout: Layout | None = None, shared: Shared = NOTHING) -> Tensor:
        """The training form: nothing stands before the block, and nothing is kept of it."""
        return self._mix(x_btd, None, self.dense_layout(x_btd, layout))[0]

    def mix_values(self, x_btd: Tensor, v_bthv: Tensor, layout: Layout | None = None) -> Tensor:
        """Window and linear state over given values; see `Mixer.mix_values`."""
        layout, h = self.dense_layout(x_btd, layout), self.config.n_heads
        plain_q_bthk, plain_k_btgk, _ = self.qkv.project(x_btd)
        q_bthk, k_btgk = self.qkv.rotate(plain_q_bthk, plain_k_btgk, layout)
        f_bthf = attention.expand_heads(self.key_features(plain_k_btgk), h)
        return windowed.attend(
            q_bthk,
            attention.expand_heads(k_btgk, h),
            v_bthv,
            Far(self._weights(plain_q_bthk, self._length_bt(layout)), f_bthf, bias_hf=self.q_map_bias),
            None,
            layout,
            window=self.config.window,
            sinks=self.config.sinks,
            scale=self.scale,
        )

    def _mix(
        self, x_btd: Tensor, past: tuple[WindowedLinearState, Tensor] | None, layout: Layout
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The output, and the block's keys, values and key features; `past` is the state and its leaving features."""
        plain_q_bthk, plain_k_btgk, v_btgk = self.qkv.project(x_btd)
        q_bthk, k_btgk = self.qkv.rotate(plain_q_bthk, plain_k_btgk, layout)
        length_bt = self._length_bt(layout, None if past is None else past[0].window.seen_b)
        weight_bthf, f_btgf = self._weights(plain_q_bthk, length_bt), self.key_features(plain_k_btgk)
        near, *carried = (None,) if past is None else (past[0].window, past[1], past[0].linear_bgfv)
        y_bthk = windowed.attend(
            q_bthk,
            k_btgk,
            v_btgk,
            Far(weight_bthf, f_btgf, *carried, bias_hf=self.q_map_bias),
            near,
            layout,
            window=self.config.window,
            sinks=self.config.sinks,
            scale=self.scale,
        )
        return skinny.project(y_bthk.to(x_btd.dtype).flatten(2), self.o_proj)[0], k_btgk, v_btgk, f_btgf

    def _leaving_features(self, past: WindowState, layout: Layout) -> Tensor:
        """Key features of those tokens of the window that can leave it within a block, ``[b, g, min(t, w), f]``.

        The window holds keys as RoPE left them, so they are turned back; in bfloat16 this rounds them once more.
        """
        k_bngk = past.window_k_bgwk[:, :, : layout.shape[1]].transpose(1, 2).to(self.k_map_weight.dtype)
        return self.key_features(self.qkv.rotate_back(k_bngk, layout, self.config.window)).transpose(1, 2)

    def key_features(self, k_btgk: Tensor) -> Tensor:
        """``phi_k`` of keys before RoPE, ``[b, t, g, f]``: a soft assignment that sums to one."""
        weight_gkf = self.k_map_weight * self.config.head_dim**-0.5
        return (torch.einsum("btgk,gkf->btgf", k_btgk, weight_gkf) + self.k_map_bias).softmax(-1)

    def query_weights(self, q_bthk: Tensor, far_bt: Tensor) -> Tensor:
        """Logarithm of ``phi(q)`` of queries before RoPE, ``[b, t, h, f]``, each with `far_bt` far tokens behind it."""
        return self._weights(q_bthk, self.far_length(far_bt)) + self.q_map_bias

    def _weights(self, q_bthk: Tensor, length_bt: Tensor) -> Tensor:
        weight_hkf = self.q_map_weight * self.config.head_dim**-0.5
        weight_bthf = torch.einsum("bthk,hkf->bthf", q_bthk, weight_hkf)
        fade_bth = length_bt[..., None] * self.q_map_fade
        return (weight_bthf - fade_bth[..., None]).to(weight_bthf.dtype)

    def _length_bt(self, layout: Layout, seen_b: Tensor | None = None) -> Tensor:
        """`far_length` of the tokens of its document before each token's window, sinks left out."""
        near, dtype = self.config.window + self.config.sinks - 1, self.q_map_fade.dtype
        if seen_b is None:
            key = ("far length", self.config.window, near, dtype)
            return layout.once(key, lambda: self._length_bt(layout, torch.zeros_like(layout.lengths_b)))
        return self.far_length((layout.index_bt(seen_b) - near).clamp(min=0))

    def far_length(self, far: Tensor) -> Tensor:
        """``log(1 + n / w)`` of numbers of far tokens."""
        return torch.log1p(far.to(precise(self.q_map_fade.dtype)) / self.config.window)

    @classmethod
    def from_attention(cls, source: AttentionWeights, stats: AttentionStats | None = None, **options: Any) -> Self:
        """Keep every weight of the attention; start the feature maps from centroids of its keys where text was given.

        Without sampled inputs the linear state starts almost silent, so that the layer is a window with sinks.
        """
        if source.window is not None:
            raise UnsupportedError(
                f"the source already looks back {source.window} tokens only; leave that layer as it is"
            )
        values = source.config_fields() | options
        mixer = cls(config_from_dict(cls.Config, values, where="mixer windowed_linear")).to(source.q_weight)
        mixer.qkv.take_(source)
        with torch.no_grad():
            mixer.o_proj.weight.copy_(source.o_weight)
            if source.o_bias is not None:
                mixer.o_proj.bias.copy_(source.o_bias)
        if stats is not None and stats.inputs_btd is not None:
            mixer.start_from_(stats.inputs_btd.to(source.q_weight))
        return mixer

    @torch.no_grad()
    def start_from_(self, x_btd: Tensor) -> None:
        """Set the feature maps from text: key features by k-means, query weights by the scores of their centroids.

        Then bias and fade of each query head are set so that its linear state carries the mass that softmax attention
        gives to the same tokens: least squares between the logarithms, over queries with few and with many far tokens.

        Args:
            x_btd: inputs of the layer, in rows longer than window and sinks.

        Raises:
            ConfigError: in rows that short no token is ever far, and the maps would have nothing to learn from.
        """
        start.from_text_(self, x_btd)


def equal_window(config: WindowedLinear.Config, *, dtype: torch.dtype) -> int:
    """The window that `attention` affords with the same sinks in the bytes of this mixer's state, and not one less.

    The baseline without a linear state is then ``attention`` with ``window=equal_window(...)`` and the same `sinks`.

    Args:
        config: of the mixer.
        dtype: of the model, whose linear state is at least float32.
    """
    with torch.device("meta"):
        state = WindowedLinear(config).init_state(1, dtype=dtype)
    return WindowState.filling(state.nbytes, config.n_kv_heads, config.sinks, config.head_dim, dtype=dtype)
