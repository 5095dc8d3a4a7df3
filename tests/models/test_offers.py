"""Layers that read what layers below offer in the same pass: in whatever pieces a text is read, it is the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from subquad.core.errors import ConfigError
from subquad.core.layout import Layout
from subquad.models.config import ModelConfig
from subquad.models.stack import Block, Stack, plainly

V = 29
ATTENTION = {"mixer": "attention", "n_heads": 2, "n_kv_heads": 1, "head_dim": 4}
MEMORY = {"mixer": "memmamba", "state_dim": 2, "summary_dim": 4, "take_above": 0.4, "recall_above": 0.2}
# Pools of several sizes, a layer between that offers nothing, one read by two, and one that is read and reads.
LAYERS = [MEMORY | {"pool": 3}, ATTENTION, MEMORY | {"pool": 5, "below": 1}, MEMORY | {"pool": 2, "below": 2}]
# Of float64: thousands of roundings of 1e-16 in another order.
EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}


def build(layers: Sequence[dict[str, Any]] = LAYERS) -> Stack:
    torch.manual_seed(0)
    model = Stack(ModelConfig(V, 8, 12, tuple(layers))).double().requires_grad_(False)
    for p in model.parameters():
        p.add_(0.5 * torch.randn_like(p))
    return model


@pytest.fixture(scope="module")
def model() -> Stack:
    return build()


def text(b: int, t: int, seed: int = 1) -> Tensor:
    return torch.randint(V, (b, t), generator=torch.Generator().manual_seed(seed))


def in_pieces(model: Stack, tokens_bt: Tensor, cuts: Sequence[int], layout: Layout | None = None) -> Tensor:
    b, t = tokens_bt.shape
    layout, state, found = layout or Layout.dense(b, t), model.init_state(b, t), list[Tensor]()
    for start, stop in zip([0, *cuts], [*cuts, t], strict=True):
        hidden_btd, update = model.read(tokens_bt[:, start:stop], state, layout=layout.narrow(start, stop))
        state = update.commit()
        found.append(hidden_btd)
    return torch.cat(found, dim=1)


def test_pieces_and_single_steps_equal_a_whole_text(model: Stack) -> None:
    tokens_bt = text(2, 150)
    whole_btd = model.hidden(tokens_bt)
    for cuts in ([1, 64, 65, 130], [70], range(1, 150)):
        torch.testing.assert_close(in_pieces(model, tokens_bt, cuts), whole_btd, **EXACT)


def test_the_pools_below_are_read(model: Stack) -> None:
    """Without them the layers above say something else, from the first token that has a note before it."""
    alone = build([{k: v for k, v in layer.items() if k != "below"} for layer in LAYERS])
    alone.load_state_dict(model.state_dict())
    tokens_bt = text(1, 20)
    apart_t = (alone.hidden(tokens_bt) - model.hidden(tokens_bt)).abs().amax((0, 2))
    assert apart_t[0] == 0 and apart_t.max() > 1e-3


def test_a_commit_at_every_n_goes_on_exactly(model: Stack) -> None:
    prompt_bt, draft_bt, follow_bt = text(3, 19), text(3, 6, 2), text(3, 5, 3)
    for n in range(7):
        n_b = torch.tensor([n, 6 - n, 0])
        pool = model.init_pool(3, 40, 6)
        model.read(prompt_bt, model.init_state(3))[1].commit_(pool)
        model.read(draft_bt, pool)[1].commit_(pool, None, n_b)
        hidden_btd, _ = model.read(follow_bt, pool)
        for row, kept in enumerate(n_b.tolist()):
            true_t = torch.cat((prompt_bt[row], draft_bt[row, :kept], follow_bt[row]))
            torch.testing.assert_close(hidden_btd[row], model.hidden(true_t[None])[0, -5:], **EXACT)


def test_packed_and_padded_texts_equal_texts_alone(model: Stack) -> None:
    documents = [[5, 66, 1, 20], [40, 2, 3]]
    layout = Layout.packed(documents)
    tokens_bt = text(*layout.shape)
    for hidden_btd in (model.hidden(tokens_bt, layout), in_pieces(model, tokens_bt, [3, 5, 45, 72], layout)):
        for i, row in enumerate(documents):
            parts = zip(hidden_btd[i, : sum(row)].split(row), tokens_bt[i, : sum(row)].split(row), strict=True)
            for got_td, tokens_t in parts:
                torch.testing.assert_close(got_td, model.hidden(tokens_t[None])[0], **EXACT)


def checkpointed(block: Any, x_btd: Tensor, layout: Layout, *shared: Any) -> Any:
    return checkpoint(block, x_btd, layout, *shared, use_reentrant=False)


def compiled(block: Any, x_btd: Tensor, layout: Layout, *shared: Any) -> Any:
    return torch.compile(block, backend="eager", fullgraph=True)(x_btd, layout, *shared)


@pytest.mark.parametrize("run", [checkpointed, compiled], ids=lambda run: run.__name__)
def test_runners_give_the_same_gradients(run: Callable[..., Any]) -> None:
    """Those of what a lower layer offers, and of the notes that it is made of, among them."""
    model, tokens_bt, found = build().requires_grad_(True), text(2, 70), []
    for way in (plainly, run):
        model.zero_grad()
        model.hidden(tokens_bt, run=way).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() >= {f"blocks.{i}.mixer.note.weight" for i in (0, 2, 3)}
    for name, want in found[0].items():
        torch.testing.assert_close(found[1][name], want, **EXACT, msg=name)


def test_who_neither_reads_nor_is_read_is_called_as_ever() -> None:
    seen: list[int] = []

    def run(block: Any, x_btd: Tensor, layout: Layout, *shared: Any) -> Any:
        assert isinstance(block, Block)
        seen.append(len(shared))
        return block(x_btd, layout, *shared)

    build(LAYERS[:2] * 2).hidden(text(1, 5), run=run)
    assert seen == [0, 0, 0, 0]
    seen.clear()
    build([MEMORY, *LAYERS]).hidden(text(1, 5), run=run)
    assert seen == [0, 1, 0, 1, 1]


def test_what_is_not_offered_is_said(model: Stack) -> None:
    with pytest.raises(ConfigError, match="layer 2: expected below of at most 1, the memmamba layers under it, got 2"):
        build([MEMORY, ATTENTION, MEMORY | {"below": 2}])
    with pytest.raises(ConfigError, match="layer 1: expected summary_dim=5, as in layer 0 whose notes it reads, got 4"):
        build([MEMORY | {"summary_dim": 5}, MEMORY | {"below": 1}])
    with pytest.raises(ConfigError, match=r"parts\[1\]: expected a mixer that reads nothing of the layers below"):
        build([MEMORY, {"mixer": "parallel", "parts": (ATTENTION, MEMORY | {"below": 1})}])
    with pytest.raises(ConfigError, match="shared: expected what 2 memmamba layers below offer, got nothing"):
        model.blocks[3].mixer(torch.randn(1, 3, 8, dtype=torch.float64))
    fewer = Stack(dataclasses.replace(model.config, layers=model.config.layers[:3]))
    fewer.blocks[0].mixer = fewer.blocks[1].mixer  # put there afterwards
    with pytest.raises(ConfigError, match="layer 2: expected below of at most 0"):
        fewer.hidden(text(1, 3))
