"""Rows of a state in one buffer for each dtype: what is copied often is copied in as many launches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from subquad.core.state import State


@dataclass(frozen=True)
class Packed:
    """A state whose tensors lie side by side, ``[b, n]`` for each dtype.

    Attributes:
        kind: how the tensors make a state.
        leaves: dtype and shape of a row of each.
        buffers: by dtype.

    Example:
        >>> import torch
        >>> from subquad.models.config import ModelConfig
        >>> from subquad.models.stack import Stack
        >>> layer = {"mixer": "attention", "n_heads": 2, "n_kv_heads": 1, "head_dim": 8}
        >>> state = Stack(ModelConfig(11, 16, 32, (layer,))).init_state(3, capacity=4)
        >>> row = Packed.of(state).row(1)
        >>> row.nbytes * 3 == state.nbytes, row.state().seen_b
        (True, tensor([0]))
    """

    kind: pytree.TreeSpec
    leaves: tuple[tuple[torch.dtype, torch.Size], ...]
    buffers: Mapping[torch.dtype, Tensor]

    @staticmethod
    def of(state: State, out: Mapping[torch.dtype, Tensor] | None = None) -> Packed:
        """Copies of all rows.

        Args:
            state: of b rows.
            out: memory for it by dtype, at least as many numbers as `state` has, one after the other; None allocates.
        """
        tensors, kind = pytree.tree_flatten(state)
        sides: dict[torch.dtype, list[Tensor]] = {}
        for x in tensors:
            sides.setdefault(x.dtype, []).append(x.detach().flatten(1) if x.ndim > 1 else x.detach()[:, None])
        buffers: dict[torch.dtype, Tensor] = {}
        for dtype, some in sides.items():
            b, n = len(some[0]), sum(x.shape[1] for x in some)
            room = some[0].new_empty(b, n) if out is None else out[dtype][: b * n].view(b, n)
            buffers[dtype] = torch.cat(some, dim=1, out=room)
        return Packed(kind, tuple((x.dtype, x.shape[1:]) for x in tensors), buffers)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return sum(x.nbytes for x in self.buffers.values())

    def row(self, i: int) -> Packed:
        """Row `i` alone, copied."""
        return Packed(self.kind, self.leaves, {dtype: x[i : i + 1].clone() for dtype, x in self.buffers.items()})

    def state(self) -> Any:
        """The state, in the same memory."""
        sides = {dtype: iter(x.split(self._widths(dtype), dim=1)) for dtype, x in self.buffers.items()}
        tensors = [
            next(sides[dtype]).unflatten(1, shape) if shape else next(sides[dtype])[:, 0]
            for dtype, shape in self.leaves
        ]
        return pytree.tree_unflatten(tensors, self.kind)

    def _widths(self, dtype: torch.dtype) -> list[int]:
        return [prod(shape) for own, shape in self.leaves if own == dtype]
