"""What is particular to several chains of guesses: what tree is drawn, and that the right chain goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from subquad.core.errors import ConfigError
from subquad.decode.copyspec import CopySpec
from subquad.decode.draft_model import DraftModel
from subquad.decode.spectr import SpecTr
from subquad.engine.draft import Draft, Drafter, InTurn, parse_drafter
from subquad.engine.engine import Engine
from subquad.engine.generate import Generation, Limits, generate
from subquad.engine.history import History
from subquad.engine.request import Request
from subquad.engine.sampler import Sampler, SamplingConfig
from subquad.engine.trace import Look
from subquad.models.stack import Stack

from .conftest import V, named

Models = Callable[[str], Stack]


def tree(drafter: Drafter, model: Stack, prompts: list[list[int]], k: int, sampler: Sampler) -> Draft:
    rows = len(prompts)
    drafter.open(model, rows, 30)
    drafter.put(range(rows), prompts)
    drafter.prepare(rows, k)
    return drafter.propose(rows, k, sampler, History.start([[0]] * rows, 0))


def looked(model: Stack, prompts: list[list[int]], drafter: Drafter, **options: Any) -> tuple[list[Generation], Look]:
    """What came, and all looks as one."""
    looks: list[Look] = []
    got = generate(model, prompts, drafter=drafter, on_look=looks.append, **options)
    sums = {f.name: sum(getattr(look, f.name) for look in looks) for f in dataclasses.fields(Look)}
    return got, Look(**sums)


@pytest.mark.parametrize("branch", [(4,), (2, 2), (3, 2, 1)])
@pytest.mark.parametrize("mixer", ["attention", "mamba2", "gla", "parallel"])
def test_a_model_that_guesses_for_itself_is_always_right(
    mixer: str, branch: tuple[int, ...], models: Models, prompts: list[list[int]]
) -> None:
    """Sampled too: target and draft distributions are the same, so that every depth has a guess that stands."""
    model, limits = models(mixer), Limits(max_new_tokens=15, end_tokens=[])
    for temperature in (0.0, 1.0):
        options = {"limits": limits, "sampling": SamplingConfig(temperature=temperature, seed=3), "draft_tokens": 4}
        got, sums = looked(model, prompts, SpecTr(model, branch), **options)
        assert (sums.kept, sums.rounds) == (sums.guessed, 3)  # five tokens a round
        if not temperature:
            assert got == generate(model, prompts, limits=limits)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_more_stands_than_of_one_chain(temperature: float, models: Models, prompts: list[list[int]]) -> None:
    """Of all guesses whose turn came; greedy rows guess the likeliest tokens, no two alike."""
    model, small, limits = models("gla"), models("mamba2"), Limits(max_new_tokens=60, end_tokens=[])
    many = [[*prompt, i] for prompt in prompts for i in range(8)]
    options = {"limits": limits, "sampling": SamplingConfig(temperature=temperature), "draft_tokens": 3}
    _, one = looked(model, many, DraftModel(small), **options)
    _, several = looked(model, many, SpecTr(small, (4, 2)), **options)
    assert several.kept / several.judged > one.kept / one.judged + 0.1


def test_coupled_draws_are_those_of_plain_decoding(models: Models, prompts: list[list[int]]) -> None:
    sampling, limits = SamplingConfig(temperature=1.0, top_p=0.95, seed=5), Limits(max_new_tokens=20, end_tokens=[4])
    options: dict[str, Any] = {"limits": limits, "sampling": sampling}
    drafter = SpecTr(models("mamba2"), (3, 2), coupled=True)
    expected = generate(models("gla"), prompts, **options)
    assert generate(models("gla"), prompts, drafter=drafter, draft_tokens=3, **options) == expected


def test_the_tree_is_what_was_asked_for(models: Models, prompts: list[list[int]]) -> None:
    """Chains share what they should and nothing else; the first greedy one is that of a single chain."""
    model, small = models("attention"), models("gla")
    draft = tree(SpecTr(small, (3, 2)), model, prompts, 4, Sampler([SamplingConfig()] * 4))
    assert (draft.branches, draft.chains, draft.q_bkv) == ((3, 2, 1, 1), 6, None)
    tokens_bck = draft.tokens_bk.unflatten(0, (4, 6))
    alone = tree(DraftModel(small), model, prompts, 4, Sampler([SamplingConfig()] * 4))
    assert torch.equal(tokens_bck[:, 0], alone.tokens_bk)
    for tokens_ck in tokens_bck.tolist():
        firsts = [chain[0] for chain in tokens_ck]
        assert firsts[::2] == firsts[1::2] and len(set(firsts)) == 3
        assert all(a[1] != b[1] for a, b in zip(tokens_ck[::2], tokens_ck[1::2], strict=True))
    assert tree(SpecTr(small, (3, 2)), model, prompts, 1, Sampler([SamplingConfig()] * 4)).tokens_bk.shape == (12, 1)


def test_siblings_are_drawn_independently_from_one_distribution(models: Models) -> None:
    """Pairs of first guesses of 20,000 rows against the product of q with itself: a chi-square test."""
    model, rows = models("attention").float(), 20_000
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    sampler = Sampler([SamplingConfig(temperature=1.0, top_k=4, seed=i) for i in range(rows)])
    draft = tree(SpecTr(model, (2, 1)), model, [[4, 9, 4]] * rows, 2, sampler)
    assert draft.q_bkv is not None
    q_v = draft.q_bkv[0, 0].double()
    first_bc = draft.tokens_bk.view(rows, 2, 2)[..., 0]
    count_x = torch.bincount(first_bc[:, 0] * V + first_bc[:, 1], minlength=V * V).double()
    p_x = (q_v[:, None] * q_v).flatten()
    there_x = p_x > 0
    chi2 = float(((count_x - p_x * rows) ** 2 / (p_x * rows))[there_x].sum())
    assert int(there_x.sum()) == 16 and count_x[~there_x].sum() == 0
    assert chi2 < 16 + 5 * 32**0.5
    # Behind unlike guesses the second ones come from other distributions, each that of its own chain.
    unlike_b = first_bc[:, 0] != first_bc[:, 1]
    q_bcv = draft.q_bkv.unflatten(0, (rows, 2))[:, :, 1]
    assert (q_bcv[:, 0] - q_bcv[:, 1]).abs().amax(-1)[unlike_b].min() > 1e-3
    torch.testing.assert_close(q_bcv[:, 0][~unlike_b], q_bcv[:, 1][~unlike_b], rtol=1e-4, atol=1e-6)


class Watched(SpecTr):
    """Checks that what it is told of the stream belongs to the tokens it is told."""

    def observe(self, tokens_bt: Tensor, n_b: Tensor, hidden_btd: Tensor) -> None:
        kept_bt = torch.arange(tokens_bt.shape[1]) < n_b[:, None]
        assert torch.equal(self.target.head(hidden_btd).argmax(-1)[kept_bt], tokens_bt[kept_bt])
        self.most = max(self.most, int(n_b.max()))
        super().observe(tokens_bt, n_b, hidden_btd)

    target: Stack
    most = 0


def test_the_stream_is_that_of_the_chain_that_stood(models: Models, prompts: list[list[int]]) -> None:
    drafter, limits = Watched(models("mamba2"), (3, 2)), Limits(max_new_tokens=20, end_tokens=[])
    drafter.target = models("gla")
    got = generate(drafter.target, prompts, limits=limits, drafter=drafter, draft_tokens=3, logprobs=True)
    plain = generate(drafter.target, prompts, limits=limits, logprobs=True)
    assert drafter.most > 1
    for a, b in zip(got, plain, strict=True):
        assert a.tokens == b.tokens
        assert a.logprobs == pytest.approx(b.logprobs, rel=1e-6)


def test_behind_another_drafter(models: Models) -> None:
    """Copies stand in every chain of the rows that have some."""
    model, limits = models("gla"), Limits(max_new_tokens=20, end_tokens=[])
    prompts = [[3, 4, 5, 6, 3, 4, 5], [1, 2], [7, 7, 7, 7], [9]]
    expected = generate(model, prompts, limits=limits)
    drafter = InTurn([CopySpec((2,)), SpecTr(models("mamba2"), (3,))])
    assert generate(model, prompts, limits=limits, drafter=drafter, draft_tokens=3) == expected
    got = generate(model, prompts, limits=limits, sampling=SamplingConfig(temperature=1.0), drafter=drafter)
    assert [len(g.tokens) for g in got] == [20] * 4


def test_a_round_of_a_tree_is_one_graph(prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the contract, with penalties and a greedy row beside a sampled one, on a state that is written anew."""
    torch.compiler.reset()
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda fn, **options: compiled(fn, backend="aot_eager", **options))
    model, limits = named("gla", layers=1), Limits(max_new_tokens=10, end_tokens=[0])
    sampling = [SamplingConfig(), SamplingConfig(temperature=1.0, repetition_penalty=1.3, seed=4)]
    options: dict[str, Any] = {"drafter": SpecTr(named("mamba2", layers=1), (2, 2)), "draft_tokens": 2}
    expected = generate(model, prompts[:2], limits=limits, sampling=sampling, **options)
    # Each round gives a token at least, so that all rounds are of the same two rows, and compiled once.
    engine = Engine(model, rows=2, capacity=20, compile=True, rounds=10, **options)
    for prompt, config in zip(prompts, sampling, strict=False):
        engine.submit(Request(prompt, limits, config))
    got: list[list[int]] = [[], []]
    while engine.busy:
        for piece in engine.step():
            got[piece.row].append(piece.token)
    assert got == [g.tokens for g in expected]


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["spectr"], "expected model=NAME"),
        (["spectr,model=attention,coupled=maybe"], "coupled=true or false"),
        (["spectr,model=attention,branch=3-2"], "expected branch like 3 or 3\\+2\\+1"),
        (["spectr,model=attention,branch=0+2"], "expected branches of 1 to 23, as many as there are tokens, got"),
        (["spectr,model=attention,branch=24"], "expected branches of 1 to 23, as many as there are tokens, got"),
        (["spectr,model=attention,chains=2"], "unknown option 'chains'"),
        (["spectr,model=attention", "copyspec"], "expected no drafter behind one that always guesses"),
    ],
)
def test_specs_that_mean_nothing(specs: list[str], message: str, models: Models) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_drafter(specs, models)
