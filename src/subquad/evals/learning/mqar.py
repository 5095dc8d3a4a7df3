"""Multi-query associative recall: pairs of key and value, then every key once more, spread over the row.

``k1 v1 k2 v2 ... _ _ k2 _ _ _ k1 _``: the answer at each key's second place is its value. Blanks are token 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from subquad.core.errors import ConfigError
from subquad.evals.learning import TaskCard
from subquad.evals.learning.task import IGNORE, Batch, Task, token_batch

CARD = TaskCard(
    title="multi-query associative recall: the value of every key",
    entry="MQAR",
    source="2312.04927",
    scored="the value at the second place of every key",
    chance="1 in vocab / 2 values",
    sizes={
        "zoology_64": {"length": 64, "pairs": 4, "vocab": 8192},
        "zoology_128": {"length": 128, "pairs": 8, "vocab": 8192},
        "zoology_256": {"length": 256, "pairs": 16, "vocab": 8192},
        "zoology_512": {"length": 512, "pairs": 64, "vocab": 8192},
    },
)


class MQAR(Task):
    """MQAR of Zoology (arXiv 2312.04927, section 3 and appendix on synthetics).

    A row's keys differ, and so do its values. Behind the pairs every other place may hold a question; the i-th is
    chosen with weight ``i^(power - 1)``, so that most keys come again soon.
    """

    @dataclass(frozen=True)
    class Config:
        """Sizes.

        Attributes:
            length: tokens of a row.
            pairs: keys of a row.
            vocab: tokens; the lower half are the blank and the keys, the upper half values.
            power: a of the places' weights; 1 is all alike.
        """

        length: int
        pairs: int
        vocab: int
        power: float = 0.01

        def __post_init__(self) -> None:
            """Refuse what does not fit."""
            if self.pairs < 1 or self.length % 2 or self.length < 4 * self.pairs:
                raise ConfigError(
                    f"mqar: expected pairs and an even length from 4 a pair, got {self}; give a longer one"
                )
            if self.vocab % 2 or self.vocab // 2 <= self.pairs:
                raise ConfigError(f"mqar: expected an even vocab above {2 * self.pairs}, got {self.vocab}; give more")

    def __init__(self, config: Config) -> None:
        self.config = config
        self.vocab_size = self.outputs = config.vocab
        self.length = config.length

    def draw(self, rng: np.random.Generator, rows: int) -> Batch:
        """Questions stand at even places behind the pairs."""
        pairs, half, start = self.config.pairs, self.config.vocab // 2, 2 * self.config.pairs
        key_bp = _choose(rng, np.zeros((rows, half - 1)), pairs) + 1
        value_bp = _choose(rng, np.zeros((rows, half)), pairs) + half
        places = (self.length - start) // 2
        weight_p = (self.config.power - 1) * np.log(np.arange(1, places + 1))
        place_bp = start + 2 * _choose(rng, np.broadcast_to(weight_p, (rows, places)), pairs)
        inputs_bt = np.zeros((rows, self.length), np.int64)
        inputs_bt[:, 0:start:2], inputs_bt[:, 1:start:2] = key_bp, value_bp
        np.put_along_axis(inputs_bt, place_bp, key_bp, 1)
        targets_bt = np.full_like(inputs_bt, IGNORE)
        np.put_along_axis(targets_bt, place_bp, value_bp, 1)
        return token_batch(inputs_bt, targets_bt)


def _choose(rng: np.random.Generator, log_weight_bn: np.ndarray, n: int) -> np.ndarray:
    """So many of each row's items in random order without putting back (Gumbel's top n)."""
    noisy_bn = log_weight_bn + rng.gumbel(size=log_weight_bn.shape)
    return np.argsort(-noisy_bn, axis=1)[:, :n]
