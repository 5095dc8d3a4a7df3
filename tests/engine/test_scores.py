"""Log-probabilities of the likeliest tokens: those of a loop by hand, plainly and through guesses, for who asks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from subquad.core.errors import ConfigError
from subquad.decode.copyspec import CopySpec
from subquad.engine.draft import Drafter
from subquad.engine.engine import Engine
from subquad.engine.request import Limits, Piece, Request
from subquad.engine.sampler import SamplingConfig
from subquad.models.stack import Stack

from .conftest import MIXERS, PROMPTS, Oracle, V, build, drain, plain, tokens

N = 9
ASKED = [5, None, 0, 20]


def by_hand(model: Stack, prompt: Sequence[int], drawn: Sequence[int], k: int) -> list[list[tuple[int, float]]]:
    """The `k` likeliest tokens behind each beginning, which is read anew for each."""
    found: list[list[tuple[int, float]]] = []
    for i in range(len(drawn)):
        scores_v = model(torch.tensor([[*prompt, *drawn[:i]]]))[0, -1].log_softmax(-1)
        order = sorted(range(V), key=lambda token, scores_v=scores_v: -float(scores_v[token]))
        found.append([(token, float(scores_v[token])) for token in order[:k]])
    return found


def check(model: Stack, prompt: Sequence[int], pieces: Sequence[Piece], k: int | None) -> None:
    drawn = tokens(pieces)
    if k is None:
        assert all(math.isnan(piece.logprob) and piece.top == () for piece in pieces)
        return
    for piece, every in zip(pieces, by_hand(model, prompt, drawn, V), strict=True):
        assert [token for token, _ in piece.top] == [token for token, _ in every[:k]]
        assert [score for _, score in piece.top] == pytest.approx([score for _, score in every[:k]], abs=2e-5)
        assert piece.logprob == pytest.approx(dict(every)[piece.token], abs=2e-5)


def right(text: int, turn: int) -> int:
    return (text + turn) % 4


def oracle(model: Stack) -> Drafter:
    continued = plain(model, PROMPTS, N)
    return Oracle([p + e for p, e in zip(PROMPTS, continued, strict=True)], right)


@pytest.mark.parametrize("mixer", ["attention", "mamba2"])
@pytest.mark.parametrize("make", [lambda model: None, oracle], ids=["plain", "guesses"])
@pytest.mark.parametrize("rounds", [1, 4])
def test_the_likeliest_are_those_of_a_loop_by_hand(
    mixer: str, make: Callable[[Stack], Drafter | None], rounds: int
) -> None:
    model = build(MIXERS[mixer])
    drafter = make(model)
    engine = Engine(model, rows=2, capacity=32, drafter=drafter, draft_tokens=drafter and 3, rounds=rounds)
    for prompt, k in zip(PROMPTS, ASKED, strict=True):
        engine.submit(Request(prompt, Limits(N, end_tokens=[]), logprobs=k))
    got = drain(engine)
    for row, (prompt, k) in enumerate(zip(PROMPTS, ASKED, strict=True)):
        assert len(got[row]) == N
        check(model, prompt, got[row], k)
    if drafter is not None:
        assert sum(look.kept for look in engine.looks) > 0


def test_they_are_the_models_own_whatever_is_sampled_and_barred(model: Stack) -> None:
    sampling = SamplingConfig(temperature=1.3, top_k=9, presence_penalty=1.0, logit_bias={3: 5.0}, seed=4)
    engine = Engine(model, rows=1, capacity=40, drafter=CopySpec((1,)), draft_tokens=3)
    engine.submit(Request([1, 2, 1, 2], Limits(20, end_tokens=[7], min_new_tokens=20), sampling, logprobs=4))
    got = drain(engine)[0]
    assert len(got) == 20
    check(model, [1, 2, 1, 2], got, 4)


def test_a_paused_row_goes_on_with_them(model: Stack) -> None:
    engine = Engine(model, rows=1, capacity=32)
    first = engine.submit(Request(PROMPTS[0], Limits(N, end_tokens=[]), logprobs=3))
    engine.submit(Request(PROMPTS[1], Limits(N, end_tokens=[])))
    got = drain(engine, lambda step: engine.pause(first, aside=True) and None if step == 3 else _resume(engine, step))
    check(model, PROMPTS[0], got[0], 3)
    check(model, PROMPTS[1], got[1], None)


def _resume(engine: Engine, step: int) -> None:
    if step == 6:
        engine.resume(0)


def test_nothing_is_made_or_done_before_someone_asks(model: Stack) -> None:
    engine = Engine(model, rows=2, capacity=32)
    scores = engine._rounds.scores
    engine.submit(Request([1], Limits(4, end_tokens=[])))
    drain(engine)
    assert scores._own_bn is None and scores._token_bnk is None
    engine.submit(Request([1], Limits(4, end_tokens=[]), logprobs=0))
    drain(engine)
    assert scores._own_bn is not None and scores._token_bnk is None
    engine.submit(Request([1], Limits(4, end_tokens=[]), logprobs=1))
    drain(engine)
    assert scores._token_bnk is not None and scores.level is None
    # Whoever does not ask has the very operations done that are done where nobody ever has.
    launched = [Launched(), Launched(), Launched()]
    for some, other, k in zip(
        launched, (engine, Engine(model, rows=2, capacity=32), engine), (None, None, 1), strict=True
    ):
        other.submit(Request([1], Limits(4, end_tokens=[]), logprobs=k))
        with some:
            drain(other)
    assert launched[0].names == launched[1].names
    assert len(launched[2].names) > len(launched[0].names)


class Launched(TorchDispatchMode):
    """Notes the names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("k", [-1, 21])
def test_more_than_there_is_room_for_is_refused(model: Stack, k: int) -> None:
    with pytest.raises(ConfigError, match="expected 0 to 20"):
        Engine(model, rows=1, capacity=8).submit(Request([1], Limits(2), logprobs=k))
