"""Many streaming clients of a server, in one event loop: they keep what comes as it came, and read it when all is over.

So a client costs little beside the server that it measures, and needs nothing but Python.
"""

from __future__ import annotations

import asyncio
import json
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from subquad.core.errors import DataError


@dataclass
class Answer:
    """What came of one request.

    Attributes:
        status: of HTTP; 0 where the client hung up before it came.
        began: seconds of the clock when it was asked.
        texts: what was written, each with the second at which it was there.
        tokens, cached: those written, and those of the prompt that were known already; 0 until the stream ends.
        finish: why it ended; "" where the client hung up, or something went wrong.
        left: whether the client hung up.
        error: what the server says went wrong.
    """

    status: int
    began: float
    left: bool
    texts: list[tuple[float, str]] = field(default_factory=list[tuple[float, str]])
    tokens: int = 0
    cached: int = 0
    finish: str = ""
    error: str = ""

    @property
    def text(self) -> str:
        """All that was written."""
        return "".join(text for _, text in self.texts)

    @property
    def first(self) -> float:
        """Seconds to the first text."""
        return self.texts[0][0] - self.began

    @property
    def seconds(self) -> float:
        """Seconds to the last text."""
        return self.texts[-1][0] - self.began

    def arrivals(self) -> list[tuple[float, float]]:
        """Tokens and when they came: of its tokens each text counts as many as it has of the characters."""
        written = max(len(self.text), 1)
        return [(at, self.tokens * len(text) / written) for at, text in self.texts]


@dataclass(frozen=True)
class Ask:
    """A request of ``/v1/completions``.

    Attributes:
        body: its fields.
        leave: after so many reads the client hangs up, 0 as soon as it has asked; None stays.
    """

    body: dict[str, Any]
    leave: int | None = None


async def ask_all(port: int, asks: Sequence[Ask], clients: int) -> list[Answer]:
    """Have so many clients ask, each one request after the other, and return the answers in order."""
    left, streams = iter(enumerate(asks)), dict[int, _Stream]()

    async def client() -> None:
        for i, ask in left:
            streams[i] = await _Stream.ask(port, ask)

    await asyncio.gather(*(client() for _ in range(clients)))
    return [streams[i].answer() for i in range(len(asks))]


async def get(port: int, path: str) -> bytes:
    """The body of a page."""
    stream = await _Stream.send(port, f"GET {path} HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n".encode(), None)
    return stream.body()[1]


class _Stream(asyncio.Protocol):
    """One request on a connection of its own, which the server closes behind its answer."""

    def __init__(self, request: bytes, leave: int | None) -> None:
        self.request, self.leave = request, leave
        self.parts: list[bytes] = []
        self.times: list[float] = []
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.left = False

    @classmethod
    async def ask(cls, port: int, ask: Ask) -> _Stream:
        fields = {"stream": True, "stream_options": {"include_usage": True}, **ask.body}
        body = json.dumps(fields).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return await cls.send(port, head.encode() + body, ask.leave)

    @classmethod
    async def send(cls, port: int, request: bytes, leave: int | None) -> _Stream:
        loop = asyncio.get_running_loop()
        _, stream = await loop.create_connection(lambda: cls(request, leave), "127.0.0.1", port)
        await stream.over
        return stream

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport, self.began = transport, time.perf_counter()
        transport.write(self.request)
        if self.leave == 0:
            # What was asked is to be there first.
            asyncio.get_running_loop().call_soon(self._hang_up)

    def data_received(self, data: bytes) -> None:
        self.parts.append(data)
        self.times.append(time.perf_counter())
        if len(self.parts) == self.leave:
            self._hang_up()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.over.done():
            self.over.set_result(None)

    def _hang_up(self) -> None:
        self.left = True
        self.transport.abort()

    def body(self) -> tuple[int, bytes, list[int]]:
        """Status, body, and how many of its bytes were there at each of `times`."""
        raw = b"".join(self.parts)
        head, _, rest = raw.partition(b"\r\n\r\n")
        if not rest:
            return 0, b"", [0] * len(self.times)
        status = int(head.split(b" ", 2)[1])
        ends = [max(n - len(head) - 4, 0) for n in accumulate(map(len, self.parts))]
        if b"transfer-encoding: chunked" not in head.lower():
            return status, rest, ends
        # Where each chunk's data lies, in what came and in the body.
        body, at, laid = bytearray(), 0, [(0, 0)]
        while (stop := rest.find(b"\r\n", at)) >= 0 and (size := int(rest[at:stop], 16)):
            body += rest[stop + 2 : stop + 2 + size]
            at = stop + 2 + size + 2
            laid.append((min(at, len(rest)), len(body)))
        came = [raw for raw, _ in laid]
        return status, bytes(body), [laid[bisect_left(came, n + 1) - 1][1] for n in ends]

    def answer(self) -> Answer:
        """The events of a stream.

        Raises:
            DataError: bytes that are none.
        """
        status, body, ends = self.body()
        answer, at = Answer(status, self.began, self.left), 0
        for event in body.split(b"\n\n")[:-1]:
            at += len(event) + 2
            data = event.removeprefix(b"data: ")
            if data == b"[DONE]":
                break
            try:
                told: dict[str, Any] = json.loads(data)
            except ValueError as error:
                raise DataError(f"stream: expected events with JSON, got {event[:80]!r}; mend the server") from error
            if usage := told.get("usage"):
                answer.tokens = usage["completion_tokens"]
                answer.cached = usage["prompt_tokens_details"]["cached_tokens"]
            for choice in told.get("choices", ()):
                if choice["text"]:
                    answer.texts.append((self.times[bisect_left(ends, at)], choice["text"]))
                answer.finish = choice["finish_reason"] or answer.finish
            answer.error = told.get("error", {}).get("message", answer.error)
        if status not in (0, 200):
            answer.error = body.decode(errors="replace")
        return answer
