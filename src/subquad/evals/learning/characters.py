"""Character language modelling: the next byte of a text.

The text is what Python's own manual pages in `pydoc_data` say, which every installation has, or any other source that
`subquad convert --data` takes. Its last tenth is held out, or another text is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from subquad.core.errors import ConfigError, DataError
from subquad.data.sources import Document, parse_source
from subquad.evals.learning import TaskCard
from subquad.evals.learning.task import Batch, Task, token_batch

CARD = TaskCard(
    title="characters: the next byte of a text",
    entry="Characters",
    source="bytes of a text",
    scored="every next byte",
    chance="the commonest byte, a space: 1 in 5 of pydoc",
    sizes={"pydoc": {"text": "pydoc", "length": 256}},
)
HELD_OUT = 0.1


class Characters(Task):
    """Byte-level language modelling; training draws windows from anywhere, the test takes them one after the other."""

    @dataclass(frozen=True)
    class Config:
        """What is read.

        Attributes:
            text: pydoc, or a source as `subquad.data.parse_source` takes it.
            length: bytes of a window.
            most: bytes that are read at most.
            test: a source that is held out, in place of the last tenth.
        """

        text: str
        length: int
        most: int = 100_000_000
        test: str = ""

        def __post_init__(self) -> None:
            """Refuse what leaves nothing to predict."""
            if self.length < 1 or self.most < 1:
                raise ConfigError(f"characters: expected length and most from 1, got {self}; raise them")

    vocab_size = outputs = 256

    def __init__(self, config: Config) -> None:
        """Read the text.

        Raises:
            DataError: no such text, or one too short to hold a window out.
        """
        self.config, self.length = config, config.length
        bytes_n = _bytes(config.text, config.most)
        if config.test:
            self.data = {"train": bytes_n, "test": _bytes(config.test, config.most)}
        else:
            split = len(bytes_n) - int(HELD_OUT * len(bytes_n))
            self.data = {"train": bytes_n[:split], "test": bytes_n[split:]}
        train_n, test_n = self.data["train"], self.data["test"]
        self.held_out = (len(test_n) - 1) // config.length
        if config.test and (self.held_out < 1 or len(train_n) <= config.length):
            raise DataError(
                f"{config.text}, {config.test}: expected texts that hold a window of {config.length} bytes, got "
                f"{len(train_n):,} and {len(test_n):,} bytes; give longer texts, or a smaller length"
            )
        if self.held_out < 1 or len(train_n) <= config.length:
            raise DataError(
                f"{config.text}: expected a text whose tenth holds a window of {config.length} bytes, got "
                f"{len(bytes_n):,} bytes; give a longer text, or --size length={max(len(bytes_n) // 20, 1)}"
            )

    def batch(self, split: str, seed: int, step: int, rows: int) -> Batch:
        """Windows from anywhere in training, one after the other in the test."""
        if split == "train":
            return super().batch(split, seed, step, rows)
        assert self.held_out is not None
        window_b = np.arange(step * rows, min((step + 1) * rows, self.held_out))
        return self._windows(self.data["test"], window_b * self.length)

    def draw(self, rng: np.random.Generator, rows: int) -> Batch:
        """Windows of the training's text."""
        text_n = self.data["train"]
        return self._windows(text_n, rng.integers(0, len(text_n) - self.length, rows))

    def _windows(self, text_n: np.ndarray, start_b: np.ndarray) -> Batch:
        window_bt = text_n[start_b[:, None] + np.arange(self.length + 1)]
        return token_batch(window_bt[:, :-1], window_bt[:, 1:])


def _bytes(source: str, most: int) -> np.ndarray:
    """The first of its bytes."""
    held = bytearray()
    for document in _texts(source):
        held += document.encode()
        if len(held) >= most:
            break
    return np.frombuffer(bytes(held[:most]), np.uint8)


def _texts(source: str) -> Iterator[str]:
    for document in parse_source(source).open():
        yield document if isinstance(document, str) else _conversation(document)


def _conversation(document: Document) -> str:
    assert not isinstance(document, str)
    return "\n\n".join(turn["content"] for turn in document)
