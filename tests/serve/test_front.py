"""A front before several replicas: which one is asked, and what becomes of requests whose replica is lost."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

import httpx
import pytest
from starlette.types import Message

from subquad.models.load import LoadedModel
from subquad.serve import front as module
from subquad.serve.affinity import BEGINNING, beginning, order
from subquad.serve.app import create_app
from subquad.serve.bounds import Bounds
from subquad.serve.calls import StoppedError
from subquad.serve.front import TRIES, Asked, Front, ReplicaLostError, play
from subquad.serve.guard import Guard, Keys
from subquad.serve.metrics import merge
from subquad.serve.served import Room, Served
from subquad.serve.site import Site

from .conftest import make_model, make_tokenizer, wait_for

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
NAMES = [f"replica-{i}" for i in range(5)]


def chat(*turns: str, **more: Any) -> str | None:
    roles = ("system", "user", "assistant", "user")
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    return beginning(CHAT, json.dumps({"model": "tiny", "messages": messages, **more}).encode())


def text(prompt: Any) -> str | None:
    return beginning(TEXT, json.dumps({"model": "tiny", "prompt": prompt}).encode())


def test_later_turns_keep_a_conversation_where_it_began() -> None:
    assert chat("be brief", "hello") == chat("be brief", "hello", "hi", "and now?") is not None
    assert chat("be brief", "hello") != chat("be brief", "good day")
    assert chat("x" * BEGINNING, "hello") == chat("x" * BEGINNING, "good day")  # a long beginning is worth sharing
    assert chat("be brief", "hello") != chat("be brief", "hello", model="other")
    assert chat("be brief", "hello") != chat("be brief", "hello", tools=[{"type": "function"}])


def test_prompts_that_begin_alike_share_a_key() -> None:
    assert text("a" * BEGINNING + "b") == text("a" * BEGINNING + "c") != text("b" * BEGINNING)
    assert text([5] * 300) == text([5] * 400) != text([6] * 300)
    assert text(["one", "two"]) == text("one") and text([[1, 2], [3]]) == text([1, 2])


NOTHING = [b"", b"no", b"[]", b'{"prompt": 3}', b'{"prompt": [null]}', b'{"messages": [1]}', b"{}"]


@pytest.mark.parametrize("body", NOTHING)
def test_what_has_no_beginning_may_go_anywhere(body: bytes) -> None:
    assert beginning(CHAT, body) is None and beginning(TEXT, body) is None
    assert beginning("/v1/embeddings", b'{"input": "a"}') is None


def test_a_replica_that_goes_moves_its_own_keys_alone() -> None:
    keys = [f"key {i}" for i in range(500)]
    idle = dict.fromkeys(NAMES, 0)
    first = {key: order(key, idle, 0)[0] for key in keys}
    counts = [list(first.values()).count(name) for name in NAMES]
    assert min(counts) > 60 and max(counts) < 140
    less = {name: 0 for name in NAMES if name != NAMES[2]}
    for key in keys:
        assert order(key, less, 0)[0] == (first[key] if first[key] != NAMES[2] else order(key, idle, 0)[1])


def test_a_busy_replica_is_passed_over() -> None:
    first, second, third = order("key", dict.fromkeys(NAMES[:3], 0), 4)
    assert order("key", {first: 4, second: 0, third: 0}, 4)[0] == first
    assert order("key", {first: 5, second: 1, third: 0}, 4) == [second, third, first]
    assert order("key", {first: 9, second: 9, third: 9}, 4)[0] == first
    assert order(None, {first: 2, second: 0, third: 1}, 4) == [second, third, first]


Part = list[Message] | Exception


def replies(*answers: list[Part]) -> tuple[Callable[[Asked], AsyncGenerator[list[Message], None]], list[Asked]]:
    """Replicas that answer by a script, one answer a try."""
    seen: list[Asked] = []

    async def ask(asked: Asked) -> AsyncGenerator[list[Message], None]:
        seen.append(asked)
        for part in answers[min(len(seen), len(answers)) - 1]:
            if isinstance(part, Exception):
                raise part
            yield part

    return ask, seen


async def no_figures() -> bytes:
    raise StoppedError("no replica tells its figures")


def start(status: int = 200, kind: str = "application/json") -> Message:
    return {"type": "http.response.start", "status": status, "headers": [(b"content-type", kind.encode())]}


def part(data: bytes, more: bool = False) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}


def post(ask: Any, seconds: float = 10.0) -> httpx.Response:
    async def main() -> httpx.Response:
        app = Guard(Front(ask, no_figures, seconds), Site((), Bounds()), Keys(()))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            return await client.post(TEXT, json={"model": "tiny", "prompt": "a"})

    return asyncio.run(main())


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE_SECONDS", 0.001)


LOST = ReplicaLostError("the replica is lost; try again")
GOOD: list[Part] = [[start(), part(b"{}")]]


@pytest.mark.parametrize("first", [[LOST], [[start()], LOST], [[start(503), part(b"stopping")]]])
def test_another_replica_answers_what_one_has_not(first: list[Part]) -> None:
    ask, seen = replies(first, first, GOOD)
    answer = post(ask)
    assert (answer.status_code, answer.content, len(seen)) == (200, b"{}", 3)
    assert answer.headers["x-replicas-lost"] == "2" and seen[0] == seen[2]
    assert seen[0].body == b'{"model":"tiny","prompt":"a"}' and seen[0].key == text("a")


def test_what_every_replica_fails_at_is_given_up() -> None:
    ask, seen = replies([LOST])
    answer = post(ask)
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "unavailable" and len(seen) == TRIES
    ask, seen = replies([[start(503), part(b"stopping")]])
    assert post(ask).content == b"stopping" and len(seen) == TRIES


def test_a_stream_that_breaks_says_so() -> None:
    ask, seen = replies([[start(kind="text/event-stream"), part(b"data: 1\n\n", more=True)], LOST], GOOD)
    first, error = post(ask).text.strip().split("\n\n")
    assert first == "data: 1" and json.loads(error[6:])["error"]["code"] == "unavailable" and len(seen) == 1


def test_a_part_is_never_taken_for_the_whole() -> None:
    ask, _ = replies([[start(), part(b"{", more=True)], LOST], GOOD)
    with pytest.raises(ReplicaLostError):  # the server cuts the connection
        post(ask)


def test_an_answer_must_begin_in_time() -> None:
    closed: list[bool] = []

    async def ask(asked: Asked) -> AsyncGenerator[list[Message], None]:
        try:
            await asyncio.sleep(60)
            yield []
        finally:
            closed.append(True)

    answer = post(ask, seconds=0.05)
    assert answer.status_code == 408 and answer.json()["error"]["code"] == "timeout" and closed == [True]


def test_a_client_that_leaves_is_forgotten_by_the_replica() -> None:
    left, seen = asyncio.Event(), list[str]()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["body"] == b"asked"
        await send(start(kind="text/event-stream"))
        await send(part(b"1", more=True))
        left.set()
        try:
            await asyncio.sleep(60)
        finally:
            seen.append("freed")

    async def main() -> None:
        messages: list[Message] = [{"type": "http.request", "body": b"asked", "more_body": False}]

        async def receive() -> Message:
            if messages:
                return messages.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            seen.append(message["type"])

        scope = {"type": "http", "method": "POST", "path": TEXT, "headers": []}
        await asyncio.wait_for(Front(lambda asked: play(app, asked), no_figures, 10)(scope, receive, send), 5)

    asyncio.run(main())
    assert seen == ["http.response.start", "http.response.body", "freed"]


@pytest.fixture(scope="module")
def sites() -> Iterator[list[Site]]:
    """Two servers of one model."""
    found: list[Site] = []
    for _ in range(2):
        loaded = LoadedModel(make_model(), make_tokenizer(), "tiny", "tiny")
        found.append(Site([Served.build(loaded, "tiny", Room(rows=2, tokens=512, prefix_bytes=2**22))], Bounds()))
        found[-1].served[0].start()
    wait_for(lambda: all(site.why_not_ready() is None for site in found))
    yield found
    for site in found:
        site.served[0].worker.stop()


QUESTION = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 20}
ASKED: list[tuple[str, str, Any]] = [
    ("POST", CHAT, QUESTION),
    ("POST", CHAT, QUESTION | {"stream": True}),
    ("POST", TEXT, {"model": "tiny", "prompt": ["a", "b"], "n": 2, "seed": 3, "max_tokens": 8, "logprobs": 0}),
    ("POST", "/v1/embeddings", {"model": "tiny", "input": "a"}),
    ("POST", TEXT, {"model": "none", "prompt": "a"}),
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/none", None),
    ("GET", "/ready", None),
    ("GET", "/openapi.json", None),
]


@pytest.mark.parametrize(("method", "path", "body"), ASKED)
def test_a_front_answers_as_a_server_does(sites: list[Site], method: str, path: str, body: Any) -> None:
    apps = [create_app(site) for site in sites]

    async def ask(asked: Asked) -> AsyncGenerator[list[Message], None]:
        loads = {str(i): site.under_way for i, site in enumerate(sites)}
        async for some in play(apps[int(order(asked.key, loads, 2)[0])], asked):
            yield some

    async def main() -> list[httpx.Response]:
        front = Guard(Front(ask, no_figures, 30), Site((), Bounds()), Keys(()))
        answers: list[httpx.Response] = []
        for app in (apps[0], front):
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
                answers.append(await client.request(method, path, json=body))
        return answers

    one, other = asyncio.run(main())
    assert one.status_code == other.status_code and one.headers["content-type"] == other.headers["content-type"]
    assert comparable(one) == comparable(other)


def comparable(answer: httpx.Response) -> Any:
    """All but what differs between two answers: ids, times, what was cached, and where time cut a stream."""
    kept: list[Any] = []
    texts: list[str] = []
    events = answer.headers["content-type"].startswith("text/event-stream")
    for event in answer.text.split("\n\n") if events else [answer.text]:
        text = event.removeprefix("data: ")
        data = json.loads(text) if text.startswith("{") else text
        if isinstance(data, dict):
            for name in ("id", "created", "usage"):
                data.pop(name, None)
            for card in data.get("data", ()):
                card.pop("created", None)
            said = [choice["delta"].pop("content", None) or "" for choice in data.get("choices", ()) if events]
            texts += said
            # Where a stream is cut is a matter of time: pieces of text that follow each other are one.
            if any(said) and kept[-1:] == [data]:
                continue
        kept.append(data)
    return kept, "".join(texts)


def test_figures_of_all_replicas_stand_side_by_side(sites: list[Site]) -> None:
    told = merge({str(i): site.metrics.registry.collect() for i, site in enumerate(sites)}).decode().splitlines()
    assert told.count("# TYPE subquad_rows gauge") == 1
    assert [line for line in told if line.startswith("subquad_rows{")] == [
        f'subquad_rows{{model="tiny",replica="{i}"}} 2.0' for i in range(2)
    ]


def test_figures_that_no_replica_tells_are_a_refusal() -> None:
    async def main() -> httpx.Response:
        app = Front(replies(GOOD)[0], no_figures, 1)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            return await client.get("/metrics")

    assert asyncio.run(main()).status_code == 503
