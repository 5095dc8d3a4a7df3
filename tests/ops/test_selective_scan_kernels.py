"""The selective scan's Triton kernels, on a GPU or interpreted: outputs, state and gradients against the loop."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.core.errors import UnsupportedError
from subquad.ops import backends, launch, selective_scan

if importlib.util.find_spec("triton") is None or not (torch.cuda.is_available() or backends.interpreted()):
    pytest.skip("needs Triton, on a GPU or interpreted", allow_module_level=True)

from subquad.ops.selective_scan import on_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("u_btd", "dt_btd", "A_dn", "B_btgn", "C_btgn", "D_d", "state_bdn")
RESULTS = ("y", "end", *(f"gradient of {name}" for name in NAMES))
# A device's own tiling; the interpreter walks through every element of a scan, so there a chunk is small.
TILES = on_triton.TILES if DEVICE == "cuda" else on_triton.Tiling(4, 2, 1)
# Sums of 64 terms in float32.
ROUNDING = 8 * 2**-24


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Scratch holds NaN: what no kernel writes shows."""
    monkeypatch.setattr(launch, "poison", True)
    monkeypatch.setattr(on_triton, "TILES", TILES)
    with backends.use("triton"):
        yield


def arguments(
    t: int, *, b: int = 1, d: int = 4, g: int = 1, n: int = 2, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Rates go over five orders of magnitude; steps, rates, D and the state are in float32 whatever `dtype`."""
    values = (
        torch.randn(b, t, d, device=DEVICE).to(dtype),
        F.softplus(torch.randn(b, t, d, device=DEVICE)),
        -torch.logspace(-3, 2, d * n, device=DEVICE).view(n, d).mT,
        torch.randn(b, t, g, n, device=DEVICE).to(dtype),
        torch.randn(b, t, g, n, device=DEVICE).to(dtype),
        torch.randn(d, device=DEVICE),
        torch.randn(b, d, n, device=DEVICE),
    )
    return dict(zip(NAMES, values, strict=True))


def written(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x for name, x in values.items() if name not in ("C_btgn", "D_d")}


def error(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm().clamp(min=1e-30))


def results(function: Any, values: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """Outputs, final state, and gradients of all inputs through both; rows behind the valid ones don't count."""
    leaves = [x.detach().requires_grad_() for x in values.values()]
    y, end = function(*leaves, **options)
    valid_bt = options.get("valid_bt")
    if valid_bt is not None:
        y = y.masked_fill(~valid_bt[..., None], 0)
    rng = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=rng, dtype=torch.float64).to(DEVICE) for x in (y, end)]
    loss = sum((x.double() * w).sum() for x, w in zip((y, end), weights, strict=True))
    return [y, end, *torch.autograd.grad(loss, leaves)]


def compare(values: dict[str, Tensor], **options: Any) -> None:
    """At most twice the error of the loop in the dtype of the values, or that of 64 float32 roundings."""
    got = results(selective_scan.scan, values, **options)
    want = results(selective_scan.equation, {name: x.double() for name, x in values.items()}, **options)
    low = {} if values["u_btd"].dtype == torch.float32 else {"dtype": torch.bfloat16}
    naive = results(selective_scan.equation, values, **options, **low)
    for name, a, n, w in zip(RESULTS, got, naive, want, strict=True):
        assert error(a, w) <= max(2 * error(n, w), ROUNDING), name
    state = selective_scan.final_state(*(x.detach() for x in written(values).values()), **options)
    assert error(state, want[1]) <= max(2 * error(naive[1], want[1]), ROUNDING)


@pytest.mark.parametrize("t", [1, 3, 4, 5, 18])
def test_lengths(t: int) -> None:
    compare(arguments(t))


@pytest.mark.parametrize("t", [1, 63, 65])
def test_lengths_at_the_devices_own_tiling(t: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_triton, "TILES", on_triton.Tiling(64, 32, 4))
    values = arguments(t, d=3, n=1)
    # So few sums that one of terms that cancel would count alone.
    compare(values | {"u_btd": values["u_btd"].abs(), "B_btgn": values["B_btgn"].abs()})


@pytest.mark.parametrize(("d", "g", "n"), [(7, 1, 1), (6, 2, 3), (10, 5, 1)])
def test_widths_and_groups(d: int, g: int, n: int) -> None:
    compare(arguments(6, d=d, g=g, n=n))


def test_bfloat16() -> None:
    compare(arguments(10, dtype=torch.bfloat16))


def test_documents_and_padding() -> None:
    values = arguments(17, b=2, d=2, n=1)
    documents_bt = torch.zeros(2, 17, dtype=torch.int64, device=DEVICE)
    for row, starts in enumerate(([1, 4, 5, 11], [9])):
        for start in starts:
            documents_bt[row, start:] += 1
    valid_bt = torch.arange(17, device=DEVICE) < torch.tensor([[17], [10]], device=DEVICE)
    documents_bt[1, 10:] = 9
    compare(values, documents_bt=documents_bt)
    compare(values, documents_bt=documents_bt + 1)
    compare(values, documents_bt=documents_bt, valid_bt=valid_bt)
    clean = selective_scan.scan(**values, documents_bt=documents_bt, valid_bt=valid_bt)
    spoiled = {n: x.clone() for n, x in values.items()}
    for name in ("u_btd", "dt_btd", "B_btgn", "C_btgn"):
        spoiled[name][1, 10:] = torch.nan
    got = selective_scan.scan(**spoiled, documents_bt=documents_bt, valid_bt=valid_bt)
    assert torch.equal(got[0][1, :10], clean[0][1, :10]) and torch.equal(got[1], clean[1])


def test_rows_without_a_token() -> None:
    values = arguments(5, b=2)
    valid_bt = torch.tensor([[True] * 5, [False] * 5], device=DEVICE)
    state = selective_scan.scan(**values, valid_bt=valid_bt)[1]
    torch.testing.assert_close(state[1], values["state_bdn"][1], rtol=0, atol=0)


@pytest.mark.parametrize("step", [0.0, 1e4, 1e30])
def test_any_step(step: float) -> None:
    """Forgetting everything every third token, in half of the channels, beside steps that matter."""
    values = arguments(10)
    values["dt_btd"][:, ::3, ::2] = step
    values["u_btd"][:, ::3, ::2] = 0
    for x in results(selective_scan.scan, values):
        assert x.isfinite().all()
    if step < 1e30:  # the gradient of an input is its step times as large, and drowns the others'
        compare(values)


def test_views_of_one_projection_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    both = torch.randn(2, 6, 4 + 2 + 2, device=DEVICE)
    u, B, C = both.split((4, 2, 2), dim=-1)
    values = arguments(6, b=2) | {"u_btd": u, "B_btgn": B[:, :, None], "C_btgn": C[:, :, None]}
    # Time before batch, and a state whose rows are columns.
    values["dt_btd"] = values["dt_btd"].transpose(0, 1).contiguous().transpose(0, 1)
    values["state_bdn"] = values["state_bdn"].mT.contiguous().mT
    compare(values)
    seen: list[int] = []
    before = on_triton._strides
    monkeypatch.setattr(on_triton, "_strides", lambda *xs: seen.extend(x.data_ptr() for x in xs) or before(*xs))
    selective_scan.scan(**{name: x.detach() for name, x in values.items()})
    assert {u.data_ptr(), B.data_ptr(), C.data_ptr()} <= set(seen)


def test_unused_results() -> None:
    values = {name: x.requires_grad_() for name, x in arguments(6).items()}
    exact = {name: x.detach().double().requires_grad_() for name, x in values.items()}
    for index in (0, 1):
        got = torch.autograd.grad(selective_scan.scan(**values)[index].sum(), list(values.values()))
        whole = selective_scan.equation(**exact)[index].sum()
        want = torch.autograd.grad(whole, list(exact.values()), allow_unused=True)
        for name, a, w in zip(NAMES, got, want, strict=True):
            assert error(a, torch.zeros_like(a) if w is None else w) < ROUNDING, name
    got = torch.autograd.grad(selective_scan.final_state(**written(values)).sum(), list(written(values).values()))
    for a, w in zip(got, (want[i] for i in (0, 1, 2, 3, 6)), strict=True):
        assert error(a, w) < ROUNDING


def test_nothing_to_do() -> None:
    for b, t in ((1, 0), (0, 3)):
        values = {name: x.requires_grad_() for name, x in arguments(t, b=b).items()}
        y, end = selective_scan.scan(**values)
        assert y.shape == (b, t, 4)
        assert torch.equal(end, values["state_bdn"])
        (y.sum() + end.sum()).backward()
        assert values["state_bdn"].grad is not None and (values["state_bdn"].grad == 1).all()
        assert torch.equal(selective_scan.final_state(**{n: x.detach() for n, x in written(values).items()}), end)


def test_dtypes_of_results() -> None:
    values = arguments(9, dtype=torch.bfloat16)
    values["state_bdn"] = values["state_bdn"].to(torch.bfloat16)
    y, end, *gradients = results(selective_scan.scan, values)
    assert (y.dtype, end.dtype) == (torch.bfloat16, torch.float32)
    assert [x.dtype for x in gradients] == [x.dtype for x in values.values()]


def test_the_same_twice() -> None:
    values = arguments(10, d=5, n=1)
    for a, b in zip(results(selective_scan.scan, values), results(selective_scan.scan, values), strict=True):
        assert torch.equal(a, b)


def test_what_the_kernels_cannot_take_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="1 to 256 entries of state a channel, got 257"):
        selective_scan.scan(**arguments(3, n=257))
    with pytest.raises(UnsupportedError, match="float64"):
        selective_scan.scan(**{name: x.double() for name, x in arguments(3).items()})


def test_operators_keep_their_contract() -> None:
    """Schemas, fakes and autograd registrations, as `torch.library.opcheck` sees them."""
    launch.poison = False  # NaN scratch is an output here, and NaN equals no NaN
    values = [x.requires_grad_() for x in arguments(5, d=2, n=1).values()]
    documents = (torch.arange(5, device=DEVICE) > 2).int()[None].contiguous()
    for last in (None, documents):
        torch.library.opcheck(on_triton._forward, (*values, last))
        detached = [x.detach() for x in values]
        torch.library.opcheck(on_triton._final_state, (*detached[:4], detached[6], last))


def test_compiles_into_one_graph() -> None:
    values = arguments(6)
    torch._dynamo.reset()

    def training(*leaves: Tensor) -> Tensor:
        y, end = selective_scan.scan(*leaves)
        return y.sum() + end.square().sum()

    compiled = torch.compile(training, fullgraph=True, backend="aot_eager")
    gradients: list[list[Tensor]] = []
    for function in (training, compiled):
        leaves = [x.detach().requires_grad_() for x in values.values()]
        function(*leaves).backward()
        gradients.append([x.grad for x in leaves])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        inputs = list(written(values).values())
        state = torch.compile(selective_scan.final_state, fullgraph=True, backend="aot_eager")(*inputs)
        assert torch.equal(state, selective_scan.final_state(*inputs))
