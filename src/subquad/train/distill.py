"""Stage distill: the whole student learns the teacher's distribution of the next token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from subquad.core.attention import RotarySpec
from subquad.core.layout import Layout
from subquad.data import TokenStream
from subquad.models.stack import Stack
from subquad.ops import rope
from subquad.train.loop import Stage
from subquad.train.losses import token_cross_entropy, token_kl
from subquad.train.precision import frozen


class Distill(Stage):
    """Minimise ``KL(p_teacher || p_student)`` per token (arXiv 1503.02531) plus `labels` times the cross-entropy.

    New mixers train at the full rate, everything taken over from the teacher at the lower one.
    """

    name = "distill"

    def __init__(
        self,
        teacher: Stack,
        student: Stack,
        layers: Sequence[int],
        stream: TokenStream,
        *,
        labels: float = 0.0,
        recompute: bool = False,
        compile_blocks: bool = False,
    ) -> None:
        """Distill `teacher` into `student`, which must share no tensor with it.

        Args:
            teacher: not changed.
            student: trained whole.
            layers: indices of its converted layers.
            stream: batches of tokens.
            labels: weight of the cross-entropy to the text itself.
            recompute: keep only the blocks' inputs for backward (arXiv 1604.06174): less memory, a third more time.
            compile_blocks: compile the blocks of both.
        """
        mine, theirs = ({x.data_ptr() for x in m.parameters()} for m in (student, teacher))
        assert not mine & theirs, "the student would train its teacher"
        self.teacher, self.student, self.stream, self.labels = teacher.eval(), student, stream, labels
        self.device, self.tokens_per_step = student.device, stream.batch * stream.time
        self._target = frozen(teacher) if self.device.type == "cuda" else teacher
        # Compiled beside the models, not in them: who uses them afterwards gets them as they were.
        blocks = (*self._target.blocks, *student.blocks)
        self._compiled = {id(block): torch.compile(block) for block in blocks} if compile_blocks else {}
        self._recompute = recompute
        rotaries = (getattr(m, "rotary", None) for model in (teacher, student) for m in model.modules())
        self._rotaries = [spec for spec in rotaries if isinstance(spec, RotarySpec)]
        student.requires_grad_(True)
        self.new = [p for i in layers for p in student.blocks[i].mixer.parameters()]
        new = {id(p) for p in self.new}
        self.old = [p for p in student.parameters() if id(p) not in new]
        self.clipped = [[*self.new, *self.old]]

    def step(self) -> dict[str, Tensor]:
        """One batch."""
        tokens_bt = next(self.stream)
        if self.device.type == "cuda":
            # A copy from pinned memory waits for nothing, so that this step is queued while the last one runs.
            tokens_bt = tokens_bt.pin_memory()
        tokens_bt = tokens_bt.to(self.device, non_blocking=True)
        layout = Layout.dense(*tokens_bt.shape, device=self.device)
        # Before the blocks, for a compiled one finds tables but keeps none.
        for spec in self._rotaries:
            rope.tables(spec, layout, self.student.dtype)
        with torch.no_grad():
            target_btd = self._target.hidden(tokens_bt, layout, self._run)
        hidden_btd = self.student.hidden(tokens_bt, layout, self._run)
        head_vd = self.student.lm_head.weight
        kl = token_kl(hidden_btd, head_vd, target_btd, self._target.lm_head.weight, layout)
        loss, figures = kl, {"kl": kl.detach()}
        if self.labels:
            cross = token_cross_entropy(hidden_btd, head_vd, tokens_bt, layout)
            loss, figures = kl + self.labels * cross, figures | {"cross_entropy": cross.detach()}
        loss.backward()  # pyright: ignore[reportUnknownMemberType]
        return {"loss": loss.detach(), **figures}

    def _run(self, block: Callable[[Tensor, Layout], Tensor], x_btd: Tensor, layout: Layout) -> Tensor:
        block = self._compiled.get(id(block), block)
        if self._recompute and torch.is_grad_enabled():
            return checkpoint(block, x_btd, layout, use_reentrant=False)  # type: ignore[no-any-return]
        return block(x_btd, layout)

    def weights(self) -> dict[str, Tensor]:
        """The whole student."""
        return self.student.state_dict()

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Put `weights` back."""
        self.student.load_state_dict(weights)

    def state_dict(self) -> dict[str, Any]:
        """The stream's position."""
        return {"stream": self.stream.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set it."""
        self.stream.load_state_dict(state["stream"])
