"""What stands before the application: keys, rates, and bodies that are read within bounds of size, depth and time."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import re
import time
from collections import OrderedDict
from collections.abc import Collection

import numpy as np
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from subquad.serve.errors import ApiError, ClientGoneError
from subquad.serve.site import LOG, Site

# One that is not closed goes to the end: were it no match, each quote in it would be the beginning of another try.
STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
CLIENTS_KEPT = 1 << 16
# Of brackets alone: steps down and up, as int8.
STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


class Keys:
    """API keys, of which only digests are kept; compared in a time that tells nothing of them."""

    def __init__(self, keys: Collection[str]) -> None:
        self._digests = [self._digest(key.encode()) for key in keys]

    @staticmethod
    def _digest(key: bytes) -> bytes:
        return hashlib.sha256(key).digest()

    def __bool__(self) -> bool:
        """Whether any is needed."""
        return bool(self._digests)

    def find(self, key: bytes) -> str | None:
        """A name for the client that has this key; None where it is none."""
        mine, found = self._digest(key), False
        for digest in self._digests:
            found |= hmac.compare_digest(mine, digest)
        return f"key-{mine.hex()[:12]}" if found else None


class Rate:
    """At most so many requests a minute of each client, as a bucket that fills again."""

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self._clients = OrderedDict[str, tuple[float, float]]()

    def wait(self, client: str) -> float:
        """Seconds until the client may ask; 0 counts as a request."""
        if not self.per_minute:
            return 0.0
        now = time.monotonic()
        left, before = self._clients.pop(client, (float(self.per_minute), now))
        left = min(left + (now - before) * self.per_minute / 60, float(self.per_minute))
        allowed = left >= 1
        self._clients[client] = (left - allowed, now)
        if len(self._clients) > CLIENTS_KEPT:
            self._clients.popitem(last=False)
        return 0.0 if allowed else (1 - left) * 60 / self.per_minute


def check_json(body: bytes, depth: int) -> None:
    """Refuse what no parser should meet: in time and memory that grow as the body does.

    Raises:
        ApiError: no UTF-8, NUL bytes, unpaired surrogates, or too deep.
    """
    try:
        body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ApiError(400, f"body: expected UTF-8, got another byte at {error.start}", code="invalid_utf8") from error
    if b"\0" in body:
        raise ApiError(400, "body: expected JSON text, got a NUL byte; escape it", code="invalid_json")
    if body.count(b"[") + body.count(b"{") > depth:
        steps = np.frombuffer(STRING.sub(b"", body).translate(STEPS, NO_BRACKETS), dtype=np.int8)
        if np.cumsum(steps, dtype=np.int32).max(initial=0) > depth:
            raise ApiError(400, f"body: expected JSON at most {depth} deep, got more", code="too_deep")
    if SURROGATE.search(body):
        try:
            json.dumps(json.loads(body), ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise ApiError(
                400, "body: expected whole characters, got half of a pair", code="invalid_unicode"
            ) from error
        except ValueError:
            pass  # the parser says what is wrong


class Guard:
    """Middleware: names the client, and lets through what is within bounds.

    What is under ``/v1`` needs a key where there are keys. ``scope["state"]["client"]`` names the key or the address.

    Args:
        app: what is guarded.
        site: knows the bounds, and counts what is under way.
        keys: that open; none opens to all.
    """

    def __init__(self, app: ASGIApp, site: Site, keys: Keys) -> None:
        self.app, self.site, self.bounds, self.keys = app, site, site.bounds, keys
        self.rate = Rate(self.bounds.rate)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or refuse one request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        send = self._noting(scope, send)
        try:
            self._admit(scope)
            body = await self._body(scope, receive) if scope["method"] in ("POST", "PUT", "PATCH") else None
        except ApiError as error:
            # The rest of the body is not waited for.
            error.headers["Connection"] = "close"
            return await error.response()(scope, receive, send)
        except ClientGoneError:
            return None
        if body is None:
            return await self.app(scope, receive, send)
        self.site.under_way += 1
        try:
            await self.app(scope, replay(body, receive), send)
        finally:
            self.site.under_way -= 1

    def _noting(self, scope: Scope, send: Send) -> Send:
        """`send` that logs what is refused."""

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                client = scope.get("state", {}).get("client")
                fields = {"client": client, "path": scope["path"][:200], "status": message["status"]}
                LOG.info("refused", extra={"fields": fields})
            await send(message)

        return noting

    def _admit(self, scope: Scope) -> None:
        address = scope.get("client")
        client = address[0] if address else "local"
        open_to_all = not scope["path"].startswith("/v1/")
        if self.keys and not open_to_all:
            kind, _, key = _header(scope, b"authorization").partition(b" ")
            found = self.keys.find(key.strip()) if kind.lower() == b"bearer" else None
            if found is None:
                raise ApiError(
                    401,
                    "expected an API key, got none that is known; send Authorization: Bearer KEY",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
            client = found
        scope.setdefault("state", {})["client"] = client
        if not open_to_all and scope["method"] == "POST" and (wait := self.rate.wait(client)):
            raise ApiError(
                429,
                f"expected at most {self.bounds.rate} requests a minute; wait",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(int(wait) + 1)},
            )

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        most = self.bounds.body_bytes
        too_large = ApiError(413, f"body: expected at most {most} bytes, got more", code="body_too_large")
        length = _header(scope, b"content-length")
        if length.isdigit() and int(length[:20]) > most:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self.bounds.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGoneError
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise too_large
                    if not message.get("more_body", False):
                        break
        except TimeoutError as error:
            late = f"body: expected to come within {self.bounds.body_seconds:g} s"
            raise ApiError(408, late, code="body_timeout") from error
        check_json(bytes(body), self.bounds.depth)
        return bytes(body)


def replay(body: bytes, receive: Receive) -> Receive:
    """What the application receives: the body at once, then whatever comes."""
    sent = False

    async def again() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _header(scope: Scope, name: bytes) -> bytes:
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    return next((value for key, value in headers if key == name), b"")
