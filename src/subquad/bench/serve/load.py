"""A server under load: many streaming clients, some of which hang up, beside the same engine without a server.

On a CPU ids are ``serve.cpu.load``: ``.errors`` and ``.leaked_bytes`` of a run in which a fifth of the clients hang up,
``.resident_bytes`` at its end beside those when it was warm, ``.rate``, and seconds to the first text (``.first``) and
the last (``.whole``), median and 95th percentile. On a GPU they are ``serve.<card>.c<clients>``: ``.vs_engine`` are
tokens a second beside the bare engine's, ``.first`` as above, and ``.prefix_saved`` the share of the prompts' tokens
that were not read again, beside the share of the beginning that they have in common.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from subquad.bench import shapes
from subquad.bench.clients import Answer, Ask, ask_all, get
from subquad.bench.drafting import TEACHER
from subquad.bench.harness import Bench
from subquad.bench.prompts import KINDS, prompt_texts
from subquad.bench.results import device_kind
from subquad.bench.serving import NAME, ServerProcess, Setup, answer_alone, gauge, quantiles, steady_rate, told
from subquad.engine.request import Limits, Request
from subquad.models.config import ModelConfig
from subquad.models.load import LoadedModel, load_model
from subquad.models.stack import Stack
from subquad.serve.served import Room, Served

VOCAB = 256
HANG_UP = 5
"""One of so many clients hangs up."""
SHARE = 3
"""One of so many prompts has a beginning that others have."""
ASKED = 8
"""Times that the same is asked."""
PASSES = 3
JUDGED = 128
"""Answers of a pass whose tokens are compared."""


def run(bench: Bench) -> None:
    """A long run on a CPU; the race with the bare engine on a GPU; both under ``--smoke``."""
    bench.name = f"serve.{device_kind(bench.device)}"
    if bench.smoke or bench.device.type == "cpu":
        _endure(bench)
    if bench.smoke or bench.device.type == "cuda":
        _race(bench)


def _endure(bench: Bench) -> None:
    clients, count = bench.size((200, 2000), smoke=(6, 24))
    long, new, shared = bench.size((160, 96, 128), smoke=(20, 8, 64))
    room = Room(
        rows=bench.size(64, smoke=4),
        tokens=shared + long + new,
        prefix_bytes=bench.size(16, smoke=1) * 2**20,
        # Some are put aside for others.
        patience=bench.size(2.0, smoke=0.01),
    )
    setup = Setup(partial(small_model, bench.size((128, 256, 4), smoke=(32, 64, 2)), bench.dtype), room, "copyspec")
    draw = random.Random(0)
    beginnings = [_any_tokens(draw, shared) for _ in range(4)]

    def body() -> dict[str, Any]:
        prompt = _any_tokens(draw, draw.randint(4, long))
        if draw.randrange(SHARE) == 0:
            prompt = draw.choice(beginnings) + prompt
        return _body(prompt, draw.randint(2, new))

    def ask(body: dict[str, Any]) -> Ask:
        return Ask(body, draw.randint(0, new // 4) if draw.randrange(HANG_UP) == 0 else None)

    bodies = [body() for _ in range(count // ASKED)]
    asks = [ask(bodies[i % len(bodies)]) for i in range(count)]
    with tempfile.TemporaryDirectory() as folder, ServerProcess(setup, Path(folder, "log")) as server:
        # What a server holds when it is warm: caches are full, and all that is imported late is there.
        asyncio.run(ask_all(server.port, [ask(body()) for _ in range(count // 2)], clients))
        warm = server.resident
        began = time.perf_counter()
        answers = asyncio.run(ask_all(server.port, asks, clients))
        wall = time.perf_counter() - began
        leaked, resident = asyncio.run(_left(server.port)), server.resident
        paused = gauge(asyncio.run(get(server.port, "/metrics")), "subquad_preemptions_total")
    stayed = [answer for answer in answers if not answer.left]
    errors = _errors(asks, answers)
    _gate_none(bench, "requests that went wrong", errors)
    _gate_none(bench, "bytes of state that nobody uses", leaked)

    loaded = setup.make()
    alone = Served.build(loaded, NAME, Room(rows=1, tokens=room.tokens, prefix_bytes=0)).worker.engine
    single = [answer_alone(alone, [body], ()).answers[0] for body in bodies]
    wrong = 0
    for i, answer in enumerate(answers):
        if not answer.left:
            prompt, tokens = bodies[i % len(bodies)]["prompt"], single[i % len(bodies)]
            wrong += not told(loaded.model, loaded.tokenizer, prompt, tokens, answer.text)
    _gate_none(bench, "answers that differ from those of single runs without a near-tie", wrong)

    shape = {"clients": clients, "requests": count, "left": count - len(stayed), "rows": room.rows, "paused": paused}
    bench.value("load.errors", errors, "1", "lower", shape=shape)
    bench.value("load.leaked_bytes", leaked, "bytes", "lower", shape=shape)
    bench.value("load.resident_bytes", resident, "bytes", "lower", baseline="warm", baseline_value=warm, shape=shape)
    came = [arrival for answer in stayed for arrival in answer.arrivals()]
    bench.value("load.rate", sum(n for _, n in came) / wall, "tokens/s", "higher", shape=shape)
    _waits(bench, "load", stayed, shape)


def _race(bench: Bench) -> None:
    clients, each = bench.size((256, 6), smoke=(4, 2))
    prompts, news = bench.size(((32, 160), (128, 384)), smoke=((4, 12), (8, 24)))
    shared, tail = bench.size((512, 64), smoke=(128, 8))
    setup = Setup(
        partial(small_model, (32, 64, 2), bench.dtype)
        if bench.smoke
        else partial(load_model, bench.hybrid or TEACHER, dtype=bench.dtype, device=bench.device),
        Room(rows=clients, tokens=shared + prompts[1] + news[1]),
        "none",
    )
    draw, id = random.Random(0), f"c{clients}"
    with tempfile.TemporaryDirectory() as folder, ServerProcess(setup, Path(folder, "log")) as server:
        loaded = setup.make()
        alone = Served.build(loaded, NAME, Room(rows=clients, tokens=setup.room.tokens, prefix_bytes=0))
        engine, ends = alone.worker.engine, alone.ends
        engine.warm(Request([0], Limits(1)))
        text = _written(bench, loaded.tokenizer)

        def bodies(count: int, news: tuple[int, int]) -> list[dict[str, Any]]:
            return [_body(_part(draw, text, draw.randint(*prompts)), draw.randint(*news)) for _ in range(count)]

        def serve(bodies: Sequence[dict[str, Any]], at_once: int = clients) -> list[Answer]:
            return asyncio.run(ask_all(server.port, [Ask(body) for body in bodies], at_once))

        few = bodies(2 * clients, (2, 16))
        answer_alone(engine, few, ends)
        serve(few)
        rates: list[list[float]] = []
        answers: list[Answer] = []
        for turn in range(bench.size(PASSES, smoke=1)):
            asked = bodies(clients * each, news)
            # Alternating who goes first keeps a drifting clock from favouring one.
            if turn % 2 == 0:
                ours, theirs = serve(asked), answer_alone(engine, asked, ends)
            else:
                theirs, ours = answer_alone(engine, asked, ends), serve(asked)
            _gate_none(bench, f"{id}: requests that went wrong, pass {turn}", _errors([Ask(b) for b in asked], ours))
            _compare(bench, f"{id}: answers other than the engine's, pass {turn}", loaded, asked, theirs.answers, ours)
            came = [arrival for answer in ours for arrival in answer.arrivals()]
            rates.append([steady_rate(came), steady_rate(theirs.arrivals)])
            bench.say(f"{bench.name}.{id}: {rates[-1][0]:.4g} tokens/s, the bare engine {rates[-1][1]:.4g}")
            answers += ours

        beginning = _part(draw, text, shared)
        asked = [_body(beginning + _part(draw, text, draw.randint(1, tail)), news[0]) for _ in range(clients)]
        theirs = answer_alone(engine, asked, ends)
        # A shared beginning is read twice, and never again.
        ours = [*serve(asked[:1]), *serve(asked[1:2]), *serve(asked[2:])]
        _gate_none(
            bench, f"{id}: requests with a shared beginning that went wrong", _errors([Ask(b) for b in asked], ours)
        )
        _compare(
            bench,
            f"{id}: answers behind a known beginning other than the engine's that reads all",
            loaded,
            asked,
            theirs.answers,
            ours,
        )

    ours_rate, theirs_rate = (statistics.median(side) for side in zip(*rates, strict=True))
    shape = {"clients": clients, "rows": clients, "requests": clients * each, "new": news, "prompt": prompts}
    bench.value(
        f"{id}.vs_engine",
        ours_rate,
        "tokens/s",
        "higher",
        baseline="the bare engine",
        baseline_value=theirs_rate,
        shape=shape | {"draft": setup.draft},
        reps=rates,
    )
    _waits(bench, id, answers, shape)
    read = sum(len(body["prompt"]) for body in asked[2:])
    bench.value(
        f"{id}.prefix_saved",
        sum(answer.cached for answer in ours[2:]) / read,
        "1",
        "higher",
        baseline="shared",
        baseline_value=(len(asked) - 2) * shared / read,
        shape={"requests": len(asked) - 2, "shared": shared},
    )


def small_model(sizes: tuple[int, int, int], dtype: torch.dtype) -> LoadedModel:
    """A hybrid with random weights, and a tokenizer that has a letter for each token.

    Args:
        sizes: width, that of the MLPs, and layers.
        dtype: of the weights.
    """
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    d_model, d_mlp, count = sizes
    layers = shapes.hybrid_layers(shapes.TINY_ATTENTION, shapes.TINY_LINEAR, count=count, every=2)
    torch.manual_seed(0)
    model = Stack(ModelConfig(VOCAB, d_model, d_mlp, layers, max_positions=4096)).to(dtype)
    core = Tokenizer(models.BPE(vocab={chr(0x100 + i): i for i in range(VOCAB)}, merges=[]))
    core.decoder = decoders.Fuse()
    return LoadedModel(model.requires_grad_(False), PreTrainedTokenizerFast(tokenizer_object=core), NAME, NAME)


def _body(prompt: list[int], new: int) -> dict[str, Any]:
    return {"model": NAME, "prompt": prompt, "max_tokens": new, "temperature": 0}


def _any_tokens(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(VOCAB) for _ in range(count)]


def _written(bench: Bench, tokenizer: Any) -> list[int]:
    """Tokens of a long text: all prompts there are, one after the other."""
    if bench.smoke:
        return _any_tokens(random.Random(1), 1000)
    text = "\n\n".join(text for kind in KINDS for text in prompt_texts(kind, bench.data))
    return tokenizer.encode(text, add_special_tokens=False)


def _part(draw: random.Random, text: list[int], count: int) -> list[int]:
    at = draw.randrange(len(text) - count)
    return text[at : at + count]


def _errors(asks: Sequence[Ask], answers: Sequence[Answer]) -> int:
    """How many went wrong: refused, broken off, or ended otherwise than by their length or an end token."""

    def right(ask: Ask, answer: Answer) -> bool:
        if answer.error or answer.status not in (0, 200):
            return False
        whole = answer.finish == "stop" or (answer.finish == "length" and answer.tokens == ask.body["max_tokens"])
        return answer.left or whole

    return sum(not right(ask, answer) for ask, answer in zip(asks, answers, strict=True))


def _gate_none(bench: Bench, what: str, count: float) -> None:
    got = torch.tensor(float(count))
    bench.gate(what, got, torch.zeros_like(got), rtol=0.0)


def _compare(
    bench: Bench,
    what: str,
    loaded: LoadedModel,
    bodies: Sequence[dict[str, Any]],
    tokens: Sequence[Sequence[int]],
    answers: Sequence[Answer],
) -> None:
    some = list(zip(bodies, tokens, answers, strict=True))[:JUDGED]
    wrong = sum(not told(loaded.model, loaded.tokenizer, b["prompt"], mine, answer.text) for b, mine, answer in some)
    _gate_none(bench, f"{what}, near-ties apart", wrong)


async def _left(port: int) -> float:
    """Bytes of state in use once nobody asks; who has hung up is gone within a step."""
    end = time.monotonic() + 5
    while True:
        page = await get(port, "/metrics")
        used = sum(gauge(page, "subquad_state_bytes", kind=kind) for kind in ("slots", "aside"))
        if not used + gauge(page, "subquad_queue_length") or time.monotonic() > end:
            return used
        await asyncio.sleep(0.05)


def _waits(bench: Bench, id: str, answers: Sequence[Answer], shape: dict[str, Any]) -> None:
    # Of an answer that is an end token and nothing else no text comes.
    told = [answer for answer in answers if answer.texts]
    for what, waits in {"first": [a.first for a in told], "whole": [a.seconds for a in told]}.items():
        for which, seconds in zip(("p50", "p95"), quantiles(waits), strict=True):
            bench.value(f"{id}.{what}.{which}", seconds, "s", "lower", shape=shape)
