"""Stage supervise: the student learns the text itself, or of conversations the answers; no teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from subquad.core.attention import RotarySpec
from subquad.core.errors import ConfigError
from subquad.core.layout import Layout
from subquad.core.mixer import Shared
from subquad.core.state import precise
from subquad.models.flops import training
from subquad.ops import rope
from subquad.train import lora
from subquad.train.losses import scored_bt, token_cross_entropy
from subquad.train.stages import StudentStage, Work


class Supervise(StudentStage):
    """Minimise the mean of ``-log p(next token)`` over the tokens that are wanted: of a batch with answers only those.

    The batch goes through in parts of the machine's rows; every token counts the same whatever the parts.
    """

    name = "supervise"
    spreads = True

    @dataclass(frozen=True)
    class Config:
        """What carries the change.

        Attributes:
            rank: of the adapters (`subquad.train.lora`) that train in place of the linear layers' weights and are
                merged into them at the end; 0 trains the parameters themselves.
            alpha: over `rank`, the factor on what the adapters add.
        """

        rank: int = 0
        alpha: float = 16.0

        def __post_init__(self) -> None:
            """Refuse a rank that is none."""
            if self.rank < 0 or self.alpha <= 0:
                raise ConfigError(f"supervise: expected rank >= 0 and alpha > 0, got {self}; change them")

    def __init__(self, work: Work, config: Config | None = None) -> None:
        """Train what `work` names, or adapters on those of its weights that belong to linear layers.

        Raises:
            ConfigError: a pattern that matches nothing, no linear layer among the names, or a rank above its sides.
            UnsupportedError: adapters on parameters that are spread over processes.
        """
        self.config = config or self.Config()
        # An adapter adds a whole matrix to its weight; and where only adapters train, there is little else to spread.
        self.spreads = not self.config.rank
        super().__init__(work)
        self.student = work.student
        self._adapted: tuple[str, ...] = ()
        if self.config.rank:
            self._adapt()
        compiled = work.machine.compiled
        blocks = self.student.blocks
        self._compiled = {id(block): torch.compile(block, dynamic=False) for block in blocks} if compiled else {}
        rotaries = (getattr(m, "rotary", None) for m in self.student.modules())
        self._rotaries = [spec for spec in rotaries if isinstance(spec, RotarySpec)]

    def _adapt(self) -> None:
        modules = dict(self.student.named_modules())
        linears = [name.removesuffix(".weight") for name in self.names if name.endswith(".weight")]
        linears = [name for name in linears if isinstance(modules[name], nn.Linear)]
        if not linears:
            raise ConfigError(
                f"supervise: expected linear layers for adapters, got none by {', '.join(self.work.train)}; "
                "train others, or leave the rank out"
            )
        self.student.requires_grad_(False)
        # Drawn by the run's seed and by nothing that happened before.
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.stream.seed)
            self.new, self.old = lora.attach(self.student, linears, self.config.rank, self.config.alpha), []
        self.clipped = [self.new]
        # What has changed once the adapters are merged.
        self.names = [f"{name}.weight" for name in linears]
        self._adapted = tuple(f"{name}.parametrizations." for name in linears)

    def finish(self) -> None:
        """Merge the adapters."""
        if self._adapted:
            lora.merge(self.student)

    def weights(self) -> dict[str, Tensor]:
        """Those of every stage, the adapters, and the weights under them."""
        under = {k: x for k, x in self.student.state_dict().items() if k.startswith(self._adapted)}
        return super().weights() | (under if self._adapted else {})

    def step(self) -> dict[str, Tensor]:
        """One batch, in parts."""
        batch = next(self.stream).to(self.device)
        tokens_bt, wanted_bt = batch.tokens_bt, batch.wanted_bt
        whole = scored_bt(Layout.dense(*tokens_bt.shape, device=self.device), wanted_bt).sum()
        loss = torch.zeros((), device=self.device)
        for part in self.parts(len(tokens_bt)):
            loss = loss + self._part(tokens_bt[part], None if wanted_bt is None else wanted_bt[part], whole)
        return {"loss": loss, "cross_entropy": loss}

    def _part(self, tokens_bt: Tensor, wanted_bt: Tensor | None, whole: Tensor) -> Tensor:
        """Add the gradients of some rows of a batch of `whole` scored tokens; their share of its loss."""
        layout = Layout.dense(*tokens_bt.shape, device=self.device)
        share = (scored_bt(layout, wanted_bt).sum().double() / whole.clamp(min=1)).to(precise(self.student.dtype))
        for spec in self._rotaries:  # before the blocks, for a compiled one finds tables but keeps none
            rope.tables(spec, layout, self.student.dtype)
        hidden_btd = self.student.hidden(tokens_bt, layout, self._run)
        loss = share * token_cross_entropy(hidden_btd, self.student.lm_head.weight, tokens_bt, layout, wanted_bt)
        loss.backward()  # pyright: ignore[reportUnknownMemberType]
        return loss.detach()

    def flops_per_token(self) -> float:
        """The student's forward and backward; of an adapted weight, only the adapter's gradient."""
        return training(self.student, self.stream.time, [*self.new, *self.old])

    def _run(self, block: Callable[..., Any], x_btd: Tensor, layout: Layout, *shared: Shared) -> Any:
        block = self._compiled.get(id(block), block)
        if self.machine.recompute and torch.is_grad_enabled():
            return checkpoint(block, x_btd, layout, *shared, use_reentrant=False)
        return block(x_btd, layout, *shared)


STAGE = Supervise
