"""Every form of attention equals the equation, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from subquad.core.layout import Layout
from subquad.ops import attention, window

EXACT = {"rtol": 1e-11, "atol": 1e-11}


def qkv(t: int, h: int = 6, g: int = 2, k: int = 8, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return tuple(torch.randn(2, t, n, k, dtype=torch.float64) for n in (h, g, g))  # pyright: ignore[reportReturnType]


def test_equation_is_attention_by_hand() -> None:
    q = torch.tensor([[[[1.0]], [[2.0]]]])
    k, v = torch.tensor([[[[0.0]], [[1.0]]]]), torch.tensor([[[[10.0]], [[20.0]]]])
    y = attention.equation(q, k, v, torch.tensor([[[True, False], [True, True]]]), scale=0.5)
    share = torch.tensor(1.0).exp() / (1 + torch.tensor(1.0).exp())
    torch.testing.assert_close(y.flatten(), torch.stack([torch.tensor(10.0), 10 + 10 * share]))


def test_heads_expand_not_rows() -> None:
    x = torch.arange(12.0).view(1, 1, 3, 4)
    expanded = attention.expand_heads(x, 6)[0, 0]
    assert [int(row[0]) for row in expanded] == [0, 0, 4, 4, 8, 8]
    rows = x.flatten(2).unflatten(-1, (12, 1)).repeat_interleave(2, 2).reshape(6, 4)
    assert F.cosine_similarity(expanded.flatten(), rows.flatten(), dim=0) < 0.99


def test_causal_masked_and_pieces_equal_the_equation() -> None:
    q, k, v = qkv(13)
    allowed = torch.ones(13, 13, dtype=torch.bool).tril().expand(2, -1, -1)
    want = attention.equation(q, k, v, allowed, 0.3)
    torch.testing.assert_close(attention.causal(q, k, v, 0.3), want, **EXACT)
    heads_k, heads_v = k.transpose(1, 2), v.transpose(1, 2)
    torch.testing.assert_close(attention.masked(q, heads_k, heads_v, allowed, 0.3), want, **EXACT)
    parts = [(heads_k[:, :, a:b], heads_v[:, :, a:b], allowed[..., a:b]) for a, b in ((0, 4), (4, 13))]
    got, lse = attention.pieces(q, parts, 0.3)
    torch.testing.assert_close(got, want, **EXACT)
    scores = 0.3 * torch.einsum("bthk,bnhk->bthn", q, attention.expand_heads(k, 6))
    masked_scores = scores.masked_fill(~allowed[:, :, None], -torch.inf)
    torch.testing.assert_close(lse, masked_scores.logsumexp(-1), **EXACT)


@pytest.mark.parametrize("t", [1, 5])
def test_masked_groups_see_their_own_mask_and_keys(t: int) -> None:
    """Against a cache longer than the block, each row and query with a mask of its own; gradients too."""
    q, _, _ = qkv(t)
    _, k, v = qkv(21, seed=1)
    allowed = torch.rand(2, t, 21) < 0.5
    allowed[..., 3] = True
    leaves = [x.requires_grad_() for x in (q, k, v)]
    weight = torch.randn(2, t, 6, 8, dtype=torch.float64)
    want = attention.equation(q, k, v, allowed, 0.3)
    got = attention.masked(q, k.transpose(1, 2), v.transpose(1, 2), allowed, 0.3)
    torch.testing.assert_close(got, want, **EXACT)
    pairs = zip(*(torch.autograd.grad((y * weight).sum(), leaves) for y in (got, want)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("documents", [[1], [5], [6], [7], [40], [4, 1, 9, 26]])
@pytest.mark.parametrize("sinks", [0, 3])
def test_band_equals_the_equation(sinks: int, documents: list[int]) -> None:
    width, t = 6, sum(documents)
    q, k, v = qkv(t)
    layout = Layout.packed([documents, documents]) if len(documents) > 1 else Layout.dense(2, t)
    index = layout.index_bt(torch.zeros(2, dtype=torch.int64))
    distance = torch.arange(t)[:, None] - torch.arange(t)
    allowed = (distance >= 0) & ((distance < width) | (index[:, None] < sinks))
    if layout.documents_bt is not None:
        allowed &= layout.documents_bt[:, :, None] == layout.documents_bt[:, None]
    want = attention.equation(q, k, v, allowed.expand(2, -1, -1), 0.3)
    empty = window.WindowState.empty(2, 2, width, sinks, 8, dtype=torch.float64, device="cpu")
    loud = empty.map(lambda x, _: x + 1e3 if x.is_floating_point() else x)  # an empty slot that is read is heard
    band = window.band(q, k.transpose(1, 2), v.transpose(1, 2), loud, layout)
    got = band.join(attention.masked(band.q_xchk, band.k_xgnk, band.v_xgnk, band.allowed_xcn, 0.3))
    torch.testing.assert_close(got, want, **EXACT)
    assert band.k_xgnk.shape[2] <= sinks + 2 * width or len(documents) > 1
