"""Gated DeltaNet: a linear state that replaces what a key held, and decays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from subquad.core.attention import AttentionStats, AttentionWeights
from subquad.core.card import Card
from subquad.core.config import config_from_dict
from subquad.core.layout import Layout
from subquad.core.mixer import NOTHING, Mixer, Shared, Update
from subquad.core.state import State
from subquad.ops import chunks, gdn, norm, replay, short_conv, skinny
from subquad.ops.conv_qkv import ConvQKV, RecurrentState, copy_, fields_of
from subquad.ops.decay import Decay
from subquad.ops.decode import Rule
from subquad.ops.replay import ReplayState, ReplayUpdate

CARD = Card(
    title="Gated Delta Networks: Improving Mamba2 with Delta Rule",
    entry="GatedDeltaNet",
    arxiv="2412.06464",
    gives="a state of constant size that overwrites what a key held, so that it recalls better than one that only adds",
    status="incubating",
    claim="surpasses Mamba2 and DeltaNet in language modelling, reasoning, in-context recall and longer contexts",
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
            "bias": True,
            "qk_norm": True,
            "rotary": {"theta": 10000.0, "dim": 8},
            "beta_bias": True,
        },
        "bare": {"d_model": 16, "n_heads": 2, "key_dim": 4, "value_dim": 6, "conv_width": 0},
    },
)

# Of the L2 norms of queries and keys, as in the authors' code.
L2_EPS = 1e-6


@dataclass(frozen=True)
class GatedDeltaNetUpdate(Update):
    """One block's unit keys, values, log decays, betas and convolution inputs, and the state behind all of it."""

    state: RecurrentState
    end_bhkv: Tensor
    k_btgk: Tensor
    v_btgv: Tensor
    g_bth: Tensor
    beta_bth: Tensor
    inputs_btd: Tensor
    layout: Layout

    def commit(self, n_b: Tensor | None = None) -> RecurrentState:
        """Run the kept tokens through the recurrence and the convolution's history."""
        where = {"valid_bt": chunks.kept(self.layout, n_b), "documents_bt": self.layout.documents_bt}
        old, end_bhkv = self.state, self.end_bhkv
        if n_b is not None:
            end_bhkv = gdn.final_state(self.k_btgk, self.v_btgv, self.g_bth, self.beta_bth, old.recurrent_bhkv, **where)
        conv_bdw = short_conv.final_state(self.inputs_btd, old.conv_bdw, **where)
        return RecurrentState(end_bhkv.to(old.recurrent_bhkv.dtype), conv_bdw)


class GatedDeltaNet(Mixer):
    """``S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T``, ``y_t = S_t^T q_t / sqrt(K)``.

    Equation 10 of arXiv 2412.06464. Queries and keys have unit L2 norm, ``beta = sigmoid(beta_proj(x))``, and the decay
    ``a = exp(-exp(A_log) softplus(dt_proj(x) + dt_bias))`` is Mamba-2's. Each head's output passes an RMS norm and a
    SiLU gate, then the output projection.

    Example:
        >>> import torch
        >>> mixer = GatedDeltaNet(GatedDeltaNet.Config(d_model=64, n_heads=4, key_dim=16, value_dim=32))
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
            n_heads, key_dim, value_dim: heads of the state, and its rows and columns.
            n_kv_heads: heads of keys and values when fewer, as in grouped-query attention.
            n_groups: heads of queries and keys when fewer, as in Qwen3-Next.
            conv_width: taps of the convolution over q, k and v, 0 for none.
            activation: ``silu`` or ``none``, behind the convolution.
            norm_eps: epsilon of the output norm and the QK norms.
            bias: biases in the projections (the gate's always has one).
            qk_norm: RMS norm with weights of every query and key head before RoPE, where a teacher has it.
            rotary: fields of `RotarySpec`, or None for no position embedding.
            beta_bias: a bias in beta's projection, for a start that writes less or more than half.
        """

        d_model: int
        n_heads: int
        key_dim: int
        value_dim: int
        n_kv_heads: int | None = None
        n_groups: int | None = None
        conv_width: int = 4
        activation: str = "silu"
        norm_eps: float = 1e-6
        bias: bool = False
        qk_norm: bool = False
        rotary: Mapping[str, Any] | None = None
        beta_bias: bool = False

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        width = config.n_heads * config.value_dim
        self.qkv = ConvQKV.of(config)
        self.dt_proj = nn.Linear(config.d_model, config.n_heads, bias=False)
        self.decay = Decay(config.n_heads)
        self.beta_proj = nn.Linear(config.d_model, config.n_heads, bias=config.beta_bias)
        self.z_proj = nn.Linear(config.d_model, width)
        nn.init.zeros_(self.z_proj.bias)
        self.norm_weight = nn.Parameter(torch.ones(width))
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
        """Norm, gate and output projection."""
        eps, heads = self.config.norm_eps, self.config.n_heads
        y_btd = norm.gated_rms(y_bthv.flatten(2), z_btd, self.norm_weight, eps, heads, gate_first=False)
        return skinny.project(y_btd, self.out_proj)[0]

    def mix_values(self, x_btd: Tensor, v_bthv: Tensor, layout: Layout | None = None) -> Tensor:
        """The recurrence over given values; see `Mixer.mix_values`."""
        state = self.qkv.init_state(len(x_btd), v_bthv.shape[-1], device=x_btd.device, dtype=x_btd.dtype)
        return self._scan(x_btd, v_bthv, state, self.dense_layout(x_btd, layout))[0]

    def _step(
        self, x_btd: Tensor, state: ReplayState, layout: Layout, norm: nn.RMSNorm | None = None
    ) -> tuple[Tensor, ReplayUpdate]:
        """A block of a pool, behind `norm` where one is given."""
        qkv, config = self.qkv, self.config
        layers = qkv.v_proj, qkv.k_proj, qkv.q_proj, self.z_proj, self.dt_proj, self.beta_proj
        v, k, q, z, dt, beta = skinny.project(x_btd, *layers, norm=norm)
        g_bth, _ = self.decay(dt)
        rule = Rule(delta=True, activation=config.activation, l2_eps=L2_EPS, scale=config.key_dim**-0.5)
        y_bthv, update = replay.advance(qkv, rule, (v, k, q), g_bth[..., None], beta.sigmoid(), state, layout)
        return self._leave(y_bthv, z), update

    def _scan(
        self, x_btd: Tensor, v_bthv: Tensor | None, state: RecurrentState, layout: Layout
    ) -> tuple[Tensor, GatedDeltaNetUpdate]:
        """The recurrence over the block's own values, or over `v_bthv`."""
        q_btgk, k_btgk, v_btgv, inputs_btd = self.qkv(x_btd, state.conv_bdw, layout)
        v_btgv = v_btgv if v_bthv is None else v_bthv
        q_btgk, k_btgk = norm.l2(q_btgk, L2_EPS) * self.config.key_dim**-0.5, norm.l2(k_btgk, L2_EPS)
        g_bth, _ = self.decay(self.dt_proj(x_btd))
        beta_bth = self.beta_proj(x_btd).sigmoid()
        where = {"valid_bt": chunks.kept(layout), "documents_bt": layout.documents_bt}
        y_bthv, end_bhkv = gdn.scan(q_btgk, k_btgk, v_btgv, g_bth, beta_bth, state.recurrent_bhkv, **where)
        return y_bthv, GatedDeltaNetUpdate(state, end_bhkv, k_btgk, v_btgv, g_bth, beta_bth, inputs_btd, layout)

    @torch.no_grad()
    def start_writing_(self, beta_h: Tensor | None) -> None:
        """Give each head this beta for every token, 1/2 where None is given or there is no bias to hold it."""
        self.beta_proj.weight.zero_()
        for name, bias_h in self.beta_proj.named_parameters():
            if name == "bias":
                bias_h.copy_(torch.zeros_like(bias_h) if beta_h is None else beta_h.logit(1e-3))

    @classmethod
    def from_attention(cls, source: AttentionWeights, stats: AttentionStats | None = None, **options: Any) -> Self:
        """Take over projections, biases, QK norms and RoPE; every token writes and decays alike.

        ``beta`` and dt do not depend on the token, dt is 1; convolution and gate let everything pass, nothing has an
        activation. `stats` give each head's half-life and beta (`AttentionStats.half_life_h`, `write_h`) and the norm's
        weight (its output's RMS); without them half-lives spread from 32 to 2048 tokens, beta is 1/2, the weight 1.
        """
        values = fields_of(source) | {"activation": "none", "beta_bias": True} | options
        mixer = cls(config_from_dict(cls.Config, values, where="mixer gated_deltanet")).to(source.q_weight)
        mixer.qkv.take_(source)
        with torch.no_grad():
            mixer.dt_proj.weight.zero_()
            mixer.start_writing_(None if stats is None else stats.write_h)
            mixer.z_proj.weight.zero_()
            mixer.z_proj.bias.fill_(norm.OPEN)
            copy_(mixer.out_proj, source.o_weight, source.o_bias)
            mixer.decay.start_(None if stats is None else stats.half_life_h)
            if stats is not None:
                mixer.norm_weight.unflatten(0, (mixer.config.n_heads, -1)).copy_(stats.output_rms_h[:, None])
        return mixer
