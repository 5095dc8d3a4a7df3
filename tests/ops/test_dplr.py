"""Diagonal plus low-rank state spaces: Cauchy kernel, chunks and steps against the loop with dense matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from subquad.core.errors import ConfigError
from subquad.ops import dplr, hippo
from subquad.ops.dplr import on_torch
from subquad.ops.dplr.equation import bilinear


def system(g: int = 2, n: int = 3, *, start: bool = False, dtype: torch.dtype = torch.float64) -> dplr.System:
    """Groups with steps from fine to coarse: HiPPO's start, or any numbers."""
    rng = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(g, n, generator=rng, dtype=torch.complex128)

    poles, low, given = normal(), normal(), normal()
    poles = torch.complex(-poles.real.abs(), 3 * poles.imag)
    if start:
        poles, low, given = (x.expand(g, -1) for x in hippo.normal_plus_low_rank(2 * n))
    return dplr.System(poles, low, given, normal(), torch.logspace(-3, -0.5, g, dtype=torch.float64)).to(dtype)


def block(t: int, g: int = 2, r: int = 2, n: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    u_btd = torch.randn(2, t, g * r, generator=rng, dtype=torch.float64)
    return u_btd.to(dtype), torch.randn(2, g * r, n, 2, generator=rng, dtype=torch.float64).to(dtype)


def powers(made: dplr.System, length: int) -> Tensor:
    """The independent computation: dense solves and one matrix product a token."""
    a_gpp, b_gp, c_gp = bilinear(made)
    out, x_gp = [], b_gp
    for _ in range(length):
        out.append((c_gp * x_gp).sum(-1))
        x_gp = (a_gpp @ x_gp[..., None])[..., 0]
    return torch.stack(out, dim=1)


@pytest.mark.parametrize("start", [True, False], ids=["hippo", "any"])
@pytest.mark.parametrize("length", [1, 2, 7, 64, 65, 500])
def test_kernel_equals_matrix_powers(length: int, start: bool) -> None:
    for n in (1, 4, 32):
        made = system(3, n, start=start)
        want_gl = powers(made, length)
        torch.testing.assert_close(dplr.kernel(made, length) / want_gl.abs().max(), want_gl / want_gl.abs().max())


def test_kernel_by_slices_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    made = system(5, 4)
    leaves = [x.clone().requires_grad_() for x in made]
    whole = dplr.kernel(dplr.System(*leaves), 20)
    want = torch.autograd.grad(whole.square().sum(), leaves)
    monkeypatch.setattr(on_torch, "SLICE", 2 * 11 * 4)
    sliced = dplr.kernel(dplr.System(*leaves), 20)
    torch.testing.assert_close(sliced, whole, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(sliced.square().sum(), leaves), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("start", [True, False], ids=["hippo", "any"])
@pytest.mark.parametrize("t", [0, 1, 2, 3, 63, 64, 65, 130, 1003])
def test_scan_equals_equation(t: int, start: bool) -> None:
    made, (u_btd, state) = system(2, 8, start=start), block(t, n=8)
    y, after = dplr.equation(u_btd, made, state)
    got, end = dplr.scan(u_btd, made, state)
    torch.testing.assert_close(got, y, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(end, after, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(dplr.final_state(u_btd, made, state), after, rtol=1e-9, atol=1e-10)


def test_scan_from_nothing_is_the_convolution_with_the_kernel() -> None:
    made, (u_btd, state) = system(2, 32, start=True), block(200, n=32)
    k_dl = dplr.kernel(made, 200).repeat_interleave(2, dim=0)
    at = torch.arange(200)
    toeplitz_dtt = k_dl[:, (at[:, None] - at).clamp(min=0)].tril()
    want = torch.einsum("dts,bsd->btd", toeplitz_dtt, u_btd)
    torch.testing.assert_close(dplr.scan(u_btd, made, torch.zeros_like(state))[0], want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("form", ["equation", "scan"])
def test_documents_and_padding_equal_separate_sequences(form: str) -> None:
    t, made = 200, system()
    u_btd, state = block(t)
    lengths = [[70, 1, 58, 40], [3, 64, 90]]
    documents_bt, valid_bt = torch.zeros(2, t, dtype=torch.int64), torch.zeros(2, t, dtype=torch.bool)
    for row, parts in enumerate(lengths):
        valid_bt[row, : sum(parts)] = True
        documents_bt[row, : sum(parts)] = torch.arange(len(parts)).repeat_interleave(torch.tensor(parts))
        documents_bt[row, sum(parts) :] = len(parts) + 5
    spoiled = u_btd.masked_fill(~valid_bt[..., None], torch.nan)
    where = {"valid_bt": valid_bt, "documents_bt": documents_bt}
    y, end = getattr(dplr, form)(spoiled, made, state, **where)
    torch.testing.assert_close(dplr.final_state(spoiled, made, state, **where), end, rtol=1e-9, atol=1e-10)
    for row, parts in enumerate(lengths):
        start = 0
        for document, n in enumerate(parts):
            before = state[row : row + 1] if document == 0 else torch.zeros_like(state[:1])
            want, after = dplr.equation(u_btd[row : row + 1, start : start + n], made, before)
            torch.testing.assert_close(y[row : row + 1, start : start + n], want, rtol=1e-9, atol=1e-10)
            start += n
        torch.testing.assert_close(end[row : row + 1], after, rtol=1e-9, atol=1e-10)


def test_final_state_keeps_any_prefix() -> None:
    made, (u_btd, state) = system(), block(70)
    documents_bt = torch.tensor([0] * 20 + [1] * 30 + [2] * 20).expand(2, -1)
    for n in (0, 1, 19, 20, 21, 64, 70):
        for documents in (None, documents_bt):
            valid_bt = torch.arange(70) < torch.tensor([n, 70 - n])[:, None]
            got = dplr.final_state(u_btd, made, state, valid_bt=valid_bt, documents_bt=documents)
            for row, kept in enumerate((n, 70 - n)):
                inside = None if documents is None else documents[row : row + 1, :kept]
                one = slice(row, row + 1)
                want = dplr.equation(u_btd[one, :kept], made, state[one], documents_bt=inside)[1]
                torch.testing.assert_close(got[one], want, rtol=1e-9, atol=1e-10)


def test_no_step_lets_a_state_grow() -> None:
    """Whatever the low-rank part: a step of any length is a contraction, so every power is."""
    made = system(4, 6)._replace(step_g=torch.tensor([1e-4, 1e-1, 1e2, 1e6], dtype=torch.float64))
    assert (torch.linalg.matrix_norm(bilinear(made)[0], ord=2) <= 1 + 1e-12).all()


@pytest.mark.parametrize("t", [1, 65, 130])
def test_gradients_equal_those_of_the_equation(t: int) -> None:
    made, (u_btd, state) = system(), block(t)
    weight = torch.randn(u_btd.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    documents_bt = (torch.arange(t) >= 40).long().expand(2, -1)
    for where in ({}, {"documents_bt": documents_bt, "valid_bt": torch.arange(t) < torch.tensor([[t], [t - 1]])}):
        found: list[tuple[Tensor, ...]] = []
        for form in (dplr.scan, dplr.equation):
            leaves = [x.clone().requires_grad_() for x in (u_btd, state, *made)]
            y, end = form(leaves[0], dplr.System(*leaves[2:]), leaves[1], **where)
            kept = y if not where else y.masked_fill(~where["valid_bt"][..., None], 0)
            found.append(torch.autograd.grad((kept * weight).sum() + end.square().sum(), leaves))
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


def test_gradcheck() -> None:
    made, (u_btd, state) = system(), block(5, r=1)
    leaves = [x.clone().requires_grad_() for x in made]

    def check(function: Callable[..., Any], *inputs: Tensor) -> bool:
        return torch.autograd.gradcheck(function, [x.requires_grad_() for x in inputs])

    assert check(lambda *xs: dplr.kernel(dplr.System(*xs), 6), *leaves)
    assert check(lambda u, s, *xs: dplr.scan(u, dplr.System(*xs), s), u_btd, state, *leaves)


def test_float32_is_as_exact_as_the_loop() -> None:
    """At most twice the error of the naive float32 loop, at HiPPO's start, where a modal form would have no digit."""
    made, (u_btd, state) = system(2, 32, start=True, dtype=torch.float32), block(500, n=32, dtype=torch.float32)
    exact = dplr.equation(u_btd.double(), made.to(torch.float64), state.double())
    naive, got = dplr.equation(u_btd, made, state), dplr.scan(u_btd, made, state)
    for a, b, c in zip(got, naive, exact, strict=True):
        assert (a - c).norm() <= 2 * (b - c).norm()
    want_gl = powers(made.to(torch.float64), 500)
    # The kernel is made in float64 and rounded once.
    torch.testing.assert_close(
        dplr.kernel(made, 500).double(), want_gl, rtol=1e-6, atol=1e-6 * float(want_gl.abs().max())
    )


def test_what_does_not_fit_is_refused() -> None:
    made, (u_btd, state) = system(), block(3)
    with pytest.raises(ConfigError, match="d=3 must be a multiple of the 2 systems"):
        dplr.scan(u_btd[..., :3], made, state)
    with pytest.raises(ConfigError, match=r"state_bdnp: expected shape \(2, 4, 3, 2\)"):
        dplr.final_state(u_btd, made, state[:, :, :2])
    with pytest.raises(ConfigError, match="length: expected at least 1, got 0"):
        dplr.kernel(made, 0)
