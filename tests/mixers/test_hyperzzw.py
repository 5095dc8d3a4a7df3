"""What is particular to HyperZ.Z.W: the operator as its double sum, blank places, float32 kernels, refusals."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.core.errors import ConfigError, UnsupportedError
from subquad.core.layout import Layout
from subquad.core.state import State
from subquad.engine.generate import generate
from subquad.mixers.hyperzzw import HyperZZW
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack


def build(**fields: Any) -> HyperZZW:
    config = {"d_model": 2, "shape": (3, 4), "local_sizes": (3,), "hidden": 3} | fields
    return HyperZZW(HyperZZW.Config(**config)).double()


def places(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    return list(itertools.product(*map(range, shape)))


def written_out(mixer: HyperZZW, x_td: Tensor) -> Tensor:
    """The mixer of one image, place by place."""
    shape, d = mixer.shape, x_td.shape[1]
    z = torch.zeros(math.prod(shape), d, dtype=x_td.dtype)
    z[: len(x_td)] = mixer.in_proj(x_td)
    at = dict(zip(places(shape), z, strict=True))
    whole, near = mixer.whole(), [net() for net in mixer.near]
    features: list[list[Tensor]] = [[] for _ in range(1 + len(near))]
    for p in places(shape)[: len(x_td)]:
        sums = [
            whole[(slice(None), *q)] * at[q] * at[tuple((a - b) % n for a, b, n in zip(p, q, shape, strict=True))]
            for q in places(shape)
        ]
        features[0].append(torch.stack(sums).sum(0))
        for made, kernel in zip(features[1:], near, strict=True):
            total = torch.zeros(d, dtype=x_td.dtype)
            for q in places(kernel.shape[1:]):
                other = tuple(a + b - n // 2 for a, b, n in zip(p, q, kernel.shape[1:], strict=True))
                total = total + kernel[(slice(None), *q)] * at.get(other, torch.zeros(d, dtype=x_td.dtype))
            made.append(at[p] * total)
    standard = [F.batch_norm(torch.stack(f), None, None, training=True, eps=1e-5) for f in features]
    return mixer.out_proj(torch.cat((z[: len(x_td)], *standard), dim=-1))


@pytest.mark.parametrize("fields", [{}, {"shape": (7,), "local_sizes": (1, 5)}, {"shape": (5, 2), "local_sizes": ()}])
@torch.no_grad()
def test_equals_the_double_sum(fields: dict[str, Any]) -> None:
    mixer = build(**fields)
    n = math.prod(mixer.shape)
    for t in (n, n - 3):  # the last places of an image that is too short are blank
        x_btd = torch.randn(2, t, 2, dtype=torch.float64)
        want = torch.stack([written_out(mixer, x_td) for x_td in x_btd])
        torch.testing.assert_close(mixer(x_btd), want, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_a_slow_network_is_its_equations() -> None:
    net = build(layers=2).whole
    kernel = net()
    for i, j in places((3, 4)):
        x_2 = torch.tensor([-1 + i, -1 + 2 * j / 3], dtype=torch.float64)
        first, second = (torch.sin(r @ x_2 + s) for r, s in zip(net.frequency, net.phase, strict=True))
        want = net.out.weight @ (net.mix[0](first) * second)
        torch.testing.assert_close(kernel[:, i, j], want, rtol=1e-10, atol=1e-12)


def test_every_parameter_learns() -> None:
    mixer = build(layers=2)
    mixer(torch.randn(2, 12, 2, dtype=torch.float64)).square().sum().backward()
    assert [name for name, p in mixer.named_parameters() if p.grad is None or p.grad.abs().sum() == 0] == []


@pytest.mark.parametrize("cast", ["bfloat16", "half"])
def test_kernels_stay_in_float32(cast: str) -> None:
    mixer = HyperZZW(HyperZZW.Config(2, (3, 4)))
    before = mixer.whole()
    getattr(mixer, cast)()
    low = mixer.in_proj.weight.dtype
    assert torch.equal(mixer.whole(), before) and before.dtype == torch.float32
    assert mixer(torch.randn(1, 12, 2, dtype=low)).dtype == low


def test_reading_and_decoding_are_refused_with_the_reason() -> None:
    mixer = build()
    for ask in (lambda: mixer.read(torch.randn(1, 1, 2), State()), lambda: mixer.init_state(1)):
        with pytest.raises(UnsupportedError, match="depends on tokens behind it, the whole image.*a causal mixer"):
            ask()
    model = Stack(ModelConfig(20, 8, 16, ({"mixer": "hyperzzw", "shape": [3, 4], "hidden": 3},)))
    assert model(torch.randint(20, (2, 12))).shape == (2, 12, 20)
    with pytest.raises(UnsupportedError, match="^layer 0: expected a causal mixer.*got hyperzzw"):
        generate(model, [[1, 2]])


def test_bad_shapes_say_what_to_do() -> None:
    for fields, match in (
        ({"shape": ()}, "expected one or two sizes"),
        ({"shape": (3, 0)}, "expected one or two sizes"),
        ({"shape": (2, 2, 2)}, "expected one or two sizes"),
        ({"local_sizes": (3, 4)}, "expected odd sizes"),
        ({"layers": 0}, "layers=0: expected at least 1"),
    ):
        with pytest.raises(ConfigError, match=match):
            build(**fields)
    mixer, x_btd = build(), torch.randn(1, 14, 2, dtype=torch.float64)
    with pytest.raises(ConfigError, match=r"at most 12 tokens, shape \(3, 4\), got one of 14"):
        mixer(x_btd)
    with pytest.raises(ConfigError, match="got one of 13"):
        mixer(x_btd, Layout.packed([[1, 13]]))
    assert mixer(x_btd, Layout.packed([[12, 2]])).shape == x_btd.shape
