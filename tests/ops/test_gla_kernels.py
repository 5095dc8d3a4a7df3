"""Gated linear attention's Triton kernels, on a GPU or interpreted: outputs, state and gradients against the loop."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from subquad.core.errors import ConfigError, UnsupportedError
from subquad.ops import backends, gla, launch

if importlib.util.find_spec("triton") is None or not (torch.cuda.is_available() or backends.interpreted()):
    pytest.skip("needs Triton, on a GPU or interpreted", allow_module_level=True)

from subquad.ops.gla import on_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("q_bthk", "k_bthk", "v_bthv", "g_bthk", "state_bhkv")
RESULTS = ("y", "end", *(f"gradient of {name}" for name in NAMES))


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Scratch holds NaN: what no kernel writes shows."""
    monkeypatch.setattr(launch, "poison", True)
    with backends.use("triton"):
        yield


def arguments(
    t: int,
    *,
    b: int = 1,
    heads: tuple[int, int, int, int] = (2, 2, 2, 2),
    k: int = 16,
    v: int = 16,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Heads are those of q, k, v and the state; half-lives go from a thousand tokens to less than one."""
    hq, hk, hv, h = heads
    g_bthk = -torch.rand(b, t, h, k, device=DEVICE) * torch.logspace(-3, 1, k, device=DEVICE)
    values = (
        torch.randn(b, t, hq, k, device=DEVICE).to(dtype),
        (torch.randn(b, t, hk, k, device=DEVICE) * k**-0.5).to(dtype),
        torch.randn(b, t, hv, v, device=DEVICE).to(dtype),
        g_bthk,
        torch.randn(b, h, k, v, device=DEVICE),
    )
    return dict(zip(NAMES, values, strict=True))


def without_q(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x for name, x in values.items() if name != "q_bthk"}


def error(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm().clamp(min=1e-30))


def results(function: Any, values: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """Outputs, final state, and gradients of all inputs through both; rows behind the valid ones don't count."""
    leaves = [x.detach().requires_grad_() for x in values.values()]
    y, end = function(*leaves, **options)
    valid_bt = options.get("valid_bt")
    if valid_bt is not None:
        y = y.masked_fill(~valid_bt[..., None, None], 0)
    rng = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=rng, dtype=torch.float64).to(DEVICE) for x in (y, end)]
    loss = sum((x.double() * w).sum() for x, w in zip((y, end), weights, strict=True))
    return [y, end, *torch.autograd.grad(loss, leaves)]


def compare(values: dict[str, Tensor], *, times: float = 2, **options: Any) -> None:
    """At most `times` the error of the loop in the dtype of the values, or that of 64 float32 roundings."""
    got = results(gla.scan, values, **options)
    want = results(gla.equation, {name: x.double() for name, x in values.items()}, **options)
    low = {} if values["v_bthv"].dtype == torch.float32 else {"dtype": torch.bfloat16}
    naive = results(gla.equation, values, **options, **low)
    for name, a, n, w in zip(RESULTS, got, naive, want, strict=True):
        assert error(a, w) <= max(times * error(n, w), 8 * 2**-24), name
    state = gla.final_state(*(x.detach() for x in list(values.values())[1:]), **options)
    assert error(state, want[1]) <= max(times * error(naive[1], want[1]), 8 * 2**-24)


@pytest.mark.parametrize("t", [1, 15, 63, 65, 130])
def test_lengths(t: int) -> None:
    compare(arguments(t))


@pytest.mark.parametrize(("k", "v"), [(7, 9), (40, 17), (24, 65)])
def test_odd_head_dims(k: int, v: int) -> None:
    compare(arguments(70, heads=(1, 1, 1, 1), k=k, v=v))


@pytest.mark.parametrize("heads", [(2, 1, 1, 2), (1, 2, 4, 4), (1, 1, 3, 3)])
def test_grouped_heads(heads: tuple[int, int, int, int]) -> None:
    compare(arguments(33, heads=heads))


def test_bfloat16() -> None:
    # The interpreter cuts a float32's bits off where the device rounds them: twice the error of rounding.
    compare(arguments(70, k=32, v=16, dtype=torch.bfloat16), times=2 if DEVICE == "cuda" else 4)


def test_float16_sums_beyond_its_range() -> None:
    values = arguments(70, dtype=torch.float16)
    values["k_bthk"] *= 100
    values["v_bthv"] *= 1000
    values["g_bthk"].zero_()
    y, end = gla.scan(**values)
    want = gla.equation(**{name: x.double() for name, x in values.items()})[1]
    assert y.dtype == torch.float16
    assert want.abs().max() > 65504
    assert error(end, want) < 8 * 2**-24


def test_documents_and_padding() -> None:
    values = arguments(140, b=2, heads=(1, 1, 1, 1))
    documents_bt = torch.zeros(2, 140, dtype=torch.int64, device=DEVICE)
    for row, starts in enumerate(([3, 64, 65, 100], [70])):
        for start in starts:
            documents_bt[row, start:] += 1
    valid_bt = torch.arange(140, device=DEVICE) < torch.tensor([[140], [120]], device=DEVICE)
    documents_bt[1, 120:] = 9
    compare(values, documents_bt=documents_bt)
    compare(values, documents_bt=documents_bt, valid_bt=valid_bt)
    clean = gla.scan(**values, documents_bt=documents_bt, valid_bt=valid_bt)
    spoiled = {n: x.clone() for n, x in values.items()}
    for name in NAMES[:4]:
        spoiled[name][1, 120:] = torch.nan
    for got, want in zip(gla.scan(**spoiled, documents_bt=documents_bt, valid_bt=valid_bt), clean, strict=True):
        assert torch.equal(got[0], want[0]) and torch.equal(got[1, :120], want[1, :120])


def test_rows_without_a_token() -> None:
    values = arguments(5, b=2)
    valid_bt = torch.tensor([[True] * 5, [False] * 5], device=DEVICE)
    state = gla.scan(**values, valid_bt=valid_bt)[1]
    torch.testing.assert_close(state[1], values["state_bhkv"][1], rtol=0, atol=0)


@pytest.mark.parametrize("g", [0.0, -80.0, -1e30, -torch.inf])
def test_any_decay(g: float) -> None:
    """Forgetting everything every third token, in half of the channels, beside decays that matter."""
    values = arguments(70)
    values["g_bthk"][:, ::3, :, ::2] = g
    for x in results(gla.scan, values):
        assert x.isfinite().all()
    compare(values)


def test_nan_in_a_decay_spoils_all_behind_it() -> None:
    values = arguments(130)
    values["g_bthk"][0, 70, 0, 2] = torch.nan
    y, end = gla.scan(**values)
    assert y[0, 70:, 0].isnan().all() and end[0, 0, 2].isnan().all()
    assert y[0, :64].isfinite().all() and y[0, :, 1].isfinite().all()


def test_views_of_one_projection_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    both = torch.randn(2, 20, 2 * 16 + 2 * 16 + 2 * 8, device=DEVICE)
    q, k, v = (x.unflatten(-1, (2, -1)) for x in both.split((32, 32, 16), dim=-1))
    values = arguments(20, b=2, v=8) | {"q_bthk": q, "k_bthk": k, "v_bthv": v}
    # Time before batch, and a state whose rows are columns.
    values["g_bthk"] = values["g_bthk"].transpose(0, 1).contiguous().transpose(0, 1)
    values["state_bhkv"] = values["state_bhkv"].mT.contiguous().mT
    compare(values)
    seen: list[tuple[int, ...]] = []
    before = on_triton._strides
    monkeypatch.setattr(on_triton, "_strides", lambda *xs: seen.extend(x.stride() for x in xs) or before(*xs))
    gla.scan(**{name: x.detach() for name, x in values.items()})
    assert q.stride() in seen and k.stride() in seen and v.stride() in seen


def test_broadcast_gradients_and_unused_results() -> None:
    values = {name: x.requires_grad_() for name, x in arguments(20).items()}
    exact = {name: x.detach().double().requires_grad_() for name, x in values.items()}
    for index in (0, 1):
        got = torch.autograd.grad(gla.scan(**values)[index].sum(), list(values.values()))
        want = torch.autograd.grad(gla.equation(**exact)[index].sum(), list(exact.values()), allow_unused=True)
        for name, a, w in zip(NAMES, got, want, strict=True):
            assert error(a, torch.zeros_like(a) if w is None else w) < 8 * 2**-24, name
    got = torch.autograd.grad(gla.final_state(**without_q(values)).sum(), list(values.values())[1:])
    for name, a, w in zip(NAMES[1:], got, want[1:], strict=True):
        assert error(a, w) < 8 * 2**-24, name


def test_nothing_to_do() -> None:
    for b, t in ((1, 0), (0, 3)):
        values = {name: x.requires_grad_() for name, x in arguments(t, b=b).items()}
        y, end = gla.scan(**values)
        assert y.shape == (b, t, 2, 16)
        assert torch.equal(end, values["state_bhkv"])
        (y.sum() + end.sum()).backward()
        assert values["state_bhkv"].grad is not None and (values["state_bhkv"].grad == 1).all()
        assert torch.equal(gla.final_state(**{n: x.detach() for n, x in without_q(values).items()}), end)


def test_dtypes_of_results() -> None:
    values = arguments(20, dtype=torch.bfloat16)
    values["state_bhkv"] = values["state_bhkv"].to(torch.bfloat16)
    values["q_bthk"] = values["q_bthk"].float()
    y, end, *gradients = results(gla.scan, values)
    assert (y.dtype, end.dtype) == (torch.bfloat16, torch.float32)
    assert [x.dtype for x in gradients] == [x.dtype for x in values.values()]


def test_the_same_twice() -> None:
    values = arguments(130)
    for a, b in zip(results(gla.scan, values), results(gla.scan, values), strict=True):
        assert torch.equal(a, b)


def test_bad_input_is_refused() -> None:
    values = arguments(5)
    with pytest.raises(ConfigError, match="v_bthv: expected t=5 as in q_bthk, got 4"):
        gla.scan(**values | {"v_bthv": values["v_bthv"][:, :4]})
    with pytest.raises(ConfigError, match="g_bthk: expected k=16"):
        gla.scan(**values | {"g_bthk": values["g_bthk"][..., :8]})
    with pytest.raises(ConfigError, match="g_bthk: expected 4 axes"):
        gla.scan(**values | {"g_bthk": values["g_bthk"][..., 0]})
    with pytest.raises(ConfigError, match="number of heads that divides h=2, got 3"):
        gla.scan(**values | {"q_bthk": values["q_bthk"].expand(-1, -1, 2, -1).repeat(1, 1, 2, 1)[:, :, :3]})
    with pytest.raises(UnsupportedError, match="head dims up to 256, got \\(16, 257\\)"):
        gla.scan(**arguments(5, v=257))
    with pytest.raises(UnsupportedError, match="float64"):
        gla.scan(**{name: x.double() for name, x in values.items()})
    with pytest.raises(ConfigError, match="one device"):
        gla.scan(**values | {"g_bthk": values["g_bthk"].to("meta")})


def test_operators_keep_their_contract() -> None:
    """Schemas, fakes and autograd registrations, as `torch.library.opcheck` sees them."""
    launch.poison = False  # NaN scratch is an output here, and NaN equals no NaN
    values = [x.requires_grad_() for x in arguments(20, b=2, heads=(1, 2, 1, 2)).values()]
    documents = (torch.arange(20, device=DEVICE) > 7).int().expand(2, -1).contiguous()
    for last in (None, documents):
        torch.library.opcheck(on_triton._forward, (*values, last))
        torch.library.opcheck(on_triton._final_state, (*(x.detach() for x in values[1:]), last))


def test_compiles_into_one_graph() -> None:
    values = arguments(20)
    torch._dynamo.reset()

    def training(*leaves: Tensor) -> Tensor:
        y, end = gla.scan(*leaves)
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
        state = torch.compile(gla.final_state, fullgraph=True, backend="aot_eager")(*list(values.values())[1:])
        assert torch.equal(state, gla.final_state(*list(values.values())[1:]))
