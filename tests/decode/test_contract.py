"""The contract of a drafter, run over all that are registered and every mixer: guesses never change what comes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from subquad.core.registry import load, methods
from subquad.engine.draft import Drafter
from subquad.engine.engine import Engine
from subquad.engine.generate import Limits, generate, generate_many
from subquad.engine.prefix import PrefixCache
from subquad.engine.request import Request
from subquad.engine.sampler import SamplingConfig
from subquad.models.stack import Stack

from .conftest import MIXERS, V, build

DRAFTERS = [(slug, name) for slug, card in methods("decode").items() for name in card.examples]
Models = Callable[[str], Stack]


def test_every_drafter_gives_examples() -> None:
    assert [slug for slug, card in methods("decode").items() if not card.examples] == []


@pytest.fixture(params=DRAFTERS, ids=[f"{slug}-{name}" for slug, name in DRAFTERS])
def drafter(request: pytest.FixtureRequest, models: Models) -> Drafter:
    slug, name = request.param
    return load("decode", slug).build(methods("decode")[slug].examples[name], models)


@pytest.mark.parametrize("mixer", MIXERS)
def test_greedy_tokens_are_those_of_plain_decoding(mixer: str, drafter: Drafter, prompts: list[list[int]]) -> None:
    """In float64, ragged rows, ends inside blocks, rows that end at different times."""
    model = build(MIXERS[mixer])
    limits = Limits(max_new_tokens=14, end_tokens=[0, 11], chunk=4)
    expected = generate(model, prompts, limits=limits)
    assert generate(model, prompts, limits=limits, drafter=drafter, draft_tokens=3) == expected


@pytest.mark.parametrize("mixer", ["attention-full", "mamba2-paper", "windowed_linear-grouped"])
def test_rows_join_and_leave(mixer: str, drafter: Drafter, prompts: list[list[int]]) -> None:
    """Few rows for many prompts, several rounds between two looks, and the number of guesses chosen as it goes."""
    model = build(MIXERS[mixer])
    limits = Limits(max_new_tokens=11, end_tokens=[3], chunk=3)
    many = prompts + [[*p[::-1], 5] for p in prompts]
    expected = dict(enumerate(generate(model, many, limits=limits)))
    assert dict(generate_many(model, many, rows=3, limits=limits, rounds=3, drafter=drafter)) == expected


def test_a_row_that_is_paused_goes_on_where_it_stood(drafter: Drafter, prompts: list[list[int]]) -> None:
    model = build(MIXERS["gated_deltanet-paper"])
    limits = Limits(max_new_tokens=12, end_tokens=[])
    expected = [g.tokens for g in generate(model, prompts, limits=limits)]
    engine = Engine(model, rows=2, capacity=24, drafter=drafter, draft_tokens=2, prefixes=PrefixCache(1 << 20, block=2))
    for prompt in prompts:
        engine.submit(Request(prompt, limits))
    got: dict[int, list[int]] = {i: [] for i in range(len(prompts))}
    steps = 0
    while engine.busy:
        for piece in engine.step():
            got[piece.row].append(piece.token)
        steps += 1
        if steps in (2, 3, 5):
            assert engine.pause(min(row for row, tokens in got.items() if 0 < len(tokens) < 12))
    assert [got[i] for i in range(len(prompts))] == expected


def test_samples_are_distributed_as_without_guesses(drafter: Drafter) -> None:
    """Three tokens of 20,000 rows against their exact probabilities: a chi-square test of all that is likely enough."""
    model = build(MIXERS["attention-full"]).float()
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    prompt, rows, n = [4, 9, 4, 9, 4], 20_000, 3
    limits = Limits(max_new_tokens=n, end_tokens=[])
    settings = SamplingConfig(temperature=0.7, top_k=4, seed=11)
    model_of = getattr(drafter, "model", None)
    if model_of is not None:
        model_of.float()
    got = generate(model, [prompt] * rows, limits=limits, sampling=settings, drafter=drafter, draft_tokens=2)
    counts: dict[tuple[int, ...], int] = {}
    for g in got:
        counts[tuple(g.tokens)] = counts.get(tuple(g.tokens), 0) + 1
    expected = exact(model, prompt, n, settings)
    assert set(counts) <= set(expected)
    likely = {tokens: p for tokens, p in expected.items() if p * rows >= 10}
    chi2 = sum((counts.get(tokens, 0) - p * rows) ** 2 / (p * rows) for tokens, p in likely.items())
    assert len(likely) > 20
    # Five standard deviations of a chi-square of that many degrees of freedom.
    assert chi2 < len(likely) + 5 * (2 * len(likely)) ** 0.5


@pytest.mark.parametrize("slug", methods("decode"))
def test_a_round_is_one_graph_without_a_break(
    slug: str, models: Models, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled whole, guesses and decisions with it, and the same tokens; so nothing in it asks the device."""
    torch.compiler.reset()
    drafter = load("decode", slug).build(next(iter(methods("decode")[slug].examples.values())), models)
    compiled = torch.compile

    def quickly(fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        return compiled(fn, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", quickly)
    model, sampling = build(MIXERS["attention-full"]), SamplingConfig(temperature=1.0, top_k=5, seed=3)
    limits = Limits(max_new_tokens=10, end_tokens=[0])
    options: dict[str, Any] = {"drafter": drafter, "draft_tokens": 2}
    expected = generate(model, prompts[:2], limits=limits, sampling=sampling, **options)
    engine = Engine(model, rows=2, capacity=20, compile=True, **options)
    for i, prompt in enumerate(prompts[:2]):
        engine.submit(Request(prompt, limits, dataclasses.replace(sampling, seed=3 + i)))
    got: dict[int, list[int]] = {0: [], 1: []}
    while engine.busy:
        for piece in engine.step():
            got[piece.row].append(piece.token)
    assert [got[0], got[1]] == [g.tokens for g in expected]


def exact(model: Stack, prompt: list[int], n: int, settings: SamplingConfig) -> dict[tuple[int, ...], float]:
    """Every sequence of n tokens with its probability."""
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(n):
        longer: dict[tuple[int, ...], float] = {}
        for tokens, p in found.items():
            logits_v = model(torch.tensor([prompt + list(tokens)]))[0, -1].double() / settings.temperature
            floor = logits_v.topk(settings.top_k).values[-1]
            for token, q in enumerate(logits_v.masked_fill(logits_v < floor, -torch.inf).softmax(-1).tolist()):
                if q:
                    longer[(*tokens, token)] = p * q
        found = longer
    return found


def test_rows_of_all_settings_side_by_side(drafter: Drafter, prompts: list[list[int]]) -> None:
    """A greedy row among sampled and penalised ones keeps its tokens; a sampled one does not depend on its company."""
    model = build(MIXERS["gla-paper"])
    settings = [
        SamplingConfig(),
        SamplingConfig(temperature=1.0, seed=3),
        SamplingConfig(repetition_penalty=1.7, frequency_penalty=0.5),
        SamplingConfig(temperature=0.6, top_p=0.8, presence_penalty=0.4, seed=9),
    ]
    limits = Limits(max_new_tokens=10, end_tokens=[2])
    options: dict[str, Any] = {"limits": limits, "drafter": drafter, "draft_tokens": 3}
    together = generate(model, prompts, sampling=settings, **options)
    for prompt, config, got in zip(prompts, settings, together, strict=True):
        assert generate(model, [prompt], sampling=[config], **options) == [got]
        if config.temperature == 0:
            assert generate(model, [prompt], limits=limits, sampling=[config]) == [got]


WEIGHED = [(slug, name) for slug, name in DRAFTERS if "model" in methods("decode")[slug].examples[name]]


@pytest.mark.parametrize(("slug", "name"), WEIGHED)
def test_guesses_of_a_broken_drafter_cost_nothing_but_time(
    slug: str, name: str, models: Models, prompts: list[list[int]]
) -> None:
    """Weights of NaN in every drafter that has some of its own."""
    drafter = load("decode", slug).build(methods("decode")[slug].examples[name], models)
    for p in drafter.model.parameters():
        p.fill_(torch.nan)
    model = build(MIXERS["attention-full"])
    sampling = SamplingConfig(temperature=1.0, seed=1)
    got = generate(model, prompts, limits=Limits(8, end_tokens=[]), sampling=sampling, drafter=drafter, draft_tokens=2)
    assert all(len(g.tokens) == 8 and all(0 <= t < V for t in g.tokens) for g in got)
