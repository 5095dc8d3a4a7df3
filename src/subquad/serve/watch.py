"""One request from its first moment to its last: measured, logged, streamed, and given up when its client leaves."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, TypeVar

from fastapi import Request as HttpRequest
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from subquad.engine.request import Piece, Request
from subquad.serve.calls import Call
from subquad.serve.errors import ApiError, ClientGoneError, as_api_error
from subquad.serve.served import Served
from subquad.serve.site import LOG, Site

T = TypeVar("T")
TO_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


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
        """Answer, until the client leaves."""
        try:
            await left_or_done(receive, self.stream_response(send))
        except ClientGoneError:
            pass
        finally:
            self._watch.close()


async def _frames(watch: Watch, events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    try:
        async for event in events:
            yield f"data: {TO_JSON(event)}\n\n"
    except Exception as error:
        told = as_api_error(error)
        if told.code == "internal":
            LOG.exception("a stream has failed")
        watch.failed(told)
        yield f"data: {TO_JSON(told.body())}\n\n"
    else:
        yield "data: [DONE]\n\n"


async def whole(watch: Watch, http: HttpRequest, work: Coroutine[Any, Any, T]) -> T:
    """Do `work` to its end, unless the client leaves before; then what it holds is free.

    Raises:
        ClientGoneError: the client has left.
    """
    try:
        return await left_or_done(http.receive, work)
    except ClientGoneError:
        raise
    except Exception as error:
        watch.failed(as_api_error(error))
        raise
    finally:
        watch.close()


async def left_or_done(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do `work` to its end, unless the client leaves before.

    Raises:
        ClientGoneError: the client has left.
    """
    task, left = asyncio.create_task(work), asyncio.create_task(_left(receive))
    try:
        await asyncio.wait((task, left), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        task.cancel()
        left.cancel()


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
