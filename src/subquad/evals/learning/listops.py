"""ListOps: what a nested expression of MIN, MAX, MED and SM (the sum modulo 10) over digits comes to.

``[MAX 4 3 [MIN 2 3 ] 1 0 [MED 1 5 8 9 2 ] ] -> 5``. Expressions are drawn by the Long Range Arena's rules: at every
place stands an operator with probability 1/4, else a digit; at the largest depth only digits; an operator has 2 to 10
arguments; and what is not longer than 500 and shorter than 2,000 tokens is thrown away. An operator and its bracket are
two tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from subquad.core.errors import ConfigError
from subquad.evals.learning import TaskCard
from subquad.evals.learning.task import Batch, Task

CARD = TaskCard(
    title="ListOps: the value of a nested expression",
    entry="ListOps",
    source="2011.04006",
    scored="the value of the row, one of ten",
    chance="1 in 10; the commonest answer, 0, is 17 % of the rows at lra",
    sizes={
        "lra": {"longer": 500, "shorter": 2000, "depth": 10, "arguments": 10},
        "short": {"longer": 10, "shorter": 100, "depth": 5, "arguments": 5},
    },
)
OPERATORS = ("MIN", "MAX", "MED", "SM")
# Ids: the digits, the operators, the bracket that closes.
CLOSE = 10 + len(OPERATORS)
OPERATOR_SHARE = 0.25
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Level:
    """All nodes of one depth, from left to right.

    Attributes:
        label_n: a digit, or 10 and more for an operator.
        children_n: arguments of each node, 0 of a digit.
    """

    label_n: Ints
    children_n: Ints


class ListOps(Task):
    """ListOps at the lengths of the Long Range Arena (arXiv 2011.04006, section 2.2.1; rules of its generator).

    Small answers and large ones are commoner than those between: always saying the commonest is right as often as
    ``chance`` says, which was measured.
    """

    @dataclass(frozen=True)
    class Config:
        """Rules.

        Attributes:
            longer, shorter: a row has more tokens than the one and fewer than the other.
            depth: deepest level, the outermost operator being 1.
            arguments: most of an operator.
        """

        longer: int
        shorter: int
        depth: int
        arguments: int

        def __post_init__(self) -> None:
            """Refuse what no expression fits."""
            if self.depth < 2 or self.arguments < 2 or self.longer < 0 or self.shorter - self.longer < 5:
                raise ConfigError(
                    f"listops: expected depth and arguments from 2 and shorter from longer + 5, got {self}; widen it"
                )
            if self.longer >= (largest := self._largest()) - 1:
                raise ConfigError(
                    f"listops: expected longer below {largest - 1}, got {self.longer}; give more depth or arguments"
                )

        def _largest(self) -> int:
            """Tokens of the fullest expression, or so many that it does not matter."""
            length = 1
            for _ in range(self.depth - 1):
                length = min(2 + self.arguments * length, 10**9)
            return length

    vocab_size = CLOSE + 1
    outputs = 10
    pooled = True

    def __init__(self, config: Config) -> None:
        self.config = config
        self.length = config.shorter - 1

    def draw(self, rng: np.random.Generator, rows: int) -> Batch:
        """Expressions one by one, padded with zeros."""
        found = [self.expression(rng) for _ in range(rows)]
        lengths_b = torch.tensor([len(tokens_t) for tokens_t, _ in found])
        inputs_bt = torch.zeros(rows, int(lengths_b.max()), dtype=torch.int64)
        for row_t, (tokens_t, _) in zip(inputs_bt, found, strict=True):
            row_t[: len(tokens_t)] = torch.from_numpy(tokens_t)
        return Batch(inputs_bt, torch.tensor([value for _, value in found]), lengths_b)

    def expression(self, rng: np.random.Generator) -> tuple[Ints, int]:
        """The tokens of one expression, and what it comes to."""
        while (levels := self._grow(rng)) is None:
            pass
        return written(levels), evaluated(levels)

    def _grow(self, rng: np.random.Generator) -> list[Level] | None:
        """A tree, level by level, or None where its length is wrong; a lone digit would be, so it is never drawn."""
        config, levels, nodes, length = self.config, list[Level](), 1, 0
        for depth in range(1, config.depth + 1):
            label_n = rng.integers(0, 10, nodes)
            children_n = np.zeros(nodes, np.int64)
            if depth < config.depth:
                is_operator_n = rng.random(nodes) < OPERATOR_SHARE if depth > 1 else np.ones(1, bool)
                operators = int(is_operator_n.sum())
                label_n[is_operator_n] = rng.integers(10, CLOSE, operators)
                children_n[is_operator_n] = rng.integers(2, config.arguments + 1, operators)
                length += operators
            levels.append(Level(label_n, children_n))
            length += nodes
            nodes = int(children_n.sum())
            # Every node still to come is a token at least.
            if length + nodes >= config.shorter:
                return None
            if nodes == 0:
                break
        return levels if length > config.longer else None


def written(levels: list[Level]) -> Ints:
    """The tokens of a tree in the order of reading."""
    sizes: list[Ints] = []
    below_n = np.zeros(0, np.int64)
    for level in reversed(levels):
        size_n = np.ones_like(level.children_n)
        is_operator_n = level.children_n > 0
        size_n[is_operator_n] = 2 + _reduced(np.add, below_n, level.children_n[is_operator_n])
        sizes.insert(0, size_n)
        below_n = size_n
    tokens_t = np.empty(int(sizes[0][0]), np.int64)
    start_n = np.zeros(1, np.int64)
    for i, level in enumerate(levels):
        tokens_t[start_n] = level.label_n
        is_operator_n = level.children_n > 0
        tokens_t[(start_n + sizes[i] - 1)[is_operator_n]] = CLOSE
        if not is_operator_n.any():
            break
        # An argument stands behind its operator and the arguments in front of it.
        counts = level.children_n[is_operator_n]
        before_n = np.cumsum(sizes[i + 1]) - sizes[i + 1]
        first = before_n[np.cumsum(counts) - counts]
        start_n = np.repeat(start_n[is_operator_n] + 1 - first, counts) + before_n
    return tokens_t


def evaluated(levels: list[Level]) -> int:
    """What a tree comes to; the median of an even number of digits is rounded down."""
    below_n = np.zeros(0, np.int64)
    for level in reversed(levels):
        is_operator_n = level.children_n > 0
        counts = level.children_n[is_operator_n]
        value_n = level.label_n.copy()
        if len(counts):
            group_n = np.repeat(np.arange(len(counts)), counts)
            sorted_n = below_n[np.lexsort((below_n, group_n))]
            start = np.cumsum(counts) - counts
            medians = (sorted_n[start + (counts - 1) // 2] + sorted_n[start + counts // 2]) // 2
            results = (
                _reduced(np.minimum, below_n, counts),
                _reduced(np.maximum, below_n, counts),
                medians,
                _reduced(np.add, below_n, counts) % 10,
            )
            value_n[is_operator_n] = np.choose(level.label_n[is_operator_n] - 10, results)
        below_n = value_n
    return int(below_n[0])


def _reduced(how: np.ufunc, value_n: Ints, counts: Ints) -> Ints:
    """`how` over neighbouring groups of `value_n`, so many in each."""
    return how.reduceat(value_n, np.cumsum(counts) - counts) if len(counts) else np.zeros(0, np.int64)
