"""Stage distill: the whole student learns the teacher's distribution of the next token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from subquad.core.attention import RotarySpec
from subquad.core.errors import ConfigError
from subquad.core.layout import Layout
from subquad.core.mixer import Shared
from subquad.core.state import precise
from subquad.models.flops import forward, training
from subquad.ops import rope
from subquad.train.losses import scored_bt, token_cross_entropy, token_kl
from subquad.train.precision import frozen
from subquad.train.stages import StudentStage, Work


class Distill(StudentStage):
    """Minimise ``KL(p_teacher || p_student)`` per token (arXiv 1503.02531), see `token_kl`, plus `labels` times the CE.

    New mixers train at the full rate, everything taken over from the teacher at the lower one. The batch goes through
    in parts of the machine's rows; every token counts the same whatever the parts.
    """

    name = "distill"
    spreads = True

    @dataclass(frozen=True)
    class Config:
        """What is minimised.

        Attributes:
            labels: weight of the cross-entropy to the text itself.
            temperature: of both distributions.
            reverse: share of ``KL(p_student || p_teacher)``.
        """

        labels: float = 0.0
        temperature: float = 1.0
        reverse: float = 0.0

        def __post_init__(self) -> None:
            """Refuse what is no loss."""
            if self.labels < 0 or self.temperature <= 0 or not 0 <= self.reverse <= 1:
                raise ConfigError(
                    f"distill: expected labels >= 0, temperature > 0, reverse in 0..1, got {self}; fix it"
                )

    def __init__(self, work: Work, config: Config | None = None) -> None:
        super().__init__(work)
        self.config = config or self.Config()
        self.teacher, self.student = work.teacher.eval(), work.student
        self._target = frozen(self.teacher) if self.device.type == "cuda" else self.teacher
        # Compiled beside the models, not in them: who uses them afterwards gets them as they were. Shapes never change
        # within a stage, so none is made symbolic for a later one.
        blocks = (*self._target.blocks, *self.student.blocks)
        compiled = work.machine.compiled
        self._compiled = {id(block): torch.compile(block, dynamic=False) for block in blocks} if compiled else {}
        rotaries = (getattr(m, "rotary", None) for model in (self.teacher, self.student) for m in model.modules())
        self._rotaries = [spec for spec in rotaries if isinstance(spec, RotarySpec)]

    def step(self) -> dict[str, Tensor]:
        """One batch, in parts."""
        batch = next(self.stream).to(self.device)
        tokens_bt, wanted_bt = batch.tokens_bt, batch.wanted_bt
        whole = scored_bt(Layout.dense(*tokens_bt.shape, device=self.device), wanted_bt).sum()
        sums: dict[str, Tensor] = {}
        for part in self.parts(len(tokens_bt)):
            figures = self._part(tokens_bt[part], None if wanted_bt is None else wanted_bt[part], whole)
            sums = {name: sums.get(name, 0) + x for name, x in figures.items()}
        return sums

    def _part(self, tokens_bt: Tensor, wanted_bt: Tensor | None, whole: Tensor) -> dict[str, Tensor]:
        """Add the gradients of some rows of a batch of `whole` scored tokens; their share of its figures."""
        layout = Layout.dense(*tokens_bt.shape, device=self.device)
        share = (scored_bt(layout, wanted_bt).sum().double() / whole.clamp(min=1)).to(precise(self.student.dtype))
        # Before the blocks, for a compiled one finds tables but keeps none.
        for spec in self._rotaries:
            rope.tables(spec, layout, self.student.dtype)
        with torch.no_grad():
            target_btd = self._target.hidden(tokens_bt, layout, self._run)
        hidden_btd = self.student.hidden(tokens_bt, layout, self._run)
        head_vd = self.student.lm_head.weight
        kl = share * token_kl(
            hidden_btd,
            head_vd,
            target_btd,
            self._target.lm_head.weight,
            layout,
            wanted_bt,
            temperature=self.config.temperature,
            reverse=self.config.reverse,
        )
        loss, figures = kl, {"kl": kl.detach()}
        if self.config.labels:
            cross = share * token_cross_entropy(hidden_btd, head_vd, tokens_bt, layout, wanted_bt)
            loss, figures = kl + self.config.labels * cross, figures | {"cross_entropy": cross.detach()}
        loss.backward()  # pyright: ignore[reportUnknownMemberType]
        return {"loss": loss.detach(), **figures}

    def flops_per_token(self) -> float:
        """The teacher's forward, and the student's forward and backward."""
        seq = self.stream.time
        return forward(self.teacher, seq) + training(self.student, seq, [*self.new, *self.old])

    def _run(self, block: Callable[..., Any], x_btd: Tensor, layout: Layout, *shared: Shared) -> Any:
        block = self._compiled.get(id(block), block)
        if self.machine.recompute and torch.is_grad_enabled():
            return checkpoint(block, x_btd, layout, *shared, use_reentrant=False)
        return block(x_btd, layout, *shared)


STAGE = Distill
