"""The short convolution against its loop, and against PyTorch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops import short_conv

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def inputs(t: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d = 3
    return (
        torch.randn(2, t, d, dtype=torch.float64),
        torch.randn(d, width, dtype=torch.float64),
        torch.randn(d, dtype=torch.float64),
        torch.randn(2, d, width - 1, dtype=torch.float64),
    )


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("t", [1, 2, 3, 65])
def test_parallel_equals_equation_and_conv1d(t: int, width: int) -> None:
    x, weight, bias, state = inputs(t, width)
    y, end = short_conv.equation(x, weight, bias, state)
    torch.testing.assert_close(short_conv.parallel(x, weight, bias, state), y, **EXACT)
    torch.testing.assert_close(short_conv.final_state(x, state), end, **EXACT)
    conv1d = F.conv1d(torch.cat((state, x.mT), 2), weight[:, None], bias, groups=3).mT
    torch.testing.assert_close(y, conv1d, **EXACT)
    torch.testing.assert_close(short_conv.parallel(x, weight, None, state), y - bias, **EXACT)


@pytest.mark.parametrize("width", [1, 4])
def test_every_prefix_of_packed_documents(width: int) -> None:
    t = 9
    x, weight, bias, state = inputs(t, width)
    documents_bt = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 2, 2], [1, 1, 1, 1, 4, 5, 5, 5, 5]])
    y, _ = short_conv.equation(x, weight, bias, state, documents_bt=documents_bt)
    torch.testing.assert_close(short_conv.parallel(x, weight, bias, state, documents_bt=documents_bt), y, **EXACT)
    for documents in (None, documents_bt):
        for n in range(t + 1):
            valid_bt = torch.arange(t) < torch.tensor([[n], [t - n]])
            _, want = short_conv.equation(x, weight, bias, state, valid_bt=valid_bt, documents_bt=documents)
            got = short_conv.final_state(x, state, valid_bt=valid_bt, documents_bt=documents)
            torch.testing.assert_close(got, want, **EXACT)


def test_documents_equal_documents_alone() -> None:
    x, weight, bias, state = inputs(12, 4)
    documents_bt = torch.tensor([0, 0, 1, 2, 2, 2, 2, 2, 2, 3, 3, 3]).expand(2, -1)
    y = short_conv.parallel(x, weight, bias, state, documents_bt=documents_bt)
    for document, (start, stop) in enumerate([(0, 2), (2, 3), (3, 9), (9, 12)]):
        begin = state if document == 0 else torch.zeros_like(state)
        alone = short_conv.parallel(x[:, start:stop], weight, bias, begin)
        torch.testing.assert_close(y[:, start:stop], alone, **EXACT)


def test_splits_and_gradients() -> None:
    x, weight, bias, state = inputs(20, 4)
    leaves = [z.requires_grad_() for z in (x, weight, bias, state)]
    whole = short_conv.parallel(x, weight, bias, state)
    pieces, carried, start = [], state, 0
    for n in (1, 2, 7, 10):
        pieces.append(short_conv.parallel(x[:, start : start + n], weight, bias, carried))
        carried, start = short_conv.final_state(x[:, start : start + n], carried), start + n
    joined = torch.cat(pieces, 1)
    torch.testing.assert_close(joined, whole, **EXACT)
    loop = short_conv.equation(x, weight, bias, state)[0]
    probe = torch.randn_like(whole)
    want = torch.autograd.grad((loop * probe).sum(), leaves)
    for y in (whole, joined):
        for got, exact in zip(torch.autograd.grad((y * probe).sum(), leaves), want, strict=True):
            torch.testing.assert_close(got, exact, **EXACT)


def test_padding_is_not_read() -> None:
    x, weight, bias, state = inputs(6, 4)
    valid_bt = torch.arange(6) < torch.tensor([[4], [0]])
    spoiled = x.masked_fill(~valid_bt[..., None], torch.nan)
    end = short_conv.final_state(spoiled, state, valid_bt=valid_bt)
    torch.testing.assert_close(end[:1], short_conv.final_state(x[:1, :4], state[:1]), **EXACT)
    assert torch.equal(end[1], state[1])
    assert torch.equal(
        short_conv.parallel(spoiled, weight, bias, state)[0, :4], short_conv.parallel(x, weight, bias, state)[0, :4]
    )
