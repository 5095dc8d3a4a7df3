"""What holds a continuation to a form: the engine's grammars, for response formats and for calls of tools."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from subquad.engine.grammar import Grammar
from subquad.serve.errors import ApiError
from subquad.serve.schemas import ResponseFormat, ToolChoice

# From a tokenizer to a grammar; it may take a while.
Make = Callable[[Any], Grammar]


def _schema(schema: Mapping[str, Any]) -> Make:
    """JSON that is valid under a schema."""
    return lambda tokenizer: Grammar.json_schema(schema, tokenizer)


def response_grammar(form: ResponseFormat | None) -> Make | None:
    """The grammar of a response format; None where anything may be written.

    Raises:
        ApiError: no schema.
    """
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return Grammar.json_object
    if form.json_schema is None:
        raise ApiError(400, "response_format: expected a json_schema, got none; give one", "response_format")
    return _schema(form.json_schema.schema_)


def tool_grammar(choice: str | ToolChoice, tools: Sequence[Mapping[str, Any]]) -> Make | None:
    """The grammar of a call that must be made; None where none must.

    Raises:
        ApiError: no such tool.
    """
    if choice in ("none", "auto"):
        return None
    if isinstance(choice, ToolChoice):
        tools = [tool for tool in tools if tool["function"]["name"] == choice.function.name]
    if not tools:
        wanted = choice.function.name if isinstance(choice, ToolChoice) else choice
        raise ApiError(400, f"tool_choice: expected a tool for {wanted!r}, got none; give it in tools", "tool_choice")
    # Each one's parameters have a place of their own, where what they refer to is found.
    places = {f"tool{i}": tool["function"].get("parameters") or {"type": "object"} for i, tool in enumerate(tools)}
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool["function"]["name"]}, "arguments": {"$ref": f"#/$defs/{place}"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for place, tool in zip(places, tools, strict=True)
    ]
    moved = {place: _moved(schema, f"#/$defs/{place}") for place, schema in places.items()}
    return _schema({"$defs": moved, "anyOf": calls})


def _moved(schema: Any, place: str) -> Any:
    """A schema that refers to its own parts, as a part of another."""
    if isinstance(schema, list):
        return [_moved(item, place) for item in cast("list[Any]", schema)]
    if not isinstance(schema, dict):
        return schema
    fields = {key: _moved(value, place) for key, value in cast("dict[str, Any]", schema).items()}
    to = fields.get("$ref")
    return fields | {"$ref": place + to[1:]} if isinstance(to, str) and to.startswith("#") else fields
