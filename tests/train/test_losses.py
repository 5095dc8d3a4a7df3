"""The chunked losses against their definitions, gradients included."""

import pytest
import torch
import torch.nn.functional as F

from subquad.core import layout as layouts
from subquad.ops.linear_loss import on_torch
from subquad.train import losses

Layout = layouts.Layout


def rand(*shape, seed=0, grad=False):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


LAYOUTS = {
    "dense": Layout.dense(2, 7),
    "ragged": Layout.ragged(torch.tensor([7, 3]), 7),
    "packed": Layout.packed([[3, 4], [2, 1, 2]]),
}
# Columns that have a label, written out by hand.
SCORED = {
    "dense": [[1, 1, 1, 1, 1, 1, 0]] * 2,
    "ragged": [[1, 1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0, 0]],
    "packed": [[1, 1, 0, 1, 1, 1, 0], [1, 0, 0, 1, 0, 0, 0]],
}


@pytest.fixture(params=[1, 4, 10_000], ids=lambda c: f"chunk{c}", autouse=True)
def chunk(request, monkeypatch):
    monkeypatch.setattr(on_torch, "LOGITS_AT_ONCE", request.param * 11)


@pytest.mark.parametrize("name", LAYOUTS)
def test_scored(name):
    assert losses.scored_bt(LAYOUTS[name]).int().tolist() == SCORED[name]


def test_only_wanted_tokens_are_labels():
    wanted = torch.tensor([[0, 0, 1, 1, 0, 1, 1], [1, 1, 0, 1, 0, 1, 1]]).bool()
    # The column before a wanted token, unless that token starts a document or is padding.
    want = [[0, 1, 0, 0, 1, 1, 0], [1, 0, 0, 0, 0, 0, 0]]
    assert losses.scored_bt(LAYOUTS["packed"], wanted).int().tolist() == want


@pytest.mark.parametrize(("temperature", "reverse"), [(2.0, 0.0), (1.0, 1.0), (0.5, 0.25)])
def test_mixed_kl_of_what_is_wanted(temperature, reverse):
    layout = LAYOUTS["ragged"]
    wanted = torch.tensor([[1, 0, 1, 1, 0, 1, 1], [1, 1, 0, 1, 1, 1, 1]]).bool()
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 0], [1, 0, 0, 0, 0, 0, 0]])
    h, w = rand(2, 7, 5, seed=1, grad=True), rand(11, 5, seed=2, grad=True)
    th, tw = rand(2, 7, 6, seed=3), rand(11, 6, seed=4)
    got = losses.token_kl(h, w, th, tw, layout, wanted, temperature=temperature, reverse=reverse)
    p, q = (th @ tw.T / temperature).softmax(-1), (h @ w.T / temperature).softmax(-1)
    both = (1 - reverse) * (p * (p / q).log()).sum(-1) + reverse * (q * (q / p).log()).sum(-1)
    want = temperature**2 * (both * mask).sum() / 5
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    for a, b in zip(torch.autograd.grad(3 * got, (h, w)), torch.autograd.grad(3 * want, (h, w)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_a_batch_without_a_wanted_label_teaches_nothing():
    h, w = rand(2, 7, 5, seed=1, grad=True), rand(11, 5, seed=2, grad=True)
    layout, none, tokens = LAYOUTS["dense"], torch.zeros(2, 7, dtype=torch.bool), torch.zeros(2, 7, dtype=torch.long)
    total = losses.token_kl(h, w, h, w, layout, none) + losses.token_cross_entropy(h, w, tokens, layout, none)
    total.backward()
    assert total == h.grad.abs().max() == w.grad.abs().max() == 0


@pytest.mark.parametrize("name", LAYOUTS)
def test_token_kl(name):
    layout, mask = LAYOUTS[name], torch.tensor(SCORED[name], dtype=torch.float64)
    h, w = rand(2, 7, 5, seed=1, grad=True), rand(11, 5, seed=2, grad=True)
    th, tw = rand(2, 7, 6, seed=3), rand(11, 6, seed=4)
    got = losses.token_kl(h, w, th, tw, layout)
    p, q = (th @ tw.T).softmax(-1), (h @ w.T).softmax(-1)
    want = ((p * (p / q).log()).sum(-1) * mask).sum() / mask.sum()
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    for a, b in zip(torch.autograd.grad(3 * got, (h, w)), torch.autograd.grad(3 * want, (h, w)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", LAYOUTS)
def test_token_cross_entropy(name):
    layout = LAYOUTS[name]
    wanted = torch.rand(2, 7, generator=torch.Generator().manual_seed(6)) < 0.7
    mask = torch.tensor(SCORED[name]).bool() & wanted.roll(-1, dims=1)
    tokens = torch.randint(11, (2, 7), generator=torch.Generator().manual_seed(5))
    h, w = rand(2, 7, 5, seed=1, grad=True), rand(11, 5, seed=2, grad=True)
    got = losses.token_cross_entropy(h, w, tokens, layout, wanted)
    rows = [(b, t) for b in range(2) for t in range(7) if mask[b, t]]
    want = F.cross_entropy(
        torch.stack([h[b, t] @ w.T for b, t in rows]), torch.tensor([tokens[b, t + 1] for b, t in rows])
    )
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    for a, b in zip(torch.autograd.grad(got, (h, w)), torch.autograd.grad(want, (h, w)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_frozen_head_gets_no_gradient():
    h, w = rand(1, 3, 5, grad=True), rand(11, 5, seed=2)
    loss = losses.token_kl(h, w, rand(1, 3, 5, seed=3), w, Layout.dense(1, 3))
    loss.backward()
    assert h.grad is not None
    assert w.grad is None
    assert not losses.token_kl(h.detach(), w, h.detach(), w, Layout.dense(1, 3)).requires_grad


def test_kl_of_the_teacher_to_itself_is_nothing():
    h, w = rand(1, 9, 5), rand(11, 5, seed=2)
    assert losses.token_kl(h, w, h, w, Layout.dense(1, 9)).abs() < 1e-15


def test_relative_error_ignores_padding():
    y, target = rand(2, 4, 3, seed=1), rand(2, 4, 3, seed=2)
    layout = Layout.ragged(torch.tensor([4, 2]), 4)
    got = losses.relative_error(y, target, layout)
    keep = torch.cat((y[0], y[1, :2])), torch.cat((target[0], target[1, :2]))
    torch.testing.assert_close(got, (keep[0] - keep[1]).norm() ** 2 / keep[1].norm() ** 2, rtol=1e-12, atol=0)
    assert losses.relative_error(torch.zeros_like(y), target, layout) == 1
