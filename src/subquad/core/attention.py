"""A softmax attention as plain data: what a teacher adapter writes and a mixer's mapping reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from subquad.core.errors import ConfigError


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

    def query_heads(self, kv_heads: Sequence[int]) -> list[int]:
        """The query heads that read `kv_heads`, in that order.

        Raises:
            ConfigError: no head, a head given twice, or one that is not there.
        """
        heads = list(kv_heads)
        if not heads or len(set(heads)) < len(heads) or not all(0 <= g < self.n_kv_heads for g in heads):
            raise ConfigError(
                f"kv_heads: expected different heads from 0 to {self.n_kv_heads - 1}, got {heads}; name each once"
            )
        r = self.n_heads // self.n_kv_heads
        return [g * r + i for g in heads for i in range(r)]

    def heads(self, kv_heads: Sequence[int]) -> AttentionWeights:
        """The part of this attention with these key/value heads and the query heads that read them.

        ``sum over parts of part(x) = attention(x)`` where every head is in exactly one part. The output bias is no
        head's: it goes with key/value head 0, so that it enters the sum once.

        Args:
            kv_heads: indices, each once; the part holds its heads in this order.

        Raises:
            ConfigError: no head, a head given twice, or one that is not there.
        """
        q_heads, k = self.query_heads(kv_heads), self.head_dim

        def rows(weight: Tensor, heads: Sequence[int]) -> Tensor:
            at_h = torch.tensor(list(heads), device=weight.device)
            return weight.unflatten(0, (-1, k)).index_select(0, at_h).flatten(0, 1)

        def bias(values: Tensor | None, heads: Sequence[int]) -> Tensor | None:
            return None if values is None else rows(values, heads)

        return replace(
            self,
            q_weight=rows(self.q_weight, q_heads),
            k_weight=rows(self.k_weight, kv_heads),
            v_weight=rows(self.v_weight, kv_heads),
            o_weight=rows(self.o_weight.mT, q_heads).mT,
            q_bias=bias(self.q_bias, q_heads),
            k_bias=bias(self.k_bias, kv_heads),
            v_bias=bias(self.v_bias, kv_heads),
            o_bias=self.o_bias if 0 in kv_heads else None,
            n_heads=len(q_heads),
            n_kv_heads=len(kv_heads),
        )


@dataclass(frozen=True)
class AttentionStats:
    """What an attention does on real text, measured per query head.

    Attributes:
        lookback_h: mean distance in tokens between a query and what it attends to.
        output_rms_h: root mean square of the head's output before the output projection.
        inputs_btd: a sample of the layer's normed inputs, a few rows that start at position 0, or None.
        median_h: median of that distance over what is attended beside the document's first tokens, or None. Attention
            is parked on those, which draws the mean out to half the text.
        entropy_h: mean entropy in nats of the attention beside those tokens, so that a query reads about
            ``exp(entropy)`` tokens, or None.
    """

    lookback_h: Tensor
    output_rms_h: Tensor
    inputs_btd: Tensor | None = None
    median_h: Tensor | None = None
    entropy_h: Tensor | None = None

    @property
    def half_life_h(self) -> Tensor:
        """Of the exponential decay nearest to the head, in tokens: the shorter of its distance and its breadth.

        Weights ``2^(-j / H)`` have their median at H, so the median look-back is one estimate (the mean look-back where
        there is no median). Their entropy is ``1 + ln(H / ln 2)``, so ``H = ln 2 exp(entropy - 1)`` is the other: a
        head that picks a few far tokens is followed by no decay, and a long one would only add what it does not read.
        """
        far_h = self.lookback_h if self.median_h is None else self.median_h
        if self.entropy_h is None:
            return far_h
        return torch.minimum(far_h, math.log(2.0) * (self.entropy_h - 1).exp())

    @property
    def write_h(self) -> Tensor | None:
        """Share in (0, 1] of the old that a delta rule should replace: ``2 / (1 + exp(entropy))``, or None.

        A running mean ``m <- (1 - beta) m + beta v`` is as steady as a mean over ``(2 - beta) / beta`` values alike
        (the inverse of the sum of its squared weights). A head reads about ``exp(entropy)`` tokens at once: a peaked
        one overwrites, a diffuse one averages.
        """
        return None if self.entropy_h is None else 2.0 / (1.0 + self.entropy_h.exp())

    def heads(self, q_heads: Sequence[int]) -> AttentionStats:
        """The same of these query heads only: whatever has an ``h`` among the axes of its name is sliced there."""

        def slice_(name: str, value: Tensor) -> Tensor:
            axis = name.rpartition("_")[2].find("h")
            return value if axis < 0 else value.index_select(axis, torch.tensor(list(q_heads), device=value.device))

        measured = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: slice_(k, v) for k, v in measured.items() if isinstance(v, Tensor)})
