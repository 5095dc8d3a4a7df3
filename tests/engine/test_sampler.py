"""Processors equal those of transformers, and a row's samples depend on its own seed only."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from subquad.core.errors import ConfigError
from subquad.engine.history import History
from subquad.engine.sampler import Sampler, SamplingConfig
from subquad.ops.draw import gumbel

V = 61
PROMPTS = [[1, 2, 3, 3], [60], [7, 7, 8, 9, 10, 11]]


def logits(rows: int = 3, seed: int = 0) -> Tensor:
    out = 3 * torch.randn(rows, V, generator=torch.Generator().manual_seed(seed))
    out[0, 5] = out[0, 6]  # a tie
    return out


def reference(config: SamplingConfig, ids: list[int], logits_v: Tensor) -> Tensor:
    from transformers import GenerationConfig
    from transformers.generation import LogitsProcessorList
    from transformers.generation.logits_process import (
        EpsilonLogitsWarper,
        EtaLogitsWarper,
        MinPLogitsWarper,
        NoBadWordsLogitsProcessor,
        NoRepeatNGramLogitsProcessor,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
        TypicalLogitsWarper,
    )

    chain = LogitsProcessorList()
    if config.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    bad_words_ids = [list(word) for word in config.bad_words_ids]
    if config.no_repeat_ngram_size:
        chain.append(NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
    if bad_words_ids:
        chain.append(NoBadWordsLogitsProcessor(bad_words_ids))
    chain.append(TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        chain.append(TopKLogitsWarper(config.top_k))
    if config.top_p < 1:
        chain.append(TopPLogitsWarper(config.top_p))
    if config.min_p:
        chain.append(MinPLogitsWarper(config.min_p))
    if config.typical_p < 1:
        chain.append(TypicalLogitsWarper(config.typical_p))
    if config.epsilon_cutoff:
        chain.append(EpsilonLogitsWarper(config.epsilon_cutoff))
    if config.eta_cutoff:
        chain.append(EtaLogitsWarper(config.eta_cutoff))
    # The order above is the one that transformers builds from the same settings.
    asked = GenerationConfig(
        do_sample=True,
        repetition_penalty=config.repetition_penalty,
        no_repeat_ngram_size=config.no_repeat_ngram_size,
        bad_words_ids=bad_words_ids or None,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p or None,
        typical_p=config.typical_p,
        epsilon_cutoff=config.epsilon_cutoff,
        eta_cutoff=config.eta_cutoff,
    )
    asked._eos_token_tensor = None
    built = order_in_transformers(asked)
    assert built == [type(p) for p in chain if not (isinstance(p, TemperatureLogitsWarper) and config.temperature == 1)]
    return chain(torch.tensor([ids]), logits_v[None].clone())[0]


def order_in_transformers(generation_config: object) -> list[type]:
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny = LlamaConfig(vocab_size=V, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    return [type(p) for p in LlamaForCausalLM(tiny)._get_logits_processor(generation_config, input_ids_seq_length=1)]


CONFIGS = [
    SamplingConfig(temperature=1.0),
    SamplingConfig(temperature=0.7),
    SamplingConfig(temperature=1.0, top_k=5),
    SamplingConfig(temperature=1.0, top_k=1000),
    SamplingConfig(temperature=1.0, top_p=0.8),
    SamplingConfig(temperature=1.0, top_p=1e-9),
    SamplingConfig(temperature=1.0, min_p=0.1),
    SamplingConfig(temperature=1.0, min_p=1.0),
    SamplingConfig(temperature=1.0, typical_p=0.6),
    SamplingConfig(temperature=1.0, typical_p=1e-6),
    SamplingConfig(temperature=0.8, top_k=12, min_p=0.02, typical_p=0.9),
    SamplingConfig(temperature=1.0, epsilon_cutoff=0.02),
    SamplingConfig(temperature=1.0, epsilon_cutoff=0.9),
    SamplingConfig(temperature=1.0, eta_cutoff=0.01),
    SamplingConfig(temperature=1.0, eta_cutoff=0.9),
    SamplingConfig(temperature=1.0, no_repeat_ngram_size=1),
    SamplingConfig(temperature=1.0, no_repeat_ngram_size=2),
    SamplingConfig(temperature=1.0, bad_words_ids=[[4], [7, 9], [20, 7, 11], [5, 0, 30]]),
    SamplingConfig(
        temperature=0.7,
        top_p=0.95,
        eta_cutoff=0.02,
        epsilon_cutoff=0.003,
        no_repeat_ngram_size=2,
        bad_words_ids=[[4], [7, 21]],
        repetition_penalty=1.3,
    ),
    SamplingConfig(temperature=1.0, repetition_penalty=1.3),
    SamplingConfig(temperature=1.6, top_k=20, top_p=0.9, min_p=0.05, repetition_penalty=0.8),
    SamplingConfig(temperature=0.4, top_k=7, top_p=0.95, min_p=0.02, repetition_penalty=1.8),
]


def history_after(generated: list[list[int]]) -> History:
    history = History.start(PROMPTS, V, tokens=9)
    for step in zip(*generated, strict=True):
        history.observe_(torch.tensor(step), torch.ones(3, dtype=torch.int64))
    return history


@pytest.mark.parametrize("config", CONFIGS)
def test_the_distribution_is_that_of_transformers(config: SamplingConfig) -> None:
    generated = [[4, 4, 5], [1, 2, 0], [7, 20, 7]]
    p_bv = Sampler([config] * 3).probabilities(logits(), history_after(generated))
    for row in range(3):
        expected_v = reference(config, PROMPTS[row] + generated[row], logits()[row]).softmax(-1)
        assert torch.equal(p_bv[row] > 0, expected_v > 0)
        torch.testing.assert_close(p_bv[row], expected_v, rtol=1e-6, atol=1e-8)


def test_rows_of_one_batch_may_all_be_processed_differently() -> None:
    history = history_after([[4, 4, 5], [1, 2, 0], [7, 20, 7]])
    for first in range(0, len(CONFIGS) - 2):
        configs = CONFIGS[first : first + 3]
        together_bv = Sampler(configs).probabilities(logits(), history)
        for row, config in enumerate(configs):
            alone_v = Sampler([config]).probabilities(logits()[row : row + 1], history.select(torch.tensor([row])))[0]
            torch.testing.assert_close(together_bv[row], alone_v, rtol=1e-6, atol=1e-8)


def test_what_is_forbidden_for_the_tokens_before_it_is_what_transformers_forbids() -> None:
    """Random texts of few tokens, in which much comes again: each row has its own size, words and length."""
    from transformers.generation.logits_process import NoBadWordsLogitsProcessor, NoRepeatNGramLogitsProcessor

    noise = torch.Generator().manual_seed(7)

    def some(most: int, least: int = 0) -> int:
        return int(torch.randint(least, most + 1, (), generator=noise))

    def text(n: int) -> list[int]:
        return torch.randint(5, (n,), generator=noise).tolist()

    rows, forbidden = 6, 0
    for _ in range(60):
        texts = [text(some(25, 1)) for _ in range(rows)]
        history = History.start(texts, 0, tokens=30)
        configs = [
            SamplingConfig(no_repeat_ngram_size=some(5), bad_words_ids=[text(some(4, 1)) for _ in range(some(5))])
            for _ in range(rows)
        ]
        sampler = Sampler(configs[::-1])
        sampler.put(range(rows), configs)
        for _ in range(3):
            step, there = text(rows), [some(1) for _ in range(rows)]
            history.observe_(torch.tensor(step), torch.tensor(there))
            texts = [t + [new] * n for t, new, n in zip(texts, step, there, strict=True)]
        guess, before = text(rows), history.snapshot()
        ahead = history.after(torch.tensor(guess))
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(history.tensors(), before.tensors(), strict=True))
        for now, known in ((texts, history), ([[*t, g] for t, g in zip(texts, guess, strict=True)], ahead)):
            x = torch.randn(rows, V, generator=noise)
            got = sampler.process(x, known)
            for row, config in enumerate(configs):
                want, ids = x[row : row + 1].clone(), torch.tensor([now[row]])
                if config.no_repeat_ngram_size:
                    want = NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size)(ids, want)
                if config.bad_words_ids:
                    want = NoBadWordsLogitsProcessor(list(config.bad_words_ids))(ids, want)
                assert torch.equal(got[row], want[0])
                forbidden += int((want == -math.inf).sum())
    assert forbidden > 1000


def test_what_no_row_asks_for_costs_no_operation_and_no_room() -> None:
    plain, counted = SamplingConfig(), SamplingConfig(presence_penalty=1.0)
    texts = [SamplingConfig(no_repeat_ngram_size=n) for n in (2, 3)]
    words = [SamplingConfig(bad_words_ids=[word]) for word in ([3], [3, 4])]
    kinds = [Sampler([plain, config]) for config in (plain, counted, *texts, *words)]
    assert len({sampler.features for sampler in kinds}) == len(kinds)
    assert [s.penalises for s in kinds] == [False, True, True, True, False, True]
    assert [s.reads_text for s in kinds] == [False, False, True, True, False, True]
    assert [s.configs[1].penalises for s in kinds] == [s.penalises for s in kinds]
    kinds[3].put([1], [plain])
    assert (kinds[3].features, kinds[3].penalises) == (kinds[0].features, False)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_logit_that_is_not_finite_is_noticed_where_its_token_is_forbidden_too(bad: float) -> None:
    broken = logits()
    broken[1, 60] = bad
    for config in (SamplingConfig(no_repeat_ngram_size=1), SamplingConfig(bad_words_ids=[[60]])):
        assert Sampler([config] * 3).sample(broken, History.start(PROMPTS, 0, tokens=9)).tolist()[1] == -1


def test_presence_and_frequency_count_the_output_and_not_the_prompt() -> None:
    config = SamplingConfig(temperature=1.0, presence_penalty=0.5, frequency_penalty=0.25)
    history = history_after([[4, 4, 5], [1, 2, 0], [7, 20, 7]])
    got_bv = Sampler([config] * 3).process(logits(), history)
    expected_bv = logits()
    for row, counts in enumerate([{4: 2, 5: 1}, {1: 1, 2: 1, 0: 1}, {7: 2, 20: 1}]):
        for token, count in counts.items():
            expected_bv[row, token] -= 0.5 + 0.25 * count
    torch.testing.assert_close(got_bv, expected_bv, rtol=0, atol=1e-6)


def test_a_finished_row_is_not_counted() -> None:
    history = History.start(PROMPTS, V)
    history.observe_(torch.tensor([1, 2, 3]), torch.tensor([1, 0, 1]))
    assert history.step_b.tolist() == [1, 0, 1]
    assert history.count_bv.sum(1).tolist() == [1, 0, 1]


def test_greedy_puts_all_mass_on_the_best_token_after_the_penalties() -> None:
    plain_bv = torch.tensor([[1.0, 2.0, 1.9]])
    history = History.start([[1]], 3)
    sampler = Sampler([SamplingConfig(repetition_penalty=1.5)])
    assert sampler.probabilities(plain_bv, history).tolist() == [[0.0, 0.0, 1.0]]
    assert sampler.sample(plain_bv, history).tolist() == [2]
    assert Sampler([SamplingConfig()]).sample(plain_bv, history).tolist() == [1]


def test_samples_follow_the_distribution() -> None:
    n, config = 100_000, SamplingConfig(temperature=0.8, top_k=12, top_p=0.97, seed=3)
    one_bv = logits(1, seed=5)
    sampler = Sampler([config] * n)
    sampler.seed_b = 3 + torch.arange(n)
    history = History.start([[0]] * n, 0)
    p_v = Sampler([config]).probabilities(one_bv.double(), History.start([[0]], 0))[0]
    counts_v = torch.bincount(sampler.sample(one_bv.expand(n, -1), history), minlength=V)
    assert counts_v[p_v == 0].sum() == 0
    kept = p_v > 0
    expected_v = n * p_v[kept]
    assert expected_v.min() > 5
    chi2 = float(((counts_v[kept] - expected_v) ** 2 / expected_v).sum())
    freedom = int(kept.sum()) - 1
    # Five standard deviations of chi-square above its mean.
    assert chi2 < freedom + 5 * math.sqrt(2 * freedom)


def test_samples_of_one_row_over_steps_follow_the_distribution() -> None:
    n = 100_000
    steps = torch.arange(n)
    p_v = torch.tensor([0.5, 0.25, 0.125, 0.1, 0.025], dtype=torch.float64)
    drawn = (p_v.log().float() + gumbel(torch.full((n,), 11), steps, 5)).argmax(-1)
    counts_v = torch.bincount(drawn, minlength=5)
    chi2 = float(((counts_v - n * p_v) ** 2 / (n * p_v)).sum())
    assert chi2 < 4 + 5 * math.sqrt(8)
    # Successive steps are independent: pairs follow the product.
    pairs = torch.bincount(drawn[:-1] * 5 + drawn[1:], minlength=25)
    expected = (n - 1) * torch.outer(p_v, p_v).flatten()
    chi2 = float(((pairs - expected) ** 2 / expected).sum())
    assert chi2 < 24 + 5 * math.sqrt(48)


def test_the_noise_is_standard_gumbel() -> None:
    noise = gumbel(torch.arange(50), torch.zeros(50, dtype=torch.int64), 4000).double().flatten()
    assert noise.isfinite().all()
    # Mean and variance of the standard Gumbel, within five standard errors (its kurtosis is 5.4).
    n, variance = noise.numel(), math.pi**2 / 6
    assert abs(noise.mean() - 0.5772156649) < 5 * math.sqrt(variance / n)
    assert abs(noise.var() - variance) < 5 * variance * math.sqrt(4.4 / n)


def test_a_row_draws_the_same_in_any_batch() -> None:
    configs = [SamplingConfig(temperature=1.0, top_p=0.9, seed=s) for s in (5, 6, 7)]
    history = history_after([[4, 4, 5], [1, 2, 0], [7, 20, 7]])
    together = Sampler(configs).sample(logits(), history).tolist()
    order = torch.tensor([2, 0, 1])
    shuffled = Sampler([configs[i] for i in order]).sample(logits()[order], history.select(order)).tolist()
    assert shuffled == [together[i] for i in order]
    for row in range(3):
        alone = history.select(torch.tensor([row]))
        assert Sampler([configs[row]]).sample(logits()[row : row + 1], alone).tolist() == [together[row]]


def test_seeds_and_steps_give_different_noise() -> None:
    first = gumbel(torch.tensor([0, 1, 0]), torch.tensor([0, 0, 1]), 1000)
    correlation = torch.corrcoef(first.double())
    assert correlation.triu(1).abs().max() < 5 / math.sqrt(1000)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_give_no_token(bad: float) -> None:
    broken = logits()
    broken[1, 4] = bad
    for config in (SamplingConfig(), SamplingConfig(temperature=1.0)):
        tokens = Sampler([config] * 3).sample(broken, History.start(PROMPTS, 0)).tolist()
        assert tokens[1] == -1
        assert min(tokens[0], tokens[2]) >= 0


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": 1e-9},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 1.5},
        {"typical_p": 0.0},
        {"typical_p": 1.2},
        {"epsilon_cutoff": -0.1},
        {"epsilon_cutoff": 1.0},
        {"eta_cutoff": 1.0},
        {"eta_cutoff": math.nan},
        {"no_repeat_ngram_size": -1},
        {"no_repeat_ngram_size": 2.5},
        {"no_repeat_ngram_size": 2**31},
        {"bad_words_ids": [[]]},
        {"bad_words_ids": [[3], [1, -1]]},
        {"bad_words_ids": [[1.5]]},
        {"repetition_penalty": 0.0},
        {"presence_penalty": math.inf},
        {"seed": -1},
    ],
)
def test_values_out_of_range_are_refused_by_name(values: dict[str, Any]) -> None:
    (name,) = values
    with pytest.raises(ConfigError, match=f"^{name}: expected .*, got "):
        SamplingConfig(**values)


def test_a_bias_is_added_first_and_minus_infinity_forbids() -> None:
    configs = [SamplingConfig(logit_bias={3: 100.0}), SamplingConfig(), SamplingConfig(logit_bias={5: -math.inf})]
    sampler, history, x = Sampler(configs, vocab_size=V), History.start(PROMPTS, 0), logits()
    want = x.clone()
    want[0, 3] += 100.0
    want[2, 5] = -math.inf
    assert torch.equal(sampler.process(x, history), want)
    assert sampler.sample(x, history)[0] == 3
    # A row that changes loses its bias; another may get one.
    sampler.put([0, 1], [SamplingConfig(), SamplingConfig(logit_bias={7: 1.5})])
    want = x.clone()
    want[1, 7] += 1.5
    want[2, 5] = -math.inf
    assert torch.equal(sampler.process(x, history), want)


@pytest.mark.parametrize("bias", [{-1: 1.0}, {2: math.inf}, {2: math.nan}])
def test_a_bias_that_means_nothing_is_refused(bias: dict[int, float]) -> None:
    with pytest.raises(ConfigError, match="logit_bias: expected token ids"):
        SamplingConfig(logit_bias=bias)
