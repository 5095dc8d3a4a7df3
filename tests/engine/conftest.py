"""Small models in float64, and an engine run to its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import pytest
import torch
from torch import Tensor

from subquad.core.registry import methods
from subquad.engine.draft import Draft, Drafter
from subquad.engine.engine import Engine
from subquad.engine.generate import generate
from subquad.engine.history import History
from subquad.engine.request import Limits, Piece
from subquad.engine.sampler import Sampler
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack

V = 29
ATTENTION = {"mixer": "attention", "n_heads": 2, "n_kv_heads": 1, "head_dim": 8}
# One example of each registered mixer that decodes.
MIXERS = {
    slug: {"mixer": slug, **next(iter(card.examples.values()))}
    for slug, card in methods("mixers").items()
    if card.causal and card.splittable
}
PROMPTS = [[1, 2, 3], [5], [9, 8, 17, 6, 5, 4, 3, 2, 1, 10, 11], [4, 4, 20, 21, 22]]


def build(layer: Mapping[str, Any]) -> Stack:
    torch.manual_seed(0)
    bare = {k: v for k, v in layer.items() if k != "d_model"}
    model = Stack(ModelConfig(V, layer.get("d_model", 32), 48, (bare,)))
    with torch.no_grad():
        for p in model.parameters():  # far from uniform logits, and no special starts
            p.add_(0.1 * torch.randn_like(p))
    return model.double().requires_grad_(False)


@pytest.fixture
def model() -> Stack:
    return build(ATTENTION)


def plain(model: Stack, prompts: Sequence[Sequence[int]], n: int) -> list[list[int]]:
    """Greedy continuations, each prompt alone."""
    limits = Limits(n, end_tokens=[])
    return [generate(model, [prompt], limits=limits)[0].tokens for prompt in prompts]


def drain(engine: Engine, before_step: Callable[[int], None] = lambda step: None) -> dict[int, list[Piece]]:
    """All pieces of every request."""
    got: dict[int, list[Piece]] = {}
    step = 0
    while engine.busy:
        before_step(step)
        for piece in engine.step():
            assert not got.get(piece.row) or got[piece.row][-1].finish is None
            got.setdefault(piece.row, []).append(piece)
        step += 1
        assert step < 500
    return got


def tokens(pieces: Sequence[Piece]) -> list[int]:
    return [piece.token for piece in pieces]


class Oracle(Drafter):
    """Knows what comes, and makes the first ``right(text, round)`` guesses right and the next ones wrong.

    Args:
        texts: prompt and true continuation of every request.
        right: right guesses, of a text by its number and how many rounds it has had.
    """

    def __init__(self, texts: Sequence[Sequence[int]], right: Callable[[int, int], int]) -> None:
        self.texts, self.right = [list(text) for text in texts], right
        # Of each slot, the number of its text, how much of it is told, and its rounds.
        self.slots: list[tuple[int, int, int]] = []

    @classmethod
    def build(cls, options: Mapping[str, str], models: Callable[[str], Stack], behind: Drafter | None) -> Self:
        raise NotImplementedError

    def open(self, target: Stack, rows: int, capacity: int) -> None:
        self.slots = [(0, 0, 0)] * rows

    def prepare(self, rows: int, k: int) -> None:
        pass

    def put(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        for row, prompt in zip(rows, prompts, strict=True):
            told = list(prompt)
            text = next(i for i, text in enumerate(self.texts) if text[: len(told)] == told)
            self.slots[row] = (text, len(told), 0)

    def propose(self, rows: int, k: int, sampler: Sampler, history: History) -> Draft:
        guesses: list[list[int]] = []
        for text, told, turn in self.slots[:rows]:
            coming = [*self.texts[text][told : told + k], *[0] * k][:k]
            right = self.right(text, turn)
            guesses.append([t if i < right else (t + 1) % V for i, t in enumerate(coming)])
        return Draft(torch.tensor(guesses), torch.full((rows,), k))

    def observe(self, tokens_bt: Tensor, n_b: Tensor, hidden_btd: Tensor) -> None:
        assert hidden_btd.shape[:2] == tokens_bt.shape
        for slot, (row, n) in enumerate(zip(tokens_bt.tolist(), n_b.tolist(), strict=True)):
            text, told, turn = self.slots[slot]
            if n:
                assert row[:n] == self.texts[text][told : told + n]
                self.slots[slot] = (text, told + n, turn + 1)

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        for source, target in zip(sources, targets, strict=True):
            self.slots[target] = self.slots[source]


class Letters:
    """Token i is the i-th letter."""

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        return "".join(chr(ord("A") + i) for i in ids)
