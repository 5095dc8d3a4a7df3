"""The gated delta rule's Triton kernels against the loop over tokens: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.core.errors import ConfigError, UnsupportedError
from subquad.ops import backends, gdn, launch

on_triton = pytest.importorskip("subquad.ops.gdn.on_triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("q_bthk", "k_bthk", "v_bthv", "g_bth", "beta_bth", "state_bhkv")
Arguments = dict[str, Tensor]

# The rule is twice the error of the loop run in bfloat16; the interpreter cuts bits off where hardware rounds, which
# doubles a rounding error's bound.
BAR = 4.0 if backends.interpreted() else 2.0

# As many roundings of float32, relative to the largest number in a sum, as a chunk has tokens.
EXACT = 64 * torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "poison", True)


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch):
    """Cut every sequence into so many segments, as it is where a device would else be idle."""
    return lambda count: monkeypatch.setattr(on_triton, "segments", lambda *_: count)


def arguments(
    t: int,
    *,
    b: int = 1,
    h: int = 1,
    heads: tuple[int, int, int] | None = None,
    k: int = 16,
    v: int = 16,
    decay: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Arguments:
    """Unit keys, log decays uniform in [-decay, 0]; `heads` of q, k and v are h unless named."""
    hq, hk, hv = heads or (h, h, h)
    made = {
        "q_bthk": torch.randn(b, t, hq, k).to(dtype),
        "k_bthk": F.normalize(torch.randn(b, t, hk, k), dim=-1).to(dtype),
        "v_bthv": torch.randn(b, t, hv, v).to(dtype),
        "g_bth": -decay * torch.rand(b, t, h),
        "beta_bth": torch.rand(b, t, h),
        "state_bhkv": torch.randn(b, h, k, v),
    }
    return {name: x.to(DEVICE) for name, x in made.items()}


def results(form: Any, values: Arguments, *, widen: bool = False, **where: Any) -> dict[str, Tensor]:
    """Outputs, final state and the gradients of a fixed random sum of both, in float64."""
    leaves = {n: (x.double() if widen else x).detach().requires_grad_() for n, x in values.items()}
    y, end = form(**leaves, **where)
    rng = torch.Generator().manual_seed(1)
    wy, wend = (torch.randn(x.shape, generator=rng, dtype=torch.float64).to(DEVICE) for x in (y, end))
    valid_bt = where.get("valid_bt")
    if valid_bt is not None:
        y, wy = (x.masked_fill(~valid_bt[..., None, None], 0) for x in (y, wy))
    loss = (y * wy.to(y.dtype)).sum(dtype=torch.float64) + (end * wend.to(end.dtype)).sum(dtype=torch.float64)
    found = torch.autograd.grad(loss, list(leaves.values()))
    return {"y": y.detach().double(), "end": end.detach().double()} | {
        f"d{name}": x.double() for name, x in zip(leaves, found, strict=True)
    }


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-12))


def agree(values: Arguments, *, growth: float = 1.0, **where: Any) -> None:
    """All results within the bar for the dtype; `growth` is by how much the equation itself enlarges a rounding."""
    got = results(on_triton.scan, values, **where)
    want = results(gdn.equation, values, widen=True, **where)
    naive = results(gdn.equation, values, dtype=torch.bfloat16, **where)
    wide = values["q_bthk"].dtype == torch.float32
    for name, x in want.items():
        bar = growth * EXACT if wide else BAR * error(naive[name], x)
        assert error(got[name], x) <= bar, f"{name}: {error(got[name], x):.1e}, expected at most {bar:.1e}"
    k, v, g, beta, state = (values[n] for n in NAMES[1:])
    torch.testing.assert_close(
        on_triton.final_state(k, v, g, beta, state, **where).double(), got["end"], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("t", [1, 63, 65, 130])
def test_equals_the_equation(t: int, dtype: torch.dtype) -> None:
    agree(arguments(t, k=16, v=24, dtype=dtype))


@pytest.mark.parametrize(
    ("k", "v", "h", "heads"),
    [(16, 33, 1, None), (40, 16, 1, None), (5, 3, 2, (2, 1, 2)), (16, 16, 6, (3, 2, 6)), (16, 16, 4, (1, 4, 2))],
)
def test_odd_widths_and_grouped_heads(k: int, v: int, h: int, heads: tuple[int, int, int] | None) -> None:
    agree(arguments(66, k=k, v=v, h=h, heads=heads))


# Of five chunks: three and two, and one each.
@pytest.mark.parametrize("count", [2, 5])
def test_segments(count: int, split: Any) -> None:
    split(count)
    agree(arguments(300, v=20))


@pytest.mark.parametrize("count", [1, 3])
def test_documents_and_padding(count: int, split: Any) -> None:
    split(count)
    lengths = [[70, 1, 58, 40], [3, 64, 66]]
    documents_bt = torch.zeros(2, 180, dtype=torch.int64)
    valid_bt = torch.zeros(2, 180, dtype=torch.bool)
    for row, parts in enumerate(lengths):
        valid_bt[row, : sum(parts)] = True
        documents_bt[row, : sum(parts)] = torch.arange(len(parts)).repeat_interleave(torch.tensor(parts))
        documents_bt[row, sum(parts) :] = 9
    where = {"valid_bt": valid_bt.to(DEVICE), "documents_bt": documents_bt.to(DEVICE)}
    values = arguments(180, b=2)
    agree(values, **where)
    spoiled = {
        n: x if n == "state_bhkv" else x.masked_fill(~where["valid_bt"].view(2, 180, *[1] * (x.dim() - 2)), torch.nan)
        for n, x in values.items()
    }
    clean, got = (results(on_triton.scan, x, **where) for x in (values, spoiled))
    for name in clean:
        torch.testing.assert_close(got[name], clean[name], rtol=0, atol=0)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("decay", [0.0, 50.0, 1e5])
def test_no_and_strong_decay(decay: float, count: int, split: Any) -> None:
    split(count)
    values = arguments(130, decay=decay)
    got, want = results(on_triton.scan, values), results(gdn.equation, values, widen=True)
    for name, x in want.items():
        assert error(got[name], x) <= EXACT or float(got[name].abs().max()) < 1e-30, name


@pytest.mark.parametrize("same", [False, True])
def test_replacing_twice_the_value_under_unit_keys(same: bool) -> None:
    values = arguments(130, decay=0.1)
    values["beta_bth"] = torch.full_like(values["beta_bth"], 2.0)
    if same:
        values["k_bthk"] = values["k_bthk"][:, :1].expand(-1, 130, -1, -1)
    # Every token a reflection along one key: the inverse of a chunk's triangular system is 2 all below its diagonal, so
    # that a rounding is doubled, and reflections forget nothing, so that the roundings of the three chunks add up.
    agree(values, growth=6.0 if same else 1.0)


def test_bfloat16_with_segments_documents_and_groups(split: Any) -> None:
    split(3)
    values = arguments(140, h=2, heads=(2, 1, 1), dtype=torch.bfloat16)
    values["state_bhkv"] = values["state_bhkv"].bfloat16()
    agree(values, documents_bt=(torch.arange(140, device=DEVICE) // 50)[None])


def test_views_of_one_projection_are_read_in_place() -> None:
    values = arguments(70, h=2)
    packed = torch.cat([values[n] for n in NAMES[:3]], dim=-1)
    views = dict(zip(NAMES[:3], packed.split(16, dim=-1), strict=True))
    views["g_bth"] = torch.stack((values["g_bth"], values["beta_bth"]), dim=1)[:, 0]
    got = results(on_triton.scan, values | views)
    for name, want in results(on_triton.scan, values).items():
        torch.testing.assert_close(got[name], want, rtol=0, atol=0)


def test_splits_equal_one_shot() -> None:
    values = arguments(150, h=2)
    whole, end = on_triton.scan(**values)
    state, parts = values["state_bhkv"], []
    for a, b in ((0, 1), (1, 64), (64, 97), (97, 150)):
        y, state = on_triton.scan(**{n: x[:, a:b] for n, x in values.items() if n != "state_bhkv"}, state_bhkv=state)
        parts.append(y)
    assert error(torch.cat(parts, dim=1), whole) <= EXACT
    assert error(state, end) <= EXACT


def test_what_comes_later_changes_nothing_before() -> None:
    values = arguments(130)
    later = {
        n: x if n == "state_bhkv" else torch.cat((x[:, :70], torch.rand_like(x[:, 70:])), 1) for n, x in values.items()
    }
    later["g_bth"] = -later["g_bth"].abs()
    torch.testing.assert_close(
        on_triton.scan(**later)[0][:, :70], on_triton.scan(**values)[0][:, :70], rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("count", [1, 3])
def test_nan_in_the_decay_spoils_all_behind_it(count: int, split: Any) -> None:
    split(count)
    values = arguments(200)
    values["g_bth"][:, 70] = torch.nan
    y, end = on_triton.scan(**values)
    assert y[:, 70:].isnan().all() and end.isnan().all()
    assert y[:, :64].isfinite().all()


@pytest.mark.parametrize(("b", "t"), [(0, 5), (2, 0)])
def test_nothing_to_do(b: int, t: int) -> None:
    values = {n: x.requires_grad_() for n, x in arguments(t, b=b).items()}
    y, end = on_triton.scan(**values)
    assert y.shape == (b, t, 1, 16) and end.dtype == torch.float32
    torch.testing.assert_close(end, values["state_bhkv"])
    torch.testing.assert_close(on_triton.final_state(**{n: values[n] for n in NAMES[1:]}), end)
    torch.testing.assert_close(torch.autograd.grad(end.sum(), values["state_bhkv"])[0], torch.ones_like(end))


def test_the_final_state_alone_has_gradients(split: Any) -> None:
    split(2)
    values = {n: x.requires_grad_() for n, x in arguments(130).items() if n != "q_bthk"}
    weight = torch.randn(1, 1, 16, 16, device=DEVICE)
    got = torch.autograd.grad((on_triton.final_state(**values) * weight).sum(), list(values.values()))
    wide = {n: x.detach().double().requires_grad_() for n, x in values.items()}
    end = gdn.equation(wide["k_bthk"], **wide)[1]
    for x, want in zip(got, torch.autograd.grad((end * weight).sum(), list(wide.values())), strict=True):
        assert error(x, want) <= EXACT


def test_autocast_chooses_the_dtype() -> None:
    values = arguments(65)
    narrow = {n: x.bfloat16() if n in NAMES[:3] else x for n, x in values.items()}
    with torch.autocast(DEVICE, torch.bfloat16):
        y, end = on_triton.scan(**values)
    want, want_end = on_triton.scan(**narrow)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, want.float(), rtol=0, atol=0)
    torch.testing.assert_close(end, want_end, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q_bthk", lambda x: x[..., :8], "k=8"),
        ("v_bthv", lambda x: x[:, :40], "t="),
        ("g_bth", lambda x: x[..., 0], "expected 3 axes"),
        ("k_bthk", lambda x: x.repeat(1, 1, 2, 1)[:, :, :3], "divides h=2"),
        ("state_bhkv", lambda x: x[:, :, :4], "k="),
    ],
)
def test_wrong_shapes_say_so(name: str, change: Any, message: str) -> None:
    values = arguments(65, h=2)
    with pytest.raises(ConfigError, match=message):
        on_triton.scan(**values | {name: change(values[name])})


def test_what_can_not_be_tiled_is_refused_with_its_reason() -> None:
    values = arguments(4, k=300)
    assert "head dims up to 256" in on_triton.refusal(*values.values())
    assert "float64" in on_triton.refusal(*(x.double() for x in arguments(4).values()))
    with backends.use("triton"), pytest.raises(UnsupportedError, match="head dims up to 256"):
        gdn.scan(**values)


def test_chosen_by_name() -> None:
    values = arguments(65)
    with backends.use("triton"):
        y, end = gdn.scan(**values)
        only = gdn.final_state(**{n: values[n] for n in NAMES[1:]})
    want = on_triton.scan(**values)
    torch.testing.assert_close((y, end), want, rtol=0, atol=0)
    torch.testing.assert_close(only, end)


def test_operators_keep_their_promises() -> None:
    values = [x.requires_grad_() for x in arguments(65).values()]
    torch.library.opcheck(on_triton._forward, (*values, None))
    torch.library.opcheck(on_triton._final_state, (*values[1:], None))


def test_compiles_without_a_graph_break() -> None:
    values = arguments(65)
    compiled = torch.compile(on_triton.scan, fullgraph=True, backend="aot_eager")
    got, want = results(compiled, values), results(on_triton.scan, values)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=0)
