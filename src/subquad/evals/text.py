"""Text to measure on, as tokens that know their bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from subquad.data.sources import parse_source, render

CHARS_A_TOKEN = 8


@dataclass(frozen=True)
class TextTokens:
    """A text as tokens, with the UTF-8 bytes that each stands for.

    Attributes:
        ids_n: int64 ``[n]``.
        bytes_n: int64 ``[n]``; what the tokenizer drops counts to the token after it, so they add up to the text.
    """

    ids_n: Tensor
    bytes_n: Tensor

    def first(self, n: int) -> TextTokens:
        """The first `n` tokens."""
        return TextTokens(self.ids_n[:n], self.bytes_n[:n])


def begin_tokens(tokenizer: Any) -> list[int]:
    """The begin-of-text token where the tokenizer puts one before any text, else nothing."""
    begin: int | None = tokenizer.bos_token_id
    return [begin] if begin is not None and tokenizer.encode("a")[:1] == [begin] else []


def begun(tokenizer: Any, tokens: list[int]) -> list[int]:
    """Tokens with what the tokenizer puts before any text, unless the text brought it, as some chat templates do."""
    begin = begin_tokens(tokenizer)
    return tokens if tokens[:1] == begin else begin + tokens


def read_text(spec: str, tokenizer: Any, chars: int | None = None) -> str:
    """The documents of a source as one text, a blank line between them.

    Args:
        spec: as in `parse_source`: a text or JSONL file, ``datasets:NAME``, or ``pydoc``.
        tokenizer: renders conversations.
        chars: stop after the document that reaches this length; None reads all.
    """
    parts: list[str] = []
    size = 0
    for document in parse_source(spec).open():
        text = render(document, tokenizer)
        # A plain text file comes in pieces that keep their line ends: these join as they were.
        parts.append(text if text.endswith("\n") else text + "\n\n")
        size += len(parts[-1])
        if chars is not None and size >= chars:
            break
    return "".join(parts)


def tokenize_text(tokenizer: Any, text: str, limit: int | None = None) -> TextTokens:
    """The tokens of `text` without special ones, and their bytes.

    Args:
        tokenizer: a fast Hugging Face tokenizer (one that knows offsets).
        text: any text.
        limit: keep only the first so many tokens.
    """
    if limit is not None:
        text = text[: limit * CHARS_A_TOKEN]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    sizes: list[int] = []
    end = 0
    for _, stop in encoded["offset_mapping"]:
        # Tokens inside one character repeat its span: the first counts it all.
        sizes.append(len(text[end:stop].encode("utf-8", "surrogatepass")) if stop > end else 0)
        end = max(end, stop)
    ids_n = torch.tensor(encoded["input_ids"], dtype=torch.int64)
    return TextTokens(ids_n, torch.tensor(sizes, dtype=torch.int64)).first(len(ids_n) if limit is None else limit)


def load_text(spec: str, tokenizer: Any, limit: int | None = None) -> TextTokens:
    """The first `limit` tokens of a source; see `read_text` and `tokenize_text`."""
    return tokenize_text(tokenizer, read_text(spec, tokenizer, limit and limit * CHARS_A_TOKEN), limit)
