"""What is asked of an engine while others are under way: refused, cancelled, paused, and of other settings."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from subquad.core.errors import ConfigError, DataError
from subquad.decode.copyspec import CopySpec
from subquad.engine.engine import Engine
from subquad.engine.generate import generate
from subquad.engine.prefix import PrefixCache
from subquad.engine.request import Limits, Request
from subquad.engine.sampler import SamplingConfig
from subquad.models.stack import Stack

from .conftest import MIXERS, PROMPTS, Letters, Oracle, V, build, drain, plain, tokens


def test_what_does_not_fit_is_refused_and_nothing_else_is_touched(model: Stack) -> None:
    expected = plain(model, PROMPTS[:2], 6)
    engine = Engine(model, rows=2, capacity=16)
    assert engine.submit(Request(PROMPTS[0], Limits(6, end_tokens=[]))) == 0
    got = engine.step()
    bad = [
        (lambda: Request([1] * 10, Limits(8)), ConfigError, "^request 1: expected at most 16 tokens .* 10 and 8 new"),
        (lambda: Request([1], Limits(0)), ConfigError, "^max_new_tokens"),
        (lambda: Request([1], Limits(4, stop=["x"])), ConfigError, "^stop: expected a tokenizer"),
        (lambda: Request([1], Limits(4, stop=[""]), tokenizer=Letters()), ConfigError, "^stop: expected strings"),
        (lambda: Request([], Limits(4)), DataError, "^request 1: expected at least one token"),
        (lambda: Request([1, V], Limits(4)), DataError, f"^request 1: expected token ids .* got {V}"),
        (lambda: Request([-1], Limits(4)), DataError, "^request 1: expected token ids"),
        (lambda: Request([1], Limits(4), SamplingConfig(temperature=-1)), ConfigError, "^temperature"),
        (lambda: Request([1], Limits(4), SamplingConfig(top_p=math.nan)), ConfigError, "^top_p"),
        (
            lambda: Request([1], Limits(4), SamplingConfig(bad_words_ids=[[2], [1, V]])),
            ConfigError,
            f"^bad_words_ids: expected token ids below {V}, got {V}",
        ),
    ]
    for make, error, message in bad:
        with pytest.raises(error, match=message):
            engine.submit(make())
    assert (engine.live, engine.busy) == (1, True)
    # A row as long as the capacity fits: the last token is never read.
    assert engine.submit(Request([1] * 11, Limits(6, end_tokens=[]))) == 1
    assert engine.submit(Request(PROMPTS[1], Limits(6, end_tokens=[]))) == 2
    rest = drain(engine)
    assert tokens(got) + tokens(rest[0]) == expected[0]
    assert tokens(rest[2]) == expected[1]
    assert tokens(rest[1]) == plain(model, [[1] * 11], 6)[0]


@pytest.mark.parametrize(
    ("prompt", "limits", "error"),
    [([1.5, 2], Limits(4), DataError), ([1], Limits(4, end_tokens=[2**70]), ConfigError)],
    ids=["a prompt of fractions", "an end token beyond 64 bits"],
)
def test_what_no_tensor_holds_is_refused_before_it_stops_all_others(
    model: Stack, prompt: Any, limits: Limits, error: type[Exception]
) -> None:
    engine = Engine(model, rows=2, capacity=16)
    engine.submit(Request([1], Limits(4, end_tokens=[])))
    with pytest.raises(error):
        engine.submit(Request(prompt, limits))
    assert tokens(drain(engine)[0]) == plain(model, [[1]], 4)[0]


@pytest.mark.parametrize(
    "options", [{"rows": 0}, {"capacity": 0}, {"chunk": 0}, {"rounds": 0}, {"drafter": True, "draft_tokens": 0}]
)
def test_an_engine_of_nothing_is_refused(model: Stack, options: dict[str, Any]) -> None:
    if "drafter" in options:
        options = options | {"drafter": Oracle([], lambda text, turn: 0)}
    make: Any = Engine
    with pytest.raises(ConfigError, match="expected"):
        make(model, **({"rows": 1, "capacity": 4} | options))


def test_a_request_is_forgotten_wherever_it_stands(model: Stack) -> None:
    """In the queue, while its prompt is read, and while it decodes; its slot serves the next one."""
    expected = plain(model, PROMPTS, 9)
    engine = Engine(model, rows=2, capacity=32, chunk=3)
    for prompt in (PROMPTS[0], PROMPTS[2], PROMPTS[1], PROMPTS[3], PROMPTS[2]):
        engine.submit(Request(prompt, Limits(9, end_tokens=[])))
    first = engine.step()
    assert {piece.row for piece in first} == {0}
    assert engine.live == 2
    assert [engine.cancel(row) for row in (0, 1, 2)] == [True] * 3
    assert (engine.live, engine.busy) == (0, True)
    got = drain(engine)
    assert set(got) == {3, 4}
    assert (tokens(got[3]), tokens(got[4])) == (expected[3], expected[2])
    assert not any(engine.cancel(row) for row in (0, 1, 2, 3, 4, 5, -1))


@pytest.mark.parametrize(("mixer", "rounds"), [*((mixer, 2) for mixer in MIXERS), ("attention", 1)])
def test_a_row_that_is_paused_again_and_again_goes_on_where_it_stood(mixer: str, rounds: int) -> None:
    """While its prompt is read and while it decodes; noise, penalties and the number of tokens left go with it."""
    model = build(MIXERS[mixer])
    settings = [SamplingConfig(temperature=0.8, presence_penalty=1.0 * (i != 1), seed=i) for i in range(4)]
    limits = Limits(11, end_tokens=[])
    expected = [
        generate(model, [p], limits=limits, sampling=[s])[0].tokens for p, s in zip(PROMPTS, settings, strict=True)
    ]
    # The one without a penalty comes first, so that counts are made room for while it waits.
    engine = Engine(model, rows=2, capacity=32, chunk=4, rounds=rounds)
    order = [1, 2, 0, 3]
    for i in order:
        engine.submit(Request(PROMPTS[i], limits, settings[i]))
    assert not engine.pause(0)

    def pause(step: int) -> None:
        if step % 2 == 1:
            engine.pause(step // 2 % 4)

    got = drain(engine, pause)
    assert [tokens(got[row]) for row in range(4)] == [expected[i] for i in order]
    assert not engine.pause(0)


def test_a_paused_row_waits_first_in_the_queue_and_can_be_cancelled(model: Stack) -> None:
    engine = Engine(model, rows=1, capacity=16)
    for _ in range(3):
        engine.submit(Request([1, 2], Limits(3, end_tokens=[])))
    engine.step()
    assert engine.pause(0)
    assert not engine.pause(0)
    assert engine.live == 0
    assert {piece.row for piece in engine.step()} == {0}
    assert engine.pause(0)
    assert engine.cancel(0)
    assert set(drain(engine)) == {1, 2}


def test_several_rounds_between_two_looks_give_their_tokens_at_once(model: Stack) -> None:
    engine = Engine(model, rows=3, capacity=32, rounds=4)
    for prompt, n in zip(PROMPTS, (9, 4, 2), strict=False):
        engine.submit(Request(prompt, Limits(n, end_tokens=[])))
    counts: list[list[int]] = []
    while engine.busy:
        pieces = engine.step()
        counts.append([sum(piece.row == row for piece in pieces) for row in range(3)])
    assert counts == [[4, 4, 2], [4, 0, 0], [1, 0, 0]]
    assert [look.tokens for look in engine.looks] == [10, 4, 1]
    assert [look.rows for look in engine.looks] == [3, 1, 1]


def test_penalties_of_a_newcomer_do_not_touch_a_row_under_way(model: Stack) -> None:
    """Room for counts is made while the first row decodes with noise of its own."""
    sampling = SamplingConfig(temperature=1.0, seed=3)
    limits = Limits(10, end_tokens=[])
    penalised = SamplingConfig(temperature=1.0, repetition_penalty=1.8, frequency_penalty=0.5, seed=4)
    expected = [generate(model, [[5]], limits=limits, sampling=[s])[0].tokens for s in (sampling, penalised)]
    engine = Engine(model, rows=2, capacity=16)
    engine.submit(Request([5], limits, sampling))
    got = engine.step() + engine.step()
    engine.submit(Request([5], limits, penalised))
    rest = drain(engine)
    assert tokens(got) + tokens(rest[0]) == expected[0]
    assert tokens(rest[1]) == expected[1]


def test_a_row_that_was_paused_before_counts_had_room_goes_on_with_its_own_noise(model: Stack) -> None:
    """It comes back together with the first row that has a penalty."""
    limits = Limits(10, end_tokens=[])
    settings = [SamplingConfig(temperature=1.0, seed=3), SamplingConfig(temperature=1.0, presence_penalty=2.0, seed=4)]
    expected = [generate(model, [[5]], limits=limits, sampling=[s])[0].tokens for s in settings]
    engine = Engine(model, rows=2, capacity=16)
    engine.submit(Request([5], limits, settings[0]))
    got = engine.step() + engine.step()
    assert engine.pause(0)
    engine.submit(Request([5], limits, settings[1]))
    rest = drain(engine)
    assert tokens(got) + tokens(rest[0]) == expected[0]
    assert tokens(rest[1]) == expected[1]


def test_end_tokens_of_a_newcomer_do_not_touch_a_row_under_way(model: Stack) -> None:
    (free,) = plain(model, [[5]], 10)
    engine = Engine(model, rows=2, capacity=16)
    engine.submit(Request([5], Limits(10, end_tokens=[free[6]])))
    got = engine.step()
    engine.submit(Request([5], Limits(10, end_tokens=sorted({*range(V)} - {*free[:4]}))))
    rest = drain(engine)
    assert tokens(got) + tokens(rest[0]) == free[: free.index(free[6]) + 1]
    assert tokens(rest[1]) == free[: len(rest[1])]
    assert rest[1][-1].finish == "end"
    assert free[len(rest[1]) - 1] not in free[:4]


def test_the_state_is_allocated_once_and_its_bytes_are_told(model: Stack) -> None:
    engine = Engine(model, rows=3, capacity=32)
    before = engine.nbytes
    assert before == model.init_state(3, 32, device="meta").nbytes
    engine.submit(Request([1, 2, 3], Limits(5)))
    drain(engine)
    assert engine.nbytes == before
    assert not engine.captured


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_end_token_comes_before_so_many_others(model: Stack, temperature: float) -> None:
    """Against a loop that forbids the end tokens by hand, with guesses and without, beside a row that may end."""
    sampling, n, least = SamplingConfig(temperature=temperature, seed=5), 12, 7
    free = generate(model, PROMPTS[:1], limits=Limits(n, end_tokens=[]), sampling=sampling)[0].tokens
    ends = [free[1], free[3], V + 5]
    biased = replace(sampling, logit_bias={token: -math.inf for token in ends if token < V})
    # Noise is a function of seed and step, so a text that is begun with a bias goes on without it.
    held = generate(model, PROMPTS[:1], limits=Limits(least, end_tokens=[]), sampling=biased)[0].tokens
    limits = Limits(n, end_tokens=ends, min_new_tokens=least)
    other = generate(model, PROMPTS[1:2], limits=Limits(n, end_tokens=ends), sampling=sampling)[0].tokens
    for drafter in (None, CopySpec((2, 1))):
        engine = Engine(model, rows=2, capacity=32, drafter=drafter, rounds=2)
        engine.submit(Request(PROMPTS[0], limits, sampling))
        engine.submit(Request(PROMPTS[1], Limits(n, end_tokens=ends), sampling))
        got = {row: tokens(pieces) for row, pieces in drain(engine).items()}
        assert got[0][:least] == held
        assert not set(got[0][:least]) & set(ends)
        assert len(got[0]) == n or got[0][-1] in ends
        assert got[1] == other


@pytest.mark.parametrize("least", [-1, 9])
def test_a_least_number_beyond_the_most_is_refused(model: Stack, least: int) -> None:
    engine = Engine(model, rows=1, capacity=16)
    with pytest.raises(ConfigError, match="^min_new_tokens: expected 0 to max_new_tokens=8"):
        engine.submit(Request([1], Limits(8, min_new_tokens=least)))


def test_a_row_that_is_put_aside_waits_until_it_is_resumed(model: Stack) -> None:
    engine = Engine(model, rows=1, capacity=64)
    first = engine.submit(Request(PROMPTS[0], Limits(12, end_tokens=[])))
    got = {first: engine.step()}
    assert engine.pause(first, aside=True) and not engine.busy and engine.aside_nbytes > 0
    assert not engine.pause(first, aside=True)
    second = engine.submit(Request(PROMPTS[1], Limits(6, end_tokens=[])))
    got |= drain(engine)
    assert engine.resume(first) and not engine.resume(first) and engine.aside_nbytes == 0
    got[first] = got[first] + drain(engine)[first]
    expected = [plain(model, [PROMPTS[0]], 12)[0], plain(model, [PROMPTS[1]], 6)[0]]
    assert [tokens(got[first]), tokens(got[second])] == expected


def test_a_row_that_is_put_aside_can_be_cancelled(model: Stack) -> None:
    engine = Engine(model, rows=1, capacity=64)
    row = engine.submit(Request(PROMPTS[0], Limits(12, end_tokens=[])))
    engine.step()
    engine.pause(row, aside=True)
    assert engine.cancel(row) and engine.aside_nbytes == 0 and not engine.cancel(row) and not engine.resume(row)


def test_a_known_beginning_is_told(model: Stack) -> None:
    told: list[tuple[int, int]] = []
    engine = Engine(
        model, rows=1, capacity=64, prefixes=PrefixCache(2**20, block=4), on_prefix=lambda *what: told.append(what)
    )
    rows = [engine.submit(Request(PROMPTS[2], Limits(2, end_tokens=[]))) for _ in range(2)]
    drain(engine)
    assert told == [(rows[1], 8)]
