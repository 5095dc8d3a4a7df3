"""The long convolution: transforms in PyTorch against the sum over earlier tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.core.errors import ConfigError
from subquad.ops import flashconv

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
NAMES = ("u_btd", "k_gl", "bias_d", "gate_in_btd", "gate_out_btd")


def arguments(t: int, length: int | None = None, *, b: int = 2, d: int = 4, g: int = 2) -> dict[str, Tensor]:
    shapes = ((b, t, d), (g, length or max(t, 1)), (d,), (b, t, d), (b, t, d))
    rng = torch.Generator().manual_seed(0)
    made = (torch.randn(shape, generator=rng, dtype=torch.float64) for shape in shapes)
    return dict(zip(NAMES, made, strict=True))


def gradients(function: Any, values: dict[str, Tensor], **options: Any) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in values.values()]
    y = function(**dict(zip(values, leaves, strict=True)), **options)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return list(torch.autograd.grad((y * weight).sum(), leaves))


def packed(b: int, t: int) -> Tensor:
    """Documents of many lengths, borders at and beside powers of two, and a row of one that isn't the first."""
    documents_bt = torch.zeros(b, t, dtype=torch.int64)
    for start in (1, 2, 7, 32, 63, 66, 128, 500):
        documents_bt[0, start:] += 1
    documents_bt[1:] = 3
    return documents_bt


@pytest.mark.parametrize("g", [1, 2, 4])
@pytest.mark.parametrize(("t", "length"), [(1, 1), (1, 5), (2, 2), (63, 63), (65, 65), (65, 7), (1000, 1000)])
def test_parallel_equals_the_sum(t: int, length: int, g: int) -> None:
    values = arguments(t, length, g=g)
    torch.testing.assert_close(flashconv.parallel(**values), flashconv.equation(**values), **EXACT)
    plain = {name: values[name] for name in NAMES[:2]}
    torch.testing.assert_close(flashconv.parallel(**plain), flashconv.equation(**plain), **EXACT)


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize(("t", "length", "behind"), [(1, 1, 3), (65, 65, 7), (65, 7, 100)])
def test_both_ways_equal_the_sums(t: int, length: int, behind: int, packs: bool) -> None:
    values = arguments(t, length) | {"behind_gl": arguments(t, behind)["k_gl"]}
    documents_bt = packed(2, t) if packs else None
    got = gradients(flashconv.parallel, values, documents_bt=documents_bt)
    want = gradients(flashconv.equation, values, documents_bt=documents_bt)
    for name, a, b in zip(values, got, want, strict=True):
        torch.testing.assert_close(a, b, **EXACT, msg=lambda m, name=name: f"{name}: {m}")


def test_backwards_is_forwards_of_the_row_turned_round() -> None:
    """An oracle that knows no sums."""
    values = arguments(40)
    nothing_gl = torch.zeros_like(values["k_gl"])
    got = flashconv.parallel(values["u_btd"], nothing_gl, behind_gl=values["k_gl"])
    want = flashconv.parallel(values["u_btd"].flip(1), values["k_gl"]).flip(1)
    torch.testing.assert_close(got, want, **EXACT)


def test_it_is_pytorchs_convolution() -> None:
    """An oracle of its own."""
    values = arguments(50, 20, d=4, g=2)
    u_bdt = F.pad((values["u_btd"] * values["gate_in_btd"]).mT, (19, 0))
    want = F.conv1d(u_bdt, values["k_gl"].flip(1).repeat_interleave(2, 0)[:, None], groups=4).mT
    want = (want + values["bias_d"] * values["u_btd"] * values["gate_in_btd"]) * values["gate_out_btd"]
    torch.testing.assert_close(flashconv.equation(**values), want, **EXACT)


@pytest.mark.parametrize(("t", "length"), [(1, 1), (65, 65), (130, 130), (130, 40), (300, 300)])
def test_documents_equal_separate_sequences(t: int, length: int) -> None:
    values, documents_bt = arguments(t, length), packed(2, t)
    want = flashconv.equation(**values, documents_bt=documents_bt)
    torch.testing.assert_close(flashconv.parallel(**values, documents_bt=documents_bt), want, **EXACT)
    for row in range(2):
        for document in documents_bt[row].unique():
            own_t = documents_bt[row] == document
            alone = {n: x[row : row + 1, own_t] if n.endswith("btd") else x for n, x in values.items()}
            torch.testing.assert_close(want[row : row + 1, own_t], flashconv.parallel(**alone), **EXACT)


def test_a_document_is_blind_to_the_others() -> None:
    """Not even NaN gets from one document into another."""
    values, documents_bt = arguments(130), packed(2, 130)
    clean = flashconv.parallel(**values, documents_bt=documents_bt)
    spoiled_t = documents_bt[0] == 3
    values["u_btd"][0, spoiled_t] = torch.nan
    got = flashconv.parallel(**values, documents_bt=documents_bt)
    assert got[0, spoiled_t].isnan().all()
    assert torch.equal(got[0, ~spoiled_t], clean[0, ~spoiled_t]) and torch.equal(got[1], clean[1])


@pytest.mark.parametrize("t", [1, 65, 130])
def test_gradients_equal_the_sums(t: int) -> None:
    values = arguments(t, min(t, 100))
    for documents_bt in (None, packed(2, t)):
        got = gradients(flashconv.parallel, values, documents_bt=documents_bt)
        want = gradients(flashconv.equation, values, documents_bt=documents_bt)
        for name, a, b in zip(NAMES, got, want, strict=True):
            torch.testing.assert_close(a, b, **EXACT, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("length", [1, 5, 31, 100])
def test_blocks_with_their_past_equal_one_shot(length: int) -> None:
    """Row by row as many tokens before the block as may be; what stands behind them is not read."""
    t, seen_b = 40, torch.tensor([60, 0, 13])
    values = arguments(60 + t, length, b=3)
    u = values["u_btd"] * values["gate_in_btd"]
    history_bsd = u[:, :60].masked_fill(torch.arange(60)[:, None] >= seen_b[:, None, None], 1e6)
    for block in (1, 33, 40):
        got = flashconv.past(history_bsd, seen_b, values["k_gl"], block)
        for row, seen in enumerate(seen_b.tolist()):
            u_1td = torch.cat((u[row : row + 1, :seen], torch.zeros(1, block, 4, dtype=u.dtype)), 1)
            want = flashconv.equation(u_1td, values["k_gl"])[:, seen:]
            torch.testing.assert_close(got[row : row + 1], want, **EXACT)


def test_gradients_through_the_past() -> None:
    values, seen_b = arguments(50, 70), torch.tensor([50, 20])
    for block in (3, 40):
        leaves = [values[name].clone().requires_grad_() for name in ("u_btd", "k_gl")]
        assert torch.autograd.gradcheck(
            lambda u, k, block=block: flashconv.past(u, seen_b, k, block).sum(1), leaves, fast_mode=True
        )


def test_half_precision_is_summed_in_float32() -> None:
    """Only the rounding of the result is lost, however long the filter."""
    values = arguments(1000)
    for dtype in (torch.bfloat16, torch.float16):
        low = {name: x.to(dtype) for name, x in values.items()}
        wide: dict[str, Any] = {name: x.double() for name, x in low.items()}
        exact = flashconv.equation(**wide)
        with torch.autocast("cpu", dtype=dtype):
            got = flashconv.parallel(**low)
        assert got.dtype == dtype
        rounding = (exact.to(dtype).double() - exact).norm()
        assert (got.double() - exact).norm() <= 1.1 * rounding


def test_nothing_to_do() -> None:
    assert flashconv.parallel(**arguments(0, 3)).shape == (2, 0, 4)
    assert flashconv.parallel(**arguments(3, b=0)).shape == (0, 3, 4)
    empty_bsd, seen_b = torch.zeros(2, 0, 4), torch.zeros(2, dtype=torch.int64)
    assert torch.equal(flashconv.past(empty_bsd, seen_b, torch.ones(1, 3), 5), torch.zeros(2, 5, 4))


def test_bad_input_is_refused() -> None:
    values = arguments(5)
    with pytest.raises(ConfigError, match="at least one tap"):
        flashconv.parallel(**values | {"k_gl": values["k_gl"][:, :0]})
    with pytest.raises(ConfigError, match="divides 4 channels, got 3"):
        flashconv.parallel(**values | {"k_gl": torch.ones(3, 5)})
    with pytest.raises(ConfigError, match="behind_gl: expected a number of filters that divides 4 channels, got 3"):
        flashconv.parallel(**values, behind_gl=torch.ones(3, 5))
    with pytest.raises(ConfigError, match="behind_gl: expected 2 filters as in k_gl, got 1"):
        flashconv.parallel(**values, behind_gl=torch.ones(1, 5))
    with pytest.raises(ConfigError, match=r"gate_in_btd: expected shape \(2, 5, 4\)"):
        flashconv.parallel(**values | {"gate_in_btd": values["gate_in_btd"][:, :4]})
    with pytest.raises(ConfigError, match=r"bias_d: expected shape \(4,\)"):
        flashconv.parallel(**values | {"bias_d": torch.ones(2)})
