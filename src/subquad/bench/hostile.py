"""Clients that mean harm, over plain sockets: what each sends, and how a server must answer."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from typing import Any

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MEGABYTE = 2**20
Address = tuple[str, int]
Attack = Callable[[Address], str]
"""Does its worst, and returns the status of the answer, or ``closed``."""


def head(path: str, *lines: str) -> bytes:
    """A POST's beginning."""
    return "\r\n".join((f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", *lines, "", "")).encode()


def status(line: socket.socket) -> str:
    """Of the answer that comes, in three digits; ``closed`` where none does."""
    got = b""
    with suppress(ConnectionError):
        while b"\r\n" not in got and (more := line.recv(2**16)):
            got += more
    return got.split(b" ", 2)[1].decode() if got.startswith(b"HTTP/1.1 ") else "closed"


def pouring(first: bytes, part: bytes, most: int = 100 * MEGABYTE) -> Attack:
    """Send `part` over and over, until an answer comes."""

    def attack(address: Address) -> str:
        with socket.create_connection(address, timeout=60) as line:
            sent = 0
            with suppress(ConnectionError):
                line.sendall(first)
                while sent < most:
                    line.sendall(part)
                    sent += len(part)
            return status(line)

    return attack


def trickling(first: bytes, seconds: float = 0.5) -> Attack:
    """Send a byte now and then, until the server has had enough."""

    def attack(address: Address) -> str:
        with socket.create_connection(address, timeout=seconds) as line:
            line.sendall(first)
            for _ in range(int(120 / seconds)):
                try:
                    if got := line.recv(2**16):
                        return got.split(b" ", 2)[1].decode()
                    return "closed"
                except TimeoutError:
                    with suppress(ConnectionError):
                        line.sendall(b"x")
                except ConnectionError:
                    return "closed"
            return "endless"

    return attack


def body(data: bytes, path: str = CHAT) -> Attack:
    """Send a whole body."""
    return pouring(head(path, f"Content-Length: {len(data)}"), data, 1)


def chat(**fields: Any) -> Attack:
    """Ask for a chat with more fields than the usual."""
    message = {"role": "user", "content": "x"}
    return body(json.dumps({"model": "tiny", "messages": [message], "max_tokens": 4, **fields}).encode())


def schema(value: Any) -> Attack:
    """Ask for a form."""
    return chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": value}})


def doubling(depth: int) -> dict[str, Any]:
    """A schema of `depth` definitions that means two to the power of `depth` strings."""
    definitions: dict[str, Any] = {
        f"d{i}": {
            "type": "object",
            "properties": {k: {"$ref": f"#/$defs/d{i + 1}"} for k in "ab"},
            "required": ["a", "b"],
        }
        for i in range(depth)
    }
    return {"$defs": definitions | {f"d{depth}": {"type": "string"}}, "$ref": "#/$defs/d0"}


def many(n: int, first: bytes) -> Attack:
    """Hold connections open with a request that never ends on each, while somebody else asks."""

    def attack(address: Address) -> str:
        lines: list[socket.socket] = []
        try:
            for _ in range(n):
                lines.append(socket.create_connection(address, timeout=10))
                lines[-1].sendall(first)
            with socket.create_connection(address, timeout=10) as line:
                line.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                return status(line)
        finally:
            for line in lines:
                line.close()

    return attack


def sleeping(address: Address) -> str:
    """Ask for long streams and read none of them."""
    asked = {"model": "tiny", "prompt": ["x"] * 16, "max_tokens": 1000, "stream": True, "logprobs": 0}
    data = json.dumps(asked | {"logit_bias": {"256": -100}}).encode()
    with socket.create_connection(address, timeout=60) as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        line.sendall(head(TEXT, f"Content-Length: {len(data)}") + data)
        time.sleep(5)
        return status(line)


def pipelining(address: Address) -> str:
    """Ask without end on one connection and read no answer."""
    one = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"
    with socket.create_connection(address, timeout=2) as line:
        with suppress(TimeoutError, ConnectionError):
            for _ in range(2000):
                line.sendall(one * 100)
        return status(line)


LIMIT = 4 * MEGABYTE - 200
CHUNKED = head(CHAT, "Transfer-Encoding: chunked")
FILLED = b"10000\r\n" + b" " * 2**16 + b"\r\n"
JOINED = [{"type": "string", "pattern": f"^.*{'x' * i}.*$"} for i in range(60)]
WIDE = {f"p{i}": {"type": "string"} for i in range(20_000)}
# What is not meant to be a request at all, and what is one that asks for too much.
QUICK: dict[str, tuple[Attack, tuple[str, ...]]] = {
    "body_100mb": (pouring(head(CHAT, f"Content-Length: {100 * MEGABYTE}"), b" " * MEGABYTE), ("413",)),
    "body_endless": (pouring(CHUNKED, FILLED), ("413",)),
    "chunk_of_exabytes": (pouring(CHUNKED, b"f" * 15 + b"\r\n" + b" " * MEGABYTE), ("400", "413")),
    "chunk_extension": (pouring(CHUNKED, b"1;" + b"x" * MEGABYTE), ("400", "closed")),
    "header_100mb": (pouring(b"GET / HTTP/1.1\r\nHost: x\r\nX: ", b"x" * MEGABYTE), ("400",)),
    "headers_endless": (pouring(b"GET / HTTP/1.1\r\nHost: x\r\n", b"X: x\r\n" * 10000), ("400",)),
    "invalid_utf8": (body(b'{"model": "' + b"\xff" * LIMIT + b'"}'), ("400",)),
    "deep_json": (body(b"[" * LIMIT), ("400",)),
    "deep_objects": (body(b'{"a":' * (LIMIT // 5)), ("400",)),
    "flat_brackets": (body(b'{"model": "tiny", "messages": [' + b"[]," * (LIMIT // 4) + b"[]]}"), ("400",)),
    "quotes": (body(b"[" * 100 + b'"' * LIMIT), ("400",)),
    "escaped_quotes": (body(b"[" * 100 + b'"' + b'\\"' * (LIMIT // 2)), ("400",)),
    "half_pairs": (body(b'{"model": "tiny", "prompt": "' + b"\\ud800" * (LIMIT // 6) + b'"}', TEXT), ("400",)),
    "many_keys": (body(json.dumps({f"k{i}": 1 for i in range(250_000)}).encode()), ("400",)),
    "huge_integer": (body(b'{"model": "tiny", "seed": ' + b"9" * LIMIT + b"}"), ("400",)),
    "long_prompt": (body(json.dumps({"model": "tiny", "prompt": "a b" * (LIMIT // 3)}).encode(), TEXT), ("400",)),
    "many_messages": (chat(messages=[{"role": "user", "content": "x"}] * 100_000), ("400",)),
    "schema_doubling": (schema(doubling(40)), ("200", "400")),
    "schema_recursion": (schema({"$ref": "#"}), ("200", "400")),
    "schema_repeats": (schema({"type": "string", "pattern": "^((a{1,900}){1,900}){1,900}$"}), ("200", "400")),
    "schema_backtracking": (schema({"type": "string", "pattern": "^(a+)+$"}), ("200", "400")),
    "schema_lookahead": (schema({"type": "string", "pattern": "(?=a)" * 1000}), ("400",)),
    "schema_long_list": (schema({"type": "array", "minItems": 10**9, "items": {"type": "null"}}), ("200", "400")),
    "schema_big_enum": (schema({"enum": [f"value {i}" for i in range(100_000)]}), ("200", "400")),
    "schema_all_of": (schema({"allOf": JOINED}), ("400",)),
    "schema_wide": (schema({"type": "object", "properties": WIDE}), ("200", "400")),
    "streams_unread": (sleeping, ("200",)),
    "pipeline_unread": (pipelining, ("200", "closed")),
    "connections_500": (many(500, head(CHAT, "Content-Length: 100")), ("200",)),
}  # fmt: skip
SLOW: dict[str, tuple[Attack, tuple[str, ...]]] = {
    "slow_headers": (trickling(b"GET / HTTP/1.1\r\nX: "), ("closed",)),
    "slow_body": (trickling(head(CHAT, "Content-Length: 1000")), ("408",)),
    "slow_chunks": (trickling(CHUNKED), ("400", "408")),
}


class Pulse:
    """How long an innocent client waits at most.

    Attributes:
        worst: seconds of the slowest ``GET /health``.
    """

    def __init__(self) -> None:
        self.worst, self.asked = 0.0, 0


@contextmanager
def pulse(url: str) -> Generator[Pulse]:
    """Ask for health all the time."""
    import threading

    import httpx

    result, ended = Pulse(), threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=url, timeout=120) as client:
            while not ended.wait(0.02):
                began = time.monotonic()
                client.get("/health").raise_for_status()
                result.worst = max(result.worst, time.monotonic() - began)
                result.asked += 1

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield result
    finally:
        ended.set()
        thread.join()
