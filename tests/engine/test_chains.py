"""Several chains of guesses leave the distribution as it is, and more of them stand than of one."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from subquad.core.registry import methods
from subquad.engine.chains import least_rho, select, verify_chains
from subquad.engine.draft import Draft
from subquad.engine.history import History
from subquad.engine.sampler import Sampler, SamplingConfig
from subquad.engine.verify import verify
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack

V, K, T, START, ROWS = 4, 2, 3, 1, 60_000
CONFIGS = {
    "plain": SamplingConfig(temperature=1.0),
    "top_k": SamplingConfig(temperature=0.7, top_k=3),
    "penalties": SamplingConfig(temperature=1.0, repetition_penalty=1.6, presence_penalty=0.5, frequency_penalty=0.6),
}
# Chance of a false alarm of one test, were the seeds not fixed.
ALARM = 1e-9


def table(seed: int) -> Tensor:
    """Logits of the next token after each token; nothing is symmetric, and nothing is rare."""
    return 1.2 * torch.randn(V, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TARGET, DRAFTER = table(1), table(2)


@functools.cache
def rows_of(name: str, rows: int) -> Sampler:
    """Rows alike but for their seeds."""
    sampler = Sampler([CONFIGS[name]] * rows)
    sampler.seed_b = torch.arange(rows)
    return sampler


def fresh(rows: int) -> History:
    return History.start([[START]], V).select(torch.zeros(rows, dtype=torch.int64))


def enumerate_texts(name: str) -> Tensor:
    """Probability of every text of T tokens, ``[V ** T]``."""
    texts_xt = torch.tensor(list(itertools.product(range(V), repeat=T)))
    sampler, history, last_x = rows_of(name, V**T), fresh(V**T), torch.full((V**T,), START)
    p_x = torch.ones(V**T, dtype=torch.float64)
    for token_x in texts_xt.unbind(1):
        p_x *= sampler.probabilities(TARGET[last_x], history).gather(1, token_x[:, None])[:, 0]
        history, last_x = history.after(token_x), token_x
    return p_x


def draw(
    branches: Sequence[int],
    sampler: Sampler,
    history: History,
    last_b: Tensor,
    dtype: torch.dtype,
    noise: torch.Generator,
) -> Draft:
    """A tree of K guesses of the drafter's table, drawn with noise that is not the sampler's."""
    nodes = [((last_b,), (), history)]
    for branch in (*branches, 1, 1)[:K]:
        children = []
        for tokens, drawn_from, before in nodes:
            q_bv = sampler.probabilities(DRAFTER.to(dtype)[tokens[-1]], before)
            for token_b in torch.multinomial(q_bv, branch, replacement=True, generator=noise).unbind(1):
                children.append(((*tokens, token_b), (*drawn_from, q_bv), before.after(token_b)))
        nodes = children
    tokens_bk = torch.stack([torch.stack(tokens[1:], 1) for tokens, _, _ in nodes], 1).flatten(0, 1)
    q_bkv = torch.stack([torch.stack(drawn_from, 1) for _, drawn_from, _ in nodes], 1).flatten(0, 1)
    return Draft(tokens_bk, torch.full_like(last_b, K), q_bkv, tuple((*branches, 1, 1)[:K]))


def logits_of(draft: Draft, last_b: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    return TARGET.to(dtype)[torch.cat((draft.fork(last_b)[:, None], draft.tokens_bk), 1)]


def decode(kind: str, name: str, branches: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The first T tokens ``[b, t]`` of all rows, and how many the first round gave; rows go on at their own pace."""
    sampler, history, rows_b = rows_of(name, ROWS), fresh(ROWS), torch.arange(ROWS)
    noise = torch.Generator().manual_seed(5)
    out_bn, fill_b = torch.zeros(ROWS, T * (K + 1) + 1, dtype=torch.int64), torch.zeros(ROWS, dtype=torch.int64)
    last_b, first_b = torch.full((ROWS,), START), None
    for turn in range(T):
        draft = draw(branches, sampler, history, last_b, dtype, noise)
        if kind == "mixed":  # of all lengths side by side, and each row has another one in the next round
            draft = Draft(draft.tokens_bk, (rows_b + turn) % (K + 1), draft.q_bkv, draft.branches)
        if kind == "behind":  # another drafter is certain in half of the rows
            certain_b1 = DRAFTER[last_b].argmax(-1, keepdim=True)
            draft = Draft(certain_b1.expand(-1, K), K * (rows_b % 2)).over(draft, V)
        if kind == "copies":  # told to be independent, and are not
            draft = Draft(draft.fork(draft.tokens_bk[:: draft.chains]), draft.length_b, draft.q_bkv, draft.branches)
        before = history.snapshot()
        tokens_bt, n_b, at_b = verify_chains(sampler, history, logits_of(draft, last_b, dtype), draft)
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(history.tensors(), before.tensors(), strict=True))
        assert (n_b >= 1).all() and (n_b <= draft.length_b + 1).all()
        assert torch.equal(at_b // draft.chains, rows_b)
        first_b = n_b if first_b is None else first_b
        for i in range(K + 1):
            there_b = i < n_b
            if i < K:  # the chain that is named is the one that stood
                assert torch.equal(draft.tokens_bk[at_b, i][n_b > i + 1], tokens_bt[:, i][n_b > i + 1])
            out_bn.scatter_(1, torch.where(there_b, fill_b + i, out_bn.shape[1] - 1)[:, None], tokens_bt[:, i : i + 1])
            history.observe_(tokens_bt[:, i], there_b.to(torch.int64))
        last_b, fill_b = tokens_bt.gather(1, (n_b - 1)[:, None])[:, 0], fill_b + n_b
    assert first_b is not None
    return out_bn[:, :T], first_b


def distance(tokens_bt: Tensor, p_x: Tensor) -> tuple[float, float]:
    """Chi-square of the texts' frequencies, and what it passes once in 1 / ALARM (Laurent and Massart)."""
    n, x = len(tokens_bt), -math.log(ALARM)
    code_b = (tokens_bt * torch.tensor([V ** (T - 1 - t) for t in range(T)])).sum(1)
    count_x = torch.bincount(code_b, minlength=V**T).double()
    assert count_x[p_x == 0].sum() == 0
    often_x = p_x * n >= 10
    d = int(often_x.sum())
    chi2 = float(((count_x - p_x * n) ** 2 / (p_x * n))[often_x].sum())
    return chi2, d + 2 * math.sqrt(d * x) + 2 * x


@pytest.mark.parametrize(
    ("kind", "name", "branches", "dtype"),
    [
        ("whole", "plain", (3,), torch.float32),
        ("whole", "plain", (1, 3), torch.float64),
        ("mixed", "plain", (2, 2), torch.float64),
        ("mixed", "top_k", (4,), torch.float32),
        ("whole", "penalties", (2, 2), torch.float32),
        ("behind", "plain", (3,), torch.float32),
        ("behind", "penalties", (2, 2), torch.float64),
    ],
)
def test_texts_are_distributed_as_enumerated(
    kind: str, name: str, branches: tuple[int, ...], dtype: torch.dtype
) -> None:
    tokens_bt, first_b = decode(kind, name, branches, dtype)
    chi2, most = distance(tokens_bt, enumerate_texts(name))
    assert chi2 < most
    assert len(first_b.unique()) == K + 1


def test_the_bound_tells_guesses_that_are_not_independent() -> None:
    chi2, most = distance(decode("copies", "plain", (3,), torch.float64)[0], enumerate_texts("plain"))
    assert chi2 > 10 * most


def random_pairs(rows: int, v: int) -> tuple[Tensor, Tensor]:
    """From nearly alike to nearly apart."""
    noise = torch.Generator().manual_seed(3)
    one_bv, two_bv = torch.randn(2, rows, v, generator=noise, dtype=torch.float64)
    far_b1 = torch.linspace(0, 4, rows, dtype=torch.float64)[:, None]
    return (2 * one_bv).softmax(-1), (2 * one_bv + far_b1 * two_bv).softmax(-1)


@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_rho_is_the_least_that_leaves_nothing_negative(k: int) -> None:
    """Against a search among a million values of rho for each pair, by its definition alone."""
    p_bv, q_bv = random_pairs(40, 7)
    rho_b = least_rho(p_bv, q_bv, torch.full((40,), k), k)
    for p_v, q_v, rho in zip(p_bv, q_bv, rho_b.tolist(), strict=True):
        low, high = 1.0, float(k)
        for _ in range(4):  # each time a grid of 32 in the cell where the residual stops being negative
            grid = torch.linspace(low, high, 33, dtype=torch.float64)
            taken = torch.minimum(p_v / grid[:, None], q_v)
            beta = taken.sum(-1, keepdim=True)
            rest = p_v - taken * (1 - (1 - beta) ** k) / beta
            at = int((rest.amin(-1) >= -1e-12).to(torch.int64).argmax())
            low, high = float(grid[max(at - 1, 0)]), float(grid[at])
        assert high - 1e-5 * k <= rho <= high + (k - 1) / 2**11


@pytest.mark.parametrize("branches", [(2,), (4,), (8,)])
def test_more_first_guesses_stand_than_of_one_chain(branches: tuple[int]) -> None:
    """Of random pairs; the mean is what K-SEQ promises within six standard deviations, and above that of one chain."""
    k, each, v = branches[0], 500, 6
    p_xv, q_xv = random_pairs(40, v)
    p_bv, q_bv = p_xv.repeat_interleave(each, 0), q_xv.repeat_interleave(each, 0)
    rows = len(p_bv)
    guess_bm = torch.multinomial(q_bv, k, replacement=True, generator=torch.Generator().manual_seed(8))
    sampler, history = rows_of("plain", rows), History.start([[0]] * rows, 0)
    one_b = torch.ones(rows, dtype=torch.int64)
    logits_btv = p_bv.log()[:, None].expand(-1, 2, -1)
    draft = Draft(guess_bm.reshape(-1, 1), one_b, q_bv.repeat_interleave(k, 0)[:, None], (k,))
    _, n_b, _ = verify_chains(sampler, history, draft.fork(logits_btv), draft)
    _, alone_b = verify(sampler, history, logits_btv, Draft(guess_bm[:, :1], one_b, q_bv[:, None]))
    rho_x1 = least_rho(p_xv, q_xv, torch.full((40,), k), k)[:, None]
    promised_x = 1 - (1 - torch.minimum(p_xv / rho_x1, q_xv).sum(-1)) ** k
    overlap_x = torch.minimum(p_xv, q_xv).sum(-1)
    # As exactly as rho is found.
    assert (promised_x > overlap_x - (k - 1) / 2**12).all()
    share_x = (n_b > 1).double().view(40, each).mean(1)
    deviation_x = (promised_x * (1 - promised_x) / each).sqrt()
    assert ((share_x - promised_x).abs() < 6 * deviation_x + 1e-2 / each).all()
    assert (n_b > 1).double().mean() > (alone_b > 1).double().mean() + 0.05


def test_of_greedy_rows_the_chain_that_is_right_the_longest_stands() -> None:
    """Row j's chain number j is right, the others up to where a wrong guess was put."""
    chain = [START]
    for _ in range(4):
        chain.append(int(TARGET[chain[-1]].argmax()))
    right_k = torch.tensor(chain[1:4])
    wrong_ck = torch.stack([torch.where(torch.arange(3) < j, right_k, (right_k + 1) % V) for j in range(3)])
    for q in (False, True):
        for best in range(3):
            tokens_ck = wrong_ck.roll(best, 0)
            draft = Draft(
                tokens_ck, torch.tensor([3]), torch.nn.functional.one_hot(tokens_ck, V).double() if q else None
            )
            draft = Draft(draft.tokens_bk, draft.length_b, draft.q_bkv, (3,))
            sampler = Sampler([SamplingConfig()])
            logits_btv = logits_of(draft, torch.tensor([START]))
            tokens_bt, n_b, at_b = verify_chains(sampler, fresh(1), logits_btv, draft)
            assert (int(n_b), int(at_b)) == (3, (2 + best) % 3)
            assert tokens_bt[0, :3].tolist() == chain[1:4]


def test_without_q_all_tokens_are_those_of_plain_decoding() -> None:
    rows, sampler, history = 5_000, rows_of("penalties", 5_000), fresh(5_000)
    last_b = torch.full((rows,), START)
    draft = draw((2, 2), sampler, history, last_b, torch.float64, torch.Generator().manual_seed(1))
    draft = Draft(draft.tokens_bk, draft.length_b, None, draft.branches)
    tokens_bt, n_b, _ = verify_chains(sampler, history, logits_of(draft, last_b), draft)
    assert n_b.unique().tolist() == [1, 2, 3]
    for t in range(K + 1):
        last_b = sampler.sample(TARGET[last_b], history)
        assert torch.equal(tokens_bt[:, t][n_b > t], last_b[n_b > t])
        history = history.after(last_b)


@pytest.mark.parametrize("what", ["logits", "q"])
def test_what_is_not_finite_hurts_its_own_row_only(what: str) -> None:
    """Logits end the row; of a drafter of NaN the row's token is what it draws anyway."""
    rows, hurt = 256, 100
    sampler, last_b = rows_of("plain", rows), torch.full((rows,), START)
    draft = draw((3,), sampler, fresh(rows), last_b, torch.float64, torch.Generator().manual_seed(2))
    logits_btv = logits_of(draft, last_b)
    assert draft.q_bkv is not None
    expected = verify_chains(sampler, fresh(rows), logits_btv, draft)
    if what == "logits":
        logits_btv[3 * hurt : 3 * hurt + 3, 0, 2] = torch.nan
    else:
        draft.q_bkv[3 * hurt : 3 * hurt + 3] = torch.nan
    got = verify_chains(sampler, fresh(rows), logits_btv, draft)
    others = torch.arange(rows) != hurt
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a[others], b[others])
    own = -1 if what == "logits" else int(sampler.sample(TARGET[last_b], fresh(rows))[hurt])
    assert got[0][hurt, 0] == own


def test_a_cut_leaves_no_chain_twice() -> None:
    tokens_bk = torch.tensor([[1, 2, 3], [1, 2, 0], [1, 4, 5], [1, 4, 6]]).repeat(2, 1)
    draft = Draft(tokens_bk, torch.tensor([3, 1]), None, (1, 2, 2))
    assert draft.cut(3).tokens_bk.tolist() == tokens_bk.tolist()
    cut = draft.cut(2)
    assert (cut.tokens_bk.tolist(), cut.branches, cut.chains) == ([[1, 2], [1, 4]] * 2, (1, 2), 2)
    assert cut.length_b.tolist() == [2, 1]
    assert draft.cut(0).tokens_bk.shape == (2, 0)


MIXERS = {
    f"{slug}-{name}": {"mixer": slug, **example}
    for slug, card in methods("mixers").items()
    if card.causal and card.splittable
    for name, example in card.examples.items()
}


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_pool_takes_the_chains_that_stood_as_if_no_others_had_been_read(mixer: str) -> None:
    """Two chains a row, each row of its own length, behind a prompt."""
    layer = {k: v for k, v in MIXERS[mixer].items() if k != "d_model"}
    torch.manual_seed(0)
    model = Stack(ModelConfig(23, MIXERS[mixer].get("d_model", 32), 48, (layer, layer))).double().requires_grad_(False)
    state = model.read(torch.randint(23, (3, 5)), model.init_state(3, 12))[1].commit()
    pool = model.init_pool(3, 12, 4)
    pool.write_(None, state)
    tokens_bt, lengths_b = torch.randint(23, (6, 4)), torch.tensor([4, 2, 3])
    at_b, n_b = torch.tensor([1, 2, 5]), torch.tensor([3, 0, 2])
    _, update = model.read(tokens_bt, pool.fork(2), lengths_b.repeat_interleave(2))
    select(update, at_b).commit_(pool, torch.arange(3), n_b)
    expected = model.read(tokens_bt[at_b], state, lengths_b)[1].commit(n_b)
    for (name, a), (_, b) in zip(pool.settled().tensors(), expected.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=name)
