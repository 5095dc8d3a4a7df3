"""Documents of several sources as one sequence: split into training and held-out, mixed, read on from anywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from subquad.core.errors import ConfigError, DataError
from subquad.data.completions import Span, completions
from subquad.data.sources import Document, Source, Tokenizer, render


def held_out(document: Document, fraction: float) -> bool:
    """Whether a document is kept from training: its content alone decides, so that no copy leaks from side to side.

    Of a conversation it is what stands before the last answer: all answers to a question lie on one side.
    """
    if not isinstance(document, str):
        asked = document[:-1] if document[-1]["role"] == "assistant" and len(document) > 1 else document
        document = "\n\n".join(turn["content"] for turn in asked)
    digest = hashlib.blake2b(document.strip().encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) < fraction * 2**64


@dataclass(frozen=True)
class Rendered:
    """A document as text, and where in it labels are; None is everywhere."""

    text: str
    spans: Sequence[Span] | None = None


class Documents:
    """One side of the train/held-out split, sources interleaved by their weights, or else by their size."""

    def __init__(self, sources: Sequence[Source], tokenizer: Tokenizer, *, fraction: float, train: bool) -> None:
        """`fraction` of the documents is held out; `train` chooses the side.

        Raises:
            ConfigError: some sources have a weight and others have none.
        """
        self.sources, self.tokenizer, self.fraction, self.train = tuple(sources), tokenizer, fraction, train
        weights = [s.weight for s in self.sources if s.weight is not None]
        if weights and len(weights) < len(self.sources):
            bare = ", ".join(s.name for s in self.sources if s.weight is None)
            raise ConfigError(f"--data {bare}: expected a weight as the other sources have, got none; add ,weight=1")
        self.weighted = bool(weights)
        # One source needs no proportions, so its size is never counted.
        self.shares: list[float] | None = weights or ([1.0] if len(self.sources) == 1 else None)

    def read(self, taken: Sequence[int] = (), chars: Sequence[int] = ()) -> Reader:
        """From where `taken` documents and `chars` characters of each source were read; from the start by default."""
        if self.shares is None:
            self.shares = [float(max(sum(len(d.text) for d in self.texts(i)), 1)) for i in range(len(self.sources))]
        nothing = [0] * len(self.sources)
        return Reader(self, self.shares, list(taken or nothing), list(chars or nothing))

    def texts(self, i: int) -> Iterator[Rendered]:
        """The documents of source `i` on this side."""
        source = self.sources[i]
        for document in source.open():
            if held_out(document, self.fraction) == self.train:
                continue
            try:
                yield self._render(document, source)
            except DataError as error:
                raise DataError(f"{source.name}: {error}") from error

    def _render(self, document: Document, source: Source) -> Rendered:
        if source.completions:
            return Rendered(*completions(document, self.tokenizer))
        return Rendered(render(document, self.tokenizer))


class Reader:
    """Documents in their order: always of the source that is furthest behind its share.

    Sources with weights never end in training: one that is through begins anew. Otherwise each is read once.

    Attributes:
        taken, chars: as in `Position`, of the documents given so far.
    """

    def __init__(self, documents: Documents, shares: Sequence[float], taken: list[int], chars: list[int]) -> None:
        """Read on where `taken` and `chars` say; both are counted up."""
        self.documents, self.shares, self.taken, self.chars = documents, shares, taken, chars
        self._anew = documents.weighted and documents.train
        self._texts = [islice(documents.texts(i), n, None) for i, n in enumerate(taken)]
        self._open = list(range(len(taken)))

    def __iter__(self) -> Reader:
        return self

    def __next__(self) -> Rendered:
        """The next document.

        Raises:
            DataError: a source that is to begin anew has no document.
        """
        while self._open:
            i = min(self._open, key=lambda j: (self.chars[j] / self.shares[j], j))
            document = next(self._texts[i], None)
            if document is None and self._anew:
                self.taken[i], self._texts[i] = 0, islice(self.documents.texts(i), 0, None)
                document = next(self._texts[i], None)
                if document is None:
                    name = self.documents.sources[i].name
                    raise DataError(f"--data {name}: expected training documents, got none; give more or hold out less")
            if document is not None:
                self.taken[i] += 1
                self.chars[i] += len(document.text)
                return document
            self._open.remove(i)
        raise StopIteration


def held_out_text(
    sources: Sequence[Source], tokenizer: Tokenizer, *, fraction: float = 0.05, chars: int | None = None
) -> str:
    """The held-out documents as one text, a blank line between them.

    Args:
        sources: as of the stream.
        tokenizer: renders conversations.
        fraction: as of the stream.
        chars: stop after the document that reaches this length; None reads all.

    Raises:
        DataError: no document is held out.
    """
    parts: list[str] = []
    size = 0
    for document in Documents(sources, tokenizer, fraction=fraction, train=False).read():
        parts.append(document.text.strip())
        size += len(parts[-1])
        if chars is not None and size >= chars:
            break
    if not size:
        raise nothing_held_out(sources, fraction)
    return "\n\n".join(parts) + "\n"


def nothing_held_out(sources: Sequence[Source], fraction: float) -> DataError:
    """The error where no document is held out."""
    names = ", ".join(source.name for source in sources)
    return DataError(
        f"--data {names}: expected held-out documents at --held-out {fraction}, got none; "
        "give more documents or hold out more"
    )
