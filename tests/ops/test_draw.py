"""Draws: what the kernels take is what PyTorch takes, and noise belongs to seed, step and token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from subquad.core.errors import ConfigError
from subquad.ops import backends
from subquad.ops.draw import agree, draw, guess_, gumbel, probabilities, uniform

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(not (torch.cuda.is_available() or backends.interpreted()), reason="needs Triton")
V = 5003


def rows(b: int, t: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, of whose rows the first is greedy, with the rows' seeds and steps; some beyond 32 bits."""
    generator = torch.Generator().manual_seed(b * t)
    logits_btv = (3 * torch.randn(b, t, V, generator=generator)).to(DEVICE, dtype)
    greedy_b = torch.arange(b, device=DEVICE) == 0
    seed_b = torch.tensor([5, 2**62 + 11, 2**40, 7][:b], device=DEVICE)
    return logits_btv, greedy_b, seed_b, torch.tensor([0, 3, 2**33, 1000][:b], device=DEVICE)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stream", [0, 3])
def test_kernels_take_the_same_tokens(dtype: torch.dtype, stream: int) -> None:
    logits_btv, greedy_b, seed_b, step_b = rows(4, 3, dtype)
    with backends.use("torch"):
        want_bt = draw(logits_btv, greedy_b, seed_b, step_b, stream=stream)
    with backends.use("triton"):
        got_bt = draw(logits_btv, greedy_b, seed_b, step_b, stream=stream)
        plain_bt = draw(logits_btv, greedy_b, seed_b, step_b, draws=False)
    # Noise that differs in its last digit may decide between two tokens: then their scores are as good as equal.
    noise_btv = torch.stack([gumbel(seed_b, step_b + i, V, stream) for i in range(3)], dim=1)
    score_btv = logits_btv.float() + noise_btv.masked_fill(greedy_b[:, None, None], 0)
    scores = (score_btv.gather(2, tokens_bt[..., None]) for tokens_bt in (got_bt, want_bt))
    torch.testing.assert_close(*scores, rtol=1e-6, atol=1e-6)
    assert (got_bt == want_bt).float().mean() > 0.8
    assert torch.equal(got_bt[0], want_bt[0])
    assert torch.equal(plain_bt, logits_btv.float().argmax(-1))


@needs_triton
def test_kernels_take_the_first_of_equal_tokens() -> None:
    logits_btv, greedy_b, seed_b, step_b = rows(1, 2, torch.float32)
    logits_btv.clamp_(max=1.0)
    with backends.use("triton"):
        got_bt = draw(logits_btv, greedy_b, seed_b, step_b)
    assert got_bt.tolist() == (logits_btv == 1).to(torch.int64).argmax(-1).tolist()


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
def test_broken_rows_give_no_token(backend: str) -> None:
    logits_btv, greedy_b, seed_b, step_b = rows(4, 2, torch.float32)
    logits_btv[0, 0, 4000], logits_btv[1, 1, 1], logits_btv[2, 0] = torch.nan, torch.inf, -torch.inf
    # A single token that is possible is certain.
    logits_btv[3, 0, 1:] = -torch.inf
    with backends.use(backend):
        got_bt = draw(logits_btv, greedy_b, seed_b, step_b)
    assert (got_bt < 0).tolist() == [[True, False], [False, True], [True, False], [False, False]]
    assert got_bt[3, 0] == 0


@needs_triton
@pytest.mark.parametrize("stream", [0, 1, 5])
def test_coins_are_the_same_to_the_bit(stream: int) -> None:
    _, _, seed_b, step_b = rows(4, 1, torch.float32)
    with backends.use("torch"):
        want_b = uniform(seed_b, step_b, stream)
    with backends.use("triton"):
        assert torch.equal(uniform(seed_b, step_b, stream), want_b)
    assert ((want_b >= 0) & (want_b < 1)).all()


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_temperature_is_a_division_before(backend: str, dtype: torch.dtype) -> None:
    logits_btv, *noise = rows(4, 2, dtype)
    temperature_b = torch.tensor([1.0, 0.3, 1.7, 2.0], device=DEVICE)
    with backends.use(backend):
        got_bt = draw(logits_btv, *noise, temperature_b=temperature_b, stream=3)
        assert torch.equal(got_bt, draw(logits_btv.float() / temperature_b[:, None, None], *noise, stream=3))


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("some", [False, True])
def test_guesses_are_draws_among_some_tokens(backend: str, dtype: torch.dtype, some: bool) -> None:
    """As among all tokens with the others forbidden, in their column alone, with what they were drawn from."""
    logits_btv, greedy_b, seed_b, step_b = rows(4, 1, dtype)
    temperature_b = torch.tensor([1.0, 0.3, 1.7, 2.0], device=DEVICE)
    ids_m = torch.arange(3, V, 7, device=DEVICE) if some else torch.arange(V, device=DEVICE)
    few_bm = logits_btv[:, 0, ids_m]
    all_bv = torch.full_like(logits_btv[:, 0], -torch.inf).index_copy_(1, ids_m, few_bm)
    tokens_bk = torch.full((4, 3), -5, device=DEVICE)
    q_bkm = torch.full((4, 3, len(ids_m)), -5.0, device=DEVICE)
    more = {"ids_m": ids_m if some else None, "temperature_b": temperature_b}
    with backends.use(backend):
        guess_(tokens_bk, q_bkm, 2, few_bm, greedy_b, seed_b, step_b, **more, stream=3)
        alone_bk = torch.zeros_like(tokens_bk)
        guess_(alone_bk, None, 2, few_bm, greedy_b, seed_b, step_b, **more, stream=3)
        want_b1 = draw(all_bv[:, None], greedy_b, seed_b, step_b + 2, temperature_b=temperature_b, stream=3)
        guess_(alone_bk, None, 1, few_bm, greedy_b, seed_b, step_b, **more, draws=False)
    assert torch.equal(tokens_bk[:, 2:], want_b1) and torch.equal(alone_bk[:, 2:], want_b1)
    assert (tokens_bk[:, :2] == -5).all() and (q_bkm[:, :2] == -5).all()
    assert torch.equal(alone_bk[:, 1], ids_m[few_bm.argmax(-1)])
    # Ten operations in float32, of numbers whose exponents are known to the last digit times their size, 30 at most.
    want_bm = probabilities(few_bm.float() / temperature_b[:, None], greedy_b)
    torch.testing.assert_close(q_bkm[:, 2], want_bm, rtol=4e-6, atol=1e-9)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
def test_guesses_of_broken_rows_are_tokens_without_odds(backend: str) -> None:
    logits_btv, *noise = rows(4, 1, torch.float32)
    logits_btv[0, 0, 4000], logits_btv[1, 0, 1], logits_btv[2, 0] = torch.nan, torch.inf, -torch.inf
    logits_btv[3, 0, 1:] = -torch.inf
    tokens_b1, q_b1v = torch.full((4, 1), -5, device=DEVICE), torch.zeros(4, 1, V, device=DEVICE)
    with backends.use(backend):
        guess_(tokens_b1, q_b1v, 0, logits_btv[:, 0], *noise)
    assert ((tokens_b1 >= 0) & (tokens_b1 < V)).all()
    assert q_b1v[:3].isnan().all()
    assert tokens_b1[3, 0] == 0 and q_b1v[3, 0, 0] == 1 and (q_b1v[3, 0, 1:] == 0).all()


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
def test_guesses_stand_up_to_the_first_that_is_another(backend: str) -> None:
    tokens_bt = torch.tensor([[1, 2, 3, 9], [1, 5, 3, 9], [0, 2, 3, 9], [1, 2, 3, 9], [1, 2, 3, 9]], device=DEVICE)
    logits_btv = torch.nn.functional.one_hot(tokens_bt, V).float()
    logits_btv[3, 0, 7] = torch.nan
    tokens_bt[3, 0] = -1
    noise = torch.ones(5, dtype=torch.bool, device=DEVICE), *torch.zeros(2, 5, dtype=torch.int64, device=DEVICE)
    guesses_bk = torch.tensor([1, 2, 3, 9], device=DEVICE).expand(5, 4)
    wanted = {
        (4, 4): ([4, 4, 4, 4, 2], [5, 2, 1, 1, 3]),
        (4, 3): ([3, 3, 3, 2, 0], [4, 2, 1, 1, 1]),
        (1, 1): ([1, 1, 1, 1, 0], [2, 2, 1, 1, 1]),
        (3, 0): ([0] * 5, [1] * 5),
    }
    for (t, k), (lengths, n) in wanted.items():
        length_b = torch.tensor(lengths, device=DEVICE)
        with backends.use(backend):
            got_bt, n_b = agree(logits_btv[:, :t], guesses_bk[:, :k], length_b, *noise, draws=False)
        assert torch.equal(got_bt, tokens_bt[:, :t]) and n_b.tolist() == n


@needs_triton
def test_many_columns_agree_as_in_pytorch() -> None:
    """More scores than one warp compares, with noise and a temperature of each row's own; guesses that often stand."""
    logits_btv, *noise = rows(4, 17, torch.float32)
    temperature_b = torch.tensor([1.0, 0.3, 1.7, 2.0], device=DEVICE)
    guesses_bk = draw(logits_btv, *noise, temperature_b=temperature_b)
    for b, wrong in enumerate((3, 11, 16)):
        guesses_bk[b, wrong] += 1
    length_b = torch.tensor([17, 17, 17, 9], device=DEVICE)
    with backends.use("triton"):
        got_bt, n_b = agree(logits_btv, guesses_bk, length_b, *noise, temperature_b=temperature_b)
    assert torch.equal(got_bt, draw(logits_btv, *noise, temperature_b=temperature_b))
    assert n_b.tolist() == [4, 12, 17, 10]


@needs_triton
def test_what_is_strided_is_read_as_it_lies() -> None:
    logits_btv, *noise = rows(4, 1, torch.float32)
    temperature_b, ids_m = (0.5 + 0.1 * torch.arange(8, device=DEVICE))[::2], torch.arange(80, device=DEVICE)[::2]
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for backend in ("torch", "triton"):
        tokens_bk, q_bkm = torch.zeros(4, 1, dtype=torch.int64, device=DEVICE), torch.zeros(4, 1, 40, device=DEVICE)
        with backends.use(backend):
            drawn_bt = draw(logits_btv, *noise, temperature_b=temperature_b[:1].expand(4))
            few_bm = logits_btv[:, 0, ids_m]
            guess_(tokens_bk, q_bkm, 0, few_bm, *noise, ids_m=ids_m, temperature_b=temperature_b)
        found.append((drawn_bt, tokens_bk, q_bkm))
    (drawn_bt, tokens_bk, q_bkm), (got_bt, got_bk, got_bkm) = found
    assert torch.equal(got_bt, drawn_bt) and torch.equal(got_bk, tokens_bk)
    torch.testing.assert_close(got_bkm, q_bkm)


@needs_triton
def test_guesses_are_not_written_between_others() -> None:
    logits_btv, *noise = rows(2, 1, torch.float32)
    with backends.use("triton"), pytest.raises(ConfigError, match="tokens_bk: expected a last axis that lies side"):
        guess_(torch.zeros(3, 2, dtype=torch.int64, device=DEVICE).T, None, 0, logits_btv[:, 0], *noise)


@needs_triton
def test_operators_keep_their_contract() -> None:
    from subquad.ops.draw import on_triton

    logits_btv, *noise = rows(2, 1, torch.float32)
    tokens_bk, q_bkm = torch.zeros(2, 1, dtype=torch.int64, device=DEVICE), torch.zeros(2, 1, V, device=DEVICE)
    torch.library.opcheck(on_triton._draw, (logits_btv, None, None, *noise, None, True, 0))
    torch.library.opcheck(on_triton._draw, (logits_btv, tokens_bk, noise[1], *noise, None, True, 0))
    torch.library.opcheck(on_triton._guess, (tokens_bk, q_bkm, 0, logits_btv[:, 0], *noise, None, None, True, 1))
    torch.library.opcheck(on_triton._guess, (tokens_bk, None, 0, logits_btv[:, 0], *noise, None, None, False, 1))
