"""Token streams: documents, tokenised in the background and cut into sequences, that resume where they stood."""

from __future__ import annotations

import atexit
import hashlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from subquad.core.errors import ConfigError, DataError
from subquad.data.sources import Document, Source, Tokenizer, pieces, render

Rows = np.ndarray[Any, np.dtype[np.int32]]
TOKENISE_CHARS = 262_144


def held_out(text: str, fraction: float) -> bool:
    """Whether a document is kept from training: its content alone decides, so that no copy leaks from side to side."""
    digest = hashlib.blake2b(text.strip().encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) < fraction * 2**64


@dataclass(frozen=True)
class Position:
    """Where a chunk of sequences begins: enough to read it again.

    Attributes:
        epoch: passes over the data that are complete.
        chunk: number of the chunk, which seeds its shuffle.
        taken: documents read of each source in this epoch.
        carry: tokens that were left over from the chunk before.
    """

    epoch: int
    chunk: int
    taken: tuple[int, ...]
    carry: tuple[int, ...] = ()


class Documents:
    """The texts of one side of the train/held-out split, sources interleaved in proportion to their size."""

    def __init__(self, sources: Sequence[Source], tokenizer: Tokenizer, *, fraction: float, train: bool) -> None:
        """`fraction` of the documents is held out; `train` chooses the side."""
        self.sources, self.tokenizer, self.fraction, self.train = tuple(sources), tokenizer, fraction, train
        self.sizes: list[int] | None = None

    def read(self, taken: Sequence[int]) -> Iterator[tuple[int, str]]:
        """Index of the source and text of each document, from where `taken` documents of each source were read."""
        if self.sizes is None:
            # One source needs no proportions, so its size is never counted.
            alone = len(self.sources) == 1
            self.sizes = [1 if alone else max(sum(len(t) for t in self._texts(s)), 1) for s in self.sources]
        texts = [self._texts(s) for s in self.sources]
        read = [sum(len(next(texts[i])) for _ in range(n)) for i, n in enumerate(taken)]
        open_ = list(range(len(texts)))
        while open_:
            i = min(open_, key=lambda j: (read[j] / self.sizes[j], j))  # type: ignore[index]
            text = next(texts[i], None)
            if text is None:
                open_.remove(i)
            else:
                read[i] += len(text)
                yield i, text

    def _texts(self, source: Source) -> Iterator[str]:
        for document in source.open():
            text = render(document, self.tokenizer)
            if held_out(text, self.fraction) != self.train:
                yield text


class TokenStream:
    """An endless iterator of int64 ``[b, t]`` batches, deterministic by seed and resumable to the sequence.

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
            sources: where documents come from; several are mixed in proportion to their size.
            tokenizer: its end token separates documents.
            batch: sequences of a batch, b.
            time: tokens of a sequence, t.
            seed: of the shuffle.
            fraction: share of the documents that is held out.
            chunk_tokens: tokens shuffled together.
        """
        if batch < 1 or time < 2:
            raise ConfigError(
                f"batch={batch}, time={time}: expected at least 1 and 2; ask for a larger batch or sequence"
            )
        self.documents = Documents([self._watched(s) for s in sources], tokenizer, fraction=fraction, train=True)
        self.batch, self.time, self.seed, self.chunk_tokens = batch, time, seed, max(chunk_tokens, time)
        self._closed = threading.Event()
        self._start(Position(0, 0, (0,) * len(sources)), 0)

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
        self._reading: Iterator[tuple[int, str]] | None = None
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

    def __next__(self) -> Tensor:
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
        return torch.from_numpy(np.stack(picked).astype(np.int64))

    def state_dict(self) -> dict[str, Any]:
        """The position, as plain numbers."""
        p = self._position
        place = {"epoch": p.epoch, "chunk": p.chunk, "taken": list(p.taken), "carry": list(p.carry)}
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
        self._start(Position(state["epoch"], state["chunk"], tuple(state["taken"]), tuple(state["carry"])), state["at"])

    def _names(self) -> list[str]:
        return [s.name for s in self.documents.sources]

    def _chunk(self, start: Position) -> tuple[Rows, Position]:
        """The shuffled sequences of the chunk at `start`, and where the next begins. Runs in the thread only."""
        if self._reading is None:
            self._reading = self.documents.read(start.taken)
        taken, ended = list(start.taken), False
        tokens: Rows = np.array(start.carry, dtype=np.int32)
        while len(tokens) < self.chunk_tokens and not ended:
            texts, ended = _take(self._reading, taken)
            tokens = np.concatenate([tokens, tokenise(texts, self.documents.tokenizer)])
        if ended:
            self._reading = None
        count = len(tokens) // self.time
        if count == 0 and any(start.taken):
            # What an epoch's earlier chunks have left is less than a sequence: the next epoch goes on from it.
            return self._chunk(Position(start.epoch + 1, start.chunk, (0,) * len(taken), tuple(tokens.tolist())))
        if count == 0:
            raise DataError(
                f"--data {', '.join(self._names())}: expected at least {self.time} training tokens, got {len(tokens)}; "
                "give more text or a shorter --seq"
            )
        rows: Rows = tokens[: count * self.time].reshape(count, self.time)
        carry = tuple(tokens[count * self.time :].tolist())
        rows = rows[np.random.default_rng((self.seed, start.chunk)).permutation(count)]
        if not ended:
            return rows, replace(start, chunk=start.chunk + 1, taken=tuple(taken), carry=carry)
        return rows, Position(start.epoch + 1, start.chunk + 1, (0,) * len(taken), carry)


def _take(documents: Iterator[tuple[int, str]], taken: list[int]) -> tuple[list[str], bool]:
    texts: list[str] = []
    size = 0
    for i, text in documents:
        texts.append(text)
        taken[i] += 1
        size += len(text)
        if size >= TOKENISE_CHARS:
            return texts, False
    return texts, True


def tokenise(texts: Sequence[str], tokenizer: Tokenizer) -> Rows:
    """The tokens of all `texts`, an end token behind each.

    Raises:
        DataError: the tokenizer has no end token.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise DataError("tokenizer: expected an end token to separate documents, got none; set its eos_token")
    cut = [list(pieces(text)) for text in texts]
    flat = [piece for parts in cut for piece in parts]
    encoded = iter(tokenizer(flat, add_special_tokens=False, verbose=False)["input_ids"] if flat else ())
    tokens: list[int] = []
    for parts in cut:
        for _ in parts:
            tokens += next(encoded)
        tokens.append(end)
    return np.array(tokens, dtype=np.int32)


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
    for _, text in Documents(sources, tokenizer, fraction=fraction, train=False).read((0,) * len(sources)):
        parts.append(text.strip())
        size += len(parts[-1])
        if chars is not None and size >= chars:
            break
    if not size:
        raise DataError(
            f"--data {', '.join(s.name for s in sources)}: expected held-out documents at --held-out {fraction}, "
            "got none; give more documents or hold out more"
        )
    return "\n\n".join(parts) + "\n"
