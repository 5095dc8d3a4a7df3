"""uvicorn, with patience for slow clients that ends and a way to stop that loses nothing."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import signal
import sys
import time
from datetime import UTC, datetime
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from subquad.serve.site import LOG, Site

HEADER_SECONDS = 10.0
"""In which a request's headers must have come, from the connection's or the last answer's moment on."""

HEADER_BYTES = 32 * 2**10
"""Of a request, beside its body."""

MOST_PIPELINED = 16
"""Requests on a connection that wait for the answer before them; each is held whole."""

SWITCH_SECONDS = 1e-4
"""After which a thread that computes gives the interpreter to one that waits: a step asks for it hundreds of times."""

FLUSH_SECONDS = 5
"""For answers to leave once the last request has ended."""


class Patient(HttpToolsProtocol):
    """Closes connections on which no request's headers come, however their bytes trickle, or more of them than fit."""

    _headers_due: asyncio.TimerHandle | None = None
    _in_headers = True
    _beside_body = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """A client is there."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Bytes have come; of a request's those count that are not its body: headers, trailers, what parts chunks."""
        self._beside_body += len(data)
        super().data_received(data)
        if self._beside_body > HEADER_BYTES and not self.transport.is_closing():
            self.send_400_response(f"expected at most {HEADER_BYTES} bytes of headers, got more")

    def on_headers_complete(self) -> None:
        """A request may be answered."""
        self._in_headers = False
        self._relax()
        if len(self.pipeline) >= MOST_PIPELINED:
            # The rest of what has come is read, and makes nothing.
            self.transport.abort()
        else:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of its body."""
        # Chunks may cost as much as what is in them.
        self._beside_body -= 2 * len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """All of a request has come."""
        self._in_headers, self._beside_body = True, 0
        super().on_message_complete()
        if self.cycle.response_complete:
            self._watch()

    def on_response_complete(self) -> None:
        """All of an answer has been given."""
        waits = not self.pipeline
        super().on_response_complete()
        if waits and self._in_headers:
            self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        super().connection_lost(exc)
        self._relax()

    def _watch(self) -> None:
        if self._headers_due is None and not self.transport.is_closing():
            self._headers_due = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def _relax(self) -> None:
        if self._headers_due is not None:
            self._headers_due.cancel()
            self._headers_due = None


class Server(uvicorn.Server):
    """Stops on SIGTERM once what is under way has ended, at most some seconds later; on a second signal at once."""

    def __init__(self, config: uvicorn.Config, site: Site, drain_seconds: float) -> None:
        super().__init__(config)
        self.site, self.drain_seconds = site, drain_seconds
        self._deadline: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal has come."""
        if sig == signal.SIGTERM and self._deadline is None:
            self.site.drain()
            self._deadline = time.monotonic() + self.drain_seconds
        else:
            super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to stop."""
        if self._deadline is not None and (not self.site.under_way or time.monotonic() > self._deadline):
            self.should_exit = True
        return await super().on_tick(counter)

    async def startup(self, sockets: list[Any] | None = None) -> None:
        """Listen. What is there by now stays, so that no collection of a large body's garbage looks at it again."""
        gc.collect()
        gc.freeze()
        sys.setswitchinterval(SWITCH_SECONDS)
        await super().startup(sockets)

    async def shutdown(self, sockets: list[Any] | None = None) -> None:
        """Have what is left fail with an answer, and let answers leave."""
        self.site.drain()
        for one in self.site.served:
            await asyncio.to_thread(one.worker.stop)
        await super().shutdown(sockets)


def make_server(app: FastAPI, site: Site, host: str, port: int, drain_seconds: float = 30.0) -> Server:
    """A server that is not running yet."""
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=Patient,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=FLUSH_SECONDS,
    )
    return Server(config, site, drain_seconds)


class JsonLines(logging.Formatter):
    """A log record as one JSON object on one line."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def log_to_stderr() -> None:
    """Have this server and uvicorn log JSON lines on stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    for logger in (LOG, logging.getLogger("uvicorn")):
        logger.handlers = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False
