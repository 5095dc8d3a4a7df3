"""Health, figures, and the page that describes it all."""

from __future__ import annotations

import re

import httpx
import openai

from .conftest import Running, wait_for


def figures(running: Running) -> dict[str, float]:
    """Every sample of ``/metrics`` by name and labels."""
    answer = httpx.get(f"{running.url}/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = (line for line in answer.text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_health_and_readiness(running: Running) -> None:
    assert httpx.get(f"{running.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{running.url}/ready").json() == {"status": "ready"}


def test_figures_tell_what_was_done(running: Running, client: openai.OpenAI) -> None:
    before = figures(running)
    prompt = "A beginning that is longer than a block of sixty-four tokens, so that it is kept. " * 2
    answers = [
        client.completions.create(model="tiny", prompt=prompt, temperature=0, max_tokens=40, logit_bias={"257": -100})
        for _ in range(2)
    ]
    after = figures(running)

    def more(name: str) -> float:
        return after[name] - before.get(name, 0)

    ours = '{model="tiny"}'
    assert more('subquad_requests_total{endpoint="/v1/completions",model="tiny",outcome="ok"}') == 2
    assert more(f"subquad_tokens_total{ours}") == 80
    usages = [answer.usage for answer in answers if answer.usage]
    assert more(f"subquad_prompt_tokens_total{ours}") == sum(usage.prompt_tokens for usage in usages)
    assert more(f"subquad_prefix_hits_total{ours}") == 1
    cached = [usage.prompt_tokens_details.cached_tokens for usage in usages if usage.prompt_tokens_details]
    assert more(f"subquad_prefix_tokens_saved_total{ours}") == sum(n or 0 for n in cached) == 128
    for name in ("time_to_first_token_seconds", "request_seconds"):
        assert more(f"subquad_{name}_count{ours}") == 2 and more(f"subquad_{name}_sum{ours}") > 0
    assert after[f"subquad_rows{ours}"] == 4
    assert after['subquad_state_bytes{kind="prefixes",model="tiny"}'] > 0
    assert after['subquad_guesses_total{model="tiny",what="kept"}'] >= 0
    wait_for(lambda: figures(running)[f"subquad_batch{ours}"] == 0)
    assert figures(running)['subquad_state_bytes{kind="slots",model="tiny"}'] == 0


def test_the_openapi_page_tells_what_is_true(running: Running) -> None:
    assert "openapi.json" in httpx.get(f"{running.url}/docs").text
    schema = httpx.get(f"{running.url}/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/models", "/ready"} <= set(schema["paths"])
    responses = schema["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert schema["components"]["schemas"]["ChatBody"]["properties"]["model"]["enum"] == ["tiny", "scripted"]
    assert {"200", "400", "429", "503"} <= set(responses) and "422" not in responses


def test_something_stands_at_the_root(running: Running) -> None:
    answer = httpx.get(running.url)
    assert answer.status_code == 200 and re.search("subquad", answer.text)
