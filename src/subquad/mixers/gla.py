"""Gated linear attention: a decay of its own for every key channel, learned from the token."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.core.attention import AttentionStats, AttentionWeights
from subquad.core.card import Card
from subquad.core.config import config_from_dict
from subquad.core.layout import Layout
from subquad.core.mixer import NOTHING, Mixer, Shared, Update
from subquad.core.precise import Precise
from subquad.core.state import State, precise
from subquad.ops import chunks, gla, norm, replay, short_conv, skinny
from subquad.ops.conv_qkv import ConvQKV, RecurrentState, copy_, fields_of
from subquad.ops.decode import Rule
from subquad.ops.replay import ReplayState, ReplayUpdate

CARD = Card(
    title="Gated Linear Attention Transformers with Hardware-Efficient Training",
    entry="GLA",
    arxiv="2312.06635",
    gives="a state of constant size whose key channels forget at a rate of their own, chosen by each token",
    status="incubating",
    claim="competitive with Transformers and Mamba in language modelling; trained on 2K tokens, it reads beyond 20K",
    measured="not reproduced",
    from_attention=True,
    constant_state=True,
    examples={
        "paper": {"d_model": 32, "n_heads": 4, "key_dim": 4, "value_dim": 8},
        "grouped": {
            "d_model": 32,
            "n_heads": 4,
            "n_kv_heads": 2,
            "key_dim": 8,
            "value_dim": 8,
            "conv_width": 3,
            "bias": True,
            "qk_norm": True,
            "rotary": {"theta": 10000.0, "dim": 8},
        },
        "groups": {
            "d_model": 16,
            "n_heads": 2,
            "n_groups": 1,
            "key_dim": 4,
            "value_dim": 6,
            "conv_width": 4,
            "activation": "silu",
            "gate_rank": 3,
            "temperature": 1.0,
        },
    },
)


class ChannelDecay(Precise):
    """``g = logsigmoid(up(down(x)) + bias) / temperature`` per head and key channel (section 4.4 of 2312.06635).

    The bias stays in at least float32 whatever the module is cast to, and so does g: bfloat16 has no numbers between
    decays of 0.996 and 1.

    Args:
        d_model: width of x.
        n_heads, key_dim: h and k of g.
        rank: width between `down` and `up`.
        temperature: the larger, the slower the decay.
    """

    def __init__(self, d_model: int, n_heads: int, key_dim: int, rank: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.down = nn.Linear(d_model, rank, bias=False)
        self.up = nn.Linear(rank, n_heads * key_dim, bias=False)
        self.bias = nn.Parameter(torch.zeros(n_heads, key_dim, dtype=precise(torch.get_default_dtype())))

    def forward(self, x_btd: Tensor) -> Tensor:
        """Log decay ``[b, t, h, k]``, in at least float32."""
        raw_bthk = self.up(self.down(x_btd)).unflatten(-1, self.bias.shape)
        return F.logsigmoid(raw_bthk.to(self.bias.dtype) + self.bias) / self.temperature

    @torch.no_grad()
    def start_(self, half_life_h: Tensor | None) -> None:
        """Let every channel of a head forget half in `half_life_h` tokens, whatever the token.

        Args:
            half_life_h: in tokens; less than 1 counts as 1, infinite is no decay at all. None spreads the heads
                from 32 to 2048.
        """
        if half_life_h is None:
            half_life_h = 2.0 ** torch.linspace(5, 11, len(self.bias))
        self.up.weight.zero_()
        # logsigmoid(x) = -y where x = -log(exp(y) - 1).
        y_h = self.temperature * math.log(2.0) / half_life_h.to(self.bias).clamp(min=1.0)
        self.bias.copy_(-y_h.expm1().log()[:, None].expand_as(self.bias))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """The projections are cast as any others."""
        if recurse:
            for linear in (self.down, self.up):
                linear._apply(fn)
        return super()._apply(fn, recurse=False)


@dataclass(frozen=True)
class GLAUpdate(Update):
    """One block's keys, values, log decays and convolution inputs, and the state behind all of it."""

    state: RecurrentState
    end_bhkv: Tensor
    k_btgk: Tensor
    v_btgv: Tensor
    g_bthk: Tensor
    inputs_btd: Tensor
    layout: Layout

    def commit(self, n_b: Tensor | None = None) -> RecurrentState:
        """Run the kept tokens through the recurrence and the convolution's history."""
        where = {"valid_bt": chunks.kept(self.layout, n_b), "documents_bt": self.layout.documents_bt}
        old, end_bhkv = self.state, self.end_bhkv
        if n_b is not None:
            end_bhkv = gla.final_state(self.k_btgk, self.v_btgv, self.g_bthk, old.recurrent_bhkv, **where)
        conv_bdw = short_conv.final_state(self.inputs_btd, old.conv_bdw, **where)
        return RecurrentState(end_bhkv.to(old.recurrent_bhkv.dtype), conv_bdw)


class GLA(Mixer):
    """``S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T``, ``y_t = S_t^T q_t``.

    Equation 3 of arXiv 2312.06635. The log decay ``g = logsigmoid(up(down(x)) + bias) / temperature`` has a value per
    key channel, from a projection of low rank. Each head's output passes an RMS norm and a SiLU gate, then the output
    projection.

    Example:
        >>> import torch
        >>> mixer = GLA(GLA.Config(d_model=64, n_heads=4, key_dim=8, value_dim=16))
        >>> state = mixer.init_state(batch=2)
        >>> y, update = mixer.read(torch.randn(2, 3, 64), state)
        >>> update.commit(torch.tensor([3, 1])).recurrent_bhkv.shape
        torch.Size([2, 4, 8, 16])
    """

    @dataclass(frozen=True)
    class Config:
        """Shape and numerics; the defaults are the paper's.

        Attributes:
            d_model: width of the model.
            n_heads, key_dim, value_dim: heads of the state, and its rows and columns.
            n_kv_heads: heads of keys and values when fewer, as in grouped-query attention.
            n_groups: heads of queries and keys when fewer.
            gate_rank: rank of the decay's projection.
            temperature: divides the log decay.
            conv_width: taps of the convolution over q, k and v, 0 for none.
            activation: ``silu`` or ``none``, behind the convolution.
            norm_eps: epsilon of the output norm and the QK norms.
            bias: biases in the projections (the gate's always has one).
            qk_norm: RMS norm with weights of every query and key head before RoPE, where a teacher has it.
            rotary: fields of `RotarySpec`, or None for no position embedding.
        """

        d_model: int
        n_heads: int
        key_dim: int
        value_dim: int
        n_kv_heads: int | None = None
        n_groups: int | None = None
        gate_rank: int = 16
        temperature: float = 16.0
        conv_width: int = 0
        activation: str = "none"
        norm_eps: float = 1e-6
        bias: bool = False
        qk_norm: bool = False
        rotary: Mapping[str, Any] | None = None

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        width = config.n_heads * config.value_dim
        self.qkv = ConvQKV.of(config)
        self.decay = ChannelDecay(config.d_model, config.n_heads, config.key_dim, config.gate_rank, config.temperature)
        self.z_proj = nn.Linear(config.d_model, width)
        nn.init.zeros_(self.z_proj.bias)
        self.norm_weight = nn.Parameter(torch.ones(width))
        self.out_proj = nn.Linear(width, config.d_model, bias=config.bias)

    def init_state(self, batch: int, capacity: int = 0, **factory: Any) -> RecurrentState:
        """Zeros; `capacity` is not needed."""
        return self.qkv.init_state(batch, **self.factory(**factory))

    def init_pool(self, rows: int, capacity: int, block: int, **factory: Any) -> State:
        """Rows that replay their last block; see `subquad.ops.replay`."""
        return replay.init_pool(self.qkv, rows, block, key_decay=True, **self.factory(**factory))

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

    def _leave(self, y_bthv: Tensor, z_btd: Tensor) -> Tensor:
        """Norm, gate and output projection."""
        eps, heads = self.config.norm_eps, self.config.n_heads
        y_btd = norm.gated_rms(y_bthv.flatten(2), z_btd, self.norm_weight, eps, heads, gate_first=False)
        return skinny.project(y_btd, self.out_proj)[0]

    def mix_values(self, x_btd: Tensor, v_bthv: Tensor, layout: Layout | None = None) -> Tensor:
        """The recurrence over given values; see `Mixer.mix_values`."""
        state = self.qkv.init_state(len(x_btd), v_bthv.shape[-1], device=x_btd.device, dtype=x_btd.dtype)
        return self._scan(x_btd, v_bthv, state, self.dense_layout(x_btd, layout))[0]

    def _step(self, x_btd: Tensor, state: ReplayState, layout: Layout) -> tuple[Tensor, ReplayUpdate]:
        """A block of a pool."""
        qkv = self.qkv
        v, k, q, z = skinny.project(x_btd, qkv.v_proj, qkv.k_proj, qkv.q_proj, self.z_proj)
        rule = Rule(delta=False, activation=self.config.activation)
        y_bthv, update = replay.advance(qkv, rule, (v, k, q), self.decay(x_btd), None, state, layout)
        return self._leave(y_bthv, z), update

    def _scan(
        self, x_btd: Tensor, v_bthv: Tensor | None, state: RecurrentState, layout: Layout
    ) -> tuple[Tensor, GLAUpdate]:
        """The recurrence over the block's own values, or over `v_bthv`."""
        q_btgk, k_btgk, v_btgv, inputs_btd = self.qkv(x_btd, state.conv_bdw, layout)
        v_btgv = v_btgv if v_bthv is None else v_bthv
        g_bthk = self.decay(x_btd)
        where = {"valid_bt": chunks.kept(layout), "documents_bt": layout.documents_bt}
        y_bthv, end_bhkv = gla.scan(q_btgk, k_btgk, v_btgv, g_bthk, state.recurrent_bhkv, **where)
        return y_bthv, GLAUpdate(state, end_bhkv, k_btgk, v_btgv, g_bthk, inputs_btd, layout)

    @classmethod
    def from_attention(cls, source: AttentionWeights, stats: AttentionStats | None = None, **options: Any) -> Self:
        """Take over projections, biases, QK norms and RoPE, and start as decaying linear attention.

        All channels of a head decay alike, whatever the token; the gate lets everything pass. `stats` give each head's
        half-life (`AttentionStats.half_life_h`) and the norm's weight (its output's RMS); without them half-lives
        spread from 32 to 2048 tokens and the weight is 1. How strongly a head writes the norm divides out again.
        """
        mixer = cls(config_from_dict(cls.Config, fields_of(source) | options, where="mixer gla")).to(source.q_weight)
        mixer.qkv.take_(source)
        with torch.no_grad():
            mixer.z_proj.weight.zero_()
            mixer.z_proj.bias.fill_(norm.OPEN)
            copy_(mixer.out_proj, source.o_weight, source.o_bias)
            mixer.decay.start_(None if stats is None else stats.half_life_h)
            if stats is not None:
                mixer.norm_weight.unflatten(0, (mixer.config.n_heads, -1)).copy_(stats.output_rms_h[:, None])
        return mixer
