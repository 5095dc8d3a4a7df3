"""Guesses that are verified leave the distribution as it is: against exact enumeration on a tiny vocabulary."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from subquad.engine.draft import Draft
from subquad.engine.history import History
from subquad.engine.sampler import Sampler, SamplingConfig
from subquad.engine.verify import DRAFT_STREAM, verify
from subquad.ops.draw import gumbel

V, K, T, START = 4, 2, 3, 1
ROWS = 60_000
CONFIGS = {
    "plain": SamplingConfig(temperature=1.0),
    "top_k": SamplingConfig(temperature=0.7, top_k=3),
    "top_p": SamplingConfig(temperature=1.3, top_p=0.8),
    "penalties": SamplingConfig(temperature=1.0, repetition_penalty=1.6, presence_penalty=0.5, frequency_penalty=0.6),
    "forbidden": SamplingConfig(
        temperature=1.0, no_repeat_ngram_size=2, bad_words_ids=[[2, 0], [START, 3, 3], [0, 2, 1]]
    ),
    "all": SamplingConfig(temperature=1.2, top_k=3, top_p=0.9, min_p=0.05, repetition_penalty=1.3, frequency_penalty=1),
}
# Chance of a false alarm of one test, were the seeds not fixed.
ALARM = 1e-9


def table(seed: int) -> Tensor:
    """Logits of the next token after each token; nothing is symmetric, and nothing is rare."""
    return 1.2 * torch.randn(V, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TARGET, DRAFTER = table(1), table(2)


def processed(logits: Sequence[float], config: SamplingConfig, text: Sequence[int]) -> list[float]:
    """Probabilities of one row in plain Python; `text` is the output, behind START."""
    x, past = list(logits), [START, *text]
    for v in range(V):
        if v == START or v in text:
            x[v] = x[v] / config.repetition_penalty if x[v] > 0 else x[v] * config.repetition_penalty
        x[v] -= config.presence_penalty * (v in text) + config.frequency_penalty * text.count(v)
        n = config.no_repeat_ngram_size
        ends = [[*past[len(past) + 1 - m :], v] for m in range(1, len(past) + 2)]
        repeats = n and any(past[i : i + n] in ends for i in range(len(past) - n + 1))
        x[v] = -math.inf if repeats or any(list(word) in ends for word in config.bad_words_ids) else x[v]
        x[v] /= config.temperature
    weights = [math.exp(value) for value in x]
    order = sorted(range(V), key=lambda v: -weights[v])
    if config.top_k:
        weights = [w if v in order[: config.top_k] else 0.0 for v, w in enumerate(weights)]
    total, mass = sum(weights), 0.0
    for v in order:
        # A token stays while what lies before it has not reached p.
        mass, before = mass + weights[v] / total, mass
        if before >= config.top_p:
            weights[v] = 0.0
    weights = [w if w >= config.min_p * max(weights) else 0.0 for w in weights]
    return [w / sum(weights) for w in weights]


def enumerate_texts(config: SamplingConfig) -> Tensor:
    """Probability of every text of T tokens, ``[V ** T]``."""
    p_x = torch.zeros(V**T, dtype=torch.float64)
    for i, text in enumerate(itertools.product(range(V), repeat=T)):
        p = 1.0
        for t in range(T):
            p *= processed(TARGET[text[t - 1] if t else START].tolist(), config, text[:t])[text[t]]
        p_x[i] = p
    return p_x


@functools.cache
def sampler_of(name: str) -> Sampler:
    """Of ROWS rows alike but for their seeds."""
    sampler = Sampler([CONFIGS[name]] * ROWS)
    sampler.seed_b = torch.arange(ROWS)
    return sampler


def fresh(rows: int) -> History:
    one = History.start([[START]], V, tokens=1 + T * (K + 1))
    return one.select(torch.zeros(rows, dtype=torch.int64))


def guesses(
    kind: str, sampler: Sampler, history: History, last_b: Tensor, length_b: Tensor, dtype: torch.dtype
) -> Draft:
    """K guesses of the drafter's table: drawn from q, its likeliest, or drawn from q and told to be from another."""
    tokens, drawn_from = list[Tensor](), list[Tensor]()
    for _ in range(K):
        logits_bv = DRAFTER.to(dtype)[last_b]
        q_bv = sampler.probabilities(logits_bv, history)
        last_b = q_bv.argmax(-1) if kind == "certain" else sampler.sample(logits_bv, history, DRAFT_STREAM).clamp(min=0)
        tokens.append(last_b)
        drawn_from.append(q_bv if kind != "lie" else q_bv.roll(1, dims=-1))
        history = history.after(last_b)
    return Draft(torch.stack(tokens, 1), length_b, None if kind == "certain" else torch.stack(drawn_from, 1))


def decode(kind: str, name: str, mixed: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The first T tokens ``[b, t]`` of all rows, and how many the first round gave; rows go on at their own pace."""
    sampler, history, rows_b = sampler_of(name), fresh(ROWS), torch.arange(ROWS)
    out_bn, fill_b = torch.zeros(ROWS, T * (K + 1) + 1, dtype=torch.int64), torch.zeros(ROWS, dtype=torch.int64)
    last_b, first_b = torch.full((ROWS,), START), None
    for turn in range(T):
        # Of all lengths side by side, and each row has another one in the next round.
        length_b = (rows_b + turn) % (K + 1) if mixed else torch.full((ROWS,), K)
        draft = guesses(kind, sampler, history, last_b, length_b, dtype)
        logits_btv = TARGET.to(dtype)[torch.cat((last_b[:, None], draft.tokens_bk), 1)]
        before = history.snapshot()
        tokens_bt, n_b = verify(sampler, history, logits_btv, draft)
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(history.tensors(), before.tensors(), strict=True))
        assert (n_b >= 1).all()
        assert (n_b <= length_b + 1).all()
        first_b = n_b if first_b is None else first_b
        for i in range(K + 1):
            there_b = i < n_b
            out_bn.scatter_(1, torch.where(there_b, fill_b + i, out_bn.shape[1] - 1)[:, None], tokens_bt[:, i : i + 1])
            # Behind the T that count, a row may have no token left that is not forbidden.
            history.observe_(tokens_bt[:, i].clamp(min=0), there_b.to(torch.int64))
        last_b, fill_b = tokens_bt.gather(1, (n_b - 1)[:, None])[:, 0].clamp(min=0), fill_b + n_b
    assert first_b is not None
    return out_bn[:, :T], first_b


def distances(tokens_bt: Tensor, p_x: Tensor) -> tuple[float, float, float, float]:
    """Total variation and chi-square of the texts' frequencies, each with the bound it passes once in 1 / ALARM.

    Of n rows over c cells ``E[TV] <= sqrt(c / n) / 2``, and one row moves it by 1 / n at most (McDiarmid); chi-square
    of d degrees passes ``d + 2 sqrt(d x) + 2 x`` with probability ``exp(-x)`` at most (Laurent and Massart).
    """
    n, x = len(tokens_bt), -math.log(ALARM)
    code_b = (tokens_bt * torch.tensor([V ** (T - 1 - t) for t in range(T)])).sum(1)
    count_x = torch.bincount(code_b, minlength=V**T).double()
    assert count_x[p_x == 0].sum() == 0
    cells = int((p_x > 0).sum())
    tv = 0.5 * float((count_x / n - p_x).abs().sum())
    often_x = p_x * n >= 10
    chi2 = float(((count_x - p_x * n) ** 2 / (p_x * n))[often_x].sum())
    d = int(often_x.sum())
    return tv, 0.5 * math.sqrt(cells / n) + math.sqrt(x / (2 * n)), chi2, d + 2 * math.sqrt(d * x) + 2 * x


@pytest.mark.parametrize(
    ("kind", "name", "mixed", "dtype"),
    [
        ("drawn", "plain", False, torch.float32),
        ("drawn", "plain", True, torch.float64),
        ("certain", "plain", True, torch.float32),
        ("drawn", "top_k", False, torch.float64),
        ("drawn", "top_p", True, torch.float32),
        ("drawn", "penalties", True, torch.float32),
        ("certain", "penalties", False, torch.float32),
        ("drawn", "forbidden", True, torch.float32),
        ("drawn", "all", True, torch.float32),
    ],
)
def test_texts_are_distributed_as_enumerated(kind: str, name: str, mixed: bool, dtype: torch.dtype) -> None:
    tokens_bt, first_b = decode(kind, name, mixed, dtype)
    tv, most_tv, chi2, most_chi2 = distances(tokens_bt, enumerate_texts(CONFIGS[name]))
    assert tv < most_tv
    assert chi2 < most_chi2
    # Guesses stood and fell, so that every way was taken.
    assert len(first_b.unique()) == K + 1


def test_the_bounds_tell_a_drafter_that_lies_about_its_distribution() -> None:
    tv, most_tv, chi2, most_chi2 = distances(
        decode("lie", "plain", False, torch.float32)[0], enumerate_texts(CONFIGS["plain"])
    )
    assert tv > 2 * most_tv
    assert chi2 > 10 * most_chi2


def test_the_share_of_guesses_that_stand_is_the_overlap() -> None:
    """A first guess stands with probability ``sum min(p, q)``; within six standard deviations."""
    p_v, q_v = TARGET[START].softmax(-1), DRAFTER[START].softmax(-1)
    overlap = float(torch.minimum(p_v, q_v).sum())
    _, first_b = decode("drawn", "plain", False, torch.float64)
    share = float((first_b > 1).double().mean())
    assert abs(share - overlap) < 6 * math.sqrt(overlap * (1 - overlap) / ROWS)


@pytest.mark.parametrize("mixed", [False, True])
def test_without_q_all_tokens_are_those_of_plain_decoding(mixed: bool) -> None:
    tokens_bt, _ = decode("certain", "all", mixed, torch.float64)
    sampler, history, last_b = sampler_of("all"), fresh(ROWS), torch.full((ROWS,), START)
    for t in range(T):
        last_b = sampler.sample(TARGET[last_b], history)
        assert torch.equal(tokens_bt[:, t], last_b)
        history = history.after(last_b)


@pytest.mark.parametrize("with_q", [False, True])
@pytest.mark.parametrize("company", [False, True])
def test_of_greedy_rows_exactly_the_right_guesses_stand(with_q: bool, company: bool) -> None:
    """Row j is given j right guesses and then wrong ones; with a sampled row beside them or not."""
    k, rows = 5, 6
    chain = [START]
    for _ in range(k + 1):
        chain.append(int(TARGET[chain[-1]].argmax()))
    right_k = torch.tensor(chain[1:-1])
    guess_bk = torch.stack([torch.where(torch.arange(k) < j, right_k, (right_k + 1) % V) for j in range(rows)])
    configs = [SamplingConfig(seed=j) for j in range(rows)] + [SamplingConfig(temperature=1.0)] * company
    guess_bk = torch.cat((guess_bk, guess_bk[:company]))
    q_bkv = torch.nn.functional.one_hot(guess_bk, V).double() if with_q else None
    logits_btv = TARGET[torch.cat((torch.full((len(configs), 1), START), guess_bk), 1)]
    draft = Draft(guess_bk, torch.full((len(configs),), k), q_bkv)
    tokens_bt, n_b = verify(Sampler(configs), fresh(len(configs)), logits_btv, draft)
    assert n_b.tolist()[:rows] == [j + 1 for j in range(rows)]
    for j in range(rows):
        assert tokens_bt[j, : j + 1].tolist() == chain[1 : j + 2]


def test_no_more_guesses_count_than_a_row_has() -> None:
    """All are right, and the row's length decides."""
    k = 3
    chain = [START]
    for _ in range(k + 1):
        chain.append(int(TARGET[chain[-1]].argmax()))
    guess_bk = torch.tensor(chain[1:-1]).repeat(k + 1, 1)
    logits_btv = TARGET[torch.tensor(chain[:-1])].repeat(k + 1, 1, 1)
    for q_bkv in (None, torch.nn.functional.one_hot(guess_bk, V).double()):
        draft = Draft(guess_bk, torch.arange(k + 1), q_bkv)
        tokens_bt, n_b = verify(Sampler([SamplingConfig()] * (k + 1)), fresh(k + 1), logits_btv, draft)
        assert n_b.tolist() == [1, 2, 3, 4]
        assert all(tokens_bt[j, : j + 1].tolist() == chain[1 : j + 2] for j in range(k + 1))


def sampled(rows: int) -> Sampler:
    return Sampler([SamplingConfig(temperature=1.0, seed=i) for i in range(rows)])


def drawn(sampler: Sampler, rows: int) -> tuple[Draft, Tensor]:
    """Guesses of the drafter's table, and the target's logits behind them."""
    last_b = torch.full((rows,), START)
    draft = guesses("drawn", sampler, fresh(rows), last_b, torch.full((rows,), K), torch.float64)
    return draft, TARGET[torch.cat((last_b[:, None], draft.tokens_bk), 1)]


def test_guesses_of_the_same_distribution_all_stand() -> None:
    rows = 5_000
    sampler = sampled(rows)
    draft, _ = drawn(sampler, rows)
    logits_btv = DRAFTER[torch.cat((torch.full((rows, 1), START), draft.tokens_bk), 1)]
    tokens_bt, n_b = verify(sampler, fresh(rows), logits_btv, draft)
    assert (n_b == K + 1).all()
    assert torch.equal(tokens_bt[:, :K], draft.tokens_bk)


def test_guesses_that_the_model_never_gives_never_stand() -> None:
    rows = 5_000
    sampler = sampled(rows)
    guess_bk = torch.arange(rows)[:, None].repeat(1, K) % 2
    q_bkv = torch.tensor([0.5, 0.5, 0, 0], dtype=torch.float64).expand(rows, K, V)
    logits_btv = torch.tensor([-torch.inf, -torch.inf, 0.0, 1.0]).expand(rows, K + 1, V)
    for q in (q_bkv, None):
        tokens_bt, n_b = verify(sampler, fresh(rows), logits_btv, Draft(guess_bk, torch.full((rows,), K), q))
        assert (n_b == 1).all()
        assert (tokens_bt[:, 0] >= 2).all()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("with_q", [False, True])
@pytest.mark.parametrize("column", range(K + 1))
def test_logits_that_are_not_finite_hurt_their_own_row_only(poison: float, with_q: bool, column: int) -> None:
    rows, hurt = 64, 7
    sampler = sampled(rows)
    draft, _ = drawn(sampler, rows)
    # All guesses stand, so that each column is reached.
    logits_btv = 50.0 * torch.nn.functional.one_hot(torch.cat((draft.tokens_bk, draft.tokens_bk[:, :1]), 1), V).double()
    draft = draft if with_q else Draft(draft.tokens_bk, draft.length_b)
    tokens_bt, n_b = verify(sampler, fresh(rows), logits_btv, draft)
    assert (n_b == K + 1).all()
    broken_btv = logits_btv.clone()
    broken_btv[hurt, column, 2] = poison
    got_bt, got_n_b = verify(sampler, fresh(rows), broken_btv, draft)
    others = torch.arange(rows) != hurt
    assert torch.equal(got_bt[others], tokens_bt[others])
    assert torch.equal(got_n_b[others], n_b[others])
    assert got_n_b[hurt] == column + 1
    assert got_bt[hurt, : column + 1].tolist() == [*tokens_bt[hurt, :column].tolist(), -1]


@pytest.mark.parametrize("with_q", [False, True])
def test_a_greedy_row_whose_logits_are_not_finite_has_no_token_either(with_q: bool) -> None:
    sampler = Sampler([SamplingConfig(), SamplingConfig(temperature=1.0)])
    logits_btv = torch.zeros(2, 2, V)
    logits_btv[0, 0, 2] = torch.nan
    q_bkv = torch.full((2, 1, V), 1 / V) if with_q else None
    draft = Draft(torch.ones(2, 1, dtype=torch.int64), torch.ones(2, dtype=torch.int64), q_bkv)
    tokens_bt, n_b = verify(sampler, fresh(2), logits_btv, draft)
    assert (int(n_b[0]), int(tokens_bt[0, 0])) == (1, -1)
    assert int(tokens_bt[1, 0]) >= 0


def test_a_drafter_of_nan_costs_its_guess_and_nothing_else() -> None:
    """The row's token is what it draws anyway, and no other row is touched."""
    rows, hurt = 256, 100
    sampler = sampled(rows)
    draft, logits_btv = drawn(sampler, rows)
    assert draft.q_bkv is not None
    tokens_bt, n_b = verify(sampler, fresh(rows), logits_btv, draft)
    q_bkv = draft.q_bkv.clone()
    q_bkv[hurt] = torch.nan
    got_bt, got_n_b = verify(sampler, fresh(rows), logits_btv, Draft(draft.tokens_bk, draft.length_b, q_bkv))
    others = torch.arange(rows) != hurt
    assert torch.equal(got_bt[others], tokens_bt[others])
    assert torch.equal(got_n_b[others], n_b[others])
    assert got_n_b[hurt] == 1
    assert got_bt[hurt, 0] == sampler.sample(logits_btv[:, 0], fresh(rows))[hurt]


def test_a_row_of_one_possible_token_gives_it_whatever_its_noise() -> None:
    """A seed whose noise for that token is the least that float32 holds: about one in thirty million."""
    seed, token, v = 393_930, 5, 8
    assert gumbel(torch.tensor([seed]), torch.zeros(1, dtype=torch.int64), v)[0].argmin() == token
    logits_bv = torch.zeros(2, v)
    logits_bv[:, token] = 5
    sampler = Sampler([SamplingConfig(temperature=1.0, top_k=1, seed=seed), SamplingConfig(seed=seed)])
    history = History.start([[0]] * 2, 0)
    wrong_b1 = torch.full((2, 1), token + 1)
    q_bkv = torch.nn.functional.one_hot(wrong_b1, v).float()
    draft = Draft(wrong_b1, torch.ones(2, dtype=torch.int64), q_bkv)
    tokens_bt, n_b = verify(sampler, history, logits_bv[:, None].repeat(1, 2, 1), draft)
    assert n_b.tolist() == [1, 1]
    assert tokens_bt[:, 0].tolist() == [token, token]
    assert sampler.sample(logits_bv, history).tolist() == [token, token]


def test_a_draft_of_few_tokens_is_one_of_all_with_no_chance_of_the_others() -> None:
    """Its distributions over all tokens, cut, behind certain guesses, and the tokens that stand."""
    rows, place_v = 500, torch.tensor([0, 3, 1, 2])
    sampler, length_b = sampled(rows), torch.arange(rows) % (K + 1)
    q_bkm = torch.rand(rows, K, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1
    q_bkm /= q_bkm.sum(-1, keepdim=True)
    guess_bk = torch.tensor([0, 2, 3])[q_bkm.flatten(0, 1).multinomial(1).view(rows, K)]
    few = Draft(guess_bk, length_b, q_bkm, place_v=place_v)
    q_bkv = torch.stack((q_bkm[..., 0], torch.zeros(rows, K), q_bkm[..., 1], q_bkm[..., 2]), dim=-1)
    whole = Draft(guess_bk, length_b, q_bkv)
    logits_btv = TARGET[torch.cat((torch.full((rows, 1), START), guess_bk), 1)]
    certain = Draft(torch.ones_like(guess_bk), (torch.arange(rows) % 2) * length_b)
    for mine, theirs in ((few, whole), (few.cut(1), whole.cut(1)), (certain.over(few, V), certain.over(whole, V))):
        assert mine.q_bkv is not None and theirs.q_bkv is not None
        assert torch.equal(mine.q_bkv, theirs.q_bkv)
        t = mine.tokens_bk.shape[1] + 1
        (tokens_bt, n_b), want = (verify(sampler, fresh(rows), logits_btv[:, :t], one) for one in (mine, theirs))
        assert torch.equal(tokens_bt, want[0]) and torch.equal(n_b, want[1])
        assert len(n_b.unique()) == t
