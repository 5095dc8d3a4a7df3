"""Stage distill_cached: the student learns what the teacher said about the stream, read from disk; no teacher runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from subquad.core.attention import RotarySpec
from subquad.core.errors import ConfigError, DataError
from subquad.core.layout import Layout
from subquad.core.mixer import Shared
from subquad.core.state import precise
from subquad.models.flops import training
from subquad.ops import rope
from subquad.train.logits import LogitCache, Origin, TopK
from subquad.train.losses import scored_bt, token_cross_entropy, token_kl_top
from subquad.train.stages import StudentStage, Work


class DistillCached(StudentStage):
    """Minimise the KL over the teacher's k most likely tokens and the rest as one, see `token_kl_top`, plus labels.

    The cache is one that `subquad.train.logits.fill` made of the same stream. Rates, parts of a batch and weights of
    tokens are those of the stage distill.
    """

    name = "distill_cached"
    spreads = True

    @dataclass(frozen=True)
    class Config:
        """What is minimised.

        Attributes:
            cache: folder of the teacher's logits.
            labels: weight of the cross-entropy to the text itself.
        """

        cache: str = ""
        labels: float = 0.0

        def __post_init__(self) -> None:
            """Refuse what is no loss."""
            if not self.cache or self.labels < 0:
                raise ConfigError(f"distill_cached: expected a cache and labels >= 0, got {self}; name the folder")

    def __init__(self, work: Work, config: Config) -> None:
        """Open the cache.

        Raises:
            CheckpointError: there is none, or it is damaged.
            DataError: it was made of another teacher, tokenizer or stream, or has another vocabulary.
        """
        super().__init__(work)
        self.config, self.student = config, work.student
        folder = Path(config.cache).expanduser()
        self.cache = LogitCache(folder)
        origin, vocabulary = self.cache.origin, work.student.config.vocab_size
        if origin.vocabulary > vocabulary:
            raise DataError(
                f"{folder}: expected a vocabulary of at most {vocabulary}, got {origin.vocabulary}; cache anew"
            )
        origin.check(Origin.of("the teacher", work.teacher, origin.k, work.stream), folder)
        compiled, blocks = work.machine.compiled, self.student.blocks
        self._compiled = {id(block): torch.compile(block, dynamic=False) for block in blocks} if compiled else {}
        rotaries = (getattr(m, "rotary", None) for m in self.student.modules())
        self._rotaries = [spec for spec in rotaries if isinstance(spec, RotarySpec)]

    def step(self) -> dict[str, Tensor]:
        """One batch, in parts."""
        batch = next(self.stream)
        # On the CPU: a sequence is found by its tokens, for which no device is waited for.
        top = self.cache.of(batch.tokens_bt).to(self.device)
        batch = batch.to(self.device)
        tokens_bt, wanted_bt = batch.tokens_bt, batch.wanted_bt
        whole = scored_bt(Layout.dense(*tokens_bt.shape, device=self.device), wanted_bt).sum()
        sums: dict[str, Tensor] = {}
        for part in self.parts(len(tokens_bt)):
            some_bt = None if wanted_bt is None else wanted_bt[part]
            figures = self._part(tokens_bt[part], some_bt, top.rows(part), whole)
            sums = {name: sums.get(name, 0) + x for name, x in figures.items()}
        return sums

    def _part(self, tokens_bt: Tensor, wanted_bt: Tensor | None, top: TopK, whole: Tensor) -> dict[str, Tensor]:
        """Add the gradients of some rows of a batch of `whole` scored tokens; their share of its figures."""
        layout = Layout.dense(*tokens_bt.shape, device=self.device)
        share = (scored_bt(layout, wanted_bt).sum().double() / whole.clamp(min=1)).to(precise(self.student.dtype))
        for spec in self._rotaries:  # before the blocks, for a compiled one finds tables but keeps none
            rope.tables(spec, layout, self.student.dtype)
        hidden_btd, head_vd = self.student.hidden(tokens_bt, layout, self._run), self.student.lm_head.weight
        kl = share * token_kl_top(hidden_btd, head_vd, top, layout, wanted_bt)
        loss, figures = kl, {"kl": kl.detach()}
        if self.config.labels:
            cross = share * token_cross_entropy(hidden_btd, head_vd, tokens_bt, layout, wanted_bt)
            loss, figures = kl + self.config.labels * cross, figures | {"cross_entropy": cross.detach()}
        loss.backward()  # pyright: ignore[reportUnknownMemberType]
        return {"loss": loss.detach(), **figures}

    def flops_per_token(self) -> float:
        """The student's forward and backward; the teacher has run before."""
        return training(self.student, self.stream.time, [*self.new, *self.old])

    def _run(self, block: Callable[..., Any], x_btd: Tensor, layout: Layout, *shared: Shared) -> Any:
        block = self._compiled.get(id(block), block)
        if self.machine.recompute and torch.is_grad_enabled():
            return checkpoint(block, x_btd, layout, *shared, use_reentrant=False)
        return block(x_btd, layout, *shared)


STAGE = DistillCached
