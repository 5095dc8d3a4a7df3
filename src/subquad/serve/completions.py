"""``/v1/completions``: plain texts, continued."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, cast

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from subquad.engine.request import Piece
from subquad.serve.answer import STREAMS, Delta, EventStream, Reader, Watch, make_requests, scored, whole
from subquad.serve.errors import ApiError
from subquad.serve.schemas import CompletionBody
from subquad.serve.served import Served
from subquad.serve.site import Site

USUAL = 16


def encode(tokenizer: Any, texts: str | Sequence[Any]) -> list[list[int]]:
    """The tokens of a text, of several, or of what is tokens already; a text begins as the tokenizer has it."""
    if isinstance(texts, str):
        return [tokenizer.encode(texts)]
    if isinstance(texts[0], int):
        return [list(cast("Sequence[int]", texts))]
    return [tokenizer.encode(text) if isinstance(text, str) else list(text) for text in texts]


def router(site: Site) -> APIRouter:
    """The endpoint of one server."""
    routes = APIRouter(tags=["generation"])

    @routes.post("/v1/completions", response_model=None, responses=STREAMS)
    async def completions(body: CompletionBody, http: Request) -> Response:
        """Continue plain texts."""
        served = site.find(body.model)
        if body.logprobs:
            raise ApiError(
                400, "logprobs: expected 0, since only the chosen token's is known; ask for that", "logprobs"
            )
        if body.echo and body.logprobs is not None:
            raise ApiError(400, "echo: expected no logprobs with it, since the prompt's are not known", "echo")
        prompts = await served.aside(lambda: encode(served.tokenizer, body.prompt))
        requests = make_requests(served, body, prompts, body.max_tokens or USUAL)
        for request in requests:
            served.worker.check(request)
        echoes = [""] * len(requests)
        if body.echo:
            echoes = [served.decoder.decode(list(request.prompt), skip_special_tokens=True) for request in requests]
        watch = Watch(site, served, http, requests, sum(map(len, prompts)))
        readers = [Reader(served, request) for request in requests]
        if body.stream:
            return EventStream(watch, _events(body, watch, readers, echoes))
        return JSONResponse(await whole(watch, http, _answer(body, watch, readers, echoes)))

    return routes


def _logprobs(served: Served, pieces: Sequence[Piece], at: int) -> dict[str, Any]:
    texts, offsets = [scored(served, piece) for piece in pieces], list[int]()
    for text, _, _ in texts:
        offsets.append(at)
        at += len(text)
    return {
        "tokens": [text for text, _, _ in texts],
        "token_logprobs": [logprob for _, logprob, _ in texts],
        "top_logprobs": None,
        "text_offset": offsets,
    }


async def _answer(
    body: CompletionBody, watch: Watch, readers: Sequence[Reader], echoes: Sequence[str]
) -> dict[str, Any]:
    deltas: list[list[Delta]] = [[] for _ in readers]
    async for index, pieces in watch.pieces():
        deltas[index].append(readers[index].take(pieces))
    choices: list[dict[str, Any]] = []
    for index, (mine, echo) in enumerate(zip(deltas, echoes, strict=True)):
        pieces = [piece for delta in mine for piece in delta.pieces]
        scores = None if body.logprobs is None else _logprobs(watch.served, pieces, 0)
        text = echo + "".join(delta.text for delta in mine)
        choices.append({"index": index, "text": text, "logprobs": scores, "finish_reason": mine[-1].finish})
    return {**_head(watch), "choices": choices, "usage": watch.usage()}


def _head(watch: Watch) -> dict[str, Any]:
    return {"id": f"cmpl-{watch.id}", "object": "text_completion", "created": watch.created, "model": watch.served.name}


async def _events(
    body: CompletionBody, watch: Watch, readers: Sequence[Reader], echoes: Sequence[str]
) -> AsyncIterator[dict[str, Any]]:
    head = _head(watch)
    counted = body.stream_options is not None and bool(body.stream_options.include_usage)
    if counted:
        head["usage"] = None

    def event(index: int, text: str, finish: str | None = None, scores: Any = None) -> dict[str, Any]:
        return {**head, "choices": [{"index": index, "text": text, "logprobs": scores, "finish_reason": finish}]}

    for index, echo in enumerate(echoes):
        if echo:
            yield event(index, echo)
    at = [0] * len(readers)
    async for index, pieces in watch.pieces():
        delta = readers[index].take(pieces)
        scores = None
        if body.logprobs is not None:
            scores = _logprobs(watch.served, delta.pieces, at[index])
            at[index] += sum(map(len, scores["tokens"]))
        if delta.text or delta.finish is not None or scores:
            yield event(index, delta.text, delta.finish, scores)
    if counted:
        yield {**head, "choices": [], "usage": watch.usage()}
