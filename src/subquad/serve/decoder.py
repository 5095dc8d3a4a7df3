"""Token ids as text: of what is written, and of one token alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

BROKEN = "\N{REPLACEMENT CHARACTER}"
BYTE = re.compile(r"<0x([0-9A-F]{2})>")
# Byte-level vocabularies write a byte as the character of that number, or from 256 on where that one can't be seen.
SEEN = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = {chr(n): n for n in SEEN} | {chr(256 + i): n for i, n in enumerate(sorted({*range(256)} - {*SEEN}))}


class TokenText(NamedTuple):
    """One token alone.

    Attributes:
        text: as OpenAI names a token: its text, or ``bytes:`` and them where it is no whole characters.
        data: its bytes; None where they are not known.
    """

    text: str
    data: bytes | None


class Decoder:
    """Decodes as a fast tokenizer does, without what transformers does around it and takes ten times as long."""

    def __init__(self, tokenizer: Any) -> None:
        from transformers import PreTrainedTokenizerFast

        own, usual = (getattr(kind, "_decode", None) for kind in (type(tokenizer), PreTrainedTokenizerFast))
        plain = own is usual
        self._decode: Callable[..., str] = tokenizer.backend_tokenizer.decode if plain else tokenizer.decode
        self._name: Callable[[int], str | None] = tokenizer.convert_ids_to_tokens
        self.token = lru_cache(1 << 16)(self._token)

    def decode(self, ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool = False) -> str:
        """The text of token ids; spaces are never cleaned up."""
        return self._decode(ids, skip_special_tokens=skip_special_tokens)

    def _token(self, token: int) -> TokenText:
        """See `TokenText`."""
        # Its second time, since some tokenizers leave out the first space of a text.
        once, twice = (self.decode([token] * n, skip_special_tokens=False) for n in (1, 2))
        text = twice[len(once) :]
        if BROKEN not in text:
            return TokenText(text, text.encode())
        name = self._name(token) or ""
        byte = BYTE.fullmatch(name)
        data = bytes([int(byte[1], 16)]) if byte else bytes(BYTES.get(char, 0) for char in name)
        if data.decode(errors="replace") != text:
            return TokenText(text, None)
        return TokenText("bytes:" + "".join(f"\\x{n:02x}" for n in data), data)
