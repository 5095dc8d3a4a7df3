"""Two replicas behind Ray Serve, one killed under load: what was asked is answered, and rightly.

Ids are ``serve.ray.kill``: ``.lost`` counts requests that got no answer or another one than the engine gives alone,
``.moved`` those that the killed replicas had taken and others answered, and ``.replaced`` is the seconds until there
are as many replicas as before.
"""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from subquad.bench.harness import Bench
from subquad.bench.tiny_server import END, free_port, save_tiny
from subquad.engine.generate import Limits, generate
from subquad.engine.sampler import SamplingConfig
from subquad.models.load import load_model

# Packages that the room runs, and what brings each.
NEEDS = {"ray": '"subquad[ray]"'}
APP = "subquad-bench"
PROMPTS = [f"Question {i}: " + "what is it that all of these have in common? " * 4 for i in range(12)]
TOKENS = 48
# Nothing ends an answer early, so that all take as long.
ASKED: dict[str, Any] = {"model": "tiny", "max_tokens": TOKENS, "temperature": 0, "logit_bias": {str(END): -100}}


@contextmanager
def deployed(folder: Path, replicas: int, **plan: Any) -> Generator[str]:
    """Ray on this machine with a deployment of a checkpoint, and its address."""
    import ray  # pyright: ignore
    from ray import serve  # pyright: ignore

    from subquad.serve.deployment import Plan, build

    ray.init(num_cpus=replicas, include_dashboard=False, logging_level="error", log_to_driver=False)
    try:
        port = free_port()
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build(Plan(model=str(folder), name="tiny", replicas=replicas, **plan)), name=APP)
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def pids() -> list[int]:
    """Processes of the deployment's replicas."""
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(f"ray::ServeReplica:{APP}:Replica".encode()):
                found.append(int(path.parent.name))
        except OSError:
            continue  # it has just ended
    return sorted(found)


def alone(folder: Path, prompts: Sequence[str]) -> dict[str, str]:
    """What the engine answers each prompt without a server."""
    loaded = load_model(str(folder))
    ids = [loaded.tokenizer.encode(prompt) for prompt in prompts]
    greedy = SamplingConfig(logit_bias={END: -100.0})
    limits = Limits(TOKENS, end_tokens=[END])
    with torch.no_grad():
        results = generate(loaded.model, ids, limits=limits, sampling=greedy, tokenizer=loaded.tokenizer)
    return {prompt: result.text for prompt, result in zip(prompts, results, strict=True)}


@dataclass
class Storm:
    """What came of many requests.

    Attributes:
        lost: why requests were not answered rightly.
        moved: that others than their first replica answered.
        replaced: seconds until there were as many replicas as before.
        by: replicas that answered, by prompt.
    """

    lost: list[str] = field(default_factory=list)
    moved: int = 0
    replaced: float = 0.0
    by: dict[str, set[str]] = field(default_factory=dict)


async def storm(url: str, want: Mapping[str, str], n: int, at_once: int, *, kill_after: int | None = None) -> Storm:
    """Ask `n` times, and kill a replica when `kill_after` of them are answered.

    Args:
        url: of the deployment.
        want: the right answers by prompt.
        n: requests.
        at_once: requests under way.
        kill_after: None kills nobody.
    """
    import httpx

    result, answered, gate, prompts = Storm(), 0, asyncio.Semaphore(at_once), list(want)

    async def ask(client: httpx.AsyncClient, prompt: str) -> None:
        nonlocal answered
        async with gate:
            try:
                got = await client.post("/v1/completions", json=ASKED | {"prompt": prompt})
            except httpx.HTTPError as error:
                result.lost.append(repr(error))
                return
        answered += 1
        if got.status_code != 200:
            result.lost.append(f"{got.status_code}: {got.text[:200]}")
            return
        if got.json()["choices"][0]["text"] != want[prompt]:
            result.lost.append(f"another answer to {prompt!r}")
        result.moved += "x-replicas-lost" in got.headers
        result.by.setdefault(prompt, set()).add(got.headers["x-replica"])

    async def kill(client: httpx.AsyncClient) -> None:
        before = pids()
        while answered < (kill_after or 0):
            await asyncio.sleep(0.005)
        os.kill(before[0], signal.SIGKILL)
        began = time.monotonic()
        while before[0] in pids() or (await client.get("/metrics")).text.count("subquad_rows{") < len(before):
            await asyncio.sleep(0.05)
        result.replaced = time.monotonic() - began

    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        asks = [ask(client, prompts[i % len(prompts)]) for i in range(n)]
        await asyncio.gather(*asks, *([] if kill_after is None else [kill(client)]))
    return result


def run(bench: Bench) -> None:
    """Rounds of requests with a replica killed in each, once those before have their replicas back."""
    bench.name = "serve.ray.kill"
    n, at_once, rounds = bench.size((400, 24, 3), smoke=(60, 16, 1))
    storms: list[Storm] = []
    with tempfile.TemporaryDirectory() as folder:
        save_tiny(Path(folder))
        want = alone(Path(folder), PROMPTS)
        with deployed(Path(folder), 2, rows=4, max_tokens=1024) as url:
            calm = asyncio.run(storm(url, want, 2 * len(want), 4))
            zero = torch.zeros(())
            bench.gate("two replicas answer as the engine alone", torch.tensor(float(len(calm.lost))), zero, rtol=0.0)
            torn = sum(len(names) > 1 for names in calm.by.values())
            bench.gate("a beginning is always read by the same replica", torch.tensor(float(torn)), zero, rtol=0.0)
            for _ in range(rounds):
                storms.append(asyncio.run(storm(url, want, n, at_once, kill_after=n // 4)))
                one = storms[-1]
                bench.say(f"{n} requests, {len(one.lost)} lost, {one.moved} moved, replaced in {one.replaced:.1f} s")
                idle = torch.tensor(float(one.moved == 0))
                bench.gate("the killed replica had requests under way", idle, zero, rtol=0.0)
    shape = {"replicas": 2, "rounds": rounds, "requests": n * rounds, "at_once": at_once, "tokens": TOKENS}
    for what in (why for one in storms for why in one.lost):
        bench.say(what)
    counts = [[float(len(one.lost))] for one in storms]
    bench.value("lost", sum(x for (x,) in counts), "requests", "lower", shape=shape, reps=counts)
    bench.value("moved", sum(one.moved for one in storms), "requests", "higher", shape=shape)
    seconds = [one.replaced for one in storms]
    bench.value("replaced", statistics.median(seconds), "s", "lower", shape=shape, reps=[[x] for x in seconds])
