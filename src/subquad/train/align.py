"""Stage align: every new mixer learns its layer's attention output from the teacher's own stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from subquad.core.errors import ConfigError, nearest
from subquad.core.layout import Layout
from subquad.core.mixer import Mixer
from subquad.data import TokenStream
from subquad.models.stack import Block, Stack
from subquad.train.loop import Stage
from subquad.train.losses import relative_error

Listener = Callable[[int, Tensor, Tensor, Layout], None]
"""Told a layer's index, its mixer's normed input, its output, and where the tokens stand."""


@torch.no_grad()
def listen(teacher: Stack, tokens_bt: Tensor, layers: Sequence[int], heard: Listener) -> None:
    """Run the teacher and report input and output of the mixers of `layers`; what lies above the last is not run."""
    index = {id(block): i for i, block in enumerate(teacher.blocks)}
    last, wanted = max(layers), set(layers)

    def run(block: Callable[[Tensor, Layout], Tensor], x_btd: Tensor, layout: Layout) -> Tensor:
        assert isinstance(block, Block)
        i = index[id(block)]
        if i > last:
            return x_btd
        x_normed_btd = block.norm1(x_btd)
        y_btd = block.mixer(x_normed_btd, layout)
        if i in wanted:
            heard(i, x_normed_btd, y_btd, layout)
        return block.feed(x_btd, y_btd) if i < last else x_btd

    teacher.hidden(tokens_bt, run=run)


def trainable(mixer: Mixer, patterns: Sequence[str]) -> list[nn.Parameter]:
    """The parameters of `mixer` whose name matches one of `patterns` (``*`` stands for anything).

    Raises:
        ConfigError: a pattern that matches nothing.
    """
    named = dict(mixer.named_parameters())
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in named):
            raise ConfigError(
                f"--train {pattern}: no such parameter in {type(mixer).__name__}{nearest(pattern, named)}"
            )
    return [p for name, p in named.items() if any(fnmatchcase(name, pattern) for pattern in patterns)]


@dataclass(frozen=True)
class Cached:
    """Input and target of every converted layer for one batch, in bfloat16."""

    x_btd: list[Tensor]
    y_btd: list[Tensor]


class Align(Stage):
    """Minimise the sum over layers of ``||mixer(x) - attention(x)||^2 / ||attention(x)||^2``, x from the teacher.

    Layers learn in parallel and apart: no gradient crosses from one to another, and each layer's graph lives only while
    the teacher stands at that layer.

    With several `passes`, a round of batches is kept in memory and seen that often before the next round is read: on
    a CPU the teacher's forward is the cost. Targets in bfloat16 put the error off by about 1e-5, far below any loss.
    """

    name = "align"

    def __init__(
        self,
        teacher: Stack,
        student: Stack,
        layers: Sequence[int],
        stream: TokenStream,
        *,
        passes: int = 1,
        cache_bytes: int = 2**30,
        most_steps: int | None = None,
        patterns: Sequence[str] = ("*",),
        compile_mixers: bool = False,
    ) -> None:
        """Align the mixers of `layers` of `student`.

        Args:
            teacher: not changed.
            student: holds the new mixers.
            layers: indices of the converted layers.
            stream: batches of tokens.
            passes: how often each batch is trained on.
            cache_bytes: memory for a round's inputs and targets.
            most_steps: steps that there will be, so that no round is larger than its passes can be held.
            patterns: which parameters of the mixers train, by name.
            compile_mixers: compile them.

        Raises:
            ConfigError: no layers, no passes, a cache too small for one batch, or a pattern that matches nothing.
        """
        if not layers or passes < 1:
            raise ConfigError(f"align: expected layers and passes >= 1, got {list(layers)} and {passes}; give some")
        self.teacher, self.stream, self.passes, self.device = teacher.eval(), stream, passes, student.device
        self.layers = sorted(layers)
        self.mixers = {i: student.blocks[i].mixer for i in self.layers}
        self.tokens_per_step = stream.batch * stream.time
        size = 2 * 2 * len(self.layers) * self.tokens_per_step * student.config.d_model
        if passes > 1 and size > cache_bytes:
            raise ConfigError(
                f"cache_bytes={cache_bytes}: expected at least {size} for one batch; "
                "raise it, or lower --batch or --seq"
            )
        self.round = 1 if passes == 1 else cache_bytes // size
        if most_steps is not None:
            self.round = max(1, min(self.round, -(-most_steps // passes)))
        for parameter in student.parameters():
            parameter.requires_grad_(False)
        sets = [trainable(mixer, patterns) for mixer in self.mixers.values()]
        self.new, self.old, self.clipped = [p for s in sets for p in s], [], sets
        for parameter in self.new:
            parameter.requires_grad_(True)
        # Compiled beside the model, not in it: who uses the student afterwards gets it as it was.
        self._read = {i: torch.compile(m) if compile_mixers else m for i, m in self.mixers.items()}
        self._cache: list[Cached] = []
        self._begin(stream.state_dict(), 0)

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
        """Run the teacher on the next batch, report to `heard`, and keep the batch if it will be seen again."""
        cached = Cached([], [])

        def both(i: int, x_btd: Tensor, y_btd: Tensor, layout: Layout) -> None:
            if self.passes > 1:
                cached.x_btd.append(x_btd.to(torch.bfloat16))
                cached.y_btd.append(y_btd.to(torch.bfloat16))
            if heard is not None:
                heard(i, x_btd, y_btd, layout)

        listen(self.teacher, next(self.stream).to(self.device, non_blocking=True), self.layers, both)
        if self.passes > 1:
            self._cache.append(cached)

    def _learn(self, i: int, x_btd: Tensor, y_btd: Tensor, layout: Layout) -> Tensor:
        with torch.enable_grad():
            loss = relative_error(self._read[i](x_btd, layout), y_btd, layout)
            loss.backward()
        return loss.detach()

    def weights(self) -> dict[str, Tensor]:
        """All tensors of the new mixers, trained or not: the mapping from attention need not be run again."""
        return {f"{i}.{name}": x for i, mixer in self.mixers.items() for name, x in mixer.state_dict().items()}

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Put `weights` back."""
        for i, mixer in self.mixers.items():
            mixer.load_state_dict({k.removeprefix(f"{i}."): x for k, x in weights.items() if k.startswith(f"{i}.")})

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
