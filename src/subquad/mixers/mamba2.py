"""Mamba-2: linear attention with a learned decay per head and token, behind a short convolution and a gate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.core.attention import AttentionStats, AttentionWeights
from subquad.core.card import Card
from subquad.core.config import config_from_dict
from subquad.core.errors import ConfigError, nearest
from subquad.core.layout import Layout
from subquad.core.mixer import NOTHING, Mixer, Shared, Update
from subquad.core.state import State
from subquad.ops import chunks, norm, replay, short_conv, skinny, ssd
from subquad.ops.attention import expand_heads
from subquad.ops.conv_qkv import ConvQKV, RecurrentState, copy_, fields_of
from subquad.ops.decay import Decay
from subquad.ops.decode import Rule
from subquad.ops.replay import ReplayState, ReplayUpdate

CARD = Card(
    title="Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality",
    entry="Mamba2",
    arxiv="2405.21060",
    gives="a state of constant size, decay per head and token; exports to architectures that serving engines know",
    status="incubating",
    claim="a core layer 2 to 8 times faster than Mamba's, competitive with Transformers in language modelling",
    measured="not reproduced",
    from_attention=True,
    constant_state=True,
    examples={
        "paper": {"d_model": 32, "n_heads": 4, "key_dim": 6, "value_dim": 8, "n_groups": 2},
        "grouped": {
            "d_model": 32,
            "n_heads": 4,
            "n_kv_heads": 2,
            "key_dim": 8,
            "value_dim": 8,
            "conv_width": 3,
            "activation": "none",
            "write": "unit",
            "norm": "before_gate",
            "bias": True,
            "qk_norm": True,
            "rotary": {"theta": 10000.0, "dim": 8},
        },
        "bare": {
            "d_model": 16,
            "n_heads": 2,
            "key_dim": 4,
            "value_dim": 6,
            "conv_width": 0,
            "activation": "none",
            "norm": "none",
        },
    },
)

WRITES = ("dt", "unit")
NORMS = ("after_gate", "before_gate", "none")

# What Bamba, GraniteMoeHybrid and Mamba2 of `transformers` fix, as options of `Mamba2.from_attention` or fields of
# `Mamba2.Config`. Their mamba_n_groups is then n_heads, and mamba_proj_bias true for the bias of the gate.
EXPORTABLE: Mapping[str, Any] = MappingProxyType(
    {
        "n_kv_heads": None,
        "conv_width": 4,
        "activation": "silu",
        "write": "dt",
        "norm": "after_gate",
        "qk_norm": False,
        "rotary": None,
    }
)


@dataclass(frozen=True)
class Mamba2Update(Update):
    """One block's keys, written values, log decays and convolution inputs, and the state behind all of it."""

    state: RecurrentState
    end_bhkv: Tensor
    k_btgk: Tensor
    v_btgv: Tensor
    g_bth: Tensor
    inputs_btd: Tensor
    layout: Layout

    def commit(self, n_b: Tensor | None = None) -> RecurrentState:
        """Run the kept tokens through the recurrence and the convolution's history."""
        where = {"valid_bt": chunks.kept(self.layout, n_b), "documents_bt": self.layout.documents_bt}
        old, end_bhkv = self.state, self.end_bhkv
        if n_b is not None:
            end_bhkv = ssd.final_state(self.k_btgk, self.v_btgv, self.g_bth, old.recurrent_bhkv, **where)
        conv_bdw = short_conv.final_state(self.inputs_btd, old.conv_bdw, **where)
        return RecurrentState(end_bhkv.to(old.recurrent_bhkv.dtype), conv_bdw)


class Mamba2(Mixer):
    """``S_t = exp(-A dt_t) S_{t-1} + dt_t k_t v_t^T``, ``y_t = S_t^T q_t + D v_t``.

    Sections 2 and 7 of arXiv 2405.21060, whose x, B, C are the values, keys and queries. Per head
    ``dt = softplus(dt_proj(x) + dt_bias)`` and ``A = exp(A_log)``; the result passes a SiLU gate and an RMS norm, then
    the output projection.

    Example:
        >>> import torch
        >>> mixer = Mamba2(Mamba2.Config(d_model=64, n_heads=4, key_dim=16, value_dim=32))
        >>> state = mixer.init_state(batch=2)
        >>> y, update = mixer.read(torch.randn(2, 3, 64), state)
        >>> update.commit(torch.tensor([3, 1])).recurrent_bhkv.shape
        torch.Size([2, 4, 16, 32])
    """

    @dataclass(frozen=True)
    class Config:
        """Shape and numerics; the defaults are the paper's.

        Attributes:
            d_model: width of the model.
            n_heads, key_dim, value_dim: heads of the state, and its rows and columns (the paper's N and P).
            n_kv_heads: heads of keys and values when fewer, as in grouped-query attention.
            n_groups: heads of queries and keys when fewer, as in the paper; the norm's groups then, too.
            conv_width: taps of the convolution over q, k and v, 0 for none.
            activation: ``silu`` or ``none``, behind the convolution.
            write: ``dt`` writes ``dt k v^T``; ``unit`` writes ``k v^T``, so that dt is the decay's alone.
            norm: RMS norm per group, ``after_gate``, ``before_gate`` or ``none``.
            norm_eps: its epsilon and that of the QK norms.
            bias: biases in the projections (the gate's always has one).
            qk_norm: RMS norm of every query and key head before RoPE.
            rotary: fields of `RotarySpec`, or None for no position embedding.
        """

        d_model: int
        n_heads: int
        key_dim: int
        value_dim: int
        n_kv_heads: int | None = None
        n_groups: int | None = None
        conv_width: int = 4
        activation: str = "silu"
        write: str = "dt"
        norm: str = "after_gate"
        norm_eps: float = 1e-5
        bias: bool = False
        qk_norm: bool = False
        rotary: Mapping[str, Any] | None = None

        def __post_init__(self) -> None:
            """Refuse unknown choices."""
            for name, value, known in (("write", self.write, WRITES), ("norm", self.norm, NORMS)):
                if value not in known:
                    raise ConfigError(f"unknown {name} {value!r}{nearest(value, known)}")

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        width = config.n_heads * config.value_dim
        self.qkv = ConvQKV.of(config)
        self.dt_proj = nn.Linear(config.d_model, config.n_heads, bias=False)
        self.decay = Decay(config.n_heads)
        self.D = nn.Parameter(torch.ones(config.n_heads))
        self.z_proj = nn.Linear(config.d_model, width)
        nn.init.zeros_(self.z_proj.bias)
        self.norm_weight = None if config.norm == "none" else nn.Parameter(torch.ones(width))
        self.out_proj = nn.Linear(width, config.d_model, bias=config.bias)

    def init_state(self, batch: int, capacity: int = 0, **factory: Any) -> RecurrentState:
        """Zeros; `capacity` is not needed."""
        return self.qkv.init_state(batch, **self.factory(**factory))

    def init_pool(self, rows: int, capacity: int, block: int, **factory: Any) -> State:
        """Rows that replay their last block; see `subquad.ops.replay`."""
        return replay.init_pool(self.qkv, rows, block, **self.factory(**factory))

    def read(
        self, x_btd: Tensor, state: State, layout: Layout | None = None, shared: Shared = NOTHING
    ) -> tuple[Tensor, Update]:
        """Run the block through convolution and recurrence; see `Mixer.read`."""
        layout = self.dense_layout(x_btd, layout)
        if isinstance(state, ReplayState):
            if x_btd.shape[1] <= state.held.block:
                return self._step(x_btd, state, layout)
            state = state.settled()
        assert isinstance(state, RecurrentState)
        y_bthv, update = self._scan(x_btd, None, state, layout)
        return self._leave(y_bthv, self.z_proj(x_btd)), update

    def read_stream(
        self, x_btd: Tensor, norm: nn.RMSNorm, state: State, layout: Layout
    ) -> tuple[Tensor, Update] | None:
        """A block of a pool; see `Mixer.read_stream`."""
        if isinstance(state, ReplayState) and x_btd.shape[1] <= state.held.block:
            return self._step(x_btd, state, layout, norm)
        return None

    def _leave(self, y_bthv: Tensor, z_btd: Tensor) -> Tensor:
        """Gate, norm and output projection."""
        config, y_btd = self.config, y_bthv.flatten(2)
        if self.norm_weight is None:
            y_btd = y_btd * F.silu(z_btd)
        else:
            groups = config.n_groups or config.n_heads
            y_btd = norm.gated_rms(
                y_btd, z_btd, self.norm_weight, config.norm_eps, groups, gate_first=config.norm == "after_gate"
            )
        return skinny.project(y_btd.to(z_btd.dtype), self.out_proj)[0]

    def _step(
        self, x_btd: Tensor, state: ReplayState, layout: Layout, norm: nn.RMSNorm | None = None
    ) -> tuple[Tensor, ReplayUpdate]:
        """A block of a pool, behind `norm` where one is given."""
        qkv, config = self.qkv, self.config
        layers = qkv.v_proj, qkv.k_proj, qkv.q_proj, self.z_proj, self.dt_proj
        v, k, q, z, dt = skinny.project(x_btd, *layers, norm=norm)
        g_bth, dt_bth = self.decay(dt)
        beta_bth = dt_bth if config.write == "dt" else None
        rule = Rule(delta=False, activation=config.activation)
        y_bthv, update = replay.advance(qkv, rule, (v, k, q), g_bth[..., None], beta_bth, state, layout, self.D)
        return self._leave(y_bthv, z), update

    def mix_values(self, x_btd: Tensor, v_bthv: Tensor, layout: Layout | None = None) -> Tensor:
        """The recurrence over given values, and D times them; see `Mixer.mix_values`."""
        state = self.qkv.init_state(len(x_btd), v_bthv.shape[-1], device=x_btd.device, dtype=x_btd.dtype)
        return self._scan(x_btd, v_bthv, state, self.dense_layout(x_btd, layout))[0]

    def _scan(
        self, x_btd: Tensor, v_bthv: Tensor | None, state: RecurrentState, layout: Layout
    ) -> tuple[Tensor, Mamba2Update]:
        """The recurrence with its D over the block's own values, or over `v_bthv`."""
        q_btgk, k_btgk, v_btgv, inputs_btd = self.qkv(x_btd, state.conv_bdw, layout)
        v_btgv = v_btgv if v_bthv is None else v_bthv
        g_bth, dt_bth = self.decay(self.dt_proj(x_btd))
        v_bthv = expand_heads(v_btgv, self.config.n_heads)
        written_btgv = (v_bthv * dt_bth[..., None]).to(v_btgv.dtype) if self.config.write == "dt" else v_btgv
        where = {"valid_bt": chunks.kept(layout), "documents_bt": layout.documents_bt}
        y_bthv, end_bhkv = ssd.scan(q_btgk, k_btgk, written_btgv, g_bth, state.recurrent_bhkv, **where)
        y_bthv = y_bthv + self.D[:, None] * v_bthv
        return y_bthv, Mamba2Update(state, end_bhkv, k_btgk, written_btgv, g_bth, inputs_btd, layout)

    @classmethod
    def from_attention(cls, source: AttentionWeights, stats: AttentionStats | None = None, **options: Any) -> Self:
        """Take over projections, biases, QK norms and RoPE, and start as decaying linear attention.

        ``dt`` is 1 and does not depend on the token, D is 0, convolution and gate let everything pass, nothing has an
        activation, and dt does not scale what is written, so that learning a decay leaves the values alone. `stats`
        give each head's half-life (`AttentionStats.half_life_h`) and the norm's weight (its output's RMS); without them
        half-lives spread from 32 to 2048 tokens and the weight is 1. How strongly a head writes, if always alike, the
        norm divides out again. An infinite look-back and ``norm="none"`` is exactly causal linear attention of the
        scaled q, k, v without a normaliser.
        """
        values = fields_of(source) | {"activation": "none", "write": "unit"} | options
        mixer = cls(config_from_dict(cls.Config, values, where="mixer mamba2")).to(source.q_weight)
        mixer.qkv.take_(source)
        with torch.no_grad():
            mixer.dt_proj.weight.zero_()
            mixer.D.zero_()
            mixer.z_proj.weight.zero_()
            mixer.z_proj.bias.fill_(norm.OPEN)
            copy_(mixer.out_proj, source.o_weight, source.o_bias)
            mixer.decay.start_(None if stats is None else stats.half_life_h)
            if mixer.norm_weight is not None and stats is not None:
                mixer.norm_weight.unflatten(0, (mixer.config.n_heads, -1)).copy_(stats.output_rms_h[:, None])
        return mixer
