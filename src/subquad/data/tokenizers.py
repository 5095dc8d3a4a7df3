"""Whether two models read the same tokens."""

from __future__ import annotations

from typing import Any

from subquad.core.errors import ConfigError

# Cases in which rules for cutting, merging and normalising differ between published tokenizers.
SAMPLES = (
    "The quick brown fox doesn't jump; it SHOUTS: I'll 'VE gone!",
    "  two  spaces,\ttabs,\r\n\n\n    and an indented line\n",
    "in 2024, 1234567 + 0.5e-3 = 12,345.67",
    "def f(x: int) -> str:\n    return f'{x!r}'  # naïve\n",
    "Ünïcödé, cafe\u0301, ﬁne, 你好世界, こんにちは, Привет, مرحبا, 👩‍👩‍👧",
)


def same_tokenizer(a: Any, b: Any, names: tuple[str, str] = ("the teacher", "the student")) -> None:
    """Refuse two tokenizers that would give one text different tokens, or end it by another token.

    Compared are all tokens and their ids, the start and end tokens, and the tokens of a few texts on which published
    rules for cutting and merging differ.

    Args:
        a, b: tokenizers, as those of `transformers`.
        names: whose they are.

    Raises:
        ConfigError: they differ; the message names the first difference.
    """
    difference = _difference(a, b)
    if difference is not None:
        what, first, second = difference
        raise ConfigError(
            f"expected one tokenizer for {names[0]} and {names[1]}, got two: {what} is {first} in one and {second} in "
            "the other; take two models of one family"
        )


def _difference(a: Any, b: Any) -> tuple[str, object, object] | None:
    """What differs first, as `a` and as `b` have it."""
    mine, theirs = a.get_vocab(), b.get_vocab()
    if mine != theirs:
        if len(mine) != len(theirs):
            return "the number of tokens", f"{len(mine):,}", f"{len(theirs):,}"
        token = min(t for t in mine.keys() | theirs.keys() if mine.get(t) != theirs.get(t))
        return f"the id of {token!r}", mine.get(token), theirs.get(token)
    for role in ("bos_token", "eos_token"):
        if getattr(a, role) != getattr(b, role):
            return f"the {role}", repr(getattr(a, role)), repr(getattr(b, role))
    for text in SAMPLES:
        ids = [t.encode(text, add_special_tokens=False) for t in (a, b)]
        if ids[0] != ids[1]:
            at = next((i for i, (x, y) in enumerate(zip(*ids, strict=False)) if x != y), min(map(len, ids)))
            first, second = (repr(t.decode(one[at : at + 1])) for t, one in zip((a, b), ids, strict=True))
            return f"token {at} of {text!r}", first, second
    return None
