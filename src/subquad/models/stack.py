"""The model: embedding, blocks of mixer and SwiGLU, norm and head; read, then commit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.core.config import config_from_dict
from subquad.core.errors import ConfigError
from subquad.core.layout import Layout
from subquad.core.mixer import NOTHING, Counts, Mixer, Shared, Update
from subquad.core.registry import load
from subquad.core.state import State, axes
from subquad.models.config import ModelConfig
from subquad.models.offers import Offers
from subquad.ops import norm, skinny


def build_mixer(layer: dict[str, Any], d_model: int) -> Mixer:
    """The mixer that a layer of a `ModelConfig` describes."""
    slug = layer["mixer"]
    cls: type[Mixer] = load("mixers", slug)
    values = {"d_model": d_model} | {k: v for k, v in layer.items() if k != "mixer"}
    return cls(config_from_dict(cls.Config, values, where=f"mixer {slug}"))


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))`` (arXiv 2002.05202, equation 6)."""

    def __init__(self, d_model: int, d_mlp: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_mlp, bias=bias)
        self.up_proj = nn.Linear(d_model, d_mlp, bias=bias)
        self.down_proj = nn.Linear(d_mlp, d_model, bias=bias)

    def forward(self, x_btd: Tensor) -> Tensor:
        """``[b, t, d] -> [b, t, d]``."""
        return self.down_proj(F.silu(self.gate_proj(x_btd)) * self.up_proj(x_btd))


class Block(nn.Module):
    """``x + mixer(norm1(x))``, then ``x + mlp(norm2(x))`` where the model has MLPs."""

    def __init__(self, config: ModelConfig, layer: dict[str, Any]) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.mixer = build_mixer(layer, config.d_model)
        self.norm2 = nn.RMSNorm(config.d_model, eps=config.norm_eps) if config.d_mlp else None
        self.mlp = SwiGLU(config.d_model, config.d_mlp, config.mlp_bias) if config.d_mlp else None

    def forward(
        self, x_btd: Tensor, layout: Layout, shared: Shared | None = None
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The training form: the stream, and behind it what the mixer offers where `shared` is given, even if empty."""
        if shared is None:
            return self.feed(x_btd, self.mixer(self.norm1(x_btd), layout))
        y_btd, update = self.mixer.begin(self.norm1(x_btd), layout, shared)
        return self.feed(x_btd, y_btd), dict(update.offers())

    def read(self, x_btd: Tensor, state: State, layout: Layout, shared: Shared = NOTHING) -> tuple[Tensor, Update]:
        """Read a block against the mixer's state, and what layers below offer."""
        fused = self.mixer.read_stream(x_btd, self.norm1, state, layout)
        y_btd, update = fused or self.mixer.read(norm.add_rms(x_btd, None, self.norm1)[1], state, layout, shared)
        return self.feed(x_btd, y_btd), update

    def feed(self, x_btd: Tensor, y_btd: Tensor) -> Tensor:
        """Add the mixer's output `y_btd` to the stream, then the SwiGLU's."""
        norm2, mlp = self.norm2, self.mlp
        if norm2 is None or mlp is None:
            return x_btd + y_btd
        fused_btd = skinny.swiglu(x_btd, y_btd, norm2, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        if fused_btd is not None:
            return fused_btd
        x_btd = x_btd + y_btd
        return x_btd + mlp(norm2(x_btd))


@dataclass(frozen=True)
class StackState(State):
    """State of every layer, and how many tokens each row has seen."""

    layers: tuple[State, ...] = axes("b")
    seen_b: Tensor = axes("b", precision="index")


@dataclass(frozen=True)
class StackUpdate(Update):
    """Every layer's update of one block."""

    state: StackState
    layers: tuple[Update, ...]
    layout: Layout

    def commit(self, n_b: Tensor | None = None) -> StackState:
        """The state of all layers after the first `n_b` tokens."""
        return StackState(tuple(u.commit(n_b) for u in self.layers), self._seen_b(self.state.seen_b, n_b))

    def commit_(self, pool: State, rows: Tensor | None = None, n_b: Tensor | None = None) -> None:
        """The same into fixed buffers, layer by layer."""
        assert isinstance(pool, StackState)
        n_b = self.layout.lengths_b if n_b is None else n_b
        layers = zip(pool.layers, self.layers, strict=True)
        counts = Counts.all(update.store_(state, rows, n_b) for state, update in layers)
        if rows is not None:
            pool.seen_b.index_copy_(0, rows, self._seen_b(self.state.seen_b, n_b))
        elif pool is self.state and self.layout.documents_bt is None:
            counts = Counts((*counts.added, pool.seen_b), counts.put)
        else:
            pool.seen_b.copy_(self._seen_b(self.state.seen_b, n_b))
        counts.count_(n_b)

    def _seen_b(self, seen_b: Tensor, n_b: Tensor | None) -> Tensor:
        if self.layout.documents_bt is None:
            return seen_b + (self.layout.lengths_b if n_b is None else n_b)
        kept_bt, continues_b = self.layout.tail(self.layout.lengths_b if n_b is None else n_b)
        return torch.where(continues_b, seen_b, 0) + kept_bt.sum(1)


class Runner(Protocol):
    """How a block is run in training: plainly, checkpointed, compiled."""

    def __call__(self, block: Callable[..., Any], x_btd: Tensor, layout: Layout, *shared: Shared) -> Any:
        """Return ``block(x_btd, layout, *shared)``, which is the next stream.

        `shared` is there only for a block that reads what others offer, or is read; the result is then the stream and
        what the block offers.
        """
        ...


def plainly(block: Callable[..., Any], x_btd: Tensor, layout: Layout, *shared: Shared) -> Any:
    """The default `Runner`."""
    return block(x_btd, layout, *shared)


class Stack(nn.Module):
    """A language model of any mixers, with one explicit state.

    Example:
        >>> import torch
        >>> layer = {"mixer": "attention", "n_heads": 2, "n_kv_heads": 1, "head_dim": 8}
        >>> model = Stack(ModelConfig(vocab_size=11, d_model=16, d_mlp=32, layers=(layer, layer)))
        >>> state = model.init_state(batch=1, capacity=4)
        >>> hidden, update = model.read(torch.tensor([[1, 2, 3]]), state)
        >>> model.head(hidden[:, -1]).shape, update.commit().seen_b
        (torch.Size([1, 11]), tensor([3]))
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = cast("Sequence[Block]", nn.ModuleList(Block(config, dict(layer)) for layer in config.layers))
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.embed.weight
        nn.init.normal_(self.embed.weight, std=0.02)
        self.offers()  # refuses a layer that needs what none below it offers

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the embedding, which is that of the stream."""
        return self.embed.weight.dtype

    def hidden(
        self,
        tokens_bt: Tensor,
        layout: Layout | None = None,
        run: Runner = plainly,
        aux_layers: Sequence[int] = (),
    ) -> Tensor:
        """Stream after the final norm, ``[b, t, d]``, from empty states.

        Args:
            tokens_bt: token ids.
            layout: where they stand; None is dense from position 0.
            run: how each block is called.
            aux_layers: as in `read`.
        """
        layout = Layout.dense(*tokens_bt.shape, device=tokens_bt.device) if layout is None else layout
        x_btd = self.embed(tokens_bt)
        offers = self.offers()
        aux: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if offers.concern(i):
                x_btd, offered = run(block, x_btd, layout, offers.to(i))
                offers.keep(i, offered)
            else:
                x_btd = run(block, x_btd, layout)
            if i in aux_layers:
                aux.append(x_btd)
        return _beside(self.norm(x_btd), aux)

    def offers(self) -> Offers:
        """Of a pass that is to begin."""
        return Offers([block.mixer for block in self.blocks])

    def head(self, hidden: Tensor) -> Tensor:
        """Logits ``[..., vocabulary]`` of hidden states ``[..., d]``."""
        return self.lm_head(hidden)

    def forward(self, tokens_bt: Tensor, layout: Layout | None = None) -> Tensor:
        """Logits ``[b, t, vocabulary]``; training takes `hidden` and the head in chunks instead."""
        return self.head(self.hidden(tokens_bt, layout))

    def init_state(self, batch: int, capacity: int = 0, **factory: Any) -> StackState:
        """An empty state; see `Mixer.init_state`. ``device="meta"`` tells ``nbytes`` at no cost."""
        layers = tuple(block.mixer.init_state(batch, capacity, **factory) for block in self.blocks)
        device = factory.get("device") or self.device
        return StackState(layers, torch.zeros(batch, dtype=torch.int64, device=device))

    def init_pool(self, rows: int, capacity: int, block: int, **factory: Any) -> StackState:
        """An empty state for rows that decode; see `Mixer.init_pool`."""
        layers = tuple(layer.mixer.init_pool(rows, capacity, block, **factory) for layer in self.blocks)
        device = factory.get("device") or self.device
        return StackState(layers, torch.zeros(rows, dtype=torch.int64, device=device))

    def read(
        self,
        tokens_bt: Tensor,
        state: StackState,
        lengths_b: Tensor | None = None,
        layout: Layout | None = None,
        aux_layers: Sequence[int] = (),
    ) -> tuple[Tensor, StackUpdate]:
        """Read a block of tokens against `state`: the stream after the final norm, and the update.

        Args:
            tokens_bt: token ids; right-padded with any valid id.
            state: rows aligned with the block's.
            lengths_b: tokens of each row; None is all columns.
            layout: instead of `lengths_b`, for packed documents or positions of one's own.
            aux_layers: ascending; the streams behind these layers, without a norm, stand side by side behind it,
                ``[b, t, d + aux d]``.
        """
        if layout is None:
            b, t = tokens_bt.shape
            layout = (
                Layout.dense(b, t, start_b=state.seen_b)
                if lengths_b is None
                else Layout.ragged(lengths_b, t, start_b=state.seen_b)
            )
        elif lengths_b is not None:
            raise ConfigError("read: expected lengths_b or layout, got both; the layout holds the lengths")
        x_btd, offers = self.embed(tokens_bt), self.offers()
        updates: list[Update] = []
        aux: list[Tensor] = []
        for i, (block, layer) in enumerate(zip(self.blocks, state.layers, strict=True)):
            x_btd, update = block.read(x_btd, layer, layout, offers.to(i))
            offers.keep(i, update.offers())
            updates.append(update)
            if i in aux_layers:
                aux.append(x_btd)
        hidden_btd = norm.add_rms(x_btd, None, self.norm)[1]
        return _beside(hidden_btd, aux), StackUpdate(state, tuple(updates), layout)


def _beside(hidden_btd: Tensor, aux: Sequence[Tensor]) -> Tensor:
    """Streams of other layers beside the last."""
    return torch.cat((hidden_btd, *aux), dim=-1) if aux else hidden_btd
