"""Two replicas behind Ray Serve on this machine: same answers, affine, and nothing lost when one is killed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

pytest.importorskip("ray.serve", reason='the deployment needs Ray: pip install "subquad[ray]"')

from pydantic import ValidationError

from subquad.bench.serve.ray_kill import ASKED, PROMPTS, alone, deployed, storm
from subquad.bench.tiny_server import save_tiny
from subquad.core.errors import ConfigError
from subquad.serve.deployment import Plan


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny(folder)
    return folder


@pytest.fixture(scope="module")
def want(folder: Path) -> dict[str, str]:
    return alone(folder, PROMPTS)


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with deployed(folder, 2, rows=2, max_tokens=1024) as url:
        yield url


def test_beginnings_have_their_replica_and_are_read_once(url: str, want: dict[str, str]) -> None:
    for _ in range(3):
        result = asyncio.run(storm(url, want, len(want), 1))
        assert not result.lost
        assert all(len(names) == 1 for names in result.by.values())
        assert len({name for names in result.by.values() for name in names}) == 2
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    for name, known in (("hits", 2 * len(want)), ("misses", len(want))):
        figures = [line for line in lines if line.startswith(f"subquad_prefix_{name}_total{{")]
        assert len(figures) == 2 and sum(float(line.split()[-1]) for line in figures) == known


def test_streams_come_through(url: str, want: dict[str, str]) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    chunks = list(client.completions.create(**ASKED, prompt=PROMPTS[0], stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == want[PROMPTS[0]] and len(chunks) > 3


def test_a_stream_that_is_left_frees_its_slot(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    with client.completions.create(**ASKED | {"max_tokens": 900}, prompt="a", stream=True) as stream:
        next(iter(stream))
    asyncio.run(becomes_idle(url))


async def becomes_idle(url: str) -> None:
    async with asyncio.timeout(10), httpx.AsyncClient() as client:
        while True:
            lines = (await client.get(f"{url}/metrics")).text.splitlines()
            if sum(float(line.split()[-1]) for line in lines if line.startswith("subquad_batch{")) == 0:
                break
    cancelled = [line for line in lines if line.startswith("subquad_requests_total{") and 'outcome="cancelled"' in line]
    assert sum(float(line.split()[-1]) for line in cancelled) == 1


def test_hostile_bodies_are_refused_at_the_front(url: str) -> None:
    for body in (b"\xff", b"[" * 1000, b" " * 5 * 2**20):
        assert httpx.post(f"{url}/v1/completions", content=body).status_code in (400, 413)


def test_what_a_killed_replica_had_taken_is_answered(url: str, want: dict[str, str]) -> None:
    result = asyncio.run(storm(url, want, 72, 16, kill_after=20))
    assert result.lost == [] and result.moved > 0
    assert not asyncio.run(storm(url, want, len(want), 4)).lost  # and by its successor


def test_wrong_plans_are_refused(tmp_path: Path) -> None:
    for wrong in ({"replicas": "0"}, {"model": "x", "replicas": "none"}, {"model": "x", "rowz": "4"}):
        with pytest.raises(ValidationError):
            Plan.model_validate(wrong)
    with pytest.raises(ConfigError, match="api_key_file"):
        Plan(model="x", api_key_file=str(tmp_path / "none")).keys()
