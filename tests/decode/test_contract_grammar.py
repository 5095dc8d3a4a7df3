"""Every drafter under a grammar: the tokens, or their distribution, are those of constrained decoding without it."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from subquad.core.registry import load, methods
from subquad.engine.draft import Drafter
from subquad.engine.engine import Engine
from subquad.engine.generate import Generation, Limits, generate
from subquad.engine.history import History
from subquad.engine.masks import Masks, Rule
from subquad.engine.relax import Relaxed
from subquad.engine.request import Request
from subquad.engine.sampler import Sampler, SamplingConfig
from subquad.models.stack import Stack

from .conftest import MIXERS, V, build, named

DRAFTERS = [(slug, name) for slug, card in methods("decode").items() for name in card.examples]
# Those whose guesses are certain, or drawn with the row's own noise: all tokens are those of plain decoding.
CERTAIN = [
    (slug, name)
    for slug, name in DRAFTERS
    if not load("decode", slug).always or methods("decode")[slug].examples[name].get("coupled") == "true"
]
STATES, CHOICES = 7, [1, 4, 7, 9, 12, 15, 18, 20]
ENDS = [2, 11]
# State 5 allows a single token.
ALLOWED = [[CHOICES[3]] if s == 5 else sorted(random.Random(s).sample(CHOICES, 4)) for s in range(STATES)]


@dataclasses.dataclass
class Toy:
    """An automaton: each state allows some tokens, one of them a single one; two may end; after `most` tokens all is
    said.
    """

    most: int = 1_000
    state: int = 0
    seen: int = 0

    def start(self) -> Toy:
        return Toy(self.most)

    @property
    def allowed(self) -> list[int]:
        return [] if self.must_end else ALLOWED[self.state]

    @property
    def may_end(self) -> bool:
        return self.must_end or self.state in (0, 3)

    @property
    def must_end(self) -> bool:
        return self.seen >= self.most

    def fill(self, mask_w: NDArray[np.int32]) -> None:
        mask_w[:] = sum(1 << token for token in self.allowed)

    def advance(self, token: int) -> None:
        assert token in self.allowed
        self.state, self.seen = (3 * self.state + token + 1) % STATES, self.seen + 1

    def forced(self) -> Sequence[int]:
        toy, tokens = self.copy(), list[int]()
        while len(toy.allowed) == 1:
            tokens += toy.allowed
            toy.advance(tokens[-1])
        return tokens

    def copy(self) -> Toy:
        return Toy(self.most, self.state, self.seen)


@functools.cache
def built(mixer: str) -> Stack:
    with torch.random.fork_rng():
        return build(MIXERS[mixer])


@pytest.fixture(params=DRAFTERS, ids=[f"{slug}-{name}" for slug, name in DRAFTERS])
def drafter(request: pytest.FixtureRequest, models: Callable[[str], Stack]) -> Drafter:
    slug, name = request.param
    return load("decode", slug).build(methods("decode")[slug].examples[name], models)


def by_hand(model: Stack, prompt: Sequence[int], limits: Limits, config: SamplingConfig, toy: Toy | None) -> list[int]:
    """A loop that forbids what may not come before the sampler sees the logits."""
    sampler, toy = Sampler([config], vocab_size=V), None if toy is None else toy.start()
    history, tokens = History.start([prompt], V, tokens=64), list[int]()
    while len(tokens) < limits.max_new_tokens and not (tokens and tokens[-1] in (limits.end_tokens or ())):
        logits_bv = model(torch.tensor([[*prompt, *tokens]]))[:, -1]
        if toy is not None:
            if toy.must_end:
                break
            may = {*toy.allowed, *(ENDS if toy.may_end else ())}
            logits_bv[0, [t for t in range(V) if t not in may]] = -torch.inf
        token_b = sampler.sample(logits_bv, history)
        history = history.after(token_b)
        tokens.append(int(token_b))
        if toy is not None and tokens[-1] not in ENDS:
            toy.advance(tokens[-1])
    return tokens


# Of rows side by side; the third is free, and the last is cut by its grammar.
SETTINGS = [
    (SamplingConfig(), Toy()),
    (SamplingConfig(repetition_penalty=1.6, no_repeat_ngram_size=3, bad_words_ids=[[4, 9], [12]]), Toy()),
    (SamplingConfig(repetition_penalty=1.3), None),
    (SamplingConfig(), Toy(most=5)),
]
LIMITS = Limits(14, end_tokens=ENDS)


@functools.cache
def expected(mixer: str) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(V, (n,), generator=generator).tolist() for n in (5, 1, 9, 3)]
    return [by_hand(built(mixer), p, LIMITS, *setting) for p, setting in zip(prompts, SETTINGS, strict=True)]


def answers(engine: Engine, requests: Sequence[Request], pauses: Sequence[int] = ()) -> list[list[int]]:
    for request in requests:
        engine.submit(request)
    got: dict[int, list[int]] = {i: [] for i in range(len(requests))}
    steps = 0
    while engine.busy:
        for piece in engine.step():
            got[piece.row].append(piece.token)
        steps += 1
        if steps in pauses and engine.live:
            engine.pause(min(row for row in got if engine._find(row) in engine._slots))
    return list(got.values())


@pytest.mark.parametrize("mixer", ["attention-full", "gated_deltanet-paper"])
def test_greedy_tokens_are_those_of_a_loop_by_hand(mixer: str, drafter: Drafter, prompts: list[list[int]]) -> None:
    """Ruled and free rows side by side, some paused and resumed, ends that are allowed here and there."""
    requests = [Request(p, LIMITS, *s[:1], grammar=s[1]) for p, s in zip(prompts, SETTINGS, strict=True)]
    engine = Engine(built(mixer), rows=3, capacity=24, drafter=drafter, draft_tokens=3)
    got = answers(engine, requests, pauses=(2, 4, 5))
    assert got == expected(mixer)
    assert len(got[3]) == 5
    assert {len(tokens) for tokens in got} != {14}
    if drafter.always:
        assert sum(look.guessed for look in engine.looks) > 0


@pytest.mark.parametrize("drafter", CERTAIN, ids="-".join, indirect=True)
def test_samples_are_those_of_a_loop_by_hand(drafter: Drafter, prompts: list[list[int]]) -> None:
    model = built("attention-full")
    configs = [SamplingConfig(temperature=1.0, seed=7), SamplingConfig(temperature=0.7, top_k=3, seed=8)]
    options: dict[str, Any] = {"limits": LIMITS, "drafter": drafter, "draft_tokens": 3, "grammar": Toy()}
    got = generate(model, prompts[:2], sampling=configs, **options)
    assert [g.tokens for g in got] == [
        by_hand(model, p, LIMITS, c, Toy()) for p, c in zip(prompts, configs, strict=False)
    ]


def test_tokens_are_those_of_a_loop_by_hand_without_a_drafter(prompts: list[list[int]]) -> None:
    """Of all kinds of sampling: what the grammar forbids is gone before any processor."""
    model = built("attention-full")
    kinds: list[dict[str, Any]] = [
        {"top_k": 2},
        {"top_p": 0.5},
        {"min_p": 0.3},
        {"typical_p": 0.4},
        {"eta_cutoff": 0.3, "epsilon_cutoff": 0.2},
        {"logit_bias": {1: 3.0, 2: 1.0}, "presence_penalty": 0.8, "frequency_penalty": 0.5},
    ]
    configs = [SamplingConfig(temperature=0.9, seed=i, **kind) for i, kind in enumerate(kinds)]
    many = [prompts[i % 4] for i in range(len(configs))]
    got = generate(model, many, limits=LIMITS, sampling=configs, grammar=Toy())
    assert [g.tokens for g in got] == [by_hand(model, p, LIMITS, c, Toy()) for p, c in zip(many, configs, strict=True)]


@functools.cache
def exact() -> tuple[Stack, list[int], SamplingConfig, dict[tuple[int, ...], float]]:
    """A model, a prompt, settings, and every text of at most three tokens that the grammar allows, with its chance."""
    prompt, bias_v = [4, 9, 4, 9, 4], torch.full((V,), -torch.inf)
    bias_v[[*CHOICES, ENDS[0]]] = 0
    settings = SamplingConfig(temperature=1.0, logit_bias=dict(enumerate(bias_v.tolist())), seed=11)
    with torch.random.fork_rng():
        model = build(MIXERS["attention-full"]).float()
    done, open_ = dict[tuple[int, ...], float](), [((), 1.0, Toy())]
    for _ in range(3):
        longer: list[tuple[tuple[int, ...], float, Toy]] = []
        for tokens, p, toy in open_:
            logits_v = model(torch.tensor([prompt + list(tokens)]))[0, -1].double()
            may = [*toy.allowed, *(ENDS[:1] if toy.may_end else ())]
            for token, q in zip(may, logits_v[may].softmax(-1).tolist(), strict=True):
                if token in ENDS:
                    done[*tokens, token] = p * q
                    continue
                behind = toy.copy()
                behind.advance(token)
                longer.append(((*tokens, token), p * q, behind))
        open_ = longer
    return model, prompt, settings, {**done, **{tokens: p for tokens, p, _ in open_}}


@pytest.mark.parametrize("drafter", [d for d in DRAFTERS if d not in CERTAIN], ids="-".join, indirect=True)
def test_samples_are_distributed_as_without_guesses(drafter: Drafter) -> None:
    """Of the drafter's guesses about half are forbidden, and leaving those out would show."""
    model, prompt, settings, texts = exact()
    model_of = getattr(drafter, "model", None)
    if model_of is not None:
        model_of.float()
    rows, together, limits = 3_000, 1_500, Limits(max_new_tokens=3, end_tokens=ENDS)
    counts = Counter[tuple[int, ...]]()
    for first in range(0, rows, together):
        sampling = dataclasses.replace(settings, seed=settings.seed + first)
        options: dict[str, Any] = {"limits": limits, "sampling": sampling, "drafter": drafter, "draft_tokens": 2}
        got: list[Generation] = generate(model, [prompt] * together, grammar=Toy(), **options)
        counts.update(tuple(g.tokens) for g in got)
    assert set(counts) <= set(texts)
    assert sum(texts.values()) == pytest.approx(1)
    likely = {tokens: p for tokens, p in texts.items() if p * rows >= 10}
    chi2 = sum((counts[tokens] - p * rows) ** 2 / (p * rows) for tokens, p in likely.items())
    assert len(likely) > 20
    # Five standard deviations of a chi-square of that many degrees of freedom.
    assert chi2 < len(likely) + 5 * (2 * len(likely)) ** 0.5


def test_relaxed_guesses_stay_within_the_grammar(prompts: list[list[int]]) -> None:
    """They change the text, and never to one that the grammar forbids: the matcher asserts it."""
    drafter = load("decode", "gad").build({"window": "6", "guesses": "4"}, built)
    options: dict[str, Any] = {"limits": Limits(30, end_tokens=[]), "drafter": drafter, "draft_tokens": 3}
    got = generate(built("attention-full"), prompts, relaxed=Relaxed(8, 20.0), grammar=Toy(), **options)
    plain = generate(built("attention-full"), prompts, limits=Limits(30, end_tokens=[]), grammar=Toy())
    assert [g.tokens for g in got] != [g.tokens for g in plain]


@pytest.mark.parametrize("slug", ["copyspec", "spectr"])
def test_a_masked_round_is_one_graph_without_a_break(
    slug: str, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.compiler.reset()
    small = functools.partial(named, layers=1)
    drafter = load("decode", slug).build(next(iter(methods("decode")[slug].examples.values())), small)
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda fn, **options: compiled(fn, backend="aot_eager", **options))
    model = build(MIXERS["attention-full"], layers=1)
    engine = Engine(model, rows=1, capacity=24, drafter=drafter, draft_tokens=2, compile=True)
    got = answers(engine, [Request(prompts[0], LIMITS, grammar=Toy())])
    assert got == [by_hand(model, prompts[0], LIMITS, SamplingConfig(), Toy())]


def test_forced_tokens_are_guessed_where_the_drafter_has_nothing_legal() -> None:
    """State 5 forces one token, whatever was guessed; guesses drawn from a q are left as they are, and fall."""
    rule, masks_tw = Rule(Toy(state=5), ENDS, V), np.zeros((4, 1), dtype=np.int32)
    behind = Toy(state=5)
    behind.advance(CHOICES[3])
    legal = next(t for t in behind.allowed)
    assert rule.walk([], masks_tw, forces=True)[:1] == [CHOICES[3]]
    assert rule.walk([0, legal], masks_tw, forces=True)[:1] == [CHOICES[3]]
    assert rule.walk([0, legal], masks_tw, forces=False) == []
    assert rule.walk([CHOICES[3], legal, 0], masks_tw, forces=False) == [CHOICES[3], legal]
    assert rule.walk([CHOICES[3], legal, 0], masks_tw[:2], forces=False) == [CHOICES[3]]


def test_no_buffer_is_made_before_a_rule_and_rules_move_with_their_rows() -> None:
    masks = Masks(4, 3, V, torch.device("cpu"))
    rule = Rule(Toy(), ENDS, V)
    assert not masks.on and not masks._rooms
    masks.put([3], [rule])
    masks.move([3], [0])
    assert masks.rules == [rule, None, None, None] and masks.on
    masks.put([0], [None])
    assert not masks.on
