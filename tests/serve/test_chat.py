"""Conversations through the official client: templates, streams, tools, refusals."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from subquad.serve.conversation import render
from subquad.serve.errors import ApiError
from subquad.serve.schemas import Message

from .conftest import Running, make_tokenizer

HELLO: list[Any] = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
ADD: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers.",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
        },
    }
]


def rendered(running: Running, text: str) -> list[int]:
    return running.served().tokenizer.encode(text, add_special_tokens=False)


def test_a_chat_follows_the_template(running: Running, client: openai.OpenAI) -> None:
    got = client.chat.completions.create(model="tiny", messages=HELLO, temperature=0, max_completion_tokens=20)
    prompt = rendered(running, "<s>[system:be brief][user:hello][a:")
    alone = running.single(prompt, 20)
    assert got.choices[0].message.content == alone.text
    assert got.choices[0].message.role == "assistant"
    assert got.usage is not None and got.usage.prompt_tokens == len(prompt)
    assert got.usage.completion_tokens == len(alone.tokens)
    assert got.object == "chat.completion" and got.model == "tiny"


def test_parts_of_a_message_are_joined(running: Running, client: openai.OpenAI) -> None:
    parts: list[Any] = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    messages: list[Any] = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
    one = client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=12)
    two = client.chat.completions.create(model="tiny", messages=HELLO, temperature=0, max_tokens=12)
    assert one.choices[0].message.content == two.choices[0].message.content


def test_a_stream_is_the_answer_in_pieces(running: Running, client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=HELLO,
            temperature=0,
            max_tokens=20,
            n=2,
            stream=True,
            logprobs=True,
            stream_options={"include_usage": True},
        )
    )
    alone = running.single(rendered(running, "<s>[system:be brief][user:hello][a:"), 20)
    for index in range(2):
        mine = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert mine[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in mine) == alone.text
        scores = [item.logprob for choice in mine if choice.logprobs for item in choice.logprobs.content or []]
        assert scores == pytest.approx(alone.logprobs[: len(scores)], abs=1e-6)
        assert len(scores) == len(alone.tokens) - (alone.finish == "end")
        assert [choice.finish_reason for choice in mine if choice.finish_reason] == [mine[-1].finish_reason]
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 2 * len(alone.tokens)
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_tool_is_called(client: openai.OpenAI) -> None:
    got = client.chat.completions.create(model="scripted", messages=HELLO, tools=ADD, temperature=0)
    choice = got.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content == "Let me add. "
    (call,) = choice.message.tool_calls or []
    assert call.type == "function" and call.function.name == "add"
    assert json.loads(call.function.arguments) == {"a": 1, "b": 2}


def test_a_tool_is_called_in_a_stream(client: openai.OpenAI) -> None:
    text, calls, finish = "", [], None
    for chunk in client.chat.completions.create(
        model="scripted", messages=HELLO, tools=ADD, temperature=0, stream=True
    ):
        for choice in chunk.choices:
            text += choice.delta.content or ""
            calls += choice.delta.tool_calls or []
            finish = choice.finish_reason or finish
    assert (text, finish) == ("Let me add. ", "tool_calls")
    assert [(call.index, call.function.name) for call in calls] == [(0, "add")]
    assert json.loads(calls[0].function.arguments) == {"a": 1, "b": 2}


@pytest.mark.parametrize("options", [{}, {"tools": ADD, "tool_choice": "none"}])
def test_without_tools_a_call_is_text(client: openai.OpenAI, options: dict[str, Any]) -> None:
    got = client.chat.completions.create(model="scripted", messages=HELLO, temperature=0, **options)
    assert got.choices[0].finish_reason == "stop" and got.choices[0].message.tool_calls is None
    assert (got.choices[0].message.content or "").endswith('"b": 2}}</tool_call>')


def test_a_tools_answer_goes_into_the_next_turn(running: Running, client: openai.OpenAI) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
    turns: list[Any] = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "3"},
    ]
    got = client.chat.completions.create(model="tiny", messages=turns, temperature=0, max_tokens=8)
    prompt = rendered(running, "<s>[system:be brief][user:hello][assistant:][tool:3][a:")
    assert got.choices[0].message.content == running.single(prompt, 8).text


def test_a_template_that_knows_no_tools_is_told_in_a_system_message() -> None:
    plain = "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}"
    tokenizer = make_tokenizer(plain)
    turns = [Message(role="user", content="hi")]
    text = tokenizer.decode(render(tokenizer, turns, ADD))
    assert text.startswith("[system:") and '"name": "add"' in text and text.endswith("[user:hi]")
    assert tokenizer.decode(render(tokenizer, turns, [])) == "[user:hi]"


def test_a_template_that_takes_no_such_messages_is_an_error() -> None:
    refusing = make_tokenizer("{{ raise_exception('turns must alternate') }}")
    with pytest.raises(ApiError, match="turns must alternate"):
        render(refusing, [Message(role="user", content="hi")], [])
    with pytest.raises(ApiError, match="chat template"):
        render(make_tokenizer(None), [Message(role="user", content="hi")], [])


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "scripted"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="expected one of tiny, scripted"):
        client.models.retrieve("gpt")


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"n": 10**9}, "n"),
        ({"n": 0}, "n"),
        ({"max_tokens": 10**6}, "max_tokens"),
        ({"top_p": 1.5}, "top_p"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"tool_choice": "required"}, "tool_choice"),
    ],
)
def test_what_can_not_be_is_refused(client: openai.OpenAI, options: dict[str, Any], param: str) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 4} | options
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(**asked)
    assert (raised.value.param or "").startswith(param)
    assert raised.value.type == "invalid_request_error"


def test_what_is_not_known_is_ignored(client: openai.OpenAI) -> None:
    got = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=2, user="u", extra_body={"store": True, "metadata": {"a": [1]}}
    )
    assert got.choices[0].finish_reason is not None


def test_another_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        client.chat.completions.create(model="gpt-4", messages=HELLO)
    assert raised.value.code == "model_not_found"


def test_a_prompt_beyond_the_room_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x" * 3000}])
    assert raised.value.code == "context_length_exceeded"
