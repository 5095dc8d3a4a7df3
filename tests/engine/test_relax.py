"""Relaxed guesses: which stand, what that changes, that it is said, and that nothing changes where none is relaxed."""

from __future__ import annotations

import math

import pytest
import torch

from subquad.core.errors import ConfigError
from subquad.decode.copyspec import CopySpec
from subquad.decode.gad import Gad
from subquad.decode.spectr import SpecTr
from subquad.engine.draft import Draft, Drafter, InTurn
from subquad.engine.engine import Engine
from subquad.engine.generate import Generation, Limits, generate
from subquad.engine.history import History
from subquad.engine.relax import Relaxed
from subquad.engine.request import Request
from subquad.engine.sampler import Sampler, SamplingConfig
from subquad.engine.trace import Look
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack

V = 23
PROMPTS = [[4, 9, 4], [7], [1, 2, 3, 5, 8]]
LAYER = {"mixer": "attention", "n_heads": 2, "n_kv_heads": 1, "head_dim": 8, "rotary": {"theta": 1e4, "dim": 8}}


@pytest.fixture
def model() -> Stack:
    torch.manual_seed(3)
    stack = Stack(ModelConfig(V, 32, 48, (LAYER, LAYER)))
    with torch.no_grad():
        for p in stack.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return stack.double().requires_grad_(False)


def run(
    model: Stack, relaxed: Relaxed | None, drafter: Drafter | None = None, **sampling: float
) -> tuple[list[Generation], list[Look]]:
    looks: list[Look] = []
    got = generate(
        model,
        PROMPTS,
        limits=Limits(16, end_tokens=[]),
        sampling=SamplingConfig(**sampling),
        drafter=drafter or Gad(6, guesses=3),
        draft_tokens=3,
        relaxed=relaxed,
        on_look=looks.append,
    )
    return got, looks


def test_a_guess_is_accepted_by_its_rank_and_its_distance() -> None:
    logits_bv = torch.randn(50, 9, generator=torch.Generator().manual_seed(0)).double()
    for beta, tau in ((1, 1.0), (2, 0.5), (3, 1.0), (9, 2.0), (4, 0.0)):
        for guess in range(9):
            got = Relaxed(beta, tau).accepts(logits_bv, torch.full((50,), guess)).tolist()
            for row, accepted in zip(logits_bv.log_softmax(-1).tolist(), got, strict=True):
                rank = sorted(row, reverse=True).index(row[guess])
                assert accepted == (rank < beta and max(row) - row[guess] <= tau)
    for bad in (math.nan, math.inf):
        logits_bv[:, 4] = bad
        assert not Relaxed(9, 5.0).accepts(logits_bv, torch.zeros(50, dtype=torch.int64)).any()
        assert not Relaxed(9, 5.0).accepts(logits_bv, torch.full((50,), 4)).any()


@pytest.mark.parametrize("relaxed", [Relaxed(1, 9.0), Relaxed(9, 0.0)])
def test_where_nothing_is_relaxed_the_tokens_are_those_of_plain_decoding(model: Stack, relaxed: Relaxed) -> None:
    expected = generate(model, PROMPTS, limits=Limits(16, end_tokens=[]))
    got, looks = run(model, relaxed)
    assert got == expected
    assert all(g.exact for g in got) and not any(look.loose for look in looks)


@pytest.mark.parametrize("sampling", [{}, {"repetition_penalty": 1.4, "frequency_penalty": 0.3}, {"top_k": 2}])
def test_what_is_relaxed_is_another_text_and_says_so(model: Stack, sampling: dict[str, float]) -> None:
    """More guesses stand; tokens that are not the likeliest behind their own text are those counted, each allowed."""
    relaxed = Relaxed(beta=6, tau=1.5)
    strict, strict_looks = run(model, None, **sampling)
    got, looks = run(model, relaxed, **sampling)
    assert all(g.exact for g in strict) and not any(g.exact for g in got)
    assert [len(g.tokens) for g in got] == [16] * 3 and [g.tokens for g in got] != [g.tokens for g in strict]
    kept, before = (sum(look.kept for look in some) for some in (looks, strict_looks))
    assert kept > before
    texts = [prompt + g.tokens[:i] for prompt, g in zip(PROMPTS, got, strict=True) for i in range(16)]
    tokens = [token for g in got for token in g.tokens]
    loose = 0
    for i, (text, token) in enumerate(zip(texts, tokens, strict=True)):
        prompt = PROMPTS[i // 16]
        sampler = Sampler([SamplingConfig(**sampling)])
        history = History.start([prompt], V, None, 64)
        for told in text[len(prompt) :]:
            history = history.after(torch.tensor([told]))
        logits_1v = sampler.process(model(torch.tensor([text]))[:, -1], history)
        loose += token != int(logits_1v.argmax())
        assert relaxed.accepts(logits_1v, torch.tensor([token])).all()
    assert 0 < loose == sum(look.loose for look in looks)


def test_the_looser_the_more_stands(model: Stack) -> None:
    shares: list[float] = []
    for relaxed in (None, Relaxed(2, 1.0), Relaxed(8, 4.0), Relaxed(V, 1e9)):
        _, looks = run(model, relaxed)
        shares.append(sum(look.kept for look in looks) / sum(look.judged for look in looks))
    assert shares[0] < shares[-1] == 1 and shares == sorted(shares)


def test_only_greedy_requests_are_relaxed(model: Stack) -> None:
    engine = Engine(model, rows=1, capacity=40, drafter=Gad(6, guesses=3), relaxed=Relaxed())
    assert not engine.exact
    with pytest.raises(ConfigError, match=r"relaxed: expected greedy requests, got temperature 0\.7"):
        engine.submit(Request([1], Limits(4), SamplingConfig(temperature=0.7)))
    assert not engine.busy
    with pytest.raises(ConfigError, match="relaxed: expected a drafter"):
        Engine(model, rows=1, capacity=40, relaxed=Relaxed())


def test_several_chains_are_refused(model: Stack) -> None:
    for drafter in (SpecTr(model, (2,)), InTurn([CopySpec(), SpecTr(model, (1, 2))])):
        with pytest.raises(ConfigError, match="relaxed: expected a drafter of one chain of guesses a row, got several"):
            Engine(model, rows=1, capacity=40, drafter=drafter, relaxed=Relaxed())
    Engine(model, rows=1, capacity=40, drafter=SpecTr(model, (1,)), relaxed=Relaxed())


class Fixed(Gad):
    """Guesses one token, all, one and none of k times in the first slots."""

    def propose(self, rows: int, k: int, sampler: Sampler, history: History) -> Draft:
        return Draft(torch.full((rows, k), 5), torch.tensor([k, 1, 0])[:rows])


def test_only_guesses_that_count_stand(model: Stack) -> None:
    got, _ = run(model, Relaxed(V, 1e9), Fixed(6))
    plain = generate(model, PROMPTS, limits=Limits(16, end_tokens=[]))
    assert got[0].tokens[:3] == [5, 5, 5] and got[0].tokens[4:7] == [5, 5, 5]
    assert got[1].tokens[0::2] == [5] * 8
    # Then the first row has ended, and the last one moves into a slot of guesses.
    assert got[2].tokens[:4] == plain[2].tokens[:4]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("beta=5,tau=3", Relaxed(5, 3.0)), ("tau=0.5", Relaxed(3, 0.5)), ("beta=2", Relaxed(2, 1.0))],
)
def test_a_rule_is_read(text: str, expected: Relaxed) -> None:
    assert Relaxed.parse(text) == expected


@pytest.mark.parametrize(
    "text", ["", "beta", "beta=x", "beta=2.5", "beta=0", "tau=-1", "tau=nan", "tau=inf", "gamma=1", "beta=2,beta=3"]
)
def test_what_is_no_rule_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="relaxed: expected"):
        Relaxed.parse(text)
