"""A drafter of another vocabulary: what it reads for a target's tokens, and which of them it can guess."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from subquad.core.errors import ConfigError
from subquad.data.tokenizers import same_tokenizer
from subquad.engine.draft import Transcript
from subquad.models.stack import Stack
from subquad.models.teachers import LoadedModel

# Most tokens of the drafter's that one of the target's is read as: its state has room for so many.
MOST_PIECES = 4
# Of the smaller vocabulary, the part that both must have.
LEAST_SHARED = 0.1

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class Translation:
    """A target's tokens in a drafter's (token-level intersection, arXiv 2502.05202, algorithm 4).

    Attributes:
        pieces: of each of the target's ids, the drafter's that it is read as; none for what the drafter can't read.
        common: ids of the target's that may be guessed: each has one piece, and no two have the same.
        start: ids of the drafter's that a text begins with.
    """

    pieces: Sequence[Sequence[int]]
    common: frozenset[int]
    start: Sequence[int] = ()

    @property
    def widest(self) -> int:
        """Most pieces of a token, at least 1."""
        return max(1, *map(len, self.pieces))

    def read(self, tokens: Sequence[int]) -> list[int]:
        """A whole text of the target's in the drafter's tokens."""
        own = [piece for token in tokens for piece in self.pieces[token]]
        begun = own[: len(self.start)] == list(self.start)
        return own if begun else [*self.start, *own]

    def table(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The pieces, int64 ``[v, p]``, 0 where a token has fewer, and how many it has, int64 ``[v]``."""
        width = self.widest
        padded = [[*pieces, *[0] * (width - len(pieces))] for pieces in self.pieces]
        count_v = torch.tensor([len(pieces) for pieces in self.pieces], dtype=torch.int64, device=device)
        return torch.tensor(padded, dtype=torch.int64, device=device), count_v


class TranslatedTranscript(Transcript):
    """The target's tokens, told as such and noted as those of the drafter that they are read as.

    Args:
        translation: of the target's tokens.
        rows, capacity: as it is told them.
        device: of the buffers.
    """

    def __init__(self, translation: Translation, rows: int, capacity: int, device: torch.device) -> None:
        room = len(translation.start) + translation.widest * (capacity + 1)
        super().__init__(rows, room - 1, device)
        self.translation = translation
        self._pieces_vp, self._count_v = translation.table(device)

    def put(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """Begin `rows` anew."""
        super().put(rows, [self.translation.read(prompt) for prompt in prompts])

    def add(self, tokens_bt: Tensor, n_b: Tensor) -> None:
        """The pieces of the first `n_b` of each of the first rows' tokens come behind what is there."""
        rows, t = tokens_bt.shape
        columns_t, columns_p = (torch.arange(n, device=n_b.device) for n in (t, self._pieces_vp.shape[1]))
        pieces_btp, count_bt = self._pieces_vp[tokens_bt], self._count_v[tokens_bt] * (columns_t < n_b[:, None])
        first_bt = self.length_b[:rows, None] + count_bt.cumsum(1) - count_bt
        slots_btp = torch.where(columns_p < count_bt[..., None], first_bt[..., None] + columns_p, self.room)
        self.tokens_bn[:rows].scatter_(1, slots_btp.flatten(1), pieces_btp.flatten(1))
        self.length_b[:rows] += count_bt.sum(1)


class Foreign(Stack):
    """A model that guesses for one of another vocabulary: it reads and gives its own tokens, and knows theirs.

    Args:
        model: shares its weights.
        translation: of the target's tokens.
    """

    def __init__(self, model: Stack, translation: Translation) -> None:
        with torch.device("meta"):
            super().__init__(model.config)
        self.load_state_dict(model.state_dict(), assign=True)
        self.translation = translation
        self.requires_grad_(False)


def translate(draft: LoadedModel, target: LoadedModel) -> Stack:
    """The model of `draft` as one that guesses for `target`: itself where both have one vocabulary, else `Foreign`.

    Tokens are the same where they stand for the same bytes, however their tokenizers write these. A token that the
    drafter does not have is read as the longest token of its own that it begins with, then the longest that goes on
    from there, to its end; of these the last `MOST_PIECES`. A special token is read where the drafter has one of that
    name, else left out, and none is guessed but the one that ends a text.

    Without tokenizers two vocabularies of one size are taken for the same.

    Args:
        draft: guesses.
        target: what it guesses for.

    Raises:
        ConfigError: two vocabularies of which one is not known for want of a tokenizer, or with too little in common.
    """
    sizes = [one.model.config.vocab_size for one in (target, draft)]
    for one in (target, draft):
        if one.tokenizer is None:
            if sizes[0] == sizes[1]:
                return draft.model
            raise ConfigError(
                f"{one.name}: expected a tokenizer beside the weights, since draft and target have {sizes[1]} and "
                f"{sizes[0]} tokens, got none; add its files"
            )
    if sizes[0] == sizes[1] and _same(target.tokenizer, draft.tokenizer):
        return draft.model
    translation = _between(target.tokenizer, draft.tokenizer, *sizes)
    least = max(1, round(LEAST_SHARED * min(sizes)))
    if len(translation.common) < least:
        raise ConfigError(
            f"draft model {draft.name}: expected at least {least:,} tokens that {target.name} has too, got "
            f"{len(translation.common):,}; take one whose vocabulary is more alike"
        )
    return Foreign(draft.model, translation)


def _same(a: Any, b: Any) -> bool:
    try:
        same_tokenizer(a, b)
    except ConfigError:
        return False
    return True


def _between(target: Any, draft: Any, target_size: int, draft_size: int) -> Translation:
    """The translation between two tokenizers of models with so many rows of their embeddings."""
    theirs, mine = (
        {i: text for i, text in sorted(token_bytes(tokenizer).items()) if i < size and text}
        for tokenizer, size in ((target, target_size), (draft, draft_size))
    )
    # Of several tokens of one text the last: the bytes of SentencePiece stand before the characters that it writes.
    ids, own = ({text: i for i, text in tokens.items()} for tokens in (theirs, mine))
    longest = max(map(len, own), default=0)
    pieces: list[list[int]] = [[] for _ in range(target_size)]
    for i, text in theirs.items():
        pieces[i] = cut(text, own, longest)[-MOST_PIECES:]
    common = {i for text, i in ids.items() if text in own}
    names = {str(token): i for i, token in draft.added_tokens_decoder.items() if i < draft_size}
    for i, token in target.added_tokens_decoder.items():
        if i not in theirs and i < target_size and str(token) in names:
            pieces[i] = [names[str(token)]]
    end, own_end = target.eos_token_id, draft.eos_token_id
    if end is not None and own_end is not None and end < target_size and own_end < draft_size:
        pieces[end] = [own_end]
        common.add(end)
    # Where it writes something before a text, that is the start token.
    start = [i for i in draft.encode("")[:1] if i == draft.bos_token_id]
    return Translation(pieces, frozenset(common), start)


def cut(text: bytes, own: Mapping[bytes, int], longest: int) -> list[int]:
    """The ids of the texts that `text` is made of, each the longest that there is; bytes that begin none are left out.

    Args:
        text: to be cut.
        own: ids by text.
        longest: most bytes of a key of `own`.
    """
    at, found = 0, list[int]()
    while at < len(text):
        ends = range(min(at + longest, len(text)), at, -1)
        end = next((end for end in ends if text[at:end] in own), None)
        if end is not None:
            found.append(own[text[at:end]])
        at = at + 1 if end is None else end
    return found


def token_bytes(tokenizer: Any) -> dict[int, bytes]:
    """What each token but the special ones stands for, by its id.

    The tokens of byte-level BPE, SentencePiece and WordPiece are told by the mark that begins most of those that begin
    a word, or do not; where there is none, tokens are their own text.

    Args:
        tokenizer: as those of `transformers`.
    """
    added: Mapping[int, Any] = tokenizer.added_tokens_decoder
    special = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
    written = {i: token for token, i in tokenizer.get_vocab().items() if i not in added and i not in special}
    marks = Counter(mark for token in written.values() for mark in _READERS if token.startswith(mark))
    read = _READERS[max(marks, key=marks.__getitem__)] if marks else str.encode
    # Tokens that were added later are written as they are.
    plain = {i: str(token).encode() for i, token in added.items() if i not in special}
    return {i: read(token) for i, token in written.items()} | plain


def _alphabet() -> dict[str, int]:
    """The bytes by the characters that GPT-2 writes for them: printable ones for themselves, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTES = _alphabet()


def _byte_level(token: str) -> bytes:
    known = all(character in _BYTES for character in token)
    return bytes(_BYTES[character] for character in token) if known else token.encode()


def _sentencepiece(token: str) -> bytes:
    byte = _BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()


def _wordpiece(token: str) -> bytes:
    if token.startswith("##"):
        return token[2:].encode()
    # A word stands behind a space, a mark of punctuation mostly does not.
    return (f" {token}" if token[:1].isalnum() else token).encode()


# By the mark that tells a family.
_READERS: Mapping[str, Callable[[str], bytes]] = {"Ġ": _byte_level, "▁": _sentencepiece, "##": _wordpiece}
