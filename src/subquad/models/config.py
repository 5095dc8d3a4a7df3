"""What a model is: sizes, numerics, and a list of layers that each name their mixer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from subquad.core.errors import ConfigError


@dataclass(frozen=True)
class ModelConfig:
    """A pre-norm language model with SwiGLU blocks, or with none.

    Attributes:
        vocab_size: rows of the embedding.
        d_model: width.
        d_mlp: hidden width of the SwiGLU; 0 is none, and blocks of a mixer alone.
        layers: one mapping a block: ``mixer`` (a slug) and the fields of that mixer's ``Config`` less ``d_model``.
        norm_eps: epsilon of the RMS norms.
        tied: the head shares the embedding's weights.
        mlp_bias: biases in the SwiGLU.
        max_positions: context the model was trained for, in tokens.
        eos_tokens: token ids that end a text.
    """

    vocab_size: int
    d_model: int
    d_mlp: int
    layers: tuple[Mapping[str, Any], ...]
    norm_eps: float = 1e-5
    tied: bool = False
    mlp_bias: bool = False
    max_positions: int = 2048
    eos_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Take lists from JSON, and refuse a layer without a mixer."""
        object.__setattr__(self, "layers", tuple(dict(layer) for layer in self.layers))
        object.__setattr__(self, "eos_tokens", tuple(self.eos_tokens))
        for i, layer in enumerate(self.layers):
            if "mixer" not in layer:
                raise ConfigError(f"layers[{i}]: expected a key 'mixer', got {sorted(layer)}; name the layer's mixer")
