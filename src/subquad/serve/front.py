"""What stands before several replicas of a server: it guards, chooses, and asks another one when one is lost."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from subquad.serve.affinity import beginning
from subquad.serve.calls import LateError, StoppedError
from subquad.serve.errors import ApiError, as_api_error
from subquad.serve.metrics import TEXT_FORMAT
from subquad.serve.site import LOG

TRIES = 4
"""Replicas that are asked before a request is given up: one that kills whoever reads it must not kill them all."""

PAUSE_SECONDS = 0.2
"""Before another is asked; twice as long each time."""

CARRIED = (
    "type",
    "http_version",
    "method",
    "scheme",
    "path",
    "raw_path",
    "query_string",
    "headers",
    "client",
    "server",
)


class ReplicaLostError(Exception):
    """A replica has gone before it had answered."""


@dataclass(frozen=True)
class Asked:
    """One request on its way to a replica.

    Attributes:
        scope: of ASGI, what can be sent to another process.
        body: all of it.
        key: what it shares with others whose prompts begin alike.
    """

    scope: dict[str, Any]
    body: bytes
    key: str | None


Ask = Callable[[Asked], AsyncGenerator[list[Message], None]]
Figures = Callable[[], Awaitable[bytes]]


class Front:
    """An ASGI application that has replicas answer; put behind a `Guard`, it reads bodies at once.

    Nothing is sent to the client before the first part of an answer's body has come. Until then a lost replica does no
    harm: another one is asked. An answer that is no stream comes in one part, so none of those is lost. A stream that
    has begun ends with an error event.

    Args:
        ask: gives a replica's messages, some at a time; raises `ReplicaLostError`.
        figures: of all replicas, for ``/metrics``.
        seconds: in which an answer must begin.
    """

    def __init__(self, ask: Ask, figures: Figures, seconds: float) -> None:
        self.ask, self.figures, self.seconds = ask, figures, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        if scope["path"] == "/metrics":
            try:
                told = Response(await self.figures(), media_type=TEXT_FORMAT)
            except StoppedError as error:
                told = as_api_error(error).response()
            return await told(scope, receive, send)
        body = (await receive()).get("body", b"") if scope["method"] in ("POST", "PUT", "PATCH") else b""
        asked = Asked({name: scope[name] for name in CARRIED if name in scope}, body, beginning(scope["path"], body))
        work = asyncio.create_task(self._answer(asked, scope, receive, send))
        left = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait((work, left), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            left.cancel()
            work.cancel()
            # What a replica still does is given up there before this returns.
            await asyncio.gather(work, left, return_exceptions=True)

    async def _answer(self, asked: Asked, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self.seconds) as limit:
                for turn in range(TRIES):
                    if turn:
                        await asyncio.sleep(PAUSE_SECONDS * 2 ** (turn - 1))
                    if await self._try(asked, turn, send, limit):
                        return
            error = as_api_error(StoppedError(f"{TRIES} replicas were lost; try again"))
        except TimeoutError:
            error = as_api_error(LateError(f"expected to begin within {self.seconds:g} s"))
        await error.response()(scope, receive, send)

    async def _try(self, asked: Asked, turn: int, send: Send, limit: asyncio.Timeout) -> bool:
        """Whether one replica has answered; else nothing was sent."""
        held: list[Message] = []
        begun = events = False
        try:
            async with aclosing(self.ask(asked)) as parts:
                async for some in parts:
                    for message in some:
                        if message["type"] == "http.response.start":
                            if message["status"] == 503 and turn < TRIES - 1:
                                return False  # a replica that is stopping, or has failed
                            events = _is_stream(message)
                            told = [(b"x-replicas-lost", str(turn).encode())] if turn else []
                            held.append({**message, "headers": [*message["headers"], *told]})
                            continue
                        if not begun:
                            begun = True
                            limit.reschedule(None)
                        for each in (*held, message):
                            await send(each)
                        held.clear()
            return begun
        except ReplicaLostError as error:
            LOG.warning("a replica is lost", extra={"fields": {"path": asked.scope["path"], "begun": begun}})
            if not begun:
                return False
            if not events:
                raise  # the connection is cut, so that nobody takes a part for the whole
            told = ApiError(503, f"not available: {error}", code="unavailable")
            await send({"type": "http.response.body", "body": f"data: {json.dumps(told.body())}\n\n".encode()})
            return True


def _is_stream(start: Message) -> bool:
    return any(
        name.lower() == b"content-type" and value.startswith(b"text/event-stream") for name, value in start["headers"]
    )


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def play(app: ASGIApp, asked: Asked) -> AsyncGenerator[list[Message], None]:
    """What an application answers, as messages: all that has come since the last were taken.

    When this is closed, the application sees that its client has left.
    """
    came, done, gone = list[Message](), asyncio.Event(), asyncio.Event()
    body: list[Message] = [{"type": "http.request", "body": asked.body, "more_body": False}]

    async def receive() -> Message:
        if body:
            return body.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        came.append(message)
        done.set()

    async def answer() -> None:
        try:
            await app({**asked.scope, "asgi": {"version": "3.0"}, "root_path": "", "state": {}}, receive, send)
        finally:
            done.set()

    task = asyncio.create_task(answer())
    try:
        while not task.done() or came:
            await done.wait()
            done.clear()
            some = came[:]
            came.clear()
            if some:
                yield some
        task.result()
    finally:
        gone.set()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
