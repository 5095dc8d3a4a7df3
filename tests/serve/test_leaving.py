"""Clients that leave, and a server that is told to: slots are freed, and what is under way is answered."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from subquad.models.checkpoint import save_pretrained
from subquad.serve.served import Served

from .conftest import Running, make_model, make_tokenizer, wait_for

ENDLESS: dict[str, Any] = {"model": "tiny", "prompt": "a", "max_tokens": 2000, "logit_bias": {"257": -100}}


def idle(served: Served) -> bool:
    return not (served.worker.live or served.worker.queued or served.worker.engine.live)


def test_a_stream_that_is_left_frees_its_slot(running: Running, client: openai.OpenAI) -> None:
    served = running.served()
    with client.completions.create(**ENDLESS, stream=True) as stream:
        next(iter(stream))
        assert served.worker.live == 1
    tokens = tokens_given(running)
    wait_for(lambda: idle(served), 5)
    assert tokens_given(running) - tokens < 500
    assert served.worker.state_nbytes["slots"] == 0


def tokens_given(running: Running) -> float:
    text = httpx.get(f"{running.url}/metrics").text
    (line,) = (line for line in text.splitlines() if line.startswith('subquad_tokens_total{model="tiny"}'))
    return float(line.split()[-1])


def test_an_answer_that_nobody_waits_for_is_given_up(running: Running) -> None:
    served = running.served()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{running.url}/v1/completions", json=ENDLESS | {"n": 6}, timeout=0.5)
    wait_for(lambda: idle(served), 5)


def test_many_come_and_a_part_of_them_leaves(running: Running) -> None:
    served = running.served()
    prompts = [f"prompt {i % 7}" for i in range(30)]
    alone = {p: running.single(served.tokenizer.encode(p), 12).text for p in set(prompts)}

    async def one(client: openai.AsyncOpenAI, i: int) -> None:
        text = ""
        stream = await client.completions.create(
            model="tiny", prompt=prompts[i], temperature=0, max_tokens=12, stream=True
        )
        async for chunk in stream:
            text += chunk.choices[0].text
            if i % 5 == 0:
                await stream.close()
                return
        assert text == alone[prompts[i]]

    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
            await asyncio.gather(*(one(client, i) for i in range(len(prompts))))

    asyncio.run(main())
    wait_for(lambda: idle(served), 5)
    assert served.worker.state_nbytes["slots"] == served.worker.state_nbytes["aside"] == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_pretrained(make_model(), folder, make_tokenizer())
    return str(folder)


@pytest.fixture
def process(folder: str) -> Iterator[tuple[subprocess.Popen[str], str, list[dict[str, Any]]]]:
    """``subquad serve`` as a process, its address, and its log's lines."""
    command = [
        sys.executable,
        "-m",
        "subquad.cli",
        "serve",
        folder,
        "--port",
        "0",
        "--rows",
        "2",
        "--max-tokens",
        "2048",
    ]
    with subprocess.Popen(
        [*command, "--device", "cpu", "--drain-seconds", "20"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "SUBQUAD_API_KEY": "secret"},
    ) as started:
        assert started.stderr is not None
        lines: list[dict[str, Any]] = []
        at = ""
        for line in started.stderr:
            lines.append(json.loads(line))
            if "running on" in lines[-1]["message"]:
                at = lines[-1]["message"].split()[3]
                break
        rest = threading.Thread(target=lambda: lines.extend(map(json.loads, started.stderr or ())))
        rest.start()
        wait_for(lambda: httpx.get(f"{at}/ready").status_code == 200)
        yield started, at, lines
        started.kill()
        rest.join(10)


def test_sigterm_ends_what_is_under_way_and_takes_nothing_new(process: Any) -> None:
    started, at, lines = process
    client = openai.OpenAI(base_url=f"{at}/v1", api_key="secret", max_retries=0)
    secret = "nobody may read this"
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 150, "logit_bias": {"257": -100}, "stream": True}
    stream = iter(client.completions.create(prompt=secret, **asked))
    text = next(stream).choices[0].text
    started.send_signal(signal.SIGTERM)
    wait_for(lambda: httpx.get(f"{at}/ready").status_code == 503)
    with pytest.raises(openai.InternalServerError) as raised:
        client.completions.create(prompt="late", **asked)
    assert raised.value.status_code == 503 and httpx.get(f"{at}/health").status_code == 200
    chunks = list(stream)
    assert chunks[-1].choices[0].finish_reason == "length" and text is not None
    assert started.wait(10) in (0, -signal.SIGTERM)
    (logged,) = (line for line in lines if line["message"] == "request")
    assert (logged["outcome"], logged["completion_tokens"], logged["model"]) == ("ok", 150, "tiny")
    assert secret not in json.dumps(lines) and logged["client"].startswith("key-")


def test_a_server_without_its_packages_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: str
) -> None:
    from subquad import cli
    from subquad.cli import serve

    monkeypatch.setattr(serve, "NEEDED", ("fastapi", "no_such_package"))
    assert cli.main(["serve", folder]) == 2
    assert 'pip install "subquad[serve]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--api-key", " "], "--api-key"),
        (["--api-key-file", "/no/such/file"], "--api-key-file"),
        (["--name", "a", "--name", "b"], "--name"),
        (["--beside", "{folder}"], "names that differ"),
        (["--state-mb", "0.001"], "state_bytes"),
        (["--draft", "nothing"], "nothing"),
    ],
)
def test_wrong_options_are_refused(
    capsys: pytest.CaptureFixture[str], folder: str, options: list[str], told: str
) -> None:
    from subquad import cli

    assert cli.main(["serve", folder, "--device", "cpu", *(option.format(folder=folder) for option in options)]) == 2
    assert told in capsys.readouterr().err


def test_rows_follow_from_bytes() -> None:
    from subquad.models.load import LoadedModel
    from subquad.serve.served import Room

    loaded = LoadedModel(make_model(), make_tokenizer(), "tiny", "tiny")
    one = Served.build(loaded, "tiny", Room(rows=1, tokens=256, prefix_bytes=0))
    each = one.worker.engine.nbytes
    for rows in (1, 3):
        room = Room(state_bytes=rows * each + each // 2, tokens=256, prefix_bytes=0)
        assert Served.build(loaded, "tiny", room).worker.engine.rows == rows
