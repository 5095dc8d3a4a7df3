"""The selective scan: the chunked form in PyTorch against the loop over tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.core.errors import ConfigError
from subquad.ops import gla, selective_scan
from subquad.ops.selective_scan import on_torch

EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}
ALONG = ("u_btd", "dt_btd", "B_btgn", "C_btgn")


def arguments(
    t: int, *, decay: float = 1.0, dtype: torch.dtype = torch.float64, d: int = 6, g: int = 2, n: int = 3
) -> dict[str, Tensor]:
    """Two rows; rates of each channel from `decay` down to a thousandth of it."""
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    made = {
        "u_btd": normal(2, t, d),
        "dt_btd": F.softplus(normal(2, t, d)),
        "A_dn": -decay * torch.logspace(-3, 0, d * n, dtype=torch.float64).view(n, d).mT,
        "B_btgn": normal(2, t, g, n),
        "C_btgn": normal(2, t, g, n),
        "D_d": normal(d),
        "state_bdn": normal(2, d, n),
    }
    return {name: x.to(dtype) for name, x in made.items()}


def written(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the final state depends on."""
    return {name: x for name, x in values.items() if name not in ("C_btgn", "D_d")}


def columns(values: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    return {name: x[:, start:stop] if name in ALONG else x for name, x in values.items()}


def rows(values: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    return {name: x if name in ("A_dn", "D_d") else x[row : row + 1] for name, x in values.items()}


def error(got: Tensor, want: Tensor) -> float:
    return float((got.detach().double() - want.detach().double()).norm() / want.detach().double().norm())


def gradients(function: Callable[..., Any], values: dict[str, Tensor], **options: Any) -> list[Tensor]:
    leaves = {name: x.clone().requires_grad_() for name, x in values.items()}
    y, end = function(**leaves, **options)
    # Both results count, each element with a weight of its own.
    weights = (torch.sin(torch.arange(x.numel(), dtype=x.dtype)).view(x.shape) for x in (y, end))
    loss = sum((x * w).sum() for x, w in zip((y, end), weights, strict=True))
    return list(torch.autograd.grad(loss, list(leaves.values())))


@pytest.mark.parametrize("decay", [0.0, 1.0, 1e5])
@pytest.mark.parametrize("t", [0, 1, 2, 63, 64, 65, 130, 1000])
def test_scan_equals_equation(t: int, decay: float) -> None:
    values = arguments(t, decay=decay)
    y, state = selective_scan.equation(**values)
    got, end = selective_scan.scan(**values)
    torch.testing.assert_close(got, y, **EXACT)
    torch.testing.assert_close(end, state, **EXACT)
    torch.testing.assert_close(selective_scan.final_state(**written(values)), state, **EXACT)


def test_two_tokens_by_hand() -> None:
    """One channel, two entries: one keeps all, one keeps a quarter for a step of 2."""
    u, dt = torch.tensor([[[3.0], [5.0]]]), torch.tensor([[[1.0], [2.0]]])
    A = torch.tensor([[0.0, -0.6931472]])
    B, C = torch.tensor([[[[1.0, 2.0]], [[0.0, 1.0]]]]), torch.tensor([[[[1.0, 0.0]], [[1.0, 1.0]]]])
    y, state = selective_scan.scan(u, dt, A, B, C, torch.tensor([0.5]), torch.zeros(1, 1, 2))
    torch.testing.assert_close(state.flatten(), torch.tensor([3.0, 6.0 / 4 + 10.0]))
    torch.testing.assert_close(y.flatten(), torch.tensor([3.0 + 1.5, 3.0 + 11.5 + 2.5]))


def test_a_channel_is_a_head_of_gated_linear_attention() -> None:
    """An oracle of its own: keys B, queries C, values dt u, one value channel a head, log decays dt A."""
    values = arguments(100, g=1)
    u, dt, A, B, C, D, state = values.values()
    B_bthk, C_bthk = (x.expand(-1, -1, 6, -1) for x in (B, C))
    g_bthk = dt[..., None] * A
    y, end = gla.equation(C_bthk, B_bthk, (dt * u)[..., None], g_bthk, state[..., None])
    got, last = selective_scan.equation(**values)
    torch.testing.assert_close(got, y[..., 0] + D * u, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last, end[..., 0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["equation", "scan"])
def test_documents_and_padding_equal_separate_sequences(form: str) -> None:
    t = 200
    values = arguments(t)
    lengths = [[70, 1, 58, 40], [3, 64, 90]]
    documents_bt = torch.zeros(2, t, dtype=torch.int64)
    valid_bt = torch.zeros(2, t, dtype=torch.bool)
    for row, parts in enumerate(lengths):
        valid_bt[row, : sum(parts)] = True
        documents_bt[row, : sum(parts)] = torch.arange(len(parts)).repeat_interleave(torch.tensor(parts))
        # Columns without a token carry anything, documents of their own included.
        documents_bt[row, sum(parts) :] = len(parts) + 5
    spoiled = {
        name: x.masked_fill(~valid_bt.view(2, t, *[1] * (x.dim() - 2)), torch.nan) if name in ALONG else x
        for name, x in values.items()
    }
    where = {"valid_bt": valid_bt, "documents_bt": documents_bt}
    y, end = getattr(selective_scan, form)(**spoiled, **where)
    torch.testing.assert_close(selective_scan.final_state(**written(spoiled), **where), end, **EXACT)
    for row, parts in enumerate(lengths):
        start = 0
        for document, n in enumerate(parts):
            alone = rows(columns(values, start, start + n), row)
            if document > 0:
                alone["state_bdn"] = torch.zeros_like(alone["state_bdn"])
            want, state = selective_scan.equation(**alone)
            torch.testing.assert_close(y[row : row + 1, start : start + n], want, **EXACT)
            start += n
        torch.testing.assert_close(end[row : row + 1], state, **EXACT)


def test_final_state_keeps_any_prefix() -> None:
    t = 70
    values = arguments(t)
    documents_bt = torch.tensor([0] * 20 + [1] * 30 + [2] * 20).expand(2, -1)
    for n in (0, 1, 19, 20, 21, 64, 70):
        for documents in (None, documents_bt):
            valid_bt = torch.arange(t) < torch.tensor([n, t - n])[:, None]
            got = selective_scan.final_state(**written(values), valid_bt=valid_bt, documents_bt=documents)
            for row, kept in enumerate((n, t - n)):
                inside = None if documents is None else documents[row : row + 1, :kept]
                state = selective_scan.equation(**rows(columns(values, 0, kept), row), documents_bt=inside)[1]
                torch.testing.assert_close(got[row : row + 1], state, **EXACT)


def test_splits_equal_one_shot() -> None:
    t = 150
    values = arguments(t)
    whole, end = selective_scan.scan(**values)
    state, start, pieces = values["state_bdn"], 0, []
    for n in (1, 63, 2, 65, 0, 19):
        piece = columns(values, start, start + n) | {"state_bdn": state}
        pieces.append(selective_scan.scan(**piece)[0])
        state, start = selective_scan.final_state(**written(piece)), start + n
    assert start == t
    torch.testing.assert_close(torch.cat(pieces, 1), whole, **EXACT)
    torch.testing.assert_close(state, end, **EXACT)


def test_groups_equal_repeated_ones() -> None:
    values = arguments(70)
    many = {name: x.repeat_interleave(3, 2) if name in ("B_btgn", "C_btgn") else x for name, x in values.items()}
    for got, want in zip(selective_scan.scan(**values), selective_scan.equation(**many), strict=True):
        torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("decay", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("t", [1, 65, 130])
def test_gradients_equal_those_of_the_equation(t: int, decay: float) -> None:
    values = arguments(t, decay=decay)
    documents_bt = (torch.arange(t) >= 40).long().expand(2, -1)
    for options in ({}, {"documents_bt": documents_bt, "valid_bt": torch.arange(t) < torch.tensor([[t], [t - 1]])}):
        got = gradients(selective_scan.scan, values, **options)
        want = gradients(selective_scan.equation, values, **options)
        for name, a, b in zip(values, got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def test_gradcheck() -> None:
    values = arguments(5)

    def check(function: Callable[..., Any], inputs: dict[str, Tensor]) -> bool:
        leaves = tuple(x.requires_grad_() for x in inputs.values())
        return torch.autograd.gradcheck(lambda *xs: function(**dict(zip(inputs, xs, strict=True))), leaves)

    assert check(selective_scan.scan, values)
    assert check(selective_scan.final_state, written(values))


@pytest.mark.parametrize("step", [0.0, 1e4, 1e30])
def test_any_step_stays_finite(step: float) -> None:
    """Forgetting everything every third token, beside steps that matter; such a token writes nothing."""
    values = arguments(130, dtype=torch.float32)
    values["dt_btd"][:, ::3] = step
    values["u_btd"][:, ::3] = 0
    want = selective_scan.equation(**{name: x.double() for name, x in values.items()})
    torch.testing.assert_close(selective_scan.scan(**values)[0].double(), want[0], rtol=1e-4, atol=1e-5)
    state = selective_scan.final_state(**written(values))
    torch.testing.assert_close(state.double(), want[1], rtol=1e-4, atol=1e-5)
    for name, gradient in zip(values, gradients(selective_scan.scan, values), strict=True):
        assert gradient.isfinite().all(), name


@pytest.mark.parametrize("decay", [0.0, 0.01, 100.0])
def test_float32_is_as_exact_as_the_loop(decay: float) -> None:
    """At most twice the error of the naive float32 loop, or that of two roundings a step of sums of 64 terms."""
    values = arguments(700, decay=decay, dtype=torch.float32)
    double = {name: x.double() for name, x in values.items()}
    exact, naive = selective_scan.equation(**double), selective_scan.equation(**values)
    assert error(selective_scan.scan(**values)[0], exact[0]) <= 2 * error(naive[0], exact[0])
    assert error(selective_scan.final_state(**written(values)), exact[1]) <= 2 * error(naive[1], exact[1])
    got, rough, want = (
        gradients(f, x)
        for f, x in (
            (selective_scan.scan, values),
            (selective_scan.equation, values),
            (selective_scan.equation, double),
        )
    )
    for name, a, b, c in zip(values, got, rough, want, strict=True):
        assert error(a, c) <= max(2 * error(b, c), 2 * 8 * 2**-24), name


def test_bfloat16_inputs_accumulate_in_float32() -> None:
    values = arguments(300, decay=0.01, dtype=torch.bfloat16)
    for name in ("dt_btd", "A_dn", "state_bdn"):
        values[name] = values[name].float()
    exact, end = selective_scan.equation(**{name: x.double() for name, x in values.items()})
    y, state = selective_scan.scan(**values)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    # Rounding the result is all that may be lost.
    assert error(y, exact) <= 2 * error(exact.to(torch.bfloat16), exact)
    assert error(state, end) < 1e-5
    low, _ = selective_scan.equation(**values, dtype=torch.bfloat16)
    assert error(low, exact) > 4 * error(y, exact)


def test_autocast_leaves_the_state_precise() -> None:
    values = arguments(100, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = selective_scan.scan(**values)[0]
    torch.testing.assert_close(got, selective_scan.scan(**values)[0], rtol=0, atol=0)


def test_a_token_changes_nothing_before_it() -> None:
    values = arguments(130)
    before = selective_scan.scan(**values)[0]
    for name in ALONG:
        values[name][:, 100:] *= 0.5
    after = selective_scan.scan(**values)[0]
    torch.testing.assert_close(after[:, :100], before[:, :100], rtol=0, atol=0)
    assert (after[:, 100:] - before[:, 100:]).abs().amin(dim=(0, 2)).max() > 1e-3


@pytest.mark.parametrize("training", [False, True])
def test_states_of_single_tokens_never_stand_together(training: bool) -> None:
    """No tensor that is made or kept for the backward has a state for each of 640 tokens."""
    values = {name: x.requires_grad_(training) for name, x in arguments(640, d=8, g=1, n=16).items()}
    kept: list[int] = []

    class Widest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            leaves = (x for x in torch.utils._pytree.tree_leaves(made) if isinstance(x, Tensor))
            kept.extend(x.untyped_storage().nbytes() for x in leaves)
            return made

    with Widest():
        y, end = selective_scan.scan(**values)
        if training:
            (y.sum() + end.sum()).backward()
    assert max(kept) < 2 * 640 * 8 * 16 * 8 / 4


def test_bad_shapes_are_refused() -> None:
    values = arguments(5)
    with pytest.raises(ConfigError, match="dt_btd: expected t=5 as in u_btd, got 4"):
        selective_scan.scan(**values | {"dt_btd": values["dt_btd"][:, :4]})
    with pytest.raises(ConfigError, match="state_bdn: expected 3 axes"):
        selective_scan.final_state(**written(values) | {"state_bdn": values["A_dn"]})
    four = {name: values[name].repeat(1, 1, 2, 1) for name in ("B_btgn", "C_btgn")}
    with pytest.raises(ConfigError, match="number of groups that divides d=6, got 4"):
        selective_scan.scan(**values | four)
    assert on_torch.refusal() is None
