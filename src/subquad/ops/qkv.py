"""The projections in front of every attention-like mixer: Q, K, V with biases, per-head norms and RoPE."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from subquad.core.attention import AttentionWeights, RotarySpec
from subquad.core.errors import ConfigError
from subquad.core.layout import Layout
from subquad.ops import rope, skinny


class QKV(nn.Module):
    """Project ``[b, t, d]`` to rotated queries ``[b, t, h, k]`` and keys, and values ``[b, t, g, k]``.

    Args:
        d_model: width of the model.
        n_heads, n_kv_heads, head_dim: h, g and k; h must be a multiple of g.
        bias: add biases.
        norm: RMS norm of every query and key head before RoPE.
        norm_eps: its epsilon.
        rotary: position embedding, or None.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        *,
        bias: bool = False,
        norm: bool = False,
        norm_eps: float = 1e-6,
        rotary: RotarySpec | None = None,
    ) -> None:
        super().__init__()
        if n_heads % n_kv_heads:
            raise ConfigError(f"n_heads={n_heads} must be a multiple of n_kv_heads={n_kv_heads}; change one of them")
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads, head_dim
        self.rotary = rotary
        self.q_proj = nn.Linear(d_model, n_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(d_model, n_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(d_model, n_kv_heads * head_dim, bias=bias)
        self.q_norm = nn.RMSNorm(head_dim, eps=norm_eps) if norm else None
        self.k_norm = nn.RMSNorm(head_dim, eps=norm_eps) if norm else None

    def forward(self, x_btd: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values."""
        q_bthk, k_btgk, v_btgk = self.project(x_btd)
        return *self.rotate(q_bthk, k_btgk, layout), v_btgk

    def project(self, x_btd: Tensor, norm: nn.RMSNorm | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys, values without position, of the input or of its `norm`."""
        projected = skinny.project(x_btd, self.q_proj, self.k_proj, self.v_proj, norm=norm)
        q_bthk, k_btgk, v_btgk = (x.unflatten(-1, (-1, self.head_dim)) for x in projected)
        if self.q_norm is not None and self.k_norm is not None:
            q_bthk, k_btgk = self.q_norm(q_bthk), self.k_norm(k_btgk)
        return q_bthk, k_btgk, v_btgk

    def rotate(self, q_bthk: Tensor, k_btgk: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """Queries and keys at their positions."""
        tables = self.tables(layout, q_bthk.dtype)
        return (q_bthk, k_btgk) if tables is None else rope.rotate_both(q_bthk, k_btgk, tables)

    def tables(self, layout: Layout, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """What turns queries and keys of `dtype` to their positions; None where they have none."""
        return None if self.rotary is None else rope.tables(self.rotary, layout, dtype)

    def rotate_back(self, k_bngk: Tensor, layout: Layout, window: int) -> Tensor:
        """Keys without position, as `project` gave them, of the oldest n of the `window` tokens before a block.

        Args:
            k_bngk: what `rotate` made of them.
            layout: the block's.
            window: tokens back from the block's first column to the first key.
        """
        if self.rotary is None:
            return k_bngk
        return rope.rotate(k_bngk, rope.tables_back(self.rotary, layout, window, k_bngk.shape[1], k_bngk.dtype))

    @torch.no_grad()
    def take_(self, source: AttentionWeights) -> None:
        """Copy the projections, biases and norms of `source`; shapes must agree."""
        copies = [(self.q_proj, source.q_weight, source.q_bias), (self.k_proj, source.k_weight, source.k_bias)]
        copies.append((self.v_proj, source.v_weight, source.v_bias))
        for linear, weight, bias in copies:
            linear.weight.copy_(weight)
            if bias is not None:
                linear.bias.copy_(bias)
        if (
            self.q_norm is not None
            and self.k_norm is not None
            and source.q_norm is not None
            and source.k_norm is not None
        ):
            self.q_norm.weight.copy_(source.q_norm)
            self.k_norm.weight.copy_(source.k_norm)
