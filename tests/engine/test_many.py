"""Many prompts through few rows: each gets what it would get alone."""

import functools
from typing import Any

import pytest
import torch

from subquad.core.errors import ConfigError, DivergenceError
from subquad.core.registry import methods
from subquad.engine.engine import Engine
from subquad.engine.generate import Generation, Limits, generate, generate_many
from subquad.engine.request import Request
from subquad.engine.sampler import SamplingConfig
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack

V = 97
MIXERS = {
    f"{slug}-{name}": {"mixer": slug, **example}
    for slug, card in methods("mixers").items()
    if card.causal and card.splittable
    for name, example in card.examples.items()
}
ATTENTION = {"mixer": "attention", "n_heads": 2, "n_kv_heads": 1, "head_dim": 8}
LENGTHS = (5, 1, 3, 12, 3, 2, 7)


def build(layer: dict[str, Any]) -> Stack:
    bare = {k: v for k, v in layer.items() if k != "d_model"}
    model = Stack(ModelConfig(vocab_size=V, d_model=layer.get("d_model", 32), d_mlp=48, layers=(bare, bare)))
    with torch.no_grad():
        for p in model.parameters():  # far from uniform logits, and no special starts
            p.add_(0.1 * torch.randn_like(p))
    return model.double()


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(V, (n,), generator=generator).tolist() for n in LENGTHS]


LIMITS = Limits(max_new_tokens=11, end_tokens=range(0, V, 12), chunk=4)
SAMPLING = SamplingConfig(temperature=1.0, seed=3)


@functools.cache
def sampled(name: str) -> tuple[Stack, list[Generation]]:
    """A model and what it gives each prompt, worked out once for all numbers of rows."""
    torch.manual_seed(0)
    model = build(MIXERS[name])
    return model, generate(model, prompts(), limits=LIMITS, sampling=SAMPLING)


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize(("rows", "rounds"), [(3, 4), (1, 1), (20, 16)])
def test_a_prompt_gets_what_it_would_get_alone(name: str, rows: int, rounds: int) -> None:
    """Float64 and noise of its own, so that its tokens are the same in any company; some end early, some at once."""
    model, expected = sampled(name)
    got = dict(generate_many(model, prompts(), rows=rows, limits=LIMITS, sampling=SAMPLING, rounds=rounds))
    assert [got[i] for i in range(len(LENGTHS))] == expected
    assert len(got) == len(LENGTHS)
    assert len({len(g.tokens) for g in expected}) > 2


def test_penalties_start_anew_with_each_prompt() -> None:
    model = build(ATTENTION)
    limits = Limits(max_new_tokens=9)
    sampling = SamplingConfig(temperature=0.7, top_k=20, repetition_penalty=1.5, presence_penalty=2.0, seed=5)
    expected = generate(model, prompts(), limits=limits, sampling=sampling)
    assert dict(generate_many(model, prompts(), rows=2, limits=limits, sampling=sampling)) == dict(enumerate(expected))
    without = generate(model, prompts(), limits=limits, sampling=SamplingConfig(temperature=0.7, top_k=20, seed=5))
    assert [g.tokens for g in without] != [g.tokens for g in expected]


def test_answers_come_as_they_end() -> None:
    """A row that is free is filled before the others have ended."""
    model = build(ATTENTION)
    order = [i for i, _ in generate_many(model, prompts(), rows=2, limits=Limits(max_new_tokens=6), rounds=2)]
    assert order == sorted(order)


def test_logits_that_are_not_finite() -> None:
    model = build(ATTENTION)
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(DivergenceError, match="prompt 0: expected finite logits, got NaN or infinity after 0 new"):
        list(generate_many(model, prompts(), rows=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "rows: expected at least 1, got 0"),
        ({"rows": 1, "rounds": 0}, "chunk and rounds of at least 1, got 1, .* and 0"),
        ({"rows": 1, "limits": Limits(stop=["x"])}, "expected a tokenizer"),
    ],
)
def test_what_can_not_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        list(generate_many(build(ATTENTION), prompts(), **options))


def test_prompts_of_other_settings_go_side_by_side() -> None:
    model = build(ATTENTION)
    settings = [
        SamplingConfig(temperature=0.5 * (i % 3), top_k=7 * (i % 2), repetition_penalty=1 + 0.3 * (i == 5), seed=i)
        for i in range(len(LENGTHS))
    ]
    limits = Limits(max_new_tokens=9)
    got = dict(generate_many(model, prompts(), rows=2, limits=limits, sampling=settings, rounds=2))
    for i, (prompt, config) in enumerate(zip(prompts(), settings, strict=True)):
        assert [got[i]] == generate(model, [prompt], limits=limits, sampling=[config])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", MIXERS)
def test_on_a_gpu_a_step_is_one_graph_and_gives_the_same(name: str) -> None:
    model = build(MIXERS[name]).float().cuda()
    limits, sampling = Limits(max_new_tokens=40), SamplingConfig(temperature=1.0, seed=3)
    engine = Engine(model, rows=4, capacity=64)
    for prompt in prompts()[:3]:
        engine.submit(Request(prompt, limits, sampling))
    engine.step()
    assert engine.captured
    expected = generate(model, prompts(), limits=limits, sampling=sampling)
    got = dict(generate_many(model, prompts(), rows=3, limits=limits, sampling=sampling))
    # Other shapes of a batch round otherwise, which in float32 turns a draw once in a long while.
    same = sum(got[i].tokens == expected[i].tokens for i in range(len(LENGTHS)))
    assert same >= len(LENGTHS) - 1
