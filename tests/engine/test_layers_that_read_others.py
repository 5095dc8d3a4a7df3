"""Guesses verified by a model whose layers read the pools of those below: a part of a block is kept in all of them."""

from __future__ import annotations

import torch

from subquad.engine.engine import Engine
from subquad.engine.request import Limits, Request
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack

from .conftest import PROMPTS, Oracle, V, drain, plain, tokens

MEMORY = {"mixer": "memmamba", "state_dim": 2, "summary_dim": 4, "pool": 3, "take_above": 0.4, "recall_above": 0.2}


def test_any_numbers_of_right_guesses_give_the_tokens_of_whole_texts() -> None:
    torch.manual_seed(0)
    model, n = Stack(ModelConfig(V, 8, 12, (MEMORY, MEMORY | {"below": 1}))).double().requires_grad_(False), 11
    for p in model.parameters():
        p.add_(0.3 * torch.randn_like(p))
    expected = plain(model, PROMPTS, n)
    for prompt, found in zip(PROMPTS, expected, strict=True):
        logits_tv = model(torch.tensor([prompt + found[:-1]]))[0, len(prompt) - 1 :]
        assert logits_tv.argmax(-1).tolist() == found  # no state at all
    assert len({token for found in expected for token in found}) > 8
    drafter = Oracle([p + e for p, e in zip(PROMPTS, expected, strict=True)], lambda text, turn: (text + turn) % 5)
    engine = Engine(model, rows=4, capacity=32, drafter=drafter, draft_tokens=4, rounds=1)
    for prompt in PROMPTS:
        engine.submit(Request(prompt, Limits(n, end_tokens=[])))
    got = drain(engine)
    assert [tokens(got[row]) for row in range(4)] == expected
