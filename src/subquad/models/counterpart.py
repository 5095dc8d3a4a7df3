"""Where a tensor of a new mixer began: which heads of the attention that stood there it was made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from subquad.models.stack import Stack

SAMPLES = 4096
# A later candidate must be nearer than by rounding.
CLEARLY = 1 - 1e-4


@dataclass(frozen=True)
class Base:
    """Where a tensor of the student began: heads of one tensor of the teacher, in any order, some perhaps repeated.

    ``base = factor * cat(split(teacher[name], size, axis)[i] for i in heads)``; a `size` of 0 is the tensor as it is.
    """

    name: str
    factor: float = 1.0
    axis: int = 0
    size: int = 0
    heads: Sequence[int] = ()

    def of(self, teacher: Mapping[str, Tensor]) -> Tensor:
        """The base, from the teacher's tensors."""
        x = teacher[self.name]
        if self.size:
            at = torch.tensor(self.heads, device=x.device)
            x = x.unflatten(self.axis, (-1, self.size)).index_select(self.axis, at)
            x = x.flatten(self.axis, self.axis + 1)
        return x if self.factor == 1.0 else self.factor * x


def began(value: Tensor, teacher: Stack, layer: int) -> Base | None:
    """The heads of the layer's tensors that are nearest to `value`, or None where nothing is nearer than zero.

    Found in the numbers, this holds for every mapping from attention that copies, repeats or chooses heads, and
    stays true when a mapping is changed.
    """
    mixer = teacher.blocks[layer].mixer
    size: int | None = getattr(mixer.config, "head_dim", None)
    if size is None or not value.is_floating_point():
        return None
    best, least = None, 1.0
    # Linear mixers have no scale of their own, and take attention's into their queries.
    factors = (1.0, float(getattr(mixer, "scale", 1.0)))
    for name, x in mixer.state_dict().items():
        for axis in range(value.dim() if x.dim() == value.dim() else 0):
            others = [n for n in range(value.dim()) if n != axis]
            if any(x.shape[n] != value.shape[n] for n in others) or value.shape[axis] % size or x.shape[axis] % size:
                continue
            ours_hn, theirs_gn = _sample(value, axis, size), _sample(x, axis, size).to(value.device)
            for factor in factors:
                # Not by squares and products, whose rounding hides that two are equal.
                exact = "donot_use_mm_for_euclid_dist"
                near_h = torch.cdist(ours_hn, factor * theirs_gn, compute_mode=exact).min(1)
                off = float(near_h.values.norm() / ours_hn.norm())
                if off < least * CLEARLY:
                    heads = tuple(near_h.indices.tolist())
                    best, least = Base(f"blocks.{layer}.mixer.{name}", factor, axis, size, heads), off
                    if heads == tuple(range(len(theirs_gn))):
                        best = Base(best.name, factor)
    return best


def _sample(x: Tensor, axis: int, size: int) -> Tensor:
    """``[h, n]``: the same few numbers of every head along `axis`, enough to tell one head from another."""
    head_hd = x.movedim(axis, 0).unflatten(0, (-1, size)).flatten(1)
    # An odd step, which no power of two among the sizes makes fall on one row only.
    return head_hd[:, :: head_hd.shape[1] // SAMPLES | 1].to(torch.promote_types(x.dtype, torch.float32))


def distance(x: Tensor, y: Tensor | None = None) -> float:
    """``|x - y|``, of all elements; from zero when there is no y."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return float((x.to(wide) if y is None else x.to(wide) - y.to(x.device, wide)).norm())
