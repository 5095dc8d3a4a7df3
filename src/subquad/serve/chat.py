"""``/v1/chat/completions``: conversations by the model's own chat template, with tools."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from subquad.engine.request import Piece
from subquad.serve.answer import STREAMS, Delta, EventStream, Reader, Watch, make_requests, scored, whole
from subquad.serve.errors import ApiError
from subquad.serve.grammar import response_grammar, tool_grammar
from subquad.serve.schemas import ChatBody, Message
from subquad.serve.served import Served
from subquad.serve.site import Site
from subquad.serve.tools import explain, written


def render(tokenizer: Any, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> list[int]:
    """The tokens of a conversation that the model is to go on with.

    A template that shows nothing of the tools is filled with a system message that explains them.

    Raises:
        ApiError: no template, or messages that it does not take.
    """
    if not tokenizer.chat_template:
        raise ApiError(
            400, "messages: expected a chat template with the model, got none; use /v1/completions", "messages"
        )
    turns = [_turn(message) for message in messages]
    try:
        text = _fill(tokenizer, turns, tools)
        if tools and _fill(tokenizer, turns, ()) == text:
            text = _fill(tokenizer, _plainly(turns, tools), ())
    except Exception as error:  # a template may raise anything
        raise ApiError(400, f"messages: the model's chat template does not take them ({error})", "messages") from error
    # The template writes the start token itself.
    return tokenizer.encode(text, add_special_tokens=False)


def _fill(tokenizer: Any, turns: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> str:
    return tokenizer.apply_chat_template(
        list(turns), tools=list(tools) or None, tokenize=False, add_generation_prompt=True
    )


def _turn(message: Message) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    turn: dict[str, Any] = {"role": role, "content": message.text}
    if message.tool_calls:
        turn["tool_calls"] = [call.model_dump() for call in message.tool_calls]
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        turn["name"] = message.name
    return turn


def _plainly(turns: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Turns with the tools and their calls as plain text."""
    told = [turn | {"content": turn["content"] + written(turn.get("tool_calls", ()))} for turn in turns]
    if told[0]["role"] == "system":
        told[0]["content"] += "\n\n" + explain(tools)
    else:
        told.insert(0, {"role": "system", "content": explain(tools)})
    return told


def _logprobs(served: Served, pieces: Sequence[Piece]) -> dict[str, Any]:
    content: list[dict[str, Any]] = []
    for text, logprob, exact in (scored(served, piece) for piece in pieces):
        content.append({"token": text, "logprob": logprob, "bytes": exact, "top_logprobs": []})
    return {"content": content, "refusal": None}


def router(site: Site) -> APIRouter:
    """The endpoint of one server."""
    routes = APIRouter(tags=["generation"])

    @routes.post("/v1/chat/completions", response_model=None, responses=STREAMS)
    async def chat(body: ChatBody, http: Request) -> Response:
        """Continue a conversation."""
        served = site.find(body.model)
        if body.top_logprobs:
            raise ApiError(
                400,
                "top_logprobs: expected 0, since only the chosen token's is known; ask for logprobs",
                "top_logprobs",
            )
        tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
        names = [tool["function"]["name"] for tool in tools]
        choice = body.tool_choice or "auto"
        if choice == "none":
            tools, names = [], []
        make = tool_grammar(choice, tools) or response_grammar(body.response_format)
        grammar = None if make is None else await served.aside(lambda: make(served.tokenizer))
        prompt = await served.aside(lambda: render(served.tokenizer, body.messages, tools))
        most = body.max_completion_tokens or body.max_tokens
        requests = make_requests(served, body, [prompt], most, grammar)
        watch = Watch(site, served, http, requests, len(prompt))
        readers = [Reader(served, request, names) for request in requests]
        if body.stream:
            return EventStream(watch, _events(body, watch, readers))
        return JSONResponse(await whole(watch, http, _answer(body, watch, readers)))

    return routes


async def _answer(body: ChatBody, watch: Watch, readers: Sequence[Reader]) -> dict[str, Any]:
    deltas: list[list[Delta]] = [[] for _ in readers]
    async for index, pieces in watch.pieces():
        deltas[index].append(readers[index].take(pieces))
    choices: list[dict[str, Any]] = []
    for index, mine in enumerate(deltas):
        text, calls = "".join(delta.text for delta in mine), [call for delta in mine for call in delta.calls]
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if calls and not text else text,
            "refusal": None,
        }
        if calls:
            message["tool_calls"] = [call.as_json() for call in calls]
        pieces = [piece for delta in mine for piece in delta.pieces]
        scores = _logprobs(watch.served, pieces) if body.logprobs else None
        choices.append({"index": index, "message": message, "logprobs": scores, "finish_reason": mine[-1].finish})
    return {**_head(watch, "chat.completion"), "choices": choices, "usage": watch.usage()}


def _head(watch: Watch, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{watch.id}", "object": kind, "created": watch.created, "model": watch.served.name}


async def _events(body: ChatBody, watch: Watch, readers: Sequence[Reader]) -> AsyncIterator[dict[str, Any]]:
    head = _head(watch, "chat.completion.chunk")
    counted = body.stream_options is not None and bool(body.stream_options.include_usage)
    if counted:
        head["usage"] = None

    def event(index: int, delta: dict[str, Any], finish: str | None = None, scores: Any = None) -> dict[str, Any]:
        return {**head, "choices": [{"index": index, "delta": delta, "logprobs": scores, "finish_reason": finish}]}

    for index in range(len(readers)):
        yield event(index, {"role": "assistant", "content": ""})
    called = [0] * len(readers)
    async for index, pieces in watch.pieces():
        delta = readers[index].take(pieces)
        scores = _logprobs(watch.served, delta.pieces) if body.logprobs and delta.pieces else None
        if delta.text or scores:
            yield event(index, {"content": delta.text}, scores=scores)
        if delta.calls:
            calls = [{"index": called[index] + i, **call.as_json()} for i, call in enumerate(delta.calls)]
            called[index] += len(calls)
            yield event(index, {"tool_calls": calls})
        if delta.finish is not None:
            yield event(index, {}, delta.finish)
    if counted:
        yield {**head, "choices": [], "usage": watch.usage()}
