"""The contract of every layer that mixes along time: read, then commit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from subquad.core.attention import AttentionStats, AttentionWeights
from subquad.core.errors import ConfigError, UnsupportedError
from subquad.core.layout import Layout
from subquad.core.state import State

Shared = Mapping[str, Tensor]
NOTHING: Shared = MappingProxyType({})


class Counts(NamedTuple):
    """What is still to be counted of a commit, int64 ``[b]`` each, in fixed buffers.

    Attributes:
        added: to these `n_b` is added.
        put: these become `n_b`.
    """

    added: tuple[Tensor, ...] = ()
    put: tuple[Tensor, ...] = ()

    @staticmethod
    def all(several: Iterable[Counts]) -> Counts:
        """Those of several commits."""
        added, put = zip(*several, strict=True)
        return Counts(tuple(chain.from_iterable(added)), tuple(chain.from_iterable(put)))

    def count_(self, n_b: Tensor) -> None:
        """Count, in one launch for all of a kind."""
        if self.added:
            torch._foreach_add_(self.added, [n_b] * len(self.added))  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
        if self.put:
            torch._foreach_copy_(self.put, [n_b] * len(self.put))  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]


class Update(ABC):
    """What one block would change. Holds the block's inputs to the recurrence, never a state per token."""

    @abstractmethod
    def commit(self, n_b: Tensor | None = None) -> State:
        """The state after the first `n_b` tokens of each row, as a new value.

        Args:
            n_b: int64 ``[b]``, each from 0 to the row's length; None keeps every token.
        """

    def commit_(self, pool: State, rows: Tensor | None = None, n_b: Tensor | None = None) -> None:
        """The same into fixed buffers: `rows` of `pool` (all, in order, when None) take the new state.

        `n_b` stays on the device, and nothing here waits for it.
        """
        pool.write_(rows, self.commit(n_b))

    def store_(self, pool: State, rows: Tensor | None, n_b: Tensor) -> Counts:
        """`commit_` but for the counting that is left to the caller, who may count for many layers at once."""
        self.commit_(pool, rows, n_b)
        return Counts()

    def tentative(self) -> State:
        """The state as if the whole block were kept, to draft on; commit of a shorter n stays possible."""
        return self.commit(None)

    def summary(self) -> tuple[Tensor, Tensor] | None:
        """The block as an affine map of the state ``(transition, addition)``, or None where it has none."""
        return None

    def offers(self) -> Shared:
        """What layers above may read of this one in the same pass, by names of its own; see `Mixer.sources`."""
        return NOTHING


@dataclass(frozen=True)
class Committed(Update):
    """Of a block of which `Layout.kept_b` told what is kept: its read has committed that already.

    Attributes:
        state: that was read, with the kept tokens in it.
    """

    state: State

    def commit(self, n_b: Tensor | None = None) -> State:
        """A copy of the state."""
        return self.state.snapshot()

    def commit_(self, pool: State, rows: Tensor | None = None, n_b: Tensor | None = None) -> None:
        """Nothing: `pool` is what was read, as was promised."""
        assert rows is None


class Mixer(nn.Module, ABC):
    """A layer ``[b, t, d] -> [b, t, d]`` that may look along time, with an explicit state.

    One rule: `read` is pure. Nothing is written before it is certain, so nothing is ever taken back. What is certain
    before a block is read, its layout says (`Layout.kept_b`): only that may be written at once.
    A subclass owns a frozen ``Config`` and is built from it.
    """

    Config: ClassVar[type[Any]]

    @abstractmethod
    def init_state(self, batch: int, capacity: int = 0, **factory: Any) -> State:
        """An empty state for `batch` rows.

        Args:
            capacity: most tokens that will ever be committed; what grows with the context allocates for it once,
                what is constant ignores it.
            factory: ``device`` and ``dtype``, by default those of the parameters. ``device="meta"`` costs nothing
                and tells ``nbytes``.
        """

    def init_pool(self, rows: int, capacity: int, block: int, **factory: Any) -> State:
        """An empty state for rows that decode: `init_state`, or another form of it where one is faster.

        Such a form may keep the last block read, so that of several reads of a pool only the last can be committed,
        and only into the pool itself or as a value; see `State.settled`.

        Args:
            rows, capacity, factory: as in `init_state`.
            block: most tokens of a read that is to be fast; longer ones are right as well.
        """
        return self.init_state(rows, capacity, **factory)

    @abstractmethod
    def read(
        self, x_btd: Tensor, state: State, layout: Layout | None = None, shared: Shared = NOTHING
    ) -> tuple[Tensor, Update]:
        """Read a block against `state` and return its output and what it would change.

        Args:
            x_btd: ``[b, t, d]``, the block.
            state: rows aligned with the block's; not modified, or by what the layout says will be kept.
            layout: where its tokens stand; None is a dense block that starts at position 0.
            shared: what the layers of `sources` offer, ``<k>.<name>`` of the k-th, read-only.
        """

    def sources(self, lower: Sequence[Mixer]) -> Sequence[int]:
        """Which layers below this one it reads the offers of, in an order of its own; most mixers read none.

        A layer that reads, or is read, is run in training by `begin`.

        Args:
            lower: the mixers of all layers below, the lowest first.

        Raises:
            ConfigError: they do not offer what this one needs.
        """
        return ()

    def read_stream(
        self, x_btd: Tensor, norm: nn.RMSNorm, state: State, layout: Layout
    ) -> tuple[Tensor, Update] | None:
        """`read` of ``norm(x)`` where the norm costs no launch of its own, or None: then nothing has been done.

        None as well of a mixer with `sources`, for their offers are not at hand here.

        Args:
            x_btd: ``[b, t, d]``, the stream.
            norm: in front of this mixer.
            state, layout: as in `read`.
        """
        return None

    def forward(self, x_btd: Tensor, layout: Layout | None = None, shared: Shared = NOTHING) -> Tensor:
        """The training form: read from an empty state and let the update go."""
        return self.begin(x_btd, layout, shared)[0]

    def begin(self, x_btd: Tensor, layout: Layout | None = None, shared: Shared = NOTHING) -> tuple[Tensor, Update]:
        """`read` from an empty state."""
        state = self.init_state(x_btd.shape[0], device=x_btd.device, dtype=x_btd.dtype)
        return self.read(x_btd, state, layout, shared)

    def mix_values(self, x_btd: Tensor, v_bthv: Tensor, layout: Layout | None = None) -> Tensor:
        """``y = M(x) v`` per head, from an empty state: the mixing along time alone, of values that are given.

        ``M`` is the ``[t, t]`` matrix by which the mixer weighs earlier tokens' values; it is never built. Projection
        and convolution of the values, gate, norm and output projection are left out.

        Args:
            x_btd: ``[b, t, d]``, what queries, keys, decays and the like come from.
            v_bthv: ``[b, t, h, v]``, the values of each of the mixer's heads.
            layout: where the tokens stand; None is dense.

        Returns:
            ``[b, t, h, v]``.

        Raises:
            UnsupportedError: this mixer is not linear in its values head by head, or doesn't say how.
        """
        raise UnsupportedError(
            f"{type(self).__name__} has no mixing matrix to compare; leave stage matrix out or choose another mixer"
        )

    def commit_(self, pool: State, rows: Tensor | None, update: Update, n_b: Tensor | None = None) -> None:
        """Commit `update` in place into `rows` of `pool`; see `Update.commit_`."""
        update.commit_(pool, rows, n_b)

    @classmethod
    def from_attention(cls, source: AttentionWeights, stats: AttentionStats | None = None, **options: Any) -> Self:
        """Build this mixer from a softmax attention's weights, so that conversion starts near the teacher.

        Args:
            source: the attention to take over; its tensors are copied.
            stats: what was measured of it on data, or None for the data-free start.
            options: fields of ``Config`` to set otherwise than the mapping does.

        Raises:
            UnsupportedError: this mixer has no mapping from attention.
        """
        raise UnsupportedError(f"{cls.__name__} has no mapping from attention; choose a mixer whose card says so")

    def factory(self, **override: Any) -> dict[str, Any]:
        """``device`` and ``dtype`` of the parameters, with `override`'s in their place."""
        like = next(self.parameters())
        return {"device": like.device, "dtype": like.dtype} | {k: v for k, v in override.items() if v is not None}

    def dense_layout(self, x_btd: Tensor, layout: Layout | None) -> Layout:
        """`layout`, checked against the block, or the dense one when None."""
        b, t = x_btd.shape[:2]
        if layout is None:
            return Layout.dense(b, t, device=x_btd.device)
        if layout.shape != (b, t):
            raise ConfigError(
                f"layout: expected shape {(b, t)} as the block's, got {layout.shape}; build it for this block"
            )
        return layout
