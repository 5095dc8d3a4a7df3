"""Repeated n-grams and bad words in an engine: of each row's own text, guessed at, paused, moved and begun before."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from subquad.decode.copyspec import CopySpec
from subquad.engine.draft import Drafter
from subquad.engine.engine import Engine
from subquad.engine.generate import generate
from subquad.engine.history import History
from subquad.engine.prefix import PrefixCache
from subquad.engine.request import Limits, Request
from subquad.engine.sampler import Sampler, SamplingConfig
from subquad.models.stack import Stack

from .conftest import MIXERS, PROMPTS, Oracle, V, build, drain, tokens

N = 14


def free(model: Stack) -> list[list[int]]:
    return [g.tokens for g in generate(model, PROMPTS, limits=Limits(N, end_tokens=[]))]


def settings_of(model: Stack) -> list[SamplingConfig]:
    """One a row, most of which forbid what would come: the last one's words begin in the prompt."""
    _, one, _, other = free(model)
    words = [[one[3]], [4, 21, other[0]], [*PROMPTS[3][-2:], other[0]], [other[2]]]
    return [
        SamplingConfig(no_repeat_ngram_size=2),
        SamplingConfig(no_repeat_ngram_size=1, bad_words_ids=words[:1]),
        SamplingConfig(),
        SamplingConfig(no_repeat_ngram_size=3, bad_words_ids=words[1:]),
    ]


def recomputed(model: Stack, prompt: Sequence[int], config: SamplingConfig) -> list[int]:
    """N greedy tokens by transformers' own processors, the whole text read again for each."""
    from transformers.generation.logits_process import NoBadWordsLogitsProcessor, NoRepeatNGramLogitsProcessor

    text = list(prompt)
    for _ in range(N):
        ids_1t = torch.tensor([text])
        logits_1v = model(ids_1t)[:, -1]
        if config.no_repeat_ngram_size:
            logits_1v = NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size)(ids_1t, logits_1v)
        if config.bad_words_ids:
            logits_1v = NoBadWordsLogitsProcessor([list(word) for word in config.bad_words_ids])(ids_1t, logits_1v)
        text.append(int(logits_1v.argmax()))
    return text[len(prompt) :]


def expected_of(model: Stack) -> list[list[int]]:
    settings = settings_of(model)
    return [recomputed(model, prompt, config) for prompt, config in zip(PROMPTS, settings, strict=True)]


@pytest.mark.parametrize("guesses", [None, "oracle", "copies"])
@pytest.mark.parametrize(("mixer", "rounds"), [("attention", 1), ("mamba2", 3)])
def test_greedy_tokens_are_those_that_transformers_processors_leave(
    mixer: str, guesses: str | None, rounds: int
) -> None:
    """Right and wrong guesses stand behind others; rows end at different times, and the last ones move."""
    model = build(MIXERS[mixer])
    expected, settings = expected_of(model), settings_of(model)
    assert [a == b for a, b in zip(free(model), expected, strict=True)] == [False, False, True, False]
    drafter: Drafter | None = None
    if guesses == "oracle":
        drafter = Oracle([p + e for p, e in zip(PROMPTS, expected, strict=True)], lambda text, turn: (text + turn) % 4)
    elif guesses == "copies":
        drafter = CopySpec((2, 1))
    for counts in ([N] * 4, [3, 3, 4, N]):
        engine = Engine(
            model, rows=4, capacity=32, drafter=drafter, draft_tokens=3 if drafter else None, rounds=rounds, chunk=4
        )
        for prompt, config, n in zip(PROMPTS, settings, counts, strict=True):
            engine.submit(Request(prompt, Limits(n, end_tokens=[]), config))
        got = drain(engine)
        assert [tokens(got[row]) for row in range(4)] == [e[:n] for e, n in zip(expected, counts, strict=True)]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("guessed", [False, True])
def test_paused_rows_and_known_beginnings_change_nothing(guessed: bool, temperature: float) -> None:
    """Few rows for many prompts, each twice; the first is paused before there is room for texts."""
    model = build(MIXERS["mamba2"])
    settings = [
        SamplingConfig(temperature=temperature, presence_penalty=2.0, seed=1),
        *(SamplingConfig(temperature=temperature, no_repeat_ngram_size=n, bad_words_ids=[[9, 8], [5]]) for n in (1, 2)),
        SamplingConfig(temperature=temperature, no_repeat_ngram_size=2, repetition_penalty=1.5, seed=3),
    ]
    limits = Limits(11, end_tokens=[], chunk=4)
    expected = [
        generate(model, [p], limits=limits, sampling=[s])[0].tokens for p, s in zip(PROMPTS, settings, strict=True)
    ]
    drafter = CopySpec((2, 1)) if guessed else None
    engine = Engine(model, rows=2, capacity=32, chunk=4, drafter=drafter, prefixes=PrefixCache(1 << 20, block=2))
    requests = [Request(p, limits, s) for p, s in zip(PROMPTS, settings, strict=True)]
    engine.submit(requests[0])
    early = [*engine.step(), *engine.step()]
    assert engine.pause(0)
    for request in (*requests[1:], *requests):
        engine.submit(request)

    def pause(step: int) -> None:
        if step % 2 == 1:
            engine.pause(step // 2 % 8)

    got = drain(engine, pause)
    assert tokens(early) + tokens(got[0]) == expected[0]
    assert [tokens(got[row]) for row in range(1, 8)] == [*expected[1:], *expected]
    assert engine.prefixes is not None
    assert engine.prefixes.hits > 0


@pytest.mark.parametrize("late", range(3))
def test_room_for_a_newcomers_past_leaves_that_of_a_row_under_way(model: Stack, late: int) -> None:
    limits = Limits(10, end_tokens=[])
    kinds = [
        SamplingConfig(presence_penalty=3.0),
        SamplingConfig(no_repeat_ngram_size=1),
        SamplingConfig(bad_words_ids=[[5, 5, token] for token in range(V)]),
    ]
    for early in kinds:
        expected = [generate(model, [[5]], limits=limits, sampling=[s])[0].tokens for s in (early, kinds[late])]
        engine = Engine(model, rows=2, capacity=16)
        engine.submit(Request([5], limits, early))
        got = engine.step() + engine.step()
        engine.submit(Request([5], limits, kinds[late]))
        rest = drain(engine)
        assert tokens(got) + tokens(rest[0]) == expected[0]
        assert tokens(rest[1]) == expected[1]


def test_a_row_as_long_as_the_capacity_has_room_for_its_text(model: Stack) -> None:
    """Guesses go beyond its end; a prompt as long as that is still read while another row decodes."""
    expected, prompt, capacity = expected_of(model)[0], PROMPTS[0], len(PROMPTS[0]) + N - 1
    long = [*PROMPTS[2], *PROMPTS[3]]
    assert len(long) == capacity
    (likely,) = generate(model, [long], limits=Limits(1, end_tokens=[]))[0].tokens
    alone, forbids = SamplingConfig(logit_bias={likely: -torch.inf}), SamplingConfig(bad_words_ids=[[long[-1], likely]])
    (other,) = generate(model, [long], limits=Limits(1, end_tokens=[]), sampling=[alone])[0].tokens
    drafter = Oracle([[*prompt, *expected], [*long, other]], lambda text, turn: 4)
    engine = Engine(model, rows=2, capacity=capacity, drafter=drafter, draft_tokens=4, chunk=4)
    engine.submit(Request(prompt, Limits(N, end_tokens=[]), settings_of(model)[0]))
    engine.submit(Request(long, Limits(1, end_tokens=[]), forbids))
    got = drain(engine)
    assert [tokens(got[row]) for row in range(2)] == [expected, [other]]


def test_what_is_forbidden_is_found_without_asking_the_device() -> None:
    """Compiled whole: a token, another behind it, and the history of both."""
    settings = [SamplingConfig(no_repeat_ngram_size=2), SamplingConfig(bad_words_ids=[[1], [7, 2]])]
    sampler, x_tbv = Sampler(settings), torch.randn(2, 2, V, generator=torch.Generator().manual_seed(3))

    def draw(history: History) -> tuple[Tensor, Tensor]:
        first_b = sampler.sample(x_tbv[0], history)
        second_b = sampler.sample(x_tbv[1], history.after(first_b))
        history.observe_block_(torch.stack((first_b, second_b), 1), torch.full_like(first_b, 2))
        return first_b, second_b

    histories = [History.start([[1, 2, 1], [7]], 0, tokens=6) for _ in range(2)]
    got = torch.compile(draw, backend="aot_eager", fullgraph=True)(histories[0])
    expected = draw(histories[1])
    for (_, a), (_, b) in zip(histories[0].tensors(), histories[1].tensors(), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
