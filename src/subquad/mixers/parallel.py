"""Several mixers side by side on one input, their outputs added: attention in some heads, others in the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from subquad.core.attention import AttentionStats, AttentionWeights
from subquad.core.card import Card
from subquad.core.config import config_from_dict, config_to_dict
from subquad.core.errors import ConfigError
from subquad.core.layout import Layout
from subquad.core.mixer import NOTHING, Counts, Mixer, Shared, Update
from subquad.core.registry import load
from subquad.core.state import State, axes
from subquad.ops.norm import add_rms

CARD = Card(
    title="Hymba: A Hybrid-head Architecture for Small Language Models",
    entry="Parallel",
    arxiv="2411.13676",
    needs="parts that are registered mixers of the same width",
    gives="layers that keep full attention in some heads only, so that what is kept is chosen head by head",
    status="incubating",
    claim="1.32 % better on average than Llama-3.2-3B, 11.67 x smaller cache and 3.49 x the throughput, at 1.5 B",
    measured="not reproduced: here the heads of a teacher are divided among mixers, and no model is pretrained",
    from_attention=True,
    examples={
        "attention_windowed_linear": {
            "d_model": 32,
            "parts": (
                {
                    "mixer": "attention",
                    "n_heads": 2,
                    "n_kv_heads": 1,
                    "head_dim": 8,
                    "rotary": {"theta": 10000.0, "dim": 8},
                    "o_bias": True,
                },
                {
                    "mixer": "windowed_linear",
                    "n_heads": 4,
                    "n_kv_heads": 2,
                    "head_dim": 8,
                    "features": 6,
                    "window": 7,
                    "sinks": 2,
                    "rotary": {"theta": 10000.0, "dim": 8},
                },
            ),
        },
        "attention_mamba2": {
            "d_model": 32,
            "parts": (
                {"mixer": "attention", "n_heads": 2, "n_kv_heads": 2, "head_dim": 8, "qk_norm": True},
                {"mixer": "mamba2", "n_heads": 2, "key_dim": 6, "value_dim": 8, "conv_width": 3},
            ),
        },
    },
)


@dataclass(frozen=True)
class ParallelState(State):
    """The states of the parts, in their order."""

    parts: tuple[State, ...] = axes("b")


@dataclass(frozen=True)
class ParallelUpdate(Update):
    """The updates of the parts, in their order."""

    parts: tuple[Update, ...]

    def commit(self, n_b: Tensor | None = None) -> ParallelState:
        """Every part commits the same tokens."""
        return ParallelState(tuple(part.commit(n_b) for part in self.parts))

    def commit_(self, pool: State, rows: Tensor | None = None, n_b: Tensor | None = None) -> None:
        """The same into fixed buffers, each part in its own way."""
        assert isinstance(pool, ParallelState)
        for part, state in zip(self.parts, pool.parts, strict=True):
            part.commit_(state, rows, n_b)

    def store_(self, pool: State, rows: Tensor | None, n_b: Tensor) -> Counts:
        """Every part's; see `Update.store_`."""
        assert isinstance(pool, ParallelState)
        return Counts.all(part.store_(state, rows, n_b) for part, state in zip(self.parts, pool.parts, strict=True))


class Parallel(Mixer):
    """``y = sum_i part_i(x)``, each part a registered mixer.

    Attention is such a sum over its heads, so a teacher's heads may go to different mixers and the start is as near as
    each of them: with attention for all it is the teacher's own output.

    Example:
        >>> import torch
        >>> heads = {"n_heads": 2, "n_kv_heads": 1, "head_dim": 16}
        >>> parts = ({"mixer": "attention", **heads}, {"mixer": "attention", **heads, "window": 8, "sinks": 2})
        >>> mixer = Parallel(Parallel.Config(d_model=64, parts=parts))
        >>> mixer(torch.randn(1, 100, 64)).shape
        torch.Size([1, 100, 64])
    """

    @dataclass(frozen=True)
    class Config:
        """The parts.

        Attributes:
            d_model: width of the model and of every part.
            parts: one mapping a part: ``mixer`` (a slug) and the fields of that mixer's ``Config`` less ``d_model``.
        """

        d_model: int
        parts: tuple[Mapping[str, Any], ...]

        def __post_init__(self) -> None:
            """Take lists from JSON, and refuse a part without a mixer."""
            object.__setattr__(self, "parts", tuple(dict(part) for part in self.parts))
            if not self.parts:
                raise ConfigError("parts: expected at least one, got none; name a mixer for each")
            for i, part in enumerate(self.parts):
                if "mixer" not in part or "d_model" in part:
                    raise ConfigError(
                        f"parts[{i}]: expected a key 'mixer' and none 'd_model', got {sorted(part)}; "
                        "name the part's mixer, and the width once for all"
                    )

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.parts = nn.ModuleList(_build(config.d_model, i, part) for i, part in enumerate(config.parts))

    @property
    def mixers(self) -> list[Mixer]:
        """The parts, in their order."""
        return list(self.parts)  # pyright: ignore[reportReturnType]

    def sources(self, lower: Sequence[Mixer]) -> Sequence[int]:
        """None: what a layer is offered has one name for all of its parts, and two parts may want different layers.

        Raises:
            ConfigError: a part that reads what layers below offer.
        """
        for i, part in enumerate(self.mixers):
            if part.sources(lower):
                raise ConfigError(
                    f"parts[{i}]: expected a mixer that reads nothing of the layers below, got {type(part).__name__} "
                    "that does; make it a layer of its own"
                )
        return ()

    def init_state(self, batch: int, capacity: int = 0, **factory: Any) -> ParallelState:
        """The parts' empty states."""
        return ParallelState(tuple(part.init_state(batch, capacity, **factory) for part in self.mixers))

    def init_pool(self, rows: int, capacity: int, block: int, **factory: Any) -> ParallelState:
        """The parts' pools."""
        return ParallelState(tuple(part.init_pool(rows, capacity, block, **factory) for part in self.mixers))

    def read(
        self, x_btd: Tensor, state: State, layout: Layout | None = None, shared: Shared = NOTHING
    ) -> tuple[Tensor, Update]:
        """Every part reads the block against its own state; see `Mixer.read`."""
        assert isinstance(state, ParallelState)
        layout = self.dense_layout(x_btd, layout)
        read = [part.read(x_btd, s, layout, shared) for part, s in zip(self.mixers, state.parts, strict=True)]
        return _sum([y_btd for y_btd, _ in read]), ParallelUpdate(tuple(update for _, update in read))

    def read_stream(
        self, x_btd: Tensor, norm: nn.RMSNorm, state: State, layout: Layout
    ) -> tuple[Tensor, Update] | None:
        """Every part's, and a plain read of those that have no such form; see `Mixer.read_stream`."""
        assert isinstance(state, ParallelState)
        normed_btd: Tensor | None = None
        read: list[tuple[Tensor, Update]] = []
        for part, own in zip(self.mixers, state.parts, strict=True):
            one = part.read_stream(x_btd, norm, own, layout)
            if one is None:
                # No part is read twice, and the norm is taken once.
                normed_btd = add_rms(x_btd, None, norm)[1] if normed_btd is None else normed_btd
                one = part.read(normed_btd, own, layout)
            read.append(one)
        return _sum([y_btd for y_btd, _ in read]), ParallelUpdate(tuple(update for _, update in read))

    def forward(self, x_btd: Tensor, layout: Layout | None = None, shared: Shared = NOTHING) -> Tensor:
        """The training form of every part."""
        layout = self.dense_layout(x_btd, layout)
        return _sum([part(x_btd, layout, shared) for part in self.mixers])

    @classmethod
    def from_attention(cls, source: AttentionWeights, stats: AttentionStats | None = None, **options: Any) -> Self:
        """Divide the heads of an attention among mixers, each started by its own mapping from its heads.

        Args:
            source: the attention.
            stats: of all its query heads; every part gets those of its own.
            options: ``parts``, one mapping a part: ``mixer``, ``kv_heads`` (the key/value heads that it takes, with the
                query heads that read them) and options of that mixer's ``from_attention``. Without it the first half
                of the heads stays attention and the others become ``windowed_linear``.

        Raises:
            ConfigError: a key/value head that is in no part, in two, or not there; a part without mixer or heads.
        """
        unknown = sorted(options.keys() - {"parts"})
        if unknown:
            raise ConfigError(f"mixer parallel: expected parts, got {', '.join(unknown)}; set options in their part")
        parts: Sequence[Mapping[str, Any]] = options.get("parts") or _halves(source.n_kv_heads)
        _check_heads(parts, source.n_kv_heads)
        mixers: list[Mixer] = []
        for part in parts:
            q_heads = source.query_heads(part["kv_heads"])
            kind: type[Mixer] = load("mixers", part["mixer"])
            own = {k: v for k, v in part.items() if k not in ("mixer", "kv_heads")}
            mixers.append(
                kind.from_attention(
                    source.heads(part["kv_heads"]), None if stats is None else stats.heads(q_heads), **own
                )
            )
        described = tuple(
            {"mixer": part["mixer"]} | {k: v for k, v in config_to_dict(mixer.config).items() if k != "d_model"}
            for part, mixer in zip(parts, mixers, strict=True)
        )
        with torch.device("meta"):  # the parts are there already: nothing to allocate or draw
            made = cls(cls.Config(source.q_weight.shape[1], described))
        made.parts = nn.ModuleList(mixers)
        return made


def _build(d_model: int, i: int, part: Mapping[str, Any]) -> Mixer:
    kind: type[Mixer] = load("mixers", part["mixer"])
    values = {"d_model": d_model} | {k: v for k, v in part.items() if k != "mixer"}
    return kind(config_from_dict(kind.Config, values, where=f"parts[{i}], mixer {part['mixer']}"))


def _sum(outputs: Sequence[Tensor]) -> Tensor:
    total_btd = outputs[0]
    for y_btd in outputs[1:]:
        total_btd = total_btd + y_btd
    return total_btd


def _halves(n_kv_heads: int) -> Sequence[Mapping[str, Any]]:
    if n_kv_heads < 2:
        raise ConfigError("mixer parallel: expected key/value heads to divide, got one; choose another mixer")
    half = (n_kv_heads + 1) // 2
    return (
        {"mixer": "attention", "kv_heads": list(range(half))},
        {"mixer": "windowed_linear", "kv_heads": list(range(half, n_kv_heads))},
    )


def _check_heads(parts: Sequence[Mapping[str, Any]], n_kv_heads: int) -> None:
    for i, part in enumerate(parts):
        if "mixer" not in part or "kv_heads" not in part:
            raise ConfigError(f"parts[{i}]: expected keys 'mixer' and 'kv_heads', got {sorted(part)}; add them")
    count = Counter(g for part in parts for g in part["kv_heads"])
    wrong = [g for g in count if not 0 <= g < n_kv_heads]
    twice = [g for g, n in count.items() if n > 1]
    missing = [g for g in range(n_kv_heads) if g not in count]
    for what, heads in (("of the layer", wrong), ("in one part each", twice), ("all in some part", missing)):
        if heads:
            raise ConfigError(
                f"parts: expected key/value heads 0 to {n_kv_heads - 1}, {what}; got otherwise for {sorted(heads)}; "
                "give every head to one part"
            )
