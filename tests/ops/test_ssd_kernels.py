"""SSD's Triton kernels against the loop over tokens: interpreted on the CPU, compiled where there is a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.core.errors import ConfigError, UnsupportedError
from subquad.ops import backends, launch, ssd

pytest.importorskip("triton", reason="needs Triton")

from subquad.ops.ssd import on_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOAT32 = 6 * 8 * 2**-24
NAMES = ("q_bthk", "k_bthk", "v_bthv", "g_bth", "state_bhkv")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Scratch holds NaN; what should run on the kernels does, and nothing else."""
    monkeypatch.setattr(launch, "poison", True)
    with backends.use("triton"):
        yield


def arguments(
    t: int, *, b: int = 1, h: int = 2, heads: tuple[int, int, int] | None = None, k: int = 16, v: int = 16,
    decay: float = 1.0, dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:  # fmt: skip
    """Unit keys, log decays uniform in [-decay, 0]; `heads` are those of q, k and v."""
    n_q, n_k, n_v = heads or (h, h, h)
    made = {
        "q_bthk": torch.randn(b, t, n_q, k).to(dtype),
        "k_bthk": F.normalize(torch.randn(b, t, n_k, k), dim=-1).to(dtype),
        "v_bthv": torch.randn(b, t, n_v, v).to(dtype),
        "g_bth": -decay * torch.rand(b, t, h),
        "state_bhkv": torch.randn(b, h, k, v),
    }
    return {name: x.to(DEVICE) for name, x in made.items()}


def rows(x: Tensor, kept_bt: Tensor) -> Tensor:
    return x.where(kept_bt.reshape(*kept_bt.shape, *[1] * (x.dim() - 2)), 0)


def results(function: Any, values: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Outputs, final state and all gradients, with weights of their own; columns without a token count nothing."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in values.items()}
    y, end = function(**leaves, **options)
    valid_bt = options.get("valid_bt")
    if valid_bt is not None:
        y = rows(y, valid_bt)
    rng = torch.Generator().manual_seed(1)
    weight_y, weight_end = (torch.randn(x.shape, generator=rng).to(x) for x in (y, end))
    gradients = torch.autograd.grad((y * weight_y).sum() + (end * weight_end).sum(), list(leaves.values()))
    return {"y": y, "end": end, **{f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}}


def error(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm().clamp(min=1e-30))


def compare(values: dict[str, Tensor], **options: Any) -> None:
    """Every result against the loop in float64 on the same rounded arguments.

    bfloat16 may be twice as far off as the loop run in bfloat16. float32: a result is at the most a chain of six sums
    of 64 products each, of sqrt(64) roundings.
    """
    got = results(ssd.scan, values, **options)
    exact = results(ssd.equation, {name: x.double() for name, x in values.items()}, **options)
    assert got["y"].dtype == values["v_bthv"].dtype
    assert got["end"].dtype == torch.float32
    if values["v_bthv"].dtype == torch.float32:
        limits = dict.fromkeys(got, FLOAT32)
    else:
        naive = results(ssd.equation, values, **options, dtype=torch.bfloat16)
        limits = {name: 2 * error(x, exact[name]) for name, x in naive.items()}
    for name, x in got.items():
        assert x.shape == exact[name].shape
        assert error(x, exact[name]) <= limits[name], name
    with torch.no_grad():
        kept = {name: x for name, x in values.items() if name != "q_bthk"}
        assert error(ssd.final_state(**kept, **options), exact["end"]) <= limits["end"]


@pytest.fixture
def segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of 64 tokens, so that short sequences have several."""
    monkeypatch.setattr(on_triton, "segment", lambda *_: 64)


@pytest.mark.parametrize("t", [1, 63, 65, 130])
def test_float32(t: int) -> None:
    compare(arguments(t, b=2, h=1))


@pytest.mark.parametrize("t", [63, 130])
@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_bfloat16(t: int, decay: float) -> None:
    compare(arguments(t, decay=decay, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_segments(segments: None, dtype: torch.dtype) -> None:
    compare(arguments(150, h=1, decay=0.1, dtype=dtype))


def test_segments_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = arguments(150, h=1, decay=0.01)
    whole = results(ssd.scan, values)
    for length in (64, 128):
        monkeypatch.setattr(on_triton, "segment", lambda *_, length=length: length)
        for name, x in results(ssd.scan, values).items():
            # Segments are joined by one more product and sum in float32 each.
            assert error(x, whole[name]) <= FLOAT32, name


@pytest.mark.parametrize(("k", "v"), [(16, 17), (20, 16), (24, 65), (1, 3)])
def test_head_dims(k: int, v: int) -> None:
    compare(arguments(70, h=1, k=k, v=v))


def test_more_value_columns_than_a_program_takes() -> None:
    compare(arguments(40, k=80, v=96, heads=(2, 1, 1), dtype=torch.bfloat16, decay=0.1))


@pytest.mark.parametrize("heads", [(4, 2, 2), (4, 1, 1), (1, 1, 4), (2, 4, 1)])
def test_grouped_heads(heads: tuple[int, int, int]) -> None:
    compare(arguments(70, h=4, heads=heads))


def packed(b: int, t: int) -> dict[str, Tensor]:
    """Documents that end inside chunks and at their borders, and rows of unequal lengths."""
    starts = torch.tensor([[5, 64, 100], [63, 70, 128]])[:b]
    documents_bt = (torch.arange(t)[None, :, None] >= starts[:, None]).sum(-1)
    valid_bt = torch.arange(t) < torch.tensor([[t - 3], [t]])[:b]
    return {"documents_bt": documents_bt.to(DEVICE), "valid_bt": valid_bt.to(DEVICE)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_documents_and_padding(segments: None, dtype: torch.dtype) -> None:
    compare(arguments(150, b=2, decay=0.1, heads=(2, 1, 1), dtype=dtype), **packed(2, 150))


def test_first_document_may_start_anew() -> None:
    """A row whose first token belongs to document 1 does not see the state."""
    values = arguments(40, h=1)
    compare(values, documents_bt=torch.ones(1, 40, dtype=torch.int64, device=DEVICE))


def test_padding_hides_what_stands_there() -> None:
    values = arguments(70, b=2)
    where = {"valid_bt": torch.arange(70, device=DEVICE) < torch.tensor([[66], [70]], device=DEVICE)}
    clean = results(ssd.scan, values, **where)
    spoiled = {name: x.clone() for name, x in values.items()}
    for name in NAMES[:4]:
        spoiled[name][0, 66:] = torch.nan
    for name, x in results(ssd.scan, spoiled, **where).items():
        assert torch.equal(x, clean[name]), name


def test_splits_equal_one_shot() -> None:
    values = arguments(150)
    whole, end = ssd.scan(**values)
    state, start, pieces = values["state_bhkv"], 0, []
    for n in (1, 63, 2, 65, 0, 19):
        piece = {name: x if name == "state_bhkv" else x[:, start : start + n] for name, x in values.items()}
        piece["state_bhkv"] = state
        pieces.append(ssd.scan(**piece)[0])
        state = ssd.final_state(**{name: x for name, x in piece.items() if name != "q_bthk"})
        start += n
    assert start == 150
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, end, rtol=1e-5, atol=1e-5)


def test_a_token_changes_nothing_before_it() -> None:
    values = arguments(130)
    before = ssd.scan(**values)[0]
    for name in NAMES[:4]:
        values[name][:, 100:] *= 0.5
    after = ssd.scan(**values)[0]
    assert torch.equal(after[:, :100], before[:, :100])
    assert not torch.equal(after[:, 100:], before[:, 100:])


def test_views_and_other_strides() -> None:
    """Slices of one projection, a last axis that isn't contiguous, an expanded gradient."""
    b, t, h, d = 2, 70, 2, 16
    fused = torch.randn(b, t, 3 * h * d, device=DEVICE)
    q, k, v = (x.unflatten(-1, (h, d)) for x in fused.chunk(3, -1))
    g = -torch.rand(b, h, t, device=DEVICE).transpose(1, 2)
    state = torch.randn(b, h, d, d, device=DEVICE).mT
    whole = ssd.scan(*(x.contiguous() for x in (q, k, v, g, state)))
    for values in ((q, k, v, g, state), (*(x.mT.contiguous().mT for x in (q, k, v)), g, state)):
        for a, c in zip(ssd.scan(*values), whole, strict=True):
            assert torch.equal(a, c)
    leaf = v.detach().clone().requires_grad_()
    ssd.scan(q, k, leaf, g, state)[0].sum().backward()
    assert leaf.grad is not None
    want = v.detach().double().requires_grad_()
    ssd.equation(q.double(), k.double(), want, g.double(), state.double())[0].sum().backward()
    assert error(leaf.grad, want.grad) < FLOAT32


@pytest.mark.parametrize("g", [-80.0, -1e4, -1e30, -torch.inf])
def test_any_decay_stays_finite(g: float) -> None:
    values = arguments(70, h=1)
    values["g_bth"][:, ::3] = g
    got = results(ssd.scan, values)
    values["g_bth"].clamp_(min=-1000.0)
    exact = results(ssd.equation, {name: x.double() for name, x in values.items()})
    for name, x in got.items():
        assert error(x, exact[name]) <= FLOAT32, name


def test_nan_decay_spoils_all_that_follows(segments: None) -> None:
    values = arguments(150, h=2)
    clean, _ = ssd.scan(**values)
    values["g_bth"][0, 70, 1] = torch.nan
    y, end = ssd.scan(**values)
    assert torch.equal(y[:, :70], clean[:, :70])
    assert torch.equal(y[:, :, 0], clean[:, :, 0])
    assert y[:, 70:, 1].isnan().all()
    assert end[:, 1].isnan().all() and end[:, 0].isfinite().all()
    assert ssd.final_state(*(values[name] for name in NAMES[1:]))[:, 1].isnan().all()


def test_gradients_through_the_final_state_alone() -> None:
    values = arguments(70, heads=(2, 1, 1))
    del values["q_bthk"]

    def of(function: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = {name: x.to(dtype).requires_grad_() for name, x in values.items()}
        end = function(**leaves)
        return list(torch.autograd.grad((end * torch.linspace(-1, 1, 16, device=DEVICE)).sum(), list(leaves.values())))

    got = of(ssd.final_state, torch.float32)
    want = of(lambda **x: ssd.equation(x["k_bthk"], **x)[1], torch.float64)
    for name, a, c in zip(values, got, want, strict=True):
        assert error(a, c) <= FLOAT32, name


@pytest.mark.parametrize(("b", "t"), [(0, 5), (2, 0)])
def test_nothing_to_do(b: int, t: int) -> None:
    values = arguments(t, b=b)
    y, end = ssd.scan(**values)
    assert y.shape == (b, t, 2, 16)
    assert torch.equal(end, values["state_bhkv"])
    assert torch.equal(ssd.final_state(*(values[name] for name in NAMES[1:])), values["state_bhkv"])


def test_half_precision_does_not_overflow() -> None:
    """The state of 130 equal tokens of size 30 is 117,000, more than float16 holds."""
    values = {name: torch.full_like(x, 30.0) for name, x in arguments(130, h=1).items()}
    values["g_bth"].zero_()
    values["q_bthk"].fill_(2.0**-9)
    half = {name: x.half() if name in NAMES[:3] else x for name, x in values.items()}
    y, end = ssd.scan(**half)
    assert y.dtype == torch.float16
    want, state = ssd.equation(**{name: x.double() for name, x in values.items()})
    assert error(y, want) <= 2**-11
    assert error(end, state) <= 2**-20


def test_state_in_bfloat16_and_autocast() -> None:
    values = arguments(66)
    rounded = values | {"state_bhkv": values["state_bhkv"].bfloat16()}
    exact = values | {"state_bhkv": rounded["state_bhkv"].float()}
    for a, c in zip(ssd.scan(**rounded), ssd.scan(**exact), strict=True):
        assert torch.equal(a, c)
    rounded["state_bhkv"].requires_grad_()
    ssd.scan(**rounded)[1].sum().backward()
    assert rounded["state_bhkv"].grad is not None and rounded["state_bhkv"].grad.dtype == torch.bfloat16
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y, end = ssd.scan(**values)
    low = values | {name: values[name].bfloat16() for name in NAMES[:3]}
    assert y.dtype == torch.float32 and end.dtype == torch.float32
    assert torch.equal(y, ssd.scan(**low)[0].float())


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("k_bthk", (1, 8, 2, 15)),
        ("v_bthv", (1, 9, 2, 16)),
        ("g_bth", (1, 8, 2, 1)),
        ("state_bhkv", (1, 2, 16, 17)),
        ("state_bhkv", (1, 3, 16, 16)),
        ("q_bthk", (1, 8, 3, 16)),
    ],
)
def test_wrong_shapes(name: str, shape: tuple[int, ...]) -> None:
    values = arguments(8)
    values[name] = torch.zeros(shape, device=DEVICE)
    with pytest.raises(ConfigError, match="expected"):
        ssd.scan(**values)


def test_what_the_kernels_refuse() -> None:
    values = arguments(8, k=260)
    with pytest.raises(UnsupportedError, match="head dims up to 256"):
        ssd.scan(**values)
    values = {name: x.double() for name, x in arguments(8).items()}
    with pytest.raises(UnsupportedError, match="float64"):
        ssd.scan(**values)


@pytest.mark.parametrize("documents", [False, True])
def test_custom_operations(documents: bool) -> None:
    values = arguments(20, heads=(2, 1, 1))
    documents_bt = packed(1, 20)["documents_bt"].int() if documents else None
    leaves = tuple(x.requires_grad_() for x in values.values())
    torch.library.opcheck(torch.ops.subquad.ssd_scan.default, (*leaves, documents_bt, 64))
    plain = tuple(x.detach() for x in leaves)
    torch.library.opcheck(torch.ops.subquad.ssd_final_state.default, (*plain[1:], documents_bt, 64))
    end = torch.ops.subquad.ssd_scan(*plain, documents_bt, 64)[1]
    dy = torch.randn(1, 20, 2, 16, device=DEVICE)
    arguments_ = (dy, end, *plain, documents_bt, 64)
    torch.library.opcheck(torch.ops.subquad.ssd_scan_backward.default, arguments_)


def test_compiles_whole() -> None:
    """One graph, forward and backward, for several lengths."""

    def loss(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> Tensor:
        y, end = ssd.scan(q, k, v, g, state)
        kept = ssd.final_state(k.detach(), v.detach(), g.detach(), state.detach())
        return (y**2).sum() + (end * kept).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for t in (20, 40):
        values = arguments(t, heads=(2, 1, 1))
        both = []
        for function in (loss, compiled):
            leaves = [x.clone().requires_grad_() for x in values.values()]
            made = function(*leaves)
            both.append([made, *torch.autograd.grad(made, leaves)])
        for a, c in zip(*both, strict=True):
            torch.testing.assert_close(a, c)
