"""Attention over quantised keys: the chunked form against the loop, and the loop against plain softmax attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from subquad.core.errors import ConfigError
from subquad.ops import vq_attention

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
LEAVES = ("q_bthk", "v_bthv", "book_hsk", "sum_bhsv")


def arguments(
    t: int, *, b: int = 2, h: int = 2, k: int = 3, v: int = 4, s: int = 5, seen: int = 3
) -> dict[str, Tensor]:
    """Rows behind `seen` tokens a code, of which one has none yet."""
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    count_bhs = torch.full((b, h, s), seen)
    count_bhs[..., 1] = 0
    return {
        "q_bthk": 2 * normal(b, t, h, k),
        "code_bth": torch.randint(s, (b, t, h), generator=rng),
        "v_bthv": normal(b, t, h, v),
        "book_hsk": normal(h, s, k),
        "count_bhs": count_bhs,
        "sum_bhsv": normal(b, h, s, v) * count_bhs[..., None],
    }


def columns(values: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    return {name: x[:, start:stop] if "_bt" in name else x for name, x in values.items()}


def empty(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return values | {name: torch.zeros_like(values[name]) for name in ("count_bhs", "sum_bhsv")}


def row_of(values: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    return {name: x if name == "book_hsk" else x[row : row + 1] for name, x in values.items()}


def without_queries(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x for name, x in values.items() if name not in ("q_bthk", "book_hsk")}


def check(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def gradients(function: Callable[..., Any], values: dict[str, Tensor], **options: Any) -> list[Tensor]:
    leaves = {name: values[name].clone().requires_grad_() for name in LEAVES}
    y, _, end = function(**values | leaves, **options)
    factors = (torch.linspace(-1, 1, x[0].numel(), dtype=x.dtype).view(x.shape[1:]) for x in (y, end))
    loss = sum((x * f).sum() for x, f in zip((y, end), factors, strict=True))
    return list(torch.autograd.grad(loss, list(leaves.values())))


@pytest.mark.parametrize("t", [0, 1, 2, 63, 64, 65, 200])
def test_scan_equals_equation(t: int) -> None:
    values = arguments(t)
    want = vq_attention.equation(**values)
    check(vq_attention.scan(**values), want)
    check(vq_attention.final_state(**without_queries(values)), want[1:])
    assert int(want[1].sum()) == int(values["count_bhs"].sum()) + 2 * 2 * t


def test_equation_is_softmax_attention_over_quantised_keys() -> None:
    """Each key replaced by its code, every pair of tokens written out."""
    values = empty(arguments(40))
    quantised_bthk = values["book_hsk"][torch.arange(2), values["code_bth"]]
    score_bhtt = torch.einsum("bthk,bnhk->bhtn", values["q_bthk"], quantised_bthk)
    later_tt = torch.ones(40, 40, dtype=torch.bool).triu(1)
    weight_bhtt = score_bhtt.masked_fill(later_tt, -torch.inf).softmax(-1)
    want = torch.einsum("bhtn,bnhv->bthv", weight_bhtt, values["v_bthv"])
    torch.testing.assert_close(vq_attention.equation(**values)[0], want, **EXACT)


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_equal_the_loops(packed: bool) -> None:
    values = arguments(70)
    where: dict[str, Tensor] = {"valid_bt": torch.arange(70) < torch.tensor([[70], [41]])}
    if packed:
        where["documents_bt"] = torch.tensor([[0] * 5 + [1] * 62 + [2] * 3, [0] * 30 + [3] * 40])
    for got, want in zip(
        gradients(vq_attention.scan, values, **where), gradients(vq_attention.equation, values, **where), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_gradients_are_those_of_finite_differences() -> None:
    values = arguments(6, b=1, h=1, k=2, v=2, s=3)
    rest = {name: x for name, x in values.items() if name not in LEAVES}

    def function(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        y, _, end = vq_attention.scan(**rest, **dict(zip(LEAVES, leaves, strict=True)))
        return y, end

    assert torch.autograd.gradcheck(function, tuple(values[name].requires_grad_() for name in LEAVES))


@pytest.mark.parametrize("function", [vq_attention.scan, vq_attention.equation])
def test_padded_and_packed_rows_equal_rows_alone(function: Callable[..., Any]) -> None:
    lengths, time = [130, 1, 0, 67], 130
    values = arguments(time, b=4)
    valid_bt = torch.arange(time) < torch.tensor(lengths)[:, None]
    loud = values | {"v_bthv": values["v_bthv"].masked_fill(~valid_bt[..., None, None], torch.nan)}
    y, count, total = function(**loud, valid_bt=valid_bt)
    assert y.isfinite().all()
    for row, n in enumerate(lengths):
        alone = function(**columns(row_of(values, row), 0, n))
        check((y[row : row + 1, :n], count[row : row + 1], total[row : row + 1]), alone)

    documents_bt = torch.tensor([0] * 3 + [1] * 70 + [2] * 57).expand(4, -1)
    y, count, total = function(**loud, valid_bt=valid_bt, documents_bt=documents_bt)
    ends = vq_attention.final_state(**without_queries(loud), valid_bt=valid_bt, documents_bt=documents_bt)
    check(ends, (count, total))
    for row, n in enumerate(lengths):
        one = row_of(values, row)
        for start, stop in ((0, min(n, 3)), (3, min(n, 73)), (73, n)):
            if start < stop or start == 0:
                alone = function(**columns(one if start == 0 else empty(one), start, stop))
                torch.testing.assert_close(y[row : row + 1, start:stop], alone[0], **EXACT)
        check((count[row : row + 1], total[row : row + 1]), alone[1:])


def test_a_row_without_a_token_and_an_empty_state_is_finite() -> None:
    values = {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in empty(arguments(3)).items()}
    for function in (vq_attention.scan, vq_attention.equation):
        y, count, _ = function(**values, valid_bt=torch.zeros(2, 3, dtype=torch.bool))
        assert y.isfinite().all() and count.sum() == 0
        (gradient,) = torch.autograd.grad(y.sum(), values["q_bthk"])
        assert gradient.isfinite().all()


def test_codes_that_no_token_has_do_not_drown_the_others() -> None:
    """Scores thousands apart: in float32 the weights of what is there must not all be 0."""
    values = empty(arguments(70))
    values["book_hsk"][:, 0] *= 1e4
    values["q_bthk"] *= 100
    values["code_bth"].clamp_(min=1)
    want = vq_attention.equation(**values)
    narrow = {name: x.float() if x.is_floating_point() else x for name, x in values.items()}
    naive, got = vq_attention.equation(**narrow), vq_attention.scan(**narrow)
    assert got[0].isfinite().all()
    # Scores of some hundreds leave float32 weights an error of some 1e-5; which sums they enter is no more than that.
    rough = (naive[0] - want[0]).norm() / want[0].norm()
    assert (got[0] - want[0]).norm() / want[0].norm() <= 2 * rough + 1e-7


def test_assign_finds_the_nearest_code() -> None:
    k_bthk, book_hsk = torch.randn(2, 30, 3, 4), torch.randn(3, 7, 4)
    want = torch.stack([torch.cdist(k_bthk[:, :, h], book_hsk[h]).argmin(-1) for h in range(3)], dim=2)
    assert torch.equal(vq_attention.assign(k_bthk, book_hsk), want)
    assert torch.equal(vq_attention.assign(book_hsk.transpose(0, 1)[None], book_hsk)[0].T, torch.arange(7).expand(3, 7))


def test_bad_arguments_say_what_to_do() -> None:
    values = arguments(4)
    for change, match in (
        ({"code_bth": values["code_bth"].int()}, "expected int64, got torch.int32"),
        ({"count_bhs": values["count_bhs"].double()}, "counts start as torch.zeros"),
        ({"sum_bhsv": values["sum_bhsv"][..., 1:]}, "use the state of these heads and values"),
        ({"book_hsk": values["book_hsk"][:, 1:]}, "a book of as many codes as the state's"),
    ):
        with pytest.raises(ConfigError, match=match):
            vq_attention.scan(**values | change)
