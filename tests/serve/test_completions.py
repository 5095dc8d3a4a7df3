"""Plain texts and vectors through the official client: what comes is what the model gives alone."""

from __future__ import annotations

import base64
import math

import httpx
import numpy as np
import openai
import pytest
import torch

from subquad.engine.sampler import SamplingConfig

from .conftest import Running

PROMPTS = ["hé", "The quick brown fox", "a", "1 2 3 4 5 6 7 8 9"]


def tokens(running: Running, text: str) -> list[int]:
    return running.served().tokenizer.encode(text)


def test_greedy_texts_are_those_of_single_runs(running: Running, client: openai.OpenAI) -> None:
    got = client.completions.create(model="tiny", prompt=PROMPTS, temperature=0, max_tokens=24)
    for i, (prompt, choice) in enumerate(zip(PROMPTS, got.choices, strict=True)):
        alone = running.single(tokens(running, prompt), 24)
        assert (choice.index, choice.text) == (i, alone.text)
        assert choice.finish_reason == {"length": "length", "end": "stop"}[alone.finish]
    assert got.usage is not None
    assert got.usage.prompt_tokens == sum(len(tokens(running, prompt)) for prompt in PROMPTS)


def test_sampled_choices_have_seeds_of_their_own(running: Running, client: openai.OpenAI) -> None:
    options = {"top_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.25, "logit_bias": {"65": 2.0}}
    got = client.completions.create(model="tiny", prompt="go", n=3, seed=11, temperature=0.8, max_tokens=12, **options)
    for i, choice in enumerate(got.choices):
        sampling = SamplingConfig(
            0.8, top_p=0.9, presence_penalty=0.5, frequency_penalty=0.25, logit_bias={65: 2.0}, seed=11 + i
        )
        assert choice.text == running.single(tokens(running, "go"), 12, sampling).text
    assert len({choice.text for choice in got.choices}) == 3


def test_the_temperature_is_one_where_none_is_asked_for(running: Running, client: openai.OpenAI) -> None:
    got = client.completions.create(model="tiny", prompt="x", seed=3, max_tokens=16)
    assert got.choices[0].text == running.single(tokens(running, "x"), 16, SamplingConfig(1.0, seed=3)).text


def test_without_a_seed_answers_differ(client: openai.OpenAI) -> None:
    texts = {client.completions.create(model="tiny", prompt="x", max_tokens=16).choices[0].text for _ in range(3)}
    assert len(texts) == 3


def test_tokens_are_prompts_too(running: Running, client: openai.OpenAI) -> None:
    one = client.completions.create(model="tiny", prompt=[5, 6, 7], temperature=0, max_tokens=8)
    two = client.completions.create(model="tiny", prompt=[[5, 6, 7], [8]], temperature=0, max_tokens=8)
    assert one.choices[0].text == two.choices[0].text == running.single([5, 6, 7], 8).text
    assert two.choices[1].text == running.single([8], 8).text


def test_log_probabilities_are_the_models_own(running: Running, client: openai.OpenAI) -> None:
    got = client.completions.create(model="tiny", prompt="ab", seed=2, temperature=0.7, max_tokens=6, logprobs=0)
    alone = running.single(tokens(running, "ab"), 6, SamplingConfig(0.7, seed=2))
    scores = got.choices[0].logprobs
    assert scores is not None and scores.token_logprobs is not None
    assert [score for score in scores.token_logprobs if score] == pytest.approx(alone.logprobs, abs=1e-6)
    assert len(scores.tokens or []) == len(scores.text_offset or []) == len(alone.tokens)


def test_stop_strings_end_a_text(running: Running, client: openai.OpenAI) -> None:
    whole = running.single(tokens(running, "stop"), 40).text
    at = next(i for i in range(8, len(whole)) if whole[i].isascii())
    first = whole.index(whole[at])
    got = client.completions.create(model="tiny", prompt="stop", temperature=0, max_tokens=40, stop=["\0\1", whole[at]])
    assert (got.choices[0].text, got.choices[0].finish_reason) == (whole[:first], "stop")


def test_echo_shows_the_prompt(running: Running, client: openai.OpenAI) -> None:
    got = client.completions.create(model="tiny", prompt="hé", temperature=0, max_tokens=4, echo=True)
    assert got.choices[0].text == "hé" + running.single(tokens(running, "hé"), 4).text


def test_streams_add_up(running: Running, client: openai.OpenAI) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    texts, finishes, usage = ["", ""], ["", ""], None
    for chunk in client.completions.create(
        model="tiny", prompt=["one", "two"], temperature=0, max_tokens=20, **options
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            finishes[choice.index] = choice.finish_reason or finishes[choice.index]
    assert texts == [running.single(tokens(running, text), 20).text for text in ("one", "two")]
    assert all(finishes) and usage is not None
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_a_known_beginning_changes_nothing(running: Running, client: openai.OpenAI) -> None:
    shared = "The same beginning, longer than a block of tokens, which is sixty-four. " * 3
    cached: list[int] = []
    for end in ("first", "second", "third", "third"):
        got = client.completions.create(model="tiny", prompt=shared + end, temperature=0, max_tokens=16)
        assert got.choices[0].text == running.single(tokens(running, shared + end), 16).text
        assert got.usage is not None and got.usage.prompt_tokens_details is not None
        cached.append(got.usage.prompt_tokens_details.cached_tokens or 0)
    assert cached == [0, 192, 192, 192]  # whole blocks of what the first prompt left


def test_vectors_are_means_or_last_states(running: Running, client: openai.OpenAI) -> None:
    model, texts = running.served().loaded.model, ["hello", "a longer text"]
    plain = client.embeddings.create(model="tiny", input=texts, encoding_format="float")
    last = client.embeddings.create(model="tiny", input=texts, extra_body={"pooling": "last"})  # base64 underneath
    for text, mean, end in zip(texts, plain.data, last.data, strict=True):
        hidden_td = model.hidden(torch.tensor([tokens(running, text)]))[0]
        for vector, expected in ((mean.embedding, hidden_td.mean(0)), (end.embedding, hidden_td[-1])):
            assert vector == pytest.approx((expected / expected.norm()).tolist(), abs=1e-6)
    assert plain.usage.prompt_tokens == sum(len(tokens(running, text)) for text in texts)


def test_base64_is_little_endian_float32(running: Running) -> None:
    body = {"model": "tiny", "input": [1, 2, 3]}
    answers = [
        httpx.post(f"{running.url}/v1/embeddings", json=body | {"encoding_format": how}).json()["data"][0]["embedding"]
        for how in ("float", "base64")
    ]
    assert np.frombuffer(base64.b64decode(answers[1]), "<f4").tolist() == pytest.approx(answers[0], abs=1e-7)
    assert math.isclose(sum(x * x for x in answers[0]), 1, rel_tol=1e-5)
