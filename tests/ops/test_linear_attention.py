"""The chunked form of linear attention equals its equation, documents and delayed keys included."""

from __future__ import annotations

import pytest
import torch

from subquad.ops import linear_attention as op


@pytest.mark.parametrize("t", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("packed", [False, True])
def test_chunked_equals_the_equation_with_gradients(t: int, packed: bool) -> None:
    torch.manual_seed(t)
    tensors = [
        torch.randn(2, *shape, dtype=torch.float64).requires_grad_()
        for shape in ((t, 6, 5), (t, 2, 5), (t, 2, 4), (2, 5, 4))
    ]
    documents = {}
    if packed:
        starts = (torch.rand(2, t) < 0.05).cumsum(1)
        # Keys run three tokens behind the queries, as those of a window's tail do.
        late = torch.cat((torch.zeros(2, 3, dtype=torch.int64), starts), 1)[:, :t]
        documents = {"q_documents_bt": starts, "k_documents_bt": late}
    want, state = op.equation(*tensors, **documents)
    got = op.chunked(*tensors, **documents)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    weight = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad((got * weight).sum(), tensors),
        torch.autograd.grad((want * weight).sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    last = documents["k_documents_bt"][:, -1:] if packed else torch.zeros(2, 1)
    kept = documents["k_documents_bt"] == last if packed else torch.ones(2, t, dtype=torch.bool)
    _, k, v, first = tensors
    torch.testing.assert_close(op.absorb(k, v, first, kept, last[:, 0] == 0), state, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("t", [1, 65, 130])
def test_scan_equals_the_equation_with_gradients(t: int) -> None:
    torch.manual_seed(t)
    shapes = ((t, 6, 5), (t, 2, 5), (t, 2, 4), (2, 5, 4))
    tensors = [torch.randn(2, *shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    want, got = op.equation(*tensors), op.scan(*tensors)
    weights = [torch.randn_like(x) for x in want]
    grads = [
        torch.autograd.grad(sum((x * w).sum() for x, w in zip(pair, weights, strict=True)), tensors)
        for pair in (want, got)
    ]
    for a, b in zip((*got, *grads[1]), (*want, *grads[0]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_scan_of_packed_and_padded_rows_is_that_of_each_alone() -> None:
    torch.manual_seed(0)
    q, k, v, state = (torch.randn(1, *n, dtype=torch.float64) for n in ((20, 4, 5), (20, 2, 5), (20, 2, 4), (2, 5, 4)))
    documents, valid = (torch.arange(20) >= 8).long()[None], (torch.arange(20) < 17)[None]
    y, end = op.scan(q, k, v, state, documents_bt=documents, valid_bt=valid)
    first, _ = op.equation(q[:, :8], k[:, :8], v[:, :8], state)
    second, last = op.equation(q[:, 8:17], k[:, 8:17], v[:, 8:17], torch.zeros_like(state))
    torch.testing.assert_close(y[:, :17], torch.cat((first, second), 1), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(end, last, rtol=1e-11, atol=1e-11)


def test_float32_stays_within_twice_the_equations_error() -> None:
    torch.manual_seed(0)
    q, k, v, s = (
        torch.randn(1, *n, dtype=torch.float64) for n in ((1000, 4, 16), (1000, 2, 16), (1000, 2, 16), (2, 16, 16))
    )
    want, _ = op.equation(q, k, v, s)
    naive, _ = op.equation(q.float(), k.float(), v.float(), s.float())
    got = op.chunked(q.float(), k.float(), v.float(), s.float())
    assert (got - want).norm() <= 2 * (naive - want).norm()


def test_autocast_leaves_sums_and_state_precise() -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(1, *n) for n in ((200, 4, 8), (200, 2, 8), (200, 2, 8), (2, 8, 8))]
    kept, continues = torch.ones(1, 200, dtype=torch.bool), torch.ones(1, dtype=torch.bool)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = op.chunked(*tensors), op.absorb(*tensors[1:], kept, continues)
    assert torch.equal(y, op.chunked(*tensors))
    assert torch.equal(state, op.absorb(*tensors[1:], kept, continues))
