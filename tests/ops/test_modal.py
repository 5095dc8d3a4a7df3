"""Diagonal state spaces in modal form: the chunked form in PyTorch against the loop over tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.core.errors import ConfigError
from subquad.ops import modal

# Real parts of log_a: on the circle, near it, ordinary, and so strong that one token forgets all.
DECAYS = {"none": 0.0, "slow": 1e-4, "mixed": 1.0, "strong": 200.0}


def arguments(
    t: int, *, decay: float = 1.0, dtype: torch.dtype = torch.float64, b: int = 2, g: int = 2, r: int = 2, n: int = 3
) -> dict[str, Tensor]:
    """Two rows, two groups of two channels, three modes of any frequency; decays a token uniform in [0, decay]."""
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    rate_gn = decay * torch.rand(g, n, generator=rng, dtype=torch.float64)
    angle_gn = math.pi * (2 * torch.rand(g, n, generator=rng, dtype=torch.float64) - 1)
    made = {
        "u_btd": normal(b, t, g * r),
        "log_a_gn": torch.complex(-rate_gn, angle_gn),
        "residue_gn": torch.complex(normal(g, n), normal(g, n)),
        "state_bdnp": normal(b, g * r, n, 2),
    }
    return {name: x.to(dtype.to_complex() if x.is_complex() else dtype) for name, x in made.items()}


def without_residue(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x for name, x in values.items() if name != "residue_gn"}


def columns(values: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    return values | {"u_btd": values["u_btd"][:, start:stop]}


def row_of(values: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    return {name: x if x.is_complex() else x[row : row + 1] for name, x in values.items()}


def doubled(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: x.to(torch.complex128 if x.is_complex() else torch.float64) for n, x in values.items()}


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def gradients(function: Callable[..., Any], values: dict[str, Tensor], weight: Tensor, **options: Any) -> list[Tensor]:
    leaves = {name: x.clone().requires_grad_() for name, x in values.items()}
    y, end = function(**leaves, **options)
    # Both results count, the state's channels each with a weight of its own.
    factor = torch.linspace(-1, 1, end[0].numel(), dtype=end.dtype).view(end.shape[1:])
    return list(torch.autograd.grad((y * weight).sum() + (end * factor).sum(), list(leaves.values())))


@pytest.mark.parametrize("decay", DECAYS.values(), ids=DECAYS)
@pytest.mark.parametrize("t", [0, 1, 2, 3, 63, 64, 65, 130, 1003])
def test_scan_equals_equation(t: int, decay: float) -> None:
    values = arguments(t, decay=decay)
    y, state = modal.equation(**values)
    got, end = modal.scan(**values)
    torch.testing.assert_close(got, y, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(end, state, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(modal.final_state(**without_residue(values)), state, rtol=1e-9, atol=1e-10)


def test_two_tokens_by_hand() -> None:
    """A mode that turns by a quarter and halves, read along both axes."""
    log_a_gn = torch.complex(torch.tensor([[0.5]]).log(), torch.tensor([[math.pi / 2]]))
    u_btd, state_bdnp = torch.tensor([[[3.0], [5.0]]]), torch.tensor([[[[2.0, 4.0]]]])
    for residue, want in ((1.0, [1.0, 5.0 - 0.5]), (-1j, [1.0, 0.5])):
        # x_1 = 0.5i (2 + 4i) + 3 = 1 + i, x_2 = 0.5i (1 + i) + 5 = 4.5 + 0.5i
        y, end = modal.scan(u_btd, log_a_gn, torch.tensor([[residue]], dtype=torch.complex64), state_bdnp)
        torch.testing.assert_close(y.flatten(), torch.tensor(want))
        torch.testing.assert_close(end.flatten(), torch.tensor([4.5, 0.5]))


@pytest.mark.parametrize("form", ["equation", "scan"])
def test_documents_and_padding_equal_separate_sequences(form: str) -> None:
    t = 200
    values = arguments(t, decay=0.1)
    lengths = [[70, 1, 58, 40], [3, 64, 90]]
    documents_bt = torch.zeros(2, t, dtype=torch.int64)
    valid_bt = torch.zeros(2, t, dtype=torch.bool)
    for row, parts in enumerate(lengths):
        valid_bt[row, : sum(parts)] = True
        documents_bt[row, : sum(parts)] = torch.arange(len(parts)).repeat_interleave(torch.tensor(parts))
        # Columns without a token carry anything, documents of their own included.
        documents_bt[row, sum(parts) :] = len(parts) + 5
    spoiled = values | {"u_btd": values["u_btd"].masked_fill(~valid_bt[..., None], torch.nan)}
    where = {"valid_bt": valid_bt, "documents_bt": documents_bt}
    y, end = getattr(modal, form)(**spoiled, **where)
    torch.testing.assert_close(modal.final_state(**without_residue(spoiled), **where), end, rtol=1e-9, atol=1e-10)
    for row, parts in enumerate(lengths):
        start = 0
        for document, n in enumerate(parts):
            alone = row_of(columns(values, start, start + n), row)
            if document > 0:
                alone["state_bdnp"] = torch.zeros_like(alone["state_bdnp"])
            want, state = modal.equation(**alone)
            torch.testing.assert_close(y[row : row + 1, start : start + n], want, rtol=1e-9, atol=1e-10)
            start += n
        torch.testing.assert_close(end[row : row + 1], state, rtol=1e-9, atol=1e-10)


def test_resets_are_exact() -> None:
    """Not a trace of an infinite number crosses a border, wherever in a chunk it lies."""
    t = 130
    for border in (1, 31, 64, 77, 128):
        values = arguments(t, decay=0.0)
        values["u_btd"][:, :border] = torch.inf
        values["state_bdnp"].fill_(torch.inf)
        documents_bt = (torch.arange(t) >= border).long().expand(2, -1)
        y, end = modal.scan(**values, documents_bt=documents_bt)
        assert y[:, border:].isfinite().all() and end.isfinite().all()


def test_final_state_keeps_any_prefix() -> None:
    t = 70
    values = arguments(t, decay=0.1)
    documents_bt = torch.tensor([0] * 20 + [1] * 30 + [2] * 20).expand(2, -1)
    for n in (0, 1, 19, 20, 21, 64, 70):
        for documents in (None, documents_bt):
            valid_bt = torch.arange(t) < torch.tensor([n, t - n])[:, None]
            got = modal.final_state(**without_residue(values), valid_bt=valid_bt, documents_bt=documents)
            for row, kept in enumerate((n, t - n)):
                inside = None if documents is None else documents[row : row + 1, :kept]
                state = modal.equation(**row_of(columns(values, 0, kept), row), documents_bt=inside)[1]
                torch.testing.assert_close(got[row : row + 1], state, rtol=1e-9, atol=1e-10)


def test_splits_equal_one_shot() -> None:
    t = 150
    values = arguments(t, decay=0.1)
    whole, end = modal.scan(**values)
    state, start, pieces = values["state_bdnp"], 0, []
    for n in (1, 63, 2, 65, 0, 19):
        piece = columns(values, start, start + n) | {"state_bdnp": state}
        pieces.append(modal.scan(**piece)[0])
        state, start = modal.final_state(**without_residue(piece)), start + n
    assert start == t
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(state, end, rtol=1e-9, atol=1e-10)


def test_groups_share_among_neighbours() -> None:
    values = arguments(70, g=2, r=3)
    alone = values | {name: values[name].repeat_interleave(3, dim=0) for name in ("log_a_gn", "residue_gn")}
    for got, want in zip(modal.scan(**values), modal.scan(**alone), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("decay", DECAYS.values(), ids=DECAYS)
@pytest.mark.parametrize("length", [1, 2, 63, 65, 1003])
def test_impulse_is_the_response_to_one(length: int, decay: float) -> None:
    values = arguments(length, decay=decay, b=1, r=1)
    values["u_btd"] = F.pad(torch.ones(1, 1, 2, dtype=torch.float64), (0, 0, 0, length - 1))
    want, _ = modal.equation(**values | {"state_bdnp": torch.zeros_like(values["state_bdnp"])})
    got_gl = modal.impulse(values["log_a_gn"], values["residue_gn"], length)
    torch.testing.assert_close(got_gl, want[0].mT, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("decay", DECAYS.values(), ids=DECAYS)
@pytest.mark.parametrize("t", [1, 65, 130])
def test_gradients_equal_those_of_the_equation(t: int, decay: float) -> None:
    values = arguments(t, decay=decay)
    weight = torch.randn(2, t, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    documents_bt = (torch.arange(t) >= 40).long().expand(2, -1)
    for options in ({}, {"documents_bt": documents_bt, "valid_bt": torch.arange(t) < torch.tensor([[t], [t - 1]])}):
        if "valid_bt" in options:
            weight = weight * options["valid_bt"][..., None]
        got = gradients(modal.scan, values, weight, **options)
        want = gradients(modal.equation, values, weight, **options)
        for name, a, b in zip(values, got, want, strict=True):
            # Those of log_a sum terms that grow with the square of the length.
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")


def test_gradcheck() -> None:
    values = arguments(5)

    def check(function: Callable[..., Any], inputs: dict[str, Tensor]) -> bool:
        leaves = tuple(x.requires_grad_() for x in inputs.values())
        return torch.autograd.gradcheck(lambda *xs: function(**dict(zip(inputs, xs, strict=True))), leaves)

    assert check(modal.scan, values)
    assert check(modal.final_state, without_residue(values))
    response = {name: values[name] for name in ("log_a_gn", "residue_gn")}
    assert check(lambda **given: modal.impulse(**given, length=6), response)


@pytest.mark.parametrize("rate", [0.0, 80.0, 1e4, 1e30])
def test_any_decay_stays_finite(rate: float) -> None:
    values = arguments(130, dtype=torch.float32)
    values["log_a_gn"][:, ::2] = complex(-rate, 3.0)
    want = modal.equation(**doubled(values))[0]
    torch.testing.assert_close(modal.scan(**values)[0].double(), want, rtol=1e-4, atol=1e-4)
    for name, gradient in zip(values, gradients(modal.scan, values, torch.ones(2, 130, 4)), strict=True):
        assert torch.view_as_real(gradient + 0j).isfinite().all(), name


@pytest.mark.parametrize("decay", [0.0, 0.01, 1.0])
def test_float32_is_as_exact_as_the_loop(decay: float) -> None:
    """At most twice the error of the naive float32 loop."""
    values = arguments(700, decay=decay, dtype=torch.float32, n=32)
    exact, naive = modal.equation(**doubled(values)), modal.equation(**values)
    for got, plain, want in zip(modal.scan(**values), naive, exact, strict=True):
        assert error(got, want) <= 2 * error(plain, want)


def test_bfloat16_inputs_accumulate_in_float32() -> None:
    values = arguments(300, decay=0.01, dtype=torch.float32)
    values["u_btd"] = values["u_btd"].bfloat16()
    exact, end = modal.equation(**doubled(values))
    y, state = modal.scan(**values)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    # Rounding the result is all that may be lost.
    assert error(y, exact) <= 2 * error(exact.to(torch.bfloat16), exact)
    assert error(state, end) < 1e-5


def test_autocast_leaves_the_state_precise() -> None:
    values = arguments(100, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = modal.scan(**values)[0]
    torch.testing.assert_close(got, modal.scan(**values)[0], rtol=0, atol=0)


def test_memory_holds_no_mode_of_every_token() -> None:
    """The largest tensor made in forward is the chunks' states, an eighth of tokens times modes with 64 tokens each."""
    b, t, g, n = 1, 1024, 4, 64
    values = arguments(t, b=b, g=g, r=1, n=n)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **kwargs or {})
            for x in torch.utils._pytree.tree_leaves(out):
                largest = max(largest, x.untyped_storage().nbytes() if isinstance(x, Tensor) else 0)
            return out

    with Watch():
        modal.scan(**values, documents_bt=torch.zeros(b, t, dtype=torch.int64))
        modal.impulse(values["log_a_gn"], values["residue_gn"], t)
    assert largest <= b * t * g * n * 16 / 8


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"u_btd": torch.zeros(2, 3, 5)}, "d=5 must be a multiple of the 2 groups"),
        ({"state_bdnp": torch.zeros(2, 4, 2, 2)}, r"state_bdnp: expected shape \(2, 4, 3, 2\), got \(2, 4, 2, 2\)"),
        ({"residue_gn": torch.zeros(2, 4, dtype=torch.complex64)}, "give every pole its residue"),
        ({"residue_gn": torch.zeros(2, 3)}, "expected complex tensors"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Tensor], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        modal.scan(**arguments(3) | changes)
    with pytest.raises(ConfigError, match="length: expected at least 1, got 0"):
        modal.impulse(*(arguments(1)[name] for name in ("log_a_gn", "residue_gn")), 0)
