"""The projections in front of a recurrent mixer: q, k, v, a short convolution over them, per-head norms and RoPE."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.core.attention import AttentionWeights, RotarySpec
from subquad.core.errors import ConfigError, nearest
from subquad.core.layout import Layout
from subquad.core.state import State, axes, precise
from subquad.ops import rope, short_conv

ACTIVATIONS = ("silu", "none")


@dataclass(frozen=True)
class RecurrentState(State):
    """What a recurrence behind `ConvQKV` remembers: a matrix per head, and the last inputs of the convolution."""

    recurrent_bhkv: Tensor = axes("b h k v", shard="h", precision="high")
    conv_bdw: Tensor = axes("b d w", shard="d")


class ConvQKV(nn.Module):
    """Project ``[b, t, d]`` to queries, keys and values, each with its own number of heads.

    The convolution runs over the channels of v, k and q in this order, which is the order of x, B, C in Mamba-2's code.

    Args:
        d_model: width of the model.
        n_heads, key_dim, value_dim: heads of the recurrence and their channels.
        n_kv_heads: heads of keys and values when fewer (grouped queries); divides n_heads.
        n_groups: heads of queries and keys when fewer (the paper's groups); divides n_heads.
        conv_width: taps of the convolution, 0 for none.
        activation: ``silu`` or ``none``, on q, k and v behind the convolution.
        bias: add biases to the projections.
        qk_norm: RMS norm of every query and key head before RoPE, with epsilon `norm_eps`.
        rotary: position embedding, or None.

    Raises:
        ConfigError: heads that do not divide, both kinds of grouping, or an unknown activation.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        key_dim: int,
        value_dim: int,
        *,
        n_kv_heads: int | None,
        n_groups: int | None,
        conv_width: int,
        activation: str,
        bias: bool,
        qk_norm: bool,
        norm_eps: float,
        rotary: RotarySpec | None,
    ) -> None:
        super().__init__()
        if n_kv_heads is not None and n_groups is not None:
            raise ConfigError(
                f"expected n_kv_heads (fewer keys and values) or n_groups (fewer queries and keys), got both, "
                f"{n_kv_heads} and {n_groups}; leave one out"
            )
        for name, n in (("n_kv_heads", n_kv_heads), ("n_groups", n_groups)):
            if n is not None and (n < 1 or n_heads % n):
                raise ConfigError(f"n_heads={n_heads} must be a multiple of {name}={n}; change one of them")
        if activation not in ACTIVATIONS:
            raise ConfigError(f"unknown activation {activation!r}{nearest(activation, ACTIVATIONS)}")
        self.n_heads, self.key_dim, self.value_dim = n_heads, key_dim, value_dim
        self.q_heads, self.k_heads, self.v_heads = (
            n_groups or n_heads,
            n_groups or n_kv_heads or n_heads,
            n_kv_heads or n_heads,
        )
        self.activation, self.rotary = activation, rotary
        self.q_proj = nn.Linear(d_model, self.q_heads * key_dim, bias=bias)
        self.k_proj = nn.Linear(d_model, self.k_heads * key_dim, bias=bias)
        self.v_proj = nn.Linear(d_model, self.v_heads * value_dim, bias=bias)
        self.q_norm = nn.RMSNorm(key_dim, eps=norm_eps) if qk_norm else None
        self.k_norm = nn.RMSNorm(key_dim, eps=norm_eps) if qk_norm else None
        self.channels = (self.q_heads + self.k_heads) * key_dim + self.v_heads * value_dim
        self.conv_weight = self.conv_bias = None
        if conv_width:
            self.conv_weight = nn.Parameter(torch.empty(self.channels, conv_width).uniform_(-1, 1) * conv_width**-0.5)
            self.conv_bias = nn.Parameter(torch.zeros(self.channels))

    @classmethod
    def of(cls, config: Any) -> Self:
        """Build from a mixer's ``Config``, which has fields of the same names, `rotary` as a mapping or None."""
        return cls(
            config.d_model,
            config.n_heads,
            config.key_dim,
            config.value_dim,
            n_kv_heads=config.n_kv_heads,
            n_groups=config.n_groups,
            conv_width=config.conv_width,
            activation=config.activation,
            bias=config.bias,
            qk_norm=config.qk_norm,
            norm_eps=config.norm_eps,
            rotary=None if config.rotary is None else RotarySpec(**config.rotary),
        )

    def init_state(self, batch: int, value_dim: int | None = None, **factory: Any) -> RecurrentState:
        """Zeros before the first token, for values of another width where one is given.

        `factory` is ``device`` and ``dtype``.
        """
        width = 1 if self.conv_weight is None else self.conv_weight.shape[1]
        high: dict[str, Any] = factory | {"dtype": precise(factory["dtype"])}
        return RecurrentState(
            torch.zeros(batch, self.n_heads, self.key_dim, value_dim or self.value_dim, **high),
            torch.zeros(batch, self.channels, width - 1, **factory),
        )

    def forward(self, x_btd: Tensor, state_bdw: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys, values, and what stood before the convolution, from which `history` goes on."""
        inputs_btd = torch.cat((self.v_proj(x_btd), self.k_proj(x_btd), self.q_proj(x_btd)), dim=-1)
        mixed_btd = inputs_btd
        if self.conv_weight is not None:
            mixed_btd = short_conv.parallel(
                inputs_btd,
                self.conv_weight,
                self.conv_bias,
                state_bdw,
                documents_bt=layout.documents_bt,
                activation=self.activation,
            )
        elif self.activation == "silu":
            mixed_btd = F.silu(mixed_btd)
        sizes = (self.v_heads * self.value_dim, self.k_heads * self.key_dim, self.q_heads * self.key_dim)
        v_btd, k_btd, q_btd = mixed_btd.split(sizes, dim=-1)
        q_bthk, k_bthk = (x.unflatten(-1, (-1, self.key_dim)) for x in (q_btd, k_btd))
        if self.q_norm is not None and self.k_norm is not None:
            q_bthk, k_bthk = self.q_norm(q_bthk), self.k_norm(k_bthk)
        if self.rotary is not None:
            tables = rope.tables(self.rotary, layout, x_btd.dtype)
            q_bthk, k_bthk = rope.rotate_both(q_bthk, k_bthk, tables)
        return q_bthk, k_bthk, v_btd.unflatten(-1, (-1, self.value_dim)), inputs_btd

    @torch.no_grad()
    def take_(self, source: AttentionWeights) -> None:
        """Copy `source`'s projections, biases and norms, its scale into the queries; the convolution passes through.

        Where there are more key/value heads here than there, heads are repeated, so that query head i keeps its own.
        Of norms that have no place here the weights go into the projections, and their division is lost.
        """
        if (source.n_heads, source.head_dim) != (self.q_heads, self.key_dim) or self.k_heads % source.n_kv_heads:
            raise ConfigError(
                f"expected {source.n_heads} query heads of {source.head_dim} channels and a multiple of "
                f"{source.n_kv_heads} key heads as the attention has, got {self.q_heads} of {self.key_dim} and "
                f"{self.k_heads}; leave n_heads, key_dim and n_groups out"
            )
        h, g, one_k = source.n_heads, source.n_kv_heads, source.q_weight.new_ones(source.head_dim)
        q_norm_k = source.scale * (one_k if source.q_norm is None else source.q_norm)
        k_norm_k = one_k if source.k_norm is None else source.k_norm
        if self.q_norm is not None and self.k_norm is not None:
            # A norm erases the scale of what stands before it, so the scale goes into the norm's weight.
            self.q_norm.weight.copy_(q_norm_k)
            self.k_norm.weight.copy_(k_norm_k)
            q_norm_k = k_norm_k = one_k
        one_v = one_k.new_ones(self.value_dim)
        _spread(self.q_proj, source.q_weight, source.q_bias, (h, self.q_heads), q_norm_k)
        _spread(self.k_proj, source.k_weight, source.k_bias, (g, self.k_heads), k_norm_k)
        _spread(self.v_proj, source.v_weight, source.v_bias, (g, self.v_heads), one_v)
        if self.conv_weight is not None and self.conv_bias is not None:
            self.conv_weight.zero_()[:, -1] = 1
            self.conv_bias.zero_()


def copy_(linear: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    """Copy into `linear`; a missing bias is zero, and one that has no place is left out."""
    linear.weight.copy_(weight)
    for name, place in linear.named_parameters():
        if name == "bias":
            place.copy_(torch.zeros_like(place) if bias is None else bias)


def _spread(linear: nn.Linear, weight: Tensor, bias: Tensor | None, heads: tuple[int, int], factor_k: Tensor) -> None:
    """Copy a projection of ``heads[0]`` heads into one of ``heads[1]``, each channel of a head times its factor."""

    def spread(rows: Tensor) -> Tensor:
        by_head = rows.unflatten(0, (heads[0], -1)) * factor_k.reshape(-1, *[1] * (rows.dim() - 1))
        return by_head.repeat_interleave(heads[1] // heads[0], dim=0).flatten(0, 1)

    copy_(linear, spread(weight), None if bias is None else spread(bias))


def fields_of(source: AttentionWeights) -> dict[str, Any]:
    """The config fields of a recurrent mixer that has room for all that `source` holds."""
    biases = (source.q_bias, source.k_bias, source.v_bias, source.o_bias)
    return {
        "d_model": source.q_weight.shape[1],
        "n_heads": source.n_heads,
        "n_kv_heads": source.n_kv_heads,
        "key_dim": source.head_dim,
        "value_dim": source.v_weight.shape[0] // source.n_kv_heads,
        "bias": any(b is not None for b in biases),
        "qk_norm": source.q_norm is not None,
        "norm_eps": source.norm_eps,
        "rotary": None if source.rotary is None else dataclasses.asdict(source.rotary),
    }
