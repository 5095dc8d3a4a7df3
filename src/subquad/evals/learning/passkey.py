"""Passkeys, byte by byte: a number hidden in a text that says the same few sentences over and over.

``... We walk on again. The passkey is 40613. Keep it in mind ... What is the passkey?\\nThe passkey is -> 40613``. The
words are those of `subquad.evals.needle`; the tokens are bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from subquad.evals.learning import TaskCard
from subquad.evals.learning.task import IGNORE, Batch, Task, token_batch
from subquad.evals.needle import FILLER, PASSKEY, NeedleGrid, make_questions

CARD = TaskCard(
    title="passkeys: the number that was hidden in a text",
    entry="Passkey",
    source="2305.16300",
    scored="each digit, after those before it",
    chance="1 in 10 digits",
    sizes={"1k": {"length": 1024, "digits": 5}, "short": {"length": 256, "digits": 3}},
)


class Passkey(Task):
    """Passkey retrieval (arXiv 2305.16300, section 4.2), the number at any depth of the text.

    All digits of a row are right under teacher forcing exactly if greedy decoding says the number.
    """

    @dataclass(frozen=True)
    class Config:
        """Sizes.

        Attributes:
            length: bytes of a row.
            digits: of the number.
        """

        length: int
        digits: int

    vocab_size = outputs = 256

    def __init__(self, config: Config) -> None:
        """Make one row.

        Raises:
            ConfigError: a length without room for text beside the question.
        """
        self.config, self.length = config, config.length
        self._rows((0.5,), 0)

    def batch(self, split: str, seed: int, step: int, rows: int) -> Batch:
        """In the test the last answer alone counts."""
        batch = super().batch(split, seed, step, rows)
        if split == "test":
            batch.targets[:, : -self.config.digits] = IGNORE
        return batch

    def draw(self, rng: np.random.Generator, rows: int) -> Batch:
        """Numbers, their depths and where the text begins are any; a number is taught wherever it is said again."""
        digits = self.config.digits
        bytes_bt = self._rows(tuple(rng.random(rows)), int(rng.integers(2**32)))
        # There are no digits but those of the number, and those of its first place follow from nothing.
        said_bt = (bytes_bt >= ord("0")) & (bytes_bt <= ord("9"))
        said_bt &= said_bt.cumsum(1) > digits
        return token_batch(bytes_bt[:, :-1], np.where(said_bt, bytes_bt, IGNORE)[:, 1:])

    def _rows(self, depths: tuple[float, ...], seed: int) -> np.ndarray:
        """Question and answer, one byte more than the inputs."""
        digits = self.config.digits
        grid = NeedleGrid((self.length - digits,), depths, samples=1, digits=digits, seed=seed)
        asked = make_questions(_Bytes(), FILLER, grid, PASSKEY)
        return np.array([[*question.tokens, *f" {question.value}".encode()] for question in asked])


class _Bytes:
    """A tokenizer whose tokens are bytes."""

    bos_token_id = None
    chat_template = None

    def encode(self, text: str, **_: bool) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode(errors="replace")
