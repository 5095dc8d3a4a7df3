"""``/v1/chat/completions``: conversations by the model's own chat template, with tools."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from subquad.core.errors import ConfigError
from subquad.engine.grammar import Grammar
from subquad.engine.request import Piece
from subquad.serve.answer import STREAMS, Delta, Reader, finite, make_requests
from subquad.serve.conversation import render
from subquad.serve.errors import ApiError
from subquad.serve.grammar import response_grammar, tool_grammar
from subquad.serve.schemas import ChatBody
from subquad.serve.served import Served
from subquad.serve.site import Site
from subquad.serve.watch import EventStream, Watch, whole


def _logprobs(served: Served, pieces: Sequence[Piece]) -> dict[str, Any]:
    content = [
        {**_scored(served, piece.token, piece.logprob), "top_logprobs": [_scored(served, *one) for one in piece.top]}
        for piece in pieces
    ]
    return {"content": content, "refusal": None}


def _scored(served: Served, token: int, logprob: float) -> dict[str, Any]:
    text, data = served.decoder.token(token)
    return {"token": text, "logprob": finite(logprob), "bytes": None if data is None else list(data)}


async def _grammar(body: ChatBody, served: Served, tools: Sequence[dict[str, Any]]) -> Grammar | None:
    """What the answer is held to."""
    choice = body.tool_choice or "auto"
    called = tool_grammar(choice, tools)
    make, param = (called, "tools") if called else (response_grammar(body.response_format), "response_format")
    if make is None:
        return None
    try:
        return await served.grammar(make)
    except ConfigError as error:
        raise ApiError(400, str(error), param) from error


def router(site: Site) -> APIRouter:
    """The endpoint of one server."""
    routes = APIRouter(tags=["generation"])

    @routes.post("/v1/chat/completions", response_model=None, responses=STREAMS)
    async def chat(body: ChatBody, http: Request) -> Response:
        """Continue a conversation."""
        served = site.find(body.model)
        if body.top_logprobs and not body.logprobs:
            raise ApiError(
                400, "top_logprobs: expected logprobs with it, got none; set logprobs to true", "top_logprobs"
            )
        tools = [] if body.tool_choice == "none" else [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
        names = [tool["function"]["name"] for tool in tools]
        grammar = await _grammar(body, served, tools)
        prompt = await served.aside(lambda: render(served.tokenizer, body.messages, tools))
        most = body.max_completion_tokens or body.max_tokens
        scores = body.top_logprobs or 0 if body.logprobs else None
        requests = make_requests(served, body, [prompt], most, grammar, scores)
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
