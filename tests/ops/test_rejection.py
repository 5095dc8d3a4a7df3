"""Speculative sampling: the kernels do what the equation says, and what comes is distributed as p."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from subquad.core.errors import ConfigError
from subquad.ops import backends, launch
from subquad.ops.draw import among_all, guess_, probabilities
from subquad.ops.rejection import rejection_sample

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(not (torch.cuda.is_available() or backends.interpreted()), reason="needs Triton")
both = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
V, M, K = 1301, 700, 3
# About the chance that one sample fails for nothing.
ALARM = 1e-9


class Round(NamedTuple):
    """What a round has at hand, with the temperature by which it is all divided."""

    logits_btv: Tensor
    guesses_bk: Tensor
    length_b: Tensor
    q_bkm: Tensor
    place_v: Tensor | None
    greedy_b: Tensor
    seed_b: Tensor
    step_b: Tensor
    temperature_b: Tensor | None

    def rejection_sample(self, backend: str) -> tuple[Tensor, Tensor]:
        with backends.use(backend):
            return rejection_sample(*self[:-1], coin=2, temperature_b=self.temperature_b)


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "poison", True)


def kept(m: int) -> tuple[Tensor, Tensor]:
    """Every second token or so, and the place of each."""
    ids_m = torch.arange(m, device=DEVICE) * V // m
    place_v = torch.full((V,), m, device=DEVICE)
    place_v[ids_m] = torch.arange(m, device=DEVICE)
    return ids_m, place_v


def a_round(b: int, *, dtype: torch.dtype = torch.float32, whole: bool = False, tempered: bool = False) -> Round:
    """Guesses that were drawn as PyTorch does; every third row is greedy, and rows have from no guess to K of them."""
    generator = torch.Generator().manual_seed(b)
    logits_btv = 2 * torch.randn(b, K + 1, V, generator=generator)
    few_bkv = logits_btv[:, :K] + 0.7 * torch.randn(b, K, V, generator=generator)
    logits_btv, few_bkv = logits_btv.to(DEVICE, dtype), few_bkv.to(DEVICE, dtype)
    ids_m, place_v = (None, None) if whole else kept(M)
    if place_v is not None:
        # Tokens that are never guessed are seldom the right ones.
        logits_btv[..., place_v == M] -= 3
    row_b = torch.arange(b, device=DEVICE)
    temperature_b = 0.5 + 0.1 * row_b if tempered else None
    noise = row_b % 3 == 1, 2**40 * row_b + 7, row_b * 5
    few_bkm = few_bkv if ids_m is None else few_bkv[..., ids_m]
    guesses_bk = torch.zeros(b, K, dtype=torch.int64, device=DEVICE)
    q_bkm = torch.zeros(few_bkm.shape, device=DEVICE)
    with backends.use("torch"):
        for i in range(K):
            more = {"ids_m": ids_m, "temperature_b": temperature_b}
            guess_(guesses_bk, q_bkm, i, few_bkm[:, i], *noise, **more, stream=1)
    return Round(logits_btv, guesses_bk, (row_b + 3) % (K + 1), q_bkm, place_v, *noise, temperature_b)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("tempered", [False, True])
def test_kernels_do_what_the_equation_says(dtype: torch.dtype, whole: bool, tempered: bool) -> None:
    """p is summed in another order, so that a coin may fall between the two: in none of these rows it does."""
    a = a_round(32, dtype=dtype, whole=whole, tempered=tempered)
    (want_bt, want_b), (got_bt, got_b) = a.rejection_sample("torch"), a.rejection_sample("triton")
    assert torch.equal(got_b, want_b)
    counts_bt = torch.arange(K + 1, device=DEVICE) < want_b[:, None]
    assert torch.equal(got_bt[counts_bt], want_bt[counts_bt])
    # No guess stood, some and all of them.
    fell_b = want_b <= a.length_b
    assert (fell_b & (want_b == 1)).any() and (fell_b & (want_b > 1)).any() and (want_b == 1 + K).any()


@both
def test_greedy_rows_keep_what_is_likeliest_and_no_other_guess(backend: str) -> None:
    """Ties go to the first of equal tokens, which stand in different programs, and q says nothing."""
    logits_btv = torch.zeros(3, K + 1, V, device=DEVICE)
    logits_btv[:, :, 600], logits_btv[:, :, 1200] = 1, 1
    guesses_bk = torch.tensor([[600] * 3, [600, 1200, 600], [1200] * 3], device=DEVICE)
    greedy_b, zeros_b = torch.ones(3, dtype=torch.bool, device=DEVICE), torch.zeros(3, dtype=torch.int64, device=DEVICE)
    q_bkv = torch.full((3, K, V), 1 / V, device=DEVICE)
    a = Round(logits_btv, guesses_bk, zeros_b + K, q_bkv, None, greedy_b, zeros_b, zeros_b, None)
    tokens_bt, n_b = a.rejection_sample(backend)
    assert n_b.tolist() == [4, 2, 1]
    assert [row[:n] for row, n in zip(tokens_bt.tolist(), n_b.tolist(), strict=True)] == [[600] * 4, [600] * 2, [600]]


@both
def test_what_is_not_finite_hurts_its_own_row_only(backend: str) -> None:
    a = a_round(9, whole=True)
    # All guesses stand, so that each column is reached.
    q_bkv = probabilities(a.logits_btv[:, :K], None)
    a = a._replace(q_bkm=q_bkv, guesses_bk=a.logits_btv[:, :K].argmax(-1), length_b=a.length_b.new_full((9,), K))
    tokens_bt, n_b = a.rejection_sample(backend)
    assert n_b.tolist() == [K + 1] * 9
    a.logits_btv[0, 2, 1000], a.logits_btv[1, 0, 5], a.logits_btv[2, K] = math.nan, math.inf, -math.inf
    q_bkv[3, 1, 77] = math.nan
    q_bkv[5, 1] = math.nan
    got_bt, got_b = a.rejection_sample(backend)
    assert torch.equal(got_bt[6:], tokens_bt[6:]) and torch.equal(got_b[6:], n_b[6:])
    assert got_b[:3].tolist() == [3, 1, K + 1]
    assert [int(got_bt[row, column]) for row, column in ((0, 2), (1, 0), (2, K))] == [-1, -1, -1]
    # A q of NaN costs its guess and what is behind it, and the token is what the row draws anyway.
    a.length_b[5] = 1
    without_bt, _ = a.rejection_sample(backend)
    assert int(got_b[5]) == 2 and got_bt[5, 1] == without_bt[5, 1] and int(got_b[3]) == K + 1


@both
def test_one_column_and_no_other_behind_it(backend: str) -> None:
    """Where processors ask for what came before, columns are judged one at a time."""
    a = a_round(12)
    a = a._replace(length_b=a.length_b.clamp(max=1))
    one = a._replace(logits_btv=a.logits_btv[:, :1], guesses_bk=a.guesses_bk[:, :1], q_bkm=a.q_bkm[:, :1])
    (tokens_bt, n_b), (want_bt, want_b) = one.rejection_sample(backend), a.rejection_sample(backend)
    assert torch.equal(n_b, want_b) and torch.equal(tokens_bt[:, 0], want_bt[:, 0])


def chi_square(tokens_n: Tensor, p_v: Tensor) -> tuple[float, float]:
    """Of the tokens' counts, with the bound that it passes once in 1 / ALARM (Laurent and Massart)."""
    n, x = len(tokens_n), -math.log(ALARM)
    count_v = torch.bincount(tokens_n, minlength=len(p_v)).double()
    assert count_v[p_v == 0].sum() == 0
    often_v = p_v * n >= 10
    d = int(often_v.sum())
    chi2 = float(((count_v - p_v * n) ** 2 / (p_v * n))[often_v].sum())
    return chi2, d + 2 * math.sqrt(d * x) + 2 * x


@both
def test_tokens_are_distributed_as_p(backend: str) -> None:
    """First tokens of rows whose guesses stood and fell, of rows whose guess fell, and the guesses themselves."""
    n, v = 1500 if backend == "triton" and DEVICE == "cpu" else 60_000, 11
    generator = torch.Generator().manual_seed(3)
    logits_v, few_m = torch.randn(v, generator=generator).to(DEVICE), torch.randn(6, generator=generator).to(DEVICE)
    ids_m = torch.tensor([0, 2, 3, 7, 8, 10], device=DEVICE)
    place_v = torch.full((v,), 6, device=DEVICE).index_copy_(0, ids_m, torch.arange(6, device=DEVICE))
    zeros_n, temperature_n = torch.zeros(n, dtype=torch.int64, device=DEVICE), torch.full((n,), 0.8, device=DEVICE)
    noise = zeros_n > 0, torch.arange(n, device=DEVICE), zeros_n
    guesses_nk, q_nkm = torch.zeros(n, 1, dtype=torch.int64, device=DEVICE), torch.zeros(n, 1, 6, device=DEVICE)
    with backends.use(backend):
        guess_(guesses_nk, q_nkm, 0, few_m.expand(n, 6), *noise, ids_m=ids_m, temperature_b=temperature_n, stream=1)
    logits_ntv = logits_v.expand(n, 2, v)
    a = Round(logits_ntv, guesses_nk, zeros_n + 1, q_nkm, place_v, *noise, temperature_n)
    tokens_nt, n_n = a.rejection_sample(backend)
    p_v = (logits_v.double() / 0.8).softmax(0).cpu()
    q_v = among_all((few_m.double() / 0.8).softmax(0), place_v).cpu()
    rest_v = (p_v - q_v).clamp(min=0)
    fell_n, stood_n = n_n == 1, n_n == 2
    for some_n, wanted_v in (
        (guesses_nk[:, 0], q_v),
        (tokens_nt[:, 0], p_v),
        (tokens_nt[fell_n, 0], rest_v / rest_v.sum()),
        (tokens_nt[stood_n, 0], torch.minimum(p_v, q_v) / torch.minimum(p_v, q_v).sum()),
        (tokens_nt[stood_n, 1], p_v),
    ):
        chi2, most = chi_square(some_n.cpu(), wanted_v)
        assert chi2 < most
    # As many stand as p and q have in common; within six standard deviations.
    overlap = float(torch.minimum(p_v, q_v).sum())
    assert abs(float(stood_n.double().mean()) - overlap) < 6 * math.sqrt(overlap * (1 - overlap) / n)
    # The bound tells another distribution.
    chi2, most = chi_square(tokens_nt[:, 0].cpu(), q_v + 1e-3)
    assert chi2 > 2 * most


@needs_triton
@pytest.mark.parametrize("whole", [False, True])
def test_rows_of_a_wider_buffer_are_read_as_they_lie(whole: bool) -> None:
    """Guesses, probabilities and logits that are parts of larger tensors."""
    a = a_round(6, whole=whole)
    wide = a._replace(
        logits_btv=torch.nn.functional.pad(a.logits_btv, (0, 9), value=9.0)[..., :V],
        guesses_bk=torch.nn.functional.pad(a.guesses_bk, (1, 2))[:, 1:-2],
        q_bkm=torch.nn.functional.pad(a.q_bkm, (0, 5, 2, 0), value=9.0)[:, 2:, :-5],
    )
    for want, got in zip(a.rejection_sample("triton"), wide.rejection_sample("triton"), strict=True):
        assert torch.equal(got, want)


@needs_triton
def test_what_is_strided_is_read_as_it_lies() -> None:
    a = a_round(6, tempered=True)
    assert a.place_v is not None and a.temperature_b is not None
    wide_v2, wide_b2 = (torch.stack((x, x), 1) for x in (a.place_v, a.temperature_b))
    strided = a._replace(place_v=wide_v2[:, 0], temperature_b=wide_b2[:, 0])
    for got, want in zip(strided.rejection_sample("triton"), a.rejection_sample("triton"), strict=True):
        assert torch.equal(got, want)


@both
@pytest.mark.parametrize("k", [0, K + 2])
def test_guesses_are_one_at_least_and_no_more_than_columns(backend: str, k: int) -> None:
    a = a_round(2, whole=True)
    guesses_bk, q_bkm = a.guesses_bk.new_zeros(2, k), a.q_bkm.new_zeros(2, k, V)
    with pytest.raises(ConfigError, match=f"guesses_bk: expected from 1 to t=4 guesses a row, got {k}"):
        a._replace(guesses_bk=guesses_bk, q_bkm=q_bkm).rejection_sample(backend)


@needs_triton
def test_operator_keeps_its_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    from subquad.ops.rejection import on_triton

    monkeypatch.setattr(launch, "poison", False)
    a = a_round(2, tempered=True)
    rows = a.length_b, a.greedy_b, a.seed_b, a.step_b
    given = (a.logits_btv, a.guesses_bk, a.q_bkm, *rows, a.place_v, a.temperature_b, 2)
    torch.library.opcheck(on_triton._rejection_sample, given)
