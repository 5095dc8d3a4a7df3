"""A decode step, reading and committing in place, is one graph without a break for every mixer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from subquad.core.registry import methods
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack, StackState

ATTENTION = {"mixer": "attention", "n_heads": 2, "n_kv_heads": 1, "head_dim": 8, "rotary": {"theta": 1e4, "dim": 8}}
CASES = {
    f"{slug}-{name}": [{"mixer": slug, **example}]
    for slug, card in methods("mixers").items()
    if card.causal
    for name, example in card.examples.items()
}
# Layers share nothing but the pool, so one mixed stack is enough.
CASES["hybrid"] = [*CASES["gla-paper"], ATTENTION]


@pytest.mark.parametrize("case", CASES)
def test_a_compiled_decode_step_has_no_break_and_the_same_tokens(case: str) -> None:
    torch.compiler.reset()
    layers = tuple({k: v for k, v in layer.items() if k != "d_model"} for layer in CASES[case])
    model = Stack(ModelConfig(vocab_size=50, d_model=CASES[case][0]["d_model"], d_mlp=32, layers=layers))
    model.requires_grad_(False)
    plain, compiled = model.init_state(2, 12), model.init_state(2, 12)

    def step(tokens_bt: Tensor, pool: StackState) -> Tensor:
        hidden_btd, update = model.read(tokens_bt, pool)
        update.commit_(pool)
        return model.head(hidden_btd[:, -1])

    prompt_bt = torch.randint(50, (2, 5))
    step(prompt_bt, plain)
    tokens_bt = step(prompt_bt, compiled).argmax(-1, keepdim=True)
    fast = torch.compile(step, backend="aot_eager", fullgraph=True)
    for _ in range(4):
        want, got = step(tokens_bt, plain), fast(tokens_bt, compiled)
        torch.testing.assert_close(got, want)
        tokens_bt = want.argmax(-1, keepdim=True)
    for (name, a), (_, b) in zip(compiled.tensors(), plain.tensors(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")
