"""Which arithmetic training uses."""

from __future__ import annotations

import torch

from subquad.models.config import ModelConfig
from subquad.models.stack import Stack
from subquad.train.precision import frozen


def test_a_frozen_teacher_computes_what_autocast_does() -> None:
    layer = {"mixer": "attention", "n_heads": 2, "n_kv_heads": 1, "head_dim": 8, "qkv_bias": True}
    model = Stack(ModelConfig(vocab_size=11, d_model=16, d_mlp=32, layers=(layer, layer), tied=True))
    before = {name: (x, x.clone()) for name, x in model.named_parameters()}
    made = frozen(model)
    tokens_bt = torch.randint(11, (2, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        torch.testing.assert_close(made(tokens_bt), model(tokens_bt), rtol=0, atol=0)
    # The model stays as it was; what is no matrix of a linear layer is the model's own, the embedding too.
    assert all(x is before[name][0] and torch.equal(x, before[name][1]) for name, x in model.named_parameters())
    assert model.lm_head.weight is model.embed.weight is made.embed.weight
    assert made.norm.weight is model.norm.weight
    assert made.lm_head.weight.dtype == made.blocks[0].mixer.qkv.q_proj.bias.dtype == torch.bfloat16
    assert not made.lm_head.weight.requires_grad
