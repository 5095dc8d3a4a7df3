"""What the assistant says in a conversation, to the token: the labels of a training on completions only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from subquad.core.errors import DataError
from subquad.data.sources import Conversation, Document, Tokenizer, render

Span = tuple[int, int]
"""First character and the one behind the last."""

Offsets = np.ndarray[Any, np.dtype[np.int64]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]


MARK = "\ue000answer\ue000"
"""Stands in an answer's place to find it; private characters, which no text has."""


def completions(document: Document, tokenizer: Tokenizer) -> tuple[str, list[Span]]:
    """A conversation as text, as `render` gives it, and where in it the assistant speaks.

    A span is what the assistant says and the special token that closes its turn: one that stands behind the last answer
    too, since behind others it may open the next turn. Where nothing closes the last turn, its span goes one character
    beyond the text: the end token that separates documents then counts. A template needs no
    marks of its own: it is rendered once more with each answer replaced, and what stays tells where the answer stood.

    Raises:
        DataError: text that is no conversation, one without a turn of the assistant, or a template that changes what
            the assistant says by more than the white space around it.
    """
    if isinstance(document, str):
        raise DataError(
            f"completions: expected conversations, got text ({document[:40]!r}); "
            "name the fields (#PROMPT+RESPONSE), or leave ,completions out"
        )
    text = render(document, tokenizer)
    answers = [i for i, turn in enumerate(document) if turn["role"] == "assistant"]
    if not answers:
        roles = ", ".join(turn["role"] for turn in document) or "nothing"
        raise DataError(f"completions: expected a turn with the role assistant, got {roles}; drop the record")
    _, behind = _around(document[: answers[-1] + 1], answers[-1], tokenizer)
    closing = next((c for c in _specials(tokenizer) if behind.lstrip().startswith(c)), None)
    return text, [_span(document, i, text, closing, tokenizer) for i in answers]


def _around(conversation: Conversation, i: int, tokenizer: Tokenizer) -> tuple[str, str]:
    """What stands before turn `i` and what stands behind it."""
    marked = render([*conversation[:i], conversation[i] | {"content": MARK}, *conversation[i + 1 :]], tokenizer)
    before, _, after = marked.partition(MARK)
    return before, after


def _span(conversation: Conversation, i: int, text: str, closing: str | None, tokenizer: Tokenizer) -> Span:
    said = conversation[i]["content"]
    before, after = _around(conversation, i, tokenizer)
    said = next((s for s in (said, said.strip()) if text == before + s + after), None)
    if said is None:
        raise DataError(
            "completions: expected a chat template that writes answers as they are, got one that changes "
            f"{conversation[i]['content'][:40]!r}; drop the record, or leave ,completions out"
        )
    end = len(before) + len(said)
    if closing is not None and after.lstrip().startswith(closing):
        return len(before), end + after.index(closing) + len(closing)
    return len(before), end if after.strip() else len(text) + 1


def _specials(tokenizer: Tokenizer) -> list[str]:
    """Every special token's text, long ones first, so that none hides behind the beginning of another."""
    tokens: Any = getattr(tokenizer, "added_tokens_decoder", {})
    named = {str(token) for token in tokens.values() if token.special}
    return sorted(named | set(getattr(tokenizer, "all_special_tokens", ())), key=len, reverse=True)


def encode(marked: Sequence[tuple[str, Sequence[Span]]], tokenizer: Tokenizer) -> list[tuple[list[int], Mask]]:
    """The tokens of each text, and which of them lie in its spans, be it with one character.

    Raises:
        DataError: a tokenizer that does not say which characters a token stands for.
    """
    if not marked:
        return []
    try:
        encoded = tokenizer(
            [text for text, _ in marked], add_special_tokens=False, verbose=False, return_offsets_mapping=True
        )
    except NotImplementedError as error:
        raise DataError(
            "completions: expected a fast tokenizer (tokenizer.json), got one that knows no offsets; "
            "save it as a fast one, or leave ,completions out"
        ) from error
    ids, offsets = cast("list[list[int]]", encoded["input_ids"]), encoded["offset_mapping"]
    return [
        (one, inside(np.array(where, dtype=np.int64).reshape(-1, 2), spans))
        for one, where, (_, spans) in zip(ids, offsets, marked, strict=True)
    ]


def inside(offsets_n2: Offsets, spans: Sequence[Span]) -> Mask:
    """Which tokens have a character in one of `spans`.

    Args:
        offsets_n2: first character and the one behind the last, by token. What no token claims (white space that the
            offsets leave out) belongs to the token after it; tokens inside one character share it.
        spans: where characters count.
    """
    end_n = np.maximum.accumulate(offsets_n2[:, 1])
    begin_n = np.minimum(offsets_n2[:, 0], np.concatenate([np.zeros(1, np.int64), end_n])[: len(end_n)])
    wanted_n: Mask = np.zeros(len(end_n), dtype=np.bool_)
    for begin, end in spans:
        wanted_n |= (begin_n < end) & (end_n > begin)
    return wanted_n
