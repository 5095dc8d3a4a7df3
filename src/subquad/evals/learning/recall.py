"""Associative recall: keys and values in turns, then one of the keys; its value is the answer.

``k v k v ... k v => k -> v``. The same key has the same value throughout a row; rows differ. Of the vocabulary two
tokens are special, as in the paper's published configuration: the mark in front of the question, and one that is never
drawn. Half of the others are keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from subquad.core.errors import ConfigError
from subquad.evals.learning import TaskCard
from subquad.evals.learning.task import IGNORE, Batch, Task, token_batch

CARD = TaskCard(
    title="associative recall: the value that stood behind a key",
    entry="Recall",
    source="2212.14052",
    scored="the value of the key at the end",
    chance="1 in (vocab - 2) / 2 values",
    sizes={"h3": {"length": 20, "vocab": 10}, "h3_40": {"length": 40, "vocab": 20}},
)
SPECIAL = 2


class Recall(Task):
    """Associative recall of Hungry Hungry Hippos (arXiv 2212.14052, section 3.1 and table 2).

    What is learned is every value that the row has shown before, so that a row teaches more than once; what counts is
    the last one, as in the paper, whose models learned every token. ``chance`` is that of any value; saying the row's
    commonest value is right a little more often.
    """

    @dataclass(frozen=True)
    class Config:
        """Sizes.

        Attributes:
            length: tokens of keys and values in front of the question, which adds two.
            vocab: all tokens, two of them special.
        """

        length: int
        vocab: int

        def __post_init__(self) -> None:
            """Refuse what leaves nothing to ask for."""
            if self.length < 2 or self.length % 2:
                raise ConfigError(f"recall: expected an even length from 2, got {self.length}; pairs take two tokens")
            if self.vocab < SPECIAL + 4 or self.vocab % 2:
                raise ConfigError(f"recall: expected an even vocab from {SPECIAL + 4}, got {self.vocab}; give more")

    def __init__(self, config: Config) -> None:
        self.config = config
        self.keys = (config.vocab - SPECIAL) // 2
        self.vocab_size = self.outputs = config.vocab
        self.length = config.length + 2

    def batch(self, split: str, seed: int, step: int, rows: int) -> Batch:
        """In the test the last answer alone counts."""
        batch = super().batch(split, seed, step, rows)
        if split == "test":
            batch.targets[:, :-1] = IGNORE
        return batch

    def draw(self, rng: np.random.Generator, rows: int) -> Batch:
        """Ids: keys first, then values, then the mark."""
        n, pairs = self.keys, self.config.length // 2
        value_bk = rng.integers(n, 2 * n, (rows, n))
        key_bp = rng.integers(0, n, (rows, pairs))
        # One of the keys that were shown, each as likely: the argmax of noise over them.
        shown_bk = (key_bp[:, :, None] == np.arange(n)).any(1)
        asked_b1 = np.where(shown_bk, rng.random((rows, n)), -1).argmax(1)[:, None]
        inputs_bt = np.empty((rows, self.length), np.int64)
        inputs_bt[:, :-2:2], inputs_bt[:, 1:-2:2] = key_bp, np.take_along_axis(value_bk, key_bp, 1)
        inputs_bt[:, -2], inputs_bt[:, -1:] = 2 * n, asked_b1
        seen_bp = np.tril(key_bp[:, :, None] == key_bp[:, None], -1).any(-1)
        targets_bt = np.full_like(inputs_bt, IGNORE)
        # What comes out at a key is its value.
        targets_bt[:, :-2:2] = np.where(seen_bp, inputs_bt[:, 1:-2:2], IGNORE)
        targets_bt[:, -1:] = np.take_along_axis(value_bk, asked_b1, 1)
        return token_batch(inputs_bt, targets_bt)
