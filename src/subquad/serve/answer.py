"""From a request's fields to the engine's requests, and from pieces to choices; the same for chats and plain texts."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, NamedTuple, TypeVar

from fastapi import Request as HttpRequest
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from subquad.engine.detokenize import Detokenizer
from subquad.engine.request import Limits, Piece, Request
from subquad.engine.sampler import SamplingConfig
from subquad.serve.calls import Call
from subquad.serve.errors import ApiError, ClientGoneError, as_api_error
from subquad.serve.schemas import Generate
from subquad.serve.served import Served
from subquad.serve.site import LOG, Site
from subquad.serve.tools import Call as ToolCall
from subquad.serve.tools import ToolText

T = TypeVar("T")
# Of the endpoints that stream, for the OpenAPI page.
STREAMS: dict[int | str, dict[str, Any]] = {200: {"content": {"application/json": {}, "text/event-stream": {}}}}
FINISH = {"end": "stop", "stop": "stop", "length": "length"}


def sampling(body: Generate, seed: int) -> SamplingConfig:
    """How to choose, by OpenAI's meaning: the temperature is 1 where none is asked for."""
    temperature = 1.0 if body.temperature is None else body.temperature
    return SamplingConfig(
        # Colder than this is greedy.
        temperature=temperature if temperature >= 1e-6 else 0.0,
        # None of the mass is the likeliest token.
        top_p=1.0 if body.top_p is None else max(body.top_p, 1e-9),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias={int(token): float(bias) for token, bias in (body.logit_bias or {}).items()},
        seed=seed % 2**63,
    )


def make_requests(
    served: Served, body: Generate, prompts: Sequence[Sequence[int]], most: int | None, grammar: Any = None
) -> list[Request]:
    """The requests of ``n`` choices of each prompt, of seeds that count up.

    Only where there are stop strings does the engine make the text: else a `Reader` does, for many tokens at once.

    Args:
        served: the model.
        body: the fields.
        prompts: token ids.
        most: tokens to write; None is all that there is room for.
        grammar: what holds them to a form.

    Raises:
        ApiError: no room.
    """
    capacity, seed = served.worker.engine.capacity, body.seed
    if seed is None:
        seed = secrets.randbelow(2**62)
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    held = {} if grammar is None else {"grammar": grammar}
    requests: list[Request] = []
    for prompt in prompts:
        room = capacity - len(prompt) + 1
        if room < 1 or (most or 1) > room:
            raise ApiError(
                400,
                f"expected at most {capacity} tokens together, got {len(prompt)} of the prompt and {most or 1} to "
                "write; shorten it",
                param="max_tokens" if room >= 1 else "prompt",
                code="context_length_exceeded",
            )
        limits = Limits(max_new_tokens=most or room, end_tokens=served.ends, stop=stop)
        for _ in range(body.n or 1):
            config = sampling(body, seed + len(requests))
            requests.append(Request(prompt, limits, config, served.decoder if stop else None, **held))
    return requests


class Delta(NamedTuple):
    """What came of one choice: text, calls of tools, the tokens, and why it ended."""

    text: str
    calls: list[ToolCall]
    pieces: list[Piece]
    finish: str | None


class Reader:
    """Turns the pieces of one choice into deltas.

    Args:
        served: the model.
        request: of the choice.
        tools: names that may be called.
    """

    def __init__(self, served: Served, request: Request, tools: Sequence[str] = ()) -> None:
        self._ends = set(served.ends)
        self._text = Detokenizer(served.decoder, request.prompt) if request.tokenizer is None else None
        self._tools = ToolText(tools) if tools else None

    def take(self, pieces: Sequence[Piece]) -> Delta:
        """What came.

        Raises:
            ApiError: the model's numbers broke down, or nothing may be written.
        """
        last = pieces[-1].finish
        if last == "diverged":
            raise ApiError(500, "the model's logits are not finite; serve it in float32", code="diverged")
        if last == "exhausted":
            raise ApiError(400, "expected a form that something can follow; change it, or logit_bias", code="exhausted")
        shown = [piece for piece in pieces if piece.token not in self._ends]
        if self._text is None:
            text = "".join(piece.text for piece in pieces)
        else:
            text = self._text.push(*(piece.token for piece in shown))
            text += self._text.finish() if last is not None else ""
        calls: list[ToolCall] = []
        finish = None if last is None else FINISH[last]
        if self._tools is not None:
            text, calls = self._tools.push(text)
            if last is not None:
                rest, more = self._tools.finish()
                text, calls = text + rest, calls + more
                finish = "tool_calls" if self._tools.called and last != "length" else finish
        return Delta(text, calls, shown, finish)


class Watch:
    """One request from its first moment to its last: what it used, how long it took, how it ended.

    Args:
        site: measures and logs.
        served: the model.
        http: the request.
        requests: of the engine.
        prompts: how many tokens they have together, each counted once.
    """

    def __init__(
        self, site: Site, served: Served, http: HttpRequest, requests: Sequence[Request], prompts: int
    ) -> None:
        self.id = secrets.token_hex(12)
        self.created = int(time.time())
        self.served, self._site, self._http = served, site, http
        self.client: str = http.scope["state"]["client"]
        self.prompt_tokens, self.tokens = prompts, 0
        self._began, self._last = time.monotonic(), [0.0] * len(requests)
        self._first: float | None = None
        self._shown: list[int] = []
        self._outcome = "cancelled"
        self.call: Call = served.worker.submit(requests, self.client, site.bounds.request_seconds)

    async def pieces(self) -> AsyncIterator[tuple[int, list[Piece]]]:
        """What comes, measured."""
        metrics, model = self._site.metrics, self.served.name
        first, each = metrics.first.labels(model), metrics.each.labels(model)
        async for index, some in self.call:
            now = time.monotonic()
            if not self._last[index]:
                first.observe(now - self._began)
                self._first = self._first or now - self._began
            else:
                each.observe((now - self._last[index]) / len(some))
            self._last[index] = now
            self.tokens += len(some)
            if self._site.log_prompts:
                self._shown += [piece.token for piece in some if piece.token >= 0]
            yield index, some
        self._outcome = "ok"

    def failed(self, error: ApiError) -> None:
        """It ends with an error."""
        self._outcome = error.code or str(error.status)

    def close(self) -> None:
        """Free what it holds, count and log it; whatever happened."""
        self.call.close()
        metrics, seconds, path = self._site.metrics, time.monotonic() - self._began, self._http.url.path
        metrics.requests.labels(self.served.name, path, self._outcome).inc()
        metrics.prompt_tokens.labels(self.served.name).inc(self.prompt_tokens)
        metrics.whole.labels(self.served.name).observe(seconds)
        fields: dict[str, Any] = {
            "id": self.id,
            "client": self.client,
            "path": path,
            "model": self.served.name,
            "outcome": self._outcome,
            "choices": len(self._last),
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.call.cached,
            "completion_tokens": self.tokens,
            "first_token_s": None if self._first is None else round(self._first, 4),
            "seconds": round(seconds, 4),
        }
        if self._site.log_prompts:
            job = self.call.jobs[0].request
            texts = (
                self.served.decoder.decode(list(ids), skip_special_tokens=False) for ids in (job.prompt, self._shown)
            )
            fields |= dict(zip(("prompt", "answer"), texts, strict=True))
        LOG.info("request", extra={"fields": fields})

    def usage(self) -> dict[str, Any]:
        """Tokens so far."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.tokens,
            "total_tokens": self.prompt_tokens + self.tokens,
            "prompt_tokens_details": {"cached_tokens": self.call.cached},
        }


class EventStream(StreamingResponse):
    """Server-sent events of one request; what it holds is free when it ends, however it ends."""

    def __init__(self, watch: Watch, events: AsyncIterator[dict[str, Any]]) -> None:
        # No proxy may keep events back.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_frames(watch, events), media_type="text/event-stream", headers=headers)
        self._watch = watch

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._watch.close()


async def _frames(watch: Watch, events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    try:
        async for event in events:
            yield f"data: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n"
    except Exception as error:
        told = as_api_error(error)
        watch.failed(told)
        yield f"data: {json.dumps(told.body())}\n\n"
    else:
        yield "data: [DONE]\n\n"


async def whole(watch: Watch, http: HttpRequest, work: Coroutine[Any, Any, T]) -> T:
    """Do `work` to its end, unless the client leaves before; then what it holds is free.

    Raises:
        ClientGoneError: the client has left.
    """
    try:
        return await left_or_done(http, work)
    except ClientGoneError:
        raise
    except Exception as error:
        watch.failed(as_api_error(error))
        raise
    finally:
        watch.close()


async def left_or_done(http: HttpRequest, work: Coroutine[Any, Any, T]) -> T:
    """Do `work` to its end, unless the client leaves before.

    Raises:
        ClientGoneError: the client has left.
    """
    task, left = asyncio.create_task(work), asyncio.create_task(_left(http))
    try:
        await asyncio.wait((task, left), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        task.cancel()
        left.cancel()


async def _left(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def scored(served: Served, piece: Piece) -> tuple[str, float, list[int] | None]:
    """A token's text, its log-probability under the model, and its bytes where it is whole characters."""
    text = served.token_text(piece.token)
    exact = None if "\N{REPLACEMENT CHARACTER}" in text else list(text.encode())
    return text, max(piece.logprob, -9999.0), exact
