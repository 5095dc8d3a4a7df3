"""Windowed attention: every form equals the equation, gradients included, whatever stands before and beside it."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from subquad.core.errors import ConfigError, UnsupportedError
from subquad.core.layout import Layout
from subquad.ops import backends, launch, windowed
from subquad.ops.window import Far, WindowState

TRITON = importlib.util.find_spec("triton") is not None and (torch.cuda.is_available() or backends.interpreted())
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(not TRITON, reason="needs Triton, on a GPU or interpreted")


def arguments(
    t: int,
    *,
    b: int = 2,
    h: int = 2,
    g: int = 1,
    k: int = 16,
    v: int = 16,
    f: int = 16,
    window: int = 5,
    sinks: int = 2,
    seen: tuple[int, ...] | None = None,
    far: bool = True,
    leaving: int | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors by name, and what else the operation takes.

    `seen` tokens stand before, or nothing; of the window's the features of the oldest `leaving` are given, or of all.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(DEVICE, dtype)

    tensors = {"q": draw(b, t, h, k), "k": draw(b, t, g, k), "v": draw(b, t, g, v)}
    if far:
        tensors |= {"weight": draw(b, t, h, f).float().to(torch.promote_types(dtype, torch.float32))}
        tensors |= {"f": draw(b, t, g, f).softmax(-1), "bias": draw(h, f)}
    if seen is not None:
        for name, wide in (("window_k", k), ("window_v", v)):
            tensors[name] = draw(b, g, window, wide)
        for name, wide in (("sink_k", k), ("sink_v", v)):
            tensors[name] = draw(b, g, sinks, wide)
        if far:
            # As after `seen` tokens: nothing in the sums before the window is full behind the sinks.
            before = (torch.tensor(seen, device=DEVICE) - window - sinks).clamp(min=0)[:, None, None, None]
            tensors["window_f"] = draw(b, g, leaving or window, f).softmax(-1)
            sums = torch.cat((draw(b, g, f, v), draw(b, g, f, 1).exp()), -1) * before
            tensors["state"] = sums.to(torch.promote_types(dtype, torch.float32))
    options = {"window": window, "sinks": sinks, "scale": 0.3, "seen": seen}
    return tensors, options


def run(function: Any, tensors: dict[str, Tensor], options: dict[str, Any], layout: Layout, **more: Any) -> Tensor:
    x, seen = tensors, options["seen"]
    far, past = None, None
    if seen is not None:
        seen_b = torch.tensor(seen, device=x["q"].device)
        past = WindowState(x["window_k"], x["window_v"], x["sink_k"], x["sink_v"], seen_b)
    if "weight" in x:
        far = Far(x["weight"], x["f"], x.get("window_f"), x.get("state"), x.get("bias"))
    values = {name: options[name] for name in ("window", "sinks", "scale")}
    return function(x["q"], x["k"], x["v"], far, past, layout, **values, **more)


def gradients(
    function: Any, tensors: dict[str, Tensor], options: dict[str, Any], layout: Layout, to: Tensor, **more: Any
) -> dict[str, Tensor]:
    """The outputs as `y`, and the gradient of every tensor; outputs of padding count for nothing."""
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    y = run(function, leaves, options, layout, **more)
    kept = layout.valid_bt[..., None, None]
    inputs = list(leaves.values())
    grads = torch.autograd.grad((y * to.to(y) * kept).sum(), inputs, allow_unused=True, materialize_grads=True)
    out = dict(zip(leaves, grads, strict=True))
    return {"y": torch.where(kept, y.detach(), 0)} | out


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30))


def layout_of(t: int, b: int = 2) -> Layout:
    return Layout.dense(b, t, device=DEVICE)


# What the kernels must get right: every boundary between window, chunk, sinks, state and text.
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (70, {"h": 4, "g": 2}),
    "window alone": (70, {"far": False}),
    "no sinks": (33, {"sinks": 0}),
    "window of one": (40, {"window": 1, "sinks": 3}),
    "window of a chunk": (150, {"b": 1, "window": 64, "sinks": 4, "h": 3, "g": 1}),
    "window over chunks": (90, {"b": 1, "window": 70, "sinks": 20}),
    "all in the window": (30, {"window": 40}),
    "shorter than the sinks": (3, {"window": 1, "sinks": 9}),
    "one token": (1, {}),
    "odd widths": (21, {"k": 24, "v": 17, "f": 5, "h": 6, "g": 2}),
    "many features": (20, {"f": 70, "v": 40, "window": 3, "b": 1}),
    "long past": (37, {"seen": (100, 7)}),
    "past of a window": (20, {"seen": (5, 0), "window": 5}),
    "one token with a past": (1, {"seen": (31, 3)}),
    "past without far": (20, {"seen": (100, 2), "far": False, "sinks": 3}),
    "past without sinks": (18, {"seen": (12, 1), "sinks": 0}),
    "features of what leaves": (3, {"seen": (31, 6), "leaving": 3}),
    "features of what leaves last": (1, {"seen": (31, 3), "leaving": 1}),
}


@pytest.mark.parametrize("name", CASES)
def test_pytorchs_form_equals_the_equation(name: str) -> None:
    t, options = CASES[name]
    tensors, values = arguments(t, **options)
    b = tensors["q"].shape[0]
    layout, to = layout_of(t, b), torch.randn(b, t, *tensors["v"].shape[-1:], dtype=torch.float64)[:, :, None]
    want = gradients(windowed.equation, tensors, values, layout, to)
    with backends.use("torch"):
        got = gradients(windowed.attend, tensors, values, layout, to)
    for tensor in want:
        torch.testing.assert_close(
            got[tensor], want[tensor], rtol=1e-9, atol=1e-10, msg=lambda m, n=tensor: f"{n}: {m}"
        )


@pytest.mark.parametrize("past", [None, (11, 2)])
@pytest.mark.parametrize("far", [True, False])
def test_packed_and_padded_rows_equal_the_equation(far: bool, past: tuple[int, ...] | None) -> None:
    layout = Layout.packed([[5, 1, 20, 3], [9, 12]], device=DEVICE)
    tensors, values = arguments(29, far=far, seen=past)
    to = torch.randn(2, 29, 2, 16, dtype=torch.float64)
    want = gradients(windowed.equation, tensors, values, layout, to)
    got = gradients(windowed.attend, tensors, values, layout, to)
    for tensor in want:
        torch.testing.assert_close(
            got[tensor], want[tensor], rtol=1e-9, atol=1e-10, msg=lambda m, n=tensor: f"{n}: {m}"
        )


def test_equation_is_attention_where_nothing_is_far() -> None:
    tensors, values = arguments(12, h=4, g=2, window=12)
    q, k, v = (x.transpose(1, 2) for x in (tensors["q"], *(tensors[n].repeat_interleave(2, 2) for n in "kv")))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(run(windowed.equation, tensors, values, layout_of(12)), want, rtol=1e-11, atol=1e-11)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "poison", True)


@needs_triton
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_the_equation(name: str) -> None:
    """In float32 no worse than twice the loop in float32, or a few roundings; gradients of every argument."""
    t, options = CASES[name]
    tensors, values = arguments(t, **options, dtype=torch.float32)
    b = tensors["q"].shape[0]
    layout, to = layout_of(t, b), torch.randn(b, t, 1, tensors["v"].shape[-1])
    exact = {n: x.double() for n, x in tensors.items()}
    want = gradients(windowed.equation, exact, values, layout, to)
    naive = gradients(windowed.equation, tensors, values, layout, to)
    with backends.use("triton"):
        got = gradients(windowed.attend, tensors, values, layout, to)
    for tensor, x in want.items():
        limit = max(2 * error(naive[tensor], x), 16 * 2**-24)
        assert got[tensor].isfinite().all(), tensor
        assert error(got[tensor], x) <= limit or (got[tensor] - x).abs().max() < 1e-6, tensor


@needs_triton
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("seen", [None, (100, 7)])
def test_kernels_in_bfloat16(seen: tuple[int, ...] | None) -> None:
    """At most twice the error of the loop in bfloat16 throughout."""
    tensors, values = arguments(40, seen=seen, dtype=torch.bfloat16)
    layout, to = layout_of(40), torch.randn(2, 40, 2, 16).bfloat16().double()
    want = gradients(windowed.equation, {n: x.double() for n, x in tensors.items()}, values, layout, to)
    naive = gradients(windowed.equation, tensors, values, layout, to, dtype=torch.bfloat16)
    with backends.use("triton"):
        got = gradients(windowed.attend, tensors, values, layout, to)
    for tensor, x in want.items():
        assert error(got[tensor], x) <= 2 * error(naive[tensor], x), tensor


@needs_triton
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("seen", [None, (9, 40)])
def test_padding_of_any_content_changes_nothing(seen: tuple[int, ...] | None) -> None:
    tensors, values = arguments(30, seen=seen, dtype=torch.float32)
    layout = Layout.ragged(torch.tensor([30, 13], device=DEVICE), 30)
    spoiled = dict(tensors)
    for name in ("q", "k", "v", "weight", "f"):
        spoiled[name] = tensors[name].masked_fill(~layout.valid_bt[..., None, None], torch.nan)
    to = torch.randn(2, 30, 2, 16)
    for backend in ("torch", "triton"):
        with backends.use(backend):
            plain = run(windowed.attend, tensors, values, layout_of(30))
            got = gradients(windowed.attend, spoiled, values, layout, to)
        torch.testing.assert_close(got["y"][1, :13], plain[1, :13], rtol=1e-6, atol=1e-6)
        assert all(x.isfinite().all() for x in got.values())
        assert got["k"][1, 13:].abs().max() == 0


@needs_triton
def test_weights_and_scores_of_any_size_stay_finite() -> None:
    for bias in (-800.0, 300.0, 800.0):
        tensors, values = arguments(40, b=1, sinks=0, dtype=torch.float32)
        tensors["weight"] += bias
        tensors["q"] *= 100
        with backends.use("triton"):
            got = gradients(windowed.attend, tensors, values, layout_of(40, 1), torch.ones(1, 40, 2, 16))
        assert all(x.isfinite().all() for x in got.values())
        want = run(windowed.equation, {n: x.double() for n, x in tensors.items()}, values, layout_of(40, 1))
        assert error(got["y"], want) < 1e-5


@needs_triton
@pytest.mark.parametrize(
    ("name", "first", "last"), [("q", 70, 71), ("k", 70, 75), ("v", 70, 80), ("weight", 70, 71), ("f", 75, 80)]
)
def test_nan_is_never_a_plausible_number(name: str, first: int, last: int) -> None:
    """Every output that reads the token is spoiled, and none of an earlier chunk."""
    tensors, values = arguments(80, b=1, dtype=torch.float32)
    tensors[name][:, 70, :, 3] = torch.nan
    with backends.use("triton"):
        got = run(windowed.attend, tensors, values, layout_of(80, 1))
    spoiled = got[:, first:last, :, 3 if name == "v" else slice(None)]
    assert spoiled.isnan().all()
    assert got[:, :64].isfinite().all()


@needs_triton
def test_views_of_one_projection_are_read_in_place() -> None:
    tensors, values = arguments(20, h=4, g=2, dtype=torch.float32)
    joint = torch.cat([tensors[n].flatten(2) for n in ("q", "k", "v")], -1)
    q, k, v = joint.split([64, 32, 32], -1)
    views = tensors | {"q": q.unflatten(-1, (4, 16)), "k": k.unflatten(-1, (2, 16)), "v": v.unflatten(-1, (2, 16))}
    # Heads before time, as a product over heads leaves them.
    views["weight"] = tensors["weight"].transpose(1, 2).contiguous().transpose(1, 2)
    with backends.use("triton"):
        a, b = (
            gradients(windowed.attend, x, values, layout_of(20), torch.ones(2, 20, 4, 16)) for x in (tensors, views)
        )
    assert all(torch.equal(a[n], b[n]) for n in a)


@needs_triton
@pytest.mark.parametrize("seen", [None, (30, 4)])
@pytest.mark.parametrize("far", [True, False])
def test_operators_are_registered_soundly(far: bool, seen: tuple[int, ...] | None) -> None:
    from subquad.ops.windowed import on_triton

    tensors, values = arguments(20, far=far, seen=seen, dtype=torch.float32)
    caught: list[Any] = []
    original = on_triton._forward  # pyright: ignore[reportPrivateUsage]

    def catch(*inputs: Any) -> Any:
        caught.append(inputs)
        return original(*inputs)

    with backends.use("triton"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_triton, "_forward", catch)
        run(windowed.attend, {n: x.requires_grad_() for n, x in tensors.items()}, values, layout_of(20))
    inputs = [x.detach().requires_grad_(x.is_floating_point()) if isinstance(x, Tensor) else x for x in caught[0]]
    torch.library.opcheck(
        original, tuple(inputs), test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
    )


@needs_triton
def test_a_compiler_takes_it_whole() -> None:
    tensors, values = arguments(20, dtype=torch.float32)
    layout, to = layout_of(20), torch.randn(2, 20, 2, 16)
    with backends.use("triton"):
        whole = torch.compile(windowed.attend, fullgraph=True, backend="aot_eager")
        got = gradients(whole, tensors, values, layout, to)
        want = gradients(windowed.attend, tensors, values, layout, to)
    assert all(torch.equal(got[n], want[n]) for n in want)


@needs_triton
@pytest.mark.parametrize("far", [True, False])
def test_nothing_to_read_is_nothing(far: bool) -> None:
    for b, t in ((2, 0), (0, 5)):
        tensors, values = arguments(t, b=b, far=far, dtype=torch.float32)
        for backend in ("torch", "triton"):
            with backends.use(backend):
                assert run(windowed.attend, tensors, values, layout_of(t, b)).shape == (b, t, 2, 16)


@needs_triton
def test_what_the_kernels_cannot_do_is_refused_with_the_reason() -> None:
    tensors, values = arguments(20, dtype=torch.float32)
    packed = Layout.packed([[5, 15], [20]], device=DEVICE)
    with backends.use("triton"):
        with pytest.raises(UnsupportedError, match="got packed documents"):
            run(windowed.attend, tensors, values, packed)
        with pytest.raises(UnsupportedError, match="got torch.float64"):
            run(windowed.attend, {n: x.double() for n, x in tensors.items()}, values, layout_of(20))
        with pytest.raises(UnsupportedError, match="float16"):
            run(windowed.attend, {n: x.half() for n, x in tensors.items()}, values, layout_of(20))
        wide, values = arguments(2, k=144, dtype=torch.float32)
        with pytest.raises(UnsupportedError, match="up to 128 in float32"):
            run(windowed.attend, wide, values, layout_of(2))


def test_shapes_that_do_not_fit_are_refused() -> None:
    tensors, values = arguments(20, h=4, g=2)
    bad: list[tuple[dict[str, Tensor], str]] = [
        ({"k": tensors["k"][:, :19]}, "k_bthk: expected t=20"),
        ({"v": tensors["v"][:, :, :1]}, "v_btgv: expected g=2"),
        ({"k": tensors["k"][..., :3]}, "k_bthk: expected k=16"),
        ({"weight": tensors["weight"][:, :, :2]}, "weight_bthf: expected shape"),
        ({"bias": tensors["bias"][1:]}, "bias_hf: expected shape"),
        ({"f": tensors["f"][..., :7]}, "weight_bthf: expected shape"),
        ({"q": tensors["q"][:, :, :3], "weight": tensors["weight"][:, :, :3]}, "divides h=3, got 2"),
        ({"state": torch.zeros(2, 2, 16, 17, dtype=torch.float64)}, "give both"),
    ]
    for change, says in bad:
        with pytest.raises(ConfigError, match=says):
            run(windowed.attend, tensors | change, values, layout_of(20))
    tensors, values = arguments(4, seen=(9, 1), leaving=3)
    with pytest.raises(ConfigError, match="expected features of 4 to 5 tokens, got 3"):
        run(windowed.attend, tensors, values, layout_of(4))
    tensors, values = arguments(20, h=4, g=2)
    with pytest.raises(ConfigError, match="layout: expected shape"):
        run(windowed.attend, tensors, values, layout_of(21))
