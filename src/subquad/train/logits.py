"""The teacher's most likely tokens, kept on disk: a distillation that reads them runs no teacher."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from subquad.core.errors import CheckpointError, ConfigError, DataError
from subquad.core.state import precise
from subquad.core.transfer import sent
from subquad.data import TokenStream
from subquad.data.tokenizers import SAMPLES
from subquad.models.difference import digest
from subquad.models.stack import Runner, Stack, plainly
from subquad.ops import launch
from subquad.train.checkpoint import write_atomically
from subquad.train.precision import autocast

SCHEMA = 2
MANIFEST = "manifest.json"
SHARD_TOKENS = 2**20
# Logits that live at a time while the first k of them are looked for.
LOGITS_AT_ONCE = 2**25


@dataclass(frozen=True)
class TopK:
    """The k most likely tokens of a distribution, and how likely all others are together.

    Attributes:
        ids_btk: integer, no two of a position the same.
        log_p_btk: their log-probabilities.
        log_tail_bt: ``log (1 - sum_k p_k)``, minus infinity where there are no others.
    """

    ids_btk: Tensor
    log_p_btk: Tensor
    log_tail_bt: Tensor

    def rows(self, part: slice) -> TopK:
        """Some rows of it."""
        return TopK(self.ids_btk[part], self.log_p_btk[part], self.log_tail_bt[part])

    def to(self, device: torch.device) -> TopK:
        """It on `device`, and nobody waits for it."""
        return TopK(sent(self.ids_btk, device), sent(self.log_p_btk, device), sent(self.log_tail_bt, device))


@torch.no_grad()
def top_k(hidden_btd: Tensor, head_vd: Tensor, k: int) -> TopK:
    """The first `k` of ``softmax(head hidden)``, most likely first; logits exist for one chunk of tokens at a time.

    Args:
        hidden_btd: hidden states after the final norm.
        head_vd: the head's weight.
        k: from 1 to the vocabulary's size.

    Raises:
        ConfigError: another k.
    """
    b, t, _ = hidden_btd.shape
    v = len(head_vd)
    if not 1 <= k <= v:
        raise ConfigError(f"k={k}: expected 1 to the vocabulary's {v} tokens; choose another")
    hidden_nd, head_vd = launch.operands(hidden_btd.flatten(0, 1), head_vd)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for x_cd in hidden_nd.split(max(LOGITS_AT_ONCE // v, 1)):
        logits_cv = x_cd @ head_vd.mT
        logits_cv = logits_cv.to(precise(logits_cv.dtype))
        top_ck, ids_ck = logits_cv.topk(k)
        all_c1 = logits_cv.logsumexp(-1, keepdim=True)
        # Summed without the first k: 1 less their sum is rounding where the tail is small.
        tail_c1 = logits_cv.scatter_(1, ids_ck, -torch.inf).logsumexp(-1, keepdim=True)
        parts.append((ids_ck, top_ck - all_c1, (tail_c1 - all_c1)[:, 0]))
    ids_nk, log_p_nk, log_tail_n = (torch.cat(x) for x in zip(*parts, strict=True))
    return TopK(ids_nk.view(b, t, k), log_p_nk.view(b, t, k), log_tail_n.view(b, t))


def tokenizer_hash(tokenizer: Any) -> str:
    """A hash of what every id stands for, and of how texts are cut on which published tokenizers differ."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    cut = tokenizer(list(SAMPLES), add_special_tokens=False, verbose=False)["input_ids"]
    return hashlib.sha256(json.dumps([vocabulary, tokenizer.eos_token_id, cut]).encode()).hexdigest()


@dataclass(frozen=True)
class Origin:
    """What a cache was made from; it serves nothing else.

    Attributes:
        teacher: its name, for people; one teacher may have several, and its weights tell.
        weights: the `digest` of the teacher, in the dtype it was loaded in.
        tokenizer: from `tokenizer_hash`.
        vocabulary: number of tokens.
        k: tokens kept of each distribution.
        sources, seed, time, held_out: those of the stream.
    """

    teacher: str
    weights: str
    tokenizer: str
    vocabulary: int
    k: int
    sources: tuple[str, ...]
    seed: int
    time: int
    held_out: float

    @staticmethod
    def of(name: str, teacher: Stack, k: int, stream: TokenStream) -> Origin:
        """That of what `teacher`, as it was loaded, says about `stream`."""
        state, documents = stream.state_dict(), stream.documents
        return Origin(
            name,
            digest(teacher),
            tokenizer_hash(documents.tokenizer),
            teacher.config.vocab_size,
            k,
            tuple(state["sources"]),
            state["seed"],
            state["time"],
            documents.fraction,
        )

    def check(self, other: Origin, where: Path) -> None:
        """Refuse another origin.

        Raises:
            DataError: with the first field that differs.
        """
        for name, mine in asdict(self).items():
            theirs = getattr(other, name)
            if name == "teacher" or mine == theirs:
                continue
            if name == "weights":
                name, mine, theirs = "teacher", *(f"{o.teacher} ({o.weights[:12]})" for o in (self, other))
            raise DataError(f"{where}: expected {name} {mine} as cached, got {theirs}; give the same or cache anew")


def keys_of(tokens_bt: Tensor) -> list[int]:
    """A number for each sequence that only its own tokens have."""
    rows = tokens_bt.cpu().numpy().astype("<i8")
    return [int.from_bytes(hashlib.blake2b(row.tobytes(), digest_size=8).digest(), signed=True) for row in rows]


class LogitWriter:
    """Writes a cache, shard by shard; what a killed process has left goes on from its last whole shard.

    Log-probabilities are stored in float16, which is off by ``u |log p|`` at most, ``u = 2^-11``. Made to sum to 1
    again, as every loss does, the stored distribution is ``KL(p || stored) <= u^2 E_p[(log p)^2] / 2`` away, to second
    order: about 1e-6 nats.
    """

    def __init__(self, folder: Path, origin: Origin, *, shard_tokens: int = SHARD_TOKENS) -> None:
        """Begin in an empty folder, or go on in one that holds a cache of the same origin.

        Raises:
            DataError: the cache there is of another origin.
            CheckpointError: it is damaged.
        """
        self.folder, self.origin = folder, origin
        self._shard_rows = max(shard_tokens // origin.time, 1)
        self._shards: list[dict[str, Any]] = []
        self._held: list[tuple[list[int], TopK]] = []
        # Where the stream goes on behind what is on disk.
        self.stream_state: dict[str, Any] | None = None
        if (folder / MANIFEST).exists():
            manifest = _manifest(folder)
            _origin(manifest).check(origin, folder)
            self._shards, self.stream_state = manifest["shards"], manifest["stream"]
        self.tokens = origin.time * sum(shard["rows"] for shard in self._shards)

    def add(self, tokens_bt: Tensor, top: TopK, stream_state: dict[str, Any]) -> None:
        """Add a batch.

        Args:
            tokens_bt: what the teacher read.
            top: what it said.
            stream_state: of the stream, behind this batch.
        """
        ids_dtype = torch.uint16 if self.origin.vocabulary <= 2**16 else torch.int32
        kept = TopK(top.ids_btk.cpu().to(ids_dtype), top.log_p_btk.cpu().half(), top.log_tail_bt.cpu().half())
        self._held.append((keys_of(tokens_bt), kept))
        self._stream_state = stream_state
        self.tokens += tokens_bt.numel()
        if sum(len(keys) for keys, _ in self._held) >= self._shard_rows:
            self.flush()

    def flush(self) -> None:
        """Put what was added on disk.

        Raises:
            CheckpointError: it could not be written; what was there is intact.
        """
        if not self._held:
            return
        keys = [key for some, _ in self._held for key in some]
        tops = [top for _, top in self._held]
        content = save(
            {
                "key": torch.tensor(keys),
                "ids": torch.cat([top.ids_btk for top in tops]),
                "log_p": torch.cat([top.log_p_btk for top in tops]),
                "log_tail": torch.cat([top.log_tail_bt for top in tops]),
            }
        )
        name = f"{len(self._shards):06d}.safetensors"
        write_atomically(self.folder / name, lambda file: file.write(content))
        shard = {"file": name, "rows": len(keys), "bytes": len(content), "blake2b": _digest(content)}
        self._shards, self.stream_state, self._held = [*self._shards, shard], self._stream_state, []
        manifest = {"schema": SCHEMA} | asdict(self.origin) | {"stream": self.stream_state, "shards": self._shards}
        text = json.dumps(manifest, indent=1) + "\n"
        write_atomically(self.folder / MANIFEST, lambda file: file.write(text.encode()))


class LogitCache:
    """Reads a cache: what the teacher said about a sequence is found by the sequence's own tokens.

    So batches may have any size and come in any order, and a sequence that the teacher never saw is never mistaken for
    one that it did.
    """

    def __init__(self, folder: Path) -> None:
        """Open the cache in `folder`.

        Raises:
            CheckpointError: there is none, a shard is missing or of another size, or the schema is another.
        """
        manifest = _manifest(folder)
        self.folder, self.origin = folder, _origin(manifest)
        self._shards: list[dict[str, Any]] = manifest["shards"]
        self._files: list[Any] = []
        self._rows: dict[int, tuple[int, int]] = {}
        for i, shard in enumerate(self._shards):
            path = folder / shard["file"]
            size = path.stat().st_size if path.exists() else 0
            if size != shard["bytes"]:
                raise CheckpointError(
                    f"{path}: expected {shard['bytes']} bytes, got {size}; copy the shard again or cache anew"
                )
            try:
                self._files.append(safe_open(path, framework="pt"))  # type: ignore[no-untyped-call]
            except SafetensorError as error:
                raise CheckpointError(f"{path}: expected safetensors, got {error}; copy the shard again") from error
            for j, key in enumerate(self._files[i].get_tensor("key").tolist()):
                self._rows[key] = (i, j)

    @property
    def tokens(self) -> int:
        """Tokens of the stream, from its start, about which it knows what the teacher said."""
        return self.origin.time * sum(shard["rows"] for shard in self._shards)

    def verify(self) -> None:
        """Read every byte and compare checksums.

        Raises:
            CheckpointError: a shard is not what was written.
        """
        for shard in self._shards:
            path = self.folder / shard["file"]
            if _digest(path.read_bytes()) != shard["blake2b"]:
                raise CheckpointError(f"{path}: expected checksum {shard['blake2b']}, got another; copy it again")

    def of(self, tokens_bt: Tensor) -> TopK:
        """What the teacher said about each of these sequences, on the CPU: ids in int32, the rest in float16.

        Raises:
            DataError: a sequence is not in the cache.
        """
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for key in keys_of(tokens_bt):
            if key not in self._rows:
                o = self.origin
                raise DataError(
                    f"{self.folder}: expected sequences of {o.time} tokens from {', '.join(o.sources)} with seed "
                    f"{o.seed}, the first {self.tokens} tokens of it, got another; give the same data, seed and "
                    "sequence length, or cache more of it"
                )
            i, j = self._rows[key]
            parts = (self._files[i].get_slice(name)[j : j + 1] for name in ("ids", "log_p", "log_tail"))
            found.append(cast("tuple[Tensor, Tensor, Tensor]", tuple(parts)))
        ids_btk, log_p_btk, log_tail_bt = (torch.cat(x) for x in zip(*found, strict=True))
        return TopK(ids_btk.to(torch.int32), log_p_btk, log_tail_bt)


@torch.no_grad()
def fill(
    folder: Path,
    teacher: Stack,
    stream: TokenStream,
    origin: Origin,
    tokens: int,
    *,
    run: Runner = plainly,
    shard_tokens: int = SHARD_TOKENS,
    display: Callable[[int], object] | None = None,
) -> LogitCache:
    """Cache what `teacher` says about the first `tokens` tokens of `stream`, going on where an earlier call was ended.

    Args:
        folder: of the cache; made if needed.
        teacher: on its device, see `subquad.train.precision.frozen`.
        stream: at its start.
        origin: from `Origin.of` this teacher, as it was loaded, and this stream.
        tokens: rounded up to whole batches.
        run: how the teacher's blocks are called.
        shard_tokens: about how many a file holds; at most so many are lost by a crash.
        display: told the tokens cached so far after each batch.

    Raises:
        DataError: the folder holds the cache of another teacher or stream.
        CheckpointError: it is damaged, or could not be written.
    """
    writer = LogitWriter(folder, origin, shard_tokens=shard_tokens)
    if writer.stream_state is not None:
        stream.load_state_dict(writer.stream_state)
    while writer.tokens < tokens:
        tokens_bt = next(stream).tokens_bt
        with autocast(teacher.device):
            hidden_btd = teacher.hidden(tokens_bt.to(teacher.device), run=run)
            top = top_k(hidden_btd, teacher.lm_head.weight, origin.k)
        writer.add(tokens_bt, top, stream.state_dict())
        if display is not None:
            display(writer.tokens)
    writer.flush()
    return LogitCache(folder)


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.exists():
        raise CheckpointError(f"{folder}: expected a cache of logits, got no {MANIFEST} in it; make one first")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: expected JSON, got {error}; cache anew") from error
    if manifest.get("schema") != SCHEMA:
        raise CheckpointError(f"{path}: expected schema {SCHEMA}, got {manifest.get('schema')}; cache anew")
    return manifest


def _origin(manifest: dict[str, Any]) -> Origin:
    names = [name for name in Origin.__dataclass_fields__ if name != "sources"]
    return Origin(sources=tuple(manifest["sources"]), **{name: manifest[name] for name in names})


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
