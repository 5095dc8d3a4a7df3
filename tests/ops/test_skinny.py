"""Linear layers over few tokens: every backend against the layers themselves in float64."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.ops import backends, launch, skinny

triton_runs = torch.cuda.is_available() or backends.interpreted()
TRITON = pytest.param("triton", marks=pytest.mark.skipif(not triton_runs, reason="needs Triton"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Products are summed in float32; the output is rounded once.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 8e-3}


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    launch.poison = True
    yield
    launch.poison = False


def linear(d: int, n: int, bias: bool, dtype: torch.dtype) -> nn.Linear:
    return nn.Linear(d, n, bias=bias).to(DEVICE, dtype)


def apart(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("backend", ["torch", TRITON])
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("b", "t", "d"), [(1, 1, 40), (1, 1, 2500), (3, 2, 1100), (5, 4, 64), (2, 9, 33), (5, 8, 200)])
def test_layers_side_by_side_give_what_each_gives_alone(
    b: int, t: int, d: int, dtype: torch.dtype, backend: str
) -> None:
    x_btd = torch.randn(b, t, d, device=DEVICE, dtype=dtype)
    sizes = ((24, True), (16, False), (33, True), (5, False), (7, True), (64, False))
    layers = [linear(d, n, bias, dtype) for n, bias in sizes]
    for some in (layers, layers[:1], layers[2:4]):
        with torch.no_grad(), backends.use(backend):
            got = skinny.project(x_btd, *some)
        for y_btn, layer in zip(got, some, strict=True):
            bias = None if layer.bias is None else layer.bias.double()
            want = F.linear(x_btd.double(), layer.weight.double(), bias)
            assert apart(y_btn, want) < ROUNDING[dtype]


@pytest.mark.parametrize("backend", ["torch", TRITON])
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("b", "t", "d", "bias"), [(1, 1, 40, True), (3, 9, 65, False)])
def test_a_gated_linear_unit_is_its_formula(
    b: int, t: int, d: int, bias: bool, dtype: torch.dtype, backend: str
) -> None:
    x_btd, layer = torch.randn(b, t, d, device=DEVICE, dtype=dtype), linear(d, 66, bias, dtype)
    with torch.no_grad(), backends.use(backend):
        got = skinny.glu(x_btd, layer)
        called: list[int] = []
        layer.register_forward_pre_hook(lambda *_: called.append(1))
        skinny.glu(x_btd, layer)
    assert called == [1]
    up_btn, gate_btn = layer.double()(x_btd.double()).chunk(2, dim=-1)
    assert apart(got, up_btn * gate_btn.sigmoid()) < 1.5 * ROUNDING[dtype]


@pytest.mark.parametrize("backend", ["torch", TRITON])
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("b", "t", "d"), [(1, 1, 40), (3, 2, 1100), (1, 7, 33), (2, 9, 33), (5, 8, 48)])
def test_layers_behind_a_norm_give_what_they_give_of_it(
    b: int, t: int, d: int, dtype: torch.dtype, backend: str
) -> None:
    x_btd = 3 * torch.randn(b, t, d, device=DEVICE, dtype=dtype)
    norm = nn.RMSNorm(d, eps=1e-5).to(DEVICE, dtype)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    layers = [linear(d, 24, True, dtype), linear(d, 17, False, dtype)]
    with torch.no_grad(), backends.use(backend):
        got = skinny.project(x_btd, *layers, norm=norm)
        n_btd = norm.double()(x_btd.double())
        for y_btn, layer in zip(got, layers, strict=True):
            assert apart(y_btn, layer.double()(n_btd)) < 1.5 * ROUNDING[dtype]


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("b", "t", "d"), [(1, 1, 40), (3, 2, 1100), (4, 4, 64)])
def test_the_fused_second_half_of_a_block_is_its_formula(
    b: int, t: int, d: int, bias: bool, dtype: torch.dtype
) -> None:
    if not triton_runs:
        pytest.skip("needs Triton")
    x_btd, y_btd = (torch.randn(b, t, d, device=DEVICE, dtype=dtype) for _ in range(2))
    norm = nn.RMSNorm(d).to(DEVICE, dtype)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    gate, up, down = linear(d, 50, bias, dtype), linear(d, 50, bias, dtype), linear(50, d, bias, dtype)
    with torch.no_grad():
        got: dict[str, Tensor | None] = {}
        for backend in ("torch", "triton"):
            with backends.use(backend):
                got[backend] = skinny.swiglu(x_btd, y_btd, norm, gate, up, down)
        h_btd = (x_btd + y_btd).double()
        wide = [m.double() for m in (norm, gate, up, down)]
        n_btd = wide[0](h_btd)
        want = h_btd + wide[3](F.silu(wide[1](n_btd)) * wide[2](n_btd))
    for y in got.values():
        assert y is not None
        assert apart(y, want) < 2 * ROUNDING[dtype]


@pytest.mark.parametrize(
    ("width", "tokens"),
    [*itertools.product([40, 96, 576, skinny.NARROW, 1536], [3, 5, 8, skinny.MOST_TOKENS]), (576, 32)],
)
def test_rows_cut_in_slices_and_a_tail_are_whole(width: int, tokens: int) -> None:
    if not triton_runs:
        pytest.skip("needs Triton")
    dtype = torch.bfloat16
    x_btd, y_btd = (3 * torch.randn(1, tokens, width, device=DEVICE, dtype=dtype) for _ in range(2))
    norm, narrow = (nn.RMSNorm(d, eps=1e-5).to(DEVICE, dtype) for d in (width, 24))
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    layers = [linear(width, 20, True, dtype), linear(width, 33, False, dtype)]
    wide_in = linear(width, 24, True, dtype), linear(width, 24, True, dtype), linear(24, width, True, dtype)
    wide_inner = linear(24, width, False, dtype), linear(24, width, False, dtype), linear(width, 24, False, dtype)
    with torch.no_grad():
        with backends.use("triton"):
            got = [
                *skinny.project(x_btd, *layers, norm=norm),
                *skinny.project(x_btd, *layers),
                skinny.swiglu(x_btd, y_btd, norm, *wide_in),
                skinny.swiglu(x_btd[..., :24], y_btd[..., :24], narrow, *wide_inner),
            ]
        x_btd, y_btd = x_btd.double(), y_btd.double()
        for module in (norm, narrow, *layers, *wide_in, *wide_inner):
            module.double()
        want = [layer(norm(x_btd)) for layer in layers] + [layer(x_btd) for layer in layers]
        for normed, (gate, up, down) in ((norm, wide_in), (narrow, wide_inner)):
            h_btd = (x_btd + y_btd)[..., : normed.weight.numel()]
            want.append(h_btd + down(F.silu(gate(normed(h_btd))) * up(normed(h_btd))))
    for y, z in zip(got, want, strict=True):
        assert y is not None
        # The norm, the sum before it, the gate and the output are rounded each, the sums over a row in float32 are not.
        assert apart(y, z) < 2 * ROUNDING[dtype]


@pytest.mark.skipif(not triton_runs, reason="needs Triton")
def test_a_row_is_held_by_the_least_powers_of_two() -> None:
    from subquad.ops.skinny.on_triton import parts

    assert [parts(width, 64) for width in (8, 64, 96, 576, 768, 896, 1024, 1536)] == [
        (64, 0), (64, 0), (128, 0), (512, 64), (512, 256), (1024, 0), (1024, 0), (1024, 512),
    ]  # fmt: skip
    assert parts(576, 256) == (512, 256)


def test_what_is_trained_hooked_adapted_or_long_is_called_as_it_is() -> None:
    if not triton_runs:
        pytest.skip("needs Triton")
    x_btd, layer = torch.randn(1, 2, 8, device=DEVICE), linear(8, 4, True, torch.float32)
    many_btd = torch.randn(1, skinny.MOST_OF_NARROW + 1, 8, device=DEVICE)
    called: list[int] = []

    class Adapted(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            called.append(1)
            return super().forward(input)

    with backends.use("triton"):
        y_btn = skinny.project(x_btd, layer)[0]
        assert y_btn.requires_grad
        with torch.no_grad():
            skinny.project(x_btd, Adapted(8, 4).to(DEVICE))
            assert called == [1]
            layer.register_forward_pre_hook(lambda *_: called.append(2))
            skinny.project(x_btd, layer)
            assert called == [1, 2]
            norm = nn.RMSNorm(8).to(DEVICE)
            norm.register_forward_pre_hook(lambda *_: called.append(3))
            skinny.project(x_btd, linear(8, 4, True, torch.float32), norm=norm)
            gate, up, down = (linear(8, 8, True, torch.float32) for _ in range(3))
            skinny.swiglu(x_btd, x_btd, norm, gate, up, down)
            assert called == [1, 2, 3, 3]
            torch.testing.assert_close(skinny.project(many_btd, layer)[0], layer(many_btd))


def test_no_token_and_no_layer_is_made_up() -> None:
    layer = linear(8, 4, True, torch.float32)
    with torch.no_grad():
        assert skinny.project(torch.randn(2, 0, 8, device=DEVICE), layer)[0].shape == (2, 0, 4)
