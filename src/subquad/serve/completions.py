"""``/v1/completions``: plain texts, continued."""

from __future__ import annotations

import codecs
from collections.abc import AsyncIterator, Sequence
from typing import Any, cast

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from subquad.engine.request import Piece
from subquad.serve.answer import STREAMS, Delta, Reader, finite, make_requests
from subquad.serve.errors import ApiError
from subquad.serve.schemas import CompletionBody
from subquad.serve.served import Served
from subquad.serve.site import Site
from subquad.serve.watch import EventStream, Watch, whole

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
        if body.echo and body.logprobs is not None:
            raise ApiError(400, "echo: expected no logprobs with it, since the prompt's are not known", "echo")
        prompts = await served.aside(lambda: encode(served.tokenizer, body.prompt))
        requests = make_requests(served, body, prompts, body.max_tokens or USUAL, scores=body.logprobs)
        for request in requests[:: body.n or 1]:
            served.worker.check(request)
        echoes = [""] * len(requests)
        if body.echo:
            texts = [served.decoder.decode(tokens, skip_special_tokens=True) for tokens in prompts]
            echoes = [text for text in texts for _ in range(body.n or 1)]
        watch = Watch(site, served, http, requests, sum(map(len, prompts)))
        readers = [Reader(served, request) for request in requests]
        if body.stream:
            return EventStream(watch, _events(body, watch, readers, echoes))
        return JSONResponse(await whole(watch, http, _answer(body, watch, readers, echoes)))

    return routes


class Scores:
    """The log-probabilities of one choice, in OpenAI's form for texts.

    Args:
        served: the model.
        k: likeliest tokens that were asked for.
    """

    def __init__(self, served: Served, k: int) -> None:
        self._decoder, self._k, self._at = served.decoder, k, 0
        # Characters are counted where their last byte comes.
        self._text = codecs.getincrementaldecoder("utf-8")("replace")

    def take(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Of the tokens that came."""
        offsets, tokens, tops = list[int](), list[str](), list[dict[str, float]]()
        for piece in pieces:
            name, data = self._decoder.token(piece.token)
            offsets.append(self._at)
            self._at += len(name) if data is None else len(self._text.decode(data))
            tokens.append(name)
            # Of tokens that are written alike the likeliest is shown; the chosen one is among them in any case.
            top = {self._decoder.token(token).text: finite(score) for token, score in reversed(piece.top)}
            tops.append(dict(reversed(top.items())) | {name: finite(piece.logprob)})
        scores = [finite(piece.logprob) for piece in pieces]
        return {
            "tokens": tokens,
            "token_logprobs": scores,
            "top_logprobs": tops if self._k else None,
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
        scores = None if body.logprobs is None else Scores(watch.served, body.logprobs).take(pieces)
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
    every = [Scores(watch.served, body.logprobs or 0) for _ in readers]
    async for index, pieces in watch.pieces():
        delta = readers[index].take(pieces)
        scores = every[index].take(delta.pieces) if body.logprobs is not None and delta.pieces else None
        if delta.text or delta.finish is not None or scores:
            yield event(index, delta.text, delta.finish, scores)
    if counted:
        yield {**head, "choices": [], "usage": watch.usage()}
