"""Conversations as tokens, by the model's own chat template; what clients write in them stays text."""

from __future__ import annotations

import copy
import json
import re
import secrets
from collections.abc import Callable, Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary

from subquad.serve.errors import ApiError
from subquad.serve.schemas import Message, ToolCall
from subquad.serve.tools import explain, written

# In a second or so they are read three times; each is a token or more.
MOST_NAMES = 10_000
# Of each tokenizer, a copy that takes special tokens as text.
_plain: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def render(tokenizer: Any, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> list[int]:
    """The tokens of a conversation that the model is to go on with.

    A template that shows nothing of the tools is filled with a system message that explains them. Only the template
    writes special tokens: their names in what a client has sent are encoded as any other text.

    Raises:
        ApiError: no template, or messages that it does not take.
    """
    if not tokenizer.chat_template:
        raise ApiError(
            400, "messages: expected a chat template with the model, got none; use /v1/completions", "messages"
        )
    special = Special(tokenizer)
    try:
        turns, shown = special.hide([_turn(message) for message in messages]), special.hide(list(tools))
        text = _fill(tokenizer, turns, shown)
        if shown and _fill(tokenizer, turns, ()) == text:
            text = _fill(tokenizer, _plainly(turns, shown), ())
    except Exception as error:  # a template may raise anything
        raise ApiError(400, f"messages: the model's chat template does not take them ({error})", "messages") from error
    return special.encode(text)


class Special:
    """The special tokens of a tokenizer, and where their names stand in what a client has sent.

    A name is replaced by a mark that nobody can guess before the template is filled, and put back between the
    template's own special tokens, in text that is encoded with none.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        special = sorted(
            ((token, id) for id, token in tokenizer.added_tokens_decoder.items() if token.special and token.content),
            key=lambda pair: -len(pair[0].content),
        )
        self._ids = [id for _, id in special]
        self._names = re.compile("|".join(re.escape(token.content) for token, _ in special) or r"(?!)")
        spaced = (
            r"\s*" * token.lstrip + f"({re.escape(token.content)})" + r"\s*" * token.rstrip for token, _ in special
        )
        self._tokens = re.compile("|".join(spaced) or r"(?!)")
        self._nonce, self._found = secrets.token_hex(8), list[str]()
        self._mark = re.compile(self._nonce + r"(\d+)z")

    def hide(self, value: Any) -> Any:
        """The value, with marks for the names in all of its texts."""
        if isinstance(value, str):
            return self._names.sub(self._hidden, value)
        if isinstance(value, list):
            return [self.hide(item) for item in cast("list[Any]", value)]
        if isinstance(value, dict):
            return {self.hide(key): self.hide(item) for key, item in cast("dict[Any, Any]", value).items()}
        return value

    def _hidden(self, match: re.Match[str]) -> str:
        self._found.append(match[0])
        return f"{self._nonce}{len(self._found) - 1}z"

    def encode(self, text: str) -> list[int]:
        """The tokens of a filled template, which writes the start token itself.

        Raises:
            ApiError: too many names, or special tokens change how this tokenizer reads the text between them, which
                can't be followed.
        """
        if len(self._found) > MOST_NAMES:
            text = (
                f"messages: expected at most {MOST_NAMES} names of special tokens, got {len(self._found)}; send fewer"
            )
            raise ApiError(400, text, "messages")
        usual: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        if not self._found:
            return usual
        if getattr(self.tokenizer, "backend_tokenizer", None) is None or self._parts(text, str) != usual:
            name = self._found[0]
            raise ApiError(
                400, f"messages: expected no special tokens of the model, got {name!r}; leave it out", "messages"
            )
        return self._parts(text, lambda part: self._mark.sub(lambda match: self._found[int(match[1])], part))

    def _parts(self, text: str, show: Callable[[str], str]) -> list[int]:
        """The template's special tokens, and between them what `show` makes of the text, without any."""
        if self.tokenizer not in _plain:
            plain = copy.deepcopy(self.tokenizer.backend_tokenizer)
            plain.encode_special_tokens = True
            _plain[self.tokenizer] = plain
        ids, at = list[int](), 0

        def add(part: str) -> None:
            ids.extend(_plain[self.tokenizer].encode(show(part), add_special_tokens=False).ids if part else ())

        for match in self._tokens.finditer(text):
            add(text[at : match.start()])
            ids.append(self._ids[cast("int", match.lastindex) - 1])
            at = match.end()
        add(text[at:])
        return ids


def _fill(tokenizer: Any, turns: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> str:
    return tokenizer.apply_chat_template(
        list(turns), tools=list(tools) or None, tokenize=False, add_generation_prompt=True
    )


def _turn(message: Message) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    turn: dict[str, Any] = {"role": role, "content": message.text}
    if message.tool_calls:
        turn["tool_calls"] = [_called(call) for call in message.tool_calls]
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        turn["name"] = message.name
    return turn


def _called(call: ToolCall) -> dict[str, Any]:
    """A call as templates expect it: the arguments as what they are, and no text of it."""
    fields = call.model_dump()
    try:
        arguments = json.loads(call.function.arguments)
    except ValueError:
        return fields
    if isinstance(arguments, dict):
        fields["function"]["arguments"] = arguments
    return fields


def _plainly(turns: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Turns with the tools and their calls as plain text."""
    told = [turn | {"content": turn["content"] + written(turn.get("tool_calls", ()))} for turn in turns]
    if told[0]["role"] == "system":
        told[0]["content"] += "\n\n" + explain(tools)
    else:
        told.insert(0, {"role": "system", "content": explain(tools)})
    return told
