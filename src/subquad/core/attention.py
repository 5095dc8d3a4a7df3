"""A softmax attention as plain data: what a teacher adapter writes and a mixer's mapping reads."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class RotarySpec:
    """Rotary position embedding (arXiv 2104.09864) with its context extension.

    Attributes:
        theta: base of the frequencies.
        dim: number of rotated channels of a head, even; the rest pass through.
        scaling: ``rope_type`` (``linear``, ``llama3`` or ``yarn``) and its parameters under the names used by
            Hugging Face configs; empty for plain RoPE.
    """

    theta: float
    dim: int
    scaling: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AttentionWeights:
    """Weights and numerics of one attention layer, in ``nn.Linear`` orientation ``[out, in]``.

    Attributes:
        q_weight, k_weight, v_weight, o_weight: ``[h k, d]``, ``[g k, d]``, ``[g v, d]``, ``[d, h v]`` for h query heads
            and g key/value heads.
        q_bias, k_bias, v_bias, o_bias: biases or None.
        q_norm, k_norm: weights ``[k]`` of the per-head RMS norms before RoPE, or None.
        n_heads, n_kv_heads, head_dim: h, g and k; h is a multiple of g, and query head i reads key/value head
            ``i // (h // g)``.
        scale: factor on the scores.
        norm_eps: epsilon of the per-head norms.
        rotary: position embedding, or None.
        window: tokens a query may see, itself included, or None for all.
    """

    q_weight: Tensor
    k_weight: Tensor
    v_weight: Tensor
    o_weight: Tensor
    n_heads: int
    n_kv_heads: int
    head_dim: int
    scale: float
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    norm_eps: float = 1e-6
    rotary: RotarySpec | None = None
    window: int | None = None

    def config_fields(self) -> dict[str, Any]:
        """Shape and numerics as the ``Config`` of an attention-like mixer names them."""
        return {
            "d_model": self.q_weight.shape[1],
            "n_heads": self.n_heads,
            "n_kv_heads": self.n_kv_heads,
            "head_dim": self.head_dim,
            "rotary": None if self.rotary is None else asdict(self.rotary),
            "qkv_bias": self.q_bias is not None,
            "o_bias": self.o_bias is not None,
            "qk_norm": self.q_norm is not None,
            "norm_eps": self.norm_eps,
            "scale": self.scale,
        }


@dataclass(frozen=True)
class AttentionStats:
    """What an attention does on real text, measured per query head.

    Attributes:
        lookback_h: mean distance in tokens between a query and what it attends to.
        output_rms_h: root mean square of the head's output before the output projection.
        inputs_btd: a sample of the layer's normed inputs, a few rows that start at position 0, or None.
    """

    lookback_h: Tensor
    output_rms_h: Tensor
    inputs_btd: Tensor | None = None
