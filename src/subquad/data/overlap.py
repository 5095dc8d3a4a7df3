"""How much of an evaluation text stands in the training data: a score on what was learnt by heart measures nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from subquad.core.errors import DataError
from subquad.data.sources import Document, Source

LENGTH = 13
"""Words of an n-gram, as in arXiv 2005.14165, appendix C."""

# Scripts that put no spaces between words count by character, as in most measures of translation.
_UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[^\W_{_UNSPACED}]+|[{_UNSPACED}]")

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
        example: one that does.
    """

    source: str
    text: str
    grams: int
    found: int
    example: str

    @property
    def share(self) -> float:
        """Share of the n-grams that were found."""
        return self.found / self.grams

    def __str__(self) -> str:
        return (
            f"{self.text}: {self.found:,} of {self.grams:,} {LENGTH}-grams ({self.share:.2%}) stand in the training "
            f"data {self.source}, e.g. {self.example!r}"
        )


def check_overlap(sources: Sequence[Source], evals: Mapping[str, str]) -> list[Overlap]:
    """The overlap of each source with each evaluation text, where there is one; the largest share first.

    Texts are compared by their n-grams of 13 words, without case and punctuation. A source is read through once and
    never held; what is remembered is a hash of each n-gram of the evaluation texts, 64 bits wide, so that a false find
    among 1e8 n-grams and 1e6 remembered ones has a probability of about 1e-5.

    Args:
        sources: what is trained on.
        evals: evaluation texts by name.

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
    found = {source.name: _found(source, wanted_n) for source in sources}
    overlaps: list[Overlap] = []
    for text, known_n in grams.items():
        for source, seen_n in found.items():
            shared_n = np.intersect1d(known_n, seen_n, assume_unique=True)
            if len(shared_n):
                words = _words(evals[text])
                at = int(np.flatnonzero(np.isin(_hashes(words), shared_n))[0])
                example = " ".join(words[at : at + LENGTH])
                overlaps.append(Overlap(source, text, len(known_n), len(shared_n), example))
    return sorted(overlaps, key=lambda o: -o.share)


def _found(source: Source, wanted_n: Hashes) -> Hashes:
    """Those of `wanted_n` that stand in `source`."""
    # Nearly every n-gram is a miss, and a table of one byte for each of many buckets tells most of them apart.
    table = np.zeros(_BUCKETS, dtype=np.bool_)
    table[wanted_n % _BUCKETS] = True
    found: list[Hashes] = []
    for words in _batches(source):
        hashes_n = _hashes(words)
        maybe_n = hashes_n[table[hashes_n % _BUCKETS]]
        found.append(np.intersect1d(maybe_n, wanted_n))
    return np.unique(np.concatenate(found)) if found else np.zeros(0, dtype=np.uint64)


def _batches(source: Source) -> Iterator[list[str]]:
    """The words of many documents at once, and between two of them what is no word of any text."""
    words: list[str] = []
    size = 0
    for document in source.open():
        text = _plain(document)
        size += len(text)
        words += [*_words(text), "\0"]
        if size >= _MANY_CHARS:
            yield words
            words, size = [], 0
    yield words


def _plain(document: Document) -> str:
    """Without a chat template, whose words would part what an evaluation text joins."""
    return document if isinstance(document, str) else "\n".join(turn["content"] for turn in document)


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
