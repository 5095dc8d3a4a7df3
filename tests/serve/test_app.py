"""Health, figures, and the page that describes it all."""

from __future__ import annotations

import httpx
import openai
import pytest

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
    schema = httpx.get(f"{running.url}/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/models", "/ready"} <= set(schema["paths"])
    responses = schema["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert schema["components"]["schemas"]["ChatBody"]["properties"]["model"]["enum"] == ["tiny", "scripted"]
    assert {"200", "400", "429", "503"} <= set(responses) and "422" not in responses


@pytest.mark.parametrize(("path", "kind"), [("", "text/html"), ("docs", "text/html"), ("page.js", "text/javascript")])
def test_pages_are_asked_for_anew_and_load_only_what_is_ours(running: Running, path: str, kind: str) -> None:
    answer = httpx.get(f"{running.url}/{path}")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith(kind)
    assert answer.headers["cache-control"] == "no-cache"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "http://" not in answer.text and "https://" not in answer.text
    again = httpx.get(f"{running.url}/{path}", headers={"If-None-Match": answer.headers["etag"]})
    assert again.status_code == 304 and again.headers["cache-control"] == "no-cache"
    assert httpx.head(f"{running.url}/{path}").headers["content-length"] == answer.headers["content-length"]


@pytest.mark.parametrize("path", ["nothing.js", "%2e%2e%2fapp.py", "..%2fapp.py", "%00", "v1", "v1/"])
def test_nothing_else_is_a_page(running: Running, path: str) -> None:
    answer = httpx.get(f"{running.url}/{path}")
    assert answer.status_code == 404 and set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("stream", [False, True])
def test_what_nobody_foresaw_is_an_error_of_the_same_form(
    running: Running, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("a secret")

    before = figures(running).get(FAILED, 0)
    monkeypatch.setattr("subquad.serve.answer.Reader.take", fail)
    with pytest.raises(openai.APIError, match="its log says why") as raised:
        for _ in client.completions.create(model="tiny", prompt="x", max_tokens=4, stream=stream):
            pass
    assert raised.value.code == "internal" and "secret" not in str(raised.value)
    wait_for(lambda: figures(running)[FAILED] == before + 1)
    wait_for(lambda: running.served().worker.live == 0)


FAILED = 'subquad_requests_total{endpoint="/v1/completions",model="tiny",outcome="internal"}'
