"""Shapes that several benches decode: a real 8B model's with random weights, since speed does not ask what they say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from subquad.bench.harness import Bench
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack
from subquad.ops.decay import Decay

# Llama-3-8B; arXiv 2407.21783, table 3.
VOCAB_SIZE, D_MODEL, D_MLP, LAYERS = 128256, 4096, 14336, 32
ROTARY = {"theta": 5e5, "dim": 128}
ATTENTION = {"mixer": "attention", "n_heads": 32, "n_kv_heads": 8, "head_dim": 128, "rotary": ROTARY}
# What stands in an attention layer's place: as many heads, in groups as the attention's, and the usual four taps.
LINEAR = {
    "mixer": "gated_deltanet",
    "n_heads": 32,
    "n_kv_heads": 8,
    "key_dim": 128,
    "value_dim": 128,
    "conv_width": 4,
}
# Relative error of the logits of so many layers in bfloat16, read in one way or another; a wrong mask costs it all.
ROUNDING = 8e-2
# The same in little, which a CPU decodes at once.
TINY_ROTARY = {"theta": 1e4, "dim": 8}
TINY_ATTENTION = {"mixer": "attention", "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "rotary": TINY_ROTARY}
TINY_LINEAR = {"mixer": "gated_deltanet", "n_heads": 4, "n_kv_heads": 2, "key_dim": 8, "value_dim": 8, "conv_width": 4}


def shape_8b(bench: Bench, every: int) -> Stack:
    """Llama-3-8B's shape with attention in every `every`-th layer, 0 for none; under ``--smoke`` four tiny layers.

    The weights are drawn where they are kept, so that a card holds them once and no more.
    """
    kinds = bench.size((ATTENTION, LINEAR), smoke=(TINY_ATTENTION, TINY_LINEAR))
    layers = hybrid_layers(*kinds, count=bench.size(LAYERS, smoke=4), every=every)
    vocab_size, d_model, d_mlp = bench.size((VOCAB_SIZE, D_MODEL, D_MLP), smoke=(50, 32, 64))
    with torch.device("meta"):
        model = Stack(ModelConfig(vocab_size, d_model, d_mlp, layers, max_positions=1 << 16))
    model = model.to(bench.dtype).to_empty(device=bench.device).requires_grad_(False)
    generator = torch.Generator(bench.device).manual_seed(0)
    for name, x in model.named_parameters():
        if x.dim() > 1:
            x.normal_(std=0.02, generator=generator)
        else:
            x.fill_(1.0 if "norm" in name else 0.0)
    for part in model.modules():
        if isinstance(part, Decay):
            part.start_(None)
    return model


def hybrid_layers(
    attention: Mapping[str, Any], linear: Mapping[str, Any], *, count: int, every: int
) -> tuple[Mapping[str, Any], ...]:
    """`count` layers: attention in each `every`-th, the last of so many; linear in the rest, or in all for 0."""
    return tuple(attention if every and i % every == every - 1 else linear for i in range(count))


def tiny(bench: Bench, *layers: Mapping[str, Any]) -> Stack:
    """A model of these layers with weights from PyTorch's own start."""
    model = Stack(ModelConfig(vocab_size=50, d_model=32, d_mlp=64, layers=layers))
    return model.to(**bench.factory).requires_grad_(False)
