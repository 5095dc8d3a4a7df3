"""Log-probabilities through the official client: a loop by hand says what they are."""

from __future__ import annotations

import math
from typing import Any

import openai
import pytest
import torch

from subquad.serve.decoder import Decoder

from .conftest import Running, make_tokenizer
from .test_chat import HELLO, rendered

GRIN = "\N{GRINNING FACE}"


def by_hand(running: Running, prompt: list[int], drawn: list[int]) -> list[dict[int, float]]:
    """The log-probability of each token behind each beginning, likeliest first."""
    model, found = running.served().loaded.model, list[dict[int, float]]()
    for i in range(len(drawn)):
        scores_v = model(torch.tensor([[*prompt, *drawn[:i]]]))[0, -1].log_softmax(-1)
        order = scores_v.argsort(descending=True)
        found.append(dict(zip(order.tolist(), scores_v[order].tolist(), strict=True)))
    return found


@pytest.mark.parametrize("stream", [False, True])
def test_a_chats_tokens_have_the_likeliest_beside_them(running: Running, client: openai.OpenAI, stream: bool) -> None:
    asked: dict[str, Any] = {
        "model": "tiny",
        "messages": HELLO,
        "temperature": 0,
        "max_tokens": 12,
        "logprobs": True,
        "top_logprobs": 3,
        "logit_bias": {"257": -100},
    }
    if stream:
        choices = [one for chunk in client.chat.completions.create(**asked, stream=True) for one in chunk.choices]
    else:
        choices = client.chat.completions.create(**asked).choices
    content = [item for one in choices if one.logprobs for item in one.logprobs.content or []]
    prompt = rendered(running, "<s>[system:be brief][user:hello][a:")
    from subquad.engine.sampler import SamplingConfig

    drawn = running.single(prompt, 12, SamplingConfig(logit_bias={257: -100})).tokens
    decoder = running.served().decoder
    for item, token, every in zip(content, drawn, by_hand(running, prompt, drawn), strict=True):
        assert item.token == decoder.token(token).text and bytes(item.bytes or []) == decoder.token(token).data
        assert item.logprob == pytest.approx(every[token], abs=1e-5)
        assert [top.token for top in item.top_logprobs] == [decoder.token(id).text for id in list(every)[:3]]
        assert [top.logprob for top in item.top_logprobs] == pytest.approx(list(every.values())[:3], abs=1e-5)


def test_without_being_asked_for_there_are_none(client: openai.OpenAI) -> None:
    got = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=2)
    assert got.choices[0].logprobs is None
    got = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=2, logprobs=True, temperature=0)
    assert got.choices[0].logprobs is not None
    assert all(item.top_logprobs == [] for item in got.choices[0].logprobs.content or [])


@pytest.mark.parametrize("stream", [False, True])
def test_a_texts_tokens_have_the_likeliest_beside_them(running: Running, client: openai.OpenAI, stream: bool) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "ab", "seed": 2, "max_tokens": 20, "logprobs": 5}
    if stream:
        choices = [one for chunk in client.completions.create(**asked, stream=True) for one in chunk.choices]
    else:
        choices = client.completions.create(**asked).choices
    from subquad.engine.sampler import SamplingConfig

    prompt = running.served().tokenizer.encode("ab")
    single = running.single(prompt, 20, SamplingConfig(1.0, seed=2))
    decoder, shown = running.served().decoder, [token for token in single.tokens if token != 257]
    parts = [one.logprobs for one in choices if one.logprobs]
    tops = [top for part in parts for top in part.top_logprobs or []]
    assert [name for part in parts for name in part.tokens or []] == [decoder.token(token).text for token in shown]
    for top, token, every in zip(tops, shown, by_hand(running, prompt, shown), strict=True):
        wanted = {decoder.token(id).text: score for id, score in list(every.items())[:5]}
        wanted[decoder.token(token).text] = every[token]
        assert top == pytest.approx(wanted, abs=1e-5) and 5 <= len(top) <= 6
    offsets = [offset for part in parts for offset in part.text_offset or []]
    assert offsets == sorted(offsets) and offsets[0] == 0 and offsets[-1] <= len(single.text)


def test_tokens_are_named_by_their_text_or_bytes() -> None:
    tokenizer = make_tokenizer()
    decoder = Decoder(tokenizer)
    named = [decoder.token(token) for token in tokenizer.encode(f"a {GRIN}", add_special_tokens=False)]
    assert [name for name, _ in named[:3]] == ["a", " ", "bytes:\\xf0"]
    assert b"".join(data or b"" for _, data in named) == f"a {GRIN}".encode()
    assert decoder.token(257) == ("</s>", b"</s>")


def test_offsets_count_whole_characters(running: Running) -> None:
    from subquad.engine.request import Piece
    from subquad.serve.completions import Scores

    scores, tokens = (
        Scores(running.served(), 0),
        running.served().tokenizer.encode(f"{GRIN}é!", add_special_tokens=False),
    )
    pieces = [Piece(0, token, "", -math.inf, None) for token in tokens]
    first, second = scores.take(pieces[:2]), scores.take(pieces[2:])
    assert first["text_offset"] + second["text_offset"] == [0, 0, 0, 0, 1, 1, 2]
    assert first["token_logprobs"] == [-9999.0, -9999.0] and first["top_logprobs"] is None
