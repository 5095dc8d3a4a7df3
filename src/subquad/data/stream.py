"""Token streams: documents, tokenised in the background and cut into sequences, that resume where they stood."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from subquad.core.errors import ConfigError, DataError
from subquad.data.batch import Batch
from subquad.data.completions import encode
from subquad.data.documents import Documents, Reader, Rendered, nothing_held_out
from subquad.data.sources import Document, Source, Tokenizer, pieces

Rows = np.ndarray[Any, np.dtype[np.int32]]
TOKENISE_CHARS = 262_144


@dataclass(frozen=True)
class Position:
    """Where a chunk of sequences begins: enough to read it again.

    Attributes:
        epoch: passes over all the data that are complete; always 0 with weights, for then each source has its own.
        chunk: number of the chunk, which seeds its shuffle.
        taken: documents read of each source since it was last begun.
        chars: characters read of each source in this epoch.
        carry: tokens that were left over from the chunk before, as `tokenise` gives them.
    """

    epoch: int
    chunk: int
    taken: tuple[int, ...]
    chars: tuple[int, ...]
    carry: tuple[int, ...] = ()


class TokenStream:
    """An endless iterator of batches, deterministic by seed and resumable to the sequence.

    Documents are joined by the end token and the join is cut every `time` tokens, so no column is padding. Sequences
    are shuffled within chunks of `chunk_tokens` (a corpus below that is shuffled whole, anew every epoch), and the next
    chunk is tokenised by a thread while this one is trained on; `close` ends it.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        tokenizer: Tokenizer,
        *,
        batch: int,
        time: int,
        seed: int = 0,
        fraction: float = 0.05,
        chunk_tokens: int = 1 << 21,
    ) -> None:
        """Stream the training side of `sources`.

        Args:
            sources: where documents come from; several are mixed by their weights, in characters, or else in
                proportion to their size, for which each is read through once before the start.
            tokenizer: its end token separates documents.
            batch: sequences of a batch, b.
            time: tokens of a sequence, t.
            seed: of the shuffle.
            fraction: share of the documents that is held out.
            chunk_tokens: tokens shuffled together.

        Raises:
            ConfigError: a size that makes no sense, or weights for some of the sources only.
        """
        if batch < 1 or time < 2:
            raise ConfigError(
                f"batch={batch}, time={time}: expected at least 1 and 2; ask for a larger batch or sequence"
            )
        self.documents = Documents([self._watched(s) for s in sources], tokenizer, fraction=fraction, train=True)
        self.batch, self.time, self.seed, self.chunk_tokens = batch, time, seed, max(chunk_tokens, time)
        self._closed = threading.Event()
        self._start(self._epoch(Position(0, 0, (), ())), 0)

    def close(self) -> None:
        """Stop the thread at the document it is in; no chunk is made any more."""
        self._closed.set()
        self._worker.join()

    def _watched(self, source: Source) -> Source:
        """`source`, ending with an error as soon as the stream is closed."""

        def documents() -> Iterator[Document]:
            for document in source.open():
                if self._closed.is_set():
                    raise ConfigError("stream: expected an open one, got one that was closed; make another")
                yield document

        return replace(source, open=documents)

    def _start(self, position: Position, at: int) -> None:
        self._reading: Reader | None = None
        self._position, self._at = position, at
        self._rows: Rows | None = None
        self._prepare(position)

    def _prepare(self, position: Position) -> None:
        """Make the chunk at `position` in a thread."""
        self._next: Future[tuple[Rows, Position]] = Future()
        # A process that ends waits for a thread until its chunk is done, and kills a daemon inside the tokenizer's own
        # code. So it is a daemon, and closed at exit.
        self._worker = threading.Thread(target=self._work, args=(position, self._next), name="tokenise", daemon=True)
        atexit.register(self.close)
        self._worker.start()

    def _work(self, position: Position, made: Future[tuple[Rows, Position]]) -> None:
        try:
            made.set_result(self._chunk(position))
        except BaseException as error:  # whoever asks for the chunk gets it
            made.set_exception(error)
        atexit.unregister(self.close)

    def __iter__(self) -> TokenStream:
        return self

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
            DataError: the training side holds less than one sequence.
        """
        picked: list[Rows] = []
        while len(picked) < self.batch:
            if self._rows is None:
                self._rows, self._after = self._next.result()
                self._worker.join()
                self._prepare(self._after)
            if self._at == len(self._rows):
                self._rows, self._position, self._at = None, self._after, 0
                continue
            picked.append(self._rows[self._at])
            self._at += 1
        return _batch(np.stack(picked), self.documents.sources)

    def state_dict(self) -> dict[str, Any]:
        """The position, as plain numbers."""
        p = self._position
        place = {"epoch": p.epoch, "chunk": p.chunk, "taken": list(p.taken), "chars": list(p.chars)}
        place["carry"] = list(p.carry)
        return place | {"at": self._at, "time": self.time, "seed": self.seed, "sources": self._names()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go where `state_dict` was taken.

        Raises:
            DataError: it was taken over other data, another seed or another sequence length.
        """
        for key, mine in (("sources", self._names()), ("time", self.time), ("seed", self.seed)):
            if state[key] != mine:
                raise DataError(f"resume: expected {key} {state[key]} as in the checkpoint, got {mine}; give the same")
        self.close()
        self._closed.clear()
        counts = (tuple(state[key]) for key in ("taken", "chars", "carry"))
        self._start(Position(state["epoch"], state["chunk"], *counts), state["at"])

    def _names(self) -> list[str]:
        return [s.name for s in self.documents.sources]

    def _chunk(self, start: Position) -> tuple[Rows, Position]:
        """The shuffled sequences of the chunk at `start`, and where the next begins. Runs in the thread only."""
        if self._reading is None:
            self._reading = self.documents.read(start.taken, start.chars)
        reading, ended = self._reading, False
        parts: list[Rows] = [np.array(start.carry, dtype=np.int32)]
        size = len(parts[0])
        while size < self.chunk_tokens and not ended:
            documents = _take(reading)
            ended = sum(len(d.text) for d in documents) < TOKENISE_CHARS
            parts.append(tokenise(documents, self.documents.tokenizer))
            size += len(parts[-1])
        tokens: Rows = np.concatenate(parts)
        if ended:
            self._reading = None
        count = size // self.time
        if count == 0 and any(start.taken):
            # What an epoch's earlier chunks have left is less than a sequence: the next epoch goes on from it.
            return self._chunk(self._epoch(replace(start, epoch=start.epoch + 1, carry=tuple(tokens.tolist()))))
        if count == 0:
            raise DataError(
                f"--data {', '.join(self._names())}: expected at least {self.time} training tokens, got {len(tokens)}; "
                "give more text or a shorter --seq"
            )
        rows: Rows = tokens[: count * self.time].reshape(count, self.time)
        carry = tuple(tokens[count * self.time :].tolist())
        rows = rows[np.random.default_rng((self.seed, start.chunk)).permutation(count)]
        after = replace(start, chunk=start.chunk + 1, carry=carry)
        if ended:
            return rows, self._epoch(replace(after, epoch=start.epoch + 1))
        return rows, replace(after, taken=tuple(reading.taken), chars=tuple(reading.chars))

    def _epoch(self, position: Position) -> Position:
        """`position` with every source at its beginning."""
        nothing = (0,) * len(self.documents.sources)
        return replace(position, taken=nothing, chars=nothing)


def held_out_batch(
    sources: Sequence[Source], tokenizer: Tokenizer, *, time: int, tokens: int, fraction: float = 0.05
) -> Batch:
    """The beginning of the held-out documents in rows: at least one, and no more than hold so many tokens.

    Args:
        sources, tokenizer, fraction: as of the stream.
        time: tokens of a row, fewer where there are not so many in all.
        tokens: of all rows.

    Raises:
        DataError: no document is held out.
    """
    reading = Documents(sources, tokenizer, fraction=fraction, train=False).read()
    parts: list[Rows] = []
    while sum(map(len, parts)) < tokens and (documents := _take(reading)):
        parts.append(tokenise(documents, tokenizer))
    if not parts:
        raise nothing_held_out(sources, fraction)
    row_n: Rows = np.concatenate(parts)[:tokens]
    time = min(time, len(row_n))
    return _batch(row_n[: len(row_n) // time * time].reshape(-1, time), sources)


def _batch(rows_bt: Rows, sources: Sequence[Source]) -> Batch:
    """Rows as `tokenise` gives them."""
    tokens_bt = torch.from_numpy(rows_bt.astype(np.int64))
    if not any(source.completions for source in sources):
        return Batch(tokens_bt)
    # A token that is no label stands as its complement.
    return Batch(torch.where(tokens_bt < 0, ~tokens_bt, tokens_bt), tokens_bt >= 0)


def _take(reading: Reader) -> list[Rendered]:
    """Documents of `TOKENISE_CHARS` characters together, or what is left."""
    documents: list[Rendered] = []
    size = 0
    while size < TOKENISE_CHARS and (document := next(reading, None)) is not None:
        documents.append(document)
        size += len(document.text)
    return documents


def tokenise(documents: Sequence[Rendered], tokenizer: Tokenizer) -> Rows:
    """The tokens of all `documents`, an end token behind each; what is no label as its complement, ``-1 - token``.

    Raises:
        DataError: the tokenizer has no end token, or can't tell where labels are.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise DataError("tokenizer: expected an end token to separate documents, got none; set its eos_token")
    cut = [list(pieces(d.text)) if d.spans is None else [] for d in documents]
    plain = iter(_ids([piece for parts in cut for piece in parts], tokenizer))
    marked = [(d.text, d.spans) for d in documents if d.spans is not None]
    masked = iter(encode(marked, tokenizer))
    out: list[Rows] = []
    for document, parts in zip(documents, cut, strict=True):
        if document.spans is None:
            out += [np.array(ids, dtype=np.int32) for ids in islice(plain, len(parts))]
            out.append(np.array([end], dtype=np.int32))
        else:
            ids, wanted_n = next(masked)
            closes = any(stop > len(document.text) for _, stop in document.spans)
            ids_n = np.array([*ids, end], dtype=np.int32)
            out.append(np.where(np.append(wanted_n, closes), ids_n, ~ids_n))
    return np.concatenate(out) if out else np.zeros(0, dtype=np.int32)


def _ids(texts: list[str], tokenizer: Tokenizer) -> Iterable[list[int]]:
    core: Any = getattr(tokenizer, "backend_tokenizer", None)
    if core is not None and core.truncation is None and core.padding is None:
        # Without offsets and without Python's own lists around it: half the time, and next to none of it holds the
        # lock that training needs for its launches.
        return (encoding.ids for encoding in core.encode_batch_fast(texts, add_special_tokens=False))
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else ()
