"""The long convolution's Triton kernels, on a GPU or interpreted: outputs and gradients against the sum."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from subquad.core.errors import UnsupportedError
from subquad.ops import backends, flashconv, launch

if importlib.util.find_spec("triton") is None or not (torch.cuda.is_available() or backends.interpreted()):
    pytest.skip("needs Triton, on a GPU or interpreted", allow_module_level=True)

from subquad.ops.flashconv import fourier, on_triton, toeplitz

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("u_btd", "k_gl", "bias_d", "gate_in_btd", "gate_out_btd")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Scratch holds NaN: what no kernel writes shows."""
    monkeypatch.setattr(launch, "poison", True)
    with backends.use("triton"):
        yield


@pytest.fixture(params=["toeplitz", "fourier"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every length goes this way; interpreted, the Fourier way cuts rows into few small tiles."""
    monkeypatch.setattr(on_triton, "MET", -1 if request.param == "fourier" else 1e9)
    if DEVICE == "cpu":
        monkeypatch.setattr(fourier, "plan", lambda t, dtype: fourier.Plan(max(2, -(-t // 64)), 4, 16))
        # Interpreted, programs take their time each, whatever their size.
        wide = fourier.Transform(channels=4, places=64, rows=32, depth=32, warps=4, stages=1)
        monkeypatch.setattr(fourier, "tilings", lambda dtype, cut: fourier.Tilings(wide, wide, 4, 1))
    return request.param


def arguments(
    t: int, length: int | None = None, *, b: int = 2, d: int = 3, g: int = 3, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    shapes = ((b, t, d), (g, length or t), (d,), (b, t, d), (b, t, d))
    made = (torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes)
    return dict(zip(NAMES, made, strict=True))


def error(got: Tensor, want: Tensor, size: float) -> float:
    return float((got.detach().double() - want.detach().double()).norm()) / max(size, 1e-30)


def sizes(values: dict[str, Tensor], want: list[Tensor]) -> dict[str, float]:
    """What errors are measured by: norms. The bias's gradient is a filter's at one lag, and as exact as the others."""
    size = {name: float(w.detach().double().norm()) for name, w in zip(("y", *values), want, strict=True)}
    if "bias_d" in values:
        lags = values["k_gl"].numel() / values["bias_d"].numel()
        size["bias_d"] = max(size["bias_d"], size["k_gl"] / lags**0.5)
    return size


def results(function: Any, values: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """Outputs and the gradients of all inputs."""
    leaves = {name: x.detach().requires_grad_() for name, x in values.items()}
    y = function(**leaves, **options)
    rng = torch.Generator().manual_seed(1)
    weight = torch.randn(y.shape, generator=rng, dtype=torch.float64).to(DEVICE)
    return [y, *torch.autograd.grad((y.double() * weight).sum(), list(leaves.values()))]


def compare(values: dict[str, Tensor], roundings: int = 3, **options: Any) -> None:
    """At most twice the error of the sum in the dtype of the values, or that of 64 float32 roundings or of several."""
    dtype = values["u_btd"].dtype
    cut = DEVICE == "cpu" and dtype == torch.bfloat16
    # The interpreter cuts off the bits of a float32 that bfloat16 has no place for, where the device rounds: packed
    # inputs, packed sums and outputs are each too small, by half a spacing of 2^-7 in the mean. Rounded, a number is
    # off by about a fourth of the spacing, its table's entry too, and such errors add up by squares.
    floor = roundings * 2**-8 if cut else max(8 * 2**-24, (2 * roundings) ** 0.5 / 4 * torch.finfo(dtype).eps)
    got = results(flashconv.parallel, values, **options)
    want = results(flashconv.equation, {name: x.double() for name, x in values.items()}, **options)
    naive = results(flashconv.equation, values, **options, dtype=dtype)
    size = sizes(values, want)
    for name, a, n, w in zip(("y", *values), got, naive, want, strict=True):
        assert a.dtype == n.dtype, name
        assert error(a, w, size[name]) <= max(2 * error(n, w, size[name]), floor), name


@pytest.mark.parametrize(
    ("t", "way"), [*((t, "toeplitz") for t in (1, 15, 63, 65, 130)), (1, "fourier"), (130, "fourier")], indirect=["way"]
)
def test_lengths(t: int, way: str) -> None:
    compare(arguments(t))


@pytest.mark.parametrize(
    ("length", "way"),
    [*((length, "toeplitz") for length in (1, 2, 64, 65, 300)), (1, "fourier"), (65, "fourier"), (100, "fourier")],
    indirect=["way"],
)
def test_filters_of_other_lengths(length: int, way: str) -> None:
    compare(arguments(130 if way == "toeplitz" else 70, length, b=1, d=2, g=2))


@pytest.mark.parametrize("left_out", [(), ("bias_d",), ("gate_in_btd",), ("gate_out_btd",), NAMES[2:]], ids=str)
def test_groups_and_what_may_be_left_out(left_out: tuple[str, ...], way: str) -> None:
    compare({name: x for name, x in arguments(70, d=4, g=2).items() if name not in left_out})


def test_many_columns(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """More than a block has, which ends within a tile's rows."""
    if DEVICE == "cpu":
        monkeypatch.setattr(toeplitz, "PRODUCT", toeplitz.PRODUCT._replace(width=16))
        monkeypatch.setattr(toeplitz, "MASKED", toeplitz.MASKED._replace(width=16))
        monkeypatch.setattr(toeplitz, "CORRELATION", toeplitz.CORRELATION._replace(width=16))
    compare(arguments(200, b=5 if DEVICE == "cpu" else 70, d=1, g=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype, way: str) -> None:
    # By the Fourier way so are spectra over tiles and within them, on the way there and back, products and tables, and
    # of filters what is transformed and what has been, over tiles.
    compare(arguments(130, dtype=dtype), roundings=3 if way == "toeplitz" else 11)


@pytest.mark.parametrize("way", ["fourier"], indirect=True)
def test_small_filters_are_no_smaller_than_half_precision_holds(way: str) -> None:
    values = {name: x for name, x in arguments(500, b=1, d=1, g=1, dtype=torch.float16).items() if name != "bias_d"}
    values["k_gl"] = values["k_gl"].float()
    large = flashconv.parallel(**values)
    # Outputs of an ordinary size: what is lost is lost of the filters.
    values["u_btd"], values["k_gl"] = values["u_btd"] * 2.0**10, values["k_gl"] * 2.0**-18
    small = flashconv.parallel(**values).double() * 2.0**8
    # Themselves rounded to multiples of 2^-24, such filters would be off by a hundredth.
    assert error(small, large, float(large.double().norm())) < 4 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("way", ["fourier"], indirect=True)
@pytest.mark.parametrize("t", [2200] if DEVICE == "cpu" else [1100, 5000, 9000, 20_000, 40_000, 130_000, 262_144])
def test_many_tiles(t: int, way: str) -> None:
    """More than a transform holds at once; against PyTorch's transforms, as the sum over tokens takes long."""
    dtype = torch.float32 if DEVICE == "cpu" else torch.bfloat16
    values = arguments(t, b=1, d=1, g=1, dtype=dtype)
    values["k_gl"] /= t**0.5
    got = results(flashconv.parallel, values)
    with backends.use("torch"):
        want = results(flashconv.parallel, {name: x.double() for name, x in values.items()})
    size = sizes(values, want)
    for name, a, w in zip(("y", *values), got, want, strict=True):
        assert error(a, w, size[name]) <= 4 * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("cut", [(5, 16, 16), (3, 16, 32), (2, 32, 16), (1, 32, 32)], ids=str)
def test_shapes_of_tiles(cut: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither side nor their number need be alike, and a tile may hold more than the row."""
    monkeypatch.setattr(on_triton, "MET", -1)
    monkeypatch.setattr(fourier, "plan", lambda t, dtype: fourier.Plan(*cut))
    compare(arguments(min(300, cut[0] * cut[1] * cut[2]), 200, b=1, d=2, g=1))


def test_tiles_hold_their_row() -> None:
    for t in (1, 4096, 4097, 32_768, 32_769, 262_144):
        n, p, q = fourier.plan(t, torch.bfloat16)
        assert (n - 1) * p * q < t <= n * p * q
        assert n <= 64


@pytest.mark.parametrize("documents", [False, True])
def test_both_ways(way: str, documents: bool) -> None:
    values = arguments(130, 100, d=4, g=2) | {"behind_gl": arguments(1, 130, d=4, g=2)["k_gl"]}
    documents_bt = (torch.arange(130, device=DEVICE) > 70).long().expand(2, -1).contiguous() if documents else None
    compare(values, documents_bt=documents_bt)


@pytest.mark.parametrize(("length", "dtype"), [(140, torch.float32), (70, torch.float32), (140, torch.bfloat16)])
def test_documents(length: int, dtype: torch.dtype) -> None:
    values = arguments(140, length, d=2, g=1, dtype=dtype)
    documents_bt = torch.zeros(2, 140, dtype=torch.int64, device=DEVICE)
    for row, starts in enumerate(([3, 4, 40, 64, 65, 100], [70])):
        for start in starts:
            documents_bt[row, start:] += 1
    compare(values, documents_bt=documents_bt)
    clean = flashconv.parallel(**values, documents_bt=documents_bt)
    values["u_btd"][0, 65:100] *= 1e6
    got = flashconv.parallel(**values, documents_bt=documents_bt)
    assert torch.equal(got[0, :64], clean[0, :64]) and torch.equal(got[0, 100:], clean[0, 100:])


def test_a_token_changes_nothing_before_it(way: str) -> None:
    values = arguments(130)
    before = flashconv.parallel(**values)
    values["u_btd"][:, 100:] *= 100
    after = flashconv.parallel(**values)
    # A transform spreads the roundings of its largest inputs over the whole row.
    spread = 0 if way == "toeplitz" else 2**-22 * float(after.abs().max())
    assert torch.allclose(after[:, :100], before[:, :100], rtol=0, atol=spread)
    assert not torch.equal(after[:, 100:], before[:, 100:])


def test_views_are_not_copied_and_columns_are(way: str) -> None:
    values = arguments(20)
    one = torch.randn(2, 20, 9, device=DEVICE)
    values["u_btd"], values["gate_in_btd"], values["gate_out_btd"] = one.split(3, dim=-1)
    compare(values)
    values["u_btd"] = torch.randn(2, 3, 20, device=DEVICE).mT
    compare(values)


def test_the_same_twice(way: str) -> None:
    values = arguments(70)
    for a, b in zip(results(flashconv.parallel, values), results(flashconv.parallel, values), strict=True):
        assert torch.equal(a, b)


def test_what_it_does_not_take_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    values = arguments(5)
    with pytest.raises(UnsupportedError, match="float64"):
        flashconv.parallel(**{name: x.double() for name, x in values.items()})
    monkeypatch.setattr(on_triton, "LONGEST", 4)
    with pytest.raises(UnsupportedError, match="beyond 4 tokens PyTorch's Fourier transforms are faster, got 5"):
        flashconv.parallel(**values)


def test_operators_keep_their_contract() -> None:
    """Schemas, fakes and autograd registrations, as `torch.library.opcheck` sees them."""
    launch.poison = False  # NaN scratch is an output here, and NaN equals no NaN
    u, k, bias, *gates = (x.requires_grad_() for x in arguments(20, d=2, g=1).values())
    documents = (torch.arange(20, device=DEVICE) > 7).int().expand(2, -1).contiguous()
    torch.library.opcheck(toeplitz._forward, (u, k, bias, *gates, documents))
    torch.library.opcheck(toeplitz._forward, (u, k, None, None, None, None))


def test_operators_of_the_fourier_way_keep_their_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    launch.poison = False
    monkeypatch.setattr(fourier, "plan", lambda t, dtype: fourier.Plan(2, 16, 16))
    u, k, bias, *gates = (x.requires_grad_() for x in arguments(20, b=1, d=1, g=1).values())
    torch.library.opcheck(fourier._forward, (u, k, k.flip(1), bias, *gates, True))
    torch.library.opcheck(fourier._forward, (u.detach(), k.detach(), None, None, None, None, False))


def test_compiles_into_one_graph(way: str) -> None:
    values = arguments(20)
    torch._dynamo.reset()

    def training(*leaves: Tensor) -> Tensor:
        u, k, bias, gate_in, gate_out = leaves
        return flashconv.parallel(u, k, bias, gate_in_btd=gate_in, gate_out_btd=gate_out).square().sum()

    compiled = torch.compile(training, fullgraph=True, backend="aot_eager")
    gradients: list[list[Any]] = []
    for function in (training, compiled):
        leaves = [x.detach().requires_grad_() for x in values.values()]
        function(*leaves).backward()
        gradients.append([x.grad for x in leaves])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)
