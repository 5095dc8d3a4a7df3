"""Answers of a form, through the official client: JSON, schemas, calls that must be made, and what can not be."""

from __future__ import annotations

import json
import threading
import time
from typing import Any, Literal

import numpy as np
import openai
import pytest
from numpy.typing import NDArray
from pydantic import BaseModel

from subquad.engine.generate import Limits, generate
from subquad.engine.grammar import Grammar, LLMatcher
from subquad.engine.sampler import SamplingConfig
from subquad.serve.grammar import tool_grammar

from .conftest import Running
from .test_chat import HELLO, rendered

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "a long name that a grammar forces": {"type": "boolean"},
        "kind": {"enum": ["short", "much longer"]},
        "text": {"type": "string", "pattern": "^[a-c]{3}$"},
    },
    "required": ["a long name that a grammar forces", "kind", "text"],
    "additionalProperties": False,
}
FORM: Any = {"type": "json_schema", "json_schema": {"name": "it", "strict": True, "schema": SCHEMA}}
FORM_ARGUMENTS: dict[str, Any] = {
    "$defs": {"side": {"enum": ["left", "right"]}},
    "type": "object",
    "properties": {"side": {"$ref": "#/$defs/side"}, "far": {"type": "boolean"}},
    "required": ["side", "far"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "turn", "parameters": FORM_ARGUMENTS}},
    {"type": "function", "function": {"name": "turn_back", "parameters": FORM_ARGUMENTS}},
]


def is_valid(text: str | None) -> bool:
    value = json.loads(text or "")
    assert list(value) == SCHEMA["required"]
    return value["kind"] in ("short", "much longer") and set(value["text"]) <= set("abc") and len(value["text"]) == 3


def alone(running: Running, seed: int) -> str:
    """The answer without a server, and without guesses."""
    loaded = running.served().loaded
    (result,) = generate(
        loaded.model,
        [rendered(running, "<s>[system:be brief][user:hello][a:")],
        limits=Limits(200, end_tokens=[257]),
        sampling=SamplingConfig(1.0, seed=seed),
        tokenizer=loaded.tokenizer,
        grammar=Grammar.json_schema(SCHEMA, loaded.tokenizer),
    )
    return result.text


def test_answers_follow_a_schema_as_those_of_single_runs_do(running: Running, client: openai.OpenAI) -> None:
    got = client.chat.completions.create(
        model="tiny", messages=HELLO, response_format=FORM, n=2, seed=5, max_tokens=200, logprobs=True, top_logprobs=2
    )
    for i, choice in enumerate(got.choices):
        assert choice.finish_reason == "stop" and is_valid(choice.message.content)
        assert choice.message.content == alone(running, 5 + i)
        content = choice.logprobs.content if choice.logprobs else None
        assert "".join(item.token for item in content or []) == choice.message.content
    engine = running.served().worker.engine
    assert sum(look.kept for look in engine.looks) > 0, "no guess stood"


def test_streams_follow_a_schema(running: Running, client: openai.OpenAI) -> None:
    texts, finishes = ["", ""], ["", ""]
    for chunk in client.chat.completions.create(
        model="tiny", messages=HELLO, response_format=FORM, n=2, seed=8, max_tokens=200, stream=True
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            finishes[choice.index] += choice.finish_reason or ""
    assert all(map(is_valid, texts)) and finishes == ["stop", "stop"]
    assert texts == [alone(running, 8), alone(running, 9)]


class Side(BaseModel):
    """What a schema refers to."""

    side: Literal["left", "right"]


class Turn(BaseModel):
    """As a user of the client writes it."""

    first: Side
    second: Side | None


def test_the_client_gets_its_own_classes(client: openai.OpenAI) -> None:
    got = client.chat.completions.parse(model="tiny", messages=HELLO, response_format=Turn, seed=1, max_tokens=100)
    parsed = got.choices[0].message.parsed
    assert isinstance(parsed, Turn) and parsed.first.side in ("left", "right")
    tool = openai.pydantic_function_tool(Turn)
    got = client.chat.completions.parse(
        model="tiny", messages=HELLO, tools=[tool], tool_choice="required", seed=2, max_tokens=200
    )
    (call,) = got.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Turn)


def test_any_object_is_an_object(client: openai.OpenAI) -> None:
    # A random model is helped to come to an end.
    bias = {str(ord(char) - 33): 4 for char in '"}:'}
    got = client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        response_format={"type": "json_object"},
        n=4,
        seed=1,
        max_tokens=400,
        logit_bias=bias,
    )
    ended = [choice for choice in got.choices if choice.finish_reason == "stop"]
    assert ended
    for choice in got.choices:
        assert (choice.message.content or "").startswith("{")
    assert all(isinstance(json.loads(choice.message.content or ""), dict) for choice in ended)


@pytest.mark.parametrize(
    ("choice", "names"),
    [("required", {"turn", "turn_back"}), ({"type": "function", "function": {"name": "turn_back"}}, {"turn_back"})],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_must_be_made_is_made(client: openai.OpenAI, choice: Any, names: set[str], stream: bool) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": HELLO, "tools": TOOLS, "tool_choice": choice, "seed": 3}
    if stream:
        choices = [one for chunk in client.chat.completions.create(**asked, stream=True) for one in chunk.choices]
        text = "".join(one.delta.content or "" for one in choices)
        calls = [call for one in choices for call in one.delta.tool_calls or []]
        finish = [one.finish_reason for one in choices if one.finish_reason]
    else:
        (one,) = client.chat.completions.create(**asked).choices
        text, calls, finish = one.message.content or "", one.message.tool_calls or [], [one.finish_reason]
    assert text == "" and finish == ["tool_calls"]
    (call,) = calls
    assert call.function.name in names
    arguments = json.loads(call.function.arguments)
    assert arguments["side"] in ("left", "right") and isinstance(arguments["far"], bool) and len(arguments) == 2


def test_a_call_that_is_cut_is_text(client: openai.OpenAI) -> None:
    got = client.chat.completions.create(
        model="tiny", messages=HELLO, tools=TOOLS, tool_choice="required", max_tokens=12
    )
    assert got.choices[0].finish_reason == "length" and not got.choices[0].message.tool_calls
    assert (got.choices[0].message.content or "").startswith('{"name": "t')


def test_parameters_find_their_own_parts(running: Running) -> None:
    """Each tool's parameters refer to parts of the same name, which differ."""
    other = FORM_ARGUMENTS | {"$defs": {"side": {"enum": ["up"]}}}
    tools = [TOOLS[0], {"type": "function", "function": {"name": "lift", "parameters": other}}]
    make = tool_grammar("required", tools)
    assert make is not None
    matcher = make(running.served().tokenizer).start()
    for token in rendered(running, '{"name": "lift", "arguments": {"side": "'):
        matcher.advance(token)
    mask_w: NDArray[np.int32] = np.zeros(-(-300 // 32), dtype=np.int32)
    matcher.fill(mask_w)
    assert [chr(33 + i) for i in range(94) if int(mask_w[i // 32]) >> i % 32 & 1] == ["u"]


BOMBS: dict[str, Any] = {
    "no such type": {"type": "cat"},
    "what nothing is valid under": {"type": "string", "minLength": 5, "maxLength": 2},
    "a schema of elsewhere": {"$ref": "http://elsewhere.invalid/x.json"},
    "a schema that is not there": {"$ref": "#/$defs/nowhere"},
    "itself": {"$ref": "#"},
    "all of any of": {
        "allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {}}} for j in range(10)]} for i in range(8)],
    },
    "no expression": {"type": "string", "pattern": "(("},
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_can_not_be_followed_is_refused_in_bounded_time(client: openai.OpenAI, name: str) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "it", "schema": BOMBS[name]}}
    began = time.monotonic()
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model="tiny", messages=HELLO, response_format=form, max_tokens=4)
    assert time.monotonic() - began < 3
    assert raised.value.param == "response_format" and len(raised.value.message) < 1000


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "^((a{1,999}){1,999}){1,999}$"},
        {"type": "string", "pattern": "^(.*a.{40}|.*b.{39})$"},
        {"enum": [f"value {i} of many" for i in range(2900)]},
        {"type": "array", "minItems": 10**6, "items": {"type": "integer"}},
    ],
    ids=["repeats", "states", "alternatives", "items"],
)
def test_what_is_large_is_followed_in_bounded_time(client: openai.OpenAI, schema: dict[str, Any]) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
    began = time.monotonic()
    got = client.chat.completions.create(model="tiny", messages=HELLO, response_format=form, max_tokens=40)
    assert time.monotonic() - began < 5
    assert (got.choices[0].message.content or "")[0] in '"['


def test_parameters_that_can_not_be_followed_are_refused(client: openai.OpenAI) -> None:
    tools: Any = [{"type": "function", "function": {"name": "x", "parameters": {"type": "cat"}}}]
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model="tiny", messages=HELLO, tools=tools, tool_choice="required")
    assert raised.value.param == "tools"
    # Nothing is made of them where nothing is held to them.
    client.chat.completions.create(model="tiny", messages=HELLO, tools=tools, max_tokens=2)


@pytest.mark.parametrize("stream", [False, True])
def test_where_nothing_can_follow_an_error_says_so(
    running: Running, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    fill, masks = LLMatcher.fill, 0

    def giving_up(self: LLMatcher, mask_w: NDArray[np.int32]) -> None:
        nonlocal masks
        masks += 1
        fill(self, mask_w) if masks < 10 else mask_w.fill(0)

    monkeypatch.setattr(LLMatcher, "fill", giving_up)
    asked: dict[str, Any] = {"model": "tiny", "messages": HELLO, "response_format": FORM, "temperature": 0}
    with pytest.raises(openai.APIError, match="something can follow") as raised:
        for _ in client.chat.completions.create(**asked, stream=stream):
            pass
    assert raised.value.code == "exhausted"
    monkeypatch.undo()
    got = client.chat.completions.create(**asked)
    assert is_valid(got.choices[0].message.content), "the server goes on"


def test_grammars_that_take_long_delay_nobody_who_asks_for_none(
    running: Running, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, compiling = threading.Event(), threading.Semaphore(0)
    make = Grammar.json_schema

    def slow(schema: Any, tokenizer: Any) -> Grammar:
        compiling.release()
        assert gate.wait(20)
        return make(schema, tokenizer)

    monkeypatch.setattr(Grammar, "json_schema", slow)
    got: list[Any] = []

    def ask() -> None:
        got.append(client.chat.completions.create(model="tiny", messages=HELLO, response_format=FORM, max_tokens=200))

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()
    try:
        assert all(compiling.acquire(timeout=10) for _ in range(2)) and not compiling.acquire(timeout=0.1)
        for _ in range(3):
            client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=2)
    finally:
        gate.set()
    for thread in threads:
        thread.join(30)
    assert len(got) == 12 and all(is_valid(one.choices[0].message.content) for one in got)
