"""How much of an evaluation text stands in the training data: a score on what was learnt by heart measures nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from subquad.core.errors import DataError
from subquad.data.sources import Source

LENGTH = 13
"""Words of an n-gram, as in arXiv 2005.14165, appendix C."""

# Scripts that put no spaces between words count by character, as in most measures of translation.
_UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[^\W_{_UNSPACED}]+|[{_UNSPACED}]")

READ_CHARS = 1_000_000_000
"""Characters of a source that are read at most, for one may never end: a minute or two."""

_BUCKETS = 1 << 24
_MANY_CHARS = 1 << 22

Hashes = np.ndarray[Any, np.dtype[np.uint64]]


@dataclass(frozen=True)
class Overlap:
    """What one source and one evaluation text share.

    Attributes:
        source, text: their names.
        grams: different n-grams of the evaluation text.
        found: how many of them stand in the source too.
        example: one that does, or "".
        chars: characters of the source that were read.
        whole: whether these are all of it.
    """

    source: str
    text: str
    grams: int
    found: int
    example: str
    chars: int
    whole: bool

    @property
    def share(self) -> float:
        """Share of the n-grams that were found."""
        return self.found / self.grams

    @property
    def figure(self) -> str:
        """What was found, and in how much."""
        read = f"{'all' if self.whole else 'the first'} {self.chars:,} characters"
        return f"{self.found:,} of {self.grams:,} {LENGTH}-grams ({self.share:.2%}) in {read}"

    def __str__(self) -> str:
        example = f", e.g. {self.example!r}" if self.example else ""
        return f"{self.text} stands in the training data {self.source}: {self.figure}{example}"


def check_overlap(sources: Sequence[Source], evals: Mapping[str, str], *, chars: int = READ_CHARS) -> list[Overlap]:
    """The overlap of each source with each evaluation text, none included; the largest share first.

    Texts are compared by their n-grams of 13 words, without case and punctuation. A source is read once and never
    held; what is remembered is a hash of each n-gram of the evaluation texts, 64 bits wide, so that a false find
    among 1e8 n-grams and 1e6 remembered ones has a probability of about 1e-5.

    Args:
        sources: what is trained on.
        evals: evaluation texts by name.
        chars: of a source no document is read after the one that reaches so many characters.

    Raises:
        DataError: an evaluation text of less than one n-gram.
    """
    grams = {name: np.unique(_hashes(_words(text))) for name, text in evals.items()}
    for name, known_n in grams.items():
        if not len(known_n):
            raise DataError(f"{name}: expected a text of at least {LENGTH} words, got a shorter one; give more text")
    if not grams:
        return []
    wanted_n = np.unique(np.concatenate(list(grams.values())))
    overlaps: list[Overlap] = []
    for source in sources:
        reading = _Reading(source, chars)
        seen_n = _found(reading, wanted_n)
        for text, known_n in grams.items():
            shared_n, example = np.intersect1d(known_n, seen_n, assume_unique=True), ""
            if len(shared_n):
                words = _words(evals[text])
                at = int(np.flatnonzero(np.isin(_hashes(words), shared_n))[0])
                example = " ".join(words[at : at + LENGTH])
            read = reading.chars, reading.whole
            overlaps.append(Overlap(source.name, text, len(known_n), len(shared_n), example, *read))
    return sorted(overlaps, key=lambda o: -o.share)


class _Reading:
    """The documents of a source as plain text, as far as they are read.

    Attributes:
        chars: read so far.
        whole: whether there are no more.
    """

    def __init__(self, source: Source, most: int) -> None:
        self.source, self.most, self.chars, self.whole = source, most, 0, False

    def __iter__(self) -> Iterator[str]:
        for document in self.source.open():
            if self.chars >= self.most:
                return
            # Without a chat template, whose words would part what an evaluation text joins.
            text = document if isinstance(document, str) else "\n".join(turn["content"] for turn in document)
            self.chars += len(text)
            yield text
        self.whole = True


def _found(texts: Iterable[str], wanted_n: Hashes) -> Hashes:
    """Those of `wanted_n` that stand in `texts`."""
    # Nearly every n-gram is a miss, and a table of one byte for each of many buckets tells most of them apart.
    table = np.zeros(_BUCKETS, dtype=np.bool_)
    table[wanted_n % _BUCKETS] = True
    found: list[Hashes] = []
    for words in _batches(texts):
        hashes_n = _hashes(words)
        maybe_n = hashes_n[table[hashes_n % _BUCKETS]]
        found.append(np.intersect1d(maybe_n, wanted_n))
    return np.unique(np.concatenate(found)) if found else np.zeros(0, dtype=np.uint64)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """The words of many documents at once, and between two of them what is no word of any text."""
    words: list[str] = []
    size = 0
    for text in texts:
        size += len(text)
        words += [*_words(text), "\0"]
        if size >= _MANY_CHARS:
            yield words
            words, size = [], 0
    yield words


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _hashes(words: Sequence[str]) -> Hashes:
    """A hash of every n-gram: ``sum_j M^j h(w_j)`` modulo 2^64, mixed, M odd, so that order counts."""
    # Python's own hash of a string differs between processes, and is never kept.
    word_n: Hashes = np.fromiter(map(hash, words), dtype=np.int64, count=len(words)).view(np.uint64)
    if len(word_n) < LENGTH:
        return np.zeros(0, dtype=np.uint64)
    sum_n: Hashes = np.zeros(len(word_n) - LENGTH + 1, dtype=np.uint64)
    for j in range(LENGTH):
        sum_n = sum_n * np.uint64(0x9E3779B97F4A7C15) + word_n[j : j + len(sum_n)]
    return sum_n ^ (sum_n >> np.uint64(29))
