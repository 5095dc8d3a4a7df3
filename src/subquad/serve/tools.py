"""Tools: how a model is told of them, and its calls found in what it writes, while it comes."""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, cast

OPEN, CLOSE = "<tool_call>", "</tool_call>"

# For chat templates that know of no tools: the same form that those of Hermes and Qwen2.5 ask for.
EXPLAINED = """You may call functions. These are their signatures:
<tools>
{tools}
</tools>
For each call write a JSON object with the function's name and arguments between tags:
<tool_call>
{{"name": "<name>", "arguments": {{...}}}}
</tool_call>"""


class Call(NamedTuple):
    """A function that the model calls, its arguments as JSON text."""

    id: str
    name: str
    arguments: str

    def as_json(self) -> dict[str, Any]:
        """As OpenAI writes it."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


def parse(text: str, names: Collection[str]) -> list[Call]:
    """The calls in one JSON text, an object or a list of objects; empty where it is anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return []
    found: list[Call] = []
    for item in cast("list[Any]", value if isinstance(value, list) else [value]):
        call = _call(item, names)
        if call is None:
            return []
        found.append(call)
    return found


def _call(item: Any, names: Collection[str]) -> Call | None:
    if not isinstance(item, dict):
        return None
    fields = cast("dict[str, Any]", item)
    name, arguments = fields.get("name"), fields.get("arguments", fields.get("parameters"))
    if not isinstance(name, str) or name not in names:
        return None
    if isinstance(arguments, str):
        return Call(f"call_{secrets.token_hex(12)}", name, arguments)
    if not isinstance(arguments, dict):
        return None
    return Call(f"call_{secrets.token_hex(12)}", name, json.dumps(arguments, ensure_ascii=False))


class ToolText:
    """Parts text that comes in pieces into what is shown and what calls a tool.

    Two forms are known: objects between ``<tool_call>`` tags, anywhere, and a text that is JSON from its first
    character on. What might be a call is held back until it is known; what turns out to be none is shown as it is.

    Args:
        names: of the tools there are.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.names, self._held, self._begun, self.called = names, "", False, False

    def push(self, text: str) -> tuple[str, list[Call]]:
        """What may be shown now, and the calls that are complete."""
        self._held += text
        if not self._begun and self._held.strip()[:1] in ("", "{", "["):
            return "", []  # all of it may be one call
        self._begun = True
        shown, calls = "", list[Call]()
        while True:
            at = self._held.find(OPEN)
            if at < 0:
                keep = _overlap(self._held, OPEN)
                shown += self._held[: len(self._held) - keep]
                self._held = self._held[len(self._held) - keep :]
                break
            end = self._held.find(CLOSE, at)
            if end < 0:
                shown, self._held = shown + self._held[:at], self._held[at:]
                break
            found = parse(self._held[at + len(OPEN) : end], self.names)
            shown += self._held[: at if found else end + len(CLOSE)]
            calls += found
            self._held = self._held[end + len(CLOSE) :]
        return self._give(shown, calls)

    def finish(self) -> tuple[str, list[Call]]:
        """The rest, after the last piece: a call whose closing tag was the end token's is complete as well."""
        rest, self._held = self._held, ""
        before, tag, inner = rest.partition(OPEN)
        calls = parse(inner if tag else rest, self.names)
        return self._give("" if calls and not tag else before if calls else rest, calls)

    def _give(self, shown: str, calls: list[Call]) -> tuple[str, list[Call]]:
        self.called = self.called or bool(calls)
        # Line breaks between calls belong to their form.
        return ("" if self.called and not shown.strip() else shown), calls


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of a text that begins the tag."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)


def explain(tools: Sequence[dict[str, Any]]) -> str:
    """What a model is told of tools where its template tells it nothing."""
    return EXPLAINED.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))


def written(calls: Sequence[dict[str, Any]]) -> str:
    """Calls of an earlier turn as the model would have written them."""
    return "\n".join(f"{OPEN}\n{json.dumps(call['function'], ensure_ascii=False)}\n{CLOSE}" for call in calls)
