"""Calls of tools, found in text however it is cut."""

from __future__ import annotations

import json

import pytest

from subquad.serve.tools import ToolText, parse

CALL = '{"name": "add", "arguments": {"a": 1, "text": "ä"}}'
TAGGED = f"<tool_call>\n{CALL}\n</tool_call>"


def read(text: str, size: int) -> tuple[str, list[tuple[str, str]], list[str]]:
    """What is shown, the calls, and what was shown before the end."""
    reader, shown, calls = ToolText(["add", "sub"]), list[str](), []
    for at in range(0, len(text), size):
        piece, found = reader.push(text[at : at + size])
        shown.append(piece)
        calls += found
    piece, found = reader.finish()
    return "".join([*shown, piece]), [(call.name, call.arguments) for call in [*calls, *found]], shown


ONE = [("add", '{"a": 1, "text": "ä"}')]


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize(
    ("text", "shown", "calls"),
    [
        ("no call <tool> at all <", "no call <tool> at all <", []),
        (TAGGED, "", ONE),
        (f"I add. {TAGGED}", "I add. ", ONE),
        (f"{TAGGED}\n{TAGGED}", "", ONE * 2),
        (f"{TAGGED[: -len('</tool_call>')]}", "", ONE),
        (CALL, "", ONE),
        (f"\n{CALL} ", "", ONE),
        (f"[{CALL}, {CALL}]", "", ONE * 2),
        (CALL.replace("arguments", "parameters"), "", ONE),
        (CALL.replace("add", "other"), CALL.replace("add", "other"), []),
        ('{"an": "object"}', '{"an": "object"}', []),
        ("[1, 2]", "[1, 2]", []),
        ("{no json", "{no json", []),
        ("<tool_call>no json</tool_call> text", "<tool_call>no json</tool_call> text", []),
        ("<tool_call>cut", "<tool_call>cut", []),
    ],
)
def test_calls_are_found(text: str, shown: str, calls: list[tuple[str, str]], size: int) -> None:
    got = read(text, size)
    assert got[:2] == (shown, calls)


def test_text_before_a_call_is_shown_as_it_comes() -> None:
    _, _, shown = read(f"I add. {TAGGED}", 1)
    assert "".join(shown[:7]) == "I add. " and "".join(shown[7:]) == ""


def test_calls_have_names_of_their_own() -> None:
    one, two = parse(f"[{CALL}, {CALL}]", ["add"])
    assert one.id != two.id and one.as_json()["function"] == {"name": "add", "arguments": one.arguments}
    assert json.loads(one.arguments) == {"a": 1, "text": "ä"}


@pytest.mark.parametrize("text", ["", "1", "null", '{"name": 1, "arguments": {}}', '{"name": "add"}', "[" * 100000])
def test_what_is_no_call(text: str) -> None:
    assert parse(text, ["add"]) == []
