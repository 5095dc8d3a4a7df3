"""What a text must be: JSON, JSON of a schema, a regular expression or a context-free grammar, by llguidance."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from subquad.core.errors import ConfigError

# Most characters of a schema, an expression or a grammar.
MOST_SOURCE = 1 << 16
# What a grammar may cost: to read it, and of memory while it is followed. Less than a second and 100 MB each.
LIMITS: Mapping[str, Any] = {
    "max_grammar_size": 50_000,
    "initial_lexer_fuel": 300_000,
    "max_lexer_states": 20_000,
    "verbose_errors": False,
}
# Patterns that one text may have to match at once: what they have in common is found in time exponential in them.
MOST_JOINED = 8
JOINING = ("allOf", "anyOf", "oneOf", "$ref")
# As json.dumps writes it. Were any whitespace allowed, a weak model might write no end of it.
JSON_STYLE: Mapping[str, Any] = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}

# Built once for each tokenizer, which takes a second.
_tokens: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


class Grammar:
    """A grammar over the tokens of one tokenizer, compiled once and shared by any number of rows.

    It is made by one of its static methods, with a fast tokenizer of transformers. End tokens are no part of it. Text
    is spelled with any tokens that give it, special ones excepted.

    Example:
        >>> from subquad.engine.request import Request
        >>> grammar = Grammar.json_schema({"type": "integer"}, tokenizer)  # doctest: +SKIP
        >>> engine.submit(Request(prompt, tokenizer=tokenizer, grammar=grammar))  # doctest: +SKIP
    """

    def __init__(self, prototype: LLMatcher) -> None:
        self._prototype = prototype

    def start(self) -> LLMatcher:
        """A matcher of a row that has no text yet."""
        return self._prototype.copy()

    @staticmethod
    def json_object(tokenizer: Any) -> Grammar:
        """Any JSON object.

        Raises:
            ConfigError: llguidance is missing, or the tokenizer is none that it can read.
        """
        return Source.json_object().compile(tokenizer)

    @staticmethod
    def json_schema(schema: Mapping[str, Any] | str, tokenizer: Any) -> Grammar:
        """JSON that is valid under a schema, on one line as ``json.dumps`` writes it, properties in their order.

        Args:
            schema: a JSON schema, or its text. Its key ``x-guidance`` may say how llguidance compiles it.
            tokenizer: of the model.

        Raises:
            ConfigError: as in `json_object`; it is no schema, has a keyword that can't be followed, nothing is valid
                under it, or it is too large.
        """
        return Source.json_schema(schema).compile(tokenizer)

    @staticmethod
    def regex(pattern: str, tokenizer: Any) -> Grammar:
        """Text that a regular expression matches as a whole, in the syntax of Rust's crate regex.

        Raises:
            ConfigError: as in `json_schema`.
        """
        return Source.regex(pattern).compile(tokenizer)

    @staticmethod
    def lark(text: str, tokenizer: Any) -> Grammar:
        """Text of a context-free grammar, as llguidance reads Lark's.

        Raises:
            ConfigError: as in `json_schema`.
        """
        return Source.lark(text).compile(tokenizer)


@dataclass(frozen=True)
class Source:
    """A grammar that was read and found good, and waits for a tokenizer.

    Attributes:
        name: of it in errors.
        text: as llguidance takes it.
    """

    name: str
    text: str

    @staticmethod
    def json_object() -> Source:
        """See `Grammar.json_object`."""
        return Source.json_schema({"type": "object"})

    @staticmethod
    def json_schema(schema: Mapping[str, Any] | str) -> Source:
        """See `Grammar.json_schema`."""
        try:
            text = schema if isinstance(schema, str) else json.dumps(schema)
            _bound("json_schema", text)
            held = json.loads(text)
        except (TypeError, ValueError, RecursionError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"json_schema: expected a JSON schema, got {_short(error)}; correct it") from error
        if not isinstance(held, dict):
            raise ConfigError(f"json_schema: expected a JSON object, got {type(held).__name__}; write a schema")
        if (patterns := _joined(held)) > MOST_JOINED:
            raise ConfigError(
                f"json_schema: expected at most {MOST_JOINED} patterns where some are joined, got {patterns}; "
                "write them as one, or leave some out"
            )
        return _checked("json_schema", lambda guide: guide.grammar_from_json_schema(text, defaults=dict(JSON_STYLE)))

    @staticmethod
    def regex(pattern: str) -> Source:
        """See `Grammar.regex`."""
        _bound("regex", pattern)
        return _checked("regex", lambda guide: guide.grammar_from_regex(pattern))

    @staticmethod
    def lark(text: str) -> Source:
        """See `Grammar.lark`."""
        _bound("lark", text)
        return _checked("lark", lambda guide: guide.grammar_from_lark(text))

    @staticmethod
    def parse(spec: str) -> Source:
        """What ``json``, ``regex:PATTERN``, a file ``*.lark``, or any other file with a JSON schema describes.

        Raises:
            ConfigError: no such file, or as in `Grammar.json_schema`.
        """
        if spec == "json":
            return Source.json_object()
        kind, colon, pattern = spec.partition(":")
        if colon and kind == "regex":
            return Source.regex(pattern)
        try:
            text = Path(spec).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"grammar: expected json, regex:PATTERN, or a file with a JSON schema or of the name *.lark, got "
                f"{spec!r} ({error}); correct it"
            ) from error
        return Source.lark(text) if spec.endswith(".lark") else Source.json_schema(text)

    def compile(self, tokenizer: Any) -> Grammar:
        """It over a tokenizer's tokens.

        Raises:
            ConfigError: as in `Grammar.json_schema`.
        """
        guide = _llguidance()
        tokens = _tokens_of(tokenizer)
        own: Any = guide.LLMatcher(tokens, self.text, log_level=0, limits=guide.LLParserLimits(**LIMITS))
        matcher = LLMatcher(own, tokens.vocab_size, tokens.eos_tokens)
        # The first mask is the dearest, and shows what no text can begin.
        mask_w = np.zeros(-(-tokens.vocab_size // 32), dtype=np.int32)
        matcher.fill(mask_w)
        if own.is_error():
            raise _refused(self.name, own.get_error() or own.stop_reason())
        if not mask_w.any() and not matcher.may_end:
            raise _refused(self.name, "one that no text has")
        return Grammar(matcher)


class LLMatcher:
    """A `Matcher` of llguidance's.

    Args:
        own: llguidance's.
        vocab_size: of its tokens.
        ends: its end tokens, which are no text.
    """

    def __init__(self, own: Any, vocab_size: int, ends: Sequence[int]) -> None:
        self._own, self._vocab_size, self._ends = own, vocab_size, ends

    @property
    def may_end(self) -> bool:
        """See `Matcher.may_end`."""
        return self._own.is_accepting()

    @property
    def must_end(self) -> bool:
        """See `Matcher.must_end`."""
        return self._own.is_stopped() and self._own.is_accepting()

    def fill(self, mask_w: NDArray[np.int32]) -> None:
        """See `Matcher.fill`; no token where llguidance has given up, since the text got too complex for its limits."""
        buffer_w = np.zeros(-(-self._vocab_size // 32), dtype=np.int32)
        self._own.unsafe_compute_mask_ptr(buffer_w.ctypes.data, buffer_w.nbytes)
        if self._own.is_error():
            buffer_w.fill(0)
        bits_w = buffer_w.view(np.uint32)
        for token in self._ends:
            bits_w[token // 32] &= ~np.uint32(1 << token % 32)
        n = min(len(buffer_w), len(mask_w))
        mask_w[:n], mask_w[n:] = buffer_w[:n], 0

    def advance(self, token: int) -> None:
        """See `Matcher.advance`."""
        self._own.consume_token(token)

    def forced(self) -> Sequence[int]:
        """See `Matcher.forced`."""
        return self._own.compute_ff_tokens()

    def copy(self) -> LLMatcher:
        """See `Matcher.copy`; what one of them has worked out the others know."""
        return LLMatcher(self._own.deep_copy(), self._vocab_size, self._ends)


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise ConfigError('grammar: expected the package llguidance, got none; pip install "subquad[serve]"') from error
    return llguidance


def _tokens_of(tokenizer: Any) -> Any:
    """llguidance's view of a tokenizer."""
    _llguidance()
    from llguidance.hf import from_tokenizer

    if tokenizer not in _tokens:
        try:
            _tokens[tokenizer] = from_tokenizer(tokenizer)
        except Exception as error:
            raise ConfigError(
                f"grammar: expected a fast tokenizer of transformers, got {type(tokenizer).__name__} "
                f"({_short(error)}); load one with AutoTokenizer"
            ) from error
    return _tokens[tokenizer]


def _checked(name: str, write: Callable[[Any], str]) -> Source:
    """The grammar that `write` gives, where it can be read."""
    guide = _llguidance()
    try:
        text = write(guide.LLMatcher)
    except ValueError as error:
        raise _refused(name, error) from error
    wrong = guide.LLMatcher.validate_grammar(text, limits=guide.LLParserLimits(**LIMITS))
    if wrong and not wrong.startswith("WARNING"):
        raise _refused(name, wrong)
    return Source(name, text)


def _bound(name: str, text: Any) -> None:
    if not isinstance(text, str):
        raise ConfigError(f"{name}: expected a text, got {type(cast('object', text)).__name__}; pass a string")
    if len(text) > MOST_SOURCE:
        raise ConfigError(f"{name}: expected at most {MOST_SOURCE} characters, got {len(text)}; make it smaller")


def _joined(schema: Mapping[str, Any]) -> int:
    """Patterns and formats that one text may have to match at once, at most; 1 where none are joined."""
    patterns, joins, left = 0, False, [cast("Any", schema)]
    while left:
        one = left.pop()
        if isinstance(one, list):
            left += one
        elif isinstance(one, dict):
            fields = cast("dict[str, Any]", one)
            mine = sum(isinstance(fields.get(name), str) for name in ("pattern", "format"))
            patterns += mine
            joins |= "allOf" in fields or (bool(mine) and any(name in fields for name in JOINING))
            left += fields.values()
    return patterns if joins else min(patterns, 1)


def _refused(name: str, reason: object) -> ConfigError:
    return ConfigError(f"{name}: expected a grammar that can be followed, got {_short(reason)}; change or simplify it")


def _short(reason: object) -> str:
    """On one line, since some reasons quote all that they are about."""
    text = " ".join(str(reason).split())
    return text if len(text) <= 200 else text[:200] + "..."
