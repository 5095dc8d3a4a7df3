"""The fixed buffers of a decoding layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from subquad.core.state import State, axes, precise


@dataclass(frozen=True)
class DecodeState(State):
    """A layer's states, each with what the pending block wrote and with the convolution's last inputs.

    Rings are indexed by the position of a token, modulo their length. A step reads the convolution's inputs at
    positions ``[seen + n - (w - 1), seen + n)`` and the pending tokens at ``[seen, seen + n)``, and writes both at
    ``[seen + n, seen + n + t)``. With room for ``w - 1 + t`` inputs and ``2 t`` pending tokens none of these slots
    meet, so that programs of one launch, which share keys and inputs, need no order among them.

    Of a pending token the ring holds what it adds to the state, ``k u^T``, and its decay, not its projections: once
    read, u stands, whatever is accepted, since no accepted token follows a rejected one. A token is read with k and u
    as they are rounded here, so that it sees the same past pending and committed.

    Attributes:
        recurrent_bhkv: states without the pending tokens.
        inputs_brd: inputs of the convolution, channels in the order v, k, q.
        keys_bnhk: keys as they enter the state; as many heads as the keys have.
        values_bnhv: what is written under them, u: beta v, or beta times the delta rule's error.
        decays_bnhk: log decays; k is 1 where all channels of a head share one.
    """

    recurrent_bhkv: Tensor = axes("b h k v", shard="h", precision="high")
    inputs_brd: Tensor = axes("b r d", shard="d")
    keys_bnhk: Tensor = axes("b n h k", shard="h")
    values_bnhv: Tensor = axes("b n h v", shard="h")
    decays_bnhk: Tensor = axes("b n h k", shard="h", precision="high")

    @property
    def block(self) -> int:
        """Most tokens of a block."""
        return self.keys_bnhk.shape[1] // 2

    @torch.no_grad()
    def load_(self, rows: Tensor, recurrent_bhkv: Tensor, conv_bdw: Tensor, seen_b: Tensor) -> None:
        """Start `rows` from committed states, as after a prompt of `seen_b` tokens; nothing is pending then.

        Args:
            rows: int64 ``[b]``.
            recurrent_bhkv: states behind the prompts.
            conv_bdw: the convolution's last ``w - 1`` inputs, the newest last.
            seen_b: tokens of each prompt.
        """
        self.recurrent_bhkv.index_copy_(0, rows, recurrent_bhkv.to(self.recurrent_bhkv.dtype))
        slots_bw = self._history(seen_b, conv_bdw.shape[2])
        self.inputs_brd[rows[:, None], slots_bw] = conv_bdw.mT.to(self.inputs_brd.dtype)

    def conv(self, rows: Tensor, seen_b: Tensor, width: int) -> Tensor:
        """The convolution's last ``width - 1`` inputs ``[b, d, w]`` before position `seen_b`, zeros before 0."""
        kept = self.inputs_brd[rows[:, None], self._history(seen_b, width - 1)]
        at_bw = seen_b[:, None] + torch.arange(1 - width, 0, device=seen_b.device)
        return kept.masked_fill((at_bw < 0)[..., None], 0).mT

    def _history(self, seen_b: Tensor, kept: int) -> Tensor:
        at_bw = seen_b[:, None] + torch.arange(-kept, 0, device=seen_b.device)
        return at_bw % max(self.inputs_brd.shape[1], 1)


def init_pool(
    rows: int,
    block: int,
    *,
    heads: int,
    q_heads: int | None = None,
    k_heads: int | None = None,
    v_heads: int | None = None,
    key_dim: int,
    value_dim: int,
    conv_width: int = 0,
    key_decay: bool = False,
    state_dtype: torch.dtype | None = None,
    **factory: Any,
) -> DecodeState:
    """Zeros for `rows` sequences that read blocks of at most `block` tokens (K + 1 for K drafted ones).

    Args:
        rows: rows of the pool.
        block: most tokens of a block.
        heads, q_heads, k_heads, v_heads: of the state, and of q, k and v where they have fewer.
        key_dim, value_dim: their channels.
        conv_width: taps of the convolution, 0 for none.
        key_decay: each key channel has its own log decay (GLA).
        state_dtype: of the states; None is the factory's, but at least float32.
        factory: ``device``, and ``dtype`` of the rings, which is the activations'.
    """
    dtype = factory.get("dtype") or torch.get_default_dtype()
    high: dict[str, Any] = factory | {"dtype": precise(dtype)}
    state: dict[str, Any] = factory | {"dtype": state_dtype or precise(dtype)}
    q_heads, k_heads, v_heads = q_heads or heads, k_heads or heads, v_heads or heads
    channels = v_heads * value_dim + (k_heads + q_heads) * key_dim
    inputs = conv_width - 1 + block if conv_width > 1 else 0
    return DecodeState(
        torch.zeros(rows, heads, key_dim, value_dim, **state),
        torch.zeros(rows, inputs, channels, **factory),
        torch.zeros(rows, 2 * block, k_heads, key_dim, **factory),
        torch.zeros(rows, 2 * block, heads, value_dim, **factory),
        torch.zeros(rows, 2 * block, heads, key_dim if key_decay else 1, **high),
    )
