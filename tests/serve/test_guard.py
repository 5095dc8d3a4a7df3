"""Keys, rates and hostile input: refused in bounded time, never with an error of the server's own."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from subquad.serve.bounds import Bounds
from subquad.serve.errors import ApiError
from subquad.serve.guard import Keys, Rate, check_json
from subquad.serve.served import Room

from .conftest import Running, build, run

CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def locked() -> Iterator[Running]:
    bounds = Bounds(body_bytes=2**16, body_seconds=0.4, request_seconds=0.5, rate=6000)
    yield from run(build(Room(rows=1, tokens=8192, queue=2), bounds, keys=["first", "second"]))


def ok(running: Running) -> bool:
    return httpx.get(f"{running.url}/health").status_code == 200


def test_a_key_opens(locked: Running) -> None:
    for key in ("first", "second"):
        assert locked.client().with_options(api_key=key).models.list().data[0].id == "tiny"
    for key in ("First", "firs", "firstt", "x"):
        with pytest.raises(openai.AuthenticationError) as raised:
            locked.client().with_options(api_key=key).models.list()
        assert raised.value.code == "invalid_api_key"
    assert httpx.get(f"{locked.url}/v1/models").status_code == 401
    assert httpx.get(f"{locked.url}/v1/models", headers={"Authorization": "Basic first"}).status_code == 401
    odd = httpx.get(f"{locked.url}/v1/models", headers={"Authorization": b"Bearer \xff\xfe"})
    assert odd.status_code == 401 and odd.json()["error"]["type"] == "authentication_error"
    for path in ("/health", "/ready", "/metrics"):
        assert httpx.get(f"{locked.url}{path}").status_code == 200


def test_keys_are_kept_as_digests_and_name_clients() -> None:
    keys = Keys(["secret"])
    name = keys.find(b"secret")
    assert name is not None and "secret" not in name and keys.find(b"other") is None and not Keys(())


def test_a_rate_is_kept_for_each_client(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("subquad.serve.guard.time.monotonic", lambda: now[0])
    rate = Rate(2)
    assert [rate.wait("a"), rate.wait("a"), rate.wait("b")] == [0, 0, 0]
    assert rate.wait("a") == pytest.approx(30)
    now[0] += 30
    assert rate.wait("a") == 0 and rate.wait("a") > 0
    assert Rate(0).wait("a") == 0


def test_a_rate_is_told_by_http() -> None:
    for running in run(build(Room(rows=1, tokens=64), Bounds(rate=1))):
        body = {"model": "tiny", "prompt": "a", "max_tokens": 1}
        assert httpx.post(f"{running.url}/v1/completions", json=body).status_code == 200
        refused = httpx.post(f"{running.url}/v1/completions", json=body)
        assert refused.status_code == 429 and 1 <= int(refused.headers["retry-after"]) <= 60
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"


def post(running: Running, body: bytes, path: str = CHAT) -> httpx.Response:
    return httpx.post(f"{running.url}{path}", content=body, headers=JSON, timeout=20)


HOSTILE: dict[str, bytes] = {
    "no json": b"hello",
    "empty": b"",
    "a list": b"[]",
    "a number": b"1" * 5000,
    "null": b"null",
    "invalid utf-8": b'{"model": "tiny\xff"}',
    "utf-16": '{"model": "tiny"}'.encode("utf-16"),
    "a nul byte": b'{"model": "tiny\0"}',
    "deep lists": b"[" * 60000,
    "deep, and a string of quotes that is not closed": b"[" * 100 + b'"' + b'\\"' * 32000,
    "deep objects": b'{"a":' * 10000,
    "deep and closed": b'{"model":"tiny","messages":' + b"[" * 20000 + b"]" * 20000 + b"}",
    "half a pair": b'{"model": "\\ud800", "messages": [{"role": "user", "content": "x"}]}',
    "half a pair in a message": b'{"model": "tiny", "messages": [{"role": "user", "content": "\\udfff"}]}',
    "half a pair as a key": b'{"model": "tiny", "logit_bias": {"\\ud800": 1}, "messages": [{"role": "user"}]}',
    "not a number": b'{"model": "tiny", "temperature": NaN, "messages": [{"role": "user", "content": "x"}]}',
    "infinity": b'{"model": "tiny", "temperature": 1e999, "messages": [{"role": "user", "content": "x"}]}',
    "a huge integer": b'{"model": "tiny", "seed": ' + b"9" * 5000 + b', "messages": [{"role": "user"}]}',
    "a huge n": b'{"model": "tiny", "n": 1000000000, "messages": [{"role": "user", "content": "x"}]}',
    "wrong items": b'{"model": "tiny", "messages": [' + b"[]," * 20000 + b"[]]}",
    "wrong biases": json.dumps({"model": "tiny", "messages": [{"role": "user"}], "logit_bias": {"x": {}}}).encode(),
    "many biases": json.dumps(
        {"model": "tiny", "messages": [{"role": "user"}], "logit_bias": {str(i): 1 for i in range(4000)}}
    ).encode(),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bodies_are_refused(running: Running, name: str) -> None:
    began = time.monotonic()
    answer = post(running, HOSTILE[name])
    assert answer.status_code == 400, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert time.monotonic() - began < 2 and len(answer.content) < 2000


def test_escaped_nul_and_pairs_are_text(running: Running) -> None:
    body = b'{"model": "tiny", "prompt": "a\\u0000b \\ud83d\\ude00 \\\\ud800", "max_tokens": 2, "temperature": 0}'
    answer = post(running, body, "/v1/completions")
    assert answer.status_code == 200
    alone = running.single(running.served().tokenizer.encode("a\0b \N{GRINNING FACE} \\ud800"), 2)
    assert answer.json()["choices"][0]["text"] == alone.text


def test_brackets_in_strings_are_not_deep() -> None:
    check_json(json.dumps({"a": "[" * 1000 + '\\"' + "{" * 1000}).encode(), 4)
    with pytest.raises(ApiError, match="deep"):
        check_json(b'{"a": "x", "b": [[[[1]]]]}', 4)


@pytest.mark.parametrize("part", [b'\\"', b'"', b"[]", b"[", b'{"a":', b"\\\\", b'"\\ud800'])
def test_no_body_takes_more_than_its_size(part: bytes) -> None:
    began = time.monotonic()
    with contextlib.suppress(ApiError):
        check_json(b"[" * 10 + b'"' + part * (2**21 // len(part)), 4)
    assert time.monotonic() - began < 2  # minutes where anything is read twice


def test_large_bodies_are_not_read(running: Running) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while True:
            sent += 2**16
            yield b" " * 2**16
            if sent > 2**30:
                return

    # The answer may come while the client still sends, which it then can't.
    try:
        answer = httpx.post(f"{running.url}{CHAT}", content=endless(), headers=JSON, timeout=20)
        assert answer.status_code == 413
    except (httpx.WriteError, httpx.ReadError):
        pass
    assert sent < 2**26 and ok(running)


def talk(running: Running, data: bytes, seconds: float = 5.0) -> bytes:
    """What comes back until the connection is closed."""
    host, port = running.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=seconds) as line:
        line.sendall(data)
        got = b""
        while more := line.recv(2**16):
            got += more
        return got


def test_a_length_that_is_too_large_is_answered_at_once(running: Running) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {100 * 2**20}\r\n\r\n"
    assert b" 413 " in talk(running, head.encode()).splitlines()[0]


def test_slow_bodies_end(locked: Running) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer first\r\nContent-Length: 100\r\n\r\n{{"
    began = time.monotonic()
    assert b" 408 " in talk(locked, head.encode()).splitlines()[0]
    assert time.monotonic() - began < 3


def test_slow_headers_end(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subquad.serve.server.HEADER_SECONDS", 0.2)
    host, port = running.url.removeprefix("http://").split(":")
    began = time.monotonic()
    with socket.create_connection((host, int(port)), timeout=5) as line:
        line.sendall(b"GET /health HTTP/1.1\r\n")
        line.settimeout(0.05)
        ended = False
        while not ended and time.monotonic() - began < 4:
            try:
                line.sendall(b"X")  # a byte now and then does not help
                ended = line.recv(1) == b""
            except TimeoutError:
                pass
            except OSError:
                ended = True
    assert ended and time.monotonic() - began < 3


def test_a_kept_connection_may_ask_again(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subquad.serve.server.HEADER_SECONDS", 0.1)
    body = {"model": "tiny", "prompt": "a", "max_tokens": 40, "temperature": 1, "logit_bias": {"257": -100}}
    with httpx.Client(base_url=running.url, timeout=60) as line:
        for _ in range(2):  # each takes longer than headers may
            began = time.monotonic()
            assert line.post("/v1/completions", json=body).json()["usage"]["completion_tokens"] == 40
            assert time.monotonic() - began > 0.1


def test_long_headers_are_refused(running: Running) -> None:
    assert b" 400 " in talk(running, b"GET / HTTP/1.1\r\nX: " + b"a" * 10**5).splitlines()[0]


def test_endless_trailers_are_refused(running: Running) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{{\r\n0\r\n".encode()
    assert b" 400 " in talk(running, head + b"X: a\r\n" * 10**4).splitlines()[0]


def test_requests_that_come_at_once_are_answered_in_turn(running: Running) -> None:
    body = b'{"model": "tiny", "prompt": "a", "max_tokens": 5, "temperature": 0}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n".encode()
    last = head + b"Connection: close\r\n\r\n" + body
    answers = talk(running, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" + head + b"\r\n" + body + last, 30)
    assert answers.count(b"HTTP/1.1 200 OK") == 3 and answers.count(b"text_completion") == 2


def test_who_asks_on_and_on_before_an_answer_is_cut_off(running: Running) -> None:
    try:
        answers = talk(running, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 1000, 30)
    except ConnectionError:
        answers = b""
    assert answers.count(b"HTTP/1.1 200 OK") <= 17 and ok(running)


def test_a_request_that_takes_too_long_ends(locked: Running) -> None:
    client = locked.client().with_options(api_key="first")
    asked: dict[str, Any] = {"model": "tiny", "prompt": "a", "max_tokens": 8000, "temperature": 1}
    asked["logit_bias"] = {"257": -100}
    with pytest.raises(openai.APIStatusError) as raised:
        client.completions.create(**asked)
    assert raised.value.status_code == 408 and raised.value.code == "timeout"
    with pytest.raises(openai.APIError, match="timeout"):  # told in the stream
        list(client.completions.create(**asked, stream=True))


def test_a_full_queue_asks_to_come_back(locked: Running) -> None:
    client = locked.client().with_options(api_key="first")
    with pytest.raises(openai.RateLimitError) as raised:
        client.completions.create(model="tiny", prompt="a", n=3)
    assert raised.value.code == "queue_full" and raised.value.response.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", CHAT, 405), ("GET", "/v1/nothing", 404), ("POST", "/health", 405), ("DELETE", "/docs", 405)],
)
def test_other_errors_have_the_same_form(running: Running, method: str, path: str, status: int) -> None:
    answer = httpx.request(method, f"{running.url}{path}")
    assert answer.status_code == status and set(answer.json()["error"]) == {"message", "type", "param", "code"}
