"""The contract of a drafter, run over all that are registered and every mixer: guesses never change what comes."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from subquad.core.registry import load, methods
from subquad.engine.draft import Draft, Drafter
from subquad.engine.engine import Engine
from subquad.engine.generate import Generation, Limits, generate, generate_many
from subquad.engine.prefix import PrefixCache
from subquad.engine.request import Request
from subquad.engine.sampler import SamplingConfig
from subquad.models.stack import Stack

from .conftest import FIRST_MIXERS, MIXERS, V, build, named

DRAFTERS = [(slug, name) for slug, card in methods("decode").items() for name in card.examples]
Models = Callable[[str], Stack]


@functools.cache
def built(mixer: str) -> Stack:
    # No drafter's own start may depend on whether the model was built before.
    with torch.random.fork_rng():
        return build(MIXERS[mixer])


PLAIN: dict[tuple[str, str], list[Generation]] = {}


def plain(
    mixer: str, prompts: Sequence[Sequence[int]], limits: Limits, sampling: Sequence[SamplingConfig] | None = None
) -> list[Generation]:
    """What comes without guesses, worked out once for all drafters."""
    key = (mixer, repr((prompts, limits, sampling)))
    if key not in PLAIN:
        PLAIN[key] = generate(built(mixer), prompts, limits=limits, sampling=sampling)
    return PLAIN[key]


def test_every_drafter_gives_examples() -> None:
    assert [slug for slug, card in methods("decode").items() if not card.examples] == []


@pytest.fixture(params=DRAFTERS, ids=[f"{slug}-{name}" for slug, name in DRAFTERS])
def drafter(request: pytest.FixtureRequest, models: Models) -> Drafter:
    slug, name = request.param
    return load("decode", slug).build(methods("decode")[slug].examples[name], models)


# Every example of a drafter with every mixer, and every example of a mixer with every drafter.
PAIRS = [
    ((slug, name), mixer)
    for slug, name in DRAFTERS
    for mixer in MIXERS
    if mixer in FIRST_MIXERS or name == next(iter(methods("decode")[slug].examples))
]


@pytest.mark.parametrize(("drafter", "mixer"), PAIRS, indirect=["drafter"], ids=["-".join((*d, m)) for d, m in PAIRS])
def test_greedy_tokens_are_those_of_plain_decoding(mixer: str, drafter: Drafter, prompts: list[list[int]]) -> None:
    """In float64, ragged rows, ends inside blocks, rows that end at different times."""
    limits = Limits(max_new_tokens=14, end_tokens=[0, 11], chunk=4)
    got = generate(built(mixer), prompts, limits=limits, drafter=drafter, draft_tokens=3)
    assert got == plain(mixer, prompts, limits)


@pytest.mark.parametrize("mixer", ["attention-full", "mamba2-paper", "windowed_linear-grouped"])
def test_rows_join_and_leave(mixer: str, drafter: Drafter, prompts: list[list[int]]) -> None:
    """Few rows for many prompts, several rounds between two looks, and the number of guesses chosen as it goes."""
    limits = Limits(max_new_tokens=11, end_tokens=[3], chunk=3)
    many = prompts + [[*p[::-1], 5] for p in prompts]
    got = dict(generate_many(built(mixer), many, rows=3, limits=limits, rounds=3, drafter=drafter))
    assert got == dict(enumerate(plain(mixer, many, limits)))


def test_a_row_that_is_paused_goes_on_where_it_stood(drafter: Drafter, prompts: list[list[int]]) -> None:
    limits = Limits(max_new_tokens=12, end_tokens=[])
    expected = [g.tokens for g in plain("gated_deltanet-paper", prompts, limits)]
    model = built("gated_deltanet-paper")
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


def test_samples_are_distributed_as_without_guesses(drafter: Drafter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tokens of many rows: the very ones drawn without guesses, or distributed by their exact probabilities.

    Where no guess has a distribution of its own, each row draws what it would draw alone, token for token. Where one
    has, a chi-square test looks at all that is likely enough. All but five tokens are forbidden, so that model and
    drafter mostly have the same ones: were p / q taken a fifth too high, chi-square would be 84 or more too high with
    any of the drafters, of which 57 are noticed.
    """
    model, prompt, settings, expected = exact()
    limits, weighed = Limits(max_new_tokens=3, end_tokens=[]), list[bool]()
    propose = drafter.propose

    def heard(*args: Any) -> Draft:
        draft = propose(*args)
        weighed.append(draft.q_bkv is not None)
        return draft

    monkeypatch.setattr(drafter, "propose", heard)
    # Side by side are as many rows as a core's cache likes; each draws with a seed of its own.
    few, rows, together = 100, 6_000, 2_000
    options: dict[str, Any] = {"limits": limits, "sampling": settings, "drafter": drafter, "draft_tokens": 2}
    # Of a copy, since a drafter may share the model's weights, which become float32 below.
    got = generate(copy.deepcopy(built("attention-full")), [prompt] * few, **options)
    assert weighed
    if not any(weighed):
        assert got == plain("attention-full", [prompt] * few, limits, settings)
        return
    model_of = getattr(drafter, "model", None)
    if model_of is not None:
        model_of.float()
    counts = Counter[tuple[int, ...]]()
    for first in range(0, rows, together):
        options["sampling"] = dataclasses.replace(settings, seed=settings.seed + first)
        counts.update(tuple(g.tokens) for g in generate(model, [prompt] * together, **options))
    assert set(counts) <= set(expected)
    likely = {tokens: p for tokens, p in expected.items() if p * rows >= 10}
    chi2 = sum((counts[tokens] - p * rows) ** 2 / (p * rows) for tokens, p in likely.items())
    assert len(likely) > 20
    # Five standard deviations of a chi-square of that many degrees of freedom.
    assert chi2 < len(likely) + 5 * (2 * len(likely)) ** 0.5


@pytest.mark.parametrize("slug", methods("decode"))
def test_a_round_is_one_graph_without_a_break(
    slug: str, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled whole, guesses and decisions with it, and the same tokens; so nothing in it asks the device."""
    torch.compiler.reset()
    small = functools.partial(named, layers=1)
    drafter = load("decode", slug).build(next(iter(methods("decode")[slug].examples.values())), small)
    compiled = torch.compile

    def quickly(fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        return compiled(fn, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", quickly)
    model, sampling = build(MIXERS["attention-full"]), SamplingConfig(temperature=1.0, top_k=5, seed=3)
    limits = Limits(max_new_tokens=10, end_tokens=[0])
    options: dict[str, Any] = {"drafter": drafter, "draft_tokens": 2}
    expected = generate(model, prompts[:2], limits=limits, sampling=sampling, **options)
    # Each round gives a token at least, so that all rounds are of the same two rows, and compiled once.
    engine = Engine(model, rows=2, capacity=20, compile=True, rounds=10, **options)
    for i, prompt in enumerate(prompts[:2]):
        engine.submit(Request(prompt, limits, dataclasses.replace(sampling, seed=3 + i)))
    got: dict[int, list[int]] = {0: [], 1: []}
    while engine.busy:
        for piece in engine.step():
            got[piece.row].append(piece.token)
    assert [got[0], got[1]] == [g.tokens for g in expected]


@functools.cache
def exact() -> tuple[Stack, list[int], SamplingConfig, dict[tuple[int, ...], float]]:
    """A model, a prompt, settings, and every sequence of three tokens with its probability."""
    prompt, bias_v = [4, 9, 4, 9, 4], torch.full((V,), -torch.inf)
    bias_v[[1, 4, 7, 9, 12]] = 0
    settings = SamplingConfig(temperature=1.0, top_k=4, logit_bias=dict(enumerate(bias_v.tolist())), seed=11)
    with torch.random.fork_rng():
        model = build(MIXERS["attention-full"]).float()
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        longer: dict[tuple[int, ...], float] = {}
        for tokens, p in found.items():
            logits_v = bias_v + model(torch.tensor([prompt + list(tokens)]))[0, -1].double()
            floor = logits_v.topk(settings.top_k).values[-1]
            for token, q in enumerate(logits_v.masked_fill(logits_v < floor, -torch.inf).softmax(-1).tolist()):
                if q:
                    longer[(*tokens, token)] = p * q
        found = longer
    return model, prompt, settings, found


def test_rows_of_all_settings_side_by_side(drafter: Drafter, prompts: list[list[int]]) -> None:
    """Greedy rows, one that may not repeat itself among them, keep their tokens; none depends on its company."""
    model = built("gla-paper")
    settings = [
        SamplingConfig(),
        SamplingConfig(temperature=1.0, seed=3),
        SamplingConfig(
            repetition_penalty=1.7, frequency_penalty=0.5, no_repeat_ngram_size=2, bad_words_ids=[[4], [7, 1]]
        ),
        SamplingConfig(temperature=0.6, top_p=0.8, presence_penalty=0.4, no_repeat_ngram_size=1, seed=9),
    ]
    limits = Limits(max_new_tokens=10, end_tokens=[2])
    options: dict[str, Any] = {"limits": limits, "drafter": drafter, "draft_tokens": 3}
    together = generate(model, prompts, sampling=settings, **options)
    for prompt, config, got in zip(prompts, settings, together, strict=True):
        assert generate(model, [prompt], sampling=[config], **options) == [got]
        if config.temperature == 0:
            assert plain("gla-paper", [prompt], limits, [config]) == [got]


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
