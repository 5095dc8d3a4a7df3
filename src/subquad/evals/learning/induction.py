"""Induction heads: a mark stands among random tokens, and again at the end; the answer is what stood behind it.

``a b c => f g h ... => -> f``. The mark is the last token id.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from subquad.core.errors import ConfigError
from subquad.evals.learning import TaskCard
from subquad.evals.learning.task import IGNORE, Batch, Task, token_batch

CARD = TaskCard(
    title="induction heads: the token that stood behind a mark",
    entry="Induction",
    source="2212.14052",
    scored="the token behind the mark at the end",
    chance="1 in vocab - 1 tokens",
    sizes={"h3": {"length": 30, "vocab": 20}, "mamba": {"length": 256, "vocab": 16}},
)


class Induction(Task):
    """Induction heads of Hungry Hungry Hippos (arXiv 2212.14052, table 2) and of Mamba (2312.00752, section 4.1.2).

    Only the answer is learned and counts: every other token is random.
    """

    @dataclass(frozen=True)
    class Config:
        """Sizes.

        Attributes:
            length: tokens of a row, the mark at its end included.
            vocab: tokens, the mark included.
        """

        length: int
        vocab: int

        def __post_init__(self) -> None:
            """Refuse what leaves no place for an answer."""
            if self.length < 3 or self.vocab < 3:
                raise ConfigError(f"induction: expected length and vocab from 3, got {self}; give more")

    def __init__(self, config: Config) -> None:
        self.config = config
        self.vocab_size = self.outputs = config.vocab
        self.length = config.length

    def draw(self, rng: np.random.Generator, rows: int) -> Batch:
        """The mark's first place is any but the last two."""
        mark = self.config.vocab - 1
        inputs_bt = rng.integers(0, mark, (rows, self.length))
        at_b1 = rng.integers(0, self.length - 2, (rows, 1))
        np.put_along_axis(inputs_bt, at_b1, mark, 1)
        inputs_bt[:, -1] = mark
        targets_bt = np.full_like(inputs_bt, IGNORE)
        targets_bt[:, -1:] = np.take_along_axis(inputs_bt, at_b1 + 1, 1)
        return token_batch(inputs_bt, targets_bt)
