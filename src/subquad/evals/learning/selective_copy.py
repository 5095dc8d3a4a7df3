"""Selective copying: a few tokens lie scattered among blanks; at the end they are to be said in their order.

``_ a _ _ b _ c _ ... ? ? ? -> a b c``. Blanks are token 0, and the last token id asks for the next answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from subquad.core.errors import ConfigError
from subquad.evals.learning import TaskCard
from subquad.evals.learning.task import IGNORE, Batch, Task, token_batch

CARD = TaskCard(
    title="selective copying: tokens scattered among blanks, in their order",
    entry="SelectiveCopy",
    source="2312.00752",
    scored="each of the copied tokens",
    chance="1 in vocab - 2 tokens",
    sizes={
        "mamba": {"length": 4096, "tokens": 16, "vocab": 16},
        "short": {"length": 256, "tokens": 16, "vocab": 16},
    },
)


class SelectiveCopy(Task):
    """Selective copying of Mamba (arXiv 2312.00752, section 4.1.1)."""

    @dataclass(frozen=True)
    class Config:
        """Sizes.

        Attributes:
            length: places of tokens and blanks; as many questions follow as there are tokens.
            tokens: to copy.
            vocab: token ids, the blank and the question included.
        """

        length: int
        tokens: int
        vocab: int

        def __post_init__(self) -> None:
            """Refuse what does not fit."""
            if not 1 <= self.tokens <= self.length or self.vocab < 4:
                raise ConfigError(f"selective_copy: expected 1 <= tokens <= length and vocab from 4, got {self}")

    def __init__(self, config: Config) -> None:
        self.config = config
        self.vocab_size = self.outputs = config.vocab
        self.length = config.length + config.tokens

    def draw(self, rng: np.random.Generator, rows: int) -> Batch:
        """The places are any, in rising order."""
        n, length = self.config.tokens, self.config.length
        token_bn = rng.integers(1, self.config.vocab - 1, (rows, n))
        place_bn = np.sort(np.argpartition(rng.random((rows, length)), n - 1, axis=1)[:, :n], axis=1)
        inputs_bt = np.zeros((rows, self.length), np.int64)
        np.put_along_axis(inputs_bt, place_bn, token_bn, 1)
        inputs_bt[:, length:] = self.config.vocab - 1
        targets_bt = np.full_like(inputs_bt, IGNORE)
        targets_bt[:, length:] = token_bn
        return token_batch(inputs_bt, targets_bt)
