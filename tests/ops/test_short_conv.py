"""The short convolution against its loop, and against PyTorch's."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.core.errors import ConfigError, UnsupportedError
from subquad.ops import backends, launch, short_conv

# Where kernels run: on a GPU, or interpreted.
RUNS = importlib.util.find_spec("triton") is not None and (torch.cuda.is_available() or backends.interpreted())
TRITON = pytest.param("triton", marks=pytest.mark.skipif(not RUNS, reason="no Triton that runs here"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def inputs(t: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d = 3
    return (
        torch.randn(2, t, d, dtype=torch.float64),
        torch.randn(d, width, dtype=torch.float64),
        torch.randn(d, dtype=torch.float64),
        torch.randn(2, d, width - 1, dtype=torch.float64),
    )


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("t", [1, 2, 3, 65])
def test_parallel_equals_equation_and_conv1d(t: int, width: int) -> None:
    x, weight, bias, state = inputs(t, width)
    y, end = short_conv.equation(x, weight, bias, state)
    torch.testing.assert_close(short_conv.parallel(x, weight, bias, state), y, **EXACT)
    torch.testing.assert_close(short_conv.final_state(x, state), end, **EXACT)
    conv1d = F.conv1d(torch.cat((state, x.mT), 2), weight[:, None], bias, groups=3).mT
    torch.testing.assert_close(y, conv1d, **EXACT)
    torch.testing.assert_close(short_conv.parallel(x, weight, None, state), y - bias, **EXACT)


@pytest.mark.parametrize("width", [1, 4])
def test_every_prefix_of_packed_documents(width: int) -> None:
    t = 9
    x, weight, bias, state = inputs(t, width)
    documents_bt = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 2, 2], [1, 1, 1, 1, 4, 5, 5, 5, 5]])
    y, _ = short_conv.equation(x, weight, bias, state, documents_bt=documents_bt)
    torch.testing.assert_close(short_conv.parallel(x, weight, bias, state, documents_bt=documents_bt), y, **EXACT)
    for documents in (None, documents_bt):
        for n in range(t + 1):
            valid_bt = torch.arange(t) < torch.tensor([[n], [t - n]])
            _, want = short_conv.equation(x, weight, bias, state, valid_bt=valid_bt, documents_bt=documents)
            got = short_conv.final_state(x, state, valid_bt=valid_bt, documents_bt=documents)
            torch.testing.assert_close(got, want, **EXACT)


def test_documents_equal_documents_alone() -> None:
    x, weight, bias, state = inputs(12, 4)
    documents_bt = torch.tensor([0, 0, 1, 2, 2, 2, 2, 2, 2, 3, 3, 3]).expand(2, -1)
    y = short_conv.parallel(x, weight, bias, state, documents_bt=documents_bt)
    for document, (start, stop) in enumerate([(0, 2), (2, 3), (3, 9), (9, 12)]):
        begin = state if document == 0 else torch.zeros_like(state)
        alone = short_conv.parallel(x[:, start:stop], weight, bias, begin)
        torch.testing.assert_close(y[:, start:stop], alone, **EXACT)


def test_splits_and_gradients() -> None:
    x, weight, bias, state = inputs(20, 4)
    leaves = [z.requires_grad_() for z in (x, weight, bias, state)]
    whole = short_conv.parallel(x, weight, bias, state)
    pieces, carried, start = [], state, 0
    for n in (1, 2, 7, 10):
        pieces.append(short_conv.parallel(x[:, start : start + n], weight, bias, carried))
        carried, start = short_conv.final_state(x[:, start : start + n], carried), start + n
    joined = torch.cat(pieces, 1)
    torch.testing.assert_close(joined, whole, **EXACT)
    loop = short_conv.equation(x, weight, bias, state)[0]
    probe = torch.randn_like(whole)
    want = torch.autograd.grad((loop * probe).sum(), leaves)
    for y in (whole, joined):
        for got, exact in zip(torch.autograd.grad((y * probe).sum(), leaves), want, strict=True):
            torch.testing.assert_close(got, exact, **EXACT)


def test_padding_is_not_read() -> None:
    x, weight, bias, state = inputs(6, 4)
    valid_bt = torch.arange(6) < torch.tensor([[4], [0]])
    spoiled = x.masked_fill(~valid_bt[..., None], torch.nan)
    end = short_conv.final_state(spoiled, state, valid_bt=valid_bt)
    torch.testing.assert_close(end[:1], short_conv.final_state(x[:1, :4], state[:1]), **EXACT)
    assert torch.equal(end[1], state[1])
    assert torch.equal(
        short_conv.parallel(spoiled, weight, bias, state)[0, :4], short_conv.parallel(x, weight, bias, state)[0, :4]
    )


FORMS = {
    "plain": {"t": 9, "width": 4},
    "silu": {"t": 9, "width": 4, "activation": "silu", "strided": True},
    "documents": {"t": 9, "width": 4, "documents": True, "activation": "silu"},
    "no bias": {"t": 21, "width": 3, "bias": False, "documents": True, "strided": True},
    "one tap": {"t": 5, "width": 1, "activation": "silu"},
    "one token": {"t": 1, "width": 4, "documents": True},
}


def results(
    form: Callable[..., Any], values: dict[str, Tensor | None], probe: Tensor, **options: Any
) -> dict[str, Tensor]:
    """Outputs, and the gradients of all that is given."""
    leaves = {n: None if x is None else x.clone().requires_grad_() for n, x in values.items()}
    y = form(**leaves, **options)
    y = y[0] if isinstance(y, tuple) else y
    some = {n: x for n, x in leaves.items() if x is not None}
    made = torch.autograd.grad((y * probe.to(y.dtype)).sum(), list(some.values()), allow_unused=True)
    return {"y": y.detach()} | {n: g for n, g in zip(some, made, strict=True) if g is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("backend", [TRITON])
def test_kernels_and_their_gradients(
    name: str, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "poison", True)
    from subquad.ops.short_conv import on_triton

    monkeypatch.setattr(on_triton, "FORWARD", on_triton.Tile(4, 16, 2))
    monkeypatch.setattr(on_triton, "BACKWARD", on_triton.Tile(4, 16, 2))
    form = {"bias": True, "documents": False, "activation": "none", "strided": False} | FORMS[name]
    t, width, d = form["t"], form["width"], 21
    values: dict[str, Tensor | None] = {
        "x_btd": torch.randn(2, t, d),
        "weight_dw": torch.randn(d, width),
        "bias_d": torch.randn(d) if form["bias"] else None,
        "state_bdw": torch.randn(2, d, width - 1),
    }
    values = {n: None if x is None else x.to(DEVICE, dtype) for n, x in values.items()}
    documents_bt = torch.tensor([[0, 0, 1, 1, 1, 2, 5, 5, 5] * 3, [1] * 27], device=DEVICE)[:, :t].cummax(1).values
    options = {"activation": form["activation"], "documents_bt": documents_bt if form["documents"] else None}
    probe = torch.randn(2, t, d).to(DEVICE, dtype)

    def kernels(x_btd: Tensor, **rest: Any) -> Tensor:
        if form["strided"]:
            x_btd = torch.cat((x_btd, torch.full_like(x_btd, torch.nan)), -1)[..., :d]
        with backends.use(backend):
            return short_conv.parallel(x_btd, **rest)

    got = results(kernels, values, probe, **options)
    want = results(short_conv.equation, values, probe, **options, dtype=torch.float64)
    naive = results(short_conv.equation, values, probe, **options, dtype=dtype)
    # Triton's interpreter rounds to bfloat16 towards zero, by up to 2^-7.
    rounding = {torch.float32: 2e-7, torch.bfloat16: 2**-7}[dtype]
    for part, exact in want.items():
        if part == "state_bdw" and width == 1:
            continue
        error, other = ((x[part].double() - exact).norm() / exact.double().norm() for x in (got, naive))
        assert got[part].dtype == dtype
        assert error <= max(2 * other, rounding), part


@pytest.mark.parametrize("backend", [TRITON])
def test_more_taps_than_the_kernels_hold_are_refused(backend: str) -> None:
    x, weight, bias, state = (z.float().to(DEVICE) for z in inputs(3, 5))
    with backends.use(backend), pytest.raises(UnsupportedError, match="up to 4 taps, got 5"):
        short_conv.parallel(x, weight, bias, state)


@pytest.mark.parametrize("backend", ["torch", TRITON])
def test_no_tokens_and_no_rows(backend: str) -> None:
    x, weight, bias, state = (z.float().to(DEVICE) for z in inputs(3, 4))
    with backends.use(backend):
        assert short_conv.parallel(x[:, :0], weight, bias, state).shape == (2, 0, 3)
        assert short_conv.parallel(x[:0], weight, bias, state[:0]).shape == (0, 3, 3)


def test_the_form_in_pytorch_has_an_activation_and_one_rounding() -> None:
    x, weight, bias, state = inputs(9, 4)
    silu = short_conv.parallel(x, weight, bias, state, activation="silu")
    torch.testing.assert_close(silu, short_conv.equation(x, weight, bias, state, activation="silu")[0], **EXACT)
    low = [z.bfloat16() for z in (x, weight, bias, state)]
    exact = short_conv.equation(*low, dtype=torch.float64)[0]
    torch.testing.assert_close(short_conv.parallel(*low), exact.bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.skipif(not RUNS, reason="no Triton that runs here")
def test_compilers_see_what_the_kernels_do(whole: bool) -> None:
    x, weight, bias, state = (z.float().to(DEVICE).requires_grad_() for z in inputs(2, 2))
    documents_bt = torch.zeros(2, 2, dtype=torch.int32, device=DEVICE)
    state = state.detach().mT.contiguous().requires_grad_()
    optional = (bias, state, documents_bt) if whole else (None, state, None)
    torch.library.opcheck(short_conv.on_triton._forward, (x, weight, *optional, True))


@pytest.mark.parametrize("backend", ["torch", TRITON])
def test_a_bias_of_any_stride_and_what_does_not_fit(backend: str) -> None:
    x, weight, bias, state = (y.to(DEVICE, torch.float32) for y in inputs(9, 4))
    with backends.use(backend):
        want = short_conv.parallel(x, weight, bias, state)
        torch.testing.assert_close(short_conv.parallel(x, weight, torch.stack((bias, -bias), 1)[:, 0], state), want)
        with pytest.raises(ConfigError, match="state_bdw: expected the last 3 inputs for 4 taps, got 2"):
            short_conv.parallel(x, weight, bias, state[..., 1:])
        with pytest.raises(ConfigError, match="unknown activation 'gelu'"):
            short_conv.parallel(x, weight, bias, state, activation="gelu")
