"""Hyena: gates between long convolutions, whose filters a small network draws from the position."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from subquad.core.card import Card
from subquad.core.errors import ConfigError
from subquad.core.kept import Kept
from subquad.core.layout import Layout
from subquad.core.mixer import NOTHING, Mixer, Shared, Update
from subquad.core.precise import Precise
from subquad.core.state import State, axes, precise
from subquad.ops import backends, cached, chunks, flashconv, past, short_conv
from subquad.ops.hyena import Recurrence

CARD = Card(
    title="Hyena Hierarchy: Towards Larger Convolutional Language Models",
    entry="Hyena",
    arxiv="2302.10866",
    gives="mixing by long convolutions at n log n: filters as long as the context and gates made of the tokens",
    status="incubating",
    claim="a Transformer's perplexity at a fifth less training compute; twice attention's speed at 8K, 100 x at 64K",
    measured="one H100: the layer is ahead of attention from 8K on, 10.5 x at 64K; quality needs pretraining",
    result="hyena.h100.json",
    examples={
        "third": {
            "d_model": 8,
            "max_len": 8192,
            "order": 3,
            "bands": 2,
            "filter_width": 8,
            "filter_layers": 3,
            "frequency": 3.0,
            "learned_decay": True,
            "conv_width": 4,
        },
        "heads": {"d_model": 8, "max_len": 8192, "n_heads": 2, "bands": 2, "filter_width": 8, "conv_width": 1},
    },
)

# A filter's window falls to this, in the slowest channel behind 1.5 times the longest context and in the fastest behind
# 0.3 times.
TARGET, SLOWEST, FASTEST = 1e-2, 1.5, 0.3


class ImplicitFilter(Precise):
    """``h_t = exp(-rate t / max_len) FFN(features(t))``, a value for each filter (section 3.3 of 2302.10866).

    The features of a position are ``t / max_len`` and its sines and cosines at `bands` frequencies; the network is
    `layers` linear ones with sines between them. It stays in at least float32 whatever the module is cast to: its
    sines are steep, and what it makes is small beside what convolutions cost.

    Args:
        filters: number of filters for each of several convolutions, ``(convolutions, heads)``.
        max_len: the longest filter, in tokens.
        bands, width, layers, frequency: of the network; the frequency is what its sines start with, and is learned.
        learned_decay: learn the rates of the windows, too.
    """

    def __init__(
        self,
        filters: tuple[int, int],
        max_len: int,
        *,
        bands: int,
        width: int,
        layers: int,
        frequency: float,
        learned_decay: bool,
    ) -> None:
        super().__init__()
        high = precise(torch.get_default_dtype())
        sizes = [2 * bands + 1, *[width] * (layers - 1), math.prod(filters)]
        self.shape, self.max_len, self.bands = filters, max_len, bands
        self.layers = nn.ModuleList(
            nn.Linear(a, b, bias=i < layers - 1, dtype=high) for i, (a, b) in enumerate(pairwise(sizes))
        )
        self.frequency_w = nn.Parameter(torch.full((width,), frequency, dtype=high))
        rate_g = torch.linspace(-math.log(TARGET) / SLOWEST, -math.log(TARGET) / FASTEST, filters[1], dtype=high)
        log_rate_ng = rate_g.log().repeat(filters[0], 1)
        if learned_decay:
            self.log_rate_ng = nn.Parameter(log_rate_ng)
        else:
            self.register_buffer("log_rate_ng", log_rate_ng)
        self._kept, self._turned = Kept[Tensor](), Kept[Tensor]()

    def forward(self, length: int) -> Tensor:
        """The first `length` taps, ``[convolutions, heads, length]``; what is not learned from is made once."""
        # As many as the next power of two, so that a text that grows asks seldom.
        whole = min(1 << (length - 1).bit_length(), self.max_len)
        weights = (*self.parameters(), self.log_rate_ng)
        k_ngl = self._kept(weights, lambda: self._draw(whole), lambda k_ngl: k_ngl.shape[2] >= length)
        return self._draw(length) if k_ngl is None else k_ngl[:, :, :length]

    def by_lag(self, length: int, dtype: torch.dtype) -> Tensor:
        """The first `length` taps, ``[convolutions, length, heads]``, as a history of that dtype is read by them."""

        def make() -> Tensor:
            return self(length).mT.to(dtype).contiguous()

        def enough(k_nlg: Tensor) -> bool:
            return k_nlg.shape[1] >= length and k_nlg.dtype == dtype

        k_nlg = self._turned((*self.parameters(), self.log_rate_ng), make, enough)
        return make() if k_nlg is None else k_nlg

    def _draw(self, length: int) -> Tensor:
        dtype, device = self.frequency_w.dtype, self.frequency_w.device
        wide = chunks.wide(self.frequency_w)
        t_l = torch.arange(length, device=device, dtype=wide)[:, None] / self.max_len
        phase_lf = 2 * math.pi * t_l * torch.linspace(1e-4, self.bands - 1, self.bands, device=device, dtype=wide)
        x = torch.cat((t_l, phase_lf.cos(), -phase_lf.sin()), dim=1).to(dtype)
        with torch.autocast(device.type, enabled=False):
            for layer in self.layers[:-1]:
                x = (self.frequency_w * layer(x)).sin()
            k_ngl = self.layers[-1](x).mT.unflatten(0, self.shape)
            return k_ngl * (-self.log_rate_ng.exp()[..., None] * t_l[:, 0].to(dtype)).exp()


@dataclass(frozen=True)
class HyenaState(State):
    """The inputs of every long convolution so far, in buffers of a fixed capacity s, and the last of the short one."""

    inputs_bnsd: Tensor = axes("b n s d", shard="d", grows="s")
    conv_bdw: Tensor = axes("b d w", shard="d")
    seen_b: Tensor = axes("b", precision="index")


@dataclass(frozen=True)
class HyenaUpdate(Update):
    """One block's inputs of the long convolutions, each with the gate in front of it, and of the short one."""

    state: HyenaState
    z_btd: tuple[Tensor, ...]
    gates_btd: tuple[Tensor | None, ...]
    inputs_btd: Tensor
    layout: Layout

    def commit(self, n_b: Tensor | None = None) -> State:
        """Copy the buffers and write the kept tokens behind what they hold."""
        n_b = self.layout.lengths_b if n_b is None else n_b
        cached.check_room(self.layout, self.state.seen_b, n_b, self.state.inputs_bnsd.shape[2], "hyena's history")
        new = HyenaState(self.state.inputs_bnsd.clone(), self._conv_bdw(n_b), self.state.seen_b.clone())
        self._write_(new, None, n_b, self._blocks())
        return new

    def commit_(self, pool: State, rows: Tensor | None = None, n_b: Tensor | None = None) -> None:
        """Write only the block's own tokens; whether they fit is known to who owns the pool."""
        assert isinstance(pool, HyenaState)
        n_b = self.layout.lengths_b if n_b is None else n_b
        conv_bdw = self._conv_bdw(n_b).detach()
        if rows is None:
            pool.conv_bdw.copy_(conv_bdw)
        else:
            pool.conv_bdw.index_copy_(0, rows, conv_bdw)
        self._write_(pool, rows, n_b, self._blocks().detach())

    def _blocks(self) -> Tensor:
        gated = (z if gate is None else z * gate for z, gate in zip(self.z_btd, self.gates_btd, strict=True))
        return torch.stack(tuple(gated), dim=1)

    def _conv_bdw(self, n_b: Tensor) -> Tensor:
        where = {"valid_bt": chunks.kept(self.layout, n_b), "documents_bt": self.layout.documents_bt}
        return short_conv.final_state(self.inputs_btd, self.state.conv_bdw, **where)

    def _write_(self, pool: HyenaState, rows: Tensor | None, n_b: Tensor, block_bntd: Tensor) -> None:
        where = cached.places(self.layout, pool.seen_b, n_b, rows)
        # A cache is written two buffers at a time: here they are two halves of the channels.
        half = block_bntd.shape[3] // 2
        cached.append_(
            pool.inputs_bnsd[..., :half],
            pool.inputs_bnsd[..., half:],
            pool.seen_b,
            block_bntd[..., :half],
            block_bntd[..., half:],
            n_b,
            rows,
            **where,
        )


class Hyena(Mixer):
    """``y = x_N (h_{N-1} * (x_{N-1} ... (h_1 * (x_1 v))))``, the recurrence of `Recurrence`, of implicit filters.

    Training and prompts take ``n log n``. Token by token each reads its whole history, which is what a convolution
    without a recurrence costs; `laughing_hyena` gives it one.

    Example:
        >>> import torch
        >>> mixer = Hyena(Hyena.Config(d_model=64, max_len=128))
        >>> state = mixer.init_state(batch=2, capacity=8)
        >>> y, update = mixer.read(torch.randn(2, 3, 64), state)
        >>> update.commit(torch.tensor([3, 1])).seen_b
        tensor([3, 1])
    """

    @dataclass(frozen=True)
    class Config:
        """Shape and numerics; the defaults are those of the published language models.

        Attributes:
            d_model: width of the model.
            max_len: the longest context, in tokens; positions and windows are measured by it.
            order: gates; one long convolution less.
            n_heads: heads whose channels share a filter, over outer products; None is one a channel, without.
            bands, filter_width, filter_layers, frequency, learned_decay: see `ImplicitFilter`.
            conv_width: taps of the short convolution.
        """

        d_model: int
        max_len: int
        order: int = 2
        n_heads: int | None = None
        bands: int = 16
        filter_width: int = 64
        filter_layers: int = 4
        frequency: float = 14.0
        learned_decay: bool = False
        conv_width: int = 3

        def __post_init__(self) -> None:
            """Refuse sizes that leave nothing."""
            for name, least in (("max_len", 1), ("bands", 1), ("filter_width", 1), ("filter_layers", 2)):
                if getattr(self, name) < least:
                    raise ConfigError(f"{name}={getattr(self, name)} must be at least {least}; raise it")

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.recurrence = Recurrence(config.d_model, config.order, config.n_heads, config.conv_width)
        self.filters = ImplicitFilter(
            (self.recurrence.convolutions, self.recurrence.heads),
            config.max_len,
            bands=config.bands,
            width=config.filter_width,
            layers=config.filter_layers,
            frequency=config.frequency,
            learned_decay=config.learned_decay,
        )

    def init_state(self, batch: int, capacity: int = 0, **factory: Any) -> HyenaState:
        """Buffers for the inputs of `capacity` tokens.

        Raises:
            ConfigError: a capacity beyond `max_len`.
        """
        self._check(capacity)
        recurrence, like = self.recurrence, self.factory(**factory)
        width, taps = recurrence.conv_weight.shape
        return HyenaState(
            torch.zeros(batch, recurrence.convolutions, capacity, recurrence.channels, **like),
            torch.zeros(batch, width, taps - 1, **like),
            torch.zeros(batch, dtype=torch.int64, device=like["device"]),
        )

    def read(
        self, x_btd: Tensor, state: State, layout: Layout | None = None, shared: Shared = NOTHING
    ) -> tuple[Tensor, Update]:
        """Convolve the block with itself and with its history; see `Mixer.read`.

        Raises:
            ConfigError: a block longer than `max_len`.
        """
        layout = self.dense_layout(x_btd, layout)
        assert isinstance(state, HyenaState)
        t, history = x_btd.shape[1], state.inputs_bnsd.shape[2]
        self._check(t)
        k_ngl = self.filters(max(1, min(history + t, self.config.max_len)))
        blocks: list[tuple[Tensor, Tensor | None]] = []

        def convolve(n: int, z_btd: Tensor, gate_in: Tensor | None, gate_out: Tensor | None) -> Tensor:
            # A transform would carry what stands in a padded column everywhere, if only as rounding.
            (z_btd,) = chunks.blank(chunks.kept(layout), z_btd)
            blocks.append((z_btd, gate_in))
            gates = {"gate_in_btd": gate_in, "gate_out_btd": None if history else gate_out}
            direct, documents_bt = self.recurrence.direct_d(n), layout.documents_bt
            y_btd = flashconv.parallel(z_btd, k_ngl[n], direct, **gates, documents_bt=documents_bt)
            if not history:
                return y_btd
            past_btd = self._past(state, n, k_ngl[n], t)
            if documents_bt is not None:
                past_btd = past_btd.masked_fill((documents_bt != 0)[..., None], 0)
            y_btd = y_btd + past_btd
            return y_btd if gate_out is None else y_btd * gate_out

        y_btd, inputs_btd = self.recurrence(x_btd, state.conv_bdw, layout, convolve)
        z, gates = zip(*blocks, strict=True)
        return y_btd, HyenaUpdate(state, z, gates, inputs_btd, layout)

    def _past(self, state: HyenaState, n: int, k_gl: Tensor, t: int) -> Tensor:
        """What the history of convolution n gives to a block of `t` tokens."""
        history_bsd = state.inputs_bnsd[:, n]
        if t == 1 and backends.wants_triton(history_bsd.device):
            k_lg = self.filters.by_lag(k_gl.shape[1], history_bsd.dtype)[n]
            if (y_bd := past.read(history_bsd, state.seen_b, k_lg)) is not None:
                return y_bd[:, None]
        return flashconv.past(history_bsd, state.seen_b, k_gl, t)

    def _check(self, tokens: int) -> None:
        if tokens > self.config.max_len:
            raise ConfigError(
                f"hyena: expected at most max_len={self.config.max_len} tokens, for which its filters are defined, got "
                f"{tokens}; build it with a larger max_len, or convert it with laughing_hyena, whose filters go on"
            )
