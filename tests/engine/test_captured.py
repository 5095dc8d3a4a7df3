"""Rounds that are recorded once and replayed: what a GPU's graphs do, on the CPU, against rounds launched anew."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from subquad.decode.copyspec import CopySpec
from subquad.decode.draft_head import DraftHead
from subquad.decode.draft_model import DraftModel
from subquad.engine.draft import Drafter
from subquad.engine.engine import Engine
from subquad.engine.prefix import PrefixCache
from subquad.engine.reader import Reader
from subquad.engine.request import Limits, Request
from subquad.engine.sampler import SamplingConfig
from subquad.models.stack import Stack

from .conftest import MIXERS, PROMPTS, build, drain, plain


class Recorded:
    """Operations with the tensors that they read and wrote; a replay runs them on the same memory, and no Python."""

    def __init__(self) -> None:
        self.operations: list[tuple[Any, Sequence[Any], Mapping[str, Any], Any]] = []
        self.ran = False

    def pool(self) -> None:
        """As of a graph: whose memory another one may use."""

    def replay(self) -> None:
        """A capture runs nothing, a recording does: so its first replay is done already."""
        if not self.ran:
            self.ran = True
            return
        for operation, args, kwargs, before in self.operations:
            after = operation(*args, **kwargs)
            for old, new in zip(tree_leaves(before), tree_leaves(after), strict=True):
                # A view, or what was written in place, is there already.
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Recorder(TorchDispatchMode):
    """Notes all operations, and refuses those that no capture allows: an answer from the device, or a host's tensor."""

    def __init__(self, graph: Recorded) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "asks the device inside a capture"
        assert "lift_fresh" not in str(func), "brings a tensor from the host inside a capture"
        out = func(*args, **(kwargs or {}))
        self.graph.operations.append((func, args, kwargs or {}, out))
        return out


@contextmanager
def record(graph: Recorded, pool: Any = None) -> Generator[None]:
    with Recorder(graph):
        yield


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph", record)


def engine_for(model: Stack, drafter: Drafter | None, *, captures: bool) -> Engine:
    engine = Engine(model, rows=4, capacity=48, drafter=drafter, most_drafted=2, rounds=3, logprobs=True)
    engine._rounds.graphs.captures, engine._rounds.static = captures, True
    engine._prompts.reader.graphs.captures = captures
    return engine


def answers(engine: Engine, requests: Sequence[Request]) -> list[list[tuple[int, str | None, float]]]:
    """Of requests that come one after the other, while others are under way."""
    waiting, got = list(requests), dict[int, list[Any]]()
    # Of fixed numbers of guesses, so that both engines draw the same whatever rounds cost.
    turns = iter(range(10_000))
    if engine.drafter is not None:
        engine.pace.choose = lambda slots=1: (0, 2, 1)[next(turns) // 4 % 3]
    while waiting or engine.busy:
        if waiting:
            engine.submit(waiting.pop(0))
        for piece in engine.step():
            got.setdefault(piece.row, []).append((piece.token, piece.finish, round(piece.logprob, 9)))
    return [got[i] for i in range(len(requests))]


SETTINGS = [
    SamplingConfig(),
    SamplingConfig(temperature=1.0, seed=3),
    SamplingConfig(temperature=0.8, top_k=5, seed=4),
    SamplingConfig(repetition_penalty=1.3),
    SamplingConfig(temperature=1.0, bad_words_ids=[[4, 5], [7]], seed=5),
    SamplingConfig(no_repeat_ngram_size=2),
    SamplingConfig(logit_bias={3: 2.0}),
    SamplingConfig(bad_words_ids=[[9]]),
]


@pytest.mark.usefixtures("recorded")
def test_rounds_read_guesses_where_there_are_some_and_end_with_their_rows() -> None:
    model, prompts, n = build(MIXERS["attention"]), [[5, 6, 5, 6, 5], [1, 2, 3, 4]], 21
    expected = plain(model, prompts, n)
    engine = Engine(model, rows=1, capacity=48, drafter=CopySpec((2,)), draft_tokens=3, rounds=8)
    engine._rounds.graphs.captures = engine._rounds.static = True
    engine.warm(Request(prompts[0], Limits(n, end_tokens=[])))
    made = len(engine._rounds.graphs)
    for prompt, tokens in zip(prompts, expected, strict=True):
        engine.submit(Request(prompt, Limits(n, end_tokens=[])))
        got: list[int] = []
        while engine.busy:
            got += [piece.token for piece in engine.step()]
        assert got == tokens
    looks = list(engine.looks)
    read = sum(look.read or 0 for look in looks)
    assert 0 < read < sum(look.rounds for look in looks)
    # Each reads 3 guesses but where fewer tokens are left.
    assert 3 * read - 4 <= sum(look.guessed for look in looks) <= 3 * read
    # No round for nothing, and none that was not made beforehand.
    assert sum(look.tokens for look in looks) == sum(look.rounds for look in looks) + sum(look.kept for look in looks)
    assert len(engine._rounds.graphs) == made
    assert all(look.steady for look in looks)


def test_the_last_look_comes_when_the_last_token_is_likely_there() -> None:
    """Two rows of 21 and 5 tokens: no round runs for nobody, but where guesses stood that were not counted on."""
    model = build(MIXERS["attention"])
    for drafter, most in ((None, 0), (DraftHead(4), 3)):
        engine = Engine(model, rows=2, capacity=48, drafter=drafter, rounds=8)
        if drafter is not None:
            engine.warm(Request(PROMPTS[0], Limits(3, end_tokens=[])))
        for prompt, n in zip(PROMPTS, (21, 5), strict=False):
            engine.submit(Request(prompt, Limits(n, end_tokens=[])))
        while engine.busy:
            engine.step()
        looks = list(engine.looks)
        assert sum(look.tokens for look in looks) == 26
        if not most:
            assert [look.rounds for look in looks] == [8, 8, 5]
        # No turn behind the first is longer than its slots' tokens that are left can make it.
        left = 21
        for look in looks:
            assert look.rounds <= min(8, left)
            left -= look.tokens if look.rows == 1 else look.rounds


def test_short_requests_tell_what_rounds_cost() -> None:
    """Of a short turn the look is a large part, but where nothing else has told it counts."""
    model = build(MIXERS["attention"])
    for limit, some in ((2, {0}), (7, {0, 1}), (16, {0, 1})):
        engine = Engine(model, rows=1, capacity=48, drafter=DraftHead(4), rounds=8)
        for _ in range(12):
            engine.submit(Request(PROMPTS[0], Limits(limit, end_tokens=[])))
        while engine.busy:
            engine.step()
        assert some <= set(engine.pace.costs(1)), limit


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("drafter", ["none", "copyspec", "draft_head", "draft_model"])
def test_replayed_rounds_give_what_rounds_launched_anew_give(drafter: str) -> None:
    """Settings that come and go, ends of unlike numbers, and least lengths: each combination is a graph of its own."""
    model = build(MIXERS["attention"])
    small = build(MIXERS["mamba2"])
    make = {
        "none": lambda: None,
        "copyspec": CopySpec,
        "draft_head": lambda: DraftHead(4),
        "draft_model": lambda: DraftModel(small),
    }[drafter]
    requests = [
        Request(
            PROMPTS[i % 4],
            Limits(6 + i % 5, end_tokens=list(range(i % 3)), min_new_tokens=i % 4 and 2),
            SETTINGS[i % 8],
        )
        for i in range(24)
    ]
    replayed, anew = (engine_for(model, make(), captures=captures) for captures in (True, False))
    assert answers(replayed, requests) == answers(anew, requests)
    assert replayed.captured
    assert len(replayed._prompts.reader.graphs) > 0
    assert not anew.captured


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("name", MIXERS)
def test_prompts_read_as_graphs_of_few_shapes_give_the_same(name: str) -> None:
    """Pieces of unlike lengths, some with a beginning that is kept, are put together to shapes that come again."""
    model, beginning = build(MIXERS[name]), [3, 1, 4, 1, 5, 9, 2, 6] * 2
    prompts = [[*(beginning if i % 3 else []), *range(1, 2 + i % 4)] for i in range(16)]
    got: list[Any] = []
    for captures in (True, False):
        engine = Engine(model, rows=5, capacity=48, chunk=20, prefixes=PrefixCache(1 << 24, block=8))
        engine._prompts.reader._most_kept = 2
        engine._prompts.reader.graphs.captures = engine._rounds.changes.captures = captures
        for prompt in prompts:
            engine.submit(Request(prompt, Limits(4, end_tokens=[])))
        got.append({row: [piece.token for piece in pieces] for row, pieces in drain(engine).items()})
        assert (len(engine._prompts.reader.graphs) > 1) == captures
        assert engine.prefixes is not None
        assert engine.prefixes.hits > 0
    assert got[0] == got[1]


def test_reads_are_put_together_to_powers_of_two_of_like_lengths() -> None:
    model = build(MIXERS["attention"])
    reader = Reader(model, model.init_state(33, 8), 8, streams=False)
    assert reader.parts([3, 9, 2], [0, 0, 0]) == [[1, 0, 2]]
    # Those of whom a state is kept come together, as many as there are buffers for.
    assert reader.parts([3, 9, 2, 5, 7, 8, 1], [1, 0, 2, 3, 3, 3, 0]) == [[5, 4, 3, 0], [2], [1, 6]]
    reader.graphs.captures = True
    assert reader.parts([3, 9, 2], [0] * 3) == [[1, 0], [2]]
    assert reader.parts([3, 9, 2], [2, 0, 1]) == [[0, 2], [1]]
    assert reader.parts([5000, 1], [0] * 2) == [[0], [1]]
    assert list(map(len, reader.parts([1000] * 11, [0] * 11))) == [4, 4, 2, 1]


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("drafter", ["none", "copyspec"])
def test_replayed_rounds_note_the_likeliest_tokens_while_someone_asks(drafter: str) -> None:
    model, asked = build(MIXERS["attention"]), [None, 3, 0, None, 20, None]
    requests = [
        Request(PROMPTS[i % 4], Limits(5 + i % 4, end_tokens=[]), SETTINGS[i % 3], logprobs=asked[i % 6])
        for i in range(18)
    ]
    tops: list[list[Any]] = []
    for captures in (True, False):
        engine = engine_for(model, CopySpec() if drafter == "copyspec" else None, captures=captures)
        engine.logprobs = False
        got: list[Any] = []
        step = engine.step
        engine.step = lambda step=step, got=got: got.extend(kept := step()) or kept
        drawn = answers(engine, requests)
        tops.append([(piece.row, piece.token, [(t, round(p, 9)) for t, p in piece.top]) for piece in got])
        for row, k in enumerate(asked * 3):
            assert {len(piece.top) for piece in got if piece.row == row} == {k or 0}
            assert all(math.isnan(score) == (k is None) for _, _, score in drawn[row])
        assert engine.captured == captures
    assert tops[0] == tops[1]


@pytest.mark.usefixtures("recorded")
def test_bad_words_of_one_token_and_of_two_are_other_rounds() -> None:
    """The second request is verified at once, in the room that the first has made; the third must go token by token."""
    model, prompt = build(MIXERS["attention"]), [1, 2, 3] * 4
    (free,) = plain(model, [prompt], 30)
    engine = Engine(model, rows=1, capacity=60, drafter=CopySpec((1,)), draft_tokens=3, rounds=1)
    engine._rounds.graphs.captures = engine._rounds.static = True
    got: list[int] = []
    for words, n in (([[21, 22]], 1), ([[28]], 40), ([free[-3:-1]], 40)):
        engine.submit(Request(prompt, Limits(n, end_tokens=[]), SamplingConfig(bad_words_ids=words)))
        got = [piece.token for pieces in drain(engine).values() for piece in pieces]
    assert free[-3:-1] in [free[i : i + 2] for i in range(len(free))]
    assert free[-3:-1] not in [got[i : i + 2] for i in range(len(got))]
