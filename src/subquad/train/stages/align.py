"""Stage align: every new mixer learns its layer's attention output from the teacher's own stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from subquad.core.errors import ConfigError
from subquad.core.layout import Layout
from subquad.core.mixer import Shared
from subquad.models.flops import forward, training_apart
from subquad.models.stack import Block, Stack
from subquad.train.losses import squared_error, squared_norm
from subquad.train.stages import StudentStage, Work

Listener = Callable[[int, Tensor, Tensor, Layout], None]
"""Told a layer's index, its mixer's normed input, its output, and where the tokens stand."""


@torch.no_grad()
def listen(
    teacher: Stack, tokens_bt: Tensor, layers: Sequence[int], heard: Listener, *, rows: int | None = None
) -> None:
    """Run the teacher and report input and output of the mixers of `layers`; what lies above the last is not run.

    Args:
        teacher: the model.
        tokens_bt: dense token ids.
        layers: indices.
        heard: told about all rows of a layer at once, lowest layer first.
        rows: go through a block together; None is all.
    """
    index = {id(block): i for i, block in enumerate(teacher.blocks)}
    last, wanted = max(layers), set(layers)

    def run(block: Callable[..., Any], x_btd: Tensor, layout: Layout, *shared: Shared) -> Any:
        assert isinstance(block, Block)
        i = index[id(block)]
        if shared:  # it can't be run in parts, and is never one to convert
            assert i not in wanted
            return block(x_btd, layout, *shared) if i < last else (x_btd, {})
        if i > last:
            return x_btd
        x_normed_btd = block.norm1(x_btd)
        y_btd = by_rows(block.mixer, layout, rows, x_normed_btd)
        if i in wanted:
            heard(i, x_normed_btd, y_btd, layout)
        if i == last:
            return x_btd

        def feed(x_btd: Tensor, y_btd: Tensor, _: Layout) -> Tensor:
            return block.feed(x_btd, y_btd)

        return by_rows(feed, layout, rows, x_btd, y_btd)

    teacher.hidden(tokens_bt, run=run)


def split_rows(layout: Layout, rows: int | None, *tensors: Tensor) -> Iterator[tuple[Layout, tuple[Tensor, ...]]]:
    """Some rows of a dense block at a time: their layout, and these rows of each of `tensors`.

    Args:
        layout: of the whole block; the layouts of the parts are kept with it, so that all layers share them.
        rows: at a time; None is all.
        tensors: ``[b, ...]``.
    """
    b, t = layout.shape
    if rows is None or rows >= b:
        yield layout, tensors
        return
    sizes = [min(rows, b - start) for start in range(0, b, rows)]
    device = layout.lengths_b.device
    parts = layout.once(("rows", rows), lambda: [Layout.dense(size, t, device=device) for size in sizes])
    yield from zip(parts, zip(*(x.split(sizes) for x in tensors), strict=True), strict=True)


def by_rows(run: Callable[..., Tensor], layout: Layout, rows: int | None, *tensors: Tensor) -> Tensor:
    """``run(*tensors, layout)``, some rows at a time."""
    parts = [run(*some, at) for at, some in split_rows(layout, rows, *tensors)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass(frozen=True)
class Cached:
    """Input and target of every converted layer for one batch, in bfloat16."""

    x_btd: list[Tensor]
    y_btd: list[Tensor]


class Align(StudentStage):
    """Minimise the sum over layers of ``||mixer(x) - attention(x)||^2 / ||attention(x)||^2``, x from the teacher.

    Layers learn in parallel and apart: no gradient crosses from one to another, and each layer's graph lives only while
    the teacher stands at that layer, for the machine's rows at a time. Numerator and denominator are those of the whole
    batch, whatever the parts.

    With several `passes`, a round of batches is kept in memory and seen that often before the next round is read: on
    a CPU the teacher's forward is the cost. Targets in bfloat16 put the error off by about 1e-5, far below any loss.
    """

    name = "align"
    layerwise = True

    @dataclass(frozen=True)
    class Config:
        """How batches are read.

        Attributes:
            passes: how often each batch is trained on.
            cache_gb: memory for a round's inputs and targets, in GiB.
        """

        passes: int = 1
        cache_gb: float = 1.0

        def __post_init__(self) -> None:
            """Refuse what reads nothing."""
            if self.passes < 1 or self.cache_gb < 0:
                raise ConfigError(f"align: expected passes >= 1 and cache_gb >= 0, got {self}; give some")

    def __init__(self, work: Work, config: Config | None = None) -> None:
        """Align the new mixers of `work`.

        Raises:
            ConfigError: no layers, a cache too small for one batch, or a pattern that matches nothing.
        """
        super().__init__(work)
        config = config or self.Config()
        self.source, self.passes = work.source.eval(), config.passes
        self.layers = sorted(work.layers)
        self.mixers = {i: work.student.blocks[i].mixer for i in self.layers}
        # Of the whole batch, whatever the number of processes: the order of the batches follows from it.
        size = 2 * 2 * len(self.layers) * self.tokens_per_step * work.student.config.d_model
        if config.passes > 1 and size > config.cache_gb * 2**30:
            raise ConfigError(
                f"align: expected cache_gb of at least {size / 2**30:.3g} for one batch, got {config.cache_gb}; "
                "raise it, or lower --batch or --seq"
            )
        self.round = 1 if config.passes == 1 else int(config.cache_gb * 2**30) // size
        if work.steps is not None:  # no round larger than its passes can be held
            self.round = max(1, min(self.round, -(-work.steps // config.passes)))
        self.clipped = self.by_layer()
        # Compiled beside the model, not in it: who uses the student afterwards gets it as it was.
        compiled = work.machine.compiled
        self._read = {i: torch.compile(m, dynamic=False) if compiled else m for i, m in self.mixers.items()}
        self._cache: list[Cached] = []
        self._begin(self.stream.state_dict(), 0)

    @classmethod
    def eligible(cls, student: Stack, layers: Sequence[int]) -> list[str]:
        """The new mixers' own."""
        mixers = tuple(f"blocks.{i}.mixer." for i in layers)
        return [name for name, _ in student.named_parameters() if name.startswith(mixers)]

    def _begin(self, stream_state: dict[str, Any], number: int) -> None:
        self._cache.clear()
        self._stream_state, self._number, self._at = stream_state, number, 0

    def step(self) -> dict[str, Tensor]:
        """One batch: from the teacher in a round's first pass, from memory in the others."""
        if self._at == self.round * self.passes:
            self._begin(self.stream.state_dict(), self._number + 1)
        losses: list[Tensor] = []
        done, at = divmod(self._at, self.round)
        if done == 0:
            self._capture(lambda i, x, y, layout: losses.append(self._learn(i, x, y, layout)))
        else:
            order = np.random.default_rng((self.stream.seed, self._number, done)).permutation(self.round)
            cached = self._cache[int(order[at])]
            layout = Layout.dense(*cached.x_btd[0].shape[:2], device=self.device)
            for i, x_btd, y_btd in zip(self.layers, cached.x_btd, cached.y_btd, strict=True):
                x_btd, y_btd = (z.to(next(self.mixers[i].parameters()).dtype) for z in (x_btd, y_btd))
                losses.append(self._learn(i, x_btd, y_btd, layout))
        self._at += 1
        layers = torch.stack(losses)
        return {"loss": layers.mean(), "layers": layers}

    def _capture(self, heard: Listener | None) -> None:
        """Run the teacher on this process's rows of the next batch, report to `heard`, and keep what is seen again."""
        cached = Cached([], [])

        def both(i: int, x_btd: Tensor, y_btd: Tensor, layout: Layout) -> None:
            if self.passes > 1:
                cached.x_btd.append(x_btd.to(torch.bfloat16))
                cached.y_btd.append(y_btd.to(torch.bfloat16))
            if heard is not None:
                heard(i, x_btd, y_btd, layout)

        tokens_bt = next(self.stream).to(self.device).tokens_bt
        (own,) = self.processes.parts(len(tokens_bt))
        listen(self.source, tokens_bt[own], self.layers, both, rows=self.machine.rows)
        if self.passes > 1:
            self._cache.append(cached)

    def _learn(self, i: int, x_btd: Tensor, y_btd: Tensor, layout: Layout) -> Tensor:
        """Add the gradients of a layer; this process's share of its relative error over the whole batch."""
        norm = self.processes.sum(squared_norm(y_btd, layout))
        total = torch.zeros_like(norm)
        for at, (x_part_btd, y_part_btd) in split_rows(layout, self.machine.rows, x_btd, y_btd):
            with torch.enable_grad():
                loss = squared_error(self._read[i](x_part_btd, at), y_part_btd, at) / norm
                if loss.requires_grad:  # the patterns may leave a layer as it is
                    loss.backward()
            total = total + loss.detach()
        return total

    def flops_per_token(self) -> float:
        """The teacher's forward up to the last layer, once for all passes, and each mixer's forward and backward."""
        seq = self.stream.time
        heard = forward(self.source, seq, layers=max(self.layers) + 1, head=False)
        trained = [*self.new, *self.old]
        return heard / self.passes + sum(training_apart(m, seq, trained) for m in self.mixers.values())

    def state_dict(self) -> dict[str, Any]:
        """Where the round began, and how far it is."""
        return {"stream": self._stream_state, "round": self.round, "number": self._number, "at": self._at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Read the round's batches again as far as it was, without training on them."""
        if state["round"] != self.round:
            raise ConfigError(
                f"resume: expected a round of {state['round']} batches as in the checkpoint, got {self.round}; "
                "give the same passes, cache and budget"
            )
        self.stream.load_state_dict(state["stream"])
        self._begin(state["stream"], state["number"])
        # A round that is over needs its place in the stream only.
        again = state["at"] < self.round * self.passes
        for _ in range(min(state["at"], self.round)):
            if again and self.passes > 1:
                self._capture(None)
            else:
                next(self.stream)
        self._at = state["at"]


STAGE = Align
