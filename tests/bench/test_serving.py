"""What judges a server under load: clients that read streams, and texts beside tokens."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest
import torch

from subquad.bench.clients import Answer, Ask, ask_all
from subquad.bench.serve.load import _errors, small_model
from subquad.bench.serving import ServerProcess, Setup, answer_alone, gauge, quantiles, steady_rate, told
from subquad.core.errors import SubquadError
from subquad.engine.engine import Engine
from subquad.models.load import LoadedModel, load_model
from subquad.serve.served import Room

EVENT = 'data: {"choices":[{"text":"%s","finish_reason":%s}]}\n\n'
USAGE = (
    'data: {"choices":[],"usage":{"completion_tokens":6,"prompt_tokens_details":{"cached_tokens":2}}}\n\n'
    "data: [DONE]\n\n"
)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return small_model((32, 64, 2), torch.float32)


@pytest.fixture(scope="module")
def answer(loaded: LoadedModel) -> list[int]:
    engine = Engine(loaded.model, rows=1, capacity=32)
    return answer_alone(engine, [{"prompt": [1, 2, 3], "max_tokens": 12}], ()).answers[0]


def chunk(text: str) -> bytes:
    return b"%x\r\n%s\r\n" % (len(text.encode()), text.encode())


def exchange(parts: list[bytes], leave: int | None = None) -> Answer:
    """What a client makes of these parts, sent one after the other."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for part in parts:
            writer.write(part)
            await asyncio.sleep(0.02)
        writer.close()

    async def main() -> Answer:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            return (await ask_all(port, [Ask({"max_tokens": 6}, leave)], 3))[0]

    return asyncio.run(main())


HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def test_a_stream_is_read_however_it_is_cut() -> None:
    body = chunk(EVENT % ("ab", "null")) + chunk(EVENT % ("cdef", '"length"') + USAGE) + b"0\r\n\r\n"
    for at in (1, 20, 60, 100, len(body) - 2):
        got = exchange([HEAD + body[:at], body[at:]])
        assert (got.status, got.text, got.finish, got.tokens, got.cached) == (200, "abcdef", "length", 6, 2)
        assert [n for _, n in got.arrivals()] == [2, 4] and not got.error and not got.left


def test_a_text_came_when_all_of_it_was_there() -> None:
    first, second = chunk(EVENT % ("ab", "null")), chunk(EVENT % ("cd", '"stop"') + USAGE)
    got = exchange([HEAD + first[:30], first[30:] + second[:9], second[9:] + b"0\r\n\r\n"])
    gap = got.texts[1][0] - got.texts[0][0]
    assert min(gap, got.first) > 0.01 and got.seconds > got.first


def test_what_goes_wrong_is_an_error() -> None:
    ask = Ask({"max_tokens": 6})
    refused = exchange([b"HTTP/1.1 429 Too Many\r\nContent-Length: 4\r\n\r\nwait"])
    assert (refused.status, refused.error) == (429, "wait")
    told_so = exchange([HEAD + chunk('data: {"error":{"message":"it broke"}}\n\n') + b"0\r\n\r\n"])
    assert told_so.error == "it broke"
    broken = exchange([HEAD + chunk(EVENT % ("ab", "null"))])
    silent = exchange([])
    short = exchange([HEAD + chunk(EVENT % ("ab", '"length"')) + b"0\r\n\r\n"])
    assert _errors([ask] * 5, [refused, told_so, broken, silent, short]) == 5
    left = exchange([HEAD + chunk(EVENT % ("ab", "null")), chunk(USAGE)], leave=1)
    assert left.left and left.text == "ab" and _errors([ask], [left]) == 0


def test_a_text_is_told_by_its_tokens(loaded: LoadedModel, answer: list[int]) -> None:
    says = partial(told, loaded.model, loaded.tokenizer, [1, 2, 3], answer)
    text = loaded.tokenizer.decode(answer)
    other = loaded.tokenizer.decode([(answer[5] + 1) % 256])
    assert says(text)
    assert not says(text[:5] + other + text[6:])
    assert not says(text[:-1]) and not says(text + other) and not says("")


def test_a_near_tie_may_go_either_way(loaded: LoadedModel, answer: list[int]) -> None:
    # A token that the head scores exactly as the one that was chosen.
    at = next(i for i, token in enumerate(answer) if token not in answer[:i] and i > 3)
    twin = next(token for token in range(256) if token not in answer)
    weight_vd = loaded.model.lm_head.weight
    before = weight_vd[twin].clone()
    text = loaded.tokenizer.decode([*answer[:at], twin])
    try:
        weight_vd[twin] = weight_vd[answer[at]]
        assert told(loaded.model, loaded.tokenizer, [1, 2, 3], answer, text)
        weight_vd[twin] = weight_vd[answer[at]] * 0.9
        assert not told(loaded.model, loaded.tokenizer, [1, 2, 3], answer, text)
    finally:
        weight_vd[twin] = before


def test_figures_of_a_run() -> None:
    # Ten a second, but for a slow beginning and end.
    arrivals = [(-50.0, 10.0), *((i / 10, 1.0) for i in range(100)), (99.0, 10.0)]
    assert steady_rate(arrivals) == pytest.approx(10)
    assert steady_rate([(0.0, 5.0)]) == 0
    assert quantiles([float(i) for i in range(101)]) == (50, 95)
    page = b'x{kind="a",model="m"} 1.0\nx{kind="b",model="m"} 2e3\n'
    assert gauge(page, "x", kind="b") == 2000
    with pytest.raises(SubquadError, match="expected y"):
        gauge(page, "y")


def test_a_server_that_does_not_start_says_why(tmp_path) -> None:
    with (
        pytest.raises(SubquadError, match="no-such-model"),
        ServerProcess(Setup(partial(load_model, tmp_path / "no-such-model"), Room(rows=1), "none"), tmp_path / "log"),
    ):
        pass
