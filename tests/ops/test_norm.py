"""Norms against PyTorch's and transformers'."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from subquad.ops import backends, norm
from subquad.ops.decay import Decay

EXACT = {"rtol": 1e-12, "atol": 1e-12}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(not (torch.cuda.is_available() or backends.interpreted()), reason="needs Triton")


def test_rms_of_one_group_is_pytorchs() -> None:
    x, weight = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    torch.testing.assert_close(norm.rms(x, weight, 1e-5), F.rms_norm(x, (8,), weight, 1e-5), **EXACT)
    parts = torch.cat(
        [F.rms_norm(part, (4,), w, 1e-5) for part, w in zip(x.split(4, -1), weight.split(4), strict=True)], -1
    )
    torch.testing.assert_close(norm.rms(x, weight, 1e-5, groups=2), parts, **EXACT)


def test_order_of_gate_and_norm() -> None:
    x, gate = torch.randn(2, 2, 3, 8, dtype=torch.float64)
    weight = torch.randn(8, dtype=torch.float64)
    first = norm.gated_rms(x, gate, weight, 1e-5, 2, gate_first=True)
    after = norm.gated_rms(x, gate, weight, 1e-5, 2, gate_first=False)
    torch.testing.assert_close(first, norm.rms(x * F.silu(gate), weight, 1e-5, 2), **EXACT)
    torch.testing.assert_close(after, norm.rms(x, weight, 1e-5, 2) * F.silu(gate), **EXACT)
    # A gate that is the same for a whole group survives only behind the norm.
    same = norm.gated_rms(x, torch.full_like(gate, 3.0), weight, 0.0, 2, gate_first=True)
    torch.testing.assert_close(same, norm.rms(x, weight, 0.0, 2), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_norms_equal_transformers(dtype: torch.dtype) -> None:
    bamba = pytest.importorskip("transformers.models.bamba.modeling_bamba")
    qwen = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    x, gate = torch.randn(2, 2, 3, 8).to(dtype)
    weight = torch.randn(8).to(dtype)
    if "group_size" not in inspect.signature(bamba.BambaRMSNormGated).parameters:
        pytest.skip("transformers before 5.23 norms all groups together")
    theirs = bamba.BambaRMSNormGated(8, group_size=4, eps=1e-5).to(dtype)
    theirs.weight.data.copy_(weight)
    got = norm.gated_rms(x, gate, weight, 1e-5, 2, gate_first=True)
    # The product with the weight may be rounded once more.
    torch.testing.assert_close(got, theirs(x, gate), rtol=torch.finfo(dtype).eps, atol=1e-6)
    theirs = qwen.Qwen3NextRMSNormGated(8, eps=1e-5).to(dtype)
    theirs.weight.data.copy_(weight)
    got = norm.gated_rms(x, gate, weight, 1e-5, gate_first=False)
    torch.testing.assert_close(got, theirs(x, gate), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_l2_leaves_zero_alone() -> None:
    x = torch.randn(5, 8, dtype=torch.float64)
    torch.testing.assert_close(norm.l2(x, 0.0), F.normalize(x, dim=-1), **EXACT)
    zero = torch.zeros(1, 8, requires_grad=True)
    norm.l2(zero, 1e-6).sum().backward()
    assert zero.grad is not None
    assert zero.grad.isfinite().all()
    assert norm.l2(zero, 1e-6).abs().max() == 0


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gate_first", [False, True])
@pytest.mark.parametrize(("groups", "width"), [(1, 40), (3, 20), (4, 128)])
def test_the_gated_norm_in_one_launch_is_its_formula(
    groups: int, width: int, gate_first: bool, dtype: torch.dtype
) -> None:
    d = groups * width
    x = torch.randn(2, 3, d, dtype=dtype, device=DEVICE)
    # As a projection of several layers gives it: with a stride from token to token.
    gate = torch.randn(2, 3, d + 7, dtype=dtype, device=DEVICE)[..., :d]
    weight = torch.rand(d, dtype=dtype, device=DEVICE)
    with torch.no_grad(), backends.use("triton"):
        y = norm.gated_rms(x, gate, weight, 1e-5, groups, gate_first=gate_first)
    want = norm.gated_rms(x.double(), gate.double(), weight.double(), 1e-5, groups, gate_first=gate_first)
    assert float((y.double() - want).norm() / want.norm()) < {torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [24, 576])
def test_a_sum_and_its_norm_in_one_launch_are_both(d: int, dtype: torch.dtype) -> None:
    x, y = (torch.randn(2, 3, d, dtype=dtype, device=DEVICE) for _ in range(2))
    layer = nn.RMSNorm(d, eps=1e-5).to(DEVICE, dtype)
    nn.init.uniform_(layer.weight, 0.5, 1.5)
    with torch.no_grad(), backends.use("triton"):
        total, out = norm.add_rms(x, y, layer)
        same, alone = norm.add_rms(total, None, layer)
    # The interpreter cuts where a GPU rounds.
    torch.testing.assert_close(total, x + y, rtol={torch.float32: 0, torch.bfloat16: 8e-3}[dtype], atol=0)
    assert torch.equal(same, total)
    assert torch.equal(alone, out)
    want = layer.double()(total.double())
    assert float((out.double() - want).norm() / want.norm()) < {torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]


@needs_triton
def test_the_decay_in_one_launch_keeps_the_digits_of_small_steps() -> None:
    layer = Decay(5).to(DEVICE)
    raw_bth = torch.linspace(-40, 40, 2 * 9 * 7, device=DEVICE).view(2, 9, 7)[..., :5]
    with torch.no_grad():
        layer.dt_bias.zero_()
        with backends.use("triton"):
            got = layer(raw_bth)
        want = layer.double()(raw_bth.double())
    for x, y in zip(got, want, strict=True):
        # Exponentials on a GPU are right to a few units of the last place of their argument.
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=0)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_norms_and_an_embedding_in_one_launch_are_what_they_are_apart(dtype: torch.dtype) -> None:
    x_btd, ids_bt = torch.randn(2, 3, 40).to(DEVICE, dtype), torch.tensor([[6, 0, 3], [1, 1, 5]], device=DEVICE)
    embed = nn.Embedding(7, 40, dtype=dtype, device=DEVICE)
    first, second = (nn.RMSNorm(40, eps=eps, dtype=dtype, device=DEVICE) for eps in (1e-5, 0.1))
    for one in (first, second):
        nn.init.normal_(one.weight)
    with torch.no_grad(), backends.use("triton"):
        joined_btd = norm.join_rms(x_btd, ids_bt, embed, first, second)
    assert joined_btd is not None
    apart_btd = torch.cat((first(x_btd), second(embed(ids_bt))), dim=-1)
    # Mean, root, and two products are rounded, in another order.
    torch.testing.assert_close(joined_btd, apart_btd, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
    # What no kernel knows is left to who asks, and so is what needs gradients.
    assert norm.join_rms(x_btd, ids_bt, embed, first, second) is None
    with torch.no_grad(), backends.use("triton"):
        assert norm.join_rms(x_btd.double(), ids_bt, embed, first, second) is None
